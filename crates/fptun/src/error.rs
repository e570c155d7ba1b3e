//! What can go wrong, in words that name the remedy.

use crate::NAME;
use std::io;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why there is no way into Linux.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step that the kernel refused
    #[error("FPTUN: cannot {what}: {source}")]
    Io {
        /// The step
        what: &'static str,
        /// The kernel's own words
        source: io::Error,
    },
    /// The kernel has no device that leads nowhere
    #[error("FPTUN: the kernel has neither dummy nor ifb devices: load one of these modules (modprobe dummy)")]
    NoDevice,
    /// Another's interface has the name
    #[error("FPTUN: there is an interface {NAME} that is not Towpath's: rename it (ip link set {NAME} name OTHER)")]
    Taken,
    /// The tc program could not be loaded or attached
    #[error("FPTUN: cannot {what}: {why}")]
    Program {
        /// The step
        what: &'static str,
        /// The loader's and the kernel's words
        why: String,
    },
}

impl Error {
    /// A refused step; for `map_err`.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// A step of which the last system call tells the error.
    pub(crate) fn last(what: &'static str) -> Self {
        Self::io(what)(io::Error::last_os_error())
    }

    /// A step of the program's; for `map_err`.
    pub(crate) fn program<E: std::error::Error>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| {
            let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
            Self::Program { what, why: causes.map(ToString::to_string).collect::<Vec<_>>().join(": ") }
        }
    }
}
