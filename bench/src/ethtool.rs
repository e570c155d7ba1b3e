//! Driver statistics by the ethtool ioctl (include/uapi/linux/ethtool.h).

use anyhow::{Context, Result, bail};

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSTATS: u32 = 0x1d;
const ETH_SS_STATS: u32 = 1;
const NAME: usize = 32;
const MOST: usize = 4096;

fn ioctl(name: &str, data: &mut [u64]) -> Result<()> {
    // SAFETY: an all-zero request is valid; the name is copied within its bounds; the kernel writes at most what the
    // buffer, sized for `MOST` statistics, holds.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = data.as_mut_ptr().cast();
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let result = libc::ioctl(socket, SIOCETHTOOL, &mut request);
        libc::close(socket);
        result
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("ethtool ioctl on {name}"));
    }
    Ok(())
}

/// The sum of the driver's statistics whose names begin and end so, of an interface of the calling thread's namespace.
pub fn sum(interface: &str, suffix: &str, prefix: &str) -> Result<u64> {
    let mut names = vec![0u64; 2 + MOST * NAME / 8];
    names[0] = u64::from(ETHTOOL_GSTRINGS) | u64::from(ETH_SS_STATS) << 32;
    ioctl(interface, &mut names)?;
    let count = (names[1] & 0xffff_ffff) as usize;
    // The header of GSTRINGS is three 32-bit words.
    let bytes: Vec<u8> = names.iter().flat_map(|word| word.to_ne_bytes()).skip(12).take(count * NAME).collect();
    let mut values = vec![0u64; 1 + MOST];
    values[0] = u64::from(ETHTOOL_GSTATS) | (count as u64) << 32;
    ioctl(interface, &mut values)?;
    let wanted = |name: &&[u8]| {
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        name.starts_with(prefix.as_bytes()) && name.ends_with(suffix.as_bytes())
    };
    let found: Vec<u64> =
        bytes.chunks_exact(NAME).zip(&values[1..]).filter(|(name, _)| wanted(name)).map(|(_, value)| *value).collect();
    if found.is_empty() {
        bail!("{interface} has no statistic '{prefix}*{suffix}'");
    }
    Ok(found.iter().sum())
}
