//! What can go wrong, each with the thing, the place, the kernel's own words and, where there is one, the remedy.

use std::io;

/// Result of an engine call.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the engine could not do what it was asked. Nothing was changed unless the variant says so.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// A system call failed for a reason not told apart below.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what
        what: String,
        /// The kernel's answer
        source: io::Error,
    },
    /// A capability is missing.
    #[error("{what}: not permitted; it needs {capability} (run as root, or grant it to the process)")]
    Permission {
        /// What was tried
        what: String,
        /// `CAP_*`
        capability: &'static str,
    },
    /// The kernel lacks something.
    #[error("kernel {release} is too old or built without it: {feature} is needed ({since})")]
    Kernel {
        /// `uname -r`
        release: String,
        /// What is missing
        feature: &'static str,
        /// First version that has it
        since: &'static str,
    },
    /// No bpffs for the pins.
    #[error("no BPF file system to keep programs and tables in: {why}; run: {remedy}")]
    NoBpffs {
        /// What stands in the way
        why: String,
        /// Command to run
        remedy: String,
    },
    /// There is no such interface in this network namespace.
    #[error("no interface with index {0} in this network namespace (it may just have vanished)")]
    NoPort(u32),
    /// The driver has no native XDP.
    #[error(
        "{port}: its driver {driver} has no native XDP; leave the port out, or ask for XDP's generic mode with --generic (slower)"
    )]
    NoNativeXdp {
        /// Interface name
        port: String,
        /// Driver name
        driver: String,
    },
    /// Another XDP program is there; it was left alone.
    #[error(
        "{port}: already carries the XDP program {name} (id {id}, {mode} mode), which was left alone; see: bpftool net show dev {port}"
    )]
    OtherProgram {
        /// Interface name
        port: String,
        /// Program id
        id: u32,
        /// Program name
        name: String,
        /// native, generic or offloaded
        mode: &'static str,
    },
    /// The driver refused the program.
    #[error("{port}: its driver {driver} refused the XDP program: {source}{hint}")]
    Refused {
        /// Interface name
        port: String,
        /// Driver name
        driver: String,
        /// The kernel's answer
        source: io::Error,
        /// What that answer means for this driver, if known
        hint: String,
    },
    /// The verifier or the loader rejected the program.
    #[error("the kernel did not accept the XDP program: {why}\n{log}")]
    Program {
        /// What failed
        why: String,
        /// The verifier's log, its last lines
        log: String,
    },
    /// Captures that the program cannot serve.
    #[error("captures see everything by way of Linux: {0}")]
    Captures(towpath_filter::TooLong),
    /// The object in the binary and this crate disagree.
    #[error("the XDP program in this binary {0}: the build is inconsistent, run cargo clean and build again")]
    Object(String),
    /// Tables that this program does not know how to read.
    #[error("{place}: {why}")]
    Foreign {
        /// Folder
        place: String,
        /// What they say of themselves
        why: towpath_tables::adopt::AdoptError,
    },
    /// Pins do not form a whole instance.
    #[error("{place} does not hold a complete instance: {why}; `towpath down` removes it")]
    Incomplete {
        /// Folder
        place: String,
        /// What is amiss
        why: String,
    },
    /// A table cannot become larger.
    #[error("table {table} is full with {size} entries and does not grow: {why}")]
    Full {
        /// Table name
        table: &'static str,
        /// Present size
        size: u32,
        /// Reason and remedy
        why: String,
    },
}

impl Error {
    /// An `Io` error, or, for EPERM and EACCES, no different: use `privileged` where a capability is the likely cause.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }

    /// As `io`, but a refusal for want of privilege names the capability.
    pub fn privileged(what: impl Into<String>, capability: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Permission { what: what.into(), capability },
            _ => Self::io(what, source),
        }
    }

    /// A `NoBpffs` error.
    pub fn no_bpffs(why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::NoBpffs { why: why.into(), remedy: remedy.into() }
    }
}
