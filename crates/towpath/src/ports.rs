//! Which interfaces are to be served: those named, wherever they are at the moment, or every one that can be.

use crate::interfaces;
use anyhow::Result;
use towpath_engine::{Engine, Error, Interface};
use towpath_fpc::{Port, PortKind};

/// The ports to serve.
pub struct Wanted {
    ports: Vec<Entry>,
    /// They were named, so each must be served; otherwise those that cannot are left out
    named: bool,
}

struct Entry {
    name: String,
    /// Its index, while there is such an interface
    ifindex: Option<u32>,
}

impl Wanted {
    /// The named interfaces, all of which exist; without names, `choose` decides.
    pub fn new(names: &[String], interfaces: &[(String, u32)]) -> Result<Self> {
        let mut ports: Vec<Entry> = Vec::new();
        for name in names {
            let ifindex = interfaces::index(interfaces, name)?;
            if ports.iter().all(|port| port.ifindex != Some(ifindex)) {
                ports.push(Entry { name: name.clone(), ifindex: Some(ifindex) });
            }
        }
        Ok(Self { ports, named: !names.is_empty() })
    }

    /// Indices of the interfaces that exist.
    pub fn indices(&self) -> Vec<u32> {
        self.ports.iter().filter_map(|port| port.ifindex).collect()
    }

    /// Names, if any were given.
    pub fn names(&self) -> Option<Vec<String>> {
        self.named.then(|| self.ports.iter().map(|port| port.name.clone()).collect())
    }

    /// Name and index of each port, also of those that do not exist now.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Option<u32>)> {
        self.ports.iter().map(|port| (port.name.as_str(), port.ifindex))
    }

    /// Fails if a port is something stacked on other interfaces, or no interface for packets at all.
    pub fn check<'a>(&self, mut ports: impl Iterator<Item = &'a Port>) -> Result<()> {
        let wanted = self.indices();
        let Some(port) = ports.find(|port| wanted.contains(&port.ifindex) && !is_device(port)) else { return Ok(()) };
        match port.kind {
            PortKind::Vlan { .. } => anyhow::bail!(
                "{} is a VLAN sub-interface: it is served with the interface underneath; name that one",
                port.name
            ),
            _ => anyhow::bail!("{} cannot be served: it has no driver of its own that receives packets", port.name),
        }
    }

    /// Without names: takes every interface with a driver of its own that has no master and no program of others.
    pub fn choose<'a>(&mut self, ports: impl Iterator<Item = &'a Port>, engine: &Engine) {
        if self.named {
            return;
        }
        let ours = engine.ports();
        let free = |port: &&Port| {
            ours.contains(&port.ifindex)
                || Interface::query(port.ifindex).is_ok_and(|interface| interface.xdp.is_none())
        };
        let candidates = ports.filter(|port| is_device(port) && port.master == 0).filter(free);
        self.ports = candidates.map(|port| Entry { name: port.name.clone(), ifindex: Some(port.ifindex) }).collect();
    }

    /// Without names: leaves out the port that the engine could not serve; None if it must be served, or is unknown.
    pub fn drop_port(&mut self, error: &Error) -> Option<u32> {
        let (Error::NoNativeXdp { port, .. } | Error::Refused { port, .. } | Error::OtherProgram { port, .. }) = error
        else {
            return None;
        };
        let place = self.ports.iter().position(|entry| !self.named && entry.name == *port)?;
        tracing::info!("left out: {error}");
        self.ports.remove(place).ifindex
    }

    /// An interface is described. True if it is one to serve that was not there before.
    pub fn appears(&mut self, port: &Port) -> bool {
        let known = self.ports.iter().any(|entry| entry.ifindex == Some(port.ifindex));
        let absent = |entry: &&mut Entry| entry.ifindex.is_none() && entry.name == port.name && is_device(port);
        match self.ports.iter_mut().find(absent) {
            Some(entry) if !known => {
                entry.ifindex = Some(port.ifindex);
                true
            }
            _ => false,
        }
    }

    /// An interface is gone. True if it was one to serve; it will be again when it comes back.
    pub fn vanishes(&mut self, ifindex: u32) -> bool {
        match self.ports.iter_mut().find(|entry| entry.ifindex == Some(ifindex)) {
            Some(entry) => {
                entry.ifindex = None;
                true
            }
            None => false,
        }
    }
}

/// Interfaces that can have a program, as opposed to those stacked on others.
fn is_device(port: &Port) -> bool {
    matches!(port.kind, PortKind::Ethernet | PortKind::Virtual)
}
