//! GRE (RFC 2784) with the key of RFC 2890.

use crate::view;
use zerocopy::{byteorder::network_endian::U16, native_endian::U32};

view! {
    /// The GRE header without options, 4 bytes.
    Gre {
        /// Flags and version
        flags: U16,
        /// EtherType of the payload
        protocol: U16,
    }
}

impl Gre {
    /// `flags` of a header without options
    pub const PLAIN: u16 = 0;
    /// `flags` of a header with a key and nothing else
    pub const KEY: u16 = 0x2000;
}

view! {
    /// The GRE header with a key, 8 bytes.
    Keyed {
        /// What it begins with
        base: Gre,
        /// The key, as on the wire
        key: U32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let header = Keyed::read_from_bytes(&[0x20, 0, 0x86, 0xdd, 1, 2, 3, 4]).unwrap();
        assert_eq!((header.base.flags.get(), header.base.protocol.get()), (Gre::KEY, 0x86dd));
        assert_eq!(header.key.get().to_ne_bytes(), [1, 2, 3, 4]);
    }
}
