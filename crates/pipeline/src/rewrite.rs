//! Last stage, the only one that changes the frame: new Ethernet header and tags, one hop less, no padding.

use crate::network::Network;
use crate::{Frame, Hop, Parsed};
use towpath_tables::Reason;
use towpath_tables::record::Family;
use towpath_wire::ethernet::{Ethernet, Tag};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::link::{DoubleTagged, Link, Tagged, Untagged};

/// Makes the frame what leaves by `hop`. On failure (the driver left no room before the frame) it is as before.
#[inline(always)]
pub fn rewrite<F: Frame>(frame: &mut F, parsed: &Parsed, hop: &Hop) -> Result<(), Reason> {
    match parsed.family {
        Family::V4 => rewrite_packet::<Ipv4, F>(frame, parsed, hop),
        Family::V6 => rewrite_packet::<Ipv6, F>(frame, parsed, hop),
    }
}

#[inline(always)]
pub(crate) fn rewrite_packet<N: Network, F: Frame>(frame: &mut F, parsed: &Parsed, hop: &Hop) -> Result<(), Reason> {
    match hop.tags() {
        0 => write::<Untagged, N, F>(frame, parsed, hop),
        1 => write::<Tagged, N, F>(frame, parsed, hop),
        2 => write::<DoubleTagged, N, F>(frame, parsed, hop),
        _ => Err(Reason::Internal),
    }
}

#[inline(always)]
fn write<L: Link, N: Network, F: Frame>(frame: &mut F, parsed: &Parsed, hop: &Hop) -> Result<(), Reason> {
    let link = hop.link::<L>(N::ETHERTYPE).ok_or(Reason::TableBusy)?;
    if !fit(frame, parsed, size_of::<L>())? {
        return Ok(());
    }
    let header = frame.get_mut::<N>(size_of::<L>()).ok_or(Reason::Internal)?;
    header.decrement();
    *frame.get_mut::<L>(0).ok_or(Reason::Internal)? = link;
    Ok(())
}

/// Makes room for `len` bytes in place of what is before the packet, and removes what pads it; false if the frame is to stay
/// as it is. On failure it is as before, too.
#[inline(always)]
pub(crate) fn fit<F: Frame>(frame: &mut F, parsed: &Parsed, len: usize) -> Result<bool, Reason> {
    if frame.is_shadow() {
        return Ok(false);
    }
    let by = parsed.offset as i32 - len as i32;
    if by != 0 && !frame.move_head(by) {
        return Err(Reason::Internal);
    }
    let padding = parsed.padding();
    if padding != 0 && !frame.trim(padding as u32) {
        frame.move_head(-by);
        return Err(Reason::Internal);
    }
    Ok(true)
}

impl Parsed {
    /// Bytes after the end of the packet
    #[inline(always)]
    fn padding(&self) -> usize {
        self.frame_len.wrapping_sub(self.offset + self.packet_len)
    }
}

impl Hop<'_> {
    /// Length of the link header in `l2` with its EtherType
    #[inline(always)]
    pub(crate) fn link_len(&self) -> usize {
        size_of::<Ethernet>() + self.tags() as usize * size_of::<Tag>()
    }
}
