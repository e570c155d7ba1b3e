//! Packet sockets that see IP frames (tcpdump, DHCP clients, …): what the fast path forwards would pass them by. Only
//! sockets of this namespace are listed. A socket for other protocols (LLDP, PPPoE, …) sees nothing that is forwarded,
//! one for protocol 0 nothing at all.
//!
//! The kernel announces nothing; the list is read at every poll (PACKET_DIAG: include/uapi/linux/packet_diag.h,
//! net/packet/diag.c, Linux 6.1).

use super::nl::{Message, Netlink, attrs, find, ne32};
use super::{Finding, POLL, candidates};
use crate::error::CmError;
use crate::watch::{PortIndex, Watcher};
use std::collections::BTreeMap;
use std::time::Duration;
use towpath_fpc::{PolicySource, Scope};
use towpath_tables::Reason;

const NETLINK_SOCK_DIAG: isize = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SHOW_INFO: u32 = 1;
const DIAG_INFO: u16 = 0;

/// EtherTypes of frames that the fast path takes, and those that stand for every frame.
const SEES_IP: &[u16] = &[0x0003, 0x0800, 0x86dd, 0x8100, 0x88a8];

/// The watcher of packet sockets.
pub struct Capture {
    netlink: Netlink,
}

impl Capture {
    /// Watches the thread's network namespace.
    pub fn new() -> Result<Self, CmError> {
        let netlink = Netlink::open(NETLINK_SOCK_DIAG).map_err(|e| CmError::io("captures: netlink socket", e))?;
        Ok(Self { netlink })
    }
}

impl Watcher for Capture {
    fn name(&self) -> &'static str {
        "capture"
    }

    fn source(&self) -> PolicySource {
        PolicySource::Capture
    }

    fn interval(&self) -> Option<Duration> {
        Some(POLL)
    }

    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        let sockets = match self.netlink.dump("packet sockets", SOCK_DIAG_BY_FAMILY, &request(), socket) {
            // A kernel without packet sockets has none that capture.
            Err(CmError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) && !packet_sockets() => {
                return Ok(Vec::new());
            }
            result => result?,
        };
        // One policy for each interface, however many sockets there are: an interface index, or 0 for all.
        let mut by_port: BTreeMap<u32, Socket> = BTreeMap::new();
        for socket in sockets {
            by_port.entry(socket.ifindex).or_insert(socket);
        }
        let everywhere = by_port.remove(&0);
        let all = everywhere.iter().flat_map(|socket| candidates(ports).map(|port| (port.ifindex, *socket)));
        Ok(all.chain(by_port).flat_map(|(ifindex, socket)| socket.findings(ifindex)).collect())
    }
}

/// packet_diag_req: family, protocol, padding, inode, what to show, cookie.
fn request() -> Vec<u8> {
    let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0, 0, 0, 0, 0];
    request.extend_from_slice(&SHOW_INFO.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request
}

/// Whether the kernel has packet sockets at all.
fn packet_sockets() -> bool {
    std::fs::exists("/proc/thread-self/net/packet").unwrap_or(true)
}

/// A socket that sees IP frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Socket {
    /// The interface it is bound to, or 0
    ifindex: u32,
    protocol: u16,
    inode: u32,
}

impl Socket {
    fn findings(&self, ifindex: u32) -> [Finding; 2] {
        let protocol = match self.protocol {
            0x0003 => "all protocols".to_owned(),
            other => format!("protocol {other:#06x}"),
        };
        let detail = format!("packet socket (inode {}) for {protocol}", self.inode);
        [Scope::Ingress(ifindex, None), Scope::Egress(ifindex, None)]
            .map(|scope| Finding::new(scope, Reason::PolicyCapture, detail.clone()))
    }
}

/// packet_diag_msg: family, type, protocol, inode, cookie; then attributes.
fn socket(message: Message<'_>) -> Result<Option<Socket>, CmError> {
    let what = "packet sockets";
    let short = || CmError::decode(what, "shorter than its header");
    let (header, attributes) = message.payload.split_first_chunk::<16>().ok_or_else(short)?;
    let [_, _, low, high, inode @ ..] = *header;
    let protocol = u16::from_ne_bytes([low, high]);
    if !SEES_IP.contains(&protocol) {
        return Ok(None);
    }
    let attributes = attrs(what, attributes)?;
    let info = find(&attributes, DIAG_INFO).ok_or_else(|| CmError::decode(what, "no interface in the answer"))?;
    let ifindex = ne32(info).ok_or_else(short)?;
    Ok(Some(Socket { ifindex, protocol, inode: ne32(&inode).unwrap_or(0) }))
}

#[cfg(test)]
mod tests {
    use super::super::nl::attr;
    use super::*;

    fn payload(protocol: u16, ifindex: u32) -> Vec<u8> {
        let mut payload = vec![17, 3];
        payload.extend(protocol.to_ne_bytes());
        payload.extend(4711u32.to_ne_bytes());
        payload.extend([0; 8]);
        let info: Vec<u8> = [ifindex, 2, 0, 0, 0, 1].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        payload.extend(attr(DIAG_INFO, &info));
        payload
    }

    #[test]
    fn only_sockets_that_see_ip_count() {
        let decode = |protocol| socket(Message { kind: 20, payload: &payload(protocol, 5) }).unwrap();
        for protocol in SEES_IP {
            assert_eq!(decode(*protocol), Some(Socket { ifindex: 5, protocol: *protocol, inode: 4711 }));
        }
        for protocol in [0, 0x0001, 0x0004, 0x88cc, 0x8863, 0x888e] {
            assert_eq!(decode(protocol), None);
        }
    }

    #[test]
    fn truncated_messages_are_errors() {
        let payload = payload(3, 5);
        for length in 0..20 {
            assert!(socket(Message { kind: 20, payload: &payload[..length] }).is_err(), "{length}");
        }
    }
}
