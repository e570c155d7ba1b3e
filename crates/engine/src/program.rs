//! The XDP program of this binary: loading it against the pinned maps, and what the kernel says about it.

use crate::error::{Error, Result};
use crate::sys;
use aya::programs::{ProgramError, Xdp};
use aya::{Ebpf, EbpfLoader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// Name of the program in the object.
const NAME: &str = "towpath";
/// Lines of the verifier's log that an error shows; the last ones say what is wrong.
const LOG_LINES: usize = 40;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/towpath-xdp.o"));

/// A loaded program.
#[derive(Debug)]
pub struct Program(OwnedFd);

/// What the kernel says about the program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProgramFacts {
    /// Identifier, as in `bpftool prog show id`
    pub id: u32,
    /// Instructions the verifier looked at, all paths taken together (0 before 5.16)
    pub verified_instructions: u32,
    /// BPF instructions
    pub instructions: u32,
    /// Bytes of machine code; 0 if the kernel interprets it
    pub jited_bytes: u32,
}

impl Program {
    /// Loads the program; each map is the one pinned at its path.
    pub fn load(pins: &[(&'static str, PathBuf)]) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for (name, path) in pins {
            loader.map_pin_path(name, path);
        }
        let mut object = loader.load(OBJECT).map_err(|e| Error::Program { why: chain(&e), log: String::new() })?;
        check_maps(&object, pins)?;
        let program: &mut Xdp = object
            .program_mut(NAME)
            .ok_or_else(|| Error::Object(format!("has no program {NAME}")))?
            .try_into()
            .map_err(|_| Error::Object(format!("has a program {NAME} that is not for XDP")))?;
        program.load().map_err(rejected)?;
        let fd = program.fd().map_err(|e| Error::Program { why: chain(&e), log: String::new() })?;
        fd.as_fd().try_clone_to_owned().map(Self).map_err(|e| Error::io("duplicate a descriptor", e))
    }

    /// Its descriptor, for links and test runs.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// What the kernel says about it.
    pub fn facts(&self) -> Result<ProgramFacts> {
        let info = sys::program_info(self.fd()).map_err(|e| Error::io("ask about the XDP program", e))?;
        Ok(ProgramFacts {
            id: info.id,
            verified_instructions: info.verified_insns,
            instructions: info.xlated_prog_len / 8,
            jited_bytes: info.jited_prog_len,
        })
    }
}

/// A map of the object that is none of ours would be private to one program and lose its contents at the next.
fn check_maps(object: &Ebpf, pins: &[(&'static str, PathBuf)]) -> Result<()> {
    let known = |name: &str| name.starts_with('.') || pins.iter().any(|(ours, _)| *ours == name);
    match object.maps().map(|(name, _)| name).find(|name| !known(name)) {
        Some(name) => Err(Error::Object(format!("has a map {name} that this crate does not know"))),
        None => Ok(()),
    }
}

fn rejected(error: ProgramError) -> Error {
    match error {
        ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EPERM) => {
            Error::privileged("load the XDP program", "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON", io_error)
        }
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().collect();
            let log = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
            Error::Program { why: io_error.to_string(), log }
        }
        other => Error::Program { why: chain(&other), log: String::new() },
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
