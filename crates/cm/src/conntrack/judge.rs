//! Which entries of connection tracking are handed over.

use super::entry::{ESTABLISHED, Entry, status};
use super::mode::FlowMode;

/// What an entry says about its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is handed over
    Yes,
    /// It stays in Linux
    No,
    /// It may be handed over once conntrack does not check its windows; or too little was told to say
    Ask,
}

/// One of them must be set: packets of a half-open connection are Linux's. A flowtable takes UDP that has not been answered
/// (net/netfilter/nft_flow_offload.c, 6.1), and connection tracking does not see the answers then.
const SEEN: u32 = status::SEEN_REPLY | status::OFFLOAD;
/// None of them may be: its end, changed sequence numbers, helpers, and entries that are not what they seem.
const REFUSED: u32 = status::DYING | status::SEQ_ADJUST | status::TEMPLATE | status::NAT_CLASH | status::HELPER;

/// Judges an entry. `handed`: it was handed over before, under the same rules.
pub fn judge(entry: &Entry, mode: FlowMode, handed: bool) -> Verdict {
    let special = entry.zoned || entry.helped || entry.proxied;
    let open = entry.is(status::CONFIRMED) && entry.status & SEEN != 0;
    if special || !open || entry.status & REFUSED != 0 || !chosen(entry, mode, handed) {
        return Verdict::No;
    }
    match entry.tcp {
        _ if !entry.connection.original.is_tcp() => Verdict::Yes,
        Some(tcp) if tcp.state != ESTABLISHED => Verdict::No,
        Some(tcp) => {
            if tcp.liberal {
                Verdict::Yes
            } else {
                Verdict::Ask
            }
        }
        // Linux puts only established connections into a flowtable, and checks their windows no longer
        // (net/netfilter/nft_flow_offload.c, 6.1). Of others a changed state is always told.
        None => {
            if handed || entry.is(status::OFFLOAD) {
                Verdict::Yes
            } else {
                Verdict::Ask
            }
        }
    }
}

/// Whether it is one of those that are wanted.
fn chosen(entry: &Entry, mode: FlowMode, handed: bool) -> bool {
    match mode {
        // Linux's own flowtable forgets what it no longer sees.
        FlowMode::Flowtable => handed || entry.is(status::OFFLOAD),
        FlowMode::Mark { value, mask } => entry.mark & mask == value,
        FlowMode::Established => !entry.connection.original.is_tcp() || entry.is(status::ASSURED),
        FlowMode::None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::entry::{Tcp, tests::connection};
    use super::*;
    use Verdict::{Ask, No, Yes};

    const LIBERAL: Option<Tcp> = Some(Tcp { state: ESTABLISHED, liberal: true });
    const MARK: FlowMode = FlowMode::Mark { value: 0x10, mask: 0xf0 };

    fn entry(protocol: u8) -> Entry {
        Entry {
            connection: connection(protocol),
            status: status::CONFIRMED | status::SEEN_REPLY | status::ASSURED,
            mark: 0,
            labels: None,
            timeout: None,
            tcp: LIBERAL.filter(|_| protocol == 6),
            zoned: false,
            helped: false,
            proxied: false,
        }
    }

    #[test]
    fn each_mode_chooses_its_own() {
        for protocol in [6, 17] {
            let plain = entry(protocol);
            let offloaded = Entry { status: plain.status | status::OFFLOAD, tcp: None, ..plain };
            let marked = Entry { mark: 0x1f, ..plain };
            assert_eq!(judge(&plain, FlowMode::Flowtable, false), No);
            assert_eq!(judge(&plain, FlowMode::Flowtable, true), Yes);
            assert_eq!(judge(&offloaded, FlowMode::Flowtable, false), Yes);
            assert_eq!(judge(&plain, MARK, true), No);
            assert_eq!(judge(&marked, MARK, false), Yes);
            assert_eq!(judge(&plain, FlowMode::Established, false), Yes);
            for entry in [plain, offloaded, marked] {
                assert_eq!(judge(&entry, FlowMode::None, true), No);
            }
        }
        let unassured = |protocol| Entry { status: status::CONFIRMED | status::SEEN_REPLY, ..entry(protocol) };
        assert_eq!(judge(&unassured(6), FlowMode::Established, false), No);
        assert_eq!(judge(&unassured(17), FlowMode::Established, false), Yes);
    }

    #[test]
    fn a_flowtable_has_udp_that_was_not_answered() {
        let unanswered = Entry { status: status::CONFIRMED, ..entry(17) };
        let offloaded = Entry { status: status::CONFIRMED | status::OFFLOAD, ..unanswered };
        assert_eq!(judge(&offloaded, FlowMode::Flowtable, false), Yes);
        assert_eq!(judge(&unanswered, FlowMode::Flowtable, true), No, "the flowtable has let go of it");
    }

    #[test]
    fn whatever_is_not_repeatable_stays_in_linux() {
        let good = entry(17);
        let mut bad = vec![
            Entry { zoned: true, ..good },
            Entry { helped: true, ..good },
            Entry { proxied: true, ..good },
            Entry { status: good.status & !status::SEEN_REPLY, ..good },
            Entry { status: good.status & !status::CONFIRMED, ..good },
        ];
        bad.extend([6, 9, 11, 12, 13].map(|bit| Entry { status: good.status | 1 << bit, ..good }));
        for entry in bad {
            assert_eq!(judge(&entry, FlowMode::Established, true), No, "{entry:?}");
        }
    }

    #[test]
    fn tcp_must_be_established_with_windows_unchecked() {
        let with = |tcp| Entry { tcp, ..entry(6) };
        assert_eq!(judge(&with(Some(Tcp { state: ESTABLISHED, liberal: false })), FlowMode::Established, true), Ask);
        for state in [1, 2, 4, 5, 6, 7, 8] {
            let closing = with(Some(Tcp { state, liberal: true }));
            assert_eq!(judge(&closing, FlowMode::Established, true), No);
        }
        assert_eq!(judge(&with(None), FlowMode::Established, false), Ask);
        assert_eq!(judge(&with(None), FlowMode::Established, true), Yes);
    }
}
