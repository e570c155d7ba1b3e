//! Interfaces: links, netconf and sysctls put together into the ports that FPM is told.

use crate::decode::link::Link;
use crate::decode::netconf::{ALL, Settings};
use crate::sysctl::{PortSettings, PortValues, Setting};
use crate::watch::PortIndex;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use towpath_fpc::{FamilySettings, Message, Policy, PolicySource, Port, PortFamily, PortKind, Scope, Vrf};
use towpath_tables::{Reason, record::Family};

struct Known {
    link: Link,
    settings: PortSettings,
    values: PortValues,
    /// Told to be down until routes have been read again
    held: bool,
}

/// What is known of the interfaces of the namespace.
pub struct Ports {
    known: BTreeMap<u32, Known>,
    netconf: HashMap<(Family, i32), Settings>,
    all: PortSettings,
    all_values: PortValues,
    hash_policy: [Setting; 2],
    flow_labels: Setting,
    /// What FPM was told of both families
    told: [Option<FamilySettings>; 2],
    index: PortIndex,
    /// What was described otherwise before, since `take_changed`
    changed: BTreeSet<Scope>,
    serve: Option<Vec<String>>,
}

impl Ports {
    /// Nothing known yet. `serve`: names of the interfaces whose settings must be followed closely; None for all.
    pub fn new(serve: Option<Vec<String>>) -> Self {
        let hash_policy = |family| Setting::new(&format!("{family}/fib_multipath_hash_policy"));
        let mut all = PortSettings::new("all");
        let all_values = all.read();
        Self {
            known: BTreeMap::new(),
            netconf: HashMap::new(),
            all,
            all_values,
            hash_policy: ["ipv4", "ipv6"].map(hash_policy),
            flow_labels: Setting::new("ipv6/auto_flowlabels"),
            told: [None; 2],
            index: PortIndex::default(),
            changed: BTreeSet::new(),
            serve,
        }
    }

    /// The ports as FPM was told them.
    pub fn index(&self) -> &PortIndex {
        &self.index
    }

    /// The link as it was last described.
    pub fn link(&self, ifindex: u32) -> Option<&Link> {
        self.known.get(&ifindex).map(|known| &known.link)
    }

    /// Learns a link.
    pub fn link_changed(&mut self, link: Link) {
        let ifindex = link.ifindex;
        self.index.set_peer(ifindex, link.peer);
        match self.known.get_mut(&ifindex) {
            Some(known) => {
                if known.link.name != link.name {
                    known.settings = PortSettings::new(&link.name);
                }
                known.link = link;
                known.values = known.settings.read();
            }
            None => {
                let mut settings = PortSettings::new(&link.name);
                let values = settings.read();
                self.known.insert(ifindex, Known { link, settings, values, held: false });
            }
        }
    }

    /// Forgets a link; true if FPM knew it.
    pub fn link_gone(&mut self, ifindex: u32) -> bool {
        self.known.remove(&ifindex);
        self.netconf.retain(|(_, index), _| u32::try_from(*index) != Ok(ifindex));
        let known = self.index.remove(ifindex).is_some();
        if known {
            self.changed.extend(scopes(ifindex));
        }
        known
    }

    /// Indices of all links.
    pub fn indices(&self) -> Vec<u32> {
        self.known.keys().copied().collect()
    }

    /// The ports of a VRF, if it is one: what they are told as depends on it.
    pub fn slaves(&self, vrf: u32) -> Vec<u32> {
        if self.link(vrf).is_none_or(|link| link.vrf_table.is_none()) {
            return Vec::new();
        }
        self.known.iter().filter(|(_, known)| known.link.master == vrf).map(|(ifindex, _)| *ifindex).collect()
    }

    /// Learns settings of an interface (or `ALL`).
    pub fn netconf_changed(&mut self, family: Family, ifindex: i32, settings: Settings) {
        self.netconf.entry((family, ifindex)).or_default().update(settings);
    }

    /// A family no longer knows an interface.
    pub fn netconf_gone(&mut self, family: Family, ifindex: i32) {
        self.netconf.remove(&(family, ifindex));
    }

    /// Forgets the settings of a family for the interfaces that `seen` does not accept.
    pub fn netconf_retain(&mut self, family: Family, seen: impl Fn(i32) -> bool) {
        self.netconf.retain(|(of, ifindex), _| *of != family || seen(*ifindex));
    }

    /// Tells a port as down whatever it is, or no longer.
    pub fn hold(&mut self, ifindex: u32, held: bool) {
        if let Some(known) = self.known.get_mut(&ifindex) {
            known.held = held;
        }
    }

    /// The message for a port, if it differs from what FPM knows (or `always`).
    pub fn message(&mut self, ifindex: u32, always: bool) -> Option<Message> {
        let port = self.compose(self.known.get(&ifindex)?);
        let before = self.index.insert(port.clone());
        if before.as_ref().is_some_and(|before| *before != port) {
            self.changed.extend(scopes(ifindex));
        }
        (always || before.as_ref() != Some(&port)).then_some(Message::Port(port))
    }

    /// Reads the interfaces' settings again that netlink does not announce, and gives the messages that follow. Changes
    /// that must show at once are looked for by the watcher of sysctls.
    pub fn poll_settings(&mut self) -> Vec<Message> {
        let all = self.all.read();
        let everyone = all != self.all_values;
        self.all_values = all;
        let serve = &self.serve;
        let names: HashMap<u32, &str> = match serve {
            Some(_) => self.index.iter().map(|port| (port.ifindex, port.name.as_str())).collect(),
            None => HashMap::new(),
        };
        let served = |link: &Link| match (serve, link.kind) {
            (_, PortKind::Loopback | PortKind::Other) => false,
            (_, PortKind::Tunnel(_)) => true,
            (None, _) => true,
            (Some(serve), kind) => {
                let lower = if let PortKind::Vlan { lower, .. } = kind { names.get(&lower).copied() } else { None };
                serve.iter().any(|name| *name == link.name || Some(name.as_str()) == lower)
            }
        };
        let mut changed = Vec::new();
        for (ifindex, known) in self.known.iter_mut().filter(|(_, known)| known.link.up && served(&known.link)) {
            let values = known.settings.read();
            if values != known.values {
                known.values = values;
                changed.push(*ifindex);
            }
        }
        if everyone {
            changed = self.indices();
        }
        changed.into_iter().filter_map(|ifindex| self.message(ifindex, false)).collect()
    }

    /// Reads what `FamilySettings` tells, and gives the messages that follow.
    pub fn poll_families(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        let labels = self.flow_labels.read().is_some_and(|value| value != 0);
        for ((family, setting), told) in Family::ALL.into_iter().zip(&mut self.hash_policy).zip(&mut self.told) {
            let hash_policy = setting.read().map_or(u8::MAX, |value| value.clamp(0, 255) as u8);
            let settings = FamilySettings { family, hash_policy, flow_labels: labels && family == Family::V6 };
            if *told != Some(settings) {
                self.changed.extend(told.is_some().then_some(Scope::Family(family)));
                *told = Some(settings);
                messages.push(Message::FamilySettings(settings));
            }
        }
        messages
    }

    /// What was described otherwise before, since the last call: it must be Linux's until FPM has taken the new
    /// description.
    pub fn take_changed(&mut self) -> Vec<Policy> {
        let policy = |scope| {
            let (reason, detail) = match scope {
                Scope::Family(_) | Scope::Local(_) => {
                    (Reason::PolicySysctl, "fib_multipath_hash_policy or auto_flowlabels has just changed".to_owned())
                }
                Scope::Ingress(ifindex, _) | Scope::Egress(ifindex, _) => {
                    let name = self.index.get(ifindex).map_or_else(|| format!("#{ifindex}"), |port| port.name.clone());
                    (Reason::PortNotReady, format!("{name} has just changed"))
                }
            };
            Policy { momentary: true, ..Policy::new(PolicySource::Ports, scope, reason, detail) }
        };
        std::mem::take(&mut self.changed).into_iter().map(policy).collect()
    }

    /// Forgets what FPM was told about whole families, so that the next poll tells it again.
    pub fn retell_families(&mut self) {
        self.told = [None; 2];
    }

    fn compose(&self, known: &Known) -> Port {
        let link = &known.link;
        let netconf = |family, ifindex| self.netconf.get(&(family, ifindex)).copied().unwrap_or_default();
        let ifindex = i32::try_from(link.ifindex).unwrap_or(0);
        let vrf = self.vrf(link);
        let vrf_down = vrf.filter(|vrf| !vrf.link.up).map(|vrf| format!("its VRF {} is down", vrf.link.name));
        let (v4, v4_all) = (netconf(Family::V4, ifindex), netconf(Family::V4, ALL));
        let (v6, v6_all) = (netconf(Family::V6, ifindex), netconf(Family::V6, ALL));
        let yes = |setting: Option<bool>| setting == Some(true);
        let either = |own: Option<bool>, all: Option<bool>| yes(own) || yes(all);
        let values = known.values;
        let ipv4 = PortFamily {
            forwarding: yes(v4.forwarding),
            ignore_linkdown: either(v4.ignore_linkdown, v4_all.ignore_linkdown),
        };
        // IPv6 forwards by the setting of all interfaces (net/ipv6/ip6_output.c, ip6_forward), provided that it is
        // at work on this one.
        let ipv6 = PortFamily {
            forwarding: yes(v6_all.forwarding) && v6.forwarding.is_some() && values.disable_ipv6 == Some(false),
            ignore_linkdown: yes(v6.ignore_linkdown),
        };
        Port {
            ifindex: link.ifindex,
            name: link.name.clone(),
            mac: link.mac,
            mtu: link.mtu,
            kind: link.kind,
            up: link.up && !known.held,
            carrier: link.carrier,
            master: if vrf.is_some() { 0 } else { link.master },
            vrf: vrf.and_then(|vrf| vrf_info(&vrf.link)),
            promiscuous: link.promiscuous,
            family: [ipv4, ipv6],
            // Not knowing them, the careful value is that redirects may be sent.
            send_redirects: values.send_redirects.unwrap_or(true) || self.all_values.send_redirects.unwrap_or(true),
            rp_filter: v4.rp_filter.unwrap_or(0).max(v4_all.rp_filter.unwrap_or(0)),
            route_localnet: either(values.route_localnet, self.all_values.route_localnet),
            unsupported: link.unsupported.clone().or_else(|| unsupported_mtu(link, values)).or(vrf_down),
        }
    }

    /// The VRF that a link belongs to.
    fn vrf(&self, link: &Link) -> Option<&Known> {
        self.known.get(&link.master).filter(|master| master.link.vrf_table.is_some())
    }
}

fn scopes(ifindex: u32) -> [Scope; 2] {
    [Scope::Ingress(ifindex, None), Scope::Egress(ifindex, None)]
}

fn vrf_info(link: &Link) -> Option<Vrf> {
    Some(Vrf { ifindex: link.ifindex, name: link.name.clone(), table: link.vrf_table? })
}

fn unsupported_mtu(link: &Link, values: PortValues) -> Option<String> {
    let ipv6 = values.ipv6_mtu.filter(|mtu| *mtu != link.mtu)?;
    Some(format!("net.ipv6.conf.{}.mtu is {ipv6}, the link's MTU {}", link.name, link.mtu))
}
