//! sender eth0 ---- eth0 router eth1 ---- eth0 sink
//!
//! The router has a route to 198.19.0.0/16 by way of the sink, in Linux and (`fill`) in the tables.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use towpath_engine::{Engine, Options, PortRequest, Site, possible_cpus};
use towpath_lab::{Lab, Node, PacketSocket, packet, wait_for};
use towpath_tables::backing::{Backing, PerTable, initial_elements};
use towpath_tables::record::{self, LAYOUT_VERSION, MAGIC, NO_VLANS, NexthopKind, TableId, mac_word, port_flags};

pub const LIMIT: Duration = Duration::from_secs(20);
/// The next hop that all routes lead to
pub const NEXTHOP: u32 = 1;

pub struct Rig {
    _lab: Lab,
    pub sender: Node,
    pub router: Node,
    pub sink: Node,
    pub frame: Vec<u8>,
}

pub type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

impl Rig {
    pub fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (sender, router, sink) = (lab.node("sender")?, lab.node("router")?, lab.node("sink")?);
        for node in [&sender, &router, &sink] {
            // Nothing but the test's own packets is counted.
            node.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
            node.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
        }
        lab.link((&sender, "eth0"), (&router, "eth0"))?;
        lab.link((&router, "eth1"), (&sink, "eth0"))?;
        router.sysctl("net.ipv4.ip_forward", "1")?;
        router.run(["ip", "addr", "add", "198.18.0.1/24", "dev", "eth0"])?;
        router.run(["ip", "addr", "add", "198.18.1.1/24", "dev", "eth1"])?;
        let mac = sink.mac("eth0")?.map(|byte| format!("{byte:02x}")).join(":");
        router.run(["ip", "neigh", "add", "198.18.1.2", "lladdr", &mac, "dev", "eth1", "nud", "permanent"])?;
        router.run(["ip", "route", "add", "198.19.0.0/16", "via", "198.18.1.2"])?;
        let ips: (IpAddr, IpAddr) = ("198.18.0.2".parse()?, "198.19.0.1".parse()?);
        let frame = packet::udp((sender.mac("eth0")?, router.mac("eth0")?), ips, (1000, 2000), &[0; 18]);
        Ok(Self { _lab: lab, sender, router, sink, frame })
    }

    pub fn requests(&self) -> Result<[PortRequest; 2]> {
        let (a, b) = (self.router.ifindex("eth0")?, self.router.ifindex("eth1")?);
        let slots = record::PORT_SLOTS;
        Ok([PortRequest { ifindex: a, slot: a % slots }, PortRequest { ifindex: b, slot: b % slots }])
    }

    /// Runs in a thread of the router's namespace.
    pub fn on_router<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.router.enter(f).expect("the router's namespace can be entered")
    }

    pub fn site(&self) -> Result<Site> {
        self.site_with(Options::default())
    }

    pub fn site_with(&self, options: Options) -> Result<Site> {
        Ok(self.on_router(|| Site::prepare(options))?)
    }

    /// An engine with filled tables that is not attached yet.
    pub fn engine(&self, sizes: &PerTable) -> Result<Engine> {
        self.engine_with(Options::default(), sizes)
    }

    pub fn engine_with(&self, options: Options, sizes: &PerTable) -> Result<Engine> {
        let site = self.site_with(options)?;
        let engine = self.on_router(|| site.create(sizes))?;
        self.fill(&engine)?;
        Ok(engine)
    }

    /// The route of this rig, in the form the program reads.
    pub fn fill(&self, engine: &Engine) -> Result {
        let tables = engine.tables();
        let view = tables.view();
        view.config().magic.store(MAGIC);
        view.config().version.store(LAYOUT_VERSION);
        let requests = self.requests()?;
        for (request, name) in requests.iter().zip(["eth0", "eth1"]) {
            let port = &view.ports()[request.slot as usize];
            let mac = self.router.mac(name)?;
            port.mac.store(mac_word(mac));
            port.vlans.store(NO_VLANS);
            port.lower.store(request.slot);
            port.mtu.store(1500);
            port.flags.store(port_flags::PRESENT | port_flags::READY | port_flags::FORWARD_V4);
            port.ifindex.store(request.ifindex);
        }
        let nexthop = &view.nexthops()[NEXTHOP as usize];
        let mut l2 = [0u8; 24];
        l2[..6].copy_from_slice(&self.sink.mac("eth0")?);
        l2[6..12].copy_from_slice(&self.router.mac("eth1")?);
        for (word, bytes) in nexthop.l2.iter().zip(l2.as_chunks::<8>().0) {
            word.store(u64::from_ne_bytes(*bytes));
        }
        nexthop.port.store(requests[1].slot);
        nexthop.device.store(requests[1].slot);
        nexthop.mtu.store(1500);
        nexthop.state.store(NexthopKind::Forward as u32);
        let root = &view.roots()[0];
        root.family.store(1);
        root.direct[0xc613].store(NEXTHOP);
        Ok(())
    }

    /// Packets that arrived at the sink's interface, and those that the kernel says it dropped on the way.
    pub fn arrived(&self) -> Result<u64> {
        counter(&self.sink, "eth0", "rx", "packets")
    }

    pub fn send(&self, count: usize) -> Result {
        let socket = self.sender.packet_socket("eth0")?;
        Ok((0..count).try_for_each(|_| socket.send(&self.frame))?)
    }

    /// Waits until `count` packets more than `before` have arrived.
    pub fn await_arrival(&self, before: u64, count: u64) -> Result {
        let what = format!("{count} packets at the sink; {}", self.drops());
        wait_for(LIMIT, &what, || (self.arrived().ok()? >= before + count).then_some(()))?;
        assert_eq!(self.arrived()? - before, count, "packets at the sink");
        Ok(())
    }

    /// For people: where packets may have gone.
    pub fn drops(&self) -> String {
        let ports = [(&self.sender, "eth0"), (&self.router, "eth0"), (&self.router, "eth1"), (&self.sink, "eth0")];
        let drop = |(node, port): (&Node, &str)| {
            let count = |way| counter(node, port, way, "dropped").unwrap_or_default();
            format!("{} {port} dropped {} rx, {} tx", node.name(), count("rx"), count("tx"))
        };
        ports.map(drop).join("; ")
    }

    /// Sends 50,000 packets a second (`burst`), while `f` runs and for a tenth of a second before and after;
    /// fails unless every one arrives.
    pub fn without_loss<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let socket = self.sender.packet_socket("eth0")?;
        let before = self.arrived()?;
        let stop = AtomicBool::new(false);
        let tenth = 100 * burst()? as u64;
        let (sent, outcome) = std::thread::scope(|scope| {
            let sender = scope.spawn(|| stream(&socket, &self.frame, &stop));
            let flowing = |more: u64| -> Result {
                let start = self.arrived()?;
                Ok(wait_for(LIMIT, "packets to flow", || (self.arrived().ok()? >= start + more).then_some(()))?)
            };
            let outcome = flowing(tenth).and_then(|()| f()).and_then(|value| flowing(tenth).map(|()| value));
            stop.store(true, Ordering::Relaxed);
            (sender.join().expect("the sender does not panic"), outcome)
        });
        let (sent, value) = (sent?, outcome?);
        let arrived = wait_for(LIMIT, "every packet sent to arrive", || {
            let arrived = self.arrived().ok()? - before;
            (arrived >= sent).then_some(arrived)
        })
        .map_err(|e| format!("{e}: {} of {sent} arrived; {}", self.arrived().unwrap_or(0) - before, self.drops()))?;
        assert_eq!(arrived, sent, "no packet arrives twice");
        println!("{sent} packets sent, all arrived");
        Ok(value)
    }

    /// The XDP program on a port of the router, by id.
    pub fn xdp(&self, port: &str) -> Result<Option<u64>> {
        let link = self.router.json(["ip", "-j", "link", "show", "dev", port])?;
        Ok(link[0]["xdp"]["prog"]["id"].as_u64())
    }

    pub fn gro(&self, port: &str) -> Result<bool> {
        let text = self.router.run(["ethtool", "-k", port])?;
        Ok(text.lines().any(|line| line.starts_with("generic-receive-offload: on")))
    }
}

fn stream(socket: &PacketSocket, frame: &[u8], stop: &AtomicBool) -> Result<u64> {
    let burst = vec![frame; burst()?];
    let (start, mut bursts) = (Instant::now(), 0u32);
    while !stop.load(Ordering::Relaxed) {
        socket.send_all(&burst)?;
        bursts += 1;
        std::thread::sleep((start + Duration::from_millis(1) * bursts).saturating_duration_since(Instant::now()));
    }
    Ok(u64::from(bursts) * burst.len() as u64)
}

/// Packets per millisecond. A processor that is only emulated does not carry 50,000 packets a second, and a ring that
/// overflows for want of speed says nothing about programs that come and go.
fn burst() -> Result<usize> {
    let emulated = std::fs::read_to_string("/proc/cpuinfo")?.contains("QEMU TCG");
    Ok(if emulated { 2 } else { 50 })
}

fn counter(node: &Node, port: &str, way: &str, what: &str) -> Result<u64> {
    let link = node.json(["ip", "-j", "-s", "link", "show", "dev", port])?;
    link[0]["stats64"][way][what].as_u64().ok_or_else(|| format!("no counter {way} {what} of {port}").into())
}

/// Packets that took the fast path from `slot`.
pub fn fast(engine: &Engine, slot: u32) -> u64 {
    let tables = engine.tables();
    let view = tables.view();
    let slots = view.elements(TableId::Ports);
    view.stats().iter().skip(slot as usize).step_by(slots).map(|stats| stats.rx_packets.load()).sum()
}

pub fn sizes() -> Result<PerTable> {
    Ok(initial_elements(possible_cpus()? as usize))
}
