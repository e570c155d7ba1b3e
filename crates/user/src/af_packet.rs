//! An interface of Linux's as a wire, by packet sockets (packet(7)): for drivers and kernels on which AF_XDP cannot be.
//!
//! A packet socket gets copies. So that nothing is received twice, Linux is made deaf to the interface (see `deaf`), which
//! therefore is a wire and no more: it has no addresses, and the port's interface in Linux is the twin.
//!
//! What arrives may be several packets in one (a sender's segmentation offload over a veth, GRO of a driver): Linux gets
//! such a frame by the twin as it is, since it knows how to cut it. A checksum that was left to the device is completed,
//! and a tag that the kernel keeps apart is put in again. Frames are sent past the queueing discipline.

use crate::blocks::{Blocks, Layout, Seen};
use crate::deaf::Deaf;
use crate::device::Device;
use crate::driver::{BATCH, Passed, PortDriver};
use crate::mapping::{Mapping, set_option};
use crate::pool::{Buffer, Pool};
use crate::tap::Tap;
use std::ffi::CString;
use std::io;
use std::mem::{size_of_val, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use towpath_pipeline::Frame;
use towpath_tables::record::SOCKET_FRAME;

/// Room for a frame of several packets and its header.
const BLOCK: usize = 128 << 10;
const BLOCKS: usize = 32;
/// Milliseconds after which the kernel hands over a block that is not full.
const PATIENCE: u32 = 1;
/// Bytes of a tag
const TAG: usize = 4;
/// Frames on their way to the device
const SEND_BYTES: libc::c_int = 4 << 20;

/// An interface cannot be a wire.
#[derive(thiserror::Error, Debug)]
#[error("{interface} cannot be a wire by packet sockets: {what}: {cause}{remedy}")]
pub struct Error {
    interface: String,
    what: &'static str,
    cause: io::Error,
    remedy: &'static str,
}

/// The wire.
pub struct PacketPort {
    blocks: Blocks,
    receiver: OwnedFd,
    sender: OwnedFd,
    index: u32,
    /// For what only Linux can take apart
    twin: Arc<Tap>,
    passed: Passed,
    _ring: Mapping,
    _deaf: Deaf,
}

/// The interface. Its settings are Linux's.
pub struct Interface {
    socket: OwnedFd,
    index: u32,
    /// Lost so far
    total: AtomicU64,
}

impl PacketPort {
    /// Takes an interface of this thread's network namespace that has no addresses. What is several packets in one goes to
    /// Linux by `twin`.
    pub fn open(interface: &str, twin: Arc<Tap>) -> Result<Self, Error> {
        let fail = |what, remedy| {
            let interface = interface.to_owned();
            move |cause: io::Error| Error { interface, what, cause, remedy }
        };
        let index = CString::new(interface).map_or(0, |name| {
            // SAFETY: a string that ends with a zero.
            unsafe { libc::if_nametoindex(name.as_ptr()) }
        });
        if index == 0 {
            return Err(fail("look for it", "")(io::Error::from_raw_os_error(libc::ENODEV)));
        }
        if has_addresses(interface).map_err(fail("look for its addresses", ""))? {
            let cause = io::Error::other("it has some");
            let remedy =
                " (a wire has none: give them to the port's own interface, and run ip address flush dev for this one)";
            return Err(fail("look for its addresses", remedy)(cause));
        }
        let open = || {
            socket().map_err(|cause| {
                let remedy = match cause.raw_os_error() {
                    Some(libc::EAFNOSUPPORT) => " (this kernel has no packet sockets: CONFIG_PACKET)",
                    Some(libc::EPERM) => " (it takes CAP_NET_RAW)",
                    _ => "",
                };
                fail("open a packet socket", remedy)(cause)
            })
        };
        let (receiver, sender) = (open()?, open()?);
        let deaf = Deaf::to(interface).map_err(|cause| {
            let remedy = match cause.raw_os_error() {
                Some(libc::EPERM) => " (it takes CAP_NET_ADMIN, or another program has it for a wire)",
                _ => " (it takes nf_tables with the ingress hook: CONFIG_NF_TABLES_NETDEV, CONFIG_NETFILTER_INGRESS)",
            };
            fail("make Linux deaf to it by a chain of nftables", remedy)(cause)
        })?;
        let ring = ring(&receiver).map_err(fail("make a ring for the packet socket", ""))?;
        set(&receiver, libc::PACKET_ADD_MEMBERSHIP, &promiscuous(index)).map_err(fail("make it promiscuous", ""))?;
        for socket in [&receiver, &sender] {
            let protocol = if socket.as_raw_fd() == receiver.as_raw_fd() { libc::ETH_P_ALL as u16 } else { 0 };
            bind(socket, index, protocol).map_err(fail("bind a packet socket to it", ""))?;
        }
        set(&sender, libc::PACKET_QDISC_BYPASS, &1).map_err(fail("send past its queueing discipline", ""))?;
        // Without CAP_NET_ADMIN there is less room.
        let _ = set_option(&sender, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BYTES);
        let layout = Layout { start: ring.start(), size: BLOCK, count: BLOCKS };
        // SAFETY: the ring was just mapped, and stays as long as its reader; the kernel fills it.
        let blocks = unsafe { Blocks::new(layout) };
        Ok(Self { blocks, receiver, sender, index, twin, passed: Passed::default(), _ring: ring, _deaf: deaf })
    }

    /// The interface, for whoever has no frames of it.
    pub fn device(&self) -> io::Result<Interface> {
        Ok(Interface { socket: self.receiver.try_clone()?, index: self.index, total: AtomicU64::new(0) })
    }
}

impl Device for Interface {
    fn lost(&self) -> u64 {
        // SAFETY: integers, for which zeros are valid.
        let mut statistics: libc::tpacket_stats_v3 = unsafe { zeroed() };
        let mut length = size_of_val(&statistics) as libc::socklen_t;
        // SAFETY: `statistics` is as long as said.
        let done = unsafe {
            let (fd, value) = (self.socket.as_raw_fd(), (&raw mut statistics).cast());
            libc::getsockopt(fd, libc::SOL_PACKET, libc::PACKET_STATISTICS, value, &mut length)
        };
        // The kernel counts from the last time that it was asked.
        let more = if done == 0 { u64::from(statistics.tp_drops) } else { 0 };
        self.total.fetch_add(more, Ordering::Relaxed) + more
    }

    /// Also none while it is down.
    fn carrier(&self) -> Option<bool> {
        // SAFETY: integers and bytes, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { zeroed() };
        request.ifr_ifru.ifru_ifindex = self.index as libc::c_int;
        // It may have another name than at first.
        let asked = [libc::SIOCGIFNAME, libc::SIOCGIFFLAGS].map(|what| {
            // SAFETY: the request, which lives across the call, is what both read and write.
            unsafe { libc::ioctl(self.socket.as_raw_fd(), what as libc::Ioctl, &raw mut request) }
        });
        // SAFETY: flags, where the second one was answered.
        (asked == [0, 0]).then(|| i32::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_RUNNING != 0)
    }
}

impl PortDriver for PacketPort {
    fn start(&mut self, _pool: &mut Pool) {}

    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        self.receive_unless(pool, frames, &|_| false);
    }

    fn receive_unless(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>, drops: &dyn Fn(&[u8]) -> bool) {
        for _ in 0..BATCH {
            let Some(mut buffer) = pool.take() else { return };
            let Some(seen) = self.blocks.next() else { return pool.give(buffer) };
            if put(&seen, &mut buffer) {
                frames.push(buffer);
                continue;
            }
            pool.give(buffer);
            if drops(seen.bytes) {
                continue;
            }
            self.passed.frames += 1;
            self.passed.lost += u64::from(!(seen.whole && pass(&seen, &self.twin)));
        }
    }

    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        let (mut refused, mut at) = (0, 0);
        while at < frames.len() {
            match send(&self.sender, &frames[at..]) {
                Ok(sent) => at += sent.max(1),
                // Too long for the device: the others are not.
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    frames.swap(refused, at);
                    (refused, at) = (refused + 1, at + 1);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        frames.drain(refused..at).for_each(|frame| pool.give(frame));
    }

    fn passed(&mut self) -> Passed {
        std::mem::take(&mut self.passed)
    }

    fn readable<'d>(&'d self, fds: &mut Vec<BorrowedFd<'d>>) -> bool {
        fds.push(self.receiver.as_fd());
        true
    }

    fn close(self: Box<Self>, _pool: &mut Pool) {}
}

/// Puts a frame into a buffer as it was on the wire, complete; false if only Linux can do that, or it does not fit.
fn put(seen: &Seen<'_>, buffer: &mut Buffer) -> bool {
    let len = seen.bytes.len();
    if seen.beside.is_several() || !seen.whole || len + TAG > SOCKET_FRAME {
        return false;
    }
    let place = buffer.resize(len);
    if place.len() != len {
        return false;
    }
    place.copy_from_slice(seen.bytes);
    if !seen.beside.complete(place) {
        return false;
    }
    let Some(tag) = seen.tag else { return true };
    let Some(macs) = seen.bytes.get(..MACS) else { return false };
    if !buffer.move_head(-(TAG as i32)) {
        return false;
    }
    let bytes = buffer.resize(len + TAG);
    bytes[..MACS].copy_from_slice(macs);
    bytes[MACS..MACS + TAG].copy_from_slice(&tag_bytes(tag));
    true
}

/// Bytes of the addresses before a tag
const MACS: usize = 12;

/// Has Linux receive a frame with what travels beside it; false if it does not take it.
fn pass(seen: &Seen<'_>, twin: &Tap) -> bool {
    match (seen.tag, seen.bytes.split_at_checked(MACS)) {
        (Some(tag), Some((macs, rest))) => twin.send(&seen.beside.behind(TAG as u16), [macs, &tag_bytes(tag), rest]),
        _ => twin.send(&seen.beside, [seen.bytes, &[], &[]]),
    }
}

fn tag_bytes((protocol, control): (u16, u16)) -> [u8; TAG] {
    let ([a, b], [c, d]) = (protocol.to_be_bytes(), control.to_be_bytes());
    [a, b, c, d]
}

/// Sends frames in their order; how many were sent.
fn send(socket: &OwnedFd, frames: &[Buffer]) -> io::Result<usize> {
    // SAFETY: pointers and integers, for which zeros are valid.
    let (mut pieces, mut messages): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) = unsafe { (zeroed(), zeroed()) };
    for (frame, (piece, message)) in frames.iter().zip(pieces.iter_mut().zip(&mut messages)) {
        let bytes = frame.bytes();
        (piece.iov_base, piece.iov_len) = (bytes.as_ptr().cast_mut().cast(), bytes.len());
        (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (piece, 1);
    }
    let count = frames.len().min(BATCH) as libc::c_uint;
    // SAFETY: the messages are as many as said; pieces and frames, which are only read, live across the call.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), count, libc::MSG_DONTWAIT) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// A packet socket that receives nothing yet.
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    // SAFETY: just opened, and nobody else's.
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

/// Gives a socket its ring.
fn ring(socket: &OwnedFd) -> io::Result<Mapping> {
    set(socket, libc::PACKET_VERSION, &(libc::tpacket_versions::TPACKET_V3 as libc::c_int))?;
    set(socket, libc::PACKET_VNET_HDR, &1)?;
    set(socket, libc::PACKET_IGNORE_OUTGOING, &1)?;
    let request = libc::tpacket_req3 {
        tp_block_size: BLOCK as u32,
        tp_block_nr: BLOCKS as u32,
        // Frames are as long as they are; the kernel wants this to divide the block.
        tp_frame_size: 2048,
        tp_frame_nr: (BLOCK / 2048 * BLOCKS) as u32,
        tp_retire_blk_tov: PATIENCE,
        tp_sizeof_priv: 0,
        tp_feature_req_word: 0,
    };
    set(socket, libc::PACKET_RX_RING, &request)?;
    Mapping::of(socket, 0, BLOCK * BLOCKS)
}

fn promiscuous(index: u32) -> libc::packet_mreq {
    let (mr_ifindex, mr_type) = (index as libc::c_int, libc::PACKET_MR_PROMISC as libc::c_ushort);
    libc::packet_mreq { mr_ifindex, mr_type, mr_alen: 0, mr_address: [0; 8] }
}

fn bind(socket: &OwnedFd, index: u32, protocol: u16) -> io::Result<()> {
    // SAFETY: integers, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index as libc::c_int;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is as long as said.
    let done = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    set_option(socket, libc::SOL_PACKET, option, value)
}

/// Whether the interface has addresses, of either family.
fn has_addresses(interface: &str) -> io::Result<bool> {
    let mut first = std::ptr::null_mut();
    // SAFETY: the list is written to `first`, read while it is there, and freed once.
    unsafe {
        if libc::getifaddrs(&mut first) != 0 {
            return Err(io::Error::last_os_error());
        }
        let (mut entry, mut found) = (first, false);
        while let Some(address) = entry.as_ref() {
            let family = address.ifa_addr.as_ref().map_or(0, |address| i32::from(address.sa_family));
            let named = std::ffi::CStr::from_ptr(address.ifa_name).to_bytes() == interface.as_bytes();
            found |= named && matches!(family, libc::AF_INET | libc::AF_INET6);
            entry = address.ifa_next;
        }
        libc::freeifaddrs(first);
        Ok(found)
    }
}
