//! Packet sockets that see IP frames (tcpdump, DHCP clients, …): what the fast path forwards would pass them by. Only
//! sockets of this namespace are listed. A socket for other protocols (LLDP, PPPoE, …) sees nothing that is forwarded,
//! one for protocol 0 nothing at all. One with a filter that the fast path can run is to see what that matches.
//!
//! The kernel announces nothing. At every poll a file says whether there is any (net/packet/af_packet.c,
//! packet_seq_show); if so they are asked for, since only PACKET_DIAG tells filters (include/uapi/linux/packet_diag.h,
//! net/packet/diag.c, net/core/sock_diag.c, Linux 6.1).

use super::nl::{Message, Netlink, attrs, find, ne32};
use super::proc::ProcNet;
use super::{POLL, candidates};
use crate::error::CmError;
use crate::watch::{Finding, PortIndex, Watcher};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use towpath_filter::{Filter, Layer, instruction};
use towpath_fpc::{PolicySource, Scope};
use towpath_tables::Reason;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SHOW_INFO: u32 = 1;
const SHOW_FILTER: u32 = 0x20;
const DIAG_INFO: u16 = 0;
const DIAG_FILTER: u16 = 7;
const WHAT: &str = "packet sockets";

/// EtherTypes of frames that the fast path takes, and those that stand for every frame.
const SEES_IP: &[u16] = &[0x0003, 0x0800, 0x86dd, 0x8100, 0x88a8];

/// The watcher of packet sockets.
pub struct Capture {
    list: ProcNet,
    netlink: Netlink,
}

impl Capture {
    /// Watches the thread's network namespace.
    pub fn new() -> Result<Self, CmError> {
        let netlink = Netlink::open(NETLINK_SOCK_DIAG).map_err(|e| CmError::io("captures: netlink socket", e))?;
        Ok(Self { list: ProcNet::new(c"packet", c"af_packet")?, netlink })
    }

    /// The sockets there are, without their filters.
    fn sockets(&mut self) -> Result<Vec<Socket>, CmError> {
        // A kernel without packet sockets has no such file.
        match self.list.read()?.is_some_and(|list| list.lines().any(sees_ip)) {
            true => self.netlink.dump(WHAT, SOCK_DIAG_BY_FAMILY, &request(SHOW_INFO), socket),
            false => Ok(Vec::new()),
        }
    }

    /// Adds the filters. The kernel tells those of eBPF not at all, and ends the list where one is too long for a message:
    /// so the list that says which sockets there are is another.
    fn with_filters(&mut self, mut sockets: Vec<Socket>) -> Result<Vec<Socket>, CmError> {
        if !sockets.is_empty() {
            let told = self.netlink.dump(WHAT, SOCK_DIAG_BY_FAMILY, &request(SHOW_INFO | SHOW_FILTER), socket)?;
            for socket in &mut sockets {
                let same = told.iter().find(|told| told.cookie == socket.cookie && told.ifindex == socket.ifindex);
                socket.sees = same.map_or(Sees::Everything, |told| told.sees.clone());
            }
        }
        Ok(sockets)
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
        let sockets = self.sockets()?;
        let sockets = self.with_filters(sockets)?;
        let mut by_port: BTreeMap<u32, Vec<&Socket>> = BTreeMap::new();
        for socket in &sockets {
            if socket.ifindex != 0 {
                by_port.entry(socket.ifindex).or_default().push(socket);
            } else {
                candidates(ports).for_each(|port| by_port.entry(port.ifindex).or_default().push(socket));
            }
        }
        Ok(by_port.iter().flat_map(|(ifindex, sockets)| on_port(*ifindex, sockets)).collect())
    }
}

/// What the sockets that see an interface's packets are to see of those that enter by it and of those that leave: for each
/// filter a finding, or one if there is a socket that is to see all.
fn on_port(ifindex: u32, sockets: &[&Socket]) -> Vec<Finding> {
    let scopes = [Scope::Ingress(ifindex, None), Scope::Egress(ifindex, None)];
    let in_scope = |scope| {
        let leaves = matches!(scope, Scope::Egress(..));
        let seen: Vec<_> = sockets.iter().map(|socket| socket.finding(scope, leaves)).collect();
        match seen.iter().find(|finding| finding.filter.is_none()) {
            Some(all) => vec![all.clone()],
            None => {
                let mut filters = BTreeSet::new();
                seen.into_iter().filter(|finding| filters.insert(finding.filter.clone())).collect()
            }
        }
    };
    scopes.into_iter().flat_map(in_scope).collect()
}

/// packet_diag_req: family, protocol, padding, inode, what to show, cookie.
fn request(show: u32) -> Vec<u8> {
    let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0, 0, 0, 0, 0];
    request.extend_from_slice(&show.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request
}

/// Whether a line of the list is about a socket that sees IP frames; its protocol stands in the fourth column.
fn sees_ip(line: &str) -> bool {
    let protocol = line.split_whitespace().nth(3).map(|protocol| u16::from_str_radix(protocol, 16));
    protocol.is_some_and(|protocol| protocol.is_ok_and(|protocol| SEES_IP.contains(&protocol)))
}

/// What a socket is to see.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Sees {
    /// It has no filter that the kernel tells
    Everything,
    /// It has one that the fast path cannot run, and why
    Unknown(String),
    /// What this matches
    Filtered(Filter),
}

/// A socket that sees IP frames.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Socket {
    /// The interface it is bound to, or 0
    ifindex: u32,
    protocol: u16,
    inode: u32,
    /// Unlike any other socket's
    cookie: [u8; 8],
    sees: Sees,
}

impl Socket {
    /// What it is to see of the packets in a scope, which may be of those that leave.
    fn finding(&self, scope: Scope, leaves: bool) -> Finding {
        let protocol = match self.protocol {
            0x0003 => "all protocols".to_owned(),
            other => format!("protocol {other:#06x}"),
        };
        let socket = format!("packet socket (inode {}) for {protocol}", self.inode);
        let (filter, sees) = match &self.sees {
            Sees::Everything => (None, String::new()),
            Sees::Unknown(why) => (None, format!(", with a filter that only Linux can run: {why}")),
            Sees::Filtered(filter) if leaves && !filter.survives_forwarding() => {
                (None, ", with a filter that looks at what forwarding changes".to_owned())
            }
            Sees::Filtered(filter) => {
                (Some(filter.clone()), format!(", with a filter of {} instructions", filter.code().len()))
            }
        };
        Finding { filter, ..Finding::new(scope, Reason::PolicyCapture, socket + &sees) }
    }
}

/// packet_diag_msg: family, type, protocol, inode, cookie; then attributes.
fn socket(message: Message<'_>) -> Result<Option<Socket>, CmError> {
    let short = || CmError::decode(WHAT, "shorter than its header");
    let (header, attributes) = message.payload.split_first_chunk::<16>().ok_or_else(short)?;
    let [_, kind, low, high, i0, i1, i2, i3, cookie @ ..] = *header;
    let protocol = u16::from_ne_bytes([low, high]);
    if !SEES_IP.contains(&protocol) {
        return Ok(None);
    }
    let attributes = attrs(WHAT, attributes)?;
    let info = find(&attributes, DIAG_INFO).ok_or_else(|| CmError::decode(WHAT, "no interface in the answer"))?;
    let ifindex = ne32(info).ok_or_else(short)?;
    // Without CAP_NET_ADMIN a filter's place is empty.
    let program = find(&attributes, DIAG_FILTER).filter(|program| !program.is_empty());
    let sees = program.map_or(Sees::Everything, |program| sees(kind, program));
    Ok(Some(Socket { ifindex, protocol, inode: u32::from_ne_bytes([i0, i1, i2, i3]), cookie, sees }))
}

/// What a socket of a type sees through a filter: an array of `struct sock_filter`.
fn sees(kind: u8, program: &[u8]) -> Sees {
    let layer = match i32::from(kind) {
        libc::SOCK_RAW => Layer::Link,
        libc::SOCK_DGRAM => Layer::Network,
        _ => return Sees::Unknown(format!("the socket is of type {kind}")),
    };
    let (instructions, rest) = program.as_chunks::<8>();
    if !rest.is_empty() {
        return Sees::Unknown("its length is odd".to_owned());
    }
    let code = instructions
        .iter()
        .map(|[c0, c1, jt, jf, k @ ..]| instruction(u16::from_ne_bytes([*c0, *c1]), *jt, *jf, u32::from_ne_bytes(*k)));
    match Filter::new(layer, code.collect()) {
        // tcpdump without an expression
        Ok(filter) if filter.matches_everything() => Sees::Everything,
        Ok(filter) => Sees::Filtered(filter),
        Err(why) => Sees::Unknown(why.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::nl::attr;
    use super::*;

    /// `ip`, as tcpdump has it
    const IP: [u64; 4] = [
        instruction(0x28, 0, 0, 12),
        instruction(0x15, 0, 1, 0x0800),
        instruction(0x06, 0, 0, 0x40000),
        instruction(0x06, 0, 0, 0),
    ];
    /// `ip[8] > 9`, of IPv4 alone
    const TTL: [u64; 4] = [
        instruction(0x30, 0, 0, 22),
        instruction(0x25, 0, 1, 9),
        instruction(0x06, 0, 0, 0x40000),
        instruction(0x06, 0, 0, 0),
    ];

    fn bytes(code: &[u64]) -> Vec<u8> {
        let of = |raw: &u64| {
            let (code, jumps, k) = ((raw >> 48) as u16, [(raw >> 40) as u8, (raw >> 32) as u8], *raw as u32);
            [&code.to_ne_bytes()[..], &jumps, &k.to_ne_bytes()].concat()
        };
        code.iter().flat_map(of).collect()
    }

    fn payload(kind: i32, protocol: u16, ifindex: u32, filter: Option<&[u8]>) -> Vec<u8> {
        let mut payload = vec![17, kind as u8];
        payload.extend(protocol.to_ne_bytes());
        payload.extend(4711u32.to_ne_bytes());
        payload.extend([1, 2, 3, 4, 5, 6, 7, 8]);
        let info: Vec<u8> = [ifindex, 2, 0, 0, 0, 1].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        payload.extend(attr(DIAG_INFO, &info));
        payload.extend(filter.into_iter().flat_map(|filter| attr(DIAG_FILTER, filter)));
        payload
    }

    fn decode(payload: &[u8]) -> Option<Socket> {
        socket(Message { kind: 20, payload }).unwrap()
    }

    #[test]
    fn the_list_says_which_sockets_see_ip() {
        // As on Linux 6.18.
        let line = |protocol| format!("000000008f2f5f8c 3      3    {protocol}   2     1 0      0      417155");
        assert!(["0003", "0800", "86dd", "8100", "88a8"].iter().all(|protocol| sees_ip(&line(protocol))));
        assert!(!["0000", "88cc", "888e", "0001"].iter().any(|protocol| sees_ip(&line(protocol))));
        assert!(!sees_ip("sk               RefCnt Type Proto  Iface R Rmem   User   Inode"));
    }

    #[test]
    fn only_sockets_that_see_ip_count() {
        for protocol in SEES_IP {
            let cookie = [1, 2, 3, 4, 5, 6, 7, 8];
            let wanted = Socket { ifindex: 5, protocol: *protocol, inode: 4711, cookie, sees: Sees::Everything };
            assert_eq!(decode(&payload(libc::SOCK_RAW, *protocol, 5, None)), Some(wanted));
        }
        for protocol in [0, 0x0001, 0x0004, 0x88cc, 0x8863, 0x888e] {
            assert_eq!(decode(&payload(libc::SOCK_RAW, protocol, 5, None)), None);
        }
    }

    #[test]
    fn filters_are_taken_as_the_kind_of_socket_sees_them() {
        let sees = |kind, filter: &[u8]| decode(&payload(kind, 3, 5, Some(filter))).unwrap().sees;
        let filter = |from| Sees::Filtered(Filter::new(from, IP.to_vec()).unwrap());
        assert_eq!(sees(libc::SOCK_RAW, &bytes(&IP)), filter(Layer::Link));
        assert_eq!(sees(libc::SOCK_DGRAM, &bytes(&IP)), filter(Layer::Network));
        assert_eq!(sees(libc::SOCK_RAW, &[]), Sees::Everything);
        assert_eq!(sees(libc::SOCK_RAW, &bytes(&IP[2..3])), Sees::Everything);
        assert!(matches!(sees(10, &bytes(&IP)), Sees::Unknown(why) if why.contains("type 10")));
        assert!(matches!(sees(libc::SOCK_RAW, &bytes(&IP)[1..]), Sees::Unknown(why) if why.contains("odd")));
        let ifindex = [instruction(0x20, 0, 0, -0x1000i32 as u32 + 8), IP[3]];
        assert!(matches!(sees(libc::SOCK_RAW, &bytes(&ifindex)), Sees::Unknown(why) if why.contains("beside")));
    }

    #[test]
    fn a_socket_that_is_to_see_all_stands_for_the_others() {
        let with =
            |filter: Option<&[u64]>| decode(&payload(libc::SOCK_RAW, 3, 5, filter.map(bytes).as_deref())).unwrap();
        let filters = |sockets: &[&Socket]| {
            let findings = on_port(5, sockets).into_iter().map(|finding| match finding.scope {
                Scope::Ingress(5, None) => ("in", finding.filter.map(|filter| filter.code().to_vec())),
                Scope::Egress(5, None) => ("out", finding.filter.map(|filter| filter.code().to_vec())),
                other => panic!("{other:?}"),
            });
            findings.collect::<Vec<_>>()
        };
        let (ip, ttl, all) = (with(Some(&IP)), with(Some(&TTL)), with(None));
        let (by_ip, by_ttl) = (Some(IP.to_vec()), Some(TTL.to_vec()));
        assert_eq!(filters(&[&ip, &ip]), [("in", by_ip.clone()), ("out", by_ip.clone())]);
        // What leaves has another TTL than it had when it came.
        assert_eq!(filters(&[&ttl]), [("in", by_ttl.clone()), ("out", None)]);
        assert_eq!(filters(&[&ip, &ttl]), [("in", by_ip), ("in", by_ttl), ("out", None)]);
        assert_eq!(filters(&[&ip, &all, &ttl]), [("in", None), ("out", None)]);
    }

    #[test]
    fn truncated_messages_are_errors() {
        let payload = payload(libc::SOCK_RAW, 3, 5, None);
        for length in 0..20 {
            assert!(socket(Message { kind: 20, payload: &payload[..length] }).is_err(), "{length}");
        }
    }
}
