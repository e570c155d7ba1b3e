//! RTM_NEWADDR, RTM_DELADDR (include/uapi/linux/if_addr.h).

use super::{address, attrs, family, split};
use crate::error::CmError;
use towpath_fpc::Address;

const WHAT: &str = "address message";
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// The address in a message; None for families other than IPv4 and IPv6.
pub fn parse(payload: &[u8]) -> Result<Option<Address>, CmError> {
    let (header, rest) = split::<8>(WHAT, payload)?;
    if family(header[0]).is_none() {
        return Ok(None);
    }
    let (mut local, mut peer) = (None, None);
    for attr in attrs(WHAT, rest) {
        match attr? {
            (IFA_ADDRESS, value) => peer = Some(address(WHAT, value)?),
            (IFA_LOCAL, value) => local = Some(address(WHAT, value)?),
            _ => {}
        }
    }
    let ifindex = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
    // Without IFA_LOCAL (IPv6 that is not point-to-point) IFA_ADDRESS is the address itself.
    Ok(local.or(peer).map(|address| Address { ifindex, address, prefix_len: header[1] }))
}
