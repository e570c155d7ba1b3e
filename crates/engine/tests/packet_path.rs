//! The XDP program, as BPF_PROG_TEST_RUN runs it in the kernel, against the packet path's table of cases and against
//! the native build. Needs CAP_BPF and CAP_NET_ADMIN; no interface but loopback is used.

use std::ffi::{CStr, CString};
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;
use towpath_engine::{Engine, Frames, Options, Site, Trace};
use towpath_pipeline::cases::translate::{Translation, translations};
use towpath_pipeline::cases::{self, Case, Expect, frames, world::INGRESS, world::World};
use towpath_pipeline::packet::Packet;
use towpath_pipeline::{Verdict, process};
use towpath_tables::Reason;
use towpath_tables::backing::PerTable;
use towpath_tables::clock;
use towpath_tables::mapping::Way;
use towpath_tables::mix;
use towpath_tables::record::{TableId, port_flags};
use towpath_tables::trace::Wanted;

/// Bytes in a test run's first buffer (net/bpf/test_run.c, bpf_prog_test_run_xdp): a page without the room before
/// and the shared info behind.
const FIRST: usize = 4096 - 256 - 320;
const HEADROOM: usize = 256;
const BPF_MAP_UPDATE_ELEM: i32 = 2;
const BPF_PROG_LOAD: i32 = 5;
const BPF_OBJ_GET: i32 = 7;
const BPF_PROG_TEST_RUN: i32 = 10;
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_OBJ_GET_INFO_BY_FD: i32 = 15;
/// A device map serves only programs that agree on this with the first that used it.
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;

/// `union bpf_attr` (linux/bpf.h) for BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// `union bpf_attr` for commands on a map's element.
#[repr(C)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn bpf<T>(command: i32, attr: &mut T) -> std::io::Result<i32> {
    // SAFETY: `attr` is laid out as the command wants it, and what its pointers name outlives the call.
    match unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) } {
        -1 => Err(std::io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}

/// `bpf` for commands that return a new descriptor.
fn bpf_fd<T>(command: i32, attr: &mut T) -> std::io::Result<OwnedFd> {
    // SAFETY: the descriptor is new, and nobody else's.
    bpf(command, attr).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn object_get(path: &CStr) -> std::io::Result<OwnedFd> {
    bpf_fd(BPF_OBJ_GET, &mut [path.as_ptr() as u64, 0])
}

fn program_get(id: u32) -> std::io::Result<OwnedFd> {
    bpf_fd(BPF_PROG_GET_FD_BY_ID, &mut [id, 0, 0, 0])
}

/// A table's map, in this process's memory.
struct Mapping {
    id: TableId,
    memory: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(id: TableId, map: &OwnedFd, len: usize) -> Self {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping of the whole map.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, map.as_raw_fd(), 0) };
        assert_ne!(memory, libc::MAP_FAILED, "map {}: {}", id.name(), std::io::Error::last_os_error());
        Self { id, memory: memory.cast(), len }
    }

    fn write(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len, "map {}", self.id.name());
        // SAFETY: as long as the mapping; the program does not run meanwhile.
        unsafe { self.memory.copy_from_nonoverlapping(bytes.as_ptr(), self.len) }
    }

    fn read(&self) -> &[u8] {
        // SAFETY: as for `write`.
        unsafe { std::slice::from_raw_parts(self.memory, self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nothing refers to it any more.
        unsafe { libc::munmap(self.memory.cast(), self.len) };
    }
}

/// The engine of a network namespace of its own, with tables as large as those of a `World`.
struct Program {
    engine: Engine,
    fd: OwnedFd,
    devices: OwnedFd,
    known: Vec<u32>,
    mappings: Vec<Mapping>,
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Err(error) = self.engine.teardown() {
            eprintln!("{error}");
        }
    }
}

impl Program {
    fn load() -> Self {
        Self::load_with(Options::default())
    }

    fn load_with(options: Options) -> Self {
        pin_to_first_cpu();
        // SAFETY: gives this thread a network namespace of its own, and changes nothing else.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
        let world = World::new();
        let len = |id: TableId| world.table(id).len();
        let sizes = TableId::ALL.map(|id| (len(id) / id.element_size()).max(1));
        let engine = Site::prepare(options).and_then(|site| site.create(&PerTable(sizes)));
        let engine = engine.expect("an engine");
        let pinned = |name: &str| {
            let path = engine.shown().join(format!("{name}_new")).into_os_string().into_vec();
            object_get(&CString::new(path).expect("no zero bytes")).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let tables = TableId::ALL.into_iter().filter(|id| len(*id) > 0);
        let mappings = tables.map(|id| Mapping::new(id, &pinned(id.name()), len(id))).collect();
        let (devices, id) = (pinned("devices"), engine.program().expect("facts").id);
        let fd = program_get(id).unwrap_or_else(|error| panic!("program {id}: {error}"));
        Self { engine, fd, devices, known: Vec::new(), mappings }
    }

    /// Makes the maps what the router's tables are. All receivers are the loopback interface.
    fn configure(&mut self, world: &World) {
        for mapping in &self.mappings {
            mapping.write(world.table(mapping.id));
        }
        for slot in std::mem::take(&mut self.known) {
            self.set_device(slot, 0);
        }
        self.known.extend(world.devices());
        for slot in &self.known {
            self.set_device(*slot, 1);
        }
    }

    /// Names the interface for a slot, or none (0).
    fn set_device(&self, slot: u32, ifindex: u32) {
        // linux/bpf.h, bpf_devmap_val: an interface, and no program
        let value = [ifindex, 0];
        let (key, value) = (std::ptr::from_ref(&slot) as u64, std::ptr::from_ref(&value) as u64);
        let mut element = Element { map_fd: self.devices.as_raw_fd() as u32, padding: 0, key, value, flags: 0 };
        bpf(BPF_MAP_UPDATE_ELEM, &mut element).expect("a device map's element can be set");
    }

    /// Runs the program on a frame: its verdict and the frame afterwards.
    fn run(&self, frame: &[u8]) -> (u32, Vec<u8>) {
        run(&self.fd, frame)
    }

    /// The program that translates on a way, which is on the loopback interface; None where it is in no link (before Linux 6.6).
    fn translator(&self, way: Way) -> Option<OwnedFd> {
        let name = ["natout_1", "natin_1"][way as usize];
        let path = self.engine.shown().join(name).into_os_string().into_vec();
        let link = object_get(&CString::new(path).expect("no zero bytes")).ok()?;
        // linux/bpf.h, bpf_link_info: type, id, and the program's
        let mut info = [0u32; 3];
        let mut attr = [link.as_raw_fd() as u64 | (size_of_val(&info) as u64) << 32, info.as_mut_ptr() as u64];
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).expect("a link has facts");
        Some(program_get(info[2]).expect("its program"))
    }

    /// The first table that is not what the router's is.
    fn difference(&self, world: &World) -> Option<&'static str> {
        self.mappings.iter().find(|m| m.read() != world.table(m.id)).map(|m| m.id.name())
    }
}

fn run(program: &OwnedFd, frame: &[u8]) -> (u32, Vec<u8>) {
    let mut out = vec![0; frame.len() + 64];
    let mut attr = TestRun { prog_fd: program.as_raw_fd() as u32, ..attr(frame, &mut out, 1) };
    bpf(BPF_PROG_TEST_RUN, &mut attr).unwrap_or_else(|error| panic!("a test run of {} bytes: {error}", frame.len()));
    out.truncate(attr.data_size_out as usize);
    (attr.retval, out)
}

fn attr(frame: &[u8], out: &mut [u8], repeat: u32) -> TestRun {
    TestRun {
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_size_out: out.len() as u32,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        ..TestRun::default()
    }
}

/// Counters are by CPU; those of the first are compared.
fn pin_to_first_cpu() {
    // SAFETY: an empty set is valid; the set outlives the call.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        assert_eq!(libc::sched_setaffinity(0, size_of_val(&set), &set), 0, "{}", std::io::Error::last_os_error());
    }
}

fn check(program: &mut Program, case: &Case) -> Result<(), String> {
    let world = case.router();
    program.configure(&world);
    case.apply(&world);
    let (action, frame) = match &case.expect {
        Expect::Drop(_) => (XDP_DROP, &case.frame),
        Expect::NotAPort | Expect::Exception(..) => (XDP_PASS, &case.frame),
        Expect::Forward { frame, .. } => (XDP_REDIRECT, frame),
    };
    let outcome = program.run(&case.frame);
    if outcome.0 != action {
        return Err(format!("action {} instead of {action}", outcome.0));
    }
    if &outcome.1 != frame {
        return Err(format!("frame is {:02x?} instead of {frame:02x?}", outcome.1));
    }
    program.difference(&world).map_or(Ok(()), |table| Err(format!("table {table} is not as it should be")))
}

#[test]
fn every_case_in_the_kernel() {
    let mut program = Program::load();
    // Nothing travels beside the frame of a test run.
    let cases: Vec<_> = cases::all().into_iter().filter(|case| case.beside.is_none()).collect();
    let wrong: Vec<_> = cases
        .iter()
        .filter_map(|case| check(&mut program, case).err().map(|error| format!("{}: {error}", case.name)))
        .collect();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    println!("{} cases", cases.len());
}

#[test]
fn a_shadow_counts_every_case_and_touches_none() {
    let mut program = Program::load_with(Options { shadow: true, ..Options::default() });
    let cases: Vec<_> = cases::all().into_iter().filter(|case| case.beside.is_none()).collect();
    let check = |case: &Case| {
        let world = case.router();
        program.configure(&world);
        case.apply(&world);
        let action = if let Expect::Drop(_) = case.expect { XDP_DROP } else { XDP_PASS };
        if program.run(&case.frame) != (action, case.frame.clone()) {
            return Some(format!("{}: not passed as it came", case.name));
        }
        program.difference(&world).map(|table| format!("{}: table {table} is not what it would be", case.name))
    };
    let wrong: Vec<_> = cases.iter().filter_map(check).collect();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    let trace = Trace { frames: Frames::All, wanted: Wanted::Everything, rate: 1 };
    program.engine.set_trace(0, Some(trace)).expect("loaded with a trace");
}

#[test]
fn verifier_figures() {
    let program = Program::load();
    let facts = program.engine.program().expect("facts");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!(
        "kernel {}: {} instructions verified, {} of BPF, {} bytes of machine code",
        kernel.trim(),
        facts.verified_instructions,
        facts.instructions,
        facts.jited_bytes
    );
    assert!(facts.verified_instructions > 1000, "the verifier says how much it did");
    // Linux gives up at a million. A start waits for it.
    assert!(facts.verified_instructions < 250_000, "a quarter of the verifier's patience");
}

#[test]
fn what_nobody_attends_to_for_too_long_is_linux_s() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let mut program = Program::load_with(Options { patience: Some(PATIENCE), ..Options::default() });
    let verified = program.engine.program().expect("facts").verified_instructions;
    println!("{verified} instructions verified");
    assert!(verified < 250_000, "a quarter of the verifier's patience");
    let forwarded = |case: &Case| case.beside.is_none() && matches!(case.expect, Expect::Forward { .. });
    let case = cases::all().into_iter().find(forwarded).expect("a case");
    check(&mut program, &case).expect("it is forwarded while somebody is there");
    let world = case.router();
    world.config().heartbeat.store(clock::now() - PATIENCE.as_nanos() as u64 - 1);
    program.configure(&world);
    world.stats(INGRESS).exceptions[Reason::Unattended as usize].store(1);
    assert_eq!(program.run(&case.frame), (XDP_PASS, case.frame));
    assert_eq!(program.difference(&world), None);
}

#[test]
fn traces_pass_the_verifier() {
    let program = Program::load();
    for frames in [Frames::All, Frames::OneIn(NonZeroU32::MAX)] {
        let trace = Trace { frames, wanted: Wanted::Everything, rate: 1 };
        program.engine.set_trace(0, Some(trace)).expect("loaded with a trace");
        println!("{} instructions verified", program.engine.program().expect("facts").verified_instructions);
    }
    program.engine.set_trace(0, None).expect("loaded without");
}

#[test]
fn translators_pass_the_verifier() {
    let program = Program::load();
    program.engine.translate(1, true).expect("loaded and put on the loopback interface");
    assert_eq!(program.engine.translated().expect("known"), [1].into());
    program.engine.translate(1, false).expect("taken off");
    assert!(program.engine.translated().expect("known").is_empty());
}

fn check_translation(program: &mut Program, translator: &OwnedFd, case: &Translation) -> Result<(), String> {
    let world = case.router();
    program.configure(&world);
    case.apply(&world);
    let action = if case.after.is_some() { TC_ACT_UNSPEC } else { TC_ACT_SHOT };
    let outcome = run(translator, &case.frame);
    if outcome.0 != action {
        return Err(format!("action {} instead of {action}", outcome.0));
    }
    if let Some(after) = case.after.as_ref().filter(|after| **after != outcome.1) {
        return Err(format!("frame is {:02x?} instead of {after:02x?}", outcome.1));
    }
    program.difference(&world).map_or(Ok(()), |table| Err(format!("table {table} is not as it should be")))
}

#[test]
fn every_translation_in_the_kernel() {
    let mut program = Program::load();
    program.engine.translate(1, true).expect("put on the loopback interface");
    let [Some(out), Some(inward)] = [Way::Out, Way::In].map(|way| program.translator(way)) else {
        return println!("this kernel has filters in place of links");
    };
    // Nothing travels beside the packet of a test run.
    let cases: Vec<_> = translations().into_iter().filter(|case| !case.tagged).collect();
    let wrong: Vec<_> = cases
        .iter()
        .filter_map(|case| {
            let translator = if case.way == Way::Out { &out } else { &inward };
            check_translation(&mut program, translator, case).err().map(|error| format!("{}: {error}", case.name))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    program.engine.translate(1, false).expect("taken off");
    println!("{} cases", cases.len());
}

struct Random(mix::Random);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0.below(limit.max(1) as u32) as usize
    }

    /// A frame that has something in common with one of these.
    fn mutate(&mut self, frames: &[Vec<u8>]) -> Vec<u8> {
        let mut frame = frames[self.below(frames.len())].clone();
        for _ in 0..self.below(4) {
            // The headers are where it matters.
            let at = self.below(frame.len().min(80));
            frame[at] = match self.below(3) {
                0 => self.0.bits() as u8,
                1 => frame[at] ^ 1 << self.below(8),
                _ => frames[self.below(frames.len())].get(at).copied().unwrap_or(0),
            };
        }
        match self.below(8) {
            0 => frame.truncate(self.below(frame.len())),
            1 => frame.resize(frame.len() + self.below(70), 0xaa),
            2 => frame.resize(4000 + self.below(1000), 0xbb),
            _ => {}
        }
        frame.resize(frame.len().max(14), 0);
        // Most would end at the checksum.
        for at in [14, 18, 22] {
            if frame.len() >= at + 20 && frame[at - 2..at] == [8, 0] && self.below(8) != 0 {
                let end = frame.len();
                frames::fix4(&mut frame[at..end]);
            }
        }
        frame
    }
}

/// Routers with different settings.
fn routers() -> Vec<World> {
    use cases::world::{GROUP, HOP, HOP_DOUBLE, HOP_VLAN, IN, IN_VLAN, group, hop};
    let settings: [fn(&mut World); 7] = [
        |_| (),
        |world| world.flag(IN, port_flags::RP_STRICT | port_flags::ROUTE_LOCALNET),
        |world| world.flag(IN, port_flags::RP_LOOSE),
        |world| {
            world.flag(IN, port_flags::PARTIAL_CSUM);
            world.flag(IN_VLAN, port_flags::PARTIAL_CSUM);
        },
        |world| {
            world.default_route(0, group(GROUP));
            world.default_route(1, group(GROUP));
            world.nexthop(HOP).mtu.store(9000);
        },
        |world| {
            world.default_route(0, group(GROUP));
            world.default_route(1, group(GROUP));
            world.config().hash_seed.store(0x1234_5678);
            world.config().hash_policy[0].store(1);
            world.config().hash_policy[1].store(1);
            world.unflag(IN, port_flags::REDIRECTS);
        },
        |world| {
            world.default_route(0, hop(HOP_VLAN));
            world.default_route(1, hop(HOP_DOUBLE));
            world.nexthop(HOP_VLAN).mtu.store(9000);
            world.nexthop(HOP_DOUBLE).mtu.store(9000);
        },
    ];
    settings
        .into_iter()
        .map(|set| {
            let mut world = World::new();
            set(&mut world);
            world
        })
        .collect()
}

/// The same frames through both builds of the packet path, one after another over the same tables.
#[test]
fn random_frames_in_the_kernel_and_natively() {
    let (seed, frames) = seed_and_frames();
    let mut random = Random(mix::Random(seed));
    let cases = cases::all();
    let all: Vec<_> = cases.iter().map(|case| case.frame.clone()).collect();
    // However many cases there are of other things.
    let of_mappings = cases.iter().filter(|case| case.name.starts_with("mapping"));
    let of_mappings: Vec<_> = of_mappings.map(|case| case.frame.clone()).collect();
    let mut program = Program::load();
    let with_more = [
        "mapping, IPv4, prefixes, TCP, both ends",
        "mapping, IPv6, hosts, UDP, both ends",
        "mapping of ports, IPv4, TCP, both ends",
        "mapping of ports, IPv6, UDP, both ends",
        "mapping, from VLAN to VLAN",
        "flow, IPv4, TCP, both, Original, 22 bytes",
        "flow, IPv6, UDP, both, Reply, 22 bytes",
        "filter, IPv4, one among many",
        "filter, IPv6, one among many",
        "filter, IPv4, dropped in a passed prefix",
    ];
    let with_more = cases.iter().filter(|case| with_more.contains(&case.name.as_str())).map(Case::router);
    let routers: Vec<World> = routers().into_iter().chain(with_more).collect();
    assert_eq!(routers.len(), 17, "with mappings in five of them, with flows in two, with filters in three");
    let (mut forwarded, mut dropped, mut mapped) = (0, 0, 0);
    for world in &routers {
        program.configure(world);
        for number in 0..frames / routers.len() {
            let of = if random.below(8) == 0 { &of_mappings } else { &all };
            let frame = random.mutate(of);
            let mut packet = Packet::with_linear(&frame, HEADROOM, FIRST);
            let verdict = process(&mut packet, &world.slices(), INGRESS);
            let action = match verdict {
                Verdict::Forward(_) => XDP_REDIRECT,
                Verdict::Drop => XDP_DROP,
                Verdict::Exception(_) | Verdict::NotAPort => XDP_PASS,
            };
            dropped += usize::from(action == XDP_DROP);
            forwarded += usize::from(action == XDP_REDIRECT);
            let outcome = program.run(&frame);
            assert_eq!(outcome.0, action, "seed {seed}, frame {number}: natively {verdict:?}: {frame:02x?}");
            assert_eq!(outcome.1, packet.bytes(), "seed {seed}, frame {number}: {verdict:?}: {frame:02x?}");
            let stats = program.mappings.iter().find(|m| m.id == TableId::Stats).expect("there is one");
            assert!(stats.read() == world.table(TableId::Stats), "seed {seed}, frame {number}: counters: {frame:02x?}");
        }
        assert_eq!(program.difference(world), None, "seed {seed}");
        mapped += world.mapping_stats().iter().flat_map(|of| &of.packets).map(|way| way.load()).sum::<u64>();
    }
    println!("{forwarded} of them forwarded, {dropped} dropped, {mapped} times mapped");
    assert!(forwarded > frames / 10, "too few frames get far enough to prove anything");
    assert!(dropped > frames / 200, "too few frames meet filters to prove anything");
    assert!(mapped > frames as u64 / 50, "too few frames meet mappings to prove anything");
}

/// Where to begin, and how many: by the environment, so that what has failed can be run again.
fn seed_and_frames() -> (u64, usize) {
    let seed = std::env::var("TOWPATH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x7077_7061_7468);
    let frames = std::env::var("TOWPATH_FRAMES").ok().and_then(|n| n.parse().ok()).unwrap_or(70_000);
    println!("seed {seed} (TOWPATH_SEED), {frames} frames (TOWPATH_FRAMES)");
    (seed, frames)
}

/// So many bytes a test run of traffic control's programs wants (`bpf_prog_test_run_skb`, net/bpf/test_run.c): Linux 6.1 refuses a
/// frame with nothing behind its Ethernet header, 6.18 one without the whole IP header that its EtherType names.
fn least(frame: &[u8]) -> usize {
    14 + match frame[12..14] {
        [8, 0] => 20,
        [0x86, 0xdd] => 40,
        _ => 1,
    }
}

/// The same packets through both builds of the translators.
#[test]
fn random_packets_are_translated_alike_in_the_kernel_and_natively() {
    /// As much as a test run takes in one piece.
    const LARGEST: usize = 3000;
    let (seed, frames) = seed_and_frames();
    let mut random = Random(mix::Random(seed));
    let mut program = Program::load();
    program.engine.translate(1, true).expect("put on the loopback interface");
    let [Some(out), Some(inward)] = [Way::Out, Way::In].map(|way| program.translator(way)) else {
        return println!("this kernel has filters in place of links");
    };
    let cases: Vec<_> = translations().into_iter().filter(|case| !case.tagged).collect();
    let all: Vec<_> = cases.iter().map(|case| case.frame.clone()).collect();
    let (mut changed, mut dropped) = (0, 0);
    for mut case in cases {
        let world = case.router();
        program.configure(&world);
        for number in 0..frames / all.len() {
            let mut frame = random.mutate(&all);
            frame.resize(frame.len().clamp(least(&frame), LARGEST), 0);
            case.frame.clone_from(&frame);
            let after = case.run(&world);
            let outcome = run(if case.way == Way::Out { &out } else { &inward }, &frame);
            let action = if after.is_some() { TC_ACT_UNSPEC } else { TC_ACT_SHOT };
            assert_eq!(outcome.0, action, "seed {seed}, {}, packet {number}: {frame:02x?}", case.name);
            dropped += usize::from(after.is_none());
            if let Some(after) = after {
                assert_eq!(outcome.1, after, "seed {seed}, {}, packet {number}: {frame:02x?}", case.name);
                changed += usize::from(after != frame);
            }
        }
        assert_eq!(program.difference(&world), None, "seed {seed}, {}", case.name);
    }
    program.engine.translate(1, false).expect("taken off");
    println!("{changed} of them changed, {dropped} dropped");
    assert!(changed > frames / 50 && dropped > 0, "too few packets meet mappings to prove anything");
}

/// `union bpf_attr` for BPF_PROG_LOAD, as far as it is used.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// A program that does nothing but name slot 2 of `devices` as receiver.
fn bare_redirect(devices: RawFd) -> OwnedFd {
    let insn = |code: u8, registers: u8, imm: i32| {
        u64::from_le_bytes({
            let [a, b, c, d] = imm.to_le_bytes();
            [code, registers, 0, 0, a, b, c, d]
        })
    };
    // r1 = map; r2 = slot; r3 = XDP_PASS; call bpf_redirect_map; exit
    let insns = [
        insn(0x18, 0x11, devices),
        0,
        insn(0xb7, 2, 2),
        insn(0xb7, 3, XDP_PASS as i32),
        insn(0x85, 0, 51),
        insn(0x95, 0, 0),
    ];
    let mut log = [0u8; 4096];
    let mut attr = ProgLoad {
        prog_type: 6,
        insn_cnt: insns.len() as u32,
        insns: insns.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 1,
        log_size: 4096,
        log: log.as_mut_ptr() as u64,
        kern_version: 0,
        prog_flags: BPF_F_XDP_HAS_FRAGS,
    };
    bpf_fd(BPF_PROG_LOAD, &mut attr)
        .unwrap_or_else(|error| panic!("bare redirect: {error}: {}", String::from_utf8_lossy(&log)))
}

/// 10th percentile and median of many runs, in nanoseconds per packet. A run is short enough that a packet which
/// begins with 255 hops left is forwarded to its end.
fn cost(program: RawFd, frame: &[u8]) -> (u32, u32) {
    let mut out = vec![0; frame.len() + 64];
    let mut costs: Vec<u32> = (0..100)
        .map(|_| {
            let mut attr = TestRun { prog_fd: program as u32, ..attr(frame, &mut out, 200) };
            bpf(BPF_PROG_TEST_RUN, &mut attr).expect("a test run");
            attr.duration
        })
        .collect();
    costs.sort();
    (costs[10], costs[50])
}

/// What one packet costs in the program alone, beside a bare redirect. Printed, not judged: other work on the
/// machine only ever adds.
#[test]
fn cost_of_a_packet() {
    let mut program = Program::load();
    let world = World::new();
    // The same packet runs again and again: make its next hop write the address that it arrived with.
    let [a, b, c, d, e, f] = cases::world::mac(cases::world::IN);
    world.nexthop(cases::world::HOP).l2[0].store(u64::from_ne_bytes([a, b, c, d, e, f, 2, 0]));
    program.configure(&world);
    let bare = bare_redirect(program.devices.as_raw_fd());
    let find = |name: &str| cases::all().into_iter().find(|case| case.name == name).expect("a case of this name").frame;
    let ipv4 = find("IPv4, longest life");
    let mut ipv6 = find("IPv6, padding 0");
    ipv6[21] = 255;
    for (name, program, frame) in [
        ("bare redirect", bare.as_raw_fd(), &ipv4),
        ("IPv4", program.fd.as_raw_fd(), &ipv4),
        ("IPv6", program.fd.as_raw_fd(), &ipv6),
        ("L2 multicast", program.fd.as_raw_fd(), &find("IPv4, multicast frame")),
    ] {
        let (floor, median) = cost(program, frame);
        println!("{name}: {floor} ns at the 10th percentile, {median} ns in the median");
    }
    for (name, family) in [
        ("flow, IPv4, TCP, untranslated, Original, 22 bytes", 4),
        ("flow, IPv6, UDP, untranslated, Original, 22 bytes", 6),
    ] {
        let case = cases::all().into_iter().find(|case| case.name == name).expect("a case of this name");
        let (world, mut frame) = (case.router(), case.frame);
        world.nexthop(cases::world::HOP).l2[0].store(u64::from_ne_bytes([a, b, c, d, e, f, 2, 0]));
        program.configure(&world);
        frame[if family == 4 { 22 } else { 21 }] = 255;
        if family == 4 {
            frames::fix4(&mut frame[14..]);
        }
        let (floor, median) = cost(program.fd.as_raw_fd(), &frame);
        let passed = program.mappings.iter().find(|m| m.id == TableId::Stats).expect("there is one");
        assert!(passed.read() != world.table(TableId::Stats), "{name}: counted");
        println!("{name}: {floor} ns at the 10th percentile, {median} ns in the median");
    }
}
