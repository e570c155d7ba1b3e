//! What a forwarded packet costs a worker of the user engine: ports in memory, one core, no kernel, beside DPDK's l3fwd.
//! The contenders' windows alternate in every round.

use crate::dpdk::{self, Hugepages};
use crate::findings::{Aim, Findings};
use crate::memory::{self, FRAME, INSIDE, OUTSIDE, STRIDE, frame};
use crate::path::{pin, thread_time};
use crate::routes;
use crate::stats::Summary;
use anyhow::{Context, Result};
use serde::Serialize;
use std::net::IpAddr;
use std::sync::Arc;
use towpath_pipeline::SlotSet;
use towpath_pipeline::{Verdict, process};
use towpath_report::{Bar, Report};
use towpath_tables::backing::{HeapBacking, initial_elements};
use towpath_tables::grace::NoReaders;
use towpath_tables::mix::Random;
use towpath_tables::rib::Entry;
use towpath_tables::writer::TableWriter;
use towpath_user::memory::{MemoryPort, Nowhere, Wire};
use towpath_user::{BATCH, Buffer, Pool, Port, PortDriver, TableSource, Worker};

const CORE: usize = 0;
const DESTINATIONS: usize = 1 << 18;
/// Packets of a window
const WINDOW: usize = 1 << 17;

/// A contender with one table.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    case: Case,
    contender: &'static str,
    /// Nanoseconds a packet
    cost: Summary,
    /// How many times that is what the worker took in the same round
    to_worker: Summary,
}

/// What every contender gets.
#[derive(Clone, Copy, Debug, Serialize)]
struct Case {
    family: &'static str,
    routes: usize,
    memory: Memory,
}

/// Where tables and buffers lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Memory {
    SmallPages,
    Hugepages,
}

impl Memory {
    fn name(self) -> &'static str {
        match self {
            Self::SmallPages => "small pages",
            Self::Hugepages => "hugepages",
        }
    }
}

#[derive(Clone, Copy)]
enum Contender {
    /// From port to port, without looking at the frames
    Ports,
    /// The pipeline for one frame after another
    OneByOne,
    /// The worker
    Worker,
    /// DPDK's l3fwd
    Peer,
}

impl Contender {
    const OURS: [Self; 3] = [Self::Ports, Self::OneByOne, Self::Worker];

    fn name(self) -> &'static str {
        match self {
            Self::Ports => "the ports alone",
            Self::OneByOne => "one packet at a time",
            Self::Worker => "Towpath's worker",
            Self::Peer => "DPDK's l3fwd (FIB)",
        }
    }
}

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("user engine, ports in memory: {rounds} rounds of windows of {WINDOW} packets each, {FRAME}-byte frames");
    // A thread of its own, since whatever it starts would stay on the core too.
    let measured = std::thread::spawn(move || measure_all(rounds)).join();
    let cases = measured.map_err(|_| anyhow::anyhow!("the measurement panicked"))??;
    report.section("A worker of the user engine").text(
        "Ports in memory on one core: a buffer is taken from the pool and 60 bytes are copied into it for each packet that \
         arrives, and it is given back for each that leaves; l3fwd's net_null ports are given the same frames in the same \
         way. CPU time of the thread per packet, windows of all contenders alternating.",
    );
    for outcomes in &cases {
        let bars: Vec<Bar> = outcomes.iter().map(Outcome::bar).collect();
        let Some(Outcome { case, .. }) = outcomes.first() else { continue };
        report.bars(&format!("{}: ns per packet, median, floor to 90th percentile", case.name()), "ns", &bars)?;
        if let Some(peer) = outcomes.iter().find(|outcome| outcome.contender == Contender::Peer.name()) {
            let what = format!("user engine, {}: times faster than DPDK's l3fwd", case.name());
            findings.goal(what, peer.to_worker.median, Aim::AtLeast(1.2));
        }
    }
    findings.keep("user", cases.concat());
    Ok(())
}

fn measure_all(rounds: usize) -> Result<Vec<Vec<Outcome>>> {
    pin(0, CORE)?;
    let peer = dpdk::check();
    if let Err(error) = &peer {
        println!("  without DPDK beside it: {error:#}");
    }
    let hugepages = Hugepages::reserve();
    if hugepages.is_none() {
        println!("  small pages only: this machine grants no hugepages");
    }
    let mut all = Vec::new();
    for memory in [Memory::SmallPages, Memory::Hugepages] {
        if memory == Memory::Hugepages && hugepages.is_none() {
            continue;
        }
        allow_hugepages(memory == Memory::Hugepages)?;
        for (family, routes) in [
            ("IPv4", routes::ipv4(1)),
            ("IPv4", routes::ipv4(1_000_000)),
            ("IPv6", routes::ipv6(1)),
            ("IPv6", routes::ipv6(250_000)),
        ] {
            let case = Case { family, routes: routes.len(), memory };
            all.push(measure(case, &routes, rounds, peer.is_ok() && family == "IPv4")?);
        }
    }
    Ok(all)
}

/// Whether what this process allocates from now on may lie in hugepages.
fn allow_hugepages(allowed: bool) -> Result<()> {
    // SAFETY: no pointers.
    match unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, libc::c_ulong::from(!allowed), 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context("cannot choose the size of pages"),
    }
}

impl Case {
    fn name(&self) -> String {
        format!(
            "{}, {} route{}, {}",
            self.family,
            self.routes,
            if self.routes == 1 { "" } else { "s" },
            self.memory.name()
        )
    }
}

impl Outcome {
    fn bar(&self) -> Bar {
        Bar { label: self.contender.into(), value: self.cost.median, low: self.cost.floor, high: self.cost.high }
    }
}

fn measure(case: Case, all: &[(IpAddr, u8)], rounds: usize, with_peer: bool) -> Result<Vec<Outcome>> {
    let tables = Arc::new(tables(all)?);
    let count = if all.len() == 1 { 1 } else { DESTINATIONS };
    let frames: Arc<[[u8; FRAME]]> = routes::destinations(all, count).into_iter().map(frame).collect();
    let peer = with_peer.then(|| dpdk::Peer::start(CORE, case.memory == Memory::Hugepages, all, &frames, WINDOW));
    let mut peer = peer.transpose()?;
    let mut bench = Bench::new(tables, &frames);
    let contenders: Vec<_> = Contender::OURS.into_iter().chain(peer.as_ref().map(|_| Contender::Peer)).collect();
    let mut costs = vec![Vec::new(); contenders.len()];
    // One round to warm caches; it is not counted.
    for round in 0..=rounds {
        for (contender, costs) in contenders.iter().zip(&mut costs) {
            let cost = match &mut peer {
                Some(peer) if matches!(contender, Contender::Peer) => peer.window()?,
                _ => bench.window(*contender)?,
            };
            if round > 0 {
                costs.push(cost);
            }
        }
    }
    println!("{}:", case.name());
    let worker = contenders.iter().position(|contender| matches!(contender, Contender::Worker));
    let worker = costs.get(worker.context("a worker")?).cloned().unwrap_or_default();
    let summarise = |(contender, costs): (&Contender, &Vec<f64>)| {
        let cost = Summary::of(costs).context("no windows")?;
        let ratios: Vec<f64> = costs.iter().zip(&worker).map(|(cost, worker)| cost / worker).collect();
        let to_worker = Summary::of(&ratios).context("no windows")?;
        let (floor, median, high) = (cost.floor, cost.median, cost.high);
        println!(
            "  {:22} floor {floor:5.1} ns  median {median:5.1} ns  90th {high:5.1} ns  to the worker {:.2} ({:.2} to {:.2})",
            contender.name(),
            to_worker.median,
            to_worker.floor,
            to_worker.high
        );
        Ok(Outcome { case, contender: contender.name(), cost, to_worker })
    };
    contenders.iter().zip(&costs).map(summarise).collect()
}

/// A router with these routes.
fn tables(all: &[(IpAddr, u8)]) -> Result<HeapBacking> {
    let mut writer = TableWriter::create(HeapBacking::new(initial_elements(1)), NoReaders)?;
    let hops = memory::router(&mut writer)?;
    let mut random = Random(3);
    for (address, length) in all {
        let leaf = hops[random.below(memory::NEXTHOPS) as usize];
        writer.route_set(memory::root(*address), *address, *length, Entry { leaf, level: 0 })?;
    }
    writer.reserve()?;
    let full = writer.publish().full;
    anyhow::ensure!(full.is_empty(), "{} tables are full", full.len());
    Ok(writer.into_backing())
}

/// Frames to come, again and again from the first one on, and those that have left.
struct Replay {
    frames: Arc<[[u8; FRAME]]>,
    at: usize,
    left: Arc<std::sync::atomic::AtomicUsize>,
}

impl Wire for Replay {
    #[inline]
    fn arrive(&mut self, buffer: &mut Buffer) -> bool {
        let Some(frame) = self.frames.get(self.at) else { return false };
        self.at = if self.at + 1 == self.frames.len() { 0 } else { self.at + 1 };
        buffer.resize(FRAME).copy_from_slice(frame);
        true
    }

    #[inline]
    fn leave(&mut self, frame: &[u8]) -> bool {
        // One worker: a load and a store are enough, as for a ring's index.
        use std::sync::atomic::Ordering::Relaxed;
        self.left.store(self.left.load(Relaxed) + usize::from(frame.len() == FRAME), Relaxed);
        true
    }
}

struct Bench {
    tables: Arc<HeapBacking>,
    left: Arc<std::sync::atomic::AtomicUsize>,
    worker: Worker<HeapBacking>,
    pool: Pool,
    inside: MemoryPort<Replay>,
    outside: MemoryPort<Replay>,
    frames: Vec<Buffer>,
}

impl Bench {
    fn new(tables: Arc<HeapBacking>, frames: &Arc<[[u8; FRAME]]>) -> Self {
        let left = Arc::default();
        let port = |frames: &Arc<[_]>| MemoryPort(Replay { frames: frames.clone(), at: 0, left: Arc::clone(&left) });
        let (none, pool) = (Arc::from([]), || Pool::new(4 * BATCH, STRIDE));
        let mut worker = Worker::new(tables.clone(), 0, pool(), Box::new(Nowhere));
        worker.add(Port { ifindex: INSIDE, slot: INSIDE, driver: Box::new(port(frames)) });
        worker.add(Port { ifindex: OUTSIDE, slot: OUTSIDE, driver: Box::new(port(&none)) });
        let (inside, outside) = (port(frames), port(&none));
        Self { tables, worker, pool: pool(), inside, outside, frames: Vec::with_capacity(BATCH), left }
    }

    /// Nanoseconds a packet.
    fn window(&mut self, contender: Contender) -> Result<f64> {
        use std::sync::atomic::Ordering::Relaxed;
        self.left.store(0, Relaxed);
        let start = thread_time()?;
        for _ in 0..WINDOW / BATCH {
            match contender {
                Contender::Ports => self.pass(),
                Contender::OneByOne => self.one_by_one(),
                Contender::Worker => {
                    self.worker.enter();
                    self.worker.turn();
                    self.worker.leave();
                }
                Contender::Peer => anyhow::bail!("a process of its own"),
            }
        }
        let spent = thread_time()? - start;
        let left = self.left.load(Relaxed);
        anyhow::ensure!(left == WINDOW, "{}: {left} of {WINDOW} packets left", contender.name());
        Ok(spent.as_nanos() as f64 / WINDOW as f64)
    }

    fn pass(&mut self) {
        self.inside.receive(&mut self.pool, &mut self.frames);
        self.outside.transmit(&mut self.pool, &mut self.frames);
    }

    fn one_by_one(&mut self) {
        self.inside.receive(&mut self.pool, &mut self.frames);
        let tables = self.tables.seen(0, SlotSet::ALL);
        let forwarded = |frame: &mut Buffer| process(frame, &tables, INSIDE) == Verdict::Forward(OUTSIDE);
        if self.frames.iter_mut().all(forwarded) {
            self.outside.transmit(&mut self.pool, &mut self.frames);
        }
        self.frames.drain(..).for_each(|frame| self.pool.give(frame));
    }
}
