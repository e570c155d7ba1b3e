//! What travels between a wire's device and its twin in Linux besides frames (NETFPC): the twin has a carrier while the device
//! has one, and the device has the twin's MTU and MAC address and is promiscuous while the twin is.
//!
//! A keeper looks at the twin whenever Linux has said something about it, and each second, since not all is announced: a device
//! above it with an address of its own makes it promiscuous without a word (net/core/dev.c, `__dev_set_rx_mode`, Linux 6.1).

use anyhow::{Context, Result};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;
use towpath_cm::audit::Linux;
use towpath_user::Device;
use towpath_user::tap::Tap;

/// Between two looks at the device.
const TURN: Duration = Duration::from_millis(100);
/// Every device has this MTU.
const ETHERNET_MTU: u32 = 1500;
/// Turns between two looks at the twin.
const TURNS: u32 = 10;

/// The thread that sees to it, until this is dropped.
pub struct Keeper {
    device: Arc<dyn Device>,
    look: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Has the device of a port's wire be as the port's interface, and the other way round; from now on.
    pub fn start(port: &str, ifindex: u32, twin: Arc<Tap>, device: Arc<dyn Device>) -> Result<Self> {
        let linux = Linux::open()?;
        let mut pair = Pair {
            port: port.into(),
            ifindex,
            linux,
            twin,
            device: device.clone(),
            carrier: None,
            settings: None,
            foreign: false,
        };
        pair.look_at_device();
        pair.look_at_twin();
        let (look, looks) = sync_channel(1);
        let thread = std::thread::Builder::new().name("keeper".into()).spawn(move || pair.keep(&looks));
        Ok(Self { device, look: Some(look), thread: Some(thread.context("cannot start a thread for a wire")?) })
    }

    /// Has it look at the twin now.
    pub fn look(&self) {
        match self.look.as_ref().map(|look| look.try_send(())) {
            // It is about to.
            None | Some(Ok(()) | Err(TrySendError::Full(()))) => {}
            Some(Err(TrySendError::Disconnected(()))) => tracing::warn!("a wire's settings are followed no more"),
        }
    }

    /// Frames that the device has lost.
    pub fn lost(&self) -> u64 {
        self.device.lost()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.look.take());
        // One that panicked has said so.
        self.thread.take().map(JoinHandle::join);
    }
}

/// What the device was told.
#[derive(Clone, Copy)]
struct Settings {
    mtu: u32,
    mac: Option<[u8; 6]>,
    promiscuous: bool,
}

struct Pair {
    port: String,
    ifindex: u32,
    linux: Linux,
    twin: Arc<Tap>,
    device: Arc<dyn Device>,
    /// As the twin was told
    carrier: Option<bool>,
    settings: Option<Settings>,
    /// The device has an address of its own
    foreign: bool,
}

impl Pair {
    fn keep(&mut self, looks: &Receiver<()>) {
        for turn in (0..TURNS).cycle() {
            match looks.recv_timeout(TURN) {
                Ok(()) => self.look_at_twin(),
                Err(RecvTimeoutError::Timeout) if turn == 0 => self.look_at_twin(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.look_at_device();
        }
    }

    fn look_at_device(&mut self) {
        let Some(carrier) = self.device.carrier().filter(|carrier| self.carrier != Some(*carrier)) else { return };
        let (port, before) = (&self.port, self.carrier.replace(carrier));
        if let Err(error) = self.twin.set_carrier(carrier) {
            tracing::warn!("cannot tell Linux whether the wire of {port} has a carrier: {error}");
        } else if before.is_some() || !carrier {
            tracing::info!("the wire of {port} has {} carrier", if carrier { "a" } else { "no" });
        }
    }

    fn look_at_twin(&mut self) {
        let link = match self.linux.link(self.ifindex) {
            Ok(Some(link)) => link,
            // It is about to be served no more.
            Ok(None) => return,
            Err(error) => return tracing::warn!("cannot ask Linux about {}: {error}", self.port),
        };
        let before = self.settings;
        let mtu = before.map(|before| before.mtu).filter(|mtu| *mtu == link.mtu);
        let mtu = mtu.unwrap_or_else(|| self.agree_on_mtu(link.mtu));
        let port = &self.port;
        if let Some(mac) = link.mac.filter(|mac| before.is_none_or(|before| before.mac != Some(*mac))) {
            let refused = self.device.set_mac(mac).err();
            self.foreign = refused.is_some();
            if let Some(error) = refused {
                tracing::warn!("the wire of {port} keeps its MAC address, and is promiscuous instead: {error}");
            }
        }
        let promiscuous = link.promiscuous || self.foreign;
        if before.is_none_or(|before| before.promiscuous != promiscuous)
            && let Err(error) = self.device.set_promiscuous(promiscuous)
        {
            let wanted = if promiscuous { "cannot be" } else { "stays" };
            tracing::warn!("the wire of {port} {wanted} promiscuous: {error}");
        }
        self.settings = Some(Settings { mtu, mac: link.mac, promiscuous });
    }

    /// Gives the device the MTU of the twin, or the twin that of the device, as an interface keeps its own if its driver refuses
    /// another; what both have then.
    fn agree_on_mtu(&self, wanted: u32) -> u32 {
        let (port, had) = (&self.port, self.settings.map_or(ETHERNET_MTU, |settings| settings.mtu));
        let Err(refused) = self.device.set_mtu(wanted) else { return wanted };
        if let Err(error) = self.twin.set_mtu(had) {
            tracing::warn!(
                "the wire of {port} cannot have the port's MTU of {wanted}: {refused}; nor can the port have {had}: {error}"
            );
            return wanted;
        }
        tracing::warn!("{port} has an MTU of {had} again: its wire cannot have {wanted} ({refused})");
        had
    }
}
