//! A lab: nodes and the links between them.

use crate::node::Node;
use crate::{leftovers, wait_for};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

/// A set of nodes, with names of its own, so that any number of labs may exist at once.
pub struct Lab {
    prefix: String,
    folder: PathBuf,
    nodes: Mutex<Vec<Node>>,
}

impl Lab {
    /// A lab without nodes; `name` (letters and digits) appears in the names of its namespaces.
    pub fn new(name: &str) -> Result<Lab> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        static LEFTOVERS: Once = Once::new();
        // SAFETY: geteuid only returns a number.
        anyhow::ensure!(unsafe { libc::geteuid() } == 0, "the lab needs root: it makes network namespaces");
        let mut removed = Ok(());
        LEFTOVERS.call_once(|| removed = leftovers::remove());
        removed?;
        let prefix = leftovers::prefix(NUMBER.fetch_add(1, Ordering::Relaxed), name);
        let folder = std::env::temp_dir().join(&prefix);
        std::fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Lab { prefix, folder, nodes: Mutex::default() })
    }

    /// A new network namespace with `lo` up, forwarding off, and without the delays of duplicate address detection.
    pub fn node(&self, name: &str) -> Result<Node> {
        let node = Node::new(&format!("{}-{name}", self.prefix), name, &self.folder)?;
        self.nodes.lock().unwrap_or_else(|e| e.into_inner()).push(node.clone());
        Ok(node)
    }

    /// Folder for files of this lab; removed with it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A veth pair, both ends up, with the offloads that a test wants (see the comments inside).
    pub fn link(&self, a: (&Node, &str), b: (&Node, &str)) -> Result<()> {
        let peer = ["type", "veth", "peer", "name", b.1, "netns", b.0.netns()];
        a.0.run(["ip", "link", "add", "name", a.1].iter().chain(&peer))?;
        for (node, port) in [a, b] {
            node.run(["ip", "link", "set", port, "up"])?;
        }
        for (node, port) in [a, b] {
            // gro on: frames redirected by XDP into one end arrive only where the other end polls (NAPI).
            // tx off: a sender would leave transport checksums partial, which no real link carries.
            // txvlan off, and the same for 802.1ad: tags would travel beside the frame, where an XDP program does not see
            // them.
            // Not before both are up: a veth that is down does not tell its peer (drivers/net/veth.c, 6.18), which then
            // does not count as able to transmit redirected frames.
            let settings = ["gro", "on", "tx", "off", "txvlan", "off", "tx-vlan-stag-hw-insert", "off"];
            node.run(["ethtool", "-K", port].iter().chain(&settings))?;
        }
        for (node, port) in [a, b] {
            let what = format!("{port} of node {} to be up", node.name());
            wait_for(Duration::from_secs(5), &what, || {
                let links = node.json(["ip", "-j", "link", "show", "dev", port]).ok()?;
                (links[0]["operstate"] == "UP").then_some(())
            })?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in self.nodes.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
            node.close();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_of(lab: &Lab) -> Vec<String> {
        let folder = std::fs::read_dir(leftovers::NETNS).into_iter().flatten().flatten();
        folder.filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(&lab.prefix)).collect()
    }

    #[test]
    fn nothing_is_left_of_a_lab() -> Result<()> {
        let lab = Lab::new("gone")?;
        let (a, b) = (lab.node("a")?, lab.node("b")?);
        lab.link((&a, "eth0"), (&b, "eth0"))?;
        let pid = a.spawn(["sleep", "1000"]).map(|p| {
            let pid = p.pid();
            std::mem::forget(p);
            pid
        })?;
        assert_eq!(names_of(&lab).len(), 2);
        let (prefix, folder) = (lab.prefix.clone(), lab.folder.clone());
        // Also if the test panics.
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _lab = lab;
            std::panic::resume_unwind(Box::new("on purpose"));
        }));
        assert!(panicked.is_err());
        assert!(!folder.exists());
        assert!(names_of(&Lab { prefix, folder, nodes: Mutex::default() }).is_empty());
        wait_for(Duration::from_secs(5), "the process to be gone", || {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            (state.is_empty() || state.contains(") Z ")).then_some(())
        })
    }

    #[test]
    fn a_failing_command_says_what_it_said() -> Result<()> {
        let lab = Lab::new("words")?;
        let node = lab.node("a")?;
        let error = format!("{:#}", node.run(["ip", "link", "show", "dev", "eth7"]).unwrap_err());
        assert!(error.contains("node a") && error.contains("ip link show dev eth7"), "{error}");
        assert!(error.contains("Device \"eth7\" does not exist"), "{error}");
        Ok(())
    }

    #[test]
    fn sysctls_are_the_nodes_own() -> Result<()> {
        let lab = Lab::new("sysctl")?;
        let (a, b) = (lab.node("a")?, lab.node("b")?);
        a.forward()?;
        assert_eq!(a.sysctl_get("net.ipv4.ip_forward")?, "1");
        assert_eq!(b.sysctl_get("net.ipv4.ip_forward")?, "0");
        Ok(())
    }
}
