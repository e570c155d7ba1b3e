//! The cache manager's loop: notifications, policy watchers, settings that must be polled, and dumps, one chunk at a
//! time, so that none of them waits for a long dump.

use crate::conntrack::{FlowMode, Mirror};
use crate::decode::{self, link::Link, nexthop, rtm};
use crate::dump::{Class, Dump, Key};
use crate::epoll::Epoll;
use crate::error::CmError;
use crate::guard::POLL;
use crate::netlink::{
    self, Channel, Incoming, NETLINK_ROUTE, NLM_F_DUMP_INTR, NLM_F_REPLACE, NLMSG_DONE, NLMSG_ERROR, OTHER_GROUPS,
    PORT_GROUPS, Received,
};
use crate::ports::Ports;
use crate::routes::{Outcome, Shared};
use crate::sink::FpcSink;
use crate::watch::{Moved, Watcher};
use crate::watched::{Alarms, Watched};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::iter;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use towpath_fpc::{Listener, Message, PolicySource};
use towpath_tables::clock;
use towpath_tables::record::Family;

/// Messages handed over at once.
const BATCH: usize = 512;
/// Notifications read before watchers and dumps get their turn again: work for about a quarter of a millisecond, so that
/// where many want the processor, watchers need not wait for it more than once.
const NOTIFICATIONS_PER_TURN: usize = 64;
/// How often the settings of interfaces are read that nothing announces, so that they are described as they are. What
/// stands in the way of the fast path is found by the watchers, sooner.
const SETTINGS_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is said that rules are looked at.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// What is due so soon is done together with what is due now: one wake-up serves all that is polled.
const TOGETHER: Duration = Duration::from_millis(10);
/// What Linux removes silently is read again after this time, so that one reading serves several events.
const RESYNC_DELAY: Duration = Duration::from_millis(20);
/// Between two dumps of a class lies at least this multiple of the work that the last one was.
const RESYNC_REST: u32 = 4;
/// Classes that change without notice when an interface stops or starts being usable.
const SILENT: [Class; 3] = [Class::Nexthops, Class::Routes(Family::V4), Class::Routes(Family::V6)];

/// How soon a receiver that lagged behind is tried again.
const FULL_REST: Duration = Duration::from_millis(1);

const TOKEN_STOP: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
const TOKEN_REQUESTER: u64 = 2;
const TOKEN_PORTS: u64 = 3;
const TOKEN_FLOWS: u64 = 4;
const TOKEN_WATCHER: u64 = 5;

/// How the manager is to work.
#[derive(Clone, Debug)]
pub struct Options {
    /// Receive buffer for notifications, in bytes; used only while CM lags behind. The kernel counts about 1 KiB for
    /// a route's notification.
    pub receive_buffer: usize,
    /// Names of the interfaces that the fast path serves (their VLAN sub-interfaces count too): settings that must be
    /// polled are polled for these. None: for all.
    pub serve: Option<Vec<String>>,
    /// Which connections Linux hands over; the watchers must be made for the same
    pub flows: FlowMode,
    /// Nothing is changed in Linux: connections are told although their windows are still checked. For predictions only
    pub observe: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { receive_buffer: 128 << 20, serve: None, flows: FlowMode::default(), observe: false }
    }
}

/// The cache manager of one network namespace.
pub struct Cm {
    options: Options,
    epoll: Epoll,
    /// What happens to interfaces comes apart from the rest, so that it does not wait behind routes
    port_listener: Channel,
    listener: Channel,
    /// Something was read from `port_listener` that happened after what `listener` still holds
    ahead: bool,
    requester: Channel,
    buffer: Vec<u8>,
    watchers: Vec<Watched>,
    ports: Ports,
    ports_complete: bool,
    port_alarms: Alarms,
    /// None was raised yet
    first_alarm: bool,
    settings_due: Instant,
    families_due: Instant,
    heartbeat_due: Instant,
    shared: Shared,
    nexthops: HashSet<u32>,
    flows: Mirror,
    dump: Option<Dump>,
    /// Classes to read, and when
    due: BTreeMap<Class, Instant>,
    /// Per class: dumps begun, and the time before which the next should not begin
    runs: HashMap<Class, (u64, Instant)>,
    /// Interfaces told as down until these dumps (class, run) have ended
    held: HashMap<u32, Vec<(Class, u64)>>,
    /// Policies, to be told when all has been read that Linux told before they were found
    found: Vec<Message>,
    /// What watchers are to be told that they do not watch
    moved: Moved,
    /// By family, see `Watcher::moved`
    uneven: [bool; 2],
    /// Messages not handed over yet
    out: Vec<Message>,
}

impl Cm {
    /// A manager for the calling thread's network namespace. It subscribes here and reads nothing yet.
    pub fn new(options: Options, watchers: Vec<Box<dyn Watcher>>) -> Result<Self, CmError> {
        let epoll = Epoll::new()?;
        let port_listener = Channel::listener(NETLINK_ROUTE, PORT_GROUPS, options.receive_buffer)?;
        let listener = Channel::listener(NETLINK_ROUTE, OTHER_GROUPS, options.receive_buffer)?;
        let requester = Channel::requester(NETLINK_ROUTE)?;
        epoll.add(port_listener.as_fd(), TOKEN_PORTS)?;
        epoll.add(listener.as_fd(), TOKEN_LISTENER)?;
        epoll.add(requester.as_fd(), TOKEN_REQUESTER)?;
        let mut watchers: Vec<_> = watchers.into_iter().map(Watched::new).collect();
        // Nothing is known of routes yet.
        let uneven = [true; 2];
        watchers.iter_mut().for_each(|watched| watched.moved(Moved::default(), uneven));
        for (token, watched) in (TOKEN_WATCHER..).zip(&watchers) {
            for fd in watched.watcher().fds() {
                epoll.add(fd, token)?;
            }
        }
        Ok(Self {
            ports: Ports::new(options.serve.clone()),
            flows: Mirror::new(options.flows, options.observe, options.receive_buffer),
            options,
            epoll,
            port_listener,
            listener,
            ahead: false,
            requester,
            buffer: Channel::buffer(),
            watchers,
            ports_complete: false,
            port_alarms: Alarms::of(PolicySource::Ports),
            first_alarm: true,
            settings_due: Instant::now(),
            families_due: Instant::now(),
            heartbeat_due: Instant::now(),
            shared: Shared::default(),
            nexthops: HashSet::new(),
            dump: None,
            due: BTreeMap::new(),
            runs: HashMap::new(),
            held: HashMap::new(),
            found: Vec::new(),
            moved: Moved::default(),
            uneven,
            out: Vec::new(),
        })
    }

    /// Tells `sink` the whole state, class by class as snapshots, and then every change, until `stop` is readable.
    /// When the end of each class's snapshot (ports, both families' addresses, neighbours and routes, nexthops, every
    /// watcher's policies) has been told, the receiver knows everything.
    ///
    /// # Errors
    /// When the sink refuses messages, or rtnetlink can no longer be used or understood.
    pub fn run(&mut self, sink: &mut dyn FpcSink, stop: BorrowedFd<'_>) -> Result<(), CmError> {
        self.epoll.add(stop, TOKEN_STOP)?;
        self.read_everything();
        let mut busy = false;
        loop {
            let full = sink.is_full()?;
            if full {
                // What is readable stays so, and would end every wait.
                std::thread::sleep(FULL_REST);
            }
            let timeout = if busy || full { Duration::ZERO } else { self.timeout() };
            let begin = clock::now();
            let ready = self.epoll.wait(timeout)?;
            if ready.contains(&TOKEN_STOP) {
                return self.flush(sink);
            }
            for token in &ready {
                if let Some(watched) = token.checked_sub(TOKEN_WATCHER).and_then(|i| self.watchers.get_mut(i as usize))
                {
                    watched.wake();
                }
            }
            // What was sent before the last of what happened to interfaces must have been read, too.
            let told = ready.iter().any(|token| matches!(*token, TOKEN_PORTS | TOKEN_LISTENER));
            let ports_busy = told && self.port_notifications()?;
            self.alarm(sink)?;
            busy = !full && told && self.notifications(sink)?;
            if !full && !busy {
                self.ahead = false;
                if !self.found.is_empty() {
                    self.out.append(&mut self.found);
                    // Connections wait for it.
                    self.flush(sink)?;
                }
            }
            busy |= ports_busy;
            self.poll(sink)?;
            self.heartbeat(begin, sink)?;
            if !full {
                self.step_dump(sink, !busy)?;
                self.begin_dump()?;
                busy |= self.step_flows(sink)?;
            }
            if busy {
                // Batches become full, and fuller ones cost less.
                self.alarm(sink)?;
            } else {
                self.flush(sink)?;
            }
        }
    }

    fn timeout(&self) -> Duration {
        if self.dump.as_ref().is_some_and(|dump| dump.finished) || !self.found.is_empty() {
            return Duration::ZERO;
        }
        let dumps = self.due.values().copied().filter(|_| self.dump.is_none());
        let first = dumps.fold(self.poll_due(), Instant::min);
        first.saturating_duration_since(Instant::now())
    }

    fn flush(&mut self, sink: &mut dyn FpcSink) -> Result<(), CmError> {
        self.alarm(sink)?;
        if self.out.is_empty() { Ok(()) } else { sink.send(std::mem::take(&mut self.out)) }
    }

    fn flush_full(&mut self, sink: &mut dyn FpcSink) -> Result<(), CmError> {
        if self.out.len() < BATCH {
            return Ok(());
        }
        let empty = Vec::with_capacity(BATCH + BATCH / 2);
        sink.send(std::mem::replace(&mut self.out, empty))
    }

    /// Sends to Linux what was described otherwise before, until the receiver has taken the new description.
    fn alarm(&mut self, sink: &mut dyn FpcSink) -> Result<(), CmError> {
        let policies = self.ports.take_changed();
        let first = self.first_alarm && self.ports_complete;
        if policies.is_empty() && !first {
            return Ok(());
        }
        self.first_alarm &= !first;
        let (alarm, over) = self.port_alarms.raise(policies);
        self.out.push(over);
        sink.alarm(alarm)
    }

    // What must be polled.

    /// When the first of it is due.
    fn poll_due(&self) -> Instant {
        let watchers = self.watchers.iter().filter_map(Watched::due).filter(|_| self.ports_complete);
        let own = self.settings_due.min(self.families_due).min(self.heartbeat_due);
        watchers.chain(self.flows.due()).fold(own, Instant::min)
    }

    fn poll(&mut self, sink: &mut dyn FpcSink) -> Result<(), CmError> {
        self.tell_moved();
        let now = Instant::now();
        if self.poll_due() > now {
            return Ok(());
        }
        let soon = now + TOGETHER;
        if self.families_due <= soon {
            self.families_due = now + POLL;
            self.out.extend(self.ports.poll_families());
        }
        if self.settings_due <= soon {
            self.settings_due = now + SETTINGS_INTERVAL;
            self.out.extend(self.ports.poll_settings());
        }
        let mut rules = false;
        for watched in self.watchers.iter_mut().filter(|_| self.ports_complete) {
            if watched.due().is_some_and(|due| due <= soon) {
                let found = watched.poll(self.ports.index());
                if watched.watcher().source() == PolicySource::Rules && !found.messages.is_empty() {
                    self.moved.add(Moved::ROUTES);
                }
                found.alarm.map_or(Ok(()), |alarm| sink.alarm(alarm))?;
                rules |= !found.messages.is_empty();
                self.out.extend(found.lost.map(Message::Lost));
                self.found.extend(found.messages);
            }
        }
        if rules {
            let generations = self.watchers.iter().flat_map(Watched::flows).collect();
            self.flows.rules(generations, &mut self.out);
        }
        Ok(())
    }

    /// Tells watchers what has changed that they do not watch.
    fn tell_moved(&mut self) {
        let moved = std::mem::take(&mut self.moved);
        if moved == Moved::default() {
            return;
        }
        for family in Family::ALL.into_iter().filter(|family| moved.routes[*family as usize]) {
            let objects = family == Family::V6 && !self.nexthops.is_empty();
            self.uneven[family as usize] = objects || self.shared.is_uneven(family);
        }
        self.watchers.iter_mut().for_each(|watched| watched.moved(moved, self.uneven));
    }

    /// Whatever was to be known of rules at this time is known.
    fn heartbeat(&mut self, at: u64, sink: &mut dyn FpcSink) -> Result<(), CmError> {
        let now = Instant::now();
        if now < self.heartbeat_due || !self.ports_complete {
            return Ok(());
        }
        self.heartbeat_due = now + HEARTBEAT;
        sink.heartbeat(at)
    }

    /// Goes on with connections; true if there is more to do.
    fn step_flows(&mut self, sink: &mut dyn FpcSink) -> Result<bool, CmError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let stepped = self.flows.step(&mut buffer, &mut self.out);
        self.buffer = buffer;
        if let Some(listener) = self.flows.take_opened() {
            self.epoll.add(listener, TOKEN_FLOWS)?;
        }
        self.flush_full(sink)?;
        Ok(stepped)
    }

    // Dumps.

    /// Reads all classes anew as soon as may be: at the start, or because notifications were lost.
    fn read_everything(&mut self) {
        self.dump = None;
        let now = Instant::now();
        self.due.extend(Class::ALL.map(|class| (class, now)));
    }

    /// Reads a class anew soon.
    fn request(&mut self, class: Class) {
        let soon = Instant::now() + RESYNC_DELAY;
        let rested = self.runs.get(&class).map_or(soon, |(_, rested)| *rested);
        self.due.entry(class).or_insert(soon.max(rested));
    }

    fn begin_dump(&mut self) -> Result<(), CmError> {
        let now = Instant::now();
        // A dump must not be taken for older than notifications that were sent before what made it necessary.
        if self.dump.is_some() || self.ahead {
            return Ok(());
        }
        let Some(class) = self.due.iter().find(|(_, due)| **due <= now).map(|(class, _)| *class) else {
            return Ok(());
        };
        self.due.remove(&class);
        let (run, _) = self.runs.entry(class).or_insert((0, now));
        *run += 1;
        self.dump = Some(Dump::new(class, *run));
        self.out.extend(class.snapshot().map(Message::SnapshotBegin));
        self.begin_pass()
    }

    fn begin_pass(&mut self) -> Result<(), CmError> {
        if let Some(Dump { class: Class::Routes(family), .. }) = self.dump {
            self.shared.begin(family);
        }
        self.next_request()
    }

    fn next_request(&mut self) -> Result<(), CmError> {
        let Some(dump) = &mut self.dump else { return Ok(()) };
        match dump.next_request() {
            Some(request) => dump.sequence = self.requester.dump(request)?,
            None => dump.finished = true,
        }
        Ok(())
    }

    /// Reads a chunk of the dump under way. `caught_up`: no notification was left to read before.
    fn step_dump(&mut self, sink: &mut dyn FpcSink, caught_up: bool) -> Result<(), CmError> {
        match &self.dump {
            None => return Ok(()),
            // Notifications of what happened during the dump have all been seen now.
            Some(dump) if dump.finished && caught_up => return self.finish_dump(),
            Some(_) => {}
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let received = self.requester.receive(&mut buffer);
        let result = match received {
            Ok(Received::Bytes(len)) => self.dumped(buffer.get(..len).unwrap_or_default(), sink),
            Ok(Received::Empty) => Ok(()),
            Ok(Received::Overrun) => Err(CmError::decode("dump", "the kernel's answer does not fit the buffer")),
            Err(e) => Err(e),
        };
        self.buffer = buffer;
        result
    }

    fn dumped(&mut self, bytes: &[u8], sink: &mut dyn FpcSink) -> Result<(), CmError> {
        let mut done = false;
        for message in netlink::messages(bytes) {
            let message = message?;
            let Some(dump) = &mut self.dump else { return Ok(()) };
            if message.sequence != dump.sequence {
                continue; // of a dump that was given up
            }
            dump.interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
            match message.kind {
                NLMSG_ERROR | NLMSG_DONE => {
                    done = true;
                    let what = dump.request().map(|request| format!("dump of {request:?}")).unwrap_or_default();
                    match netlink::failure(what, &message) {
                        // The table or the family does not exist: nothing to show.
                        Some(CmError::Kernel { source, .. })
                            if matches!(
                                source.raw_os_error(),
                                Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT)
                            ) => {}
                        Some(error) => return Err(error),
                        None => {}
                    }
                }
                _ => self.shown(&message)?,
            }
            self.flush_full(sink)?;
        }
        if let Some(dump) = &mut self.dump {
            dump.boundary();
        }
        if done {
            self.settle_pending();
            self.next_request()?;
        }
        Ok(())
    }

    /// An object that a dump shows.
    fn shown(&mut self, message: &Incoming<'_>) -> Result<(), CmError> {
        let Some(dump) = &mut self.dump else { return Ok(()) };
        let payload = message.payload;
        match message.kind {
            rtm::NEWROUTE => {
                if let Some(route) =
                    decode::route::parse(payload)?.filter(|route| dump.shows(Key::Route(route.route.key)))
                {
                    if dump.pending.first().is_some_and(|first| first.route.key != route.route.key) {
                        self.settle_pending();
                    }
                    if let Some(dump) = &mut self.dump {
                        dump.pending.push(route);
                    }
                }
            }
            rtm::NEWLINK => {
                if let Some(link) = decode::link::parse(payload)?.filter(|link| dump.shows(Key::Link(link.ifindex))) {
                    self.link(link);
                }
            }
            rtm::NEWADDR => {
                let address = decode::address::parse(payload)?.filter(|address| dump.shows(Key::Address(*address)));
                self.out.extend(address.map(Message::Address));
            }
            rtm::NEWNEIGH => {
                let shown = decode::neighbour::parse(payload)?.filter(|shown| dump.shows(Key::Neighbour(shown.key)));
                self.out.extend(shown.map(Message::Neighbour));
            }
            rtm::NEWNEXTHOP => {
                let object = nexthop::parse(payload)?;
                if dump.shows(Key::Nexthop(object.id)) {
                    self.nexthops.insert(object.id);
                    self.out.push(Message::Nexthop(object));
                }
            }
            rtm::NEWNETCONF => {
                let shown = decode::netconf::parse(payload)?;
                if let Some((family, ifindex, settings)) = shown.filter(|(f, i, _)| dump.shows(Key::Netconf(*f, *i))) {
                    self.ports.netconf_changed(family, ifindex, settings);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The routes shown last are all of their key.
    fn settle_pending(&mut self) {
        let Some(dump) = &mut self.dump else { return };
        let routes = std::mem::take(&mut dump.pending);
        // A notification may have come since they were shown.
        if routes.first().is_some_and(|first| dump.shows(Key::Route(first.route.key))) {
            self.out.extend(self.shared.dumped(routes));
        }
    }

    fn finish_dump(&mut self) -> Result<(), CmError> {
        if self.dump.as_mut().is_some_and(Dump::again) {
            return self.begin_pass();
        }
        let Some(dump) = self.dump.take() else { return Ok(()) };
        match dump.class {
            Class::Links => {
                for ifindex in self.ports.indices() {
                    if !dump.mentioned(Key::Link(ifindex)) {
                        self.link_gone(ifindex);
                    }
                }
                self.ports.retell_families();
                self.settings_due = Instant::now();
                self.families_due = self.settings_due;
                self.ports_complete = true;
                self.ports_changed();
            }
            Class::Netconf(family) => {
                self.ports.netconf_retain(family, |ifindex| dump.mentioned(Key::Netconf(family, ifindex)));
                self.retell_ports();
            }
            Class::Nexthops => {
                self.nexthops.retain(|id| dump.mentioned(Key::Nexthop(*id)));
                self.moved.add(Moved::ROUTES);
            }
            Class::Routes(family) => {
                self.shared.end(family, |key| dump.mentioned(Key::Route(*key)));
                self.moved.add(Moved::routes_of(family));
            }
            Class::Addresses(_) | Class::Neighbours(_) => {}
        }
        self.out.extend(dump.class.snapshot().map(Message::SnapshotEnd));
        // Time for which it waited (for a processor, or while Linux moved interfaces) costs nobody anything.
        let rest = clock::worked().saturating_sub(dump.begun) * RESYNC_REST;
        self.runs.insert(dump.class, (dump.run, Instant::now() + rest));
        self.release(dump.class, dump.run);
        Ok(())
    }

    // Interfaces that came up, but whose old routes Linux removed without a word when they went down.

    /// Tells a port as down until these classes have been read again.
    fn hold(&mut self, ifindex: u32, classes: &[Class]) {
        let next_run = |class: &Class| (*class, self.runs.get(class).map_or(0, |(run, _)| *run) + 1);
        self.held.insert(ifindex, classes.iter().map(next_run).collect());
        self.ports.hold(ifindex, true);
    }

    fn release(&mut self, class: Class, run: u64) {
        self.held.values_mut().for_each(|awaited| awaited.retain(|(of, needed)| *of != class || *needed > run));
        let free: Vec<u32> = self.held.iter().filter(|(_, awaited)| awaited.is_empty()).map(|(i, _)| *i).collect();
        for ifindex in free {
            self.held.remove(&ifindex);
            self.ports.hold(ifindex, false);
            self.tell_port(ifindex);
        }
    }

    // Notifications.

    /// Reads what happened to interfaces; true if more may be waiting.
    fn port_notifications(&mut self) -> Result<bool, CmError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.read_port_notifications(&mut buffer);
        self.buffer = buffer;
        result
    }

    fn read_port_notifications(&mut self, buffer: &mut [u8]) -> Result<bool, CmError> {
        for _ in 0..NOTIFICATIONS_PER_TURN {
            match self.port_listener.receive(buffer)? {
                Received::Empty => return Ok(false),
                Received::Bytes(len) => {
                    self.ahead = true;
                    for message in netlink::messages(buffer.get(..len).unwrap_or_default()) {
                        self.notified(&message?)?;
                    }
                }
                Received::Overrun => return self.overrun(Listener::Interfaces).map(|()| true),
            }
        }
        Ok(true)
    }

    /// Reads other notifications; true if more may be waiting.
    fn notifications(&mut self, sink: &mut dyn FpcSink) -> Result<bool, CmError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.read_notifications(&mut buffer, sink);
        self.buffer = buffer;
        result
    }

    fn read_notifications(&mut self, buffer: &mut [u8], sink: &mut dyn FpcSink) -> Result<bool, CmError> {
        for _ in 0..NOTIFICATIONS_PER_TURN {
            match self.listener.receive(buffer)? {
                Received::Empty => return Ok(false),
                Received::Bytes(len) => {
                    for message in netlink::messages(buffer.get(..len).unwrap_or_default()) {
                        self.notified(&message?)?;
                    }
                }
                Received::Overrun => return self.overrun(Listener::Routes).map(|()| true),
            }
            self.flush_full(sink)?;
        }
        Ok(true)
    }

    fn overrun(&mut self, listener: Listener) -> Result<(), CmError> {
        tracing::warn!("notifications were lost; traffic goes to Linux until everything has been read again");
        self.out.push(Message::Lost(listener));
        // What is still queued is older than what was lost: away with it.
        self.port_listener = Channel::listener(NETLINK_ROUTE, PORT_GROUPS, self.options.receive_buffer)?;
        self.epoll.add(self.port_listener.as_fd(), TOKEN_PORTS)?;
        self.listener = Channel::listener(NETLINK_ROUTE, OTHER_GROUPS, self.options.receive_buffer)?;
        self.epoll.add(self.listener.as_fd(), TOKEN_LISTENER)?;
        self.requester = Channel::requester(NETLINK_ROUTE)?;
        self.epoll.add(self.requester.as_fd(), TOKEN_REQUESTER)?;
        for ifindex in self.ports.indices() {
            self.hold(ifindex, &Class::ALL);
            self.tell_port(ifindex);
        }
        self.read_everything();
        Ok(())
    }

    fn touch(&mut self, key: Key, removed: bool) {
        if let Some(dump) = &mut self.dump {
            dump.touch(key, removed);
        }
    }

    fn notified(&mut self, message: &Incoming<'_>) -> Result<(), CmError> {
        let payload = message.payload;
        match message.kind {
            rtm::NEWROUTE | rtm::DELROUTE => self.route_notified(message)?,
            rtm::NEWNEIGH | rtm::DELNEIGH => {
                if let Some(neighbour) = decode::neighbour::parse(payload)? {
                    let gone = message.kind == rtm::DELNEIGH;
                    self.touch(Key::Neighbour(neighbour.key), gone);
                    let delete = Message::NeighbourDelete(neighbour.key);
                    self.out.push(if gone { delete } else { Message::Neighbour(neighbour) });
                }
            }
            rtm::NEWNEXTHOP | rtm::DELNEXTHOP => self.nexthop_notified(message)?,
            rtm::NEWADDR | rtm::DELADDR => self.address_notified(message)?,
            rtm::NEWLINK => {
                if let Some(link) = decode::link::parse(payload)? {
                    self.touch(Key::Link(link.ifindex), false);
                    self.link(link);
                }
            }
            rtm::DELLINK => {
                if let Some(link) = decode::link::parse(payload)? {
                    self.touch(Key::Link(link.ifindex), true);
                    self.link_gone(link.ifindex);
                }
            }
            rtm::NEWNETCONF | rtm::DELNETCONF => {
                if let Some((family, ifindex, settings)) = decode::netconf::parse(payload)? {
                    let gone = message.kind == rtm::DELNETCONF;
                    self.netconf_notified(family, ifindex, (!gone).then_some(settings));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn route_notified(&mut self, message: &Incoming<'_>) -> Result<(), CmError> {
        let Some(route) = decode::route::parse(message.payload)? else { return Ok(()) };
        let key = route.route.key;
        let gone = message.kind == rtm::DELROUTE;
        self.moved.add(Moved::routes_of(key.prefix.family()));
        // Replacing an IPv6 multipath route removes its siblings.
        self.touch(Key::Route(key), gone || message.flags & NLM_F_REPLACE != 0);
        let Outcome { message, doubtful } = match gone {
            true => self.shared.deleted(&route),
            false => self.shared.added(route, message.flags, !self.nexthops.is_empty()),
        };
        self.out.push(message);
        if doubtful {
            self.request(Class::Routes(key.prefix.family()));
        }
        Ok(())
    }

    fn nexthop_notified(&mut self, message: &Incoming<'_>) -> Result<(), CmError> {
        let object = nexthop::parse(message.payload)?;
        let gone = message.kind == rtm::DELNEXTHOP;
        self.touch(Key::Nexthop(object.id), gone);
        self.moved.add(Moved::ROUTES);
        if gone {
            self.nexthops.remove(&object.id);
            self.out.push(Message::NexthopDelete(object.id));
            // Its routes go with it: net/ipv4/nexthop.c, __remove_nexthop_fib.
            self.request(Class::Routes(Family::V4));
            self.request(Class::Routes(Family::V6));
        } else {
            self.nexthops.insert(object.id);
            self.out.push(Message::Nexthop(object));
        }
        Ok(())
    }

    fn address_notified(&mut self, message: &Incoming<'_>) -> Result<(), CmError> {
        let Some(address) = decode::address::parse(message.payload)? else { return Ok(()) };
        let gone = message.kind == rtm::DELADDR;
        self.touch(Key::Address(address), gone);
        self.moved.add(Moved::ROUTES);
        self.out.push(if gone { Message::AddressDelete(address) } else { Message::Address(address) });
        if address.address.is_ipv4() {
            // Routes that prefer an address as source go with it, hops revive when an interface gets its first one:
            // net/ipv4/fib_frontend.c, fib_inetaddr_event.
            self.request(Class::Routes(Family::V4));
        }
        Ok(())
    }

    fn netconf_notified(&mut self, family: Family, ifindex: i32, settings: Option<decode::netconf::Settings>) {
        match settings {
            Some(settings) => self.ports.netconf_changed(family, ifindex, settings),
            None => self.ports.netconf_gone(family, ifindex),
        }
        self.moved.add(Moved::routes_of(family));
        if let Some(dump) = self.dump.as_mut().filter(|dump| dump.class == Class::Netconf(family)) {
            // It carries only what changed, and the dump may be older: neither suffices.
            dump.interrupted = true;
        }
        match u32::try_from(ifindex) {
            Ok(ifindex) => self.tell_port(ifindex),
            Err(_) => self.retell_ports(),
        }
    }

    fn link(&mut self, link: Link) {
        let usable = |link: &Link| link.up && link.carrier;
        let (ifindex, works) = (link.ifindex, usable(&link));
        let before = self.ports.link(ifindex).cloned();
        let (state, mtu, name) = ((link.up, link.carrier, link.master), link.mtu, link.name.clone());
        let group = link.group;
        self.ports.link_changed(link);
        match &before {
            Some(before) => {
                // Linux marks hops as dead or alive again without a word, too.
                self.moved.links |= (before.group, &before.name) != (group, &name);
                if (before.up, before.carrier, before.master) != state {
                    self.moved.add(Moved::ROUTES);
                    SILENT.into_iter().for_each(|class| self.request(class));
                }
                if !usable(before) && works {
                    self.hold(ifindex, &SILENT);
                }
                if before.mtu != mtu {
                    // net/ipv6/route.c, rt6_mtu_change, adjusts the routes' MTU.
                    self.request(Class::Routes(Family::V6));
                }
            }
            None => self.ports_changed(),
        }
        if before.is_some_and(|before| before.name != name) {
            self.ports_changed();
        }
        self.tell_port(ifindex);
    }

    fn link_gone(&mut self, ifindex: u32) {
        self.held.remove(&ifindex);
        if self.ports.link_gone(ifindex) {
            self.out.push(Message::PortDelete(ifindex));
        }
        SILENT.into_iter().for_each(|class| self.request(class));
        self.moved.add(Moved::ROUTES);
        self.ports_changed();
    }

    /// Tells a port if it changed, and the ports of a VRF with it.
    fn tell_port(&mut self, ifindex: u32) {
        let slaves = self.ports.slaves(ifindex);
        self.tell_ports(iter::once(ifindex).chain(slaves));
    }

    fn retell_ports(&mut self) {
        self.tell_ports(self.ports.indices());
    }

    /// Tells those that changed; while ports are being read all of them, because what is not told then is gone.
    fn tell_ports(&mut self, ports: impl IntoIterator<Item = u32>) {
        let always = self.dump.as_ref().is_some_and(|dump| dump.class == Class::Links);
        for ifindex in ports {
            self.out.extend(self.ports.message(ifindex, always));
        }
    }

    fn ports_changed(&mut self) {
        self.watchers.iter_mut().for_each(Watched::wake);
    }
}
