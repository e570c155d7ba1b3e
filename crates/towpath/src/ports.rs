//! Which interfaces are to be served: those named, wherever they are at the moment, or every one that can be.

use crate::interfaces;
use crate::wires::{self, PortArgument, Wire};
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
    /// None: its own
    wire: Option<Wire>,
}

impl Wanted {
    /// The named interfaces, all of which exist; without names, `choose` decides.
    pub fn new(named: &[PortArgument], interfaces: &[(String, u32)]) -> Result<Self> {
        let mut ports: Vec<Entry> = Vec::new();
        for PortArgument { name, wire } in named {
            let ifindex = interfaces::index(interfaces, name)
                .map_err(|error| if wire.is_some() { wires::without_twin(name, error) } else { error })?;
            if ports.iter().all(|port| port.ifindex != Some(ifindex)) {
                ports.push(Entry { name: name.clone(), ifindex: Some(ifindex), wire: wire.clone() });
            }
        }
        Ok(Self { ports, named: !named.is_empty() })
    }

    /// Indices of the interfaces that exist.
    pub fn indices(&self) -> Vec<u32> {
        self.ports.iter().filter_map(|port| port.ifindex).collect()
    }

    /// Indices of those with a driver in Linux, which can run a program.
    pub fn with_driver(&self) -> Vec<u32> {
        self.ports.iter().filter(|port| port.wire.is_none()).filter_map(|port| port.ifindex).collect()
    }

    /// The wire of a port, if it is not its interface's own.
    pub fn wire(&self, ifindex: u32) -> Option<&Wire> {
        self.ports.iter().find(|port| port.ifindex == Some(ifindex))?.wire.as_ref()
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
    pub fn check<'a>(&self, ports: impl Iterator<Item = &'a Port>) -> Result<()> {
        let wanted = self.indices();
        let unservable = |port: &'a Port| Some((port, unservable(port.kind)?));
        match ports.filter(|port| wanted.contains(&port.ifindex)).find_map(unservable) {
            Some((port, why)) => anyhow::bail!("{} cannot be served: {why}", port.name),
            None => Ok(()),
        }
    }

    /// Without names: takes every interface with a driver of its own that has no master and no program of others, and
    /// says why it leaves the others.
    pub fn choose<'a>(&mut self, ports: impl Iterator<Item = &'a Port>, engine: &Engine) {
        if self.named {
            return;
        }
        let ours = engine.ports();
        for port in ports {
            match obstacle(port, &ours) {
                None => {
                    self.ports.push(Entry { name: port.name.clone(), ifindex: Some(port.ifindex), wire: None });
                }
                Some(why) => tracing::info!("left out: {}: {why}", port.name),
            }
        }
    }

    /// Without names: leaves out a port that cannot be served; None if it must be served, or is unknown.
    pub fn drop_port(&mut self, ifindex: u32, why: &dyn std::error::Error) -> Option<u32> {
        let place = self.ports.iter().position(|entry| !self.named && entry.ifindex == Some(ifindex))?;
        tracing::info!("left out: {why}");
        self.ports.remove(place).ifindex
    }

    /// As `drop_port`, for the port that the engine could not serve.
    pub fn drop_refused(&mut self, error: &Error) -> Option<u32> {
        let (Error::NoNativeXdp { port, .. } | Error::Refused { port, .. } | Error::OtherProgram { port, .. }) = error
        else {
            return None;
        };
        let ifindex = self.ports.iter().find(|entry| entry.name == *port)?.ifindex?;
        self.drop_port(ifindex, error)
    }

    /// An interface is described. True if it is one to serve that was not there before.
    pub fn appears(&mut self, port: &Port) -> bool {
        let known = self.ports.iter().any(|entry| entry.ifindex == Some(port.ifindex));
        let absent =
            |entry: &&mut Entry| entry.ifindex.is_none() && entry.name == port.name && unservable(port.kind).is_none();
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

/// Why an interface that nobody named is not served.
fn obstacle(port: &Port, ours: &[u32]) -> Option<String> {
    if let Some(why) = unservable(port.kind) {
        return Some(why.into());
    }
    if port.master != 0 {
        return Some("enslaved".into());
    }
    if ours.contains(&port.ifindex) {
        return None;
    }
    match Interface::query(port.ifindex) {
        Ok(Interface { xdp: Some(other), .. }) => {
            Some(format!("it carries the XDP program {} (id {}, {} mode)", other.name, other.id, other.mode))
        }
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    }
}

/// Why no interface of a kind can have a program of its own: it is stacked on others, or none for packets at all.
pub fn unservable(kind: PortKind) -> Option<&'static str> {
    match kind {
        PortKind::Vlan { .. } => Some("a VLAN sub-interface is served with the interface underneath it"),
        PortKind::Tunnel(_) => Some("a tunnel is served with the interfaces that its packets come in by"),
        PortKind::Loopback => Some("what comes in by it is this host's own"),
        PortKind::Other => Some("it has no driver of its own that receives packets"),
        PortKind::Ethernet | PortKind::Virtual => None,
    }
}
