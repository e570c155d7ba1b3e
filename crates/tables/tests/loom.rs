//! Models of what readers can meet while the writer publishes, reuses and changes things: the trie's own publication,
//! the store's own reclaim, the look-up itself, over loom's atomics. Run by `scripts/loom.sh`.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, Ordering::*, fence};
use loom::thread;
use std::sync::Arc;
use towpath_tables::backing::GrowError;
use towpath_tables::grace::{self, Grace, NoReaders, Workers};
use towpath_tables::lpm::{Kind, Leaf, LpmRead, lookup};
use towpath_tables::order::{Shared, change, consistent, load, publish};
use towpath_tables::record::{Line, NODE_REACH, TableId};
use towpath_tables::rib::{Entry, Prefix, Rib};
use towpath_tables::store::{Memory, Store};

struct Word(AtomicU32);

impl Word {
    fn new(value: u32) -> Self {
        Self(AtomicU32::new(value))
    }
}

impl Shared<u32> for Word {
    fn load(&self) -> u32 {
        self.0.load(Relaxed)
    }
    fn store(&self, value: u32) {
        self.0.store(value, Relaxed)
    }
    fn acquire_fence() {
        fence(Acquire)
    }
    fn release_fence() {
        fence(Release)
    }
    fn full_fence() {
        fence(SeqCst)
    }
    fn pause() {
        thread::yield_now()
    }
}

/// The slot that has routes; the others stay empty and need no atomics.
const SLOT: u16 = 0x0a00;

/// Tables with one root slot and hardly any lines, which are cells, so that loom sees a reader that looks at one while it
/// is rewritten.
struct Tables {
    slot: Word,
    lines: Vec<UnsafeCell<Line>>,
}

#[derive(Clone)]
struct Model(Arc<Tables>);

impl Model {
    fn new(lines: usize) -> Self {
        let lines = (0..lines).map(|_| UnsafeCell::new(Line::ZERO)).collect();
        Self(Arc::new(Tables { slot: Word::new(0), lines }))
    }
}

impl LpmRead for Model {
    fn root_word(&self, _: u32, slot: u16) -> Option<u32> {
        Some(if slot == SLOT { load(&self.0.slot) } else { 0 })
    }
    fn root_default(&self, _: u32) -> Option<u32> {
        Some(0)
    }
    fn line(&self, index: u32) -> Option<&Line> {
        // SAFETY: loom reports the access if it conflicts with a write.
        Some(self.0.lines.get(index as usize)?.with(|line| unsafe { &*line }))
    }
}

impl Memory for Model {
    fn elements(&self, table: TableId) -> usize {
        if table == TableId::Nodes { self.0.lines.len() + NODE_REACH } else { 1 }
    }
    fn write_lines(&mut self, index: u32, lines: &[Line]) {
        for (slot, line) in self.0.lines[index as usize..].iter().zip(lines) {
            // SAFETY: loom reports the access if it conflicts with a read.
            slot.with_mut(|slot| unsafe { *slot = *line });
        }
    }
    fn publish_root(&mut self, _: u32, slot: u16, word: u32) {
        assert_eq!(slot, SLOT);
        publish(&self.0.slot, word);
    }
    fn publish_default(&mut self, _: u32, _: u32) {
        unreachable!("there is no default route in these models");
    }
    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), GrowError> {
        Err(GrowError { table, elements, cause: "models do not grow".into() })
    }
}

const PROBE: [u8; 4] = [10, 0, 1, 1];

/// The nodes of a model: packed in one line, or of words in two, or wide and packed.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Packed,
    Long,
    Wide,
}

/// A next hop that does not fit into a byte.
const LARGE: u32 = 1000;

impl Form {
    /// Lines that `routes` takes.
    fn lines(self) -> usize {
        if self == Form::Long { 2 } else { 1 }
    }
}

/// 10.0.1.0/24 to this next hop, and beside it enough for a node of this form.
fn routes(rib: &mut Rib<4>, nexthop: u32, form: Form) {
    let entry = |n| Entry { leaf: Leaf::nexthop(n).unwrap(), level: 0 };
    rib.set(Prefix::new(PROBE, 24).unwrap(), entry(nexthop));
    for third in (3..9).filter(|_| form == Form::Long) {
        rib.set(Prefix::new([10, 0, 2 * third, 0], 24).unwrap(), entry(LARGE));
    }
    if form == Form::Wide {
        rib.set(Prefix::new([10, 0, 9, 9], 32).unwrap(), entry(90));
    }
}

/// A model with room for so many versions of the routes; the first is published.
fn start<G: Grace>(versions: usize, form: Form, grace: impl FnOnce() -> G) -> (Model, Rib<4>, Store<Model, G>) {
    let model = Model::new(1 + versions * form.lines());
    let mut store = Store::new(model.clone(), grace());
    let mut rib = Rib::new(0);
    routes(&mut rib, 2, form);
    rib.publish(&mut store);
    assert_eq!(lookup(&model, 0, &PROBE).unwrap().kind(), Kind::Nexthop(2));
    (model, rib, store)
}

fn publication(form: Form) {
    loom::model(move || {
        let (model, mut rib, mut store) = start(3, form, || NoReaders);
        let reader = thread::spawn(move || lookup(&model, 0, &PROBE).unwrap().kind());
        routes(&mut rib, 3, form);
        rib.publish(&mut store);
        let seen = reader.join().unwrap();
        assert!([Kind::Nexthop(2), Kind::Nexthop(3)].contains(&seen), "{seen:?}");
    });
}

#[test]
fn a_reader_sees_the_old_or_the_new_route() {
    publication(Form::Packed);
}

#[test]
fn a_reader_sees_the_old_or_the_new_route_with_a_long_node() {
    publication(Form::Long);
}

#[test]
fn a_reader_sees_the_old_or_the_new_route_with_a_wide_node() {
    publication(Form::Wide);
}

/// Nodes for two versions only: the third must wait until the first is free.
fn reuse<G: Grace + 'static>(form: Form, make: fn(Arc<Word>) -> G) {
    loom::model(move || {
        let word = Arc::new(Word::new(0));
        let (model, mut rib, mut store) = start(2, form, || make(word.clone()));
        let reader = thread::spawn(move || {
            for _ in 0..2 {
                grace::enter(&*word);
                let seen = lookup(&model, 0, &PROBE).unwrap().kind();
                assert!([Kind::Nexthop(2), Kind::Nexthop(3), Kind::Nexthop(4)].contains(&seen), "{seen:?}");
                grace::leave(&*word);
            }
        });
        for nexthop in [3, 4] {
            routes(&mut rib, nexthop, form);
            rib.publish(&mut store);
            store.reclaim();
        }
        assert_eq!(store.used(TableId::Nodes), Some(form.lines()));
        reader.join().unwrap();
    });
}

#[test]
fn nodes_are_reused_only_after_grace() {
    reuse(Form::Packed, |word| Workers([word]));
}

#[test]
fn long_nodes_are_reused_only_after_grace() {
    reuse(Form::Long, |word| Workers([word]));
}

#[test]
fn wide_nodes_are_reused_only_after_grace() {
    reuse(Form::Wide, |word| Workers([word]));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_grace_the_model_fails() {
    reuse(Form::Packed, |_| NoReaders);
}

#[test]
fn a_next_hop_is_seen_whole_or_not_at_all() {
    loom::model(|| {
        let record = Arc::new([Word::new(0), Word::new(1), Word::new(1)]);
        let reader = {
            let record = record.clone();
            thread::spawn(move || consistent(&record[0], || (record[1].load(), record[2].load())))
        };
        for value in [2, 3] {
            change(&record[0], || {
                record[1].store(value);
                record[2].store(value);
            });
        }
        if let Some((first, second)) = reader.join().unwrap() {
            assert_eq!(first, second, "a torn record");
        }
        assert_eq!(consistent(&record[0], || record[1].load()), Some(3));
    });
}

/// Two sets of mappings take turns: one is in force, the other is written.
fn turns(wait: fn(Arc<Word>)) {
    loom::model(move || {
        let (word, in_force) = (Arc::new(Word::new(0)), Arc::new(Word::new(1)));
        let sets = Arc::new([0, 0].map(|version| UnsafeCell::new([version; 2])));
        let reader = {
            let (word, in_force, sets) = (word.clone(), in_force.clone(), sets.clone());
            thread::spawn(move || {
                grace::enter(&*word);
                let set = &sets[load(&*in_force) as usize - 1];
                // SAFETY: loom reports the access if it conflicts with a write.
                set.with(|set| unsafe { assert_eq!((*set)[0], (*set)[1], "a torn set") });
                grace::leave(&*word);
            })
        };
        for version in 1..=2 {
            wait(word.clone());
            let other = 1 - (in_force.load() - 1);
            // SAFETY: loom reports the access if it conflicts with a read.
            sets[other as usize].with_mut(|set| unsafe { *set = [version; 2] });
            publish(&*in_force, other + 1);
        }
        reader.join().unwrap();
    });
}

#[test]
fn a_set_of_mappings_is_written_when_nobody_looks_at_it() {
    turns(|word| Workers([word]).wait());
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_grace_a_set_of_mappings_is_written_under_a_reader() {
    turns(|_| ());
}

/// A worker is told that there is new memory in place of the old one, which is taken away once the worker was waited for.
/// So user engines take new tables, and leave ports.
fn replacement(wait: fn(Arc<Word>)) {
    loom::model(move || {
        let (word, told) = (Arc::new(Word::new(0)), Arc::new(Word::new(0)));
        let old = Arc::new(UnsafeCell::new(Line::ZERO));
        let worker = {
            let (word, told, old) = (word.clone(), told.clone(), old.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    grace::enter(&*word);
                    if told.load() == 0 {
                        // SAFETY: loom reports the access if it conflicts with a write.
                        old.with(|old| assert_eq!(unsafe { *old }, Line::ZERO));
                    }
                    grace::leave(&*word);
                }
            })
        };
        told.store(1);
        wait(word);
        // SAFETY: loom reports the access if it conflicts with a read.
        old.with_mut(|old| unsafe { (*old).words[0] = 1 });
        worker.join().unwrap();
    });
}

#[test]
fn memory_is_taken_away_only_after_grace() {
    replacement(|word| Workers([word]).wait());
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_grace_memory_is_taken_away_from_under_a_worker() {
    replacement(|_| ());
}
