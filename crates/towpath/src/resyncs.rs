//! How often what Linux has was read again because it could not be followed, by what was the cause.

use crate::report;
use crate::words;
use std::collections::BTreeMap;
use towpath_fpc::{Listener, PolicySource};

/// Why.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Cause {
    /// Notifications to one of the cache manager's listeners were lost
    Lost(Listener),
    /// Announcements of what devices can do with XDP were lost
    Abilities,
    /// Another cache manager came
    CacheManager,
}

/// All there are.
const CAUSES: [Cause; 9] = {
    use PolicySource::{Nftables, Rules, Tc, Xfrm};
    [
        Cause::Lost(Listener::Interfaces),
        Cause::Lost(Listener::Routes),
        Cause::Lost(Listener::Connections),
        Cause::Lost(Listener::Policies(Nftables)),
        Cause::Lost(Listener::Policies(Xfrm)),
        Cause::Lost(Listener::Policies(Rules)),
        Cause::Lost(Listener::Policies(Tc)),
        Cause::Abilities,
        Cause::CacheManager,
    ]
};

impl Cause {
    fn name(self) -> &'static str {
        match self {
            Self::Lost(Listener::Interfaces) => "interfaces",
            Self::Lost(Listener::Routes) => "routes",
            Self::Lost(Listener::Connections) => "connections",
            Self::Lost(Listener::Policies(source)) => words::policy_source(source),
            Self::Abilities => "xdp-features",
            Self::CacheManager => "cache-manager",
        }
    }
}

/// Counts since the daemon started.
#[derive(Default)]
pub struct Resyncs(BTreeMap<Cause, u64>);

impl Resyncs {
    /// Once more.
    pub fn count(&mut self, cause: Cause) {
        *self.0.entry(cause).or_default() += 1;
    }

    /// All causes, also those that never were.
    pub fn report(&self) -> Vec<report::Resync> {
        let count = |cause: &Cause| self.0.get(cause).copied().unwrap_or(0);
        CAUSES.iter().map(|cause| report::Resync { cause: cause.name().into(), count: count(cause) }).collect()
    }
}
