//! The packet path for many frames at once: each stage with all of them, so that memory comes for one while the others are
//! worked on. What becomes of each is what `process` would have made of it.

use crate::cache::prefetch;
use crate::ingress::{parse_link, parse_packet};
use crate::network::Network;
use crate::rewrite::rewrite_packet;
use crate::roots::root_for;
use crate::route::Last;
use crate::stats::Tally;
use crate::{Entry, Frame, Parsed, Stop, Tables, Verdict, count_exception, filters};
use arrayvec::ArrayVec;
use towpath_tables::Reason;
use towpath_tables::lpm::{Kind, Walk};
use towpath_tables::trace::Outcome;
use towpath_wire::ethernet::{self, Ethernet};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;

/// Frames at once.
pub const BATCH: usize = 64;

/// What becomes of each frame of a batch: a number below `LINUX` is the slot of the interface that is to transmit it.
pub struct Ways(pub [u32; BATCH]);

impl Ways {
    /// From here on numbers stand for frames that are Linux's.
    pub const LINUX: u32 = 1 << 16;
    /// Stands for a frame that is Linux's since it came in by no port.
    const NOT_A_PORT: u32 = u32::MAX - 1;
    /// Stands for a frame that is dropped.
    pub const NOWHERE: u32 = u32::MAX;

    fn linux(reason: Reason) -> u32 {
        Self::LINUX | reason as u32
    }

    /// What became of the frame at this place.
    pub fn outcome(&self, place: usize) -> Option<Outcome> {
        Some(match *self.0.get(place)? {
            Self::NOT_A_PORT => Outcome::NotAPort,
            Self::NOWHERE => Verdict::Drop.into(),
            slot if slot < Self::LINUX => Outcome::Forward(slot),
            reason => Outcome::Exception(Reason::from_index((reason - Self::LINUX) as u8)?),
        })
    }

    /// The slot of the interface that transmits the first frames, if one does for all of them.
    #[inline]
    pub fn all_one(&self, frames: usize) -> Option<u32> {
        let (first, rest) = self.0.get(..frames)?.split_first()?;
        (*first < Self::LINUX && rest.iter().all(|slot| slot == first)).then_some(*first)
    }
}

/// A header whose destination has so many bytes.
trait Header<const BYTES: usize>: Network {
    fn destination(&self) -> [u8; BYTES];
}

impl Header<4> for Ipv4 {
    #[inline(always)]
    fn destination(&self) -> [u8; 4] {
        self.destination
    }
}

impl Header<16> for Ipv6 {
    #[inline(always)]
    fn destination(&self) -> [u8; 16] {
        self.destination
    }
}

/// A packet on its way to an address of so many bytes.
struct Job<'t, const BYTES: usize> {
    /// Place of its frame in the batch
    place: usize,
    entry: Entry<'t>,
    parsed: Parsed,
    to: [u8; BYTES],
    root: u32,
    walk: Walk,
}

type Jobs<'t, const BYTES: usize> = ArrayVec<Job<'t, BYTES>, BATCH>;

/// Takes frames that came in by one interface along the whole path and counts them; those behind the first `BATCH` are left
/// alone. `filter`: whether the operator's filters have not been looked at yet.
#[inline(always)]
pub fn process_batch<F: Frame, T: Tables>(tables: &T, ifindex: u32, frames: &mut [F], filter: bool) -> Ways {
    let mut ways = Ways([Ways::NOT_A_PORT; BATCH]);
    let Some(entry) = Entry::find(tables, ifindex) else { return ways };
    frames.iter().filter_map(|frame| frame.get::<Ethernet>(0)).for_each(prefetch);
    let filter = filter && filters::are_there(tables);
    let (mut four, mut six) = (Jobs::<4>::new(), Jobs::<16>::new());
    for (place, frame) in frames.iter_mut().enumerate().take(BATCH) {
        if filter && filters::drops(frame, tables, ifindex) {
            ways.0[place] = Ways::NOWHERE;
            continue;
        }
        let mut entry = entry;
        let done = match parse(frame, tables, &mut entry, place, &mut four, &mut six) {
            Ok(()) => continue,
            Err(Stop::Exception(reason)) => Err(reason),
            Err(Stop::Flow(candidate)) => frame.flow(tables, &entry, candidate),
            Err(Stop::Mapped(candidate)) => frame.mapped(tables, &entry, candidate),
        };
        ways.0[place] = way(tables, &entry, done);
    }
    finish::<Ipv4, 4, F, T>(tables, frames, &mut four, &mut ways);
    finish::<Ipv6, 16, F, T>(tables, frames, &mut six, &mut ways);
    ways
}

/// The way of a frame that came in by this port; counts what is Linux's.
#[inline(always)]
fn way<T: Tables>(tables: &T, entry: &Entry, done: Result<u32, Reason>) -> u32 {
    done.unwrap_or_else(|reason| {
        count_exception(tables, entry.slot, reason);
        Ways::linux(reason)
    })
}

#[inline(always)]
fn parse<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &mut Entry<'t>,
    place: usize,
    four: &mut Jobs<'t, 4>,
    six: &mut Jobs<'t, 16>,
) -> Result<(), Stop> {
    let (ethertype, offset) = parse_link(frame, tables, entry)?;
    match ethertype {
        ethernet::IPV4 => add_job::<Ipv4, 4, F, T>(frame, tables, *entry, (place, offset), four),
        ethernet::IPV6 => add_job::<Ipv6, 16, F, T>(frame, tables, *entry, (place, offset), six),
        _ => Err(Reason::UnsupportedEncap.into()),
    }
}

#[inline(always)]
fn add_job<'t, N: Header<BYTES>, const BYTES: usize, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: Entry<'t>,
    (place, offset): (usize, usize),
    jobs: &mut Jobs<'t, BYTES>,
) -> Result<(), Stop> {
    let parsed = parse_packet::<N, F, T>(frame, tables, &entry, offset, frame.total_len())?;
    let header = frame.get::<N>(offset).ok_or(Reason::Truncated)?;
    let to = header.destination();
    let root = root_for::<N, T>(tables, entry.port, || header.source_words())?;
    let walk = Walk::new(tables, root, &to);
    jobs.push(Job { place, entry, parsed, to, root, walk });
    Ok(())
}

/// Finds the packets' next hops, and rewrites what is forwarded.
#[inline(always)]
fn finish<N: Network, const BYTES: usize, F: Frame, T: Tables>(
    tables: &T,
    frames: &mut [F],
    jobs: &mut [Job<BYTES>],
    ways: &mut Ways,
) {
    if jobs.is_empty() {
        return;
    }
    look_up(tables, jobs);
    let (mut tally, mut last) = (Tally::default(), Last::NONE);
    for job in jobs {
        let (Some(frame), Some(way)) = (frames.get_mut(job.place), ways.0.get_mut(job.place)) else { continue };
        *way = self::way(tables, &job.entry, forward::<N, BYTES, F, T>(tables, frame, job, &mut last, &mut tally));
    }
    tally.write(tables);
}

/// Each step with all of them, until none goes on.
#[inline(always)]
fn look_up<const BYTES: usize, T: Tables>(tables: &T, jobs: &mut [Job<BYTES>]) {
    for Job { to, root, walk, .. } in &mut *jobs {
        walk.begin(tables, *root, to);
        ask_for_nexthop(tables, walk);
    }
    loop {
        let mut on = false;
        for Job { to, walk, .. } in &mut *jobs {
            on |= walk.locate(tables, to);
        }
        if !on {
            return;
        }
        for Job { walk, .. } in &mut *jobs {
            walk.follow(tables);
            ask_for_nexthop(tables, walk);
        }
    }
}

#[inline(always)]
fn ask_for_nexthop<T: Tables>(tables: &T, walk: &Walk) {
    if let Kind::Nexthop(index) = walk.word().kind() {
        tables.prefetch_nexthop(index);
    }
}

#[inline(always)]
fn forward<'t, N: Network, const BYTES: usize, F: Frame, T: Tables>(
    tables: &'t T,
    frame: &mut F,
    job: &Job<BYTES>,
    last: &mut Last<'t>,
    tally: &mut Tally,
) -> Result<u32, Reason> {
    let Job { entry, parsed, .. } = job;
    let word = job.walk.found(tables, job.root).map_err(|_| Reason::Internal)?;
    let hop = match last.route::<N, F, T>(frame, tables, entry, parsed, word) {
        Ok(hop) => hop,
        Err(refusal) => return frame.refused(tables, entry, parsed, refusal),
    };
    rewrite_packet::<N, F>(frame, parsed, hop)?;
    hop.mark_hit();
    tally.add(tables, entry.slot, parsed, hop);
    Ok(hop.device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::frames::{address6, ipv4, ipv6, link, udp};
    use crate::cases::world::*;
    use crate::packet::Packet;
    use crate::process;
    use std::collections::BTreeSet;
    use towpath_tables::record::TableId;

    /// Packets of both families in turn: two to each place, then on to the next one, from another source each time.
    fn frames(batch: u16) -> Vec<Packet> {
        let frame = |n: u16| {
            let (payload, from) = (udp(1000, 9, &[]), batch * 100 + n);
            let [high, low] = from.to_be_bytes();
            let frame = match n / 2 % 4 {
                0 => [link(IN, &[], ethernet::IPV4), ipv4([192, 0, high, low], [10, 1, 0, 1], 17, &payload)],
                // Without a route, behind what goes to a group.
                1 => [link(IN, &[], ethernet::IPV4), ipv4([192, 0, high, low], [9, 9, 9, 9], 17, &payload)],
                2 => [link(IN, &[], ethernet::IPV6), ipv6(address6(9, 9, from), address6(0xa, 0, 1), 17, &payload)],
                _ => [link(IN, &[], ethernet::IPV4), ipv4([192, 0, high, low], [203, 0, 0, 1], 17, &payload)],
            };
            Packet::new(&frame.concat(), 64)
        };
        (0..BATCH as u16).map(frame).collect()
    }

    #[test]
    fn a_batch_becomes_what_each_frame_becomes() {
        let (alone, together) = (World::new(), World::new());
        let mut seen = BTreeSet::new();
        for batch in 0..8 {
            let (mut one, mut all) = (frames(batch), frames(batch));
            let ways = process_batch(&together.slices(), INGRESS, &mut all, true);
            for (place, frame) in one.iter_mut().enumerate() {
                let (outcome, wanted) = (ways.outcome(place), process(frame, &alone.slices(), INGRESS).into());
                assert_eq!(outcome, Some(wanted), "batch {batch}, frame {place}");
                seen.insert(wanted.word());
            }
            assert_eq!(ways.outcome(BATCH), None);
            assert!(one == all, "batch {batch}");
        }
        let outcomes = [Outcome::Forward(OUT), Outcome::Forward(OTHER), Outcome::Exception(Reason::NoRoute)];
        assert_eq!(seen, outcomes.map(Outcome::word).into(), "both of the group's, and Linux's");
        alone.watched_like(&together);
        for id in TableId::ALL {
            assert!(alone.table(id) == together.table(id), "table {}", id.name());
        }
    }

    #[test]
    fn one_way_for_all_is_seen() {
        let mut ways = Ways([Ways::LINUX; BATCH]);
        assert_eq!((ways.all_one(0), ways.all_one(1), ways.all_one(BATCH + 1)), (None, None, None));
        ways.0[..3].fill(7);
        assert_eq!((ways.all_one(3), ways.all_one(4)), (Some(7), None));
        ways.0[1] = 8;
        assert_eq!(ways.all_one(3), None);
    }
}
