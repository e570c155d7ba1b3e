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
    /// The MTU changed. The program takes frames of several buffers, so there is nothing to reload or to change.
    Mtu {
        /// Interface index
        ifindex: u32,
        /// Bytes of IP
        mtu: u32,
    },
    /// Linux switched promiscuous mode. XDP sees what the device's filter lets through, which is what Linux sees;
    /// the program itself compares MAC addresses.
    Promiscuous {
        /// Interface index
        ifindex: u32,
        /// On
        on: bool,
    },
}
