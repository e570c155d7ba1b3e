//! Connections that Linux hands over: into the tables and out of them.

use std::collections::HashSet;
use towpath_tables::backing::Backing;
use towpath_tables::grace::Grace;
use towpath_tables::writer::TableWriter;
use towpath_tables::{Connection, Tuple};

/// What there is to know about them beside the tables.
#[derive(Default, Debug)]
pub(crate) struct Flows {
    /// Original tuples that a description under way has mentioned
    mentioned: Option<HashSet<Tuple>>,
    refused: Refused,
}

/// Connections for which there was no room.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Refused {
    /// How often one was left to Linux
    pub total: u64,
    /// There has been no room made since
    pub full: bool,
}

impl Flows {
    pub fn refused(&self) -> Refused {
        self.refused
    }

    pub fn set<B: Backing, G: Grace>(&mut self, tables: &mut TableWriter<B, G>, connection: &Connection) {
        if let Some(mentioned) = &mut self.mentioned {
            mentioned.insert(connection.original);
        }
        if tables.set_flow(connection).is_err() {
            self.refused = Refused { total: self.refused.total + 1, full: true };
        }
    }

    pub fn remove<B: Backing, G: Grace>(&mut self, tables: &mut TableWriter<B, G>, original: &Tuple) {
        if tables.remove_flow(original).is_some() {
            self.refused.full = false;
        }
    }

    /// A description of all connections begins.
    pub fn begin(&mut self) {
        self.mentioned = Some(HashSet::new());
    }

    /// It is complete: what it has not mentioned is gone.
    pub fn end<B: Backing, G: Grace>(&mut self, tables: &mut TableWriter<B, G>) {
        let Some(mentioned) = self.mentioned.take() else {
            tracing::warn!("end of a description of connections that was not begun");
            return;
        };
        let originals = tables.flows().map(|flow| flow.connection.original);
        let gone: Vec<_> = originals.filter(|original| !mentioned.contains(original)).collect();
        gone.iter().for_each(|original| self.remove(tables, original));
    }
}
