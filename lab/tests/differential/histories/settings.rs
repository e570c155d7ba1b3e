//! What Linux can be told about forwarding, one thing after another: set, changed, taken back.

use super::{Trial, XDP};
use anyhow::{Context, Result, ensure};

/// A setting, and whether the fast path goes on with what it does not touch.
struct Setting {
    name: &'static str,
    /// The last one takes everything back
    steps: &'static [&'static str],
    fast: bool,
}

/// What Linux must be asked about, at least for some packets.
const fn touches(name: &'static str, steps: &'static [&'static str]) -> Setting {
    Setting { name, steps, fast: false }
}

/// What is repeated, or does not concern forwarding.
const fn repeated(name: &'static str, steps: &'static [&'static str]) -> Setting {
    Setting { name, steps, fast: true }
}

/// What brings eth2 back as it was when it went down, or its addresses and neighbours were taken from it.
macro_rules! eth2_back {
    () => {
        "link set eth2 up; address replace 203.0.113.1/24 broadcast + dev eth2; \
    address replace 2001:db8:2::1/64 dev eth2 nodad; address replace fe80::1/64 dev eth2 nodad; \
    neighbor replace 203.0.113.10 lladdr 02:00:00:00:00:22 dev eth2; \
    neighbor replace 2001:db8:2::10 lladdr 02:00:00:00:00:22 dev eth2"
    };
}

const SYSCTLS: &[Setting] = &[
    touches("forwarding of IPv4", &["sysctl net.ipv4.ip_forward=0", "sysctl net.ipv4.ip_forward=1"]),
    repeated(
        "forwarding of IPv4 by one port",
        &[
            "sysctl net.ipv4.conf.eth0.accept_redirects=0; sysctl net.ipv4.conf.eth1.accept_redirects=0; \
             sysctl net.ipv4.conf.eth0.forwarding=0",
            "sysctl net.ipv4.conf.eth0.forwarding=1; sysctl net.ipv4.conf.eth1.forwarding=0",
            "sysctl net.ipv4.conf.eth1.forwarding=1; sysctl net.ipv4.conf.eth0.accept_redirects=1; \
             sysctl net.ipv4.conf.eth1.accept_redirects=1",
        ],
    ),
    touches(
        "redirects to a port that does not forward",
        &[
            "sysctl net.ipv4.conf.eth1.forwarding=0",
            "sysctl net.ipv4.conf.eth1.forwarding=1; sysctl net.ipv6.conf.eth1.forwarding=0",
            "sysctl net.ipv6.conf.eth1.forwarding=1",
        ],
    ),
    touches("forwarding of IPv6", &["sysctl net.ipv6.conf.all.forwarding=0", "sysctl net.ipv6.conf.all.forwarding=1"]),
    repeated(
        "forwarding of IPv6 by one port",
        &[
            "sysctl net.ipv6.conf.eth1.accept_redirects=0; sysctl net.ipv6.conf.eth1.forwarding=0",
            "sysctl net.ipv6.conf.eth1.forwarding=1; sysctl net.ipv6.conf.eth1.accept_redirects=1",
        ],
    ),
    repeated(
        "reverse path filter",
        &[
            "sysctl net.ipv4.conf.all.rp_filter=1",
            "sysctl net.ipv4.conf.all.rp_filter=2",
            "sysctl net.ipv4.conf.all.rp_filter=0; sysctl net.ipv4.conf.eth0.rp_filter=1",
            "sysctl net.ipv4.conf.eth0.rp_filter=2",
            "sysctl net.ipv4.conf.eth0.rp_filter=0",
        ],
    ),
    repeated(
        "sources that are the router's own",
        &["sysctl net.ipv4.conf.eth0.accept_local=1", "sysctl net.ipv4.conf.eth0.accept_local=0"],
    ),
    repeated(
        "addresses of the loopback on links",
        &["sysctl net.ipv4.conf.all.route_localnet=1", "sysctl net.ipv4.conf.all.route_localnet=0"],
    ),
    touches(
        "reverse path filter by marks",
        &["sysctl net.ipv4.conf.eth0.src_valid_mark=1", "sysctl net.ipv4.conf.eth0.src_valid_mark=0"],
    ),
    touches(
        "directed broadcasts",
        &[
            "sysctl net.ipv4.conf.all.bc_forwarding=1; sysctl net.ipv4.conf.eth0.bc_forwarding=1",
            "sysctl net.ipv4.conf.all.bc_forwarding=0; sysctl net.ipv4.conf.eth0.bc_forwarding=0",
        ],
    ),
    touches(
        "path MTU of forwarded packets",
        &["sysctl net.ipv4.ip_forward_use_pmtu=1", "sysctl net.ipv4.ip_forward_use_pmtu=0"],
    ),
    touches(
        "policies of IPsec at a port",
        &["sysctl net.ipv4.conf.eth0.disable_policy=1", "sysctl net.ipv4.conf.eth0.disable_policy=0"],
    ),
    touches("MTU of IPv6 at a port", &["sysctl net.ipv6.conf.eth1.mtu=1280", "sysctl net.ipv6.conf.eth1.mtu=1400"]),
    touches(
        "no IPv6 at a port",
        &["sysctl net.ipv6.conf.eth2.disable_ipv6=1", "sysctl net.ipv6.conf.eth2.disable_ipv6=0", eth2_back!()],
    ),
    repeated(
        "hop limit of the router's own",
        &["sysctl net.ipv6.conf.eth0.hop_limit=3", "sysctl net.ipv6.conf.eth0.hop_limit=64"],
    ),
    touches(
        "proxy for IPv6 neighbours",
        &["sysctl net.ipv6.conf.all.proxy_ndp=1", "sysctl net.ipv6.conf.all.proxy_ndp=0"],
    ),
    repeated("proxy for ARP", &["sysctl net.ipv4.conf.eth0.proxy_arp=1", "sysctl net.ipv4.conf.eth0.proxy_arp=0"]),
    touches(
        "segment routing",
        &["sysctl net.ipv6.conf.eth0.seg6_enabled=1", "sysctl net.ipv6.conf.eth0.seg6_enabled=0"],
    ),
    repeated(
        "routes of links without carrier",
        &[
            "sysctl net.ipv4.conf.all.ignore_routes_with_linkdown=1",
            "sysctl net.ipv4.conf.all.ignore_routes_with_linkdown=0",
        ],
    ),
];

const ROUTES: &[Setting] = &[
    repeated(
        "kinds of IPv4 routes",
        &[
            "route replace 198.18.1.128/25 via 192.0.2.10",
            "route replace unreachable 198.18.1.128/25",
            "route replace prohibit 198.18.1.128/25",
            "route replace blackhole 198.18.1.128/25",
            "route replace throw 198.18.1.128/25",
            "route replace broadcast 198.18.1.128/25 dev eth0 table main",
            "route del 198.18.1.128/25",
            "route replace local 198.18.200.1/32 dev lo table main",
            "route del 198.18.200.1/32",
        ],
    ),
    repeated(
        "kinds of IPv6 routes",
        &[
            "route replace 2001:db8:101:8000::/49 via 2001:db8::10",
            "route replace unreachable 2001:db8:101:8000::/49",
            "route replace prohibit 2001:db8:101:8000::/49",
            "route replace blackhole 2001:db8:101:8000::/49",
            "route replace anycast 2001:db8:101:8000::/49 dev eth0 table main",
            "route replace local 2001:db8:101:8000::/49 dev lo table main",
            "route del 2001:db8:101:8000::/49",
        ],
    ),
    repeated(
        "routes in table local",
        &[
            "route add local 198.18.0.1/32 dev lo table local",
            "route del local 198.18.0.1/32 dev lo table local",
            "route add unreachable 198.18.0.0/16 table local",
            "route del unreachable 198.18.0.0/16 table local",
        ],
    ),
    touches(
        "routes by type of service",
        &[
            "route add 198.18.1.128/25 tos 0x10 via 192.0.2.10",
            "route add 198.18.1.128/25 via 198.51.100.10",
            "route del 198.18.1.128/25 tos 0x10",
            "route del 198.18.1.128/25",
        ],
    ),
    repeated(
        "metrics of routes",
        &[
            "route add 198.18.1.128/25 via 192.0.2.10 metric 20",
            "route add 198.18.1.128/25 via 198.51.100.10 metric 10",
            "route del 198.18.1.128/25 metric 10",
            "route del 198.18.1.128/25 metric 20",
        ],
    ),
    repeated(
        "MTU of a route",
        &[
            "route add 198.18.1.128/25 via 192.0.2.10 mtu 1300",
            "route replace 198.18.1.128/25 via 192.0.2.10 mtu lock 1300",
            "route replace 198.18.1.128/25 via 192.0.2.10",
            "route del 198.18.1.128/25",
        ],
    ),
    repeated(
        "gateways of the other family, and on no link's prefix",
        &[
            "route add 198.18.1.128/25 via inet6 2001:db8:1::10 dev eth1",
            "route replace 198.18.1.128/25 via inet6 fe80::10 dev eth1",
            "route replace 198.18.1.128/25 via 198.18.9.9 dev eth1 onlink",
            "route del 198.18.1.128/25",
        ],
    ),
    repeated("realms", &["route add 198.18.1.128/25 via 192.0.2.10 realms 5", "route del 198.18.1.128/25"]),
    touches(
        "routes by source",
        &[
            "route add 2001:db8:101:8000::/49 from 2001:db8:f00::/48 via 2001:db8::10",
            "route del 2001:db8:101:8000::/49 from 2001:db8:f00::/48",
        ],
    ),
    touches(
        "encapsulation by a route",
        &[
            "route add 198.18.1.128/25 encap ip id 5 dst 192.0.2.10 dev eth0",
            "route replace 198.18.1.128/25 via 192.0.2.10",
            "route del 198.18.1.128/25",
        ],
    ),
    repeated(
        "next hops that are objects",
        &[
            "nexthop add id 1 via 192.0.2.10 dev eth0; route add 198.18.1.128/25 nhid 1",
            "nexthop replace id 1 via 198.51.100.10 dev eth1",
            "nexthop replace id 1 blackhole",
            "nexthop replace id 1 via 203.0.113.10 dev eth2",
            "nexthop del id 1",
        ],
    ),
    repeated(
        "groups of next hops",
        &[
            "nexthop add id 1 via 192.0.2.10 dev eth0; nexthop add id 2 via 198.51.100.10 dev eth1",
            "nexthop add id 10 group 1/2,3; route add 198.18.1.128/25 nhid 10",
            "nexthop replace id 10 group 2",
            "nexthop del id 10; nexthop del id 1; nexthop del id 2",
        ],
    ),
    touches(
        "resilient groups",
        &[
            "nexthop add id 1 via 192.0.2.10 dev eth0; nexthop add id 2 via 198.51.100.10 dev eth1",
            "nexthop add id 10 group 1/2 type resilient buckets 8; route add 198.18.1.128/25 nhid 10",
            "nexthop replace id 10 group 2 type resilient buckets 8",
            "nexthop del id 10; nexthop del id 1; nexthop del id 2",
        ],
    ),
];

const RULES: &[Setting] = &[
    touches(
        "rules by source and port",
        &[
            "route add 198.18.1.0/24 via 203.0.113.10 table 100",
            "rule add from 198.19.0.0/24 priority 100 lookup 100",
            "rule add iif eth1 priority 101 lookup 100",
            "rule del priority 100",
            "rule del priority 101; route del 198.18.1.0/24 table 100",
        ],
    ),
    touches(
        "rules by marks, services and users",
        &[
            "rule add fwmark 7 priority 100 prohibit",
            "rule add not fwmark 7 priority 104 lookup 100; route add 198.18.1.0/24 via 203.0.113.10 table 100",
            "rule add tos 0x10 priority 101 prohibit",
            "rule add uidrange 1-100 priority 102 prohibit",
            "rule add oif eth1 priority 103 prohibit",
            "rule del priority 100; rule del priority 101; rule del priority 102; rule del priority 103",
            "rule del priority 104; route del 198.18.1.0/24 table 100",
        ],
    ),
    touches(
        "rules by protocols and ports",
        &[
            "rule add ipproto tcp priority 100 prohibit",
            "rule add dport 53 priority 101 unreachable",
            "rule del priority 100; rule del priority 101",
        ],
    ),
    touches(
        "rules without short prefixes, and those that skip others",
        &[
            "rule add priority 100 lookup main suppress_prefixlength 8",
            "rule add from 198.19.0.0/16 priority 99 goto 32767",
            "rule del priority 99; rule del priority 100",
        ],
    ),
    touches(
        "table local behind others",
        &[
            "rule add priority 1000 lookup local; rule del priority 0",
            "rule add priority 0 lookup local; rule del priority 1000",
        ],
    ),
    touches(
        "rules of IPv6",
        &[
            "ip -6 rule add from 2001:db8:f00::/48 priority 100 blackhole",
            "ip -6 rule add iif eth1 priority 101 unreachable",
            "ip -6 rule del priority 100; ip -6 rule del priority 101",
        ],
    ),
];

const PORTS: &[Setting] = &[
    repeated("MTU of a port", &["link set eth1 mtu 1280", "link set eth1 mtu 9000", "link set eth1 mtu 1400"]),
    repeated("a port that is down", &["link set eth2 down", eth2_back!()]),
    repeated(
        "a port's MAC address",
        &["link set eth1 address 02:00:00:00:00:77", "link set eth1 address 02:00:00:00:00:11"],
    ),
    repeated("promiscuous mode", &["link set eth0 promisc on", "link set eth0 promisc off"]),
    repeated("all multicast frames", &["link set eth0 allmulticast on", "link set eth0 allmulticast off"]),
    repeated(
        "what does not concern packets",
        &["link set eth0 alias uplink", "link set eth0 group 7", "link set eth0 alias none; link set eth0 group 0"],
    ),
];

/// What a port is beneath of.
const UPPER: &[Setting] = &[
    touches(
        "a bridge",
        &[
            "link add br0 type bridge mcast_snooping 0; link set br0 up",
            "link set eth2 master br0",
            "link set eth2 nomaster; link del br0",
        ],
    ),
    repeated(
        "a VRF",
        &[
            "link add vrf0 type vrf table 300; link set vrf0 up",
            concat!("link set eth2 master vrf0; ", eth2_back!()),
            "route add 198.18.0.0/24 via 203.0.113.10 table 300; route add 198.18.1.0/24 via 192.0.2.10 dev eth0 table 300",
            "route add 2001:db8:101::/48 via 2001:db8::10 dev eth0 table 300",
            "route add 203.0.113.0/24 dev eth2; route add 2001:db8:2::/64 dev eth2",
            "route add unreachable default metric 4278198272 table 300",
            "ip -6 route add unreachable default metric 4278198272 table 300",
            "sysctl net.ipv4.conf.eth2.rp_filter=1",
            "sysctl net.ipv4.conf.eth2.rp_filter=2",
            "sysctl net.ipv4.conf.eth2.rp_filter=0; sysctl net.ipv4.conf.vrf0.rp_filter=1",
            "rule del priority 1000; rule add priority 1000 l3mdev",
            "ip -6 rule add iif vrf0 priority 101 lookup main; ip -6 rule add iif eth2 priority 100 lookup 301",
            "ip -6 rule del priority 101; ip -6 rule del priority 100",
            "link set eth2 nomaster; link del vrf0",
            eth2_back!(),
        ],
    ),
    touches(
        "what is in the way in a VRF",
        &[
            "link add vrf0 type vrf table 300; link set vrf0 up",
            concat!("link set eth2 master vrf0; ", eth2_back!()),
            "link set vrf0 down",
            "link set vrf0 up",
            "sysctl net.ipv4.conf.vrf0.forwarding=0",
            "sysctl net.ipv4.conf.vrf0.forwarding=1; sysctl net.ipv6.conf.vrf0.disable_ipv6=1",
            "sysctl net.ipv6.conf.vrf0.disable_ipv6=0; rule add iif eth2 priority 100 lookup 301",
            "rule del priority 100; rule add iif vrf0 priority 100 lookup main",
            "rule del priority 100; nft add table ip t; nft 'add chain ip t c { type filter hook prerouting priority raw;}'",
            "nft add rule ip t c iifname vrf0 ip daddr 198.18.0.0/24 drop",
            "nft delete table ip t",
            "link set eth2 nomaster; link del vrf0",
            eth2_back!(),
        ],
    ),
    touches(
        "a macvlan on a port",
        &["link add mv0 link eth0 type macvlan mode bridge", "link set mv0 up", "link del mv0"],
    ),
    touches("an ipvlan on a port", &["link add iv0 link eth0 type ipvlan", "link set iv0 up", "link del iv0"]),
    repeated("a VLAN sub-interface", &["link add link eth0 name v5 type vlan id 5", "link set v5 up", "link del v5"]),
];

const ADDRESSES: &[Setting] = &[
    repeated(
        "addresses of IPv4",
        &[
            "address add 198.18.200.1/24 dev eth0",
            "address add 198.18.201.1/32 dev eth0",
            "address add 198.18.202.1/32 dev lo",
            "address del 198.18.202.1/32 dev lo",
            "address del 198.18.201.1/32 dev eth0; address del 198.18.200.1/24 dev eth0",
        ],
    ),
    repeated(
        "addresses of IPv6",
        &[
            "address add 2001:db8:200::1/64 dev eth0 nodad",
            "address add 2001:db8:101:8000::1/128 dev lo",
            "address del 2001:db8:101:8000::1/128 dev lo; address del 2001:db8:200::1/64 dev eth0",
        ],
    ),
    repeated(
        "neighbours",
        &[
            "neighbor replace 192.0.2.11 lladdr 02:00:00:00:09:01 dev eth0 nud permanent",
            "neighbor replace 192.0.2.11 lladdr 02:00:00:00:09:02 dev eth0 nud noarp",
            "neighbor del 192.0.2.11 dev eth0",
            "neighbor replace 2001:db8::11 lladdr 02:00:00:00:09:01 dev eth0 nud permanent",
            "neighbor del 2001:db8::11 dev eth0",
        ],
    ),
];

const POLICIES: &[Setting] = &[
    touches(
        "netfilter, forwarded packets",
        &[
            "nft add table inet t; nft 'add chain inet t c { type filter hook forward priority 0;}'",
            "nft add rule inet t c udp dport 53 drop",
            "nft insert rule inet t c ip ttl 1 accept",
            "nft flush chain inet t c",
            "nft 'add chain inet t c { policy drop;}'",
            "nft delete table inet t",
        ],
    ),
    touches(
        "netfilter, packets as they come",
        &[
            "nft add table ip t; nft 'add chain ip t c { type filter hook prerouting priority raw;}'",
            "nft add rule ip t c iifname eth0 ip daddr 198.18.0.0/24 drop",
            "nft add rule ip t c meta mark set 7",
            "nft delete table ip t",
        ],
    ),
    touches(
        "netfilter, packets as they leave",
        &[
            "nft add table ip6 t; nft 'add chain ip6 t c { type filter hook postrouting priority 0;}'",
            "nft add rule ip6 t c oifname eth1 drop",
            "nft delete table ip6 t",
        ],
    ),
    touches(
        "netfilter, frames at a port",
        &[
            "nft add table netdev t; nft 'add chain netdev t c { type filter hook ingress device eth0 priority 0;}'",
            "nft add rule netdev t c ip protocol tcp drop",
            "nft delete table netdev t",
        ],
    ),
    repeated(
        "netfilter, the router's own packets",
        &[
            "nft add table inet t; nft 'add chain inet t i { type filter hook input priority 0;}'; \
                nft add rule inet t i tcp dport 80 drop",
            "nft 'add chain inet t o { type filter hook output priority 0;}'; nft add rule inet t o tcp dport 80 drop",
            "nft delete table inet t",
        ],
    ),
    touches(
        "connection tracking and translation",
        &[
            "nft add table ip t; nft 'add chain ip t c { type nat hook postrouting priority srcnat;}'",
            "nft add rule ip t c ip protocol 255 masquerade",
            "nft delete table ip t",
        ],
    ),
    touches(
        "IPsec policies",
        &[
            "ip xfrm policy add dir fwd src 198.19.0.0/16 dst 198.18.1.0/24 action block",
            "ip xfrm policy add dir out src 198.19.0.0/16 dst 198.18.0.0/24 action block",
            "ip xfrm policy deleteall",
        ],
    ),
    touches(
        "queueing disciplines and filters",
        &[
            "tc qdisc add dev eth1 root tbf rate 1gbit burst 100k latency 1ms",
            "tc qdisc del dev eth1 root",
            "tc qdisc add dev eth0 ingress",
            "tc filter add dev eth0 ingress bpf bytecode '1,6 0 0 4294967295' classid 1:1",
            "tc qdisc del dev eth0 ingress",
            "tc qdisc add dev eth1 clsact",
            "tc filter add dev eth1 egress bpf bytecode '1,6 0 0 4294967295' classid 1:1",
            "tc qdisc del dev eth1 clsact",
        ],
    ),
];

/// Goes through them. What this kernel has not is said, and fails where nothing may be skipped.
fn honoured(trial: &mut Trial, settings: &[Setting]) -> Result<()> {
    let required = std::env::var_os("TOWPATH_NO_SKIP").is_some();
    for Setting { name, steps, fast: claimed } in settings {
        let before = trial.forwarded();
        trial.refusals.clear();
        trial.unhindered = *claimed;
        trial.run(steps).with_context(|| format!("{name} ({})", trial.explained()))?;
        let after = trial.forwarded();
        let [plain, fast] = [after[0] - before[0], after[1] - before[1]];
        println!("{name}: {plain} plainly forwarded, {fast} fast");
        ensure!(!claimed || fast * 2 > plain, "{name}: the fast path forwarded {fast} of {plain}");
        if let Some(refusal) = trial.refusals.first() {
            println!("SKIP: {name}: not on this kernel: {refusal}");
            ensure!(!required, "{name} is required here: {refusal}");
        }
    }
    Ok(())
}

#[test]
fn every_sysctl_is_honoured() -> Result<()> {
    honoured(&mut Trial::new(XDP)?, SYSCTLS)
}

#[test]
fn every_kind_of_route_is_honoured() -> Result<()> {
    let mut trial = Trial::new(XDP)?;
    honoured(&mut trial, ROUTES)?;
    honoured(&mut trial, ADDRESSES)
}

#[test]
fn every_policy_is_honoured() -> Result<()> {
    let mut trial = Trial::new(XDP)?;
    honoured(&mut trial, RULES)?;
    honoured(&mut trial, POLICIES)
}

#[test]
fn every_change_of_a_port_is_honoured() -> Result<()> {
    each_alone(PORTS)
}

#[test]
fn every_device_above_a_port_is_honoured() -> Result<()> {
    each_alone(UPPER)
}

/// Each with routers of its own: with a port's routes and neighbours Linux forgets more than can be put back.
fn each_alone(settings: &[Setting]) -> Result<()> {
    settings.iter().try_for_each(|setting| honoured(&mut Trial::new(XDP)?, std::slice::from_ref(setting)))
}

impl Trial {
    /// Frames plainly forwarded so far, and those that went fast.
    fn forwarded(&self) -> [u64; 2] {
        [self.pair.plain_forwarded, self.sums.fast]
    }

    /// What Towpath says about policies, for whoever reads of a failure.
    fn explained(&self) -> String {
        let status = self.towpath.as_ref().map(|towpath| towpath.json(&["status"]));
        match status {
            Some(Ok(status)) => format!("policies {}", status["policies"]),
            Some(Err(error)) => format!("{error:#}"),
            None => String::new(),
        }
    }
}
