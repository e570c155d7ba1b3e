//! Connections through a firewall that tracks and translates them: the same conversations through plain Linux and through
//! Towpath, which takes established connections over. Whatever comes out is compared, and in the end conntrack's entries.
//!
//! Both routers are liberal about TCP's windows (as Linux itself is with connections in a flowtable), since conntrack does
//! not see every segment of a connection that is taken over.

use crate::compare::Pair;
use crate::ends::{ACK, End, FIN, PUSH, RST, SYN, View};
use crate::generate::Case;
use crate::random::Random;
use crate::router::{Profile, Router};
use anyhow::{Result, bail, ensure};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use towpath_lab::packet::checksum;
use towpath_lab::{Frame, wait_for};

/// The inner hosts' side, and the outer hosts'.
const INSIDE: usize = 0;
const OUTSIDE: usize = 1;

/// What the router does with addresses, beside letting connections from inside and to the forwarded ports through. (In a VRF that
/// is from either side: there `red` is where both come from.)
pub const RULES: &str = "
table inet stateful {
  chain forward {
    type filter hook forward priority filter; policy drop;
    meta l4proto esp accept
    ct state established,related accept
    ct state invalid drop
    iifname { eth0, red } accept
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
    // So that no entry goes in the course of a run.
    router.node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", "600")?;
    router.node.sh(&format!("nft -f - <<'END'\n{RULES}\nEND")).map(drop)
}

/// The entries of conntrack, without what depends on the time, as of UDP whether they are assured: they are once they have been in
/// use for two seconds.
pub fn entries(router: &Router) -> Result<Vec<String>> {
    let listed = ["ipv4", "ipv6"].map(|family| router.node.sh(&format!("conntrack -L -f {family} 2>/dev/null")));
    let mut entries = Vec::new();
    for line in listed.into_iter().collect::<Result<Vec<_>>>()?.iter().flat_map(|text| text.lines()) {
        // Protocol, its number, seconds left, then the rest.
        let mut words: Vec<&str> = line.split_whitespace().filter(|word| !word.starts_with("use=")).collect();
        ensure!(words.len() > 3, "not an entry: {line}");
        words.remove(2);
        words.retain(|word| *word != "[ASSURED]" || line.starts_with("tcp"));
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

/// A connection and what is still to happen on it.
pub struct Conversation {
    /// Who opens it, and who answers
    ends: [End; 2],
    tcp: bool,
    /// Last step first
    steps: Vec<Step>,
    last: Vec<Case>,
    identification: u16,
}

#[derive(Clone, Copy)]
enum Step {
    /// A segment or datagram from this end, with flags of TCP and so many bytes
    Send { from: usize, flags: u8, length: usize },
    /// The same, out of turn: with its numbers so far from where they should be, and nobody takes account of it
    Stray { from: usize, flags: u8, length: usize, sequence: i32, acknowledged: i32 },
    /// A datagram without checksum, where that is allowed
    Unchecked { from: usize },
    /// From inside, longer than the outer port's MTU
    TooLong,
    /// In two fragments; IPv4 only
    Fragments { from: usize },
    /// What was sent last, once more
    Again,
    /// An ICMP error from this end about what the other might have sent
    Error { from: usize },
    /// Both ends forget the connection; the next is between the same ports.
    Anew,
}

impl Conversation {
    /// One of any kind; `number` makes its ports its own.
    pub fn new(random: &mut Random, number: u16, strange: Strange) -> Self {
        let kind = random.pick(&[Kind::Plain, Kind::Masqueraded, Kind::Masqueraded, Kind::PortForwarded]);
        let tcp = random.percent(70);
        let ends = ends(kind, random.percent(40), tcp, 1024 + number, random);
        let steps = if tcp { tcp_steps(random, strange) } else { udp_steps(random) };
        Self { ends, tcp, steps, last: Vec::new(), identification: random.word() }
    }

    /// Frames that carry the conversation on, if they are to come from this port.
    fn next(&mut self, port: usize, random: &mut Random) -> Vec<Case> {
        if let Some(Step::Anew) = self.steps.last() {
            self.steps.pop();
            self.ends.iter_mut().for_each(|end| end.sequence = end.sequence.wrapping_add(1 << 20));
        }
        let Some(step) = self.steps.last().copied() else { return Vec::new() };
        let due = match step {
            Step::Send { from, .. }
            | Step::Stray { from, .. }
            | Step::Unchecked { from }
            | Step::Fragments { from }
            | Step::Error { from } => self.ends[from].port == port,
            Step::TooLong => port == INSIDE,
            Step::Again => self.last.first().is_some_and(|last| last.port == port),
            Step::Anew => false,
        };
        if !due {
            return Vec::new();
        }
        self.steps.pop();
        let frames = match step {
            Step::Send { from, flags, length } => vec![self.send(from, flags, &random.bytes(length))],
            Step::Stray { from, flags, length, sequence, acknowledged } => {
                let end = self.ends[from];
                let (sequence, expected) =
                    (end.sequence.wrapping_add_signed(sequence), end.expected.wrapping_add_signed(acknowledged));
                vec![self.frame(&End { sequence, expected, ..end }, flags, &random.bytes(length))]
            }
            Step::Unchecked { from } => {
                let mut frame = self.send(from, ACK, &random.bytes(30));
                if !self.tcp && self.ends[from].view.own.is_ipv4() {
                    frame[UDP_CHECKSUM].fill(0);
                }
                vec![frame]
            }
            Step::TooLong => {
                let inner = usize::from(self.ends[1].port == INSIDE);
                let end = self.ends[inner];
                vec![self.frame(&end, ACK | PUSH, &random.bytes(1380))]
            }
            Step::Fragments { from } => fragments(self.send(from, ACK, &random.bytes(1000))),
            Step::Error { from } => Vec::from_iter(self.ends[from].unreachable(self.tcp, self.identification)),
            Step::Again => return self.last.clone(),
            Step::Anew => Vec::new(),
        };
        let cases: Vec<Case> = frames.into_iter().map(|bytes| Case { bytes, port, plain: false }).collect();
        if !matches!(step, Step::Error { .. }) {
            self.last.clone_from(&cases);
        }
        cases
    }

    fn frame(&mut self, end: &End, flags: u8, payload: &[u8]) -> Vec<u8> {
        self.identification = self.identification.wrapping_add(1);
        end.frame(self.tcp.then_some(flags), self.identification, payload)
    }

    fn send(&mut self, from: usize, flags: u8, payload: &[u8]) -> Vec<u8> {
        let end = self.ends[from];
        let taken = payload.len() as u32 + u32::from(flags & (FIN | SYN) != 0);
        self.ends[from].sequence = end.sequence.wrapping_add(taken);
        self.ends[1 - from].expected = self.ends[from].sequence;
        self.frame(&end, flags, payload)
    }
}

/// Where the checksum lies in a frame with UDP over IPv4.
const UDP_CHECKSUM: std::ops::Range<usize> = 40..42;

/// An IPv4 packet in two fragments; anything else as it is.
fn fragments(frame: Vec<u8>) -> Vec<Vec<u8>> {
    const HEADERS: usize = 14 + 20;
    const FIRST: usize = 512;
    if frame[12..14] != [8, 0] {
        return vec![frame];
    }
    let (headers, data) = frame.split_at(HEADERS);
    let (first, second) = data.split_at(FIRST);
    let part = |data: &[u8], offset: u16| {
        let mut frame = [headers, data].concat();
        frame[16..18].copy_from_slice(&(20 + data.len() as u16).to_be_bytes());
        frame[20..22].copy_from_slice(&offset.to_be_bytes());
        frame[24..26].fill(0);
        let sum = checksum(&frame[14..HEADERS]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame
    };
    vec![part(first, 0x2000), part(second, (FIRST / 8) as u16)]
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

/// Which strange segments there are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Strange {
    All,
    /// But no RST with a sequence number that was acknowledged already: plain Linux calls it invalid. Conntrack does not know
    /// what was acknowledged in a connection that is taken over (nor does it of one in its own flowtable).
    /// For the same reason no guessed RST in a connection that both ends began at once: conntrack may have seen nothing
    /// acknowledged, and takes any RST then.
    NoOldResets,
}

/// Handshake, data in both directions with what may go wrong, and an end of one of several kinds, or none.
fn tcp_steps(random: &mut Random, strange: Strange) -> Vec<Step> {
    let send = |from, flags, length| Step::Send { from, flags, length };
    let stray = |from, flags, sequence, acknowledged| Step::Stray { from, flags, length: 0, sequence, acknowledged };
    let reset = |from, sequence| stray(from, RST | ACK, sequence, 0);
    let close = |first: usize| {
        [send(first, FIN | ACK, 0), send(1 - first, ACK, 0), send(1 - first, FIN | ACK, 0), send(first, ACK, 0)]
    };
    let open = [send(0, SYN, 0), send(1, SYN | ACK, 0), send(0, ACK, 0)];
    let together = random.percent(10);
    let mut steps = match together {
        // Both begin at once.
        true => vec![send(0, SYN, 0), send(1, SYN, 0), stray(0, SYN | ACK, -1, 0), stray(1, SYN | ACK, -1, 0)],
        false => open.to_vec(),
    };
    steps.extend(talk(random, ACK | PUSH));
    let first = random.below(2);
    match random.below(10) {
        0 => {}
        1 => steps.extend([send(first, FIN | ACK, 0), send(1 - first, FIN | ACK, 0), send(first, ACK, 0)]),
        // One end has more to say after the other has ended.
        2 => {
            steps.extend([send(first, FIN | ACK, 0), send(1 - first, ACK, 0)]);
            steps.extend([send(1 - first, ACK | PUSH, 700), send(first, ACK, 0)]);
            steps.extend([send(1 - first, FIN | ACK, 0), send(first, ACK, 0)]);
        }
        // The last acknowledgement is sent twice.
        3 => steps.extend(close(first).into_iter().chain([Step::Again])),
        // Both close at once, and see only then that the other did.
        4 => steps.extend([
            send(first, FIN | ACK, 0),
            stray(1 - first, FIN | ACK, 0, -1),
            send(1 - first, FIN | ACK, 0),
            send(first, ACK, 0),
        ]),
        5 | 6 => steps.push(reset(first, 0)),
        // Somebody guesses, and the connection goes on.
        7 if strange == Strange::All || !together => {
            steps.extend([reset(first, 1 + random.below(30_000) as i32), stray(1 - first, ACK, 0, 0)]);
            steps.extend(talk(random, ACK | PUSH).into_iter().chain(close(first)));
        }
        8 if strange == Strange::All => {
            steps.extend([reset(first, -1 - random.below(500) as i32), send(1 - first, ACK, 0)]);
            steps.extend(close(first));
        }
        _ => {
            steps.extend(close(first).into_iter().chain([Step::Anew]).chain(open));
            steps.extend(talk(random, ACK | PUSH));
        }
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
    let step = |random: &mut Random| {
        let from = random.below(2);
        let stray = |length, sequence| Step::Stray { from, flags, length, sequence, acknowledged: 0 };
        match random.below(50) {
            0 => Step::Error { from },
            1..4 => Step::Again,
            4 => stray(17, random.pick(&[-1_000_000, 1_000_000])),
            5 => Step::TooLong,
            6 => Step::Fragments { from },
            7 => Step::Unchecked { from },
            _ => Step::Send { from, flags, length: random.pick(&[0, 1, 2, 17, 512, 1300]) },
        }
    };
    (0..rounds).map(|_| step(random)).collect()
}

/// Takes `count` conversations through both routers, `beside` at a time; `during` is called now and then.
pub fn run(
    pair: &mut Pair,
    seed: u64,
    count: u16,
    beside: usize,
    strange: Strange,
    mut during: impl FnMut(&Pair) -> Result<()>,
) -> Result<u64> {
    let mut random = Random::new(seed);
    let mut waiting =
        (0..count).map(|number| Conversation::new(&mut Random::new(seed ^ u64::from(number) << 32), number, strange));
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
            let cases: Vec<Case> = open.iter_mut().flat_map(|c| c.next(port, &mut random)).collect();
            sent += cases.len() as u64;
            if let Some(difference) = pair.differs(&cases)? {
                bail!("{} differs from {} (seed {seed}):\n{difference}", pair.routers[1].name, pair.routers[0].name);
            }
        }
        turns += 1;
        if turns.is_multiple_of(120) {
            during(pair)?;
        }
    }
}

/// What comes out at the far end when a masqueraded connection that has become fast sends a segment far outside of the window.
pub fn outside_of_the_window(
    pair: &mut Pair,
    port: u16,
    is_fast: impl Fn() -> Result<bool>,
) -> Result<[Vec<Frame>; 2]> {
    let mut random = Random::new(0);
    let ends = ends(Kind::Masqueraded, false, true, port, &mut random);
    let mut talk = Conversation { ends, tcp: true, steps: Vec::new(), last: Vec::new(), identification: 0 };
    let mut say = |pair: &mut Pair, step, from: usize| {
        talk.steps.push(step);
        pair.exchange(&talk.next(talk.ends[from].port, &mut random))
    };
    for (from, flags) in [(0, SYN), (1, SYN | ACK), (0, ACK)] {
        ensure!(
            say(pair, Step::Send { from, flags, length: 0 }, from)?.is_ok(),
            "the routers differ about its beginning"
        );
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_fast()? {
        ensure!(Instant::now() < deadline, "the connection does not become fast");
        for from in [0, 1] {
            let sent = say(pair, Step::Send { from, flags: ACK | PUSH, length: 10 }, from)?;
            ensure!(sent.is_ok_and(|outputs| !outputs[[OUTSIDE, INSIDE][from]].is_empty()), "it does not arrive");
        }
    }
    let stray = Step::Stray { from: 0, flags: ACK | PUSH, length: 10, sequence: 1 << 24, acknowledged: 0 };
    let Err(difference) = say(pair, stray, 0)? else { bail!("both do the same") };
    Ok(difference.outputs.map(|mut outputs| std::mem::take(&mut outputs[OUTSIDE])))
}

/// Waits until both routers' entries are the same, as `of` tells them.
pub fn same_entries(pair: &Pair, of: impl Fn(&Router) -> Result<Vec<String>>) -> Result<Vec<String>> {
    let mut last = Default::default();
    let same = wait_for(Duration::from_secs(5), "the same entries of conntrack", || {
        last = [of(&pair.routers[0]).ok()?, of(&pair.routers[1]).ok()?];
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

/// The entries of a router with Towpath. A RST that ends a connection is Linux's, but conntrack does not know what was
/// acknowledged meanwhile, so it takes the number for a guess and leaves the connection to its timeout for closed ones.
pub fn entries_but_for_resets(router: &Router) -> Result<Vec<String>> {
    let mut entries = entries(router)?;
    for entry in entries.iter_mut().filter(|entry| entry.starts_with("tcp")) {
        *entry = entry.replacen(" CLOSE ", " ESTABLISHED ", 1);
    }
    entries.sort();
    Ok(entries)
}

/// The profile of the two routers.
pub const TRACKED: Profile = Profile { name: "tracked", send_redirects: false, ..crate::PLAIN };
