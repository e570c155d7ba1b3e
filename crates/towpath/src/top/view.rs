//! The live view. It ends on q, Escape, Ctrl-C or a signal, and leaves the terminal as it was.

use super::rates::Reading;
use super::sample::Sampler;
use super::{EXCEPTION_HEADS, PORT_HEADS, PREFIX_HEADS, exception_rows, port_rows, prefix_rows, read, sample, summary};
use crate::read::connect;
use crate::report::Top;
use crate::signals::Termination;
use anyhow::{Context, Result};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Text;
use ratatui::widgets::{Cell, Paragraph, Row, Table, Wrap};
use ratatui::{DefaultTerminal, Frame};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between two looks at the keys.
const KEYS: Duration = Duration::from_millis(100);

/// Runs it until it is ended.
pub fn run(interval: Duration, prefixes: bool) -> Result<()> {
    // Said where it can be read.
    drop(connect()?);
    let termination = Termination::block()?;
    let ended = Arc::new(AtomicBool::new(false));
    let told = ended.clone();
    crate::source::thread("signals", move || {
        termination.wait();
        told.store(true, Ordering::Relaxed);
    })?;
    let mut terminal = ratatui::try_init().context("cannot draw on this terminal")?;
    let sampler = prefixes.then(Sampler::default);
    let result = show(&mut terminal, interval, sampler, &ended);
    ratatui::restore();
    result
}

fn show(
    terminal: &mut DefaultTerminal,
    interval: Duration,
    mut sampler: Option<Sampler>,
    ended: &AtomicBool,
) -> Result<()> {
    let mut last: Option<Reading> = None;
    let mut shown = Err(anyhow::anyhow!("reading …"));
    while !ended.load(Ordering::Relaxed) {
        let begin = Instant::now();
        match connect().and_then(|mut client| read(&mut client)) {
            Ok(now) => {
                shown = last.as_ref().map_or(shown, |before| Ok(Shown::new(now.since(before), sampler.as_mut())));
                last = Some(now);
            }
            // A daemon that is started anew is shown again.
            Err(error) => (last, shown) = (None, Err(error)),
        }
        // What has been counted so far is no rate: the first one comes soon.
        let wait = if shown.is_ok() { interval } else { interval.min(Duration::from_millis(500)) };
        loop {
            terminal.draw(|frame| draw(frame, &shown))?;
            let left = wait.saturating_sub(begin.elapsed());
            if left.is_zero() || ended.load(Ordering::Relaxed) {
                break;
            }
            if event::poll(left.min(KEYS))? && is_end(&event::read()?) {
                return Ok(());
            }
        }
    }
    Ok(())
}

struct Shown {
    top: Top,
    /// Why there is no sample
    trouble: Option<String>,
}

impl Shown {
    fn new(mut top: Top, sampler: Option<&mut Sampler>) -> Self {
        let failed = sampler.and_then(|sampler| sampler.add(&mut top).err());
        Self { top, trouble: failed.map(|error| format!("no prefixes: {error:#}")) }
    }

    /// What is said of the sample, and its rows.
    fn sampled(&self) -> Option<(String, Vec<Vec<String>>)> {
        let trouble = self.trouble.clone().map(|trouble| (trouble, Vec::new()));
        trouble.or_else(|| self.top.prefixes.as_ref().map(|prefixes| (sample(prefixes), prefix_rows(prefixes))))
    }
}

fn is_end(event: &Event) -> bool {
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = event else { return false };
    match code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        KeyCode::Char('c') => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}

fn draw(frame: &mut Frame, shown: &Result<Shown>) {
    let sampled = shown.as_ref().ok().and_then(Shown::sampled);
    let ports = shown.as_ref().map_or(0, |shown| shown.top.ports.len() as u16);
    // A line above the rows, their heads, and a line below.
    let prefixes = sampled.as_ref().map_or(0, |(_, rows)| rows.len() as u16 + 3);
    let lengths = [2, ports + 2, prefixes].map(Constraint::Length);
    let [head, middle, below, rest, foot] =
        Layout::vertical(lengths.into_iter().chain([Constraint::Fill(1), Constraint::Length(1)])).areas(frame.area());
    frame.render_widget(Paragraph::new("q quits").dim(), foot);
    let top = match shown {
        Ok(shown) => &shown.top,
        Err(error) => return frame.render_widget(Paragraph::new(format!("{error:#}")).wrap(Wrap { trim: true }), head),
    };
    let style = if top.in_sync { Style::new() } else { Style::new().fg(Color::Red) };
    frame.render_widget(Paragraph::new(summary(top)).style(style.bold()), head);
    frame.render_widget(table(&PORT_HEADS, port_rows(top)), middle);
    frame.render_widget(table(&EXCEPTION_HEADS, exception_rows(top)), rest);
    if let Some((said, rows)) = sampled {
        let [title, area] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(below);
        frame.render_widget(Paragraph::new(said).bold(), title);
        frame.render_widget(table(&PREFIX_HEADS, rows), area);
    }
}

/// As `text::table`: heads that begin with `>` are of columns aligned to the right.
fn table(heads: &[&'static str], rows: Vec<Vec<String>>) -> Table<'static> {
    let right: Vec<bool> = heads.iter().map(|head| head.starts_with('>')).collect();
    let cell = |(text, right): (String, &bool)| {
        let text = Text::from(text);
        Cell::from(if *right { text.right_aligned() } else { text })
    };
    let row = |cells: Vec<String>| Row::new(cells.into_iter().zip(&right).map(cell).collect::<Vec<_>>());
    let heads: Vec<String> = heads.iter().map(|head| head.trim_start_matches('>').to_owned()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).chain(heads.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0) as u16
    };
    let widths: Vec<_> = (0..heads.len()).map(|column| Constraint::Length(width(column))).collect();
    let head = row(heads).style(Style::new().bold().underlined());
    Table::new(rows.into_iter().map(row).collect::<Vec<_>>(), widths).header(head).column_spacing(2)
}
