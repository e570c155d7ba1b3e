//! Alarms on their way to the daemon's thread. What that thread does not heed in time (it may be waiting for the kernel to
//! verify a program, or going through a million routes) is heeded here: all of the family that an alarm concerns goes to
//! Linux, until the daemon's thread has done what is due and knows more precisely.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use towpath_engine::ConfigTable;
use towpath_fpc::Alarm;
use towpath_tables::Reason;
use towpath_tables::record::Family;

/// How long the daemon's thread has for an alarm. It looks for them every 5 ms while it works on routes, and what must
/// be polled was found up to 70 ms after Linux accepted it.
const PATIENCE: Duration = Duration::from_millis(10);

/// What the sentry needs to know about tables.
pub trait Guarded {
    /// Makes all packets of a family exceptions for this reason.
    fn pull(&self, family: Family, reason: Reason);
    /// Leaves it to the writer what are exceptions.
    fn release(&self);
    /// Rules were looked at, at this time, and what was found is in force.
    fn beat(&self, at: u64);
}

impl Guarded for ConfigTable {
    fn pull(&self, family: Family, reason: Reason) {
        ConfigTable::pull(self, family, reason);
    }

    fn release(&self) {
        ConfigTable::release(self);
    }

    fn beat(&self, at: u64) {
        ConfigTable::beat(self, at);
    }
}

/// Watches over tables and hands alarms on.
pub struct Sentry<T = ConfigTable>(Arc<Shared<T>>);

impl<T> Clone for Sentry<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Sentry<T> {
    fn default() -> Self {
        let post =
            Post { waiting: Vec::new(), unsettled: Vec::new(), taken: 0, heartbeat: 0, tables: None, in_line: false };
        Self(Arc::new(Shared { post: Mutex::new(post), changed: Condvar::new() }))
    }
}

struct Shared<T> {
    post: Mutex<Post<T>>,
    changed: Condvar,
}

struct Post<T> {
    /// Alarms that the daemon's thread has not taken
    waiting: Vec<Alarm>,
    /// One for each alarm that is not known to be heeded, in turn
    unsettled: Vec<Unsettled>,
    /// So many of the first of them were taken
    taken: usize,
    /// When rules were last looked at
    heartbeat: u64,
    /// What is watched over
    tables: Option<T>,
    /// It says what Linux says, and not what a former daemon knew
    in_line: bool,
}

struct Unsettled {
    /// When it must be heeded; None if all of its families have been sent to Linux
    due: Option<Instant>,
    reasons: Vec<(Family, Reason)>,
}

impl<T: Guarded> Sentry<T> {
    /// Watches over these tables from now on.
    pub fn guard(&self, tables: T) {
        let mut post = self.lock();
        post.tables = Some(tables);
        let now = Instant::now();
        post.unsettled.iter_mut().for_each(|alarm| alarm.due = Some(now));
        post.pull();
    }

    /// Watches over none from now on: nobody will heed what comes.
    pub fn abandon(&self) {
        self.lock().tables = None;
    }

    /// Leaves an alarm for the daemon's thread, which has less time for it the longer it has been on its way.
    pub fn raise(&self, alarm: Alarm, on_its_way: Duration) {
        let reasons = Family::ALL.into_iter().filter_map(|family| {
            let policies = alarm.policies.iter().filter(|policy| policy.scope.concerns(family));
            Some((family, policies.map(|policy| policy.reason).min()?))
        });
        let unsettled =
            Unsettled { due: Some(Instant::now() + PATIENCE.saturating_sub(on_its_way)), reasons: reasons.collect() };
        let mut post = self.lock();
        post.unsettled.push(unsettled);
        post.waiting.push(alarm);
        self.0.changed.notify_one();
    }

    /// Rules were looked at, at this time, and what was found has been raised.
    pub fn heartbeat(&self, at: u64) {
        let mut post = self.lock();
        post.heartbeat = at;
        post.beat();
    }

    /// Whether the tables are in line with Linux: while they are, they are told of heartbeats.
    pub fn in_line(&self, is: bool) {
        let mut post = self.lock();
        post.in_line = is;
        post.beat();
    }

    /// When rules were last looked at.
    pub fn last_heartbeat(&self) -> u64 {
        self.lock().heartbeat
    }

    /// True if there are alarms to take.
    pub fn is_waiting(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// The alarms that wait. They are to be acted on, and then `settle` is to be called.
    pub fn take(&self) -> Vec<Alarm> {
        let mut post = self.lock();
        post.taken = post.unsettled.len();
        std::mem::take(&mut post.waiting)
    }

    /// The tables say what the alarms taken ask for.
    pub fn settle(&self) {
        let mut post = self.lock();
        let taken = std::mem::take(&mut post.taken);
        let pulled = post.unsettled.drain(..taken).any(|alarm| alarm.due.is_none());
        // If others were pulled for, the brake holds until they are settled, too.
        if pulled
            && post.unsettled.iter().all(|alarm| alarm.due.is_some())
            && let Some(tables) = &post.tables
        {
            tables.release();
        }
        post.beat();
    }

    /// Does what is due, for ever.
    pub fn watch(&self) {
        let mut post = self.lock();
        loop {
            let waited = match post.due().map(|due| due.saturating_duration_since(Instant::now())) {
                None => self.0.changed.wait(post),
                Some(Duration::ZERO) => {
                    post.pull();
                    Ok(post)
                }
                Some(left) => match self.0.changed.wait_timeout(post, left) {
                    Ok((post, _)) => Ok(post),
                    Err(poisoned) => Ok(poisoned.into_inner().0),
                },
            };
            post = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Post<T>> {
        // Nothing panics under the lock.
        self.0.post.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Guarded> Post<T> {
    fn due(&self) -> Option<Instant> {
        self.tables.as_ref()?;
        self.unsettled.iter().filter_map(|alarm| alarm.due).min()
    }

    /// Lets connections pass, and the programs go on, for some time more, if all alarms are heeded.
    fn beat(&self) {
        let holds = self.in_line && self.unsettled.is_empty();
        if let Some(tables) = self.tables.as_ref().filter(|_| holds) {
            tables.beat(self.heartbeat);
        }
    }

    fn pull(&mut self) {
        let Some(tables) = &self.tables else { return };
        let now = Instant::now();
        for alarm in self.unsettled.iter_mut().filter(|alarm| alarm.due.is_some_and(|due| due <= now)) {
            alarm.due = None;
            for (family, reason) in &alarm.reasons {
                tables.pull(*family, *reason);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_fpc::{AlarmId, Policy, PolicySource, Scope};
    use towpath_tables::backing::{Backing, HeapBacking, initial_elements};

    /// More than any machine needs to run a thread.
    const DEADLINE: Duration = Duration::from_secs(20);
    const TC: u32 = 1 + Reason::PolicyTc as u32;
    const XFRM: u32 = 1 + Reason::PolicyXfrm as u32;

    #[derive(Clone)]
    struct Heap(Arc<HeapBacking>);

    impl Guarded for Heap {
        fn pull(&self, family: Family, reason: Reason) {
            self.0.brake().pull(self.0.view().config(), family, reason);
        }

        fn release(&self) {
            self.0.brake().release(self.0.view().config());
        }

        fn beat(&self, at: u64) {
            self.0.view().config().heartbeat.store(at);
        }
    }

    fn heap() -> Heap {
        Heap(Arc::new(HeapBacking::new(initial_elements(1))))
    }

    fn alarm(scope: Scope, reason: Reason) -> Alarm {
        let policy = Policy::new(PolicySource::Tc, scope, reason, "");
        Alarm { id: AlarmId { source: PolicySource::Tc, number: 1 }, policies: vec![policy] }
    }

    fn sentry() -> Sentry<Heap> {
        let sentry = Sentry::default();
        let watch = Sentry::<Heap>::clone(&sentry);
        std::thread::spawn(move || watch.watch());
        sentry
    }

    fn becomes(tables: &Heap, wanted: [u32; 2]) {
        let end = Instant::now() + DEADLINE;
        let words = || tables.0.view().config().policy.each_ref().map(|word| word.load());
        while words() != wanted {
            assert!(Instant::now() < end, "{:?} instead of {wanted:?}", words());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_is_not_heeded_in_time_goes_to_linux_until_it_is() {
        let (sentry, tables) = (sentry(), heap());
        sentry.guard(tables.clone());
        let begin = Instant::now();
        sentry.raise(alarm(Scope::Egress(7, Some(Family::V6)), Reason::PolicyTc), Duration::ZERO);
        becomes(&tables, [0, TC]);
        assert!(begin.elapsed() >= PATIENCE, "{:?}", begin.elapsed());
        // Nothing taken, nothing settled.
        sentry.settle();
        becomes(&tables, [0, TC]);
        assert!(sentry.is_waiting());
        assert_eq!(sentry.take(), [alarm(Scope::Egress(7, Some(Family::V6)), Reason::PolicyTc)]);
        assert!(!sentry.is_waiting());
        // One that comes between and is not in what was taken:
        sentry.raise(alarm(Scope::Ingress(7, None), Reason::PolicyXfrm), Duration::ZERO);
        becomes(&tables, [XFRM, XFRM]);
        sentry.settle();
        becomes(&tables, [XFRM, XFRM]);
        assert_eq!(sentry.take().len(), 1);
        sentry.settle();
        becomes(&tables, [0, 0]);
    }

    #[test]
    fn what_was_long_on_its_way_is_not_waited_for() {
        let due = |on_its_way| {
            let sentry = Sentry::default();
            sentry.guard(heap());
            let begin = Instant::now();
            sentry.raise(alarm(Scope::Family(Family::V4), Reason::PolicyTc), on_its_way);
            sentry.lock().due().expect("it is waited for").duration_since(begin)
        };
        assert!(due(Duration::ZERO) >= PATIENCE);
        for longer in [PATIENCE, Duration::MAX] {
            let begin = Instant::now();
            assert!(due(longer) <= begin.elapsed());
        }
    }

    #[test]
    fn what_is_heeded_in_time_stays_precise() {
        let (sentry, tables) = (Sentry::default(), heap());
        sentry.guard(tables.clone());
        sentry.raise(alarm(Scope::Family(Family::V4), Reason::PolicyTc), Duration::ZERO);
        assert_eq!(sentry.take().len(), 1);
        sentry.settle();
        assert!(sentry.lock().due().is_none(), "nothing is due any more");
        becomes(&tables, [0, 0]);
    }

    #[test]
    fn connections_go_on_only_when_alarms_before_a_heartbeat_are_heeded() {
        let (sentry, tables) = (Sentry::default(), heap());
        let beat = || tables.0.view().config().heartbeat.load();
        sentry.heartbeat(5);
        sentry.guard(tables.clone());
        assert_eq!(beat(), 0, "what the tables say is not known to be true yet");
        sentry.in_line(true);
        assert_eq!(beat(), 5);
        sentry.heartbeat(6);
        assert_eq!(beat(), 6);
        sentry.raise(alarm(Scope::Family(Family::V4), Reason::PolicyTc), Duration::ZERO);
        sentry.heartbeat(7);
        assert_eq!((beat(), sentry.take().len()), (6, 1), "it is about that alarm, too");
        sentry.settle();
        assert_eq!(beat(), 7);
        // Another cache manager looks at Linux already, and has not described all of it yet.
        sentry.in_line(false);
        sentry.heartbeat(8);
        assert_eq!(beat(), 7);
        sentry.in_line(true);
        assert_eq!(beat(), 8);
    }

    #[test]
    fn tables_that_are_left_stay_as_they_are() {
        let (sentry, left, next) = (sentry(), heap(), heap());
        sentry.guard(left.clone());
        sentry.abandon();
        sentry.raise(alarm(Scope::Family(Family::V4), Reason::PolicyTc), Duration::MAX);
        sentry.guard(next.clone());
        becomes(&next, [TC, 0]);
        becomes(&left, [0, 0]);
    }

    #[test]
    fn alarms_from_before_hold_in_tables_that_come_after() {
        let (sentry, first) = (sentry(), heap());
        sentry.raise(alarm(Scope::Family(Family::V4), Reason::PolicyTc), Duration::ZERO);
        sentry.guard(first.clone());
        becomes(&first, [TC, 0]);
        let second = heap();
        sentry.guard(second.clone());
        becomes(&second, [TC, 0]);
        sentry.take();
        sentry.settle();
        becomes(&second, [0, 0]);
    }
}
