//! XFRM policies: a forwarded packet is checked against those of direction `fwd` and looked up among those of `out`
//! (xfrm4_policy_check and xfrm4_route_forward in net/ipv4/ip_forward.c, likewise net/ipv6/ip6_output.c), or, where
//! none applies, against the default. Policies of sockets concern their sockets only.
//!
//! Sources: include/uapi/linux/xfrm.h, net/xfrm/xfrm_user.c (Linux 6.1).

use super::netfilter::scope;
use super::nl::{Message, Netlink, Wakeup, ne32};
use super::{Finding, count, has_tunnels};
use crate::error::CmError;
use crate::watch::{PortIndex, Watcher};
use netlink_sys::protocols::NETLINK_XFRM;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use towpath_fpc::{PolicySource, Scope};
use towpath_tables::Reason;
use towpath_tables::record::Family;

/// XFRMNLGRP_POLICY; and XFRMNLGRP_EXPIRE, which is all that tells of a policy that reached the end of its life.
const GROUPS: [u32; 2] = [4, 2];
const GETPOLICY: u16 = 0x15;
const NEWPOLICY: u16 = 0x13;
const GETSPDINFO: u16 = 0x25;
const GETDEFAULT: u16 = 0x28;

/// xfrm_userpolicy_info: where the selector's family and the direction are.
const SELECTOR_FAMILY: usize = 40;
const DIRECTION: usize = 160;
const IN: u8 = 0;
const OUT: u8 = 1;
const FORWARD: u8 = 2;
const BLOCK: u8 = 1;

/// Policies can go without a message (with a device); their numbers are looked at this often.
const RECOUNT: Duration = Duration::from_secs(1);

/// The watcher of XFRM policies.
pub struct Xfrm {
    /// None where the kernel has no XFRM
    sockets: Option<(Wakeup, Netlink)>,
    /// Number of policies as the kernel counts them, when they were last read
    counted: Option<Vec<u8>>,
    findings: Vec<Finding>,
}

impl Xfrm {
    /// Watches the thread's network namespace.
    pub fn new() -> Result<Self, CmError> {
        let open = || Ok((Wakeup::join(NETLINK_XFRM, &GROUPS)?, Netlink::open(NETLINK_XFRM)?));
        let sockets = match open() {
            Ok(sockets) => Some(sockets),
            Err(e) if is_unsupported(&e) => None,
            Err(e) => return Err(CmError::io("XFRM: netlink socket", e)),
        };
        Ok(Self { sockets, counted: None, findings: Vec::new() })
    }

    fn refresh(&mut self) -> Result<(), CmError> {
        let Some((wakeup, netlink)) = &mut self.sockets else { return Ok(()) };
        let woken = wakeup.drain("XFRM notifications")?;
        let counted = netlink.ask("number of XFRM policies", GETSPDINFO, &[0; 4])?.1;
        if !woken && self.counted.as_ref() == Some(&counted) {
            return Ok(());
        }
        self.findings = default_findings(netlink)?;
        self.findings.extend(policy_findings(netlink)?);
        self.counted = Some(counted);
        Ok(())
    }
}

impl Watcher for Xfrm {
    fn name(&self) -> &'static str {
        "xfrm"
    }

    fn source(&self) -> PolicySource {
        PolicySource::Xfrm
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(|(wakeup, _)| wakeup.fd()).collect()
    }

    fn interval(&self) -> Option<Duration> {
        self.sockets.as_ref().map(|_| RECOUNT)
    }

    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        self.refresh().inspect_err(|_| self.counted = None)?;
        let matters = |finding: &&Finding| has_tunnels(ports) || !matches!(finding.scope, Scope::Local(_));
        Ok(self.findings.iter().filter(matters).cloned().collect())
    }

    fn has_lost(&mut self) -> bool {
        self.sockets.as_mut().is_some_and(|(wakeup, _)| wakeup.take_lost())
    }
}

fn is_unsupported(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT))
}

fn policy_findings(netlink: &mut Netlink) -> Result<Vec<Finding>, CmError> {
    let mut numbers: BTreeMap<(Option<Family>, bool), usize> = BTreeMap::new();
    for met in netlink.dump("XFRM policies", GETPOLICY, &[], on_the_way)? {
        *numbers.entry(met).or_default() += 1;
    }
    Ok(numbers
        .into_iter()
        .flat_map(|((family, local), number)| {
            let direction = if local { "in" } else { "fwd or out" };
            let detail = format!("{} of XFRM in direction {direction}", count(number, "policy"));
            families(family).iter().map(move |f| Finding::new(scope(*f, local), Reason::PolicyXfrm, detail.clone()))
        })
        .collect())
}

fn families(family: Option<Family>) -> &'static [Family] {
    match family {
        Some(Family::V4) => &Family::ALL[..1],
        Some(Family::V6) => &Family::ALL[1..],
        None => &Family::ALL,
    }
}

/// The family (None: either) of a policy, and whether only packets to the host itself meet it.
fn on_the_way(message: Message<'_>) -> Result<Option<(Option<Family>, bool)>, CmError> {
    if message.kind != NEWPOLICY {
        return Ok(None);
    }
    let short = || CmError::decode("XFRM policies", "shorter than a policy");
    let direction = *message.payload.get(DIRECTION).ok_or_else(short)?;
    let family = message.payload.get(SELECTOR_FAMILY..).and_then(|b| b.first_chunk()).ok_or_else(short)?;
    let local = match direction {
        IN => true,
        OUT | FORWARD => false,
        _ => return Ok(None),
    };
    let family = match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_INET => Some(Family::V4),
        libc::AF_INET6 => Some(Family::V6),
        _ => None,
    };
    Ok(Some((family, local)))
}

/// The namespace's default for packets that no policy covers (Linux 5.15; earlier ones have none).
fn default_findings(netlink: &mut Netlink) -> Result<Vec<Finding>, CmError> {
    let default = match netlink.ask("XFRM default policy", GETDEFAULT, &[0; 4]) {
        Ok((_, payload)) => payload,
        Err(CmError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    // xfrm_userpolicy_default: in, fwd, out.
    let word = ne32(&default).ok_or_else(|| CmError::decode("XFRM default policy", "too short"))?.to_ne_bytes();
    let local = match word {
        [_, BLOCK, ..] | [_, _, BLOCK, _] => false,
        [BLOCK, ..] => true,
        _ => return Ok(Vec::new()),
    };
    let detail = "XFRM blocks what no policy covers (ip xfrm policy setdefault)";
    Ok(Family::ALL.map(|f| Finding::new(scope(f, local), Reason::PolicyXfrm, detail)).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(family: i32, direction: u8) -> Vec<u8> {
        let mut payload = vec![0; 168];
        payload[SELECTOR_FAMILY..][..2].copy_from_slice(&(family as u16).to_ne_bytes());
        payload[DIRECTION] = direction;
        payload
    }

    #[test]
    fn forward_and_out_count_in_does_for_tunnels() {
        let decode = |payload: &[u8]| on_the_way(Message { kind: NEWPOLICY, payload });
        assert_eq!(decode(&policy(libc::AF_INET, 0)).unwrap(), Some((Some(Family::V4), true)));
        assert_eq!(decode(&policy(libc::AF_INET, 1)).unwrap(), Some((Some(Family::V4), false)));
        assert_eq!(decode(&policy(libc::AF_INET6, 2)).unwrap(), Some((Some(Family::V6), false)));
        assert_eq!(decode(&policy(0, 2)).unwrap(), Some((None, false)));
        assert_eq!(decode(&policy(libc::AF_INET, 3)).unwrap(), None, "a socket's");
        assert!(decode(&policy(libc::AF_INET, 1)[..100]).is_err());
    }
}
