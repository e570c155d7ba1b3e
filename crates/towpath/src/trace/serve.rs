//! The daemon's part of traces: has the program tell what becomes of packets, and finds out why by sending each through the
//! pipeline once more, over the tables as they are by then.

use super::dissect::{Dissected, Packet, dissect, has_ports};
use super::expression;
use crate::control::{self, Wanted};
use crate::daemon::{Daemon, Event};
use crate::explain::{Explained, HEADROOM, Ingress, Names, Subject, explain_frame};
use crate::lookout::WorkersTrace;
use crate::report::{Became, Drawn, TraceBegun, TraceLine, TracedPacket, Verdict};
use crate::source::thread;
use crate::words;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use towpath_engine::{Frames, Ring, Seen, Trace};
use towpath_fpc::{PortKind, Tunnel};
use towpath_pipeline::{Beside, packet};
use towpath_tables::clock;
use towpath_tables::trace::{Outcome, TRACES, Traced, Wanted as Gated};
use towpath_tables::{Reason, Tuple};

/// Lines that wait for a client; more are missed.
const LINES: usize = 64;
/// Between two looks whether there are still traces.
const PATIENCE: Duration = Duration::from_millis(200);
/// Longest frame, whatever a record says.
const LONGEST: usize = 1 << 17;

/// The traces that run.
#[derive(Default)]
pub struct Traces {
    running: [Option<Running>; TRACES],
    reader: Option<Reader>,
}

struct Running {
    /// Its client
    client: u64,
    /// Packets are told in brief
    brief: bool,
    lines: SyncSender<String>,
    /// Packets that the client was too slow for
    missed: u64,
    /// What it sees of workers
    workers: Arc<WorkersTrace>,
}

impl Traces {
    /// Those that run, by number, as far as they are about workers.
    pub fn of_workers(&self) -> impl Iterator<Item = (usize, Arc<WorkersTrace>)> {
        self.running
            .iter()
            .enumerate()
            .filter_map(|(number, running)| Some((number, running.as_ref()?.workers.clone())))
    }
}

/// The thread that takes what the program tells; it ends with this.
struct Reader(Arc<AtomicBool>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

impl Reader {
    fn start(ring: Ring, events: SyncSender<Event>) -> Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let told = ended.clone();
        thread("traces", move || read(ring, &told, &events))?;
        Ok(Self(ended))
    }
}

fn read(mut ring: Ring, ended: &AtomicBool, events: &SyncSender<Event>) {
    while !ended.load(Relaxed) {
        match ring.wait(PATIENCE) {
            Ok(packets) if packets.is_empty() => {}
            Ok(packets) => {
                if events.send(Event::Traced(packets)).is_err() {
                    return;
                }
            }
            Err(error) => return tracing::warn!("{error}"),
        }
    }
}

/// Serves a client that traces until either side has had enough. Whatever the client does, or if it dies, the trace ends.
pub fn stream(wanted: Wanted, mut client: UnixStream, events: &SyncSender<Event>) -> Result<()> {
    static CLIENTS: AtomicU64 = AtomicU64::new(0);
    let number = CLIENTS.fetch_add(1, Relaxed);
    let (lines, told) = sync_channel(LINES);
    events.send(Event::TraceBegin(number, wanted, lines))?;
    let (mut input, leaves) = (client.try_clone()?, events.clone());
    input.set_read_timeout(None)?;
    thread("tracing", move || {
        while input.read(&mut [0; 64]).is_ok_and(|length| length > 0) {}
        let _ = leaves.send(Event::TraceEnd(number));
    })?;
    let result = told.iter().try_for_each(|line: String| {
        client.write_all(line.as_bytes())?;
        client.write_all(b"\n")
    });
    let _ = client.shutdown(Shutdown::Both);
    Ok(result?)
}

impl Daemon {
    /// Begins a trace; the first line says so, or why not.
    pub fn begin_trace(&mut self, client: u64, wanted: Wanted, lines: SyncSender<String>) {
        let begun = self.start_trace(client, wanted, lines.clone());
        let _ = lines.try_send(control::answer(begun));
    }

    fn start_trace(&mut self, client: u64, wanted: Wanted, lines: SyncSender<String>) -> Result<TraceBegun> {
        let free = self.traces.running.iter().position(Option::is_none);
        let number = free.with_context(|| format!("{TRACES} traces run already; more are not run at once"))?;
        let trace = Trace {
            frames: match (wanted.one_in, wanted.filter) {
                (Some(number), _) => Frames::OneIn(number),
                (None, Some(filter)) => Frames::Matching(expression::filter(filter)?),
                (None, None) => Frames::All,
            },
            wanted: gated(wanted.exceptions, wanted.reason.as_deref())?,
            rate: wanted.rate,
        };
        let first = self.traces.running.iter().all(Option::is_none);
        let workers = Arc::new(WorkersTrace::new(&trace));
        self.engine.set_trace(number, Some(trace)).context("this trace cannot be run")?;
        if first && let Err(error) = self.open_ring() {
            self.engine.set_trace(number, None)?;
            return Err(error);
        }
        let brief = wanted.one_in.is_some();
        self.traces.running[number] = Some(Running { client, brief, lines, missed: 0, workers });
        self.look_out();
        Ok(TraceBegun {})
    }

    fn open_ring(&mut self) -> Result<()> {
        let ring = self.engine.trace_ring()?.context("the traces have just ended")?;
        self.traces.reader = Some(Reader::start(ring, self.events.clone())?);
        Ok(())
    }

    /// Ends the trace of a client, and says what it has met; nothing if there is none.
    pub fn end_trace(&mut self, client: u64) {
        let of_client = |running: &Option<Running>| running.as_ref().is_some_and(|running| running.client == client);
        let Some(number) = self.traces.running.iter().position(of_client) else { return };
        let Some(running) = self.traces.running[number].take() else { return };
        self.look_out();
        let Seen { matched, missed } = self.seen(number, &running);
        let _ = running.lines.try_send(control::answer(Ok(TraceLine::End { matched, missed })));
        drop(running);
        if self.traces.running.iter().all(Option::is_none) {
            self.traces.reader = None;
        }
        if let Err(error) = self.engine.set_trace(number, None) {
            tracing::warn!("a trace that has ended goes on in the program: {error}");
        }
    }

    /// What a trace has met, and not told.
    fn seen(&self, number: usize, running: &Running) -> Seen {
        let (program, workers) = (self.engine.traced(number).unwrap_or_default(), running.workers.seen());
        let missed = program.missed + workers.missed + running.missed;
        Seen { matched: program.matched + workers.matched, missed }
    }

    /// Tells the traces of packets.
    pub fn tell_traces(&mut self, packets: &[Traced]) {
        let missed = |number: usize| {
            let running = self.traces.running[number].as_ref();
            running.map_or(0, |running| self.seen(number, running).missed - running.missed)
        };
        let missed = std::array::from_fn::<_, TRACES, _>(missed);
        let brief = self.traces.running.iter().flatten().any(|running| running.brief);
        for traced in packets {
            let Some(told) = self.explain_traced(traced) else { continue };
            let prefix = told.destination.filter(|_| brief).and_then(|destination| self.prefix(destination));
            for (number, running) in self.traces.running.iter_mut().enumerate() {
                let Some(running) = running.as_mut().filter(|_| traced.traces >> number & 1 != 0) else { continue };
                let missed = missed[number] + running.missed;
                let line = match running.brief {
                    true => TraceLine::Drawn(told.in_brief(prefix.clone(), missed)),
                    false => TraceLine::Packet(Box::new(TracedPacket { missed, ..told.packet.clone() })),
                };
                running.missed += u64::from(running.lines.try_send(control::answer(Ok(line))).is_err());
            }
        }
    }

    fn explain_traced(&self, traced: &Traced) -> Option<Told> {
        let outcome = Outcome::from_word(traced.outcome)?;
        let head = traced.head.get(..traced.head_len as usize)?;
        let beside = (traced.partial & Traced::HAS_TAG != 0).then_some(((traced.tag >> 16) as u16, traced.tag as u16));
        let dissected = dissect(head, beside)?;
        let (ingress, subject) = self.arrival(traced, &dissected);
        let known = subject.unwrap_or(NO_SUBJECT);
        let view = self.fpm.tables().view();
        let mut explained = explain_frame(whole(traced, head, beside), known, &ingress, view, self);
        if outcome == Outcome::Exception(Reason::PolicyCapture) && explained.result.is_ok() {
            self.captured(&mut explained);
        }
        let offset = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
        Some(Told {
            outcome,
            destination: explained.destination.or(subject.map(|subject| subject.tuple.destination)),
            packet: TracedPacket {
                time_ns: offset.saturating_sub(clock::exact().saturating_sub(traced.time)),
                port: self.interface(traced.ifindex),
                queue: traced.queue,
                length: traced.total_len,
                packet: dissected.packet.map(|packet| summary(&packet.subject)),
                agrees: agrees(outcome, &explained),
                became: self.became(outcome),
                explanation: explained.explanation,
                missed: 0,
            },
        })
    }

    /// Puts in what the pipeline knows nothing of: that a capture's filter has matched before.
    fn captured(&self, explained: &mut Explained) {
        let (reason, details) = (Reason::PolicyCapture, self.filters().into_iter().map(|policy| policy.detail.clone()));
        let detail = details.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(" or ");
        explained.result = Err(reason);
        explained.explanation.verdict =
            Verdict::Linux { reason: reason.name().into(), text: reason.text().into(), detail: Some(detail) };
    }

    /// Where a frame came in, and the ends of the packet that the look-up is about.
    fn arrival(&self, traced: &Traced, dissected: &Dissected) -> (Ingress, Option<Subject>) {
        let mut port = traced.ifindex;
        for (protocol, id) in &dissected.tags {
            let tagged = PortKind::Vlan { lower: port, protocol: *protocol, id: *id };
            match self.fpm.interfaces().find(|interface| interface.kind == tagged) {
                Some(interface) => port = interface.ifindex,
                None => break,
            }
        }
        let outer = dissected.packet;
        let tunnelled = outer.as_ref().and_then(|outer| self.tunnel_of(outer));
        let mac = self.fpm.interfaces().find(|interface| interface.ifindex == traced.ifindex).and_then(|port| port.mac);
        let because = format!("received on queue {} by core {}", traced.queue, traced.cpu);
        let tags = dissected.tags.clone();
        let (port, tunnel, subject) = match tunnelled {
            Some((port, tunnel, subject)) => (port, Some(tunnel), Some(subject)),
            None => (port, None, outer.map(|outer| outer.subject)),
        };
        (Ingress { device: traced.ifindex, port, tags, mac: mac.unwrap_or_default(), tunnel, because }, subject)
    }

    /// The tunnel that a packet comes out of, and what is in it.
    fn tunnel_of(&self, outer: &Packet) -> Option<(u32, Tunnel, Subject)> {
        let inner = outer.inner()?;
        let Tuple { source, destination, .. } = outer.subject.tuple;
        self.fpm.interfaces().find_map(|interface| match interface.kind {
            PortKind::Tunnel(tunnel)
                if tunnel.local == destination && tunnel.remote == source && tunnel.input.key == inner.key =>
            {
                Some((interface.ifindex, tunnel, inner.packet.subject))
            }
            _ => None,
        })
    }

    fn became(&self, outcome: Outcome) -> Became {
        let linux = |reason: &str, text: &str| Became::Linux { reason: reason.into(), text: text.into() };
        match outcome {
            Outcome::Forward(slot) => Became::Fast { port: self.interface_in(slot) },
            Outcome::Exception(reason) => linux(reason.name(), reason.text()),
            Outcome::NotAPort => linux("not-a-port", "it came in by an interface that is not in the tables"),
        }
    }

    fn interface_in(&self, slot: u32) -> String {
        let port = self.fpm.ports().find(|state| state.slot == slot);
        port.map_or_else(|| format!("slot {slot}"), |state| state.port.name.clone())
    }
}

/// What is told of a packet.
struct Told {
    outcome: Outcome,
    /// Where it goes, if it is an IP packet
    destination: Option<IpAddr>,
    packet: TracedPacket,
}

impl Told {
    fn in_brief(&self, prefix: Option<String>, missed: u64) -> Drawn {
        let (fast, length) = (matches!(self.outcome, Outcome::Forward(_)), self.packet.length);
        Drawn { time_ns: self.packet.time_ns, prefix, fast, length, missed }
    }
}

/// Of a frame that has no IP packet in it.
const NO_SUBJECT: Subject = Subject {
    tuple: Tuple {
        source: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        destination: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        source_port: 0,
        destination_port: 0,
        protocol: 0,
    },
    ttl: 0,
};

fn gated(exceptions: bool, reason: Option<&str>) -> Result<Gated> {
    match reason {
        None if exceptions => Ok(Gated::Exceptions),
        None => Ok(Gated::Everything),
        Some(name) => match Reason::ALL.iter().find(|reason| reason.name() == name) {
            Some(reason) => Ok(Gated::For(*reason)),
            None => bail!("{name:?} is no reason"),
        },
    }
}

/// The frame as it arrived; what is not known of it is zeros behind all headers.
fn whole(traced: &Traced, head: &[u8], tag: Option<(u16, u16)>) -> packet::Packet {
    let mut frame = head.to_vec();
    frame.resize((traced.total_len as usize).min(LONGEST), 0);
    let partial = match traced.partial & 3 {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    };
    packet::Packet::with_linear(&frame, HEADROOM, traced.first_len as usize).with_beside(Beside { partial, tag })
}

/// Whether the pipeline came to the same again; captures are not asked again.
fn agrees(outcome: Outcome, explained: &Explained) -> bool {
    match (outcome, explained.result) {
        (Outcome::Forward(slot), result) => result == Ok(slot),
        (Outcome::Exception(reason), result) => result == Err(reason),
        (Outcome::NotAPort, result) => result == Err(Reason::PortNotReady),
    }
}

/// Ends and protocol of a packet.
fn summary(Subject { tuple, .. }: &Subject) -> String {
    let end = |address: IpAddr, port| match has_ports(tuple.protocol) {
        true => SocketAddr::new(address, port).to_string(),
        false => address.to_string(),
    };
    let protocol = words::transport(tuple.protocol);
    let (from, to) = (end(tuple.source, tuple.source_port), end(tuple.destination, tuple.destination_port));
    format!("{from} > {to} {protocol}")
}
