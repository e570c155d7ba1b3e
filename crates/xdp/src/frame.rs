//! A frame in an XDP context.

use crate::beside;
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len};
use towpath_pipeline::{Beside, Frame};
use towpath_wire::View;

/// A first buffer with less in it than this is the whole frame: drivers fill it before they begin another, and none gives
/// it less room (the least is mlx5's, 1472 bytes; drivers/net/ethernet/mellanox/mlx5/core/en/params.c, Linux 6.1). Asking
/// the kernel costs a call, which with the mitigations for speculative returns is a fifth of the packet's way.
const FIRST_BUFFER: usize = 1024;

/// The frame that the program runs for. `start` and `end` enclose its first buffer; they are read again whenever the
/// kernel has moved it.
pub struct XdpFrame {
    ctx: *mut xdp_md,
    start: usize,
    end: usize,
}

impl XdpFrame {
    /// # Safety
    /// `ctx` is the context that the kernel called the program with.
    #[inline(always)]
    pub unsafe fn new(ctx: *mut xdp_md) -> Self {
        // SAFETY: as promised by the caller.
        unsafe { Self { ctx, start: (*ctx).data as usize, end: (*ctx).data_end as usize } }
    }

    #[inline(always)]
    fn reload(&mut self) {
        // SAFETY: `ctx` still is that context.
        *self = unsafe { Self::new(self.ctx) };
    }

    #[inline(always)]
    fn place<T: View>(&self, offset: usize) -> Option<*mut T> {
        let place = self.start + offset;
        if place + size_of::<T>() > self.end { None } else { Some(place as *mut T) }
    }
}

impl Frame for XdpFrame {
    #[inline(always)]
    fn get<T: View>(&self, offset: usize) -> Option<&T> {
        // SAFETY: inside the first buffer, which nobody else touches while the program runs; any bytes make a `T`.
        self.place(offset).map(|place| unsafe { &*place })
    }

    #[inline(always)]
    fn get_mut<T: View>(&mut self, offset: usize) -> Option<&mut T> {
        // SAFETY: as for `get`, and `self` is borrowed for as long as the view lives.
        self.place(offset).map(|place| unsafe { &mut *place })
    }

    #[inline(always)]
    fn first_len(&self) -> usize {
        self.end - self.start
    }

    #[inline(always)]
    fn total_len(&self) -> usize {
        match self.first_len() {
            whole if whole < FIRST_BUFFER => whole,
            // SAFETY: `ctx` is the program's context.
            _ => unsafe { bpf_xdp_get_buff_len(self.ctx) as usize },
        }
    }

    #[inline(always)]
    fn beside(&self) -> Beside {
        // SAFETY: `ctx` is the program's context, and the port's flag says that it is a veth's.
        unsafe { beside::look(self.ctx) }
    }

    #[inline(always)]
    fn move_head(&mut self, by: i32) -> bool {
        // SAFETY: `ctx` is the program's context; the bounds are read again.
        let done = unsafe { bpf_xdp_adjust_head(self.ctx, by) } == 0;
        self.reload();
        done
    }

    #[inline(always)]
    fn trim(&mut self, by: u32) -> bool {
        // SAFETY: as for `move_head`.
        let done = unsafe { bpf_xdp_adjust_tail(self.ctx, -(by as i32)) } == 0;
        self.reload();
        done
    }
}
