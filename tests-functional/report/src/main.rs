// SPDX-License-Identifier: GPL-2.0-or-later

//! Makes tables and a chart of the results of `guest_policies.py`

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use plotters::prelude::*;
use serde_json::Value;

#[derive(Parser)]
struct Cli {
    /// The results
    json: PathBuf,
    /// Draw a chart, as SVG
    #[arg(long)]
    chart: Option<PathBuf>,
}

const POLICIES: [&str; 3] = ["oom-notifier-2014", "shrinker-2018", "oom-notifier-2020"];

/// The published figures for each policy. They are from the report that led to
/// the last policy, which does not have figures for the driver of 2014.
const PUBLISHED: [&str; 3] = [
    "not published",
    "published: 542 s, no progress for 315 s",
    "published: 63 s",
];

const MIB: f64 = 1_048_576.0;

/// A column of a table: its title, the field, and the factor
type Column = (&'static str, &'static str, f64);

const OOM: &[Column] = &[
    ("exit", "/exit", 1.0),
    ("pages out", "/pages", 1.0),
    ("calls", "/calls", 1.0),
    ("writes, ms", "/seconds", 1e3),
    ("longest, ms", "/longest", 1e3),
    ("without balloon, ms", "/seconds without balloon", 1e3),
    ("longest, ms", "/longest without balloon", 1e3),
];

const PAGE_CACHE: &[Column] = &[
    ("target after, s", "/seconds", 1.0),
    ("reader stopped after, s", "/reader stopped after", 1.0),
    ("in all, s", "/seconds in all", 1.0),
    ("longest stall, s", "/longest stall", 1.0),
    ("balloon_inflate = balloon_deflate", "/balloon_inflate", 1.0),
    ("device: unasked", "/counters/pages-deflated-unasked", 1.0),
    ("calls", "/calls", 1.0),
    ("MiB read", "/read", 1.0 / MIB),
];

const LOOP: &[Column] = &[
    ("processes killed", "/killed", 1.0),
    ("guest CPU, %", "/guest cpu", 100.0),
    ("QEMU CPU, %", "/qemu cpu", 100.0),
    ("of that not vCPU, %", "/device cpu", 100.0),
    ("inflated/s", "/inflated per second", 1.0),
    ("deflated/s", "/deflated per second", 1.0),
    ("calls/s", "/calls per second", 1.0),
    ("events/s", "/events per second", 1.0),
];

/// The values of a field in the runs that have it
fn values(runs: &[&Value], pointer: &str, factor: f64) -> Vec<f64> {
    let mut list: Vec<_> = runs
        .iter()
        .filter_map(|run| Some(run.pointer(pointer)?.as_f64()? * factor))
        .collect();
    list.sort_unstable_by(f64::total_cmp);
    list
}

/// The median, the smallest and the largest of sorted values, and the number of
/// values if it is less than the number of runs
fn cell(values: &[f64], runs: usize) -> String {
    let number = |value: f64| {
        let digits = usize::from(value.fract() != 0.0 && value.abs() < 100.0);
        format!("{value:.digits$}")
    };
    let [Some(first), Some(last)] = [values.first(), values.last()] else {
        return "-".to_owned();
    };
    let median = number(values[values.len() / 2]);
    let (low, high) = (number(*first), number(*last));
    let mut text = median;
    if low != high {
        text += &format!(" ({low} to {high})");
    }
    if values.len() < runs {
        text += &format!(", {} of {runs} runs", values.len());
    }
    text
}

/// The runs of a scenario with a policy, with or without the feature
fn select<'a>(runs: &'a [Value], keys: &[(&str, &str)]) -> Vec<&'a Value> {
    runs.iter()
        .filter(|run| keys.iter().all(|(key, value)| run[key] == *value))
        .collect()
}

fn table(runs: &[Value], scenario: &str, columns: &[Column]) -> String {
    let titles: Vec<_> = columns.iter().map(|(title, ..)| *title).collect();
    let mut text = format!(
        "| policy | bit | property | runs | {} |\n",
        titles.join(" | ")
    );
    text += &format!("|---|---|---|---|{}\n", "---|".repeat(titles.len()));
    let mut properties: Vec<_> = runs
        .iter()
        .filter_map(|run| run["property"].as_str())
        .collect();
    properties.sort_unstable();
    properties.dedup();
    for policy in POLICIES {
        for bit in ["off", "on"] {
            for property in &properties {
                let keys = [
                    ("scenario", scenario),
                    ("policy", policy),
                    ("bit", bit),
                    ("property", property),
                ];
                let rows = select(runs, &keys);
                if rows.is_empty() {
                    continue;
                }
                let cells: Vec<_> = columns
                    .iter()
                    .map(|(_, pointer, factor)| cell(&values(&rows, pointer, *factor), rows.len()))
                    .collect();
                text += &format!(
                    "| {policy} | {bit} | {property} | {} | {} |\n",
                    rows.len(),
                    cells.join(" | ")
                );
            }
        }
    }
    text
}

/// The size of the balloon over time in the runs with the page cache
fn chart(path: &PathBuf, report: &Value, runs: &[Value]) -> Result<()> {
    let memory = report["memory"].as_f64().context("no memory")?;
    let root = SVGBackend::new(path, (1080, 380)).into_drawing_area();
    root.fill(&WHITE)?;
    let panels: Vec<Vec<_>> = POLICIES
        .iter()
        .map(|policy| {
            let keys = [
                ("scenario", "page_cache"),
                ("policy", policy),
                ("bit", "on"),
            ];
            select(runs, &keys)
                .iter()
                .map(|run| {
                    let samples = run["samples"].as_array().map_or(&[][..], Vec::as_slice);
                    samples
                        .iter()
                        .filter_map(|s| Some((s[0].as_f64()?, memory - s[1].as_f64()? / MIB)))
                        .collect::<Vec<_>>()
                })
                .collect()
        })
        .collect();
    let end = panels
        .iter()
        .flatten()
        .filter_map(|line| Some(line.last()?.0))
        .fold(1.0, f64::max);
    for (i, area) in root.split_evenly((1, 3)).iter().enumerate() {
        let mut chart = ChartBuilder::on(area)
            .caption(POLICIES[i], ("sans-serif", 17))
            .margin(10)
            .x_label_area_size(52)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..end, 0.0..memory)?;
        chart
            .configure_mesh()
            .x_labels(5)
            .x_desc(format!("seconds ({})", PUBLISHED[i]))
            .y_desc("balloon, MiB")
            .draw()?;
        for line in &panels[i] {
            chart.draw_series(LineSeries::new(
                line.iter().copied(),
                RGBColor(60, 110, 180).stroke_width(1),
            ))?;
        }
        let target = memory - report["target"].as_f64().context("no target")?;
        chart.draw_series(LineSeries::new(
            [(0.0, target), (end, target)],
            RGBColor(190, 90, 70),
        ))?;
    }
    root.present()?;
    Ok(())
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let report: Value = serde_json::from_str(&fs::read_to_string(&cli.json)?)?;
    let runs = report["runs"].as_array().context("no runs")?;
    for (scenario, columns) in [("oom", OOM), ("page_cache", PAGE_CACHE), ("loop", LOOP)] {
        if !select(runs, &[("scenario", scenario)]).is_empty() {
            println!("{scenario}\n\n{}", table(runs, scenario, columns));
        }
    }
    if let Some(path) = &cli.chart {
        chart(path, &report, runs)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn medians_and_ranges() {
        assert_eq!(cell(&[], 1), "-");
        assert_eq!(cell(&[2.0], 1), "2");
        assert_eq!(cell(&[1.0, 2.5, 40.0], 3), "2.5 (1 to 40)");
        assert_eq!(cell(&[300.4, 300.4], 3), "300, 2 of 3 runs");
    }

    #[test]
    fn only_runs_that_match() {
        let runs = [
            json!({"policy": "a", "bit": "on", "x": {"y": 3}}),
            json!({"policy": "a", "bit": "off", "x": null}),
            json!({"policy": "b", "bit": "on"}),
        ];
        let selected = select(&runs, &[("policy", "a")]);
        assert_eq!(selected.len(), 2);
        assert_eq!(values(&selected, "/x/y", 2.0), [6.0]);
    }
}
