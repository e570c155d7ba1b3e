//! Attaching the program to ports, and the device settings that go with it.
//!
//! A veth without GRO has no NAPI context until a program is attached and loses it, with what is in its ring, when
//! the program goes (drivers/net/veth.c, `veth_disable_xdp`). With GRO the context and the ring stay. So GRO is
//! switched on before the program comes and is left on when it goes.
//!
//! A driver that cuts VLAN tags off into the descriptor hides them from XDP, so that offload is switched off while the
//! program is there. A veth has no such switch: a tag that the host at its other end leaves to its device
//! (`tx-vlan-offload`, which VLAN interfaces and bridges on top of a veth use) travels beside the frame. Where the program
//! cannot see that (see `beside`), the user is told what to do at the other end.

use crate::beside::Places;
use crate::bpffs::PinDir;
use crate::error::{Error, Result};
use crate::grace::GraceMethod;
use crate::interface::Interface;
use crate::sys;
use crate::tc;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Something the user should know about a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice {
    /// Interface name
    pub port: String,
    /// What is or will be done
    pub text: String,
    /// Command that undoes it, where `towpath down` does not
    pub undo: Option<String>,
}

/// How to attach.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Mode {
    /// In the driver
    #[default]
    Native,
    /// In the stack, after the driver built an skb: for tests and devices without native XDP
    Generic,
}

impl Mode {
    /// As `Attached::mode` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    /// `XDP_FLAGS_DRV_MODE`, `XDP_FLAGS_SKB_MODE`
    fn flags(self) -> u32 {
        match self {
            Self::Native => 1 << 2,
            Self::Generic => 1 << 1,
        }
    }
}

/// Drivers known to stop and restart their rings when the first program comes or the last goes, so that packets are lost
/// for a moment. From experience, not from reading each: of a driver that is not listed it is said that it may.
const RESETTING_DRIVERS: &[&str] = &[
    "atlantic",
    "bnxt_en",
    "cpsw",
    "ena",
    "fsl_dpa",
    "fsl_dpaa2_eth",
    "funeth",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "mana",
    "mlx4_en",
    "mlx5_core",
    "mtk_soc_eth",
    "mvneta",
    "mvpp2",
    "nfp",
    "qede",
    "rvu-nicpf",
    "sfc",
    "st_gmac",
    "virtio_net",
];

/// What a program costs those who send TCP by the other end of a veth.
pub const LOCAL_TCP: &str = "the kernel takes TSO from a veth's other end while a program is attached, and packets whose checksum is \
     left to the veth are Linux's: TCP from containers and virtual machines there is slower than by Linux alone";

/// What is going to be done to a port's device.
struct Plan {
    gro: bool,
    rx_vlan: bool,
}

fn plan(interface: &Interface, mode: Mode) -> Result<Plan> {
    let failed = |e| Error::io(format!("ask for offloads of {}", interface.name), e);
    let veth = interface.is_veth();
    // Not every driver answers: one that knows no such flag cuts no tags off.
    let rx_vlan = !veth && interface.ethtool.rx_vlan().unwrap_or(false);
    Ok(Plan { gro: veth && mode == Mode::Native && !interface.ethtool.gro().map_err(failed)?, rx_vlan })
}

/// What attaching to the interface will do besides attaching; nothing is changed.
pub fn announce(interface: &Interface, mode: Mode) -> Result<Vec<Notice>> {
    let plan = plan(interface, mode)?;
    let notice = |text: String, undo| Notice { port: interface.name.clone(), text, undo };
    let mut notices = Vec::new();
    if plan.gro {
        notices.push(notice(
            "GRO is switched on and stays on, so that attaching and detaching lose no packets".into(),
            Some(format!("ethtool -K {} gro off", interface.name)),
        ));
    }
    // drivers/net/veth.c, `veth_xdp_set`, `veth_fix_features`
    if mode == Mode::Native && interface.is_veth() {
        notices.push(notice(LOCAL_TCP.into(), None));
    }
    if plan.rx_vlan {
        notices.push(notice("the receive VLAN offload is off while Towpath serves the port".into(), None));
    }
    if let Some(why) = unseen_tags(interface, mode) {
        let text = format!(
            "VLAN tags that the host at the other end leaves to its device cannot be seen ({why}), and such frames are taken \
             for untagged ones; if it uses VLANs, run there: ethtool -K PEER txvlan off tx-vlan-stag-hw-insert off"
        );
        notices.push(notice(text, None));
    }
    let driver = &interface.driver;
    if mode == Mode::Native && !interface.is_veth() {
        let text = if RESETTING_DRIVERS.contains(&driver.as_str()) {
            format!(
                "driver {driver} restarts its rings when the program is attached or detached: packets are lost for a moment"
            )
        } else {
            format!(
                "driver {driver} may restart its rings when the program is attached or detached and lose packets then"
            )
        };
        notices.push(notice(text, None));
    }
    Ok(notices)
}

/// Why the program does not see VLAN tags that travel beside frames, if there may be any.
fn unseen_tags(interface: &Interface, mode: Mode) -> Option<String> {
    match mode {
        _ if !interface.is_veth() => None,
        Mode::Generic => Some("XDP's generic mode".into()),
        Mode::Native => Places::find().err(),
    }
}

/// A program on an interface, not pinned: dropping it takes the program off again and undoes the settings.
pub(crate) struct Attachment {
    interface: Interface,
    link: Option<OwnedFd>,
    plan: Plan,
}

impl Attachment {
    /// Prepares the device and attaches the program.
    pub(crate) fn make(interface: Interface, program: BorrowedFd<'_>, mode: Mode) -> Result<Self> {
        if let Some(other) = &interface.xdp {
            let (port, name) = (interface.name.clone(), other.name.clone());
            return Err(Error::OtherProgram { port, id: other.id, name, mode: other.mode });
        }
        let wanted = plan(&interface, mode)?;
        // From here on dropping undoes what was done so far.
        let mut attachment = Self { interface, link: None, plan: Plan { gro: false, rx_vlan: false } };
        let interface = &attachment.interface;
        let failed =
            |what: &str, e| Error::privileged(format!("switch {what} of {}", interface.name), "CAP_NET_ADMIN", e);
        if wanted.gro {
            interface.ethtool.set_gro(true).map_err(|e| failed("GRO", e))?;
            attachment.plan.gro = true;
        }
        if wanted.rx_vlan {
            interface.ethtool.set_rx_vlan(false).map_err(|e| failed("the receive VLAN offload", e))?;
            attachment.plan.rx_vlan = true;
        }
        let link = sys::link_create(program, interface.index, sys::AttachType::Xdp, mode.flags())
            .map_err(|e| explain(interface, mode, e))?;
        attachment.link = Some(link);
        Ok(attachment)
    }

    /// Makes it last: pins the link and leaves marks of what is to be restored.
    pub(crate) fn pin(mut self, dir: &PinDir) -> Result<OwnedFd> {
        let index = self.interface.index;
        if self.plan.rx_vlan {
            dir.mark(&rx_vlan_mark(index))?;
        }
        let link = self.link.take().ok_or(Error::NoPort(index))?;
        if let Err(e) = sys::pin(link.as_fd(), &dir.pin(&link_pin(index))) {
            self.link = Some(link);
            return Err(Error::io(format!("pin the link of {}", self.interface.name), e));
        }
        self.plan = Plan { gro: false, rx_vlan: false };
        Ok(link)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            log_failure("detach from", &self.interface.name, detach(link.as_fd()));
        }
        if self.plan.rx_vlan {
            log_failure("restore the VLAN offload of", &self.interface.name, self.interface.ethtool.set_rx_vlan(true));
        }
        if self.plan.gro {
            log_failure("restore GRO of", &self.interface.name, self.interface.ethtool.set_gro(false));
        }
    }
}

/// Takes the program off the interface `index`, whose link is pinned, and restores what the marks say.
pub(crate) fn release(dir: &PinDir, index: u32) -> Result<()> {
    tc::take_off(dir, &tc::ACCEPT, index)?;
    match sys::get_pinned(&dir.pin(&link_pin(index))) {
        Ok(link) => match detach(link.as_fd()) {
            // ENOLINK: the interface went away and took the program with it.
            Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOLINK | libc::ENODEV)) => {
                return Err(Error::privileged(format!("detach from interface {index}"), "CAP_NET_ADMIN", e));
            }
            _ => {}
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(format!("open the link of interface {index}"), e)),
    }
    dir.remove(&link_pin(index))?;
    if dir.pin(&rx_vlan_mark(index)).is_dir() {
        if let Ok(interface) = Interface::query(index) {
            log_failure("restore the VLAN offload of", &interface.name, interface.ethtool.set_rx_vlan(true));
        }
        dir.remove(&rx_vlan_mark(index))?;
    }
    Ok(())
}

/// Detaches a link, after every packet has gone to Linux for a grace period. A veth that keeps its NAPI, for GRO, forgets
/// the queue's device while a program may still run there (drivers/net/veth.c 6.1, `veth_disable_xdp`): one that asks
/// for the interface would read through a null pointer.
fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    if let Err(error) = let_pass(link) {
        tracing::debug!("the program is taken off while it may run: {error}");
    }
    sys::link_detach(link)
}

fn let_pass(link: BorrowedFd<'_>) -> Result<()> {
    let failed = |e| Error::io("let all packets of a port pass", e);
    let pass = sys::load_pass().map_err(failed)?;
    sys::link_update(link, pass.as_fd()).map_err(failed)?;
    GraceMethod::choose()?.wait()
}

fn log_failure(what: &str, port: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::warn!("could not {what} {port}: {error}");
    }
}

/// Name of a link's pin.
pub(crate) fn link_pin(index: u32) -> String {
    format!("{LINK}{index}")
}

/// Interface index from the name of a link's pin.
pub(crate) fn pinned_index(name: &str) -> Option<u32> {
    name.strip_prefix(LINK)?.parse().ok()
}

const LINK: &str = "link_";

fn rx_vlan_mark(index: u32) -> String {
    format!("rxvlan_{index}")
}

fn explain(interface: &Interface, mode: Mode, source: io::Error) -> Error {
    let (port, driver) = (interface.name.clone(), interface.driver.clone());
    let hint = match source.raw_os_error() {
        Some(libc::EPERM) => {
            return Error::Permission { what: format!("attach to {port}"), capability: "CAP_NET_ADMIN" };
        }
        Some(libc::ENODEV) => return Error::NoPort(interface.index),
        Some(libc::EOPNOTSUPP) => return Error::NoNativeXdp { port, driver },
        Some(libc::EBUSY | libc::EEXIST) => match Interface::query(interface.index).map(|now| now.xdp) {
            Ok(Some(other)) => return Error::OtherProgram { port, id: other.id, name: other.name, mode: other.mode },
            _ => " (another program came and went)",
        },
        // drivers/net/veth.c, `veth_xdp_set`
        Some(libc::ERANGE) if interface.is_veth() => " (the MTU of its peer is too large for XDP)",
        Some(libc::ENOSPC) if interface.is_veth() => {
            " (its peer has more transmit queues than it has receive queues: ethtool -L)"
        }
        Some(libc::ENOTCONN) if interface.is_veth() => " (it has no peer)",
        Some(libc::EINVAL) => {
            " (often: the MTU, LRO or the number of queues is not one the driver can serve with XDP; see dmesg)"
        }
        _ => "",
    };
    let instead =
        if mode == Mode::Native { "; XDP's generic mode (--generic, slower) does without the driver" } else { "" };
    Error::Refused { port, driver, source, hint: format!("{hint}{instead}") }
}
