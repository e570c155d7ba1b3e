//! Tables and destinations. Prefixes come from the mix that the tables' own tests use; destinations are drawn evenly
//! over the routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use towpath_tables::mix::{self, Random};

/// So many IPv4 routes of an internet-like mix, none of them about the addresses of the links; the same ones each time.
pub fn ipv4(count: usize) -> Vec<(IpAddr, u8)> {
    let prefixes = mix::ipv4(count + count / 1000 + 16, 1).into_iter();
    let prefixes = prefixes.map(|(octets, length)| (Ipv4Addr::from(octets), length));
    let links = Ipv4Addr::new(198, 18, 0, 0).to_bits() >> 17;
    let apart = prefixes.filter(|(address, _)| address.to_bits() >> 17 != links);
    apart.take(count).map(|(address, length)| (address.into(), length)).collect()
}

/// So many IPv6 routes.
pub fn ipv6(count: usize) -> Vec<(IpAddr, u8)> {
    let prefixes = mix::ipv6(count + count / 1000 + 16, 1).into_iter();
    let prefixes = prefixes.map(|(octets, length)| (Ipv6Addr::from(octets), length));
    let apart = prefixes.filter(|(address, _)| address.segments()[..2] != [0x2001, 0xdb8]);
    apart.take(count).map(|(address, length)| (address.into(), length)).collect()
}

/// `count` destinations (a power of two), each inside a route drawn at random.
pub fn destinations(routes: &[(IpAddr, u8)], count: usize) -> Vec<IpAddr> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .filter_map(|_| {
            let (prefix, length) = routes.get(random.bits() as usize % routes.len().max(1))?;
            Some(match prefix {
                IpAddr::V4(address) => {
                    let host = (random.bits() as u32).checked_shr(u32::from(*length)).unwrap_or(0);
                    IpAddr::V4((address.to_bits() | host).into())
                }
                IpAddr::V6(address) => {
                    let wide = u128::from(random.bits()) << 64 | u128::from(random.bits());
                    let host = wide.checked_shr(u32::from(*length)).unwrap_or(0);
                    IpAddr::V6((address.to_bits() | host).into())
                }
            })
        })
        .collect()
}
