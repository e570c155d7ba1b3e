//! Towpath inside a node.

use crate::{Node, Process, wait_for};
use anyhow::{Context, Result};
use serde_json::Value;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

/// The `towpath` command: TOWPATH_BIN, or the one built with the running program (beside it; a test lies one folder
/// deeper).
pub fn towpath_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("TOWPATH_BIN") {
        let path = PathBuf::from(path);
        anyhow::ensure!(path.is_file(), "no {}, which TOWPATH_BIN names", path.display());
        return Ok(path);
    }
    let program = std::env::current_exe()?;
    let beside = program.ancestors().skip(1).take(2).map(|folder| folder.join("towpath"));
    beside.into_iter().find(|path| path.is_file()).with_context(|| {
        format!("no towpath beside {}: run 'cargo build', or name it by TOWPATH_BIN", program.display())
    })
}

/// A running `towpath up`.
pub struct Towpath {
    node: Node,
    binary: PathBuf,
    /// The daemon's process
    pub process: Process,
}

impl Towpath {
    /// Starts `towpath up` with `arguments` (ports and options) and waits until it says it is ready.
    pub fn up(node: &Node, arguments: &[&str]) -> Result<Towpath> {
        let binary = towpath_binary()?;
        let notify = node.folder("notify");
        let _ = std::fs::remove_file(&notify);
        let socket = UnixDatagram::bind(&notify).with_context(|| format!("cannot bind {}", notify.display()))?;
        socket.set_nonblocking(true)?;
        let mut command = node.command(&binary);
        command.arg("up").args(arguments).env("NOTIFY_SOCKET", &notify);
        let mut process = node.start(command)?;
        let mut ready = false;
        wait_for(Duration::from_secs(30), "towpath up to be ready", || {
            let mut buffer = [0; 256];
            while let Ok(length) = socket.recv(&mut buffer) {
                ready |= buffer[..length].split(|b| *b == b'\n').any(|line| line == b"READY=1");
            }
            (ready || process.ended().is_ok_and(|status| status.is_some())).then_some(())
        })
        .with_context(|| process.log())?;
        anyhow::ensure!(ready, "towpath up ended before it was ready:\n{}", process.log());
        Ok(Towpath { node: node.clone(), binary, process })
    }

    /// Runs another `towpath` command in the node and reads its JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let binary = self.binary.display().to_string();
        self.node.json([&binary as &str].iter().chain(arguments).chain(&["--json"]))
    }
}
