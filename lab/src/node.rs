//! A node: one network namespace.

use crate::leftovers::{self, NETNS};
use crate::packet::PacketSocket;
use crate::process::Process;
use crate::routes::RouteSocket;
use crate::wait_for;
use anyhow::{Context, Result, bail};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A network namespace; clones are the same one. It is removed with its [`crate::Lab`].
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    netns: String,
    name: String,
    folder: PathBuf,
    file: File,
    processes: AtomicU32,
}

impl Node {
    pub(crate) fn new(netns: &str, name: &str, folder: &Path) -> Result<Node> {
        checked(&mut Command::new("ip"), ["netns", "add", netns])?;
        let path = Path::new(NETNS).join(netns);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let inner =
            Inner { netns: netns.into(), name: name.into(), folder: folder.into(), file, processes: AtomicU32::new(0) };
        let node = Node { inner: Arc::new(inner) };
        node.set_defaults()?;
        Ok(node)
    }

    /// What a namespace starts with depends on the machine (net.core.devconf_inherit_init_net); labs start alike.
    fn set_defaults(&self) -> Result<()> {
        for scope in ["all", "default"] {
            for (family, key, value) in [
                ("ipv4", "forwarding", "0"),
                ("ipv4", "rp_filter", "0"),
                ("ipv6", "forwarding", "0"),
                // Addresses are usable at once: nobody else is on these links.
                ("ipv6", "accept_dad", "0"),
                ("ipv6", "dad_transmits", "0"),
                ("ipv6", "router_solicitations", "0"),
            ] {
                self.sysctl(&format!("net.{family}.conf.{scope}.{key}"), value)?;
            }
        }
        self.run(["ip", "link", "set", "lo", "up"])?;
        Ok(())
    }

    /// Name within the lab.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Name of the namespace, for `ip netns`.
    pub fn netns(&self) -> &str {
        &self.inner.netns
    }

    /// A command that will run in the node, with the node's /sys, as `ip netns exec` arranges it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let inner = self.inner.clone();
        // SAFETY: what runs between fork and exec makes system calls only; the descriptor lives as long as the command.
        unsafe { command.pre_exec(move || enter_for_good(inner.file.as_raw_fd())) };
        command
    }

    /// Runs a command to its end and gives what it wrote to stdout; an error with the command and its words if it
    /// fails.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        let mut arguments = arguments.into_iter();
        let program = arguments.next().context("no command to run")?;
        checked(&mut self.command(program), arguments).with_context(|| format!("in node {}", self.name()))
    }

    /// Runs a shell command line to its end, as [`Node::run`] does.
    pub fn sh(&self, line: &str) -> Result<String> {
        self.run(["sh", "-ec", line])
    }

    /// Starts a process that runs until it is dropped (or the lab is); its output goes to a file.
    pub fn spawn<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Process> {
        let mut arguments = arguments.into_iter();
        let program = arguments.next().context("no command to start")?;
        let mut command = self.command(program);
        command.args(arguments);
        self.start(command)
    }

    /// Starts a prepared command as [`Node::spawn`] does. It has entered the namespace, by which a closing lab finds it,
    /// when this returns.
    pub fn start(&self, command: Command) -> Result<Process> {
        let number = self.inner.processes.fetch_add(1, Ordering::Relaxed);
        let mut process = Process::start(command, self.folder(&format!("{number}.log")))?;
        let what = format!("process {} to enter node {}", process.pid(), self.name());
        let inode = self.inner.file.metadata()?.ino();
        wait_for(Duration::from_secs(10), &what, || {
            (leftovers::is_in(process.pid(), inode) || !matches!(process.ended(), Ok(None))).then_some(())
        })?;
        Ok(process)
    }

    /// Path of a file or folder of this node in the lab's folder.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.inner.folder.join(format!("{}-{name}", self.name()))
    }

    /// Runs `f` in a thread of the node's network namespace; sockets made there stay there. Files below /sys are
    /// still those of the caller's namespace, files below /proc/sys/net the node's.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: setns on a descriptor of ours; it changes this thread alone.
                if unsafe { libc::setns(self.inner.file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    let error = std::io::Error::last_os_error();
                    bail!("cannot enter the network namespace {}: {error}", self.netns());
                }
                Ok(f())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes a sysctl of the node: `net.ipv4.ip_forward`, or with slashes if a part holds dots.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        self.enter(|| std::fs::write(&path, value))?
            .with_context(|| format!("cannot write {value} to {} in node {}", path.display(), self.name()))
    }

    /// Reads a sysctl of the node.
    pub fn sysctl_get(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key);
        let text = self
            .enter(|| std::fs::read_to_string(&path))?
            .with_context(|| format!("cannot read {} in node {}", path.display(), self.name()))?;
        Ok(text.trim().to_owned())
    }

    /// Makes the node forward IPv4 and IPv6 on all interfaces.
    pub fn forward(&self) -> Result<()> {
        for scope in ["all", "default"] {
            for family in ["ipv4", "ipv6"] {
                self.sysctl(&format!("net.{family}.conf.{scope}.forwarding"), "1")?;
            }
        }
        Ok(())
    }

    /// Runs a command that writes JSON, such as `ip -j …`.
    pub fn json<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<serde_json::Value> {
        let text = self.run(arguments)?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// MAC address of an interface.
    pub fn mac(&self, port: &str) -> Result<[u8; 6]> {
        let links = self.json(["ip", "-j", "link", "show", "dev", port])?;
        let text = links[0]["address"].as_str().context("ip link shows no address")?;
        let bytes: Option<Vec<u8>> = text.split(':').map(|b| u8::from_str_radix(b, 16).ok()).collect();
        bytes.and_then(|b| b.try_into().ok()).with_context(|| format!("no MAC address: {text}"))
    }

    /// Interface index.
    pub fn ifindex(&self, port: &str) -> Result<u32> {
        let name = std::ffi::CString::new(port)?;
        // SAFETY: the name is a C string that outlives the call.
        match self.enter(|| unsafe { libc::if_nametoindex(name.as_ptr()) })? {
            0 => bail!("node {} has no interface {port}", self.name()),
            index => Ok(index),
        }
    }

    /// A packet socket on an interface.
    pub fn packet_socket(&self, port: &str) -> Result<PacketSocket> {
        let index = self.ifindex(port)?;
        self.enter(|| PacketSocket::open(index))?.with_context(|| format!("on {port} of node {}", self.name()))
    }

    /// A socket that changes the node's routes.
    pub fn route_socket(&self) -> Result<RouteSocket> {
        self.enter(RouteSocket::open)?
    }

    /// Ends what runs in the namespace and removes it.
    pub(crate) fn close(&self) {
        if let Err(error) = leftovers::remove_namespace(self.netns()) {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Makes the calling process one of this network namespace, with a /sys that shows it, in mounts of its own.
fn enter_for_good(netns: RawFd) -> std::io::Result<()> {
    let done = |result| if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
    let nothing = std::ptr::null();
    // SAFETY: every pointer is null, as mount(2) allows here, or a constant C string.
    unsafe {
        done(libc::setns(netns, libc::CLONE_NEWNET))?;
        done(libc::unshare(libc::CLONE_NEWNS))?;
        done(libc::mount(nothing, c"/".as_ptr(), nothing, libc::MS_SLAVE | libc::MS_REC, nothing.cast()))?;
        done(libc::umount2(c"/sys".as_ptr(), libc::MNT_DETACH))?;
        done(libc::mount(c"sysfs".as_ptr(), c"/sys".as_ptr(), c"sysfs".as_ptr(), 0, nothing.cast()))
    }
}

fn sysctl_path(key: &str) -> PathBuf {
    let key = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    Path::new("/proc/sys").join(key)
}

/// Runs a command to its end; its stdout, or an error with the command line and what it said.
fn checked<S: AsRef<OsStr>>(command: &mut Command, arguments: impl IntoIterator<Item = S>) -> Result<String> {
    command.args(arguments);
    let line = || {
        let words: Vec<&OsStr> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
        words.join(&OsString::from(" ")).to_string_lossy().into_owned()
    };
    let shown = line();
    let Output { status, stdout, stderr } = command.output().with_context(|| format!("cannot run {shown}"))?;
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    if !status.success() {
        bail!("{shown}: {status}\n{}{}", stdout, String::from_utf8_lossy(&stderr));
    }
    Ok(stdout)
}
