//! What hangs in the hooks of IPv4 and IPv6 beside nftables' chains and xtables' tables. The kernel's own list
//! (nfnetlink_hook, a module since Linux 5.14) names each function; where it is missing, BPF links of netfilter and
//! IPVS are looked for, the others that are known.
//!
//! Hooks of a device (ingress, egress) are only ever those of nftables, which has been asked itself.

use super::super::Finding;
use super::super::bpf::{self, NetfilterLinks};
use super::super::netfilter::{families, hooks, pf, scope};
use super::super::nl::{self, Message, Netlink, attrs, find, text_of};
use super::super::proc::ProcNet;
use super::header;
use crate::error::CmError;
use towpath_tables::Reason;
use towpath_tables::record::Family;

const SUBSYSTEM: u16 = 12;
const HOOKNUM: u16 = 1;
const FUNCTION: u16 = 4;

/// Hook functions judged by the watchers of nftables and xtables, and those that let pass whatever is forwarded:
/// `nf_nat_*` does nothing to packets without a connection (nf_nat_core.c), `apparmor_ip_postroute` nothing to packets
/// without a local socket (security/apparmor/lsm.c), `ip_sabotage_in` nothing to packets that did not come in by a
/// bridge (br_netfilter_hooks.c), `accept_all` nothing at all (net/netfilter/core.c). Linux 6.1.
const JUDGED: &[&str] = &[
    "accept_all",
    "apparmor_ip_postroute",
    "ip6t_do_table",
    "ip6table_mangle_hook",
    "ip_sabotage_in",
    "ipt_do_table",
    "iptable_mangle_hook",
];
/// Functions of connection tracking whose names do not say so (nf_conntrack_proto.c, nf_defrag_ipv6_hooks.c; 6.1 and 6.18).
const TRACKING: &[&str] = &["ipv4_confirm", "ipv6_confirm", "nf_confirm", "ipv6_defrag"];
const JUDGED_PREFIXES: &[&str] = &["nf_nat_", "nft_do_chain"];

/// Where to look.
pub enum Hooks {
    /// The kernel lists its hooks
    Listed,
    /// It does not: what can hang there is asked for one by one
    Guessed(Option<NetfilterLinks>, ProcNet),
}

impl Hooks {
    /// Finds out what this kernel offers.
    pub fn new(netlink: &mut Netlink) -> Result<Self, CmError> {
        match list(netlink, pf::IPV4, 0) {
            Ok(_) => Ok(Self::Listed),
            Err(CmError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                let mut links = bpf::has_netfilter_programs().then(NetfilterLinks::default);
                links.as_mut().map(NetfilterLinks::read).transpose().map_err(unlisted)?;
                Ok(Self::Guessed(links, ProcNet::new(c"ip_vs", c"ip_vs")?))
            }
            Err(e) => Err(e),
        }
    }

    /// What hangs in the hooks now. `flows`: what connections may pass connection tracking by.
    pub fn findings(
        &mut self,
        netlink: &mut Netlink,
        tunnels: bool,
        flows: Option<u32>,
    ) -> Result<Vec<Finding>, CmError> {
        let mut findings = Vec::new();
        match self {
            Self::Listed => {
                for pf in [pf::IPV4, pf::IPV6] {
                    for (hook, name, local) in hooks(tunnels) {
                        for function in list(netlink, pf, hook)? {
                            findings.extend(judge(pf, (name, local), &function, flows));
                        }
                    }
                }
            }
            Self::Guessed(links, proc) => {
                let links = links.as_mut().map(NetfilterLinks::read).transpose()?.unwrap_or_default();
                for bpf::NetfilterLink { id, pf, hook } in links {
                    let Some((_, name, local)) = hooks(tunnels).find(|(h, ..)| *h == hook) else { continue };
                    let detail = format!("BPF link {id} in netfilter's {name} hook (of some namespace)");
                    findings.extend(
                        families(pf)
                            .iter()
                            .map(|f| Finding::new(scope(*f, local), Reason::PolicyNetfilter, detail.clone())),
                    );
                }
                if has_services(proc)? {
                    findings.extend(
                        Family::ALL.map(|f| Finding::family(f, Reason::PolicyConntrack, "IPVS has virtual services")),
                    );
                }
            }
        }
        Ok(findings)
    }
}

/// BPF links are listed for CAP_SYS_ADMIN only. Without that list a BPF program in netfilter could not be told from none,
/// and everything would have to be Linux's for ever: that is said at the start.
fn unlisted(error: CmError) -> CmError {
    match error {
        CmError::Io { what, source } if source.raw_os_error() == Some(libc::EPERM) => {
            let needs = "it needs CAP_SYS_ADMIN on a kernel built without CONFIG_NETFILTER_NETLINK_HOOK";
            CmError::Io { what: format!("{what} ({needs})"), source }
        }
        other => other,
    }
}

fn judge(pf: u8, (hook, local): (&str, bool), function: &str, flows: Option<u32>) -> Vec<Finding> {
    if JUDGED.contains(&function) || JUDGED_PREFIXES.iter().any(|prefix| function.starts_with(prefix)) {
        return Vec::new();
    }
    let tracks = function.contains("conntrack") || TRACKING.contains(&function);
    let flows = flows.filter(|_| tracks && !local);
    let reason = if tracks { Reason::PolicyConntrack } else { Reason::PolicyNetfilter };
    let detail = format!("netfilter hook {hook}: kernel function {function}");
    let finding = |family: &Family| Finding::new(scope(*family, local), reason, detail.clone()).passed_by(flows);
    families(pf).iter().map(finding).collect()
}

/// Names of the functions in a hook.
fn list(netlink: &mut Netlink, pf: u8, hook: u32) -> Result<Vec<String>, CmError> {
    let mut body = header(pf).to_vec();
    body.extend(nl::attr(HOOKNUM, &hook.to_be_bytes()));
    netlink.dump("netfilter hooks", SUBSYSTEM << 8, &body, |message| function(&message).map(Some))
}

fn function(message: &Message<'_>) -> Result<String, CmError> {
    let attributes = attrs("netfilter hooks", message.payload.get(4..).unwrap_or_default())?;
    // Without kallsyms there are no names, and what cannot be named is not judged.
    Ok(find(&attributes, FUNCTION).map_or_else(|| "without a name".to_owned(), text_of))
}

/// Whether IPVS has services: its hooks come with the first (ip_vs_core.c). The file has three lines of heading; without the
/// module there is no file.
fn has_services(proc: &mut ProcNet) -> Result<bool, CmError> {
    Ok(proc.read()?.is_some_and(|list| list.lines().count() > 3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_fpc::Scope;

    #[test]
    fn only_unknown_functions_stand_in_the_way() {
        for harmless in ["nft_do_chain_inet", "ipt_do_table", "nf_nat_ipv4_out", "apparmor_ip_postroute"] {
            assert_eq!(judge(pf::IPV4, ("forward", false), harmless, Some(7)), [], "{harmless}");
        }
        let found = judge(pf::IPV6, ("prerouting", false), "ipv6_conntrack_in", Some(7));
        let detail = "netfilter hook prerouting: kernel function ipv6_conntrack_in";
        assert_eq!(found, [Finding::family(Family::V6, Reason::PolicyConntrack, detail).passed_by(Some(7))]);
        assert_eq!(judge(pf::IPV4, ("postrouting", false), "nf_confirm", Some(7))[0].flows, Some(7));
        assert_eq!(judge(pf::IPV4, ("input", true), "nf_confirm", Some(7))[0].flows, None);
        assert_eq!(judge(pf::IPV4, ("forward", false), "nf_hook_run_bpf", Some(7))[0].flows, None);
        assert_eq!(judge(pf::IPV4, ("forward", false), "nf_hook_run_bpf", None)[0].reason, Reason::PolicyNetfilter);
        assert_eq!(judge(pf::IPV4, ("input", true), "nf_hook_run_bpf", None)[0].scope, Scope::Local(Family::V4));
    }

    #[test]
    fn names_are_read_from_the_message() {
        // As recorded on Linux 6.1: nfgenmsg, module name, function name, hook number, priority.
        let mut payload = vec![2, 0, 0, 0];
        payload.extend(nl::attr(5, b"nf_conntrack\0"));
        payload.extend(nl::attr(4, b"ipv4_conntrack_in\0"));
        payload.extend(nl::attr(1, &[0; 4]));
        assert_eq!(function(&Message { kind: 0, payload: &payload }).unwrap(), "ipv4_conntrack_in");
        assert!(function(&Message { kind: 0, payload: &payload[..7] }).is_err());
    }
}
