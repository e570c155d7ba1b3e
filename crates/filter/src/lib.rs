//! Filters of packet sockets (classic BPF): checked, judged and put into eBPF, so that an XDP program can tell which frames
//! a capture would show.
//!
//! Everything here speaks of frames that the fast path may forward: Ethernet, no VLAN tag, IPv4 without options or IPv6.
//! Whatever else arrives is Linux's anyway, so it does not matter what a filter would say of it.
//!
//! The contract: a [`Filter`] is a program that Linux would take too (net/core/filter.c, `bpf_check_classic`, 6.1) and that
//! this crate can repeat: its jumps go forward and stay inside, it ends, it divides by no constant 0. What
//! [`translate`] makes of it says "match" whenever Linux's own run would, for the frame as it arrived; if
//! [`Filter::survives_forwarding`], also whenever Linux's run on the frame as it would leave would. A [`Runnable`] says the same
//! of frames that no XDP program sees.

mod assemble;
mod decode;
mod run;
mod sample;
mod survive;
mod translate;

pub use decode::{Unsupported, instruction};
pub use run::Runnable;
pub use sample::one_in;
pub use translate::{Capture, TooLong, translate};

use decode::Op;

/// Instructions of one filter that are run at most, and of all filters together.
pub const MAX_INSTRUCTIONS: usize = 1024;
/// Filters that are run at most.
pub const MAX_FILTERS: usize = 8;

/// Where a socket sees a frame from: its type decides (net/packet/af_packet.c, `packet_rcv`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Layer {
    /// SOCK_RAW: from its Ethernet header on
    Link,
    /// SOCK_DGRAM: from the network header on
    Network,
}

impl Layer {
    /// Bytes of the frame that the socket does not see.
    fn skipped(self) -> u32 {
        match self {
            Self::Link => 0,
            Self::Network => ETHERNET,
        }
    }
}

/// Length of an Ethernet header.
const ETHERNET: u32 = 14;
/// Where in it the EtherType is.
const ETHERTYPE: u32 = 12;

/// A filter that can be run.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Filter {
    layer: Layer,
    /// As in `struct sock_filter`: operation (16 bits), the two jumps (8 each), operand (32), from the high bits down
    code: Vec<u64>,
}

impl Filter {
    /// Checks a program; its instructions are encoded as by [`instruction`].
    pub fn new(layer: Layer, code: Vec<u64>) -> Result<Self, Unsupported> {
        decode::decode(layer, &code)?;
        Ok(Self { layer, code })
    }

    /// Where it sees frames from.
    pub fn layer(&self) -> Layer {
        self.layer
    }

    /// Its instructions, encoded as by [`instruction`].
    pub fn code(&self) -> &[u64] {
        &self.code
    }

    /// Whether it ends at once, and matches.
    pub fn matches_everything(&self) -> bool {
        matches!(self.ops().first(), Some(Op::Return(true)))
    }

    /// Whether what it says of a frame cannot change when the frame is forwarded.
    pub fn survives_forwarding(&self) -> bool {
        survive::survives(&self.ops())
    }

    fn ops(&self) -> Vec<Op> {
        // `new` has found that it can be decoded.
        decode::decode(self.layer, &self.code).unwrap_or_default()
    }
}
