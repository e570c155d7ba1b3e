//! A frame in an XDP context.

use crate::beside;
use crate::constant::constant;
use crate::maps::FAR_MAPS;
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len};
use towpath_pipeline::nat::{self, Choice};
use towpath_pipeline::{
    Beside, Candidate, Entering, Entry, Frame, Inside, Parsed, Place, Refusal, Tables, Turn, advance_tunnelled,
    checksum, enter6, forward_flow, look_through6,
};
use towpath_tables::record::{Family, PORT_SLOTS};
use towpath_tables::{Reason, opaque};
use towpath_wire::{Sum, View};

/// A first buffer with less in it than this is the whole frame: drivers fill it before they begin another, and none gives
/// it less room (the least is mlx5's, 1472 bytes; drivers/net/ethernet/mellanox/mlx5/core/en/params.c, Linux 6.1). Asking
/// the kernel costs a call, which with the mitigations for speculative returns is a fifth of the packet's way.
const FIRST_BUFFER: usize = 1024;

/// Whether nothing is to be forwarded. A verifier takes out what is then not done.
#[inline(always)]
pub fn is_shadow() -> bool {
    constant!(const towpath_tables::mark::SHADOW) != 0
}

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
    fn is_shadow(&self) -> bool {
        is_shadow()
    }

    #[inline(always)]
    fn forget(number: u32) -> u32 {
        // A verifier does not know what is in a table, so it does not know that this is 0.
        number ^ FAR_MAPS.config().map_or(0, |config| config.reserved[0].load())
    }

    #[inline(always)]
    fn sum(&self, offset: usize, len: usize) -> Option<Sum> {
        let folded = opaque(payload_sum(self.ctx, offset as u32, len as u32) as usize) as u32;
        u16::try_from(folded).ok().map(|folded| Sum::default().folded(folded))
    }

    #[inline(always)]
    fn tunnelled<T: Tables>(&mut self, _: &T, entry: &Entry, parsed: &Parsed, refusal: Refusal) -> Result<u32, Reason> {
        let at = entry.slot << SLOT_SHIFT | parsed.offset as u32 & PLACES;
        let what = match Place::of(refusal, parsed)? {
            Place::Outside(Parsed { family: Family::V6, .. }) => {
                INSIDE | entry.slot << OTHER_SHIFT | result(through6(self.ctx, Self::forget(at)))?
            }
            Place::Outside(_) => OUTSIDE | at,
            Place::Inside(_) => return Err(Reason::Internal),
            Place::Before(slot, _) => slot << OTHER_SHIFT | at,
        };
        let turn = opaque(tunnelled(self.ctx, Self::forget(what)) as usize) as u64;
        let answer = if turn & ENTERS == 0 { turn as u32 } else { into6(self.ctx, turn) };
        self.reload();
        result(answer)
    }

    #[inline(always)]
    fn flow<T: Tables>(&mut self, _: &T, entry: &Entry, candidate: Candidate) -> Result<u32, Reason> {
        let partial = if entry.may_be_partial() { PARTIAL } else { 0 };
        let what = entry.slot << SLOT_SHIFT | (candidate.reason as u32) << REASON_SHIFT;
        let what = Self::forget(what | partial | candidate.offset as u32 & OFFSET);
        let answer = match candidate.family {
            Family::V4 => flow4(self.ctx, what),
            Family::V6 => flow6(self.ctx, what),
        };
        self.reload();
        result(answer)
    }

    #[inline(always)]
    fn mapped<T: Tables>(&mut self, _: &T, entry: &Entry, candidate: Candidate) -> Result<u32, Reason> {
        let partial = if entry.may_be_partial() { PARTIAL } else { 0 };
        let six = if candidate.family == Family::V6 { SIX } else { 0 };
        let what = Self::forget(entry.slot << SLOT_SHIFT | partial | six | candidate.offset as u32 & OFFSET);
        let inward = mapped_in(self.ctx, what);
        let choice = mapped_choice(self.ctx, what, inward);
        let chosen = result_of_choice(choice)?;
        let outward = mapped_out(self.ctx, what, chosen.0);
        let answer = mapped_rewrite(self.ctx, what, outward, inward, chosen.0);
        self.reload();
        result(answer)
    }

    #[inline(always)]
    fn trim(&mut self, by: u32) -> bool {
        // SAFETY: as for `move_head`.
        let done = unsafe { bpf_xdp_adjust_tail(self.ctx, -(by as i32)) } == 0;
        self.reload();
        done
    }
}

/// What functions are told of a packet: the IP header's place, and the slot that it came in by
const OFFSET: u32 = 0x1f;
const SLOT_SHIFT: u32 = 8;
/// What `tunnelled` is told besides: the packet is to be looked through; or it was, and the slots are that of the tunnel that it
/// came out of and that of the port that it came in by; or neither, and the second slot is that of the tunnel that it goes into
const OUTSIDE: u32 = 1 << 24;
const INSIDE: u32 = 1 << 25;
const OTHER_SHIFT: u32 = 16;
const _: () = assert!(PORT_SLOTS << SLOT_SHIFT <= 1 << OTHER_SHIFT && PORT_SLOTS << OTHER_SHIFT <= OUTSIDE);
/// What it answers, beside what all do: what `into6` is to be told
const ENTERS: u64 = 1 << 48;
/// What `flow4` and `flow6` are told besides place and slot: checksums may be incomplete, and the policy's reason.
const PARTIAL: u32 = 0x20;
const REASON_SHIFT: u32 = 16;
/// What all answer: a slot, or what is inside of a tunnel's packet, or a reason from here on
const REFUSED: u32 = PORT_SLOTS << 8;

/// From an answer. The kernel verifies such functions by themselves and takes every number for possible; so that the compiler
/// does the same, no answer is judged before it is opaque.
#[inline(always)]
fn result(answer: u32) -> Result<u32, Reason> {
    let answer = opaque(answer as usize) as u32;
    match answer.checked_sub(REFUSED) {
        None => Ok(answer),
        Some(reason) => Err(Reason::from_index(reason as u8).unwrap_or(Reason::Internal)),
    }
}

/// The answer.
#[inline(always)]
fn answer(result: Result<u32, Reason>) -> u32 {
    match result {
        Ok(device) => device,
        // A compiler that knew nothing against it would add before it looks whether there is a reason, and a verifier
        // objects to adding to what may be anything.
        Err(reason) => opaque(reason as usize) as u32 + REFUSED,
    }
}

/// In place of a folded sum: there is none.
const NO_SUM: u32 = 1 << 16;
/// No header that a sum begins with lies farther behind.
const PLACES: u32 = 0xff;
/// Nothing longer is added up, and a verifier follows no place in a packet that may lie beyond 64 KiB.
const LENGTHS: u32 = 0x1fff;

#[inline(never)]
#[unsafe(no_mangle)]
fn payload_sum(ctx: *mut xdp_md, offset: u32, len: u32) -> u32 {
    if len > LENGTHS {
        return NO_SUM;
    }
    // SAFETY: the caller has the context from the kernel.
    let frame = unsafe { XdpFrame::new(ctx) };
    let len = opaque(len as usize) & LENGTHS as usize;
    let sum = checksum::sum(&frame, (offset & PLACES) as usize, len);
    sum.map_or(NO_SUM, |sum| sum.fold().into())
}

#[inline(never)]
#[unsafe(no_mangle)]
fn tunnelled(ctx: *mut xdp_md, what: u32) -> u64 {
    // SAFETY: the caller has the context from the kernel.
    let mut frame = unsafe { XdpFrame::new(ctx) };
    match go_on(&mut frame, what) {
        Ok(Turn::Enters(Entering(entering))) => ENTERS | entering,
        Ok(Turn::Sent(device)) => answer(Ok(device)).into(),
        Err(reason) => answer(Err(reason)).into(),
    }
}

/// Apart from `tunnelled`, so that the stack has room for both and a verifier goes through each by itself.
#[inline(never)]
#[unsafe(no_mangle)]
fn through6(ctx: *mut xdp_md, what: u32) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let frame = unsafe { XdpFrame::new(ctx) };
    answer(find_inside(&frame, what))
}

/// See `through6`.
#[inline(never)]
#[unsafe(no_mangle)]
fn into6(ctx: *mut xdp_md, what: u64) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let mut frame = unsafe { XdpFrame::new(ctx) };
    answer(enter6(&mut frame, &FAR_MAPS, Entering(what)))
}

#[inline(never)]
#[unsafe(no_mangle)]
fn flow4(ctx: *mut xdp_md, what: u32) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let mut frame = unsafe { XdpFrame::new(ctx) };
    answer(go_on_by_flow(&mut frame, Family::V4, what))
}

/// Apart from `flow4`, so that neither needs room on the stack for what the other keeps there.
#[inline(never)]
#[unsafe(no_mangle)]
fn flow6(ctx: *mut xdp_md, what: u32) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let mut frame = unsafe { XdpFrame::new(ctx) };
    answer(go_on_by_flow(&mut frame, Family::V6, what))
}

/// Of a packet that meets mappings, besides: it is IPv6.
const SIX: u32 = 1 << 16;
/// In place of a choice, a reason
const NO_CHOICE: u64 = 1 << 31;

#[inline(always)]
fn meets_mappings(what: u32) -> Option<(Entry<'static>, Candidate)> {
    let slot = what >> SLOT_SHIFT & (PORT_SLOTS - 1);
    let entry = Entry::new(slot, FAR_MAPS.port(slot)?).with_partial(what & PARTIAL != 0);
    let family = if what & SIX != 0 { Family::V6 } else { Family::V4 };
    Some((entry, Candidate { family, offset: (what & OFFSET) as usize, reason: Reason::Mapped }))
}

#[inline(always)]
fn result_of_choice(choice: u64) -> Result<Choice, Reason> {
    let choice = opaque(choice as usize) as u64;
    if choice & NO_CHOICE == 0 {
        Ok(Choice(choice))
    } else {
        Err(Reason::from_index(choice as u8).unwrap_or(Reason::Internal))
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
fn mapped_in(ctx: *mut xdp_md, what: u32) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let frame = unsafe { XdpFrame::new(ctx) };
    meets_mappings(what).map_or(0, |(entry, candidate)| nat::inward(&frame, &FAR_MAPS, &entry, candidate))
}

#[inline(never)]
#[unsafe(no_mangle)]
fn mapped_choice(ctx: *mut xdp_md, what: u32, inward: u32) -> u64 {
    // SAFETY: the caller has the context from the kernel.
    let frame = unsafe { XdpFrame::new(ctx) };
    let met = meets_mappings(what).ok_or(Reason::Internal);
    match met.and_then(|(entry, candidate)| nat::choose(&frame, &FAR_MAPS, &entry, candidate, inward)) {
        Ok(Choice(choice)) => choice & !NO_CHOICE,
        Err(reason) => NO_CHOICE | opaque(reason as usize) as u64,
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
fn mapped_out(ctx: *mut xdp_md, what: u32, choice: u64) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let frame = unsafe { XdpFrame::new(ctx) };
    meets_mappings(what).map_or(0, |(_, candidate)| nat::outward(&frame, &FAR_MAPS, candidate, Choice(choice)))
}

#[inline(never)]
#[unsafe(no_mangle)]
fn mapped_rewrite(ctx: *mut xdp_md, what: u32, outward: u32, inward: u32, choice: u64) -> u32 {
    // SAFETY: the caller has the context from the kernel.
    let mut frame = unsafe { XdpFrame::new(ctx) };
    let met = meets_mappings(what).ok_or(Reason::Internal);
    answer(met.and_then(|(entry, candidate)| {
        nat::finish(&mut frame, &FAR_MAPS, &entry, candidate, [outward, inward], Choice(choice))
    }))
}

#[inline(always)]
fn go_on_by_flow(frame: &mut XdpFrame, family: Family, what: u32) -> Result<u32, Reason> {
    let slot = what >> SLOT_SHIFT & (PORT_SLOTS - 1);
    let entry = Entry::new(slot, FAR_MAPS.port(slot).ok_or(Reason::Internal)?).with_partial(what & PARTIAL != 0);
    let reason = Reason::from_index((what >> REASON_SHIFT) as u8).ok_or(Reason::Internal)?;
    forward_flow(frame, &FAR_MAPS, &entry, Candidate { family, offset: (what & OFFSET) as usize, reason })
}

#[inline(always)]
fn go_on(frame: &mut XdpFrame, what: u32) -> Result<Turn, Reason> {
    let (slot, other) = (what >> SLOT_SHIFT & (PORT_SLOTS - 1), what >> OTHER_SHIFT & (PORT_SLOTS - 1));
    let parsed = || Parsed::again(frame, (what & PLACES) as usize);
    let (slot, place) = match what & (OUTSIDE | INSIDE) {
        0 => (slot, Place::Before(other, parsed()?)),
        OUTSIDE => (slot, Place::Outside(parsed()?)),
        _ => (other, Place::Inside(Inside(what & ((1 << OTHER_SHIFT) - 1)))),
    };
    let entry = Entry::new(slot, FAR_MAPS.port(slot).ok_or(Reason::Internal)?);
    advance_tunnelled(frame, &FAR_MAPS, &entry, place)
}

#[inline(always)]
fn find_inside(frame: &XdpFrame, what: u32) -> Result<u32, Reason> {
    let slot = what >> SLOT_SHIFT & (PORT_SLOTS - 1);
    let entry = Entry::new(slot, FAR_MAPS.port(slot).ok_or(Reason::Internal)?);
    let parsed = Parsed::again(frame, (what & PLACES) as usize)?;
    look_through6(frame, &FAR_MAPS, &entry, &parsed).map(|Inside(inside)| inside)
}
