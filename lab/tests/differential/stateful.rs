//! Connections through a firewall that tracks and translates them: the same conversations through plain Linux and through
//! Towpath, which takes established connections over. Whatever comes out is compared, and in the end conntrack's entries.
//!
//! Both routers are liberal about TCP's windows (as Linux itself is with connections in a flowtable), since conntrack does
//! not see every segment of a connection that is taken over.

use crate::compare::Pair;
use crate::generate::Case;
use crate::random::Random;
use crate::router::{HOST_MACS, Profile, ROUTER_MACS, Router};
use anyhow::{Result, bail, ensure};
use etherparse::{PacketBuilder, PacketBuilderStep, TcpHeader, icmpv4};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use towpath_lab::wait_for;

/// The inner hosts' side, and the outer hosts'.
const INSIDE: usize = 0;
const OUTSIDE: usize = 1;

/// What the router does with addresses, beside letting connections from inside and to the forwarded ports through.
pub const RULES: &str = "
table inet stateful {
  chain forward {
    type filter hook forward priority filter; policy drop;
    meta l4proto esp accept
    ct state established,related accept
    ct state invalid drop
    iifname eth0 accept
    ct status dnat accept
  }
  chain prerouting {
    type nat hook prerouting priority dstnat;
    ip daddr 198.51.100.1 tcp dport 8080 dnat ip to 198.18.2.7:80
    ip daddr 198.51.100.1 udp dport 5300 dnat ip to 198.18.2.8:53
    ip6 daddr 2001:db8:1::1 tcp dport 8080 dnat ip6 to [2001:db8:102::7]:80
    ip6 daddr 2001:db8:1::1 udp dport 5300 dnat ip6 to [2001:db8:102::8]:53
  }
  chain postrouting {
    type nat hook postrouting priority srcnat;
    oifname eth1 ip saddr 198.19.1.0/24 masquerade
    oifname eth1 ip6 saddr 2001:db8:f00:1::/64 masquerade
  }
}";

/// Puts the rules into force.
pub fn configure(router: &Router) -> Result<()> {
    router.node.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", "1")?;
    router.node.sh(&format!("nft -f - <<'END'\n{RULES}\nEND")).map(drop)
}

/// The entries of conntrack, without what depends on the time.
pub fn entries(router: &Router) -> Result<Vec<String>> {
    let listed = ["ipv4", "ipv6"].map(|family| router.node.sh(&format!("conntrack -L -f {family} 2>/dev/null")));
    let mut entries = Vec::new();
    for line in listed.into_iter().collect::<Result<Vec<_>>>()?.iter().flat_map(|text| text.lines()) {
        // Protocol, its number, seconds left, then the rest.
        let mut words: Vec<&str> = line.split_whitespace().filter(|word| !word.starts_with("use=")).collect();
        ensure!(words.len() > 3, "not an entry: {line}");
        words.remove(2);
        entries.push(words.join(" "));
    }
    entries.sort();
    Ok(entries)
}

/// How the router translates a conversation.
#[derive(Clone, Copy)]
enum Kind {
    Plain,
    Masqueraded,
    /// From outside to one of the router's ports that lead to a host inside
    PortForwarded,
}

/// What one end sees: its own address and the other's.
#[derive(Clone, Copy)]
struct View {
    own: SocketAddr,
    other: SocketAddr,
}

/// One end of a conversation.
struct End {
    /// The router's port that it is behind
    port: usize,
    view: View,
    /// The next byte that it sends, and the next that it expects
    sequence: u32,
    expected: u32,
}

/// A connection and what is still to happen on it.
pub struct Conversation {
    /// Who opens it, and who answers
    ends: [End; 2],
    tcp: bool,
    /// Last step first
    steps: Vec<Step>,
    last: Option<Case>,
    identification: u16,
}

#[derive(Clone, Copy)]
enum Step {
    /// A segment or datagram from this end, with flags of TCP and so many bytes
    Send { from: usize, flags: u8, length: usize },
    /// What was sent last, once more
    Again,
    /// An ICMP error from this end about what the other might have sent
    Error { from: usize },
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const PUSH: u8 = 8;
const ACK: u8 = 16;

impl Conversation {
    /// One of any kind; `number` makes its ports its own.
    pub fn new(random: &mut Random, number: u16) -> Self {
        let kind = random.pick(&[Kind::Plain, Kind::Masqueraded, Kind::Masqueraded, Kind::PortForwarded]);
        let tcp = random.percent(70);
        let ends = ends(kind, random.percent(40), tcp, 1024 + number, random);
        let steps = if tcp { tcp_steps(random) } else { udp_steps(random) };
        Self { ends, tcp, steps, last: None, identification: random.word() }
    }

    /// A frame that carries the conversation on, if it is one from this port.
    fn next(&mut self, port: usize, random: &mut Random) -> Option<Case> {
        match *self.steps.last()? {
            Step::Send { from, flags, length } if self.ends[from].port == port => {
                self.steps.pop();
                let case = self.send(from, flags, &random.bytes(length));
                self.last = Some(case);
            }
            Step::Again if self.last.as_ref()?.port == port => drop(self.steps.pop()),
            Step::Error { from } if self.ends[from].port == port => {
                self.steps.pop();
                return self.error(from);
            }
            _ => return None,
        }
        self.last.clone()
    }

    fn send(&mut self, from: usize, flags: u8, payload: &[u8]) -> Case {
        let (end, tcp) = (&self.ends[from], self.tcp);
        self.identification = self.identification.wrapping_add(1);
        let ip = packet(end, self.identification);
        let mut bytes = Vec::new();
        if tcp {
            let mut header = TcpHeader::new(end.view.own.port(), end.view.other.port(), end.sequence, 64_000);
            header.fin = flags & FIN != 0;
            header.syn = flags & SYN != 0;
            header.psh = flags & PUSH != 0;
            header.ack = flags & ACK != 0;
            header.acknowledgment_number = if header.ack { end.expected } else { 0 };
            ip.tcp_header(header).write(&mut bytes, payload).expect("writing to memory");
        } else {
            let udp = ip.udp(end.view.own.port(), end.view.other.port());
            udp.write(&mut bytes, payload).expect("writing to memory");
        }
        let port = end.port;
        let taken = payload.len() as u32 + u32::from(flags & (FIN | SYN) != 0);
        self.ends[from].sequence = self.ends[from].sequence.wrapping_add(taken);
        self.ends[1 - from].expected = self.ends[from].sequence;
        Case { bytes, port, plain: false }
    }

    /// "Host unreachable" about a packet of the other end as this end would have got it; IPv4 only.
    fn error(&self, from: usize) -> Option<Case> {
        let end = &self.ends[from];
        if end.view.own.is_ipv6() {
            return None;
        }
        let received = View { own: end.view.other, other: end.view.own };
        let mut quoted = Vec::new();
        let ip = packet(&End { view: received, ..*end }, 1);
        match self.tcp {
            true => ip.tcp(received.own.port(), received.other.port(), end.expected, 1000).write(&mut quoted, &[]),
            false => ip.udp(received.own.port(), received.other.port()).write(&mut quoted, &[]),
        }
        .expect("writing to memory");
        let unreachable = icmpv4::DestUnreachableHeader::Host;
        let error =
            packet(end, self.identification).icmpv4(etherparse::Icmpv4Type::DestinationUnreachable(unreachable));
        let mut bytes = Vec::new();
        error.write(&mut bytes, &quoted[14..]).expect("writing to memory");
        Some(Case { bytes, port: end.port, plain: false })
    }
}

fn packet(end: &End, identification: u16) -> PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2(HOST_MACS[end.port], ROUTER_MACS[end.port]);
    let (source, destination) = (end.view.own.ip(), end.view.other.ip());
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = etherparse::Ipv4Header {
                time_to_live: 64,
                identification,
                dont_fragment: true,
                source: source.octets(),
                destination: destination.octets(),
                ..Default::default()
            };
            header.header_checksum = header.calc_header_checksum();
            ethernet.ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => ethernet.ip(etherparse::IpHeaders::Ipv6(
            etherparse::Ipv6Header {
                hop_limit: 64,
                source: source.octets(),
                destination: destination.octets(),
                ..Default::default()
            },
            Default::default(),
        )),
        _ => unreachable!("both ends are of one family"),
    }
}

fn ends(kind: Kind, v6: bool, tcp: bool, port: u16, random: &mut Random) -> [End; 2] {
    let pick = |v4: &str, v6_text: &str| -> IpAddr { if v6 { v6_text } else { v4 }.parse().expect("an address") };
    let inner = match kind {
        Kind::Masqueraded => pick("198.19.1.5", "2001:db8:f00:1::5"),
        _ => pick("198.19.2.5", "2001:db8:f00:2::5"),
    };
    let outer = pick("198.18.0.9", "2001:db8:100::9");
    let router = pick("198.51.100.1", "2001:db8:1::1");
    let seen = |own: SocketAddr, other: SocketAddr| View { own, other };
    let (opens, answers) = match kind {
        Kind::Plain => {
            let (inner, outer) = ((inner, port).into(), (outer, 80).into());
            ((INSIDE, seen(inner, outer)), (OUTSIDE, seen(outer, inner)))
        }
        Kind::Masqueraded => {
            let (inner, outer) = ((inner, port).into(), (outer, 80).into());
            ((INSIDE, seen(inner, outer)), (OUTSIDE, seen(outer, (router, port).into())))
        }
        Kind::PortForwarded => {
            let outer = (pick("198.19.64.5", "2001:db8:f01::5"), port).into();
            let (forwarded, inner) = match tcp {
                true => (8080, (pick("198.18.2.7", "2001:db8:102::7"), 80).into()),
                false => (5300, (pick("198.18.2.8", "2001:db8:102::8"), 53).into()),
            };
            ((OUTSIDE, seen(outer, (router, forwarded).into())), (INSIDE, seen(inner, outer)))
        }
    };
    [opens, answers].map(|(port, view)| End { port, view, sequence: random.next() as u32, expected: 0 })
}

/// Handshake, data in both directions with what may go wrong, and an end of one of several kinds, or none.
fn tcp_steps(random: &mut Random) -> Vec<Step> {
    let send = |from, flags, length| Step::Send { from, flags, length };
    let mut steps = vec![send(0, SYN, 0), send(1, SYN | ACK, 0), send(0, ACK, 0)];
    steps.extend(talk(random, ACK | PUSH));
    let first = random.below(2);
    match random.below(4) {
        0 => {}
        1 => steps.extend([send(first, FIN | ACK, 0), send(1 - first, FIN | ACK, 0), send(first, ACK, 0)]),
        // One end has more to say after the other has ended.
        2 => {
            steps.extend([send(first, FIN | ACK, 0), send(1 - first, ACK, 0)]);
            steps.extend([send(1 - first, ACK | PUSH, 700), send(first, ACK, 0)]);
            steps.extend([send(1 - first, FIN | ACK, 0), send(first, ACK, 0)]);
        }
        // The last acknowledgement is sent twice.
        _ => steps.extend([
            send(first, FIN | ACK, 0),
            send(1 - first, ACK, 0),
            send(1 - first, FIN | ACK, 0),
            send(first, ACK, 0),
            Step::Again,
        ]),
    }
    steps.reverse();
    steps
}

fn udp_steps(random: &mut Random) -> Vec<Step> {
    let mut steps = vec![Step::Send { from: 0, flags: 0, length: 40 }, Step::Send { from: 1, flags: 0, length: 80 }];
    steps.extend(talk(random, 0));
    steps.reverse();
    steps
}

fn talk(random: &mut Random, flags: u8) -> Vec<Step> {
    let rounds = 20 + random.below(60);
    let step = |random: &mut Random| match random.below(40) {
        0 => Step::Error { from: random.below(2) },
        1..4 => Step::Again,
        _ => Step::Send { from: random.below(2), flags, length: random.pick(&[0, 1, 2, 17, 512, 1300]) },
    };
    (0..rounds).map(|_| step(random)).collect()
}

/// Takes `count` conversations through both routers, `beside` at a time; `during` is called now and then.
pub fn run(
    pair: &mut Pair,
    seed: u64,
    count: u16,
    beside: usize,
    mut during: impl FnMut(&Pair) -> Result<()>,
) -> Result<u64> {
    let mut random = Random::new(seed);
    let mut waiting =
        (0..count).map(|number| Conversation::new(&mut Random::new(seed ^ u64::from(number) << 32), number));
    let mut open: Vec<Conversation> = Vec::new();
    let (mut sent, mut turns) = (0, 0u64);
    loop {
        open.retain(|conversation| !conversation.steps.is_empty());
        while open.len() < beside {
            let Some(next) = waiting.next() else { break };
            open.push(next);
        }
        if open.is_empty() {
            return Ok(sent);
        }
        for port in [INSIDE, OUTSIDE] {
            let cases: Vec<Case> = open.iter_mut().filter_map(|c| c.next(port, &mut random)).collect();
            sent += cases.len() as u64;
            if let Some(difference) = pair.differs(&cases)? {
                bail!("{} differs from {} (seed {seed}):\n{difference}", pair.routers[1].name, pair.routers[0].name);
            }
        }
        turns += 1;
        if turns.is_multiple_of(40) {
            during(pair)?;
        }
    }
}

/// Waits until both routers' entries are the same.
pub fn same_entries(pair: &Pair) -> Result<Vec<String>> {
    let mut last = Default::default();
    let same = wait_for(Duration::from_secs(5), "the same entries of conntrack", || {
        last = [entries(&pair.routers[0]).ok()?, entries(&pair.routers[1]).ok()?];
        (last[0] == last[1]).then(|| last[0].clone())
    });
    same.map_err(|error| {
        let only = |one: &[String], other: &[String]| -> Vec<String> {
            one.iter().filter(|entry| !other.contains(entry)).cloned().collect()
        };
        error.context(format!(
            "only in {}: {:#?}\nonly in {}: {:#?}",
            pair.routers[0].name,
            only(&last[0], &last[1]),
            pair.routers[1].name,
            only(&last[1], &last[0])
        ))
    })
}

/// The profile of the two routers.
pub const TRACKED: Profile = Profile { name: "tracked", send_redirects: false, ..crate::PLAIN };
