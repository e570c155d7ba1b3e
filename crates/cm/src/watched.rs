//! A watcher together with what the loop knows of it.

use crate::watch::{Finding, Moved, PortIndex, Watcher};
use std::time::{Duration, Instant};
use towpath_fpc::{Alarm, AlarmId, Listener, Message, Policy, PolicySource, Snapshot};
use towpath_tables::Reason;
use towpath_tables::record::Family;

/// How soon a watcher that failed is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// What a poll found out.
#[derive(Default, Debug)]
pub struct Found {
    /// Policies that are new; it may go ahead of messages
    pub alarm: Option<Alarm>,
    /// The whole set as a snapshot, and the end of the alarm
    pub messages: Vec<Message>,
    /// Notifications that wake the watcher were lost
    pub lost: Option<Listener>,
}

/// A watcher, its last set, and when it must be polled.
pub struct Watched {
    watcher: Box<dyn Watcher>,
    told: Option<Vec<Policy>>,
    alarms: Alarms,
    due: Option<Instant>,
    failing: bool,
}

impl Watched {
    /// A watcher that was not polled yet.
    pub fn new(watcher: Box<dyn Watcher>) -> Self {
        let alarms = Alarms::of(watcher.source());
        Self { watcher, told: None, alarms, due: Some(Instant::now()), failing: false }
    }

    /// The watcher itself.
    pub fn watcher(&self) -> &dyn Watcher {
        self.watcher.as_ref()
    }

    /// When it must be polled; None if only its descriptors say so.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Generations of the rules that connections may pass, as told last.
    pub fn flows(&self) -> impl Iterator<Item = u32> {
        self.told.iter().flatten().filter_map(|policy| policy.flows)
    }

    /// It must be polled at once.
    pub fn wake(&mut self) {
        self.due = Some(Instant::now());
    }

    /// Tells it what has changed beside its own, see `Watcher::moved`.
    pub fn moved(&mut self, moved: Moved, uneven: [bool; 2]) {
        if self.watcher.moved(moved, uneven) {
            self.wake();
        }
    }

    /// Polls it and gives what follows: nothing, or its whole set and what of it is new.
    pub fn poll(&mut self, ports: &PortIndex) -> Found {
        let findings = match self.watcher.findings(ports) {
            Ok(findings) => {
                if self.failing {
                    tracing::info!(watcher = self.watcher.name(), "can be read again");
                }
                self.failing = false;
                self.due = self.watcher.interval().map(|interval| Instant::now() + interval);
                findings
            }
            Err(error) => {
                if !self.failing {
                    tracing::warn!(watcher = self.watcher.name(), %error, "unknown state: all traffic goes to Linux");
                }
                self.failing = true;
                self.due = Some(Instant::now() + RETRY);
                self.unknown(&error.to_string())
            }
        };
        let source = self.watcher.source();
        let lost = self.watcher.has_lost().then_some(Listener::Policies(source));
        Found { lost, ..self.tell(findings) }
    }

    fn unknown(&self, error: &str) -> Vec<Finding> {
        let detail = format!("{}: {error}", self.watcher.name());
        Family::ALL.map(|family| Finding::family(family, Reason::PolicyUnknown, &detail)).into()
    }

    fn tell(&mut self, findings: Vec<Finding>) -> Found {
        let source = self.watcher.source();
        let policy = |Finding { scope, reason, detail, filter, flows, in_vrfs, rules, momentary }| Policy {
            source,
            scope,
            reason,
            detail,
            filter,
            flows,
            in_vrfs,
            rules,
            momentary,
        };
        let mut set: Vec<_> = findings.into_iter().map(policy).collect();
        set.sort_unstable();
        set.dedup();
        if self.told.as_ref() == Some(&set) {
            return Found::default();
        }
        let known = self.told.as_deref().unwrap_or_default();
        let new: Vec<_> = set.iter().filter(|policy| known.binary_search(policy).is_err()).cloned().collect();
        let snapshot = Snapshot::Policies(source);
        let mut messages = vec![Message::SnapshotBegin(snapshot)];
        messages.extend(set.iter().cloned().map(Message::Policy));
        messages.push(Message::SnapshotEnd(snapshot));
        let first = self.told.replace(set).is_none();
        if new.is_empty() && !first {
            return Found { messages, ..Found::default() };
        }
        let (alarm, over) = self.alarms.raise(new);
        messages.push(over);
        Found { alarm: Some(alarm), messages, lost: None }
    }
}

/// Makes the alarms of one source. The first must be raised even if it is empty: its end ends those that a cache manager
/// before this one left behind.
pub struct Alarms {
    source: PolicySource,
    last: u64,
}

impl Alarms {
    /// None raised yet.
    pub fn of(source: PolicySource) -> Self {
        Self { source, last: 0 }
    }

    /// The alarm, and the message that ends it.
    pub fn raise(&mut self, policies: Vec<Policy>) -> (Alarm, Message) {
        self.last = monotonic().max(self.last + 1);
        let id = AlarmId { source: self.source, number: self.last };
        (Alarm { id, policies }, Message::AlarmOver(id))
    }
}

/// Nanoseconds of CLOCK_MONOTONIC: they rise also from one process to the next.
fn monotonic() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours, which the call fills.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
