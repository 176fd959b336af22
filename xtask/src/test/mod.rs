// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs the test suites, with the runners that they are made for

mod container;
mod coverage;
mod deb;
mod docs;
mod functional;
mod fuzz;
mod interfaces;
mod libvirt;
mod qtest;
mod results;
mod sanitize;
mod unit;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use xshell::cmd;

use self::{
    container::container,
    coverage::coverage,
    deb::deb,
    docs::docs,
    functional::{functional, Kernel},
    fuzz::fuzz,
    libvirt::libvirt,
    qtest::{qtest, run_qtests},
    results::Count,
    sanitize::sanitize,
    unit::unit,
};
use crate::{
    build::{build_both, Build, Device, Target},
    env::Env,
    install,
    preflight::Needs,
    run::{shell_in, RunQuiet},
    series::{self, Depth},
};

/// A group of tests
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Everything that runs in seconds: unit tests, lints, formatting
    Unit,
    /// The device under QEMU's qtest, without a guest
    Qtest,
    /// Guests that boot Linux
    Functional,
    /// Random operations on both devices, which have to act alike
    Differential,
    /// How much of the device and its bindings the tests execute
    Coverage,
    /// Inputs that the fuzzer has found, with sanitizers
    Fuzz,
    /// Some of these on a build with sanitizers; only if it is named
    Sanitize,
    /// The exported series of patches
    Series,
    /// Guests of libvirt, with what install has installed; only if it is named
    Libvirt,
    /// The packages that deb has built, in a Debian of their own; only if it is
    /// named
    Deb,
    /// All in the container of ci/Containerfile; only if it is named
    Container,
}

impl Suite {
    /// Whether it is run only if somebody asks for it: it takes long, or needs
    /// something that has to be built for it alone.
    const fn is_extra(self) -> bool {
        matches!(
            self,
            Self::Sanitize | Self::Libvirt | Self::Deb | Self::Container
        )
    }
}

/// The exit code that tells meson that nothing could be tested
const SKIPPED: u8 = 77;

/// The seed with which difftest chooses one, and prints it with the result
const RANDOM: &str = "random";

/// What the user has chosen
#[derive(Args)]
pub struct Options {
    /// Implementation of the balloon device, for qtest and functional
    /// [default: both]
    #[arg(long, value_enum)]
    device: Option<Device>,
    /// Guest architecture, for qtest
    #[arg(long, value_enum, default_value = "x86_64")]
    target: Target,
    /// Kernel of the guest, for functional: a version (6.1, 6.12) or a suite of
    /// Debian (sid); can be repeated [default: of all suites]
    #[arg(long = "kernel")]
    kernels: Vec<Kernel>,
    /// The short form of functional: fewer repetitions, and if no kernel is
    /// given, only the oldest
    #[arg(long)]
    quick: bool,
    /// Number of operations, for differential
    #[arg(long, default_value_t = 100_000)]
    ops: u64,
    /// Seed, for differential: a number, or "random"; others give other
    /// operations
    #[arg(long, default_value = "1", value_parser = parse_seed)]
    seed: String,
    /// Where QEMU was installed, for libvirt
    #[arg(long, default_value = install::DEFAULT_PREFIX)]
    prefix: PathBuf,
    /// Build QEMU after each patch, with and without Rust, and run the qtests
    /// that are new or changed, for series
    #[arg(long)]
    each: bool,
    /// The same for each envelope, or for some, with those that they build on,
    /// for series
    #[arg(
        long,
        conflicts_with = "each",
        value_name = "NAME,...",
        num_args = 0..,
        require_equals = true,
        value_delimiter = ','
    )]
    envelopes: Option<Vec<String>>,
}

fn parse_seed(text: &str) -> Result<String> {
    if text != RANDOM {
        text.parse::<u64>()
            .context("neither a number nor \"random\"")?;
    }
    Ok(text.to_owned())
}

/// What it takes to run these suites, or all of them
pub fn needs(suites: &[Suite]) -> Needs {
    let only = |which: &[Suite]| !suites.is_empty() && suites.iter().all(|s| which.contains(s));
    if only(&[Suite::Libvirt, Suite::Container]) {
        // Whatever else is missing is the reason to skip it.
        return Needs::default();
    }
    let needs = if only(&[
        Suite::Unit,
        Suite::Qtest,
        Suite::Differential,
        Suite::Coverage,
        Suite::Fuzz,
        Suite::Series,
    ]) {
        Needs::build()
    } else {
        Needs::guest()
    };
    if suites.is_empty() || suites.contains(&Suite::Series) {
        needs.with(docs::PACKAGES)
    } else {
        needs
    }
}

/// Run the given suites, or all of them.
///
/// # Errors
///
/// Fails if a suite could not be run.  A test that has failed is reported
/// through the exit code instead.
pub fn run(env: &Env, suites: &[Suite], options: &Options) -> Result<ExitCode> {
    let Options { device, target, .. } = *options;
    // Long tests are only run if somebody asks for them.
    let quick = options.quick || suites.is_empty() && options.kernels.is_empty();
    let suites = if suites.is_empty() {
        &Suite::value_variants()
            .iter()
            .copied()
            .filter(|suite| !suite.is_extra())
            .collect::<Vec<_>>()
    } else {
        suites
    };
    let mut total = Count::default();
    for suite in suites {
        env.say(&format!("== {suite:?} tests"));
        let count = match suite {
            Suite::Unit => unit(env)?,
            Suite::Qtest => qtest(env, device, target)?,
            Suite::Functional => functional(env, device, &options.kernels, quick)?,
            Suite::Differential => differential(env, options)?,
            Suite::Coverage => coverage(env, &options.seed)?,
            Suite::Fuzz => fuzz(env)?,
            Suite::Sanitize => sanitize(env, &options.seed)?,
            Suite::Libvirt => libvirt(env, &options.prefix)?,
            Suite::Deb => deb(env)?,
            Suite::Container => container(env)?,
            Suite::Series => check_series(env, options)?,
        };
        println!(
            "{suite:?}: {} passed, {} failed",
            count.passed, count.failed
        );
        total += count;
    }

    if suites.len() > 1 {
        // The reason should not have to be looked for far above.
        for message in &total.messages {
            println!("{message}");
        }
    }
    println!(
        "{} passed, {} failed, {} skipped",
        total.passed, total.failed, total.skipped
    );
    Ok(match total {
        Count {
            failed: 0,
            passed: 1..,
            ..
        } => ExitCode::SUCCESS,
        Count {
            failed: 0,
            skipped: 1..,
            ..
        } => ExitCode::from(SKIPPED),
        _ => ExitCode::FAILURE,
    })
}

/// Check the exported patches.
fn check_series(env: &Env, options: &Options) -> Result<Count> {
    let depth = match &options.envelopes {
        Some(names) => Depth::Envelopes(names),
        None if options.each => Depth::Patches,
        None => Depth::Apply,
    };
    let mut count = Count::from(true);
    series::check(env, depth, |build, programs| {
        count += run_qtests(env, build, programs)?;
        Ok(())
    })?;
    count += docs(env)?;
    Ok(count)
}

/// Run random operations on both devices.
fn differential(env: &Env, options: &Options) -> Result<Count> {
    let [c, rust] = &build_both(env)?;
    compare(env, [c, rust], options.ops, &options.seed, &[])
}

/// Run operations on the C device and the Rust device of these builds: those that
/// have shown a difference before, and random ones.
fn compare(
    env: &Env,
    [c, rust]: [&Build; 2],
    ops: u64,
    seed: &str,
    vars: &[(&'static str, PathBuf)],
) -> Result<Count> {
    let sh = shell_in(&env.repo)?;
    let (a, b, save) = (c.qemu(), rust.qemu(), env.cache.join("difference.txt"));
    let quiet = env.quiet.then_some("--quiet");
    let run = |args: &[String]| -> Result<Count> {
        let same = cmd!(
            sh,
            "cargo run -q --release --locked -p difftest -- --a {a} --b {b} {args...} {quiet...}"
        )
        .envs(vars.iter().map(|(k, v)| (k, v)))
        .succeeds()?;
        Ok(same.into())
    };
    let mut count = Count::default();
    let cases = sh.read_dir("difftest/cases")?;
    env.say(&format!("{} known cases on both devices", cases.len()));
    for case in cases {
        count += run(&["--replay".to_owned(), case.display().to_string()])?;
    }
    env.say(&format!(
        "{ops} random operations on both devices, seed {seed}"
    ));
    let save = save.display();
    let mut args = vec![format!("--ops={ops}"), format!("--save={save}")];
    if seed != RANDOM {
        args.push(format!("--seed={seed}"));
    }
    count += run(&args)?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn meson_has_the_same_suites() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let meson = fs::read_to_string(dir.join("../meson.build")).unwrap();
        let (_, rest) = meson.split_once("suites = {").unwrap();
        let (table, _) = rest.split_once('}').unwrap();
        // 'name': seconds,
        let registered: BTreeSet<_> = table
            .lines()
            .filter_map(|line| line.trim().strip_suffix(',')?.split_once(": "))
            .map(|(name, seconds)| {
                assert!(seconds.parse::<u32>().is_ok_and(|n| n > 0), "{name}");
                name.trim_matches('\'').to_owned()
            })
            .collect();
        let ours = Suite::value_variants()
            .iter()
            .map(|suite| suite.to_possible_value().unwrap().get_name().to_owned());
        assert_eq!(registered, ours.collect());
    }
}
