// SPDX-License-Identifier: GPL-2.0-or-later

//! The measurements

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{ensure, Context, Result};
use qtest_client::rng::Rng;

use crate::{
    cases::{pfns, runs, Backing, BACKINGS, ORDERS, PAGES},
    report::Rows,
    ring::{Driver, DEFLATE, ELEMENT, ELEMENTS, INFLATE, PAGE, REGION, REGION_SIZE},
    Cli,
};

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

/// Measure inflating and deflating with one kind of memory, with all orders and
/// batch sizes.
pub fn bench_rings(cli: &Cli, backing: Backing, rows: &mut Rows) -> Result<()> {
    let binaries = [&cli.a, &cli.b];
    let huge = backing.is_hugetlb();
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
                if !cli.quiet {
                    eprintln!("{}/{}: {}", rep + 1, cli.reps, name("inflate, deflate"));
                }
                let list = pfns(order);
                for (i, binary) in binaries.iter().enumerate() {
                    let mut driver = start(binary, backing, i == 1)?;
                    driver.prepare_pfns(&list)?;
                    driver.touch()?;
                    for (way, q) in [("inflate", INFLATE), ("deflate", DEFLATE)] {
                        let ns = driver.measure(q, ELEMENTS, one_kick)? / PAGES as f64;
                        let row = rows.entry(name(way)).or_default();
                        if i == 0 { &mut row.c } else { &mut row.rust }.push(ns);
                    }
                }
                if huge {
                    // Deflating needs hardly any system calls to compare with
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

/// Start QEMU with the C device or, if `rust`, the Rust device; with or without
/// transparent huge pages.
fn start(binary: &Path, backing: Backing, rust: bool) -> Result<Driver> {
    let options = if rust { backing.rust_options } else { "" };
    if backing.thp {
        return Driver::start(binary, backing.args, options);
    }
    // QEMU inherits this setting
    nix::sys::prctl::set_thp_disable(true)?;
    let driver = Driver::start(binary, backing.args, options);
    nix::sys::prctl::set_thp_disable(false)?;
    driver
}

/// Measure reports of 32 times 4 MiB; in ns/page.
pub fn bench_reporting(cli: &Cli, rows: &mut Rows) -> Result<()> {
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

/// Measure for how long the monitor does not answer while the device works on a
/// hostile element: 128 descriptors of 64 MiB of valid PFNs, in random or in
/// ascending order, with one kind of memory.  The result is the cost of the
/// most expensive turn, plus the time of the monitor itself.
pub fn monitor_latency(
    binary: &Path,
    backing: Backing,
    order: &str,
    rust: bool,
) -> Result<Duration> {
    if backing.is_hugetlb() {
        ensure!(
            free_huge_pages()? >= 256,
            "needs 256 free huge pages of 2 MiB"
        );
    }
    let mut driver = start(binary, backing, rust)?;
    driver.touch()?;
    let mut rng = Rng::new(3);
    let first = REGION / PAGE;
    let pages = REGION_SIZE / PAGE;
    let part: Vec<u8> = (0..1 << 18)
        .map(|i| match order {
            "random" => rng.below(pages),
            _ => i % pages,
        })
        .flat_map(|page| ((first + page) as u32).to_le_bytes())
        .collect();
    let buffer = REGION + REGION_SIZE;
    for i in 0..64 {
        driver.write(buffer + (i << 20), &part)?;
    }
    driver.prepare(INFLATE, &[(buffer, 64 << 20, false); 128], true)?;

    // A device that has not answered by then does not yield
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

/// The number of free huge pages of 2 MiB on the host
fn free_huge_pages() -> Result<u64> {
    let text = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")?;
    Ok(text.trim().parse()?)
}

/// Count how many huge pages of 2 MiB become free when 1 GiB is inflated, 256
/// pages at a time, with options for the device.
pub fn hugetlb(binary: &Path, options: &str) -> Result<u64> {
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
    let mut driver = Driver::start(binary, &args, options)?;
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
