//! Whether a port can transmit frames redirected to it. If it cannot, the kernel drops them without a word, so next
//! hops that leave by such a port are Linux's.
//!
//! From 6.3 on each device says so itself (netdev generic netlink, Documentation/netlink/specs/netdev.yaml) and
//! announces changes. A veth gains the ability when its *peer* has a NAPI context, that is an XDP program or GRO
//! (drivers/net/veth.c, `veth_xdp_xmit`); since the flag is only looked at when the veth itself comes up and when the
//! peer, up, changes GRO, it may lag behind, but the flag is what redirection obeys. Before 6.3 a veth is asked by sending a frame through it (Ethernet
//! frame of the local experimental EtherType, addressed to the port itself, which receivers discard) and looking at
//! the counter of frames it took; other drivers are known by name. And before 6.3 the kernel redirects no frame of
//! several buffers to any device (net/core/filter.c 6.1, `xdp_do_redirect`).

use crate::error::{Error, Result};
use crate::interface::Interface;
use crate::netlink::{HEADER, Socket, attributes, word16, word32, word64};
use crate::sys;
use std::io;
use std::os::fd::AsFd;
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

/// Whether the interface can transmit frames redirected to it, now.
pub fn can_transmit(ifindex: u32) -> Result<TransmitSupport> {
    let interface = Interface::query(ifindex)?;
    let failed = |e| Error::io(format!("find out whether {} can transmit redirected frames", interface.name), e);
    match Netdev::open().map_err(failed)? {
        Some(mut netdev) => Ok(judge(&interface, netdev.features(ifindex).map_err(failed)?)),
        None if interface.is_veth() => probe_veth(&interface).map_err(failed),
        None => Ok(by_driver(&interface.driver)),
    }
}

/// Announces changes of what `can_transmit` says. Before 6.3 nothing is announced: then every wait ends in time and
/// the caller asks again.
pub struct TransmitWatch(Option<Netdev>);

impl TransmitWatch {
    /// Starts to listen in this thread's network namespace.
    pub fn open() -> Result<Self> {
        let failed = |e| Error::io("listen for changes of XDP features", e);
        let mut netdev = Netdev::open().map_err(failed)?;
        if let Some(netdev) = &mut netdev {
            netdev.listen().map_err(failed)?;
        }
        Ok(Self(netdev))
    }

    /// True if the kernel announces changes.
    pub fn announces(&self) -> bool {
        self.0.is_some()
    }

    /// Interfaces whose abilities may have changed; empty if `timeout` passed.
    pub fn wait(&mut self, timeout: Duration) -> Result<Vec<u32>> {
        match &mut self.0 {
            Some(netdev) => netdev.changed(timeout).map_err(|e| Error::io("wait for changes of XDP features", e)),
            None => {
                std::thread::sleep(timeout);
                Ok(Vec::new())
            }
        }
    }
}

/// `NETDEV_XDP_ACT_NDO_XMIT`
const NDO_XMIT: u64 = 4;
/// `NETDEV_XDP_ACT_NDO_XMIT_SG`
const NDO_XMIT_SG: u64 = 64;

fn judge(interface: &Interface, features: u64) -> TransmitSupport {
    if features & NDO_XMIT_SG != 0 && features & NDO_XMIT != 0 {
        TransmitSupport::Full
    } else if features & NDO_XMIT != 0 {
        TransmitSupport::SingleBuffer
    } else {
        TransmitSupport::None(why_not(interface))
    }
}

fn why_not(interface: &Interface) -> String {
    if interface.is_veth() {
        "a veth transmits redirected frames only if its peer had GRO or an XDP program when either came up or changed that; \
         with both up: ethtool -K PEER gro off && ethtool -K PEER gro on"
            .into()
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

/// `r1 = ifindex; r2 = 0; call bpf_redirect; exit`
fn redirect_to(ifindex: u32) -> [u64; 4] {
    [0x01b7 | u64::from(ifindex) << 32, 0x02b7, 0x85 | 23 << 32, 0x95]
}

fn probe_veth(interface: &Interface) -> io::Result<TransmitSupport> {
    let program = sys::prog_load("towpath_probe", c"Dual MIT/GPL", &redirect_to(interface.index), &mut [])?;
    let mut frame = [0u8; 60];
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    let before = frames_taken(interface)?;
    sys::run_live(program.as_fd(), &frame, interface.index)?;
    let taken = frames_taken(interface)? != before;
    Ok(if taken { TransmitSupport::SingleBuffer } else { TransmitSupport::None(why_not(interface)) })
}

/// Redirected frames the veth has passed on so far.
fn frames_taken(interface: &Interface) -> io::Result<u64> {
    let statistics = interface.ethtool.statistics()?;
    Ok(statistics
        .iter()
        .filter(|(name, _)| name.starts_with("tx_queue_") && name.ends_with("_xdp_xmit"))
        .map(|(_, n)| n)
        .sum())
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

    fn features(&mut self, ifindex: u32) -> io::Result<u64> {
        let request = genl(self.family, NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
        let answer = self.socket.request(&request)?;
        answer
            .iter()
            .find_map(|message| attribute(message.get(GENL_HEADER..)?, NETDEV_A_DEV_XDP_FEATURES))
            .map(|features| word64(features, 0))
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
