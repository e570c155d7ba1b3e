//! Linux's settings: what of them keeps traffic of the ports in Linux, and what would let connections pass.

use super::checks::{Check, finding};
use crate::report::{self, Finding, State};
use crate::words;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;
use towpath_cm::{FlowMode, PortIndex, survey};
use towpath_fpc::{Policy, PolicySource, Port, PortKind, Rule, Scope};
use towpath_tables::record::Family;

const SETTINGS: &str = "settings";
/// Ways to have connections handed over that need no more than `--flows`.
const MODES: [FlowMode; 2] = [FlowMode::Flowtable, FlowMode::Established];

/// What is looked at.
pub struct Look<'a> {
    /// Every interface
    pub all: &'a PortIndex,
    /// Those that are ports
    pub ports: &'a [&'a Port],
    /// Which connections are handed over
    pub flows: FlowMode,
    /// Workers take frames of some ports past all XDP programs
    pub wires: bool,
}

/// A policy, and the families that the same one is told of.
struct Merged {
    policy: Policy,
    families: Vec<Family>,
}

impl Look<'_> {
    /// What touches traffic of these ports.
    pub fn findings(&self) -> Result<Vec<Finding>> {
        let touching = self.touching(self.flows)?;
        if touching.is_empty() {
            let found = "nothing keeps traffic from the fast path";
            return Ok(vec![finding(Check::Policy, SETTINGS, State::Well, found)]);
        }
        let modes = if touching.iter().any(is_netfilter) { self.passing_modes()? } else { Vec::new() };
        let mut findings: Vec<_> = merged(touching).iter().map(|merged| self.judge(merged, &modes)).collect();
        if !modes.is_empty() {
            findings.extend(tracking(self.flows));
        }
        Ok(findings)
    }

    fn touching(&self, flows: FlowMode) -> Result<Vec<Policy>> {
        let policies = survey::policies(self.all, flows)?;
        Ok(policies.into_iter().filter(|policy| self.touches(&policy.scope)).collect())
    }

    /// Whether a port that is looked at, or a VLAN on it, forwards packets in the scope.
    fn touches(&self, scope: &Scope) -> bool {
        let of_port = |port: &Port| match scope {
            Scope::Ingress(ifindex, _) | Scope::Egress(ifindex, _) => *ifindex == port.ifindex,
            Scope::Family(_) | Scope::Local(_) => true,
        };
        let forwards = |port: &Port| {
            Family::ALL.into_iter().zip(&port.family).any(|(family, of)| of.forwarding && scope.concerns(family))
        };
        self.all.iter().any(|port| self.is_looked_at(port) && of_port(port) && forwards(port))
    }

    fn is_looked_at(&self, port: &Port) -> bool {
        let named = |ifindex: u32| self.ports.iter().any(|port| port.ifindex == ifindex);
        match port.kind {
            PortKind::Vlan { lower, .. } => named(lower) || named(port.ifindex),
            _ => named(port.ifindex),
        }
    }

    /// For each way to have connections handed over, the families in which they would pass all rules.
    fn passing_modes(&self) -> Result<Vec<(FlowMode, Vec<Family>)>> {
        let families = |mode| {
            let touching = self.touching(mode)?;
            let stands = |family| {
                move |policy: &Policy| is_netfilter(policy) && policy.scope.concerns(family) && policy.flows.is_none()
            };
            anyhow::Ok(Family::ALL.into_iter().filter(|family| !touching.iter().any(stands(*family))).collect())
        };
        MODES.into_iter().map(|mode| Ok((mode, families(mode)?))).collect()
    }

    fn judge(&self, merged: &Merged, modes: &[(FlowMode, Vec<Family>)]) -> Finding {
        let Merged { policy, families } = merged;
        let told = words::policy(policy, policy.filter.is_some(), |ifindex| self.name(ifindex));
        let check = if is_netfilter(policy) { Check::Netfilter } else { Check::Policy };
        let about = told.port.as_deref().unwrap_or(SETTINGS);
        let (state, how) = match policy {
            Policy { flows: Some(_), .. } => (State::Slower, "; connections that Linux has accepted pass"),
            Policy { filter: Some(_), .. } if self.wires => {
                (State::Stops, "; its filter is not run, because some ports have wires")
            }
            Policy { filter: Some(_), .. } => (State::Slower, "; only what its filter matches"),
            Policy { scope: Scope::Local(_), .. } => (State::Slower, ""),
            Policy { rules: Some(rules), .. } if !rules.iter().any(Rule::refuses_all) => {
                (State::Slower, "; repeated as far as they go by port and source")
            }
            _ => (State::Stops, ""),
        };
        let names: Vec<_> = families.iter().map(|family| words::family(*family)).collect();
        let found = format!("{}: {} ({} {}{how})", told.source, told.detail, told.scope, names.join(" and "));
        let better = modes.iter().find(|(mode, passed)| {
            *mode != self.flows && is_netfilter(policy) && families.iter().all(|family| passed.contains(family))
        });
        let remedy = match better {
            Some((mode, _)) if state == State::Stops => format!("towpath up --flows {mode} {}", self.names()),
            _ => self.shown_by(policy, &told),
        };
        finding(check, about, state, found).with(remedy)
    }

    /// The command that shows where a setting stands; that takes it back, if it is a sysctl.
    fn shown_by(&self, policy: &Policy, told: &report::Policy) -> String {
        let port = told.port.as_deref();
        match policy.source {
            PolicySource::Nftables => "nft list ruleset".into(),
            PolicySource::Xtables => "iptables-save; ip6tables-save".into(),
            PolicySource::Xfrm => "ip xfrm policy".into(),
            PolicySource::Rules => "ip rule; ip -6 rule".into(),
            PolicySource::Tc => {
                let port = port.map_or_else(String::new, |port| format!(" dev {port}"));
                format!("tc qdisc show{port}; tc filter show{port} ingress")
            }
            PolicySource::Capture => "ss --packet --processes".into(),
            PolicySource::Sysctl => sysctl(&policy.detail, self.mtu(port)),
            PolicySource::Tunnels => "ip -d tunnel".into(),
            PolicySource::Ports => "ip -d link".into(),
        }
    }

    fn name(&self, ifindex: u32) -> String {
        self.all.get(ifindex).map_or_else(|| format!("#{ifindex}"), |port| port.name.clone())
    }

    fn names(&self) -> String {
        self.ports.iter().map(|port| port.name.as_str()).collect::<Vec<_>>().join(" ")
    }

    fn mtu(&self, port: Option<&str>) -> u32 {
        port.and_then(|name| self.all.by_name(name)).map_or(0, |port| port.mtu)
    }
}

/// The settings that are watched are told by their names, and none of them stands in the way at 0, but a port's MTU.
fn sysctl(detail: &str, mtu: u32) -> String {
    match detail.split_whitespace().next().filter(|word| word.starts_with("net.")) {
        Some(name) if name.ends_with(".mtu") => format!("sysctl -w {name}={mtu}"),
        Some(name) => format!("sysctl -w {name}=0"),
        None => "sysctl -a -r '^net.ipv[46]'".into(),
    }
}

fn is_netfilter(policy: &Policy) -> bool {
    matches!(policy.source, PolicySource::Nftables | PolicySource::Xtables)
}

/// One for what is told of each family, or of a way in and a way out.
fn merged(policies: Vec<Policy>) -> Vec<Merged> {
    let mut places: BTreeMap<_, usize> = BTreeMap::new();
    let mut all: Vec<Merged> = Vec::new();
    for policy in policies {
        let of = Family::ALL.into_iter().filter(|family| policy.scope.concerns(*family));
        let place = match policy.scope {
            Scope::Family(_) => (0, 0),
            Scope::Ingress(ifindex, _) => (1, ifindex),
            Scope::Egress(ifindex, _) => (2, ifindex),
            Scope::Local(_) => (3, 0),
        };
        let at = *places.entry((policy.source, place, policy.detail.clone())).or_insert(all.len());
        match all.get_mut(at) {
            Some(merged) => merged.families.extend(of),
            None => all.push(Merged { families: of.collect(), policy }),
        }
    }
    all
}

/// What connections come from.
fn tracking(flows: FlowMode) -> Vec<Finding> {
    let setting = |name: &str| Path::new("/proc/sys/net/netfilter").join(name).exists();
    if !setting("nf_conntrack_max") {
        let missing = finding(Check::Conntrack, SETTINGS, State::Slower, "not loaded").with("modprobe nf_conntrack");
        return vec![missing];
    }
    let mut findings = vec![finding(Check::Conntrack, SETTINGS, State::Well, "loaded")];
    if flows == FlowMode::Flowtable {
        // The kernel has this setting wherever it has flowtables (net/netfilter/nf_conntrack_standalone.c).
        findings.push(match setting("nf_flowtable_tcp_timeout") {
            true => finding(Check::Flowtable, SETTINGS, State::Well, "the kernel has them"),
            false => finding(Check::Flowtable, SETTINGS, State::Slower, "the kernel has none (CONFIG_NF_FLOW_TABLE)"),
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_are_taken_back_by_their_names() {
        assert_eq!(sysctl("net.ipv4.ip_forward_use_pmtu is on", 0), "sysctl -w net.ipv4.ip_forward_use_pmtu=0");
        let mtu = sysctl("net.ipv6.conf.eth0.mtu is 1280, below the interface's 1500", 1500);
        assert_eq!(mtu, "sysctl -w net.ipv6.conf.eth0.mtu=1500");
        assert!(sysctl("eth0 has no IPv6", 0).starts_with("sysctl -a"));
    }
}
