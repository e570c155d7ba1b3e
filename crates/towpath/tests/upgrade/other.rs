//! Two builds of the command that take over from each other under traffic: the one that was built with the tests, and the
//! one that TOWPATH_OTHER names (`scripts/upgrade.sh` builds another revision and runs these tests).

use super::world::{Ends, PORTS, World};
use crate::common::{Daemon, Net, RIGHT, built, eventually};
use crate::support::{self, Asker, Talk};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use towpath_tables::mix::Random;

/// Upgrades and downgrades, each as often.
const ROUNDS: usize = 3;
const WORKERS: [&str; 4] = ["--engine", "user", "--cores", "0"];

fn other() -> PathBuf {
    std::env::var_os("TOWPATH_OTHER").expect("TOWPATH_OTHER names another build").into()
}

/// Both builds, as often as there are rounds, the other one first and last.
fn turns() -> impl Iterator<Item = PathBuf> {
    (0..ROUNDS).flat_map(|_| [built(), other()])
}

/// Kills a daemon and starts this build, which takes its tables over, or says why it replaces them.
fn succeed(net: &Net, mut killed: Daemon, binary: &Path, arguments: &[&str]) -> Daemon {
    killed.signal(libc::SIGKILL);
    net.set_binary(binary);
    let daemon = net.up(arguments);
    let replaced = daemon.log().lines().find(|line| line.contains("are replaced")).map(str::to_owned);
    assert_eq!(net.json(&["status"])["adopted"] == true, replaced.is_none(), "{}", daemon.log());
    let which = if binary == built() { "this build" } else { "the other build" };
    println!("{which}: {}", replaced.unwrap_or_else(|| "takes the tables over".into()));
    daemon
}

/// Routes change under a stream. What workers had in their rings when they were killed is lost, and nothing else.
fn routed(engine: &[&str]) {
    let world = World::new(Random(7), false);
    let (net, traffic) = (&world.net, &world.traffic);
    let arguments = [engine, &PORTS].concat();
    net.set_binary(&other());
    let mut daemon = Some(net.up(&arguments));
    let mut switches = Vec::new();
    world.turns(|| {
        net.flows(500);
        for binary in turns() {
            let (linux, sent) = (net.forwarded_by_linux(), traffic.sent());
            let last = daemon.take().expect("a daemon");
            daemon = Some(succeed(net, last, &binary, &arguments));
            switches.push(sent..traffic.sent());
            let held = world.hold();
            super::check(net);
            traffic.follows(&held);
            drop(held);
            net.flows(500);
            let (sent, linux) = (traffic.sent() - sent, net.forwarded_by_linux() - linux);
            assert!(linux as usize <= sent / 4, "Linux forwarded {linux} of {sent}");
        }
    });
    let lost = traffic.lost();
    println!("{engine:?}: {} packets, {} lost, {} switches", traffic.sent(), lost.len(), switches.len());
    if engine.is_empty() {
        traffic.is_whole();
    }
    // A worker has at most so much in hand.
    const IN_HAND: usize = 64;
    let excused = |number: &usize| {
        switches.iter().any(|switch| (switch.start.saturating_sub(IN_HAND)..switch.end).contains(number))
    };
    assert!(lost.iter().all(excused), "{lost:?}, but the switches were at {switches:?}");
    assert!(net.towpath(&["down"]).status.success());
    daemon.expect("a daemon").wait();
}

/// Connections through a firewall with address translation go on, and go fast again by each build.
fn connected(engine: &[&str]) {
    let net = support::firewall();
    support::echoes(&net);
    let arguments = [engine, &["--flows", "established", "eth0", "eth1"]].concat();
    net.set_binary(&other());
    let mut daemon = Some(net.up(&arguments));
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    let mut inwards = Talk::start(&net.right, &format!("{}:{}", support::OUTSIDE, support::FORWARDED));
    let asker = Asker::start(&net, 7002);
    let begun = [talk.port(), inwards.port(), asker.port()];
    let all_fast = || {
        let is_fast = |port: &u16| support::flow(&net, *port).is_some_and(|flow| support::is_fast(&flow));
        eventually("all connections go fast", || begun.iter().all(is_fast).then_some(()));
        net.flows(100);
    };
    let stop = AtomicBool::new(false);
    let asked = std::thread::scope(|scope| {
        let _end = Ends(&stop);
        let asking = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                talk.exchange(1);
                inwards.exchange(1);
                asker.ask(1);
                count += 1;
            }
            count
        });
        all_fast();
        for binary in turns() {
            let last = daemon.take().expect("a daemon");
            daemon = Some(succeed(&net, last, &binary, &arguments));
            all_fast();
        }
        stop.store(true, Ordering::Relaxed);
        asking.join().expect("all was answered")
    });
    println!("{engine:?}: {asked} questions by each of three connections were answered");
    assert!(net.towpath(&["down"]).status.success());
    daemon.expect("a daemon").wait();
}

#[test]
#[ignore = "needs another build: scripts/upgrade.sh"]
fn another_build_takes_over_and_gives_back() {
    routed(&[]);
}

#[test]
#[ignore = "needs another build: scripts/upgrade.sh"]
fn another_build_takes_over_from_workers_and_gives_back() {
    routed(&WORKERS);
}

#[test]
#[ignore = "needs another build: scripts/upgrade.sh"]
fn connections_go_on_with_another_build() {
    connected(&[]);
}

#[test]
#[ignore = "needs another build: scripts/upgrade.sh"]
fn connections_go_on_with_another_build_and_workers() {
    connected(&WORKERS);
}
