//! What is looked at. One list, from which names and texts follow.

use crate::report::{Finding, State};

macro_rules! checks {
    ($($variant:ident, $name:literal, $effect:literal;)*) => {
        /// Something that the fast path depends on.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Check {
            $(#[doc = $effect] $variant,)*
        }

        impl Check {
            /// Short name, as in JSON.
            const fn name(self) -> &'static str {
                match self { $(Check::$variant => $name,)* }
            }

            /// What it gains or costs.
            const fn effect(self) -> &'static str {
                match self { $(Check::$variant => $effect,)* }
            }
        }
    };
}

checks! {
    Kernel, "kernel", "the fast path is programs in this kernel";
    Feature, "kernel-feature", "without it `towpath up` does not start";
    Capability, "capability", "without it `towpath up` does not start";
    Bpffs, "bpffs", "programs and tables are kept there, so that packets keep flowing when the daemon dies; `towpath up` mounts it if it may (CAP_SYS_ADMIN)";
    Jit, "jit", "a program that is not compiled for the processor costs each packet far more";
    Btf, "btf", "by the kernel's own types the program sees checksums and VLAN tags that travel beside a veth's frames";
    XdpFeatures, "xdp-features", "kernels that tell what each device can do with XDP also redirect frames of several buffers";
    Conntrack, "conntrack", "connections that Linux has accepted go fast where rules are in the way; they come from connection tracking";
    Flowtable, "flowtable", "--flows flowtable takes the connections that a rule puts into a flowtable; --flows established does without";
    Filters, "filters", "what a filter of `towpath filter` matches is dropped, or passed on, before anything else; all packets pay for the look";
    Shadow, "shadow", "an instance in the shadow (--shadow) only counts what would be forwarded";
    Ports, "ports", "packets are forwarded between ports";
    PortKind, "port-kind", "a program runs only where a driver hands packets over";
    PortState, "port-state", "packets pass only by a port that is up, has a carrier and is its own master";
    PortSetting, "port-setting", "a setting of the interface that the fast path does not repeat leaves its traffic to Linux";
    Forwarding, "forwarding", "the fast path forwards where Linux does";
    NativeXdp, "native-xdp", "in the driver a packet is forwarded before Linux spends anything on it; in XDP's generic mode only after most of it is spent";
    Transmit, "transmit", "packets that leave by the port go straight to its driver; where it does not take them they go to Linux";
    Queues, "queues", "each receive queue is worked on by one core at a time";
    Mtu, "mtu", "frames longer than a buffer take a driver and a kernel that hand them over in several";
    Lro, "lro", "packets that the device has merged cannot be forwarded one by one; many drivers refuse XDP programs meanwhile";
    Aggregation, "tcp-aggregation", "Linux forwards TCP that is merged into packets of up to 64 KiB as one; the fast path takes each packet by itself, so it gains with many packets and connections, and may lose to Linux with a few TCP streams of large packets";
    Attaching, "attaching", "a change that comes with the program";
    Policy, "policy", "a setting of Linux that the fast path does not repeat leaves the traffic that it touches to Linux";
    Netfilter, "netfilter", "rules on the packets' way are Linux's to apply; connections that it has accepted may pass them fast";
    Cores, "cores", "each worker of --engine user takes a core for itself";
    IsolatedCores, "isolated-cores", "on a core that Linux schedules nothing else on, a worker of --engine user is not interrupted";
    HugePages, "huge-pages", "buffers and tables of --engine user in huge pages cost fewer misses of the TLB";
    RawSockets, "raw-sockets", "workers of --engine user take packets by AF_XDP or packet sockets, and tell Linux of special exceptions by one";
    LockedMemory, "locked-memory", "AF_XDP's buffers are locked memory";
    ZeroCopy, "zero-copy", "with it --engine user sends and receives by AF_XDP without copying; without, each frame is copied";
}

/// A finding about something.
pub fn finding(check: Check, about: &str, state: State, found: impl Into<String>) -> Finding {
    let (check, effect) = (check.name().into(), check.effect().into());
    Finding { check, about: about.into(), state, found: found.into(), effect, remedy: None }
}

impl Finding {
    /// The same, with the command that helps.
    pub fn with(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}
