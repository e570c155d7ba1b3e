//! What Linux is told to do with forwarded packets, read once: for a look without a fast path. Interfaces are described by a
//! manager that ends when it has told them all, policies by the watchers.

use crate::conntrack::FlowMode;
use crate::error::CmError;
use crate::guard;
use crate::manager::{Cm, Options};
use crate::watch::PortIndex;
use crate::watched::Watched;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use towpath_fpc::{Message, Policy, Snapshot};

/// The manager is not followed for long, so little has to wait.
const RECEIVE_BUFFER: usize = 1 << 20;

/// The interfaces of the calling thread's network namespace, as a fast path manager is told them.
pub fn ports() -> Result<PortIndex, CmError> {
    let (stop, stopped) = UnixStream::pair().map_err(|e| CmError::io("a pair of sockets", e))?;
    let (mut ports, mut stop) = (PortIndex::default(), Some(stop));
    let mut take = |messages: Vec<Message>| {
        for message in messages {
            match message {
                Message::Port(port) => drop(ports.insert(port)),
                Message::PortDelete(ifindex) => drop(ports.remove(ifindex)),
                // To close this end is the signal to stop.
                Message::SnapshotEnd(Snapshot::Ports) => drop(stop.take()),
                _ => {}
            }
        }
        Ok(())
    };
    let options = Options { receive_buffer: RECEIVE_BUFFER, flows: FlowMode::None, ..Options::default() };
    Cm::new(options, Vec::new())?.run(&mut take, stopped.as_fd())?;
    Ok(ports)
}

/// What stands in the way of the fast path where these connections are handed over.
pub fn policies(ports: &PortIndex, flows: FlowMode) -> Result<Vec<Policy>, CmError> {
    let found = guard::watchers(flows)?.into_iter().flat_map(|watcher| Watched::new(watcher).poll(ports).messages);
    let policy = |message| match message {
        Message::Policy(policy) => Some(policy),
        _ => None,
    };
    Ok(found.filter_map(policy).collect())
}
