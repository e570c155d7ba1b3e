//! The benchmarks' own XDP programs: the traffic source, the sinks, and the peers that Towpath is measured against.
#![no_std]
#![no_main]

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibParams, xdp_action, xdp_md};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_ktime_get_ns};
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, DevMap};
use aya_ebpf::programs::XdpContext;

/// What the source writes over the template for each packet: an IPv6 destination, or an IPv4 destination in the first
/// four bytes, the IPv4 header's checksum and UDP's in the next two each.
#[repr(C)]
pub struct Variation(pub [u64; 2]);

/// How the source works.
#[repr(C)]
pub struct Source {
    /// First 64 bytes of every frame
    pub template: [u32; 16],
    /// Number of variations less one (a power of two less one)
    pub mask: u32,
    /// 4 or 6, plus `STAMPED` and `SOURCES`; 0: the template is all there is to the frame
    pub family: u32,
    /// Packets sent
    pub sent: u64,
}

#[map]
static SOURCE: Array<Source> = Array::with_max_entries(1, 0);
#[map]
static VARIATIONS: Array<Variation> = Array::with_max_entries(1, 1024);
#[map]
static OUT: DevMap = DevMap::with_max_entries(1, 0);
/// Packets seen by `sink`, `absorb` or `relay` (0) and `discard` (1).
#[map]
static SEEN: Array<u64> = Array::with_max_entries(2, 1024);
#[map]
static PORTS: DevMap = DevMap::with_max_entries(1024, 0);

/// Where `source` leaves the time, if asked to, and `observe` finds it: after the UDP header over IPv4.
const STAMP: usize = 42;
/// The time of sending goes into the payload (IPv4 only).
const STAMPED: u32 = 1 << 8;
/// It is the source address that varies (IPv4 only).
const SOURCES: u32 = 1 << 9;

/// Writes the next frame of the sequence over whatever the frame held and sends it out.
#[xdp]
pub fn source(ctx: XdpContext) -> u32 {
    send(&ctx)
}

/// When `paced` sends, in nanoseconds (CLOCK_MONOTONIC).
#[repr(C)]
pub struct Pace {
    /// Between two packets in the mean
    pub interval: u64,
    /// When it began
    pub start: u64,
    /// Packets sent since, and those that it was too late for
    pub count: u64,
}

#[map]
static PACE: Array<Pace> = Array::with_max_entries(1, 0);
/// Packets go in bursts, as they come from a device that holds its interrupts back a little.
const TICK: u64 = 50_000;
/// Packets that are sent at once at most, when the source has come late: a veth's ring holds 256.
const BURST: u64 = 128;

/// As `source`, when a packet is due; otherwise it drops the frame and leaves the sequence as it is.
#[xdp]
pub fn paced(ctx: XdpContext) -> u32 {
    let Some(pace) = PACE.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: plain helper call; map values are whole and one CPU runs the program at a time.
    unsafe {
        let tick = bpf_ktime_get_ns() / TICK * TICK;
        let due = tick.saturating_sub((*pace).start) / (*pace).interval.max(1);
        if due <= (*pace).count {
            return xdp_action::XDP_DROP;
        }
        (*pace).count = (*pace).count.max(due.saturating_sub(BURST)) + 1;
    }
    send(&ctx)
}

#[inline(always)]
fn send(ctx: &XdpContext) -> u32 {
    let Some(source) = SOURCE.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    let frame = ctx.data() as *mut u8;
    // SAFETY: the verifier proves every access: 60 bytes of the frame are compared with its end, map values are whole.
    unsafe {
        if frame.add(60) as usize > ctx.data_end() {
            return xdp_action::XDP_ABORTED;
        }
        let words = frame as *mut u32;
        for i in 0..15 {
            words.add(i).write_unaligned((*source).template[i]);
        }
        let Some(variation) = VARIATIONS.get_ptr((*source).sent as u32 & (*source).mask) else {
            return xdp_action::XDP_ABORTED;
        };
        if (*source).family == 0 {
            if frame.add(64) as usize > ctx.data_end() {
                return xdp_action::XDP_ABORTED;
            }
            words.add(15).write_unaligned((*source).template[15]);
        } else if (*source).family & 0xff == 4 {
            let address = if (*source).family & SOURCES == 0 { 30 } else { 26 };
            (frame.add(address) as *mut u32).write_unaligned((*variation).0[0] as u32);
            (frame.add(24) as *mut u16).write_unaligned(((*variation).0[0] >> 32) as u16);
            (frame.add(40) as *mut u16).write_unaligned(((*variation).0[0] >> 48) as u16);
        } else {
            if frame.add(64) as usize > ctx.data_end() {
                return xdp_action::XDP_ABORTED;
            }
            words.add(15).write_unaligned((*source).template[15]);
            (frame.add(38) as *mut u64).write_unaligned((*variation).0[0]);
            (frame.add(46) as *mut u64).write_unaligned((*variation).0[1]);
        }
        if (*source).family & STAMPED != 0 {
            (frame.add(STAMP) as *mut u64).write_unaligned(bpf_ktime_get_ns());
        }
        (*source).sent += 1;
    }
    OUT.redirect(0, 0).unwrap_or(xdp_action::XDP_ABORTED)
}

#[inline(always)]
fn count(slot: u32) {
    if let Some(seen) = SEEN.get_ptr_mut(slot) {
        // SAFETY: a map value; one CPU runs the program at a time.
        unsafe { *seen += 1 }
    }
}

/// The far end: counts and drops.
#[xdp(frags)]
pub fn sink(_ctx: XdpContext) -> u32 {
    count(0);
    xdp_action::XDP_DROP
}

/// A far end that is also a working interface: takes the source's packets (IPv4, UDP to the discard port), leaves the
/// rest to Linux.
#[xdp(frags)]
pub fn absorb(ctx: XdpContext) -> u32 {
    if !to_discard_port(&ctx) {
        return xdp_action::XDP_PASS;
    }
    count(0);
    xdp_action::XDP_DROP
}

#[inline(always)]
fn to_discard_port(ctx: &XdpContext) -> bool {
    let frame = ctx.data() as *const u8;
    // SAFETY: the verifier proves the accesses against data_end.
    unsafe {
        frame.add(38) as usize <= ctx.data_end()
            && (frame.add(12) as *const u16).read_unaligned() == ETHERTYPE_IPV4
            && *frame.add(23) == IPPROTO_UDP
            && (frame.add(36) as *const u16).read_unaligned() == DISCARD_PORT
    }
}

const IPPROTO_UDP: u8 = 17;
const DISCARD_PORT: u16 = 9u16.to_be();

/// Latencies of stamped packets in units of `LATENCY_UNIT` nanoseconds; the last bucket holds all longer ones.
#[map]
static LATENCIES: Array<u64> = Array::with_max_entries(LATENCY_BUCKETS, 1024);
const LATENCY_BUCKETS: u32 = 1 << 16;
const LATENCY_UNIT: u64 = 100;
/// Times at which the last byte of the destination MAC address changed: `CHANGES[n]` is the time of the nth change,
/// the last element counts them.
#[map]
static CHANGES: Array<[u64; 2]> = Array::with_max_entries(CHANGES_KEPT + 1, 1024);
const CHANGES_KEPT: u32 = 1 << 16;

/// The far end that looks: counts, notes latencies and when packets began to go to another gateway.
#[xdp(frags)]
pub fn observe(ctx: XdpContext) -> u32 {
    count(0);
    let frame = ctx.data() as *const u8;
    // SAFETY: the verifier proves the accesses against data_end.
    let (gateway, sent) = unsafe {
        if frame.add(STAMP + 8) as usize > ctx.data_end() {
            return xdp_action::XDP_DROP;
        }
        (u64::from(*frame.add(5)), (frame.add(STAMP) as *const u64).read_unaligned())
    };
    // SAFETY: plain helper call; map values are whole and one CPU runs the program at a time.
    unsafe {
        let now = bpf_ktime_get_ns();
        let bucket = (now.wrapping_sub(sent) / LATENCY_UNIT).min(u64::from(LATENCY_BUCKETS) - 1) as u32;
        if let Some(latency) = LATENCIES.get_ptr_mut(bucket) {
            *latency += 1;
        }
        let Some(state) = CHANGES.get_ptr_mut(CHANGES_KEPT) else { return xdp_action::XDP_DROP };
        if (*state)[1] != gateway {
            (*state)[1] = gateway;
            if let Some(change) = CHANGES.get_ptr_mut((*state)[0] as u32 & (CHANGES_KEPT - 1)) {
                *change = [now, gateway];
            }
            (*state)[0] += 1;
        }
    }
    xdp_action::XDP_DROP
}

/// XDP_DROP in the router.
#[xdp(frags)]
pub fn discard(_ctx: XdpContext) -> u32 {
    count(1);
    xdp_action::XDP_DROP
}

/// XDP_PASS in the router.
#[xdp(frags)]
pub fn pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// The bare redirect: every frame, as it is, to the other port.
#[xdp(frags)]
pub fn redirect(_ctx: XdpContext) -> u32 {
    OUT.redirect(0, 0).unwrap_or(xdp_action::XDP_ABORTED)
}

/// What a router does to any packet, and no more: every frame, counted down and with its MAC addresses exchanged, to the other
/// port. What it costs over `redirect` is mostly the first read of the frame.
#[xdp(frags)]
pub fn rewrite(ctx: XdpContext) -> u32 {
    let frame = ctx.data() as *mut u8;
    // SAFETY: the verifier proves every access against data_end.
    unsafe {
        if frame.add(34) as usize > ctx.data_end() {
            return xdp_action::XDP_ABORTED;
        }
        count_down(frame, (frame.add(12) as *const u16).read_unaligned());
        let addresses = (frame as *const [[u8; 6]; 2]).read_unaligned();
        (frame as *mut [[u8; 6]; 2]).write_unaligned([addresses[1], addresses[0]]);
    }
    OUT.redirect(0, 0).unwrap_or(xdp_action::XDP_ABORTED)
}

/// Makes what a socket sent look as if it came from a driver: counts the source's packets (as `absorb` knows them) and
/// sends them out.
#[xdp(frags)]
pub fn relay(ctx: XdpContext) -> u32 {
    if !to_discard_port(&ctx) {
        return xdp_action::XDP_PASS;
    }
    count(0);
    OUT.redirect(0, 0).unwrap_or(xdp_action::XDP_ABORTED)
}

/// A minimal router on `bpf_fib_lookup`: stands in for xdp-tools' xdp-forward where that is not installed.
#[xdp(frags)]
pub fn fib_forward(ctx: XdpContext) -> u32 {
    forward(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

const ETHERTYPE_IPV4: u16 = 0x0800u16.to_be();
const ETHERTYPE_IPV6: u16 = 0x86ddu16.to_be();
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

#[inline(always)]
fn forward(ctx: &XdpContext) -> Option<u32> {
    // SAFETY: the verifier proves every access against data_end; FibParams is plain data, for which zeros are valid.
    unsafe {
        let frame = ctx.data() as *mut u8;
        if frame.add(34) as usize > ctx.data_end() {
            return None;
        }
        let mut fib: FibParams = core::mem::zeroed();
        let ethertype = (frame.add(12) as *const u16).read_unaligned();
        match ethertype {
            ETHERTYPE_IPV4 => {
                if *frame.add(14) != 0x45 || *frame.add(22) <= 1 {
                    return None;
                }
                fib.family = AF_INET;
                fib.l4_protocol = *frame.add(23);
                fib.__bindgen_anon_1.tot_len = u16::from_be((frame.add(16) as *const u16).read_unaligned());
                fib.__bindgen_anon_3.ipv4_src = (frame.add(26) as *const u32).read_unaligned();
                fib.__bindgen_anon_4.ipv4_dst = (frame.add(30) as *const u32).read_unaligned();
            }
            ETHERTYPE_IPV6 => {
                if frame.add(54) as usize > ctx.data_end() || *frame.add(21) <= 1 {
                    return None;
                }
                fib.family = AF_INET6;
                fib.l4_protocol = *frame.add(20);
                fib.__bindgen_anon_1.tot_len = u16::from_be((frame.add(18) as *const u16).read_unaligned());
                fib.__bindgen_anon_3.ipv6_src = (frame.add(22) as *const [u32; 4]).read_unaligned();
                fib.__bindgen_anon_4.ipv6_dst = (frame.add(38) as *const [u32; 4]).read_unaligned();
            }
            _ => return None,
        }
        fib.ifindex = (*(ctx.ctx as *const xdp_md)).ingress_ifindex;
        let found = bpf_fib_lookup(ctx.ctx as *mut _, &mut fib, size_of::<FibParams>() as i32, 0);
        if found != BPF_FIB_LKUP_RET_SUCCESS as i64 {
            return None;
        }
        count_down(frame, ethertype);
        (frame as *mut [u8; 6]).write_unaligned(fib.dmac);
        (frame.add(6) as *mut [u8; 6]).write_unaligned(fib.smac);
        Some(PORTS.redirect(fib.ifindex, 0).unwrap_or(xdp_action::XDP_ABORTED))
    }
}

/// Takes one from the TTL or the hop limit.
///
/// # Safety
/// The frame has 34 bytes.
#[inline(always)]
unsafe fn count_down(frame: *mut u8, ethertype: u16) {
    // SAFETY: as the caller says.
    unsafe {
        if ethertype == ETHERTYPE_IPV4 {
            let check = frame.add(24) as *mut u16;
            let sum = u32::from(check.read_unaligned()) + u32::from(0x0100u16.to_be());
            check.write_unaligned((sum + (sum >> 16)) as u16);
            *frame.add(22) -= 1;
        } else {
            *frame.add(21) -= 1;
        }
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
