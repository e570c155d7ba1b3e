//! Raw frames: packet sockets (packet(7)) and a builder for ordinary packets.

use anyhow::{Context, Result, bail};
use etherparse::PacketBuilder;
use std::io::{Error, ErrorKind};
use std::mem::{size_of, size_of_val, zeroed};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A frame that was received.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frame {
    /// All bytes from the destination MAC address on, a VLAN tag included wherever the kernel kept it
    pub bytes: Vec<u8>,
    /// The kernel has not completed the transport checksum (a local sender left it to the device)
    pub partial_checksum: bool,
}

/// A packet socket bound to one interface: sends and receives whole Ethernet frames. What the node itself sends by
/// the interface is not received.
pub struct PacketSocket {
    fd: OwnedFd,
}

const PACKET_IGNORE_OUTGOING: i32 = 23;
const RECEIVE_BUFFER: i32 = 64 << 20;
const LARGEST_FRAME: usize = 65_600;
/// Messages given to the kernel at once.
const BATCH: usize = 64;

impl PacketSocket {
    /// A socket in the calling thread's network namespace (see [`crate::Node::packet_socket`]).
    pub fn open(ifindex: u32) -> Result<PacketSocket> {
        // Protocol 0: nothing is received before the socket is bound to its interface.
        // SAFETY: socket takes plain integers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(Error::last_os_error()).context("cannot open a packet socket");
        }
        // SAFETY: the descriptor was just opened and belongs to nobody else.
        let socket = PacketSocket { fd: unsafe { OwnedFd::from_raw_fd(fd) } };
        socket.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
        socket.set(libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
        // Past the queueing discipline, whose own packets would come between.
        socket.set(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1)?;
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER)?;
        // SAFETY: sockaddr_ll is plain data, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = ifindex as i32;
        // SAFETY: the address outlives the call and the length is its own.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) };
        if bound != 0 {
            return Err(Error::last_os_error()).with_context(|| format!("cannot bind to interface {ifindex}"));
        }
        Ok(socket)
    }

    fn set(&self, level: i32, option: i32, value: i32) -> Result<()> {
        // SAFETY: the value outlives the call and the length is its own.
        let result = unsafe {
            let length = size_of::<i32>() as u32;
            libc::setsockopt(self.fd.as_raw_fd(), level, option, (&raw const value).cast(), length)
        };
        if result != 0 {
            return Err(Error::last_os_error()).with_context(|| format!("setsockopt {level}/{option}"));
        }
        Ok(())
    }

    /// Sends one frame.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.send_all(&[frame])
    }

    /// Sends frames in order, many with one system call. A frame the kernel refuses is an error.
    pub fn send_all(&self, frames: &[impl AsRef<[u8]>]) -> Result<()> {
        for batch in frames.chunks(BATCH) {
            self.send_batch(batch)?;
        }
        Ok(())
    }

    fn send_batch(&self, frames: &[impl AsRef<[u8]>]) -> Result<()> {
        let mut pieces: Vec<libc::iovec> = frames
            .iter()
            .map(|f| libc::iovec { iov_base: f.as_ref().as_ptr().cast_mut().cast(), iov_len: f.as_ref().len() })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = pieces
            .iter_mut()
            .map(|piece| {
                // SAFETY: mmsghdr is plain data, for which zeros are valid.
                let mut message: libc::mmsghdr = unsafe { zeroed() };
                message.msg_hdr.msg_iov = piece;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let mut sent = 0;
        while sent < messages.len() {
            let rest = &mut messages[sent..];
            // SAFETY: headers, vectors and frames live until after the call; the kernel only reads the frames.
            match unsafe { libc::sendmmsg(self.fd.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, 0) } {
                n if n > 0 => sent += n as usize,
                _ => match Error::last_os_error() {
                    error if error.kind() == ErrorKind::Interrupted => {}
                    error => {
                        let length = frames[sent].as_ref().len();
                        return Err(error).with_context(|| format!("cannot send a frame of {length} bytes"));
                    }
                },
            }
        }
        Ok(())
    }

    /// The next frame, waiting at most `limit`; None if none came.
    pub fn receive(&self, limit: Duration) -> Result<Option<Frame>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(frame) = self.receive_now()? {
                return Ok(Some(frame));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let milliseconds = left.as_millis().clamp(1, 1000) as i32;
            // SAFETY: one pollfd, which outlives the call.
            unsafe { libc::poll(&raw mut poll, 1, milliseconds) };
        }
    }

    /// The first frame that `wanted` accepts, within `limit`; others are thrown away.
    pub fn receive_matching(&self, limit: Duration, wanted: impl Fn(&Frame) -> bool) -> Result<Option<Frame>> {
        let deadline = Instant::now() + limit;
        while let Some(frame) = self.receive(deadline.saturating_duration_since(Instant::now()))? {
            if wanted(&frame) {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    /// Everything that has arrived by now.
    pub fn drain(&self) -> Result<Vec<Frame>> {
        std::iter::from_fn(|| self.receive_now().transpose()).collect()
    }

    /// Frames that were lost because the socket's buffer was full, since the last call.
    pub fn lost(&self) -> Result<u32> {
        // SAFETY: tpacket_stats is plain data, for which zeros are valid.
        let mut stats: libc::tpacket_stats = unsafe { zeroed() };
        let mut length = size_of_val(&stats) as u32;
        // SAFETY: the buffer outlives the call and the length is its own.
        let result = unsafe {
            let to = (&raw mut stats).cast();
            libc::getsockopt(self.fd.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS, to, &raw mut length)
        };
        if result != 0 {
            return Err(Error::last_os_error()).context("PACKET_STATISTICS");
        }
        Ok(stats.tp_drops)
    }

    fn receive_now(&self) -> Result<Option<Frame>> {
        let mut buffer = [0u8; LARGEST_FRAME];
        let mut control = [0u64; 16];
        let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: msghdr is plain data, for which zeros are valid.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_iov = &raw mut piece;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: header, vector and both buffers live until after the call, with their own lengths.
        let length = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        if length < 0 {
            return match Error::last_os_error() {
                error if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
                // The interface went down: reported once.
                error if error.raw_os_error() == Some(libc::ENETDOWN) => Ok(None),
                error => Err(error).context("cannot receive"),
            };
        }
        anyhow::ensure!(message.msg_flags & libc::MSG_TRUNC == 0, "frame longer than {LARGEST_FRAME} bytes");
        let bytes = &buffer[..length as usize];
        let Some(aux) = auxdata(&message) else { bail!("packet without PACKET_AUXDATA") };
        Ok(Some(Frame {
            bytes: with_tag(bytes, &aux),
            partial_checksum: aux.tp_status & libc::TP_STATUS_CSUMNOTREADY != 0,
        }))
    }
}

fn auxdata(message: &libc::msghdr) -> Option<libc::tpacket_auxdata> {
    // SAFETY: the kernel filled the control buffer and its length; CMSG_* stay inside it, and a message of this type
    // holds a tpacket_auxdata, read unaligned.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_PACKET && (*header).cmsg_type == libc::PACKET_AUXDATA {
                return Some(libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned());
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    None
}

/// The kernel takes the outer tag out of every frame it receives: back to where it was.
fn with_tag(bytes: &[u8], aux: &libc::tpacket_auxdata) -> Vec<u8> {
    let (Some(macs), Some(rest)) = (bytes.get(..12), bytes.get(12..)) else { return bytes.to_vec() };
    if aux.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return bytes.to_vec();
    }
    [macs, &aux.tp_vlan_tpid.to_be_bytes(), &aux.tp_vlan_tci.to_be_bytes(), rest].concat()
}

/// An Ethernet frame with an ordinary UDP packet: TTL or hop limit 64, correct checksums.
///
/// MAC addresses, IP addresses and ports are given as (source, destination). Panics if the families differ.
pub fn udp(macs: ([u8; 6], [u8; 6]), ips: (IpAddr, IpAddr), ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(macs.0, macs.1);
    let ip = match ips {
        (IpAddr::V4(source), IpAddr::V4(destination)) => ethernet.ipv4(source.octets(), destination.octets(), 64),
        (IpAddr::V6(source), IpAddr::V6(destination)) => ethernet.ipv6(source.octets(), destination.octets(), 64),
        _ => panic!("{} and {} are of different families", ips.0, ips.1),
    };
    let udp = ip.udp(ports.0, ports.1);
    let mut frame = Vec::with_capacity(udp.size(payload.len()));
    udp.write(&mut frame, payload).expect("writing to memory");
    frame
}

/// Internet checksum (RFC 1071) of bytes.
pub fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Whether a frame asks for the address as Linux probes a neighbour: by an ARP request (RFC 826), or a neighbour solicitation
/// (RFC 4861, 4.3).
pub fn asks_for(frame: &[u8], address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            frame.get(12..14) == Some(&[8, 6])
                && frame.get(20..22) == Some(&[0, 1])
                && frame.get(38..42) == Some(&address.octets())
        }
        IpAddr::V6(address) => {
            frame.get(12..14) == Some(&[0x86, 0xdd])
                && frame.get(20) == Some(&58)
                && frame.get(54) == Some(&135)
                && frame.get(62..78) == Some(&address.octets())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses() -> (IpAddr, IpAddr) {
        ("192.0.2.1".parse().unwrap(), "198.51.100.1".parse().unwrap())
    }

    #[test]
    fn a_built_packet_has_a_correct_header_checksum() {
        let frame = udp(([2; 6], [4; 6]), addresses(), (1000, 2000), b"hello");
        assert_eq!(frame.len(), 14 + 20 + 8 + 5);
        assert_eq!(&frame[..14], [4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 8, 0]);
        assert_eq!(checksum(&frame[14..34]), 0);
        assert_ne!(checksum(&frame[14..33]), 0);
    }

    #[test]
    fn frames_cross_a_link_as_they_were_sent() -> Result<()> {
        // a eth0 ---- eth0 b
        let lab = crate::Lab::new("frames")?;
        let (a, b) = (lab.node("a")?, lab.node("b")?);
        lab.link((&a, "eth0"), (&b, "eth0"))?;
        let (sender, receiver) = (a.packet_socket("eth0")?, b.packet_socket("eth0")?);
        let plain = udp((a.mac("eth0")?, b.mac("eth0")?), addresses(), (1000, 2000), b"hello");
        let tagged = [&plain[..12], &[0x81, 0x00, 0x60, 0x05], &plain[12..]].concat();
        let twice = [&plain[..12], &[0x88, 0xa8, 0x10, 0x07], &tagged[12..]].concat();
        let frames = [plain, tagged, twice];
        sender.send_all(&frames)?;
        for frame in frames {
            let found = receiver.receive_matching(Duration::from_secs(5), |f| f.bytes == frame)?;
            assert_eq!(found, Some(Frame { bytes: frame, partial_checksum: false }));
        }
        assert_eq!(receiver.lost()?, 0);
        assert_eq!(sender.receive_matching(Duration::ZERO, |f| f.bytes[12..14] == [8, 0])?, None, "own frames");
        Ok(())
    }
}
