//! What stands in an XDP program for what only its loader knows about the running kernel, until the loader puts that
//! there. It is how a program sees what travels beside a frame of a veth: the driver keeps the packet's `sk_buff`
//! behind the `xdp_buff` (drivers/net/veth.c, `struct veth_xdp_buff`, since Linux 6.3), and kernel functions give
//! access to both (kernel/bpf/helpers.c, `bpf_cast_to_kern_ctx` and `bpf_rdonly_cast`, since 6.2).

use crate::record::MAGIC;

/// A kernel function that the program calls. The mark is the number of a helper function that does not exist.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Function {
    /// `void *bpf_cast_to_kern_ctx(void *ctx)`: the `xdp_buff` of a context
    CastToKernCtx = 0,
    /// `void *bpf_rdonly_cast(const void *object, u32 type)`
    RdonlyCast = 1,
}

/// A number that the program asks for; all are 0 if the kernel does not let it look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Number {
    /// Size of `struct xdp_buff`; the pointer to the `sk_buff` lies right behind it
    XdpBuff = 0,
    /// BTF identifier of `struct sk_buff_list`, which begins with such a pointer
    SkbList = 1,
    /// Offset in `struct sk_buff` of the byte that holds `ip_summed`
    Summed = 2,
    /// That byte's bits that are all set for CHECKSUM_PARTIAL
    SummedMask = 3,
    /// Offset in `struct sk_buff` of `vlan_all`: the tag's protocol (network byte order), then its control information
    /// (the machine's); 0 if there is no tag
    Vlan = 4,
}

/// As `Function::mark`, for a function of the program itself that its loader makes: `u32 captured(struct xdp_md *)`, not 0
/// if a capture is to see the frame.
pub const CAPTURED: u32 = MAGIC & 0x7fff_ff00 | 0xff;

/// As `CAPTURED`, for the filter of the trace with this number (below `trace::TRACES`).
pub const fn traced(trace: u32) -> u32 {
    MAGIC & 0x7fff_ff00 | 0xe0 | trace
}

/// As `Number::mark`, for how long the program goes on when nobody looks at Linux any more (`Config::heartbeat`): nanoseconds,
/// or 0 if for good.
pub const PATIENCE: u64 = (MAGIC as u64) << 32 | 1 << 17;

/// As `Number::mark`, for a number that is not 0 if nothing is to be forwarded (`towpath up --shadow`).
pub const SHADOW: u64 = (MAGIC as u64) << 32 | 1 << 18;

impl Function {
    /// Every function.
    pub const ALL: [Self; 2] = [Self::CastToKernCtx, Self::RdonlyCast];

    /// Its name in the kernel.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CastToKernCtx => "bpf_cast_to_kern_ctx",
            Self::RdonlyCast => "bpf_rdonly_cast",
        }
    }

    /// What stands for its number.
    pub const fn mark(self) -> u32 {
        MAGIC & 0x7fff_ff00 | self as u32
    }

    /// The function that this stands for.
    pub fn from_mark(mark: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|function| function.mark() == mark)
    }
}

impl Number {
    /// Every number.
    pub const ALL: [Self; 5] = [Self::XdpBuff, Self::SkbList, Self::Summed, Self::SummedMask, Self::Vlan];

    /// What stands for it: 64 bits, unlike any `TableId::length_mark`.
    pub const fn mark(self) -> u64 {
        (MAGIC as u64) << 32 | 1 << 16 | self as u64
    }

    /// The number that this stands for.
    pub fn from_mark(mark: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|number| number.mark() == mark)
    }
}
