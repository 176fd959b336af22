// SPDX-License-Identifier: GPL-2.0-or-later

//! Prints the results as a table, JSON and a chart

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    path::Path,
};

use anyhow::Result;
use plotters::prelude::*;
use serde::Serialize;

/// Nanoseconds per page, one value for each repetition
#[derive(Default, Serialize)]
pub struct Row {
    /// The C device as it is without the series
    pub upstream: Vec<f64>,
    pub c: Vec<f64>,
    pub rust: Vec<f64>,
    /// The bare system calls: the fastest way
    pub limit: Vec<f64>,
}

/// What is measured
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Upstream,
    C,
    Rust,
}

impl Row {
    /// The results of a device
    pub fn of(&mut self, device: Device) -> &mut Vec<f64> {
        match device {
            Device::Upstream => &mut self.upstream,
            Device::C => &mut self.c,
            Device::Rust => &mut self.rust,
        }
    }
}

/// The results of all cases, by name
pub type Rows = BTreeMap<String, Row>;

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The median, and half the range of the values in percent of the median. If
/// the range is larger than the median, only the largest value.
fn cell(values: &[f64]) -> String {
    if values.is_empty() {
        return String::new();
    }
    let max = values.iter().copied().fold(f64::MIN, f64::max);
    let min = values.iter().copied().fold(f64::MAX, f64::min);
    let median = median(values);
    if max - min > median {
        format!("< {:.0}", max.ceil())
    } else {
        format!("{median:.0} ± {:.0} %", 50.0 * (max - min) / median)
    }
}

/// How long the monitor did not answer, in milliseconds
#[derive(Serialize)]
pub struct Latency {
    /// Without repetitions
    pub c: f64,
    /// In each repetition
    pub rust: Vec<f64>,
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worst = self.rust.iter().copied().fold(0.0, f64::max);
        write!(
            f,
            "C {:.0} ms (or more, if 10 s); Rust median {:.1} ms, worst {worst:.1} ms",
            self.c,
            median(&self.rust)
        )
    }
}

/// The contents of the file that `--json` writes
#[derive(Serialize)]
pub struct Report<'a> {
    pub repetitions: usize,
    pub ns_per_page: &'a Rows,
    pub worst_monitor_latency_ms: BTreeMap<String, Latency>,
    /// The number of huge pages out of 512: C, Rust
    pub huge_pages_freed: Option<[u64; 2]>,
}

/// The results as a table for people
pub fn table(rows: &Rows) -> String {
    let mut text = String::new();
    text += "| case | C without the series, ns/page | C | Rust | system calls alone | C / Rust |\n";
    text += "|---|---|---|---|---|---|\n";
    for (name, row) in rows {
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {} | {:.1} |",
            cell(&row.upstream),
            cell(&row.c),
            cell(&row.rust),
            cell(&row.limit),
            median(&row.c) / median(&row.rust),
        );
    }
    text
}

/// The results for inflating with full rings, as bars on a logarithmic scale
pub fn chart(path: &Path, rows: &Rows) -> Result<()> {
    let cases: Vec<_> = rows
        .iter()
        .filter(|(name, row)| {
            name.starts_with("inflate") && name.ends_with("ring") && !row.limit.is_empty()
        })
        .collect();
    let height = 90 + 48 * cases.len() as u32;
    let root = SVGBackend::new(path, (960, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "Inflating the balloon, full ring: ns per page",
            ("sans-serif", 20),
        )
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(210)
        .build_cartesian_2d((5f64..40_000f64).log_scale(), 0f64..cases.len() as f64)?;
    let label = |y: &f64| {
        let index = (y - 0.5).round();
        if (y - 0.5 - index).abs() > 0.01 || index < 0.0 {
            return String::new();
        }
        cases
            .get(index as usize)
            .map_or_else(String::new, |(name, _)| {
                name.trim_start_matches("inflate ")
                    .trim_end_matches(" ring")
                    .to_owned()
            })
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(2 * cases.len() + 1)
        .y_label_formatter(&label)
        .x_desc("ns per 4 KiB page, logarithmic; shorter is better")
        .draw()?;

    type Get = fn(&Row) -> &Vec<f64>;
    let series: [(&str, RGBColor, Get); 4] = [
        ("C without the series", RGBColor(220, 160, 90), |row| {
            &row.upstream
        }),
        ("C", RGBColor(190, 90, 70), |row| &row.c),
        ("Rust", RGBColor(60, 110, 180), |row| &row.rust),
        ("system calls alone", RGBColor(150, 150, 150), |row| {
            &row.limit
        }),
    ];
    for (i, (name, color, get)) in series.into_iter().enumerate() {
        let bars = cases.iter().enumerate().map(|(y, (_, row))| {
            let low = y as f64 + 0.1 + 0.2 * (3 - i) as f64;
            let value = median(get(row)).clamp(5.0, 40_000.0);
            Rectangle::new([(5.0, low), (value, low + 0.18)], color.filled())
        });
        chart
            .draw_series(bars)?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}
