//! Network namespaces, a running CM, and a model of what it told.

#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::PipeWriter;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use towpath_cm::{Cm, CmError, Options, Watcher};
use towpath_fpc::*;
use towpath_tables::flow::{self, Tuple};
use towpath_tables::record::Family;

/// How long a condition may take to hold.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `test` in a thread with a network namespace of its own, which ends with it.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        enter_new_namespace();
        ip("link set lo up");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Moves the calling thread into a new network namespace.
pub fn enter_new_namespace() {
    // SAFETY: concerns only the calling thread's namespace; takes no pointers.
    let rc = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(rc, 0, "unshare: {}", std::io::Error::last_os_error());
}

/// Runs `ip` with these words; gives its complaint if it failed.
pub fn try_ip(words: &str) -> Result<String, String> {
    let output = Command::new("ip").args(words.split_whitespace()).output().expect("ip can be run");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// Runs `ip`, which must succeed.
pub fn ip(words: &str) -> String {
    try_ip(words).unwrap_or_else(|error| panic!("ip {words}: {error}"))
}

/// Writes a sysctl of the calling thread's namespace.
pub fn sysctl(path: &str, value: &str) {
    let file = format!("/proc/sys/net/{path}");
    std::fs::write(&file, value).unwrap_or_else(|error| panic!("{file}: {error}"));
}

/// Waits until `condition` gives something.
pub fn wait<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a receiver of CM's messages knows, by marking and sweeping.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Model {
    pub ports: BTreeMap<u32, Port>,
    pub addresses: BTreeMap<Address, ()>,
    pub neighbours: BTreeMap<NeighbourKey, Option<[u8; 6]>>,
    pub routes: BTreeMap<RouteKey, Route>,
    pub nexthops: BTreeMap<u32, NexthopObject>,
    pub flows: BTreeMap<Tuple, flow::Connection>,
    pub policies: BTreeMap<PolicySource, Vec<Policy>>,
    pub settings: [Option<u8>; 2],
}

/// A model with what is only needed to build it.
#[derive(Default)]
pub struct Replay {
    pub model: Model,
    pub ended: Vec<Snapshot>,
    /// Everything told, in order
    pub log: Vec<Message>,
    /// How often notifications were lost
    pub lost: BTreeMap<Listener, u32>,
    open: Vec<Snapshot>,
    ports: HashSet<u32>,
    addresses: HashSet<Address>,
    neighbours: HashSet<NeighbourKey>,
    routes: HashSet<RouteKey>,
    nexthops: HashSet<u32>,
    flows: HashSet<Tuple>,
    alarms: BTreeSet<AlarmId>,
}

impl Replay {
    pub fn apply(&mut self, message: Message) {
        self.log.push(message.clone());
        let model = &mut self.model;
        match message {
            Message::SnapshotBegin(snapshot) => self.begin(snapshot),
            Message::SnapshotEnd(snapshot) => self.end(snapshot),
            Message::Port(port) => {
                self.ports.insert(port.ifindex);
                model.ports.insert(port.ifindex, port);
            }
            Message::PortDelete(ifindex) => drop(model.ports.remove(&ifindex)),
            Message::Address(address) => {
                self.addresses.insert(address);
                model.addresses.insert(address, ());
            }
            Message::AddressDelete(address) => drop(model.addresses.remove(&address)),
            // The kernel makes and forgets entries of multicast groups as it likes.
            Message::Neighbour(neighbour) if neighbour.key.address.is_multicast() => {}
            Message::Neighbour(neighbour) => {
                self.neighbours.insert(neighbour.key);
                model.neighbours.insert(neighbour.key, neighbour.lladdr);
            }
            Message::NeighbourDelete(key) => drop(model.neighbours.remove(&key)),
            Message::Route(route) => {
                self.routes.insert(route.key);
                model.routes.insert(route.key, route);
            }
            Message::RouteDelete(key) => drop(model.routes.remove(&key)),
            Message::Nexthop(object) => {
                self.nexthops.insert(object.id);
                model.nexthops.insert(object.id, object);
            }
            Message::NexthopDelete(id) => drop(model.nexthops.remove(&id)),
            Message::Flow(connection) => {
                self.flows.insert(connection.original);
                model.flows.insert(connection.original, connection);
            }
            Message::FlowDelete(original) => drop(model.flows.remove(&original)),
            Message::Policy(policy) => model.policies.entry(policy.source).or_default().push(policy),
            Message::Alarm(alarm) => drop(self.alarms.insert(alarm.id)),
            Message::AlarmOver(id) => assert!(self.alarms.remove(&id), "{id:?} ends but was not told"),
            Message::Heartbeat(_) => {}
            Message::Lost(listener) => *self.lost.entry(listener).or_default() += 1,
            Message::FamilySettings(settings) => model.settings[settings.family as usize] = Some(settings.hash_policy),
        }
    }

    fn begin(&mut self, snapshot: Snapshot) {
        self.open.push(snapshot);
        match snapshot {
            Snapshot::Ports => self.ports.clear(),
            Snapshot::Addresses(of) => self.addresses.retain(|address| Family::of(address.address) != of),
            Snapshot::Neighbours(of) => self.neighbours.retain(|key| Family::of(key.address) != of),
            Snapshot::Nexthops => self.nexthops.clear(),
            Snapshot::Routes(of) => self.routes.retain(|key| key.prefix.family() != of),
            Snapshot::Flows => self.flows.clear(),
            Snapshot::Policies(source) => drop(self.model.policies.insert(source, Vec::new())),
        }
    }

    fn end(&mut self, snapshot: Snapshot) {
        assert!(self.open.contains(&snapshot), "{snapshot:?} ends but did not begin");
        self.open.retain(|open| *open != snapshot);
        self.ended.push(snapshot);
        let model = &mut self.model;
        match snapshot {
            Snapshot::Ports => model.ports.retain(|key, _| self.ports.contains(key)),
            Snapshot::Addresses(of) => {
                model.addresses.retain(|key, _| Family::of(key.address) != of || self.addresses.contains(key));
            }
            Snapshot::Neighbours(of) => {
                model.neighbours.retain(|key, _| Family::of(key.address) != of || self.neighbours.contains(key));
            }
            Snapshot::Nexthops => model.nexthops.retain(|key, _| self.nexthops.contains(key)),
            Snapshot::Routes(of) => {
                model.routes.retain(|key, _| key.prefix.family() != of || self.routes.contains(key));
            }
            Snapshot::Flows => model.flows.retain(|key, _| self.flows.contains(key)),
            Snapshot::Policies(_) => {}
        }
    }

    /// Every class was told once.
    pub fn is_complete(&self) -> bool {
        self.ended.contains(&Snapshot::Routes(Family::V6))
    }
}

/// A CM that runs in a thread, in the namespace of the thread that started it.
pub struct Running {
    pub receiver: Arc<Mutex<Replay>>,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<Result<(), CmError>>>,
}

impl Running {
    pub fn start() -> Self {
        Self::with(Options::default(), Vec::new)
    }

    /// A CM with options and watchers, once it has told everything.
    pub fn with(options: Options, watchers: impl FnOnce() -> Vec<Box<dyn Watcher>> + Send + 'static) -> Self {
        let receiver = Arc::new(Mutex::new(Replay::default()));
        let (end, stop) = std::io::pipe().expect("pipe");
        let told = receiver.clone();
        let thread = std::thread::spawn(move || {
            let mut sink = |batch: Vec<Message>| {
                let mut receiver = told.lock().expect("lock");
                batch.into_iter().for_each(|message| receiver.apply(message));
                Ok(())
            };
            Cm::new(options, watchers())?.run(&mut sink, end.as_fd())
        });
        let running = Self { receiver, stop: Some(stop), thread: Some(thread) };
        wait("first snapshots", || running.receiver.lock().expect("lock").is_complete().then_some(()));
        running
    }

    pub fn model(&self) -> Model {
        self.receiver.lock().expect("lock").model.clone()
    }

    /// Waits until the model fulfils a condition.
    pub fn wait<T>(&self, what: &str, mut condition: impl FnMut(&Model) -> Option<T>) -> T {
        wait(what, || condition(&self.receiver.lock().expect("lock").model))
    }

    /// Waits until what was told is what a new CM would tell.
    pub fn settle(&self, what: &str) {
        let start = Instant::now();
        loop {
            let fresh = fresh();
            let told = self.model();
            if told == fresh {
                return;
            }
            if start.elapsed() > DEADLINE {
                panic!("told and real state differ {what}\n{}", differences(&told, &fresh));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        let result = self.thread.take().expect("running").join();
        if !std::thread::panicking() {
            result.expect("CM's thread does not panic").expect("CM ends without an error");
        }
    }
}

/// The lines in which two models differ.
fn differences(told: &Model, real: &Model) -> String {
    let lines = |model: &Model| format!("{model:#?}").lines().map(str::to_owned).collect::<Vec<_>>().join("\n");
    let mut text = String::new();
    for key in told.routes.keys().chain(real.routes.keys().filter(|key| !told.routes.contains_key(key))) {
        if told.routes.get(key) != real.routes.get(key) {
            text += &format!("told {:?}\nreal {:?}\n", told.routes.get(key), real.routes.get(key));
        }
    }
    let without_routes = |model: &Model| Model { routes: BTreeMap::new(), ..model.clone() };
    if without_routes(told) != without_routes(real) {
        text += &format!("told {}\nreal {}", lines(&without_routes(told)), lines(&without_routes(real)));
    }
    text
}

/// What a new CM tells.
pub fn fresh() -> Model {
    Running::start().model()
}

/// Interface index by name.
pub fn ifindex(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).expect("name");
    // SAFETY: the name is a terminated string that lives across the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}
