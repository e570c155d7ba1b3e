//!     (worker's side) tap0 host            twin0 router
//!
//! TAPs as wires, and as what stands for a wire in Linux.
#![cfg(not(miri))]

mod support;

use anyhow::{Context, Result, ensure};
use std::sync::Arc;
use support::{LIMIT, buffers, give, quiet, receive, transmit};
use towpath_lab::{Lab, Node, packet, wait_for};
use towpath_user::memory::{Cable, MemoryPort};
use towpath_user::tap::{Tap, TapPort};
use towpath_user::twin::Twinned;
use towpath_user::{BATCH, Pool, PortDriver, Vnet};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// A node with a TAP that says nothing by itself, and the other side of the TAP.
fn node(lab: &Lab, name: &str, device: &str) -> Result<(Node, Tap)> {
    let node = quiet(lab, name)?;
    node.run(["ip", "tuntap", "add", "dev", device, "mode", "tap"])?;
    node.run(["ip", "link", "set", device, "up", "address", "02:00:00:00:00:01"])?;
    let tap = node.enter(|| Tap::open(device))??;
    wait_for(LIMIT, "the TAP to have a carrier", || {
        let link = node.json(["ip", "-j", "link", "show", "dev", device]).ok()?;
        (link[0]["operstate"] == "UP" || link[0]["operstate"] == "UNKNOWN").then_some(())
    })?;
    Ok((node, tap))
}

fn frame(number: u16, payload: usize) -> Vec<u8> {
    let ips = ("192.0.2.1".parse().expect("an address"), "198.51.100.1".parse().expect("an address"));
    packet::udp((MAC, [2, 0, 0, 0, 0, 1]), ips, (1000, number), &vec![7; payload])
}

#[test]
fn frames_cross_a_tap_both_ways_as_they_are() -> Result<()> {
    let lab = Lab::new("tap")?;
    let (host, tap) = node(&lab, "host", "tap0")?;
    let (socket, mut port, mut pool) = (host.packet_socket("tap0")?, TapPort(tap), Pool::new(2 * BATCH, 4096));
    assert!(port.readable(&mut Vec::new()));
    // More than a batch, of all lengths, some with tags.
    let mut sent: Vec<_> = (0..100).map(|n| frame(n, 10 * usize::from(n))).collect();
    support::tag(&mut sent);
    socket.send_all(&sent)?;
    assert_eq!(receive(&mut port, &mut pool, sent.len())?, sent);
    for part in sent.chunks(BATCH) {
        assert_eq!(transmit(&mut port, &mut pool, part), 0);
        for frame in part {
            let got = socket.receive(LIMIT)?.context("a frame")?;
            assert_eq!((&got.bytes, got.partial_checksum), (frame, false));
        }
    }
    // While the interface is down nothing is taken.
    host.run(["ip", "link", "set", "tap0", "down"])?;
    assert_eq!(transmit(&mut port, &mut pool, &sent[..3]), 3);
    assert_eq!(pool.free(), pool.count());
    Ok(())
}

/// What a stack leaves to its device arrives done: segments of the MTU with complete checksums.
#[test]
fn linux_cuts_and_completes_what_it_sends() -> Result<()> {
    let lab = Lab::new("tapgso")?;
    let (host, tap) = node(&lab, "host", "tap0")?;
    host.run(["ip", "address", "add", "192.0.2.1/24", "dev", "tap0"])?;
    host.run(["ip", "neigh", "add", "192.0.2.2", "lladdr", "02:00:00:00:00:07", "dev", "tap0", "nud", "permanent"])?;
    let (mut port, mut pool) = (TapPort(tap), Pool::new(2 * BATCH, 4096));
    // UDP in segments of 1000 bytes (UDP_SEGMENT), which a device could cut.
    let sent = host.enter(|| -> Result<_> {
        let socket = std::net::UdpSocket::bind("192.0.2.1:1000")?;
        socket.send_to(&[9; 777], "192.0.2.2:9")?;
        support::segment(&socket, 1000)?;
        Ok(socket.send_to(&[9; 2500], "192.0.2.2:9"))
    })??;
    // Linux 6.1 does not cut UDP for a device that completes no checksums.
    let cut: &[usize] = match sent {
        Ok(_) => &[819, 1042, 1042, 542],
        Err(error) if error.raw_os_error() == Some(libc::EIO) => &[819],
        Err(error) => return Err(error.into()),
    };
    let got = receive(&mut port, &mut pool, cut.len())?;
    assert_eq!(got.iter().map(Vec::len).collect::<Vec<_>>(), cut);
    for frame in got {
        assert!(support::udp_checksum_holds(&frame), "{frame:02x?}");
    }
    Ok(())
}

#[test]
fn a_twin_stands_for_the_wire_in_linux() -> Result<()> {
    let lab = Lab::new("twin")?;
    let (router, tap) = node(&lab, "router", "twin0")?;
    let linux = router.packet_socket("twin0")?;
    let (cable, mut pool) = (Cable::new(1000), Pool::new(2 * BATCH, 4096));
    let mut port = Twinned::new(Box::new(MemoryPort(cable.clone())), Arc::new(tap));
    // From the wire, to be forwarded.
    assert!(cable.inwards.push(&frame(1, 18)));
    assert_eq!(receive(&mut port, &mut pool, 1)?, [frame(1, 18)]);
    // What is not forwarded, Linux receives.
    let exceptions = buffers(&mut pool, &[frame(2, 18), frame(3, 1000)]);
    assert_eq!(port.deliver(&exceptions), Some(0));
    give(&mut pool, exceptions);
    for number in [2, 3] {
        let got = linux.receive(LIMIT)?.context("a frame")?;
        assert_eq!(got.bytes, frame(number, if number == 2 { 18 } else { 1000 }));
    }
    // What is forwarded leaves by the wire, and so does what Linux sends, also while frames keep arriving.
    assert_eq!(transmit(&mut port, &mut pool, &[frame(4, 18)]), 0);
    assert_eq!(cable.outwards.pop(), Some(frame(4, 18)));
    let own: Vec<_> = (10..90).map(|n| frame(n, 18)).collect();
    linux.send_all(&own)?;
    let mut out = Vec::new();
    wait_for(LIMIT, "what Linux sends", || {
        assert!(cable.inwards.push(&frame(5, 18)));
        let arrived = receive(&mut port, &mut pool, 1).expect("it arrives");
        assert_eq!(arrived, [frame(5, 18)]);
        out.extend(std::iter::from_fn(|| cable.outwards.pop()));
        (out.len() >= own.len()).then_some(())
    })?;
    assert_eq!(out, own);
    assert_eq!(pool.free(), pool.count());
    // A twin that is down takes nothing.
    router.run(["ip", "link", "set", "twin0", "down"])?;
    let exceptions = buffers(&mut pool, &[frame(2, 18), frame(3, 1000)]);
    assert_eq!(port.deliver(&exceptions), Some(2));
    give(&mut pool, exceptions);
    Ok(())
}

/// A header that leaves something to Linux goes with the frame.
#[test]
fn linux_completes_what_it_is_left() -> Result<()> {
    let lab = Lab::new("tapvnet")?;
    let (host, tap) = node(&lab, "host", "tap0")?;
    let socket = host.packet_socket("tap0")?;
    let frame = frame(1, 18);
    ensure!(tap.send(&Vnet::partial(34, 6), [&frame[..10], &frame[10..40], &frame[40..]]));
    let got = socket.receive(LIMIT)?.context("a frame")?;
    assert_eq!((got.bytes, got.partial_checksum), (frame, true));
    Ok(())
}

#[test]
fn what_cannot_be_opened_is_named_with_what_helps() -> Result<()> {
    let lab = Lab::new("tapno")?;
    let (host, _tap) = node(&lab, "host", "tap0")?;
    host.run(["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"])?;
    host.run(["ip", "tuntap", "add", "dev", "tun0", "mode", "tun"])?;
    host.run(["ip", "tuntap", "add", "dev", "multi0", "mode", "tap", "multi_queue"])?;
    let cases = [
        ("none", "ip tuntap add dev none mode tap"),
        ("a-name-that-is-too-long", "ip tuntap add"),
        ("tap0", "another program has it open"),
        ("veth0", "it is no TAP"),
        ("tun0", "it is no TAP"),
        ("multi0", "one with several queues"),
    ];
    for (name, words) in cases {
        let error = host.enter(|| Tap::open(name))?.err().with_context(|| format!("{name} was opened"))?.to_string();
        assert!(error.contains(words) && error.contains(name), "{error}");
    }
    assert!(host.ifindex("none").is_err(), "nothing was made");
    Ok(())
}
