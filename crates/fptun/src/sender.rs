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

/// An EtherType for local experiments (IEEE 802): nothing looks into a packet of this type.
const OPAQUE: u16 = 0x88b5;

/// What a sender's packets may be and enter by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Frames as they arrived, whatever they hold, at the ingress of interfaces with MAC addresses
    Arrived,
    /// Packets whose headers are in order, anywhere. Linux looks into them while the record is still behind them
    /// (`packet_parse_headers` in net/packet/af_packet.c, 6.1); what it takes for headers, it lets nobody cut. So one that
    /// says it is longer than it is may be dropped, as `Outcome::Undeliverable`
    Whole,
}

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
    /// A batch on its way, each frame with its record: the kernel takes what lies in one piece faster than two pieces
    batch: Vec<u8>,
}

impl Sender {
    pub(crate) fn open(device: u32, key: Key, kind: Kind) -> Result<Self> {
        // Not bound yet, it receives nothing; bound, nothing either, since no packet gets past the device's program.
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
        address.sll_protocol = match kind {
            Kind::Arrived => OPAQUE.to_be(),
            Kind::Whole => 0,
        };
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
        Ok(Self { socket, key, batch: Vec::new() })
    }

    /// Has packets enter Linux, in order. Returns how many were not taken.
    pub fn send<'a>(&mut self, packets: impl IntoIterator<Item = Packet<'a>>) -> usize {
        let mut packets = packets.into_iter();
        let (mut lengths, mut lost) = ([0; BATCH], 0);
        loop {
            self.batch.clear();
            let mut count = 0;
            for (packet, length) in packets.by_ref().take(BATCH).zip(&mut lengths) {
                self.batch.extend_from_slice(packet.frame);
                self.batch.extend_from_slice(Record::new(self.key, packet.entry, packet.mark).as_bytes());
                *length = packet.frame.len() + size_of::<Record>();
                count += 1;
            }
            if count == 0 {
                return lost;
            }
            lost += self.send_batch(&lengths[..count]);
        }
    }

    /// Sends a frame with whatever behind it.
    #[cfg(test)]
    pub(crate) fn send_raw(&mut self, frame: &[u8], behind: &[u8]) -> usize {
        self.batch = [frame, behind].concat();
        self.send_batch(&[self.batch.len()])
    }

    /// Sends what lies in `batch`, frames of these lengths. Returns how many the kernel did not take.
    fn send_batch(&mut self, lengths: &[usize]) -> usize {
        // SAFETY: plain numbers and pointers that nobody follows, for which zeroes are valid.
        let (mut pieces, mut messages): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) = unsafe { std::mem::zeroed() };
        let mut left = self.batch.as_mut_slice();
        for ((length, piece), message) in lengths.iter().zip(&mut pieces).zip(&mut messages) {
            let (frame, behind) = left.split_at_mut(*length);
            *piece = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: *length };
            (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (piece, 1);
            left = behind;
        }
        let (mut rest, mut lost) = (&mut messages[..lengths.len()], 0);
        while !rest.is_empty() {
            // SAFETY: headers, vectors and frames live until after the call; the kernel only reads the frames.
            let sent = unsafe {
                let number = rest.len() as libc::c_uint;
                libc::sendmmsg(self.socket.as_raw_fd(), rest.as_mut_ptr(), number, libc::MSG_DONTWAIT)
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
}
