//! RTM_NEWNEIGH, RTM_DELNEIGH (include/uapi/linux/neighbour.h).

use super::{address, attrs, family, split};
use crate::error::CmError;
use towpath_fpc::{Neighbour, NeighbourKey};

const WHAT: &str = "neighbour message";
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NTF_PROXY: u8 = 0x08;
/// States in which Linux itself sends to the link-layer address: PERMANENT, NOARP, REACHABLE, PROBE, STALE, DELAY
/// (`NUD_VALID`, include/net/neighbour.h).
const NUD_VALID: u16 = 0x80 | 0x40 | 0x02 | 0x10 | 0x04 | 0x08;

/// The neighbour in a message; None for bridge entries and proxied addresses.
pub fn parse(payload: &[u8]) -> Result<Option<Neighbour>, CmError> {
    let (header, rest) = split::<12>(WHAT, payload)?;
    if family(header[0]).is_none() || header[10] & NTF_PROXY != 0 {
        return Ok(None);
    }
    let (mut destination, mut lladdr) = (None, None);
    for attr in attrs(WHAT, rest) {
        match attr? {
            (NDA_DST, value) => destination = Some(address(WHAT, value)?),
            (NDA_LLADDR, value) => lladdr = value.try_into().ok(),
            _ => {}
        }
    }
    let ifindex = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
    let state = u16::from_ne_bytes([header[8], header[9]]);
    Ok(destination.map(|address| Neighbour {
        key: NeighbourKey { ifindex, address },
        lladdr: lladdr.filter(|_| state & NUD_VALID != 0),
        state,
    }))
}
