//! RTM_NEWNETCONF, RTM_DELNETCONF (include/uapi/linux/netconf.h): settings per interface and family. Notifications
//! carry only what changed.

use super::{attrs, family, int32};
use crate::error::CmError;
use towpath_tables::record::Family;

const WHAT: &str = "netconf message";
const IFINDEX: u16 = 1;
const FORWARDING: u16 = 2;
const RP_FILTER: u16 = 3;
const IGNORE_ROUTES_WITH_LINKDOWN: u16 = 6;

/// Index that stands for `conf/all`.
pub const ALL: i32 = -1;

/// What one message says; None where it says nothing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Settings {
    /// `forwarding`
    pub forwarding: Option<bool>,
    /// `rp_filter` (IPv4)
    pub rp_filter: Option<u8>,
    /// `ignore_routes_with_linkdown`
    pub ignore_linkdown: Option<bool>,
}

impl Settings {
    /// Takes over what `newer` says.
    pub fn update(&mut self, newer: Settings) {
        self.forwarding = newer.forwarding.or(self.forwarding);
        self.rp_filter = newer.rp_filter.or(self.rp_filter);
        self.ignore_linkdown = newer.ignore_linkdown.or(self.ignore_linkdown);
    }
}

/// Family, interface index (or `ALL`, or -2 for `conf/default`) and settings; None for other families.
pub fn parse(payload: &[u8]) -> Result<Option<(Family, i32, Settings)>, CmError> {
    let number = payload.first().ok_or_else(|| CmError::decode(WHAT, "empty"))?;
    let Some(family) = family(*number) else { return Ok(None) };
    let (mut ifindex, mut settings) = (None, Settings::default());
    // struct netconfmsg is one byte, padded to four.
    for attr in attrs(WHAT, payload.get(4..).unwrap_or_default()) {
        let (kind, value) = attr?;
        match kind {
            IFINDEX => ifindex = Some(int32(WHAT, value)? as i32),
            FORWARDING => settings.forwarding = Some(int32(WHAT, value)? != 0),
            RP_FILTER => settings.rp_filter = Some(int32(WHAT, value)?.min(255) as u8),
            IGNORE_ROUTES_WITH_LINKDOWN => settings.ignore_linkdown = Some(int32(WHAT, value)? != 0),
            _ => {}
        }
    }
    Ok(ifindex.map(|ifindex| (family, ifindex, settings)))
}
