//! Towpath's shared tables: plain records in fixed arrays, their look-ups, and the single writer that publishes
//! changes so that readers (the XDP program, the user engine) never see a torn or missing entry.
//!
//! Without the feature `std` only what readers need is built, for the BPF target.
#![cfg_attr(not(any(test, feature = "std")), no_std)]

pub mod filter;
pub mod lpm;
pub mod order;
pub mod reason;
pub mod record;
pub mod word;

pub use reason::{REASONS, Reason};
