// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs random operations on two builds of QEMU's virtio-balloon device in lock
//! step, and compares everything that the driver and the user can observe.

mod differences;
mod driver;
mod effects;
mod exec;
mod gen;
mod op;
mod report;
mod search;
mod shrink;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use qtest_client::rng::Rng;

use crate::{
    exec::Setup,
    gen::Wanted,
    op::{from_text, to_text, Op},
    search::{Failure, Totals},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RingArg {
    Split,
    Packed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TransportArg {
    Mmio,
    Pci,
}

/// Compare two builds of the virtio-balloon device with random operations
#[derive(Parser, Debug)]
#[command(name = "balloon-difftest", version)]
struct Args {
    /// QEMU with the C device
    #[arg(long)]
    a: PathBuf,

    /// QEMU with the Rust device
    #[arg(long)]
    b: PathBuf,

    /// How many operations to run
    #[arg(long, default_value_t = 100_000)]
    ops: u64,

    /// Seed of the random number generator [default: from the time]
    #[arg(long)]
    seed: Option<u64>,

    /// Only use rings of this format, if the driver accepts it [default: both]
    #[arg(long, value_enum)]
    ring: Option<RingArg>,

    /// Only use this transport [default: both]
    #[arg(long, value_enum)]
    transport: Option<TransportArg>,

    /// Always offer to return elements in order, not only now and then
    #[arg(long)]
    in_order: bool,

    /// Run the operations from this file
    #[arg(long)]
    replay: Option<PathBuf>,

    /// Where to save the operations that show a difference
    #[arg(long)]
    save: Option<PathBuf>,

    /// Print each kind of operation, and how often it was run
    #[arg(long)]
    kinds: bool,

    /// Do not show progress
    #[arg(short, long)]
    quiet: bool,

    /// Print the differences that are intended, and exit
    #[arg(long)]
    list_named: bool,

    /// Additional option for the QEMU of --b, to see that differences are found
    #[arg(long, hide = true, allow_hyphen_values = true)]
    b_arg: Vec<String>,

    /// Let the device of --b ignore a page, to see that differences are found
    #[arg(long, hide = true)]
    inject_fault: bool,
}

/// A seed that is not the same every time
fn seed_from_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// Tell at once what was found, because shrinking takes some time.
fn announce(failure: &Failure, totals: &Totals, args: &Args) -> Result<()> {
    eprintln!(
        "Difference after {} operations, at: {}\n{}\nShrinking ...",
        totals.ops,
        failure.ops.last().map(Op::to_string).unwrap_or_default(),
        failure.what
    );
    if let Some(path) = &args.save {
        std::fs::write(
            path.with_extension("full"),
            to_text(&failure.cfg, &failure.ops)?,
        )?;
    }
    Ok(())
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if args.list_named {
        print!("{}", differences::describe_all());
        return Ok(ExitCode::SUCCESS);
    }
    let setup = Setup {
        a: args.a.clone(),
        b: args.b.clone(),
        b_args: args.b_arg.clone(),
        inject_fault: args.inject_fault,
    };
    let mut totals = Totals {
        quiet: args.quiet,
        ..Totals::default()
    };
    let start = Instant::now();
    let (origin, failure, elapsed) = if let Some(path) = &args.replay {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let (cfg, ops) = from_text(&text)?;
        let failure = search::replay(&setup, cfg, &ops, &mut totals)?;
        ("replay".to_owned(), failure, start.elapsed())
    } else {
        let seed = args.seed.unwrap_or_else(seed_from_time);
        let wanted = Wanted {
            packed: args.ring.map(|ring| ring == RingArg::Packed),
            pci: args.transport.map(|t| t == TransportArg::Pci),
            in_order: args.in_order,
        };
        let mut rng = Rng::new(seed);
        let failure = search::random(&setup, &mut rng, args.ops, &wanted, &mut totals)?;
        let elapsed = start.elapsed();
        let failure = match failure {
            Some(failure) => {
                announce(&failure, &totals, &args)?;
                Some(search::shrink(&setup, failure))
            }
            None => None,
        };
        (format!("seed {seed}"), failure, elapsed)
    };
    if let Some(failure) = &failure {
        report::report(failure, &args)?;
    }
    report::summary(&totals, &origin, failure.is_some(), elapsed, &args);
    Ok(if failure.is_some() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
