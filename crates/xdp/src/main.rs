//! The XDP program: the packet path of crate `pipeline` over an XDP context and BPF maps.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod beside;
mod constant;
mod frame;
mod maps;

use aya_ebpf::bindings::{xdp_action, xdp_md};
use frame::XdpFrame;
use maps::Maps;
use towpath_pipeline::{Verdict, process};

/// Forwards what the tables allow; everything else goes to Linux as it came.
#[unsafe(no_mangle)]
#[unsafe(link_section = "xdp.frags")]
fn towpath(ctx: *mut xdp_md) -> u32 {
    // SAFETY: the kernel calls the program with a valid context.
    let (mut frame, ifindex) = unsafe { (XdpFrame::new(ctx), (*ctx).ingress_ifindex) };
    match process(&mut frame, &Maps, ifindex) {
        // The receiver was named by `Maps::transmitter`.
        Verdict::Forward(_) => xdp_action::XDP_REDIRECT,
        Verdict::Exception(_) | Verdict::NotAPort => xdp_action::XDP_PASS,
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
