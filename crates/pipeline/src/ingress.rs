//! First stage: the port, the tags, and whether this is an IP packet that a router forwards at all.

use crate::network::Network;
use crate::{Frame, Tables, partial};
use towpath_tables::record::{Family, NO_VLANS, PORT_PROBES, PORT_SLOTS, Port, destination_word, port_flags};
use towpath_tables::{Obstacle, Reason, opaque};
use towpath_wire::ethernet::{self, Ethernet, Tag};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;

/// The port that a frame entered by.
#[derive(Clone, Copy)]
pub struct Entry<'t> {
    /// Its slot
    pub slot: u32,
    /// Its record
    pub port: &'t Port,
    /// Its flags, read once
    pub flags: u32,
}

/// What the first stage found out about a frame.
#[derive(Clone, Copy, Debug)]
pub struct Parsed {
    /// Address family
    pub family: Family,
    /// Where the IP header begins: 14, 18 or 22
    pub offset: usize,
    /// Length of the IP packet; the frame may be longer by padding
    pub packet_len: usize,
    /// Length of the frame as it arrived
    pub frame_len: usize,
    /// It lies in more than one buffer
    pub several: bool,
}

/// Why a frame is not one to be routed by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// It is Linux's for this reason
    Exception(Reason),
    /// It may pass if it is of a flow
    Flow(Candidate),
    /// It came in by a port with mappings
    Mapped(Candidate),
}

/// A packet that a policy leaves to Linux unless it is of a flow or can be translated. Its header is not looked at yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Address family
    pub family: Family,
    /// Where the IP header begins
    pub offset: usize,
    /// The policy's reason
    pub reason: Reason,
}

impl From<Reason> for Stop {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self::Exception(reason)
    }
}

impl Stop {
    /// The reason where flows do not count.
    #[inline(always)]
    pub fn reason(self) -> Reason {
        match self {
            Self::Exception(reason) => reason,
            Self::Flow(candidate) | Self::Mapped(candidate) => candidate.reason,
        }
    }
}

impl<'t> Entry<'t> {
    /// The port of the interface with this index, if it has one.
    #[inline(always)]
    pub fn find<T: Tables>(tables: &'t T, ifindex: u32) -> Option<Self> {
        for probe in 0..PORT_PROBES {
            let slot = ifindex.wrapping_add(probe) % PORT_SLOTS;
            let port = tables.port(slot)?;
            if port.ifindex.load() == ifindex {
                return Some(Self::new(slot, port));
            }
        }
        None
    }

    /// The port in a slot.
    #[inline(always)]
    pub fn new(slot: u32, port: &'t Port) -> Self {
        Self { slot, port, flags: port.flags.load() }
    }

    /// The slot and record of the VLAN sub-interface that a tag names.
    #[inline(always)]
    pub(crate) fn sub_interface<T: Tables>(
        self,
        tables: &'t T,
        protocol: u16,
        id: u16,
    ) -> Result<(u32, &'t Port), Reason> {
        let table = match self.port.vlans.load() {
            NO_VLANS => return Err(Reason::UnsupportedEncap),
            index => tables.vlan_table(index).ok_or(Reason::Internal)?,
        };
        // VLAN 0 is no VLAN but a priority, and no sub-interface can have it.
        // The verifier of Linux 6.1 forgets the range of a number when its bytes are swapped: say it again.
        let place = opaque(usize::from(id / 2)) % table.slots.len();
        let pair = table.slots.get(place).ok_or(Reason::Internal)?.load();
        let slot = (if id.is_multiple_of(2) { pair & 0xffff } else { pair >> 16 }).checked_sub(1);
        let slot = slot.filter(|_| id != 0).ok_or(Reason::UnsupportedEncap)?;
        let port = tables.port(slot).ok_or(Reason::Internal)?;
        let same = port.vlan.load() == u32::from(protocol) << 16 | u32::from(id);
        if same { Ok((slot, port)) } else { Err(Reason::UnsupportedEncap) }
    }

    /// The VLAN sub-interface that a tag names, if it is ready.
    #[cfg_attr(target_arch = "bpf", inline(always))]
    #[cfg_attr(not(target_arch = "bpf"), inline(never))]
    fn beneath<T: Tables>(self, tables: &'t T, protocol: u16, id: u16) -> Result<Self, (Self, Reason)> {
        let (slot, port) = self.sub_interface(tables, protocol, id).map_err(|reason| (self, reason))?;
        let known = !self.flags & port_flags::PARTIAL_CSUM;
        let mut beneath = Self::new(slot, port);
        beneath.flags &= !known;
        beneath.ready().map_err(|reason| (beneath, reason))?;
        Ok(beneath)
    }

    /// Goes on to the VLAN sub-interface that a tag names.
    #[inline(always)]
    fn descend<T: Tables>(&mut self, tables: &'t T, protocol: u16, id: u16) -> Result<(), Reason> {
        let (entry, result) = match self.beneath(tables, protocol, id) {
            Ok(entry) => (entry, Ok(())),
            Err((entry, reason)) => (entry, Err(reason)),
        };
        *self = entry;
        result
    }

    #[inline(always)]
    pub(crate) fn ready(&self) -> Result<(), Reason> {
        self.has(port_flags::PRESENT | port_flags::READY)
    }

    /// Whether transport checksums of frames that entered here may be incomplete
    #[inline(always)]
    pub fn may_be_partial(&self) -> bool {
        self.flags & port_flags::PARTIAL_CSUM != 0
    }

    /// The same, as `may_be_partial` was said to be.
    #[inline(always)]
    pub fn with_partial(mut self, may_be: bool) -> Self {
        if !may_be {
            self.flags &= !port_flags::PARTIAL_CSUM;
        }
        self
    }

    #[inline(always)]
    fn has(&self, flags: u32) -> Result<(), Reason> {
        if self.flags & flags == flags { Ok(()) } else { Err(Reason::PortNotReady) }
    }

    /// Whether the engine may look at what travels beside frames that entered here
    #[inline(always)]
    pub fn sees_beside(&self) -> bool {
        self.flags & port_flags::BESIDE != 0
    }

    /// Takes in what travels beside the frame, where the engine sees that.
    #[inline(always)]
    fn look_beside<F: Frame, T: Tables>(&mut self, frame: &F, tables: &'t T) -> Result<(), Reason> {
        if !self.sees_beside() {
            return Ok(());
        }
        let beside = frame.beside();
        match beside.partial {
            Some(true) => return Err(Reason::PartialChecksum),
            // What is known need not be guessed.
            Some(false) => self.flags &= !port_flags::PARTIAL_CSUM,
            None => {}
        }
        match beside.tag {
            Some((protocol, control)) => self.descend(tables, protocol, control & Tag::ID),
            None => Ok(()),
        }
    }
}

impl Parsed {
    /// What `parse` found out about a frame with an IP header at `offset`, worked out again without its checks.
    #[inline(always)]
    pub fn again<F: Frame>(frame: &F, offset: usize) -> Result<Self, Reason> {
        let header = frame.get::<Ipv4>(offset).ok_or(Reason::Truncated)?;
        let (family, packet_len) = match header.version_ihl >> 4 {
            4 => (Family::V4, usize::from(header.total_len.get())),
            _ => {
                let header = frame.get::<Ipv6>(offset).ok_or(Reason::Truncated)?;
                (Family::V6, size_of::<Ipv6>() + usize::from(header.payload_len.get()))
            }
        };
        let frame_len = frame.total_len();
        Ok(Self { family, offset, packet_len, frame_len, several: frame_len != frame.first_len() })
    }
}

/// Reads the frame's headers and leaves in `entry` the port that they belong to.
#[inline(always)]
pub fn parse<'t, F: Frame, T: Tables>(frame: &F, tables: &'t T, entry: &mut Entry<'t>) -> Result<Parsed, Stop> {
    let (ethertype, offset) = parse_link(frame, tables, entry)?;
    match ethertype {
        ethernet::IPV4 => parse_packet::<Ipv4, F, T>(frame, tables, entry, offset, frame.total_len()),
        ethernet::IPV6 => parse_packet::<Ipv6, F, T>(frame, tables, entry, offset, frame.total_len()),
        _ => Err(Reason::UnsupportedEncap.into()),
    }
}

/// Reads the Ethernet header and the tags, and leaves in `entry` the port that they belong to. What is behind them: its
/// EtherType, and where it begins.
#[inline(always)]
pub(crate) fn parse_link<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &mut Entry<'t>,
) -> Result<(u16, usize), Reason> {
    entry.ready()?;
    let ethernet = frame.get::<Ethernet>(0).ok_or(Reason::Truncated)?;
    entry.look_beside(frame, tables)?;
    let mut offset = size_of::<Ethernet>();
    let mut ethertype = ethernet.ethertype.get();
    for _ in 0..2 {
        if !matches!(ethertype, ethernet::VLAN | ethernet::SERVICE_VLAN) {
            break;
        }
        let tag = frame.get::<Tag>(offset).ok_or(Reason::Truncated)?;
        entry.descend(tables, ethertype, tag.id())?;
        ethertype = tag.ethertype.get();
        offset += size_of::<Tag>();
    }
    if destination_word(ethernet.first.get()) != entry.port.mac.load() {
        return Err(if ethernet.is_group() { Reason::L2Multicast } else { Reason::NotForUs });
    }
    Ok((ethertype, offset))
}

/// Reads the header of the packet that lies at `offset` and before `end` and has come in by `entry`.
#[inline(always)]
pub(crate) fn parse_packet<N: Network, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    entry: &Entry,
    offset: usize,
    end: usize,
) -> Result<Parsed, Stop> {
    let config = tables.config().ok_or(Reason::Internal)?;
    entry.has(N::FORWARDING)?;
    let (all, here) = (&config.policy, &entry.port.ingress_policy);
    let words = [all[N::FAMILY as usize].load(), here[N::FAMILY as usize].load()];
    if words != [0; 2] {
        return Err(stopped(words, N::FAMILY, offset));
    }
    let header = frame.get::<N>(offset).ok_or(Reason::Truncated)?;
    let packet_len = header.packet_len(end.wrapping_sub(offset))?;
    header.check_scopes(entry.flags)?;
    if entry.may_be_partial() {
        partial::check(frame, header, offset, packet_len)?;
    }
    let frame_len = frame.total_len();
    let several = frame_len != frame.first_len();
    Ok(Parsed { family: N::FAMILY, offset, packet_len, frame_len, several })
}

/// What two policies, of which one at least says something, make of a packet: the stricter counts.
#[inline(always)]
fn stopped(words: [u32; 2], family: Family, offset: usize) -> Stop {
    match words.map(policy) {
        // Where packets are translated, no flow's tuple is what connection tracking has seen.
        [Ok(()), Err((reason @ Reason::Mapped, _))] => Stop::Mapped(Candidate { family, offset, reason }),
        [Err((reason, _)), Err((Reason::Mapped, _))] => Stop::Exception(reason),
        [Err((reason, false)), _] | [_, Err((reason, false))] => Stop::Exception(reason),
        [Err((reason, true)), _] | [_, Err((reason, true))] => Stop::Flow(Candidate { family, offset, reason }),
        [Ok(()), Ok(())] => Stop::Exception(Reason::Internal),
    }
}

/// A policy word: 0, or 1 + the reason for which packets are exceptions.
#[inline(always)]
pub(crate) fn policy(word: u32) -> Result<(), (Reason, bool)> {
    match word {
        0 => Ok(()),
        word => Err(Obstacle::of(word).map_or((Reason::Internal, false), |obstacle| (obstacle.reason, obstacle.flows))),
    }
}

/// As `policy`, where flows do not count.
#[inline(always)]
pub(crate) fn strict_policy(word: u32) -> Result<(), Reason> {
    policy(word).map_err(|(reason, _)| reason)
}
