//! Fuzz targets: functions that take any bytes and panic if what they try breaks a promise. They are run in two ways: by
//! the tests, on what is kept in `corpus/`, on seeds and on both with bytes changed; and by libFuzzer, which looks for bytes
//! that take other ways through the code (`scripts/fuzz.sh`).

mod filters;
mod frames;
mod manager;
mod messages;
mod netlink;
mod tables;

use std::path::{Path, PathBuf};
use towpath_tables::backing::{HeapBacking, initial_elements};
use towpath_tables::record::TableId;

/// A function to be tried with any bytes.
pub struct Target {
    /// Its name
    pub name: &'static str,
    /// Tries it
    pub run: fn(&[u8]),
    /// Bytes from which others are made
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 6] = [
    Target { name: "frames", run: frames::run, seeds: frames::seeds },
    Target { name: "messages", run: messages::run, seeds: messages::seeds },
    Target { name: "manager", run: manager::run, seeds: messages::seeds },
    Target { name: "netlink", run: netlink::run, seeds: netlink::seeds },
    Target { name: "filters", run: filters::run, seeds: filters::seeds },
    Target { name: "tables", run: tables::run, seeds: tables::seeds },
];

/// The target with a name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// What is kept for it: one input a line, in hexadecimal digits.
    pub fn corpus(&self) -> Vec<Vec<u8>> {
        let text = std::fs::read_to_string(self.corpus_file()).unwrap_or_default();
        text.lines().map(|line| from_hex(line).unwrap_or_else(|| panic!("{}: {line:?}", self.name))).collect()
    }

    /// Where that lies.
    pub fn corpus_file(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name).with_extension("hex")
    }
}

/// The bytes that hexadecimal digits stand for.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|digit| Some(digit.to_digit(16)? as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// Takes a fixed number of bytes from the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*taken)
}

/// Tables that are soon looked through, and grow as they must.
fn small_tables() -> HeapBacking {
    HeapBacking::new(
        initial_elements(1).with(TableId::Nodes, 64).with(TableId::Nexthops, 32).with(TableId::NexthopKeys, 32),
    )
}
