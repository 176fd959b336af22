// SPDX-License-Identifier: GPL-2.0-or-later

//! `balloon-bench`: how fast memory goes into the balloon, and out of it
//!
//! Measures two builds of QEMU in turns, together with the system calls that
//! are needed in any case.

mod cases;
mod measure;
mod report;
mod ring;

use std::{collections::BTreeMap, fs, path::PathBuf, time::Duration};

use anyhow::Result;
use clap::Parser;

use crate::{
    cases::BACKINGS,
    measure::{bench_reporting, bench_rings, hugetlb, monitor_latency},
    report::{chart, table, Report, Rows},
};

#[derive(Parser)]
struct Cli {
    /// QEMU with the C device
    #[arg(long)]
    a: PathBuf,
    /// QEMU with the Rust device
    #[arg(long)]
    b: PathBuf,
    /// Program that measures the bare system calls (compiled from limit.c)
    #[arg(long)]
    limit: PathBuf,
    /// How often to measure everything
    #[arg(long, default_value_t = 5)]
    reps: usize,
    /// Write the results, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draw a chart, as SVG
    #[arg(long)]
    chart: Option<PathBuf>,
    /// Do not show progress
    #[arg(short, long)]
    quiet: bool,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    only: String,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let mut rows = Rows::new();
    for backing in BACKINGS {
        bench_rings(&cli, backing, &mut rows)?;
    }
    if "reporting".contains(&cli.only) {
        bench_reporting(&cli, &mut rows)?;
    }
    println!("{}", table(&rows));

    let mut latency = BTreeMap::new();
    for backing in BACKINGS {
        let name = format!("latency {}", backing.name);
        if !name.contains(&cli.only) {
            continue;
        }
        let ms = |binary| {
            let worst = (0..cli.reps).map(|_| monitor_latency(binary, backing));
            let worst: Result<Vec<Duration>> = worst.collect();
            let worst = worst?.into_iter().max().unwrap_or_default();
            Ok::<_, anyhow::Error>(worst.as_secs_f64() * 1000.0)
        };
        // One that does not answer at all need not be asked again
        let measured = monitor_latency(&cli.a, backing)
            .and_then(|c| Ok([c.as_secs_f64() * 1000.0, ms(&cli.b)?]));
        match measured {
            Ok([c, rust]) => {
                println!(
                    "worst latency of the monitor, hostile element, {}: C {c:.0} ms (or more, if \
                     10 s), Rust {rust:.1} ms (target: 20)",
                    backing.name
                );
                latency.insert(backing.name, [c, rust]);
            }
            Err(err) => println!("{name}: not measured: {err:#}"),
        }
    }
    let mut huge = None;
    if "hugetlb pages".contains(&cli.only) {
        match hugetlb(&cli.a).and_then(|c| Ok([c, hugetlb(&cli.b)?])) {
            Ok([c, rust]) => {
                println!("huge pages freed by inflating 1 GiB: C {c}, Rust {rust} (target: 512)");
                huge = Some([c, rust]);
            }
            Err(err) => println!("hugetlb: not measured: {err:#}"),
        }
    }
    let report = Report {
        repetitions: cli.reps,
        ns_per_page: &rows,
        worst_monitor_latency: latency,
        huge_pages_freed: huge,
    };
    if let Some(path) = &cli.json {
        fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    if let Some(path) = &cli.chart {
        chart(path, &rows)?;
    }
    Ok(())
}
