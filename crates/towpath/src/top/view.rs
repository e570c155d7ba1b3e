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
                shown = last.as_ref().map_or(shown, |before| rates(&now, before, sampler.as_mut()));
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

fn rates(now: &Reading, before: &Reading, sampler: Option<&mut Sampler>) -> Result<Top> {
    let mut top = now.since(before);
    sampler.map_or(Ok(()), |sampler| sampler.add(&mut top))?;
    Ok(top)
}

fn is_end(event: &Event) -> bool {
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = event else { return false };
    match code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        KeyCode::Char('c') => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}

fn draw(frame: &mut Frame, shown: &Result<Top>) {
    let (ports, prefixes) = shown.as_ref().map_or((0, 0), |top| (top.ports.len() as u16, prefix_lines(top)));
    let lengths = [2, ports + 2, prefixes].map(Constraint::Length);
    let [head, middle, sampled, rest, foot] =
        Layout::vertical(lengths.into_iter().chain([Constraint::Fill(1), Constraint::Length(1)])).areas(frame.area());
    frame.render_widget(Paragraph::new("q quits").dim(), foot);
    let top = match shown {
        Ok(top) => top,
        Err(error) => return frame.render_widget(Paragraph::new(format!("{error:#}")).wrap(Wrap { trim: true }), head),
    };
    let style = if top.in_sync { Style::new() } else { Style::new().fg(Color::Red) };
    frame.render_widget(Paragraph::new(summary(top)).style(style.bold()), head);
    frame.render_widget(table(&PORT_HEADS, port_rows(top)), middle);
    frame.render_widget(table(&EXCEPTION_HEADS, exception_rows(top)), rest);
    if let Some(prefixes) = &top.prefixes {
        let [title, rows] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(sampled);
        frame.render_widget(Paragraph::new(sample(prefixes)).bold(), title);
        frame.render_widget(table(&PREFIX_HEADS, prefix_rows(prefixes)), rows);
    }
}

/// Lines that the prefixes take, with those above and below them.
fn prefix_lines(top: &Top) -> u16 {
    top.prefixes.as_ref().map_or(0, |prefixes| prefixes.busiest.len() as u16 + 3)
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
