//! Which connections Linux hands over.

use std::fmt;
use std::str::FromStr;

/// Which of the connections that Linux has accepted may take the fast path.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum FlowMode {
    /// Those that a rule put into a flowtable of nftables (`flow add @f`): conntrack shows them as OFFLOAD
    #[default]
    Flowtable,
    /// Those whose connection mark under `mask` is `value`
    Mark {
        /// Wanted, within the mask
        value: u32,
        /// The bits that count, not 0
        mask: u32,
    },
    /// All that conntrack has confirmed and seen replies of, TCP once it is established
    Established,
    /// None: whatever passes netfilter's hooks stays in Linux
    None,
}

/// Not a `FlowMode`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FlowModeError {
    /// None of the words
    #[error("`{0}` is none of flowtable, mark=VALUE/MASK, established, none")]
    Unknown(String),
    /// A number of the mark
    #[error("`{0}` in a connection mark is no number of 32 bits: write 16 or 0x10")]
    Number(String),
    /// Every connection would match, or bits are asked for that do not count
    #[error("mark={value:#x}/{mask:#x} {why}")]
    Mark {
        /// As given
        value: u32,
        /// As given
        mask: u32,
        /// What is wrong with it
        why: &'static str,
    },
}

impl FromStr for FlowMode {
    type Err = FlowModeError;

    fn from_str(text: &str) -> Result<Self, FlowModeError> {
        match text {
            "flowtable" => Ok(Self::Flowtable),
            "established" => Ok(Self::Established),
            "none" => Ok(Self::None),
            _ => text.strip_prefix("mark=").ok_or_else(|| FlowModeError::Unknown(text.to_owned())).and_then(mark),
        }
    }
}

/// `VALUE/MASK`, or `VALUE` for all bits.
fn mark(text: &str) -> Result<FlowMode, FlowModeError> {
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (number(value)?, number(mask)?),
        None => (number(text)?, u32::MAX),
    };
    let wrong = |why| Err(FlowModeError::Mark { value, mask, why });
    match () {
        () if mask == 0 => wrong("would match every connection: say `established` for that"),
        () if value & !mask != 0 => wrong("can never match: the value has bits that the mask has not"),
        () => Ok(FlowMode::Mark { value, mask }),
    }
}

fn number(text: &str) -> Result<u32, FlowModeError> {
    let number = match text.strip_prefix("0x") {
        Some(digits) if !digits.starts_with('+') => u32::from_str_radix(digits, 16),
        _ => text.parse(),
    };
    number.map_err(|_| FlowModeError::Number(text.to_owned()))
}

impl fmt::Display for FlowMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flowtable => f.write_str("flowtable"),
            Self::Mark { value, mask } => write!(f, "mark={value:#x}/{mask:#x}"),
            Self::Established => f.write_str("established"),
            Self::None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_and_written() {
        for (text, mode) in [
            ("flowtable", FlowMode::Flowtable),
            ("established", FlowMode::Established),
            ("none", FlowMode::None),
            ("mark=0x10/0xf0", FlowMode::Mark { value: 0x10, mask: 0xf0 }),
            ("mark=16/240", FlowMode::Mark { value: 0x10, mask: 0xf0 }),
            ("mark=0/1", FlowMode::Mark { value: 0, mask: 1 }),
            ("mark=7", FlowMode::Mark { value: 7, mask: u32::MAX }),
        ] {
            assert_eq!(text.parse(), Ok(mode));
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!(FlowMode::default(), FlowMode::Flowtable);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let said = |text: &str| text.parse::<FlowMode>().unwrap_err().to_string();
        assert!(said("all").contains("`all` is none of flowtable"));
        assert!(said("mark").contains("mark=VALUE/MASK"));
        for (text, part) in [("mark=", "``"), ("mark=1/x", "`x`"), ("mark=0x/1", "`0x`"), ("mark=0x+1/1", "`0x+1`")] {
            assert!(said(text).contains(part), "{}", said(text));
        }
        assert!(said("mark=4294967296/1").contains("`4294967296`"));
        assert!(said("mark=0/0").contains("every connection"));
        assert!(said("mark=0x11/0x10").contains("can never match"));
    }
}
