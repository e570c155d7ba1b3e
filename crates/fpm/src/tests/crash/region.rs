//! Tables that a process shares with its children and that outlive them, as maps in a bpffs do: growth makes a larger
//! table beside the old one, and one store puts it in its place.

use std::ptr::NonNull;
use towpath_tables::backing::{Backing, GrowError, PerTable, RawTable, RawTables};
use towpath_tables::brake::Brake;
use towpath_tables::grace::{Grace, Workers};
use towpath_tables::order;
use towpath_tables::record::TableId;
use towpath_tables::word::{W32, W64};

pub const READERS: usize = 1;
/// Room for a table
const AREA: usize = 16 << 20;
/// A table has two places, which it takes in turn.
const AREAS: usize = 2 * TableId::ALL.len();
const HEAD: usize = 4096;

/// What is not in the tables.
#[derive(Default)]
#[repr(C, align(4096))]
pub struct Head {
    /// By table: which of its places it has in the upper half, and its elements
    places: [W64; TableId::ALL.len()],
    /// Odd while a reader looks
    pub readers: [W32; READERS],
    /// Number of the change that the writer has begun with
    pub begun: W32,
    /// Number of the last one that it has done
    pub done: W32,
    /// Not 0 when the writer is about to touch the tables
    pub alive: W32,
    /// How often tables have grown
    pub grown: W32,
}
const _: () = assert!(size_of::<Head>() == HEAD);

/// The tables as a process sees them.
pub struct Region {
    base: NonNull<u8>,
    raw: RawTables,
    brake: Brake,
}

// SAFETY: what lies there is atomic words, or written by the single writer; the mapping stays for good.
unsafe impl Send for Region {}

/// A writer's grace periods.
pub type Readers = Workers<[&'static W32; READERS]>;

impl Region {
    /// Zeroed tables.
    pub fn new(elements: &PerTable) -> Self {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        let bytes = HEAD + AREAS * AREA;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind | libc::MAP_NORESERVE, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let base = NonNull::new(start.cast()).expect("mapped");
        // SAFETY: replaced before anybody looks.
        let raw = TableId::ALL.map(|_| unsafe { RawTable::from_raw(base, 0) });
        let mut region = Self { base, raw, brake: Brake::default() };
        for table in TableId::ALL {
            region.head().places[table as usize].store(elements.get(table) as u64);
        }
        region.refresh();
        region
    }

    /// The same tables for another reader or writer.
    pub fn again(&self) -> Self {
        let mut again = Self { base: self.base, raw: self.raw, brake: Brake::default() };
        again.refresh();
        again
    }

    pub fn head(&self) -> &'static Head {
        // SAFETY: the mapping begins with one, made of words, and stays for good.
        unsafe { self.base.cast().as_ref() }
    }

    pub fn readers(&self) -> Readers {
        Workers(self.head().readers.each_ref())
    }

    /// Looks at the tables as they are now.
    pub fn refresh(&mut self) {
        self.raw = TableId::ALL.map(|table| {
            let place = order::load(&self.head().places[table as usize]);
            // SAFETY: an area of the mapping, which holds so many.
            unsafe { RawTable::from_raw(self.area(table, (place >> 32) as usize), place as u32 as usize) }
        });
    }

    fn area(&self, table: TableId, which: usize) -> NonNull<u8> {
        // SAFETY: inside the mapping.
        unsafe { self.base.add(HEAD + (2 * table as usize + which) * AREA) }
    }
}

// SAFETY: `refresh` gives the memory of each table, which stays.
unsafe impl Backing for Region {
    fn tables(&self) -> &RawTables {
        &self.raw
    }

    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), GrowError> {
        use TableId::*;
        let (old, place) = (self.raw[table as usize], &self.head().places[table as usize]);
        if elements <= old.elements() {
            return Ok(());
        }
        let fixed = matches!(table, Config | Ports | Stats | Flows | FlowLines | Mappings | MappingStats);
        if fixed || elements * table.element_size() > AREA {
            return Err(GrowError { table, elements, cause: "it has its size for good".into() });
        }
        let which = 1 - (order::load(place) >> 32);
        let area = self.area(table, which as usize);
        // SAFETY: the areas lie in the mapping and do not overlap, and nobody looks at this one: a grace period has passed
        // since it was left. MADV_REMOVE zeroes it.
        unsafe {
            assert_eq!(libc::madvise(area.as_ptr().cast(), AREA, libc::MADV_REMOVE), 0);
            old.base().copy_to_nonoverlapping(area, old.elements() * table.element_size());
        }
        order::publish(place, which << 32 | elements as u64);
        self.head().grown.add(1);
        self.refresh();
        self.readers().wait();
        Ok(())
    }

    fn brake(&self) -> Brake {
        self.brake.clone()
    }
}
