//! Whether a filter's answer can change when a frame is forwarded: all ways through the program are followed at once, with
//! what is known of the registers on each.
//!
//! The fast path writes MAC addresses, the time to live with the checksum (IPv4), or the hop limit (IPv6), and cuts padding
//! off. A filter that would read beyond a frame's end does not match; so one that matches the frame as it leaves has read
//! what was there when it arrived, too, and only those bytes and the length count.

use crate::ETHERTYPE;
use crate::decode::{Alu, Op, Operand, Reg, Test, Width};

/// What is known of a register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Known {
    low: u32,
    high: u32,
    /// It is the frame's EtherType
    ethertype: bool,
}

impl Known {
    const NOTHING: Self = Self::between(0, u32::MAX);

    const fn between(low: u32, high: u32) -> Self {
        Self { low, high, ethertype: false }
    }

    /// What holds on both of two ways.
    fn or(self, other: Self) -> Self {
        Self {
            low: self.low.min(other.low),
            high: self.high.max(other.high),
            ethertype: self.ethertype && other.ethertype,
        }
    }

    fn after(self, alu: Alu, with: Self) -> Self {
        let ends = match alu {
            Alu::Add => self.low.checked_add(with.low).zip(self.high.checked_add(with.high)),
            Alu::And => Some((0, self.high.min(with.high))),
            Alu::Rsh if with.low == with.high => self.low.checked_shr(with.low).zip(self.high.checked_shr(with.low)),
            Alu::Lsh if with.low == with.high && with.low < self.high.leading_zeros() => {
                Some((self.low << with.low, self.high << with.low))
            }
            _ => None,
        };
        ends.map_or(Self::NOTHING, |(low, high)| Self::between(low, high))
    }
}

const V4: u8 = 1;
const V6: u8 = 2;
const IPV4: u32 = 0x0800;
const IPV6: u32 = 0x86dd;
/// Where the network header begins
const NETWORK: u32 = 14;
/// Of IPv4 without options
const IPV4_HEADER: u32 = 20;

/// What is known before an instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
struct State {
    a: Known,
    x: Known,
    memory: [Known; 16],
    /// Families that frames can have which come here
    families: u8,
}

impl State {
    fn merge(&mut self, other: &Self) {
        self.a = self.a.or(other.a);
        self.x = self.x.or(other.x);
        self.memory.iter_mut().zip(other.memory).for_each(|(own, other)| *own = own.or(other));
        self.families |= other.families;
    }

    fn set(&mut self, register: Reg, known: Known) {
        match register {
            Reg::A => self.a = known,
            Reg::X => self.x = known,
        }
    }

    fn get(&self, register: Reg) -> Known {
        match register {
            Reg::A => self.a,
            Reg::X => self.x,
        }
    }

    fn operand(&self, operand: Operand) -> Known {
        match operand {
            Operand::K(k) => Known::between(k, k),
            Operand::X => self.x,
        }
    }

    /// Whether bytes from `first` up to `last` may be written when a frame that comes here is forwarded.
    fn may_be_written(&self, first: u32, last: u32) -> bool {
        let touches = |from: u32, to: u32| first <= to && last >= from;
        touches(0, ETHERTYPE - 1)
            || self.families & V4 != 0 && (touches(22, 22) || touches(24, 25))
            || self.families & V6 != 0 && touches(21, 21)
    }

    /// Whether the instruction may read what forwarding changes.
    fn reads_written(&self, op: Op) -> bool {
        match op {
            Op::Load(width, at) => self.may_be_written(at, at.saturating_add(width as u32 - 1)),
            Op::LoadHeaderLen(at) => self.may_be_written(at, at),
            Op::LoadIndexed { width, k, skipped } => {
                let place = |x: u32| i64::from(x) + i64::from(k as i32);
                // Places before the packet match in any case.
                let (first, last) = (place(self.x.low).max(0), place(self.x.high));
                let last = last + i64::from(width as u32 - 1);
                let wraps = self.x.high > i32::MAX as u32 || last > i64::from(i32::MAX);
                wraps || last >= 0 && self.may_be_written(first as u32 + skipped, last as u32 + skipped)
            }
            Op::LoadLen { .. } => true,
            _ => false,
        }
    }

    /// What the instruction leaves.
    fn advance(&mut self, op: Op) {
        match op {
            Op::Load(Width::Half, ETHERTYPE) => self.a = Known { ethertype: true, ..Known::between(0, 0xffff) },
            Op::Load(width, _) | Op::LoadIndexed { width, .. } => self.a = loaded(width),
            Op::LoadHeaderLen(NETWORK) if self.families == V4 => self.x = Known::between(IPV4_HEADER, IPV4_HEADER),
            Op::LoadHeaderLen(_) => self.x = Known::between(0, 60),
            Op::LoadLen { to, .. } => self.set(to, Known::NOTHING),
            Op::Set(to, k) => self.set(to, Known::between(k, k)),
            Op::LoadMem(to, slot) => self.set(to, self.memory[usize::from(slot)]),
            Op::StoreMem(from, slot) => self.memory[usize::from(slot)] = self.get(from),
            Op::Alu(alu, operand) => self.a = self.a.after(alu, self.operand(operand)),
            Op::Negate => self.a = Known::NOTHING,
            Op::ToX => self.x = self.a,
            Op::ToA => self.a = self.x,
            Op::Jump(_) | Op::Branch { .. } | Op::Return(_) | Op::ReturnA => {}
        }
    }

    /// The families of frames that a branch sends either way.
    fn split(&self, test: Test, operand: Operand) -> [u8; 2] {
        match (test, operand) {
            (Test::Equal, Operand::K(k)) if self.a.ethertype => {
                let equal = match k {
                    IPV4 => V4,
                    IPV6 => V6,
                    _ => 0,
                };
                [self.families & equal, self.families & !equal]
            }
            _ => [self.families; 2],
        }
    }
}

fn loaded(width: Width) -> Known {
    match width {
        Width::Byte => Known::between(0, 0xff),
        Width::Half => Known::between(0, 0xffff),
        Width::Word => Known::NOTHING,
    }
}

/// Whether no frame's way through the program reads what forwarding changes.
pub fn survives(ops: &[Op]) -> bool {
    let start = Known::between(0, 0);
    let mut states: Vec<Option<State>> = vec![None; ops.len()];
    flow(&mut states, 0, &State { a: start, x: start, memory: [Known::NOTHING; 16], families: V4 | V6 });
    for (at, op) in ops.iter().enumerate() {
        // Jumps go forward: everything that leads here has been seen. Nothing may, or nothing that is forwarded.
        let Some(mut state) = states[at].take() else { continue };
        if state.reads_written(*op) {
            return false;
        }
        state.advance(*op);
        match *op {
            Op::Return(_) | Op::ReturnA => {}
            Op::Jump(target) => flow(&mut states, target, &state),
            Op::Branch { test, operand, yes, no } => {
                for (target, families) in [yes, no].into_iter().zip(state.split(test, operand)) {
                    flow(&mut states, target, &State { families, ..state.clone() });
                }
            }
            _ => flow(&mut states, at + 1, &state),
        }
    }
    true
}

/// Frames come to an instruction.
fn flow(states: &mut [Option<State>], target: usize, state: &State) {
    if state.families == 0 {
        return;
    }
    match states.get_mut(target) {
        Some(Some(there)) => there.merge(state),
        Some(empty) => *empty = Some(state.clone()),
        None => {}
    }
}
