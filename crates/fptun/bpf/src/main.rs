//! The tc program on the egress hook of the device that packets with a record are sent by: checks the record, cuts it off,
//! and has the packet enter where the record says.
#![no_std]
#![no_main]

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT};
use aya_ebpf::helpers::{bpf_check_mtu, bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use towpath_wire::fptun::{Entry, Key, Outcome, Record};

/// Put there by whoever loads the program.
#[unsafe(no_mangle)]
static KEY: Global<Key> = Global::new([0; 2]);

/// Packets by `Outcome`.
#[map]
static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);

const RECORD: u32 = size_of::<Record>() as u32;

#[classifier]
fn fptun(ctx: TcContext) -> i32 {
    match enter(&ctx) {
        Ok(Entry::Ingress(device)) => redirect(Outcome::Ingress, device, BPF_F_INGRESS.into()),
        Ok(Entry::Egress(device)) => redirect(Outcome::Egress, device, 0),
        Err(outcome) => {
            count(outcome);
            TC_ACT_SHOT
        }
    }
}

/// Makes the packet what is to enter.
#[inline(always)]
fn enter(ctx: &TcContext) -> Result<Entry, Outcome> {
    let length = ctx.len().checked_sub(RECORD).ok_or(Outcome::NoRecord)?;
    let words: [u64; 4] = ctx.load(length as usize).map_err(|_| Outcome::NoRecord)?;
    let record = Record::over(&words);
    let entry = record.check(KEY.load())?;
    let (Entry::Ingress(device) | Entry::Egress(device)) = entry;
    let skb = ctx.skb.skb;
    let mut mtu = 0;
    // SAFETY: the context is the kernel's, and `mtu` outlives the call. What fits is for Linux to judge: it is asked only
    // whether there is such a device (net/core/filter.c, bpf_skb_check_mtu, Linux 6.1).
    let known = unsafe { bpf_check_mtu(skb.cast(), device, &mut mtu, 0, 0) } >= 0;
    // SAFETY: the context is the kernel's.
    if !known || unsafe { bpf_skb_change_tail(skb, length, 0) } != 0 {
        return Err(Outcome::Undeliverable);
    }
    ctx.set_mark(record.mark.get());
    Ok(entry)
}

#[inline(always)]
fn redirect(outcome: Outcome, device: u32, flags: u64) -> i32 {
    count(outcome);
    // SAFETY: takes numbers only.
    unsafe { bpf_redirect(device, flags) as i32 }
}

#[inline(always)]
fn count(outcome: Outcome) {
    if let Some(counter) = OUTCOMES.get_ptr_mut(outcome as u32) {
        // SAFETY: the counter is this CPU's own.
        unsafe { *counter += 1 };
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
