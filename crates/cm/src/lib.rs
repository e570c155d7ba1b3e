//! CM, the cache manager: reads Linux's state by netlink and other kernel interfaces and tells it to the fast path
//! manager as FPC messages. It decides nothing and keeps as little as it can.

pub mod error;
pub mod guard;
pub mod watch;

pub use error::CmError;
pub use watch::{PortIndex, Watcher};
