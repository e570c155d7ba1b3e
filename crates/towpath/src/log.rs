//! The log on stderr. Where that is the journal (systemd.exec(5), JOURNAL_STREAM), each line begins with its priority as
//! of sd-daemon(3) and has no time of its own.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Starts the log; `verbose` as on the command line.
pub fn start(verbose: u8) {
    // What the BPF loader has to say of BTF that old kernels lack concerns nobody.
    let default = ["info,aya=error,aya_obj=error", "debug,aya=info,aya_obj=info", "trace"][usize::from(verbose).min(2)];
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lines);
    if is_journal() {
        let format = Format::default().without_time().with_level(false).with_target(false).with_ansi(false);
        log.with_ansi(false).event_format(Prioritised(format)).init();
    } else {
        log.with_target(false).with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
}

/// Says why the command ends.
pub fn failure(why: impl fmt::Display) {
    note(format_args!("{}{why}", prefix(Level::ERROR)));
}

/// Writes a line to stderr, as it is. Nobody ends because it cannot be written (`eprintln` would).
pub fn note(text: impl fmt::Display) {
    let _ = Lines.write_all(format!("{text}\n").as_bytes());
}

/// Lines that could not be written to stderr, which may be a file on a disk that is full.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Stderr by whole lines. What cannot be written is counted, and said as soon as something can.
struct Lines;

impl Write for Lines {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let (mut stderr, lost) = (io::stderr().lock(), LOST.swap(0, Ordering::Relaxed));
        let said = match lost {
            0 => Ok(()),
            _ => writeln!(stderr, "{}{lost} lines before this one could not be written", prefix(Level::WARN)),
        };
        if said.and_then(|()| stderr.write_all(lines)).is_err() {
            LOST.fetch_add(lost + 1, Ordering::Relaxed);
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a line begins with that is not an event's.
fn prefix(level: Level) -> String {
    if is_journal() { format!("<{}>", priority(level)) } else { "towpath: ".into() }
}

fn is_journal() -> bool {
    let stderr = || std::fs::File::from(std::io::stderr().as_fd().try_clone_to_owned().ok()?).metadata().ok();
    let Ok(journal) = std::env::var("JOURNAL_STREAM") else { return false };
    stderr().is_some_and(|stderr| journal == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// As of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

struct Prioritised(Format<Full, ()>);

impl<S, N> FormatEvent<S, N> for Prioritised
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}
