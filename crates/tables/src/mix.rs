//! Route tables such as the Internet's, for tests and benchmarks: seeded, so that every run sees the same.
//!
//! The shares of prefix lengths are rounded from what public route collectors (RIPE RIS, RouteViews) showed in recent
//! years: of IPv4 about 60 % /24, 20 % /22 and /23, the rest mostly /16 to /21; of IPv6 about half /48, an eighth /32.
//! Where the prefixes lie is simpler than in reality: IPv4 spread evenly over unicast space; IPv6 beneath a pool of
//! allocations of 32 bits in the regional registries' blocks, and beneath those evenly. Both are more scattered, and
//! so need more memory, than the real thing.

use std::collections::HashSet;

/// Lengths and their shares in thousandths.
const IPV4: [(u8, u32); 17] = [
    (24, 600),
    (23, 95),
    (22, 105),
    (21, 50),
    (20, 48),
    (19, 32),
    (18, 18),
    (17, 12),
    (16, 30),
    (15, 3),
    (14, 2),
    (13, 1),
    (12, 1),
    (11, 1),
    (10, 1),
    (9, 0),
    (8, 1),
];
const IPV6: [(u8, u32); 16] = [
    (48, 470),
    (32, 120),
    (44, 90),
    (40, 90),
    (36, 55),
    (29, 40),
    (46, 40),
    (47, 35),
    (33, 15),
    (34, 10),
    (35, 5),
    (38, 5),
    (42, 12),
    (45, 8),
    (30, 3),
    (28, 2),
];

/// Registries' blocks, first 16 bits: from and how many.
const IPV6_BLOCKS: [(u16, u16); 6] = [(0x2001, 1), (0x2400, 16), (0x2600, 16), (0x2800, 4), (0x2a00, 16), (0x2c0f, 1)];

/// A small generator of pseudo-random numbers (splitmix64: Steele, Lea, Flood, OOPSLA 2014).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which must not be zero.
    pub fn below(&mut self, limit: u32) -> u32 {
        (((self.bits() >> 32) * u64::from(limit)) >> 32) as u32
    }
}

fn length(random: &mut Random, shares: &[(u8, u32)]) -> u8 {
    let total = shares.iter().map(|share| share.1).sum();
    let mut at = random.below(total);
    for &(len, share) in shares {
        if at < share {
            return len;
        }
        at -= share;
    }
    shares[0].0
}

/// `count` different IPv4 prefixes (address in network byte order, length), in no order. At most a few millions: there
/// are no more of the lengths that are common.
pub fn ipv4(count: usize, seed: u64) -> Vec<([u8; 4], u8)> {
    let mut random = Random(seed);
    distinct(count, || {
        loop {
            let address = random.bits() as u32;
            let first = address >> 24;
            if !(1..224).contains(&first) || first == 10 || first == 127 {
                continue;
            }
            let len = length(&mut random, &IPV4);
            return ((address & (u32::MAX << (32 - len))).to_be_bytes(), len);
        }
    })
}

/// `count` different IPv6 prefixes, in no order.
pub fn ipv6(count: usize, seed: u64) -> Vec<([u8; 16], u8)> {
    let mut random = Random(seed);
    let allocations = (count / 5).max(16) as u32;
    distinct(count, || {
        // The smaller of two draws: some allocations are cut up more than others.
        let which = random.below(allocations).min(random.below(allocations));
        let mut place = Random(seed ^ u64::from(which));
        let (block, blocks) = IPV6_BLOCKS[place.below(IPV6_BLOCKS.len() as u32) as usize];
        let first = u128::from(block + place.below(blocks.into()) as u16);
        let address = first << 112 | u128::from(place.below(1 << 16)) << 96 | u128::from(random.bits()) << 32;
        let len = length(&mut random, &IPV6);
        ((address & (u128::MAX << (128 - len))).to_be_bytes(), len)
    })
}

fn distinct<T: Copy + Eq + std::hash::Hash>(count: usize, mut next: impl FnMut() -> T) -> Vec<T> {
    let mut seen = HashSet::with_capacity(count);
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        let item = next();
        if seen.insert(item) {
            all.push(item);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_their_shares() {
        let count = if cfg!(miri) { 500 } else { 50_000 };
        let share = |lens: &[u8], which: u8| lens.iter().filter(|len| **len == which).count() * 100 / count;
        let v4: Vec<u8> = ipv4(count, 1).into_iter().map(|(_, len)| len).collect();
        let v6: Vec<u8> = ipv6(count, 1).into_iter().map(|(_, len)| len).collect();
        assert!((55..=65).contains(&share(&v4, 24)), "{}", share(&v4, 24));
        assert!((42..=52).contains(&share(&v6, 48)), "{}", share(&v6, 48));
        assert_eq!(ipv4(100, 7), ipv4(100, 7));
        assert_ne!(ipv4(100, 7), ipv4(100, 8));
    }
}
