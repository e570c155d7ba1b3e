//! nftables, and with it iptables-nft: rules on a forwarded packet's way, and rules anywhere that make the kernel track
//! connections. Beside the rules, `hooks` looks at what else hangs in netfilter's hooks.
//!
//! A rule set changes by transactions, each with a new generation number. A notification makes the rules be read again
//! if the generation is another; should one ever be missing, the generation is asked for now and then all the same
//! (include/uapi/linux/netfilter/nf_tables.h, Linux 6.1).

mod aside;
mod barrier;
mod bits;
mod hooks;
mod meet;
mod packet;
mod queues;
mod ruleset;
mod xt;

use super::proc::ProcNet;
use super::{Finding, POLL, has_tunnels, nl, vrfs};
use crate::conntrack::FlowMode;
use crate::error::CmError;
use crate::watch::{Moved, PortIndex, Watcher};
use aside::Aside;
use hooks::Hooks;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nl::{Netlink, Wakeup};
use ruleset::Ruleset;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};
use towpath_fpc::{InVrfs, PolicySource};
use towpath_tables::record::Family;

const SUBSYSTEM: u16 = 10;
const GROUP: u32 = 7;
const GETGEN: u16 = 16;
const GEN_ID: u16 = 1;

/// nfgenmsg: family, version 0, resource id 0.
fn header(family: u8) -> [u8; 4] {
    [family, 0, 0, 0]
}

/// How often the generation is asked for without a notification.
const RECHECK: Duration = Duration::from_secs(1);
/// How long to wait until a kernel that has no nf_tables is asked again: each question makes it look for the module.
const ABSENT_RETRY: Duration = Duration::from_secs(10);

/// The watcher of nftables.
pub struct Nftables {
    wakeup: Wakeup,
    netlink: Netlink,
    generation: Generation,
    /// When the generation was last asked for
    asked: Instant,
    ruleset: Ruleset,
    hooks: Hooks,
    queues: ProcNet,
    aside: Aside,
    flows: FlowMode,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Generation {
    Unknown,
    Absent,
    Is(u32),
}

impl Nftables {
    /// Watches the thread's network namespace, where these connections are handed over.
    pub fn new(flows: FlowMode) -> Result<Self, CmError> {
        let open = |e| CmError::io("nftables: netlink socket", e);
        let mut netlink = Netlink::open(NETLINK_NETFILTER).map_err(open)?;
        Ok(Self {
            wakeup: Wakeup::join(NETLINK_NETFILTER, &[GROUP]).map_err(open)?,
            hooks: Hooks::new(&mut netlink)?,
            queues: ProcNet::new(queues::FILE, c"nfnetlink_queue")?,
            netlink,
            generation: Generation::Unknown,
            asked: Instant::now(),
            ruleset: Ruleset::default(),
            aside: Aside::default(),
            flows,
        })
    }

    fn refresh(&mut self) -> Result<(), CmError> {
        let woken = self.wakeup.drain("nftables notifications")?;
        let wait = match self.generation {
            Generation::Unknown => Duration::ZERO,
            Generation::Absent => ABSENT_RETRY,
            Generation::Is(_) => RECHECK,
        };
        if !woken && self.asked.elapsed() < wait {
            return Ok(());
        }
        self.asked = Instant::now();
        // Asked before the rules are: if they change in between, the next poll sees it.
        let generation = match self.netlink.ask("nftables generation", SUBSYSTEM << 8 | GETGEN, &header(0)) {
            Ok((_, payload)) => Generation::Is(decode_generation(&payload)?),
            Err(CmError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Generation::Absent,
            Err(e) => return Err(e),
        };
        match generation {
            Generation::Is(_) if generation != self.generation => {
                self.ruleset = Ruleset::read(&mut self.netlink, self.flows)?;
            }
            Generation::Is(_) => {}
            _ => self.ruleset = Ruleset::default(),
        }
        self.generation = generation;
        Ok(())
    }
}

impl Nftables {
    /// Which packets of a family's connections stand for others in VRFs. A flowtable takes them before the VRF does.
    fn in_vrfs(&self, family: Family) -> InVrfs {
        match self.flows {
            FlowMode::Flowtable => InVrfs::ByPort,
            _ if self.ruleset.tells_apart(family) => InVrfs::Stay,
            _ => InVrfs::ByVrf,
        }
    }
}

impl Watcher for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn source(&self) -> PolicySource {
        PolicySource::Nftables
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.wakeup.fd()]
    }

    fn interval(&self) -> Option<Duration> {
        Some(POLL)
    }

    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        self.refresh().inspect_err(|_| self.generation = Generation::Unknown)?;
        let flows = match self.generation {
            _ if self.flows == FlowMode::None => None,
            // No rule hands any over.
            _ if self.flows == FlowMode::Flowtable && !self.ruleset.has_flowtables() => None,
            Generation::Is(generation) => Some(generation),
            // Connections are tracked all the same, and this never changes.
            Generation::Absent | Generation::Unknown => Some(0),
        };
        let mut findings = self.ruleset.findings(ports, flows, self.flows);
        findings.extend(self.hooks.findings(&mut self.netlink, has_tunnels(ports), flows)?);
        let in_vrfs = Family::ALL.map(|family| self.in_vrfs(family));
        for finding in findings.iter_mut().filter(|finding| finding.flows.is_some()) {
            let concerned = Family::ALL.into_iter().filter(|family| finding.scope.concerns(*family));
            finding.in_vrfs = concerned.map(|family| in_vrfs[family as usize]).min().unwrap_or_default();
        }
        if findings.iter().any(|finding| finding.flows.is_some()) {
            findings.extend(queues::findings(&mut self.queues)?);
            findings.extend(self.aside.findings(&self.ruleset, Instant::now()));
            findings.extend(vrfs(ports).flat_map(|vrf| self.ruleset.tell_apart(vrf)));
        }
        Ok(findings)
    }

    fn has_lost(&mut self) -> bool {
        self.wakeup.take_lost()
    }

    fn moved(&mut self, moved: Moved, uneven: [bool; 2]) -> bool {
        // What is in a flowtable goes past rules in Linux, too.
        let met = matches!(self.flows, FlowMode::Established | FlowMode::Mark { .. });
        met && self.aside.moved(moved, uneven, Instant::now())
    }
}

fn decode_generation(payload: &[u8]) -> Result<u32, CmError> {
    let what = "nftables generation";
    let attributes = nl::attrs(what, payload.get(4..).unwrap_or_default())?;
    nl::find(&attributes, GEN_ID).and_then(nl::be32).ok_or_else(|| CmError::decode(what, "no generation number"))
}
