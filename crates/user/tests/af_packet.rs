//!     host eth0 ---- wire0 router lan0 (a TAP, the wire's twin)
//!
//! An interface as a wire, by packet sockets.
#![cfg(not(miri))]

mod support;

use anyhow::{Context, Result, ensure};
use std::sync::Arc;
use std::time::Duration;
use support::{LIMIT, arrived, quiet};
use towpath_lab::{Lab, Node, packet, wait_for};
use towpath_user::af_packet::PacketPort;
use towpath_user::tap::Tap;
use towpath_user::{BATCH, Device, Passed, Pool, PortDriver};

struct Rig {
    host: Node,
    router: Node,
    port: PacketPort,
    twin: Arc<Tap>,
    pool: Pool,
    _lab: Lab,
}

impl Rig {
    fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        // Nothing but the test's own frames is on the wire, and the wire has no addresses.
        let [host, router] = [quiet(&lab, "host")?, quiet(&lab, "router")?];
        lab.link((&host, "eth0"), (&router, "wire0"))?;
        router.run(["ip", "tuntap", "add", "dev", "lan0", "mode", "tap"])?;
        router.run(["ip", "link", "set", "lan0", "up"])?;
        router.run(["ip", "address", "add", "192.0.2.1/24", "dev", "lan0"])?;
        host.run(["ip", "address", "add", "192.0.2.2/24", "dev", "eth0"])?;
        let twin = Arc::new(router.enter(|| Tap::open("lan0"))??);
        let port = router.enter(|| PacketPort::open("wire0", twin.clone()))??;
        Ok(Self { host, router, port, twin, pool: Pool::new(4 * BATCH, 4096), _lab: lab })
    }

    fn receive(&mut self, count: usize) -> Result<Vec<Vec<u8>>> {
        support::receive(&mut self.port, &mut self.pool, count)
    }

    fn transmit(&mut self, frames: &[Vec<u8>]) -> usize {
        support::transmit(&mut self.port, &mut self.pool, frames)
    }

    fn frame(&self, number: u16, payload: usize) -> Result<Vec<u8>> {
        let ips = ("192.0.2.2".parse()?, "198.51.100.1".parse()?);
        Ok(packet::udp((self.host.mac("eth0")?, [2, 0, 0, 0, 0, 9]), ips, (1000, number), &vec![7; payload]))
    }
}

/// IPv4 packets that a node's Linux has received.
fn heard(node: &Node) -> Result<u64> {
    let text = node.run(["cat", "/proc/net/snmp"])?;
    let ip = text.lines().filter(|line| line.starts_with("Ip:")).nth(1).context("no line Ip:")?;
    Ok(ip.split_whitespace().nth(3).context("no InReceives")?.parse()?)
}

#[test]
fn frames_cross_the_wire_both_ways_as_they_are() -> Result<()> {
    let mut rig = Rig::new("packet")?;
    let socket = rig.host.packet_socket("eth0")?;
    let mut frames = (0..300).map(|n| rig.frame(n, usize::from(n) * 4)).collect::<Result<Vec<_>>>()?;
    support::tag(&mut frames);
    socket.send_all(&frames)?;
    assert_eq!(rig.receive(frames.len())?, frames);
    assert_eq!(rig.port.passed(), Passed::default());
    for part in frames.chunks(BATCH) {
        assert_eq!(rig.transmit(part), 0);
        for frame in part {
            let got = socket.receive(LIMIT)?.context("a frame")?;
            assert_eq!((&got.bytes, got.partial_checksum), (frame, false));
        }
    }
    // What is too long for the device stays, and the rest is sent.
    let long = rig.frame(1, 2000)?;
    let part = [long.clone(), frames[1].clone(), long, frames[2].clone()];
    assert_eq!(rig.transmit(&part), 2);
    for frame in &frames[1..3] {
        assert_eq!(socket.receive(LIMIT)?.context("a frame")?.bytes, *frame);
    }
    assert_eq!(rig.pool.free(), rig.pool.count());
    assert_eq!(rig.port.device()?.lost(), 0);
    Ok(())
}

/// Before 6.2 the header cannot say that a frame is several UDP packets, and the kernel loses it.
fn tells_segments() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(2))
}

#[test]
fn what_a_sender_leaves_to_its_device_is_completed_or_goes_to_linux() -> Result<()> {
    let mut rig = Rig::new("packetgso")?;
    rig.host.run(["ethtool", "-K", "eth0", "tx", "on", "tx-udp-segmentation", "on"])?;
    rig.host.sh("ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent")?;
    let twin = rig.router.packet_socket("lan0")?;
    let host = rig.host.clone();
    let send = |bytes: usize, segment: libc::c_int| {
        host.enter(|| -> Result<()> {
            let socket = std::net::UdpSocket::bind("192.0.2.2:1000")?;
            support::segment(&socket, segment)?;
            socket.send_to(&vec![9; bytes], "192.0.2.9:9")?;
            Ok(())
        })?
    };
    send(777, 1000)?;
    let frame = rig.receive(1)?.remove(0);
    assert!(frame.len() == 819 && support::udp_checksum_holds(&frame), "{frame:02x?}");
    // Several packets in one, more than a buffer holds.
    send(8500, 1000)?;
    if !tells_segments() {
        let device = rig.port.device()?;
        return wait_for(LIMIT, "the loss to be counted", || (device.lost() == 1).then_some(()));
    }
    let got = wait_for(LIMIT, "Linux to receive it by the twin", || {
        assert!(arrived(&mut rig.port, &mut rig.pool).is_empty());
        twin.receive(Duration::from_millis(1)).ok().flatten()
    })?;
    assert_eq!((got.bytes.len(), got.partial_checksum), (8542, true));
    assert_eq!(rig.port.passed(), Passed { frames: 1, lost: 0 });
    // The operator's filters are asked before Linux gets it.
    send(8500, 1000)?;
    wait_for(LIMIT, "the frame to be filtered", || {
        let (mut frames, asked) = (Vec::new(), std::cell::Cell::new(0));
        rig.port.receive_unless(&mut rig.pool, &mut frames, &|bytes| {
            asked.set(bytes.len());
            true
        });
        (asked.get() == 8542).then_some(())
    })?;
    assert_eq!(rig.port.passed(), Passed::default());
    // A twin that is down does not take it.
    rig.router.run(["ip", "link", "set", "lan0", "down"])?;
    send(8500, 1000)?;
    let passed = wait_for(LIMIT, "the frame", || {
        assert!(arrived(&mut rig.port, &mut rig.pool).is_empty());
        Some(rig.port.passed()).filter(|passed| passed.frames != 0)
    })?;
    assert_eq!(passed, Passed { frames: 1, lost: 1 });
    Ok(())
}

#[test]
fn linux_hears_nothing_of_the_wire_while_it_is_one() -> Result<()> {
    let mut rig = Rig::new("packetdeaf")?;
    let socket = rig.host.packet_socket("eth0")?;
    let ips = ("192.0.2.2".parse()?, "192.0.2.1".parse()?);
    let frame = packet::udp((rig.host.mac("eth0")?, rig.router.mac("wire0")?), ips, (1000, 9), &[7; 18]);
    let before = heard(&rig.router)?;
    let frames = vec![frame.clone(); 50];
    socket.send_all(&frames)?;
    assert_eq!(rig.receive(50)?, frames);
    assert_eq!(heard(&rig.router)?, before);
    let Rig { port, router, .. } = rig;
    drop(port);
    // A child of this process that is about to start another program may keep the sockets for a moment.
    wait_for(LIMIT, "Linux to hear again", || {
        socket.send(&frame).ok()?;
        (heard(&router).ok()? > before).then_some(())
    })?;
    assert_eq!(router.run(["nft", "list", "ruleset"])?, "", "nothing is left");
    Ok(())
}

#[test]
fn what_cannot_be_a_wire_is_named_with_what_helps() -> Result<()> {
    let rig = Rig::new("packetno")?;
    rig.router.run(["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"])?;
    rig.router.run(["ip", "address", "add", "198.51.100.1/24", "dev", "veth0"])?;
    let cases = [("veth0", "ip address flush dev"), ("wire0", "another program has it"), ("none", "No such device")];
    for (wire, words) in cases {
        let error = format!(
            "{}",
            rig.router
                .enter(|| PacketPort::open(wire, rig.twin.clone()))?
                .err()
                .with_context(|| format!("{wire} was taken"))?
        );
        ensure!(error.contains(words) && error.contains(wire), "{error}");
    }
    Ok(())
}
