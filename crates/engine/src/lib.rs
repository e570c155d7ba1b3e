//! The XDP engine's host side: loads and attaches the program, owns maps and pins, grows tables.
//!
//! `Site::prepare` checks what must hold and finds the instance's place in a bpffs. From it an `Engine` comes, with
//! new tables (`create`) or those a former process left (`left`, `adopt`). Everything an engine makes is pinned, so that
//! packets keep flowing when the process dies; only `Engine::teardown` and `Site::teardown` take it away.
//!
//! New and enlarged tables are pinned beside the old under names ending in `_new`; when every link runs the program
//! that uses them, they take the old names. `adopt` finishes or discards what a crash left in between.

mod attach;
mod beside;
mod bpffs;
mod engine;
mod error;
mod ethtool;
mod grace;
mod interface;
mod netfpc;
mod netlink;
mod probe;
mod program;
mod region;
mod require;
mod sys;
mod tc;
mod trace;
mod transmit;

pub use attach::{LOCAL_TCP, Mode, Notice, announce};
pub use bpffs::{is_mounted, netns_inode};
pub use engine::{Engine, Left, Options, PortRequest, Site, Tables};
pub use error::{Error, Result};
pub use ethtool::{Channels, Ethtool, Queues};
pub use grace::GraceMethod;
pub use interface::{Attached, Interface, queues};
pub use netfpc::{PortFacts, Request};
pub use program::ProgramFacts;
pub use region::{ConfigTable, possible_cpus};
pub use require::{Requirement, compiles, may_lock_memory, may_open_raw_sockets, release, requirements};
pub use trace::{Frames, Ring, Seen, Trace};
pub use transmit::{Changed, PEER_GRO, TransmitSupport, TransmitWatch, XdpFeatures, can_transmit, xdp_features};
