//! iptables-legacy and ip6tables-legacy. The kernel announces nothing, so the tables are asked for at every poll, in
//! two steps: the short description of a table (IPT_SO_GET_INFO) tells where its built-in chains begin and end, and so
//! whether rules are on a forwarded packet's way; only a table without such rules is read whole, for its chains'
//! policies and for matches that track connections. Only tables that exist already are asked for, since asking makes
//! them. Sources: include/uapi/linux/netfilter_ipv{4,6}/ip{,6}_tables.h, net/netfilter/x_tables.c (Linux 6.1).

use super::netfilter::{hooks, scope, xt_tracks};
use super::nl::{ne32, text_of};
use super::proc::ProcNet;
use super::{Finding, POLL, count, has_tunnels};
use crate::error::CmError;
use crate::watch::{PortIndex, Watcher};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;
use towpath_fpc::PolicySource;
use towpath_tables::Reason;
use towpath_tables::record::Family;

const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
const TABLE_NAME: usize = 32;
const HOOKS: usize = 5;
const INFO: usize = TABLE_NAME + 4 + 4 * HOOKS * 2 + 8;
/// Bytes before the entries in an answer to GET_ENTRIES: name, size, padding to 8.
const ENTRIES_AT: usize = 40;
/// A larger table is not read at every poll; it is taken to be in the way. Reading costs about half a microsecond an
/// entry, and an entry takes about 200 bytes.
const LARGEST: usize = 128 << 10;
/// A standard target's verdict "accept": -NF_ACCEPT - 1.
const ACCEPT: i32 = -2;

/// What differs between the families.
struct Layout {
    family: Family,
    tool: &'static str,
    names: &'static CStr,
    module: &'static CStr,
    domain: i32,
    level: i32,
    /// Offset of `target_offset`, `next_offset` in an entry
    offsets_at: usize,
    /// Size of an entry without matches and target
    entry: usize,
}

const LAYOUTS: [Layout; 2] = [
    Layout {
        family: Family::V4,
        tool: "iptables-legacy",
        names: c"ip_tables_names",
        module: c"ip_tables",
        domain: libc::AF_INET,
        level: libc::SOL_IP,
        offsets_at: 88,
        entry: 112,
    },
    Layout {
        family: Family::V6,
        tool: "ip6tables-legacy",
        names: c"ip6_tables_names",
        module: c"ip6_tables",
        domain: libc::AF_INET6,
        level: libc::SOL_IPV6,
        offsets_at: 140,
        entry: 168,
    },
];

/// The watcher of xtables' own tables.
pub struct Xtables {
    families: Vec<Tables>,
}

impl Xtables {
    /// Watches the thread's network namespace.
    pub fn new() -> Result<Self, CmError> {
        let families = LAYOUTS.iter().map(Tables::new).collect::<Result<_, _>>()?;
        Ok(Self { families })
    }
}

impl Watcher for Xtables {
    fn name(&self) -> &'static str {
        "xtables"
    }

    fn source(&self) -> PolicySource {
        PolicySource::Xtables
    }

    fn interval(&self) -> Option<Duration> {
        Some(POLL)
    }

    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        let mut findings = Vec::new();
        for tables in &mut self.families {
            findings.extend(tables.findings(has_tunnels(ports))?);
        }
        Ok(findings)
    }
}

/// The tables of one family.
struct Tables {
    layout: &'static Layout,
    /// None where the kernel does not know the family
    socket: Option<OwnedFd>,
    names: ProcNet,
    buffer: Vec<u8>,
}

impl Tables {
    fn new(layout: &'static Layout) -> Result<Self, CmError> {
        let what = || format!("{}: socket", layout.tool);
        // Any socket of the family carries the options; one for datagrams that is never bound receives nothing.
        // SAFETY: the call takes numbers only.
        let fd = unsafe { libc::socket(layout.domain, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        let socket = match fd {
            // SAFETY: the call has just made this descriptor, and nothing else owns it.
            0.. => Some(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            _ => return Err(CmError::last_os(what())),
        };
        Ok(Self { layout, socket, names: ProcNet::new(layout.names, layout.module)?, buffer: Vec::new() })
    }

    fn findings(&mut self, tunnels: bool) -> Result<Vec<Finding>, CmError> {
        let Some(socket) = self.socket.as_ref().map(|s| s.as_raw_fd()) else { return Ok(Vec::new()) };
        let infos = self.existing()?.iter().map(|name| self.info(socket, name)).collect::<Result<Vec<_>, _>>()?;
        let infos: Vec<_> = infos.into_iter().flatten().collect();
        let tool = self.layout.tool;
        let mut findings: Vec<_> = infos
            .iter()
            .flat_map(|info| info.rules_on_the_way(tunnels).map(|(chain, local)| (&info.name, chain, local)))
            .map(|(name, chain, local)| {
                let detail = format!("{tool} -t {name}: rules in {chain}");
                Finding::new(scope(self.layout.family, local), Reason::PolicyNetfilter, detail)
            })
            .collect();
        if !findings.iter().any(|finding| finding.scope == scope(self.layout.family, false)) {
            for info in &infos {
                findings.extend(self.read(socket, info, tunnels)?);
            }
        }
        Ok(findings)
    }

    fn finding(&self, reason: Reason, detail: String) -> Finding {
        Finding::family(self.layout.family, reason, detail)
    }

    /// Names of the tables that exist in the namespace.
    fn existing(&mut self) -> Result<Vec<String>, CmError> {
        Ok(self.names.read()?.unwrap_or_default().lines().map(str::to_owned).collect())
    }

    fn info(&self, socket: i32, name: &str) -> Result<Option<Info>, CmError> {
        let mut bytes = [0; INFO];
        put_name(&mut bytes, name);
        match getsockopt(socket, self.layout.level, GET_INFO, &mut bytes) {
            Ok(_) => Ok(Info::decode(name, &bytes)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(CmError::io(format!("{}: table {name}", self.layout.tool), e)),
        }
    }

    /// Judges a table by all its entries.
    fn read(&mut self, socket: i32, info: &Info, tunnels: bool) -> Result<Vec<Finding>, CmError> {
        let (tool, name) = (self.layout.tool, &info.name);
        if info.size > LARGEST {
            let detail = format!("{tool} -t {name}: {}, too many to be watched", count(info.entries, "entry"));
            return Ok(vec![self.finding(Reason::PolicyUnknown, detail)]);
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        buffer.resize(ENTRIES_AT + info.size, 0);
        put_name(&mut buffer, name);
        buffer[TABLE_NAME..TABLE_NAME + 4].copy_from_slice(&(info.size as u32).to_ne_bytes());
        let what = || format!("{tool}: entries of table {name}");
        let findings = match getsockopt(socket, self.layout.level, GET_ENTRIES, &mut buffer) {
            Ok(_) => self
                .judge(info, &buffer[ENTRIES_AT..], tunnels)
                .ok_or_else(|| CmError::decode(what(), "malformed entry")),
            // The table has been replaced since its size was told: something is going on, the next poll sees what.
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                Ok(vec![self.finding(Reason::PolicyNetfilter, format!("{tool} -t {name}: being replaced"))])
            }
            Err(e) => Err(CmError::io(what(), e)),
        };
        self.buffer = buffer;
        findings
    }

    /// None if an entry does not hold what it says.
    fn judge(&self, info: &Info, entries: &[u8], tunnels: bool) -> Option<Vec<Finding>> {
        let (tool, name) = (self.layout.tool, &info.name);
        let mut findings = Vec::new();
        for (chain, local, _, end) in info.chains(tunnels) {
            if !accepts(self.layout, entries.get(end..)?)? {
                let detail = format!("{tool} -t {name}: policy of {chain} is not ACCEPT");
                findings.push(Finding::new(scope(self.layout.family, local), Reason::PolicyNetfilter, detail));
            }
        }
        let mut rest = entries;
        while !rest.is_empty() {
            let (extensions, next) = extensions(self.layout, rest)?;
            if let Some(extension) = extensions.iter().find(|extension| xt_tracks(extension)) {
                let detail = format!("{tool} -t {name}: a rule with {extension} (connection tracking)");
                findings.push(self.finding(Reason::PolicyConntrack, detail));
            }
            rest = rest.get(next..)?;
        }
        Some(findings)
    }
}

/// ipt_getinfo; offsets are into the table's entries.
struct Info {
    name: String,
    valid_hooks: u32,
    hook_entry: [u32; HOOKS],
    underflow: [u32; HOOKS],
    entries: usize,
    size: usize,
}

impl Info {
    fn decode(name: &str, bytes: &[u8; INFO]) -> Option<Self> {
        let word = |at: usize| bytes.get(TABLE_NAME + 4 * at..).and_then(ne32);
        let mut info = Self {
            name: name.to_owned(),
            valid_hooks: word(0)?,
            hook_entry: [0; HOOKS],
            underflow: [0; HOOKS],
            entries: word(1 + 2 * HOOKS)? as usize,
            size: word(2 + 2 * HOOKS)? as usize,
        };
        for hook in 0..HOOKS {
            info.hook_entry[hook] = word(1 + hook)?;
            info.underflow[hook] = word(1 + HOOKS + hook)?;
        }
        Some(info)
    }

    /// The built-in chains on a packet's way: name, whether only the host's own packets pass it, first entry, and the
    /// entry that is the policy.
    fn chains(&self, tunnels: bool) -> impl Iterator<Item = (String, bool, usize, usize)> + '_ {
        hooks(tunnels).filter(|(hook, ..)| self.valid_hooks & (1 << hook) != 0).map(|(hook, name, local)| {
            let hook = hook as usize;
            (name.to_uppercase(), local, self.hook_entry[hook] as usize, self.underflow[hook] as usize)
        })
    }

    /// Of those on a forwarded packet's way, and of those on the host's own packets', the first that has rules.
    fn rules_on_the_way(&self, tunnels: bool) -> impl Iterator<Item = (String, bool)> {
        [false, true].into_iter().filter_map(move |of| {
            let mut ruled = self.chains(tunnels).filter(|(_, local, first, policy)| *local == of && first != policy);
            ruled.next().map(|(chain, local, ..)| (chain, local))
        })
    }
}

/// Names of an entry's matches and target, and its length.
fn extensions(layout: &Layout, entry: &[u8]) -> Option<(Vec<String>, usize)> {
    let half = |at: usize| entry.get(at..)?.first_chunk().map(|b| u16::from_ne_bytes(*b) as usize);
    let (target, next) = (half(layout.offsets_at)?, half(layout.offsets_at + 2)?);
    let mut names = Vec::new();
    let mut at = layout.entry;
    while at < target {
        names.push(extension_name(entry.get(at..)?)?);
        at += half(at)?.max(1); // never the same place twice, whatever the entry says
    }
    names.push(extension_name(entry.get(target..)?)?);
    (next > 0).then_some((names, next))
}

/// Name of a match or target: size, name, revision.
fn extension_name(bytes: &[u8]) -> Option<String> {
    bytes.get(2..31).map(text_of)
}

/// Whether the entry, a chain's policy, is a plain ACCEPT.
fn accepts(layout: &Layout, entry: &[u8]) -> Option<bool> {
    let target = entry.get(layout.offsets_at..)?.first_chunk().map(|b| u16::from_ne_bytes(*b) as usize)?;
    let verdict = entry.get(target + 32..)?.first_chunk().map(|b| i32::from_ne_bytes(*b))?;
    Some(extension_name(entry.get(target..)?)?.is_empty() && verdict == ACCEPT)
}

fn put_name(bytes: &mut [u8], name: &str) {
    let length = name.len().min(TABLE_NAME - 1);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
}

fn getsockopt(socket: i32, level: i32, option: i32, bytes: &mut [u8]) -> io::Result<usize> {
    let mut length = bytes.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `bytes`, which is exclusively borrowed.
    let result = unsafe { libc::getsockopt(socket, level, option, bytes.as_mut_ptr().cast(), &raw mut length) };
    if result == 0 { Ok(length as usize) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IPv4 entry with the extensions; the last is the target, with a verdict.
    fn entry(extensions: &[&str], verdict: i32) -> Vec<u8> {
        let layout = &LAYOUTS[0];
        let mut bytes = vec![0; layout.entry];
        let mut target = 0;
        for name in extensions {
            target = bytes.len();
            bytes.extend_from_slice(&40u16.to_ne_bytes());
            bytes.extend_from_slice(name.as_bytes());
            bytes.resize(target + 32, 0);
            bytes.extend_from_slice(&verdict.to_ne_bytes());
            bytes.resize(target + 40, 0);
        }
        let length = bytes.len() as u16;
        bytes[layout.offsets_at..][..2].copy_from_slice(&(target as u16).to_ne_bytes());
        bytes[layout.offsets_at + 2..][..2].copy_from_slice(&length.to_ne_bytes());
        bytes
    }

    fn tables() -> Tables {
        Tables::new(&LAYOUTS[0]).unwrap()
    }

    /// A filter table: INPUT with `input`, empty FORWARD and OUTPUT with policy `forward`.
    fn table(input: &[u8], forward: i32) -> (Info, Vec<u8>) {
        let bytes =
            [input, &entry(&[""], ACCEPT), &entry(&[""], forward), &entry(&[""], ACCEPT), &entry(&["ERROR"], 0)];
        let bytes = bytes.concat();
        let (policy, at) = (entry(&[""], ACCEPT).len() as u32, input.len() as u32);
        let info = Info {
            name: "filter".into(),
            valid_hooks: 0b01110,
            hook_entry: [0, 0, at + policy, at + 2 * policy, 0],
            underflow: [0, at, at + policy, at + 2 * policy, 0],
            entries: 5,
            size: bytes.len(),
        };
        (info, bytes)
    }

    #[test]
    fn input_rules_are_not_in_the_way_but_tracking_ones_are() {
        let (info, bytes) = table(&entry(&["tcp", "comment", "REJECT"], 0), ACCEPT);
        assert_eq!(info.rules_on_the_way(false).next(), None);
        assert_eq!(info.rules_on_the_way(true).collect::<Vec<_>>(), [("INPUT".to_owned(), true)]);
        assert_eq!(tables().judge(&info, &bytes, true), Some(vec![]));
        let (info, bytes) = table(&entry(&["conntrack", ""], ACCEPT), ACCEPT);
        assert_eq!(tables().judge(&info, &bytes, false).unwrap()[0].reason, Reason::PolicyConntrack);
    }

    #[test]
    fn a_drop_policy_is_in_the_way() {
        let (info, bytes) = table(&[], -1);
        let found = tables().judge(&info, &bytes, true).unwrap();
        let detail = "iptables-legacy -t filter: policy of FORWARD is not ACCEPT";
        assert_eq!(found, [Finding::family(Family::V4, Reason::PolicyNetfilter, detail)]);
    }

    #[test]
    fn malformed_entries_are_noticed() {
        let (info, bytes) = table(&entry(&["tcp", "REJECT"], 0), ACCEPT);
        for length in 1..bytes.len() {
            let result = tables().judge(&info, &bytes[..length], true);
            assert!(result.is_none_or(|found| found.is_empty()), "{length}");
        }
        assert_eq!(tables().judge(&info, &vec![0; bytes.len()], true), None);
    }

    #[test]
    fn families_are_in_order() {
        assert_eq!(LAYOUTS.each_ref().map(|layout| layout.family), Family::ALL);
    }
}
