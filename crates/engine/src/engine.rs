//! An instance: its place, its tables, its program and the ports it serves.

use crate::attach::{self, Attachment, Mode, Notice};
use crate::bpffs::{PinDir, netns_inode};
use crate::error::{Error, Result};
use crate::grace::GraceMethod;
use crate::interface::Interface;
use crate::netfpc::{PortFacts, Request};
use crate::program::{NAME_CAPTURE, Program, ProgramFacts, load_translators};
use crate::region::{ConfigTable, Maps, Region, STAGED, Targets, entries_of, map_names, staged_name};
use crate::trace::{Ring, Seen, Trace, Traces};
use crate::{require, sys, tc};
use aya_obj::generated::bpf_prog_info;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use towpath_filter::Capture;
use towpath_tables::backing::{Backing, GrowError, PerTable, RawTables};
use towpath_tables::brake::Brake;
use towpath_tables::record::{SOCKET_QUEUES, TableId};

/// Name of the program's pin.
const PROGRAM: &str = "program";

/// Choices of the user.
#[derive(Clone, Copy, Default, Debug)]
pub struct Options {
    /// How to attach
    pub mode: Mode,
    /// Frames go to sockets of the user engine where there are some
    pub sockets: bool,
    /// It is only found out what would be forwarded: everything is Linux's. Not with sockets
    pub shadow: bool,
    /// There may be flows: what Linux transmits can be looked at, see `Engine::watch_transmitted`
    pub flows: bool,
    /// How long the programs go on after the last heartbeat (`ConfigTable::beat`); None: for good. Then all packets are
    /// Linux's until the next one
    pub patience: Option<Duration>,
}

impl Options {
    /// Only a driver in native mode has something beside its frames.
    pub(crate) fn looks(self) -> bool {
        self.mode == Mode::Native
    }
}

/// A port to serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortRequest {
    /// Interface index
    pub ifindex: u32,
    /// Slot in the port table
    pub slot: u32,
}

/// The place of an instance: this thread's network namespace and its folder of pins.
#[derive(Debug)]
pub struct Site {
    dir: PinDir,
    options: Options,
}

impl Site {
    /// Checks capabilities and kernel features and finds the bpffs, mounting one if there is none. Changes nothing
    /// else.
    pub fn prepare(options: Options) -> Result<Self> {
        require::check()?;
        Ok(Self { dir: PinDir::find(netns_inode()?)?, options })
    }

    /// Folder of the pins.
    pub fn shown(&self) -> &Path {
        self.dir.shown()
    }

    /// True if a former process left pins here.
    pub fn exists(&self) -> bool {
        self.dir.exists()
    }

    /// Interfaces that a former process attached to and left attached.
    pub fn attached(&self) -> Result<Vec<u32>> {
        Ok(self.dir.names()?.iter().filter_map(|name| attach::pinned_index(name)).collect())
    }

    /// Interfaces with the programs that translate addresses, of a former process too.
    fn translated(&self) -> Result<BTreeSet<u32>> {
        let names = self.dir.names()?;
        Ok(tc::TRANSLATE.iter().flat_map(|hook| names.iter().filter_map(|name| hook.index(name))).collect())
    }

    fn take_translators_off(&self, index: u32) -> Result<()> {
        tc::TRANSLATE.iter().try_for_each(|hook| tc::take_off(&self.dir, hook, index))
    }

    /// What attaching to these interfaces will do besides, for the user to know beforehand. Fails for an interface
    /// that does not exist or carries another XDP program.
    pub fn announce(&self, ports: &[u32]) -> Result<Vec<Notice>> {
        let ours = self.attached()?;
        let mut notices = Vec::new();
        for &index in ports.iter().filter(|index| !ours.contains(index)) {
            let interface = Interface::query(index)?;
            if let Some(other) = interface.xdp {
                return Err(Error::OtherProgram {
                    port: interface.name,
                    id: other.id,
                    name: other.name,
                    mode: other.mode,
                });
            }
            notices.extend(attach::announce(&interface, self.options.mode)?);
        }
        Ok(notices)
    }

    /// Makes empty tables of these sizes. Ports that a former process left keep their old program and tables until
    /// `attach`.
    pub fn create(mut self, sizes: &PerTable) -> Result<Engine> {
        self.dir.create()?;
        // Mappings are in tables that nobody takes over.
        self.translated()?.into_iter().try_for_each(|index| self.take_translators_off(index))?;
        let made = self
            .discard_staged()
            .and_then(|()| Ok((Region::create(&self.dir, sizes)?, self.open_links()?, GraceMethod::choose()?)));
        match made {
            Ok((region, links, grace)) => {
                let ports = links.into_iter().map(|(index, link)| (index, Port::new(link, None))).collect();
                Ok(Engine::new(Core::new(self, region, ports, grace)))
            }
            Err(e) => {
                self.discard();
                Err(e)
            }
        }
    }

    /// Finds the tables and ports that a former process left. Fails with `Incomplete` if there is nothing whole to take
    /// over: then `create`.
    pub fn left(self) -> Result<Left> {
        let links = self.open_links()?;
        self.recover(&links)?;
        let ended = |index: &u32| !tc::TRANSLATE.iter().all(|hook| tc::runs_on(&self.dir, hook, *index));
        self.translated()?.into_iter().filter(ended).try_for_each(|index| self.take_translators_off(index))?;
        Ok(Left { region: Region::adopt(&self.dir)?, links, site: self })
    }

    /// Takes off whatever a former process left; nothing if there is nothing.
    pub fn teardown(self) -> Result<()> {
        for index in self.attached()? {
            attach::release(&self.dir, index)?;
        }
        self.translated()?.into_iter().try_for_each(|index| self.take_translators_off(index))?;
        self.dir.remove_all()
    }

    /// Links of interfaces that still exist; pins of others are removed.
    fn open_links(&self) -> Result<Vec<(u32, OwnedFd)>> {
        let mut links = Vec::new();
        for index in self.attached()? {
            let failed = |e| Error::io(format!("open the link of interface {index}"), e);
            let link = sys::get_pinned(&self.dir.pin(&attach::link_pin(index))).map_err(failed)?;
            match sys::link_info(link.as_fd()).map_err(failed)?.ifindex {
                0 => attach::release(&self.dir, index)?,
                _ => links.push((index, link)),
            }
        }
        Ok(links)
    }

    /// After a crash between staging tables and giving them their names: staged tables that a program in a link uses
    /// are whole and in use, so they get the names; others are discarded.
    fn recover(&self, links: &[(u32, OwnedFd)]) -> Result<()> {
        let programs = self.programs()?;
        let mut used = Vec::new();
        for (index, link) in links {
            let failed = |e| Error::io(format!("ask for the tables in use on interface {index}"), e);
            let id = sys::link_info(link.as_fd()).map_err(failed)?.program_id;
            let program = programs.get(&id).ok_or_else(|| Error::Incomplete {
                place: self.shown().display().to_string(),
                why: format!("interface {index} runs a program (id {id}) that is not kept there"),
            })?;
            used.extend(sys::program_map_ids(program.as_fd()).map_err(failed)?);
        }
        for name in map_names() {
            let staged = staged_name(name);
            let Ok(map) = sys::get_pinned(&self.dir.pin(&staged)) else { continue };
            let info = sys::map_info(map.as_fd()).map_err(|e| Error::io(format!("ask about {staged}"), e))?;
            if used.contains(&info.id) {
                self.dir.rename(&staged, name)?;
            }
        }
        self.discard_staged()
    }

    /// Pinned programs by id: the one in use, and one that a crash kept from taking its place everywhere. (To open a
    /// program by its id takes more capabilities than anything else here.)
    fn programs(&self) -> Result<BTreeMap<u32, OwnedFd>> {
        let mut programs = BTreeMap::new();
        for name in [PROGRAM.to_owned(), staged_name(PROGRAM)] {
            let Ok(program) = sys::get_pinned(&self.dir.pin(&name)) else { continue };
            let info = sys::program_info(program.as_fd()).map_err(|e| Error::io(format!("ask about {name}"), e))?;
            programs.insert(info.id, program);
        }
        Ok(programs)
    }

    fn discard_staged(&self) -> Result<()> {
        let names = self.dir.names()?;
        names.iter().filter(|name| name.ends_with(STAGED)).try_for_each(|name| self.dir.remove(name))
    }

    fn discard(&self) {
        if let Err(e) = self.discard_staged() {
            tracing::warn!("tables that are not used remain pinned: {e}");
        }
        self.dir.discard_if_created();
    }
}

/// What a former process left. Its programs go on by its tables.
#[derive(Debug)]
pub struct Left {
    site: Site,
    region: Region,
    links: Vec<(u32, OwnedFd)>,
}

impl Left {
    /// What holds for all its tables.
    pub fn config(&self) -> ConfigTable {
        self.region.config()
    }

    /// Records that a table has room for.
    pub fn elements(&self, table: TableId) -> usize {
        self.region.len(table) as usize
    }

    /// Whether its programs let Linux have what captures are to see, which this binary's will not do at first.
    pub fn has_captures(&self) -> Result<bool> {
        let failed = |e| Error::io("ask about the programs that were left", e);
        let programs = self.site.programs()?;
        let infos = programs.values().map(|program| sys::program_info(program.as_fd()).map_err(failed));
        let infos = infos.collect::<Result<Vec<_>>>()?;
        let name = |info: &bpf_prog_info| info.name.map(|byte| byte as u8);
        Ok(infos.iter().any(|info| name(info).starts_with(NAME_CAPTURE.as_bytes())))
    }

    /// Takes it over, with this binary's program. Packets flow by the old state meanwhile.
    pub fn adopt(self) -> Result<Engine> {
        let Self { site, region, links } = self;
        let mut core = Core::new(site, region, BTreeMap::new(), GraceMethod::choose()?);
        let program = core.load()?;
        let slots = core.device_slots()?;
        for (index, link) in links {
            core.ports.insert(index, Port::new(link, slots.get(&index).copied()));
        }
        // The program for one mode must not run in the other: it would look beside frames in the wrong place.
        core.leave_other_mode()?;
        core.switch_links(&program)?;
        core.name_program()?;
        Ok(Engine::new(core))
    }
}

/// A port being served.
#[derive(Debug)]
struct Port {
    link: OwnedFd,
    /// Slot of the port table it transmits for
    slot: Option<u32>,
    up: bool,
    promiscuous: bool,
}

impl Port {
    /// A port is taken to be up until something else is said.
    fn new(link: OwnedFd, slot: Option<u32>) -> Self {
        Self { link, slot, up: true, promiscuous: false }
    }
}

#[derive(Debug)]
struct Core {
    site: Site,
    region: Region,
    /// None while the tables are staged and may still grow: the kernel takes long to verify one
    program: Option<Arc<Program>>,
    /// What the program lets Linux have
    captures: Vec<Capture>,
    /// What it tells of
    traces: Traces,
    /// What Linux transmits is looked at, on all ports
    watching: bool,
    ports: BTreeMap<u32, Port>,
    grace: GraceMethod,
}

impl Drop for Core {
    /// Tables that never came into use are of no use to anybody.
    fn drop(&mut self) {
        if self.region.staged() {
            self.site.discard();
        }
    }
}

impl Core {
    fn new(site: Site, region: Region, ports: BTreeMap<u32, Port>, grace: GraceMethod) -> Self {
        let (captures, traces) = (Vec::new(), Traces::default());
        Self { site, region, program: None, captures, traces, watching: false, ports, grace }
    }

    /// The program, loaded against the tables as they are unless that is done.
    fn load(&mut self) -> Result<Arc<Program>> {
        if let Some(program) = &self.program {
            return Ok(program.clone());
        }
        let program = Arc::new(self.load_with(None, &self.captures, &self.traces)?);
        self.program = Some(program.clone());
        Ok(program)
    }

    /// A new program; `grown` is a table that is to take the place of a smaller one.
    fn load_with(&self, grown: Option<TableId>, captures: &[Capture], traces: &Traces) -> Result<Program> {
        Program::load(&self.region.pins(&self.site.dir, grown), self.site.options, captures, traces)
    }

    /// Which slot each interface in the map of devices transmits for.
    fn device_slots(&self) -> Result<BTreeMap<u32, u32>> {
        let mut slots = BTreeMap::new();
        for slot in 0..self.region.len(TableId::Ports) {
            let device = sys::map_lookup::<[u32; 2]>(self.region.targets(Targets::Devices), slot);
            if let Some([index, _]) = device.map_err(|e| Error::io("read the map of devices", e))? {
                slots.insert(index, slot);
            }
        }
        Ok(slots)
    }

    fn set_device(&self, slot: u32, ifindex: Option<u32>) -> Result<()> {
        let map = self.region.targets(Targets::Devices);
        let done = match ifindex {
            Some(index) => sys::map_update(map, slot, &[index, 0]),
            None => sys::map_delete(map, slot),
        };
        done.map_err(|e| Error::privileged(format!("enter port slot {slot} in the map of devices"), "CAP_NET_ADMIN", e))
    }

    /// Puts a program into every link. It is pinned before, so that whoever comes after a crash finds what runs.
    fn switch_links(&self, program: &Program) -> Result<()> {
        let (dir, staged) = (&self.site.dir, staged_name(PROGRAM));
        dir.remove(&staged)?;
        sys::pin(program.fd(), &dir.pin(&staged)).map_err(|e| Error::io("pin the program", e))?;
        self.ports.iter().try_for_each(|(index, port)| self.switch(program, *index, port))
    }

    /// The program that `switch_links` put into every link takes the final name.
    fn name_program(&self) -> Result<()> {
        self.site.dir.rename(&staged_name(PROGRAM), PROGRAM)
    }

    fn switch(&self, program: &Program, index: u32, port: &Port) -> Result<()> {
        match sys::link_update(port.link.as_fd(), program.fd()) {
            // ENOLINK: the interface is gone; the manager will hear of it and remove the port.
            Err(e) if e.raw_os_error() != Some(libc::ENOLINK) => {
                Err(Error::privileged(format!("replace the program of interface {index}"), "CAP_NET_ADMIN", e))
            }
            _ => self.put_accept_on(program, index),
        }
    }

    /// Has the tc program that goes with a program run on an interface, if it is wanted or an older one does, or none.
    fn put_accept_on(&self, program: &Program, index: u32) -> Result<()> {
        let dir = &self.site.dir;
        match program.accept() {
            Some(accept) if self.watching || tc::is_on(dir, &tc::ACCEPT, index) => {
                tc::put_on(dir, &tc::ACCEPT, accept, index)
            }
            Some(_) => Ok(()),
            None => tc::take_off(dir, &tc::ACCEPT, index),
        }
    }

    fn watch_transmitted(&mut self) -> Result<()> {
        if !self.site.options.flows {
            return Ok(());
        }
        self.watching = true;
        let Some(program) = &self.program else { return Ok(()) };
        let dir = &self.site.dir;
        let mut missing = self.ports.keys().filter(|index| !tc::is_on(dir, &tc::ACCEPT, **index));
        missing.try_for_each(|index| self.put_accept_on(program, *index))
    }

    /// See `Engine::translate`.
    fn translate(&self, index: u32, on: bool) -> Result<()> {
        if !on {
            return self.site.take_translators_off(index);
        }
        // The tables that these programs read never grow, so they stay as they are.
        let programs = load_translators(&self.region.pins(&self.site.dir, None))?;
        let mut hooks = tc::TRANSLATE.iter().zip(&programs);
        let put = hooks.try_for_each(|(hook, program)| tc::put_on(&self.site.dir, hook, program.as_fd(), index));
        if put.is_err() {
            self.site.take_translators_off(index)?;
        }
        put
    }

    /// New tables come into use: every port gets the program that knows them, then their pins the final names.
    fn commit(&mut self) -> Result<()> {
        let program = self.load()?;
        self.switch_links(&program)?;
        self.name_program()?;
        self.region.commit(&self.site.dir)
    }

    /// Takes the program off ports where a former process attached it in the other mode.
    fn leave_other_mode(&mut self) -> Result<()> {
        for index in self.ports.keys().copied().collect::<Vec<_>>() {
            let attached = Interface::query(index).ok().and_then(|interface| interface.xdp);
            if attached.is_some_and(|attached| attached.mode != self.site.options.mode.name()) {
                self.detach(index)?;
            }
        }
        Ok(())
    }

    fn attach(&mut self, requests: &[PortRequest]) -> Result<()> {
        self.leave_other_mode()?;
        let new: Vec<_> = requests.iter().filter(|request| !self.ports.contains_key(&request.ifindex)).collect();
        // Those that can fail come first: a veth takes any program.
        let program = self.load()?;
        let mut interfaces = new.iter().map(|request| Interface::query(request.ifindex)).collect::<Result<Vec<_>>>()?;
        interfaces.sort_by_key(Interface::is_veth);
        let attachments = interfaces
            .into_iter()
            .map(|interface| Ok((interface.index, Attachment::make(interface, program.fd(), self.site.options.mode)?)))
            .collect::<Result<Vec<_>>>()?;
        self.fill_devices(requests)?;
        for (done, request) in new.iter().enumerate() {
            if let Err(error) = self.put_accept_on(&program, request.ifindex) {
                new.iter().take(done).try_for_each(|done| tc::take_off(&self.site.dir, &tc::ACCEPT, done.ifindex))?;
                return Err(error);
            }
        }
        if self.region.staged() {
            self.commit()?;
        }
        for (index, attachment) in attachments {
            let link = attachment.pin(&self.site.dir)?;
            self.ports.insert(index, Port::new(link, None));
        }
        for request in requests {
            if let Some(port) = self.ports.get_mut(&request.ifindex) {
                port.slot = Some(request.slot);
            }
        }
        Ok(())
    }

    /// Enters the ports in the map of devices: all, or none of those that were not there.
    fn fill_devices(&self, requests: &[PortRequest]) -> Result<()> {
        for (done, request) in requests.iter().enumerate() {
            if let Err(error) = self.set_device(request.slot, Some(request.ifindex)) {
                for undone in requests.iter().take(done).filter(|r| !self.ports.contains_key(&r.ifindex)) {
                    self.set_device(undone.slot, None)?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn detach(&mut self, index: u32) -> Result<()> {
        if let Some(slot) = self.ports.get(&index).and_then(|port| port.slot) {
            self.set_device(slot, None)?;
        }
        attach::release(&self.site.dir, index)?;
        self.ports.remove(&index);
        Ok(())
    }

    /// How a port's driver runs the program that is in the port's link; None if it does not.
    fn mode_of(&self, index: u32, port: &Port) -> Result<Option<&'static str>> {
        let link = sys::link_info(port.link.as_fd())
            .map_err(|e| Error::io(format!("ask about the link of interface {index}"), e))?;
        let there = Interface::query(index)?.xdp.filter(|there| link.ifindex == index && link.program_id == there.id);
        Ok(there.map(|there| there.mode))
    }

    /// Attaches to a port again if its driver does not run the program any more.
    fn verify(&mut self, index: u32) -> Result<()> {
        let Some(port) = self.ports.get(&index) else { return Ok(()) };
        if self.mode_of(index, port)?.is_some() {
            return Ok(());
        }
        let program = self.load()?;
        let attachment = Attachment::make(Interface::query(index)?, program.fd(), self.site.options.mode)?;
        self.site.dir.remove(&attach::link_pin(index))?;
        let link = attachment.pin(&self.site.dir)?;
        if let Some(port) = self.ports.get_mut(&index) {
            port.link = link;
        }
        Ok(())
    }

    fn set_up(&mut self, index: u32, up: bool) -> Result<()> {
        let Some(port) = self.ports.get_mut(&index) else { return Ok(()) };
        port.up = up;
        match port.slot {
            Some(slot) => self.set_device(slot, up.then_some(index)),
            None => Ok(()),
        }
    }

    /// See `Engine::set_captures`.
    fn set_captures(&mut self, captures: &[Capture]) -> Result<()> {
        let program = self.load_with(None, captures, &self.traces)?;
        self.replace(program)?;
        self.captures = captures.to_vec();
        self.grace.wait()
    }

    /// See `Engine::set_trace`.
    fn set_trace(&mut self, number: usize, trace: Option<Trace>) -> Result<()> {
        let traces = self.traces.with(number, trace)?;
        let program = self.load_with(None, &self.captures, &traces)?;
        self.replace(program)?;
        self.traces = traces;
        Ok(())
    }

    /// A new program comes into use.
    fn replace(&mut self, program: Program) -> Result<()> {
        self.switch_links(&program)?;
        self.name_program()?;
        self.program = Some(Arc::new(program));
        Ok(())
    }

    /// See `Backing::grow`.
    fn grow(&mut self, id: TableId, elements: usize) -> Result<()> {
        let (name, size, wanted) = (id.name(), self.region.len(id), entries_of(id, elements)?);
        if wanted <= size {
            return Ok(());
        }
        if matches!(id, TableId::Mappings | TableId::MappingStats) {
            let why = "it has its size for good".to_owned();
            return Err(Error::Full { table: name, size, why });
        }
        if matches!(id, TableId::Config | TableId::Ports | TableId::Stats) {
            let why = "places in it follow from its size; leave out some ports".to_owned();
            return Err(Error::Full { table: name, size, why });
        }
        if matches!(id, TableId::Flows | TableId::FlowLines) {
            let why = "its size was chosen when the tables were made".to_owned();
            return Err(Error::Full { table: name, size, why });
        }
        let dir = &self.site.dir;
        let grown = self.region.enlarged(dir, id, wanted)?;
        if self.region.staged() {
            // Nobody uses the old table; to load the program can wait until all have their sizes.
            self.program = None;
            return self.region.install(dir, grown);
        }
        let program = match self.load_with(Some(id), &self.captures, &self.traces) {
            Ok(program) => Arc::new(program),
            Err(error) => {
                dir.remove(&staged_name(name))?;
                return Err(error);
            }
        };
        self.switch_links(&program)?;
        self.program = Some(program);
        self.region.install(&self.site.dir, grown)?;
        self.name_program()?;
        self.grace.wait()
    }
}

/// An engine in a network namespace. Calls must come from threads in that namespace.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Mutex<Core>>);

impl Engine {
    fn new(core: Core) -> Self {
        Self(Arc::new(Mutex::new(core)))
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        // A panic under the lock leaves at worst a step undone that the next call or `adopt` completes.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tables' memory: for the writer, who may let them grow, and for readers, whose view stays valid but old
    /// after a growth until they `refresh`.
    pub fn tables(&self) -> Tables {
        let core = self.core();
        let maps = core.region.maps().clone();
        let raw = maps.each_ref().map(|map| map.raw());
        Tables { engine: self.clone(), _maps: maps, raw, brake: core.region.brake().clone() }
    }

    /// What holds for all tables, for as long as the engine is.
    pub fn config(&self) -> ConfigTable {
        self.core().region.config()
    }

    /// See `Site::announce`.
    pub fn announce(&self, ports: &[u32]) -> Result<Vec<Notice>> {
        self.core().site.announce(ports)
    }

    /// Attaches to the ports that are not attached yet and enters all of them in the map of devices; new tables come
    /// into use. All or nothing: if it fails, programs and settings are what they were.
    pub fn attach(&self, ports: &[PortRequest]) -> Result<()> {
        self.core().attach(ports)
    }

    /// Has the frames of a port's queue go to this socket (AF_XDP, bound to the queue), or to none. They also go to none
    /// when the socket is closed; then the program forwards them itself.
    pub fn set_socket(&self, slot: u32, queue: u32, socket: Option<BorrowedFd<'_>>) -> Result<()> {
        let core = self.core();
        let (map, key) = (core.region.targets(Targets::Sockets), slot * SOCKET_QUEUES + queue);
        let done = match socket {
            Some(socket) => sys::map_update(map, key, &socket.as_raw_fd()),
            None => sys::map_delete(map, key),
        };
        let what = || format!("enter queue {queue} of port slot {slot} in the map of sockets");
        done.map_err(|e| Error::privileged(what(), "CAP_NET_ADMIN", e))
    }

    /// Has frames that match one of these go to Linux instead, on all ports that are attached to or will be. It holds for
    /// every frame when this returns; if it fails, at least those captures hold that were asked for before and now. The
    /// tables must be in use.
    pub fn set_captures(&self, captures: &[Capture]) -> Result<()> {
        self.core().set_captures(captures)
    }

    /// Has the program tell what becomes of packets, or no longer, for the trace with this number (below `TRACES`). The tables
    /// must be in use. Who takes what it tells has to open the ring anew when the first trace begins.
    pub fn set_trace(&self, number: usize, trace: Option<Trace>) -> Result<()> {
        self.core().set_trace(number, trace)
    }

    /// Where the program tells; None without traces.
    pub fn trace_ring(&self) -> Result<Option<Ring>> {
        self.core().traces.ring()
    }

    /// What the trace with this number has met.
    pub fn traced(&self, number: usize) -> Result<Seen> {
        self.core().traces.seen(number)
    }

    /// Looks at what Linux transmits, to know which flows it has accepted, on all ports that are attached or will be, as long
    /// as they are. Nothing if there are to be no flows. Before Linux 6.6 that takes a qdisc (clsact), and Linux drops what it
    /// would transmit by a port in the moment that the qdisc comes or goes (net/sched/sch_api.c `qdisc_graft`); what is
    /// forwarded fast is not affected.
    pub fn watch_transmitted(&self) -> Result<()> {
        self.core().watch_transmitted()
    }

    /// Has what Linux receives and transmits by an interface translated by the mappings of its port, or not any more. The
    /// tables must be in use.
    pub fn translate(&self, ifindex: u32, on: bool) -> Result<()> {
        self.core().translate(ifindex, on)
    }

    /// Interfaces where it is, those that a former process left included.
    pub fn translated(&self) -> Result<BTreeSet<u32>> {
        self.core().site.translated()
    }

    /// Detaches from a port; not an error if it is not attached or gone.
    pub fn detach(&self, ifindex: u32) -> Result<()> {
        self.core().detach(ifindex)
    }

    /// Interfaces attached to.
    pub fn ports(&self) -> Vec<u32> {
        self.core().ports.keys().copied().collect()
    }

    /// Does what the manager asks.
    pub fn apply(&self, request: Request) -> Result<()> {
        match request {
            Request::AddPort { ifindex, slot } => self.attach(&[PortRequest { ifindex, slot }]),
            Request::RemovePort { ifindex } => self.detach(ifindex),
            Request::PortState { ifindex, up } => self.core().set_up(ifindex, up),
            Request::Mtu { ifindex, .. } => self.core().verify(ifindex),
            Request::Promiscuous { ifindex, on } => {
                if let Some(port) = self.core().ports.get_mut(&ifindex) {
                    port.promiscuous = on;
                }
                Ok(())
            }
        }
    }

    /// Loads the program against new tables as they are; it is loaded again if they grow. `attach` would do it too.
    pub fn load(&self) -> Result<()> {
        self.core().load().map(drop)
    }

    /// Whether the program sees what travels beside frames that come in by an interface (`port_flags::BESIDE`). Not known,
    /// and false, until it is loaded.
    pub fn sees_beside(&self, ifindex: u32) -> Result<bool> {
        let seen = self.core().program.as_ref().is_some_and(|program| program.sees_beside());
        Ok(seen && Interface::query(ifindex)?.is_veth())
    }

    /// How a port is served; None if it is not.
    pub fn port(&self, ifindex: u32) -> Option<PortFacts> {
        let core = self.core();
        let port = core.ports.get(&ifindex)?;
        let mode = core.mode_of(ifindex, port).ok().flatten();
        Some(PortFacts { mode, up: port.up, promiscuous: port.promiscuous })
    }

    /// Takes everything off: links, settings, pins. Packets are Linux's again when it returns.
    pub fn teardown(&self) -> Result<()> {
        let mut core = self.core();
        let ports: Vec<u32> = core.ports.keys().copied().collect();
        ports.into_iter().try_for_each(|index| core.detach(index))?;
        core.site.translated()?.into_iter().try_for_each(|index| core.site.take_translators_off(index))?;
        core.site.dir.remove_all()
    }

    /// What the kernel says about the program, which is loaded if it was not.
    pub fn program(&self) -> Result<ProgramFacts> {
        self.core().load()?.facts()
    }

    /// Bytes of kernel memory by map.
    pub fn memory(&self) -> Result<Vec<(&'static str, u64)>> {
        self.core().region.memory()
    }

    /// Folder of the pins.
    pub fn shown(&self) -> std::path::PathBuf {
        self.core().site.shown().to_owned()
    }
}

/// The tables as mapped by this process.
pub struct Tables {
    engine: Engine,
    /// Keeps mapped what `raw` gives the addresses of
    _maps: Maps,
    raw: RawTables,
    brake: Brake,
}

impl Tables {
    /// Looks at the tables as they are now, if some have grown.
    pub fn refresh(&mut self) {
        *self = self.engine.tables();
    }
}

// SAFETY: the mappings were made for their tables and live as long as `_maps` holds them; `grow` alone replaces them.
unsafe impl Backing for Tables {
    fn tables(&self) -> &RawTables {
        &self.raw
    }

    fn grow(&mut self, table: TableId, elements: usize) -> std::result::Result<(), GrowError> {
        let grown = self.engine.core().grow(table, elements);
        self.refresh();
        grown.map_err(|e| GrowError { table, elements, cause: e.to_string() })
    }

    fn brake(&self) -> Brake {
        self.brake.clone()
    }
}
