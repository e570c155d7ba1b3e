//! The user engine in the daemon: workers on their cores, and the AF_XDP sockets of the ports, or their wires.
//!
//! Queue q of the n-th port goes to worker n + q, around; a wire is one queue. A worker without a queue of a port that may transmit leaves what
//! is to be sent by it to one that has one.

use crate::keeper::Keeper;
use crate::report;
use crate::wires::{self, Wire};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use towpath_engine::{Engine, GraceMethod, Tables, possible_cpus};
use towpath_fptun::{Entry, Fptun, Kind, Outcome, Packet, Sender};
use towpath_tables::Reason;
use towpath_tables::backing::{Backing, GrowError, RawTables};
use towpath_tables::brake::Brake;
use towpath_tables::grace;
use towpath_tables::record::{self, PORT_SLOTS, SOCKET_QUEUES, TableId, port_flags};
use towpath_user::af_xdp::{self, STRIDE, XdpPort, XdpQueues};
use towpath_user::{Buffer, Core, Linux, Pool, Port, PortDriver};

/// Workers if nobody says how many.
const WORKERS: usize = 4;
/// Buffers of a worker: for each of its sockets as many as the rings hold, and what is on its way besides.
const BUFFERS_PER_SOCKET: usize = 1024;
const BUFFERS: usize = 1024;

/// Lines of the statistics: one for the programs of each CPU, and behind those one for the worker of each core.
pub fn statistics_lines() -> Result<usize> {
    Ok(2 * possible_cpus()? as usize)
}

/// What is asked of the user engine, checked as far as that changes nothing.
pub struct Plan {
    cores: Vec<Core>,
    /// Sockets of a worker at most
    sockets: usize,
}

impl Plan {
    /// Workers on these cores, or on some of those that this process may use; `ports` are the interfaces that may be
    /// served by sockets, and there are so many `wires`.
    pub fn new(cores: Option<&[u32]>, ports: &[u32], wires: usize) -> Result<Self> {
        if !ports.is_empty() {
            af_xdp::check()?;
        }
        let cores = match cores {
            Some(cores) => cores.iter().map(|core| Core(*core)).collect(),
            None => choose(&towpath_user::usable_cores()?, ports.len() + wires),
        };
        towpath_user::check_cores(&cores)?;
        // An interface that has just gone is no reason to fail here.
        let queues = ports.iter().map(|port| towpath_engine::queues(*port).map_or(1, |(receiving, _)| receiving));
        let sockets = queues.map(|queues| (queues.min(SOCKET_QUEUES) as usize).div_ceil(cores.len().max(1))).sum();
        Ok(Self { cores, sockets })
    }
}

/// The last ones, as many as there are ports, but not all: the first is left to everything else.
fn choose(usable: &[Core], ports: usize) -> Vec<Core> {
    let count = ports.clamp(1, WORKERS).min(usable.len().saturating_sub(1).max(1));
    usable[usable.len().saturating_sub(count)..].to_vec()
}

type UserEngine = towpath_user::Engine<Tables>;

/// Workers, and what they serve.
pub struct Workers {
    engine: Arc<UserEngine>,
    /// What the workers' ways to Linux lead through
    fptun: Fptun,
    xdp: Engine,
    cores: Vec<Core>,
    /// Of the statistics
    first_line: u32,
    /// Waits for programs that may have seen a socket
    programs: GraceMethod,
    /// By interface index
    served: BTreeMap<u32, Served>,
    /// Which port each interface index was, in the order in which they came
    numbers: BTreeMap<u32, usize>,
}

/// A worker's way to Linux, which sees what it is handed received by the port.
struct Way(Sender);

impl Linux for Way {
    fn deliver(&mut self, ifindex: u32, frames: &[Buffer]) -> usize {
        let entry = Entry::Ingress(ifindex);
        self.0.send(frames.iter().map(|frame| Packet { entry, mark: 0, frame: frame.bytes() }))
    }
}

struct Served {
    slot: u32,
    sockets: Vec<Socket>,
    /// Its wire, if it has one
    wire: Option<Wired>,
}

struct Wired {
    worker: usize,
    keeper: Option<Keeper>,
}

struct Socket {
    queue: u32,
    worker: usize,
    fd: OwnedFd,
}

/// What of a port no worker has yet.
pub struct Opened {
    ifindex: u32,
    /// To be dropped before its driver
    wire: Option<Wired>,
    /// With the worker that each is for
    drivers: BTreeMap<usize, Box<dyn PortDriver>>,
    /// Workers whose driver may send
    senders: Vec<usize>,
    sockets: Vec<Socket>,
}

impl Opened {
    /// The port
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }
}

impl Workers {
    /// Starts them, without ports, on the engine's tables.
    pub fn start(plan: &Plan, xdp: &Engine) -> Result<Self> {
        let fptun = Fptun::open()?;
        let ways = plan.cores.iter().map(|_| fptun.sender(Kind::Arrived).map(Way)).collect::<Result<Vec<_>, _>>()?;
        let mut ways = ways.into_iter();
        let buffers = BUFFERS + BUFFERS_PER_SOCKET * plan.sockets;
        let equip = |_| {
            let way = ways.next().expect("there is one for each core");
            (Pool::new(buffers, STRIDE), Box::new(way) as Box<dyn Linux>)
        };
        let first_line = possible_cpus()?;
        let engine = UserEngine::start(&Arc::new(xdp.tables()), &plan.cores, first_line, equip)?;
        Ok(Self {
            engine: Arc::new(engine),
            fptun,
            xdp: xdp.clone(),
            cores: plan.cores.clone(),
            first_line,
            programs: GraceMethod::choose()?,
            served: BTreeMap::new(),
            numbers: BTreeMap::new(),
        })
    }

    /// Opens a port's wire, or a socket on each queue of its interface.
    pub fn open(&mut self, ifindex: u32, name: &str, wire: Option<&Wire>) -> Result<Opened> {
        let next = self.numbers.len();
        let number = *self.numbers.entry(ifindex).or_insert(next);
        match wire {
            Some(wire) => {
                let worker = number % self.cores.len().max(1);
                let wires::Opened { keeper, driver } = wire.open(name, ifindex)?;
                let (drivers, wire) = ([(worker, driver)].into(), Some(Wired { worker, keeper }));
                Ok(Opened { ifindex, drivers, senders: vec![worker], sockets: Vec::new(), wire })
            }
            None => self.open_sockets(ifindex, name, number),
        }
    }

    fn open_sockets(&self, ifindex: u32, name: &str, number: usize) -> Result<Opened> {
        let (receiving, transmitting) = towpath_engine::queues(ifindex)?;
        if receiving > SOCKET_QUEUES {
            bail!(
                "{name} has {receiving} receive queues, and the user engine serves at most {SOCKET_QUEUES} of a port; run: \
                 ethtool -L {name} combined {SOCKET_QUEUES} (or rx {SOCKET_QUEUES}, as the driver counts them), or use \
                 --engine xdp"
            );
        }
        let areas: Vec<_> = self.engine.areas().collect();
        let (mut ports, mut senders, mut sockets) = (BTreeMap::<usize, Vec<XdpPort>>::new(), Vec::new(), Vec::new());
        for queue in 0..receiving {
            let worker = (number + queue as usize) % areas.len().max(1);
            let area = areas.get(worker).context("there is no worker")?;
            let port = XdpPort::open(*area, ifindex, queue).with_context(|| format!("{name} cannot be served"))?;
            let fd = port.as_fd().try_clone_to_owned().context("cannot keep a socket")?;
            sockets.push(Socket { queue, worker, fd });
            let ports = ports.entry(worker).or_default();
            // The first queue of a worker is the one that sends, if it may.
            if ports.is_empty() && queue < transmitting {
                senders.push(worker);
            }
            ports.push(port);
        }
        let driver = |(worker, queues)| (worker, Box::new(XdpQueues::new(queues)) as Box<dyn PortDriver>);
        Ok(Opened { ifindex, drivers: ports.into_iter().map(driver).collect(), senders, sockets, wire: None })
    }

    /// Has the workers serve a port that was opened; if that fails, a program goes on alone.
    pub fn serve(&mut self, slot: u32, opened: Opened) -> Result<()> {
        let ifindex = opened.ifindex;
        let done = self.hand_out(slot, opened);
        if done.is_err() {
            self.leave(ifindex);
        }
        done
    }

    fn hand_out(&mut self, slot: u32, opened: Opened) -> Result<()> {
        let Opened { ifindex, drivers, senders, sockets, wire } = opened;
        let served = self.served.entry(ifindex).or_insert(Served { slot, sockets, wire });
        for (worker, driver) in drivers {
            if !self.engine.add(worker, Port { ifindex, slot, driver }) {
                bail!("the worker on core {} is gone", self.cores.get(worker).map_or(0, |core| core.0));
            }
        }
        for worker in (0..self.cores.len()).filter(|worker| !senders.contains(worker)) {
            if let Some(sender) = senders.get(worker % senders.len().max(1)) {
                self.engine.leave_to(worker, (ifindex, slot), *sender);
            }
        }
        let enter = |socket: &Socket| self.xdp.set_socket(slot, socket.queue, Some(socket.fd.as_fd()));
        Ok(served.sockets.iter().try_for_each(enter)?)
    }

    /// Takes a port from the workers: its frames are the program's again, and what the workers have of it is forwarded.
    pub fn leave(&mut self, ifindex: u32) {
        let served = self.served.remove_entry(&ifindex);
        self.take_back(served.into_iter().collect());
    }

    fn take_back(&mut self, ports: Vec<(u32, Served)>) {
        for port in ports.iter().map(|(_, port)| port) {
            for socket in &port.sockets {
                if let Err(error) = self.xdp.set_socket(port.slot, socket.queue, None) {
                    tracing::warn!("{error}");
                }
            }
        }
        if !ports.is_empty()
            && let Err(error) = self.programs.wait()
        {
            // What a program hands to a socket at this moment is lost then.
            tracing::warn!("{error}");
        }
        for (ifindex, port) in ports {
            // A socket ends with its last descriptor, and the worker's is to be that.
            drop(port);
            self.engine.remove(ifindex);
        }
    }

    /// Linux has said something about the port.
    pub fn told(&self, ifindex: u32) {
        let keeper = self.served.get(&ifindex).and_then(|port| port.wire.as_ref()?.keeper.as_ref());
        keeper.into_iter().for_each(Keeper::look);
    }

    /// Whether workers serve the port.
    pub fn serves(&self, ifindex: u32) -> bool {
        self.served.contains_key(&ifindex)
    }

    /// Has this see what workers receive, or nobody.
    pub fn set_lookout(&self, lookout: Option<&Arc<dyn towpath_user::Lookout>>) {
        self.engine.set_lookout(lookout);
    }

    /// What the tables' writer is to wait by.
    pub fn grace(&self) -> towpath_user::Grace {
        self.engine.grace()
    }

    /// The tables for their writer, who may let them grow.
    pub fn tables(&self) -> Shared {
        Shared { tables: self.xdp.tables(), workers: Some((self.xdp.clone(), self.engine.clone())) }
    }

    /// What became of packets on their way to Linux.
    pub fn entered(&self) -> Result<Vec<report::Entered>> {
        let counted = Outcome::ALL.into_iter().zip(self.fptun.outcomes()?);
        let entered = |(outcome, packets): (Outcome, u64)| {
            let (outcome, text, dropped) = (outcome.name().into(), outcome.text().into(), outcome.is_loss());
            report::Entered { outcome, text, dropped, packets }
        };
        Ok(counted.map(entered).collect())
    }

    /// What the status says of each.
    pub fn report(&self, name: impl Fn(u32) -> String) -> Vec<report::Worker> {
        let tables = self.xdp.tables();
        // What passes a tunnel is counted there and on the ports that it comes in and leaves by.
        let is_port = |port: &record::Port| port.flags.load() & port_flags::TUNNEL == 0;
        let ports: Vec<_> = tables.view().ports().iter().map(is_port).collect();
        let report = |(worker, core): (usize, &Core)| {
            let mut report = report::Worker { core: core.0, ..report::Worker::default() };
            let line = (self.first_line + core.0) as usize * PORT_SLOTS as usize;
            let stats = tables.view().stats().iter().skip(line);
            for (stats, _) in stats.zip(&ports).filter(|(_, is_port)| **is_port) {
                report.rx_packets += stats.rx_packets.load();
                report.tx_packets += stats.tx_packets.load();
                let all = stats.exceptions.iter().map(|count| count.load()).sum::<u64>();
                report.exceptions += all - stats.exceptions[Reason::Filtered as usize].load();
                report.tx_lost += stats.tx_lost.load();
                report.exceptions_lost += stats.exceptions_lost.load();
            }
            for (ifindex, served) in &self.served {
                if let Some(wire) = served.wire.as_ref().filter(|wire| wire.worker == worker) {
                    report.rx_lost += wire.keeper.as_ref().map_or(0, Keeper::lost);
                    report.queues.push(report::Queue { port: name(*ifindex), queue: 0 });
                }
                for socket in served.sockets.iter().filter(|socket| socket.worker == worker) {
                    report.rx_lost += af_xdp::lost(socket.fd.as_fd()).unwrap_or_default();
                    report.queues.push(report::Queue { port: name(*ifindex), queue: socket.queue });
                }
            }
            report
        };
        self.cores.iter().enumerate().map(report).collect()
    }
}

impl Drop for Workers {
    /// The programs go on alone, and nothing that has arrived is lost.
    fn drop(&mut self) {
        let served = std::mem::take(&mut self.served);
        self.take_back(served.into_iter().collect());
    }
}

/// The tables, for their writer. When one grows, the workers look at the new one before he goes on.
pub struct Shared {
    tables: Tables,
    workers: Option<(Engine, Arc<UserEngine>)>,
}

impl Shared {
    /// Tables without workers.
    pub fn alone(tables: Tables) -> Self {
        Self { tables, workers: None }
    }
}

// SAFETY: the tables are those of `Tables`, which keeps the promise.
unsafe impl Backing for Shared {
    fn tables(&self) -> &RawTables {
        self.tables.tables()
    }

    fn brake(&self) -> Brake {
        self.tables.brake()
    }

    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), GrowError> {
        let grown = self.tables.grow(table, elements);
        if let Some((xdp, workers)) = &self.workers {
            workers.set_tables(&Arc::new(xdp.tables()));
        }
        grown
    }
}

/// Waits for programs in flight and for workers.
pub struct Grace {
    programs: GraceMethod,
    workers: Option<towpath_user::Grace>,
}

impl Grace {
    /// For the programs, and for workers if there are any.
    pub fn of(workers: Option<&Workers>) -> Result<Self> {
        Ok(Self { programs: GraceMethod::choose()?, workers: workers.map(Workers::grace) })
    }
}

impl grace::Grace for Grace {
    fn wait(&mut self) {
        grace::Grace::wait(&mut self.programs);
        if let Some(workers) = &mut self.workers {
            workers.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_core_is_left_to_everything_else_if_there_are_several() {
        let usable = |numbers: &[u32]| numbers.iter().map(|number| Core(*number)).collect::<Vec<_>>();
        let chosen =
            |numbers: &[u32], ports| choose(&usable(numbers), ports).iter().map(|core| core.0).collect::<Vec<_>>();
        assert_eq!(chosen(&[3], 2), [3]);
        assert_eq!(chosen(&[0, 1], 2), [1]);
        assert_eq!(chosen(&[0, 1, 4, 5], 2), [4, 5]);
        assert_eq!(chosen(&[0, 1, 4, 5], 9), [1, 4, 5]);
        assert_eq!(chosen(&[0, 1, 2, 3, 4, 5, 6, 7], 9), [4, 5, 6, 7]);
        assert_eq!(chosen(&[0, 1, 2], 0), [2]);
    }
}
