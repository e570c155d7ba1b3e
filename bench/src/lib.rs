//! Traffic at the rate of a driver, measurements and what is needed for both: the benchmarks' parts, which the demo uses
//! too.

pub mod beside;
pub mod bpf;
pub mod capture;
pub mod connections;
pub mod cost;
pub mod dpdk;
pub mod ethtool;
pub mod exceptions;
mod feeder;
pub mod filter;
pub mod findings;
pub mod groups;
pub mod instructions;
pub mod latency;
pub mod left;
pub mod memory;
pub mod nat;
pub mod path;
pub mod routes;
pub mod scrape;
pub mod sockets;
pub mod source;
pub mod stalls;
pub mod stats;
pub mod sync;
pub mod tcp;
pub mod user;
