//! DPDK's software devices as wires.
#![cfg(feature = "dpdk")]

mod support;

use anyhow::{Context, Result};
use support::{LIMIT, quiet};
use towpath_lab::{Lab, packet};
use towpath_user::dpdk::DpdkPort;
use towpath_user::{BATCH, Pool, PortDriver};

struct Wire {
    port: DpdkPort,
    pool: Pool,
}

impl Wire {
    fn new(port: DpdkPort) -> Self {
        let mut pool = Pool::new(4 * BATCH, 4096);
        let mut port = port;
        port.start(&mut pool);
        Self { port, pool }
    }

    fn turn(&mut self) -> Vec<Vec<u8>> {
        support::arrived(&mut self.port, &mut self.pool)
    }

    fn receive(&mut self, count: usize) -> Result<Vec<Vec<u8>>> {
        support::receive(&mut self.port, &mut self.pool, count)
    }

    /// How many were not sent.
    fn transmit(&mut self, frames: &[Vec<u8>]) -> usize {
        support::transmit(&mut self.port, &mut self.pool, frames)
    }
}

fn frame(number: u16, payload: usize) -> Vec<u8> {
    let ips = ("192.0.2.1".parse().expect("an address"), "198.51.100.1".parse().expect("an address"));
    packet::udp(([2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 1]), ips, (1000, number), &vec![7; payload])
}

/// Of many lengths, some with a tag or two.
fn frames() -> Vec<Vec<u8>> {
    let mut frames: Vec<_> = (0..60).map(|n| frame(n, 20 * usize::from(n))).collect();
    support::tag(&mut frames);
    frames
}

#[test]
fn what_a_ring_is_given_comes_back_and_more_finds_no_room() -> Result<()> {
    let mut wire = Wire::new(DpdkPort::open("net_ring0")?);
    for _ in 0..200 {
        assert_eq!(wire.transmit(&frames()), 0);
        assert!(wire.receive(60)? == frames());
    }
    assert!(!wire.port.readable(&mut Vec::new()));
    // Rings are of a fixed size; what does not fit is not taken, and all buffers come back.
    let refused: usize = (0..100).map(|_| wire.transmit(&frames())).sum();
    assert!(refused > 0 && refused < 6000, "{refused}");
    assert_eq!(wire.receive(6000 - refused)?.len(), 6000 - refused);
    assert!(wire.turn().is_empty());
    assert_eq!(wire.pool.free(), wire.pool.count());
    Ok(())
}

#[test]
fn null_gives_and_takes_without_end() -> Result<()> {
    let mut wire = Wire::new(DpdkPort::open("net_null0,size=100")?);
    // More than there are buffers.
    for _ in 0..500 {
        let arrived = wire.turn();
        assert!(!arrived.is_empty() && arrived.iter().all(|frame| frame.len() == 100));
        assert_eq!(wire.transmit(&frames()), 0);
    }
    // A worker without buffers loses what arrives, and nothing else.
    let mut none = Pool::new(1, 4096);
    let last = none.take().context("a buffer")?;
    for _ in 0..500 {
        let mut frames = Vec::new();
        wire.port.receive(&mut none, &mut frames);
        assert!(frames.is_empty());
    }
    none.give(last);
    assert!(!wire.turn().is_empty());
    Ok(())
}

#[test]
fn a_tap_of_dpdks_is_an_interface_of_linuxs() -> Result<()> {
    let lab = Lab::new("dpdktap")?;
    let host = quiet(&lab, "host")?;
    let mut wire = Wire::new(host.enter(|| DpdkPort::open("net_tap0,iface=dtap0"))??);
    host.run(["ip", "link", "set", "dtap0", "up"])?;
    let socket = host.packet_socket("dtap0")?;
    socket.send_all(&frames())?;
    assert!(wire.receive(60)? == frames());
    assert_eq!(wire.transmit(&frames()), 0);
    for frame in frames() {
        let got = socket.receive_matching(LIMIT, |got| got.bytes == frame)?;
        assert!(got.is_some(), "{frame:02x?}");
    }
    Ok(())
}

#[test]
fn frames_cross_an_interface_by_packet_sockets_of_dpdks() -> Result<()> {
    let lab = Lab::new("dpdkpacket")?;
    let (host, router) = (quiet(&lab, "host")?, quiet(&lab, "router")?);
    lab.link((&host, "eth0"), (&router, "wire0"))?;
    let mut wire = Wire::new(router.enter(|| DpdkPort::open("net_af_packet0,iface=wire0"))??);
    let socket = host.packet_socket("eth0")?;
    // It takes an outer tag out of the frame and tells no more of it than that it was one.
    let sent: Vec<_> = frames().into_iter().filter(|frame| frame[12..14] != [0x88, 0xa8]).collect();
    socket.send_all(&sent)?;
    assert!(wire.receive(sent.len())? == sent);
    assert_eq!(wire.transmit(&sent), 0);
    for frame in sent {
        assert!(socket.receive(LIMIT)?.context("a frame")?.bytes == frame, "{frame:02x?}");
    }
    Ok(())
}

#[test]
fn devices_come_and_go_and_those_that_cannot_be_are_named() -> Result<()> {
    for _ in 0..3 {
        let mut wire = Wire::new(DpdkPort::open("net_null7,size=64")?);
        assert!(!wire.turn().is_empty());
    }
    for device in ["net_nothing0", "0000:ff:00.0", "net_af_packet7", ""] {
        let error = DpdkPort::open(device).err().with_context(|| format!("{device} was opened"))?.to_string();
        assert!(error.contains("find the device") && error.contains("--vdev") && error.contains(device), "{error}");
    }
    Ok(())
}
