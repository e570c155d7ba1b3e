//! Classic BPF to eBPF, for a function that is called with an XDP context.

use crate::assemble::{Assembler, Bits, If, Label, R, Value};
use crate::decode::{Alu, Op, Operand, Reg, Test, Width, followers};
use crate::{Filter, MAX_FILTERS, MAX_INSTRUCTIONS};
use std::collections::BTreeSet;

/// A filter, and where it is to be run.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Capture {
    /// The filter
    pub filter: Filter,
    /// On frames that come in by this interface only; None: by any
    pub only: Option<u32>,
}

/// More filters, or longer ones, than are run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("more than {MAX_FILTERS} filters, or more than {MAX_INSTRUCTIONS} instructions of filters, capture at once")]
pub struct TooLong;

const ANSWER: R = R(0);
/// What nothing is kept in: helper functions take their arguments there.
const SCRATCH: [R; 3] = [R(1), R(2), R(3)];
const END: R = R(6);
const A: R = R(7);
const X: R = R(8);
const DATA: R = R(9);
const STACK: R = R(10);

// Places in the stack
const CONTEXT: i16 = -8;
const BYTES: i16 = -16;
const MEMORY: i16 = -80;

// Places in `struct xdp_md`
const MD_DATA: i16 = 0;
const MD_DATA_END: i16 = 4;
const MD_INGRESS_IFINDEX: i16 = 12;

// Helper functions (include/uapi/linux/bpf.h, since 5.18)
const XDP_GET_BUFF_LEN: i32 = 188;
const XDP_LOAD_BYTES: i32 = 189;

/// Places up to here are looked for in the frame's first buffer; the verifier takes no more than 65535.
const DIRECT: u32 = 0x7000;

/// The shortest frame on a wire, without its checksum. Frames of which as much lies in the first buffer have code of their
/// own, which looks for nothing within.
const SHORTEST: u32 = 60;

/// The body of a function `u32 captured(struct xdp_md *)`: 1 if one of the filters matches the frame, else 0. A place in
/// the frame is found wherever it lies in its buffers; beyond its end nothing matches, as with Linux.
pub fn translate(captures: &[Capture]) -> Result<Vec<u64>, TooLong> {
    let instructions: usize = captures.iter().map(|capture| capture.filter.code().len()).sum();
    if captures.len() > MAX_FILTERS || instructions > MAX_INSTRUCTIONS {
        return Err(TooLong);
    }
    let mut assembler = Assembler::default();
    let (end, short) = (SCRATCH[1], assembler.label());
    assembler.load(4, DATA, SCRATCH[0], MD_DATA);
    assembler.load(4, END, SCRATCH[0], MD_DATA_END);
    assembler.store(8, STACK, CONTEXT, SCRATCH[0]);
    assembler.set(end, Value::R(DATA));
    assembler.add(end, Value::K(SHORTEST as i32));
    assembler.jump_if(Bits::B64, If::Greater, end, Value::R(END), short);
    run_all(&mut assembler, captures, SHORTEST);
    assembler.place(short);
    run_all(&mut assembler, captures, 0);
    assembler.finish()
}

/// All filters for frames of which so many bytes are known to be in the first buffer, up to their answer.
fn run_all(assembler: &mut Assembler, captures: &[Capture], sure: u32) {
    let matched = assembler.label();
    // The verifier refuses code that nothing leads to: also what follows a filter that matches everything.
    if captures.iter().all(|capture| Translator::run(assembler, capture, matched, sure)) {
        assembler.answer(0);
    }
    if assembler.is_led_to(matched) {
        assembler.place(matched);
        assembler.answer(1);
    }
}

/// One filter on its way.
struct Translator<'a> {
    to: &'a mut Assembler,
    matched: Label,
    /// Where to go if it does not match
    next: Label,
    /// Where its instructions are
    ops: Vec<Label>,
    /// So many bytes of the frame need not be looked for
    sure: u32,
}

impl<'a> Translator<'a> {
    /// False if no frame goes on to the next filter.
    fn run(to: &'a mut Assembler, capture: &Capture, matched: Label, sure: u32) -> bool {
        let ops = capture.filter.ops();
        let labels = ops.iter().map(|_| to.label()).collect();
        let next = to.label();
        let mut this = Translator { to, matched, next, ops: labels, sure };
        if let Some(ifindex) = capture.only {
            let [register, ..] = SCRATCH;
            this.context();
            this.to.load(4, register, register, MD_INGRESS_IFINDEX);
            this.to.jump_if(Bits::B32, If::NotEqual, register, Value::K(ifindex as i32), next);
        }
        this.to.set32(A, Value::K(0));
        this.to.set32(X, Value::K(0));
        for at in reached(&ops) {
            this.to.place(this.ops[at]);
            this.op(at, ops[at]);
        }
        this.to.place(next);
        this.to.is_led_to(next)
    }

    fn op(&mut self, at: usize, op: Op) {
        match op {
            Op::Load(width, place) => self.load(A, width, place),
            Op::LoadIndexed { width, k, skipped } => self.load_indexed(width, k, skipped),
            Op::LoadHeaderLen(place) => {
                self.load(X, Width::Byte, place);
                self.to.alu(Bits::B32, Alu::And as u8, X, Value::K(15));
                self.to.alu(Bits::B32, Alu::Lsh as u8, X, Value::K(2));
            }
            Op::LoadLen { to, skipped } => {
                self.context();
                self.to.call(XDP_GET_BUFF_LEN);
                self.to.set32(register(to), Value::R(ANSWER));
                self.to.alu(Bits::B32, Alu::Sub as u8, register(to), Value::K(skipped as i32));
            }
            Op::Set(to, k) => self.to.set32(register(to), Value::K(k as i32)),
            Op::LoadMem(to, slot) => self.to.load(4, register(to), STACK, memory(slot)),
            Op::StoreMem(from, slot) => self.to.store(4, STACK, memory(slot), register(from)),
            Op::Alu(alu, operand) => self.alu(alu, operand),
            Op::Negate => self.to.alu(Bits::B32, NEGATE, A, Value::K(0)),
            Op::Jump(target) => self.go_to(at, target),
            Op::Branch { test, operand, yes, no } => {
                let operand = self.beside(operand);
                self.branch(at, test, operand, yes, no);
            }
            Op::ReturnA => {
                self.to.jump_if(Bits::B32, If::NotEqual, A, Value::K(0), self.matched);
                self.to.jump(self.next);
            }
            Op::Return(true) => self.to.jump(self.matched),
            Op::Return(false) => self.to.jump(self.next),
            Op::ToX => self.to.set32(X, Value::R(A)),
            Op::ToA => self.to.set32(A, Value::R(X)),
        }
    }

    /// To divide by 0 ends the filter; it then does not match.
    fn alu(&mut self, alu: Alu, operand: Operand) {
        if matches!((alu, operand), (Alu::Div | Alu::Mod, Operand::X)) {
            self.to.jump_if(Bits::B32, If::Equal, X, Value::K(0), self.next);
        }
        self.to.alu(Bits::B32, alu as u8, A, value(operand));
    }

    /// What A is compared with. The verifier of Linux 6.1 follows both ways of a branch on two registers, even if A is known and
    /// one of them cannot be gone, and believes there of the other register what cannot be: so that is a copy, not X.
    fn beside(&mut self, operand: Operand) -> Value {
        match operand {
            Operand::K(_) => value(operand),
            Operand::X => {
                let [copy, ..] = SCRATCH;
                self.to.set32(copy, Value::R(X));
                Value::R(copy)
            }
        }
    }

    fn branch(&mut self, at: usize, test: Test, operand: Value, yes: usize, no: usize) {
        let (test, inverse) = match test {
            Test::Equal => (If::Equal, Some(If::NotEqual)),
            Test::Greater => (If::Greater, Some(If::LessOrEqual)),
            Test::GreaterOrEqual => (If::GreaterOrEqual, Some(If::Less)),
            Test::AnyOf => (If::AnyOf, None),
        };
        match inverse {
            Some(inverse) if yes == at + 1 => self.to.jump_if(Bits::B32, inverse, A, operand, self.ops[no]),
            _ => {
                self.to.jump_if(Bits::B32, test, A, operand, self.ops[yes]);
                self.go_to(at, no);
            }
        }
    }

    fn go_to(&mut self, at: usize, target: usize) {
        if target != at + 1 {
            self.to.jump(self.ops[target]);
        }
    }

    /// The context into the first scratch register
    fn context(&mut self) {
        self.to.load(8, SCRATCH[0], STACK, CONTEXT);
    }

    /// A load from a fixed place. The way through the helper function comes first: the verifier then knows least of the
    /// frame, and finds the other way safe without going through the rest again.
    fn load(&mut self, to: R, width: Width, place: u32) {
        let (bytes, [end, at, _]) = (width as u8, SCRATCH);
        if place.saturating_add(bytes.into()) <= self.sure {
            self.to.load(bytes, to, DATA, place as i16);
            return self.to.big_endian(to, bytes);
        }
        let (direct, done) = (self.to.label(), self.to.label());
        let near = place <= DIRECT;
        if near {
            self.to.set(end, Value::R(DATA));
            self.to.add(end, Value::K(place as i32 + i32::from(bytes)));
            self.to.jump_if(Bits::B64, If::LessOrEqual, end, Value::R(END), direct);
        }
        self.to.set32(at, Value::K(place as i32));
        self.load_anywhere(to, bytes);
        if near {
            self.to.jump(done);
            self.to.place(direct);
            self.to.load(bytes, to, DATA, place as i16);
            self.to.place(done);
        }
        self.to.big_endian(to, bytes);
    }

    /// A load from a place that depends on X. One before the packet means something else to Linux (`SKF_NET_OFF`,
    /// `SKF_LL_OFF`); nobody knows what then, so it matches.
    fn load_indexed(&mut self, width: Width, k: u32, skipped: u32) {
        let (bytes, [end, at, from]) = (width as u8, SCRATCH);
        let (direct, far, done) = (self.to.label(), self.to.label(), self.to.label());
        self.to.set32(at, Value::R(X));
        self.to.add32(at, Value::K(k as i32));
        self.to.jump_if(Bits::B32, If::SignedLess, at, Value::K(0), self.matched);
        self.to.add32(at, Value::K(skipped as i32));
        self.to.jump_if(Bits::B64, If::Greater, at, Value::K(DIRECT as i32), far);
        self.to.set(from, Value::R(DATA));
        self.to.add(from, Value::R(at));
        self.to.set(end, Value::R(from));
        self.to.add(end, Value::K(i32::from(bytes)));
        self.to.jump_if(Bits::B64, If::LessOrEqual, end, Value::R(END), direct);
        self.to.place(far);
        self.load_anywhere(A, bytes);
        self.to.jump(done);
        self.to.place(direct);
        self.to.load(bytes, A, from, 0);
        self.to.place(done);
        self.to.big_endian(A, bytes);
    }

    /// Loads from the place that the second scratch register says, in whichever buffer it lies; not there: no match.
    fn load_anywhere(&mut self, to: R, bytes: u8) {
        let [_, _, buffer] = SCRATCH;
        self.context();
        self.to.set(buffer, Value::R(STACK));
        self.to.add(buffer, Value::K(BYTES.into()));
        self.to.set32(R(4), Value::K(bytes.into()));
        self.to.call(XDP_LOAD_BYTES);
        self.to.jump_if(Bits::B64, If::NotEqual, ANSWER, Value::K(0), self.next);
        self.to.load(bytes, to, STACK, BYTES);
    }
}

const NEGATE: u8 = 0x80;

/// The instructions that a way leads to, in order.
fn reached(ops: &[Op]) -> Vec<usize> {
    let mut reached = BTreeSet::from([0]);
    for (at, op) in ops.iter().enumerate() {
        if reached.contains(&at) {
            reached.extend(followers(at, op).into_iter().flatten());
        }
    }
    reached.into_iter().collect()
}

fn register(register: Reg) -> R {
    match register {
        Reg::A => A,
        Reg::X => X,
    }
}

fn value(operand: Operand) -> Value {
    match operand {
        Operand::K(k) => Value::K(k as i32),
        Operand::X => Value::R(X),
    }
}

fn memory(slot: u8) -> i16 {
    MEMORY + i16::from(slot) * 4
}
