//! The flow hash that chooses among a group's next hops. It takes the fields that Linux takes (6.1,
//! net/ipv4/route.c, fib_multipath_hash; net/ipv6/route.c, rt6_multipath_hash), both directions of a flow alike, and
//! mixes them in its own way: which of the next hops a flow gets may differ from Linux's choice, that it always gets
//! the same does not.

use crate::Frame;
use crate::ingress::Parsed;
use crate::network::{Network, Part};
use towpath_tables::Reason;
use towpath_tables::record::{Config, GROUP_BUCKETS};
use towpath_wire::transport::{Icmp, Ports, protocol};

/// The bucket of a group that the packet's flow belongs to.
#[cfg_attr(target_arch = "bpf", inline(always))]
#[cfg_attr(not(target_arch = "bpf"), inline(never))]
pub fn bucket<N: Network, F: Frame>(frame: &F, config: &Config, header: &N, parsed: &Parsed) -> Result<usize, Reason> {
    let seed = u64::from(config.hash_seed.load());
    let hash = match config.hash_policy[N::FAMILY as usize].load() {
        0 => {
            let header = quoted(frame, header, parsed)?.unwrap_or(header);
            mix(addresses(seed, header), header.flow_extra())
        }
        _ => mix(addresses(seed, header), ports(frame, header, parsed)?),
    };
    Ok(bucket_of_hash(hash))
}

/// The bucket of the flow that all of a tunnel's packets are.
#[inline(always)]
pub fn bucket_of_tunnel<N: Network>(config: &Config, header: &N) -> usize {
    bucket_of_hash(addresses(u64::from(config.hash_seed.load()), header))
}

/// A flow label for what has this packet inside: one of those that are given without a state (RFC 6437, section 3; as Linux
/// marks them, IPV6_FLOWLABEL_STATELESS_FLAG).
#[inline(always)]
pub fn flow_label<N: Network>(config: &Config, header: &N) -> u32 {
    const STATELESS: u32 = 0x8_0000;
    let hash = mix(addresses(u64::from(config.hash_seed.load()), header), header.flow_extra());
    (hash >> 45) as u32 | STATELESS
}

#[inline(always)]
fn bucket_of_hash(hash: u64) -> usize {
    (mix(hash, 0) >> 56) as usize % GROUP_BUCKETS
}

#[inline(always)]
fn addresses<N: Network>(seed: u64, header: &N) -> u64 {
    header.flow_words().into_iter().fold(seed, mix)
}

/// One round: a product by an odd constant, its upper half folded into the lower.
#[inline(always)]
fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ product >> 32
}

/// Protocol and ports, the same for both directions; none in fragments.
#[inline(always)]
fn ports<N: Network, F: Frame>(frame: &F, header: &N, parsed: &Parsed) -> Result<u64, Reason> {
    let proto = u64::from(header.protocol()) << 32;
    let has_ports = matches!(header.protocol(), protocol::TCP | protocol::UDP | protocol::SCTP);
    if !has_ports || header.part() != Part::Whole || parsed.packet_len < size_of::<N>() + size_of::<Ports>() {
        return Ok(proto);
    }
    let ports = frame.get::<Ports>(parsed.offset + size_of::<N>()).ok_or(Reason::Truncated)?;
    let (a, b) = (ports.source.get(), ports.destination.get());
    Ok(proto | u64::from(a ^ b) << 16 | u64::from(a.wrapping_add(b)))
}

/// ICMP errors go the way of the packet that they quote.
#[inline(always)]
fn quoted<'f, N: Network, F: Frame>(frame: &'f F, header: &N, parsed: &Parsed) -> Result<Option<&'f N>, Reason> {
    let inner = size_of::<N>() + size_of::<Icmp>();
    if header.protocol() != N::ICMP || header.part() == Part::Later || parsed.packet_len < inner + size_of::<N>() {
        return Ok(None);
    }
    let icmp = frame.get::<Icmp>(parsed.offset + size_of::<N>()).ok_or(Reason::Truncated)?;
    if !N::icmp_quotes(icmp.kind) {
        return Ok(None);
    }
    frame.get::<N>(parsed.offset + inner).map(Some).ok_or(Reason::Truncated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::frames::{address6, ipv4, ipv6, udp};
    use crate::cases::world::World;
    use crate::packet::Packet;
    use towpath_wire::{ipv4::Ipv4, ipv6::Ipv6};

    const A: [u8; 4] = [192, 0, 2, 1];
    const B: [u8; 4] = [198, 51, 100, 9];

    fn bucket_of<N: Network>(policy: u32, packet: &[u8]) -> usize {
        let world = World::new();
        world.config().hash_policy[N::FAMILY as usize].store(policy);
        let frame = Packet::new(packet, 0);
        let (packet_len, frame_len) = (packet.len(), packet.len());
        let parsed = Parsed { family: N::FAMILY, offset: 0, packet_len, frame_len, several: false };
        bucket(&frame, world.config(), frame.get::<N>(0).unwrap(), &parsed).unwrap()
    }

    #[test]
    fn both_directions_and_errors_share_a_bucket() {
        for n in 0..64 {
            let (there, back) = (udp(n, 53, &[]), udp(53, n, &[]));
            for policy in [0, 1] {
                let four = |s, d, payload: &[u8]| bucket_of::<Ipv4>(policy, &ipv4(s, d, 17, payload));
                assert_eq!(four(A, B, &there), four(B, A, &back));
                let (a, b) = (address6(0, n, 1), address6(1, 0, n));
                let six = |s, d, payload: &[u8]| bucket_of::<Ipv6>(policy, &ipv6(s, d, 17, payload));
                assert_eq!(six(a, b, &there), six(b, a, &back));
            }
            let (quoted4, quoted6) =
                (ipv4(A, [10, 0, 0, n as u8], 17, &there), ipv6(address6(0, n, 1), address6(1, 0, n), 17, &there));
            let error = |kind: u8, quoted: &[u8]| [&[kind, 0, 0, 0, 0, 0, 0, 0], quoted].concat();
            let about4 = bucket_of::<Ipv4>(0, &ipv4(B, A, 1, &error(3, &quoted4)));
            assert_eq!(about4, bucket_of::<Ipv4>(0, &quoted4));
            let about6 = bucket_of::<Ipv6>(0, &ipv6(address6(9, 9, 9), address6(0, n, 1), 58, &error(2, &quoted6)));
            assert_eq!(about6, bucket_of::<Ipv6>(0, &quoted6));
        }
    }

    #[test]
    fn policy_decides_what_counts() {
        let buckets = |policy| {
            let all = (0..1000).map(|port| bucket_of::<Ipv4>(policy, &ipv4(A, B, 17, &udp(port, 53, &[]))));
            all.collect::<std::collections::BTreeSet<_>>().len()
        };
        assert_eq!(buckets(0), 1, "addresses alone");
        // 1000 balls in 256 bins leave about 5 empty.
        assert!(buckets(1) > 235, "ports spread: {}", buckets(1));
        let fragment = |port| {
            let mut packet = ipv4(A, B, 17, &udp(port, 53, &[]));
            packet[6] = 0x20;
            bucket_of::<Ipv4>(1, &packet)
        };
        assert!((0..100).all(|port| fragment(port) == fragment(0)), "fragments have no ports");
    }

    #[test]
    fn addresses_spread() {
        let four: std::collections::BTreeSet<_> =
            (0..1000u16).map(|n| bucket_of::<Ipv4>(0, &ipv4(A, [10, 0, (n >> 8) as u8, n as u8], 17, &[]))).collect();
        let six: std::collections::BTreeSet<_> =
            (0..1000).map(|n| bucket_of::<Ipv6>(0, &ipv6(address6(0, 0, 1), address6(1, 0, n), 17, &[]))).collect();
        assert!(four.len() > 235 && six.len() > 235, "{} {}", four.len(), six.len());
    }
}
