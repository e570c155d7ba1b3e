//! FPC, fast path control: what the cache manager (CM) tells the fast path manager (FPM), as typed messages.
//!
//! In one process the messages travel as they are; between processes `codec` frames them.

pub mod codec;
pub mod connection;
pub mod message;
pub mod stream;
pub mod tls;

pub use connection::{Connection, ConnectionError, Receiver, Sender};
pub use message::*;
