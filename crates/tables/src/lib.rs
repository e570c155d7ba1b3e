//! Towpath's shared tables: plain records in fixed arrays, their look-ups, and the single writer that publishes
//! changes so that readers (the XDP program, the user engine) never see a torn or missing entry.
//!
//! Without the feature `std` only what readers need is built, for the BPF target.
#![cfg_attr(not(any(test, feature = "std")), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(feature = "std")]
pub mod adopt;
#[cfg(feature = "std")]
pub mod backing;
#[cfg(feature = "std")]
pub mod brake;
#[cfg(feature = "std")]
pub mod clock;
pub mod filter;
pub mod filtering;
#[cfg(feature = "std")]
pub mod filters;
pub mod flow;
#[cfg(feature = "std")]
pub mod flows;
#[cfg(feature = "std")]
pub mod grace;
pub mod layout;
pub mod lpm;
pub mod mapping;
#[cfg(feature = "std")]
pub mod mappings;
pub mod mark;
#[cfg(feature = "std")]
pub mod mix;
#[cfg(feature = "std")]
pub mod nexthop;
pub mod opaque;
pub mod order;
pub mod policy;
#[cfg(feature = "std")]
pub mod pool;
pub mod reason;
pub mod record;
#[cfg(feature = "std")]
pub mod rib;
#[cfg(feature = "std")]
pub mod sources;
#[cfg(feature = "std")]
pub mod store;
pub mod trace;
#[cfg(feature = "std")]
pub mod tunnel;
pub mod word;
#[cfg(feature = "std")]
pub mod writer;

pub use flow::{Connection, Tuple};
pub use opaque::opaque;
pub use policy::{Obstacle, POLICY_FLOWS};
pub use reason::{REASONS, Reason};
