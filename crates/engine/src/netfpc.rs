//! What the manager asks an engine to do about its ports.

/// One request.
///
/// The devices stay Linux's: it alone sets MTU, filters, promiscuous mode and whether they are up. What the XDP engine
/// does is to keep its programs and its map of devices in step with that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Serve the interface: attach the program, and transmit for this slot of the port table.
    AddPort {
        /// Interface index
        ifindex: u32,
        /// Slot in the port table
        slot: u32,
    },
    /// Serve it no longer: detach.
    RemovePort {
        /// Interface index
        ifindex: u32,
    },
    /// The interface came up or went down. While it is down nothing is redirected to it: a packet that a table still
    /// sends there goes to Linux, which knows what to do, instead of being dropped by the kernel's redirect.
    PortState {
        /// Interface index
        ifindex: u32,
        /// Up
        up: bool,
    },
    /// Linux changed the MTU. The program takes frames of several buffers and the tables say how much a way out takes,
    /// so neither changes; but a driver makes its rings anew for another MTU, and what it then says about XDP may be
    /// another thing. The engine makes sure that the program still runs there, and attaches it again if not. If the
    /// driver refuses it with this MTU that is an error, Linux forwards what comes in, and the next change of the MTU
    /// tries again. Whether the port can transmit is to be asked again (`can_transmit`).
    Mtu {
        /// Interface index
        ifindex: u32,
        /// Bytes of IP
        mtu: u32,
    },
    /// Linux switched promiscuous mode. XDP sees what the device's filter lets through, which is what Linux sees, and
    /// the program compares MAC addresses itself, so packets go the same ways; the port is known to see the frames of
    /// others (`PortFacts`).
    Promiscuous {
        /// Interface index
        ifindex: u32,
        /// On
        on: bool,
    },
}

/// How the engine serves a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortFacts {
    /// How the driver runs the program: native, generic; None if it does not
    pub mode: Option<&'static str>,
    /// Frames may be redirected to it
    pub up: bool,
    /// It receives the frames of others too
    pub promiscuous: bool,
}
