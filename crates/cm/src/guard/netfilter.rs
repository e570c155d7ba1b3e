//! What nftables and xtables have in common: the hooks, and which matches and targets leave connection tracking alone.

use towpath_fpc::Scope;
use towpath_tables::record::Family;

/// Protocol families of netfilter (include/uapi/linux/netfilter.h).
pub mod pf {
    /// IPv4 and IPv6
    pub const INET: u8 = 1;
    /// IPv4
    pub const IPV4: u8 = 2;
    /// Hooks of one device
    pub const NETDEV: u8 = 5;
    /// IPv6
    pub const IPV6: u8 = 10;
}

/// Hooks of IPv4 and IPv6 that a forwarded packet passes, with their names.
pub const FORWARD_PATH: [(u32, &str); 3] = [(0, "prerouting"), (2, "forward"), (4, "postrouting")];

/// Hooks that packets to the host itself and from it pass besides.
pub const LOCAL_PATH: [(u32, &str); 2] = [(1, "input"), (3, "output")];

/// The hooks that matter, and whether only to the host's own packets.
pub fn hooks(tunnels: bool) -> impl Iterator<Item = (u32, &'static str, bool)> {
    let own = LOCAL_PATH.into_iter().filter(move |_| tunnels).map(|(hook, name)| (hook, name, true));
    FORWARD_PATH.into_iter().map(|(hook, name)| (hook, name, false)).chain(own)
}

/// What a hook touches.
pub fn scope(family: Family, local: bool) -> Scope {
    if local { Scope::Local(family) } else { Scope::Family(family) }
}

/// The families that a netfilter family covers; none for ARP, bridge and netdev.
pub fn families(pf: u8) -> &'static [Family] {
    match pf {
        pf::INET => &Family::ALL,
        pf::IPV4 => &Family::ALL[..1],
        pf::IPV6 => &Family::ALL[1..],
        _ => &[],
    }
}

/// Matches and targets of xtables known not to register connection tracking when a rule with them is added. It acts
/// at prerouting on every packet, in whatever chain the rule stands that asked for it, so anything else (conntrack,
/// state, helper, MASQUERADE, …, and whatever is unknown) counts as using it. By `checkentry` functions of
/// net/netfilter/xt_*.c and net/ipv{4,6}/netfilter, Linux 6.1: who calls nf_ct_netns_get or nf_defrag_ipv{4,6}_enable.
#[rustfmt::skip]
const WITHOUT_CONNTRACK: &[&str] = &[
    "", "standard", "ERROR", "AUDIT", "CHECKSUM", "CLASSIFY", "DSCP", "ECN", "HL", "HMARK", "IDLETIMER", "LED", "LOG",
    "MARK", "NFLOG", "NFQUEUE", "RATEEST", "REJECT", "SECMARK", "SET", "TCPMSS", "TCPOPTSTRIP", "TEE", "TOS", "TRACE",
    "TTL", "addrtype", "ah", "bpf", "cgroup", "comment", "cpu", "dccp", "devgroup", "dscp", "dst", "ecn", "esp",
    "eui64", "frag", "hashlimit", "hbh", "hl", "icmp", "icmp6", "ipcomp", "iprange", "ipv6header", "l2tp", "length",
    "limit", "mac", "mark", "mh", "multiport", "nfacct", "osf", "owner", "physdev", "pkttype", "policy", "quota",
    "rateest", "realm", "recent", "rpfilter", "rt", "sctp", "set", "statistic", "string", "tcp", "tcpmss", "time",
    "tos", "ttl", "u32", "udp", "udplite",
];

/// Whether a rule with this match or target makes connection tracking (or reassembly) act on forwarded packets.
pub fn xt_tracks(name: &str) -> bool {
    !WITHOUT_CONNTRACK.contains(&name)
}

/// Targets of xtables that say no more than what becomes of a connection, or leave its packets as they are.
#[rustfmt::skip]
const DECIDING: &[&str] = &[
    "", "AUDIT", "CONNMARK", "CONNSECMARK", "DNAT", "ERROR", "IDLETIMER", "LED", "LOG", "MARK", "MASQUERADE", "NETMAP",
    "NFLOG", "RATEEST", "REDIRECT", "REJECT", "SECMARK", "SET", "SNAT", "TCPMSS", "TRACE", "standard",
];

/// Targets that change each packet, or copy it: a flowtable's connections do not meet them in Linux either.
const CHANGING: &[&str] = &["CHECKSUM", "CLASSIFY", "DSCP", "ECN", "HL", "HMARK", "TCPOPTSTRIP", "TEE", "TOS", "TTL"];

/// Whether connections that Linux handed over may pass a rule with this target; `flowtable`: those of a flowtable. By
/// net/netfilter/xt_*.c and net/ipv{4,6}/netfilter, Linux 6.1; unknown ones are not passed.
pub fn xt_passes(target: &str, flowtable: bool) -> bool {
    DECIDING.contains(&target) || flowtable && CHANGING.contains(&target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tracking_extensions_and_unknown_ones_track() {
        for name in ["conntrack", "state", "MASQUERADE", "SNAT", "CT", "connlimit", "socket", "TPROXY", "no-such"] {
            assert!(xt_tracks(name), "{name}");
        }
        for name in ["", "tcp", "ERROR", "comment", "REJECT"] {
            assert!(!xt_tracks(name), "{name}");
        }
    }
}
