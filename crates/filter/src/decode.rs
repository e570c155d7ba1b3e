//! Classic BPF decoded and checked (include/uapi/linux/{bpf_common,filter}.h, Linux 6.1).

use crate::{ETHERTYPE, Layer, MAX_INSTRUCTIONS};

/// Why a filter cannot be run. Whoever has one sees everything by way of Linux.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unsupported {
    /// More than `MAX_INSTRUCTIONS`
    #[error("it has {0} instructions, more than {MAX_INSTRUCTIONS}")]
    Long(usize),
    /// It asks for what travels beside the packet (SKF_AD_*)
    #[error("instruction {0} looks beside the packet")]
    Ancillary(usize),
    /// Nothing that Linux would take
    #[error("instruction {0} is none of a socket filter's")]
    Malformed(usize),
}

/// Encodes a `struct sock_filter`.
pub const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> u64 {
    (code as u64) << 48 | (jt as u64) << 40 | (jf as u64) << 32 | k as u64
}

/// The two registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reg {
    A,
    X,
}

/// How many bytes a load takes, in network byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Width {
    Byte = 1,
    Half = 2,
    Word = 4,
}

/// The second operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operand {
    K(u32),
    X,
}

/// What is worked out. The numbers are those of the operation's four bits, in classic BPF and in eBPF.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Alu {
    Add = 0x00,
    Sub = 0x10,
    Mul = 0x20,
    Div = 0x30,
    Or = 0x40,
    And = 0x50,
    Lsh = 0x60,
    Rsh = 0x70,
    Mod = 0x90,
    Xor = 0xa0,
}

/// What is asked of A; numbers as in `Alu`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Test {
    Equal = 0x10,
    Greater = 0x20,
    GreaterOrEqual = 0x30,
    AnyOf = 0x40,
}

/// An instruction. Places in the packet count from the frame's beginning, targets from the program's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// A = packet[at]
    Load(Width, u32),
    /// A = packet[X + k], as the socket counts; `skipped` bytes of the frame lie before that
    LoadIndexed {
        width: Width,
        k: u32,
        skipped: u32,
    },
    /// X = 4 * (packet[at] & 15)
    LoadHeaderLen(u32),
    /// The frame's length without the bytes that the socket does not see
    LoadLen {
        to: Reg,
        skipped: u32,
    },
    Set(Reg, u32),
    LoadMem(Reg, u8),
    StoreMem(Reg, u8),
    Alu(Alu, Operand),
    Negate,
    Jump(usize),
    Branch {
        test: Test,
        operand: Operand,
        yes: usize,
        no: usize,
    },
    /// Matches if A is not 0
    ReturnA,
    Return(bool),
    /// X = A
    ToX,
    /// A = X
    ToA,
}

// Places of what lies beside the packet.
const AD_OFF: u32 = -0x1000i32 as u32;
const AD_PROTOCOL: u32 = AD_OFF;
const AD_VLAN_TAG: u32 = AD_OFF + 44;
const AD_VLAN_TAG_PRESENT: u32 = AD_OFF + 48;
/// From here on places are relative to headers, or beside the packet.
const NEGATIVE: u32 = 1 << 31;
const MEMORY: u32 = 16;

/// The program's instructions, if all can be run.
pub fn decode(layer: Layer, code: &[u64]) -> Result<Vec<Op>, Unsupported> {
    if code.len() > MAX_INSTRUCTIONS {
        return Err(Unsupported::Long(code.len()));
    }
    let ops = code.iter().enumerate().map(|(at, raw)| decode_one(layer, at, *raw)).collect::<Result<Vec<_>, _>>()?;
    let last = ops.len().checked_sub(1).ok_or(Unsupported::Malformed(0))?;
    // Jumps go forward, so it comes to its end.
    if !matches!(ops[last], Op::Return(_) | Op::ReturnA) {
        return Err(Unsupported::Malformed(last));
    }
    let outside = |(at, op): (usize, &Op)| followers(at, op).into_iter().flatten().any(|next| next > last);
    ops.iter().enumerate().position(outside).map_or(Ok(ops), |at| Err(Unsupported::Malformed(at)))
}

/// What may follow an instruction.
pub fn followers(at: usize, op: &Op) -> [Option<usize>; 2] {
    match *op {
        Op::Return(_) | Op::ReturnA => [None; 2],
        Op::Jump(target) => [Some(target), None],
        Op::Branch { yes, no, .. } => [Some(yes), Some(no)],
        _ => [Some(at + 1), None],
    }
}

fn decode_one(layer: Layer, at: usize, raw: u64) -> Result<Op, Unsupported> {
    let (code, jt, jf, k) = ((raw >> 48) as u16, (raw >> 40) as u8, (raw >> 32) as u8, raw as u32);
    let malformed = Err(Unsupported::Malformed(at));
    let (skipped, after) = (layer.skipped(), at + 1);
    let slot = || if k < MEMORY { Ok(k as u8) } else { Err(Unsupported::Malformed(at)) };
    let width = match code & 0x18 {
        0x00 => Width::Word,
        0x08 => Width::Half,
        _ => Width::Byte,
    };
    Ok(match code {
        0x20 | 0x28 | 0x30 => load(width, k, skipped).ok_or(Unsupported::Ancillary(at))?,
        0x40 | 0x48 | 0x50 => Op::LoadIndexed { width, k, skipped },
        0xb1 if k < NEGATIVE => Op::LoadHeaderLen(k + skipped),
        0xb1 => return Err(Unsupported::Ancillary(at)),
        0x80 => Op::LoadLen { to: Reg::A, skipped },
        0x81 => Op::LoadLen { to: Reg::X, skipped },
        0x00 => Op::Set(Reg::A, k),
        0x01 => Op::Set(Reg::X, k),
        0x60 => Op::LoadMem(Reg::A, slot()?),
        0x61 => Op::LoadMem(Reg::X, slot()?),
        0x02 => Op::StoreMem(Reg::A, slot()?),
        0x03 => Op::StoreMem(Reg::X, slot()?),
        0x84 => Op::Negate,
        0x05 => Op::Jump(after + k as usize),
        0x06 => Op::Return(k != 0),
        0x16 => Op::ReturnA,
        0x07 => Op::ToX,
        0x87 => Op::ToA,
        _ => {
            let operand = if code & 0x08 == 0 { Operand::K(k) } else { Operand::X };
            match (code & 0x07, alu(code), test(code)) {
                (0x04, Some(alu), _) if code <= 0xff && !is_refused(alu, operand) => Op::Alu(alu, operand),
                (0x05, _, Some(test)) if code <= 0xff => {
                    Op::Branch { test, operand, yes: after + usize::from(jt), no: after + usize::from(jf) }
                }
                _ => return malformed,
            }
        }
    })
}

/// A load from a fixed place. None if that lies beside the packet, and is not known of every frame that is forwarded.
fn load(width: Width, k: u32, skipped: u32) -> Option<Op> {
    match k {
        AD_PROTOCOL => Some(Op::Load(Width::Half, ETHERTYPE)),
        AD_VLAN_TAG | AD_VLAN_TAG_PRESENT => Some(Op::Set(Reg::A, 0)),
        NEGATIVE.. => None,
        _ => Some(Op::Load(width, k + skipped)),
    }
}

fn alu(code: u16) -> Option<Alu> {
    use Alu::*;
    [Add, Sub, Mul, Div, Or, And, Lsh, Rsh, Mod, Xor].into_iter().find(|alu| *alu as u16 == code & 0xf0)
}

fn test(code: u16) -> Option<Test> {
    use Test::*;
    [Equal, Greater, GreaterOrEqual, AnyOf].into_iter().find(|test| *test as u16 == code & 0xf0)
}

/// What Linux refuses.
fn is_refused(alu: Alu, operand: Operand) -> bool {
    match (alu, operand) {
        (Alu::Div | Alu::Mod, Operand::K(k)) => k == 0,
        (Alu::Lsh | Alu::Rsh, Operand::K(k)) => k >= u32::BITS,
        _ => false,
    }
}
