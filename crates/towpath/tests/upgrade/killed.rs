//! Daemons that are killed at random moments: while they start, take tables over, build new ones beside them, or follow routes,
//! which change all the time. Traffic must all arrive, at a host that a route has led to; and, as soon as the next daemon is
//! ready, at the host that Linux's routes name.
//!
//! TOWPATH_DAEMON_CRASHES sets how many are killed, TOWPATH_SEED where the random numbers begin. With TOWPATH_OTHER, another
//! build of the command, each daemon is one of the two by chance.

use super::change_config;
use super::world::{PORTS, World};
use crate::common::{Daemon, Net, built, eventually};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};
use towpath_tables::mix::Random;

const KILLS: u32 = 5;
/// Longest life of a daemon that was ready.
const LIFE: Duration = Duration::from_millis(400);

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

fn part(of: Duration, random: &mut Random) -> Duration {
    of * random.below(1000) / 1000
}

/// Now and then, what is left is of another version: then the next daemon builds tables beside.
fn spoil(net: &Net, random: &mut Random) {
    if random.below(3) == 0 && net.pins().join("config").exists() {
        change_config(net, |config| config.version.store(999));
    }
}

/// The builds of the command that there are.
fn builds() -> Vec<PathBuf> {
    std::iter::once(built()).chain(std::env::var_os("TOWPATH_OTHER").map(PathBuf::from)).collect()
}

/// Kills a daemon, spoils what it left or not, and starts one of the builds.
fn follow(net: &Net, mut killed: Daemon, arguments: &[&str], random: &mut Random) -> Daemon {
    killed.signal(libc::SIGKILL);
    spoil(net, random);
    let builds = builds();
    net.set_binary(&builds[random.below(builds.len() as u32) as usize]);
    net.start_up(arguments)
}

/// `connections`: whether packets belong to such, which go fast when Linux has accepted them.
fn killed(connections: bool) {
    let kills = number("TOWPATH_DAEMON_CRASHES").map_or(KILLS, |kills| kills as u32);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_nanos() as u64;
    let seed = number("TOWPATH_SEED").unwrap_or(now);
    println!("TOWPATH_SEED={seed}");
    let mut random = Random(seed);

    let world = World::new(Random(random.bits()), connections);
    let (net, traffic) = (&world.net, &world.traffic);
    let clean = net.traces();
    let arguments: &[&str] = if connections { &["--flows", "established"] } else { &[] };
    let arguments = [arguments, &PORTS].concat();
    let begin = Instant::now();
    let mut daemon = Some(net.up(&arguments));
    let start = begin.elapsed();
    let pins = || net.traces().split("], ").last().map(str::to_owned);
    let mut adopted = 0;
    world.turns(|| {
        // What notes accepted packets comes with the first rules that connections may pass.
        net.flows(100);
        let healthy = pins();
        for _ in 0..kills {
            let mut last = daemon.take().expect("a daemon");
            match random.below(2) {
                0 => sleep(part(LIFE, &mut random)),
                _ => {
                    last = follow(net, last, &arguments, &mut random);
                    sleep(part(start * 3 / 2, &mut random));
                }
            }
            let linux = net.forwarded_by_linux();
            let sent = traffic.sent();
            last = follow(net, last, &arguments, &mut random);
            last.await_log("ready: ");
            let held = world.hold();
            adopted += u32::from(net.json(&["status"])["adopted"] == true);
            super::check(net);
            traffic.follows(&held);
            net.flows(100);
            let (sent, linux) = (traffic.sent() - sent, net.forwarded_by_linux() - linux);
            // A new daemon has Linux accept each connection's packets first.
            assert!(connections || linux as usize <= sent / 4, "Linux forwarded {linux} of {sent}");
            assert_eq!(net.traces().matches("prog/xdp").count(), PORTS.len());
            let as_before = || (builds().len() > 1 || pins() == healthy).then_some(());
            eventually(&format!("as many pins as before, {healthy:?}"), as_before);
            drop(held);
            daemon = Some(last);
        }
    });
    println!(
        "{} packets; {kills} daemons were killed in {:?}, of whose tables {adopted} were taken over",
        traffic.sent(),
        begin.elapsed()
    );
    traffic.is_whole();
    assert!(net.towpath(&["down"]).status.success());
    daemon.expect("a daemon").wait();
    assert_eq!(net.traces(), clean);
}

#[test]
fn daemons_that_are_killed_at_random_moments_lose_and_misroute_nothing() {
    killed(false);
}

#[test]
fn nor_do_they_lose_or_misroute_packets_of_connections() {
    killed(true);
}
