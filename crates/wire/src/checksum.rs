//! The Internet checksum (RFC 1071), over words as they are on the wire: one's complement sums do not mind the byte
//! order as long as all words share it.

use zerocopy::native_endian::U32;

/// A running one's complement sum of words as on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Sum(u64);

impl Sum {
    /// Adds words; `N` is small enough (below 2^31) that no carry is lost.
    #[inline(always)]
    pub fn words<const N: usize>(mut self, words: &[U32; N]) -> Self {
        for word in words {
            self.0 += u64::from(word.get());
        }
        self
    }

    /// Adds a 16-bit number that stands on the wire big-endian.
    #[inline(always)]
    pub fn number(self, number: u16) -> Self {
        Self(self.0 + u64::from(number.to_be()))
    }

    /// Adds what a sum was folded to.
    #[inline(always)]
    pub fn folded(self, folded: u16) -> Self {
        Self(self.0 + u64::from(folded))
    }

    /// The sum folded to 16 bits, as on the wire, not complemented. Zero only if everything added was zero.
    #[inline(always)]
    pub fn fold(self) -> u16 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        sum as u16
    }

    /// Whether this is what the sum folds to; cheaper than folding it. At most 65536 words were added.
    #[inline(always)]
    pub fn folds_to(self, folded: u16) -> bool {
        // Folding takes multiples of 0xffff off until no more than that is left, and leaves zero only of zero. A number is a
        // multiple exactly if its product with the inverse modulo 2^64 is its quotient, and so small.
        const INVERSE: u64 = 0xfffe_fffe_fffe_ffff;
        const _: () = assert!(INVERSE.wrapping_mul(0xffff) == 1);
        let quotient = self.0.wrapping_sub(folded.into()).wrapping_mul(INVERSE);
        quotient >> 48 == 0 && (folded != 0 || self.0 == 0)
    }
}

/// How words that a checksum covers change (RFC 1624, equation 3).
#[derive(Clone, Copy, Default, Debug)]
pub struct Change(Sum);

impl Change {
    /// A word as on the wire becomes another.
    #[inline(always)]
    pub fn word(self, old: u32, new: u32) -> Self {
        Self(Sum(self.0.0 + u64::from(!old) + u64::from(new)))
    }

    /// As `word`, for eight bytes.
    #[inline(always)]
    pub fn double_word(self, old: u64, new: u64) -> Self {
        self.word(old as u32, new as u32).word((old >> 32) as u32, (new >> 32) as u32)
    }

    /// What has to be added to a sum of what is covered, as on the wire.
    #[inline(always)]
    pub fn fold(self) -> u16 {
        self.0.fold()
    }

    /// What a checksum as on the wire becomes. Never 0xffff but where there is nothing but zeros.
    #[inline(always)]
    pub fn apply(self, checksum: u16) -> u16 {
        !Sum(self.0.0 + u64::from(!checksum)).fold()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071, section 3: the example's words and their sum.
    #[test]
    fn rfc_1071_example() {
        let words = [[0x00, 0x01, 0xf2, 0x03], [0xf4, 0xf5, 0xf6, 0xf7]].map(U32::from_bytes);
        assert_eq!(Sum::default().words(&words).fold(), 0xddf2u16.to_be());
    }

    /// Whatever changes, the sum over everything stays what it was: all ones.
    #[test]
    fn a_changed_checksum_is_right() {
        let mut random = 1u64;
        for _ in 0..10_000 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let (old, new, rest) = (random, random.rotate_left(29).wrapping_mul(3), (random >> 11) as u32);
            let words = |word: u64| [word as u32, (word >> 32) as u32, rest].map(U32::new);
            let checksum = !Sum::default().words(&words(old)).fold();
            let changed = Change::default().double_word(old, new).apply(checksum);
            assert_eq!(
                Sum::default().words(&words(new)).number(u16::from_be(changed)).fold(),
                0xffff,
                "{old:x} {new:x}"
            );
            assert_ne!(changed, 0xffff);
        }
    }

    #[test]
    fn carries_are_folded_to_the_end() {
        let ones = [U32::new(u32::MAX); 5];
        assert_eq!(Sum::default().words(&ones).fold(), 0xffff);
        assert_eq!(Sum::default().words(&ones).number(1).fold(), 1u16.to_be());
        assert_eq!(Sum::default().fold(), 0);
    }

    #[test]
    fn a_sum_folds_to_one_number_only() {
        let edges = [0, 1, 2, 0xfffe, 0xffff, 0x1_0000, 0x1_fffe, 0x1_ffff, 0xffff_fffe, 0xffff_ffff];
        for low in edges {
            for sum in (0..=5).map(|carries| Sum(carries << 32 | low)).chain([Sum(0xffff << 32 | low)]) {
                let mut same = (0..=u16::MAX).filter(|folded| sum.folds_to(*folded));
                assert_eq!((same.next(), same.next()), (Some(sum.fold()), None), "{sum:x?}");
            }
        }
    }
}
