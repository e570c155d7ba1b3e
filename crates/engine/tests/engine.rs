//! The engine on veth ports of a router in network namespaces; needs root.

mod common;

use common::{LIMIT, NEXTHOP, Result, Rig, fast, sizes};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use towpath_engine::{
    Changed, Engine, Error, GraceMethod, Mode, Options, Request, Site, TransmitSupport, TransmitWatch, can_transmit,
};
use towpath_filter::{Capture, Filter, Layer, instruction};
use towpath_lab::{PacketSocket, packet, wait_for};
use towpath_tables::backing::Backing;
use towpath_tables::clock;
use towpath_tables::flow::acceptance;
use towpath_tables::grace::NoReaders;
use towpath_tables::record::{Family, NO_VLANS, PORT_SLOTS, TableId, port_flags};
use towpath_tables::writer::TableWriter;
use towpath_tables::writer::port_totals;
use towpath_tables::{Connection, Obstacle, Reason, Tuple};

/// One test at a time: they count packets at a pace.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn attach(rig: &Rig, engine: &Engine) -> Result {
    let requests = rig.requests()?;
    Ok(rig.on_router(|| engine.attach(&requests))?)
}

#[test]
fn forwards_from_driver_to_driver_and_leaves_nothing_behind() -> Result {
    let _alone = alone();
    let rig = Rig::new("engine")?;
    let engine = rig.engine(&sizes()?)?;
    let facts = engine.program()?;
    println!(
        "kernel {}: {} instructions verified, {} in the program, {} bytes of machine code",
        std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        facts.verified_instructions,
        facts.instructions,
        facts.jited_bytes
    );
    assert!(facts.verified_instructions > 0);
    assert_eq!((rig.xdp("eth0")?, rig.xdp("eth1")?), (None, None), "nothing is attached before it is asked for");

    attach(&rig, &engine)?;
    assert_eq!((rig.xdp("eth0")?, rig.xdp("eth1")?), (Some(facts.id.into()), Some(facts.id.into())));
    let ingress = rig.requests()?[0].slot;
    let arrived = rig.arrived()?;
    rig.send(100)?;
    rig.await_arrival(arrived, 100)?;
    assert_eq!(fast(&engine, ingress), 100);
    let tables = engine.tables();
    assert_eq!(tables.view().nexthops()[NEXTHOP as usize].hit.load(), 1);
    let memory = engine.memory()?;
    assert_eq!(memory.len(), TableId::ALL.len() + 2);
    assert!(memory.iter().all(|(_, bytes)| *bytes > 0), "{memory:?}");

    rig.on_router(|| engine.teardown())?;
    assert_eq!((rig.xdp("eth0")?, rig.xdp("eth1")?), (None, None));
    assert!(!rig.site()?.exists(), "pins are gone");
    let arrived = rig.arrived()?;
    rig.send(10)?;
    rig.await_arrival(arrived, 10)?;
    assert_eq!(fast(&engine, ingress), 100, "Linux forwards again");
    Ok(())
}

#[test]
fn no_packet_is_lost_when_programs_come_are_replaced_and_go() -> Result {
    let _alone = alone();
    let rig = Rig::new("lossless")?;
    for port in ["eth0", "eth1"] {
        rig.router.run(["ethtool", "-K", port, "gro", "off"])?;
    }
    let ports = rig.requests()?.map(|request| request.ifindex);
    let notices = rig.on_router(|| Site::prepare(Options::default())?.announce(&ports))?;
    let undo: Vec<_> = notices.iter().filter_map(|notice| notice.undo.as_deref()).collect();
    assert_eq!(undo, ["ethtool -K eth0 gro off", "ethtool -K eth1 gro off"]);

    let engine = rig.engine(&sizes()?)?;
    let ingress = rig.requests()?[0].slot;
    println!("attach");
    rig.without_loss(|| attach(&rig, &engine))?;
    assert!(fast(&engine, ingress) > 0);
    println!("replace");
    drop(engine);
    let (engine, before) = rig.without_loss(|| {
        let site = rig.site()?;
        let engine = rig.on_router(|| site.left()?.adopt())?;
        let before = fast(&engine, ingress);
        Ok((engine, before))
    })?;
    assert!(fast(&engine, ingress) > before, "the new program goes on with the old tables");
    println!("detach");
    rig.without_loss(|| Ok(rig.on_router(|| engine.teardown())?))?;
    assert_eq!((rig.xdp("eth0")?, rig.xdp("eth1")?), (None, None));
    assert!(rig.gro("eth0")? && rig.gro("eth1")?, "GRO stays on, as announced");
    Ok(())
}

#[test]
fn a_family_is_stopped_before_its_tables_are_taken_over() -> Result {
    let _alone = alone();
    let rig = Rig::new("brake")?;
    let engine = rig.engine(&sizes()?)?;
    attach(&rig, &engine)?;
    let ingress = rig.requests()?[0].slot;
    rig.send(10)?;
    wait_for(LIMIT, "packets are forwarded", || (fast(&engine, ingress) == 10).then_some(()))?;
    drop(engine);
    let site = rig.site()?;
    let left = rig.on_router(|| site.left())?;
    left.config().pull(Family::V4, Reason::PolicyTc);
    rig.send(10)?;
    let engine = rig.on_router(|| left.adopt())?;
    let tables = engine.tables();
    let totals = || port_totals(&tables.view(), ingress);
    wait_for(LIMIT, "packets are exceptions", || (totals().exceptions[Reason::PolicyTc as usize] == 10).then_some(()))?;
    assert_eq!(fast(&engine, ingress), 10);
    // The writer's brake is the same.
    tables.brake().release(tables.view().config());
    rig.send(10)?;
    wait_for(LIMIT, "packets are forwarded again", || (fast(&engine, ingress) == 20).then_some(()))?;
    rig.on_router(|| engine.teardown())?;
    Ok(())
}

/// The program reads what is written in a place that did not exist before the table grew.
fn reads_the_last_nexthop(rig: &Rig, engine: &Engine) -> Result {
    let tables = engine.tables();
    let view = tables.view();
    let last = view.nexthops().len() - 1;
    let (old, new) = (&view.nexthops()[NEXTHOP as usize], &view.nexthops()[last]);
    for (from, to) in
        [(&old.port, &new.port), (&old.device, &new.device), (&old.mtu, &new.mtu), (&old.state, &new.state)]
    {
        to.store(from.load());
    }
    for (from, to) in old.l2.iter().zip(&new.l2) {
        to.store(from.load());
    }
    view.roots()[0].direct[0xc613].store(last as u32);
    let (arrived, ingress) = (rig.arrived()?, rig.requests()?[0].slot);
    let before = fast(engine, ingress);
    rig.send(50)?;
    rig.await_arrival(arrived, 50)?;
    assert_eq!(fast(engine, ingress) - before, 50);
    assert_eq!(new.hit.load(), 1);
    Ok(())
}

#[test]
fn tables_grow_before_they_are_used() -> Result {
    let _alone = alone();
    let rig = Rig::new("staged")?;
    let engine = rig.engine(&sizes()?)?;
    let (mut tables, first) = (engine.tables(), engine.program()?.id);
    let wanted = tables.view().nexthops().len() * 3 + 1;
    rig.on_router(|| tables.grow(TableId::Nexthops, wanted))?;
    attach(&rig, &engine)?;
    assert_ne!(engine.program()?.id, first, "that one knew only the smaller table");
    reads_the_last_nexthop(&rig, &engine)
}

#[test]
fn tables_grow_while_packets_flow() -> Result {
    let _alone = alone();
    let rig = Rig::new("growth")?;
    let engine = rig.engine(&sizes()?)?;
    attach(&rig, &engine)?;
    let mut tables = engine.tables();
    let growing =
        [TableId::Vlans, TableId::Roots, TableId::Nodes, TableId::Nexthops, TableId::NexthopKeys, TableId::Groups];
    tables.view().groups()[3].buckets[9].store(77);
    let first = engine.program()?.id;
    rig.without_loss(|| {
        Ok(rig.on_router(|| {
            growing.into_iter().try_for_each(|table| tables.grow(table, tables.view().elements(table) * 3 + 1))
        })?)
    })?;
    let (view, before) = (tables.view(), sizes()?);
    for table in TableId::ALL {
        let times = if growing.contains(&table) { before.get(table) * 3 + 1 } else { before.get(table) };
        assert_eq!(view.elements(table), times, "{}", table.name());
    }
    assert_eq!(view.groups()[3].buckets[9].load(), 77);
    assert!(view.groups()[64..].iter().flat_map(|group| &group.buckets).all(|bucket| bucket.load() == 0));
    assert_ne!(engine.program()?.id, first);
    assert_eq!(rig.xdp("eth0")?, Some(engine.program()?.id.into()));

    reads_the_last_nexthop(&rig, &engine)?;
    let full = rig.on_router(|| tables.grow(TableId::Ports, 1000)).unwrap_err();
    assert!(full.to_string().contains("table ports is full with 256 entries"), "{full}");
    rig.on_router(|| engine.teardown())?;
    Ok(())
}

#[test]
fn a_growth_that_a_crash_interrupted_is_finished_or_discarded() -> Result {
    let _alone = alone();
    let rig = Rig::new("crash")?;
    let engine = rig.engine(&sizes()?)?;
    attach(&rig, &engine)?;
    let folder = engine.shown();
    let mut tables = engine.tables();
    rig.on_router(|| tables.grow(TableId::Groups, 200))?;
    // As it is between the replacement of the programs and that of the names: the table in use has the new name. And
    // a growth that got no further than making a table.
    std::fs::rename(folder.join("groups"), folder.join("groups_new"))?;
    for (name, value) in [("groups", "1024"), ("nodes_new", "64")] {
        let path = folder.join(name).display().to_string();
        let spec = ["type", "array", "key", "4", "value", value, "entries", "9", "name", name, "flags", "1024"];
        rig.on_router(|| std::process::Command::new("bpftool").args(["map", "create", &path]).args(spec).status())?;
    }
    assert!(folder.join("groups").exists() && folder.join("nodes_new").exists());
    drop((engine, tables));

    let site = rig.site()?;
    let engine = rig.on_router(|| site.left()?.adopt())?;
    assert_eq!(engine.tables().view().elements(TableId::Groups), 200);
    let names: Vec<_> =
        std::fs::read_dir(&folder)?.map(|entry| entry.map(|e| e.file_name())).collect::<std::io::Result<_>>()?;
    assert!(!names.iter().any(|name| name.to_string_lossy().ends_with("_new")), "{names:?}");
    rig.on_router(|| engine.teardown())?;
    Ok(())
}

#[test]
fn packets_flow_without_the_process_and_new_tables_replace_old_ones_without_loss() -> Result {
    let _alone = alone();
    let rig = Rig::new("takeover")?;
    let engine = rig.engine(&sizes()?)?;
    attach(&rig, &engine)?;
    let first = engine.program()?.id;
    drop(engine);
    assert_eq!(rig.xdp("eth0")?, Some(first.into()));
    assert_eq!(rig.site()?.attached()?.len(), 2);
    let second = rig.without_loss(|| {
        let engine = rig.engine(&sizes()?.with(TableId::Groups, 99))?;
        assert_eq!(rig.xdp("eth0")?, Some(first.into()), "the old program stays until the new tables are filled");
        attach(&rig, &engine)?;
        Ok(engine)
    })?;
    assert_eq!(rig.xdp("eth0")?, Some(second.program()?.id.into()));
    assert!(fast(&second, rig.requests()?[0].slot) > 0);
    // A third that is given up before it is attached changes nothing.
    drop(rig.engine(&sizes()?)?);
    drop(second);
    let site = rig.site()?;
    let engine = rig.on_router(|| site.left()?.adopt())?;
    assert_eq!(engine.tables().view().elements(TableId::Groups), 99);
    drop(engine);
    let site = rig.site()?;
    rig.on_router(|| site.teardown())?;
    assert_eq!(rig.xdp("eth0")?, None);
    assert!(!rig.site()?.exists());
    Ok(())
}

#[test]
fn what_cannot_be_attached_is_named_and_nothing_is_changed() -> Result {
    let _alone = alone();
    let rig = Rig::new("refused")?;
    rig.router.run(["ethtool", "-K", "eth0", "gro", "off"])?;
    rig.router.run(["ip", "link", "add", "name", "br0", "type", "bridge"])?;
    let requests = rig.requests()?;
    let engine = rig.engine(&sizes()?)?;
    let with = |ifindex| [requests[0], towpath_engine::PortRequest { ifindex, slot: ifindex % 256 }];

    let bridge = with(rig.router.ifindex("br0")?);
    let error = rig.on_router(|| engine.attach(&bridge)).unwrap_err();
    assert!(matches!(&error, Error::NoNativeXdp { port, driver } if port == "br0" && driver == "bridge"), "{error}");
    let error = rig.on_router(|| engine.attach(&with(9999))).unwrap_err();
    assert!(matches!(error, Error::NoPort(9999)), "{error}");

    let id = engine.program()?.id.to_string();
    rig.router.run(["bpftool", "net", "attach", "xdpdrv", "id", &id, "dev", "eth1"])?;
    let error = rig.on_router(|| engine.attach(&requests)).unwrap_err();
    assert!(
        matches!(&error, Error::OtherProgram { port, name, mode: "native", .. } if port == "eth1" && name == "towpath"),
        "{error}"
    );
    assert!(error.to_string().contains(&format!("id {id}")), "{error}");
    assert_eq!(rig.xdp("eth1")?.map(|id| id.to_string()), Some(id), "left alone");

    assert_eq!((rig.xdp("eth0")?, rig.gro("eth0")?), (None, false));
    drop(engine);
    let site = rig.site()?;
    assert!(!site.exists());
    let error = rig.on_router(|| site.left()?.adopt()).unwrap_err();
    assert!(matches!(error, Error::Incomplete { .. }), "{error}");

    // The bridge can be had in generic mode.
    let site = rig.on_router(|| Site::prepare(Options { mode: Mode::Generic, ..Options::default() }))?;
    let sizes = sizes()?;
    let engine = rig.on_router(|| site.create(&sizes))?;
    rig.on_router(|| engine.attach(&bridge[1..]))?;
    assert_eq!(engine.ports(), [bridge[1].ifindex]);
    rig.on_router(|| engine.teardown())?;
    Ok(())
}

#[test]
fn a_port_that_is_down_or_removed_is_not_redirected_to() -> Result {
    let _alone = alone();
    let rig = Rig::new("ports")?;
    let engine = rig.engine(&sizes()?)?;
    let [ingress, egress] = rig.requests()?;
    for request in [ingress, egress] {
        rig.on_router(|| engine.apply(Request::AddPort { ifindex: request.ifindex, slot: request.slot }))?;
    }
    let mut expected = 0;
    for (up, fast_path) in [(false, false), (true, true)] {
        rig.on_router(|| engine.apply(Request::PortState { ifindex: egress.ifindex, up }))?;
        let arrived = rig.arrived()?;
        rig.send(20)?;
        // Linux, which knows that the port is up all the time, forwards what the engine does not.
        rig.await_arrival(arrived, 20)?;
        expected += if fast_path { 20 } else { 0 };
        assert_eq!(fast(&engine, ingress.slot), expected, "engine told that the port is up: {up}");
    }
    rig.on_router(|| engine.apply(Request::RemovePort { ifindex: egress.ifindex }))?;
    assert_eq!(engine.ports(), [ingress.ifindex]);
    let arrived = rig.arrived()?;
    rig.send(20)?;
    rig.await_arrival(arrived, 20)?;
    assert_eq!(fast(&engine, ingress.slot), expected);
    // A port that vanishes with its namespace does not hinder the rest.
    rig.router.run(["ip", "link", "del", "eth0"])?;
    rig.on_router(|| engine.teardown())?;
    assert!(!rig.site()?.exists());
    Ok(())
}

#[test]
fn a_veth_transmits_only_while_its_peer_can_receive() -> Result {
    let _alone = alone();
    let rig = Rig::new("transmit")?;
    let egress = rig.router.ifindex("eth1")?;
    let mut watch = rig.on_router(TransmitWatch::open)?;
    let support = || rig.on_router(|| can_transmit(egress));
    let able = [TransmitSupport::Full, TransmitSupport::SingleBuffer];
    let wire = rig.sink.packet_socket("eth0")?;
    assert!(able.contains(&support()?), "{:?}", support()?);
    rig.sink.run(["ethtool", "-K", "eth0", "gro", "off"])?;
    assert!(matches!(support()?, TransmitSupport::None(why) if why.contains("gro on")));
    if watch.announces() {
        wait_for(LIMIT, "the change to be announced", || {
            let changed = watch.wait(Duration::from_millis(100)).ok()?;
            matches!(changed, Changed::These(ports) if ports.contains(&egress)).then_some(())
        })?;
    }
    rig.sink.run(["ethtool", "-K", "eth0", "gro", "on"])?;
    assert!(able.contains(&support()?), "{:?}", support()?);
    println!("{:?}, changes announced: {}", support()?, watch.announces());
    // A frame sent now comes behind whatever the questions may have sent.
    let frame = |kind| [[0; 12].as_slice(), &[0x88, kind], &[0; 46]].concat();
    rig.router.packet_socket("eth1")?.send(&frame(0xb6))?;
    let mut seen = Vec::new();
    wait_for(LIMIT, "the last frame", || {
        seen.extend(wire.drain().ok()?.into_iter().map(|frame| frame.bytes));
        seen.contains(&frame(0xb6)).then_some(())
    })?;
    assert!(!seen.iter().any(|bytes| bytes.starts_with(&frame(0xb5)[..14])), "nothing is sent to find out");
    Ok(())
}

#[test]
fn lost_announcements_of_abilities_are_told() -> Result {
    let _alone = alone();
    let rig = Rig::new("announced")?;
    let mut watch = rig.on_router(TransmitWatch::open)?;
    if !watch.announces() {
        return Ok(());
    }
    rig.sink.sh("for i in $(seq 500); do ethtool -K eth0 gro off; ethtool -K eth0 gro on; done")?;
    wait_for(LIMIT, "the loss", || (watch.wait(Duration::ZERO).ok()? == Changed::Any).then_some(()))?;
    rig.sink.run(["ethtool", "-K", "eth0", "gro", "off"])?;
    let egress = rig.router.ifindex("eth1")?;
    wait_for(LIMIT, "what is announced then", || {
        (watch.wait(Duration::from_millis(100)).ok()? == Changed::These(vec![egress])).then_some(())
    })?;
    Ok(())
}

#[test]
fn both_ways_to_wait_for_programs_work() -> Result {
    assert!(matches!(GraceMethod::choose()?, GraceMethod::Membarrier));
    for method in [GraceMethod::choose()?, GraceMethod::map_update()?] {
        method.wait()?;
        method.wait()?;
    }
    Ok(())
}

/// A frame to the router that reaches the sender's device with its VLAN tag beside it: a bridge on that device forwards it.
fn bridge(rig: &Rig) -> Result<PacketSocket> {
    rig.sender.sh("ip link add name bridge type bridge; ip link add name in type veth peer name out
         ip link set out master bridge; ip link set eth0 master bridge
         for port in bridge in out; do ip link set $port up; done
         ethtool -K in txvlan off tx-vlan-stag-hw-insert off; ethtool -K eth0 txvlan on tx-vlan-stag-hw-insert on")?;
    Ok(rig.sender.packet_socket("in")?)
}

/// What happened to packets of a port: forwarded, and exceptions for a reason.
fn outcome(engine: &Engine, slot: u32, reason: Reason) -> (u64, u64) {
    let tables = engine.tables();
    let view = tables.view();
    let all = view.stats().iter().skip(slot as usize).step_by(view.elements(TableId::Ports));
    let exceptions = all.map(|stats| stats.exceptions[reason as usize].load()).sum();
    (fast(engine, slot), exceptions)
}

/// Lets the engine look beside the frames of the first port, which has a VLAN sub-interface with tag 100 (in another slot).
fn look_beside(rig: &Rig, engine: &Engine) -> Result<(u32, u32)> {
    let tables = engine.tables();
    let view = tables.view();
    let slot = rig.requests()?[0].slot;
    let sub = (slot + 128) % PORT_SLOTS;
    let (port, sub_port) = (&view.ports()[slot as usize], &view.ports()[sub as usize]);
    let seen = rig.on_router(|| engine.sees_beside(port.ifindex.load()))?;
    let flags = port.flags.load() | port_flags::PARTIAL_CSUM | if seen { port_flags::BESIDE } else { 0 };
    sub_port.mac.store(port.mac.load());
    sub_port.mtu.store(port.mtu.load());
    sub_port.flags.store(flags | port_flags::VLAN);
    sub_port.vlans.store(NO_VLANS);
    sub_port.vlan.store(0x8100 << 16 | 100);
    view.vlans()[0].slots[50].store(sub + 1);
    port.vlans.store(0);
    port.flags.store(flags);
    Ok((slot, sub))
}

#[test]
fn what_travels_beside_a_frame_is_seen_or_the_user_warned() -> Result {
    let _alone = alone();
    let rig = Rig::new("beside")?;
    let engine = rig.engine(&sizes()?)?;
    let ports = rig.requests()?.map(|request| request.ifindex);
    let notices = rig.on_router(|| Site::prepare(Options::default())?.announce(&ports))?;
    let warned = notices.iter().filter(|notice| notice.text.contains("txvlan off")).count();
    attach(&rig, &engine)?;
    let (slot, sub) = look_beside(&rig, &engine)?;
    let seen = rig.on_router(|| engine.sees_beside(ports[0]))?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let version: Vec<u32> = kernel.split('.').map_while(|number| number.parse().ok()).collect();
    assert_eq!(seen, version >= vec![6, 3], "kernel {}: {notices:?}", kernel.trim());
    assert_eq!(warned, if seen { 0 } else { ports.len() }, "{notices:?}");

    // A packet without a UDP checksum looks as if that were left to a device.
    let mut bare = rig.frame.clone();
    bare[40..42].fill(0);
    let socket = rig.sender.packet_socket("eth0")?;
    let counted = || (outcome(&engine, slot, Reason::PartialChecksum), fast(&engine, sub));
    let arrived = rig.arrived()?;
    socket.send(&bare)?;
    rig.await_arrival(arrived, 1)?;
    assert_eq!(counted(), (if seen { (1, 0) } else { (0, 1) }, 0));

    // Here it is: the sender's UDP leaves the checksum to the device, which leaves it to whoever needs it.
    rig.sender.run(["ethtool", "-K", "eth0", "tx", "on"])?;
    rig.sender.sh(&format!(
        "ip address add 198.18.0.2/24 dev eth0; ip route add 198.19.0.0/16 via 198.18.0.1
         ip neighbour replace 198.18.0.1 lladdr {} dev eth0",
        rig.router.mac("eth0")?.map(|byte| format!("{byte:02x}")).join(":")
    ))?;
    let wire = rig.sink.packet_socket("eth0")?;
    let sent = rig.sender.enter(|| {
        let socket = std::net::UdpSocket::bind("198.18.0.2:1000")?;
        socket.send_to(&[7; 18], "198.19.0.1:2000")
    })?;
    assert_eq!(sent?, 18);
    let frame = wire.receive_matching(LIMIT, |frame| frame.bytes.ends_with(&[7; 18]))?.ok_or("the packet in time")?;
    let complete =
        packet::udp(([0; 6], [0; 6]), ("198.18.0.2".parse()?, "198.19.0.1".parse()?), (1000, 2000), &[7; 18]);
    assert_eq!(frame.bytes[34..], complete[34..], "completed by Linux");
    assert_eq!(counted(), (if seen { (1, 1) } else { (0, 2) }, 0));
    if !seen {
        return Ok(());
    }

    // Tags: one of a sub-interface, and one that no interface has.
    let bridged = bridge(&rig)?;
    let tagged = |id: u8| [&rig.frame[..12], &[0x81, 0, 0, id], &rig.frame[12..]].concat();
    let arrived = rig.arrived()?;
    bridged.send(&tagged(100))?;
    rig.await_arrival(arrived, 1)?;
    assert_eq!(counted(), ((1, 1), 1));
    bridged.send(&tagged(101))?;
    wait_for(LIMIT, "the unknown VLAN to be an exception", || {
        (outcome(&engine, slot, Reason::UnsupportedEncap) == (1, 1)).then_some(())
    })?;
    rig.send(1)?;
    rig.await_arrival(arrived, 2)?;
    assert_eq!(counted(), ((2, 1), 1), "Linux does not forward it either");
    rig.on_router(|| engine.teardown())?;
    Ok(())
}

/// Captures of what goes to a UDP port.
fn to_port(port: u32, only: Option<u32>) -> Capture {
    let (load, end) = (instruction(0x28, 0, 0, 36), [instruction(0x06, 0, 0, 1), instruction(0x06, 0, 0, 0)]);
    let code = [load, instruction(0x15, 0, 1, port)].into_iter().chain(end).collect();
    Capture { filter: Filter::new(Layer::Link, code).expect("a filter"), only }
}

#[test]
fn what_captures_match_goes_to_linux_and_is_counted() -> Result {
    let _alone = alone();
    let rig = Rig::new("capture")?;
    let engine = rig.engine(&sizes()?)?;
    attach(&rig, &engine)?;
    let [entry, exit] = rig.requests()?;
    let counted = |engine: &Engine| outcome(engine, entry.slot, Reason::PolicyCapture);
    for (captures, taken) in [
        (vec![], false),
        (vec![to_port(2000, None)], true),
        (vec![to_port(2001, None)], false),
        (vec![to_port(2000, Some(entry.ifindex))], true),
        (vec![to_port(2000, Some(exit.ifindex))], false),
        (vec![to_port(2001, None), to_port(2000, None)], true),
        (vec![], false),
    ] {
        rig.on_router(|| engine.set_captures(&captures))?;
        let (before, arrived) = (counted(&engine), rig.arrived()?);
        rig.send(3)?;
        rig.await_arrival(arrived, 3)?;
        let (fast, linux) = if taken { (0, 3) } else { (3, 0) };
        assert_eq!(counted(&engine), (before.0 + fast, before.1 + linux), "{captures:?}");
    }
    rig.without_loss(|| {
        for captures in [vec![to_port(2001, None)], vec![]] {
            rig.on_router(|| engine.set_captures(&captures))?;
        }
        Ok(())
    })?;
    let site = rig.site()?;
    assert!(!rig.on_router(|| site.left()?.has_captures())?);

    // They stay when the tables grow, and those that are left can be told.
    rig.on_router(|| engine.set_captures(&[to_port(2000, None)]))?;
    let mut tables = engine.tables();
    let nodes = tables.view().elements(TableId::Nodes);
    rig.on_router(|| tables.grow(TableId::Nodes, 2 * nodes))?;
    let (before, arrived) = (counted(&engine), rig.arrived()?);
    rig.send(3)?;
    rig.await_arrival(arrived, 3)?;
    assert_eq!(counted(&engine), (before.0, before.1 + 3));
    drop((tables, engine));
    let site = rig.site()?;
    let left = rig.on_router(|| site.left())?;
    assert!(left.has_captures()?);
    let engine = rig.on_router(|| left.adopt())?;
    rig.send(3)?;
    rig.await_arrival(arrived, 6)?;
    assert_eq!(counted(&engine), (before.0 + 3, before.1 + 3), "they are to be asked for again");
    Ok(rig.on_router(|| engine.teardown())?)
}

const WITH_FLOWS: Options = Options { mode: Mode::Native, sockets: false, shadow: false, flows: true, patience: None };

/// An engine with the connection of the rig's frame as a flow, and rules that let only flows pass.
fn with_flow(rig: &Rig, source_port: u16) -> Result<Engine> {
    let engine = rig.engine_with(WITH_FLOWS, &sizes()?)?;
    let mut writer = TableWriter::create(engine.tables(), NoReaders)?;
    let (source, destination) = ("198.18.0.2".parse()?, "198.19.0.1".parse()?);
    let original = Tuple { source, destination, source_port, destination_port: 2000, protocol: 17 };
    writer.set_flow(&Connection::new(original, original.inverse()).ok_or("two directions")?)?;
    writer.open_flows();
    writer.set_policy(Family::V4, Some(Obstacle { reason: Reason::PolicyNetfilter, flows: true }));
    rig.fill(&engine)?;
    rig.on_router(|| engine.watch_transmitted())?;
    Ok(engine)
}

/// What Linux accepted of the flow, per direction.
fn accepted(engine: &Engine) -> [u64; 2] {
    engine.tables().view().flows()[0].accepted.each_ref().map(|word| word.load())
}

fn exceptions(engine: &Engine, slot: u32, reason: Reason) -> u64 {
    port_totals(&engine.tables().view(), slot).exceptions[reason as usize]
}

/// Programs on the egress hook of a port: in links, and as filters of that name.
fn on_egress(rig: &Rig, port: &str) -> Result<usize> {
    const BPF_PROG_QUERY: i32 = 16;
    const BPF_TCX_EGRESS: u32 = 47;
    let index = rig.router.ifindex(port)?;
    // `union bpf_attr`: interface and kind first, a pointer to room for identifiers at 16 bytes, their number at 24.
    let mut ids = [0u32; 8];
    let mut attr = [0u64; 8];
    attr[0] = u64::from(index) | u64::from(BPF_TCX_EGRESS) << 32;
    (attr[2], attr[3]) = (ids.as_mut_ptr() as u64, ids.len() as u64);
    // SAFETY: the command writes to the attributes and the identifiers, both of which outlive the call.
    let query = || unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, attr.as_mut_ptr(), size_of_val(&attr)) };
    // Linux before 6.6 knows no such hook.
    let links = if rig.on_router(query) == 0 { attr[3] as u32 as usize } else { 0 };
    let filters = rig.router.run(["tc", "filter", "show", "dev", port, "egress"])?;
    Ok(links + filters.lines().filter(|line| line.contains("towpath_accept")).count())
}

#[test]
fn what_linux_transmits_is_looked_at_once_that_is_wanted() -> Result {
    let _alone = alone();
    let rig = Rig::new("watch")?;
    let both = || -> Result<(usize, usize)> { Ok((on_egress(&rig, "eth0")?, on_egress(&rig, "eth1")?)) };
    let engine = rig.engine_with(WITH_FLOWS, &sizes()?)?;
    rig.fill(&engine)?;
    attach(&rig, &engine)?;
    assert_eq!(both()?, (0, 0));
    for _ in 0..2 {
        rig.on_router(|| engine.watch_transmitted())?;
        assert_eq!(both()?, (1, 1));
    }
    rig.on_router(|| engine.teardown())?;
    let engine = rig.engine_with(Options::default(), &sizes()?)?;
    rig.fill(&engine)?;
    attach(&rig, &engine)?;
    rig.on_router(|| engine.watch_transmitted())?;
    assert_eq!(both()?, (0, 0), "there are to be no flows");
    rig.on_router(|| engine.teardown())?;
    Ok(())
}

#[test]
fn a_flow_passes_once_linux_has_accepted_a_packet_of_it() -> Result {
    let _alone = alone();
    let rig = Rig::new("accept")?;
    let engine = with_flow(&rig, 1000)?;
    attach(&rig, &engine)?;
    assert_eq!((on_egress(&rig, "eth0")?, on_egress(&rig, "eth1")?), (1, 1));
    let [from, to] = rig.requests()?.map(|request| request.slot);
    let wanted = |generation| [acceptance(generation, from, to), 0];
    let arrived = rig.arrived()?;
    rig.send(1)?;
    rig.await_arrival(arrived, 1)?;
    assert_eq!((accepted(&engine), fast(&engine, from)), (wanted(2), 0), "the first by Linux");
    assert_eq!(exceptions(&engine, from, Reason::FlowWaiting), 1);
    engine.config().beat(clock::now());
    rig.send(9)?;
    rig.await_arrival(arrived, 10)?;
    assert_eq!(fast(&engine, from), 9, "the others without");
    let tables = engine.tables();
    let counters = &tables.view().flows()[0].counters[0];
    assert_eq!((counters.packets.load(), counters.bytes.load()), (9, 9 * (20 + 8 + 18)));

    // Other rules: none passes, and Linux's packets count only once flows are open again.
    let generation = &tables.view().config().flow_generation;
    generation.store(3);
    rig.send(5)?;
    rig.await_arrival(arrived, 15)?;
    assert_eq!((accepted(&engine), fast(&engine, from)), (wanted(2), 9));
    generation.store(4);
    rig.send(1)?;
    rig.await_arrival(arrived, 16)?;
    assert_eq!((accepted(&engine), fast(&engine, from)), (wanted(4), 9));
    engine.config().beat(clock::now());
    rig.send(4)?;
    rig.await_arrival(arrived, 20)?;
    assert_eq!(fast(&engine, from), 13);
    rig.on_router(|| engine.teardown())?;
    assert_eq!((on_egress(&rig, "eth0")?, on_egress(&rig, "eth1")?), (0, 0));
    Ok(())
}

#[test]
fn what_linux_does_not_forward_of_a_flow_is_not_accepted() -> Result {
    let _alone = alone();
    let rig = Rig::new("notaccept")?;
    let engine = with_flow(&rig, 1000)?;
    attach(&rig, &engine)?;
    let arrived = rig.arrived()?;
    // A packet of the router's own with the connection's addresses and ports.
    let own = rig.router.packet_socket("eth1")?;
    let mut frame = rig.frame.clone();
    frame[..6].copy_from_slice(&rig.sink.mac("eth0")?);
    own.send(&frame)?;
    rig.await_arrival(arrived, 1)?;
    assert_eq!(accepted(&engine), [0; 2], "the host's own");
    // Dropped by a rule.
    rig.router.run([
        "nft",
        "add table ip t; add chain ip t f { type filter hook forward priority 0; }; add rule ip t f drop",
    ])?;
    rig.send(3)?;
    let slot = rig.requests()?[0].slot;
    wait_for(LIMIT, "three packets to be Linux's", || {
        (exceptions(&engine, slot, Reason::FlowWaiting) == 3).then_some(())
    })?;
    let dropped = || rig.router.run(["nft", "-a", "list", "ruleset"]);
    println!("{}", dropped()?);
    assert_eq!(accepted(&engine), [0; 2], "dropped by a rule");
    rig.router.run(["nft", "flush", "ruleset"])?;
    rig.send(1)?;
    rig.await_arrival(arrived, 2)?;
    assert_ne!(accepted(&engine)[0], 0);
    rig.on_router(|| engine.teardown())?;
    Ok(())
}

#[test]
fn the_tc_program_outlives_the_process_is_replaced_and_goes_with_flows() -> Result {
    let _alone = alone();
    let rig = Rig::new("acceptlife")?;
    let engine = with_flow(&rig, 1000)?;
    attach(&rig, &engine)?;
    drop(engine);
    assert_eq!((on_egress(&rig, "eth0")?, on_egress(&rig, "eth1")?), (1, 1), "pinned");
    let engine =
        rig.on_router(|| rig.site_with(WITH_FLOWS).map(|site| site.left().and_then(|left| left.adopt())))??;
    assert_eq!((on_egress(&rig, "eth0")?, on_egress(&rig, "eth1")?), (1, 1), "replaced");
    let arrived = rig.arrived()?;
    rig.send(1)?;
    rig.await_arrival(arrived, 1)?;
    assert_ne!(accepted(&engine)[0], 0);
    let port = rig.requests()?[1].ifindex;
    rig.on_router(|| engine.detach(port))?;
    assert_eq!((on_egress(&rig, "eth0")?, on_egress(&rig, "eth1")?), (1, 0), "with its port");
    drop(engine);
    let engine = rig.on_router(|| rig.site().map(|site| site.left().and_then(|left| left.adopt())))??;
    assert_eq!(on_egress(&rig, "eth0")?, 0, "a process that has no flows takes it off");
    rig.on_router(|| engine.teardown())?;
    assert!(!rig.site()?.exists(), "pins are gone");
    Ok(())
}
