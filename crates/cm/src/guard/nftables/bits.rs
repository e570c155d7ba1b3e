//! What is known beforehand of the bytes in nftables' registers, for all packets of a connection that go fast.

use std::ops::Range;

/// Bytes of all registers (NFT_REG32_COUNT words, include/uapi/linux/netfilter/nf_tables.h, Linux 6.1).
const REGISTERS: usize = 64;

/// A byte, bit by bit. One that was never loaded says nothing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Byte {
    /// Where it is known
    value: u8,
    /// The same in packets of all connections
    known: u8,
    /// The same in all packets of a connection's direction; includes what is known
    fixed: u8,
}

impl Byte {
    /// This one.
    pub const fn known(value: u8) -> Self {
        Self::partly(value, 0xff, 0xff)
    }

    /// Known in these bits, the same in those, anything in the others.
    pub const fn partly(value: u8, known: u8, fixed: u8) -> Self {
        Self { value: value & known, known, fixed: fixed | known }
    }

    /// Not known, but the same in all packets of a connection's direction.
    pub const FIXED: Self = Self::partly(0, 0, 0xff);
    /// Another one in each packet.
    pub const VARYING: Self = Self::partly(0, 0, 0);
}

/// What a condition says of packets of connections that go fast.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It holds for all of them
    Always,
    /// For none
    Never,
    /// For all of a connection's direction, or for none
    Fixed,
    /// It may change from packet to packet
    Varies,
}

impl Answer {
    /// What the opposite says.
    pub fn inverted(self, inverted: bool) -> Self {
        match self {
            Self::Always if inverted => Self::Never,
            Self::Never if inverted => Self::Always,
            same => same,
        }
    }
}

/// NFT_CMP_EQ and NFT_CMP_NEQ.
const EQUAL: u32 = 0;
const UNEQUAL: u32 = 1;

/// Compares as nft_cmp does.
pub fn compare(bytes: &[Byte], operation: u32, with: &[u8]) -> Answer {
    let differs = bytes.iter().zip(with).any(|(byte, with)| (byte.value ^ with) & byte.known != 0);
    let sure = matches!(operation, EQUAL | UNEQUAL);
    match value(bytes) {
        _ if bytes.len() != with.len() => Answer::Varies,
        _ if sure && differs => Answer::Never.inverted(operation == UNEQUAL),
        Some(value) => match (operation, value.as_slice().cmp(with)) {
            (EQUAL, order) => is(order.is_eq()),
            (UNEQUAL, order) => is(order.is_ne()),
            (2, order) => is(order.is_lt()),
            (3, order) => is(order.is_le()),
            (4, order) => is(order.is_gt()),
            (5, order) => is(order.is_ge()),
            _ => Answer::Varies,
        },
        None => changing(bytes),
    }
}

/// What a condition says that asks all of these bytes.
pub fn changing(bytes: &[Byte]) -> Answer {
    if bytes.iter().all(|byte| byte.fixed == 0xff) { Answer::Fixed } else { Answer::Varies }
}

/// The bytes, if all of them are known.
pub fn value(bytes: &[Byte]) -> Option<Vec<u8>> {
    bytes.iter().map(|byte| (byte.known == 0xff).then_some(byte.value)).collect()
}

/// What a condition says whose answer is this.
pub fn is(holds: bool) -> Answer {
    if holds { Answer::Always } else { Answer::Never }
}

/// The registers while a rule is gone through.
pub struct Registers([Byte; REGISTERS]);

impl Registers {
    /// With nothing in them.
    pub fn new() -> Self {
        Self([Byte::VARYING; REGISTERS])
    }

    /// Of a register's number as it is told (NFT_REG_1 to 4 of 16 bytes, NFT_REG32_00 to 15 of 4) so many bytes.
    fn range(number: Option<u32>, length: usize) -> Option<Range<usize>> {
        let from = match number? as usize {
            number @ 1..=4 => (number - 1) * 16,
            number @ 8..=23 => (number - 8) * 4,
            _ => return None,
        };
        let to = from.checked_add(length).filter(|to| *to <= REGISTERS)?;
        Some(from..to)
    }

    /// Nothing where there is no such register.
    pub fn read(&self, number: Option<u32>, length: usize) -> &[Byte] {
        Self::range(number, length).map_or(&[], |range| &self.0[range])
    }

    /// What a load leaves behind; it fills whole words.
    pub fn write(&mut self, number: Option<u32>, bytes: &[Byte]) {
        match Self::range(number, bytes.len().next_multiple_of(4)) {
            Some(range) => {
                let words = &mut self.0[range];
                words.fill(Byte::known(0));
                words[..bytes.len()].copy_from_slice(bytes);
            }
            None => *self = Self::new(),
        }
    }

    /// `(bytes & mask) ^ xor`.
    pub fn mask(&mut self, from: Option<u32>, to: Option<u32>, mask: &[u8], xor: &[u8]) {
        let bytes = self.read(from, mask.len()).iter().zip(mask.iter().zip(xor));
        let masked = bytes
            .map(|(byte, (mask, xor))| Byte::partly((byte.value & mask) ^ xor, byte.known | !mask, byte.fixed | !mask));
        match masked.collect::<Vec<_>>() {
            masked if masked.is_empty() => *self = Self::new(),
            masked => self.write(to, &masked),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_that_are_known_decide() {
        let flags = [Byte::partly(0x10, 0x17, 0x17)];
        for (operation, with, answer) in [
            (EQUAL, 0x02, Answer::Never),
            (UNEQUAL, 0x02, Answer::Always),
            (EQUAL, 0x18, Answer::Varies),
            (UNEQUAL, 0x10, Answer::Varies),
            (2, 0x02, Answer::Varies),
            (EQUAL, 0, Answer::Never),
        ] {
            assert_eq!(compare(&flags, operation, &[with]), answer, "{operation} {with:#x}");
        }
        assert_eq!(compare(&[Byte::FIXED], EQUAL, &[1]), Answer::Fixed);
        assert_eq!(compare(&[Byte::known(3)], 5, &[3]), Answer::Always);
        assert_eq!(compare(&[Byte::known(3)], 4, &[3]), Answer::Never);
        assert_eq!(compare(&[], EQUAL, &[3]), Answer::Varies, "no such register");
    }

    #[test]
    fn masks_leave_what_they_let_through() {
        let mut registers = Registers::new();
        registers.write(Some(1), &[Byte::partly(0x10, 0x17, 0x17)]);
        registers.mask(Some(1), Some(9), &[0x12], &[0]);
        assert_eq!(value(registers.read(Some(9), 1)), Some(vec![0x10]));
        registers.mask(Some(1), Some(1), &[0x08], &[0]);
        assert_eq!(changing(registers.read(Some(1), 1)), Answer::Varies);
        assert_eq!(changing(registers.read(Some(2), 4)), Answer::Varies, "never loaded");
        assert_eq!(registers.read(Some(24), 4), []);
        assert_eq!(registers.read(Some(23), 8), []);
    }
}
