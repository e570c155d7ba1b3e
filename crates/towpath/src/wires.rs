//! Wires of ports that are no interfaces' own, as the command line names them.

use crate::keeper::Keeper;
use anyhow::{Context, Result, bail};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use towpath_tables::record::SOCKET_FRAME;
use towpath_user::af_packet::PacketPort;
use towpath_user::pcap::PcapPort;
use towpath_user::tap::{Tap, TapPort};
use towpath_user::twin::Twinned;
use towpath_user::{Device, PortDriver};

/// A port, as NAME or NAME=WIRE.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortArgument {
    /// The interface with the port's settings in Linux
    pub name: String,
    /// None: the interface's own
    pub wire: Option<Wire>,
}

/// By what the frames of a port come and go. The port's interface in Linux is a TAP then, the wire's twin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wire {
    /// An interface of this name, by packet sockets
    Packet(String),
    /// A TAP of this name
    Tap(String),
    /// A device of DPDK's, named as for its options -a and --vdev
    Dpdk(String),
    /// Files: frames arrive from the first, leave into the second
    Pcap(Option<PathBuf>, Option<PathBuf>),
}

/// What moves frames, and what else the device can be asked.
type Parts = (Box<dyn PortDriver>, Option<Arc<dyn Device>>);

#[cfg(feature = "dpdk")]
fn dpdk(device: &str) -> Result<Parts> {
    let wire = towpath_user::dpdk::DpdkPort::open(device)?;
    let device = wire.device();
    Ok((Box::new(wire), Some(Arc::new(device))))
}

#[cfg(not(feature = "dpdk"))]
fn dpdk(device: &str) -> Result<Parts> {
    bail!(
        "{device}: this towpath was built without DPDK; build it with: scripts/dpdk.sh && cargo build --release --features dpdk"
    )
}

/// A wire that no worker has yet.
pub struct Opened {
    /// Who sees to the rest; to be dropped before the driver. None: the wire has no settings
    pub keeper: Option<Keeper>,
    /// For the worker, with the twin
    pub driver: Box<dyn PortDriver>,
}

impl std::str::FromStr for PortArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, wire) = match text.split_once('=') {
            Some((name, wire)) => (name, Some(wire.parse()?)),
            None => (text, None),
        };
        if name.is_empty() {
            return Err("a port has the name of an interface".into());
        }
        Ok(Self { name: name.into(), wire })
    }
}

impl std::str::FromStr for Wire {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (driver, rest) = text.split_once(':').unwrap_or((text, ""));
        let named = |example: &str| match rest {
            "" => Err(format!("{driver} takes a name, as in {driver}:{example}")),
            name => Ok(name.to_owned()),
        };
        match driver {
            "af_packet" => named("eth0").map(Self::Packet),
            "tap" => named("tap1").map(Self::Tap),
            "dpdk" if ["net_af_packet", "net_pcap"].iter().any(|copies| rest.starts_with(copies)) => {
                Err("DPDK's driver gets copies of what Linux hears too; use af_packet:NAME or pcap:IN,OUT".into())
            }
            "dpdk" => named("0000:03:00.0").map(Self::Dpdk),
            "pcap" => {
                let (input, output) = rest.split_once(',').unwrap_or((rest, ""));
                let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
                match (path(input), path(output)) {
                    (None, None) => {
                        Err("pcap takes files, as in pcap:IN.pcap,OUT.pcap (either may be left out)".into())
                    }
                    (input, output) => Ok(Self::Pcap(input, output)),
                }
            }
            _ => Err(format!("no wire {driver:?}; there are af_packet:NAME, tap:NAME, pcap:IN,OUT and dpdk:DEVICE")),
        }
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = |path: &Option<PathBuf>| path.as_deref().unwrap_or(Path::new("")).display().to_string();
        match self {
            Self::Packet(name) => write!(f, "af_packet:{name}"),
            Self::Tap(name) => write!(f, "tap:{name}"),
            Self::Dpdk(device) => write!(f, "dpdk:{device}"),
            Self::Pcap(input, output) => write!(f, "pcap:{},{}", path(input), path(output)),
        }
    }
}

/// The largest MTU of a port with a wire: with two tags before it, such a packet fits a worker's buffer.
pub const LARGEST_MTU: usize = SOCKET_FRAME - 22;

/// The error for a port with a wire whose interface is not there.
pub fn without_twin(port: &str, error: anyhow::Error) -> anyhow::Error {
    error.context(format!(
        "{port} has no interface to stand for its wire in Linux; make it, and give it the port's addresses: \
         ip tuntap add dev {port} mode tap"
    ))
}

impl Wire {
    /// Opens it, and the TAP of this name and index that stands for it in Linux.
    pub fn open(&self, port: &str, ifindex: u32) -> Result<Opened> {
        if matches!(self, Self::Tap(name) | Self::Packet(name) if name == port) {
            bail!("{port} cannot be its own wire: it is a port's side in Linux, or its wire, but not both");
        }
        let twin = Tap::open(port).with_context(|| format!("{port} cannot stand for a wire in Linux"))?;
        let twin = Arc::new(twin);
        let (wire, device): Parts = match self {
            Self::Packet(name) => {
                let wire = PacketPort::open(name, twin.clone())?;
                let device = wire.device().context("cannot keep a socket")?;
                (Box::new(wire), Some(Arc::new(device)))
            }
            Self::Dpdk(device) => dpdk(device)?,
            Self::Tap(name) => (Box::new(TapPort(Tap::open(name)?)), None),
            Self::Pcap(input, output) => (Box::new(PcapPort::open(input.as_deref(), output.as_deref())?), None),
        };
        let keeper = device.map(|device| Keeper::start(port, ifindex, twin.clone(), device)).transpose()?;
        Ok(Opened { keeper, driver: Box::new(Twinned::new(wire, twin)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_named_with_their_wires() {
        let parse = |text: &str| text.parse::<PortArgument>().map(|port| (port.name, port.wire));
        let port = |name: &str, wire| Ok((name.to_string(), wire));
        assert_eq!(parse("eth0"), port("eth0", None));
        assert_eq!(parse("lan0=tap:tap1"), port("lan0", Some(Wire::Tap("tap1".into()))));
        assert_eq!(parse("lan0=dpdk:net_tap0,iface=a"), port("lan0", Some(Wire::Dpdk("net_tap0,iface=a".into()))));
        assert_eq!(parse("lan0=af_packet:eth0"), port("lan0", Some(Wire::Packet("eth0".into()))));
        let pcap =
            |input: Option<&str>, output: Option<&str>| Wire::Pcap(input.map(Into::into), output.map(Into::into));
        for (text, wire) in [
            ("pcap:a.pcap,b=c.pcap", pcap(Some("a.pcap"), Some("b=c.pcap"))),
            ("pcap:a.pcap", pcap(Some("a.pcap"), None)),
            ("pcap:,b.pcap", pcap(None, Some("b.pcap"))),
        ] {
            assert_eq!(parse(&format!("lan0={text}")), port("lan0", Some(wire.clone())));
            assert_eq!(wire.to_string().parse(), Ok(wire));
        }
        for wrong in [
            "",
            "=tap:tap1",
            "lan0=",
            "lan0=tap",
            "lan0=tap:",
            "lan0=pcap",
            "lan0=pcap:,",
            "lan0=ring:0",
            "lan0=dpdk:",
            "lan0=dpdk:net_af_packet0,iface=a",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
