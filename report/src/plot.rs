//! Plots as SVG text.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

const COLOURS: [RGBColor; 6] = [
    RGBColor(0x17, 0x6f, 0xb5),
    RGBColor(0xd9, 0x6c, 0x06),
    RGBColor(0x2b, 0x8a, 0x3e),
    RGBColor(0xa6, 0x1e, 0x4d),
    RGBColor(0x5f, 0x3d, 0xc4),
    RGBColor(0x49, 0x50, 0x57),
];

/// One bar: the value and the ends of its spread.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What it stands for
    pub label: String,
    /// Length
    pub value: f64,
    /// Lower end of the spread
    pub low: f64,
    /// Upper end of the spread
    pub high: f64,
}

/// One line.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it stands for
    pub label: String,
    /// Points in order of x
    pub points: Vec<(f64, f64)>,
}

fn text<E: std::fmt::Display>(error: E) -> anyhow::Error {
    anyhow!("{error}")
}

pub fn bars(title: &str, unit: &str, bars: &[Bar]) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (860, 70 + 34 * bars.len() as u32)).into_drawing_area();
        let most = bars.iter().map(|bar| bar.high.max(bar.value)).fold(f64::MIN_POSITIVE, f64::max) * 1.12;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 17))
            .margin(8)
            .x_label_area_size(26)
            .build_cartesian_2d(-most * 0.38..most, 0.0..bars.len() as f64)
            .map_err(text)?;
        for (row, bar) in bars.iter().rev().enumerate() {
            let (bottom, top) = (row as f64 + 0.2, row as f64 + 0.8);
            let middle = row as f64 + 0.5;
            let colour = COLOURS[(bars.len() - 1 - row) % COLOURS.len()];
            let body = Rectangle::new([(0.0, bottom), (bar.value, top)], colour.mix(0.8).filled());
            let spread = PathElement::new([(bar.low, middle), (bar.high, middle)], BLACK);
            let label = Text::new(bar.label.clone(), (-most * 0.37, middle + 0.18), ("sans-serif", 14));
            let figure = format!("{} {unit}", number(bar.value));
            let value = Text::new(figure, (bar.high.max(bar.value) + most * 0.01, middle + 0.18), ("sans-serif", 13));
            chart.draw_series([body]).map_err(text)?;
            chart.draw_series([spread]).map_err(text)?;
            chart.draw_series([label, value]).map_err(text)?;
        }
        area.present().map_err(text)?;
    }
    Ok(svg)
}

pub fn lines(title: &str, x: &str, y: &str, log_x: bool, series: &[Series]) -> Result<String> {
    let scale = |value: f64| if log_x { value.max(f64::MIN_POSITIVE).log10() } else { value };
    let all = || series.iter().flat_map(|series| series.points.iter());
    let left = all().map(|point| scale(point.0)).fold(f64::INFINITY, f64::min);
    let right = all().map(|point| scale(point.0)).fold(f64::NEG_INFINITY, f64::max);
    // Room for the legend above the lines.
    let most = all().map(|point| point.1).fold(f64::MIN_POSITIVE, f64::max) * 1.35;
    if !left.is_finite() {
        return Err(anyhow!("no points"));
    }
    let right = if right > left { right } else { left + 1.0 };
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (860, 380)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 17))
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(left..right, 0.0..most)
            .map_err(text)?;
        chart
            .configure_mesh()
            .x_desc(x)
            .y_desc(y)
            .x_label_formatter(&|value| number(if log_x { 10f64.powf(*value) } else { *value }))
            .y_label_formatter(&|value| number(*value))
            .draw()
            .map_err(text)?;
        for (index, line) in series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points: Vec<_> = line.points.iter().map(|point| (scale(point.0), point.1)).collect();
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))
                .map_err(text)?
                .label(line.label.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
            chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled()))).map_err(text)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()
            .map_err(text)?;
        area.present().map_err(text)?;
    }
    Ok(svg)
}

/// A figure with as many digits as are worth reading.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{:.3}M", value / 1e6).replace(".000M", "M"),
        size if size >= 1e4 => format!("{:.1}k", value / 1e3).replace(".0k", "k"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 || value == 0.0 => format!("{value:.1}").replace(".0", ""),
        _ => format!("{value:.2}").replace(".00", ""),
    }
}
