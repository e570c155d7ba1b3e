//! Random rule sets of nftables, and what an administrator does to one.
//!
//! What most rules match is the same for every packet of a connection's direction that Linux may leave to the fast path: a
//! flow repeats what was decided about packets before. Some ask for lengths, or for what was counted: no connection may pass
//! those. There is nothing here about times, nor about what connection tracking counts, which is less where packets were fast.

use crate::hosts::{PORTS_ASKED, address, network};
use crate::random::Random;
use crate::router::{PORT_NAMES, PORTS, ROUTER_V4};
use std::fmt::Write;
use std::net::Ipv4Addr;

/// The mark that hands connections over, where marks do.
pub const MARK: &str = "0x10";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Table {
    Inet,
    Ip,
    Ip6,
    Netdev,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hook {
    Ingress,
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// The hooks of IP.
const HOOKS: [Hook; 5] = [Hook::Forward, Hook::Prerouting, Hook::Postrouting, Hook::Input, Hook::Output];

#[derive(Clone, PartialEq, Eq)]
struct Rule {
    /// Its own in a rule set and all that come of it
    id: u32,
    text: String,
}

#[derive(Clone, PartialEq, Eq)]
struct Chain {
    table: Table,
    name: String,
    hook: Hook,
    /// Of a chain that hangs in its hook: type, hook and priority
    base: Option<String>,
    nat: bool,
    drop: bool,
    rules: Vec<Rule>,
}

#[derive(Clone, PartialEq, Eq)]
struct Set {
    table: Table,
    name: String,
    kind: &'static str,
    elements: Vec<String>,
}

#[derive(Clone, Default)]
pub struct Ruleset {
    sets: Vec<Set>,
    chains: Vec<Chain>,
    ids: u32,
}

/// What all parts of a rule are about: they must not contradict each other.
#[derive(Clone, Copy)]
struct About {
    table: Table,
    six: bool,
    ip: &'static str,
    transport: &'static str,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Table::Inet => "inet p",
            Table::Ip => "ip p",
            Table::Ip6 => "ip6 p",
            Table::Netdev => "netdev p",
        }
    }

    /// What a rule of this table may be about.
    fn about(self, random: &mut Random) -> About {
        let six = match self {
            Table::Ip => false,
            Table::Ip6 => true,
            Table::Inet | Table::Netdev => random.percent(40),
        };
        let (ip, transport) = (if six { "ip6" } else { "ip" }, random.pick(&["tcp", "udp"]));
        About { table: self, six, ip, transport }
    }
}

impl Ruleset {
    /// A rule set; `marks`: most of them mark new connections so that they are handed over.
    pub fn new(random: &mut Random, marks: bool) -> Self {
        let mut set = Self::default();
        if !marks && random.percent(30) {
            set.add_only(random);
            return set;
        }
        for table in [Table::Inet, Table::Ip, Table::Ip6] {
            if random.percent(if table == Table::Inet { 90 } else { 35 }) {
                set.add_table(table, random);
            }
        }
        if random.percent(8) {
            set.add_ingress(random);
        }
        if random.percent(20) {
            set.add_counting(random);
        }
        if marks && random.percent(90) {
            let name = set.add_base(Table::Inet, Hook::Forward, "filter", "-1".into(), false);
            set.add_rule(name, format!("ct state new ct mark set ct mark or {MARK}"));
        }
        set
    }

    fn add_table(&mut self, table: Table, random: &mut Random) {
        for _ in 0..random.below(3) {
            self.add_set(table, random);
        }
        for (hook, chance) in HOOKS.into_iter().zip([90, 25, 20, 20, 15]) {
            if random.percent(chance) {
                self.add_filter(table, hook, random);
            }
            if hook == Hook::Forward && random.percent(15) {
                self.add_filter(table, hook, random);
            }
        }
        for (hook, chance) in [(Hook::Prerouting, 35), (Hook::Postrouting, 40), (Hook::Input, 4), (Hook::Output, 4)] {
            if random.percent(chance) {
                self.add_nat(table, hook, random);
            }
        }
    }

    /// One chain alone, so that nothing else speaks for its hook, which drops something.
    fn add_only(&mut self, random: &mut Random) {
        let table = random.pick(&[Table::Inet, Table::Ip, Table::Ip6]);
        let hook = random.pick(&[Hook::Prerouting, Hook::Forward, Hook::Postrouting]);
        self.add_filter(table, hook, random);
        let text = format!("{} drop", self.matching(table.about(random), hook, random));
        self.insert_rule(0, 0, text);
    }

    /// A rule that answers each packet differently, in a chain that all see.
    fn add_counting(&mut self, random: &mut Random) {
        let forward = |chain: &Chain| chain.hook == Hook::Forward && chain.base.is_some();
        let Some(chain) = self.chains.iter().position(forward) else { return };
        let text = format!("{} drop", differently(random.pick(&["tcp", "udp"]), random));
        let last = self.chains[chain].rules.len();
        self.insert_rule(chain, random.pick(&[0, 0, last]), text);
    }

    fn add_set(&mut self, table: Table, random: &mut Random) {
        let name = format!("s{}", self.sets.len());
        let kinds = ["ipv4_addr; flags interval", "ipv6_addr; flags interval", "inet_service", "ifname"];
        let kind = match table {
            Table::Ip => random.pick(&[0, 2, 3]),
            Table::Ip6 => random.pick(&[1, 2, 3]),
            _ => random.below(4),
        };
        let mut set = Set { table, name, kind: kinds[kind], elements: Vec::new() };
        for _ in 0..random.below(4) {
            set.toggle(random);
        }
        self.sets.push(set);
    }

    fn add_filter(&mut self, table: Table, hook: Hook, random: &mut Random) {
        let priority = random.pick(&[-450, -300, -290, -150, -5, 0, 0, 0, 1, 50, 150, 300]);
        let drop = random.percent(match hook {
            Hook::Forward => 30,
            _ => 8,
        });
        let at = self.add_base(table, hook, "filter", priority.to_string(), drop);
        let mut children = Vec::new();
        for _ in 0..random.pick(&[0, 0, 1, 2]) {
            let name = format!("c{}", self.chains.len());
            let chain = Chain { table, name, hook, base: None, nat: false, drop: false, rules: Vec::new() };
            self.chains.push(chain);
            children.push(self.chains.len() - 1);
        }
        if drop || random.percent(30) {
            let mut usual =
                vec!["ct state established,related accept", "ct state vmap { established : accept, related : accept }"];
            usual.push("ct direction reply accept");
            if hook == Hook::Forward {
                self.add_rule(at, random.pick(&usual).to_owned());
                let accept = [
                    "iifname eth0 accept",
                    "meta l4proto { tcp, udp } accept",
                    "ct state new accept",
                    "th dport != 53 accept",
                ];
                self.add_rule(at, random.pick(&accept).to_owned());
            } else if random.percent(70) {
                self.add_rule(at, "meta l4proto { tcp, udp, icmp, ipv6-icmp } accept".to_owned());
            }
        }
        for place in [at].into_iter().chain(children) {
            for _ in 0..random.below(5) {
                let text = self.rule(place, random);
                let first = random.below(self.chains[place].rules.len() + 1);
                self.insert_rule(place, first, text);
            }
        }
    }

    fn add_nat(&mut self, table: Table, hook: Hook, random: &mut Random) {
        let priority = match hook {
            Hook::Prerouting | Hook::Output => random.pick(&[-150, -100, -50]),
            _ => random.pick(&[50, 100, 150]),
        };
        let at = self.add_base(table, hook, "nat", priority.to_string(), random.percent(3));
        for _ in 0..random.below(4) {
            let text = self.rule(at, random);
            self.add_rule(at, text);
        }
    }

    fn add_ingress(&mut self, random: &mut Random) {
        let device = random.pick(&PORT_NAMES);
        let at = self.add_base(Table::Netdev, Hook::Ingress, "filter", "0".into(), false);
        let base = self.chains[at].base.as_mut().expect("a base chain");
        *base = format!("type filter hook ingress device {device} priority 0");
        for _ in 0..random.below(3) {
            let text = self.rule(at, random);
            self.add_rule(at, text);
        }
    }

    fn add_base(&mut self, table: Table, hook: Hook, kind: &str, priority: String, drop: bool) -> usize {
        let name = format!("c{}", self.chains.len());
        let base = format!("type {kind} hook {} priority {priority}", format!("{hook:?}").to_lowercase());
        let nat = kind == "nat";
        self.chains.push(Chain { table, name, hook, base: Some(base), nat, drop, rules: Vec::new() });
        self.chains.len() - 1
    }

    fn add_rule(&mut self, chain: usize, text: String) {
        self.insert_rule(chain, self.chains[chain].rules.len(), text);
    }

    fn insert_rule(&mut self, chain: usize, at: usize, text: String) {
        self.ids += 1;
        self.chains[chain].rules.insert(at, Rule { id: self.ids, text });
    }

    /// A rule for this chain.
    fn rule(&self, chain: usize, random: &mut Random) -> String {
        let Chain { table, hook, nat, .. } = self.chains[chain];
        let about = table.about(random);
        if nat {
            return nat_rule(about, hook, random);
        }
        let mut words = Vec::new();
        for _ in 0..random.pick(&[0, 1, 1, 1, 2, 2]) {
            words.push(self.matching(about, hook, random));
        }
        words.push(match words.is_empty() {
            true => self.dispatch(about, chain, random),
            false => self.verdict(about, chain, random),
        });
        words.join(" ")
    }

    /// What a rule matches.
    fn matching(&self, about: About, hook: Hook, random: &mut Random) -> String {
        let About { six, ip, transport, .. } = about;
        let not = random.pick(&["", "", "", "!= "]);
        let (address, end) = (random.pick(&["saddr", "daddr"]), random.pick(&["dport", "dport", "sport"]));
        let [one, other] = [(); 2].map(|()| random.pick(&PORTS_ASKED));
        let [host, second] = [(); 2].map(|()| some_host(six, random));
        match random.below(18) {
            0..4 => self.in_set(about, hook, random),
            4 => Some(format!("{ip} {address} {not}{{ {host}, {second} }}")),
            5 => Some(format!("{transport} dport {not}{one}")),
            6 if one != other => Some(format!("{transport} sport {not}{{ {one}, {other} }}")),
            7 => Some(format!("{transport} {end} {not}{}-{}", one.min(other), one.max(other) + 1)),
            8 => Some(format!("{ip} saddr . {transport} {end} {{ {host} . {one}, {second} . {other} }}")),
            9 => Some(format!("meta l4proto {transport}")),
            10 => Some(format!("{transport} {end} and 1 == {}", random.below(2))),
            11 => {
                Some(format!("jhash {ip} saddr . {ip} daddr mod 4 seed 0x{} {not}{}", random.below(9), random.below(4)))
            }
            12 if hook != Hook::Ingress => Some(format!("meta mark {not}{}", random.below(3))),
            13 if transport == "tcp" => {
                Some(random.pick(&["tcp flags & (syn | ack) == syn", "tcp flags & (fin | rst) != 0"]).into())
            }
            14 => Some(format!("{ip} {address} and {}", if six { "::1 == ::1" } else { "0.0.0.1 == 0.0.0.1" })),
            15 => Some(place(hook, random)),
            16.. if hook != Hook::Ingress => Some(tracked(about, random)),
            _ => None,
        }
        .unwrap_or_else(|| format!("{ip} {address} {not}{}", some_address(six, random)))
    }

    /// Being in one of the sets of the table, if there is one that fits.
    fn in_set(&self, about: About, hook: Hook, random: &mut Random) -> Option<String> {
        let wrong = if about.six { "ipv4" } else { "ipv6" };
        let fits = |set: &&Set| set.table == about.table && !set.kind.starts_with(wrong);
        let fitting: Vec<&Set> = self.sets.iter().filter(fits).collect();
        if fitting.is_empty() {
            return None;
        }
        let set = random.pick(&fitting);
        let what = match set.kind {
            "inet_service" => format!("{} {}", about.transport, random.pick(&["dport", "sport"])),
            "ifname" if hook == Hook::Postrouting || hook == Hook::Output => "oifname".into(),
            "ifname" => "iifname".into(),
            _ => format!("{} {}", about.ip, random.pick(&["saddr", "daddr"])),
        };
        Some(format!("{what} {}@{}", random.pick(&["", "", "!= "]), set.name))
    }

    /// A rule that says by a map what becomes of whom.
    fn dispatch(&self, about: About, chain: usize, random: &mut Random) -> String {
        let About { six, ip, transport, .. } = about;
        let further = self.further(chain);
        let [one, other] = [random.pick(&["accept", "drop", "continue"]), random.pick(&["accept", "drop", "return"])];
        let address = random.pick(&["saddr", "daddr"]);
        match random.below(6) {
            0..3 if !further.is_empty() => format!("jump {}", random.pick(&further)),
            0 => {
                let [host, second] = [0, 1].map(|port| crate::hosts::address(six, port, random.below(3)));
                format!("{ip} {address} vmap {{ {host} : {one}, {second} : {other} }}")
            }
            3 => {
                let name = if self.chains[chain].hook == Hook::Output { "oifname" } else { "iifname" };
                format!(
                    "{name} vmap {{ eth0 : {one}, eth1 : continue, eth2 : {} }}",
                    random.pick(&["accept", "continue"])
                )
            }
            4 => {
                let last = if further.is_empty() { "accept".into() } else { format!("goto {}", random.pick(&further)) };
                format!("{transport} dport vmap {{ 80 : {one}, 443 : {other}, 53 : {last} }}")
            }
            _ => "counter".into(),
        }
    }

    fn verdict(&self, about: About, chain: usize, random: &mut Random) -> String {
        let Chain { hook, base, .. } = &self.chains[chain];
        let (further, tcp) = (self.further(chain), about.transport == "tcp");
        let early = base.as_ref().is_some_and(|base| base.ends_with("-300"));
        match (hook, random.below(24)) {
            (_, 0..6) => "accept".into(),
            (_, 6..11) => "drop".into(),
            (Hook::Ingress, 11) => format!("fwd to {}", random.pick(&PORT_NAMES)),
            (Hook::Forward | Hook::Input | Hook::Output, 11..14) => reject(about, random),
            (_, 14..17) if !further.is_empty() => {
                format!("{} {}", random.pick(&["jump", "goto"]), random.pick(&further))
            }
            (_, 17) => "return".into(),
            (Hook::Ingress, _) => "counter".into(),
            (_, 18) => format!("meta mark set {}", random.below(3)),
            (_, 19) => format!("ct state new ct mark set {}", random.below(3)),
            (Hook::Prerouting, 20) if early => "notrack".into(),
            (Hook::Forward, 20) if tcp => "tcp flags syn tcp option maxseg size set rt mtu".into(),
            (Hook::Forward | Hook::Postrouting, 21) if random.percent(60) => format!("{} dscp set cs1", about.ip),
            (Hook::Prerouting, 21) if early && random.percent(20) => "ct zone set 1".into(),
            // Without a rule that asks for labels, entries have no room for any.
            (_, 23) => format!("ct label set {}", random.below(2)),
            (_, 22) => "limit rate 1/day burst 1 packets counter".into(),
            _ => "counter".into(),
        }
    }

    /// Chains that this one may lead to, without going in a circle.
    fn further(&self, chain: usize) -> Vec<&str> {
        let from = &self.chains[chain];
        let later = self.chains.iter().skip(chain + 1).take_while(|other| other.base.is_none());
        later.filter(|other| other.table == from.table).map(|other| other.name.as_str()).collect()
    }

    /// Changes something, as far as there is anything.
    pub fn change(&mut self, random: &mut Random) {
        if self.chains.is_empty() {
            return self.add_table(Table::Inet, random);
        }
        let chain = random.below(self.chains.len());
        match random.below(10) {
            0..4 => {
                let text = self.rule(chain, random);
                let at = random.pick(&[0, self.chains[chain].rules.len()]);
                self.insert_rule(chain, at, text);
            }
            4..7 => {
                let full: Vec<usize> = (0..self.chains.len()).filter(|at| !self.chains[*at].rules.is_empty()).collect();
                if !full.is_empty() {
                    let rules = &mut self.chains[random.pick(&full)].rules;
                    rules.remove(random.below(rules.len()));
                }
            }
            7 if !self.sets.is_empty() => {
                let at = random.below(self.sets.len());
                self.sets[at].toggle(random);
            }
            8 => self.chains[chain].drop ^= self.chains[chain].base.is_some() && !self.chains[chain].nat,
            9 => self.chains[chain].rules.clear(),
            _ => self.add_filter(Table::Inet, Hook::Forward, random),
        }
    }

    /// Whether addresses may be translated.
    pub fn translates(&self) -> bool {
        self.chains.iter().any(|chain| chain.nat)
    }

    /// Numbers of all rules.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.chains.iter().flat_map(|chain| &chain.rules).map(|rule| rule.id)
    }

    pub fn remove(&mut self, id: u32) {
        self.chains.iter_mut().for_each(|chain| chain.rules.retain(|rule| rule.id != id));
    }

    /// Names of all chains.
    pub fn chains(&self) -> impl Iterator<Item = String> {
        self.chains.iter().map(|chain| chain.name.clone())
    }

    pub fn remove_chain(&mut self, name: &str) {
        self.chains.retain(|chain| chain.name != name);
    }

    /// Commands that put this rule set in the place of any other.
    pub fn whole(&self) -> String {
        let mut text = String::from("flush ruleset\n");
        for table in [Table::Inet, Table::Ip, Table::Ip6, Table::Netdev] {
            let sets: Vec<&Set> = self.sets.iter().filter(|set| set.table == table).collect();
            let chains: Vec<&Chain> = self.chains.iter().filter(|chain| chain.table == table).collect();
            if sets.is_empty() && chains.is_empty() {
                continue;
            }
            let _ = writeln!(text, "table {} {{", table.name());
            sets.iter().for_each(|set| text += &set.declaration());
            // All chains before any rule, which may lead to a later one.
            chains.iter().for_each(|chain| text += &chain.declaration());
            text += "}\n";
            chains.iter().for_each(|chain| text += &chain.additions());
        }
        text
    }

    /// Commands that make this rule set of that one, which it came of. `handle` tells a rule's.
    pub fn edits(&self, old: &Ruleset, handle: impl Fn(&str, u32) -> Option<u64>) -> String {
        let mut text = String::new();
        for set in &self.sets {
            let Some(before) = old.sets.iter().find(|other| other.name == set.name) else {
                text += &set.added();
                continue;
            };
            for (verb, one, other) in [("delete", before, set), ("add", set, before)] {
                for element in one.elements.iter().filter(|element| !other.elements.contains(element)) {
                    let _ = writeln!(text, "{verb} element {} {} {{ {element} }}", set.table.name(), set.name);
                }
            }
        }
        let fresh: Vec<&Chain> = self.chains.iter().filter(|chain| old.chain(&chain.name).is_none()).collect();
        fresh.iter().for_each(|chain| text += &chain.added());
        fresh.iter().for_each(|chain| text += &chain.additions());
        for chain in &self.chains {
            if let Some(before) = old.chain(&chain.name).filter(|before| *before != chain) {
                text += &chain.edits(before, &handle);
            }
        }
        text
    }

    fn chain(&self, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.name == name)
    }
}

impl Chain {
    fn header(&self) -> String {
        let policy = if self.drop { "drop" } else { "accept" };
        self.base.as_ref().map_or_else(String::new, |base| format!("{base}; policy {policy};"))
    }

    fn declaration(&self) -> String {
        format!("chain {} {{\n{}\n}}\n", self.name, self.header())
    }

    fn added(&self) -> String {
        format!("add table {}\nadd chain {0} {} {{ {} }}\n", self.table.name(), self.name, self.header())
    }

    fn place(&self) -> String {
        format!("{} {}", self.table.name(), self.name)
    }

    /// The harness's markers pass every chain.
    fn additions(&self) -> String {
        let mut text = String::new();
        if self.base.is_some() {
            let _ = writeln!(text, "add rule {} meta l4proto esp accept", self.place());
        }
        for Rule { id, text: rule } in &self.rules {
            let _ = writeln!(text, "add rule {} {rule} comment \"r{id}\"", self.place());
        }
        text
    }

    /// Commands that make this chain of that one: one rule more or less as such, anything else anew.
    fn edits(&self, before: &Chain, handle: &impl Fn(&str, u32) -> Option<u64>) -> String {
        let (place, mut text) = (self.place(), String::new());
        if self.drop != before.drop {
            let _ = writeln!(text, "add chain {place} {{ policy {}; }}", if self.drop { "drop" } else { "accept" });
        }
        let gone = before.rules.iter().find(|rule| !self.rules.contains(rule));
        let deleted = gone.filter(|gone| before.rules.iter().filter(|rule| rule != gone).eq(&self.rules));
        let added = self.rules.split_last().filter(|(_, others)| **others == before.rules);
        let inserted = self.rules.split_first().filter(|(_, others)| **others == before.rules);
        if self.rules == before.rules {
        } else if let Some(handle) = deleted.and_then(|rule| handle(self.table.name(), rule.id)) {
            let _ = writeln!(text, "delete rule {place} handle {handle}");
        } else if let Some((Rule { id, text: rule }, _)) = added {
            let _ = writeln!(text, "add rule {place} {rule} comment \"r{id}\"");
        } else if let Some((Rule { id, text: rule }, _)) = inserted.filter(|_| self.base.is_none()) {
            let _ = writeln!(text, "insert rule {place} {rule} comment \"r{id}\"");
        } else {
            text += &format!("flush chain {place}\n{}", self.additions());
        }
        text
    }
}

impl Set {
    fn declaration(&self) -> String {
        let elements = match self.elements.is_empty() {
            true => String::new(),
            false => format!("elements = {{ {} }}\n", self.elements.join(", ")),
        };
        format!("set {} {{\ntype {}\n{elements}}}\n", self.name, self.kind)
    }

    fn added(&self) -> String {
        format!("add table {}\ntable {0} {{\n{}}}\n", self.table.name(), self.declaration())
    }

    /// Puts an element in, or takes it out.
    fn toggle(&mut self, random: &mut Random) {
        let element = match self.kind {
            "inet_service" => random.pick(&PORTS_ASKED).to_string(),
            "ifname" => random.pick(&PORT_NAMES).to_owned(),
            kind => some_host(kind.starts_with("ipv6"), random),
        };
        match self.elements.iter().position(|other| *other == element) {
            Some(at) => drop(self.elements.swap_remove(at)),
            None => self.elements.push(element),
        }
    }
}

/// A port, or whatever else only some hooks know of a packet's place.
fn place(hook: Hook, random: &mut Random) -> String {
    let (not, port) = (random.pick(&["", "", "", "!= "]), random.pick(&PORT_NAMES));
    match (hook, random.below(4)) {
        (Hook::Prerouting, 0) => format!("fib saddr type {not}unicast"),
        (Hook::Prerouting, 1) => "fib saddr . iif oif exists".into(),
        (Hook::Prerouting, 2) => format!("iifgroup {not}0"),
        (Hook::Prerouting, _) => format!("ether saddr {not}02:00:00:00:00:2{}", random.below(PORTS)),
        (Hook::Forward, 0) => {
            format!("iifname . oifname {{ {port} . {}, eth0 . eth1 }}", random.pick(&["eth2", "eth1"]))
        }
        (Hook::Forward, 1) | (Hook::Postrouting | Hook::Output, _) => format!("oifname {not}{port}"),
        _ => format!("iifname {not}{port}"),
    }
}

/// What connection tracking says; and what answers each packet differently.
fn tracked(about: About, random: &mut Random) -> String {
    let About { six, ip, transport, .. } = about;
    let not = random.pick(&["", "", "", "!= "]);
    let (direction, address) = (random.pick(&["original", "reply"]), random.pick(&["saddr", "daddr"]));
    match random.below(10) {
        0 => format!("ct state {not}{}", random.pick(&["new", "established", "invalid", "related", "untracked"])),
        1 => format!("ct state {}", random.pick(&["established,related", "new,untracked", "established,new"])),
        2 => format!("ct direction {direction}"),
        3 => format!("ct status {}", random.pick(&["dnat", "snat", "seen-reply"])),
        4 => format!("ct mark and {MARK} {not}{MARK}"),
        5 => format!("ct {direction} {ip} {address} {not}{}", some_address(six, random)),
        6 => {
            let far = [
                "limit rate 1000000/second burst 1000000 packets",
                "limit rate over 1000000/second burst 1000000 packets",
                "quota over 1000 mbytes",
                "ct count over 100000",
            ];
            format!("{}{}", random.pick(&["ct state new ", "ct state new ", ""]), random.pick(&far))
        }
        7 => differently(transport, random),
        8 => format!("ct label {}", random.below(2)),
        _ => format!("ct mark {not}{}", random.below(3)),
    }
}

/// What holds for some packets of a connection and not for others, by what came before or by its length.
fn differently(transport: &str, random: &mut Random) -> String {
    let near = [
        "quota over 6 kbytes",
        "limit rate over 1/day burst 40 packets",
        "limit rate 1/day burst 40 packets",
        "numgen inc mod 16 0",
        "meta length > 100",
    ];
    // What the router itself says to its neighbours depends on the time.
    format!("meta l4proto {transport} {}", random.pick(&near))
}

fn reject(about: About, random: &mut Random) -> String {
    let own = match about.table {
        Table::Inet => "reject with icmpx admin-prohibited",
        Table::Ip6 => "reject with icmpv6 no-route",
        _ => "reject with icmp host-prohibited",
    };
    let reset = if about.transport == "tcp" { "meta l4proto tcp reject with tcp reset" } else { own };
    random.pick(&["reject", reset, own]).into()
}

fn nat_rule(about: About, hook: Hook, random: &mut Random) -> String {
    let About { table, six, ip, transport } = about;
    // The family of what is translated to is named in inet alone.
    let family = if table == Table::Inet { format!("{ip} ") } else { String::new() };
    let [asked, other] = [(); 2].map(|()| random.pick(&PORTS_ASKED));
    let [one, two] = [(); 2].map(|()| some_host(six, random));
    let own = own_address(six, random);
    let (address, to_us) = (some_address(six, random), format!("{ip} daddr {own} {transport} dport {asked}"));
    match (hook, random.below(6)) {
        (Hook::Prerouting, 0) => format!("{to_us} redirect"),
        (Hook::Prerouting, 1) => format!("{to_us} dnat {family}to {one}"),
        (Hook::Prerouting, 2) => {
            format!("{to_us} dnat {family}to jhash {ip} saddr mod 2 seed 0x1 map {{ 0 : {one}, 1 : {two} }}")
        }
        (Hook::Prerouting, _) if six => format!("{to_us} dnat {family}to [{one}]:{other}"),
        (Hook::Prerouting, _) => format!("{to_us} dnat {family}to {one}:{other}"),
        (Hook::Postrouting, 0) => format!("{ip} saddr {address} snat {family}to {own}"),
        (Hook::Postrouting, 1) => format!("{ip} daddr {address} meta l4proto {{ tcp, udp }} masquerade"),
        (Hook::Postrouting, _) => format!("oifname {} {ip} saddr {address} masquerade", random.pick(&PORT_NAMES)),
        _ => format!("{transport} dport {asked} accept"),
    }
}

/// An address of the router's own.
pub fn own_address(six: bool, random: &mut Random) -> String {
    let port = random.below(PORTS);
    if six { format!("2001:db8:{port:x}::1") } else { Ipv4Addr::from(ROUTER_V4[port]).to_string() }
}

fn some_host(six: bool, random: &mut Random) -> String {
    address(six, random.below(PORTS), random.below(3)).to_string()
}

/// A host, a network, or the router.
fn some_address(six: bool, random: &mut Random) -> String {
    match random.below(4) {
        0 => network(six, random.below(PORTS)),
        1 => own_address(six, random),
        _ => some_host(six, random),
    }
}
