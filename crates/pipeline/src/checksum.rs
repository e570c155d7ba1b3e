//! The Internet checksum over a whole payload, which of what the fast path forwards only GRE asks for.

use crate::Frame;
use towpath_tables::opaque;
use towpath_wire::Sum;
use zerocopy::byteorder::network_endian::U16;
use zerocopy::native_endian::U32;

/// Words that are added at a time.
const CHUNK: usize = 16;
/// Chunks of the longest payload that is added up, a page: what a verifier goes through has a bound.
const CHUNKS: usize = 64;
/// No place in it lies farther behind
const FARTHEST: usize = 0x1fff;
/// Its length
const LONGEST: usize = (CHUNKS + 1) * CHUNK * size_of::<U32>() - 1;

/// The one's complement sum of `len` bytes at `offset`, which is not 0; None if they are not all in the first buffer, or too
/// many.
#[inline(always)]
pub fn sum<F: Frame>(frame: &F, offset: usize, len: usize) -> Option<Sum> {
    if len > LONGEST {
        return None;
    }
    let mut sum = Sum::default();
    for chunk in 0..CHUNKS {
        let at = chunk * size_of::<[U32; CHUNK]>();
        if at + size_of::<[U32; CHUNK]>() > len {
            break;
        }
        sum = sum.words(frame.get::<[U32; CHUNK]>(offset + at)?);
    }
    sum = rest::<8, F>(frame, offset, len, sum)?;
    sum = rest::<4, F>(frame, offset, len, sum)?;
    sum = rest::<2, F>(frame, offset, len, sum)?;
    sum = rest::<1, F>(frame, offset, len, sum)?;
    if len & 2 != 0 {
        sum = sum.number(frame.get::<U16>(offset + (len & !3))?.get());
    }
    if len & 1 != 0 {
        // With the byte before it: of one byte by itself, or of a place that a compiler has worked out, a verifier does not
        // see that it is in the frame.
        let at = opaque((offset + len).wrapping_sub(2)) & FARTHEST;
        let [_, last] = *frame.get::<[u8; 2]>(at)?;
        sum = sum.number(u16::from(last) << 8);
    }
    Some(sum)
}

/// Adds so many words, a power of two, if the length's binary digits ask for them.
#[inline(always)]
fn rest<const WORDS: usize, F: Frame>(frame: &F, offset: usize, len: usize, sum: Sum) -> Option<Sum> {
    let size = size_of::<[U32; WORDS]>();
    if len & size == 0 {
        return Some(sum);
    }
    Some(sum.words(frame.get::<[U32; WORDS]>(offset + (len & !(2 * size - 1)))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Packet;

    #[test]
    fn every_length_is_added_up_from_every_place() {
        let bytes: Vec<u8> = (0..4200u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for linear in [bytes.len(), 1000] {
            let frame = Packet::with_linear(&bytes, 0, linear);
            for len in (0..200).chain([990, 998, 999, 1023, 1500, 4094, 4095, 4096, 4159, 4160]) {
                for offset in [1, 2, 34] {
                    let expected: u64 = (bytes.get(offset..offset + len).unwrap_or_default())
                        .chunks(2)
                        .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)))
                        .sum();
                    let sum = sum(&frame, offset, len).map(|sum| u64::from(u16::from_be(sum.fold())) % 0xffff);
                    let there = offset + len <= linear && len <= LONGEST;
                    assert_eq!(sum, there.then_some(expected % 0xffff), "{len} bytes at {offset} of {linear}");
                }
            }
        }
    }
}
