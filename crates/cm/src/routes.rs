//! Keys that name several routes of the kernel.
//!
//! FPC has one route per key, and the kernel mostly too; then CM remembers nothing. Exceptions are remembered here:
//! - IPv4 aliases: `ip route append` and equal addresses on two interfaces make several routes under one key
//!   (net/ipv4/fib_trie.c, fib_table_insert).
//! - IPv6 siblings: each hop of a multipath route is a route of its own; one can be deleted without a word about the
//!   others (net/ipv6/ip6_fib.c, fib6_del_route).
//! - IPv6 routes that cannot have siblings (no gateway) may stand beside others of the same metric.
//! - Routes for a TOS, only because they are there (`Shared::is_uneven`).
//!
//! A limit: where a route without siblings stands between siblings of the same metric, the kernel's dump shows only
//! the siblings.
//!
//! Where it is not certain what the kernel does, the key's route is `unsupported` and the caller is asked to read the
//! routes again. Read for Linux 6.1 and 6.18.

use crate::decode::route::KernelRoute;
use crate::netlink::{NLM_F_APPEND, NLM_F_EXCL, NLM_F_REPLACE};
use std::collections::HashMap;
use towpath_fpc::{Hop, Message, Prefix, Route, RouteKey, Via};
use towpath_tables::record::Family;

/// RTPROT_RA: learned from router advertisements, never a sibling.
const RTPROT_RA: u8 = 9;

/// What a change of the kernel means for FPM.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The route under the key, or that there is none
    pub message: Message,
    /// The routes of this family must be read again
    pub doubtful: bool,
}

#[derive(Debug)]
struct Entry {
    routes: Vec<KernelRoute>,
    /// The kernel has or may have routes under this key that are not in `routes`
    incomplete: bool,
    /// The dump that saw it last
    pass: u64,
}

/// The keys with several routes, and the IPv6 routes that could come to share theirs unannounced.
#[derive(Default, Debug)]
pub struct Shared {
    keys: HashMap<RouteKey, Entry>,
    /// Dumps begun, per family
    passes: [u64; 2],
}

impl Shared {
    /// A notification that a route was added or replaced. `objects`: nexthop objects exist in the namespace.
    pub fn added(&mut self, route: KernelRoute, flags: u16, objects: bool) -> Outcome {
        let key = route.route.key;
        let whole = flags & (NLM_F_EXCL | NLM_F_REPLACE) != 0;
        match self.keys.remove(&key) {
            None if whole && !route.source_specific => self.settle(key, Entry::of(route)),
            None => self.settle(key, Self::beside_unknown(route, objects)),
            Some(entry) => {
                let outdated = !whole && self.is_outdated(&entry);
                let outcome = self.settle(key, entry.with(route, flags));
                Outcome { doubtful: outcome.doubtful || outdated, ..outcome }
            }
        }
    }

    /// The kernel had something under the key, or (IPv6 multipath) it had nothing and sent no NLM_F_EXCL.
    fn beside_unknown(route: KernelRoute, objects: bool) -> Entry {
        let whole = key_family(&route) == Family::V6 && route.multipath && !objects && !route.source_specific;
        Entry { incomplete: !whole, ..Entry::of(route) }
    }

    /// A notification that a route was deleted.
    pub fn deleted(&mut self, route: &KernelRoute) -> Outcome {
        let key = route.route.key;
        match self.keys.remove(&key) {
            None => Outcome { message: Message::RouteDelete(key), doubtful: false },
            Some(entry) => {
                let outdated = self.is_outdated(&entry);
                let outcome = self.settle(key, entry.without(route));
                Outcome { doubtful: outcome.doubtful || outdated, ..outcome }
            }
        }
    }

    /// What is known is from before the dump that is under way, which was made because it may be wrong.
    fn is_outdated(&self, entry: &Entry) -> bool {
        entry.routes.first().is_none_or(|first| entry.pass != self.pass(key_family(first)))
    }

    fn pass(&self, family: Family) -> u64 {
        self.passes[family as usize]
    }

    /// Whether two packets between the same addresses, with the same mark, may be routed differently: by TOS, or (IPv6, whose
    /// flow labels count) by one of several next hops (`rt6_multipath_hash`). Next-hop objects are not looked at.
    pub fn is_uneven(&self, family: Family) -> bool {
        self.keys.iter().any(|(key, entry)| key.prefix.family() == family && (key.tos != 0 || entry.is_uneven()))
    }

    /// A dump of a family begins. What it does not show is forgotten by `end`.
    pub fn begin(&mut self, family: Family) {
        self.passes[family as usize] += 1;
    }

    /// All routes that a dump shows under one key.
    pub fn dumped(&mut self, routes: Vec<KernelRoute>) -> Option<Message> {
        let key = routes.first()?.route.key;
        let pass = self.pass(key.prefix.family());
        let mut entry = self.keys.remove(&key).filter(|entry| entry.pass == pass).unwrap_or_else(Entry::empty);
        // A dump of IPv6 shows source-specific routes apart; and if it had to find its place again, some once more.
        if !routes.iter().all(|route| entry.routes.contains(route)) {
            entry.routes.extend(routes);
        }
        Some(self.settle(key, entry).message)
    }

    /// The dump of a family is complete. Of the keys it did not show last, those that notifications `touched` remain.
    pub fn end(&mut self, family: Family, touched: impl Fn(&RouteKey) -> bool) {
        let pass = self.pass(family);
        self.keys.retain(|key, entry| key.prefix.family() != family || entry.pass == pass || touched(key));
        let of_family = self.keys.iter_mut().filter(|(key, _)| key.prefix.family() == family);
        of_family.for_each(|(_, entry)| entry.pass = pass);
    }

    fn settle(&mut self, key: RouteKey, mut entry: Entry) -> Outcome {
        entry.pass = self.pass(key.prefix.family());
        let doubtful = entry.incomplete;
        let Some(message) = entry.message() else {
            return Outcome { message: Message::RouteDelete(key), doubtful };
        };
        if entry.is_worth_remembering() {
            self.keys.insert(key, entry);
        }
        Outcome { message, doubtful }
    }
}

impl Entry {
    fn empty() -> Self {
        Self { routes: Vec::new(), incomplete: false, pass: 0 }
    }

    fn of(route: KernelRoute) -> Self {
        Self { routes: vec![route], incomplete: false, pass: 0 }
    }

    fn with(mut self, route: KernelRoute, flags: u16) -> Self {
        if self.routes.iter().any(|known| known.source_specific) || route.source_specific {
            // Routes of the same key but other sources live in another tree and say nothing of one another.
            self.incomplete = true;
            self.routes.push(route);
        } else if flags & NLM_F_EXCL != 0 {
            return Self::of(route);
        } else if flags & NLM_F_REPLACE != 0 {
            self.incomplete |= self.routes.len() > 1;
            match self.routes.first_mut() {
                Some(first) => *first = route,
                None => self.routes.push(route),
            }
        } else {
            let siblings = |known: &&mut KernelRoute| can_have_siblings(known) && can_have_siblings(&route);
            match self.routes.iter_mut().find(siblings) {
                Some(known) if route.multipath => *known = route,
                _ if key_family(&route) == Family::V4 && flags & NLM_F_APPEND == 0 => self.routes.insert(0, route),
                _ => self.routes.push(route),
            }
        }
        self
    }

    fn without(mut self, gone: &KernelRoute) -> Self {
        if self.incomplete {
            return self;
        }
        let gone_hops = hops(gone).to_vec();
        let same = |known: &KernelRoute| {
            known.source_specific == gone.source_specific
                && known.route.kind == gone.route.kind
                && match (&known.route.via, &gone.route.via) {
                    (Via::Object(a), Via::Object(b)) => a == b,
                    (Via::Hops(own), Via::Hops(_)) => {
                        gone_hops.iter().all(|hop| holds(known, hop))
                            && (own.len() == gone_hops.len() || key_family(known) == Family::V6)
                    }
                    _ => false,
                }
        };
        let Some(index) = self.routes.iter().position(same) else {
            self.incomplete = true;
            return self;
        };
        let known = &mut self.routes[index];
        let Via::Hops(left) = &mut known.route.via else {
            self.routes.remove(index);
            return self;
        };
        if key_family(gone) == Family::V6 {
            left.retain(|hop| !gone_hops.iter().any(|gone| same_hop(gone, hop)));
        } else {
            left.clear();
        }
        if left.is_empty() {
            self.routes.remove(index);
        }
        self
    }

    /// What FPM is to know: the only route, or the first one as unsupported if it matters which one Linux takes.
    fn message(&self) -> Option<Message> {
        let first = &self.routes.first()?.route;
        let alike = self.routes.iter().all(|other| other.route.kind == first.kind) && first.kind != 1;
        let certain = !self.incomplete && (self.routes.len() == 1 || alike);
        Some(Message::Route(Route { unsupported: first.unsupported || !certain, ..first.clone() }))
    }

    fn is_uneven(&self) -> bool {
        let siblings: usize =
            self.routes.iter().filter(|route| can_have_siblings(route)).map(|route| hops(route).len()).sum();
        siblings > 1 || self.incomplete && self.routes.first().is_some_and(|first| key_family(first) == Family::V6)
    }

    fn is_worth_remembering(&self) -> bool {
        match self.routes.as_slice() {
            _ if self.incomplete => true,
            [only] if key_family(only) == Family::V4 => only.source_specific || only.route.key.tos != 0,
            [only] => only.source_specific || hops(only).len() > 1 || !(can_have_siblings(only) || is_object(only)),
            _ => true,
        }
    }
}

fn key_family(route: &KernelRoute) -> Family {
    Prefix::family(&route.route.key.prefix)
}

fn is_object(route: &KernelRoute) -> bool {
    matches!(route.route.via, Via::Object(_))
}

fn hops(route: &KernelRoute) -> &[Hop] {
    match &route.route.via {
        Via::Hops(hops) => hops,
        Via::Object(_) => &[],
    }
}

/// `rt6_qualify_for_ecmp` (include/net/ip6_route.h).
fn can_have_siblings(route: &KernelRoute) -> bool {
    key_family(route) == Family::V6
        && route.route.protocol != RTPROT_RA
        && hops(route).first().is_some_and(|hop| hop.gateway.is_some())
}

fn same_hop(a: &Hop, b: &Hop) -> bool {
    (a.ifindex, a.gateway) == (b.ifindex, b.gateway)
}

fn holds(route: &KernelRoute, hop: &Hop) -> bool {
    hops(route).iter().any(|own| same_hop(own, hop))
}
