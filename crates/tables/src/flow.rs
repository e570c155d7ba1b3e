//! Connections that Linux handed over, as it knows them.

use core::net::IpAddr;

/// One direction's addresses and ports, as packets of it arrive.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tuple {
    /// Source address
    pub source: IpAddr,
    /// Destination address, of the source's family
    pub destination: IpAddr,
    /// Source port
    pub source_port: u16,
    /// Destination port
    pub destination_port: u16,
    /// 6 (TCP) or 17 (UDP)
    pub protocol: u8,
}

impl Tuple {
    /// What a packet that leaves as the answer's opposite has: source and destination exchanged.
    pub fn inverse(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
        }
    }

    /// Whether both addresses are of one family, and the protocol is TCP or UDP
    pub fn is_sound(&self) -> bool {
        self.source.is_ipv4() == self.destination.is_ipv4() && matches!(self.protocol, TCP | UDP)
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A connection as Linux's connection tracking has it: packets of one direction arrive as its tuple and leave as the inverse
/// of the other direction's. So what is translated, and how, needs no words of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Connection {
    /// Packets of whoever began it
    pub original: Tuple,
    /// The answers
    pub reply: Tuple,
}

impl Connection {
    /// A connection; None unless both directions are sound and of one family and protocol.
    pub fn new(original: Tuple, reply: Tuple) -> Option<Self> {
        let same = original.protocol == reply.protocol && original.source.is_ipv4() == reply.source.is_ipv4();
        (same && original.is_sound() && reply.is_sound()).then_some(Self { original, reply })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(source: &str, destination: &str, protocol: u8) -> Tuple {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        Tuple { source, destination, source_port: 1, destination_port: 2, protocol }
    }

    #[test]
    fn a_connection_is_of_one_family_and_protocol() {
        let four = tuple("192.0.2.1", "198.51.100.1", 6);
        let six = tuple("2001:db8::1", "2001:db8::2", 6);
        let mixed = tuple("192.0.2.1", "2001:db8::2", 6);
        assert!(Connection::new(four, four.inverse()).is_some());
        assert!(Connection::new(six, six.inverse()).is_some());
        assert_eq!(Connection::new(four, six), None);
        assert_eq!(Connection::new(mixed, mixed), None);
        assert_eq!(Connection::new(four, Tuple { protocol: 17, ..four.inverse() }), None);
        let sctp = Tuple { protocol: 132, ..four };
        assert_eq!(Connection::new(sctp, sctp.inverse()), None);
    }

    #[test]
    fn the_inverse_goes_back() {
        let there = tuple("192.0.2.1", "198.51.100.1", 17);
        let back = there.inverse();
        assert_eq!((back.source, back.source_port), (there.destination, 2));
        assert_eq!((back.destination, back.destination_port), (there.source, 1));
        assert_eq!(back.inverse(), there);
    }
}
