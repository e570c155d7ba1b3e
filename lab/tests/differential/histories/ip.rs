//! One `ip -batch` in a router's namespace, which takes command after command: a fraction of what a process for each costs.

use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use towpath_lab::Node;

/// A line that `ip` refuses: what it says of it ends the answer to the line before.
const NONSENSE: &str = "?";

/// The process, and the number of the line that it got last.
pub struct Ip {
    node: Node,
    child: Child,
    input: ChildStdin,
    output: BufReader<PipeReader>,
    line: usize,
}

impl Ip {
    /// Starts it.
    pub fn start(node: &Node) -> Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        let mut command = node.command("ip");
        command.args(["-force", "-batch", "-"]).stdin(Stdio::piped()).stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn().context("cannot start ip")?;
        let input = child.stdin.take().context("ip takes no input")?;
        Ok(Self { node: node.clone(), child, input, output: BufReader::new(reader), line: 0 })
    }

    /// Runs a command; what it wrote, and whether it succeeded.
    pub fn run(&mut self, command: &str) -> Result<(String, bool)> {
        // At once: the process may end at the first line.
        self.input.write_all(format!("{command}\n{NONSENSE}\n").as_bytes())?;
        self.line += 2;
        let [failed, end] = [self.line - 1, self.line].map(|line| format!("Command failed -:{line}"));
        let (mut answer, mut succeeded) = (String::new(), true);
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                // Some commands end the process when they fail.
                *self = Self::start(&self.node.clone())?;
                return Ok((answer, false));
            }
            match line.trim_end() {
                text if text == end => return Ok((answer, succeeded)),
                text if text == failed => succeeded = false,
                text if text.contains("\"?\" is unknown") => {}
                text => answer = answer + text + "\n",
            }
        }
    }
}

impl Drop for Ip {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
