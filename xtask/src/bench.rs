// SPDX-License-Identifier: GPL-2.0-or-later

//! C against Rust: `cargo xtask bench`

use std::{fs, path::Path};

use anyhow::{ensure, Result};
use serde_json::Value;
use xshell::cmd;

use crate::{
    build::{build_both, Build, Device, Target},
    env::Env,
    guest,
    hugepages::HugePages,
    run::{shell_in, RunQuiet},
    source::Source,
};

/// Huge pages of 2 MiB that the benchmark needs
const HUGE_PAGES: u64 = 700;

/// Build the C device as it is without the series.
fn build_upstream(env: &Env) -> Result<Build> {
    let root = env.cache.join("upstream");
    let source = Source::prepare(env, None)?.pristine_worktree(env, &root)?;
    let build = Build::configured(env, &root, source, Device::C, Target::X86_64)?;
    build.build_qemu(env)?;
    Ok(build)
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
    let upstream = build_upstream(env)?.qemu();
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
         --reps {reps} --only {only} --upstream {upstream} --a {a} --b {b} --limit {limit} --json {tmp}"
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
        report["guest"] = guest::bench(env, builds)?;
    }
    if let Some(json) = json {
        fs::write(json, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    Ok(())
}
