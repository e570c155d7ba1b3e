//! A process that runs beside the test.

use crate::wait_for;
use anyhow::{Context, Result};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A running process; dropping it ends it (SIGTERM, then SIGKILL). If the test is panicking then, its output is shown.
pub struct Process {
    child: Child,
    log: PathBuf,
    line: String,
}

impl Process {
    pub(crate) fn start(mut command: Command, log: PathBuf) -> Result<Process> {
        let line = format!("{command:?}");
        let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {line}"))?;
        Ok(Process { child, log, line })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the process has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&mut self, signal: i32) {
        if let Ok(None) = self.child.try_wait() {
            // SAFETY: kill takes plain integers; the child was not reaped, so the pid is still its.
            unsafe { libc::kill(self.child.id() as i32, signal) };
        }
    }

    /// Waits until its output holds `text`; an error with the output if it ends before, or does not within `limit`.
    pub fn wait_for_output(&mut self, limit: Duration, text: &str) -> Result<()> {
        let mut ended = None;
        wait_for(limit, &format!("\"{text}\" from {}", self.line), || {
            let found = self.log().contains(text);
            ended = self.child.try_wait().ok().flatten();
            (found || ended.is_some()).then_some(())
        })
        .with_context(|| self.log())?;
        anyhow::ensure!(self.log().contains(text), "{}: {}\n{}", self.line, ended.unwrap_or_default(), self.log());
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits; its status.
    pub fn stop(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM);
        self.wait(limit)
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.line);
        wait_for(limit, &what, || self.child.try_wait().ok().flatten()).with_context(|| self.log())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("lab: {} wrote:\n{}", self.line, self.log());
        }
        if self.stop(Duration::from_secs(2)).is_err() {
            let _ = self.kill();
        }
    }
}
