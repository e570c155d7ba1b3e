//! The daemon: joins the cache manager, the fast path manager and the engine. One thread owns the tables: it takes
//! events from an inbox, brings the tables in line, and answers questions between two batches.

use crate::answer::Facts;
use crate::captures::Captures;
use crate::cli::{self, Serve};
use crate::control::{self, Request, Wanted as WantedTrace};
use crate::explain::Names;
use crate::flows::{self, Flows};
use crate::follow::{Keeper, Told};
use crate::instance::Instance;
use crate::interfaces;
use crate::link::Remote;
use crate::metrics::Endpoint;
use crate::notify::Manager;
use crate::ports::Wanted;
use crate::read::connect;
use crate::resyncs::Resyncs;
use crate::sentry::Sentry;
use crate::signals::Termination;
use crate::source::{Inbound, Running, Source, thread};
use crate::trace::{self, Traces};
use crate::wires::{LARGEST_MTU, PortArgument};
use crate::workers::{Grace, Plan, Shared, Workers, statistics_lines};
use anyhow::{Result, bail};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use towpath_cm::FlowMode;
use towpath_engine::{Changed, Engine, Mode, Notice, Options, PortRequest, Site, TransmitWatch};
use towpath_fpc::codec::Packet;
use towpath_fpc::{Alarm, AlarmId, Message, Policy, PolicySource, Scope, Snapshot};
use towpath_fpm::Fpm;
use towpath_hitflags::{HitFlags, Netlink};
use towpath_tables::Reason;
use towpath_tables::backing::{Backing, initial_elements};
use towpath_tables::record::{Family, PORT_PROBES, PORT_SLOTS, TableId};
use towpath_tables::trace::Traced;
use towpath_tables::writer::TableWriter;

/// Batches and questions that may wait; beyond that their senders do.
const INBOX: usize = 8;
/// How long the first description of everything may take to begin with; it is extended while messages come.
const FIRST_SNAPSHOT: Duration = Duration::from_secs(30);
/// How long a daemon that was asked to end may take.
const ENDING: Duration = Duration::from_secs(30);

/// What reaches the daemon's thread.
pub enum Event {
    /// From the cache manager
    Messages(Vec<Message>),
    /// There are alarms; this wakes the daemon up if it waits
    Alarm,
    /// The messages before it have been applied when this is handled: say so, naming this sequence number
    Acknowledge(u32),
    /// The cache manager in this process has failed
    SourceEnded(String),
    /// The cache manager at the other end of a socket has left
    SourceLost,
    /// Whether ports can transmit may have changed
    Transmit(Changed),
    /// What Linux had let pass before this change of its rules has left
    Settled(u64),
    /// Nobody looks any more at connections that had ended when it began to be waited for
    Reclaimable(u64),
    /// A question and where the answer goes
    Request(Request, SyncSender<String>),
    /// A client, by number, wants packets to be told as lines
    TraceBegin(u64, WantedTrace, SyncSender<String>),
    /// It has had enough
    TraceEnd(u64),
    /// Packets of traces
    Traced(Vec<Traced>),
    /// End, because of this
    Stop(&'static str),
}

/// Everything the daemon's thread owns.
pub struct Daemon {
    pub instance: Instance,
    pub engine: Engine,
    pub fpm: Fpm<Shared, Grace>,
    /// Of the user engine; None with the other one
    pub workers: Option<Workers>,
    pub wanted: Wanted,
    pub facts: Facts,
    pub source: Running,
    pub hits: HitFlags<Keeper>,
    pub flows: Flows,
    pub inbox: Receiver<Event>,
    /// The way into the inbox
    pub events: SyncSender<Event>,
    /// Has the alarms, which overtake what is in the inbox
    pub sentry: Sentry,
    /// An event taken from the inbox that is still to be handled
    pub pending: Option<Event>,
    /// Ports are attached: what happens to them now must be acted on
    pub running: bool,
    /// Ports that have come and are not attached yet
    pub arrivals: BTreeSet<u32>,
    /// A port with mappings has gone
    pub unmapped: bool,
    /// What the engine was told of the ports' devices
    pub told: BTreeMap<u32, Told>,
    /// Classes of objects that are being described anew
    pub resyncing: HashSet<Snapshot>,
    /// How often everything was described anew
    pub resyncs: u64,
    /// How often anything was, by cause
    pub causes: Resyncs,
    /// The cache manager has left, and no other one has described everything since
    pub lost: bool,
    /// Ports that nothing can be redirected to, and why
    pub cannot_transmit: BTreeMap<u32, String>,
    /// Those last seen, for the log
    pub policies: BTreeSet<Policy>,
    /// Tables that were full when last looked at, for the log
    pub shortages: BTreeSet<TableId>,
    /// Where the captures' filters are
    pub captures: Captures,
    /// Who is told of packets
    pub traces: Traces,
    /// Is told how the daemon is
    pub manager: Manager,
}

/// Why ports cannot be served.
enum Refused {
    /// Because of this one's sockets
    Port(u32, anyhow::Error),
    /// The engine says which
    Engine(towpath_engine::Error),
}

/// A port that the tables have no place for.
#[derive(thiserror::Error, Debug)]
#[error(
    "{port} (index {ifindex}): table ports is full for it: the {PORT_PROBES} slots from its index modulo {PORT_SLOTS} on \
     are taken by other ports; leave one of those out, or let the interface have another index \
     (ip link add ... index N, or move it to another namespace and back)"
)]
pub struct NoSlot {
    port: String,
    ifindex: u32,
}

/// Where Linux's state comes from.
pub enum Origin {
    /// A cache manager in this process, which hands over such connections
    InProcess(FlowMode),
    /// One that connects to this socket, or to the instance's own
    Socket(Option<PathBuf>),
    /// One on another host
    Remote(Remote),
}

/// How a command ended.
pub enum Ended {
    /// There is nothing left to do
    Done,
    /// The fast path goes on, and the next daemon is to take it over
    Left,
}

/// `towpath up`, and `towpath fpm`: serves until told to stop.
pub fn run(serve: &Serve, origin: Origin) -> Result<Ended> {
    let instance = Instance::current()?;
    let lock = instance.lock()?;
    let ended = start(serve, origin, &instance).and_then(|daemon| match daemon {
        Some(daemon) => daemon.serve(),
        None => Ok(Ended::Done),
    });
    instance.remove(lock);
    ended
}

/// `towpath down`: asks the daemon to stop, or removes what a killed one left.
pub fn down() -> Result<()> {
    let instance = Instance::current()?;
    let mut asked = false;
    let lock = instance.lock_within(ENDING, || {
        // A daemon that is about to start listens somewhat later.
        if !asked && let Some(mut daemon) = control::Client::connect(&instance.control_socket())? {
            asked = daemon.ask(&Request::Stop)?;
        }
        Ok(())
    })?;
    let removed = Site::prepare(Options::default()).and_then(Site::teardown);
    let device = towpath_fptun::remove();
    instance.remove(lock);
    removed?;
    Ok(device?)
}

/// `towpath leave`: asks the daemon to end as it is, and waits until it has.
pub fn leave() -> Result<()> {
    let instance = Instance::current()?;
    let left = instance.holder();
    let _: bool = connect()?.ask(&Request::Leave)?;
    let deadline = Instant::now() + ENDING;
    while let Some(holder) = instance.holder().filter(|holder| left == Some(*holder)) {
        if Instant::now() > deadline {
            bail!("the daemon (pid {holder}) did not end within {} s", ENDING.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Brings everything up; None if told to stop meanwhile.
fn start(serve: &Serve, origin: Origin, instance: &Instance) -> Result<Option<Daemon>> {
    let termination = Termination::block()?;
    let mode = match &origin {
        Origin::InProcess(mode) => Some(*mode),
        Origin::Socket(_) => None,
        // What another host's Linux accepts is not seen here.
        Origin::Remote(_) => Some(FlowMode::None),
    };
    let flows = flows::Wanted::new(mode, serve.max_flows);
    let user = serve.engine == cli::Engine::User;
    let mode = if serve.generic { Mode::Generic } else { Mode::Native };
    let patience = serve.detach_after.map(|seconds| Duration::from_secs(seconds.into()));
    let options = Options { mode, sockets: user, shadow: serve.shadow, flows: flows.any(), patience };
    let site = Site::prepare(options)?;
    let endpoint = serve.metrics.map(Endpoint::open).transpose()?;
    let interfaces = interfaces::all()?;
    let wanted = Wanted::new(&serve.ports, &interfaces)?;
    let plan = if user { Some(plan(serve, &wanted, &interfaces)?) } else { None };
    // Workers that were killed leave it, and new ones replace it.
    if !user {
        towpath_fptun::remove()?;
    }
    let mut facts = Facts::new(options.mode, options.shadow);
    let wired = serve.ports.iter().filter(|port| serve.detach_after.is_some() && port.wire.is_some());
    wired.for_each(|port| facts.notice(&of_no_use(port)));
    facts.remote = matches!(origin, Origin::Remote(_));
    let (events, inbox) = sync_channel(INBOX);
    let sentry = Sentry::default();
    let watch = sentry.clone();
    thread("sentry", move || watch.watch())?;
    let stop = events.clone();
    thread("signals", move || while stop.send(Event::Stop(termination.wait())).is_ok() {})?;
    let source = match origin {
        Origin::Socket(path) => Source::Socket(path.unwrap_or_else(|| instance.fpc_socket())),
        Origin::Remote(remote) => Source::Remote(remote),
        Origin::InProcess(_) => Source::InProcess(towpath_cm::Options {
            serve: wanted.names(),
            flows: flows.mode.unwrap_or_default(),
            observe: options.shadow,
            ..towpath_cm::Options::default()
        }),
    };
    let source = source.start(Inbound { events: events.clone(), sentry: sentry.clone() })?;
    let keeper = match &source.peer {
        Some(peer) => Keeper::Remote(peer.clone()),
        None => Keeper::Local(Netlink::open()?),
    };
    // Of a shadow's connections Linux itself sees every packet.
    let connections = match (flows.any() && !options.shadow, &source.peer) {
        (false, _) => flows::Keeper::Nobody,
        (true, Some(peer)) => flows::Keeper::Remote(peer.clone()),
        (true, None) => flows::Keeper::local()?,
    };
    let hits = HitFlags::new(keeper, towpath_hitflags::PERIOD, Instant::now());
    // A table of none cannot be made.
    let setup = Setup { plan: plan.as_ref(), flows: flows.room.max(1) as usize };
    let Parts { engine, fpm, workers } = tables(site, options, &setup, &mut facts, &sentry)?;
    let mut daemon = Daemon {
        instance: instance.clone(),
        engine,
        fpm,
        workers,
        wanted,
        facts,
        source,
        hits,
        flows: Flows::new(flows, connections),
        lost: false,
        inbox,
        events: events.clone(),
        sentry,
        pending: None,
        running: false,
        arrivals: BTreeSet::new(),
        unmapped: false,
        told: BTreeMap::new(),
        resyncing: HashSet::new(),
        resyncs: 0,
        causes: Resyncs::default(),
        cannot_transmit: BTreeMap::new(),
        policies: BTreeSet::new(),
        shortages: BTreeSet::new(),
        captures: Captures::default(),
        traces: Traces::default(),
        manager: Manager::new(Instant::now()),
    };
    if !daemon.first_snapshot()? {
        daemon.take_off()?;
        return Ok(None);
    }
    watch_transmit(events.clone())?;
    daemon.attach()?;
    if let Err(error) = daemon.open_control(events, endpoint) {
        // Nobody could ask it anything, or end it.
        daemon.take_off()?;
        return Err(error);
    }
    daemon.announce();
    Ok(Some(daemon))
}

/// What `--detach-after` cannot do for a port with a wire.
fn of_no_use(port: &PortArgument) -> Notice {
    let text = "--detach-after is of no use for it: it has a wire, by which nothing comes in once towpath has died";
    Notice { port: port.name.clone(), text: text.into(), undo: None }
}

/// Follows whether ports can transmit what is redirected to them. Where the kernel announces nothing, those that cannot
/// are asked again now and then.
fn watch_transmit(events: SyncSender<Event>) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(1);
    let mut watch = TransmitWatch::open()?;
    thread("transmit", move || {
        loop {
            let changed = match watch.wait(PATIENCE) {
                Ok(Changed::These(changed)) if watch.announces() && changed.is_empty() => continue,
                Ok(changed) => changed,
                Err(error) => return tracing::warn!("{error}"),
            };
            if events.send(Event::Transmit(changed)).is_err() {
                return;
            }
        }
    })
}

/// What the user engine is to be, from the command line and the interfaces there are.
fn plan(serve: &Serve, wanted: &Wanted, interfaces: &[(String, u32)]) -> Result<Plan> {
    let mut ports = wanted.with_driver();
    let wires = wanted.indices().len() - ports.len();
    if ports.is_empty() && wires == 0 {
        ports.extend(interfaces.iter().filter(|(name, _)| name != "lo").map(|(_, ifindex)| ifindex));
    }
    Plan::new(serve.cores.as_ref().map(|cores| cores.0.as_slice()), &ports, wires)
}

/// What works on the tables.
struct Parts {
    engine: Engine,
    fpm: Fpm<Shared, Grace>,
    workers: Option<Workers>,
}

/// What the tables are to be good for.
struct Setup<'a> {
    plan: Option<&'a Plan>,
    /// Room for connections
    flows: usize,
}

/// The tables a former daemon left if they are whole, else new ones.
fn tables(site: Site, options: Options, setup: &Setup, facts: &mut Facts, sentry: &Sentry) -> Result<Parts> {
    if site.exists() {
        match adopt(site, setup, sentry) {
            Ok(parts) => {
                facts.adopted = true;
                return Ok(parts);
            }
            Err(error) => tracing::warn!("tables of a former daemon are replaced: {error:#}"),
        }
        return create(Site::prepare(options)?, setup, sentry);
    }
    create(site, setup, sentry)
}

/// To take tables over takes a while, in which the programs left forward: the sentry watches from the beginning.
fn adopt(site: Site, setup: &Setup, sentry: &Sentry) -> Result<Parts> {
    let left = site.left()?;
    towpath_tables::adopt::check(&left.config())?;
    // Nobody has followed the rules since.
    left.config().close_flows();
    let room = left.elements(TableId::Flows);
    if room != setup.flows {
        bail!("they have room for {room} connections, and {} are asked for", setup.flows);
    }
    if left.has_captures()? {
        sentry.raise(captures_unknown(), Duration::ZERO);
    }
    sentry.guard(left.config());
    let mut parts = join(left.adopt()?, setup.plan, TableWriter::adopt)?;
    // The programs of a port with mappings run as long as it is the same interface.
    let translated = parts.engine.translated()?;
    for ifindex in parts.fpm.keep_mappings(|ifindex| translated.contains(&ifindex)) {
        tracing::warn!("interface {ifindex} is not what it was: its mappings are ended");
    }
    Ok(parts)
}

/// Everything may be what a capture is to see, until the cache manager has told its first captures.
fn captures_unknown() -> Alarm {
    let (source, reason) = (PolicySource::Capture, Reason::PolicyCapture);
    let detail = "the captures of a former daemon's time are looked for";
    let policy = |family| Policy::new(source, Scope::Family(family), reason, detail);
    Alarm { id: AlarmId { source, number: 0 }, policies: Family::ALL.map(policy).into() }
}

fn create(site: Site, setup: &Setup, sentry: &Sentry) -> Result<Parts> {
    let engine = site.create(&initial_elements(statistics_lines()?).with_flows(setup.flows))?;
    let parts = join(engine, setup.plan, TableWriter::create)?;
    sentry.guard(parts.engine.config());
    Ok(parts)
}

/// Starts the workers, so that the writer can wait for them from the beginning.
fn join<E>(
    engine: Engine,
    plan: Option<&Plan>,
    write: impl FnOnce(Shared, Grace) -> Result<TableWriter<Shared, Grace>, E>,
) -> Result<Parts>
where
    anyhow::Error: From<E>,
{
    let (lines, there) = (statistics_lines()?, engine.tables().view().stats().len());
    if there < lines * PORT_SLOTS as usize {
        bail!("the table of statistics has {there} lines, and {lines} times {PORT_SLOTS} are needed");
    }
    let workers = plan.map(|plan| Workers::start(plan, &engine)).transpose()?;
    let tables = workers.as_ref().map_or_else(|| Shared::alone(engine.tables()), Workers::tables);
    let writer = write(tables, Grace::of(workers.as_ref())?)?;
    Ok(Parts { engine, fpm: Fpm::new(writer, towpath_fpm::all_classes()), workers })
}

impl Daemon {
    /// Takes in messages until everything was described once; false if told to stop.
    fn first_snapshot(&mut self) -> Result<bool> {
        let mut last = Instant::now();
        while !self.fpm.is_complete() {
            match self.inbox.recv_timeout(FIRST_SNAPSHOT.saturating_sub(last.elapsed())) {
                Ok(Event::Messages(messages)) => {
                    self.take(messages);
                    last = Instant::now();
                }
                Ok(Event::Stop(_)) => return Ok(false),
                Ok(Event::SourceEnded(error)) => bail!("cannot learn Linux's state: {error}"),
                Ok(Event::Acknowledge(sequence)) => self.acknowledge(sequence),
                Ok(_) => {}
                Err(_) => bail!("Linux's state was not told within {} s", FIRST_SNAPSHOT.as_secs()),
            }
            self.take_alarms();
            self.fpm.restrain();
            self.sentry.settle();
        }
        Ok(true)
    }

    /// Fills the tables and attaches to the ports: all of the named ones, or as many as can.
    fn attach(&mut self) -> Result<()> {
        self.wanted.choose(self.fpm.interfaces(), &self.engine);
        self.wanted.check(self.fpm.interfaces())?;
        let told = |ifindex: &u32| self.fpm.interfaces().any(|port| port.ifindex == *ifindex);
        if let Some(absent) = self.wanted.indices().into_iter().find(|ifindex| !told(ifindex)) {
            bail!("the cache manager has told nothing of {}", self.interface(absent));
        }
        let wanted = self.wanted.indices();
        for notice in self.engine.announce(&self.wanted.with_driver())? {
            self.facts.notice(&notice);
        }
        wanted.iter().for_each(|ifindex| self.fpm.serve(*ifindex, true));
        self.check_abilities(&wanted);
        // New tables come to their sizes before the kernel verifies the program against them. Only then it is known what
        // it sees.
        self.sync();
        self.engine.load()?;
        self.check_abilities(&wanted);
        loop {
            self.sync();
            if self.wanted.indices().is_empty() {
                bail!("there is no port that can be served: none has native XDP (see --generic)");
            }
            // Without names, ports that cannot be served are left out.
            let ifindex = match self.requests() {
                Ok(requests) => match self.attach_all(&requests) {
                    Ok(()) => break,
                    Err(Refused::Port(ifindex, error)) => {
                        self.wanted.drop_port(ifindex, error.as_ref()).ok_or(error)?
                    }
                    Err(Refused::Engine(error)) => self.wanted.drop_refused(&error).ok_or(error)?,
                },
                Err(error) => self.wanted.drop_port(error.ifindex, &error).ok_or(error)?,
            };
            self.fpm.serve(ifindex, false);
        }
        let (wanted, with_driver) = (self.wanted.indices(), self.wanted.with_driver());
        for left in self.engine.ports().into_iter().filter(|ifindex| !with_driver.contains(ifindex)) {
            self.engine.detach(left)?;
        }
        let ports: Vec<_> = self.fpm.interfaces().filter(|port| wanted.contains(&port.ifindex)).cloned().collect();
        ports.iter().for_each(|port| self.tell_engine(port));
        // Ports that are each other's peers can transmit only now.
        self.check_abilities(&wanted);
        self.sync();
        self.take_up_mappings();
        Ok(())
    }

    /// Has the engine serve the ports, and the workers if there are any. Sockets and wires come first: whether a port can
    /// have them is to be known before anything changes.
    fn attach_all(&mut self, requests: &[PortRequest]) -> Result<(), Refused> {
        let mut opened = Vec::new();
        for request in requests {
            let name = self.interface(request.ifindex);
            if let Some(workers) = &mut self.workers {
                let mtu = self.fpm.interfaces().find(|port| port.ifindex == request.ifindex).map_or(0, |port| port.mtu);
                let port = match self.wanted.wire(request.ifindex) {
                    Some(_) if mtu as usize > LARGEST_MTU => Err(anyhow::anyhow!(
                        "{name} has an MTU of {mtu}, and packets of a port with a wire have at most {LARGEST_MTU} bytes; run: \
                         ip link set {name} mtu {LARGEST_MTU}"
                    )),
                    wire => workers.open(request.ifindex, &name, wire),
                };
                opened.push((request.slot, port.map_err(|error| Refused::Port(request.ifindex, error))?));
            }
        }
        let with_driver = self.wanted.with_driver();
        let programs = requests.iter().filter(|request| with_driver.contains(&request.ifindex));
        self.engine.attach(&programs.copied().collect::<Vec<_>>()).map_err(Refused::Engine)?;
        for (slot, port) in opened {
            self.hand_to_workers(slot, port);
        }
        Ok(())
    }

    fn requests(&self) -> Result<Vec<PortRequest>, NoSlot> {
        let slot = |(name, ifindex): (&str, Option<u32>)| {
            let ifindex = ifindex?;
            let request = self.slot(ifindex).map(|slot| PortRequest { ifindex, slot });
            Some(request.ok_or_else(|| NoSlot { port: name.into(), ifindex }))
        };
        self.wanted.iter().filter_map(slot).collect()
    }

    /// Slot of a port in the tables.
    pub fn slot(&self, ifindex: u32) -> Option<u32> {
        self.fpm.ports().find(|state| state.port.ifindex == ifindex).map(|state| state.slot)
    }

    fn open_control(&self, events: SyncSender<Event>, endpoint: Option<Endpoint>) -> Result<()> {
        let tracing = events.clone();
        let handle = move |request| {
            let (reply, answer) = sync_channel(1);
            events.send(Event::Request(request, reply)).ok()?;
            answer.recv().ok()
        };
        endpoint.map_or(Ok(()), |endpoint| endpoint.serve(handle.clone()))?;
        let trace = move |wanted, client| trace::stream(wanted, client, &tracing);
        control::serve(&self.instance.control_socket(), handle, trace)
    }

    fn announce(&mut self) {
        self.running = true;
        // Whoever reads it may be gone, or the disk be full.
        if let Err(error) = writeln!(std::io::stdout(), "ready: {}", self.extent()) {
            tracing::warn!("cannot write to stdout: {error}");
        }
        self.manager.ready(self.status_line());
    }

    /// Works until told to stop, or until Linux's state can no longer be followed.
    fn serve(mut self) -> Result<Ended> {
        loop {
            self.tick();
            if self.sentry.is_waiting() {
                self.sync();
            }
            match self.next(self.due().saturating_duration_since(Instant::now())) {
                Ok(Event::Messages(messages)) => self.follow(messages),
                Ok(Event::Alarm) => self.sync(),
                Ok(Event::Request(Request::Stop, reply)) => {
                    let _ = reply.send(control::answer(Ok(true)));
                    return self.stop("towpath down");
                }
                Ok(Event::Request(Request::Leave, reply)) => {
                    let _ = reply.send(control::answer(Ok(true)));
                    return self.leave();
                }
                Ok(Event::Request(request @ (Request::NatAdd(_) | Request::NatDel(_)), reply)) => {
                    let _ = reply.send(self.change_mapping(&request));
                }
                Ok(Event::Request(Request::FilterChange(changes), reply)) => {
                    let _ = reply.send(self.change_filters(&changes));
                }
                Ok(Event::Request(request, reply)) => {
                    let _ = reply.send(self.answer(request));
                }
                Ok(Event::TraceBegin(client, wanted, lines)) => self.begin_trace(client, wanted, lines),
                Ok(Event::TraceEnd(client)) => self.end_trace(client),
                Ok(Event::Traced(packets)) => self.tell_traces(&packets),
                Ok(Event::Stop(signal)) => return self.stop(signal),
                Ok(Event::Transmit(changed)) => self.transmit_changed(changed),
                Ok(Event::Acknowledge(sequence)) => self.acknowledge(sequence),
                Ok(Event::SourceLost) => {
                    self.resyncing.extend(towpath_fpm::all_classes());
                    self.lost = true;
                    self.fpm.follow_rules(false);
                    self.sync();
                }
                Ok(Event::Settled(change)) => self.fpm.open_flows(change),
                Ok(Event::Reclaimable(seal)) => self.fpm.reclaim_flows(seal),
                Ok(Event::SourceEnded(error)) => {
                    self.take_off()?;
                    bail!("Linux's state can no longer be followed, so the fast path was taken off: {error}");
                }
                Err(RecvTimeoutError::Disconnected) => bail!("nobody is left to tell anything"),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn acknowledge(&self, sequence: u32) {
        if let Some(peer) = &self.source.peer {
            peer.send(Packet::Ack(sequence));
        }
    }

    fn next(&mut self, timeout: Duration) -> Result<Event, RecvTimeoutError> {
        self.pending.take().map_or_else(|| self.inbox.recv_timeout(timeout), Ok)
    }

    fn stop(mut self, why: &str) -> Result<Ended> {
        tracing::info!("stopping: {why}");
        self.manager.stopping();
        self.take_off()?;
        Ok(Ended::Done)
    }

    /// Ends without the workers, whose ports are the programs' then: those go on alone, by what is known now. Changes that come
    /// with the workers' end are for the next daemon.
    fn leave(mut self) -> Result<Ended> {
        tracing::info!("leaving the fast path to the next daemon");
        self.manager.stopping();
        self.sync();
        self.sentry.abandon();
        drop(self.workers.take());
        Ok(Ended::Left)
    }

    /// Linux forwards again when it returns. The workers leave first, while what they hand to Linux can still enter.
    fn take_off(&mut self) -> Result<()> {
        drop(self.workers.take());
        Ok(self.engine.teardown()?)
    }
}
