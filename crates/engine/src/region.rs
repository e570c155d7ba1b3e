//! The shared tables: BPF arrays, pinned, and mapped into this process.

use crate::bpffs::PinDir;
use crate::error::{Error, Result};
use crate::sys::{self, MapSpec};
use aya_obj::generated::bpf_map_type;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;
use towpath_tables::Reason;
use towpath_tables::adopt::{self, AdoptError};
use towpath_tables::backing::{PerTable, RawTable};
use towpath_tables::brake::Brake;
use towpath_tables::record::{Config, Family, PORT_SLOTS, SOCKET_QUEUES, TableId};

/// A map of what frames are redirected to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Targets {
    /// Interfaces, by port slot
    Devices = 0,
    /// Sockets of the user engine, by port slot and queue
    Sockets = 1,
}

impl Targets {
    const ALL: [Self; 2] = [Self::Devices, Self::Sockets];

    const fn name(self) -> &'static str {
        match self {
            Self::Devices => "devices",
            Self::Sockets => "sockets",
        }
    }

    fn create(self) -> Result<OwnedFd> {
        let (kind, value_size, max_entries) = match self {
            Self::Devices => (bpf_map_type::BPF_MAP_TYPE_DEVMAP, DEVICE_SIZE, PORT_SLOTS),
            Self::Sockets => (bpf_map_type::BPF_MAP_TYPE_XSKMAP, SOCKET_SIZE, PORT_SLOTS * SOCKET_QUEUES),
        };
        let spec = MapSpec { kind, name: self.name(), value_size, max_entries, flags: 0 };
        sys::map_create(spec, None).map_err(|e| {
            let what = format!("create map {} of {max_entries}", self.name());
            Error::privileged(what, "CAP_NET_ADMIN and CAP_BPF", e)
        })
    }
}

/// Appended to the name of a pin that is to take the place of another once every program uses it.
pub const STAGED: &str = "_new";
/// `struct bpf_devmap_val`: interface index and program.
const DEVICE_SIZE: u32 = 8;
/// A descriptor
const SOCKET_SIZE: u32 = 4;

/// One table, mapped.
#[derive(Debug)]
pub(crate) struct Table {
    fd: OwnedFd,
    start: NonNull<u8>,
    bytes: usize,
    entries: u32,
}

// SAFETY: the mapping belongs to the value and is valid in every thread; access to its contents is by words that are
// atomic, or by the single writer.
unsafe impl Send for Table {}
// SAFETY: as for Send.
unsafe impl Sync for Table {}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: start and bytes are those of a mapping made in `map` that nobody uses any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

impl Table {
    /// This table's memory, valid as long as the value.
    pub(crate) fn raw(&self) -> RawTable {
        // SAFETY: a mapping is aligned to pages; `map` made it for this many elements, and the kernel zeroed them.
        unsafe { RawTable::from_raw(self.start, self.entries as usize) }
    }

    fn create(id: TableId, entries: u32) -> Result<Self> {
        let name = id.name();
        let kind = bpf_map_type::BPF_MAP_TYPE_ARRAY;
        let what = || format!("create table {name} of {entries} times {} bytes", id.element_size());
        // The kernel gives the address of global data only for maps of one element.
        let spec = MapSpec { kind, name, value_size: bytes_of(id, entries)?, max_entries: 1, flags: sys::MMAPABLE };
        let fd = sys::map_create(spec, None).map_err(|e| Error::privileged(what(), "CAP_BPF", e))?;
        Self::map(id, fd, entries)
    }

    /// Takes a map that exists; it must be one for this table.
    fn open(id: TableId, fd: OwnedFd) -> Result<Self> {
        let info = sys::map_info(fd.as_fd()).map_err(|e| Error::io(format!("ask about table {}", id.name()), e))?;
        let (records, rest) = (info.value_size / id.element_size() as u32, info.value_size % id.element_size() as u32);
        if rest != 0 || info.max_entries != 1 || info.map_flags & sys::MMAPABLE == 0 {
            let why = format!("{} elements of {} bytes", info.max_entries, info.value_size);
            let why = format!("{why}, wanted one of records of {} bytes", id.element_size());
            let cause = io::Error::new(io::ErrorKind::InvalidData, why);
            return Err(Error::io(format!("take over table {}", id.name()), cause));
        }
        Self::map(id, fd, records)
    }

    /// What the table `config` says of itself, whatever its size; nothing if it cannot be one.
    fn check_version(fd: OwnedFd) -> Result<std::result::Result<(), AdoptError>> {
        let info = sys::map_info(fd.as_fd()).map_err(|e| Error::io("ask about table config", e))?;
        if info.map_flags & sys::MMAPABLE == 0 || info.max_entries != 1 || size_of::<Config>() > page_size() {
            return Ok(Ok(()));
        }
        let table = Self::map(TableId::Config, fd, 1)?;
        // SAFETY: such a map has whole pages, of which a record of atomic words takes one at most, and lives until the end.
        Ok(adopt::check(unsafe { table.start.cast().as_ref() }))
    }

    fn map(id: TableId, fd: OwnedFd, entries: u32) -> Result<Self> {
        let bytes = (id.element_size() * entries as usize).next_multiple_of(page_size());
        // SAFETY: a new mapping at an address of the kernel's choice, of a descriptor that is open.
        let start = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        match NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED) {
            Some(start) => Ok(Self { fd, start, bytes, entries }),
            None => Err(Error::io(format!("map table {} ({bytes} bytes)", id.name()), io::Error::last_os_error())),
        }
    }
}

/// The verifier lets no program reach further than this into global data (BPF_MAX_VAR_OFF, include/linux/bpf_verifier.h,
/// Linux 6.1 to 6.18).
const MOST_BYTES: u64 = (1 << 29) - 1;

/// Size of a table in its map.
fn bytes_of(id: TableId, records: u32) -> Result<u32> {
    let bytes = u64::from(records) * id.element_size() as u64;
    if bytes > MOST_BYTES {
        let cause = format!("it would take {bytes} bytes, and the verifier allows {MOST_BYTES}");
        let cause = io::Error::new(io::ErrorKind::InvalidInput, cause);
        return Err(Error::io(format!("create table {} of {records} elements", id.name()), cause));
    }
    Ok(bytes as u32)
}

/// The table `config`, which never grows. Programs heed what is changed in it at once.
#[derive(Clone, Debug)]
pub struct ConfigTable {
    table: Arc<Table>,
    brake: Brake,
}

impl ConfigTable {
    /// See `Brake::pull`.
    pub fn pull(&self, family: Family, reason: Reason) {
        self.brake.pull(self, family, reason);
    }

    /// See `Brake::release`.
    pub fn release(&self) {
        self.brake.release(self);
    }

    /// See `Config::heartbeat`.
    pub fn beat(&self, at: u64) {
        self.heartbeat.store(at);
    }

    /// See `TableWriter::close_flows`.
    pub fn close_flows(&self) {
        towpath_tables::flows::close(self);
    }
}

impl Deref for ConfigTable {
    type Target = Config;

    fn deref(&self) -> &Config {
        // SAFETY: mapped for this table, of one record at least, for as long as the value; it consists of atomic words.
        unsafe { self.table.start.cast().as_ref() }
    }
}

/// Every table; one that grew lives on for those who still look at it.
pub(crate) type Maps = [Arc<Table>; TableId::ALL.len()];

/// The tables of an instance and its maps of targets.
#[derive(Debug)]
pub(crate) struct Region {
    tables: Maps,
    targets: [OwnedFd; Targets::ALL.len()],
    brake: Brake,
    /// Pins bear names with `STAGED`: no program in use refers to them
    staged: bool,
}

impl Region {
    /// Makes empty tables and pins them beside those that may be in use.
    pub(crate) fn create(dir: &PinDir, sizes: &PerTable) -> Result<Self> {
        let tables = try_tables(|id| {
            let table = Table::create(id, entries_of(id, sizes.get(id))?)?;
            pin(dir, table.fd.as_fd(), &staged_name(id.name()))?;
            Ok(table)
        })?;
        let targets = try_targets(|which| {
            let map = which.create()?;
            pin(dir, map.as_fd(), &staged_name(which.name()))?;
            Ok(map)
        })?;
        Ok(Self { tables, targets, brake: Brake::default(), staged: true })
    }

    /// Opens the pinned tables.
    pub(crate) fn adopt(dir: &PinDir) -> Result<Self> {
        let incomplete = |why: String| Error::Incomplete { place: dir.shown().display().to_string(), why };
        let open = |name: &str| sys::get_pinned(&dir.pin(name)).map_err(|e| incomplete(format!("open {name}: {e}")));
        let tables = try_tables(|id| Table::open(id, open(id.name())?).map_err(|e| incomplete(e.to_string())));
        let tables = match tables {
            Ok(tables) => tables,
            // Tables of another version may be others, and of other sizes: then that is what there is to say.
            Err(error) => {
                let version = open(TableId::Config.name()).and_then(Table::check_version)?;
                let place = dir.shown().display().to_string();
                return Err(version.err().map_or(error, |why| Error::Foreign { place, why }));
            }
        };
        let targets = try_targets(|which| open(which.name()))?;
        let region = Self { tables, targets, brake: Brake::default(), staged: false };
        let (cpus, slots) = (possible_cpus()?, region.len(TableId::Ports));
        if region.len(TableId::Stats) < cpus.saturating_mul(slots) {
            return Err(incomplete(format!("statistics for fewer than {cpus} CPUs times {slots} ports")));
        }
        Ok(region)
    }

    /// True while the tables serve no program in use.
    pub(crate) fn staged(&self) -> bool {
        self.staged
    }

    /// The brake on the policies.
    pub(crate) fn brake(&self) -> &Brake {
        &self.brake
    }

    /// The mappings.
    pub(crate) fn maps(&self) -> &Maps {
        &self.tables
    }

    pub(crate) fn config(&self) -> ConfigTable {
        ConfigTable { table: self.tables[TableId::Config as usize].clone(), brake: self.brake.clone() }
    }

    /// Number of elements of a table.
    pub(crate) fn len(&self, id: TableId) -> u32 {
        self.table(id).entries
    }

    /// Descriptor of a table's map.
    pub(crate) fn fd(&self, id: TableId) -> BorrowedFd<'_> {
        self.table(id).fd.as_fd()
    }

    /// A map of targets.
    pub(crate) fn targets(&self, which: Targets) -> BorrowedFd<'_> {
        self.targets[which as usize].as_fd()
    }

    fn table(&self, id: TableId) -> &Table {
        &self.tables[id as usize]
    }

    /// Where each map is pinned now, by map name; `grown` is pinned under its staged name whatever the others are.
    pub(crate) fn pins(&self, dir: &PinDir, grown: Option<TableId>) -> Vec<(&'static str, PathBuf)> {
        let path = |name: &'static str, staged: bool| {
            (name, dir.pin(&if staged { staged_name(name) } else { name.to_owned() }))
        };
        let tables = TableId::ALL.into_iter().map(|id| {
            let (_, pin) = path(id.name(), self.staged || grown == Some(id));
            (id.section(), pin)
        });
        tables.chain(Targets::ALL.map(|which| path(which.name(), self.staged))).collect()
    }

    /// Gives staged pins their final names, in place of those that had them.
    pub(crate) fn commit(&mut self, dir: &PinDir) -> Result<()> {
        for name in map_names() {
            dir.rename(&staged_name(name), name)?;
        }
        self.staged = false;
        Ok(())
    }

    /// A larger copy of one table, pinned under the staged name.
    pub(crate) fn enlarged(&self, dir: &PinDir, id: TableId, entries: u32) -> Result<Grown> {
        let (old, new) = (self.table(id), Table::create(id, entries)?);
        let bytes = old.bytes.min(new.bytes);
        // SAFETY: both mappings are at least `bytes` long and do not overlap. The writer, the only one to change what
        // must not be lost, is the caller and waits; words that programs store meanwhile (hit flags) are plain data.
        unsafe { std::ptr::copy_nonoverlapping(old.start.as_ptr(), new.start.as_ptr(), bytes) };
        dir.remove(&staged_name(id.name()))?;
        pin(dir, new.fd.as_fd(), &staged_name(id.name()))?;
        Ok(Grown { id, table: new })
    }

    /// Puts an enlarged table in the place of the old one.
    pub(crate) fn install(&mut self, dir: &PinDir, grown: Grown) -> Result<()> {
        if !self.staged {
            dir.rename(&staged_name(grown.id.name()), grown.id.name())?;
        }
        self.tables[grown.id as usize] = Arc::new(grown.table);
        Ok(())
    }

    /// Bytes of kernel memory the maps hold, by map name.
    pub(crate) fn memory(&self) -> Result<Vec<(&'static str, u64)>> {
        let tables = TableId::ALL.into_iter().map(|id| (id.name(), self.fd(id)));
        let targets = Targets::ALL.map(|which| (which.name(), self.targets(which)));
        tables.chain(targets).map(|(name, fd)| Ok((name, memory_of(name, fd)?))).collect()
    }
}

/// A table that is to replace a smaller one.
pub(crate) struct Grown {
    id: TableId,
    table: Table,
}

/// Names of all maps of an instance.
pub(crate) fn map_names() -> impl Iterator<Item = &'static str> {
    TableId::ALL.into_iter().map(TableId::name).chain(Targets::ALL.map(Targets::name))
}

pub(crate) fn staged_name(name: &str) -> String {
    format!("{name}{STAGED}")
}

/// Number of CPUs the kernel may ever run: the size of per-CPU statistics.
pub fn possible_cpus() -> Result<u32> {
    let path = "/sys/devices/system/cpu/possible";
    let failed = |e| Error::io(format!("read {path}"), e);
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|cpu| cpu.parse::<u32>().ok());
    last.map(|cpu| cpu + 1).ok_or_else(|| failed(io::Error::new(io::ErrorKind::InvalidData, text)))
}

/// A BPF map counts in 32 bits.
pub(crate) fn entries_of(id: TableId, elements: usize) -> Result<u32> {
    u32::try_from(elements).map_err(|_| {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, "a BPF map has at most 4294967295");
        Error::io(format!("create table {} of {elements} elements", id.name()), cause)
    })
}

fn try_tables(make: impl Fn(TableId) -> Result<Table>) -> Result<Maps> {
    let tables = TableId::ALL.into_iter().map(|id| make(id).map(Arc::new)).collect::<Result<Vec<_>>>()?;
    Ok(tables.try_into().unwrap_or_else(|_| unreachable!("one table for each id")))
}

fn try_targets(make: impl Fn(Targets) -> Result<OwnedFd>) -> Result<[OwnedFd; Targets::ALL.len()]> {
    let [devices, sockets] = Targets::ALL.map(make);
    Ok([devices?, sockets?])
}

fn pin(dir: &PinDir, fd: BorrowedFd<'_>, name: &str) -> Result<()> {
    sys::pin(fd, &dir.pin(name)).map_err(|e| Error::io(format!("pin {}", dir.shown().join(name).display()), e))
}

fn memory_of(name: &str, fd: BorrowedFd<'_>) -> Result<u64> {
    let failed = |e| Error::io(format!("read the memory use of map {name}"), e);
    let text = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd())).map_err(failed)?;
    text.lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
        .ok_or_else(|| failed(io::Error::new(io::ErrorKind::InvalidData, "no line memlock")))
}

fn page_size() -> usize {
    // SAFETY: no pointers.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}
