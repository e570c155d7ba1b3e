//! What rules (`ip rule`) come to: for packets that come in by a port, and by their source, which tables are looked up in
//! which order.
//!
//! Linux takes the first rule that matches and whose table has a route (net/core/fib_rules.c, fib_rules_lookup). So the
//! tables of all rules that match stand in one root, routes of an earlier one on a higher level. A rule for some
//! destinations, or one that is not known, hides what is beneath it by an exception; so does a `throw` route.

use crate::routes::{DEFAULT, LOCAL, MAIN};
use std::net::IpAddr;
use towpath_fpc::{Prefix, Rule, RuleAction};
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

/// The plan for packets that come in by an interface of this name; None if there is no room for so many sources or steps.
pub(crate) fn plan(family: Family, rules: Option<&Vec<Rule>>, name: &str) -> Option<Plan> {
    let Some(rules) = rules else {
        let other = [LOCAL, MAIN].map(|table| Step::Table(table, None)).to_vec();
        return Some(Plan { sources: Vec::new(), other });
    };
    let matches = |rule: &&Rule| rule.action != RuleAction::Skip && rule.iif.as_deref().is_none_or(|iif| iif == name);
    let rules: Vec<_> = rules.iter().filter(matches).collect();
    let mut prefixes: Vec<_> = rules.iter().filter_map(|rule| rule.from).collect();
    prefixes.sort_by_key(|prefix| (prefix.prefix_len(), *prefix));
    prefixes.dedup();
    let sources: Vec<_> = prefixes.into_iter().map(|from| (from, steps(family, &rules, Some(from)))).collect();
    let plan = Plan { sources, other: steps(family, &rules, None) };
    (plan.sources.len() <= SOURCES && plan.steps().all(|steps| steps.len() <= LEVELS)).then_some(plan)
}

/// The steps for sources that are in this prefix but in no longer one of a rule's.
fn steps(family: Family, rules: &[&Rule], source: Option<Prefix>) -> Steps {
    let matches = |rule: &&&Rule| rule.from.is_none_or(|from| source.is_some_and(|source| covers(from, source)));
    let mut steps = Steps::new();
    for rule in rules.iter().filter(matches) {
        steps.push(match (rule.action, rule.to) {
            // No port belongs to a VRF.
            (RuleAction::Vrf | RuleAction::Skip, _) => continue,
            (_, Some(to)) => Step::Refuse(to),
            (RuleAction::Lookup(table), None) => Step::Table(table, None),
            (RuleAction::LookupBeyond(table, len), None) => Step::Table(table, Some(len)),
            (RuleAction::Unknown, None) => Step::Refuse(all(family)),
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
        let b = plan(Family::V4, Some(&rules), "b").unwrap();
        assert_eq!(b.other, [LOCAL_FIRST, THEN_MAIN]);
        assert!(is_usual(&b.other));
        let by_source = [
            (prefix("10.0.0.0/8"), vec![LOCAL_FIRST, BY_A, THEN_MAIN]),
            (prefix("10.1.0.0/16"), vec![LOCAL_FIRST, BY_A, Step::Table(7, None), THEN_MAIN]),
        ];
        assert_eq!(b.sources, by_source);
        let a = plan(Family::V4, Some(&rules), "a").unwrap();
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
        assert_eq!(plan(Family::V4, Some(&rules), "a").unwrap().other, end(Step::Refuse(prefix("0.0.0.0/0"))));
        assert_eq!(plan(Family::V4, Some(&rules), "b").unwrap().other, end(THEN_MAIN));
    }

    #[test]
    fn too_many_rules_have_no_plan() {
        let sources: Vec<_> = (0..=SOURCES).map(|n| format!("10.{n}.0.0/16")).collect();
        let of = |from: &String| rule(None, Some(from), RuleAction::Lookup(100));
        assert!(plan(Family::V4, Some(&sources.iter().skip(1).map(of).collect()), "a").is_some());
        assert_eq!(plan(Family::V4, Some(&sources.iter().map(of).collect()), "a"), None);
        let many = vec![rule(None, None, RuleAction::Lookup(100)); LEVELS + 1];
        assert_eq!(plan(Family::V4, Some(&many), "a"), None);
    }
}
