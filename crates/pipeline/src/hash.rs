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
#[inline(always)]
pub fn bucket<N: Network, F: Frame>(frame: &F, config: &Config, header: &N, parsed: &Parsed) -> Result<usize, Reason> {
    let seed = u64::from(config.hash_seed.load());
    let hash = match config.hash_policy[N::FAMILY as usize].load() {
        0 => {
            let header = quoted(frame, header, parsed)?.unwrap_or(header);
            mix(addresses(seed, header), header.flow_extra())
        }
        _ => mix(addresses(seed, header), ports(frame, header, parsed)?),
    };
    Ok((mix(hash, 0) >> 56) as usize % GROUP_BUCKETS)
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
