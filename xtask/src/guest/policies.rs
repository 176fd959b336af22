// SPDX-License-Identifier: GPL-2.0-or-later

//! What deflate-on-oom does to guests, depending on their driver:
//! `cargo xtask guest-policies`

use std::path::{absolute, PathBuf};

use anyhow::{ensure, Result};
use clap::Args;
use xshell::cmd;

use super::{
    policy::{self, Policy},
    program, SUITE,
};
use crate::{
    build::{Build, Device, Target},
    env::Env,
    run::{shell_in, RunQuiet},
};

/// What the user has chosen
#[derive(Args)]
pub struct Options {
    /// How often to measure everything
    #[arg(long, default_value_t = 3)]
    reps: usize,
    /// Measure once, and not for long
    #[arg(long)]
    quick: bool,
    /// Only this policy; can be repeated
    #[arg(long = "policy", value_enum)]
    policies: Vec<Policy>,
    /// Only this scenario (oom, `page_cache` or loop); can be repeated
    #[arg(long = "scenario")]
    scenarios: Vec<String>,
    /// NAME=VALUE: measure the loop also with this property of the device; can be
    /// repeated
    #[arg(long = "device-property")]
    properties: Vec<String>,
    /// Write the results, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draw a chart, as SVG
    #[arg(long)]
    chart: Option<PathBuf>,
}

/// Build the Rust device, measure guests with all drivers, and print tables.
///
/// # Errors
///
/// Fails if something could not be measured.
pub fn run(env: &Env, options: &Options) -> Result<()> {
    let build = Build::prepare(env, Device::Rust, Target::X86_64, None)?;
    build.build_qemu(env)?;
    let (assets, drivers) = policy::provision(env, SUITE)?;
    env.say(&format!("measuring guests with Linux {}", assets.release));

    let reps = if options.quick { 1 } else { options.reps }.to_string();
    let there = shell_in(&build.dir)?;
    let mut measure = program(env, &there, &build, &assets, "guest_policies.py")
        .args(["--reps", &reps])
        .env("BALLOON_GUEST_POLICIES", drivers)
        .args(options.quick.then_some("--quick"));
    for policy in &options.policies {
        measure = measure.args(["--policy", policy.name()]);
    }
    for scenario in &options.scenarios {
        measure = measure.args(["--scenario", scenario]);
    }
    for property in &options.properties {
        measure = measure.args(["--device-property", property]);
    }
    let json = match &options.json {
        Some(path) => absolute(path)?,
        None => env.cache.join("guest-policies.json"),
    };
    let measured = measure.arg("--json").arg(&json).succeeds()?;
    ensure!(measured, "the guests could not be measured");

    let sh = shell_in(&env.repo)?;
    let mut report = cmd!(
        sh,
        "cargo run -q --release --locked -p policy-report -- {json}"
    );
    if let Some(chart) = &options.chart {
        report = report.arg("--chart").arg(absolute(chart)?);
    }
    ensure!(report.succeeds()?, "the report could not be made");
    Ok(())
}
