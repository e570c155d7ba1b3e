//! Workers in threads of their own, and what the rest of the process tells them.

use crate::bell::Bell;
use crate::driver::{Linux, Lookout, PortDriver};
use crate::exchange::Exchange;
use crate::pool::{Area, Pool};
use crate::worker::{Port, Reading, TableSource, Worker};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use towpath_tables::grace::{self, Grace as _};
use towpath_tables::word::W32;

/// Turns without a frame after which a worker sleeps. Each takes some tens of nanoseconds for a port, so that a core that
/// is kept busy does not sleep between two packets, and one that is idle sleeps soon.
const EMPTY_TURNS: u32 = 2000;
/// How long a worker sleeps that nothing wakes when frames arrive.
const NAP: Duration = Duration::from_micros(50);

/// What can go wrong with workers.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// The core is not there, or not for this process
    #[error(
        "there is no core {core} for a worker: this process may use {usable} (name those; or see taskset and the cgroup's \
         cpuset.cpus)"
    )]
    NoCore {
        /// Its number
        core: u32,
        /// Cores that there are
        usable: String,
    },
    /// A core was named twice
    #[error("core {0} was named twice; each worker needs a core of its own")]
    SameCore(u32),
    /// Anything else that the kernel refuses
    #[error("cannot {what}: {cause}")]
    Io {
        /// What was to be done
        what: &'static str,
        /// In the kernel's words
        cause: io::Error,
    },
}

/// A core for a worker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Core(pub u32);

/// What a worker is told.
enum Order<S> {
    /// And say when it is done
    Add(Port, SyncSender<()>),
    /// And say when it is done
    Remove(u32, SyncSender<()>),
    /// Leave what is to be sent by the interface with this index and slot to another worker
    LeaveTo(u32, u32, usize),
    Tables(Arc<S>),
    Lookout(Option<Arc<dyn Lookout>>),
    Stop,
}

/// What a worker shares with those who tell it things.
struct Desk<S> {
    /// None once the worker is gone
    orders: Mutex<Option<VecDeque<Order<S>>>>,
    /// Number of orders ever given; whoever changes it holds the lock
    given: W32,
    /// Wakes the worker
    bell: Arc<Bell>,
}

struct Running<S> {
    core: Core,
    desk: Arc<Desk<S>>,
    reading: Reading,
    area: Area,
    thread: Option<JoinHandle<()>>,
}

/// Workers at work. They stop when this is dropped.
pub struct Engine<S> {
    workers: Vec<Running<S>>,
}

/// Waits until no worker looks at what it found in the tables before.
#[derive(Clone)]
pub struct Grace(grace::Workers<Vec<Reading>>);

impl grace::Grace for Grace {
    fn wait(&mut self) {
        self.0.wait();
    }
}

impl<S: TableSource + Send + Sync + 'static> Engine<S> {
    /// Starts a worker on each core; that of core n writes line `first_line` + n of the statistics. `equip` makes a
    /// worker's buffers and its way to Linux. All of them, or none.
    pub fn start(
        tables: &Arc<S>,
        cores: &[Core],
        first_line: u32,
        mut equip: impl FnMut(Core) -> (Pool, Box<dyn Linux>),
    ) -> Result<Self, Error> {
        check_cores(cores)?;
        let workers = cores.iter().map(|core| {
            let (pool, linux) = equip(*core);
            let bell = Bell::new().map_err(|cause| Error::Io { what: "make an eventfd for a worker", cause })?;
            Ok((*core, Worker::new(tables.clone(), first_line.wrapping_add(core.0), pool, linux), Arc::new(bell)))
        });
        let workers: Vec<_> = workers.collect::<Result<_, _>>()?;
        let ends: Vec<_> = workers.iter().map(|(_, worker, bell)| (worker.buffers(), bell.clone())).collect();
        let several = workers.len() > 1;
        let mut engine = Self { workers: Vec::new() };
        for ((core, mut worker, bell), exchange) in workers.into_iter().zip(Exchange::among(&ends)) {
            if several {
                worker.join(exchange);
            }
            engine.workers.push(spawn(core, worker, bell)?);
        }
        Ok(engine)
    }

    /// The workers' cores.
    pub fn cores(&self) -> impl Iterator<Item = Core> {
        self.workers.iter().map(|worker| worker.core)
    }

    /// Memory of each worker's pool, for its drivers.
    pub fn areas(&self) -> impl Iterator<Item = Area> {
        self.workers.iter().map(|worker| worker.area)
    }

    /// Gives a worker a port and returns when it is served; false if there is no such worker (any more).
    pub fn add(&self, worker: usize, port: Port) -> bool {
        let Some(worker) = self.workers.get(worker) else { return false };
        let (done, when_done) = sync_channel(1);
        worker.desk.give(Order::Add(port, done));
        when_done.recv().is_ok()
    }

    /// Has a worker leave what is to be sent by a port to another worker, which has the port. Nothing if there is no such
    /// worker.
    pub fn leave_to(&self, worker: usize, (ifindex, slot): (u32, u32), other: usize) {
        if let Some(worker) = self.workers.get(worker) {
            worker.desk.give(Order::LeaveTo(ifindex, slot, other));
            self.grace().wait();
        }
    }

    /// Takes a port from all workers. When it returns, none of them uses it, and what had arrived by it is forwarded.
    pub fn remove(&self, ifindex: u32) {
        let (done, when_done) = sync_channel(self.workers.len());
        self.workers.iter().for_each(|worker| worker.desk.give(Order::Remove(ifindex, done.clone())));
        drop(done);
        while when_done.recv().is_ok() {}
    }

    /// Has all workers look at these tables. When it returns, none of them looks at others.
    pub fn set_tables(&self, tables: &Arc<S>) {
        self.tell(|| Order::Tables(tables.clone()));
    }

    /// Has this see what workers receive, or nobody. When it returns, nobody else does.
    pub fn set_lookout(&self, lookout: Option<&Arc<dyn Lookout>>) {
        self.tell(|| Order::Lookout(lookout.cloned()));
    }

    /// What the tables' writer is to wait by.
    pub fn grace(&self) -> Grace {
        Grace(grace::Workers(self.workers.iter().map(|worker| worker.reading.clone()).collect()))
    }

    /// Gives everybody an order and waits until nobody works by what was before.
    fn tell(&self, order: impl Fn() -> Order<S>) {
        self.workers.iter().for_each(|worker| worker.desk.give(order()));
        self.grace().wait();
    }
}

impl<S> Drop for Engine<S> {
    fn drop(&mut self) {
        self.workers.iter().for_each(|worker| worker.desk.give(Order::Stop));
        for thread in self.workers.iter_mut().filter_map(|worker| worker.thread.take()) {
            // A worker that panicked has said so on stderr.
            let _ = thread.join();
        }
    }
}

impl<S> Desk<S> {
    fn new(bell: Arc<Bell>) -> Self {
        Self { orders: Mutex::new(Some(VecDeque::new())), given: W32::new(0), bell }
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<Order<S>>>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, order: Order<S>) {
        if let Some(orders) = &mut *self.lock() {
            self.given.store(self.given.load().wrapping_add(1));
            orders.push_back(order);
        }
        self.bell.ring();
    }

    fn take(&self) -> Option<Order<S>> {
        self.lock().as_mut()?.pop_front()
    }
}

fn spawn<S: TableSource + Send + Sync + 'static>(
    core: Core,
    worker: Worker<S>,
    bell: Arc<Bell>,
) -> Result<Running<S>, Error> {
    let desk = Arc::new(Desk::new(bell));
    let (reading, area) = (worker.reading(), worker.area());
    let theirs = desk.clone();
    let thread = std::thread::Builder::new()
        .name(format!("worker-{}", core.0))
        .spawn(move || {
            if let Err(error) = pin(core) {
                // It was possible when `check_cores` looked. Slower, but right.
                tracing::warn!("a worker is not pinned to core {}: {error}", core.0);
            }
            work(worker, &theirs);
        })
        .map_err(|cause| Error::Io { what: "start a worker's thread", cause })?;
    Ok(Running { core, desk, reading, area, thread: Some(thread) })
}

/// Whatever becomes of a worker, nobody waits for it when it is gone.
struct Gone<'d, S>(Reading, &'d Desk<S>);

impl<S> Drop for Gone<'_, S> {
    fn drop(&mut self) {
        if self.0.load() & 1 == 1 {
            grace::leave(&*self.0);
        }
        *self.1.lock() = None;
    }
}

/// Works until told to stop.
fn work<S: TableSource>(mut worker: Worker<S>, desk: &Desk<S>) {
    let _gone = Gone(worker.reading(), desk);
    let mut taken = 0u32;
    let mut empty = 0;
    loop {
        worker.enter();
        // The fence in `enter` makes whoever gave an order and then waits for this worker either see that it reads, or be
        // sure that it sees the order here.
        while desk.given.load() != taken {
            let Some(order) = desk.take() else { break };
            taken = taken.wrapping_add(1);
            match order {
                Order::Add(port, done) => {
                    worker.add(port);
                    // Whoever gave the order may have left.
                    let _ = done.send(());
                }
                Order::Remove(ifindex, done) => {
                    worker.remove(ifindex);
                    let _ = done.send(());
                }
                Order::LeaveTo(ifindex, slot, other) => worker.leave_to(ifindex, slot, other),
                Order::Tables(tables) => worker.set_tables(tables),
                Order::Lookout(lookout) => worker.set_lookout(lookout),
                Order::Stop => return,
            }
        }
        let mut received = worker.turn();
        if received == 0 && empty >= EMPTY_TURNS {
            desk.bell.lie_down();
            // What others handed over before they saw it asleep.
            received = worker.turn();
        }
        worker.leave();
        if received == 0 && empty >= EMPTY_TURNS {
            sleep(worker.drivers(), &desk.bell);
        }
        if empty >= EMPTY_TURNS {
            desk.bell.get_up();
        }
        empty = if received == 0 { (empty + 1).min(EMPTY_TURNS) } else { 0 };
        std::hint::spin_loop();
    }
}

/// Sleeps until a frame may have arrived, or the bell rings.
fn sleep<'d>(drivers: impl Iterator<Item = &'d dyn PortDriver>, bell: &Bell) {
    let mut fds = vec![bell.as_fd()];
    let mut nap = false;
    for driver in drivers {
        nap |= !driver.readable(&mut fds);
    }
    let mut fds: Vec<libc::pollfd> = fds.into_iter().map(poll_entry).collect();
    let limit = libc::timespec { tv_sec: 0, tv_nsec: NAP.as_nanos() as i64 };
    let limit = if nap { &raw const limit } else { std::ptr::null() };
    // SAFETY: the entries are as many as said; `limit` is null or points to a time that lives here.
    unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit, std::ptr::null()) };
}

fn poll_entry(fd: BorrowedFd<'_>) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }
}

/// Fails if a core is not there for this thread, or named twice.
pub fn check_cores(cores: &[Core]) -> Result<(), Error> {
    if let Some(n) = (1..cores.len()).find(|n| cores[..*n].contains(&cores[*n])) {
        return Err(Error::SameCore(cores[n].0));
    }
    let usable = usable_cores()?;
    match cores.iter().find(|core| !usable.contains(core)) {
        Some(core) => {
            let usable = usable.iter().map(|core| core.0.to_string()).collect::<Vec<_>>().join(", ");
            Err(Error::NoCore { core: core.0, usable })
        }
        None => Ok(()),
    }
}

/// Cores that this thread may run on, in ascending order.
pub fn usable_cores() -> Result<Vec<Core>, Error> {
    let set = affinity().map_err(|cause| Error::Io { what: "ask for the cores of this process", cause })?;
    // SAFETY: the numbers are below the size of the set.
    let numbers = (0..libc::CPU_SETSIZE as usize).filter(|number| unsafe { libc::CPU_ISSET(*number, &set) });
    Ok(numbers.map(|number| Core(number as u32)).collect())
}

/// Cores that this thread may run on.
fn affinity() -> io::Result<libc::cpu_set_t> {
    // SAFETY: a set of bits, for which zeros are valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is as large as said.
    match unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } {
        0 => Ok(set),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps this thread on a core.
fn pin(core: Core) -> io::Result<()> {
    // SAFETY: a set of bits, for which zeros are valid; `check_cores` has compared the number with its size.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { libc::CPU_SET(core.0 as usize, &mut set) };
    // SAFETY: the set is as large as said.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
