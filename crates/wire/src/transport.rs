//! As much of the transport protocols as a router that hashes flows looks at.

use crate::view;
use zerocopy::{byteorder::network_endian::U16, native_endian};

/// Protocol numbers (IANA)
pub mod protocol {
    /// IPv6 hop-by-hop options
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP
    pub const ICMP: u8 = 1;
    /// TCP
    pub const TCP: u8 = 6;
    /// UDP
    pub const UDP: u8 = 17;
    /// Datagram congestion control protocol
    pub const DCCP: u8 = 33;
    /// IPv6 routing header
    pub const ROUTING: u8 = 43;
    /// Generic routing encapsulation
    pub const GRE: u8 = 47;
    /// IPv6 fragment header
    pub const FRAGMENT: u8 = 44;
    /// Encapsulating security payload
    pub const ESP: u8 = 50;
    /// IPv6 authentication header
    pub const AUTHENTICATION: u8 = 51;
    /// ICMPv6
    pub const ICMPV6: u8 = 58;
    /// IPv6: nothing follows
    pub const NO_NEXT: u8 = 59;
    /// IPv6 destination options
    pub const DESTINATION_OPTIONS: u8 = 60;
    /// OSPF
    pub const OSPF: u8 = 89;
    /// SCTP
    pub const SCTP: u8 = 132;
    /// IPv6 mobility header
    pub const MOBILITY: u8 = 135;
    /// UDP-Lite
    pub const UDP_LITE: u8 = 136;
}

view! {
    /// The ports that TCP, UDP, SCTP, DCCP and UDP-Lite begin with.
    Ports {
        /// Source
        source: U16,
        /// Destination
        destination: U16,
    }
}

impl Ports {
    /// Both, as on the wire.
    #[inline(always)]
    pub fn word(self) -> u32 {
        zerocopy::transmute!(self)
    }

    /// Those of such a word.
    #[inline(always)]
    pub fn of(word: u32) -> Self {
        zerocopy::transmute!(word)
    }
}

view! {
    /// UDP (RFC 768), 8 bytes.
    Udp {
        /// Ports
        ports: Ports,
        /// Length with this header
        len: U16,
        /// Checksum, as on the wire; 0 if there is none
        checksum: native_endian::U16,
    }
}

view! {
    /// TCP (RFC 9293) up to and with its checksum, 18 bytes.
    Tcp {
        /// Ports
        ports: Ports,
        /// Sequence and acknowledgement numbers
        numbers: [u8; 8],
        /// Header length, flags, window
        flags: [u8; 4],
        /// Checksum, as on the wire
        checksum: native_endian::U16,
    }
}

impl Tcp {
    /// Length of the shortest header
    pub const MIN: usize = 20;
    /// Flags of the second byte of `flags`: no more data
    pub const FIN: u8 = 1;
    /// Synchronize
    pub const SYN: u8 = 2;
    /// Reset
    pub const RST: u8 = 4;
    /// Acknowledgement
    pub const ACK: u8 = 16;

    /// Length of the header with its options, as it says
    #[inline(always)]
    pub fn header_len(&self) -> usize {
        usize::from(self.flags[0] >> 4) * 4
    }

    /// `FIN` and so on
    #[inline(always)]
    pub fn control(&self) -> u8 {
        self.flags[1]
    }
}

view! {
    /// SCTP's common header (RFC 9260), 12 bytes.
    Sctp {
        /// Ports
        ports: Ports,
        /// Verification tag
        tag: [u8; 4],
        /// CRC32c, as on the wire
        checksum: native_endian::U32,
    }
}

view! {
    /// The eight bytes that ICMP and ICMPv6 messages begin with.
    Icmp {
        /// Type
        kind: u8,
        /// Code
        code: u8,
        /// Checksum, as on the wire
        checksum: native_endian::U16,
        /// Depends on the type
        rest: [u8; 4],
    }
}
