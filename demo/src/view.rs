//! What the user sees while traffic runs: a live view on a terminal, elsewhere one plain line a second.

use crate::traffic::{Count, Traffic};
use anyhow::{Context, Result};
use ratatui::backend::CrosstermBackend;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Gauge, Paragraph, Sparkline, Widget};
use ratatui::{Frame, Terminal, TerminalOptions, Viewport};
use std::io::{IsTerminal, Stdout, stdout};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks at the counters.
const INTERVAL: Duration = Duration::from_millis(250);
/// Looks for each line where there is no terminal.
const PLAIN_EVERY: usize = 4;
const HEIGHT: u16 = 9;
const WIDTH: usize = 100;

/// The user's view; shared by the thread that samples and the one that plays the scenes.
pub struct View {
    inner: Mutex<Inner>,
    begin: Instant,
}

struct Inner {
    terminal: Option<Terminal<CrosstermBackend<Stdout>>>,
    scene: String,
    event: String,
    /// Counters at which the stream's losses began to be counted, if they are now
    counted: Option<Count>,
    lost_before: u64,
    samples: Vec<Sample>,
}

/// The traffic over one interval.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// End of the interval, seconds from the beginning
    pub at: f64,
    /// Packets sent a second
    pub sent: f64,
    /// Packets a second that left by up1 and by up2
    pub arrived: [f64; 2],
    /// Share of the fast path, 0 to 1
    pub fast: f64,
    /// Nanoseconds of the router's core a packet
    pub cost: f64,
    /// Packets lost so far where losses are counted
    pub lost: u64,
    /// The stream ran at one rate all the time
    pub steady: bool,
}

impl View {
    /// A live view if stdout is a terminal that can be drawn on.
    pub fn new() -> View {
        let options = TerminalOptions { viewport: Viewport::Inline(HEIGHT) };
        let live = stdout().is_terminal();
        let terminal = live.then(|| Terminal::with_options(CrosstermBackend::new(stdout()), options).ok()).flatten();
        let inner = Inner {
            terminal,
            scene: "setting up".into(),
            event: String::new(),
            counted: None,
            lost_before: 0,
            samples: Vec::new(),
        };
        View { inner: Mutex::new(inner), begin: Instant::now() }
    }

    /// Begins a scene.
    pub fn scene(&self, title: &str) {
        let mut inner = self.lock();
        inner.scene = title.to_owned();
        inner.event.clear();
        drop(inner);
        self.print(Line::default());
        self.print(Line::from(format!("== {title}")).bold());
    }

    /// Tells what happens now.
    pub fn say(&self, text: &str) {
        self.lock().event = text.to_owned();
        for line in wrapped(text) {
            self.print(Line::from(line));
        }
    }

    /// Shows a command's output.
    pub fn show(&self, output: &str) {
        for line in output.trim_end().lines() {
            self.print(Line::from(format!("    {line}")).dim());
        }
    }

    /// Tells whether a promise was kept.
    pub fn judge(&self, kept: bool, text: &str) {
        let (mark, colour) = if kept { ("kept  ", Color::Green) } else { ("BROKEN", Color::Red) };
        self.print(Line::from(vec![
            Span::styled(mark, Style::new().fg(colour).bold()),
            Span::raw(format!("  {text}")),
        ]));
    }

    /// Counts what is lost from here on, or (None) no longer; `lost` were in the span that ends.
    pub fn count_from(&self, begin: Option<Count>, lost: u64) {
        let mut inner = self.lock();
        inner.counted = begin;
        inner.lost_before += lost;
    }

    /// Looks at the traffic until `stop` says so.
    pub fn watch(&self, traffic: &Traffic, stop: impl Fn() -> bool) -> Result<()> {
        let (mut last, mut time, mut changes) = (traffic.count()?, Instant::now(), traffic.changes());
        while !stop() {
            std::thread::sleep(INTERVAL);
            let (now, took) = (traffic.count()?, time.elapsed().as_secs_f64());
            time = Instant::now();
            let steady = changes == traffic.changes();
            changes = traffic.changes();
            self.add(&now, &now.since(&last), took, steady)?;
            last = now;
        }
        Ok(())
    }

    fn add(&self, now: &Count, span: &Count, took: f64, steady: bool) -> Result<()> {
        let mut inner = self.lock();
        let lost = inner.lost_before + inner.counted.map_or(0, |begin| now.since(&begin).lost());
        inner.samples.push(Sample {
            at: self.begin.elapsed().as_secs_f64(),
            sent: span.sent as f64 / took,
            arrived: span.arrived.map(|packets| packets as f64 / took),
            fast: span.fast(),
            cost: span.cost(),
            lost,
            steady,
        });
        let Inner { terminal, scene, event, samples, .. } = &mut *inner;
        match terminal {
            Some(terminal) => {
                terminal.draw(|frame| draw(frame, scene, event, samples)).context("draw on the terminal")?;
            }
            None if samples.len() % PLAIN_EVERY == 0 => {
                if let Some(sample) = samples.last() {
                    println!("{:6.1} s  {}", sample.at, figures(sample));
                }
            }
            None => {}
        }
        Ok(())
    }

    /// All samples so far.
    pub fn samples(&self) -> Vec<Sample> {
        self.lock().samples.clone()
    }

    /// Takes the live view away; what was said stays.
    pub fn close(&self) {
        if let Some(mut terminal) = self.lock().terminal.take() {
            // What remains would be a blank block at worst.
            let _ = terminal.clear();
            let _ = terminal.show_cursor();
        }
    }

    fn print(&self, line: Line) {
        match &mut self.lock().terminal {
            // A line that could not be drawn is not worth ending the demo for.
            Some(terminal) => drop(terminal.insert_before(1, |buffer| line.render(buffer.area, buffer))),
            None => println!("{line}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn figures(sample: &Sample) -> String {
    format!(
        "sent {:>7}/s  arrived {:>7}/s by {:<4} lost {:<3} fast path {:>3.0} %  {:>5.0} ns a packet",
        thousands(sample.sent),
        thousands(sample.arrived.iter().sum()),
        way(sample),
        sample.lost,
        sample.fast * 100.0,
        sample.cost,
    )
}

fn draw(frame: &mut Frame, scene: &str, event: &str, samples: &[Sample]) {
    let Some(sample) = samples.last() else { return };
    let block = Block::bordered().title(format!(" {scene} ")).border_style(Style::new().fg(Color::Blue));
    let area = block.inner(frame.area());
    frame.render_widget(block, frame.area());
    let rows = Layout::vertical([1, 1, 1, 3, 1].map(Constraint::Length)).split(area);
    let lost = Style::new().fg(if sample.lost == 0 { Color::Green } else { Color::Red }).bold();
    let line = Line::from(vec![
        Span::raw("sent ").dim(),
        Span::raw(format!("{:>7}/s", thousands(sample.sent))).bold(),
        Span::raw("   arrived ").dim(),
        Span::raw(format!("{:>7}/s", thousands(sample.arrived.iter().sum()))).bold(),
        Span::raw("   by ").dim(),
        Span::raw(format!("{:<4}", way(sample))).bold(),
        Span::raw("   lost ").dim(),
        Span::styled(sample.lost.to_string(), lost),
    ]);
    frame.render_widget(Paragraph::new(line), rows[0]);
    let gauge = Gauge::default()
        .ratio(sample.fast.clamp(0.0, 1.0))
        .label(format!("fast path {:.0} %", sample.fast * 100.0))
        .gauge_style(Style::new().fg(Color::Green).bg(Color::DarkGray));
    frame.render_widget(gauge, rows[1]);
    let cost = format!("the router's core: {:.0} ns a packet, waking up for small batches included", sample.cost);
    frame.render_widget(Paragraph::new(cost), rows[2]);
    let width = usize::from(rows[3].width);
    // The floods' packets cost less than the stream's, because they come in large batches: they would hide the change.
    let costs: Vec<u64> = samples.iter().filter(|s| s.steady).map(|s| s.cost as u64).collect();
    let sparkline = Sparkline::default().data(&costs[costs.len().saturating_sub(width)..]).fg(Color::Yellow);
    frame.render_widget(sparkline, rows[3]);
    frame.render_widget(Paragraph::new(event.to_owned()).italic(), rows[4]);
}

/// The link that most packets took.
fn way(sample: &Sample) -> &'static str {
    match sample.arrived {
        [0.0, 0.0] => "-",
        [first, second] if first >= second => "up1",
        _ => "up2",
    }
}

/// A rate in a few digits.
pub fn thousands(rate: f64) -> String {
    if rate < 1e6 { format!("{:.1}k", rate / 1e3) } else { format!("{:.2}M", rate / 1e6) }
}

/// Breaks text between words into lines of at most `WIDTH` characters; at least one line.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().filter(|line| line.is_empty() || line.len() + 1 + word.len() <= WIDTH);
        match last {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) => line.extend([" ", word]),
            None => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_broken_between_words() {
        let text = ["word"; 50].join(" ");
        let lines = wrapped(&text);
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.len() <= WIDTH));
        assert_eq!(lines.join(" "), text);
        assert_eq!(wrapped(""), [""]);
    }

    #[test]
    fn the_link_that_carries_most_is_named() {
        let sample = |arrived| Sample { at: 0.0, sent: 0.0, arrived, fast: 0.0, cost: 0.0, lost: 0, steady: true };
        assert_eq!(way(&sample([0.0, 0.0])), "-");
        assert_eq!(way(&sample([2.0, 1.0])), "up1");
        assert_eq!(way(&sample([1.0, 2.0])), "up2");
    }
}
