// SPDX-License-Identifier: GPL-2.0-or-later

//! `balloon-bench`: how fast memory goes into the balloon, and out of it
//!
//! Measures two builds of QEMU in turns, together with the system calls that
//! are needed in any case.

mod ring;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{ensure, Context, Result};
use clap::Parser;
use plotters::prelude::*;
use qtest_client::rng::Rng;
use serde::Serialize;

use crate::ring::{Driver, DEFLATE, ELEMENT, ELEMENTS, INFLATE, PAGE, REGION, REGION_SIZE};

/// Pages in a full ring
const PAGES: usize = ELEMENT * ELEMENTS;

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
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    only: String,
}

/// What backs the guest's memory
#[derive(Clone, Copy, PartialEq, Eq)]
struct Backing {
    name: &'static str,
    args: &'static [&'static str],
    thp: bool,
}

const BACKINGS: [Backing; 4] = [
    Backing {
        name: "thp",
        args: &[],
        thp: true,
    },
    Backing {
        name: "nothp",
        args: &[],
        thp: false,
    },
    Backing {
        name: "memfd",
        args: &[
            "-object",
            "memory-backend-memfd,id=ram0,size=512M,share=on",
            "-machine",
            "memory-backend=ram0",
        ],
        thp: true,
    },
    Backing {
        name: "hugetlb",
        args: &[
            "-object",
            "memory-backend-memfd,id=ram0,size=512M,hugetlb=on,hugetlbsize=2M",
            "-machine",
            "memory-backend=ram0",
        ],
        thp: true,
    },
];

const ORDERS: [&str; 4] = ["descending", "ascending", "runs", "random"];

/// The smallest acceptable ratio of C to Rust
fn target(case: &str) -> Option<f64> {
    Some(match case {
        "inflate descending thp element" | "inflate ascending thp element" => 20.0,
        "inflate descending thp ring" | "inflate ascending thp ring" => 50.0,
        "inflate runs thp ring" => 12.0,
        "inflate random thp ring" => 2.2,
        "inflate descending memfd ring" => 6.0,
        "deflate descending thp ring" => 40.0,
        _ => return None,
    })
}

/// Nanoseconds for a page, one for each repetition
#[derive(Default, Serialize)]
struct Row {
    c: Vec<f64>,
    rust: Vec<f64>,
    /// The bare system calls; the better of the two ways
    limit: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Half the distance between the smallest and the largest value, in percent of
/// the median
fn spread(values: &[f64]) -> f64 {
    let max = values.iter().copied().fold(f64::MIN, f64::max);
    let min = values.iter().copied().fold(f64::MAX, f64::min);
    50.0 * (max - min) / median(values)
}

/// The PFNs of a full ring, relative to the region
fn pfns(order: &str) -> Vec<u32> {
    let n = PAGES as u32;
    let mut rng = Rng::new(1);
    match order {
        "descending" => (0..n).rev().collect(),
        "ascending" => (0..n).collect(),
        "random" => {
            // Every second page, so that none is next to another
            let mut list: Vec<u32> = (0..n).map(|i| 2 * i).collect();
            rng.shuffle(&mut list);
            list
        }
        _ => {
            // Runs of 1 to 64 with a page between them
            let (mut runs, mut count, mut next) = (Vec::new(), 0, 0);
            while count < n {
                let len = (1 + rng.below(64) as u32).min(n - count);
                runs.push(next..next + len);
                count += len;
                next += len + 1;
            }
            rng.shuffle(&mut runs);
            runs.into_iter().flatten().collect()
        }
    }
}

/// The runs that are left of the PFNs in each group, as input for the program
/// that measures the limit
fn runs(pfns: &[u32], group_size: usize) -> String {
    let mut text = String::new();
    for group in pfns.chunks(group_size) {
        let mut sorted = group.to_vec();
        sorted.sort_unstable();
        for run in sorted.chunk_by(|a, b| *b == a + 1) {
            let _ = writeln!(text, "{} {}", run[0], run.len());
        }
        text.push('\n');
    }
    text
}

fn limit(program: &Path, backing: Backing, runs: &str) -> Result<f64> {
    let mut child = Command::new(program)
        .args([backing.name, &(REGION_SIZE >> 20).to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    child
        .stdin
        .take()
        .context("no pipe")?
        .write_all(runs.as_bytes())?;
    let out = child.wait_with_output()?;
    ensure!(out.status.success(), "{} failed", program.display());
    let best = String::from_utf8(out.stdout)?
        .split_whitespace()
        .filter_map(|ns| ns.parse::<f64>().ok())
        .filter(|ns| *ns > 0.0)
        .fold(f64::MAX, f64::min);
    Ok(best / PAGES as f64)
}

type Rows = BTreeMap<String, Row>;

/// Inflate and deflate: all orders and sizes of batches, for one kind of memory
fn bench_rings(cli: &Cli, backing: Backing, rows: &mut Rows) -> Result<()> {
    let binaries = [&cli.a, &cli.b];
    let huge = backing.name == "hugetlb";
    if huge && free_huge_pages().unwrap_or(0) < 256 {
        eprintln!("hugetlb: not measured, as it needs 256 free huge pages of 2 MiB");
        return Ok(());
    }
    for rep in 0..cli.reps {
        for order in ORDERS {
            for (kick, one_kick) in [("element", false), ("ring", true)] {
                let name = |way| format!("{way} {order} {} {kick}", backing.name);
                if !name("inflate").contains(&cli.only) && !name("deflate").contains(&cli.only) {
                    continue;
                }
                eprintln!("{}/{}: {}", rep + 1, cli.reps, name("inflate, deflate"));
                let list = pfns(order);
                for (i, binary) in binaries.iter().enumerate() {
                    let mut driver = start(binary, backing)?;
                    driver.prepare_pfns(&list)?;
                    driver.touch()?;
                    for (way, q) in [("inflate", INFLATE), ("deflate", DEFLATE)] {
                        let ns = driver.measure(q, ELEMENTS, one_kick)? / PAGES as f64;
                        let row = rows.entry(name(way)).or_default();
                        if i == 0 { &mut row.c } else { &mut row.rust }.push(ns);
                    }
                }
                if huge {
                    // There are hardly any system calls to be compared with
                    continue;
                }
                let group = if one_kick { PAGES } else { ELEMENT };
                let ns = limit(&cli.limit, backing, &runs(&list, group))?;
                rows.entry(name("inflate")).or_default().limit.push(ns);
            }
        }
    }
    Ok(())
}

/// Start QEMU with or without transparent huge pages.
fn start(binary: &Path, backing: Backing) -> Result<Driver> {
    if backing.thp {
        return Driver::start(binary, backing.args, "");
    }
    // inherited by QEMU
    nix::sys::prctl::set_thp_disable(true)?;
    let driver = Driver::start(binary, backing.args, "");
    nix::sys::prctl::set_thp_disable(false)?;
    driver
}

/// Reports of 32 times 4 MiB, in ns/page
fn bench_reporting(cli: &Cli, rows: &mut Rows) -> Result<()> {
    let row = rows.entry("reporting 32 x 4 MiB".to_owned()).or_default();
    for _ in 0..cli.reps {
        for (i, binary) in [&cli.a, &cli.b].iter().enumerate() {
            let mut driver = Driver::start(binary, &[], ",free-page-reporting=on")?;
            driver.touch()?;
            let buffers: Vec<_> = (0..32)
                .map(|n| (REGION + (n << 22), 4 << 20, true))
                .collect();
            driver.prepare(3, &buffers, true)?;
            let ns = driver.measure(3, 1, true)? / PAGES as f64;
            if i == 0 { &mut row.c } else { &mut row.rust }.push(ns);
        }
        let runs: String = (0..32).map(|n| format!("{} 1024\n", n * 1024)).collect();
        row.limit.push(limit(&cli.limit, BACKINGS[0], &runs)?);
    }
    Ok(())
}

/// How long the monitor does not answer while a hostile element is worked on:
/// 128 descriptors of 64 MiB of valid PFNs
fn monitor_latency(binary: &Path) -> Result<Duration> {
    let mut driver = Driver::start(binary, &[], "")?;
    driver.touch()?;
    let mut rng = Rng::new(3);
    let first = REGION / PAGE;
    let pages = REGION_SIZE / PAGE;
    let part: Vec<u8> = (0..1 << 18)
        .flat_map(|_| ((first + rng.below(pages)) as u32).to_le_bytes())
        .collect();
    let buffer = REGION + REGION_SIZE;
    for i in 0..64 {
        driver.write(buffer + (i << 20), &part)?;
    }
    driver.prepare(INFLATE, &[(buffer, 64 << 20, false); 128], true)?;

    // That is long enough to see who does not answer
    let limit = Duration::from_secs(10);
    driver.qemu.set_qmp_timeout(limit)?;
    let begin = Instant::now();
    driver.kick(INFLATE)?;
    let mut worst = Duration::ZERO;
    while begin.elapsed() < limit {
        let start = Instant::now();
        let answer = driver.qemu.qmp(r#"{"execute":"query-status"}"#);
        worst = worst.max(start.elapsed());
        if answer.is_err() {
            return Ok(worst);
        }
    }
    driver.kicked()?;
    Ok(worst)
}

/// Huge pages of 2 MiB that the host has left
fn free_huge_pages() -> Result<u64> {
    let text = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")?;
    Ok(text.trim().parse()?)
}

/// How many huge pages of 2 MiB come back when 1 GiB is inflated, 256 pages at
/// a time
fn hugetlb(binary: &Path) -> Result<u64> {
    ensure!(
        free_huge_pages()? >= 640,
        "needs 640 free huge pages of 2 MiB"
    );
    let args = [
        "-m",
        "1280M",
        "-object",
        "memory-backend-memfd,id=ram0,size=1280M,hugetlb=on,hugetlbsize=2M",
        "-machine",
        "memory-backend=ram0",
    ];
    let mut driver = Driver::start(binary, &args, "")?;
    for part in 0..4u64 {
        driver.touch_at(REGION + part * REGION_SIZE)?;
    }
    let before = free_huge_pages()?;
    for part in 0..8u32 {
        let list: Vec<u32> = (0..PAGES as u32)
            .rev()
            .map(|i| part * PAGES as u32 + i)
            .collect();
        driver.prepare_pfns(&list)?;
        driver.measure(INFLATE, ELEMENTS, false)?;
    }
    Ok(free_huge_pages()?.saturating_sub(before))
}

fn table(rows: &Rows) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "| case | C ns/page | Rust ns/page | limit ns/page | C/Rust | target | Rust/limit \
         |\n|---|---|---|---|---|---|---|"
    );
    for (name, row) in rows {
        let (c, rust, limit) = (median(&row.c), median(&row.rust), median(&row.limit));
        let cell = |value: f64, list: &[f64]| {
            if list.is_empty() {
                String::new()
            } else {
                format!("{value:.0} ± {:.0} %", spread(list))
            }
        };
        let target = target(name);
        let verdict = target.map_or_else(String::new, |t| {
            let met = if c / rust >= t { "met" } else { "MISSED" };
            format!("{t}: {met}")
        });
        let of_limit = if row.limit.is_empty() {
            String::new()
        } else {
            format!("{:.2}", rust / limit)
        };
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {:.1} | {verdict} | {of_limit} |",
            cell(c, &row.c),
            cell(rust, &row.rust),
            cell(limit, &row.limit),
            c / rust,
        );
    }
    text
}

/// Inflating with full rings, as bars on a logarithmic scale
fn chart(path: &Path, rows: &Rows) -> Result<()> {
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
    let series: [(&str, RGBColor, Get); 3] = [
        ("C", RGBColor(190, 90, 70), |row| &row.c),
        ("Rust", RGBColor(60, 110, 180), |row| &row.rust),
        ("system calls alone", RGBColor(150, 150, 150), |row| {
            &row.limit
        }),
    ];
    for (i, (name, color, get)) in series.into_iter().enumerate() {
        let bars = cases.iter().enumerate().map(|(y, (_, row))| {
            let low = y as f64 + 0.14 + 0.24 * (2 - i) as f64;
            let value = median(get(row)).clamp(5.0, 40_000.0);
            Rectangle::new([(5.0, low), (value, low + 0.22)], color.filled())
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

#[derive(Serialize)]
struct Report<'a> {
    repetitions: usize,
    ns_per_page: &'a Rows,
    /// Milliseconds; C, Rust
    worst_monitor_latency: Option<[f64; 2]>,
    /// Of 512; C, Rust
    huge_pages_freed: Option<[u64; 2]>,
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

    let mut latency = None;
    if "latency".contains(&cli.only) {
        let ms = |d: Duration| d.as_secs_f64() * 1000.0;
        let (c, rust) = (ms(monitor_latency(&cli.a)?), ms(monitor_latency(&cli.b)?));
        println!(
            "worst latency of the monitor, hostile element: C {c:.0} ms (or more, if 10 s), Rust \
             {rust:.1} ms (target: 20)"
        );
        latency = Some([c, rust]);
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
