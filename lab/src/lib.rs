//! Network-namespace topologies as code, for tests, the demo and the benchmarks.
//!
//! A [`Lab`] makes [`Node`]s (network namespaces) and veth links between them; commands, daemons and closures run
//! inside a node; packet sockets send and receive raw frames on its interfaces. Everything a lab made goes when it is
//! dropped, also by a panic; what a killed process left behind is removed when the next lab starts.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! // host (192.0.2.2) eth0 ---- eth0 (192.0.2.1) router
//! let lab = towpath_lab::Lab::new("example")?;
//! let (host, router) = (lab.node("host")?, lab.node("router")?);
//! lab.link((&host, "eth0"), (&router, "eth0"))?;
//! host.run(["ip", "addr", "add", "192.0.2.2/24", "dev", "eth0"])?;
//! router.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "eth0"])?;
//! host.run(["ping", "-c1", "192.0.2.1"])?;
//! # Ok(())
//! # }
//! ```
//!
//! All of it needs root. Addresses in labs come from RFC 5737, RFC 3849 and RFC 2544 (198.18.0.0/15).

mod certificates;
mod frr;
mod leftovers;
mod node;
pub mod packet;
mod process;
mod relay;
mod routes;
mod topology;
mod towpath;

pub use certificates::{Authority, Files, Validity};
pub use frr::Frr;
pub use node::Node;
pub use packet::{Frame, PacketSocket};
pub use process::Process;
pub use relay::relay;
pub use routes::RouteSocket;
pub use topology::Lab;
pub use towpath::{Towpath, towpath_binary};

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// So long, or as many times longer as TOWPATH_PATIENCE says: a virtual machine that translates instructions is slow, and how
/// slow is no subject of a test.
pub fn patience(limit: Duration) -> Duration {
    let times =
        std::env::var("TOWPATH_PATIENCE").ok().map(|times| times.parse().expect("TOWPATH_PATIENCE is a number"));
    limit * times.unwrap_or(1u32)
}

/// Asks `condition` until it gives a value, which is returned; an error naming `what` once `limit` has passed (see `patience`).
pub fn wait_for<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let limit = patience(limit);
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        let asked = Instant::now();
        if let Some(value) = condition() {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("waited {limit:?} in vain for: {what}");
        }
        // Where asking takes long (a process in a virtual machine), what is waited for must get on beside it.
        std::thread::sleep(pause.max(asked.elapsed()));
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Whether the kernel can do what `probe` tries. If it cannot, the calling test is to return at once: this says so on
/// stderr, or panics where skipping is not allowed (TOWPATH_NO_SKIP, set in the test virtual machine).
pub fn supported(what: &str, probe: impl FnOnce() -> Result<()>) -> bool {
    let Err(error) = probe() else { return true };
    assert!(std::env::var_os("TOWPATH_NO_SKIP").is_none(), "{what} is required here: {error:#}");
    eprintln!("SKIP: this kernel has no {what}: {error:#}");
    false
}

/// Whether the kernel has VRFs.
pub fn vrfs_supported() -> bool {
    supported("VRFs", || Lab::new("probe")?.node("a")?.sh("ip link add probe type vrf table 7").map(drop))
}
