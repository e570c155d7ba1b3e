//! eBPF put together: instructions (include/uapi/linux/bpf.h, Linux 6.1) and jumps whose targets come later.

use crate::translate::TooLong;

/// A register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct R(pub u8);

/// A place to jump to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label(usize);

/// Comparisons: the four bits of the operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum If {
    Equal = 0x10,
    Greater = 0x20,
    GreaterOrEqual = 0x30,
    AnyOf = 0x40,
    NotEqual = 0x50,
    Less = 0xa0,
    LessOrEqual = 0xb0,
    SignedLess = 0xc0,
}

/// A second operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Value {
    K(i32),
    R(R),
}

impl Value {
    /// The bit that says which kind of operand it is, the source register, the immediate number.
    fn fields(self) -> (u8, u8, i32) {
        match self {
            Self::K(k) => (0, 0, k),
            Self::R(R(register)) => (0x08, register, 0),
        }
    }
}

/// How many bits of its registers an instruction takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bits {
    B32,
    B64,
}

const MOVE: u8 = 0xb0;
const ADD: u8 = 0x00;

/// A program that is being put together.
#[derive(Default)]
pub struct Assembler {
    code: Vec<u64>,
    /// Where each label is
    labels: Vec<Option<usize>>,
    /// Jumps and what they lead to
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    /// A label that is still to be placed.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// The label is here.
    pub fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    /// Whether there is a jump to it so far.
    pub fn is_led_to(&self, label: Label) -> bool {
        self.jumps.iter().any(|(_, to)| *to == label)
    }

    fn push(&mut self, code: u8, dst: u8, src: u8, offset: i16, immediate: i32) {
        let registers = u64::from(src) << 4 | u64::from(dst);
        let (offset, immediate) = (u64::from(offset as u16), u64::from(immediate as u32));
        self.code.push(u64::from(code) | registers << 8 | offset << 16 | immediate << 32);
    }

    /// `to = to (operation) value`
    pub fn alu(&mut self, bits: Bits, operation: u8, to: R, value: Value) {
        let class = if bits == Bits::B32 { 0x04 } else { 0x07 };
        let (kind, source, immediate) = value.fields();
        self.push(class | operation | kind, to.0, source, 0, immediate);
    }

    /// `to = value`, in 64 bits
    pub fn set(&mut self, to: R, value: Value) {
        self.alu(Bits::B64, MOVE, to, value);
    }

    /// `to = value`, in 32 bits
    pub fn set32(&mut self, to: R, value: Value) {
        self.alu(Bits::B32, MOVE, to, value);
    }

    /// `to += value`, in 64 bits
    pub fn add(&mut self, to: R, value: Value) {
        self.alu(Bits::B64, ADD, to, value);
    }

    /// `to += value`, in 32 bits
    pub fn add32(&mut self, to: R, value: Value) {
        self.alu(Bits::B32, ADD, to, value);
    }

    /// Turns a number of so many bytes around from network byte order.
    pub fn big_endian(&mut self, register: R, bytes: u8) {
        if bytes > 1 {
            self.push(0xdc, register.0, 0, 0, i32::from(bytes) * 8);
        }
    }

    /// `to = *(from + offset)`, so many bytes
    pub fn load(&mut self, bytes: u8, to: R, from: R, offset: i16) {
        self.push(0x61 | size(bytes), to.0, from.0, offset, 0);
    }

    /// `*(to + offset) = from`, so many bytes
    pub fn store(&mut self, bytes: u8, to: R, offset: i16, from: R) {
        self.push(0x63 | size(bytes), to.0, from.0, offset, 0);
    }

    /// Calls a helper function.
    pub fn call(&mut self, helper: i32) {
        self.push(0x85, 0, 0, 0, helper);
    }

    /// Goes to `label` if `register (test) value`.
    pub fn jump_if(&mut self, bits: Bits, test: If, register: R, value: Value, label: Label) {
        let class = if bits == Bits::B32 { 0x06 } else { 0x05 };
        let (kind, source, immediate) = value.fields();
        self.jumps.push((self.code.len(), label));
        self.push(class | test as u8 | kind, register.0, source, 0, immediate);
    }

    /// Goes to `label`.
    pub fn jump(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(0x05, 0, 0, 0, 0);
    }

    /// Ends with this answer.
    pub fn answer(&mut self, answer: i32) {
        self.set32(R(0), Value::K(answer));
        self.push(0x95, 0, 0, 0, 0);
    }

    /// The program, its jumps filled in.
    pub fn finish(mut self) -> Result<Vec<u64>, TooLong> {
        for (from, label) in self.jumps {
            let to = self.labels[label.0].ok_or(TooLong)?;
            let offset = i16::try_from(to as i64 - from as i64 - 1).map_err(|_| TooLong)?;
            self.code[from] |= u64::from(offset as u16) << 16;
        }
        Ok(self.code)
    }
}

/// The bits for a size, less those for four bytes.
fn size(bytes: u8) -> u8 {
    match bytes {
        1 => 0x10,
        2 => 0x08,
        8 => 0x18,
        _ => 0x00,
    }
}
