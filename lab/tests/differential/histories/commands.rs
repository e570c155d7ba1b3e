//! Random commands. They need not make sense: what Linux refuses is a step too, and must change nothing.
//!
//! A step is one line: commands of `ip`, or with their name in front of others, or `sysctl KEY=VALUE`, with "; " between several.

use crate::random::Random;
use crate::router::{HOST_MACS, PORT_NAMES, PORTS, ROUTER_MACS, ROUTER_V4, mac};

/// What routes are made for, of both families: wide, narrow, inside one another and inside the links' own prefixes.
pub const PREFIXES: [&[&str]; 2] = [
    &[
        "0.0.0.0/0",
        "198.18.0.0/16",
        "198.18.0.0/24",
        "198.18.0.0/23",
        "198.18.1.0/24",
        "198.18.1.128/25",
        "198.18.1.129/32",
        "198.18.8.0/22",
        "192.0.2.0/25",
        "198.51.100.64/26",
        "203.0.113.77/32",
        "198.18.200.0/25",
    ],
    &[
        "::/0",
        "2001:db8:100::/40",
        "2001:db8:100::/48",
        "2001:db8:101::/48",
        "2001:db8:101:8000::/49",
        "2001:db8:101:8000::1/128",
        "2001:db8:1::/96",
        "2001:db8:2::77/128",
        "2001:db8:200::/65",
    ],
];

/// Tables that no rule of the beginning leads to.
pub const OTHER_TABLES: [&str; 2] = ["100", "101"];
const OBJECTS: usize = 5;
const GROUPS: usize = 2;

/// Makes the steps of a history.
pub struct Commands {
    random: Random,
    /// What takes back what is in the way of all traffic
    remedies: Vec<String>,
}

impl Commands {
    pub fn new(seed: u64) -> Self {
        Self { random: Random::new(seed), remedies: Vec::new() }
    }

    /// The next step.
    pub fn step(&mut self) -> String {
        if !self.remedies.is_empty() && self.random.percent(35) {
            let at = self.random.below(self.remedies.len());
            return self.remedies.swap_remove(at);
        }
        match self.random.below(100) {
            0..42 => self.route(),
            42..54 => self.object(),
            54..65 => self.neighbour(),
            65..74 => self.address(),
            74..83 => self.link(),
            83..90 => self.sysctl(),
            _ => self.rule(),
        }
    }

    fn pick(&mut self, from: &[&'static str]) -> &'static str {
        self.random.pick(from)
    }

    fn device(&mut self) -> &'static str {
        self.random.pick(&PORT_NAMES)
    }

    fn route(&mut self) -> String {
        let v6 = self.random.percent(45);
        let prefix = self.pick(PREFIXES[usize::from(v6)]);
        let other = self.pick(&OTHER_TABLES);
        let table = if self.random.percent(12) { format!(" table {other}") } else { String::new() };
        let metric = self.pick(&["", "", "", " metric 10", " metric 20"]);
        let action =
            self.pick(&["add", "add", "replace", "replace", "replace", "append", "change", "del", "del", "del"]);
        if action == "del" {
            return format!("route del {prefix}{table}{metric}");
        }
        let kind = self.random.below(100);
        if kind < 16 {
            let kind = self.pick(&["blackhole", "unreachable", "prohibit", "throw"]);
            return format!("route {action} {kind} {prefix}{table}{metric}");
        }
        let via = match kind {
            16..34 => format!("nhid {}", self.any_object()),
            34..50 => (0..2 + self.random.below(2)).map(|_| self.member(v6)).collect::<Vec<_>>().join(" "),
            50..56 => format!("dev {}", self.device()),
            _ => self.via(v6),
        };
        let options = self.pick(&["", "", "", "", "", " mtu 1300", " mtu lock 1290", " advmss 1000", " hoplimit 9"]);
        format!("route {action} {prefix}{table}{metric}{options} {via}")
    }

    fn any_object(&mut self) -> usize {
        1 + self.random.below(OBJECTS + GROUPS)
    }

    /// A gateway and the port that it is behind.
    fn gateway(&mut self, v6: bool) -> (String, &'static str) {
        let port = self.random.below(PORTS);
        let [a, b, c, _] = ROUTER_V4[port];
        let last = self.pick(&["10", "10", "10", "11", "11", "99"]);
        let gateway = match (v6, self.random.below(10)) {
            (false, 0) => "198.18.9.9".into(),
            (false, _) => format!("{a}.{b}.{c}.{last}"),
            (true, 0 | 1) => format!("fe80::{last}"),
            (true, _) => format!("2001:db8:{port}::{last}"),
        };
        (gateway, PORT_NAMES[port])
    }

    fn via(&mut self, v6: bool) -> String {
        // Of IPv4 some next hops are IPv6 (RFC 8950).
        let other = !v6 && self.random.percent(12);
        let (gateway, device) = self.gateway(v6 || other);
        let family = if other { "inet6 " } else { "" };
        let device = if self.random.percent(3) { self.device() } else { device };
        let named = other || gateway.starts_with("fe80") || gateway == "198.18.9.9" || self.random.percent(50);
        let device = if named { format!(" dev {device}") } else { String::new() };
        let onlink = if named && (gateway == "198.18.9.9" || self.random.percent(10)) { " onlink" } else { "" };
        format!("via {family}{gateway}{device}{onlink}")
    }

    fn member(&mut self, v6: bool) -> String {
        let via = self.via(v6);
        format!("nexthop {via} weight {}", 1 + self.random.below(3))
    }

    fn object(&mut self) -> String {
        let action = self.pick(&["add", "add", "replace", "replace", "del"]);
        let id = self.any_object();
        match action {
            "del" => format!("nexthop del id {id}"),
            _ if id > OBJECTS => {
                let mut members: Vec<_> = (1..=OBJECTS).filter(|_| self.random.percent(45)).collect();
                members.truncate(3);
                let members: Vec<_> =
                    members.iter().map(|member| format!("{member},{}", 1 + self.random.below(3))).collect();
                format!("nexthop {action} id {id} group {}", members.join("/"))
            }
            _ if self.random.percent(10) => format!("nexthop {action} id {id} blackhole"),
            _ if self.random.percent(10) => format!("nexthop {action} id {id} dev {}", self.device()),
            _ => {
                // Even ones are for IPv6.
                let (gateway, device) = self.gateway(id.is_multiple_of(2));
                let onlink = if gateway == "198.18.9.9" { " onlink" } else { "" };
                format!("nexthop {action} id {id} via {gateway} dev {device}{onlink}")
            }
        }
    }

    fn neighbour(&mut self) -> String {
        let port = self.random.below(PORTS);
        let [a, b, c, _] = ROUTER_V4[port];
        let last = self.pick(&["11", "11", "77", "99"]);
        let address = match self.random.below(6) {
            0 => format!("fe80::{}", self.pick(&["10", "11"])),
            1 | 2 => format!("2001:db8:{port}::{last}"),
            _ => format!("{a}.{b}.{c}.{last}"),
        };
        let device = PORT_NAMES[port];
        if self.random.percent(30) {
            return format!("neighbor del {address} dev {device}");
        }
        let state = self.pick(&["permanent", "permanent", "noarp"]);
        format!("neighbor replace {address} lladdr {} dev {device} nud {state}", self.host_mac(port))
    }

    fn host_mac(&mut self, port: usize) -> String {
        let mut bytes = HOST_MACS[port];
        bytes[4] = self.random.below(3) as u8;
        mac(bytes)
    }

    fn address(&mut self) -> String {
        let (port, number) = (self.random.below(PORTS), 200 + self.random.below(3));
        let device = PORT_NAMES[port];
        let action = self.pick(&["add", "add", "del"]);
        let dad = if action == "add" { " nodad" } else { "" };
        match self.random.below(12) {
            0..4 => format!("address {action} 198.18.{number}.1/24 dev {device}"),
            4 => format!("address {action} 198.18.{number}.1/32 dev {device}"),
            5 => format!("address {action} 198.18.{number}.1 peer 198.18.{number}.9 dev {device}"),
            6 => format!("address {action} 198.18.0.1/24 metric 30 dev {device}"),
            7..10 => format!("address {action} 2001:db8:{number}::1/64 dev {device}{dad}"),
            10 => format!("address {action} 2001:db8:100::1/127 dev {device}{dad}"),
            _ => {
                let [a, b, c, d] = ROUTER_V4[port];
                self.remedies.push(format!("address replace {a}.{b}.{c}.{d}/24 broadcast + dev {device}"));
                format!("address del {a}.{b}.{c}.{d}/24 dev {device}")
            }
        }
    }

    fn link(&mut self) -> String {
        let port = self.random.below(PORTS);
        let device = PORT_NAMES[port];
        match self.random.below(15) {
            10 | 11 => {
                self.remedies.push(format!("link set away name {device}"));
                format!("link set {device} name away")
            }
            12 | 13 => self.vlan(device),
            14 => self.vrf(port),
            0..5 => {
                self.remedies.push(self.up(port));
                format!("link set {device} down")
            }
            5 => {
                self.remedies.push(format!("link set {device} arp on"));
                format!("link set {device} arp off")
            }
            6 => {
                self.remedies.push(format!("link set {device} address {}", mac(ROUTER_MACS[port])));
                format!("link set {device} address 02:00:00:00:00:77")
            }
            _ => format!("link set {device} mtu {}", self.pick(&["1280", "1300", "1400", "1500", "2000"])),
        }
    }

    /// A VLAN sub-interface, where the kernel has such.
    fn vlan(&mut self, device: &str) -> String {
        let number = self.random.below(3);
        self.remedies.push(format!("link del {device}.7"));
        [
            format!("link add link {device} name {device}.7 type vlan id 7"),
            format!("address add 198.18.{}.1/24 dev {device}.7", 210 + number),
            format!("link set {device}.7 up"),
            format!("neighbor replace 198.18.{}.9 lladdr {} dev {device}.7", 210 + number, mac(HOST_MACS[number])),
            format!("route replace 198.18.8.0/22 via 198.18.{}.9", 210 + number),
        ]
        .join("; ")
    }

    /// A port in a VRF, where the kernel has such, whose table rules lead to, too.
    fn vrf(&mut self, port: usize) -> String {
        let (device, other, up) = (PORT_NAMES[port], (port + 1) % PORTS, self.up(port));
        let ([a, b, c, _], out) = (ROUTER_V4[other], PORT_NAMES[other]);
        self.remedies.push(format!("link set {device} nomaster; {up}"));
        let add = "link add red type vrf table 100; link set red up";
        let leak = format!("route replace 198.18.0.0/24 via {a}.{b}.{c}.10 dev {out} onlink table 100");
        format!("{add}; link set {device} master red; {up}; {leak}")
    }

    /// What brings a port back with what it loses when it goes down.
    fn up(&self, port: usize) -> String {
        let [a, b, c, _] = ROUTER_V4[port];
        let (device, host) = (PORT_NAMES[port], mac(HOST_MACS[port]));
        let neighbour = |address: String| format!("neighbor replace {address} lladdr {host} dev {device}");
        [
            format!("link set {device} up"),
            format!("address replace 2001:db8:{port}::1/64 dev {device} nodad"),
            format!("address replace fe80::1/64 dev {device} nodad"),
            neighbour(format!("{a}.{b}.{c}.10")),
            neighbour(format!("2001:db8:{port}::10")),
        ]
        .join("; ")
    }

    fn sysctl(&mut self) -> String {
        let interface = if self.random.percent(25) { "all" } else { self.device() };
        let value = self.random.below(3);
        let bit = value % 2;
        let key = |family: &str, name: &str| format!("sysctl net.{family}.conf.{interface}.{name}");
        match self.random.below(21) {
            16 => format!("{}={bit}", key("ipv4", "src_valid_mark")),
            17 => format!("{}={bit}", key("ipv4", "bc_forwarding")),
            18 => format!("{}={bit}", key("ipv4", "proxy_arp")),
            19 => format!("{}={bit}", key("ipv4", "disable_policy")),
            20 => format!("{}={}", key("ipv6", "mtu"), self.pick(&["1280", "1300", "1400"])),
            0..4 => format!("{}={value}", key("ipv4", "rp_filter")),
            12 => format!("{}={bit}", key("ipv4", "accept_source_route")),
            13 => format!("{}={bit}", key("ipv4", "drop_unicast_in_l2_multicast")),
            14 => format!("sysctl net.ipv4.ip_forward_use_pmtu={bit}"),
            15 => format!("sysctl net.ipv6.fib_multipath_hash_policy={value}"),
            4 => self.off(key("ipv4", "forwarding")),
            5 => self.off(key("ipv6", "forwarding")),
            6 => self.off("sysctl net.ipv4.ip_forward".into()),
            7 => format!("{}={bit}", key("ipv4", "accept_local")),
            8 => format!("{}={bit}", key("ipv4", "route_localnet")),
            9 => format!("sysctl net.ipv4.fib_multipath_hash_policy={value}"),
            10 => format!("sysctl net.ipv4.fib_multipath_use_neigh={bit}"),
            _ => format!("{}={bit}", key("ipv4", "ignore_routes_with_linkdown")),
        }
    }

    /// Turns a setting off, to be turned on again.
    fn off(&mut self, setting: String) -> String {
        self.remedies.push(format!("{setting}=1"));
        format!("{setting}=0")
    }

    fn rule(&mut self) -> String {
        if self.random.percent(8) {
            return self.local_moved();
        }
        let (device, v6) = (self.device(), self.random.percent(40));
        let source = match v6 {
            false => format!("198.19.{}", self.pick(&["0.0/24", "64.0/18", "64.0/20", "128.0/17"])),
            true => self.pick(&["2001:db8:f01::/48", "2001:db8:f00::/40", "2001:db8:f02:2::/64"]).into(),
        };
        let destination = if v6 { "2001:db8:101::/48" } else { "198.18.1.0/24" };
        let select = match self.random.below(12) {
            0..3 => format!("from {source}"),
            3..6 => format!("iif {device}"),
            6 | 7 => format!("iif {device} from {source}"),
            8 => format!("to {destination} iif {device}"),
            9 => format!("to {destination}"),
            10 => format!("iif {device} fwmark 7"),
            _ => self.pick(&["from all", "not from all fwmark 7", "oif eth1", "from all ipproto udp"]).into(),
        };
        let action = match self.random.below(12) {
            0..4 => "lookup 100".into(),
            4..7 => "lookup 101".into(),
            7 | 8 => {
                let longest = self.pick(&["0", "16", "24", "40", "48"]);
                format!("lookup {} suppress_prefixlength {longest}", self.pick(&["main", "100"]))
            }
            // To the rule for table main.
            9 => "goto 32766".into(),
            _ => self.pick(&["blackhole", "unreachable", "prohibit"]).into(),
        };
        let rule = format!("{select} priority {} {action}", 100 + self.random.below(5));
        // The family of a rule is not guessed from its prefix.
        let family = if v6 { "ip -6 " } else { "" };
        self.remedies.push(format!("{family}rule del {rule}"));
        format!("{family}rule add {rule}")
    }

    /// Table local behind other tables.
    fn local_moved(&mut self) -> String {
        let family = self.pick(&["-4", "-6"]);
        let priority = self.pick(&["50", "110", "40000"]);
        let to = |priority| format!("ip {family} rule add priority {priority} lookup local");
        let from = |priority| format!("ip {family} rule del priority {priority} lookup local");
        self.remedies.push(format!("{}; {}", to("0"), from(priority)));
        format!("{}; {}", to(priority), from("0"))
    }
}
