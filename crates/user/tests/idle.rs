//! A worker without work sleeps. In a process of its own, where no other worker is.
#![cfg(not(miri))]

use std::sync::Arc;
use std::time::{Duration, Instant};
use towpath_tables::backing::{HeapBacking, initial_elements};
use towpath_user::memory::{Cable, Exceptions, MemoryPort};
use towpath_user::{BATCH, Core, Engine, Linux, Pool, Port};

/// State of the thread with this name: R while it runs or could, S while it sleeps.
fn state(name: &str) -> Option<char> {
    std::fs::read_dir("/proc/self/task").ok()?.flatten().find_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let rest = stat.split_once(&format!("({name}) "))?.1;
        rest.chars().next()
    })
}

fn becomes(wanted: char) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while state("worker-0") != Some(wanted) {
        assert!(Instant::now() < deadline, "the worker is {:?}, not {wanted}, for 10 s", state("worker-0"));
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn an_idle_worker_sleeps_with_ports_and_without() {
    let tables = Arc::new(HeapBacking::new(initial_elements(1)));
    let equip = |_| (Pool::new(BATCH, 2112), Box::new(Exceptions::default()) as Box<dyn Linux>);
    let engine = Engine::start(&tables, &[Core(0)], 0, equip).expect("there is a core 0");
    becomes('S');
    assert!(engine.add(0, Port { ifindex: 1, slot: 1, driver: Box::new(MemoryPort(Cable::new(1))) }));
    becomes('S');
}
