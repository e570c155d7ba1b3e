//! What travels beside a frame of a veth: see `towpath_tables::mark`.

use crate::constant::constant;
use aya_ebpf::bindings::xdp_md;
use core::ffi::c_void;
use core::mem::transmute;
use towpath_pipeline::Beside;
use towpath_tables::mark::Function;

macro_rules! number {
    ($number:ident) => {
        constant!(const towpath_tables::mark::Number::$number.mark())
    };
}

/// Looks beside the frame in the driver's own structures.
///
/// # Safety
/// `ctx` is the context of a program that a veth runs in native mode.
#[inline(always)]
pub unsafe fn look(ctx: *mut xdp_md) -> Beside {
    let list = number!(SkbList);
    if list == 0 {
        return Beside::UNKNOWN;
    }
    // SAFETY: behind a veth's `xdp_buff` lies a pointer to an `sk_buff`, which is null if the frame came without one.
    // The marks were replaced by these functions and by the places of these fields; the kernel checks every read.
    unsafe {
        let cast_to_kern_ctx: unsafe extern "C" fn(*mut xdp_md) -> *const c_void =
            transmute(Function::CastToKernCtx.mark() as usize);
        let rdonly_cast: unsafe extern "C" fn(*const c_void, usize) -> *const *const c_void =
            transmute(Function::RdonlyCast.mark() as usize);
        let skb = *rdonly_cast(cast_to_kern_ctx(ctx).byte_add(number!(XdpBuff)), list);
        if skb.is_null() {
            return Beside::NOTHING;
        }
        let summed = *skb.byte_add(number!(Summed)).cast::<u8>() as usize;
        let vlan = *skb.byte_add(number!(Vlan)).cast::<u32>();
        let mask = number!(SummedMask);
        Beside {
            partial: Some(summed & mask == mask),
            tag: (vlan != 0).then_some((u16::from_be(vlan as u16), (vlan >> 16) as u16)),
        }
    }
}
