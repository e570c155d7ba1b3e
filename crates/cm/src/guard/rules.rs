//! Policy routing rules. The fast path repeats what the kernel starts with: table local, then main, then (IPv4)
//! default. The rule that a VRF brings (l3mdev) concerns enslaved interfaces only, which are no ports.
//!
//! Sources: include/uapi/linux/fib_rules.h, net/core/fib_rules.c (Linux 6.1).

use super::nl::{Message, Netlink, Wakeup, attrs, find, ne32};
use super::{Finding, family_name};
use crate::error::CmError;
use crate::watch::{PortIndex, Watcher};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use towpath_fpc::PolicySource;
use towpath_tables::Reason;
use towpath_tables::record::Family;

const NEWRULE: u16 = 32;
const GETRULE: u16 = 34;
/// RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_RULE
const GROUPS: [u32; 2] = [8, 19];

const MAIN: u32 = 254;
const LOCAL: u32 = 255;
const DEFAULT: u32 = 253;
const TO_TABLE: u8 = 1;
/// FRA_*: attributes that every rule has and that select nothing.
const PRIORITY: u16 = 6;
const SUPPRESS_IFGROUP: u16 = 13;
const SUPPRESS_PREFIXLEN: u16 = 14;
const TABLE: u16 = 15;
const PAD: u16 = 18;
const L3MDEV: u16 = 19;
const PROTOCOL: u16 = 21;

/// The watcher of `ip rule`.
pub struct Rules {
    wakeup: Wakeup,
    netlink: Netlink,
    read: bool,
    findings: Vec<Finding>,
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
        })
    }

    fn refresh(&mut self) -> Result<(), CmError> {
        if !self.wakeup.drain("rule notifications")? && self.read {
            return Ok(());
        }
        self.read = false;
        self.findings.clear();
        for family in Family::ALL {
            let rules = dump(&mut self.netlink, family)?;
            self.findings.extend(judge(family, &rules).map(|d| Finding::family(family, Reason::PolicyRule, d)));
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

    fn findings(&mut self, _: &PortIndex) -> Result<Vec<Finding>, CmError> {
        self.refresh().inspect_err(|_| self.read = false)?;
        Ok(self.findings.clone())
    }
}

/// A rule, as far as it matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rule {
    /// Everything is looked up in the table
    All(u32),
    /// What belongs to a VRF is looked up in its table
    L3mdev,
    /// Anything else, with its priority
    Other(u32),
}

fn dump(netlink: &mut Netlink, family: Family) -> Result<Vec<Rule>, CmError> {
    let mut header = [0; 12];
    header[0] = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    } as u8;
    match netlink.dump(&format!("{} rules", family_name(family)), GETRULE, &header, decode) {
        // A kernel without policy routing has no rules beside the usual look-up.
        Err(CmError::Kernel { source, .. })
            if matches!(source.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) =>
        {
            Ok(vec![Rule::All(LOCAL), Rule::All(MAIN)])
        }
        result => result,
    }
}

/// fib_rule_hdr: family, dst_len, src_len, tos, table, two reserved bytes, action, flags; then attributes.
fn decode(message: Message<'_>) -> Result<Option<Rule>, CmError> {
    if message.kind != NEWRULE {
        return Ok(None);
    }
    let (header, attributes) =
        message.payload.split_first_chunk::<12>().ok_or_else(|| CmError::decode("rules", "shorter than its header"))?;
    let [_, dst_len, src_len, tos, table, _, _, action, flags @ ..] = *header;
    let attributes = attrs("rules", attributes)?;
    let number = |kind| find(&attributes, kind).and_then(ne32);
    let unused = |kind| number(kind).is_none_or(|value| value == u32::MAX);
    let plain = |also: u16| {
        let known = [PRIORITY, SUPPRESS_IFGROUP, SUPPRESS_PREFIXLEN, TABLE, PAD, PROTOCOL, also];
        (dst_len, src_len, tos, action, u32::from_ne_bytes(flags)) == (0, 0, 0, TO_TABLE, 0)
            && unused(SUPPRESS_IFGROUP)
            && unused(SUPPRESS_PREFIXLEN)
            && attributes.iter().all(|(kind, _)| known.contains(kind))
    };
    let l3mdev = find(&attributes, L3MDEV).and_then(|v| v.first()).is_some_and(|v| *v == 1);
    Ok(Some(if l3mdev && plain(L3MDEV) {
        Rule::L3mdev
    } else if plain(TABLE) {
        Rule::All(number(TABLE).unwrap_or(table.into()))
    } else {
        Rule::Other(number(PRIORITY).unwrap_or(0))
    }))
}

/// What the rules do beyond the usual, in words; rules come in the order in which the kernel tries them.
fn judge(family: Family, rules: &[Rule]) -> Option<String> {
    let family = family_name(family);
    if let Some(Rule::Other(priority)) = rules.iter().find(|rule| matches!(rule, Rule::Other(_))) {
        return Some(format!("{family} rule with priority {priority} (ip rule)"));
    }
    let tables: Vec<_> = rules
        .iter()
        .filter_map(|rule| match rule {
            Rule::All(table) => Some(*table),
            _ => None,
        })
        .collect();
    if matches!(tables[..], [LOCAL, MAIN] | [LOCAL, MAIN, DEFAULT]) {
        return None;
    }
    Some(format!("{family} rules look up tables {tables:?} instead of local, main, default (ip rule)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ip rule` of a fresh namespace and after `ip rule add from 192.0.2.0/24 lookup 100`, as recorded on Linux 6.18.
    const RECORDED: &[(&[u8], Rule)] = &include!("recorded/rules.in");

    #[test]
    fn recorded_rules_are_understood() {
        for (payload, expected) in RECORDED {
            assert_eq!(decode(Message { kind: NEWRULE, payload }).unwrap(), Some(*expected));
            for length in 0..12 {
                assert!(decode(Message { kind: NEWRULE, payload: &payload[..length] }).is_err());
            }
        }
    }

    #[test]
    fn only_the_usual_order_is_repeated() {
        use Rule::{All, L3mdev, Other};
        for usual in [&[All(LOCAL), All(MAIN)][..], &[All(LOCAL), L3mdev, All(MAIN), All(DEFAULT)]] {
            assert_eq!(judge(Family::V4, usual), None, "{usual:?}");
        }
        let unusual: [&[Rule]; 6] = [
            &[],
            &[All(MAIN), All(LOCAL)],
            &[All(LOCAL), All(100), All(MAIN)],
            &[All(LOCAL), Other(5), All(MAIN), All(DEFAULT)],
            &[All(MAIN), All(DEFAULT)],
            &[All(LOCAL), All(MAIN), All(DEFAULT), All(7)],
        ];
        for rules in unusual {
            assert!(judge(Family::V4, rules).is_some(), "{rules:?}");
        }
    }
}
