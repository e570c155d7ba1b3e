//! The user engine: the packet path of crate `pipeline` on cores of its own in user space.
//!
//! A [`Worker`] runs every frame to completion, a batch at a time, over the shared tables; it alone owns its ports'
//! queues ([`PortDriver`]), its buffers ([`Pool`]) and its line of the statistics. [`Engine`] starts workers on pinned
//! cores, gives them ports and tables, and waits for them when the tables' writer wants memory back.
//!
//! What is not forwarded goes to Linux as it arrived ([`Linux`]), received by the interface that it came in by.
//!
//! Ports' drivers: [`af_xdp`] on interfaces of Linux's; [`af_packet`], [`tap`], [`pcap`] and [`memory`] as wires of their own, which
//! [`twin`] joins with an interface in Linux.

pub mod af_packet;
pub mod af_xdp;
mod bell;
mod blocks;
mod deaf;
mod device;
#[cfg(feature = "dpdk")]
pub mod dpdk;
mod driver;
mod engine;
mod exchange;
mod mapping;
pub mod memory;
pub mod pcap;
mod pool;
mod ring;
pub mod tap;
pub mod twin;
mod vnet;
mod worker;

pub use device::Device;
pub use driver::{BATCH, Linux, Lookout, Passed, PortDriver};
pub use engine::{Core, Engine, Error, Grace, check_cores, usable_cores};
pub use pool::{Area, Buffer, HEADROOM, Pool};
pub use vnet::Vnet;
pub use worker::{Port, Reading, TableSource, Worker};
