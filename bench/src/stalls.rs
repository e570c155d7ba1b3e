//! A worker's pauses while its tables change: ports in memory, a worker that never waits for packets, and a writer beside
//! it that changes routes, publishes them and takes memory back. Windows with and without changes alternate. Every packet
//! that leaves is looked at: its next hop must be one that its destination had.

use crate::findings::Findings;
use crate::memory::{self, FRAME, INSIDE, NEXTHOPS, OUTSIDE, STRIDE};
use crate::routes;
use crate::stats::{Summary, percentile};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use towpath_report::{Bar, Report};
use towpath_tables::backing::{Backing, GrowError, HeapBacking, RawTables, initial_elements};
use towpath_tables::brake::Brake;
use towpath_tables::lpm::Leaf;
use towpath_tables::mix::Random;
use towpath_tables::record::TableId;
use towpath_tables::rib::Entry;
use towpath_tables::writer::TableWriter;
use towpath_user::memory::{Exceptions, MemoryPort, Wire};
use towpath_user::{BATCH, Buffer, Core, Engine, Grace, Pool, Port, usable_cores};

const ROUTES: usize = 100_000;
const DESTINATIONS: usize = 1 << 16;
const WINDOW: Duration = Duration::from_secs(1);
/// Changes published together, and how often: 10,000 a second
const BURST: u32 = 10;
const BURSTS: Duration = Duration::from_millis(1);
/// Lines for the nodes of the routes, several times what they take: the tables here cannot grow.
const LINES: usize = 1 << 20;

/// What one window showed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Window {
    /// Changes of routes
    pub changes: u64,
    /// Packets that left
    pub packets: u64,
    /// Packets with a next hop that their destination never had
    pub misrouted: u64,
    /// Packets handed to Linux, which no route here asks for
    pub exceptions: u64,
    /// Longest time between two batches, in microseconds
    pub longest: f64,
    /// Time between two batches that one in ten thousand is longer than, in microseconds
    pub seldom: f64,
}

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("a worker's pauses: {rounds} rounds, with and without 10,000 changes of {ROUTES} routes a second");
    let mut churn = Churn::new(ROUTES)?;
    let mut windows = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        windows[0].push(churn.window(false, WINDOW)?);
        windows[1].push(churn.window(true, WINDOW)?);
    }
    let mut bars = Vec::new();
    for (name, windows) in ["no changes", "10,000 changes a second"].into_iter().zip(&windows) {
        let of = |value: fn(&Window) -> f64| Summary::of(&windows.iter().map(value).collect::<Vec<_>>());
        let [longest, seldom] = [of(|w| w.longest), of(|w| w.seldom)].map(|summary| summary.context("no windows"));
        let (longest, seldom) = (longest?, seldom?);
        let sum = |value: fn(&Window) -> u64| windows.iter().map(value).sum::<u64>();
        let (packets, changes) = (sum(|w| w.packets), sum(|w| w.changes));
        let wrong = sum(|w| w.misrouted) + sum(|w| w.exceptions);
        println!(
            "  {name:23}  longest pause median {:.0} us ({:.0} to {:.0})  one batch in 10,000 above {:.1} us  {changes} \
             changes  {packets} packets, {wrong} not as they should",
            longest.median, longest.floor, longest.high, seldom.median
        );
        ensure!(wrong == 0, "{wrong} packets were misrouted or handed to Linux");
        bars.push(Bar { label: name.into(), value: seldom.median, low: seldom.floor, high: seldom.high });
    }
    report
        .section("A worker's pauses while routes change")
        .text(
            "Time between two batches that one in ten thousand is longer than, ports in memory. The longest pauses, in the \
             figures beside this report, are other work on the core.",
        )
        .bars("microseconds, median, floor to 90th percentile", "us", &bars)?;
    findings.keep("stalls", windows);
    Ok(())
}

/// Tables whose writer and readers are in one process; they cannot grow.
struct Fixed(Arc<HeapBacking>);

// SAFETY: the memory is that of `HeapBacking`, which nobody lets grow once it is shared.
unsafe impl Backing for Fixed {
    fn tables(&self) -> &RawTables {
        self.0.tables()
    }

    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), GrowError> {
        if elements <= self.view().elements(table) {
            return Ok(());
        }
        Err(GrowError { table, elements, cause: "these tables have a fixed size".into() })
    }

    fn brake(&self) -> Brake {
        self.0.brake()
    }
}

/// What becomes of a route while tables change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stays,
    /// Leads to one neighbour or the other
    Turns,
    /// Is there or not
    Comes,
}

struct Route {
    prefix: (IpAddr, u8),
    kind: Kind,
    /// Neighbours by number
    hops: [u32; 2],
    changed: bool,
}

/// A router whose routes change.
pub struct Churn {
    writer: TableWriter<Fixed, Grace>,
    engine: Engine<HeapBacking>,
    linux: Exceptions,
    hops: Vec<Leaf>,
    routes: Vec<Route>,
    frames: Arc<[[u8; FRAME]]>,
    allowed: Arc<[u64]>,
    random: Random,
}

impl Churn {
    /// A router with so many routes; a third of them may turn, a third may come and go. What is in none of them has a
    /// default route.
    pub fn new(count: usize) -> Result<Self> {
        let core = usable_cores()?.last().copied().context("no core")?;
        let sizes = initial_elements(core.0 as usize + 1).with(TableId::Nodes, LINES);
        let tables = Arc::new(HeapBacking::new(sizes));
        let linux = Exceptions::default();
        let equip = |_: Core| (Pool::new(4 * BATCH, STRIDE), Box::new(linux.clone()) as _);
        let engine = Engine::start(&tables, &[core], 0, equip)?;
        let mut writer = TableWriter::create(Fixed(tables), engine.grace())?;
        let hops = memory::router(&mut writer)?;
        let mut random = Random(5);
        let prefixes = routes::ipv4(count);
        let destinations = routes::destinations(&prefixes, DESTINATIONS);
        let mut routes: Vec<_> = prefixes.into_iter().map(|prefix| Route::new(prefix, &mut random)).collect();
        routes.push(Route { kind: Kind::Stays, ..Route::new(("0.0.0.0".parse()?, 0), &mut random) });
        let by_prefix: HashMap<_, _> = routes.iter().map(|route| (route.prefix, route)).collect();
        let allowed = destinations.iter().map(|destination| allowed(&by_prefix, *destination)).collect();
        let frames = destinations.iter().zip(0..).map(|(destination, number)| numbered(*destination, number)).collect();
        let mut churn = Self { writer, engine, linux, hops, routes, frames, allowed, random };
        (0..churn.routes.len()).try_for_each(|place| churn.set(place))?;
        churn.publish()?;
        Ok(churn)
    }

    fn set(&mut self, place: usize) -> Result<()> {
        let Route { prefix: (address, length), hops, changed, .. } = self.routes[place];
        let leaf = self.hops[hops[usize::from(changed)] as usize];
        self.writer.route_set(memory::root(address), address, length, Entry { leaf, level: 0 })?;
        Ok(())
    }

    /// Changes a route drawn at random.
    fn change(&mut self) -> Result<()> {
        let place = loop {
            let place = self.random.below(self.routes.len() as u32) as usize;
            if self.routes[place].kind != Kind::Stays {
                break place;
            }
        };
        let route = &mut self.routes[place];
        route.changed = !route.changed;
        if route.kind == Kind::Comes && route.changed {
            let (address, length) = route.prefix;
            self.writer.route_remove(memory::root(address), address, length)?.context("it was there")?;
            return Ok(());
        }
        self.set(place)
    }

    fn publish(&mut self) -> Result<()> {
        let full = self.writer.publish().full;
        ensure!(full.is_empty(), "{} tables are full", full.len());
        // At once, so that what a worker still looks at would soon be written anew.
        self.writer.reclaim();
        Ok(())
    }

    /// Has the worker forward for a while, with or without changes.
    pub fn window(&mut self, changing: bool, length: Duration) -> Result<Window> {
        let (report, reports) = channel();
        for (ifindex, frames) in [(OUTSIDE, Arc::from([])), (INSIDE, self.frames.clone())] {
            let driver = Box::new(MemoryPort(Checked::new(frames, self.allowed.clone(), report.clone())));
            ensure!(self.engine.add(0, Port { ifindex, slot: ifindex, driver }), "the worker is gone");
        }
        drop(report);
        let mut changes = 0;
        let (start, mut next) = (Instant::now(), Duration::ZERO);
        while start.elapsed() < length {
            if changing {
                (0..BURST).try_for_each(|_| self.change())?;
                self.publish()?;
                changes += u64::from(BURST);
            }
            next += BURSTS;
            std::thread::sleep(next.saturating_sub(start.elapsed()));
        }
        [INSIDE, OUTSIDE].into_iter().for_each(|ifindex| self.engine.remove(ifindex));
        Ok(self.summary(&reports, changes))
    }

    fn summary(&self, reports: &Receiver<Seen>, changes: u64) -> Window {
        let (mut packets, mut misrouted, mut gaps) = (0, 0, Vec::new());
        for seen in reports {
            packets += seen.packets;
            misrouted += seen.misrouted;
            gaps.extend(seen.gaps.into_iter().map(|gap| f64::from(gap) / 1000.0));
        }
        gaps.sort_by(f64::total_cmp);
        let [longest, seldom] = [100.0, 99.99].map(|percent| percentile(&gaps, percent).unwrap_or_default());
        Window { changes, packets, misrouted, exceptions: self.linux.take().len() as u64, longest, seldom }
    }
}

impl Route {
    fn new(prefix: (IpAddr, u8), random: &mut Random) -> Self {
        let kind = [Kind::Stays, Kind::Turns, Kind::Comes][random.below(3) as usize];
        Self { prefix, kind, hops: [(); 2].map(|()| random.below(NEXTHOPS)), changed: false }
    }
}

/// The neighbours that packets to this destination may be sent to at some time, a bit for each.
fn allowed(routes: &HashMap<(IpAddr, u8), &Route>, destination: IpAddr) -> u64 {
    let IpAddr::V4(destination) = destination else { return 0 };
    let mut hops = 0;
    for length in (0..=32).rev() {
        let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
        let prefix = (IpAddr::V4((destination.to_bits() & mask).into()), length);
        let Some(route) = routes.get(&prefix) else { continue };
        hops |= 1 << route.hops[0];
        match route.kind {
            Kind::Stays => return hops,
            Kind::Turns => return hops | 1 << route.hops[1],
            Kind::Comes => {}
        }
    }
    hops
}

/// A packet that says which it is, in its last bytes.
fn numbered(destination: IpAddr, number: u32) -> [u8; FRAME] {
    let mut frame = memory::frame(destination);
    frame[FRAME - 4..].copy_from_slice(&number.to_ne_bytes());
    frame
}

/// What a port has seen.
#[derive(Default)]
struct Seen {
    packets: u64,
    misrouted: u64,
    /// Nanoseconds between two batches, at most about four seconds
    gaps: Vec<u32>,
}

/// Packets without end, or none, and those that leave, checked; reported when the port closes.
struct Checked {
    frames: Arc<[[u8; FRAME]]>,
    allowed: Arc<[u64]>,
    at: usize,
    batch: Option<Instant>,
    seen: Seen,
    report: Sender<Seen>,
}

impl Checked {
    fn new(frames: Arc<[[u8; FRAME]]>, allowed: Arc<[u64]>, report: Sender<Seen>) -> Self {
        Self { frames, allowed, at: 0, batch: None, seen: Seen::default(), report }
    }

    fn is_allowed(&self, frame: &[u8]) -> Option<bool> {
        let number = u32::from_ne_bytes(*frame.last_chunk()?);
        Some(self.allowed.get(number as usize)? >> frame.get(5)? & 1 == 1)
    }
}

impl Wire for Checked {
    fn arrive(&mut self, buffer: &mut Buffer) -> bool {
        let Some(frame) = self.frames.get(self.at) else { return false };
        if self.at.is_multiple_of(BATCH) {
            let now = Instant::now();
            let gap = self.batch.replace(now).map(|before| now - before);
            self.seen.gaps.extend(gap.map(|gap| gap.as_nanos() as u32));
        }
        self.at = (self.at + 1) % self.frames.len();
        buffer.resize(FRAME).copy_from_slice(frame);
        true
    }

    fn leave(&mut self, frame: &[u8]) -> bool {
        self.seen.packets += 1;
        self.seen.misrouted += u64::from(self.is_allowed(frame) != Some(true));
        true
    }
}

impl Drop for Checked {
    fn drop(&mut self) {
        // Nobody asks any more if a window was broken off.
        let _ = self.report.send(std::mem::take(&mut self.seen));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_packet_is_misrouted_while_routes_change() {
        let mut churn = Churn::new(20_000).unwrap();
        let window = churn.window(true, WINDOW).unwrap();
        assert_eq!((window.misrouted, window.exceptions), (0, 0), "{window:?}");
        assert!(window.packets > 10_000 && window.changes > 500, "{window:?}");
    }
}
