//! CM, the cache manager: reads Linux's state by netlink and other kernel interfaces and tells it to the fast path
//! manager as FPC messages. It decides nothing and keeps as little as it can.
//!
//! [`Cm`] is one thread: it subscribes to rtnetlink, dumps each class of objects as a snapshot, and passes on what
//! changes. Linux removes some objects without a word; the events that make it do so are known ([`manager`]), and the
//! class is then read again, as after an overrun of the socket. A snapshot never flushes: FPM marks and sweeps.
//! Policies come from [`Watcher`]s ([`guard`]).

pub mod audit;
pub mod conntrack;
pub mod decode;
mod dump;
mod epoll;
pub mod error;
pub mod guard;
pub mod manager;
mod netlink;
mod ports;
mod routes;
mod sink;
pub mod survey;
mod sysctl;
pub mod watch;
mod watched;

pub use conntrack::{FlowMode, FlowModeError};
pub use error::CmError;
pub use manager::{Cm, Options};
pub use sink::FpcSink;
pub use watch::{Finding, Moved, PortIndex, Watcher};
