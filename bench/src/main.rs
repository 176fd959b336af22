// SPDX-License-Identifier: GPL-2.0-or-later

//! `balloon-bench`: measures how fast memory goes into the balloon and out of
//! it
//!
//! Alternates between two builds of QEMU, and also measures the system calls
//! that any device needs.

mod cases;
mod measure;
mod report;
mod ring;

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::Result;
use clap::Parser;

use crate::{
    cases::{BACKINGS, HOSTILE},
    measure::{bench_guests, bench_reporting, bench_rings, hugetlb, monitor_latency},
    report::{chart, table, Device, Latency, Report, Rows},
};

#[derive(Parser)]
struct Cli {
    /// QEMU with the C device as it is without the series
    #[arg(long)]
    upstream: Option<PathBuf>,
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

impl Cli {
    /// What is measured in turns; another begins in each repetition, as
    /// the state of the host depends on what has run before
    fn devices(&self, repetition: usize) -> Vec<(Device, &PathBuf)> {
        let upstream = self.upstream.iter().map(|path| (Device::Upstream, path));
        let mut devices: Vec<_> = upstream
            .chain([(Device::C, &self.a), (Device::Rust, &self.b)])
            .collect();
        let count = devices.len();
        devices.rotate_left(repetition % count);
        devices
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let mut rows = Rows::new();
    for backing in BACKINGS {
        bench_rings(&cli, backing, &mut rows)?;
    }
    bench_guests(&cli, &mut rows)?;
    bench_reporting(&cli, &mut rows)?;
    println!("{}", table(&rows));

    let mut latencies = BTreeMap::new();
    for (backing, order) in BACKINGS
        .iter()
        .flat_map(|b| HOSTILE.map(|order| (*b, order)))
    {
        let name = format!("latency {} {order}", backing.name);
        if !name.contains(&cli.only) {
            continue;
        }
        let ms = |binary, rust| {
            let latency = monitor_latency(binary, backing, order, rust)?;
            Ok::<_, anyhow::Error>(latency.as_secs_f64() * 1000.0)
        };
        // If it does not answer at all, further repetitions have no use
        let measured = ms(&cli.a, false).and_then(|c| {
            let rust: Result<Vec<_>> = (0..cli.reps).map(|_| ms(&cli.b, true)).collect();
            Ok(Latency { c, rust: rust? })
        });
        match measured {
            Ok(latency) => {
                println!("{name}: {latency}");
                latencies.insert(name, latency);
            }
            Err(err) => println!("{name}: not measured: {err:#}"),
        }
    }
    let mut huge = None;
    if "hugetlb pages".contains(&cli.only) {
        match hugetlb(&cli.a, "").and_then(|c| Ok([c, hugetlb(&cli.b, ",huge-pages=on")?])) {
            Ok([c, rust]) => {
                println!("huge pages freed by inflating 1 GiB, of 512: C {c}, Rust {rust}");
                huge = Some([c, rust]);
            }
            Err(err) => println!("hugetlb: not measured: {err:#}"),
        }
    }
    let report = Report {
        repetitions: cli.reps,
        ns_per_page: &rows,
        worst_monitor_latency_ms: latencies,
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
