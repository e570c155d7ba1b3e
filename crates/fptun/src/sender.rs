//! Sending packets with records.

use crate::error::{Error, Result};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use towpath_wire::fptun::{Entry, Key, Record};
use zerocopy::IntoBytes;

/// Packets given to the kernel at once.
const BATCH: usize = 64;
/// Bytes that may wait in the kernel: more than its queue of received packets takes.
const BUFFER: libc::c_int = 8 << 20;

/// A packet, and where it enters.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Where
    pub entry: Entry,
    /// The mark it has from there on
    pub mark: u32,
    /// From the Ethernet header on. An interface without MAC addresses takes only the EtherType from that header
    pub frame: &'a [u8],
}

/// A packet socket on the device.
#[derive(Debug)]
pub struct Sender {
    socket: OwnedFd,
    key: Key,
}

impl Sender {
    pub(crate) fn open(device: u32, key: Key) -> Result<Self> {
        // Protocol 0: it receives nothing.
        // SAFETY: takes numbers only.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(Error::last("open a packet socket (it takes CAP_NET_RAW)"));
        }
        // SAFETY: the call has just made this descriptor, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain numbers, for which zeroes are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = device as i32;
        let buffer = BUFFER;
        // SAFETY: address and number live through the calls, and their sizes are given.
        let results = unsafe {
            let number = size_of_val(&buffer) as libc::socklen_t;
            let length = size_of_val(&address) as libc::socklen_t;
            [
                libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, (&raw const buffer).cast(), number),
                libc::bind(fd, (&raw const address).cast(), length),
            ]
        };
        if results != [0, 0] {
            return Err(Error::last("bind a packet socket to the device"));
        }
        Ok(Self { socket, key })
    }

    /// Has packets enter Linux, in order. Returns how many were not taken.
    pub fn send(&self, packets: &[Packet<'_>]) -> usize {
        packets.chunks(BATCH).map(|batch| self.send_batch(batch)).sum()
    }

    fn send_batch(&self, packets: &[Packet<'_>]) -> usize {
        let mut records = [Record::new([0; 2], Entry::Ingress(0), 0); BATCH];
        for (record, packet) in records.iter_mut().zip(packets) {
            *record = Record::new(self.key, packet.entry, packet.mark);
        }
        let pairs = packets.iter().zip(&records).map(|(packet, record)| [packet.frame, record.as_bytes()]);
        transmit(&self.socket, pairs)
    }

    /// Sends frames with whatever behind them.
    #[cfg(test)]
    pub(crate) fn send_raw(&self, frame: &[u8], behind: &[u8]) -> usize {
        transmit(&self.socket, std::iter::once([frame, behind]))
    }
}

/// Sends at most `BATCH` frames of two pieces each. Returns how many the kernel did not take.
fn transmit<'a>(socket: &OwnedFd, frames: impl Iterator<Item = [&'a [u8]; 2]>) -> usize {
    // SAFETY: plain numbers and pointers that nobody follows, for which zeroes are valid.
    let (mut pieces, mut messages): ([[libc::iovec; 2]; BATCH], [libc::mmsghdr; BATCH]) = unsafe { std::mem::zeroed() };
    let mut count = 0;
    for ((frame, pieces), message) in frames.zip(&mut pieces).zip(&mut messages) {
        *pieces = frame.map(|piece| libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() });
        message.msg_hdr.msg_iov = pieces.as_mut_ptr();
        message.msg_hdr.msg_iovlen = pieces.len();
        count += 1;
    }
    let (mut rest, mut lost) = (&mut messages[..count], 0);
    while !rest.is_empty() {
        // SAFETY: headers, vectors and frames live until after the call; the kernel only reads the frames.
        let sent = unsafe {
            libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as libc::c_uint, libc::MSG_DONTWAIT)
        };
        let done = match sent {
            1.. => sent as usize,
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => 0,
            // The first one was refused.
            _ => {
                lost += 1;
                1
            }
        };
        rest = &mut rest[done..];
    }
    lost
}
