//! Reports of the demo and the benchmarks: one HTML file that needs nothing else, plots as inline SVG.

mod plot;

pub use plot::{Bar, Series};

use anyhow::{Context, Result};
use html_escape::encode_text;
use std::fmt::Write;
use std::path::Path;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}\
h1,h2{line-height:1.2}table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;\
text-align:right}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}\
.met{color:#176f2c}.missed{color:#a11}";

/// A report under construction.
pub struct Report {
    body: String,
    title: String,
}

impl Report {
    /// An empty report.
    pub fn new(title: &str) -> Self {
        Self { body: format!("<h1>{}</h1>\n", encode_text(title)), title: title.to_owned() }
    }

    /// Starts a section.
    pub fn section(&mut self, title: &str) -> &mut Self {
        self.push(format_args!("<h2>{}</h2>\n", encode_text(title)))
    }

    /// A paragraph of plain text.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.push(format_args!("<p>{}</p>\n", encode_text(text)))
    }

    /// Preformatted text, such as a command's output.
    pub fn verbatim(&mut self, text: &str) -> &mut Self {
        self.push(format_args!("<pre>{}</pre>\n", encode_text(text)))
    }

    /// A table; the first column is a label.
    pub fn table<R: AsRef<[String]>>(&mut self, head: &[&str], rows: &[R]) -> &mut Self {
        self.body.push_str("<table><tr>");
        for cell in head {
            self.push(format_args!("<th>{}</th>", encode_text(cell)));
        }
        self.body.push_str("</tr>\n");
        for row in rows {
            self.body.push_str("<tr>");
            for cell in row.as_ref() {
                self.push(format_args!("<td>{}</td>", encode_text(cell)));
            }
            self.body.push_str("</tr>\n");
        }
        self.body.push_str("</table>\n");
        self
    }

    /// Horizontal bars with their spread.
    pub fn bars(&mut self, title: &str, unit: &str, bars: &[Bar]) -> Result<&mut Self> {
        let svg = plot::bars(title, unit, bars).with_context(|| format!("plot '{title}'"))?;
        self.body.push_str(&svg);
        Ok(self)
    }

    /// Lines over a common axis.
    pub fn lines(&mut self, title: &str, x: &str, y: &str, log_x: bool, series: &[Series]) -> Result<&mut Self> {
        let svg = plot::lines(title, x, y, log_x, series).with_context(|| format!("plot '{title}'"))?;
        self.body.push_str(&svg);
        Ok(self)
    }

    /// Writes the report, making its folder if need be.
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let title = encode_text(&self.title);
        let page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
             <style>{STYLE}</style></head>\n<body>\n{}</body></html>\n",
            self.body
        );
        std::fs::write(path, page).with_context(|| format!("write {}", path.display()))
    }

    fn push(&mut self, arguments: std::fmt::Arguments) -> &mut Self {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(arguments);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_plots_hold_their_labels() {
        let mut report = Report::new("a < b");
        report.section("s").text("<script>").table(&["x", "y"], &[["1".to_owned(), "2 & 3".to_owned()]]);
        report.bars("cost", "ns", &[Bar { label: "linux".into(), value: 3.0, low: 2.0, high: 4.0 }]).unwrap();
        let series = [Series { label: "towpath".into(), points: vec![(1.0, 1.0), (10.0, 2.0)] }];
        report.lines("over", "routes", "ns", true, &series).unwrap();
        for expected in ["a &lt; b", "&lt;script&gt;", "2 &amp; 3", "linux", "towpath", "routes"] {
            assert!(report.body.contains(expected), "{expected} is missing from {}", report.body);
        }
        assert!(!report.body.contains("<script>"));
    }
}
