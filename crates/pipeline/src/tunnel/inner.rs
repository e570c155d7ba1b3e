//! What tunnels ask of the header of a packet besides.

use crate::network::{Network, Part};
use crate::{Frame, Parsed};
use towpath_tables::Reason;
use towpath_wire::Sum;
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::transport::protocol;
use zerocopy::byteorder::network_endian::U16;

/// Both bits of TOS or traffic class for explicit congestion notification (RFC 3168)
pub const ECN: u8 = 3;

/// Where in a fragment header offset and flags are
const OFFSET_AND_FLAGS: usize = 2;

/// A header inside of a tunnel.
pub trait Inner: Network {
    /// TOS or traffic class
    fn class(&self) -> u8;
    /// The flow label, or 0
    fn label(&self) -> u32;
    /// What the sum over a packet becomes when it is sent on, with one hop less
    fn sum_of_sent(sum: Sum) -> Sum;
    /// Whether Linux puts the packet into a tunnel over IPv6 to this other end without asking what else is in it.
    fn check_enters<F: Frame>(&self, frame: &F, parsed: &Parsed, remote: &[u8; 16]) -> Result<(), Reason>;
}

impl Inner for Ipv4 {
    #[inline(always)]
    fn class(&self) -> u8 {
        self.tos
    }

    #[inline(always)]
    fn label(&self) -> u32 {
        0
    }

    /// A right header's sum is zero, before and after.
    #[inline(always)]
    fn sum_of_sent(sum: Sum) -> Sum {
        sum
    }

    #[inline(always)]
    fn check_enters<F: Frame>(&self, _: &F, _: &Parsed, _: &[u8; 16]) -> Result<(), Reason> {
        Ok(())
    }
}

impl Inner for Ipv6 {
    #[inline(always)]
    fn class(&self) -> u8 {
        Ipv6::class(self)
    }

    #[inline(always)]
    fn label(&self) -> u32 {
        self.flow_label()
    }

    /// The hop limit is the low byte of a pair.
    #[inline(always)]
    fn sum_of_sent(sum: Sum) -> Sum {
        sum.number(!1)
    }

    /// What comes from the other end is not sent back to it (ip6gre_xmit_ipv6). Destination options, wherever they are, may
    /// hold an encapsulation limit, which goes before the tunnel's (ip6_tnl_parse_tlv_enc_lim); behind a fragment header they
    /// are only looked for where it says that the packet is whole.
    #[inline(always)]
    fn check_enters<F: Frame>(&self, frame: &F, parsed: &Parsed, remote: &[u8; 16]) -> Result<(), Reason> {
        if self.source == *remote {
            return Err(Reason::Tunnel);
        }
        match self.next_header {
            protocol::ROUTING | protocol::AUTHENTICATION | protocol::DESTINATION_OPTIONS => {
                Err(Reason::ExtensionHeader)
            }
            _ if self.part() == Part::Whole => Ok(()),
            _ => {
                let place = parsed.offset + size_of::<Self>() + OFFSET_AND_FLAGS;
                let fragment = frame.get::<U16>(place).ok_or(Reason::Truncated)?;
                if fragment.get() == 0 { Err(Reason::ExtensionHeader) } else { Ok(()) }
            }
        }
    }
}
