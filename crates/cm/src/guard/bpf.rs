//! The little of bpf(2) that the watchers ask: links in netfilter's hooks, and programs attached by tcx.

use crate::error::CmError;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const PROG_LOAD: libc::c_long = 5;
const PROG_GET_NEXT_ID: libc::c_long = 11;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const LINK_GET_FD_BY_ID: libc::c_long = 30;
const LINK_GET_NEXT_ID: libc::c_long = 31;
const LINK_TYPE_NETFILTER: u32 = 10;
const PROG_TYPE_NETFILTER: u32 = 32;
/// BPF_PROG_TYPE_SCHED_CLS, which tcx takes.
pub const PROG_TYPE_CLASSIFIER: u32 = 3;
const ATTACH_NETFILTER: u32 = 45;

/// bpf(2) with one of the forms of its attribute; gives what the call returns.
fn bpf<T>(command: libc::c_long, attribute: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attribute` is a plain record of the size given, exclusively borrowed through the call; pointers in it are
    // the caller's, who keeps what they point to alive.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Whether the kernel knows BPF programs for netfilter at all (since 6.4), found out by loading one that accepts. What is
/// neither yes nor no is taken to be yes.
pub fn has_netfilter_programs() -> bool {
    /// The part of bpf_attr for BPF_PROG_LOAD up to the attach type.
    #[repr(C)]
    struct Attribute {
        kind: u32,
        count: u32,
        code: u64,
        license: u64,
        log: [u32; 4],
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        attach_type: u32,
    }
    const ACCEPT: [u64; 2] = [0x1_0000_00b7, 0x95]; // r0 = NF_ACCEPT; exit
    let mut attribute = Attribute {
        kind: PROG_TYPE_NETFILTER,
        count: ACCEPT.len() as u32,
        code: ACCEPT.as_ptr().expose_provenance() as u64,
        license: c"Dual MIT/GPL".as_ptr().expose_provenance() as u64,
        log: [0; 4],
        kernel_version: 0,
        flags: 0,
        name: *b"towpath_probe\0\0\0",
        ifindex: 0,
        attach_type: ATTACH_NETFILTER,
    };
    match bpf(PROG_LOAD, &mut attribute) {
        Ok(fd) => {
            // SAFETY: the call has just made this descriptor, and nothing else owns it.
            drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
            true
        }
        Err(e) => e.raw_os_error() != Some(libc::EINVAL),
    }
}

/// Whether there are programs of a type anywhere. As long as there are none, none is attached either, and nobody has to
/// ask each place where one could be. A program has its id before it can be attached, and ids rise until they start over
/// near 2^31 (bpf_prog_alloc_id, kernel/bpf/syscall.c, 6.1): what is new lies behind what was seen last.
pub struct Programs {
    kind: u32,
    /// The last program looked at
    seen: u32,
    /// Those of the type
    known: BTreeSet<u32>,
}

impl Programs {
    /// Beyond this ids might start over before the next look.
    const LAST: u32 = 1 << 30;

    /// For programs of this type (BPF_PROG_TYPE_*).
    pub fn of(kind: u32) -> Self {
        Self { kind, seen: 0, known: BTreeSet::new() }
    }

    /// False if there are none. Without CAP_SYS_ADMIN the kernel does not list programs: then there may be.
    pub fn may_exist(&mut self) -> Result<bool, CmError> {
        while let Some(first) = self.known.first().copied() {
            match next_id(PROG_GET_NEXT_ID, first - 1) {
                Ok(id) if id == Some(first) => break,
                Ok(_) => drop(self.known.remove(&first)),
                Err(e) => return Self::unlisted(e),
            }
        }
        while self.seen < Self::LAST {
            match next_id(PROG_GET_NEXT_ID, self.seen) {
                Ok(Some(id)) => {
                    if self.is_of_kind(id)? {
                        self.known.insert(id);
                    }
                    self.seen = id;
                }
                Ok(None) => return Ok(!self.known.is_empty()),
                Err(e) => return Self::unlisted(e),
            }
        }
        Ok(true)
    }

    fn unlisted(error: io::Error) -> Result<bool, CmError> {
        if error.raw_os_error() == Some(libc::EPERM) {
            Ok(true)
        } else {
            Err(CmError::io("list of BPF programs", error))
        }
    }

    fn is_of_kind(&self, id: u32) -> Result<bool, CmError> {
        #[repr(C, align(8))]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
        }
        let mut info = Info::default();
        match information(PROG_GET_FD_BY_ID, id, &mut info) {
            Ok(found) => Ok(found && info.kind == self.kind),
            Err(e) => Err(CmError::io(format!("BPF program {id}"), e)),
        }
    }
}

/// A BPF program in a netfilter hook (Linux 6.4). The kernel does not tell of which namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetfilterLink {
    /// Link id
    pub id: u32,
    /// Netfilter family
    pub pf: u8,
    /// Hook number
    pub hook: u32,
}

/// All links there are, by id; a link never changes what it is.
pub struct NetfilterLinks {
    programs: Programs,
    known: HashMap<u32, Option<NetfilterLink>>,
}

impl Default for NetfilterLinks {
    fn default() -> Self {
        Self { programs: Programs::of(PROG_TYPE_NETFILTER), known: HashMap::new() }
    }
}

impl NetfilterLinks {
    /// The netfilter links of now, in order of their ids.
    pub fn read(&mut self) -> Result<Vec<NetfilterLink>, CmError> {
        if !self.programs.may_exist()? {
            return Ok(Vec::new());
        }
        let mut known = HashMap::new();
        let mut found = Vec::new();
        let mut id = 0;
        while let Some(next) = next_link(id)? {
            id = next;
            let link = match self.known.get(&id) {
                Some(link) => *link,
                None => match inspect(id) {
                    Ok(link) => link,
                    // It is being made this very moment: the next poll finds it made.
                    Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => continue,
                    Err(e) => return Err(CmError::io(format!("BPF link {id}"), e)),
                },
            };
            known.insert(id, link);
            found.extend(link);
        }
        self.known = known;
        Ok(found)
    }
}

fn next_link(start: u32) -> Result<Option<u32>, CmError> {
    match next_id(LINK_GET_NEXT_ID, start) {
        // Kernels before 5.8 do not list links, and have none in netfilter.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        result => result.map_err(|e| CmError::io("list of BPF links", e)),
    }
}

/// The first object behind `start`.
fn next_id(command: libc::c_long, start: u32) -> io::Result<Option<u32>> {
    #[repr(C)]
    struct Attribute {
        start: u32,
        next: u32,
        flags: u32,
    }
    let mut attribute = Attribute { start, next: 0, flags: 0 };
    match bpf(command, &mut attribute) {
        Ok(_) => Ok(Some(attribute.next)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Fills `info`, the beginning of the object's bpf_*_info; `open` makes a descriptor of its id. False if it is gone.
fn information<T>(open: libc::c_long, id: u32, info: &mut T) -> io::Result<bool> {
    #[repr(C)]
    struct ById {
        id: u32,
        next: u32,
        flags: u32,
    }
    #[repr(C)]
    struct InfoByFd {
        fd: u32,
        length: u32,
        info: u64,
    }
    let fd = match bpf(open, &mut ById { id, next: 0, flags: 0 }) {
        // SAFETY: the call has just made this descriptor, and nothing else owns it.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd as i32) },
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
        Err(e) => return Err(e),
    };
    let mut attribute = InfoByFd {
        fd: fd.as_raw_fd() as u32,
        length: size_of::<T>() as u32,
        info: std::ptr::from_mut(info).expose_provenance() as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attribute).map(|_| true)
}

fn inspect(id: u32) -> io::Result<Option<NetfilterLink>> {
    /// bpf_link_info with its netfilter part, and room for what else may be put there.
    #[repr(C, align(8))]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        pad: u32,
        pf: u32,
        hook: u32,
        rest: [u32; 10],
    }
    let mut info = Info::default();
    let found = information(LINK_GET_FD_BY_ID, id, &mut info)?;
    let netfilter = found && info.kind == LINK_TYPE_NETFILTER;
    Ok(netfilter.then_some(NetfilterLink { id, pf: info.pf as u8, hook: info.hook }))
}

/// Where tcx programs hang: the value is the kernel's attach type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Tcx {
    /// Before the stack sees a packet
    Ingress = 46,
    /// After it
    Egress = 47,
}

/// More programs than this on one place are not told apart.
const MOST: usize = 16;

/// Number of tcx programs on the interface of the thread's namespace that have none of these names; None if the kernel has no
/// tcx (before 6.6). 0 if the interface is gone. Without CAP_SYS_ADMIN the kernel does not tell names: then none has one.
pub fn tcx_programs(ifindex: u32, place: Tcx, names: &[&str]) -> Result<Option<u32>, CmError> {
    #[repr(C)]
    #[derive(Default)]
    struct Attribute {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        pad: u32,
        program_flags: u64,
        links: u64,
        link_flags: u64,
        revision: u64,
    }
    let mut ids = [0u32; MOST];
    let mut attribute = Attribute {
        target: ifindex,
        attach_type: place as u32,
        programs: ids.as_mut_ptr().expose_provenance() as u64,
        count: MOST as u32,
        ..Attribute::default()
    };
    let what = || format!("tcx programs on interface {ifindex}");
    match bpf(PROG_QUERY, &mut attribute) {
        Ok(_) => {
            let mut others = attribute.count;
            for id in ids.into_iter().take(attribute.count as usize) {
                others -= u32::from(has_name(id, names).map_err(|e| CmError::io(what(), e))?);
            }
            Ok(Some(others))
        }
        Err(e) => match e.raw_os_error() {
            Some(libc::ENODEV) => Ok(Some(0)),
            // The rest did not fit.
            Some(libc::ENOSPC) => Ok(Some(attribute.count)),
            Some(libc::EINVAL | libc::E2BIG) => Ok(None),
            _ => Err(CmError::io(what(), e)),
        },
    }
}

/// Whether a program has one of these names, as far as the kernel keeps names.
fn has_name(id: u32, names: &[&str]) -> io::Result<bool> {
    /// bpf_prog_info up to the name.
    #[repr(C, align(8))]
    #[derive(Default)]
    struct Info {
        before: [u64; 8],
        name: [u8; 16],
    }
    let mut info = Info::default();
    match information(PROG_GET_FD_BY_ID, id, &mut info) {
        Ok(found) => Ok(found && names.contains(&super::nl::text_of(&info.name).as_str())),
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netfilter_programs_are_there_since_linux_6_4() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(['.', '-']).map(|part| part.trim().parse::<u32>().unwrap_or(0));
        let version = (numbers.next().unwrap(), numbers.next().unwrap());
        assert_eq!(has_netfilter_programs(), version >= (6, 4), "{release}");
    }
}
