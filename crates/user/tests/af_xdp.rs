//! sender eth0 ---- eth0 router eth1 ---- eth0 sink
//!
//! A worker serves the router's ports by AF_XDP sockets; the tables are filled by hand with what Linux has been told. What
//! it does not forward must reach Linux, and what it does must not.
#![cfg(not(miri))]

use anyhow::{Context, Result, ensure};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use towpath_engine::{GraceMethod, Options, PortRequest, Site, possible_cpus};
use towpath_fptun::{self as fptun, Fptun, Packet};
use towpath_lab::{Lab, Node, packet};
use towpath_tables::Reason;
use towpath_tables::backing::{Backing, initial_elements};
use towpath_tables::lpm::Leaf;
use towpath_tables::nexthop::{Action, Header, NexthopIdentity, NexthopValue};
use towpath_tables::record::{Family, PORT_SLOTS, SOCKET_FRAME, port_flags};
use towpath_tables::rib::Entry;
use towpath_tables::writer::{MAIN_ROOT, PortValue, TableWriter};
use towpath_user::af_xdp::{STRIDE, XdpPort};
use towpath_user::{Core, Engine, Linux, Pool, Port};

const LIMIT: Duration = Duration::from_secs(20);
/// Links: the router's and its neighbour's address, and those to reach
const LINKS: [(&str, &str, &str); 2] = [("eth0", "198.18.0.1", "198.18.0.2"), ("eth1", "198.18.1.1", "198.18.1.2")];

/// An address to which the sink is the way, and which does not answer
const BEYOND: &str = "198.19.0.1";

type Tables = towpath_engine::Tables;

struct Rig {
    sender: Node,
    sink: Node,
    router: Node,
    xdp: towpath_engine::Engine,
    user: Option<(Engine<Tables>, Fptun)>,
    tables: Arc<Tables>,
    slots: [u32; 2],
    /// MAC addresses: the sender's, the router's two, the sink's
    macs: [[u8; 6]; 4],
    _lab: Lab,
    _alone: MutexGuard<'static, ()>,
}

/// All workers share a core: one rig at a time.
static ALONE: Mutex<()> = Mutex::new(());

impl Rig {
    fn new(name: &str) -> Result<Self> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let lab = Lab::new(name)?;
        let [sender, router, sink] = [lab.node("sender")?, lab.node("router")?, lab.node("sink")?];
        for node in [&sender, &router, &sink] {
            // Nothing but the test's own packets is counted.
            node.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
            node.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
        }
        lab.link((&sender, "eth0"), (&router, "eth0"))?;
        lab.link((&router, "eth1"), (&sink, "eth0"))?;
        // Longer frames than sockets take can arrive.
        for node in [&sender, &router] {
            node.run(["ip", "link", "set", "eth0", "mtu", "3300"])?;
        }
        router.sysctl("net.ipv4.ip_forward", "1")?;
        for (node, (port, ours, theirs)) in [&sender, &sink].into_iter().zip(LINKS) {
            router.run(["ip", "addr", "add", &format!("{ours}/24"), "dev", port])?;
            node.run(["ip", "addr", "add", &format!("{theirs}/24"), "dev", "eth0"])?;
            node.run(["ip", "route", "add", "default", "via", ours])?;
            let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
            for (on, dev, address, mac) in
                [(&router, port, theirs, node.mac("eth0")?), (node, "eth0", ours, router.mac(port)?)]
            {
                on.run(["ip", "neigh", "add", address, "lladdr", &text(mac), "dev", dev, "nud", "permanent"])?;
            }
        }
        let (xdp, tables, slots) = serve(&router, &[&sender, &sink])?;
        let macs = [sender.mac("eth0")?, router.mac("eth0")?, router.mac("eth1")?, sink.mac("eth0")?];
        let mut rig = Self { macs, sender, sink, router, xdp, user: None, tables, slots, _lab: lab, _alone: alone };
        rig.start_worker()?;
        Ok(rig)
    }

    fn start_worker(&mut self) -> Result<()> {
        let line = possible_cpus()?;
        self.user = Some(self.router.enter(|| -> Result<_> {
            let fptun = Fptun::open()?;
            let mut sender = Some(fptun.sender(towpath_fptun::Kind::Arrived)?);
            let equip = |_| {
                let mut sender = sender.take().expect("one worker");
                let linux = move |ifindex: u32, frame: &[u8]| {
                    sender.send([Packet { entry: fptun::Entry::Ingress(ifindex), mark: 0, frame }]) == 0
                };
                (Pool::new(4096, STRIDE), Box::new(linux) as Box<dyn Linux>)
            };
            let user = Engine::start(&self.tables, &[Core(0)], line, equip)?;
            let area = user.areas().next().context("one worker")?;
            for ((port, ..), slot) in LINKS.into_iter().zip(self.slots) {
                let ifindex = self.router.ifindex(port)?;
                let driver = XdpPort::open(area, ifindex, 0)?;
                let socket = driver.as_fd().try_clone_to_owned()?;
                ensure!(user.add(0, Port { ifindex, slot, driver: Box::new(driver) }));
                self.xdp.set_socket(slot, 0, Some(socket.as_fd()))?;
            }
            Ok((user, fptun))
        })??);
        Ok(())
    }

    /// A port's counters: those of the XDP program, and the worker's.
    fn totals(&self, port: usize) -> (Totals, Totals) {
        let (view, slot) = (self.tables.view(), self.slots[port] as usize);
        let all: Vec<_> = view.stats().iter().skip(slot).step_by(PORT_SLOTS as usize).collect();
        let (worker, cpus) = all.split_last().expect("lines of statistics");
        let sum = |lines: &[&towpath_tables::record::PortStats]| Totals {
            rx: lines.iter().map(|stats| stats.rx_packets.load()).sum(),
            tx: lines.iter().map(|stats| stats.tx_packets.load()).sum(),
            lost: lines.iter().map(|stats| stats.tx_lost.load() + stats.exceptions_lost.load()).sum(),
            exceptions: Reason::ALL
                .iter()
                .map(|reason| (*reason, lines.iter().map(|stats| stats.exceptions[*reason as usize].load()).sum()))
                .filter(|(_, count)| *count != 0)
                .collect(),
        };
        (sum(cpus), sum(&[worker]))
    }

    /// A UDP frame from the sender to an address beyond the router.
    fn frame(&self, number: u16, payload: usize) -> Result<Vec<u8>> {
        let ips: (IpAddr, IpAddr) = (LINKS[0].2.parse()?, BEYOND.parse()?);
        Ok(packet::udp((self.macs[0], self.macs[1]), ips, (1000, number), &vec![7; payload]))
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Totals {
    rx: u64,
    tx: u64,
    lost: u64,
    exceptions: Vec<(Reason, u64)>,
}

/// The XDP program on both ports, and tables that say what Linux has been told.
fn serve(router: &Node, neighbours: &[&Node; 2]) -> Result<(towpath_engine::Engine, Arc<Tables>, [u32; 2])> {
    router.enter(|| -> Result<_> {
        let site = Site::prepare(Options { sockets: true, ..Options::default() })?;
        let xdp = site.create(&initial_elements(possible_cpus()? as usize + 1))?;
        let mut writer = TableWriter::create(xdp.tables(), GraceMethod::choose()?)?;
        let local = writer.alloc_nexthop(NexthopIdentity {
            ifindex: 0,
            gateway: None,
            mtu: 0,
            reason: Some(Reason::LocalDestination),
        })?;
        writer.set_nexthop(local, &NexthopValue::exception(Reason::LocalDestination));
        let mut requests = Vec::new();
        for ((port, ours, theirs), node) in LINKS.into_iter().zip(neighbours) {
            let ifindex = router.ifindex(port)?;
            let slot = writer.alloc_port(ifindex)?;
            let flags = port_flags::READY | port_flags::FORWARD_V4;
            let (mac, to) = (router.mac(port)?, node.mac("eth0")?);
            writer.set_port(slot, &PortValue { flags, mac, mtu: 1500, ..PortValue::plain(slot) });
            let identity = NexthopIdentity { ifindex, gateway: Some(theirs.parse()?), mtu: 0, reason: None };
            let hop = writer.alloc_nexthop(identity)?;
            let header = Header::new(to, mac, &[]).context("a header")?;
            writer.set_nexthop(
                hop,
                &NexthopValue { action: Action::Forward(header), port: slot, device: slot, mtu: 1500 },
            );
            let beyond = (port == "eth1").then_some((BEYOND, hop));
            for (address, hop) in [(ours, local), (theirs, hop)].into_iter().chain(beyond) {
                let leaf = Leaf::nexthop(hop).context("a leaf")?;
                writer.route_set(MAIN_ROOT[Family::V4 as usize], address.parse()?, 32, Entry { leaf, level: 0 })?;
            }
            requests.push(PortRequest { ifindex, slot });
        }
        ensure!(writer.publish().full.is_empty());
        xdp.attach(&requests)?;
        let tables = Arc::new(xdp.tables());
        Ok((xdp, tables, [requests[0].slot, requests[1].slot]))
    })?
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.user.take());
        let _ = self.router.enter(|| self.xdp.teardown());
    }
}

#[test]
fn a_worker_forwards_and_linux_gets_the_rest_as_it_came() -> Result<()> {
    let rig = Rig::new("afxdp")?;
    let (socket, linux) = (rig.sink.packet_socket("eth0")?, rig.router.packet_socket("eth0")?);
    let sender = rig.sender.packet_socket("eth0")?;

    // Forwarded: more than the rings hold, one after another.
    const FRAMES: u16 = 1200;
    for number in 0..FRAMES {
        sender.send(&rig.frame(number, 18)?)?;
        let got = socket.receive_matching(LIMIT, |got| got.bytes.get(36..38) == Some(&number.to_be_bytes()[..]))?;
        let got =
            got.with_context(|| format!("frame {number} did not come: {:?} {:?}", rig.totals(0), rig.totals(1)))?;
        let mut expected = rig.frame(number, 18)?;
        expected[..6].copy_from_slice(&rig.macs[3]);
        expected[6..12].copy_from_slice(&rig.macs[2]);
        expected[22] -= 1;
        let sum = u16::from_be_bytes([expected[24], expected[25]]);
        let sum = sum.checked_add(0x100).unwrap_or_else(|| sum.wrapping_add(0x101));
        expected[24..26].copy_from_slice(&sum.to_be_bytes());
        ensure!(got.bytes == expected, "{:02x?} instead of {expected:02x?}", got.bytes);
    }
    let count = u64::from(FRAMES);
    assert_eq!(rig.totals(0), (Totals::default(), Totals { rx: count, ..Totals::default() }));
    assert_eq!(rig.totals(1), (Totals::default(), Totals { tx: count, ..Totals::default() }));

    // Not forwarded: Linux sees each received by the port, every byte as it came.
    linux.drain()?;
    let mut to_router = rig.frame(9, 100)?;
    to_router[30..34].copy_from_slice(&[198, 18, 0, 1]);
    let mut last_hop = rig.frame(9, 100)?;
    last_hop[22] = 1;
    for frame in [&mut to_router, &mut last_hop] {
        frame[24..26].fill(0);
        let sum = packet::checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        // The UDP checksum is none of the router's business, but zero says that there is none.
        frame[40..42].fill(0);
        sender.send(frame)?;
        let seen = linux.receive_matching(LIMIT, |seen| seen.bytes == *frame)?;
        ensure!(seen.is_some(), "Linux did not see {frame:02x?}");
    }
    let (_, worker) = rig.totals(0);
    assert_eq!(worker.exceptions, [(Reason::TtlExpired, 1), (Reason::LocalDestination, 1)]);
    assert_eq!((worker.rx, worker.lost), (count, 0));

    // What need not or cannot leave the kernel: no IP packet, and a frame that is too long for a socket.
    let mut other = rig.frame(9, 100)?;
    other[12..14].copy_from_slice(&[0x88, 0xb5]);
    let long = rig.frame(9, SOCKET_FRAME)?;
    for frame in [&other, &long] {
        sender.send(frame)?;
        ensure!(linux.receive_matching(LIMIT, |seen| seen.bytes == *frame)?.is_some(), "Linux did not see a frame");
    }
    let (program, unchanged) = rig.totals(0);
    assert_eq!(program.exceptions, [(Reason::UnsupportedEncap, 1), (Reason::MtuExceeded, 1)]);
    assert_eq!(unchanged, worker);
    Ok(())
}

#[test]
fn hosts_reach_each_other_and_the_router() -> Result<()> {
    let rig = Rig::new("afxdpping")?;
    let ping =
        |arguments: &[&str]| rig.sender.command("ping").args(["-n", "-i", "0.05", "-W", "20"]).args(arguments).output();
    for (target, size) in [("198.18.1.2", "56"), ("198.18.0.1", "56"), ("198.18.1.1", "1400"), ("198.18.1.2", "1472")] {
        let output = ping(&["-c", "5", "-s", size, target])?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains(" 5 received"), "{target}: {text} {:?} {:?}", rig.totals(0), rig.totals(1));
    }
    let output = ping(&["-c", "1", "-t", "1", "198.18.1.2"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(text.contains("From 198.18.0.1") && text.contains("Time to live exceeded"), "{text}");
    // Requests one way and answers the other by the worker; the rest is Linux's.
    let ((_, inside), (_, outside)) = (rig.totals(0), rig.totals(1));
    assert_eq!((inside.rx, outside.rx, inside.lost + outside.lost), (10, 10, 0));
    assert_eq!(inside.exceptions, [(Reason::TtlExpired, 1), (Reason::LocalDestination, 10)]);
    Ok(())
}

#[test]
fn when_the_workers_are_gone_the_program_forwards() -> Result<()> {
    let mut rig = Rig::new("afxdpgone")?;
    let sender = rig.sender.packet_socket("eth0")?;
    let socket = rig.sink.packet_socket("eth0")?;
    let pass = |rig: &Rig, number: u16, limit: Duration| -> Result<bool> {
        sender.send(&rig.frame(number, 18)?)?;
        let got = socket.receive_matching(limit, |got| got.bytes.get(36..38) == Some(&number.to_be_bytes()[..]))?;
        Ok(got.is_some())
    };
    let forwarded = |rig: &Rig| (rig.totals(0).0.rx, rig.totals(0).1.rx);
    ensure!(pass(&rig, 1, LIMIT)?, "the worker does not forward");
    assert_eq!(forwarded(&rig), (0, 1));
    // As if it had died: nobody takes its sockets out of the map. They end with the last process that has them, which may
    // be a child of this one that is about to start another program.
    drop(rig.user.take());
    towpath_lab::wait_for(LIMIT, "the program to forward", || {
        pass(&rig, 2, Duration::from_millis(100)).is_ok_and(|passed| passed).then_some(())
    })?;
    assert_eq!(forwarded(&rig), (1, 1));
    rig.start_worker()?;
    ensure!(pass(&rig, 3, LIMIT)?, "the new worker does not forward");
    assert_eq!(forwarded(&rig), (1, 2));
    Ok(())
}

#[test]
fn sockets_that_cannot_be_are_refused() -> Result<()> {
    let rig = Rig::new("afxdpno")?;
    let (ifindex, area) = (rig.router.ifindex("eth0")?, Pool::new(64, STRIDE).area());
    let refused = |queue: u32| rig.router.enter(|| XdpPort::open(area, ifindex, queue).err().map(|e| e.to_string()));
    let busy = refused(0)?.context("the worker has this queue")?;
    ensure!(busy.contains("another socket has this queue"), "{busy}");
    let none = refused(99)?.context("there is no such queue")?;
    ensure!(none.contains("queue 99") && none.contains("is there such a queue?"), "{none}");
    Ok(())
}
