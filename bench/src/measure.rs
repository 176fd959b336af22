// SPDX-License-Identifier: GPL-2.0-or-later

//! The measurements

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{ensure, Context, Result};
use qtest_client::rng::Rng;

use crate::{
    cases::{pfns, runs, Backing, Spread, BACKINGS, GUESTS, ORDERS, PAGES, REPORTED, SPREAD},
    report::{Device, Rows},
    ring::{
        Buffer, Driver, DEFLATE, ELEMENT, ELEMENTS, INFLATE, PAGE, REGION, REGION_SIZE, REPORTING,
        REPORTS,
    },
    Cli,
};

/// The time in nanoseconds that the system calls alone take to discard runs of
/// pages in memory of a size in bytes
fn limit(program: &Path, backing: Backing, size: u64, runs: &str) -> Result<f64> {
    let mut child = Command::new(program)
        .args([backing.name, &(size >> 20).to_string()])
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
    Ok(best)
}

/// Measure inflating and deflating with one kind of memory, with all orders and
/// batch sizes.
pub fn bench_rings(cli: &Cli, backing: Backing, rows: &mut Rows) -> Result<()> {
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
                let list = pfns(order, PAGES);
                for (device, binary) in cli.devices(rep) {
                    let mut driver = start(binary, backing, device == Device::Rust)?;
                    driver.prepare_pfns(&list)?;
                    // The first round takes longer, because QEMU allocates its
                    // own memory, and finds out which system calls it can use.
                    // The guest's memory is only used after it: the host does
                    // not make huge pages again of those that were divided.
                    for measured in [false, true] {
                        if measured {
                            driver.touch()?;
                        }
                        for (way, q) in [("inflate", INFLATE), ("deflate", DEFLATE)] {
                            let ns = driver.measure(q, ELEMENTS, one_kick)? / PAGES as f64;
                            if measured {
                                let row = rows.entry(name(way)).or_default();
                                row.of(device).push(ns);
                            }
                        }
                    }
                }
                if huge {
                    // Deflating needs hardly any system calls to compare with
                    continue;
                }
                let group = if one_kick { PAGES } else { ELEMENT };
                let ns = limit(&cli.limit, backing, REGION_SIZE, &runs(&list, group))?;
                let row = rows.entry(name("inflate")).or_default();
                row.limit.push(ns / PAGES as f64);
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

/// Measure free page reporting; in ns/page.
pub fn bench_reporting(cli: &Cli, rows: &mut Rows) -> Result<()> {
    for case in REPORTED.iter().filter(|c| c.name.contains(&cli.only)) {
        let row = rows.entry(case.name.to_owned()).or_default();
        let pages = case.buffers as f64 * f64::from(case.pages);
        let offsets: Vec<u32> = (0..case.buffers as u32)
            .map(|i| i * case.distance)
            .collect();
        let buffer = |&first: &u32| -> Buffer {
            let addr = REGION + u64::from(first) * PAGE;
            (addr, case.pages * PAGE as u32, true)
        };
        let rounds: Vec<Vec<Buffer>> = offsets
            .chunks(REPORTS)
            .map(|part| part.iter().map(buffer).collect())
            .collect();
        let mut groups = String::new();
        for part in offsets.chunks(REPORTS) {
            for first in part {
                writeln!(groups, "{first} {}", case.pages)?;
            }
            groups.push('\n');
        }
        // This takes less than a millisecond, so that other work on the host has
        // more effect than in other cases.
        let reps = 5 * cli.reps;
        for rep in 0..reps {
            if !cli.quiet {
                eprintln!("{}/{}: {}", rep + 1, reps, case.name);
            }
            for (device, binary) in cli.devices(rep) {
                let mut driver = Driver::start(binary, &[], ",free-page-reporting=on")?;
                // See bench_rings()
                driver.measure_rounds(REPORTING, &rounds, case.chain)?;
                driver.touch()?;
                let ns = driver.measure_rounds(REPORTING, &rounds, case.chain)?;
                row.of(device).push(ns / pages);
            }
            let ns = limit(&cli.limit, BACKINGS[0], REGION_SIZE, &groups)?;
            row.limit.push(ns / pages);
        }
    }
    Ok(())
}

/// Measure inflating and deflating the same amount of memory in guests of
/// different sizes, with full rings and transparent huge pages.
pub fn bench_guests(cli: &Cli, rows: &mut Rows) -> Result<()> {
    for rep in 0..cli.reps {
        for (order, rings) in SPREAD {
            for gib in GUESTS {
                let name = |way| format!("scale {way} {order} {gib} GiB");
                if !name("inflate").contains(&cli.only) && !name("deflate").contains(&cli.only) {
                    continue;
                }
                if !cli.quiet {
                    eprintln!("{}/{}: {}", rep + 1, cli.reps, name("inflate, deflate"));
                }
                let spread = Spread::new(gib);
                let list = pfns(order, rings * PAGES);
                for (device, binary) in cli.devices(rep) {
                    let both = inflate_and_deflate(binary, gib, &spread, &list)?;
                    for (way, ns) in ["inflate", "deflate"].into_iter().zip(both) {
                        let row = rows.entry(name(way)).or_default();
                        row.of(device).push(ns);
                    }
                }
                let offsets: Vec<u32> = list.iter().map(|&page| spread.offset(page)).collect();
                let size = (gib << 30) - REGION;
                let ns = limit(&cli.limit, BACKINGS[0], size, &runs(&offsets, PAGES))?;
                let row = rows.entry(name("inflate")).or_default();
                row.limit.push(ns / list.len() as f64);
            }
        }
    }
    Ok(())
}

/// Measure inflating, and then deflating, pages that are spread over a guest,
/// with full rings; in ns/page.
fn inflate_and_deflate(
    binary: &Path,
    gib: u64,
    spread: &Spread,
    pages: &[u32],
) -> Result<[f64; 2]> {
    // Without a reservation, because the guest may be larger than what is free
    // on the host
    let memory = format!("memory-backend-ram,id=ram0,size={gib}G,reserve=off");
    let args = [
        "-m",
        &format!("{gib}G"),
        "-object",
        &memory,
        "-machine",
        "memory-backend=ram0",
    ];
    let mut driver = Driver::start(binary, &args, "")?;
    for first in spread.chunks() {
        let addr = REGION + u64::from(first) * PAGE;
        driver.fill(addr, u64::from(Spread::CHUNK) * PAGE)?;
    }
    let list: Vec<u32> = pages.iter().map(|&page| spread.pfn(page)).collect();
    let mut both = [0.0; 2];
    for (ns, q) in both.iter_mut().zip([INFLATE, DEFLATE]) {
        for part in list.chunks(PAGES) {
            driver.prepare_pfns(part)?;
            *ns += driver.measure(q, ELEMENTS, true)?;
        }
        *ns /= list.len() as f64;
    }
    Ok(both)
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
