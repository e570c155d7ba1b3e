//! Numbers of Linux in the words that iproute2 uses for them.

use crate::report;
use towpath_fpc::table as tables;
use towpath_fpc::{Policy, PolicySource, Route, Scope};
use towpath_fpm::{Phase, Waiting};
use towpath_tables::backing::GrowError;
use towpath_tables::record::{Family, TableId};
use towpath_wire::transport::protocol;

/// A full table: which, why, what it means and what to do about it.
pub fn shortage(full: &GrowError, waiting: Waiting) -> String {
    let counts = [
        (waiting.ports, "ports"),
        (waiting.vias, "ways of routes"),
        (waiting.neighbours, "neighbours"),
        (waiting.prefixes, "prefixes"),
    ];
    let counts: Vec<_> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    let waiting = if counts.is_empty() { String::new() } else { format!(" ({} wait for room)", counts.join(", ")) };
    let remedy = match full.table {
        TableId::Ports => "serve fewer ports, or give interfaces other indices (ip link add ... index N)",
        TableId::Vlans => "free memory, or serve fewer ports with VLAN sub-interfaces",
        _ => "free memory, or let Linux have fewer routes, next hops or neighbours",
    };
    format!("{full}; what does not fit goes to Linux{waiting} and is tried again every second; {remedy}")
}

/// RTPROT_* (linux/rtnetlink.h; names of /etc/iproute2/rt_protos)
pub fn protocol(number: u8) -> String {
    let name = match number {
        0 => "unspec",
        1 => "redirect",
        2 => "kernel",
        3 => "boot",
        4 => "static",
        8 => "gated",
        9 => "ra",
        10 => "mrt",
        11 => "zebra",
        12 => "bird",
        13 => "dnrouted",
        14 => "xorp",
        15 => "ntk",
        16 => "dhcp",
        17 => "mrouted",
        18 => "keepalived",
        42 => "babel",
        84 => "ovn",
        99 => "openr",
        186 => "bgp",
        187 => "isis",
        188 => "ospf",
        189 => "rip",
        192 => "eigrp",
        other => return other.to_string(),
    };
    name.into()
}

/// RTN_* (linux/rtnetlink.h)
pub fn route_kind(number: u8) -> String {
    let name = match number {
        1 => "unicast",
        2 => "local",
        3 => "broadcast",
        4 => "anycast",
        5 => "multicast",
        6 => "blackhole",
        7 => "unreachable",
        8 => "prohibit",
        9 => "throw",
        10 => "nat",
        other => return other.to_string(),
    };
    name.into()
}

/// IPPROTO_*
pub fn transport(number: u8) -> String {
    match number {
        protocol::TCP => "tcp".into(),
        protocol::UDP => "udp".into(),
        other => other.to_string(),
    }
}

/// A routing table: its name if it has one by default.
pub fn table(number: u32) -> String {
    match number {
        tables::DEFAULT => "default".into(),
        tables::MAIN => "main".into(),
        tables::LOCAL => "local".into(),
        other => other.to_string(),
    }
}

/// NUD_* (linux/neighbour.h): one bit is set, or none.
pub fn neighbour_state(state: u16) -> String {
    let name = match state {
        0 => "none",
        0x01 => "incomplete",
        0x02 => "reachable",
        0x04 => "stale",
        0x08 => "delay",
        0x10 => "probe",
        0x20 => "failed",
        0x40 => "noarp",
        0x80 => "permanent",
        other => return format!("{other:#x}"),
    };
    name.into()
}

/// A family in JSON.
pub fn family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

/// A policy in JSON, which may touch only what its filter matches; `name` gives interfaces their names.
pub fn policy(policy: &Policy, filtered: bool, name: impl Fn(u32) -> String) -> report::Policy {
    let (scope, port, of) = match policy.scope {
        Scope::Family(of) => ("all", None, Some(of)),
        Scope::Ingress(ifindex, of) => ("ingress", Some(name(ifindex)), of),
        Scope::Egress(ifindex, of) => ("egress", Some(name(ifindex)), of),
        Scope::Local(of) => ("local", None, Some(of)),
    };
    report::Policy {
        source: policy_source(policy.source).into(),
        scope: scope.into(),
        port,
        family: of.map(|of| family(of).into()),
        reason: policy.reason.name().into(),
        detail: policy.detail.clone(),
        filtered,
    }
}

/// Which part of Linux policies come from.
pub fn policy_source(source: PolicySource) -> &'static str {
    match source {
        PolicySource::Nftables => "nftables",
        PolicySource::Xtables => "iptables",
        PolicySource::Xfrm => "xfrm",
        PolicySource::Rules => "rules",
        PolicySource::Tc => "tc",
        PolicySource::Capture => "capture",
        PolicySource::Sysctl => "sysctl",
        PolicySource::Ports => "ports",
        PolicySource::Tunnels => "tunnels",
    }
}

/// A route for a line of text.
pub fn route(route: &Route) -> String {
    let key = route.key;
    let metric = if key.priority == 0 { String::new() } else { format!(", metric {}", key.priority) };
    format!("{} of table {}{metric}, protocol {}", prefix(route), table(key.table), protocol(route.protocol))
}

/// A route's prefix, with the route's kind if that is none to other hosts.
pub fn prefix(route: &Route) -> String {
    let kind = if route.kind == 1 { String::new() } else { format!("{} ", route_kind(route.kind)) };
    format!("{kind}{}", route.key.prefix)
}

/// Whether connections pass.
pub fn gate(phase: Phase) -> &'static str {
    match phase {
        Phase::Shut => "shut",
        Phase::Opening => "opening",
        Phase::Open => "open",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_is_named_with_its_remedy() {
        let full = |table| GrowError { table, elements: 2048, cause: "Cannot allocate memory (os error 12)".into() };
        let waiting = Waiting { vias: 3, neighbours: 1, ..Waiting::default() };
        let text = shortage(&full(TableId::Nexthops), waiting);
        for word in ["nexthops", "2048", "Cannot allocate", "3 ways of routes, 1 neighbours wait", "free memory"] {
            assert!(text.contains(word), "{word:?} is missing in: {text}");
        }
        let text = shortage(&full(TableId::Ports), Waiting::default());
        assert!(text.contains("serve fewer ports") && !text.contains("wait for room"), "{text}");
    }
}
