//! Prints what CM tells about the network namespace it runs in, and how long the first description took.
//! `cm-watch -q` prints only the latter and goes on counting.

use std::os::fd::AsFd;
use std::time::Instant;
use towpath_cm::{Cm, CmError, FlowMode, Options, guard};
use towpath_fpc::{Message, Snapshot};
use towpath_tables::record::Family;

fn main() -> Result<(), CmError> {
    let quiet = std::env::args().any(|arg| arg == "-q");
    let once = std::env::args().any(|arg| arg == "-1");
    let (never, stop) = std::io::pipe().map_err(|e| CmError::io("pipe", e))?;
    let started = Instant::now();
    let mut stop = Some(stop);
    let mut count = 0;
    let mut sink = |batch: Vec<Message>| {
        for message in &batch {
            if !quiet {
                println!("{message:?}");
            }
        }
        count += batch.len();
        if batch.contains(&Message::SnapshotEnd(Snapshot::Routes(Family::V6))) {
            eprintln!("{count} messages in {:?}", started.elapsed());
            if once {
                stop = None;
            }
        }
        Ok(())
    };
    Cm::new(Options::default(), guard::watchers(FlowMode::default())?)?.run(&mut sink, never.as_fd())
}
