//! A router with four ports, whose routes to twelve destinations change all the time, and a stream of packets to them: where
//! each has come is known by its number.
//!
//!     left -- eth0 [router] eth1 -- right, eth2 -- second, eth3 -- third

use crate::common::{Net, enlarge_buffer, eventually, paced};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Scope, sleep};
use std::time::Duration;
use towpath_lab::{Node, RouteSocket};
use towpath_tables::mix::Random;

pub const PORTS: [&str; 4] = ["eth0", "eth1", "eth2", "eth3"];
const UDP_PORT: u16 = 7000;
const TARGETS: usize = 12;
/// Packets that there is room for: some minutes of them.
const PACKETS: usize = 1 << 20;
/// A firewall whose connections may go fast.
const RULES: &str = "table inet filter { \
    chain forward { \
        type filter hook forward priority 0; policy drop; \
        ct state established,related accept; \
        iifname eth0 accept; \
    }; \
};";

/// The hosts behind ports 1 to 3, as gateways.
const GATEWAYS: [[&str; 2]; 3] =
    [["198.51.100.2", "2001:db8:2::2"], ["203.0.113.2", "2001:db8:3::2"], ["198.18.0.2", "2001:db8:4::2"]];

fn gateway(host: usize, family: usize) -> IpAddr {
    GATEWAYS[host][family].parse().expect("an address")
}

/// A destination: a wide route leads to one host for good, a narrow one, while there is one, to the same or to another.
pub struct Target {
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
pub struct Routes {
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

/// A packet a millisecond to the targets, in turn, and which host each has come to. The packets of connections come back.
pub struct Traffic {
    stop: AtomicBool,
    sent: AtomicU64,
    /// 1 + the host's number, by the packet's
    arrivals: Vec<AtomicU8>,
    /// 1 for those that came back
    answers: Option<Vec<AtomicU8>>,
}

impl Traffic {
    fn new(connections: bool) -> Self {
        let marks = || (0..PACKETS).map(|_| AtomicU8::new(0)).collect();
        let answers = connections.then(marks);
        Self { stop: AtomicBool::new(false), sent: AtomicU64::new(0), arrivals: marks(), answers }
    }

    fn start<'a>(&'a self, scope: &'a Scope<'a, '_>, left: &Node, hosts: [&Node; 3], targets: &[Target]) {
        let socket = |node: &Node, address: IpAddr, port| {
            let bind = || UdpSocket::bind((address, port));
            let socket = node.enter(bind).expect("in the node").expect("a free port");
            enlarge_buffer(&socket);
            socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
            socket
        };
        for (number, host) in hosts.into_iter().enumerate() {
            // Answers come from where the question went, so each destination has a socket.
            for target in targets {
                let socket = socket(host, target.address, UDP_PORT);
                scope.spawn(move || self.receive(&socket, &self.arrivals, 1 + number as u8, self.answers.is_some()));
            }
        }
        let socket = socket(left, Ipv6Addr::UNSPECIFIED.into(), 0);
        if let Some(answers) = &self.answers {
            let socket = socket.try_clone().expect("a second descriptor");
            scope.spawn(move || self.receive(&socket, answers, 1, false));
        }
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

    /// Notes what comes, and sends it back if it is to be answered.
    fn receive(&self, socket: &UdpSocket, marks: &[AtomicU8], mark: u8, answer: bool) {
        let mut buffer = [0; 8];
        while !self.stop.load(Ordering::Relaxed) || !self.is_complete() {
            if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let before = marks[u64::from_be_bytes(buffer) as usize].swap(mark, Ordering::Relaxed);
                assert_eq!(before, 0, "a packet came twice");
                if answer {
                    socket.send_to(&buffer, from).expect("sent back");
                }
            } else if self.stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Packets sent so far.
    pub fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed) as usize
    }

    /// Where a packet has come, and come back from if it is to.
    fn host_of(&self, number: usize) -> Option<usize> {
        let is_back = |answers: &Vec<AtomicU8>| answers[number].load(Ordering::Relaxed) != 0;
        let host = usize::from(self.arrivals[number].load(Ordering::Relaxed)).checked_sub(1);
        host.filter(|_| self.answers.as_ref().is_none_or(is_back))
    }

    fn is_complete(&self) -> bool {
        (0..self.sent()).rev().all(|number| self.host_of(number).is_some())
    }

    /// What is sent from now on goes where Linux's routes lead.
    pub fn follows(&self, routes: &Routes) {
        let first = self.sent();
        for number in first..first + 4 * TARGETS {
            let host = eventually("a packet arrives", || self.host_of(number));
            let target = &routes.targets[number % TARGETS];
            assert_eq!(host, target.now, "{}, of the hosts {:?}", target.address, target.hosts);
        }
    }

    /// The packets that did not come, or not back.
    pub fn lost(&self) -> Vec<usize> {
        (0..self.sent()).filter(|number| self.host_of(*number).is_none()).collect()
    }

    /// Nothing was lost.
    pub fn is_whole(&self) {
        let lost = self.lost();
        assert!(lost.is_empty(), "{} of {} lost: {lost:?}", lost.len(), self.sent());
    }

    /// Nothing came to a host that no route has led to.
    fn is_led(&self, targets: &[Target]) {
        let strays =
            |number: &usize| self.host_of(*number).is_some_and(|host| !targets[number % TARGETS].hosts.contains(&host));
        let stray: Vec<_> = (0..self.sent()).filter(strays).collect();
        assert!(stray.is_empty(), "{} of {} came to a wrong host: {stray:?}", stray.len(), self.sent());
    }
}

/// Ends what goes on beside, also where a test fails.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// All of it.
pub struct World {
    pub net: Net,
    others: [Node; 2],
    routes: Mutex<Routes>,
    pub traffic: Traffic,
}

impl World {
    /// Without a daemon. `connections`: packets pass a firewall, by which they belong to connections.
    pub fn new(random: Random, connections: bool) -> Self {
        let net = Net::new();
        let others = [
            net.add_host("second", "eth2", "203.0.113", "2001:db8:3"),
            net.add_host("third", "eth3", "198.18.0", "2001:db8:4"),
        ];
        for (host, gateways) in [&net.right, &others[0], &others[1]].into_iter().zip(GATEWAYS) {
            host.sh("ip route add local 10.0.0.0/8 dev lo; ip route add local 2001:db8:100::/40 dev lo")
                .expect("routes");
            // Such addresses are no interface's.
            host.sysctl("net.ipv6.ip_nonlocal_bind", "1").expect("set");
            gateways.iter().for_each(|own| eventually("a host is reached", || net.ping(&net.left, own).then_some(())));
        }
        if connections {
            net.router.run(["nft", RULES]).expect("rules");
        }
        let routes = Mutex::new(Routes::new(&net.router, random));
        Self { net, others, routes, traffic: Traffic::new(connections) }
    }

    /// Keeps the routes as they are.
    pub fn hold(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has traffic flow and routes change while this is done. All that was sent came to where routes have led.
    pub fn turns(&self, work: impl FnOnce()) {
        let stop = AtomicBool::new(false);
        let hosts = [&self.net.right, &self.others[0], &self.others[1]];
        std::thread::scope(|scope| {
            let _ends = (Ends(&stop), Ends(&self.traffic.stop));
            self.traffic.start(scope, &self.net.left, hosts, &self.hold().targets);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    self.hold().burst();
                    sleep(Duration::from_millis(5));
                }
            });
            work();
        });
        self.traffic.is_led(&self.hold().targets);
    }
}
