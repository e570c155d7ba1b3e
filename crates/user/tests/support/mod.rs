//! What the tests of wires share: frames to send, and a batch's way into buffers and out of them.
#![allow(dead_code, reason = "each test file uses a part")]

use anyhow::{Result, ensure};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::Duration;
use towpath_lab::{Lab, Node, wait_for};
use towpath_user::{Buffer, Pool, PortDriver};

/// How long to wait for anything before the test fails.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A node that says nothing by itself.
pub fn quiet(lab: &Lab, name: &str) -> Result<Node> {
    let node = lab.node(name)?;
    node.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
    Ok(node)
}

/// Puts a tag into each seventh frame, and another around it into each twenty-first.
pub fn tag(frames: &mut [Vec<u8>]) {
    for frame in frames.iter_mut().step_by(7) {
        frame.splice(12..12, [0x81, 0, 0x60, 5]);
    }
    for frame in frames.iter_mut().step_by(21) {
        frame.splice(12..12, [0x88, 0xa8, 0x10, 7]);
    }
}

/// The frames in buffers of the pool.
pub fn buffers(pool: &mut Pool, frames: &[Vec<u8>]) -> Vec<Buffer> {
    let mut fill = |frame: &Vec<u8>| {
        let mut buffer = pool.take().expect("a buffer");
        buffer.resize(frame.len()).copy_from_slice(frame);
        buffer
    };
    frames.iter().map(&mut fill).collect()
}

/// Gives buffers back.
pub fn give(pool: &mut Pool, frames: Vec<Buffer>) {
    frames.into_iter().for_each(|frame| pool.give(frame));
}

/// What has arrived, a batch at most.
pub fn arrived(port: &mut impl PortDriver, pool: &mut Pool) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    port.receive(pool, &mut frames);
    let bytes = frames.iter().map(|frame| frame.bytes().to_vec()).collect();
    give(pool, frames);
    bytes
}

/// Frames that arrive until there are so many.
pub fn receive(port: &mut impl PortDriver, pool: &mut Pool, count: usize) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    wait_for(LIMIT, &format!("{count} frames"), || {
        all.extend(arrived(port, pool));
        (all.len() >= count).then_some(())
    })?;
    Ok(all)
}

/// Transmits frames; how many were not sent.
pub fn transmit(port: &mut impl PortDriver, pool: &mut Pool, frames: &[Vec<u8>]) -> usize {
    let mut frames = buffers(pool, frames);
    port.transmit(pool, &mut frames);
    let left = frames.len();
    give(pool, frames);
    left
}

/// Has a socket's datagrams cut into segments of so many bytes, by the device if it can (UDP_SEGMENT).
pub fn segment(socket: &UdpSocket, bytes: libc::c_int) -> Result<()> {
    // SAFETY: the value lives across the call and is as long as said.
    let set = unsafe {
        let (value, length) = ((&raw const bytes).cast(), size_of_val(&bytes) as u32);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, value, length)
    };
    ensure!(set == 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Whether the UDP checksum of an untagged IPv4 frame without options is right.
pub fn udp_checksum_holds(frame: &[u8]) -> bool {
    let udp = &frame[34..];
    let pseudo = [&frame[26..34], &[0, 17], &(udp.len() as u16).to_be_bytes(), udp].concat();
    towpath_lab::packet::checksum(&pseudo) == 0
}
