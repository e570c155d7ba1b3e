//! The rule set as far as it matters: base chains and where they hang, how many rules they hold, and what uses
//! connection tracking.

use super::super::netfilter::{FORWARD_PATH, families, hooks, pf, scope, xt_tracks};
use super::super::nl::{self, Message, Netlink, attrs, be32, find, text_of};
use super::super::{Finding, count, has_tunnels};
use super::barrier::{barrier, object_is_barrier};
use super::meet::{self, Element, Set, Verdict, Walk};
use super::packet::{By, Class};
use super::{SUBSYSTEM, header};
use crate::conntrack::FlowMode;
use crate::error::CmError;
use crate::watch::PortIndex;
use std::collections::{BTreeMap, BTreeSet};
use towpath_fpc::{Port, Scope};
use towpath_tables::Reason;
use towpath_tables::record::Family;
use towpath_wire::transport::protocol;

const GETTABLE: u16 = 1;
const GETCHAIN: u16 = 4;
const GETRULE: u16 = 7;
const GETSET: u16 = 10;
const GETSETELEM: u16 = 13;
const GETOBJ: u16 = 19;
const GETFLOWTABLE: u16 = 23;

const DORMANT: u32 = 1;
const NF_ACCEPT: u32 = 1;
const INET_INGRESS: u32 = 5;
const NETDEV_INGRESS: u32 = 0;
const NETDEV_EGRESS: u32 = 1;

/// A table: netfilter family and name.
type TableKey = (u8, String);

/// What the rule set does to forwarded packets.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Ruleset {
    dormant: BTreeSet<TableKey>,
    chains: Vec<Chain>,
    /// Number of rules by table and chain
    rules: BTreeMap<(TableKey, String), usize>,
    /// What tracks connections: the netfilter family and where it was found
    tracking: BTreeSet<(u8, String)>,
    flowtables: Vec<Flowtable>,
    /// What no connection may pass: the netfilter family and where it was found
    barriers: BTreeSet<(u8, String)>,
    /// The same for what connections may pass while routes are what they are
    routed: BTreeSet<(u8, String)>,
    /// The same for what tells ports of a VRF apart
    apart: BTreeSet<(u8, String)>,
}

#[derive(PartialEq, Eq, Debug)]
struct Chain {
    table: TableKey,
    name: String,
    hook: u32,
    priority: i32,
    /// It sees a connection's first packet only
    translates: bool,
    devices: Vec<String>,
    accepts: bool,
}

#[derive(PartialEq, Eq, Debug)]
struct Flowtable {
    table: TableKey,
    name: String,
    devices: Vec<String>,
}

impl Ruleset {
    /// Reads the rule set of the namespace, where these connections are handed over.
    pub fn read(netlink: &mut Netlink, flows: FlowMode) -> Result<Self, CmError> {
        let tables = dump(netlink, "nftables tables", GETTABLE, table)?;
        let chains = dump(netlink, "nftables chains", GETCHAIN, chain)?;
        let flowtables = dump(netlink, "nftables flowtables", GETFLOWTABLE, flowtable)?;
        let sets = dump(netlink, "nftables sets", GETSET, set)?;
        let mut tracking: BTreeSet<_> = sets.iter().filter_map(|set| set.tracking.clone()).collect();
        let mut met = Met::default();
        sets.into_iter().for_each(|NamedSet { table, name, set, .. }| met.put_set(table, name, set));
        let (mut barriers, mut routed, mut apart) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for object in dump(netlink, "nftables objects", GETOBJ, object)? {
            if object_is_barrier(object.kind) {
                barriers.insert((object.pf, object.place.clone()));
            }
            tracking.insert((object.pf, object.place));
        }
        let mut rules = BTreeMap::new();
        let all = |what: &str, family, attributes: &Attributes<'_>| rule(what, family, attributes, flows);
        for mut rule in dump(netlink, "nftables rules", GETRULE, all)? {
            let (found, stops) = (rule.tracking.take(), rule.barrier.take());
            let (pf, table) = &rule.chain.0;
            let place = |expression| (*pf, format!("{}, chain {}: {expression}", table_name(*pf, table), rule.chain.1));
            tracking.extend(found.map(place));
            barriers.extend(stops.map(place));
            *rules.entry(rule.chain.clone()).or_default() += 1;
            if matches!(flows, FlowMode::Established | FlowMode::Mark { .. }) {
                met.put_rule(rule);
            }
        }
        let dormant: BTreeSet<_> = tables.into_iter().collect();
        for chain in chains.iter().filter(|chain| !dormant.contains(&chain.table)) {
            let found = met.chain(chain, &mut |table, set| elements(netlink, table, set))?;
            barriers.extend(found.changing);
            routed.extend(found.routed);
            apart.extend(found.apart);
        }
        Ok(Self { dormant, chains, rules, tracking, flowtables, barriers, routed, apart })
    }

    /// Whether rules may put connections into flowtables.
    pub fn has_flowtables(&self) -> bool {
        !self.flowtables.is_empty()
    }

    /// Whether rules may say of a connection in a VRF that came in by one port what they would not say of another.
    pub fn tells_apart(&self, family: Family) -> bool {
        self.apart.iter().any(|(pf, _)| families(*pf).contains(&family))
    }

    /// What stands in the way of connections in a VRF.
    pub fn tell_apart(&self, vrf: &Port) -> Vec<Finding> {
        let finding = |(pf, place): &(u8, String)| {
            let detail = format!("{place} (no connection of the VRF {} may pass)", vrf.name);
            let scope = move |family: &Family| Scope::Ingress(vrf.ifindex, Some(*family));
            families(*pf).iter().map(move |family| Finding::new(scope(family), Reason::PolicyNetfilter, detail.clone()))
        };
        self.apart.iter().flat_map(finding).collect()
    }

    /// What stands in the way while the answers of a family's routes are not certain.
    pub fn uncertain(&self, family: Family, why: &str) -> Vec<Finding> {
        let routed = self.routed.iter().filter(|(pf, _)| families(*pf).contains(&family));
        let detail = |place: &String| format!("{place} asks for routes{why} (no connection may pass)");
        routed.map(|(_, place)| Finding::family(family, Reason::PolicyNetfilter, detail(place))).collect()
    }

    /// What stands in the way, with the interfaces known at the moment. `flows` is the generation that connections may pass,
    /// chosen by `mode`.
    pub fn findings(&self, ports: &PortIndex, flows: Option<u32>, mode: FlowMode) -> Vec<Finding> {
        let mut findings = Vec::new();
        for chain in self.chains.iter().filter(|chain| !self.dormant.contains(&chain.table)) {
            let rules = self.rules.get(&(chain.table.clone(), chain.name.clone())).copied().unwrap_or(0);
            if rules > 0 || !chain.accepts {
                let policy = if chain.accepts { "" } else { ", policy drop" };
                let detail = format!("{}: {}{policy}", chain.describe(), count(rules, "rule"));
                let passing = flows.filter(|_| chain.sees_connections());
                let finding = |scope| Finding::new(scope, Reason::PolicyNetfilter, detail.clone());
                findings.extend(chain.scopes(ports).into_iter().map(|scope| match scope {
                    Scope::Family(_) => finding(scope).passed_by(passing),
                    _ => finding(scope),
                }));
            }
        }
        for (pf, detail) in &self.tracking {
            let detail = format!("{detail} (connection tracking)");
            let finding = |f: &Family| Finding::family(*f, Reason::PolicyConntrack, detail.clone()).passed_by(flows);
            findings.extend(families(*pf).iter().map(finding));
        }
        for (pf, detail) in self.barriers.iter().filter(|_| flows.is_some()) {
            let detail = format!("{detail} (no connection may pass)");
            findings.extend(families(*pf).iter().map(|f| Finding::family(*f, Reason::PolicyNetfilter, detail.clone())));
        }
        for flowtable in &self.flowtables {
            let detail = format!("{}, flowtable {}", table_name(flowtable.table.0, &flowtable.table.1), flowtable.name);
            findings.extend(
                indices(&flowtable.devices, ports)
                    .map(|i| Finding::new(Scope::Ingress(i, None), Reason::PolicyConntrack, detail.clone()))
                    .map(|finding| finding.passed_by(flows.filter(|_| mode == FlowMode::Flowtable))),
            );
        }
        findings
    }
}

/// The rule set as packets of connections meet it that go fast.
#[derive(Default)]
struct Met {
    tables: BTreeMap<TableKey, meet::Table>,
    /// Some packets are not tracked
    untracked: bool,
}

/// What was found in a chain, by netfilter family and place.
#[derive(Default)]
struct FoundIn {
    /// What may answer each packet of a connection differently: none may pass
    changing: Vec<(u8, String)>,
    /// What asks for routes
    routed: Vec<(u8, String)>,
    /// What tells ports of a VRF apart
    apart: Vec<(u8, String)>,
}

/// NF_IP_PRI_CONNTRACK
const CONNTRACK: i32 = -200;

impl Met {
    fn put_set(&mut self, table: TableKey, name: String, set: Set) {
        self.tables.entry(table).or_default().sets.insert(name, set);
    }

    fn put_rule(&mut self, rule: Rule) {
        let (table, chain) = rule.chain;
        self.untracked |= rule.untracks;
        self.tables.entry(table).or_default().chains.entry(chain).or_default().push(rule.list);
    }

    /// What packets of connections meet in a chain that hangs in a hook.
    fn chain(
        &self,
        chain: &Chain,
        elements: &mut dyn FnMut(&TableKey, &str) -> Result<Vec<Element>, CmError>,
    ) -> Result<FoundIn, CmError> {
        let mut found = FoundIn::default();
        let Some(table) = self.tables.get(&chain.table).filter(|_| chain.sees_connections() && !chain.translates)
        else {
            return Ok(found);
        };
        let tracked = !self.untracked && (chain.hook != 0 || chain.priority > CONNTRACK);
        let in_vrf = if chain.hook == 0 { By::Ports } else { By::Vrf };
        for family in families(chain.table.0) {
            for (protocol, by) in
                [protocol::TCP, protocol::UDP].into_iter().flat_map(|of| [(of, By::Interface), (of, in_vrf)])
            {
                let class = Class { family: *family, protocol, tracked, by };
                let mut elements = |set: &str| elements(&chain.table, set);
                let mut walk = Walk::new(table, class, &mut elements);
                walk.base(&chain.name)?;
                let place = |(name, what): (String, String)| {
                    format!("{}, chain {name}: {what}", table_name(chain.table.0, &chain.table.1))
                };
                if by == in_vrf {
                    let apart = walk.found.map(|at| format!("{} may differ between ports of a VRF", place(at)));
                    found.apart.extend(apart.map(|detail| (class.pf(), detail)));
                    continue;
                }
                let changing = walk.found.map(|at| format!("{} may answer each packet differently", place(at)));
                found.changing.extend(changing.map(|detail| (class.pf(), detail)));
                found.routed.extend(walk.routed.map(|at| (class.pf(), place(at))));
            }
        }
        Ok(found)
    }
}

/// The elements of a set.
fn elements(netlink: &mut Netlink, (family, table): &TableKey, set: &str) -> Result<Vec<Element>, CmError> {
    let mut body = header(*family).to_vec();
    for (kind, name) in [(1, table.as_str()), (2, set)] {
        body.extend(nl::attr(kind, format!("{name}\0").as_bytes()));
    }
    let lists = netlink.dump("nftables elements", SUBSYSTEM << 8 | GETSETELEM, &body, |message| {
        decode_with("nftables elements", &message, elements_of)
    })?;
    Ok(lists.into_iter().flatten().collect())
}

fn elements_of(what: &str, _: u8, attributes: &Attributes<'_>) -> Result<Option<Vec<Element>>, CmError> {
    let list = attrs(what, find(attributes, 3).unwrap_or_default())?;
    list.into_iter().map(|(_, element)| element_of(what, element)).collect::<Result<_, _>>().map(Some)
}

fn element_of(what: &str, element: &[u8]) -> Result<Element, CmError> {
    let element = attrs(what, element)?;
    let data = attrs(what, find(&element, 2).unwrap_or_default())?;
    Ok(Element {
        key: find(&element, 1).map(meet::bytes).transpose()?,
        verdict: find(&data, 2).map(|verdict| Verdict::decode(what, verdict)).transpose()?,
    })
}

impl Chain {
    fn describe(&self) -> String {
        format!("{}, chain {}", table_name(self.table.0, &self.table.1), self.name)
    }

    /// Whether it hangs where connections are tracked and rules see each once for all.
    fn sees_connections(&self) -> bool {
        !families(self.table.0).is_empty() && FORWARD_PATH.iter().any(|(hook, _)| *hook == self.hook)
    }

    /// What the chain sees of forwarded packets; nothing if it is not on their way.
    fn scopes(&self, ports: &PortIndex) -> Vec<Scope> {
        let ingress = || indices(&self.devices, ports).map(|i| Scope::Ingress(i, None)).collect();
        match (self.table.0, self.hook) {
            (pf::INET, INET_INGRESS) | (pf::NETDEV, NETDEV_INGRESS) => ingress(),
            (pf::NETDEV, NETDEV_EGRESS) => indices(&self.devices, ports).map(|i| Scope::Egress(i, None)).collect(),
            (pf, hook) => {
                let own = hooks(has_tunnels(ports)).find(|(h, ..)| *h == hook).map(|(.., local)| local);
                own.map_or_else(Vec::new, |local| families(pf).iter().map(|f| scope(*f, local)).collect())
            }
        }
    }
}

/// Indices of the named devices; a name that ends in `*` stands for all that begin so (Linux 6.16).
fn indices<'a>(names: &'a [String], ports: &'a PortIndex) -> impl Iterator<Item = u32> + 'a {
    let named = |name: &str| {
        names.iter().any(|n| match n.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => n == name,
        })
    };
    ports.iter().filter(move |port| named(&port.name)).map(|port| port.ifindex)
}

fn table_name(family: u8, name: &str) -> String {
    let family = match family {
        pf::INET => "inet",
        pf::IPV4 => "ip",
        pf::NETDEV => "netdev",
        pf::IPV6 => "ip6",
        3 => "arp",
        7 => "bridge",
        _ => "?",
    };
    format!("nft table {family} {name}")
}

/// One object of a dump: the table's family and the attributes.
type Attributes<'a> = [(u16, &'a [u8])];

fn dump<T>(
    netlink: &mut Netlink,
    what: &str,
    kind: u16,
    decode: impl Fn(&str, u8, &Attributes<'_>) -> Result<Option<T>, CmError>,
) -> Result<Vec<T>, CmError> {
    netlink.dump(what, SUBSYSTEM << 8 | kind, &header(0), |message| decode_with(what, &message, &decode))
}

fn decode_with<T>(
    what: &str,
    message: &Message<'_>,
    decode: impl Fn(&str, u8, &Attributes<'_>) -> Result<Option<T>, CmError>,
) -> Result<Option<T>, CmError> {
    let (family, attributes) =
        message.payload.split_first_chunk::<4>().ok_or_else(|| CmError::decode(what, "shorter than its header"))?;
    decode(what, family[0], &attrs(what, attributes)?)
}

fn string(what: &str, attributes: &Attributes<'_>, kind: u16) -> Result<String, CmError> {
    find(attributes, kind).map(text_of).ok_or_else(|| CmError::decode(what, format!("attribute {kind} is missing")))
}

/// A dormant table; others do not matter.
fn table(what: &str, family: u8, attributes: &Attributes<'_>) -> Result<Option<TableKey>, CmError> {
    let dormant = find(attributes, 2).and_then(be32).is_some_and(|flags| flags & DORMANT != 0);
    Ok(if dormant { Some((family, string(what, attributes, 1)?)) } else { None })
}

/// A base chain; others hang nowhere.
fn chain(what: &str, family: u8, attributes: &Attributes<'_>) -> Result<Option<Chain>, CmError> {
    let Some(hook) = find(attributes, 4) else { return Ok(None) };
    let hook = attrs(what, hook)?;
    Ok(Some(Chain {
        table: (family, string(what, attributes, 1)?),
        name: string(what, attributes, 3)?,
        hook: find(&hook, 1).and_then(be32).ok_or_else(|| CmError::decode(what, "base chain without hook number"))?,
        priority: find(&hook, 2).and_then(be32).unwrap_or(0) as i32,
        translates: find(attributes, 7).map(text_of).is_some_and(|kind| kind == "nat"),
        devices: devices(what, &hook, 3, 4)?,
        accepts: find(attributes, 5).and_then(be32).is_none_or(|policy| policy == NF_ACCEPT),
    }))
}

/// Device names of a hook: one in attribute `single`, several nested in `list` (a prefix comes as attribute 2 there).
fn devices(what: &str, hook: &Attributes<'_>, single: u16, list: u16) -> Result<Vec<String>, CmError> {
    let mut names: BTreeSet<_> = find(hook, single).filter(|_| single != list).map(text_of).into_iter().collect();
    for (kind, name) in attrs(what, find(hook, list).unwrap_or_default())? {
        names.insert(if kind == 1 { text_of(name) } else { format!("{}*", text_of(name)) });
    }
    Ok(names.into_iter().collect())
}

fn flowtable(what: &str, family: u8, attributes: &Attributes<'_>) -> Result<Option<Flowtable>, CmError> {
    let hook = attrs(what, find(attributes, 3).unwrap_or_default())?;
    Ok(Some(Flowtable {
        table: (family, string(what, attributes, 1)?),
        name: string(what, attributes, 2)?,
        devices: devices(what, &hook, 3, 3)?,
    }))
}

/// A set, and where its elements carry expressions that track connections.
struct NamedSet {
    table: TableKey,
    name: String,
    set: Set,
    tracking: Option<(u8, String)>,
}

fn set(what: &str, family: u8, attributes: &Attributes<'_>) -> Result<Option<NamedSet>, CmError> {
    let number = |kind| find(attributes, kind).and_then(be32);
    let (table, name) = (string(what, attributes, 1)?, string(what, attributes, 2)?);
    let tracking = nested_tracking(what, attributes, 17, 18)?;
    let place = |expression| (family, format!("{}, set {name}: {expression}", table_name(family, &table)));
    let set = Set {
        flags: number(3).unwrap_or(0),
        key: number(5).unwrap_or(0) as usize,
        data: number(7).unwrap_or(0) as usize,
        objects: number(15),
        answers: answering(what, attributes)?,
    };
    Ok(Some(NamedSet { tracking: tracking.map(place), table: (family, table), name, set }))
}

/// Whether a set's elements have expressions that do more than count.
fn answering(what: &str, attributes: &Attributes<'_>) -> Result<bool, CmError> {
    let single = find(attributes, 17).into_iter();
    let list = attrs(what, find(attributes, 18).unwrap_or_default())?;
    for expression in single.chain(list.into_iter().map(|(_, expression)| expression)) {
        if !["counter", "last"].contains(&string(what, &attrs(what, expression)?, 1)?.as_str()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A named object that tracks connections by being there.
struct Object {
    pf: u8,
    kind: Option<u32>,
    place: String,
}

fn object(what: &str, family: u8, attributes: &Attributes<'_>) -> Result<Option<Object>, CmError> {
    // Counter, quota, limit, tunnel and secmark do not; ct helper, ct timeout, ct expectation, connlimit, synproxy and
    // whatever comes later do.
    let kind = find(attributes, 3).and_then(be32);
    if matches!(kind, Some(1 | 2 | 4 | 6 | 8)) {
        return Ok(None);
    }
    let table = table_name(family, &string(what, attributes, 1)?);
    let place = format!("{table}, object {}", string(what, attributes, 2)?);
    Ok(Some(Object { pf: family, kind, place }))
}

struct Rule {
    chain: (TableKey, String),
    tracking: Option<String>,
    /// Why no connection may pass
    barrier: Option<String>,
    /// Connection tracking leaves its packets alone
    untracks: bool,
    /// Its expressions
    list: Vec<u8>,
}

fn rule(what: &str, family: u8, attributes: &Attributes<'_>, flows: FlowMode) -> Result<Option<Rule>, CmError> {
    let chain = ((family, string(what, attributes, 1)?), string(what, attributes, 2)?);
    let list = find(attributes, 4).unwrap_or_default();
    let mut untracks = false;
    for (_, expression) in attrs(what, list)? {
        untracks |= string(what, &attrs(what, expression)?, 1)? == "notrack";
    }
    let (tracking, barrier) = (list_tracking(what, list)?, barrier(what, list, flows)?);
    Ok(Some(Rule { chain, tracking, barrier, untracks, list: list.to_vec() }))
}

/// The first expression of a list that tracks connections.
fn list_tracking(what: &str, list: &[u8]) -> Result<Option<String>, CmError> {
    for (_, expression) in attrs(what, list)? {
        if let Some(name) = tracking(what, expression)? {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// As `list_tracking`, for a single expression in attribute `single` or a list of them in `list`.
fn nested_tracking(what: &str, from: &Attributes<'_>, single: u16, list: u16) -> Result<Option<String>, CmError> {
    if let Some(expression) = find(from, single)
        && let Some(name) = tracking(what, expression)?
    {
        return Ok(Some(name));
    }
    list_tracking(what, find(from, list).unwrap_or_default())
}

/// The expression's name if adding a rule with it makes the kernel track (or reassemble) what it forwards. By the
/// `init` functions of net/netfilter/nft_*.c, Linux 6.1; unknown ones are taken to.
fn tracking(what: &str, expression: &[u8]) -> Result<Option<String>, CmError> {
    let expression = attrs(what, expression)?;
    let name = string(what, &expression, 1)?;
    let data = attrs(what, find(&expression, 2).unwrap_or_default())?;
    Ok(match name.as_str() {
        "bitwise" | "byteorder" | "cmp" | "counter" | "dup" | "exthdr" | "fib" | "fwd" | "hash" | "immediate"
        | "inner" | "last" | "limit" | "log" | "lookup" | "meta" | "notrack" | "numgen" | "objref" | "osf"
        | "payload" | "queue" | "quota" | "range" | "reject" | "rt" | "tunnel" | "xfrm" => None,
        "dynset" => nested_tracking(what, &data, 7, 10)?,
        "match" | "target" => Some(string(what, &data, 1)?).filter(|extension| xt_tracks(extension)),
        _ => Some(name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(text: &str) -> Vec<Vec<u8>> {
        text.lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .map(|line| {
                let digits: Vec<u8> = line.bytes().filter(u8::is_ascii_hexdigit).collect();
                digits
                    .chunks(2)
                    .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
                    .collect()
            })
            .collect()
    }

    fn established(what: &str, family: u8, attributes: &Attributes<'_>) -> Result<Option<Rule>, CmError> {
        rule(what, family, attributes, FlowMode::Established)
    }

    /// The rule set of the recorded dumps in `recorded/`, each line one message's payload.
    fn recorded() -> Ruleset {
        let what = "recording";
        let mut set = Ruleset::default();
        for payload in fixture(include_str!("../recorded/chains.hex")) {
            set.chains.extend(decode_with(what, &Message { kind: 0, payload: &payload }, chain).unwrap());
        }
        for payload in fixture(include_str!("../recorded/rules.hex")) {
            let rule = decode_with(what, &Message { kind: 0, payload: &payload }, established).unwrap().unwrap();
            if let Some(name) = rule.tracking {
                set.tracking.insert((rule.chain.0.0, name));
            }
            *set.rules.entry(rule.chain).or_default() += 1;
        }
        set
    }

    #[test]
    fn recorded_rule_set_is_understood() {
        let set = recorded();
        let hooks: Vec<_> = set.chains.iter().map(|c| (c.describe(), c.hook, c.accepts, c.devices.clone())).collect();
        let expected = [
            ("nft table inet t, chain pass", 2, false, vec![]),
            ("nft table inet t, chain mine", 1, true, vec![]),
            ("nft table netdev d, chain ing", 0, true, vec!["v0".to_owned()]),
        ];
        assert_eq!(hooks, expected.map(|(name, hook, accepts, devices)| (name.to_owned(), hook, accepts, devices)));
        assert_eq!(set.tracking, BTreeSet::from([(pf::INET, "ct".to_owned()), (pf::IPV4, "MASQUERADE".to_owned())]));
        let rules: Vec<_> = set.rules.iter().map(|(((_, t), c), n)| (t.as_str(), c.as_str(), *n)).collect();
        assert_eq!(rules, [("t", "mine", 2), ("nat", "POSTROUTING", 1), ("d", "ing", 1)]);
    }

    #[test]
    fn truncated_recordings_are_errors_or_nothing_but_never_a_panic() {
        for payload in fixture(include_str!("../recorded/rules.hex")) {
            for length in 0..payload.len() {
                let _ = decode_with("test", &Message { kind: 0, payload: &payload[..length] }, established);
            }
        }
    }

    #[test]
    fn unknown_expressions_count_as_tracking() {
        let expression = |name: &str| nl::attr(1, format!("{name}\0").as_bytes());
        assert_eq!(tracking("test", &expression("cmp")).unwrap(), None);
        assert_eq!(tracking("test", &expression("ct")).unwrap().as_deref(), Some("ct"));
        assert_eq!(tracking("test", &expression("from-the-future")).unwrap().as_deref(), Some("from-the-future"));
    }
}
