//! Sysctls that change what Linux does with forwarded packets, that the fast path does not repeat, and that no
//! notification tells. They are read at every poll, by descriptors kept open.
//!
//! Watched, with the place in Linux 6.1 that makes them matter:
//! - `net.ipv4.ip_forward_use_pmtu`: path MTUs learned from ICMP limit forwarded packets (route.c, ipv4_mtu)
//! - `net.ipv4.fib_multipath_use_neigh`: next hops of a group are skipped by neighbour state (fib_semantics.c)
//! - `net.ipv{4,6}.fib_multipath_hash_policy` above 1: inner or custom fields choose the next hop (route.c)
//! - `net.ipv6.conf.all.proxy_ndp`: neighbour discovery for proxied hosts is taken out of the way (ip6_output.c)
//! - `net.ipv6.conf.X.disable_ipv6`, no such file, or an `mtu` of 0 (MTU below 1280, IPv6 off): IPv6 is dropped
//!   (ip6_input.c). A file opened before IPv6 left the interface reads 0 for a while (addrconf.c, addrconf_ifdown)
//! - `net.ipv6.conf.X.mtu` below the interface's: it limits forwarded IPv6 packets (ip6_output.c, addrconf.c)
//! - `net.ipv4.conf.X.accept_redirects`, of all and of X if X forwards, else of either: redirects change next hops by X, for
//!   what other ports forward too (inetdevice.h, IN_DEV_RX_REDIRECTS; route.c, __ip_do_redirect). Those that come in by a
//!   VRF's port come in by the VRF (vrf.c, vrf_ip_rcv): its setting decides
//! - `net.ipv6.conf.X.accept_redirects` where `net.ipv6.conf.X.forwarding` is off: the same (route.c, rt6_do_redirect);
//!   IPv6 forwards by the setting of all
//! - `net.ipv4.conf.X.send_redirects` on, or `route_localnet` off, while the port is still described otherwise: only
//!   while the change has not been taken over, which may take its time therefore
//!
//! Left alone: what netconf announces (forwarding, rp_filter, ignore_routes_with_linkdown, bc_forwarding, …); what
//! concerns only exceptions (accept_local and log_martians: sources that are ours or martian; accept_source_route:
//! options; bc_forwarding, mc_forwarding, drop_unicast_in_l2_multicast: broadcast and multicast; seg6_enabled,
//! rpl_seg_enabled, ioam6_enabled: extension headers); what only weakens XFRM policies, which are watched themselves
//! (disable_xfrm, disable_policy); src_valid_mark (a forwarded packet has no mark unless netfilter or tc, watched
//! themselves, give it one); shared_media (redirects to the sender, on which the packet is Linux's); ARP and ND
//! (proxy_arp, arp_*); and ip_forward_update_priority (orders packets within a full queue).

use super::{Finding, POLL, candidates, family_name, vrfs};
use crate::error::CmError;
use crate::watch::{PortIndex, Watcher};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use towpath_fpc::{PolicySource, Port, Scope};
use towpath_tables::Reason;
use towpath_tables::record::Family;

/// What IPv6 needs of an interface (RFC 8200, section 5); Linux accepts no lower value for `net.ipv6.conf.X.mtu`.
const IPV6_MIN_MTU: u32 = 1280;

/// A sysctl that holds one number, kept open. It belongs to the namespace of the thread that opened it.
struct Number {
    path: String,
    file: Option<File>,
}

impl Number {
    fn new(name: &str) -> Self {
        Self { path: format!("/proc/sys/{name}"), file: None }
    }

    /// Its value; None if the kernel has no such sysctl (now).
    fn read(&mut self) -> Result<Option<u32>, CmError> {
        // An open file of an interface that went or was renamed gives an error: then the name may have a new one.
        for _ in 0..2 {
            if self.file.is_none() {
                match File::open(&self.path) {
                    Ok(file) => self.file = Some(file),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(e) => return Err(CmError::io(&self.path, e)),
                }
            }
            let mut text = [0; 32];
            match self.file.as_ref().map_or(Ok(0), |file| file.read_at(&mut text, 0)) {
                Ok(length) => return self.decode(&text[..length]).map(Some),
                Err(_) => self.file = None,
            }
        }
        Ok(None)
    }

    fn decode(&self, text: &[u8]) -> Result<u32, CmError> {
        let text = String::from_utf8_lossy(text);
        text.trim().parse().map_err(|e| CmError::decode(&self.path, format!("{:?}: {e}", text.trim())))
    }

    fn is_on(&mut self) -> Result<bool, CmError> {
        Ok(self.read()?.is_some_and(|value| value != 0))
    }
}

/// Reads by which fields both families of the thread's namespace choose among next hops.
pub struct HashPolicies {
    hash_policy: [Number; 2],
}

impl Default for HashPolicies {
    fn default() -> Self {
        let hash_policy = ["net/ipv4", "net/ipv6"].map(|dir| Number::new(&format!("{dir}/fib_multipath_hash_policy")));
        Self { hash_policy }
    }
}

impl HashPolicies {
    /// The policies of now, IPv4 first. A kernel without multipath routing counts as policy 0.
    pub fn read(&mut self) -> Result<[u32; 2], CmError> {
        let [v4, v6] = &mut self.hash_policy;
        Ok([v4.read()?.unwrap_or(0), v6.read()?.unwrap_or(0)])
    }
}

/// The watcher of sysctls.
pub struct Sysctl {
    hash_policies: HashPolicies,
    use_pmtu: Number,
    use_neigh: Number,
    proxy_ndp: Number,
    all: PortV4,
    ports: HashMap<u32, PortNumbers>,
}

/// `net.ipv4.conf.X.*` that hold for an interface together with those of `all`.
struct PortV4 {
    accept: Number,
    send: Number,
    route_localnet: Number,
}

impl PortV4 {
    fn new(name: &str) -> Self {
        let number = |sysctl| Number::new(&format!("net/ipv4/conf/{name}/{sysctl}"));
        Self {
            accept: number("accept_redirects"),
            send: number("send_redirects"),
            route_localnet: number("route_localnet"),
        }
    }

    /// Whether redirects that come in here are accepted, where those of all are `accepted` (inetdevice.h,
    /// IN_DEV_RX_REDIRECTS).
    fn accepts_redirects(&mut self, forwarding: bool, accepted: bool) -> Result<bool, CmError> {
        // One of the two decides by itself.
        Ok(if forwarding == accepted { self.accept.is_on()? } else { accepted })
    }

    /// What stands in the way of a port. Only those are read that can make a difference beside those of `all`, of which
    /// one is `accepted`, and what the port is described as, because none should be read without need. `forwards`: another
    /// port may send packets there.
    fn findings(
        &mut self,
        port: &Port,
        all: &mut Self,
        accepted: bool,
        forwards: bool,
    ) -> Result<Vec<Finding>, CmError> {
        let name = &port.name;
        let family = Some(Family::V4);
        let (ingress, egress) = (Scope::Ingress(port.ifindex, family), Scope::Egress(port.ifindex, family));
        let finding = |scope, detail| Finding::new(scope, Reason::PolicySysctl, detail);
        let mut findings = Vec::new();
        let forwarding = port.family[0].forwarding;
        if (forwarding || forwards) && self.accepts_redirects(forwarding, accepted)? {
            let how = if forwarding { "on (all too) while forwarding" } else { "on (or all) while not forwarding" };
            findings.push(finding(egress, format!("net.ipv4.conf.{name}.accept_redirects is {how}")));
        }
        if !port.send_redirects && (all.send.is_on()? || self.send.is_on()?) {
            findings.push(finding(ingress, format!("net.ipv4.conf.{name}.send_redirects has just been turned on")));
        }
        if port.route_localnet && !all.route_localnet.is_on()? && !self.route_localnet.is_on()? {
            findings.push(finding(ingress, format!("net.ipv4.conf.{name}.route_localnet has just been turned off")));
        }
        Ok(findings)
    }
}

/// `net.ipv6.conf.X.*`
struct PortV6 {
    disabled: Number,
    mtu: Number,
    forwarding: Number,
    accept: Number,
}

struct PortNumbers {
    name: String,
    v4: PortV4,
    v6: PortV6,
}

impl PortNumbers {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), v4: PortV4::new(name), v6: PortV6::new(name) }
    }
}

impl Sysctl {
    /// Watches the thread's network namespace.
    pub fn new() -> Result<Self, CmError> {
        Ok(Self {
            hash_policies: HashPolicies::default(),
            use_pmtu: Number::new("net/ipv4/ip_forward_use_pmtu"),
            use_neigh: Number::new("net/ipv4/fib_multipath_use_neigh"),
            proxy_ndp: Number::new("net/ipv6/conf/all/proxy_ndp"),
            all: PortV4::new("all"),
            ports: HashMap::new(),
        })
    }

    fn namespace(&mut self) -> Result<Vec<Finding>, CmError> {
        let switches = [
            (&mut self.use_pmtu, Family::V4, "net.ipv4.ip_forward_use_pmtu"),
            (&mut self.use_neigh, Family::V4, "net.ipv4.fib_multipath_use_neigh"),
            (&mut self.proxy_ndp, Family::V6, "net.ipv6.conf.all.proxy_ndp"),
        ];
        let mut findings = Vec::new();
        for (number, family, name) in switches {
            if number.is_on()? {
                findings.push(Finding::family(family, Reason::PolicySysctl, format!("{name} is on")));
            }
        }
        for (policy, family) in self.hash_policies.read()?.iter().zip(Family::ALL) {
            if *policy > 1 {
                let family_name = family_name(family).to_lowercase();
                let detail = format!("net.{family_name}.fib_multipath_hash_policy is {policy}");
                findings.push(Finding::family(family, Reason::PolicySysctl, detail));
            }
        }
        Ok(findings)
    }
}

impl Watcher for Sysctl {
    fn name(&self) -> &'static str {
        "sysctl"
    }

    fn source(&self) -> PolicySource {
        PolicySource::Sysctl
    }

    fn interval(&self) -> Option<Duration> {
        Some(POLL)
    }

    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        let mut findings = self.namespace()?;
        let accepted = self.all.accept.is_on()?;
        let forwards = candidates(ports).any(|port| port.family[0].forwarding);
        self.ports.retain(|ifindex, numbers| ports.get(*ifindex).is_some_and(|port| port.name == numbers.name));
        for port in candidates(ports) {
            let numbers = self.ports.entry(port.ifindex).or_insert_with(|| PortNumbers::new(&port.name));
            findings.extend(numbers.v4.findings(port, &mut self.all, accepted, forwards)?);
            findings.extend(numbers.v6.findings(port)?);
        }
        for vrf in vrfs(ports) {
            let numbers = self.ports.entry(vrf.ifindex).or_insert_with(|| PortNumbers::new(&vrf.name));
            if numbers.v4.accepts_redirects(vrf.family[0].forwarding, accepted)? {
                findings.extend(redirected(vrf));
            }
            findings.extend(numbers.v6.findings(vrf)?);
        }
        Ok(findings)
    }
}

/// What stands in the way of the ports of a VRF that accepts redirects.
fn redirected(vrf: &Port) -> [Finding; 2] {
    let detail = format!("the VRF {} accepts redirects (net.ipv4.conf.{}.accept_redirects)", vrf.name, vrf.name);
    let scopes = [Scope::Ingress, Scope::Egress].map(|of| of(vrf.ifindex, Some(Family::V4)));
    scopes.map(|scope| Finding::new(scope, Reason::PolicySysctl, detail.clone()))
}

impl PortV6 {
    fn new(name: &str) -> Self {
        let number = |sysctl| Number::new(&format!("net/ipv6/conf/{name}/{sysctl}"));
        Self {
            disabled: number("disable_ipv6"),
            mtu: number("mtu"),
            forwarding: number("forwarding"),
            accept: number("accept_redirects"),
        }
    }

    /// What stands in the way of a port.
    fn findings(&mut self, port: &Port) -> Result<Vec<Finding>, CmError> {
        let name = &port.name;
        let family = Some(Family::V6);
        let (ingress, egress) = (Scope::Ingress(port.ifindex, family), Scope::Egress(port.ifindex, family));
        let finding = |scope, detail| Finding::new(scope, Reason::PolicySysctl, detail);
        let (disabled, mtu) = (self.disabled.read()?, self.mtu.read()?);
        if disabled != Some(0) || mtu.is_none_or(|mtu| mtu < IPV6_MIN_MTU) {
            let detail = match disabled {
                Some(0) | None => format!("{name} has no IPv6 (no net.ipv6.conf.{name})"),
                Some(_) => format!("net.ipv6.conf.{name}.disable_ipv6 is on"),
            };
            return Ok(vec![finding(ingress, detail.clone()), finding(egress, detail)]);
        }
        let mut findings = Vec::new();
        if let Some(mtu) = mtu.filter(|mtu| *mtu < port.mtu) {
            let detail = format!("net.ipv6.conf.{name}.mtu is {mtu}, below the interface's {}", port.mtu);
            findings.push(finding(egress, detail));
        }
        if port.family[1].forwarding && !self.forwarding.is_on()? && self.accept.is_on()? {
            let detail =
                format!("net.ipv6.conf.{name}.accept_redirects is on while {name} does not forward (but all do)");
            findings.push(finding(egress, detail));
        }
        Ok(findings)
    }
}
