//! Traces: copies of packets and what became of them, for those who ask. Only the program `towpath_traced` has any of this, and
//! it is loaded only while somebody traces.

use crate::frame::XdpFrame;
use crate::maps::MAPS;
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_xdp_get_buff_len, bpf_xdp_load_bytes};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};
use core::mem::transmute;
use towpath_pipeline::{Beside, Entry, Frame};
use towpath_tables::mark;
use towpath_tables::opaque;
use towpath_tables::trace::{Gate, HEAD, TRACES, Traced, Wanted};

/// Takes the records to whoever reads them; its size is the loader's.
#[map(name = "trace_ring")]
static RING: RingBuf = RingBuf::with_byte_size(4096, 0);

/// How much each trace may tell.
#[map(name = "trace_gates")]
static GATES: Array<Gate> = Array::with_max_entries(TRACES as u32, 0);

/// The record of the packet that the program runs for: what it was is to be kept until it is known what becomes of it.
#[map(name = "trace_packet")]
static PACKET: PerCpuArray<Traced> = PerCpuArray::with_max_entries(1, 0);

/// Whether a trace's filter matches. The loader puts the filter in place of the mark.
///
/// # Safety
/// `ctx` is the context that the kernel called the program with.
#[inline(always)]
unsafe fn matches<const TRACE: u32>(ctx: *mut xdp_md) -> bool {
    // SAFETY: the mark is replaced by a function of this kind.
    let filter: unsafe extern "C" fn(*mut xdp_md) -> u32 = unsafe { transmute(mark::traced(TRACE) as usize) };
    // SAFETY: `ctx` is the program's context.
    unsafe { filter(ctx) != 0 }
}

/// Keeps the packet as it arrived, if a trace's filter matches; the traces of which one does, by bits. (The kernel verifies
/// functions by themselves only if they answer with a number.)
#[unsafe(no_mangle)]
#[inline(never)]
pub fn towpath_trace_begin(ctx: *mut xdp_md) -> u32 {
    let Some(packet) = PACKET.get_ptr_mut(0) else { return 0 };
    // SAFETY: this processor's own; `ctx` is the program's context. What was found is kept in memory bit by bit, so that a
    // verifier does not follow each set of filters that match by itself.
    unsafe {
        let traces = &raw mut (*packet).traces;
        traces.write_volatile(0);
        macro_rules! ask {
            ($($trace:literal)*) => { $(
                if matches::<$trace>(ctx) {
                    traces.write_volatile(traces.read_volatile() | 1 << $trace);
                }
            )* };
        }
        ask!(0 1 2 3);
        const _: () = assert!(TRACES == 4);
        if traces.read_volatile() != 0 {
            keep(ctx, &mut *packet);
        }
        traces.read_volatile()
    }
}

/// # Safety
/// `ctx` is the context that the kernel called the program with.
#[inline(always)]
unsafe fn keep(ctx: *mut xdp_md, packet: &mut Traced) {
    // SAFETY: `ctx` is the program's context; `head` has room for what is loaded.
    unsafe {
        packet.time = bpf_ktime_get_ns();
        packet.cpu = bpf_get_smp_processor_id();
        packet.ifindex = (*ctx).ingress_ifindex;
        packet.queue = (*ctx).rx_queue_index;
        packet.total_len = bpf_xdp_get_buff_len(ctx) as u32;
        let frame = XdpFrame::new(ctx);
        packet.first_len = frame.first_len() as u32;
        keep_beside(&frame, packet);
        let length = (packet.total_len as usize).min(HEAD);
        // So the verifier sees that it is neither nothing nor too much.
        let length = (opaque(length.wrapping_sub(1)) & (HEAD - 1)) + 1;
        packet.head_len = length as u32;
        if bpf_xdp_load_bytes(ctx, 0, packet.head.as_mut_ptr().cast(), length as u32) != 0 {
            packet.traces = 0;
        }
    }
}

#[inline(always)]
fn keep_beside(frame: &XdpFrame, packet: &mut Traced) {
    let sees = Entry::find(&MAPS, packet.ifindex).is_some_and(|entry| entry.sees_beside());
    let Beside { partial, tag } = if sees { frame.beside() } else { Beside::UNKNOWN };
    packet.partial = partial.map_or(2, u32::from);
    packet.tag = 0;
    if let Some((protocol, control)) = tag {
        packet.partial |= Traced::HAS_TAG;
        packet.tag = u32::from(protocol) << 16 | u32::from(control);
    }
}

/// Tells the traces what became of the packet, as far as their rates allow; those that were told, by bits.
#[unsafe(no_mangle)]
#[inline(never)]
pub fn towpath_trace_end(outcome: u32) -> u32 {
    let Some(packet) = PACKET.get_ptr_mut(0) else { return 0 };
    // SAFETY: this processor's own.
    let packet = unsafe { &mut *packet };
    if packet.traces == 0 {
        return 0;
    }
    packet.outcome = outcome;
    let mut told = 0;
    for trace in 0..TRACES as u32 {
        let Some(gate) = GATES.get_ptr(trace) else { return 0 };
        // SAFETY: a record of the array, of words that processors share.
        let gate = unsafe { &*gate };
        let asked = packet.traces >> trace & 1 != 0 && Wanted::takes(gate.wanted.load(), outcome);
        if asked && gate.admits(packet.time) {
            told |= 1 << trace;
        }
    }
    packet.traces = told;
    if told != 0 && RING.output::<Traced>(&*packet, 0).is_err() {
        count_lost(told);
    }
    told
}

/// Counts a packet for which the ring had no room.
#[inline(always)]
fn count_lost(traces: u32) {
    for trace in 0..TRACES as u32 {
        if let Some(gate) = GATES.get_ptr(trace).filter(|_| traces >> trace & 1 != 0) {
            // SAFETY: as in `towpath_trace_end`.
            unsafe { &*gate }.missed.add(1);
        }
    }
}
