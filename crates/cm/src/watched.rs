//! A watcher together with what the loop knows of it.

use crate::watch::{PortIndex, Watcher};
use std::time::{Duration, Instant};
use towpath_fpc::{Message, Policy, Scope, Snapshot};
use towpath_tables::{Reason, record::Family};

/// How soon a watcher that failed is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// A watcher, its last set, and when it must be polled.
pub struct Watched {
    watcher: Box<dyn Watcher>,
    told: Option<Vec<Policy>>,
    due: Option<Instant>,
    failing: bool,
}

impl Watched {
    /// A watcher that was not polled yet.
    pub fn new(watcher: Box<dyn Watcher>) -> Self {
        Self { watcher, told: None, due: Some(Instant::now()), failing: false }
    }

    /// The watcher itself.
    pub fn watcher(&self) -> &dyn Watcher {
        self.watcher.as_ref()
    }

    /// When it must be polled; None if only its descriptors say so.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It must be polled at once.
    pub fn wake(&mut self) {
        self.due = Some(Instant::now());
    }

    /// Polls it and gives the messages that follow: none, or its whole set as a snapshot.
    pub fn poll(&mut self, ports: &PortIndex) -> Vec<Message> {
        let set = match self.watcher.poll(ports) {
            Ok(set) => {
                if self.failing {
                    tracing::info!(watcher = self.watcher.name(), "can be read again");
                }
                self.failing = false;
                self.due = self.watcher.interval().map(|interval| Instant::now() + interval);
                set.or_else(|| self.told.is_none().then(Vec::new))
            }
            Err(error) => {
                if !self.failing {
                    tracing::warn!(watcher = self.watcher.name(), %error, "unknown state: all traffic goes to Linux");
                }
                self.failing = true;
                self.due = Some(Instant::now() + RETRY);
                Some(self.unknown(&error.to_string()))
            }
        };
        set.map(|set| self.tell(set)).unwrap_or_default()
    }

    fn unknown(&self, error: &str) -> Vec<Policy> {
        let source = self.watcher.source();
        let policy = |family| Policy {
            source,
            scope: Scope::Family(family),
            reason: Reason::PolicyUnknown,
            detail: format!("{}: {error}", self.watcher.name()),
        };
        vec![policy(Family::V4), policy(Family::V6)]
    }

    fn tell(&mut self, mut set: Vec<Policy>) -> Vec<Message> {
        set.sort();
        if self.told.as_ref() == Some(&set) {
            return Vec::new();
        }
        let snapshot = Snapshot::Policies(self.watcher.source());
        let mut messages = vec![Message::SnapshotBegin(snapshot)];
        messages.extend(set.iter().cloned().map(Message::Policy));
        messages.push(Message::SnapshotEnd(snapshot));
        self.told = Some(set);
        messages
    }
}
