//! Filters run here, on frames that no XDP program sees.

use crate::Filter;
use crate::decode::{Alu, Op, Operand, Reg, Test, Width};

const SLOTS: usize = 16;

/// A filter's instructions, ready to be run.
#[derive(Clone, Debug)]
pub struct Runnable(Vec<Op>);

impl Filter {
    /// Makes it ready to be run here.
    pub fn runnable(&self) -> Runnable {
        Runnable(self.ops())
    }
}

impl Runnable {
    /// Whether it matches a frame, given from its Ethernet header on: what [`crate::translate`] would have an XDP program
    /// answer.
    pub fn matches(&self, frame: &[u8]) -> bool {
        Run { frame, a: 0, x: 0, memory: [0; SLOTS] }.run(&self.0).unwrap_or(false)
    }
}

/// What changes while a filter runs.
struct Run<'f> {
    frame: &'f [u8],
    a: u32,
    x: u32,
    memory: [u32; SLOTS],
}

impl Run<'_> {
    /// Its answer; None if it loads what the frame does not have, or divides by 0, which ends it.
    fn run(mut self, ops: &[Op]) -> Option<bool> {
        let mut at = 0;
        // Jumps go forward (`Filter::new`), so this comes to an end.
        loop {
            let op = *ops.get(at)?;
            at += 1;
            match op {
                Op::Load(width, place) => self.a = self.load(width, place)?,
                Op::LoadIndexed { width, k, skipped } => {
                    let place = self.x.wrapping_add(k);
                    // Before the packet: see `translate`.
                    if place.cast_signed() < 0 {
                        return Some(true);
                    }
                    self.a = self.load(width, place + skipped)?;
                }
                Op::LoadHeaderLen(place) => self.x = (self.load(Width::Byte, place)? & 15) << 2,
                Op::LoadLen { to, skipped } => self.set(to, (self.frame.len() as u32).wrapping_sub(skipped)),
                Op::Set(to, k) => self.set(to, k),
                Op::LoadMem(to, slot) => self.set(to, *self.memory.get(usize::from(slot))?),
                Op::StoreMem(from, slot) => *self.memory.get_mut(usize::from(slot))? = self.get(from),
                Op::Alu(alu, operand) => self.a = calculate(alu, self.a, self.operand(operand))?,
                Op::Negate => self.a = self.a.wrapping_neg(),
                Op::Jump(target) => at = target,
                Op::Branch { test, operand, yes, no } => {
                    at = if holds(test, self.a, self.operand(operand)) { yes } else { no };
                }
                Op::ReturnA => return Some(self.a != 0),
                Op::Return(answer) => return Some(answer),
                Op::ToX => self.x = self.a,
                Op::ToA => self.a = self.x,
            }
        }
    }

    fn load(&self, width: Width, place: u32) -> Option<u32> {
        let bytes = self.frame.get(place as usize..)?.get(..width as usize)?;
        Some(bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn get(&self, register: Reg) -> u32 {
        match register {
            Reg::A => self.a,
            Reg::X => self.x,
        }
    }

    fn set(&mut self, register: Reg, value: u32) {
        match register {
            Reg::A => self.a = value,
            Reg::X => self.x = value,
        }
    }

    fn operand(&self, operand: Operand) -> u32 {
        match operand {
            Operand::K(k) => k,
            Operand::X => self.x,
        }
    }
}

/// None for what is divided by 0. Shifts are by the lowest five bits, as in eBPF.
fn calculate(alu: Alu, a: u32, operand: u32) -> Option<u32> {
    Some(match alu {
        Alu::Add => a.wrapping_add(operand),
        Alu::Sub => a.wrapping_sub(operand),
        Alu::Mul => a.wrapping_mul(operand),
        Alu::Div => a.checked_div(operand)?,
        Alu::Mod => a.checked_rem(operand)?,
        Alu::Or => a | operand,
        Alu::And => a & operand,
        Alu::Xor => a ^ operand,
        Alu::Lsh => a.wrapping_shl(operand),
        Alu::Rsh => a.wrapping_shr(operand),
    })
}

fn holds(test: Test, a: u32, operand: u32) -> bool {
    match test {
        Test::Equal => a == operand,
        Test::Greater => a > operand,
        Test::GreaterOrEqual => a >= operand,
        Test::AnyOf => a & operand != 0,
    }
}
