//! What the service manager is told (sd_notify(3)): datagrams to the socket named by NOTIFY_SOCKET. Its absence or refusal
//! is no error.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// The service manager, if there is one.
pub struct Manager {
    /// How often it is told that the daemon works; None if it does not want to know
    period: Option<Duration>,
    due: Instant,
    /// When the cache manager had looked at Linux when this was last told
    heartbeat: u64,
    status: String,
}

impl Manager {
    /// As the environment says.
    pub fn new(now: Instant) -> Self {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
        let period = watchdog(number("WATCHDOG_USEC"), number("WATCHDOG_PID"));
        Self { period, due: now, heartbeat: 0, status: String::new() }
    }

    /// Packets take the fast path.
    pub fn ready(&mut self, status: String) {
        notify(&format!("READY=1\nSTATUS={status}"));
        self.status = status;
    }

    /// How the daemon is, in a line for people.
    pub fn status(&mut self, status: String) {
        if status != self.status {
            notify(&format!("STATUS={status}"));
            self.status = status;
        }
    }

    /// The daemon ends.
    pub fn stopping(&self) {
        notify("STOPPING=1");
    }

    /// When `works` is next to be called, at the latest.
    pub fn due(&self) -> Option<Instant> {
        self.period.map(|_| self.due)
    }

    /// The daemon's thread works. `heartbeat` is when the cache manager of this process last looked at Linux, and is told
    /// as a sign of life only when it is another one than before.
    pub fn works(&mut self, now: Instant, heartbeat: Option<u64>) {
        let Some(period) = self.period.filter(|_| now >= self.due) else { return };
        self.due = now + period;
        if heartbeat.is_none_or(|heartbeat| std::mem::replace(&mut self.heartbeat, heartbeat) != heartbeat) {
            notify("WATCHDOG=1");
        }
    }
}

/// How often to tell it, so that one word may be late.
fn watchdog(patience: Option<u64>, pid: Option<u64>) -> Option<Duration> {
    let ours = pid.is_none_or(|pid| pid == u64::from(std::process::id()));
    patience.filter(|patience| ours && *patience > 0).map(|patience| Duration::from_micros(patience) / 3)
}

/// Tells it `state` (for example `READY=1`).
fn notify(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(name.as_bytes(), state) {
        tracing::warn!("cannot notify {}: {error}", name.display());
    }
}

fn send(name: &[u8], state: &str) -> std::io::Result<()> {
    let address = match name {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_of_another_process_is_none_of_ours() {
        let own = u64::from(std::process::id());
        assert_eq!(watchdog(Some(3_000_000), None), Some(Duration::from_secs(1)));
        assert_eq!(watchdog(Some(3_000_000), Some(own)), Some(Duration::from_secs(1)));
        assert_eq!(watchdog(Some(3_000_000), Some(own + 1)), None);
        assert_eq!(watchdog(None, Some(own)), None);
        assert_eq!(watchdog(Some(0), None), None);
    }

    #[test]
    fn a_path_and_an_abstract_name_are_reached() {
        let path = std::env::temp_dir().join(format!("towpath-notify-{}", std::process::id()));
        let name = format!("towpath-notify-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(path.as_os_str().as_bytes(), "READY=1").unwrap();
        send(format!("@{name}").as_bytes(), "READY=1").unwrap();
        for socket in [by_path, by_name] {
            let mut buffer = [0; 16];
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1");
        }
        std::fs::remove_file(path).unwrap();
    }
}
