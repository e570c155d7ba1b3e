//! Whether a port can transmit frames redirected to it. If it cannot, the kernel drops them without a word, so next
//! hops that leave by such a port are Linux's.
//!
//! From 6.3 on each device says so itself (netdev generic netlink, Documentation/netlink/specs/netdev.yaml) and
//! announces changes. A veth gains the ability when its *peer* has a NAPI context, that is an XDP program or GRO
//! (drivers/net/veth.c, `veth_xdp_xmit`); since the flag is only looked at when the veth itself comes up and when the
//! peer, up, changes GRO, it may lag behind, but the flag is what redirection obeys. Before 6.3 a veth is asked by an
//! attempt (see `probe`), and other drivers are known by name. And before 6.3 the kernel redirects no frame of several
//! buffers to any device (net/core/filter.c 6.1, `xdp_do_redirect`).

use crate::error::{Error, Result};
use crate::interface::{self, Interface};
use crate::netlink::{HEADER, Socket, attributes, word16, word32, word64};
use crate::probe;
use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

/// Whether frames can be redirected to a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TransmitSupport {
    /// Frames of any kind
    Full,
    /// Only frames in one buffer: jumbo frames that the receiver delivers in several are dropped
    SingleBuffer,
    /// None; the text says why and what would change it
    None(String),
}

/// Drivers with `ndo_xdp_xmit` in Linux 6.1.
const DRIVERS: &[&str] = &[
    "atlantic",
    "bnxt_en",
    "cpsw",
    "cpsw-switch",
    "ena",
    "fsl_dpa",
    "fsl_dpaa2_eth",
    "fsl_enetc",
    "funeth",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "mana",
    "mlx5_core",
    "mtk_soc_eth",
    "mvneta",
    "mvpp2",
    "netsec",
    "qede",
    "rvu-nicpf",
    "sfc",
    "st_gmac",
    "tun",
    "virtio_net",
    "xen_netfront",
];

/// Has a veth transmit redirected frames; where its peer is, and with the peer's name.
pub const PEER_GRO: &str = "ethtool -K PEER gro off && ethtool -K PEER gro on";

/// Whether the interface can transmit frames redirected to it, now.
pub fn can_transmit(ifindex: u32) -> Result<TransmitSupport> {
    let interface = Interface::query(ifindex)?;
    let failed = |e| Error::io(format!("find out whether {} can transmit redirected frames", interface.name), e);
    match Netdev::open().map_err(failed)? {
        Some(mut netdev) => Ok(judge(&interface, netdev.features(ifindex).map_err(failed)?)),
        None if interface.is_veth() => match probe::takes_frames(&interface).map_err(failed)? {
            true => Ok(TransmitSupport::SingleBuffer),
            false => Ok(TransmitSupport::None(why_not(&interface))),
        },
        None => Ok(by_driver(&interface.driver)),
    }
}

/// Tells when what `can_transmit` says may have changed. Before 6.3 nothing is announced: then it shows in the frames
/// that a veth drops that it can no longer transmit, but a veth that could not has to be asked again.
pub struct TransmitWatch(Sign);

/// Interfaces whose abilities may have changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Changed {
    /// Only these
    These(Vec<u32>),
    /// Any: announcements were lost
    Any,
}

enum Sign {
    Announced(Netdev),
    /// Frames that each veth has dropped so far
    Dropped(BTreeMap<u32, u64>),
}

impl TransmitWatch {
    /// Starts to look in this thread's network namespace.
    pub fn open() -> Result<Self> {
        let failed = |e| Error::io("listen for changes of XDP features", e);
        let Some(mut netdev) = Netdev::open().map_err(failed)? else {
            return Ok(Self(Sign::Dropped(interface::dropped_by_veths()?)));
        };
        netdev.listen().map_err(failed)?;
        Ok(Self(Sign::Announced(netdev)))
    }

    /// True if the kernel announces changes.
    pub fn announces(&self) -> bool {
        matches!(self.0, Sign::Announced(_))
    }

    /// Whose abilities may have changed; nobody's if `timeout` passed.
    pub fn wait(&mut self, timeout: Duration) -> Result<Changed> {
        match &mut self.0 {
            Sign::Announced(netdev) => match netdev.changed(timeout) {
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(Changed::Any),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Changed::These(Vec::new())),
                changed => changed.map(Changed::These).map_err(|e| Error::io("wait for changes of XDP features", e)),
            },
            Sign::Dropped(before) => {
                std::thread::sleep(timeout);
                let now = interface::dropped_by_veths()?;
                let more = |(ifindex, count): (&u32, &u64)| (before.get(ifindex)? != count).then_some(*ifindex);
                let changed = now.iter().filter_map(more).collect();
                *before = now;
                Ok(Changed::These(changed))
            }
        }
    }
}

bitflags::bitflags! {
    /// What a device can do with XDP, as it says itself (`enum netdev_xdp_act` of include/uapi/linux/netdev.h).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct XdpFeatures: u64 {
        /// It runs programs
        const BASIC = 1;
        /// It transmits frames that are redirected to it
        const NDO_XMIT = 4;
        /// AF_XDP without copies
        const ZEROCOPY = 8;
        /// Programs see frames of several buffers
        const RX_SG = 32;
        /// It transmits redirected frames of several buffers
        const NDO_XMIT_SG = 64;
        const _ = !0;
    }
}

/// What the interface's device says that it can do with XDP, now; None on kernels that do not tell (before 6.3).
pub fn xdp_features(ifindex: u32) -> Result<Option<XdpFeatures>> {
    let asked = Netdev::open().and_then(|netdev| netdev.map(|mut netdev| netdev.features(ifindex)).transpose());
    asked.map_err(|e| Error::io(format!("ask for the XDP features of interface {ifindex}"), e))
}

fn judge(interface: &Interface, features: XdpFeatures) -> TransmitSupport {
    if features.contains(XdpFeatures::NDO_XMIT_SG | XdpFeatures::NDO_XMIT) {
        TransmitSupport::Full
    } else if features.contains(XdpFeatures::NDO_XMIT) {
        TransmitSupport::SingleBuffer
    } else {
        TransmitSupport::None(why_not(interface))
    }
}

fn why_not(interface: &Interface) -> String {
    if interface.is_veth() {
        format!(
            "a veth transmits redirected frames only if its peer had GRO or an XDP program when either came up or changed \
             that; with both up: {PEER_GRO}"
        )
    } else {
        format!("driver {} does not transmit redirected frames", interface.driver)
    }
}

fn by_driver(driver: &str) -> TransmitSupport {
    if DRIVERS.contains(&driver) {
        TransmitSupport::SingleBuffer
    } else {
        TransmitSupport::None(format!(
            "driver {driver} is not known to transmit redirected frames, and this kernel does not say (it does from 6.3 on)"
        ))
    }
}

/// The generic netlink family `netdev`.
struct Netdev {
    socket: Socket,
    family: u16,
    group: Option<u32>,
}

const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
/// Header of netlink and of generic netlink
const GENL_HEADER: usize = HEADER + 4;

impl Netdev {
    /// None if the kernel has no such family (before 6.3).
    fn open() -> io::Result<Option<Self>> {
        let mut socket = Socket::open(netlink_sys::protocols::NETLINK_GENERIC)?;
        let name = b"netdev\0";
        let answer = match socket.request(&genl(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, name)) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            other => other?,
        };
        let Some(message) = answer.first() else { return Ok(None) };
        let body = message.get(GENL_HEADER..).unwrap_or_default();
        let family = attribute(body, CTRL_ATTR_FAMILY_ID).map_or(0, |id| word16(id, 0));
        let group = attribute(body, CTRL_ATTR_MCAST_GROUPS).and_then(|groups| {
            attributes(groups)
                .find(|(_, group)| attribute(group, CTRL_ATTR_MCAST_GRP_NAME).is_some_and(|n| n == b"mgmt\0"))
                .and_then(|(_, group)| attribute(group, CTRL_ATTR_MCAST_GRP_ID))
                .map(|id| word32(id, 0))
        });
        Ok(Some(Self { socket, family, group }))
    }

    fn features(&mut self, ifindex: u32) -> io::Result<XdpFeatures> {
        let request = genl(self.family, NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
        let answer = self.socket.request(&request)?;
        answer
            .iter()
            .find_map(|message| attribute(message.get(GENL_HEADER..)?, NETDEV_A_DEV_XDP_FEATURES))
            .map(|features| XdpFeatures::from_bits_retain(word64(features, 0)))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer names no XDP features"))
    }

    fn listen(&mut self) -> io::Result<()> {
        let group = self.group.ok_or_else(|| io::Error::other("family netdev has no group mgmt"))?;
        self.socket.join(group)
    }

    fn changed(&mut self, timeout: Duration) -> io::Result<Vec<u32>> {
        let messages = self.socket.wait(timeout)?;
        let ifindex = |message: &Vec<u8>| {
            attribute(message.get(GENL_HEADER..)?, NETDEV_A_DEV_IFINDEX).map(|index| word32(index, 0))
        };
        Ok(messages.iter().filter(|message| word16(message, 4) == self.family).filter_map(ifindex).collect())
    }
}

fn attribute(body: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(body).find(|(k, _)| *k == kind).map(|(_, payload)| payload)
}

/// A generic netlink request with one attribute.
fn genl(family: u16, command: u8, kind: u16, payload: &[u8]) -> Vec<u8> {
    let attribute_len = 4 + payload.len();
    let mut message = Vec::with_capacity(GENL_HEADER + attribute_len + 3);
    message.extend(((GENL_HEADER + attribute_len.next_multiple_of(4)) as u32).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend(netlink_packet_core::NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend((attribute_len as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(payload);
    message.resize(GENL_HEADER + attribute_len.next_multiple_of(4), 0);
    message
}
