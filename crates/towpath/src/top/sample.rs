//! The busiest prefixes, estimated from a sample: one packet in so many, drawn at random by the program as it arrives, so that what
//! is not drawn costs hardly anything, and nothing when nobody looks.

use crate::control::{Client, Request, Wanted};
use crate::read::connect;
use crate::report::{Drawn, Top, TopPrefix, TopPrefixes, TraceBegun, TraceLine};
use anyhow::Result;
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::num::NonZeroU32;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Packets a second that are drawn, as far as one knows how many come, and that are looked at at most.
const DRAWN: f64 = 300.0;
const MOST: u32 = 1000;
/// A sample that is so many times too large or too small is begun anew.
const OFF: f64 = 8.0;
/// Prefixes that are told.
const TOLD: usize = 10;

/// The sample of the moment.
#[derive(Default)]
pub struct Sampler {
    running: Option<Running>,
}

struct Running {
    one_in: NonZeroU32,
    counts: Arc<Mutex<Counts>>,
    connection: UnixStream,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

/// What was drawn since a time.
struct Counts {
    since: Instant,
    /// When the sample began, nanoseconds since 1970-01-01 UTC; what was drawn before is none of it
    begun: u64,
    prefixes: BTreeMap<Option<String>, Count>,
    seen: u64,
    missed: u64,
    missed_before: u64,
    ended: bool,
}

#[derive(Default)]
struct Count {
    packets: u64,
    bytes: u64,
    fast: u64,
}

impl Sampler {
    /// Draws from now on as befits these rates.
    pub fn begin(&mut self, rates: &Top) -> Result<()> {
        self.running = None;
        let one_in = fitting(rates);
        let mut client = connect()?;
        let wanted = Wanted { filter: None, exceptions: false, reason: None, rate: MOST, one_in: Some(one_in) };
        let TraceBegun {} = client.ask(&Request::Trace(wanted))?;
        let (connection, counts) = (client.hang_up()?, Arc::new(Mutex::new(Counts::new(now()))));
        let noted = counts.clone();
        crate::source::thread("sample", move || read(&mut client, &noted))?;
        self.running = Some(Running { one_in, counts, connection });
        Ok(())
    }

    /// Adds to the rates of an interval what was drawn in it. If that was far too much or too little, or nothing is drawn any
    /// more, it is begun anew.
    pub fn add(&mut self, rates: &mut Top) -> Result<()> {
        let Some(running) = &self.running else { return self.begin(rates) };
        let counts = lock(&running.counts).take();
        let ended = counts.ended;
        rates.prefixes = Some(estimates(counts, running.one_in));
        let off = f64::from(running.one_in.get()) / f64::from(fitting(rates).get());
        if ended || !(1.0 / OFF..OFF).contains(&off) {
            self.begin(rates)?;
        }
        Ok(())
    }
}

/// As `Drawn::time_ns`.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64)
}

fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One packet in how many is to be drawn.
fn fitting(rates: &Top) -> NonZeroU32 {
    let packets: f64 = rates.ports.iter().map(|port| port.rx_packets + port.exceptions).sum();
    NonZeroU32::new((packets / DRAWN) as u32).unwrap_or(NonZeroU32::MIN)
}

fn read(client: &mut Client, counts: &Mutex<Counts>) {
    while let Ok(TraceLine::Drawn(drawn)) = client.next() {
        lock(counts).note(drawn);
    }
    lock(counts).ended = true;
}

impl Counts {
    fn new(begun: u64) -> Self {
        let (since, prefixes) = (Instant::now(), BTreeMap::new());
        Self { since, begun, prefixes, seen: 0, missed: 0, missed_before: 0, ended: false }
    }

    /// What there is, and from now on nothing.
    fn take(&mut self) -> Self {
        let (missed, ended) = (self.missed, self.ended);
        std::mem::replace(self, Self { missed, missed_before: missed, ended, ..Self::new(self.begun) })
    }

    /// The program draws as soon as it is in its first link, which may be long before the daemon says so.
    fn note(&mut self, drawn: Drawn) {
        self.missed = drawn.missed;
        if drawn.time_ns < self.begun {
            self.missed_before = drawn.missed;
            return;
        }
        self.seen += 1;
        let count = self.prefixes.entry(drawn.prefix).or_default();
        count.packets += 1;
        count.bytes += u64::from(drawn.length);
        count.fast += u64::from(drawn.fast);
    }
}

/// Each packet that was looked at stands for those that were not drawn, or were too many.
fn estimates(counts: Counts, one_in: NonZeroU32) -> TopPrefixes {
    let seconds = counts.since.elapsed().as_secs_f64();
    let missed = counts.missed.saturating_sub(counts.missed_before);
    let drawn = (counts.seen + missed) as f64 / counts.seen.max(1) as f64;
    let each = f64::from(one_in.get()) * drawn / seconds;
    let estimate = |(prefix, count): (Option<String>, Count)| TopPrefix {
        prefix,
        packets: count.packets as f64 * each,
        bits: count.bytes as f64 * 8.0 * each,
        fast: count.fast as f64 / count.packets as f64,
        seen: count.packets,
    };
    let mut busiest: Vec<_> = counts.prefixes.into_iter().map(estimate).collect();
    busiest.sort_by_key(|prefix| std::cmp::Reverse(prefix.seen));
    busiest.truncate(TOLD);
    TopPrefixes { one_in: one_in.get(), seen: counts.seen, missed, busiest }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const BEGUN: u64 = 7;

    fn drawn(prefix: &str, fast: bool, missed: u64) -> Drawn {
        Drawn { time_ns: BEGUN, prefix: Some(prefix.into()), fast, length: 100, missed }
    }

    #[test]
    fn what_is_looked_at_stands_for_the_rest() {
        let mut counts = Counts::new(BEGUN);
        counts.note(Drawn { time_ns: BEGUN - 1, ..drawn("a", true, 90) });
        for number in 0..10 {
            counts.note(drawn(if number < 6 { "a" } else { "b" }, number % 2 == 0, 100));
        }
        let one_in = NonZeroU32::new(50).expect("not zero");
        let mut taken = counts.take();
        let told = estimates(Counts::new(BEGUN), one_in);
        assert_eq!((told.seen, told.missed, told.busiest.len()), (0, 0, 0));
        assert_eq!((counts.missed, counts.missed_before), (100, 100), "what was missed before is not counted again");
        taken.since = Instant::now() - Duration::from_secs(2000);
        let told = estimates(taken, one_in);
        assert_eq!((told.one_in, told.seen, told.missed), (50, 10, 10));
        // Ten were looked at and ten missed, so each stands for two times fifty in 2000 seconds.
        for (found, (prefix, packets, seen)) in told.busiest.iter().zip([("a", 0.3, 6), ("b", 0.2, 4)]) {
            assert_eq!((found.prefix.as_deref(), found.seen, found.fast), (Some(prefix), seen, 0.5));
            assert!((found.packets / packets - 1.0).abs() < 0.01, "{found:?}");
            assert!((found.bits / found.packets - 800.0).abs() < 1e-6, "{found:?}");
        }
        assert_eq!(told.busiest.len(), 2);
    }
}
