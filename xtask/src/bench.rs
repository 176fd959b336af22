// SPDX-License-Identifier: GPL-2.0-or-later

//! C against Rust: `cargo xtask bench`

use std::{fs, path::Path};

use anyhow::{ensure, Context, Result};
use serde_json::Value;
use xshell::cmd;

use crate::{
    build::build_both,
    env::Env,
    guest,
    run::{shell_in, RunQuiet},
};

/// Huge pages of 2 MiB that the benchmark needs
const HUGE_PAGES: u64 = 700;

/// Huge pages that were reserved, and are given back in the end
pub struct HugePages(Option<u64>);

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// Have at least `count` huge pages.  It takes root; tests that need them
    /// are skipped otherwise.
    pub fn reserve(env: &Env, count: u64) -> Self {
        let read = || fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse().ok();
        let Some(before) = read().filter(|n: &u64| *n < count) else {
            return Self(None);
        };
        let enough = fs::write(NR_HUGEPAGES, count.to_string()).is_ok()
            && read().is_some_and(|n: u64| n >= count);
        if !enough {
            env.say("cannot reserve huge pages: what needs them is skipped");
        }
        Self(Some(before))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            // It is only memory that stays reserved
            let _ = fs::write(NR_HUGEPAGES, before.to_string());
        }
    }
}

/// Build both devices, measure them, and print the results.
///
/// # Errors
///
/// Fails if something could not be measured.
pub fn run(
    env: &Env,
    reps: usize,
    only: &str,
    json: Option<&Path>,
    chart: Option<&Path>,
) -> Result<()> {
    let builds @ [c, rust] = &build_both(env)?;
    let sh = shell_in(&env.repo)?;

    let limit = env.cache.join("bench-limit");
    cmd!(sh, "cc -O2 -Wall -o {limit} bench/limit.c").run_quiet()?;
    env.say("building and running the benchmark");

    let _pages = HugePages::reserve(env, HUGE_PAGES);
    let tmp = env.cache.join("bench.json");
    let (a, b, reps) = (c.qemu(), rust.qemu(), reps.to_string());
    let mut bench = cmd!(
        sh,
        "cargo run -q --release --locked -p balloon-bench --
         --reps {reps} --only {only} --a {a} --b {b} --limit {limit} --json {tmp}"
    );
    if let Some(chart) = chart {
        bench = bench.arg("--chart").arg(std::path::absolute(chart)?);
    }
    if env.quiet {
        bench = bench.arg("--quiet");
    }
    ensure!(bench.succeeds()?, "the benchmark has failed");
    let mut report: Value = serde_json::from_str(&fs::read_to_string(&tmp)?)?;

    if "guest".contains(only) {
        let assets = guest::provision(env, guest::SUITE)?;
        let mut results = serde_json::Map::new();
        for build in builds {
            env.say(&format!(
                "a guest inflates and deflates 2 GiB ({} device)",
                build.device.name()
            ));
            let there = shell_in(&build.dir)?;
            let (python, script) = (build.python(), env.repo.join("bench/guest.py"));
            let out = cmd!(there, "{python} {script}")
                .envs(guest::python_env(build, &assets))
                .output_quiet()?;
            let value: Value = serde_json::from_slice(&out).context("bench/guest.py")?;
            println!("guest, {} device: {value}", build.device.name());
            results.insert(build.device.name().to_owned(), value);
        }
        report["guest"] = results.into();
    }
    if let Some(json) = json {
        fs::write(json, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    Ok(())
}
