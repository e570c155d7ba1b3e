//! The tc programs on a port with mappings, which translate what Linux receives and transmits by it.

use crate::maps::FAR_MAPS;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_INVALIDATE_HASH, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT,
    TC_ACT_UNSPEC,
};
use aya_ebpf::helpers::generated::{bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes};
use core::mem::MaybeUninit;
use towpath_pipeline::Tables;
use towpath_pipeline::nat::{Fate, Held, Passing, translate};
use towpath_tables::mapping::Way;
use towpath_wire::ethernet::{Ethernet, Tag};
use towpath_wire::{Change, View};

#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier/out")]
fn towpath_nat_out(ctx: *mut __sk_buff) -> i32 {
    pass(ctx, Way::Out)
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier/in")]
fn towpath_nat_in(ctx: *mut __sk_buff) -> i32 {
    pass(ctx, Way::In)
}

#[inline(always)]
fn pass(ctx: *mut __sk_buff, way: Way) -> i32 {
    match translate(&mut Skb(ctx), &FAR_MAPS, way) {
        Fate::Pass => TC_ACT_UNSPEC,
        Fate::Drop => TC_ACT_SHOT,
    }
}

struct Skb(*mut __sk_buff);

/// Where the IP header is: on both hooks the packet begins with an Ethernet header, and tags are beside it.
const NETWORK: usize = size_of::<Ethernet>();

impl Skb {
    /// Writes bytes there, with these flags of `bpf_skb_store_bytes`; the packet's hash is no longer right then.
    #[inline(always)]
    fn write<T: View>(&mut self, offset: usize, bytes: &T, flags: u32) -> bool {
        let (place, len) = ((&raw const *bytes).cast(), size_of::<T>() as u32);
        let flags = (flags | BPF_F_INVALIDATE_HASH).into();
        // SAFETY: the context is the kernel's, and there are so many bytes.
        unsafe { bpf_skb_store_bytes(self.0.cast(), (NETWORK + offset) as u32, place, len, flags) == 0 }
    }
}

impl Passing for Skb {
    #[inline(always)]
    fn load<T: View>(&self, offset: usize) -> Option<Held<T>> {
        let mut bytes = MaybeUninit::<Held<T>>::uninit();
        let (place, len) = (bytes.as_mut_ptr().cast(), size_of::<T>() as u32);
        // SAFETY: the context is the kernel's, and the bytes are as many as there is room for.
        let read = unsafe { bpf_skb_load_bytes(self.0.cast(), (NETWORK + offset) as u32, place, len) };
        // SAFETY: all of the view was written, and any bytes make one.
        (read == 0).then(|| unsafe { bytes.assume_init() })
    }

    /// A checksum of the whole packet that the driver gave follows.
    #[inline(always)]
    fn store<T: View>(&mut self, offset: usize, bytes: &T) -> bool {
        self.write(offset, bytes, BPF_F_RECOMPUTE_CSUM)
    }

    #[inline(always)]
    fn cover(&mut self, offset: usize, change: Change, zero_is_none: bool) -> bool {
        let zero = if zero_is_none { BPF_F_MARK_MANGLED_0 } else { 0 };
        let flags = u64::from(BPF_F_PSEUDO_HDR | zero);
        // SAFETY: the context is the kernel's. Without a size, the last but one argument is a sum's change.
        unsafe { bpf_l4_csum_replace(self.0.cast(), (NETWORK + offset) as u32, 0, change.fold().into(), flags) == 0 }
    }

    /// A checksum of the whole packet that the driver gave stays, unless the packet has none of its own.
    #[inline(always)]
    fn set_port(&mut self, offset: usize, port: u16, checksum: usize, zero_is_none: bool) -> bool {
        type Bytes = [u8; 2];
        let new = Held(port.to_ne_bytes());
        let (Some(old), Some(sum)) = (self.load::<Bytes>(offset), self.load::<Bytes>(checksum)) else { return false };
        if zero_is_none && u16::from_ne_bytes(sum.0) == 0 {
            return self.store(offset, &new.0);
        }
        let zero = if zero_is_none { BPF_F_MARK_MANGLED_0 } else { 0 };
        let (from, flags) = (u16::from_ne_bytes(old.0), zero | size_of::<Bytes>() as u32);
        // SAFETY: the context is the kernel's.
        let covered = unsafe {
            bpf_l4_csum_replace(self.0.cast(), (NETWORK + checksum) as u32, from.into(), port.into(), flags.into())
        };
        covered == 0 && self.write(offset, &new.0, 0)
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        // SAFETY: the context is the kernel's.
        u16::from_be(unsafe { (*self.0).protocol } as u16)
    }

    /// VLAN 0 is no VLAN but a priority.
    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as for `ethertype`.
        let (present, control) = unsafe { ((*self.0).vlan_present, (*self.0).vlan_tci) };
        present != 0 && control as u16 & Tag::ID != 0
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: as for `ethertype`.
        unsafe { (*self.0).ifindex }
    }

    #[inline(always)]
    fn forget(number: u32) -> u32 {
        number ^ FAR_MAPS.config().map_or(0, |config| config.reserved[0].load())
    }

    #[inline(always)]
    fn segments(&self) -> u64 {
        // SAFETY: as for `ethertype`.
        u64::from(unsafe { (*self.0).gso_segs }).max(1)
    }
}
