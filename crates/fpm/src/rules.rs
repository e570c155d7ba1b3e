//! What rules (`ip rule`) come to: for packets that come in by a port, and by their source, which tables are looked up in
//! which order.
//!
//! Linux takes the first rule that matches and whose table has a route (net/core/fib_rules.c, fib_rules_lookup). So the
//! tables of all rules that match stand in one root, routes of an earlier one on a higher level. A rule for some
//! destinations, or one that is not known, hides what is beneath it by an exception; so does a `throw` route.

use crate::routes::{DEFAULT, LOCAL, MAIN};
use std::net::IpAddr;
use towpath_fpc::{Port, Prefix, Rule, RuleAction};
use towpath_tables::record::{Family, SOURCES};
use towpath_tables::rib::LEVELS;

/// One thing that Linux asks for the route.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Step {
    /// A table; of some, only routes to prefixes of more bits than this
    Table(u32, Option<u8>),
    /// All destinations of a prefix are Linux's from here on
    Refuse(Prefix),
}

pub(crate) type Steps = Vec<Step>;

/// The steps for packets that come in by a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Plan {
    /// For sources in these prefixes, the shortest first; the longest that has one counts
    pub sources: Vec<(Prefix, Steps)>,
    /// For all others
    pub other: Steps,
}

impl Plan {
    /// The steps of all sources.
    pub fn steps(&self) -> impl Iterator<Item = &Steps> {
        self.sources.iter().map(|(_, steps)| steps).chain([&self.other])
    }
}

/// Whether the steps are those that there are without rules.
pub(crate) fn is_usual(steps: &Steps) -> bool {
    const USUAL: [Step; 3] = [Step::Table(LOCAL, None), Step::Table(MAIN, None), Step::Table(DEFAULT, None)];
    *steps == USUAL[..2] || *steps == USUAL
}

/// Whose packets rules are asked about.
#[derive(Clone, Copy)]
pub(crate) struct Asking<'a> {
    /// Name of the interface that they come in by: of a VRF, if it belongs to one
    pub iif: &'a str,
    /// Table of the VRF
    pub table: Option<u32>,
}

impl<'a> Asking<'a> {
    /// This host itself.
    pub const OWN: Asking<'static> = Asking { iif: "lo", table: None };

    /// What comes in by a port.
    pub fn of(port: &'a Port) -> Self {
        match &port.vrf {
            Some(vrf) => Self { iif: &vrf.name, table: Some(vrf.table) },
            None => Self { iif: &port.name, table: None },
        }
    }
}

/// Whether what this host sends itself, outside of VRFs, meets the usual tables whatever it is.
pub(crate) fn are_usual_beside_vrfs(rules: &[Rule]) -> bool {
    let steps = |rule: &Rule| match rule {
        Rule { action: RuleAction::Vrf, .. } => Some(None),
        Rule { iif: None, from: None, to: None, by_mark: false, action: RuleAction::Lookup(table), .. } => {
            Some(Some(Step::Table(*table, None)))
        }
        _ => None,
    };
    let steps: Option<Vec<_>> = rules.iter().map(steps).collect();
    steps.is_some_and(|steps| is_usual(&steps.into_iter().flatten().collect()))
}

/// The plan for packets; None if there is no room for so many sources or steps, or it is not known what the rules say.
pub(crate) fn plan(family: Family, rules: Option<&Vec<Rule>>, asking: Asking<'_>) -> Option<Plan> {
    let Some(rules) = rules else {
        let other = [LOCAL, MAIN].map(|table| Step::Table(table, None)).to_vec();
        return Some(Plan { sources: Vec::new(), other });
    };
    let rules = || rules.iter().filter(|rule| rule.action != RuleAction::Skip);
    // Which of them match on the way back to the source depends on the kernel: fib_rule_iif_match, net/core/fib_rules.c.
    let by_iif = |rule: &Rule| rule.iif.as_deref().is_some_and(|iif| iif != "lo");
    if family == Family::V4 && asking.table.is_some() && rules().any(by_iif) {
        return None;
    }
    let rules: Vec<_> = rules().filter(|rule| rule.iif.as_deref().is_none_or(|iif| iif == asking.iif)).collect();
    let mut prefixes: Vec<_> = rules.iter().filter_map(|rule| rule.from).collect();
    prefixes.sort_by_key(|prefix| (prefix.prefix_len(), *prefix));
    prefixes.dedup();
    let steps = |from| steps(family, &rules, asking.table, from);
    let sources: Vec<_> = prefixes.into_iter().map(|from| (from, steps(Some(from)))).collect();
    let plan = Plan { sources, other: steps(None) };
    (plan.sources.len() <= SOURCES && plan.steps().all(|steps| steps.len() <= LEVELS)).then_some(plan)
}

/// The steps for sources that are in this prefix but in no longer one of a rule's.
fn steps(family: Family, rules: &[&Rule], vrf: Option<u32>, source: Option<Prefix>) -> Steps {
    let matches = |rule: &&&Rule| rule.from.is_none_or(|from| source.is_some_and(|source| covers(from, source)));
    let mut steps = Steps::new();
    for rule in rules.iter().filter(matches) {
        steps.push(match (rule.action, rule.to, vrf) {
            (RuleAction::Skip, ..) | (RuleAction::Vrf, _, None) => continue,
            (_, Some(to), _) => Step::Refuse(to),
            (RuleAction::Lookup(table), ..) | (RuleAction::Vrf, _, Some(table)) => Step::Table(table, None),
            (RuleAction::LookupBeyond(table, len), ..) => Step::Table(table, Some(len)),
            (RuleAction::Unknown, ..) => Step::Refuse(all(family)),
        });
        if steps.last() == Some(&Step::Refuse(all(family))) {
            break;
        }
    }
    steps
}

fn all(family: Family) -> Prefix {
    let any = match family {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    };
    Prefix::new(any, 0).expect("no bits fit any address")
}

fn covers(outer: Prefix, inner: Prefix) -> bool {
    outer.prefix_len() <= inner.prefix_len() && Prefix::new(inner.address(), outer.prefix_len()) == Some(outer)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BY_A: Step = Step::Table(100, None);
    const LOCAL_FIRST: Step = Step::Table(LOCAL, None);
    const THEN_MAIN: Step = Step::Table(MAIN, None);

    fn rule(iif: Option<&str>, from: Option<&str>, action: RuleAction) -> Rule {
        let from = from.map(prefix);
        Rule { priority: 0, iif: iif.map(str::to_owned), from, to: None, by_mark: false, action }
    }

    fn by(iif: &str) -> Asking<'_> {
        Asking { iif, table: None }
    }

    fn prefix(text: &str) -> Prefix {
        let (address, len) = text.split_once('/').unwrap();
        Prefix::new(address.parse().unwrap(), len.parse().unwrap()).unwrap()
    }

    #[test]
    fn a_packet_meets_the_rules_that_match_in_their_order() {
        let lookup = |iif, from, table| rule(iif, from, RuleAction::Lookup(table));
        let rules = vec![
            lookup(None, None, LOCAL),
            lookup(Some("a"), None, 100),
            lookup(None, Some("10.0.0.0/8"), 100),
            lookup(None, Some("10.1.0.0/16"), 7),
            lookup(None, None, MAIN),
        ];
        let b = plan(Family::V4, Some(&rules), by("b")).unwrap();
        assert_eq!(b.other, [LOCAL_FIRST, THEN_MAIN]);
        assert!(is_usual(&b.other));
        let by_source = [
            (prefix("10.0.0.0/8"), vec![LOCAL_FIRST, BY_A, THEN_MAIN]),
            (prefix("10.1.0.0/16"), vec![LOCAL_FIRST, BY_A, Step::Table(7, None), THEN_MAIN]),
        ];
        assert_eq!(b.sources, by_source);
        let a = plan(Family::V4, Some(&rules), by("a")).unwrap();
        assert_eq!(a.other, [LOCAL_FIRST, BY_A, THEN_MAIN]);
        assert!(!is_usual(&a.other));
    }

    #[test]
    fn what_is_not_known_ends_the_steps() {
        let mut to = rule(None, None, RuleAction::Lookup(100));
        to.to = Some(prefix("192.0.2.0/24"));
        let unknown = rule(Some("a"), None, RuleAction::Unknown);
        let beyond = rule(None, None, RuleAction::LookupBeyond(MAIN, 0));
        let rules = vec![beyond, to, unknown, rule(None, None, RuleAction::Lookup(MAIN))];
        let first = [Step::Table(MAIN, Some(0)), Step::Refuse(prefix("192.0.2.0/24"))];
        let end = |last| [&first[..], &[last]].concat();
        assert_eq!(plan(Family::V4, Some(&rules), by("a")).unwrap().other, end(Step::Refuse(prefix("0.0.0.0/0"))));
        assert_eq!(plan(Family::V4, Some(&rules), by("b")).unwrap().other, end(THEN_MAIN));
    }

    #[test]
    fn what_comes_in_by_a_vrf_meets_its_table_and_rules_for_the_vrf() {
        let lookup = |iif, table| rule(iif, None, RuleAction::Lookup(table));
        let red = Asking { iif: "red", table: Some(10) };
        let rules = vec![
            lookup(None, LOCAL),
            rule(None, None, RuleAction::Vrf),
            lookup(Some("red"), 100),
            lookup(Some("eth0"), 7),
            lookup(None, MAIN),
        ];
        let of_red = Step::Table(10, None);
        let six = plan(Family::V6, Some(&rules), red).unwrap();
        assert_eq!(six.other, [LOCAL_FIRST, of_red, BY_A, THEN_MAIN]);
        assert_eq!(plan(Family::V4, Some(&rules), red), None, "the way back is not known");
        let plain = [&rules[..2], &rules[4..]].concat();
        let four = plan(Family::V4, Some(&plain), red).unwrap();
        assert_eq!(four.other, [LOCAL_FIRST, of_red, THEN_MAIN]);
        assert!(is_usual(&plan(Family::V4, Some(&plain), by("eth0")).unwrap().other));
        // Without the rule, Linux looks up nothing in the VRF's table.
        assert!(is_usual(&plan(Family::V4, None, red).unwrap().other));
    }

    #[test]
    fn too_many_rules_have_no_plan() {
        let sources: Vec<_> = (0..=SOURCES).map(|n| format!("10.{n}.0.0/16")).collect();
        let of = |from: &String| rule(None, Some(from), RuleAction::Lookup(100));
        assert!(plan(Family::V4, Some(&sources.iter().skip(1).map(of).collect()), by("a")).is_some());
        assert_eq!(plan(Family::V4, Some(&sources.iter().map(of).collect()), by("a")), None);
        let many = vec![rule(None, None, RuleAction::Lookup(100)); LEVELS + 1];
        assert_eq!(plan(Family::V4, Some(&many), by("a")), None);
    }
}
