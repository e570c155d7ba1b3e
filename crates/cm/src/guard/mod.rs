//! Watchers for everything in Linux that the fast path does not repeat: while such a setting stands, the packets that
//! it may touch are Linux's.
//!
//! Where it cannot be told cheaply what a setting does, it is taken to touch more rather than less. Where the kernel
//! announces changes, the announcement only wakes the watcher, which then reads the whole state again; where it does
//! not, the state is read every `POLL`.

mod bpf;
mod capture;
pub mod netfilter;
mod nftables;
pub(crate) mod nl;
mod proc;
mod rules;
pub mod sysctl;
mod tc;
mod tcx;
mod tunnels;
mod xfrm;
mod xtables;

use crate::conntrack::FlowMode;
use crate::error::CmError;
use crate::watch::{Finding, PortIndex, Watcher};
use std::collections::BTreeSet;
use std::time::Duration;
use towpath_fpc::{Port, PortKind};
use towpath_tables::record::Family;

pub use capture::Capture;
pub use nftables::Nftables;
pub use rules::Rules;
pub(crate) use rules::dump as dump_rules;
pub use sysctl::Sysctl;
pub use tc::Tc;
pub use tunnels::Tunnels;
pub use xfrm::Xfrm;
pub use xtables::Xtables;

/// How often state without announcements is read. A change must have taken effect within 100 ms; what is left of them is
/// for being late on a busy machine. Every reading costs an idle router time.
pub const POLL: Duration = Duration::from_millis(70);

/// All watchers of the calling thread's network namespace, where these connections are handed over. They must be used by
/// a thread of that namespace.
pub fn watchers(flows: FlowMode) -> Result<Vec<Box<dyn Watcher>>, CmError> {
    Ok(vec![
        Box::new(Nftables::new(flows)?),
        Box::new(Xtables::new()?),
        Box::new(Xfrm::new()?),
        Box::new(Rules::new()?),
        Box::new(Tc::new()?),
        Box::new(Capture::new()?),
        Box::new(Sysctl::new()?),
        Box::new(Tunnels::new()?),
    ])
}

/// Whether the interface can be a port at all; others need not be looked at.
pub(crate) fn can_be_port(port: &Port) -> bool {
    let kind = matches!(port.kind, PortKind::Ethernet | PortKind::Virtual | PortKind::Vlan { .. });
    port.master == 0 && (kind || is_tunnel(port))
}

/// Whether it is a tunnel to one other end.
fn is_tunnel(port: &Port) -> bool {
    matches!(port.kind, PortKind::Tunnel(tunnel) if !tunnel.remote.is_unspecified())
}

/// Whether packets that the host itself receives and sends matter: those that carry a tunnel's.
pub(crate) fn has_tunnels(ports: &PortIndex) -> bool {
    ports.iter().any(is_tunnel)
}

/// The interfaces that can be ports.
pub(crate) fn candidates(ports: &PortIndex) -> impl Iterator<Item = &Port> {
    ports.iter().filter(|port| can_be_port(port))
}

/// The VRFs that they belong to.
pub(crate) fn vrfs(ports: &PortIndex) -> impl Iterator<Item = &Port> {
    let vrfs: BTreeSet<u32> = candidates(ports).filter_map(|port| Some(port.vrf.as_ref()?.ifindex)).collect();
    vrfs.into_iter().filter_map(|ifindex| ports.get(ifindex))
}

/// "IPv4" or "IPv6".
pub(crate) fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// "1 rule", "2 rules".
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
