//! Daemons that are killed at random moments: while they start, take tables over, build new ones beside them, or follow routes,
//! which change all the time. Traffic must all arrive, at a host that a route has led to; and, as soon as the next daemon is
//! ready, at the host that Linux's routes name.
//!
//!     left -- eth0 [router] eth1 -- right, eth2 -- second, eth3 -- third
//!
//! TOWPATH_DAEMON_CRASHES sets how many are killed, TOWPATH_SEED where the random numbers begin.

use super::change_config;
use crate::common::{Net, enlarge_buffer, eventually, paced};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Scope, sleep};
use std::time::{Duration, Instant, SystemTime};
use towpath_lab::{Node, RouteSocket};
use towpath_tables::mix::Random;

const KILLS: u32 = 5;
const PORTS: [&str; 4] = ["eth0", "eth1", "eth2", "eth3"];
const UDP_PORT: u16 = 7000;
const TARGETS: usize = 12;
/// Packets that there is room for: some minutes of them.
const PACKETS: usize = 1 << 20;
/// Longest life of a daemon that was ready.
const LIFE: Duration = Duration::from_millis(400);

/// The hosts behind ports 1 to 3, as gateways.
const GATEWAYS: [[&str; 2]; 3] =
    [["198.51.100.2", "2001:db8:2::2"], ["203.0.113.2", "2001:db8:3::2"], ["198.18.0.2", "2001:db8:4::2"]];

fn gateway(host: usize, family: usize) -> IpAddr {
    GATEWAYS[host][family].parse().expect("an address")
}

/// A destination: a wide route leads to one host for good, a narrow one, while there is one, to the same or to another.
struct Target {
    address: IpAddr,
    narrow: (IpAddr, u8),
    hosts: [usize; 2],
    /// Which of them Linux's routes name
    now: usize,
    is_narrow: bool,
}

impl Target {
    fn new(number: usize, routes: &mut RouteSocket) -> Self {
        let hosts = [number % GATEWAYS.len(), (number + 1) % GATEWAYS.len()];
        let v4 = |third, last| IpAddr::V4(Ipv4Addr::new(10, number as u8, third, last));
        let v6 = |fourth, last| IpAddr::V6([0x2001, 0xdb8, 0x100 + number as u16, fourth, 0, 0, 0, last].into());
        let (address, narrow, wide) = match number % 2 {
            0 => (v4(1, 1), (v4(1, 0), 24), (v4(0, 0), 16)),
            _ => (v6(1, 1), (v6(1, 0), 64), (v6(0, 0), 48)),
        };
        routes.replace(wide, gateway(hosts[0], number % 2)).expect("a route");
        Self { address, narrow, hosts, now: hosts[0], is_narrow: false }
    }

    /// Sets the narrow route to either host, or takes it away.
    fn change(&mut self, routes: &mut RouteSocket, random: &mut Random) {
        let family = usize::from(self.address.is_ipv6());
        match random.below(3) as usize {
            2 if self.is_narrow => {
                routes.delete(self.narrow).expect("deleted");
                (self.now, self.is_narrow) = (self.hosts[0], false);
            }
            2 => {}
            which => {
                routes.replace(self.narrow, gateway(self.hosts[which], family)).expect("replaced");
                (self.now, self.is_narrow) = (self.hosts[which], true);
            }
        }
    }
}

/// What the routes are, and what changes them.
struct Routes {
    socket: RouteSocket,
    random: Random,
    targets: Vec<Target>,
    /// Whether there are these others
    others: Vec<bool>,
}

impl Routes {
    fn new(router: &Node, random: Random) -> Self {
        let mut socket = router.route_socket().expect("a socket");
        let targets = (0..TARGETS).map(|number| Target::new(number, &mut socket)).collect();
        socket.flush().expect("routes");
        Self { socket, random, targets, others: vec![false; 2000] }
    }

    /// Some changes at once: of routes that traffic follows, and of others, so that tables grow and shrink.
    fn burst(&mut self) {
        for _ in 0..self.random.below(8) {
            let which = self.random.below(TARGETS as u32) as usize;
            self.targets[which].change(&mut self.socket, &mut self.random);
        }
        for _ in 0..self.random.below(100) {
            let which = self.random.below(self.others.len() as u32) as usize;
            let prefix = (IpAddr::V4(Ipv4Addr::from(0xac10_0000 + ((which as u32) << 6))), 26);
            let is = &mut self.others[which];
            *is = !*is;
            match *is {
                true => self.socket.replace(prefix, gateway(which % GATEWAYS.len(), 0)).expect("a route"),
                false => self.socket.delete(prefix).expect("deleted"),
            }
        }
        self.socket.flush().expect("changed");
    }
}

/// A packet a millisecond to the targets, in turn, and which host each has come to.
struct Traffic {
    stop: AtomicBool,
    sent: AtomicU64,
    /// 1 + the host's number, by the packet's
    arrivals: Vec<AtomicU8>,
}

impl Traffic {
    fn new() -> Self {
        let arrivals = (0..PACKETS).map(|_| AtomicU8::new(0)).collect();
        Self { stop: AtomicBool::new(false), sent: AtomicU64::new(0), arrivals }
    }

    fn start<'a>(&'a self, scope: &'a Scope<'a, '_>, left: &Node, hosts: [&Node; 3], targets: &[Target]) {
        let socket =
            |node: &Node, port| node.enter(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))).expect("in the node");
        for (number, host) in hosts.into_iter().enumerate() {
            let socket = socket(host, UDP_PORT).expect("a free port");
            enlarge_buffer(&socket);
            socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
            scope.spawn(move || self.receive(&socket, 1 + number as u8));
        }
        let socket = socket(left, 0).expect("bound");
        let address = |target: &Target| match target.address {
            IpAddr::V4(address) => SocketAddr::new(address.to_ipv6_mapped().into(), UDP_PORT),
            IpAddr::V6(address) => SocketAddr::new(address.into(), UDP_PORT),
        };
        let addresses: Vec<_> = targets.iter().map(address).collect();
        scope.spawn(move || {
            paced(&self.stop, &self.sent, |number| {
                let sent = socket.send_to(&number.to_be_bytes(), addresses[number as usize % TARGETS]);
                assert_eq!(sent.expect("sent"), 8);
            });
        });
    }

    fn receive(&self, socket: &UdpSocket, host: u8) {
        let mut buffer = [0; 8];
        while !self.stop.load(Ordering::Relaxed) || !self.is_complete() {
            if socket.recv(&mut buffer).is_ok() {
                let before = self.arrivals[u64::from_be_bytes(buffer) as usize].swap(host, Ordering::Relaxed);
                assert_eq!(before, 0, "a packet came twice");
            } else if self.stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed) as usize
    }

    /// Where a packet has come.
    fn host_of(&self, number: usize) -> Option<usize> {
        usize::from(self.arrivals[number].load(Ordering::Relaxed)).checked_sub(1)
    }

    fn is_complete(&self) -> bool {
        (0..self.sent()).rev().all(|number| self.host_of(number).is_some())
    }

    /// What is sent from now on goes where Linux's routes lead.
    fn follows(&self, routes: &Routes) {
        let first = self.sent();
        for number in first..first + 4 * TARGETS {
            let host = eventually("a packet arrives", || self.host_of(number));
            let target = &routes.targets[number % TARGETS];
            assert_eq!(host, target.now, "{}, of the hosts {:?}", target.address, target.hosts);
        }
    }

    /// Nothing was lost, and nothing came to a host that no route has led to.
    fn is_whole(&self, targets: &[Target]) {
        let lost: Vec<_> = (0..self.sent()).filter(|number| self.host_of(*number).is_none()).collect();
        assert!(lost.is_empty(), "{} of {} lost: {lost:?}", lost.len(), self.sent());
        let strays =
            |number: &usize| !targets[number % TARGETS].hosts.contains(&self.host_of(*number).expect("it came"));
        let stray: Vec<_> = (0..self.sent()).filter(strays).collect();
        assert!(stray.is_empty(), "{} of {} came to a wrong host: {stray:?}", stray.len(), self.sent());
    }
}

/// Ends what goes on beside, also where a test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

fn part(of: Duration, random: &mut Random) -> Duration {
    of * random.below(1000) / 1000
}

#[test]
fn daemons_that_are_killed_at_random_moments_lose_and_misroute_nothing() {
    let kills = number("TOWPATH_DAEMON_CRASHES").map_or(KILLS, |kills| kills as u32);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_nanos() as u64;
    let seed = number("TOWPATH_SEED").unwrap_or(now);
    println!("TOWPATH_SEED={seed}");
    let mut random = Random(seed);

    let net = Net::new();
    let clean = net.traces();
    let second = net.add_host("second", "eth2", "203.0.113", "2001:db8:3");
    let third = net.add_host("third", "eth3", "198.18.0", "2001:db8:4");
    let hosts = [&net.right, &second, &third];
    for (host, gateways) in hosts.into_iter().zip(GATEWAYS) {
        host.sh("ip route add local 10.0.0.0/8 dev lo; ip route add local 2001:db8:100::/40 dev lo").expect("routes");
        gateways.iter().for_each(|own| eventually("a host is reached", || net.ping(&net.left, own).then_some(())));
    }
    let routes = Routes::new(&net.router, Random(random.bits()));
    let begin = Instant::now();
    let mut daemon = net.up(&PORTS);
    let start = begin.elapsed();
    let healthy = net.traces();
    let (traffic, stop) = (Traffic::new(), AtomicBool::new(false));
    let mut adopted = 0;
    let routes = Mutex::new(routes);
    let hold = || -> MutexGuard<'_, Routes> { routes.lock().unwrap_or_else(PoisonError::into_inner) };
    std::thread::scope(|scope| {
        let _ends = (Ends(&stop), Ends(&traffic.stop));
        traffic.start(scope, &net.left, hosts, &hold().targets);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                hold().burst();
                sleep(Duration::from_millis(5));
            }
        });
        for _ in 0..kills {
            match random.below(2) {
                0 => sleep(part(LIFE, &mut random)),
                _ => {
                    daemon.signal(libc::SIGKILL);
                    spoil(&net, &mut random);
                    daemon = net.start_up(&PORTS);
                    sleep(part(start * 3 / 2, &mut random));
                }
            }
            daemon.signal(libc::SIGKILL);
            spoil(&net, &mut random);
            let linux = net.forwarded_by_linux();
            let sent = traffic.sent();
            daemon = net.up(&PORTS);
            let held = hold();
            adopted += u32::from(net.json(&["status"])["adopted"] == true);
            let check = net.towpath(&["check"]);
            assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
            traffic.follows(&held);
            net.flows(100);
            let (sent, linux) = (traffic.sent() - sent, net.forwarded_by_linux() - linux);
            assert!(linux as usize <= sent / 4, "Linux forwarded {linux} of {sent}");
            assert_eq!(net.traces().matches("prog/xdp").count(), PORTS.len());
            assert_eq!(net.traces().split("], ").last(), healthy.split("], ").last(), "as many pins as before");
        }
    });
    println!("{} packets; {kills} daemons were killed, of whose tables {adopted} were taken over", traffic.sent());
    traffic.is_whole(&hold().targets);
    assert!(net.towpath(&["down"]).status.success());
    daemon.wait();
    assert_eq!(net.traces(), clean);
}

/// Now and then, what is left is of another version: then the next daemon builds tables beside.
fn spoil(net: &Net, random: &mut Random) {
    if random.below(3) == 0 && net.pins().join("config").exists() {
        change_config(net, |config| config.version.store(999));
    }
}
