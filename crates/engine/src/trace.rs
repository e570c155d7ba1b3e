//! Traces: their filters in the program, their gates, and the ring by which the program tells what they are to see.

use crate::error::{Error, Result};
use crate::sys::{self, MapSpec};
use aya::maps::{Map, MapData, RingBuf};
use aya_obj::generated::bpf_map_type;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use towpath_filter::Filter;
use towpath_tables::trace::{Gate, TRACES, Traced, Wanted};
use zerocopy::FromBytes;

/// Bytes of the ring: some hundred records, more than a trace may tell at once.
const RING: u32 = 1 << 18;
/// Names of the maps in the object: the program's ring, the gates, and the packet under way.
pub(crate) const MAPS: [&str; 3] = ["trace_ring", "trace_gates", "trace_packet"];

/// What a trace is to tell.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trace {
    /// Of which frames
    pub frames: Frames,
    /// Of those, the ones that this becomes of
    pub wanted: Wanted,
    /// So many a second at most, and at once
    pub rate: u32,
}

/// Which frames a trace looks at as they arrive.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Frames {
    /// All
    All,
    /// Those that this matches
    Matching(Filter),
    /// One in so many, drawn at random
    OneIn(NonZeroU32),
}

/// What passed a trace's gate.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Packets that the trace was for
    pub matched: u64,
    /// Of those, the ones that were not told since that would have been too many at once
    pub missed: u64,
}

/// The traces that run.
#[derive(Clone, Default, Debug)]
pub(crate) struct Traces {
    maps: Option<Arc<[OwnedFd; MAPS.len()]>>,
    running: [Option<Trace>; TRACES],
}

impl Traces {
    /// The same, but that this one runs or does not. Without any there are no maps.
    pub(crate) fn with(&self, number: usize, trace: Option<Trace>) -> Result<Self> {
        let mut traces = self.clone();
        if let Some(slot) = traces.running.get_mut(number) {
            *slot = trace.clone();
        }
        if traces.running.iter().all(Option::is_none) {
            return Ok(Self::default());
        }
        if traces.maps.is_none() {
            traces.maps = Some(Arc::new(create()?));
        }
        if let (Some(trace), Some([_, gates, _])) = (&trace, traces.maps.as_deref()) {
            let done = sys::map_update(gates.as_fd(), number as u32, &gate(trace));
            done.map_err(|e| Error::io(format!("set the gate of trace {number}"), e))?;
        }
        Ok(traces)
    }

    /// Whether there are any.
    pub(crate) fn any(&self) -> bool {
        self.maps.is_some()
    }

    /// By number.
    pub(crate) fn running(&self) -> &[Option<Trace>; TRACES] {
        &self.running
    }

    /// The maps by name.
    pub(crate) fn maps(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        self.maps.iter().flat_map(|maps| MAPS.into_iter().zip(maps.each_ref().map(AsFd::as_fd)))
    }

    pub(crate) fn ring(&self) -> Result<Option<Ring>> {
        self.maps.as_deref().map(|[ring, ..]| Ring::open(ring.as_fd())).transpose()
    }

    pub(crate) fn seen(&self, number: usize) -> Result<Seen> {
        let Some([_, gates, _]) = self.maps.as_deref() else { return Ok(Seen::default()) };
        let words = sys::map_lookup::<[u64; WORDS]>(gates.as_fd(), number as u32);
        let words = words.map_err(|e| Error::io(format!("read the gate of trace {number}"), e))?;
        let [.., matched, missed] = words.unwrap_or_default();
        Ok(Seen { matched, missed })
    }
}

const WORDS: usize = size_of::<Gate>() / size_of::<u64>();

/// A `Gate` that nothing has passed.
fn gate(trace: &Trace) -> [u64; WORDS] {
    let Gate { interval, room, due, wanted, matched, missed } = Gate::new(trace.rate, trace.wanted);
    [interval, room, due, wanted, matched, missed].map(|word| word.load())
}

fn create() -> Result<[OwnedFd; MAPS.len()]> {
    let [ring, gates, packet] = MAPS;
    let make = |kind, name, value_size, max_entries| {
        let spec = MapSpec { kind, name, value_size, max_entries, flags: 0 };
        sys::map_create(spec, None).map_err(|e| Error::privileged(format!("create map {name}"), "CAP_BPF", e))
    };
    Ok([
        make(bpf_map_type::BPF_MAP_TYPE_RINGBUF, ring, 0, RING)?,
        make(bpf_map_type::BPF_MAP_TYPE_ARRAY, gates, size_of::<Gate>() as u32, TRACES as u32)?,
        make(bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY, packet, size_of::<Traced>() as u32, 1)?,
    ])
}

/// What the program tells of all traces that run.
pub struct Ring(RingBuf<MapData>);

impl Ring {
    fn open(map: BorrowedFd<'_>) -> Result<Self> {
        let failed = |e: &dyn std::fmt::Display| Error::io("map the ring of traces", io::Error::other(e.to_string()));
        let map = map.try_clone_to_owned().map_err(|e| failed(&e))?;
        let data = MapData::from_fd(map).map_err(|e| failed(&e))?;
        RingBuf::try_from(Map::RingBuf(data)).map(Self).map_err(|e| failed(&e))
    }

    /// What has been told by now; waits for something, but not for longer than this.
    pub fn wait(&mut self, patience: Duration) -> Result<Vec<Traced>> {
        let mut ready = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor, which is open.
        let done = unsafe { libc::poll(&raw mut ready, 1, patience.as_millis().min(1 << 30) as i32) };
        if done < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(Error::io("wait for traces", error));
            }
        }
        let mut told = Vec::new();
        while let Some(record) = self.0.next() {
            told.extend(Traced::read_from_bytes(&record).ok());
        }
        Ok(told)
    }
}
