//! The few settings that netlink does not announce, read from /proc/sys/net through files that stay open. (inotify
//! sees writes to these files, but only those made through the same mount of /proc.)

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// One number under /proc/sys/net.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    file: Option<File>,
}

impl Setting {
    /// The setting at this path below /proc/sys/net, of the calling thread's network namespace.
    pub fn new(path: &str) -> Self {
        Self { path: PathBuf::from("/proc/sys/net").join(path), file: None }
    }

    /// Its present value; None if there is no such setting (any more).
    pub fn read(&mut self) -> Option<i64> {
        if let Some(value) = self.file.as_ref().and_then(number) {
            return Some(value);
        }
        // Renaming an interface makes its files anew.
        self.file = File::open(&self.path).ok();
        self.file.as_ref().and_then(number)
    }
}

fn number(file: &File) -> Option<i64> {
    let mut text = [0; 24];
    let len = file.read_at(&mut text, 0).ok()?;
    str::from_utf8(text.get(..len)?).ok()?.trim().parse().ok()
}

/// What the settings of an interface say.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PortValues {
    /// IPv4 `send_redirects`; None if IPv4 does not know the interface
    pub send_redirects: Option<bool>,
    /// IPv4 `route_localnet`
    pub route_localnet: Option<bool>,
    /// IPv6 `disable_ipv6`; None if IPv6 does not know the interface
    pub disable_ipv6: Option<bool>,
    /// IPv6 `mtu`
    pub ipv6_mtu: Option<u32>,
}

/// The settings of one interface, or of `all`.
#[derive(Debug)]
pub struct PortSettings {
    send_redirects: Setting,
    route_localnet: Setting,
    disable_ipv6: Setting,
    ipv6_mtu: Setting,
}

impl PortSettings {
    /// Those of the interface of this name.
    pub fn new(name: &str) -> Self {
        let setting = |family: &str, file: &str| Setting::new(&format!("{family}/conf/{name}/{file}"));
        Self {
            send_redirects: setting("ipv4", "send_redirects"),
            route_localnet: setting("ipv4", "route_localnet"),
            disable_ipv6: setting("ipv6", "disable_ipv6"),
            ipv6_mtu: setting("ipv6", "mtu"),
        }
    }

    /// Their present values.
    pub fn read(&mut self) -> PortValues {
        PortValues {
            send_redirects: self.send_redirects.read().map(|value| value != 0),
            route_localnet: self.route_localnet.read().map(|value| value != 0),
            disable_ipv6: self.disable_ipv6.read().map(|value| value != 0),
            ipv6_mtu: self.ipv6_mtu.read().and_then(|value| value.try_into().ok()),
        }
    }
}
