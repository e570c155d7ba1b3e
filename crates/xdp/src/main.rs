//! The XDP program: the packet path of crate `pipeline` over an XDP context and BPF maps.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch, asm_goto_with_outputs))]

mod accept;
mod attended;
mod beside;
mod captured;
mod constant;
mod filters;
mod frame;
mod maps;
mod nat;
mod trace;

use aya_ebpf::bindings::{xdp_action, xdp_md};
use frame::{XdpFrame, is_shadow};
use maps::{MAPS, Maps};
use towpath_pipeline::{Entry, Frame, Verdict, parse, process_unfiltered};
use towpath_tables::record::SOCKET_FRAME;
use towpath_tables::trace::Outcome;

/// Forwards what the tables allow; everything else goes to Linux as it came.
#[unsafe(no_mangle)]
#[unsafe(link_section = "xdp.frags")]
fn towpath(ctx: *mut xdp_md) -> u32 {
    // SAFETY: the kernel calls the program with a valid context.
    unsafe {
        match beforehand(ctx) {
            Some((action, _)) => action,
            None => action(process_unfiltered(&mut XdpFrame::new(ctx), &MAPS, (*ctx).ingress_ifindex)),
        }
    }
}

/// As `towpath`, for ports of the user engine: what a worker may forward goes to its socket while there is one. The rest,
/// and everything when the workers are gone, takes the same way as with the other program.
#[unsafe(no_mangle)]
#[unsafe(link_section = "xdp.frags")]
fn towpath_user(ctx: *mut xdp_md) -> u32 {
    // SAFETY: the kernel calls the program with a valid context.
    if let Some((action, _)) = unsafe { beforehand(ctx) } {
        return action;
    }
    // SAFETY: as above.
    let (mut frame, ifindex, queue) = unsafe { (XdpFrame::new(ctx), (*ctx).ingress_ifindex, (*ctx).rx_queue_index) };
    if is_for_socket(&frame, ifindex, queue) {
        xdp_action::XDP_REDIRECT
    } else {
        action(process_unfiltered(&mut frame, &MAPS, ifindex))
    }
}

/// As both others, with traces: see `trace`. Without sockets nothing is for one.
#[unsafe(no_mangle)]
#[unsafe(link_section = "xdp.frags")]
fn towpath_traced(ctx: *mut xdp_md) -> u32 {
    trace::towpath_trace_begin(ctx);
    // SAFETY: the kernel calls the program with a valid context.
    if let Some((action, outcome)) = unsafe { beforehand(ctx) } {
        trace::towpath_trace_end(outcome);
        return action;
    }
    // SAFETY: as above.
    let (mut frame, ifindex, queue) = unsafe { (XdpFrame::new(ctx), (*ctx).ingress_ifindex, (*ctx).rx_queue_index) };
    if is_for_socket(&frame, ifindex, queue) {
        // Its worker traces it.
        return xdp_action::XDP_REDIRECT;
    }
    let verdict = process_unfiltered(&mut frame, &MAPS, ifindex);
    trace::towpath_trace_end(Outcome::from(verdict).word());
    action(verdict)
}

/// What is decided before the packet path, and how a trace tells it (`Outcome::word`): by filters, then since nobody looks at
/// Linux any more, then for captures.
///
/// # Safety
/// `ctx` is the context that the kernel called the program with.
#[inline(always)]
unsafe fn beforehand(ctx: *mut xdp_md) -> Option<(u32, u32)> {
    // SAFETY: the caller's promise.
    if unsafe { filters::dropped(ctx) } {
        return Some((xdp_action::XDP_DROP, Outcome::from(Verdict::Drop).word()));
    }
    // SAFETY: as above.
    let linuxs = unsafe { attended::unattended((*ctx).ingress_ifindex).or_else(|| captured::captured(ctx)) };
    linuxs.map(|outcome| (xdp_action::XDP_PASS, outcome))
}

/// Whether the frame goes to the socket of this queue, which is then named for the verdict XDP_REDIRECT. Only what is
/// whole in the frame and lies in one buffer can go there.
#[inline(always)]
fn is_for_socket(frame: &XdpFrame, ifindex: u32, queue: u32) -> bool {
    let Some(mut entry) = Entry::find(&MAPS, ifindex) else { return false };
    let (slot, sees) = (entry.slot, entry.sees_beside());
    frame.total_len() <= SOCKET_FRAME
        && frame.total_len() == frame.first_len()
        && (!sees || frame.beside().tag.is_none())
        && parse(frame, &MAPS, &mut entry).is_ok()
        && Maps::socket(slot, queue)
}

#[inline(always)]
fn action(verdict: Verdict) -> u32 {
    match verdict {
        // The receiver was named by `Maps::transmitter`.
        Verdict::Forward(_) if !is_shadow() => xdp_action::XDP_REDIRECT,
        Verdict::Forward(_) | Verdict::Exception(_) | Verdict::NotAPort => xdp_action::XDP_PASS,
        Verdict::Drop => xdp_action::XDP_DROP,
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // A panic that the compiler could not remove is an endless loop, which the verifier refuses.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
