//! A filter that matches by chance.

use crate::assemble::{Assembler, Bits, If, R, Value};
use crate::translate::TooLong;
use std::num::NonZeroU32;

/// Helper function (include/uapi/linux/bpf.h): 32 bits at random
const GET_PRANDOM_U32: i32 = 7;

/// As `translate`, but whatever the frame is, the answer is 1 once in so many times, drawn at random.
pub fn one_in(number: NonZeroU32) -> Result<Vec<u64>, TooLong> {
    let mut assembler = Assembler::default();
    let drawn = assembler.label();
    assembler.call(GET_PRANDOM_U32);
    let most = (u32::MAX / number) as i32;
    assembler.jump_if(Bits::B32, If::LessOrEqual, R(0), Value::K(most), drawn);
    assembler.answer(0);
    assembler.place(drawn);
    assembler.answer(1);
    assembler.finish()
}
