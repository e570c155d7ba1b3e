//! What can go wrong between CM and the kernel.

use std::io;

/// An error of the cache manager or of one of its watchers.
#[derive(Debug, thiserror::Error)]
pub enum CmError {
    /// The kernel refused a request; `ext` is its own explanation (extended acknowledgement), if it gave one.
    #[error("{what}: {source}{}", ext.as_deref().map(|e| format!(" (kernel: {e})")).unwrap_or_default())]
    Kernel {
        /// What was asked, e.g. "dump of IPv4 routes"
        what: String,
        /// The kernel's error number
        source: io::Error,
        /// The kernel's own words
        ext: Option<String>,
    },
    /// A file or socket could not be used.
    #[error("{what}: {source}")]
    Io {
        /// Which file or socket, and for what
        what: String,
        /// The system's error
        source: io::Error,
    },
    /// The kernel said something that cannot be decoded.
    #[error("{what}: {text}")]
    Decode {
        /// What was being read
        what: String,
        /// Why it cannot be understood
        text: String,
    },
    /// The receiver of the messages went away.
    #[error("the fast path manager no longer accepts messages: {0}")]
    Sink(String),
}

impl CmError {
    /// An I/O error with what was being done.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }

    /// The last system call's error with what was being done.
    pub fn last_os(what: impl Into<String>) -> Self {
        Self::io(what, io::Error::last_os_error())
    }

    /// Something that could not be decoded.
    pub fn decode(what: impl Into<String>, text: impl ToString) -> Self {
        Self::Decode { what: what.into(), text: text.to_string() }
    }
}
