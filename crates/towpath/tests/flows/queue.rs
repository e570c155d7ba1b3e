//! A program that takes packets out of the kernel by NFQUEUE and gives them back when it likes
//! (include/uapi/linux/netfilter/nfnetlink_queue.h, Linux 6.1).

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use towpath_lab::Node;

const SUBSYSTEM: u16 = 3 << 8;
const PACKET: u16 = SUBSYSTEM;
const VERDICT: u16 = SUBSYSTEM | 1;
const CONFIG: u16 = SUBSYSTEM | 2;
const NLM_F_REQUEST: u16 = 1;
const NF_ACCEPT: u32 = 1;

/// The listener of queue 0.
pub struct Queue(Socket);

impl Queue {
    pub fn listen(node: &Node) -> Self {
        let mut socket = node.enter(|| Socket::new(NETLINK_NETFILTER)).expect("in the node").expect("a socket");
        socket.bind_auto().expect("bound");
        let queue = Self(socket);
        // NFQNL_CFG_CMD_BIND; NFQNL_COPY_META, of no bytes
        queue.send(CONFIG, 1, &[1, 0, 0, 0]);
        queue.send(CONFIG, 2, &[0, 0, 0, 0, 1]);
        queue
    }

    fn send(&self, kind: u16, attribute: u16, value: &[u8]) {
        let padded = value.len().next_multiple_of(4);
        let mut message = ((16 + 4 + 4 + padded) as u32).to_ne_bytes().to_vec();
        message.extend([kind, NLM_F_REQUEST].map(u16::to_ne_bytes).concat());
        message.extend([0; 8]);
        // nfgenmsg: family, version, queue
        message.extend([0; 4]);
        message.extend([(value.len() + 4) as u16, attribute].map(u16::to_ne_bytes).concat());
        message.extend(value);
        message.resize(24 + padded, 0);
        self.0.send_to(&message, &SocketAddr::new(0, 0), 0).expect("sent");
    }

    /// Waits for a packet; its number.
    pub fn packet(&self) -> u32 {
        crate::common::eventually("a packet is queued", || {
            let mut buffer = Vec::with_capacity(4096);
            self.0.recv(&mut buffer, libc::MSG_DONTWAIT).ok()?;
            let kind = u16::from_ne_bytes(buffer[4..6].try_into().expect("a header"));
            // The first attribute is its header, and that begins with the number.
            (kind == PACKET).then(|| u32::from_be_bytes(buffer[24..28].try_into().expect("a number")))
        })
    }

    /// Gives a packet back.
    pub fn accept(&self, number: u32) {
        self.send(VERDICT, 2, &[NF_ACCEPT.to_be_bytes(), number.to_be_bytes()].concat());
    }
}
