//! A number that changes when the records' layout does, so that tables of another build are not adopted by mistake.

use core::mem::offset_of;

use crate::record::*;

/// FNV-1a (Fowler, Noll, Vo) over the numbers that make up the layout.
pub const fn layout_hash() -> u32 {
    let numbers = [
        LAYOUT_VERSION as usize,
        size_of::<Config>(),
        offset_of!(Config, layout),
        offset_of!(Config, policy),
        offset_of!(Config, hash_policy),
        offset_of!(Config, hash_seed),
        offset_of!(Config, local_filter),
        LOCAL_FILTER_BITS as usize,
        offset_of!(Config, tunnels),
        TUNNEL_BUCKETS,
        TUNNEL_PROBES,
        size_of::<Port>(),
        offset_of!(Port, ifindex),
        offset_of!(Port, flags),
        offset_of!(Port, mac),
        offset_of!(Port, root),
        offset_of!(Port, ingress_policy),
        offset_of!(Port, vlans),
        offset_of!(Port, vlan),
        offset_of!(Port, lower),
        offset_of!(Port, mtu),
        offset_of!(Port, tunnel),
        PORT_PROBES as usize,
        offset_of!(Tunnel, sequence),
        offset_of!(Tunnel, flags),
        offset_of!(Tunnel, local),
        offset_of!(Tunnel, remote),
        offset_of!(Tunnel, input_key),
        offset_of!(Tunnel, output_key),
        offset_of!(Tunnel, ttl_tos),
        offset_of!(Tunnel, link),
        offset_of!(Tunnel, policy),
        offset_of!(Tunnel, way),
        size_of::<VlanTable>(),
        size_of::<Root>(),
        offset_of!(Root, direct),
        offset_of!(Root, default),
        offset_of!(Root, family),
        size_of::<Line>(),
        offset_of!(Node, bitmap),
        offset_of!(Node, counts),
        NODE_HEAD,
        offset_of!(Wide, ends),
        WIDE_HEAD,
        WIDE_ENDS,
        PACKED_HEAD,
        offset_of!(PackedWide, ends),
        PACKED_WIDE_HEAD,
        PACKED_WIDE_RUNS,
        size_of::<Nexthop>(),
        offset_of!(Nexthop, sequence),
        offset_of!(Nexthop, state),
        offset_of!(Nexthop, port),
        offset_of!(Nexthop, device),
        offset_of!(Nexthop, mtu),
        offset_of!(Nexthop, hit),
        offset_of!(Nexthop, l2),
        size_of::<NexthopKey>(),
        offset_of!(NexthopKey, ifindex),
        offset_of!(NexthopKey, family),
        offset_of!(NexthopKey, gateway),
        offset_of!(NexthopKey, mtu),
        offset_of!(NexthopKey, reason),
        size_of::<Group>(),
        GROUP_BUCKETS,
        size_of::<PortStats>(),
        offset_of!(PortStats, rx_packets),
        offset_of!(PortStats, rx_bytes),
        offset_of!(PortStats, tx_packets),
        offset_of!(PortStats, tx_bytes),
        offset_of!(PortStats, tx_lost),
        offset_of!(PortStats, exceptions_lost),
        offset_of!(PortStats, exceptions),
        crate::reason::REASONS,
    ];
    let mut hash = 0x811c_9dc5u32;
    let mut index = 0;
    while index < numbers.len() {
        hash = (hash ^ numbers[index] as u32).wrapping_mul(0x0100_0193);
        index += 1;
    }
    hash
}
