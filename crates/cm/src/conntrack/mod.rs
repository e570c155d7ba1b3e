//! Connections that Linux hands over, by ctnetlink.
//!
//! A dump only proposes, an event decides: what a dump shows may be over already, and an entry older than the first
//! listener says nothing of its end (`nf_conntrack_events` 2, net/netfilter/nf_conntrack_ecache.c, Linux 6.1). So an
//! entry that a dump shows and that is not known yet is *touched*, by a change that changes nothing: an entry that
//! tells its events tells itself whole then. The others stay in Linux. Where windows are still checked, the same
//! change ends that.
//!
//! A flowtable takes connections without an event of its own (only what the same packet changes besides is told),
//! so that all entries are dumped now and then; that also finds what was lost.

pub mod entry;
mod judge;
mod mode;
mod table;

pub use mode::{FlowMode, FlowModeError};
pub use table::{Change, Table, Timeouts};

use crate::error::CmError;
use crate::netlink::{
    self, Channel, Incoming, NETLINK_NETFILTER, NLM_F_REQUEST_DUMP, NLMSG_DONE, NLMSG_ERROR, Received,
};
use entry::{Entry, Labels, status};
use judge::{Verdict, judge};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use towpath_fpc::{Listener, Message, Snapshot};
use towpath_tables::flow::Tuple;

/// NFNLGRP_CONNTRACK_NEW, _UPDATE and _DESTROY.
const GROUPS: &[u32] = &[1, 2, 3];
/// NFNL_SUBSYS_CTNETLINK with IPCTNL_MSG_CT_NEW, _GET and _DELETE.
const NEW: u16 = 0x100;
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
const NLM_F_REQUEST: u16 = 1;

/// Events read, and entries touched, before others get their turn again.
const AT_ONCE: usize = 64;
/// Room that the listener has for the events of each entry that is touched: they come while it does not read.
const ROOM: usize = 2048;
/// Dumps are this far apart at least, and this multiple of the time that the last one took.
const INTERVAL: Duration = Duration::from_secs(5);
const REST: u32 = 50;
/// A flowtable that was removed lets go of its connections a moment after the rules have changed.
const SETTLED: Duration = Duration::from_secs(1);
/// How soon connection tracking that could not be read is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// A connection that was handed over.
struct Known {
    /// `Session::epoch` in which it was last seen to be chosen
    epoch: u32,
    /// `Session::dumps` when it was last told
    told: u32,
    /// Connection mark
    mark: u32,
    /// Its labels, as told last
    labels: Option<Box<Labels>>,
}

/// The mirror of a network namespace's connections. It works while there are rules that connections may pass.
pub struct Mirror {
    mode: FlowMode,
    observe: bool,
    receive_buffer: usize,
    generations: BTreeSet<u32>,
    session: Option<Session>,
    /// The session's listener is new
    opened: bool,
    retry: Option<Instant>,
    /// It was said that it cannot be read
    said: bool,
    malformed: u64,
}

/// What lasts while connection tracking is being read.
struct Session {
    /// Windows stay checked
    observe: bool,
    listener: Channel,
    dumper: Channel,
    toucher: Channel,
    known: HashMap<Tuple, Known>,
    /// Entries that were touched because of this dump, or of the one before, and have not answered
    asked: [HashSet<Tuple>; 2],
    /// Entries to be touched, and whether their windows are to be checked no longer
    touch: VecDeque<(Tuple, bool)>,
    /// Rises when it has to be seen anew which connections are chosen
    epoch: u32,
    dumps: u32,
    /// Sequence number and beginning of the dump under way
    dump: Option<(u32, Instant)>,
    due: Instant,
    /// When the rules' change has settled
    settled: Option<Instant>,
}

impl Mirror {
    /// One that has not begun. `observe`: no entry is changed, see `Options::observe`.
    pub fn new(mode: FlowMode, observe: bool, receive_buffer: usize) -> Self {
        Self {
            mode,
            observe,
            receive_buffer,
            generations: BTreeSet::new(),
            session: None,
            opened: false,
            retry: None,
            said: false,
            malformed: 0,
        }
    }

    /// Connections may pass rules of these generations: none, or others than before.
    pub fn rules(&mut self, generations: BTreeSet<u32>, out: &mut Vec<Message>) {
        if generations == self.generations {
            return;
        }
        self.generations = generations;
        if self.generations.is_empty() {
            self.close(out);
            self.retry = None;
        } else if let Some(session) = &mut self.session {
            session.rules_changed();
        } else {
            self.retry = Some(Instant::now());
        }
    }

    /// The listener, if it was opened since the last call.
    pub fn take_opened(&mut self) -> Option<BorrowedFd<'_>> {
        let opened = std::mem::take(&mut self.opened);
        self.session.as_ref().filter(|_| opened).map(|session| session.listener.as_fd())
    }

    /// When there is something to do even if nothing happens.
    pub fn due(&self) -> Option<Instant> {
        self.session.as_ref().map(|session| session.due).or(self.retry)
    }

    /// Does a little of what is to be done; true if there is more.
    pub fn step(&mut self, buffer: &mut [u8], out: &mut Vec<Message>) -> bool {
        match self.try_step(buffer, out) {
            Ok(busy) => {
                self.said &= self.session.is_none();
                busy
            }
            Err(error) => {
                if !self.said {
                    tracing::warn!(%error, "connections cannot be read, and stay in Linux");
                }
                self.said = true;
                self.close(out);
                self.retry = Some(Instant::now() + RETRY);
                false
            }
        }
    }

    fn try_step(&mut self, buffer: &mut [u8], out: &mut Vec<Message>) -> Result<bool, CmError> {
        if self.retry.is_some_and(|retry| retry <= Instant::now()) {
            self.open()?;
        }
        let Some(session) = &mut self.session else { return Ok(false) };
        let mut busy = false;
        for _ in 0..AT_ONCE {
            match session.listener.receive(buffer)? {
                Received::Empty => break,
                Received::Bytes(length) => {
                    for message in netlink::messages(buffer.get(..length).unwrap_or_default()) {
                        session.event(&message?, self.mode, &mut self.malformed, out)?;
                    }
                    busy = true;
                }
                Received::Overrun => {
                    tracing::warn!("notifications of connections were lost: all are read again");
                    out.push(Message::Lost(Listener::Connections));
                    // What is still queued is older than what was lost.
                    session.listener = listener(self.receive_buffer)?;
                    self.opened = true;
                    session.due = Instant::now();
                    session.dump = None;
                    // Their answers may be among what was lost.
                    session.asked = Default::default();
                    return Ok(true);
                }
            }
        }
        busy |= session.step_dump(buffer, self.mode, &mut self.malformed, out)?;
        busy |= session.step_touch(buffer, (self.receive_buffer / ROOM).clamp(1, AT_ONCE))?;
        Ok(busy)
    }

    fn open(&mut self) -> Result<(), CmError> {
        self.session = Some(Session {
            observe: self.observe,
            // Before anything is read: what happens from now on is told.
            listener: listener(self.receive_buffer)?,
            dumper: Channel::requester(NETLINK_NETFILTER)?,
            toucher: Channel::requester(NETLINK_NETFILTER)?,
            known: HashMap::new(),
            asked: Default::default(),
            touch: VecDeque::new(),
            epoch: 0,
            dumps: 0,
            dump: None,
            due: Instant::now(),
            settled: None,
        });
        self.opened = true;
        self.retry = None;
        Ok(())
    }

    /// No connection is handed over any more.
    fn close(&mut self, out: &mut Vec<Message>) {
        if self.session.take().is_some() {
            out.extend([Message::SnapshotBegin(Snapshot::Flows), Message::SnapshotEnd(Snapshot::Flows)]);
        }
    }
}

fn listener(receive_buffer: usize) -> Result<Channel, CmError> {
    Channel::listener(NETLINK_NETFILTER, GROUPS, receive_buffer)
}

/// Decodes an entry; one that makes no sense is counted, and passed over.
fn decode(payload: &[u8], malformed: &mut u64) -> Option<Entry> {
    match Entry::parse(payload) {
        Ok(entry) => entry,
        Err(error) => {
            *malformed += 1;
            if malformed.is_power_of_two() {
                tracing::warn!(%error, malformed, "a connection stays in Linux");
            }
            None
        }
    }
}

impl Session {
    fn rules_changed(&mut self) {
        self.epoch += 1;
        self.due = Instant::now();
        self.dump = None;
        self.settled = Some(Instant::now() + SETTLED);
    }

    /// Something happened to an entry.
    fn event(
        &mut self,
        message: &Incoming<'_>,
        mode: FlowMode,
        malformed: &mut u64,
        out: &mut Vec<Message>,
    ) -> Result<(), CmError> {
        let gone = match message.kind {
            NEW => false,
            DELETE => true,
            _ => return Ok(()),
        };
        let Some(entry) = decode(message.payload, malformed) else { return Ok(()) };
        let original = entry.connection.original;
        for asked in &mut self.asked {
            asked.remove(&original);
        }
        match self.judge(&entry, mode, self.is_chosen(&original)) {
            _ if gone => self.forget(&original, out),
            Verdict::Yes => self.tell(&entry, false, out),
            Verdict::No => self.forget(&original, out),
            // It was asked, and this is all that it says.
            Verdict::Ask if message.port == self.toucher.port() => self.forget(&original, out),
            Verdict::Ask => self.touch.push_back((original, original.is_tcp())),
        }
        Ok(())
    }

    /// A dump shows an entry.
    fn shown(&mut self, entry: &Entry, mode: FlowMode, out: &mut Vec<Message>) {
        let original = entry.connection.original;
        let (known, chosen) = (self.known.contains_key(&original), self.is_chosen(&original));
        match self.judge(entry, mode, chosen) {
            Verdict::No if !known => return,
            Verdict::Yes if known => return self.tell(entry, true, out),
            _ => {}
        }
        if let Some(known) = self.known.get_mut(&original) {
            // What happens to it is told, so it is what it was until it says otherwise.
            known.told = self.dumps;
            out.push(Message::Flow(entry.connection));
        }
        let asked = self.asked[1].contains(&original);
        if self.asked[0].insert(original) && !asked {
            self.touch.push_back((original, original.is_tcp()));
        }
    }

    /// As `judge`; whoever changes nothing does not mind windows that are checked.
    fn judge(&self, entry: &Entry, mode: FlowMode, handed: bool) -> Verdict {
        match judge(entry, mode, handed) {
            Verdict::Ask if self.observe && entry.tcp.is_some() => Verdict::Yes,
            verdict => verdict,
        }
    }

    fn is_chosen(&self, original: &Tuple) -> bool {
        self.known.get(original).is_some_and(|known| known.epoch == self.epoch)
    }

    /// Tells a connection that is chosen, as an event or a dump shows it.
    fn tell(&mut self, entry: &Entry, dumped: bool, out: &mut Vec<Message>) {
        let original = entry.connection.original;
        let labels = entry.labels.map(Box::new);
        match self.known.get_mut(&original) {
            Some(known) => {
                // Rules may decide by these: of others, Linux has to accept a packet anew. An event that is not about labels
                // does not tell them, and neither does one that takes them all away (`ctnetlink_dump_labels`).
                if known.mark != entry.mark || known.labels != labels {
                    out.push(Message::FlowDelete(original));
                }
                known.labels = labels.or_else(|| known.labels.take().filter(|_| !dumped));
                (known.epoch, known.told, known.mark) = (self.epoch, self.dumps, entry.mark);
            }
            None => {
                let known = Known { epoch: self.epoch, told: self.dumps, mark: entry.mark, labels };
                self.known.insert(original, known);
            }
        }
        out.push(Message::Flow(entry.connection));
    }

    fn forget(&mut self, original: &Tuple, out: &mut Vec<Message>) {
        if self.known.remove(original).is_some() {
            out.push(Message::FlowDelete(*original));
        }
    }

    /// Begins a dump that is due, or reads a part of the one under way; true if there is more.
    fn step_dump(
        &mut self,
        buffer: &mut [u8],
        mode: FlowMode,
        malformed: &mut u64,
        out: &mut Vec<Message>,
    ) -> Result<bool, CmError> {
        let Some((sequence, started)) = self.dump else { return self.begin_dump(mode, out) };
        let length = match self.dumper.receive(buffer)? {
            Received::Bytes(length) => length,
            Received::Empty => return Ok(false),
            Received::Overrun => return Err(CmError::decode("connections", "the kernel's answer does not fit")),
        };
        for message in netlink::messages(buffer.get(..length).unwrap_or_default()) {
            let message = message?;
            match message.kind {
                _ if message.sequence != sequence => {}
                NLMSG_ERROR | NLMSG_DONE => {
                    netlink::failure("dump of connections", &message).map_or(Ok(()), Err)?;
                    self.end_dump(started, out);
                    return Ok(true);
                }
                NEW => {
                    if let Some(entry) = decode(message.payload, malformed) {
                        self.shown(&entry, mode, out);
                    }
                }
                _ => {}
            }
        }
        Ok(true)
    }

    fn begin_dump(&mut self, mode: FlowMode, out: &mut Vec<Message>) -> Result<bool, CmError> {
        let now = Instant::now();
        if now < self.due {
            return Ok(false);
        }
        if self.settled.is_some_and(|settled| settled <= now) {
            self.settled = None;
            self.epoch += 1;
        }
        self.dumps += 1;
        out.push(Message::SnapshotBegin(Snapshot::Flows));
        // A dump that was given up would be in the way of this one.
        self.dumper = Channel::requester(NETLINK_NETFILTER)?;
        let mut request = Vec::new();
        // A flowtable also takes what was not answered.
        let wanted = if mode == FlowMode::Flowtable { status::CONFIRMED } else { status::SEEN_REPLY };
        let body = [vec![0; 4], entry::with_status(wanted)].concat();
        let sequence = self.dumper.put(GET, NLM_F_REQUEST_DUMP, &body, &mut request);
        self.dumper.send(&request, || "asking for a dump of connections".to_owned())?;
        self.dump = Some((sequence, now));
        Ok(true)
    }

    fn end_dump(&mut self, started: Instant, out: &mut Vec<Message>) {
        self.known.retain(|_, known| known.told == self.dumps);
        out.push(Message::SnapshotEnd(Snapshot::Flows));
        self.asked[1] = std::mem::take(&mut self.asked[0]);
        self.dump = None;
        let now = Instant::now();
        let next = now + INTERVAL.max((now - started) * REST);
        self.due = self.settled.map_or(next, |settled| settled.min(next));
    }

    /// Touches at most `count` of the entries that are to be touched; true if there may be more.
    fn step_touch(&mut self, buffer: &mut [u8], count: usize) -> Result<bool, CmError> {
        // Refusals: entries that are gone have told it themselves, and others stay in Linux.
        while !matches!(self.toucher.receive(buffer)?, Received::Empty) {}
        let mut requests = Vec::new();
        for (original, tcp) in self.touch.drain(..self.touch.len().min(count)) {
            let mut body = entry::named(&original);
            if tcp && !self.observe {
                body.extend(entry::liberal());
            }
            self.toucher.put(NEW, NLM_F_REQUEST, &body, &mut requests);
        }
        if requests.is_empty() {
            return Ok(false);
        }
        self.toucher.send(&requests, || "touching connections".to_owned())?;
        Ok(true)
    }
}
