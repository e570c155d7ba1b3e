//! Hit flags: neighbours that the fast path uses stay valid in Linux by Linux's own probing, idle ones age as ever; and
//! so do connections (`Connections`).
//!
//! Linux keeps a neighbour alive while it sends to it itself; packets that take the fast path do not count. So engines
//! mark the next hops they use, and once a period the neighbours behind the marked ones are reported to Linux as used
//! (`NTF_USE`), which is what a packet of its own would have done: `REACHABLE` goes on to `DELAY` instead of `STALE`,
//! `STALE` to `DELAY`, and from there Linux probes (neigh_add, __neigh_event_send and neigh_timer_handler in
//! net/core/neighbour.c, 6.1). ARP and ND alike. The period must be shorter than `delay_first_probe_time` (5 s), within
//! which Linux wants to have seen a use when `REACHABLE` ends.

mod connections;
mod netlink;

pub use connections::{Connections, RefreshConnections};
pub use netlink::Netlink;

use std::time::{Duration, Instant};
use towpath_fpc::{Feedback, NeighbourKey, Sender};

/// How often hit flags are read.
pub const PERIOD: Duration = Duration::from_secs(1);

/// Where hits are reported.
pub trait Refresh {
    /// These neighbours were used.
    fn refresh(&mut self, neighbours: &[NeighbourKey]) -> Result<(), RefreshError>;
}

/// Hits could not be reported.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// No rtnetlink socket
    #[error("rtnetlink socket for hit flags: {0}")]
    Socket(std::io::Error),
    /// Linux does not take the report
    #[error("reporting neighbour {} of interface {} as used: {cause}", neighbour.address, neighbour.ifindex)]
    Refused {
        /// Which
        neighbour: NeighbourKey,
        /// The kernel's answer
        cause: std::io::Error,
    },
    /// Linux's connection tracking cannot be asked, or refuses
    #[error("reporting used connections: {0}")]
    Connections(towpath_cm::CmError),
    /// The other process is gone
    #[error(transparent)]
    Connection(#[from] towpath_fpc::ConnectionError),
}

/// Over FPC: the cache manager's process reports to Linux.
impl Refresh for Sender {
    fn refresh(&mut self, neighbours: &[NeighbourKey]) -> Result<(), RefreshError> {
        Ok(self.feedback(Feedback::Hits(neighbours.to_vec()))?)
    }
}

/// Reads hit flags once a period and reports them.
#[derive(Debug)]
pub struct HitFlags<R> {
    refresh: R,
    period: Duration,
    due: Instant,
}

impl<R: Refresh> HitFlags<R> {
    /// Reports to `refresh`, for the first time a period after `now`.
    pub fn new(refresh: R, period: Duration, now: Instant) -> Self {
        Self { refresh, period, due: now + period }
    }

    /// When `poll` has something to do again.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// If a period has passed, asks `take` for the neighbours used in it and reports them.
    pub fn poll(&mut self, now: Instant, take: impl FnOnce() -> Vec<NeighbourKey>) -> Result<(), RefreshError> {
        if now < self.due {
            return Ok(());
        }
        self.due = now + self.period;
        let neighbours = take();
        if neighbours.is_empty() { Ok(()) } else { self.refresh.refresh(&neighbours) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Vec<Vec<NeighbourKey>>);

    impl Refresh for Log {
        fn refresh(&mut self, neighbours: &[NeighbourKey]) -> Result<(), RefreshError> {
            self.0.push(neighbours.to_vec());
            Ok(())
        }
    }

    #[test]
    fn reports_once_a_period_and_only_what_was_used() {
        let start = Instant::now();
        let key = NeighbourKey { ifindex: 1, address: [192, 0, 2, 1].into() };
        let mut flags = HitFlags::new(Log::default(), PERIOD, start);
        flags.poll(start, || panic!("asked too early")).unwrap();
        flags.poll(start + PERIOD, || vec![key]).unwrap();
        assert_eq!(flags.due(), start + 2 * PERIOD);
        flags.poll(start + PERIOD * 3 / 2, || panic!("asked twice in a period")).unwrap();
        flags.poll(start + 2 * PERIOD, Vec::new).unwrap();
        assert_eq!(flags.refresh.0, [vec![key]]);
    }
}
