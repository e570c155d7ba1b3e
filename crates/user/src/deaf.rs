//! An interface that Linux does not listen to: all that comes in by it is dropped behind the packet sockets. An nftables
//! chain does it (family netdev, hook ingress, policy drop), in a table that belongs to a netlink socket and ends with it
//! (NFT_TABLE_F_OWNER, Linux 5.12), so nothing is left when the process dies. include/uapi/linux/netfilter/nf_tables.h.

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use std::io;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NESTED: u16 = 0x8000;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFTABLES: u16 = 10;
const NEW_TABLE: u16 = NFTABLES << 8;
const NEW_CHAIN: u16 = NFTABLES << 8 | 3;
const NETDEV: u8 = 5;
const OWNER: u32 = 2;
const INGRESS: u32 = 0;
/// Before any that people make
const PRIORITY: i32 = -500;
const DROP: u32 = 0;
/// Bytes of a netlink message's header
const HEADER: usize = 16;

/// While this exists, Linux does not hear what comes in by the interface.
pub struct Deaf {
    _owner: Socket,
}

impl Deaf {
    /// Makes Linux deaf to an interface of this thread's network namespace.
    pub fn to(interface: &str) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        let table = format!("towpath_{interface}");
        let make = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let hook = [number(1, INGRESS), number(2, PRIORITY as u32), string(3, interface)].concat();
        let chain =
            [string(1, &table), string(3, "deaf"), attribute(4 | NESTED, &hook), number(5, DROP), string(7, "filter")];
        let batch = [
            message(BATCH_BEGIN, NLM_F_REQUEST, 0, NFTABLES, &[]),
            message(NEW_TABLE, make, NETDEV, 0, &[string(1, &table), number(2, OWNER)].concat()),
            message(NEW_CHAIN, make, NETDEV, 0, &chain.concat()),
            message(BATCH_END, NLM_F_REQUEST, 0, NFTABLES, &[]),
        ];
        socket.send(&batch.concat(), 0)?;
        acknowledged(&socket, 2)?;
        Ok(Self { _owner: socket })
    }
}

/// Reads so many answers, which are there when `send` returns; the first refusal is the error.
fn acknowledged(socket: &Socket, mut wanted: usize) -> io::Result<()> {
    while wanted > 0 {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Some((header, body)) = rest.split_first_chunk::<HEADER>() {
            let [a, b, c, d, low, high, ..] = *header;
            let code = body.first_chunk::<4>().map_or(0, |code| i32::from_ne_bytes(*code));
            match u16::from_ne_bytes([low, high]) {
                NLMSG_ERROR if code != 0 => return Err(io::Error::from_raw_os_error(-code)),
                NLMSG_ERROR => wanted = wanted.saturating_sub(1),
                _ => {}
            }
            let len = (u32::from_ne_bytes([a, b, c, d]) as usize).max(HEADER).next_multiple_of(4);
            rest = rest.get(len..).unwrap_or_default();
        }
    }
    Ok(())
}

/// A message of nfnetlink: netlink's header, family, version, resource (big-endian), attributes.
fn message(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let len = (HEADER + 4 + attributes.len()) as u32;
    let mut message = len.to_ne_bytes().to_vec();
    message.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
    message.extend([0; 8]);
    message.extend([family, 0]);
    message.extend(resource.to_be_bytes());
    message.extend(attributes);
    message
}

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut attribute = [(payload.len() as u16 + 4).to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(payload);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn number(kind: u16, number: u32) -> Vec<u8> {
    attribute(kind, &number.to_be_bytes())
}

fn string(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), &[0]].concat())
}
