//! Where packets come from that rules (`ip rule`) are about: each port with a source of each prefix that a rule names, and
//! with one of none.

use super::is_routed;
use crate::control::Arrival;
use crate::report;
use std::collections::BTreeSet;
use std::net::IpAddr;
use towpath_cm::audit::Neighbours;
use towpath_fpc::{Prefix, Rule};
use towpath_tables::record::Family;

/// All of them; none where rules ask neither for ports nor for sources, but for ports in VRFs.
pub fn all(ports: &[report::Port], rules: &[(Family, Vec<Rule>)], neighbours: &Neighbours) -> Vec<Arrival> {
    let mut all = Vec::new();
    for (family, rules) in rules {
        let asks = rules.iter().any(|rule| rule.iif.is_some() || rule.from.is_some());
        // What comes out of a tunnel is Linux's while there are rules.
        let ports = ports.iter().filter(|port| port.mode != "tunnel" && (asks || port.vrf.is_some()));
        for port in ports.filter(|port| port.vrf.is_none() || can_be_asked(*family, rules)) {
            let Some(ifindex) = port.ifindex else { continue };
            let near = neighbours.keys().filter(|key| key.ifindex == ifindex).map(|key| key.address).filter(is_routed);
            let near: BTreeSet<_> = near.filter(|address| address.is_ipv4() == (*family == Family::V4)).collect();
            let sources = sources(*family, &port.name, rules, &near);
            all.extend(sources.into_iter().map(|source| Arrival { ifindex, source }));
        }
    }
    all
}

/// Whether Linux, asked for a VRF's port, answers as it does for packets: those of IPv6 come in by the VRF's device then.
fn can_be_asked(family: Family, rules: &[Rule]) -> bool {
    family == Family::V4 || rules.iter().all(|rule| rule.iif.is_none())
}

/// A source for each prefix that rules for a port name, and one that is in none; the port's neighbours before others,
/// because Linux looks for the way back.
fn sources(family: Family, port: &str, rules: &[Rule], near: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
    let about = rules.iter().filter(|rule| rule.iif.as_deref().is_none_or(|iif| iif == port));
    let prefixes: BTreeSet<Prefix> = about.filter_map(|rule| rule.from).collect();
    let place = |address: &IpAddr| prefixes.iter().filter(|prefix| prefix.contains(*address)).max_by_key(longest);
    let elsewhere = (family == Family::V6).then_some(IpAddr::from([0; 16]));
    let of = |wanted: Option<&Prefix>| {
        let others = wanted.map_or(elsewhere, |prefix| Some(second(*prefix)));
        near.iter().copied().chain(others).find(|address| place(address) == wanted)
    };
    prefixes.iter().map(Some).chain([None]).filter_map(of).collect()
}

fn longest(prefix: &&Prefix) -> u8 {
    prefix.prefix_len()
}

/// The second address of a prefix, since the first may be the network's own; the only one of a host's.
fn second(prefix: Prefix) -> IpAddr {
    match prefix.address() {
        IpAddr::V4(first) => (first.to_bits() | u32::from(prefix.prefix_len() < 32)).to_be_bytes().into(),
        IpAddr::V6(first) => (first.to_bits() | u128::from(prefix.prefix_len() < 128)).to_be_bytes().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_fpc::RuleAction;

    fn rule(iif: Option<&str>, from: Option<(&str, u8)>) -> Rule {
        let from = from.map(|(address, len)| Prefix::new(address.parse().unwrap(), len).unwrap());
        Rule { priority: 1, iif: iif.map(Into::into), from, to: None, by_mark: false, action: RuleAction::Lookup(100) }
    }

    fn of(family: Family, rules: &[Rule], near: &[&str]) -> Vec<String> {
        let near = near.iter().map(|address| address.parse().unwrap()).collect();
        sources(family, "eth0", rules, &near).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_prefix_has_a_source_that_no_longer_one_has() {
        let near = ["192.0.2.2", "10.1.2.3"];
        assert_eq!(of(Family::V4, &[rule(Some("eth0"), None)], &near), ["10.1.2.3"]);
        let wide = rule(None, Some(("10.0.0.0", 8)));
        assert_eq!(of(Family::V4, std::slice::from_ref(&wide), &near), ["10.1.2.3", "192.0.2.2"]);
        let narrow = rule(Some("eth0"), Some(("10.1.0.0", 16)));
        assert_eq!(of(Family::V4, &[wide.clone(), narrow], &near), ["10.0.0.1", "10.1.2.3", "192.0.2.2"]);
        let elsewhere = rule(Some("eth1"), Some(("10.1.0.0", 16)));
        assert_eq!(of(Family::V4, &[wide, elsewhere], &near), ["10.1.2.3", "192.0.2.2"]);
        assert_eq!(of(Family::V4, &[rule(None, Some(("10.1.2.4", 32)))], &[]), ["10.1.2.4"]);
    }

    #[test]
    fn ipv6_needs_no_source_outside_of_the_prefixes() {
        let rules = [rule(None, Some(("2001:db8:1::", 48)))];
        assert_eq!(of(Family::V6, &rules, &[]), ["::", "2001:db8:1::1"]);
    }
}
