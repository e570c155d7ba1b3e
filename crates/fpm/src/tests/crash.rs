//! Writers that are killed at any moment. A child process takes the tables over that the last one left, learns
//! everything and follows changes, until it is killed; then packets must go as before or after the change that it was at,
//! or to Linux; and whoever comes next must make of the tables what tables are that nobody was ever killed over.
//!
//! TOWPATH_CRASHES sets the number of kills.

mod region;
mod world;

use super::*;
use region::{Head, Readers, Region};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use towpath_tables::backing::{Backing, PerTable};
use towpath_tables::grace::{self, Grace};
use towpath_tables::mix::Random;
use towpath_tables::record::{Config, NODE_REACH, Tunnel};
use world::{World, follow, step};

const KILLS: u32 = 100;
/// Longest time that a writer has once it has begun.
const LIFE: Duration = Duration::from_millis(30);
/// More than any machine needs to run a process.
const PATIENCE: Duration = Duration::from_secs(30);

/// Small, so that they have to grow.
fn sizes() -> PerTable {
    initial_elements(1)
        .with(TableId::Nodes, NODE_REACH + 4)
        .with(TableId::Nexthops, 8)
        .with(TableId::NexthopKeys, 8)
        .with(TableId::Groups, 1)
        .with(TableId::Vlans, 1)
}

fn probes() -> Vec<IpAddr> {
    let pool = (0..512).step_by(5).map(|which| IpAddr::V4((world::pool(which).to_bits() + 3).into()));
    let tunnel = ["10.77.1.1", "100.127.255.255"].map(ip);
    model::PROBES.into_iter().map(ip).chain(tunnel).chain(pool).collect()
}

type Outcomes = Vec<BTreeSet<Outcome>>;

/// Where packets would go. A record that is being changed makes them Linux's.
fn all_outcomes(view: &View<'_>, probes: &[IpAddr]) -> Outcomes {
    let busy = |index| {
        NexthopValue::read(&view.nexthops()[index as usize])
            .map_or(Outcome::Exception(Reason::TableBusy), |_| outcome(view, index))
    };
    probes.iter().map(|probe| leaves(view, *probe).into_iter().map(busy).collect()).collect()
}

/// The next hops that an address leads to.
fn leaves(view: &View<'_>, address: IpAddr) -> BTreeSet<u32> {
    let word = match address {
        IpAddr::V4(address) => lpm::lookup(view, MAIN_ROOT[0], &address.octets()),
        IpAddr::V6(address) => lpm::lookup(view, MAIN_ROOT[1], &address.octets()),
    };
    match word.expect("no index is out of range").kind() {
        Kind::None => BTreeSet::new(),
        Kind::Nexthop(index) => [index].into(),
        Kind::Group(group) => view.groups()[group as usize].buckets.iter().map(|bucket| bucket.load()).collect(),
        Kind::Node(_) => panic!("a look-up ended at a node"),
    }
}

/// What a daemon makes of this that nobody was killed before.
fn fresh(world: &World) -> TestFpm {
    world.daemon(TableWriter::create(HeapBacking::new(sizes()), NoReaders).expect("tables"))
}

/// All that the tables say, by what it means: slots and indices may be others.
fn meaning<B: Backing, G: Grace>(fpm: &Fpm<B, G>) -> Vec<String> {
    let view = fpm.tables().view();
    let ifindex = |slot: u32| view.ports()[slot as usize].ifindex.load();
    let config: &Config = view.config();
    let words = |words: &[towpath_tables::word::W32]| words.iter().map(|word| word.load()).collect::<Vec<_>>();
    let mut all = vec![
        format!("policies {:?} {:?}", words(&config.policy), words(&config.hash_policy)),
        format!("own addresses {:?}", config.local_filter.iter().map(|word| word.load()).collect::<Vec<_>>()),
        format!("flows {:?}", fpm.tables().flows().map(|flow| flow.connection).collect::<BTreeSet<_>>()),
        format!("mappings {:?}", fpm.mappings().map(|(mapping, _)| mapping).collect::<BTreeSet<_>>()),
        format!("mappings in force {:?}", fpm.tables().mappings().into_values().collect::<BTreeSet<_>>().len()),
    ];
    for slot in config.tunnels.iter().enumerate().filter(|(_, word)| word.load() != 0) {
        all.push(format!("tunnel at {}: {}", slot.0, ifindex(slot.1.load() - 1)));
    }
    let by_interface: BTreeMap<u32, u32> = fpm.tables().ports().map(|(slot, of)| (of, slot)).collect();
    for (of, slot) in by_interface {
        let port = &view.ports()[slot as usize];
        let vlans = match port.vlans.load() {
            NO_VLANS => Vec::new(),
            table => {
                let halves = view.vlans()[table as usize]
                    .slots
                    .iter()
                    .flat_map(|word| [word.load() & 0xffff, word.load() >> 16]);
                let tagged = halves.enumerate().filter(|(_, slot)| *slot != 0);
                tagged.map(|(id, slot)| (id, ifindex(slot - 1))).collect()
            }
        };
        let way = match lpm::Word(port.tunnel.way.load()).kind() {
            Kind::Nexthop(index) => vec![format!("{:?}", outcome(&view, index))],
            Kind::Group(_) | Kind::None | Kind::Node(_) => Vec::new(),
        };
        let Tunnel { flags, local, remote, input_key, output_key, ttl_tos, link, policy, .. } = &port.tunnel;
        let tunnel =
            [flags, &local[0], &remote[0], input_key, output_key, ttl_tos, link, policy].map(|word| word.load());
        all.push(format!(
            "port {of}: {:?} {:x} {:?} {:?} {vlans:?} {:x} {} {} {:?} {way:?}",
            port.flags.load(),
            port.mac.load(),
            words(&port.root),
            words(&port.ingress_policy),
            port.vlan.load(),
            ifindex(port.lower.load()),
            port.mtu.load(),
            tunnel,
        ));
        assert_eq!(port.tunnel.sequence.load() & 1, 0, "the tunnel of interface {of} is being changed for ever");
    }
    all
}

/// Elements in use that a crash could lose.
fn used<B: Backing, G: Grace>(fpm: &mut Fpm<B, G>) -> Vec<(TableId, usize)> {
    use TableId::*;
    fpm.tables_mut().reclaim();
    let usage = fpm.tables().usage();
    [Vlans, Roots, Nodes, Nexthops, Groups, Ports].map(|table| (table, usage[table as usize].used)).into()
}

fn equal<B: Backing, G: Grace>(fpm: &mut Fpm<B, G>, world: &World) {
    let mut fresh = fresh(world);
    let (found, wanted) = (meaning(fpm), meaning(&fresh));
    for (found, wanted) in found.iter().zip(&wanted) {
        assert_eq!(found, wanted);
    }
    assert_eq!(found.len(), wanted.len());
    let view = fpm.tables().view();
    let changing =
        fpm.nexthops().find(|nexthop| NexthopValue::read(&view.nexthops()[nexthop.index as usize]).is_none());
    assert!(changing.is_none(), "{changing:?} is being changed for ever");
    for probe in probes() {
        let [found, wanted] = [shares(&fpm.tables().view(), probe), shares(&fresh.tables().view(), probe)];
        // Which of several next hops gets what is left over depends on their indices.
        let close =
            wanted.iter().all(|(way, share)| found.get(way).is_some_and(|of| of.abs_diff(*share) <= wanted.len()));
        assert!(close && found.len() == wanted.len(), "{probe}: {found:?}, not {wanted:?}");
    }
    assert_eq!(fpm.tables().flows().map(|flow| flow.connection).collect::<BTreeSet<_>>(), world.flows());
    assert_eq!(used(fpm), used(&mut fresh), "something has leaked");
}

/// A writer's life: takes over, learns everything, follows changes from number `done` + 1 on, until it is killed.
fn live(region: Region, mut world: World, done: u32) {
    let head = region.head();
    let readers = region.readers();
    head.alive.store(1);
    let mut fpm = world.daemon(TableWriter::adopt(region, readers).expect("tables that can be taken over"));
    head.done.store(done);
    for number in done + 1..done + 1_000_000 {
        let step = step(number);
        head.begun.store(number);
        world.apply(&step);
        follow(&mut fpm, &step);
        if number % 8 == 0 {
            change_in_place(&mut fpm);
        }
        head.done.store(number);
        if number % 8 == 0 {
            fpm.tables_mut().reclaim();
        }
    }
}

/// Changes next hops to Linux's and back, many times: in between a change takes too little time to be met by chance.
fn change_in_place<B: Backing, G: Grace>(fpm: &mut Fpm<B, G>) {
    let tables = fpm.tables_mut();
    let all = (2..tables.view().nexthops().len() as u32).filter_map(|index| Some((index, tables.nexthop(index)?)));
    let all: Vec<_> = all.collect();
    for _ in 0..1000 {
        for (index, value) in &all {
            tables.set_nexthop(*index, &NexthopValue::exception(Reason::NoNeighbour));
            tables.set_nexthop(*index, value);
        }
    }
}

/// Starts a writer and kills it at some moment after it has begun to touch the tables.
fn kill_one(region: &Region, world: &World, delay: Duration) {
    let head = region.head();
    head.alive.store(0);
    // SAFETY: the C library's allocator works in a child of a process with threads, and nothing else in it that the child
    // uses takes locks.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        let (region, world, done) = (region.again(), world.clone(), head.begun.load());
        let ended = catch_unwind(AssertUnwindSafe(|| live(region, world, done)));
        // SAFETY: ends the child without what belongs to the parent.
        unsafe { libc::_exit(if ended.is_ok() { 1 } else { 2 }) }
    }
    let deadline = Instant::now() + PATIENCE;
    while head.alive.load() == 0 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    std::thread::sleep(delay);
    let mut status = 0;
    // SAFETY: the child is ours and was not waited for.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
    }
    assert!(libc::WIFSIGNALED(status), "the writer ended by itself, status {}", libc::WEXITSTATUS(status));
}

/// Looks all the time, as packets do: there is always a route, and no record is torn.
fn read(mut region: Region, stop: &AtomicBool) -> u64 {
    let (word, covered) = (&region.head().readers[0], world::pool(0).to_bits());
    let (mut random, mut seen) = (Random(1), 0);
    while !stop.load(Ordering::Relaxed) {
        grace::enter(word);
        region.refresh();
        let view = region.view();
        for _ in 0..64 {
            let address = IpAddr::V4((covered + random.below(1 << 22)).into());
            let all = leaves(&view, address);
            assert!(!all.is_empty(), "{address} has no route");
            for index in all {
                let Some(value) = NexthopValue::read(&view.nexthops()[index as usize]) else { continue };
                if let Action::Forward(header) | Action::Mapped(header) = value.action {
                    assert_eq!((&header.bytes()[..5], &header.bytes()[6..11]), (&mac(0)[..5], &mac(0)[..5]));
                    assert!(header.bytes()[5] >= 0x80, "{header:?}");
                }
            }
        }
        grace::leave(word);
        seen += 64;
        // Others want the processor.
        std::thread::sleep(Duration::from_micros(20));
    }
    seen
}

/// What a killed writer left is as before or after the change that it was at, or Linux's.
fn check_dead(region: &Region, before: &Outcomes, after: &Outcomes, worlds: [&World; 2]) {
    let view = region.view();
    let probes = probes();
    let now = all_outcomes(&view, &probes);
    for (((probe, now), before), after) in probes.iter().zip(&now).zip(before).zip(after) {
        for outcome in now {
            let linux = matches!(outcome, Outcome::Exception(_));
            assert!(
                linux || before.contains(outcome) || after.contains(outcome),
                "{probe}: {outcome:?}, not {before:?} or {after:?}"
            );
        }
    }
    for connection in worlds.iter().flat_map(|world| world.flows()) {
        for tuple in [connection.original, connection.reply] {
            let found = towpath_tables::flows::find(&view, &tuple);
            assert!(found.is_none_or(|(flow, _)| flow.connection == connection), "{tuple:?} is of {found:?}");
        }
    }
    let mapped: BTreeSet<_> = in_tables::read(&view).into_values().map(|value| value.inside).collect();
    let wanted = worlds.map(|world| world.mappings().iter().map(|mapping| mapping.inside.address()).collect());
    assert!(wanted.contains(&mapped), "{mapped:?} are mapped, and not {wanted:?}");
}

#[test]
fn tables_of_killed_writers_are_sound_and_can_be_taken_over() {
    let kills = std::env::var("TOWPATH_CRASHES").map_or(KILLS, |text| text.parse().expect("a number"));
    let mut region = Region::new(&sizes());
    let (head, readers): (&'static Head, Readers) = (region.head(), region.readers());
    // What Linux says by now, and what it said when a writer last was done with it all.
    let (mut world, mut done) = (World::new(), 0);
    let mut before = world.clone();
    drop(world.daemon(TableWriter::create(region.again(), readers.clone()).expect("tables")));
    let stop = Arc::new(AtomicBool::new(false));
    let (looking, stopped) = (region.again(), stop.clone());
    let reader = std::thread::spawn(move || read(looking, &stopped));
    let probes = probes();
    let mut random = Random(kills.into());
    let (mut killed, mut amid) = (0, 0);
    // A writer that hardly runs beside others is seldom amid a change: then more are killed.
    while killed < kills || amid <= kills / 10 && killed < 10 * kills {
        killed += 1;
        let delay = LIFE.as_nanos() as u32;
        // As often in the first tenth, when it takes over, as later.
        let delay = if random.below(2) == 0 { delay } else { delay / 10 };
        kill_one(&region, &world, Duration::from_nanos(random.below(delay).into()));
        region.refresh();
        let begun = head.begun.load();
        amid += u32::from(begun != head.done.load());
        while done < begun {
            if done == head.done.load() {
                before = world.clone();
            }
            done += 1;
            world.apply(&step(done));
        }
        if head.done.load() == begun {
            before = world.clone();
        }
        let outcomes = |world: &World| all_outcomes(&fresh(world).tables().view(), &probes);
        check_dead(&region, &outcomes(&before), &outcomes(&world), [&before, &world]);
        // The next one takes over what this one left, or what it makes of it.
        if random.below(2) == 0 {
            let tables = TableWriter::adopt(region.again(), readers.clone()).expect("tables that can be taken over");
            equal(&mut world.daemon(tables), &world);
            head.done.store(begun);
            region.refresh();
        }
    }
    stop.store(true, Ordering::Relaxed);
    let seen = reader.join().expect("the reader failed");
    println!(
        "{killed} writers killed, {amid} amid a change, {done} changes, {} growths, {seen} look-ups",
        head.grown.load()
    );
    assert!(amid > kills / 10 && head.grown.load() > 3 && done > kills && seen > 10_000);
}
