//! The operator's filters: before anything else.

use crate::constant::constant;
use crate::frame::XdpFrame;
use crate::maps::FAR_MAPS;
use aya_ebpf::bindings::xdp_md;
use towpath_pipeline::filters;

/// Whether the frame is to be dropped; it is counted then. Until there is a filter for the first time the table has room for
/// one record, which no filter has: then a verifier takes out all of this.
///
/// # Safety
/// `ctx` is the context that the kernel called the program with.
#[inline(always)]
pub unsafe fn dropped(ctx: *mut xdp_md) -> bool {
    constant!(const towpath_tables::record::TableId::Filters.length_mark()) > 1
        && filters::are_there(&FAR_MAPS)
        && drops(ctx) != 0
}

#[inline(never)]
fn drops(ctx: *mut xdp_md) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let (frame, ifindex) = unsafe { (XdpFrame::new(ctx), (*ctx).ingress_ifindex) };
    filters::drops(&frame, &FAR_MAPS, ifindex).into()
}
