//! Frames that captures are to see: see `towpath_tables::mark::CAPTURED`.

use crate::frame::XdpFrame;
use crate::maps::MAPS;
use aya_ebpf::bindings::xdp_md;
use core::mem::transmute;
use towpath_tables::mark::CAPTURED;
use towpath_tables::trace::Outcome;

/// What became of the frame (`Outcome::word`) if it is to go to Linux since a capture is to see it; it is counted then. Whoever
/// loads the program puts the captures' filters in place of the mark, or 0 if there are none: then nothing of this remains.
///
/// # Safety
/// `ctx` is the context that the kernel called the program with.
#[inline(always)]
pub unsafe fn captured(ctx: *mut xdp_md) -> Option<u32> {
    // SAFETY: the mark is replaced by a function of this kind.
    let filters: unsafe extern "C" fn(*mut xdp_md) -> u32 = unsafe { transmute(CAPTURED as usize) };
    // SAFETY: `ctx` is the program's context.
    (unsafe { filters(ctx) } != 0).then(|| count(ctx))
}

#[inline(never)]
fn count(ctx: *mut xdp_md) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let (frame, ifindex) = unsafe { (XdpFrame::new(ctx), (*ctx).ingress_ifindex) };
    Outcome::from(towpath_pipeline::capture(&frame, &MAPS, ifindex)).word()
}
