//! Header views and checksums: what Towpath reads and writes in frames, `no_std`.
//!
//! The contract: a view is a `repr(C)` struct of unaligned bytes, laid over a place in a frame that was checked to be
//! long enough once, when the view was taken. After that no accessor can fail or panic, whatever the bytes are; what
//! they mean is for the caller to judge. Multi-byte fields are big-endian types, or words "as on the wire" (the
//! machine's byte order over the wire's bytes) where only sums and comparisons are wanted.
#![no_std]

pub mod checksum;
pub mod ethernet;
pub mod fptun;
pub mod gre;
pub mod ipv4;
pub mod ipv6;
pub mod link;
pub mod transport;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What may be laid over bytes of a frame: any bytes are valid, no alignment, no padding.
pub trait View: FromBytes + IntoBytes + Unaligned + Immutable + KnownLayout {}
impl<T: FromBytes + IntoBytes + Unaligned + Immutable + KnownLayout> View for T {}

/// Declares a view.
macro_rules! view {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Unaligned, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $ty,)* }
    };
}
pub(crate) use view;

pub use checksum::{Change, Sum};
