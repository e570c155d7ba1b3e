//! RTM_NEWNEXTHOP, RTM_DELNEXTHOP (include/uapi/linux/nexthop.h).

use super::{address, attrs, int16, int32, split};
use crate::error::CmError;
use towpath_fpc::{Hop, NexthopObject, NexthopObjectKind};

const WHAT: &str = "nexthop message";
const NHA_ID: u16 = 1;
const NHA_GROUP: u16 = 2;
const NHA_GROUP_TYPE: u16 = 3;
const NHA_BLACKHOLE: u16 = 4;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
const NHA_ENCAP_TYPE: u16 = 7;
const NHA_ENCAP: u16 = 8;
const NHA_FDB: u16 = 11;
const NHA_RES_GROUP: u16 = 12;
const GROUP_TYPE_MPATH: u16 = 0;

/// The nexthop object in a message.
pub fn parse(payload: &[u8]) -> Result<NexthopObject, CmError> {
    let (header, rest) = split::<8>(WHAT, payload)?;
    let flags = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
    let mut hop = Hop { ifindex: 0, gateway: None, weight: 1, flags };
    let (mut id, mut group, mut blackhole, mut unsupported) = (None, None, false, false);
    for attr in attrs(WHAT, rest) {
        let (kind, value) = attr?;
        match kind {
            NHA_ID => id = Some(int32(WHAT, value)?),
            NHA_GROUP => group = Some(members(value)),
            NHA_GROUP_TYPE => unsupported |= int16(WHAT, value)? != GROUP_TYPE_MPATH,
            NHA_BLACKHOLE => blackhole = true,
            NHA_OIF => hop.ifindex = int32(WHAT, value)?,
            NHA_GATEWAY => hop.gateway = Some(address(WHAT, value)?),
            NHA_ENCAP_TYPE | NHA_ENCAP | NHA_FDB | NHA_RES_GROUP => unsupported = true,
            _ => {}
        }
    }
    let id = id.ok_or_else(|| CmError::decode(WHAT, "no id"))?;
    let kind = match group {
        _ if unsupported => NexthopObjectKind::Unsupported,
        Some(members) => NexthopObjectKind::Group(members),
        None if blackhole => NexthopObjectKind::Blackhole,
        None => NexthopObjectKind::Hop(hop),
    };
    Ok(NexthopObject { id, kind })
}

/// `struct nexthop_grp`: id, weight - 1, high byte of weight - 1 (zero before Linux 6.12), two reserved bytes.
fn members(value: &[u8]) -> Vec<(u32, u16)> {
    let (entries, _) = value.as_chunks::<8>();
    entries
        .iter()
        .map(|[a, b, c, d, low, high, ..]| {
            (u32::from_ne_bytes([*a, *b, *c, *d]), u16::from_le_bytes([*low, *high]).saturating_add(1))
        })
        .collect()
}
