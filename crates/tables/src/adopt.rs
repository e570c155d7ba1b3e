//! Looking through tables that another writer left: are they of this layout, are they sound, what is in use.

use std::collections::BTreeSet;

use crate::backing::View;
use crate::layout::layout_hash;
use crate::lpm::{Kind, LpmRead, Word};
use crate::record::*;
use crate::store::{InUse, all_ends, ends, lines_of, stored, stored_count};

/// Tables that cannot be taken over; new ones must be made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AdoptError {
    /// Written by a build with other records, or not by Towpath at all
    #[error("the tables' {what} is {found:#x}, this program's is {expected:#x}: they must be replaced, not adopted")]
    Different {
        /// `magic number`, `layout version` or `layout hash`
        what: &'static str,
        /// What the tables say
        found: u32,
        /// What this program would say
        expected: u32,
    },
    /// They contradict themselves
    #[error("the tables are damaged and must be replaced, not adopted: {0}")]
    Damaged(String),
}

fn damaged<T>(what: String) -> Result<T, AdoptError> {
    Err(AdoptError::Damaged(what))
}

/// Checks whether these are tables such as this program writes.
pub fn check(config: &Config) -> Result<(), AdoptError> {
    for (what, word, expected) in [
        ("magic number", &config.magic, MAGIC),
        ("layout version", &config.version, LAYOUT_VERSION),
        ("layout hash", &config.layout, layout_hash()),
    ] {
        let found = word.load();
        if found != expected {
            return Err(AdoptError::Different { what, found, expected });
        }
    }
    Ok(())
}

/// Checks the tables; returns what is in use in them.
pub(crate) fn scan(view: &View<'_>) -> Result<InUse, AdoptError> {
    check(view.config())?;
    let mut scan = Scan {
        view,
        lines: vec![false; view.elements(TableId::Nodes)],
        nexthops: vec![false; view.nexthops().len().min(view.nexthop_keys().len())],
        groups: vec![false; view.groups().len()],
        to_filters: false,
        used: InUse::default(),
    };
    for (index, root) in (0..).zip(view.roots()) {
        let bytes = match root.family.load() {
            0 => continue,
            1 | FILTER_ROOT => 4,
            2 | FILTERS_V6 => 16,
            other => return damaged(format!("route table {index} is of family {other}")),
        };
        scan.used.roots.push(index);
        scan.to_filters = root.family.load() >= FILTER_ROOT;
        for word in &root.direct {
            scan.word(Word(word.load()), bytes - 2)?;
        }
        scan.word(Word(root.default.load()), 0)?;
    }
    for index in 0..scan.groups.len() {
        if scan.groups[index] {
            scan.used.groups.push(index as u32);
            for bucket in &view.groups()[index].buckets {
                scan.nexthop(bucket.load())?;
            }
        }
    }
    scan.used.nexthops = (0..).zip(&scan.nexthops).filter(|(_, used)| **used).map(|(index, _)| index).collect();
    let mut interfaces = BTreeSet::new();
    for (slot, port) in view.ports().iter().enumerate() {
        let ifindex = port.ifindex.load();
        if ifindex != 0 && !interfaces.insert(ifindex) {
            return damaged(format!("interface {ifindex} is in slot {slot} and in one before"));
        }
        match port.vlans.load() {
            NO_VLANS => {}
            _ if ifindex == 0 => {}
            vlans if (vlans as usize) < view.vlans().len() => scan.used.vlans.push(vlans),
            vlans => return damaged(format!("port {slot} has VLAN table {vlans}, which is not there")),
        }
        let lists = port.root.iter().map(|root| root.load()).filter(|root| ifindex != 0 && root & BY_SOURCE != 0);
        for list in lists.map(|root| root & !BY_SOURCE) {
            if list as usize >= view.sources().len() {
                return damaged(format!("port {slot} has source list {list}, which is not there"));
            }
            scan.used.sources.push(list);
        }
    }
    Ok(scan.used)
}

struct Scan<'a> {
    view: &'a View<'a>,
    lines: Vec<bool>,
    nexthops: Vec<bool>,
    groups: Vec<bool>,
    /// Leaves are filters, not next hops
    to_filters: bool,
    used: InUse,
}

/// `Root::family` of the filters of IPv6
const FILTERS_V6: u32 = FILTER_ROOT + Family::V6 as u32;

impl Scan<'_> {
    /// Follows a word over at most `levels` nodes.
    fn word(&mut self, word: Word, levels: usize) -> Result<(), AdoptError> {
        match word.kind() {
            Kind::None => Ok(()),
            Kind::Nexthop(index) | Kind::Group(index) if self.to_filters => self.filter(word, index),
            Kind::Nexthop(index) => self.nexthop(index),
            Kind::Group(index) => match self.groups.get_mut(index as usize) {
                Some(used) => {
                    *used = true;
                    Ok(())
                }
                None => damaged(format!("a route leads to group {index}, which is not there")),
            },
            Kind::Node(index) if levels == 0 => damaged(format!("node {index} is deeper than an address is long")),
            Kind::Node(index) => self.node(word, index, levels),
        }
    }

    fn nexthop(&mut self, index: u32) -> Result<(), AdoptError> {
        match self.nexthops.get_mut(index as usize) {
            Some(used) if index != 0 => {
                *used = true;
                Ok(())
            }
            _ => damaged(format!("a route leads to next hop {index}, which is not there")),
        }
    }

    /// Filters are written anew when they are taken over: what the record says matters there.
    fn filter(&self, word: Word, index: u32) -> Result<(), AdoptError> {
        let is_there = (index as usize) < self.view.filters().len();
        if word.kind() == Kind::Nexthop(index) && is_there {
            Ok(())
        } else {
            damaged(format!("sources lead to filter {index}, which is not there"))
        }
    }

    /// Looks through the node to which `word` leads.
    fn node(&mut self, word: Word, index: u32, levels: usize) -> Result<(), AdoptError> {
        let Some(node) = self.view.node(index).filter(|_| index != 0) else {
            return damaged(format!("a route leads to node {index}, which is not there"));
        };
        let (bytes, sound) = if word.is_wide() {
            (2, levels.is_multiple_of(2) && is_sound_wide(word, node.line))
        } else {
            (1, is_sound(node.line.as_node()))
        };
        if !sound {
            return damaged(format!("node {index} contradicts itself"));
        }
        let count = stored_count(word, node.line);
        let lines = lines_of(word, count);
        let Some(taken) = self.lines.get_mut(index as usize..index as usize + lines as usize) else {
            return damaged(format!("node {index} does not end inside the table"));
        };
        if taken.iter_mut().any(|line| std::mem::replace(line, true)) {
            return damaged(format!("node {index} is part of two routes' ways"));
        }
        self.used.nodes.push((index, lines));
        for next in (0..count).filter_map(|rank| stored(self.view, word, node, rank)) {
            self.word(next, levels - bytes)?;
        }
        Ok(())
    }
}

fn is_sound(node: &Node) -> bool {
    let mut counts = [0u32; 5];
    for (quarter, bits) in node.bitmap.iter().enumerate() {
        counts[quarter + 1] = counts[quarter] + bits.count_ones();
    }
    node.bitmap[0] & 1 != 0 && node.counts.map(u32::from) == counts[..4]
}

/// Ends ascend, nothing follows the last one, and there is no end where there may be none.
fn is_sound_wide(word: Word, first: &Line) -> bool {
    let all = all_ends(word, first);
    let ends: Vec<u16> = ends(word, first).collect();
    !ends.is_empty()
        && ends.len() < all.len()
        && ends.is_sorted_by(|a, b| a < b)
        && all.iter().skip(ends.len()).all(|end| *end == NO_END)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The line of a wide node, packed or not, that begins with these ends.
    fn wide_line(places: usize, first: &[u16]) -> Line {
        let mut line = Line::ZERO;
        let ends = first.iter().copied().chain(std::iter::repeat(NO_END)).take(places);
        ends.zip(line.bytes_mut().as_chunks_mut::<2>().0).for_each(|(end, bytes)| *bytes = end.to_ne_bytes());
        line
    }

    #[test]
    fn ends_of_a_wide_node_ascend_and_stop() {
        for (word, runs) in [(Word::wide(1), WIDE_RUNS), (Word::wide(1).to_packed(), PACKED_WIDE_RUNS)] {
            let sound = |first: &[u16]| is_sound_wide(word, &wide_line(runs, first));
            assert!(sound(&[0]));
            assert!(sound(&[1, 2, 3, 4, 5, 0xfffe]));
            assert!(!sound(&[]), "one word only");
            assert!(!sound(&[1, 3, 3, 4]), "twice the same");
            assert!(!sound(&[2, 1, 3, 4]), "descending");
            assert!(!sound(&[1, 2, 3, NO_END, 5]), "a gap");
            let full: Vec<u16> = (1..runs as u16).collect();
            assert!(sound(&full));
            assert!(!sound(&[full, vec![runs as u16]].concat()), "an end in the last place");
        }
    }
}
