//! Connections that Linux hands over: let pass when rules that are new have settled, and kept alive in Linux while in use.

use crate::daemon::{Daemon, Event};
use crate::source::{Peer, thread};
use crate::workers::Grace;
use anyhow::Result;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};
use towpath_cm::FlowMode;
use towpath_fpc::Feedback;
use towpath_fpc::codec::Packet;
use towpath_fpm::{Timeouts, Told};
use towpath_hitflags::{Connections, RefreshConnections};
use towpath_tables::grace::Grace as _;

/// What it means if connections cannot be let pass.
const STAYING: &str = "connections stay in Linux until its rules change again";
/// How often Linux's timeouts are read while there are connections.
const READ_TIMEOUTS: Duration = Duration::from_secs(1);

/// What the command line says of connections.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Which ones; None if the cache manager at the other end of a socket decides
    pub mode: Option<FlowMode>,
    /// Room for so many; 0 if none are taken
    pub room: u32,
}

impl Wanted {
    /// Room for none if none are wanted, and none wanted without room.
    pub fn new(mode: Option<FlowMode>, max: u32) -> Self {
        match mode {
            Some(FlowMode::None) => Self { mode, room: 0 },
            Some(_) if max == 0 => Self { mode: Some(FlowMode::None), room: 0 },
            _ => Self { mode, room: max },
        }
    }

    /// Whether there may be any.
    pub fn any(&self) -> bool {
        self.room > 0
    }
}

/// Who tells Linux about connections.
pub enum Keeper {
    /// None are taken
    Nobody,
    /// A thread of this process
    Local(Sender<Feedback>),
    /// The cache manager at the other end of a socket
    Remote(Peer),
}

impl Keeper {
    /// Starts the thread. Linux takes its time for each connection, so nobody waits for it.
    pub fn local() -> Result<Self> {
        let mut connections = Connections::open()?;
        let (sender, waiting) = channel();
        thread("conntrack", move || {
            for feedback in waiting {
                let told = match feedback {
                    Feedback::FlowsUsed(used) => connections.refresh(&used),
                    Feedback::FlowsAhead(ahead) => connections.forget_acknowledged(&ahead),
                    Feedback::Hits(_) | Feedback::Resync(_) => Ok(()),
                };
                if let Err(error) = told {
                    tracing::warn!("{error}");
                }
            }
        })?;
        Ok(Self::Local(sender))
    }

    /// Tells it, if it is about connections.
    pub fn tell(&self, feedback: Feedback) {
        match self {
            Self::Nobody => {}
            // The thread ends with this process.
            Self::Local(thread) => drop(thread.send(feedback)),
            Self::Remote(peer) => peer.send(Packet::Feedback(feedback)),
        }
    }
}

/// What the daemon does about connections.
pub struct Flows {
    pub wanted: Wanted,
    keeper: Keeper,
    /// When Linux's timeouts are read again
    timeouts_due: Instant,
    /// The table was full when last looked at, for the log
    full: bool,
}

impl Flows {
    pub fn new(wanted: Wanted, keeper: Keeper) -> Self {
        Self { wanted, keeper, timeouts_due: Instant::now(), full: false }
    }
}

impl Daemon {
    /// Does what is due for connections.
    pub fn follow_flows(&mut self) {
        let now = Instant::now();
        if let Some(change) = self.fpm.settled_flows(now) {
            match self.engine.watch_transmitted() {
                Ok(()) => self.await_grace(Event::Settled(change), STAYING),
                Err(error) => tracing::error!("{STAYING}: {error}"),
            }
        }
        if let Some(seal) = self.fpm.seal_flows(now) {
            self.await_grace(Event::Reclaimable(seal), "room of connections that ended stays taken");
        }
        if self.fpm.tables().flow_count() == 0 {
            return;
        }
        if now >= self.flows.timeouts_due {
            self.flows.timeouts_due = now + READ_TIMEOUTS;
            self.fpm.set_flow_timeouts(timeouts());
        }
        let Told { used, ahead } = self.fpm.take_used_flows(now);
        if !used.is_empty() {
            self.flows.keeper.tell(Feedback::FlowsUsed(used));
        }
        if !ahead.is_empty() {
            self.flows.keeper.tell(Feedback::FlowsAhead(ahead));
        }
        self.log_full_flows();
    }

    /// Waits for a grace period without holding up anything else; this event tells of its end. `failing`: what it means if
    /// there is none.
    fn await_grace(&self, end: Event, failing: &'static str) {
        let events = self.events.clone();
        let waited = Grace::of(self.workers.as_ref()).and_then(|mut grace| {
            thread("grace", move || {
                grace.wait();
                drop(events.send(end));
            })
        });
        if let Err(error) = waited {
            tracing::error!("{failing}: {error:#}");
        }
    }

    fn log_full_flows(&mut self) {
        let full = self.fpm.refused_flows().full;
        if full && !self.flows.full {
            tracing::warn!("{}", self.full_flows());
        }
        self.flows.full = full;
    }

    /// What people are to know if connections find no room.
    pub fn full_flows(&self) -> String {
        format!(
            "table flows has no room for more connections, which stay in Linux ({} times so far); start with a larger \
             --max-flows than {}",
            self.fpm.refused_flows().total,
            self.flows.wanted.room
        )
    }
}

/// For how long this namespace's Linux keeps connections that it hands over and that have no packets: the shortest of those
/// that may hold. What cannot be read is as Linux has it by default.
fn timeouts() -> Timeouts {
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?;
        text.trim().parse().ok().map(Duration::from_secs)
    };
    let shortest = |names: &[&str], default| names.iter().filter_map(|name| read(name)).min().unwrap_or(default);
    let default = Timeouts::default();
    Timeouts {
        tcp: shortest(
            &["tcp_timeout_established", "tcp_timeout_unacknowledged", "tcp_timeout_max_retrans"],
            default.tcp,
        ),
        udp: shortest(&["udp_timeout", "udp_timeout_stream"], default.udp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_room_or_wish_there_is_none() {
        let of = |mode, max| {
            let wanted = Wanted::new(mode, max);
            (wanted.mode, wanted.room, wanted.any())
        };
        let flowtable = Some(FlowMode::Flowtable);
        assert_eq!(of(flowtable, 5), (flowtable, 5, true));
        assert_eq!(of(flowtable, 0), (Some(FlowMode::None), 0, false));
        assert_eq!(of(Some(FlowMode::None), 5), (Some(FlowMode::None), 0, false));
        assert_eq!(of(None, 5), (None, 5, true));
        assert_eq!(of(None, 0), (None, 0, false));
    }
}
