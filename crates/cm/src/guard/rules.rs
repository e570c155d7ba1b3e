//! Policy routing rules. Without others, Linux looks up table local, then main, then (IPv4) default. Others are told as far as
//! the fast path can repeat them: by the interface that a packet comes in by, its source and destination. A rule that asks
//! for anything else keeps what it still says of those, and leaves their packets to Linux.
//!
//! What a rule that asks for marks says of packets without one is known in advance, and packets on the fast path have
//! none: rules of netfilter and filters of tc, which could give them one, leave them to Linux. Where a packet may arrive
//! with a mark, because it comes from this namespace by a veth pair (skb_scrub_packet, net/core/skbuff.c), it is Linux's.
//!
//! Sources: include/uapi/linux/fib_rules.h, net/core/fib_rules.c, net/ipv4/fib_rules.c, net/ipv6/fib6_rules.c (Linux 6.1).

use super::nl::{Message, Netlink, Wakeup, attrs, find, ne32};
use super::{candidates, count, family_name};
use crate::decode::family_number;
use crate::error::CmError;
use crate::watch::{Finding, PortIndex, Watcher};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use towpath_fpc::table::{DEFAULT, LOCAL, MAIN};
use towpath_fpc::{PolicySource, Port, Prefix, Rule, RuleAction, Scope};
use towpath_tables::Reason;
use towpath_tables::record::Family;

const NEWRULE: u16 = 32;
const GETRULE: u16 = 34;
/// RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_RULE
const GROUPS: [u32; 2] = [8, 19];

/// Rules of a family that are told one by one; more are left to Linux.
const MOST: usize = 256;
/// FR_ACT_*
const TO_TABLE: u8 = 1;
const NOP: u8 = 3;
/// FIB_RULE_*: flags of rules that do not change what they match; the second two say that an interface is not there
const SOUND_FLAGS: u32 = PERMANENT | IIF_DETACHED | OIF_DETACHED;
const PERMANENT: u32 = 1;
const IIF_DETACHED: u32 = 8;
const OIF_DETACHED: u32 = 16;
/// The selectors are turned round
const INVERT: u32 = 2;
/// FRA_*
const DST: u16 = 1;
const SRC: u16 = 2;
const IIFNAME: u16 = 3;
const PRIORITY: u16 = 6;
const FWMARK: u16 = 10;
const SUPPRESS_IFGROUP: u16 = 13;
const SUPPRESS_PREFIXLEN: u16 = 14;
const TABLE: u16 = 15;
const FWMASK: u16 = 16;
const OIFNAME: u16 = 17;
const PAD: u16 = 18;
const L3MDEV: u16 = 19;
const PROTOCOL: u16 = 21;
/// What is understood, or makes no difference
const KNOWN: [u16; 13] = [
    DST,
    SRC,
    IIFNAME,
    PRIORITY,
    FWMARK,
    SUPPRESS_IFGROUP,
    SUPPRESS_PREFIXLEN,
    TABLE,
    FWMASK,
    OIFNAME,
    PAD,
    L3MDEV,
    PROTOCOL,
];

/// The watcher of `ip rule`.
pub struct Rules {
    wakeup: Wakeup,
    netlink: Netlink,
    read: bool,
    findings: Vec<Finding>,
    /// Families with rules that ask for marks
    marks: Vec<Family>,
}

impl Rules {
    /// Watches the thread's network namespace.
    pub fn new() -> Result<Self, CmError> {
        let open = |e| CmError::io("rules: netlink socket", e);
        Ok(Self {
            wakeup: Wakeup::join(NETLINK_ROUTE, &GROUPS).map_err(open)?,
            netlink: Netlink::open(NETLINK_ROUTE).map_err(open)?,
            read: false,
            findings: Vec::new(),
            marks: Vec::new(),
        })
    }

    fn refresh(&mut self) -> Result<(), CmError> {
        if !self.wakeup.drain("rule notifications")? && self.read {
            return Ok(());
        }
        self.read = false;
        self.findings.clear();
        self.marks.clear();
        for family in Family::ALL {
            let rules = dump(&mut self.netlink, family)?;
            self.marks.extend(rules.iter().any(|rule| rule.by_mark).then_some(family));
            self.findings.extend(judge(family, rules));
        }
        self.read = true;
        Ok(())
    }
}

impl Watcher for Rules {
    fn name(&self) -> &'static str {
        "rules"
    }

    fn source(&self) -> PolicySource {
        PolicySource::Rules
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.wakeup.fd()]
    }

    fn interval(&self) -> Option<Duration> {
        None
    }

    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        self.refresh().inspect_err(|_| self.read = false)?;
        let marked = |family: Family| move |port| marked(port, family);
        let near = || candidates(ports).filter(|port| ports.is_near(port.ifindex));
        let marked = self.marks.iter().flat_map(|family| near().map(marked(*family)));
        Ok(self.findings.iter().cloned().chain(marked).collect())
    }

    fn has_lost(&mut self) -> bool {
        self.wakeup.take_lost()
    }
}

/// A port where packets may arrive with a mark that rules ask for.
fn marked(port: &Port, family: Family) -> Finding {
    let (name, family_name) = (&port.name, family_name(family));
    let detail = format!(
        "{family_name} rules ask for marks (ip rule), and {name}'s other end is in this namespace: packets keep theirs"
    );
    Finding::new(Scope::Ingress(port.ifindex, Some(family)), Reason::PolicyRule, detail)
}

/// The rules of a family, in the order in which the kernel tries them.
pub(crate) fn dump(netlink: &mut Netlink, family: Family) -> Result<Vec<Rule>, CmError> {
    let mut header = [0; 12];
    header[0] = family_number(family);
    match netlink.dump(&format!("{} rules", family_name(family)), GETRULE, &header, |message| decode(family, message)) {
        // A kernel without policy routing has no rules beside the usual look-up.
        Err(CmError::Kernel { source, .. })
            if matches!(source.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) =>
        {
            Ok(vec![all(LOCAL), all(MAIN)])
        }
        result => result,
    }
}

/// The rule that looks up everything in a table.
fn all(table: u32) -> Rule {
    Rule { priority: 0, iif: None, from: None, to: None, by_mark: false, action: RuleAction::Lookup(table) }
}

/// fib_rule_hdr: family, dst_len, src_len, tos, table, two reserved bytes, action, flags; then attributes. None also for
/// rules that do nothing. Whether a rule matches: fib_rule_match.
fn decode(family: Family, message: Message<'_>) -> Result<Option<Rule>, CmError> {
    if message.kind != NEWRULE {
        return Ok(None);
    }
    let (header, attributes) =
        message.payload.split_first_chunk::<12>().ok_or_else(|| CmError::decode("rules", "shorter than its header"))?;
    let [_, dst_len, src_len, tos, table, _, _, action, flags @ ..] = *header;
    let flags = u32::from_ne_bytes(flags);
    let attributes = attrs("rules", attributes)?;
    let number = |kind| find(&attributes, kind).and_then(ne32);
    let prefix = |kind, len: u8| match len {
        0 => Ok(None),
        _ => prefix(family, find(&attributes, kind).unwrap_or_default(), len).map(Some),
    };
    let is_vrf = find(&attributes, L3MDEV).and_then(|v| v.first()).is_some_and(|v| *v == 1);
    let beyond = number(SUPPRESS_PREFIXLEN).filter(|len| *len != u32::MAX);
    let (mark, mask) = (number(FWMARK).unwrap_or(0), number(FWMASK).unwrap_or(0));
    let (by_mark, for_marked) = (mask != 0, mark & mask != 0 && flags & !(SOUND_FLAGS | INVERT) == 0);
    // With its selectors turned round, a rule that asks for a mark is for all packets without it, whatever else it asks.
    let inverted = flags & INVERT != 0;
    let for_all = inverted && for_marked;
    let sound = tos == 0
        && flags & !(SOUND_FLAGS | if for_all { INVERT } else { 0 }) == 0
        && !(for_all && is_vrf)
        && number(SUPPRESS_IFGROUP).is_none_or(|group| group == u32::MAX)
        && attributes.iter().all(|(kind, _)| KNOWN.contains(kind));
    let table = number(TABLE).unwrap_or(table.into());
    let priority = number(PRIORITY).unwrap_or(0);
    let any = Rule { priority, by_mark, ..all(table) };
    if inverted && !for_all {
        // It may be about anything.
        return Ok(Some(Rule { action: RuleAction::Unknown, ..any }));
    }
    if action == NOP {
        return Ok(None);
    }
    // Where a packet will leave is not known when it is forwarded: ip_route_input_slow, ip6_route_input. What goes into a
    // tunnel that is bound to an interface may be meant.
    let by_out = find(&attributes, OIFNAME).is_some();
    if (for_marked || by_out) && !for_all {
        return Ok(Some(Rule { action: RuleAction::Skip, ..any }));
    }
    let action = match (sound && action == TO_TABLE, is_vrf, beyond.map(u8::try_from)) {
        (true, true, None) => RuleAction::Vrf,
        (true, false, None) => RuleAction::Lookup(table),
        (true, false, Some(Ok(len))) => RuleAction::LookupBeyond(table, len),
        _ => RuleAction::Unknown,
    };
    if for_all {
        return Ok(Some(Rule { action, ..any }));
    }
    let (to, from) = (prefix(DST, dst_len)?, prefix(SRC, src_len)?);
    Ok(Some(Rule { iif: find(&attributes, IIFNAME).map(text), from, to, action, ..any }))
}

fn prefix(family: Family, bytes: &[u8], len: u8) -> Result<Prefix, CmError> {
    let address = match family {
        Family::V4 => <[u8; 4]>::try_from(bytes).map(IpAddr::from),
        Family::V6 => <[u8; 16]>::try_from(bytes).map(IpAddr::from),
    };
    address.ok().and_then(|address| Prefix::new(address, len)).ok_or_else(|| CmError::decode("rules", "bad prefix"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// What the rules do beyond the usual; they come in the order in which the kernel tries them.
fn judge(family: Family, rules: Vec<Rule>) -> Option<Finding> {
    if is_usual(&rules) {
        return None;
    }
    let others = rules.iter().filter(|rule| !is_plain(rule)).map(|rule| rule.priority).collect::<Vec<_>>();
    let name = family_name(family);
    let vrf = rules.iter().any(|rule| rule.action == RuleAction::Vrf);
    let detail = match others[..] {
        [] if vrf => format!("{name} rules look up tables of VRFs (ip rule)"),
        [] => format!("{name} rules look up other tables than local, main, default, in this order (ip rule)"),
        [priority] => format!("{name} rule with priority {priority} (ip rule)"),
        [first, ..] => {
            format!("{}, the first with priority {first} (ip rule)", count(others.len(), &format!("{name} rule")))
        }
    };
    let marks = if rules.iter().any(|rule| rule.by_mark) { ": by marks, so connections stay in Linux" } else { "" };
    let finding = Finding::family(family, Reason::PolicyRule, detail + marks);
    Some(Finding { rules: (rules.len() <= MOST).then_some(rules), ..finding })
}

/// Whether a rule is one of those that there are without any being added, wherever it stands.
fn is_plain(rule: &Rule) -> bool {
    let selects = rule.selects() || rule.by_mark;
    !selects && matches!(rule.action, RuleAction::Lookup(LOCAL | MAIN | DEFAULT) | RuleAction::Vrf)
}

fn is_usual(rules: &[Rule]) -> bool {
    let tables = [LOCAL, MAIN, DEFAULT].map(RuleAction::Lookup);
    let are = |tables: &[RuleAction]| rules.iter().map(|rule| &rule.action).eq(tables);
    rules.iter().all(is_plain) && (are(&tables[..2]) || are(&tables))
}

#[cfg(test)]
mod tests {
    use super::super::nl::attr;
    use super::*;

    /// `ip rule` of a fresh namespace and after `ip rule add from 192.0.2.0/24 lookup 100`, as recorded on Linux 6.18.
    const RECORDED: &[(&[u8], (u32, Option<&str>, u32))] = &include!("recorded/rules.in");

    #[test]
    fn recorded_rules_are_understood() {
        for (payload, (priority, from, table)) in RECORDED {
            let from = from.map(|from| Prefix::new(from.parse().unwrap(), 24).unwrap());
            let family = if payload[0] == 2 { Family::V4 } else { Family::V6 };
            let rule = decode(family, Message { kind: NEWRULE, payload }).unwrap();
            assert_eq!(rule, Some(Rule { priority: *priority, from, ..all(*table) }));
            for length in 0..12 {
                assert!(decode(family, Message { kind: NEWRULE, payload: &payload[..length] }).is_err());
            }
        }
    }

    /// What the kernel tells of a rule of IPv4 with priority 5 that leads to table 100, with these flags and attributes.
    fn told(flags: u32, attributes: &[(u16, u32)]) -> Option<Rule> {
        let mut payload = vec![libc::AF_INET as u8, 0, 0, 0, 100, 0, 0, TO_TABLE];
        payload.extend(flags.to_ne_bytes());
        let all = attributes.iter().chain(&[(PRIORITY, 5)]);
        payload.extend(all.flat_map(|(kind, value)| attr(*kind, &value.to_ne_bytes())));
        decode(Family::V4, Message { kind: NEWRULE, payload: &payload }).unwrap()
    }

    #[test]
    fn what_asks_for_marks_is_decided_for_packets_without_one() {
        let rule = |action| Some(Rule { priority: 5, by_mark: true, action, ..all(0) });
        let (skip, lookup, unknown) =
            (rule(RuleAction::Skip), rule(RuleAction::Lookup(100)), rule(RuleAction::Unknown));
        let marked = [(FWMARK, 7), (FWMASK, 0xff)];
        assert_eq!(told(0, &marked), skip);
        // What is asked besides makes no difference.
        assert_eq!(told(0, &[marked[0], marked[1], (23, 5)]), skip);
        // Without a mark in these bits.
        assert_eq!(told(0, &[(FWMASK, 0xff)]), lookup);
        assert_eq!(told(0, &[(FWMARK, 0x100), (FWMASK, 0xff)]), lookup);
        // Turned round, it is for all that have not this mark, whatever else it asks.
        assert_eq!(told(INVERT, &marked), lookup);
        assert_eq!(told(INVERT, &[marked[0], marked[1], (OIFNAME, 7)]), lookup);
        assert_eq!(told(INVERT, &[marked[0], marked[1], (23, 5)]), unknown);
        assert_eq!(told(INVERT, &[(FWMASK, 0xff)]), unknown);
        // Who knows what a new flag means?
        assert_eq!(told(1 << 20, &marked), unknown);
        let only = Rule { by_mark: false, ..lookup.unwrap() };
        assert_eq!(told(0, &[]), Some(only));
        // Nothing that is forwarded is meant, but it is told.
        assert_eq!(told(0, &[(OIFNAME, 7)]), Some(Rule { by_mark: false, ..skip.unwrap() }));
    }

    #[test]
    fn only_the_usual_order_needs_no_word() {
        let vrf = Rule { action: RuleAction::Vrf, ..all(0) };
        for usual in [vec![all(LOCAL), all(MAIN)], vec![all(LOCAL), all(MAIN), all(DEFAULT)]] {
            assert_eq!(judge(Family::V4, usual.clone()), None, "{usual:?}");
        }
        let other = Rule { priority: 5, action: RuleAction::Unknown, ..all(0) };
        let unusual = [
            vec![],
            vec![all(MAIN), all(LOCAL)],
            vec![all(LOCAL), vrf, all(MAIN), all(DEFAULT)],
            vec![all(LOCAL), all(100), all(MAIN)],
            vec![all(LOCAL), other, all(MAIN), all(DEFAULT)],
            vec![all(LOCAL), Rule { iif: Some("eth0".into()), ..all(MAIN) }, all(MAIN)],
            vec![all(MAIN), all(DEFAULT)],
            vec![all(LOCAL), all(MAIN), all(DEFAULT), all(7)],
            vec![all(LOCAL), Rule { by_mark: true, action: RuleAction::Skip, ..all(0) }, all(MAIN), all(DEFAULT)],
        ];
        for rules in unusual {
            let finding = judge(Family::V4, rules.clone()).unwrap();
            assert_eq!(finding.rules, Some(rules));
        }
        assert_eq!(judge(Family::V4, vec![all(7); MOST + 1]).unwrap().rules, None);
    }
}
