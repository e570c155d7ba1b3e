//! The operator's filters: a change is made whole or not at all, and in force at once.

use std::collections::BTreeSet;
use towpath_tables::filters::{Action, Decision, FilterError, FilterValue, Filters};

/// Something to do to the filters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FilterChange {
    /// A new one
    Add(FilterValue, Action),
    /// The end of one
    Remove(FilterValue, Action),
    /// The end of all
    Clear,
}

/// Why filters cannot be changed so.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FilterRefused {
    /// Two filters for the same packets
    #[error("there is such a filter already{}", if *.0 == Action::Pass { ", which passes what it matches" } else { "" })]
    Present(Action),
    /// Nothing to end
    #[error("there is no such filter")]
    Absent,
    /// The port is none that can have filters
    #[error("{0}")]
    Port(&'static str),
    /// The tables cannot hold it
    #[error(transparent)]
    Tables(#[from] FilterError),
}

/// A change that cannot be made, and which of them it is, if it is one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Its place
    pub at: Option<usize>,
    /// Why
    pub why: FilterRefused,
}

/// The filters after some changes. Numbers of those that were there before are not given again, since their counters go on.
pub(crate) fn changed(
    before: &Filters,
    changes: &[FilterChange],
    check_port: impl Fn(u32) -> Result<(), FilterRefused>,
) -> Result<Filters, Fault> {
    let used: BTreeSet<u32> = before.values().map(|decision| decision.number).collect();
    let mut free = (1..).filter(|number| !used.contains(number));
    let mut all = before.clone();
    for (at, change) in changes.iter().enumerate() {
        let fault = |why| Fault { at: Some(at), why };
        match *change {
            FilterChange::Add(value, action) => {
                check_port(value.ifindex).map_err(fault)?;
                if let Some(old) = all.get(&value) {
                    return Err(fault(FilterRefused::Present(old.action)));
                }
                let number = free.next().ok_or_else(|| fault(FilterError::TooMany.into()))?;
                all.insert(value, Decision { number, action });
            }
            FilterChange::Remove(value, action) => {
                let there = all.get(&value).filter(|old| old.action == action);
                there.ok_or_else(|| fault(FilterRefused::Absent))?;
                all.remove(&value);
            }
            FilterChange::Clear => all.clear(),
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_tables::filters::Block;

    fn value(source: &str, len: u8) -> FilterValue {
        let source = Block::new(source.parse().expect("an address"), len);
        FilterValue { source, destination: None, protocol: None, ports: [None; 2], ifindex: 0 }
    }

    #[test]
    fn changes_are_made_in_order_and_numbers_are_not_given_again() {
        let (one, two) = (value("10.0.0.0", 8), value("2001:db8::", 32));
        let apply = |before: &Filters, changes: &[FilterChange]| changed(before, changes, |_| Ok(()));
        let add = |value| FilterChange::Add(value, Action::Drop);
        let all = apply(&Filters::new(), &[add(one), FilterChange::Clear, add(two)]).expect("allowed");
        assert_eq!(all, [(two, Decision { number: 2, action: Action::Drop })].into());
        let all = apply(&all, &[FilterChange::Remove(two, Action::Drop), add(two), add(one)]).expect("allowed");
        assert_eq!(all.values().map(|decision| decision.number).collect::<Vec<_>>(), [3, 1], "not 2");
        let fault = |changes: &[FilterChange]| apply(&all, changes).expect_err("refused");
        assert_eq!(fault(&[FilterChange::Clear, FilterChange::Remove(one, Action::Drop)]).at, Some(1));
        assert_eq!(fault(&[FilterChange::Remove(one, Action::Pass)]).why, FilterRefused::Absent);
        assert_eq!(fault(&[FilterChange::Add(one, Action::Pass)]).why, FilterRefused::Present(Action::Drop));
        let no_port = changed(&all, &[add(value("10.9.0.0", 16))], |_| Err(FilterRefused::Port("none")));
        assert_eq!(no_port.expect_err("refused").at, Some(0));
    }
}
