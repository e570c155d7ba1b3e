//! The flows, as their writer changes them and as packets find them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use towpath_tables::backing::{HeapBacking, MAX_FLOWS, PerTable, initial_elements};
use towpath_tables::flow::{Direction, acceptance};
use towpath_tables::flows::{self, FlowTotals, Full};
use towpath_tables::grace::{Grace, NoReaders};
use towpath_tables::record::{FLOW_PLACES, Flow, TableId, flow_state};
use towpath_tables::writer::TableWriter;
use towpath_tables::{Connection, Tuple};

type Writer<G = NoReaders> = TableWriter<HeapBacking, G>;

fn sizes(flows: usize) -> PerTable {
    initial_elements(1).with_flows(flows)
}

fn writer(flows: usize) -> Writer {
    TableWriter::create(HeapBacking::new(sizes(flows)), NoReaders).unwrap()
}

/// A connection behind masquerade: every number another one, of both families and protocols in turn.
fn connection(number: u32) -> Connection {
    let (six, protocol) = (number & 1 != 0, if number & 2 != 0 { 6 } else { 17 });
    let address = |which: u16, host: u32| match six {
        true => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, which, 0, 0, 0, (host >> 16) as u16, host as u16)),
        false => IpAddr::V4(Ipv4Addr::from(u32::from(which) << 24 | host)),
    };
    let (client, server, ours) = (address(10, number >> 2), address(20, 7), address(30, 1));
    let (high, low) = ((number >> 18) as u16, (number >> 2) as u16);
    let original = Tuple { source: client, destination: server, source_port: low, destination_port: 80, protocol };
    let reply = Tuple { source: server, destination: ours, source_port: 80 + high, destination_port: low, protocol };
    Connection::new(original, reply).unwrap()
}

fn record<'w, G: Grace>(writer: &'w Writer<G>, tuple: &Tuple) -> &'w Flow {
    let (found, _) = flows::find(&writer.view(), tuple).expect("it is a flow");
    &writer.view().flows()[found.index as usize]
}

#[test]
fn a_flow_is_found_in_both_directions_until_it_ends() {
    let mut writer = writer(100);
    for number in 0..100 {
        writer.set_flow(&connection(number)).unwrap();
    }
    assert_eq!((writer.flow_count(), writer.flows().count()), (100, 100));
    for number in 0..100 {
        let wanted = connection(number);
        for (tuple, direction) in [(wanted.original, Direction::Original), (wanted.reply, Direction::Reply)] {
            let (found, way) = flows::find(&writer.view(), &tuple).unwrap();
            assert_eq!((found.connection, way), (wanted, direction));
            assert_eq!((found.totals, found.accepted, found.closed), (FlowTotals::default(), [None; 2], false));
            assert_eq!(flows::find(&writer.view(), &Tuple { source_port: 60_000, ..tuple }), None);
        }
    }
    assert_eq!(writer.remove_flow(&connection(7).reply), None, "only the original tuple names it");
    assert_eq!(writer.remove_flow(&connection(7).original), Some(FlowTotals::default()));
    assert_eq!(writer.remove_flow(&connection(7).original), None);
    assert_eq!((writer.flow_count(), writer.flows().count()), (99, 99));
    assert_eq!(flows::find(&writer.view(), &connection(7).original), None);
    assert_eq!(flows::find(&writer.view(), &connection(7).reply), None);
}

#[test]
fn what_has_ended_is_used_again_after_a_grace_period_that_somebody_waited_for() {
    let mut writer = writer(1000);
    assert_eq!(writer.seal_flows(), None, "nothing has ended");
    let (one, two) = (connection(1), connection(2));
    let index = |writer: &Writer, connection: &Connection| {
        flows::find(&writer.view(), &connection.original).expect("it is a flow").0.index
    };
    let end =
        |writer: &mut Writer, connection: &Connection| writer.remove_flow(&connection.original).map(drop).unwrap();
    writer.set_flow(&one).unwrap();
    let first = index(&writer, &one);
    end(&mut writer, &one);
    let seal = writer.seal_flows().expect("one has ended");
    assert_eq!(writer.seal_flows(), None, "it is waited for");
    writer.set_flow(&two).unwrap();
    assert_ne!(index(&writer, &two), first, "somebody may look at it");
    end(&mut writer, &two);
    assert_eq!(writer.seal_flows(), None, "one wait at a time");
    writer.reclaim_flows(seal);
    writer.set_flow(&one).unwrap();
    assert_eq!((index(&writer, &one), writer.flow_count()), (first, 1), "it is used again");
    assert_eq!(writer.flow_records().len(), 2, "no more than two at the same time");
    let later = writer.seal_flows().expect("the other one has ended");
    assert_ne!(later, seal);
    writer.reclaim_flows(seal);
    writer.set_flow(&two).unwrap();
    assert_eq!(index(&writer, &two), 2, "what is waited for is not free by another's wait");
    // What a wait of the writer's own has made free is not made free again.
    writer.reclaim();
    end(&mut writer, &one);
    assert!(writer.seal_flows().is_some());
    writer.reclaim_flows(later);
    writer.set_flow(&one).unwrap();
    writer.set_flow(&connection(3)).unwrap();
    assert_eq!((writer.flow_count(), writer.flows().count(), writer.flow_records().len()), (3, 3, 4));
}

#[test]
fn what_is_described_again_keeps_what_it_has() {
    let mut writer = writer(4);
    writer.open_flows();
    let generation = writer.view().config().flow_generation.load();
    writer.set_flow(&connection(1)).unwrap();
    let flow = record(&writer, &connection(1).original);
    flow.accepted[1].store(acceptance(generation, 0, 300));
    flow.counters[0].packets.add(3);
    flow.counters[1].bytes.add(99);
    flow.state.set(flow_state::CLOSED);
    assert!(writer.flows().next().unwrap().closed);
    writer.set_flow(&connection(1)).unwrap();
    let view = writer.flows().next().unwrap();
    assert_eq!((view.accepted, view.closed), ([None, Some((0, 300))], false));
    record(&writer, &connection(1).original).state.set(flow_state::CLOSED | flow_state::FINISHED);
    writer.set_flow(&connection(1)).unwrap();
    assert!(writer.flows().next().unwrap().closed, "what was told was true before the FIN");
    assert_eq!(view.totals, FlowTotals { packets: [3, 0], bytes: [0, 99] });
    writer.close_flows();
    assert_eq!(writer.flows().next().unwrap().accepted, [None; 2], "of another generation");
    assert_eq!(writer.remove_flow(&connection(1).original), Some(view.totals));
    writer.reclaim();
    writer.set_flow(&connection(2)).unwrap();
    let view = writer.flows().next().unwrap();
    assert_eq!((view.index, view.connection), (0, connection(2)));
    assert_eq!((view.totals, view.closed), (FlowTotals::default(), false));
    assert_eq!(record(&writer, &connection(2).original).accepted.each_ref().map(|word| word.load()), [0; 2]);
}

#[test]
fn of_two_connections_with_one_tuple_the_later_one_is_right() {
    let mut writer = writer(8);
    let first = connection(0);
    for second in [
        Connection::new(first.original, connection(4).reply).unwrap(),
        Connection::new(connection(4).original, first.reply).unwrap(),
        Connection::new(first.reply, first.original).unwrap(),
    ] {
        writer.set_flow(&first).unwrap();
        writer.set_flow(&second).unwrap();
        assert_eq!(writer.flows().map(|flow| flow.connection).collect::<Vec<_>>(), [second]);
        assert_eq!(flows::find(&writer.view(), &second.reply).unwrap().1, Direction::Reply);
        assert!(writer.remove_flow(&second.original).is_some());
        writer.reclaim();
    }
    assert!(writer.view().flow_lines().iter().flat_map(|line| &line.places).all(|place| place.load() == 0));
}

#[test]
fn generations_are_even_while_flows_pass() {
    let mut writer = writer(1);
    let generation = |writer: &Writer| writer.view().config().flow_generation.load();
    assert_eq!(generation(&writer), 1, "closed at first");
    writer.close_flows();
    assert_eq!(generation(&writer), 1);
    writer.open_flows();
    writer.open_flows();
    assert_eq!(generation(&writer), 2);
    writer.close_flows();
    writer.close_flows();
    assert_eq!(generation(&writer), 3);
    writer.view().config().flow_generation.store(u32::MAX);
    writer.open_flows();
    assert_eq!(generation(&writer), 0);
}

#[test]
fn a_full_table_refuses_until_there_is_room() {
    let mut writer = writer(4);
    (0..4).for_each(|number| writer.set_flow(&connection(number)).unwrap());
    assert_eq!(writer.set_flow(&connection(4)), Err(Full));
    assert_eq!(writer.set_flow(&connection(3)), Ok(()), "it is there");
    assert_eq!((writer.flow_count(), flows::find(&writer.view(), &connection(4).original)), (4, None));
    assert!(writer.remove_flow(&connection(0).original).is_some());
    assert_eq!(writer.set_flow(&connection(4)), Ok(()));
    let usage = writer.usage()[TableId::Flows as usize];
    assert_eq!((usage.used, usage.elements, usage.bytes), (4, 4, 512));
}

#[test]
fn full_lines_refuse_and_leave_nothing_behind() {
    // More records than the one line has places for.
    let mut writer = TableWriter::create(
        HeapBacking::new(sizes(1).with(TableId::Flows, 100).with(TableId::FlowLines, 1)),
        NoReaders,
    )
    .unwrap();
    for number in 0..FLOW_PLACES as u32 / 2 {
        writer.set_flow(&connection(number)).unwrap();
    }
    assert_eq!(writer.set_flow(&connection(50)), Err(Full));
    assert!(writer.remove_flow(&connection(0).original).is_some());
    assert_eq!(writer.set_flow(&connection(50)), Ok(()));
    assert_eq!(writer.flows().count(), FLOW_PLACES / 2);
    assert!(writer.flows().all(|flow| flows::find(&writer.view(), &flow.connection.reply).is_some()));
}

#[test]
fn lines_hold_as_many_flows_as_there_are_records() {
    let flows = if cfg!(miri) { 200 } else { 100_000 };
    let mut writer = writer(flows);
    let refused = (0..flows as u32).filter(|number| writer.set_flow(&connection(*number)).is_err()).count();
    assert_eq!(refused, 0);
    assert!((0..flows as u32).all(|number| flows::find(&writer.view(), &connection(number).reply).is_some()));
}

#[test]
fn two_million_flows_fit_into_a_gibibyte() {
    let sizes = sizes(2_000_000);
    let bytes: usize =
        [TableId::Flows, TableId::FlowLines].map(|table| sizes.get(table) * table.element_size()).iter().sum();
    assert_eq!(sizes.get(TableId::Flows), 2_000_000);
    assert!(bytes <= 1 << 30, "{bytes}");
    let most = initial_elements(1).with_flows(usize::MAX);
    assert_eq!(most.get(TableId::Flows), MAX_FLOWS);
    for table in [TableId::Flows, TableId::FlowLines] {
        assert!(most.get(table) * table.element_size() < 1 << 29, "{}", table.name());
    }
}

/// Says when it is waited for.
#[derive(Clone, Default)]
struct Counted(std::rc::Rc<std::cell::Cell<usize>>);

impl Grace for Counted {
    fn wait(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn records_are_used_again_after_a_grace_period_only() {
    let grace = Counted::default();
    let mut writer = TableWriter::create(HeapBacking::new(sizes(2)), grace.clone()).unwrap();
    writer.set_flow(&connection(0)).unwrap();
    writer.remove_flow(&connection(0).original).unwrap();
    writer.set_flow(&connection(1)).unwrap();
    assert_eq!((grace.0.get(), writer.flows().next().unwrap().index), (0, 1), "there was another record");
    writer.set_flow(&connection(2)).unwrap();
    assert_eq!((grace.0.get(), writer.flow_count()), (1, 2));
    writer.reclaim();
    assert_eq!(grace.0.get(), 1, "nothing to wait for");
}

#[test]
fn a_writer_that_takes_tables_over_begins_without_flows() {
    let mut writer = writer(16);
    (0..10).for_each(|number| writer.set_flow(&connection(number)).unwrap());
    writer.remove_flow(&connection(9).original).unwrap();
    writer.open_flows();
    let mut writer = TableWriter::adopt(writer.into_backing(), NoReaders).unwrap();
    assert_eq!((writer.flow_count(), writer.flows().count()), (0, 0));
    assert_eq!(writer.view().config().flow_generation.load(), 3, "closed");
    assert!((0..10).all(|number| flows::find(&writer.view(), &connection(number).original).is_none()));
    (0..16).for_each(|number| writer.set_flow(&connection(number)).unwrap());
    assert_eq!(writer.flows().count(), 16);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

    /// After any changes exactly those flows are found that should be, by both tuples.
    #[test]
    fn flows_are_those_of_a_map(steps in prop::collection::vec((0..4u8, 0..60u32), 1..300)) {
        let mut writer = writer(40);
        let mut model: HashMap<Tuple, (Connection, bool)> = HashMap::new();
        for (step, number) in steps {
            let one = connection(number);
            match step {
                0 | 1 => match writer.set_flow(&one) {
                    Ok(()) => {
                        model.insert(one.original, (one, false));
                    }
                    Err(Full) => {
                        prop_assert_eq!(model.len(), 40);
                        prop_assert!(!model.contains_key(&one.original));
                    }
                },
                2 => prop_assert_eq!(writer.remove_flow(&one.original).is_some(), model.remove(&one.original).is_some()),
                _ => if let Some((_, closed)) = model.get_mut(&one.original) {
                    record(&writer, &one.reply).state.set(flow_state::CLOSED);
                    *closed = true;
                },
            }
            prop_assert_eq!(writer.flow_count(), model.len());
        }
        let found: HashMap<Tuple, (Connection, bool)> =
            writer.flows().map(|flow| (flow.connection.original, (flow.connection, flow.closed))).collect();
        prop_assert_eq!(&found, &model);
        for number in 0..60 {
            let one = connection(number);
            for tuple in [one.original, one.reply] {
                let found = flows::find(&writer.view(), &tuple).map(|(flow, _)| flow.connection);
                prop_assert_eq!(found, model.get(&one.original).map(|(connection, _)| *connection));
            }
        }
    }
}
