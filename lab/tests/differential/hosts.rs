//! Hosts that hold conversations through whatever is between them. They answer what reaches them as they see it, and what
//! is lost they send again; so nobody has to say what a rule set does with their packets.

use crate::ends::{ACK, End, FIN, PUSH, SYN, View};
use crate::generate::Case;
use crate::normalise::Outputs;
use crate::random::Random;
use crate::router::{PORTS, ROUTER_V4};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The ports where hosts answer.
pub const PORTS_ASKED: [u16; 5] = [53, 80, 443, 5300, 8080];
/// How often something is sent that nobody gets, until a conversation is given up.
const PATIENCE: u32 = 60;

/// A host behind a port of the router.
pub fn address(six: bool, port: usize, host: usize) -> IpAddr {
    match six {
        true => Ipv6Addr::new(0x2001, 0xdb8, 0xf00 + port as u16, 0, 0, 0, 0, host as u16 + 1).into(),
        false => Ipv4Addr::new(198, 19, 64 * port as u8, host as u8 + 1).into(),
    }
}

/// The hosts behind a port.
pub fn network(six: bool, port: usize) -> String {
    format!(
        "{}/{}",
        if six { format!("2001:db8:{:x}::", 0xf00 + port) } else { format!("198.19.{}.0", 64 * port) },
        if six { 48 } else { 18 }
    )
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Syn,
    SynAck,
    Ack,
    /// Data, so many packets still
    Data(u32),
    /// The end that closes first, and how far it has come
    Fin(usize, usize),
    Over,
}

/// A packet on its way.
struct Sent {
    from: usize,
    taken: u32,
    /// Where the conversation is once it has arrived
    next: Phase,
}

/// A conversation of two hosts.
pub struct Talk {
    number: u16,
    tcp: bool,
    /// Who begins, and who answers: as the last packet to come out for it tells
    ends: [End; 2],
    /// The answering end knows of it
    reached: bool,
    phase: Phase,
    sent: Option<Sent>,
    patience: u32,
    identification: u16,
}

impl Talk {
    /// One of its own number, of which packets and ports bear witness.
    pub fn new(number: u16, random: &mut Random) -> Self {
        let (six, tcp) = (random.percent(40), random.percent(60));
        let from = random.below(PORTS);
        let to = if random.percent(5) { from } else { (from + 1 + random.below(PORTS - 1)) % PORTS };
        let own = SocketAddr::new(address(six, from, random.below(3)), 1024 + number);
        let answers = match random.percent(35) {
            true => own_address(six, random.below(PORTS)),
            false => address(six, to, random.below(3)),
        };
        let view = View { own, other: SocketAddr::new(answers, random.pick(&PORTS_ASKED)) };
        let first = u32::from(number) << 17;
        let ends = [
            End { port: from, view, sequence: first, expected: 0 },
            End { port: to, view: view.turned(), sequence: first | 1 << 16, expected: 0 },
        ];
        let data = Phase::Data(20 + random.below(40) as u32);
        let phase = if tcp { Phase::Syn } else { data };
        Self { number, tcp, ends, reached: false, phase, sent: None, patience: PATIENCE, identification: number }
    }

    /// Whether nothing more happens.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over || self.patience == 0
    }

    /// What is sent next.
    pub fn next(&mut self, random: &mut Random) -> Case {
        let (from, flags, length, next) = self.step(random);
        self.identification = self.identification.wrapping_add(1);
        let end = &self.ends[from];
        if flags & SYN == 0
            && random.percent(2)
            && let Some(bytes) = end.unreachable(self.tcp, self.identification)
        {
            self.sent = None;
            return Case { bytes, port: end.port, plain: false };
        }
        let mut payload = random.bytes(length);
        if !self.tcp {
            payload.splice(..0, [self.number.to_be_bytes(), [from as u8, 0]].concat());
        }
        let taken = payload.len() as u32 + u32::from(flags & (FIN | SYN) != 0);
        self.sent = Some(Sent { from, taken, next });
        let bytes = end.frame(self.tcp.then_some(flags), self.identification, &payload);
        Case { bytes, port: end.port, plain: false }
    }

    /// Who sends, with which flags, how much, and where that leads to.
    fn step(&self, random: &mut Random) -> (usize, u8, usize, Phase) {
        let answers = self.reached && random.percent(85);
        let data = Phase::Data(20 + random.below(40) as u32);
        match self.phase {
            Phase::SynAck if answers => (1, SYN | ACK, 0, Phase::Ack),
            Phase::Syn | Phase::SynAck => (0, SYN, 0, Phase::SynAck),
            Phase::Ack => (0, ACK, 0, data),
            Phase::Data(left) => {
                let from = if self.reached { random.below(2) } else { 0 };
                let next = match left {
                    0 if self.tcp && random.percent(70) => Phase::Fin(random.below(2), 0),
                    0 => Phase::Over,
                    _ => Phase::Data(left - 1),
                };
                (from, ACK | PUSH, random.pick(&[0, 1, 17, 200, 900]), next)
            }
            Phase::Fin(first, step) => {
                let sends = [(first, FIN | ACK), (1 - first, FIN | ACK), (first, ACK)];
                let (from, flags) = sends[step.min(2)];
                (from, flags, 0, if step < 2 { Phase::Fin(first, step + 1) } else { Phase::Over })
            }
            Phase::Over => (0, ACK, 0, Phase::Over),
        }
    }

    /// Takes in what came out: whether what was sent has arrived, and as what.
    pub fn hear(&mut self, arrived: &[Arrived]) {
        let Some(Sent { from, taken, next }) = self.sent.take() else { return };
        let other = 1 - from;
        let own = |arrived: &&Arrived| arrived.number == self.number && arrived.from == from && arrived.tcp == self.tcp;
        let Some(arrived) = arrived.iter().filter(own).find(|arrived| from == 0 || arrived.view == self.ends[0].view)
        else {
            self.patience -= 1;
            return;
        };
        if from == 0 {
            self.ends[1].port = arrived.port;
            self.ends[1].view = arrived.view;
            self.reached = true;
        }
        self.ends[from].sequence = self.ends[from].sequence.wrapping_add(taken);
        self.ends[other].expected = self.ends[from].sequence;
        self.phase = next;
    }
}

/// A packet of a conversation that came out.
pub struct Arrived {
    number: u16,
    from: usize,
    tcp: bool,
    port: usize,
    view: View,
}

/// The packets of conversations among these frames.
pub fn arrivals(outputs: &Outputs) -> Vec<Arrived> {
    let all = outputs.iter().enumerate();
    all.flat_map(|(port, frames)| frames.iter().filter_map(move |frame| arrival(port, &frame.bytes))).collect()
}

fn arrival(port: usize, bytes: &[u8]) -> Option<Arrived> {
    let packet = SlicedPacket::from_ethernet(bytes).ok()?;
    let (source, destination): (IpAddr, IpAddr) = match packet.net? {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        _ => return None,
    };
    let (ports, number, from, tcp) = match packet.transport? {
        TransportSlice::Tcp(tcp) if !tcp.rst() => {
            let sequence = tcp.sequence_number();
            ((tcp.source_port(), tcp.destination_port()), (sequence >> 17) as u16, (sequence >> 16 & 1) as usize, true)
        }
        TransportSlice::Udp(udp) => {
            let [high, low, from, ..] = *udp.payload() else { return None };
            ((udp.source_port(), udp.destination_port()), u16::from_be_bytes([high, low]), usize::from(from), false)
        }
        _ => return None,
    };
    let view = View { own: SocketAddr::new(destination, ports.1), other: SocketAddr::new(source, ports.0) };
    Some(Arrived { number, from, tcp, port, view })
}

fn own_address(six: bool, port: usize) -> IpAddr {
    match six {
        true => Ipv6Addr::new(0x2001, 0xdb8, port as u16, 0, 0, 0, 0, 1).into(),
        false => Ipv4Addr::from(ROUTER_V4[port]).into(),
    }
}

/// A frame in words.
pub fn describe(case: &Case) -> String {
    let entered = format!("into eth{}", case.port);
    let Some(arrived) = arrival(case.port, &case.bytes) else {
        return format!("{entered}: {} bytes", case.bytes.len());
    };
    let Arrived { number, from, tcp, view: View { own, other }, .. } = arrived;
    format!(
        "{entered}: {} {number}/{from} {other} > {own}, {} bytes",
        if tcp { "tcp" } else { "udp" },
        case.bytes.len()
    )
}
