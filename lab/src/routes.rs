//! Routes changed over rtnetlink, hundreds in one call: several times as fast as `ip -batch`.

use anyhow::{Context, Result, bail};
use std::io::Error;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const RTA_DST: u16 = 1;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// Metric of every route made here, so that both families' are found again under their keys.
const METRIC: u32 = 1024;
/// Bytes given to the kernel at once.
const CHUNK: usize = 32 * 1024;

/// A socket that changes routes of table main (see [`crate::Node::route_socket`]).
pub struct RouteSocket {
    fd: OwnedFd,
    chunk: Vec<u8>,
}

impl RouteSocket {
    /// A socket in the calling thread's network namespace.
    pub fn open() -> Result<RouteSocket> {
        // SAFETY: socket takes plain integers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(Error::last_os_error()).context("cannot open a rtnetlink socket");
        }
        // SAFETY: the descriptor was just opened and belongs to nobody else.
        Ok(RouteSocket { fd: unsafe { OwnedFd::from_raw_fd(fd) }, chunk: Vec::with_capacity(2 * CHUNK) })
    }

    /// Sets a route, now or with those that follow.
    pub fn replace(&mut self, prefix: (IpAddr, u8), gateway: IpAddr) -> Result<()> {
        self.push(RTM_NEWROUTE, NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE, prefix, Some(gateway))
    }

    /// Removes a route, now or with those that follow.
    pub fn delete(&mut self, prefix: (IpAddr, u8)) -> Result<()> {
        self.push(RTM_DELROUTE, NLM_F_REQUEST, prefix, None)
    }

    /// Hands over what is left; an error if the kernel refused anything.
    pub fn flush(&mut self) -> Result<()> {
        if !self.chunk.is_empty() {
            // SAFETY: the buffer outlives the call and the length is its own.
            let sent = unsafe { libc::send(self.fd.as_raw_fd(), self.chunk.as_ptr().cast(), self.chunk.len(), 0) };
            if sent != self.chunk.len() as isize {
                return Err(Error::last_os_error()).context("cannot send to rtnetlink");
            }
            self.chunk.clear();
        }
        // The kernel has worked on everything by now, and answers only what it refuses.
        let mut answer = [0u8; 4096];
        // SAFETY: the buffer outlives the call and the length is its own.
        let length =
            unsafe { libc::recv(self.fd.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), libc::MSG_DONTWAIT) };
        if length >= 20 && u16::from_ne_bytes([answer[4], answer[5]]) == NLMSG_ERROR {
            let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
            bail!("the kernel refused a route: {}", Error::from_raw_os_error(-code));
        }
        Ok(())
    }

    fn push(&mut self, kind: u16, flags: u16, (prefix, length): (IpAddr, u8), gateway: Option<IpAddr>) -> Result<()> {
        let start = self.chunk.len();
        self.chunk.extend([0; 16]);
        let family = if prefix.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let (protocol, route_type) = if kind == RTM_NEWROUTE { (RTPROT_STATIC, RTN_UNICAST) } else { (0, 0) };
        // rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags.
        self.chunk.extend([family as u8, length, 0, 0, RT_TABLE_MAIN, protocol, 0, route_type, 0, 0, 0, 0]);
        self.attribute(RTA_DST, &octets(prefix));
        self.attribute(RTA_PRIORITY, &METRIC.to_ne_bytes());
        if let Some(gateway) = gateway {
            self.attribute(RTA_GATEWAY, &octets(gateway));
        }
        let size = (self.chunk.len() - start) as u32;
        self.chunk[start..start + 4].copy_from_slice(&size.to_ne_bytes());
        self.chunk[start + 4..start + 6].copy_from_slice(&kind.to_ne_bytes());
        self.chunk[start + 6..start + 8].copy_from_slice(&flags.to_ne_bytes());
        if self.chunk.len() >= CHUNK { self.flush() } else { Ok(()) }
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.chunk.extend((4 + value.len() as u16).to_ne_bytes());
        self.chunk.extend(kind.to_ne_bytes());
        self.chunk.extend(value);
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
