//! The interfaces of two hosts. Those that are served have *twins* of the same name on the cache manager's host, whose Linux
//! decides over them; what is not forwarded fast is handed from one to the other by whatever joins them. Messages name
//! interfaces by that host's numbers, and everything here by this host's.
//!
//! Where it is not sure that the two are one port to whoever is on the wire, and that nothing on this host decides over its
//! packets, the port is described as one that does what the fast path does not repeat: all of its packets are handed over.

use crate::explain::mac;
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use towpath_cm::guard::{Capture, Tc};
use towpath_cm::{Finding, PortIndex, Watcher, survey};
use towpath_fpc::codec::Packet;
use towpath_fpc::{AlarmId, Feedback, Message, Policy, Port, PortKind, Scope, Snapshot};
use towpath_tables::clock;
use towpath_tables::record::Family;

/// Interfaces without a twin have numbers from here on. Linux counts from 1.
const ELSEWHERE: u32 = 1 << 30;

/// A port of this host, as far as it matters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Twin {
    ifindex: u32,
    mac: Option<[u8; 6]>,
    mtu: u32,
    kind: PortKind,
    /// Why it cannot be left to another host's Linux
    obstacle: Option<String>,
}

/// Those that there are at the moment.
pub type Twins = BTreeMap<String, Twin>;

/// Looks at this host's ports.
pub struct Survey {
    names: Vec<String>,
    tc: Tc,
    captures: Capture,
}

impl Survey {
    /// Of the ports with these names.
    pub fn new(names: Vec<String>) -> Result<Self> {
        Ok(Self { names, tc: Tc::new()?, captures: Capture::new()? })
    }

    /// What they are like now.
    pub fn look(&mut self) -> Result<Twins> {
        let ports = survey::ports()?;
        let mut findings = self.tc.findings(&ports)?;
        // That is how it may hand over what comes in.
        findings.retain(|finding| !matches!(finding.scope, Scope::Ingress(..)));
        findings.extend(self.captures.findings(&ports)?);
        Ok(self.twins(&ports, &findings))
    }

    fn twins(&self, ports: &PortIndex, findings: &[Finding]) -> Twins {
        let there = self.names.iter().filter_map(|name| ports.by_name(name));
        there.map(|port| (port.name.clone(), Twin::new(port, findings))).collect()
    }
}

impl Twin {
    fn new(port: &Port, findings: &[Finding]) -> Self {
        let (name, ifindex) = (&port.name, port.ifindex);
        let forwards = Family::ALL.into_iter().find(|family| port.family[*family as usize].forwarding);
        let forwards = forwards.map(|family| {
            let remedy = match family {
                Family::V4 => format!("ipv4.conf.{name}.forwarding=0"),
                Family::V6 => format!("ipv6.conf.{name}.disable_ipv6=1"),
            };
            format!(
                "Linux on the fast path's host forwards what comes in by {name}, too; run there: sysctl -w net.{remedy}"
            )
        });
        let finding = || findings.iter().find(|finding| finding.scope.interface().is_none_or(|of| of == ifindex));
        let obstacle = forwards.or_else(|| Some(format!("on the fast path's host: {}", finding()?.detail)));
        Self { ifindex, mac: port.mac, mtu: port.mtu, kind: port.kind, obstacle }
    }

    /// Why it is not the same as that port of the cache manager's host.
    fn difference(&self, port: &Port) -> Option<String> {
        let name = &port.name;
        if !matches!(port.kind, PortKind::Ethernet | PortKind::Virtual) {
            return Some(format!("{name} is no Ethernet interface on the cache manager's host"));
        }
        if self.mac != port.mac {
            let (here, there) = (mac(bytes(&self.mac)), mac(bytes(&port.mac)));
            return Some(format!("{name} is {here} on the fast path's host and {there} on the cache manager's"));
        }
        if self.mtu != port.mtu {
            let (here, there) = (self.mtu, port.mtu);
            return Some(format!("{name} has an MTU of {here} on the fast path's host and {there} on the other one"));
        }
        self.obstacle.clone()
    }
}

fn bytes(mac: &Option<[u8; 6]>) -> Option<&[u8]> {
    mac.as_ref().map(<[u8; 6]>::as_slice)
}

/// Numbers of interfaces here, by those on the other host.
#[derive(Clone, Default)]
pub struct Numbers(Arc<Mutex<BTreeMap<u32, u32>>>);

impl Numbers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is said to the other host, with its numbers.
    pub fn outbound(&self, packet: Packet) -> Packet {
        let Packet::Feedback(Feedback::Hits(mut neighbours)) = packet else { return packet };
        let numbers = self.lock();
        let theirs: BTreeMap<u32, u32> = numbers.iter().map(|(theirs, ours)| (*ours, *theirs)).collect();
        neighbours.retain_mut(|key| theirs.get(&key.ifindex).map(|number| key.ifindex = *number).is_some());
        Packet::Feedback(Feedback::Hits(neighbours))
    }
}

/// What one session with a cache manager says, in this host's terms.
pub struct Interpreter {
    twins: Twins,
    numbers: Numbers,
    /// Differences that the log knows
    told: BTreeMap<String, String>,
    /// Alarms that are not over, with numbers by this host's clock
    alarms: Vec<(AlarmId, u64)>,
    last: u64,
}

impl Interpreter {
    /// Of a session that begins.
    pub fn new(twins: Twins) -> Self {
        let (numbers, told) = (Numbers::default(), BTreeMap::new());
        Self { twins, numbers, told, alarms: Vec::new(), last: 0 }
    }

    /// The numbers that it learns.
    pub fn numbers(&self) -> Numbers {
        self.numbers.clone()
    }

    /// Adds what a message means here to `all`.
    ///
    /// # Errors
    /// When everything has to be described anew.
    pub fn take(&mut self, mut message: Message, all: &mut Vec<Message>) -> Result<()> {
        match &mut message {
            // What Linux has accepted there cannot be seen here.
            Message::Flow(_) | Message::FlowDelete(_) => return Ok(()),
            Message::SnapshotBegin(Snapshot::Flows) | Message::SnapshotEnd(Snapshot::Flows) => return Ok(()),
            Message::Port(port) => {
                self.learn(port)?;
                self.describe(port);
            }
            Message::Policy(policy) => {
                all.extend(self.policies(policy).into_iter().map(Message::Policy));
                return Ok(());
            }
            Message::Alarm(alarm) => {
                alarm.policies = alarm.policies.iter().flat_map(|policy| self.policies(policy)).collect();
                self.last = clock::exact().max(self.last + 1);
                self.alarms.push((alarm.id, self.last));
                alarm.id.number = self.last;
                all.push(message);
                return Ok(());
            }
            Message::AlarmOver(id) => {
                let of = |alarm: &AlarmId| alarm.source == id.source && alarm.number <= id.number;
                let Some(number) = self.alarms.extract_if(.., |(alarm, _)| of(alarm)).last().map(|(_, ours)| ours)
                else {
                    return Ok(());
                };
                id.number = number;
            }
            // It says when by that host's clock. By this one's it is known only when that is told.
            Message::Heartbeat(at) => *at = clock::now(),
            _ => {}
        }
        let numbers = self.numbers.lock();
        message.renumber(|theirs| numbers.get(&theirs).copied().unwrap_or(theirs | ELSEWHERE));
        drop(numbers);
        all.push(message);
        Ok(())
    }

    /// Notes which interface here is meant by the number there.
    fn learn(&self, port: &Port) -> Result<()> {
        let theirs = port.ifindex;
        let ours = self.twins.get(&port.name).map_or(theirs | ELSEWHERE, |twin| twin.ifindex);
        let mut numbers = self.numbers.lock();
        let before = numbers.insert(theirs, ours);
        let moved = before.is_some_and(|before| before != ours);
        if moved || (before.is_none() && numbers.iter().any(|(other, of)| *of == ours && *other != theirs)) {
            bail!("{} is another interface of the cache manager's host than before", port.name);
        }
        if theirs >= ELSEWHERE {
            bail!("{} has the number {theirs} on the cache manager's host, which is none of Linux's", port.name);
        }
        Ok(())
    }

    /// Puts into the description what is known of the port here.
    fn describe(&mut self, port: &mut Port) {
        if let PortKind::Tunnel(_) = port.kind {
            // What was taken out of it here could not enter that host's Linux.
            port.kind = PortKind::Other;
        }
        let Some(twin) = self.twins.get(&port.name) else { return };
        let difference = twin.difference(port);
        port.kind = twin.kind;
        if let Some(why) = &difference
            && self.told.insert(port.name.clone(), why.clone()).as_ref() != Some(why)
        {
            tracing::warn!("all packets of {} go to the cache manager's host: {why}", port.name);
        }
        port.unsupported = port.unsupported.take().or(difference);
    }

    /// A policy here. One of an interface that is not known yet is of all.
    fn policies(&self, policy: &Policy) -> Vec<Policy> {
        let numbers = self.numbers.lock();
        let with = |scope| Policy { scope, flows: None, ..policy.clone() };
        match policy.scope {
            Scope::Ingress(theirs, _) | Scope::Egress(theirs, _) if !numbers.contains_key(&theirs) => {
                let families = Family::ALL.into_iter().filter(|family| policy.scope.concerns(*family));
                families.map(|family| with(Scope::Family(family))).collect()
            }
            Scope::Ingress(theirs, family) => vec![with(Scope::Ingress(numbers[&theirs], family))],
            Scope::Egress(theirs, family) => vec![with(Scope::Egress(numbers[&theirs], family))],
            scope @ (Scope::Family(_) | Scope::Local(_)) => vec![with(scope)],
        }
    }
}

#[cfg(test)]
mod tests;
