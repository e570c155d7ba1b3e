//! The log on stderr. Where that is the journal (systemd.exec(5), JOURNAL_STREAM), each line begins with its priority as
//! of sd-daemon(3) and has no time of its own.

use std::fmt;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
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
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if is_journal() {
        let format = Format::default().without_time().with_level(false).with_target(false).with_ansi(false);
        log.with_ansi(false).event_format(Prioritised(format)).init();
    } else {
        log.with_target(false).with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
}

/// Says why the command ends.
pub fn failure(why: impl fmt::Display) {
    if is_journal() {
        eprintln!("<{}>{why}", priority(Level::ERROR));
    } else {
        eprintln!("towpath: {why}");
    }
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
