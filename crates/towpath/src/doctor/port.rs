//! One port: its driver, its device's settings, and its state in Linux.

use super::checks::{Check, finding};
use crate::ports::unservable;
use crate::report::{Finding, State};
use towpath_engine::{Attached, Channels, Interface, LOCAL_TCP, Mode, PEER_GRO, TransmitSupport, XdpFeatures};
use towpath_fpc::Port;

/// What fits one buffer at least: a page without the headroom of XDP (256 bytes), `struct skb_shared_info` (320) and the
/// Ethernet header.
const ONE_BUFFER: u32 = 4096 - 256 - 320 - 14;

/// Everything about a port.
pub fn look(port: &Port) -> Vec<Finding> {
    let of = Of { port };
    if let Some(why) = unservable(port.kind) {
        return vec![of.finding(Check::PortKind, State::Stops, why)];
    }
    let mut findings = vec![of.state(), of.forwarding()];
    findings.extend(port.unsupported.as_ref().map(|what| of.finding(Check::PortSetting, State::Stops, what)));
    match Interface::query(port.ifindex) {
        Ok(interface) => of.device(&interface, &mut findings),
        Err(error) => findings.push(of.finding(Check::NativeXdp, State::Unknown, error.to_string())),
    }
    findings
}

struct Of<'a> {
    port: &'a Port,
}

impl Of<'_> {
    fn finding(&self, check: Check, state: State, found: impl Into<String>) -> Finding {
        finding(check, &self.port.name, state, found)
    }

    fn state(&self) -> Finding {
        let (port, name) = (self.port, &self.port.name);
        let stops = |found| self.finding(Check::PortState, State::Stops, found);
        if !port.up {
            stops("down").with(format!("ip link set {name} up"))
        } else if port.master != 0 {
            stops("enslaved").with(format!("ip link set {name} nomaster"))
        } else if !port.carrier {
            stops("without carrier").with(format!("ip link show {name}"))
        } else {
            self.finding(Check::PortState, State::Well, "up")
        }
    }

    fn forwarding(&self) -> Finding {
        let found = match self.port.family.map(|family| family.forwarding) {
            [true, true] => "IPv4 and IPv6",
            [true, false] => "IPv4 (IPv6 is not forwarded)",
            [false, true] => "IPv6 (IPv4 is not forwarded)",
            [false, false] => {
                // With slashes, since names of interfaces may have dots.
                return self
                    .finding(Check::Forwarding, State::Stops, "Linux forwards nothing that comes in here")
                    .with(format!("sysctl -w net/ipv4/conf/{}/forwarding=1", self.port.name));
            }
        };
        self.finding(Check::Forwarding, State::Well, found)
    }

    fn device(&self, interface: &Interface, findings: &mut Vec<Finding>) {
        let features = towpath_engine::xdp_features(interface.index);
        let known = features.as_ref().ok().copied().flatten();
        findings.push(match &interface.xdp {
            Some(attached) => self.attached(attached),
            None => self.native(interface, features),
        });
        findings.push(self.transmit(interface));
        findings.extend(self.queues(interface));
        findings.push(self.mtu(known));
        findings.extend(self.lro(interface));
        findings.push(self.aggregation(interface));
        match &interface.xdp {
            None => findings.extend(self.attaching(interface)),
            Some(attached) if attached.mode == "native" && interface.is_veth() => {
                findings.push(self.finding(Check::Attaching, State::Slower, LOCAL_TCP));
            }
            Some(_) => {}
        }
        findings.extend(known.map(|features| self.zero_copy(features)));
    }

    fn attached(&self, attached: &Attached) -> Finding {
        let Attached { id, name, mode } = attached;
        let found = format!("carries the XDP program {name} (id {id}, {mode} mode)");
        let state = match (attached.is_ours(), *mode) {
            (false, _) => {
                let remedy = format!("bpftool net show dev {}", self.port.name);
                return self.finding(Check::NativeXdp, State::Stops, found).with(remedy);
            }
            (true, "generic") => State::Slower,
            (true, _) => State::Well,
        };
        self.finding(Check::NativeXdp, state, found)
    }

    fn native(&self, interface: &Interface, features: towpath_engine::Result<Option<XdpFeatures>>) -> Finding {
        let driver = &interface.driver;
        match features {
            Ok(Some(features)) if features.contains(XdpFeatures::BASIC) => {
                self.finding(Check::NativeXdp, State::Well, format!("driver {driver} has it"))
            }
            Ok(Some(_)) => {
                // drivers/net/veth.c, `veth_set_xdp_features`
                let why = if interface.is_veth() {
                    ": its peer has more transmit queues than it has receive queues, or it has no peer (see ethtool -L)"
                } else {
                    ""
                };
                self.finding(Check::NativeXdp, State::Stops, format!("driver {driver} has none{why}"))
                    .with(format!("towpath up --generic {}", self.port.name))
            }
            Ok(None) => {
                let found = format!("driver {driver}; this kernel does not tell, `towpath up` tries");
                self.finding(Check::NativeXdp, State::Unknown, found)
            }
            Err(error) => self.finding(Check::NativeXdp, State::Unknown, error.to_string()),
        }
    }

    fn transmit(&self, interface: &Interface) -> Finding {
        let finding = |state, found: String| self.finding(Check::Transmit, state, found);
        match towpath_engine::can_transmit(interface.index) {
            Ok(TransmitSupport::Full) => finding(State::Well, "frames of any kind".into()),
            Ok(TransmitSupport::SingleBuffer) => {
                finding(State::Slower, "frames in one buffer; longer ones go to Linux".into())
            }
            Ok(TransmitSupport::None(why)) if interface.is_veth() => finding(State::Stops, why).with(PEER_GRO),
            Ok(TransmitSupport::None(why)) => finding(State::Stops, why),
            Err(error) => finding(State::Unknown, error.to_string()),
        }
    }

    /// None if the driver does not tell of its queues.
    fn queues(&self, interface: &Interface) -> Option<Finding> {
        let Channels { now, most } = interface.ethtool.channels().ok()?;
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let (receive, limit) = (now.receiving + now.combined, most.receiving + most.combined);
        let found = format!("{receive} of at most {limit} receive, for {cores} cores");
        let wanted = cores.min(limit);
        if receive >= wanted {
            return Some(self.finding(Check::Queues, State::Well, found));
        }
        let kind = if most.combined > 0 { "combined" } else { "rx" };
        let remedy = format!("ethtool -L {} {kind} {wanted}", self.port.name);
        Some(self.finding(Check::Queues, State::Slower, found).with(remedy))
    }

    fn mtu(&self, features: Option<XdpFeatures>) -> Finding {
        let mtu = self.port.mtu;
        let several = features.is_none_or(|features| features.contains(XdpFeatures::RX_SG));
        if mtu <= ONE_BUFFER || several {
            return self.finding(Check::Mtu, State::Well, mtu.to_string());
        }
        self.finding(Check::Mtu, State::Stops, format!("{mtu}, and the driver hands over one buffer"))
            .with(format!("ip link set {} mtu {ONE_BUFFER}", self.port.name))
    }

    /// None if it is off.
    fn lro(&self, interface: &Interface) -> Option<Finding> {
        let on = interface.ethtool.feature("rx-lro").unwrap_or(false);
        on.then(|| {
            let remedy = format!("ethtool -K {} lro off", self.port.name);
            self.finding(Check::Lro, State::Slower, "the device merges packets (LRO)").with(remedy)
        })
    }

    fn aggregation(&self, interface: &Interface) -> Finding {
        let gro = interface.ethtool.gro().unwrap_or(false);
        let hardware = interface.ethtool.feature("rx-gro-hw").unwrap_or(false);
        let found = match (interface.is_veth(), gro, hardware) {
            (_, _, true) => "the device merges TCP for Linux (rx-gro-hw)",
            (true, true, _) => "a veth with GRO: Linux gets TCP merged, at little cost",
            _ => return self.finding(Check::Aggregation, State::Well, "no merging by the device"),
        };
        self.finding(Check::Aggregation, State::Slower, found)
    }

    fn attaching(&self, interface: &Interface) -> Vec<Finding> {
        match towpath_engine::announce(interface, Mode::Native) {
            Ok(notices) => {
                let finding = |text: String| self.finding(Check::Attaching, State::Slower, text);
                notices.into_iter().map(|notice| finding(notice.text)).collect()
            }
            Err(error) => vec![self.finding(Check::Attaching, State::Unknown, error.to_string())],
        }
    }

    fn zero_copy(&self, features: XdpFeatures) -> Finding {
        match features.contains(XdpFeatures::ZEROCOPY) {
            true => self.finding(Check::ZeroCopy, State::Well, "the driver has it"),
            false => self.finding(Check::ZeroCopy, State::Slower, "the driver has none"),
        }
    }
}
