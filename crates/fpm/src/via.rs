//! Where routes lead, each distinct answer kept once: many routes share few sets of next hops.

use std::collections::HashMap;
use std::sync::Arc;
use towpath_fpc::{Hop, Via};
use towpath_tables::record::Family;

/// RTNH_F_* of include/uapi/linux/rtnetlink.h
pub(crate) const RTNH_F_DEAD: u32 = 1;
const RTNH_F_ONLINK: u32 = 4;

/// Number of an interned `ViaKey`.
pub(crate) type ViaId = u32;

/// Where a route leads.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct ViaKey {
    /// Family of the packets
    pub family: Family,
    pub target: Target,
    /// Route MTU metric
    pub mtu: u32,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Target {
    Hops(Box<[Hop]>),
    Object(u32),
}

impl ViaKey {
    /// Flags that come and go without meaning (offload, link down, which the port tells) are left out.
    pub fn new(family: Family, via: &Via, mtu: u32) -> Self {
        let kept = |hop: &Hop| Hop { flags: hop.flags & (RTNH_F_DEAD | RTNH_F_ONLINK), ..*hop };
        let target = match via {
            Via::Hops(hops) => Target::Hops(hops.iter().map(kept).collect()),
            Via::Object(id) => Target::Object(*id),
        };
        Self { family, target, mtu }
    }

    pub fn via(&self) -> Via {
        match &self.target {
            Target::Hops(hops) => Via::Hops(hops.to_vec()),
            Target::Object(id) => Via::Object(*id),
        }
    }
}

#[derive(Debug)]
struct Slot {
    key: Arc<ViaKey>,
    routes: u32,
}

/// All answers in use, by number.
#[derive(Default, Debug)]
pub(crate) struct Vias {
    numbers: HashMap<Arc<ViaKey>, ViaId>,
    slots: Vec<Option<Slot>>,
    free: Vec<ViaId>,
    /// Answers that lost their last route; dropped by `reap` if they do not find another first
    idle: Vec<ViaId>,
}

impl Vias {
    /// The number of an answer; one more route uses it.
    pub fn hold(&mut self, key: ViaKey) -> ViaId {
        if let Some(&id) = self.numbers.get(&key) {
            if let Some(Some(slot)) = self.slots.get_mut(id as usize) {
                slot.routes += 1;
            }
            return id;
        }
        let id = self.free.pop().unwrap_or(self.slots.len() as ViaId);
        let key = Arc::new(key);
        self.numbers.insert(key.clone(), id);
        let slot = Some(Slot { key, routes: 1 });
        match self.slots.get_mut(id as usize) {
            Some(place) => *place = slot,
            None => self.slots.push(slot),
        }
        id
    }

    /// One route fewer uses it.
    pub fn release(&mut self, id: ViaId) {
        if let Some(Some(slot)) = self.slots.get_mut(id as usize) {
            slot.routes -= 1;
            if slot.routes == 0 {
                self.idle.push(id);
            }
        }
    }

    pub fn get(&self, id: ViaId) -> Option<&Arc<ViaKey>> {
        self.slots.get(id as usize)?.as_ref().map(|slot| &slot.key)
    }

    /// All answers in use.
    pub fn iter(&self) -> impl Iterator<Item = (ViaId, &Arc<ViaKey>)> {
        (0..).zip(&self.slots).filter_map(|(id, slot)| Some((id, &slot.as_ref()?.key)))
    }

    /// Forgets answers without routes; returns their numbers.
    pub fn reap(&mut self) -> Vec<ViaId> {
        let mut gone = std::mem::take(&mut self.idle);
        gone.sort_unstable();
        gone.dedup();
        gone.retain(|&id| {
            let Some(place) = self.slots.get_mut(id as usize) else { return false };
            let Some(slot) = place.take_if(|slot| slot.routes == 0) else { return false };
            self.numbers.remove(&slot.key);
            self.free.push(id);
            true
        });
        gone
    }
}
