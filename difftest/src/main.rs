// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs random operations on two builds of QEMU's virtio-balloon device in lock
//! step, and compares everything that the driver and the user can observe.

mod driver;
mod exec;
mod gen;
mod op;
mod shrink;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use clap::Parser;
use qtest_client::rng::Rng;

use crate::{
    exec::{Effects, Lockstep, Setup, BATCH, NAMED_DIFFERENCES},
    gen::Generator,
    op::{from_text, to_text, Config, Op},
};

/// Operations after which QEMU is started again, with other options
const OPS_PER_START: u64 = 2000;

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

    /// Run the operations from this file
    #[arg(long)]
    replay: Option<PathBuf>,

    /// Where to save the operations that show a difference
    #[arg(long)]
    save: Option<PathBuf>,

    /// Print each kind of operation, and how often it was run
    #[arg(long)]
    kinds: bool,

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

/// Counts for the summary
#[derive(Debug, Default)]
struct Totals {
    ops: u64,
    episodes: u64,
    kinds: BTreeMap<String, u64>,
    effects: Effects,
}

/// Operations with different outcomes; the last is where it was noticed.
struct Failure {
    cfg: Config,
    /// Operations since QEMU was started
    ops: Vec<Op>,
    /// The start of the last episode
    episode: usize,
    what: String,
}

/// Run operations on new instances; returns the index of the one after which
/// there was a difference.
fn run(
    setup: &Setup,
    cfg: &Config,
    ops: &[Op],
    effects: &mut Effects,
) -> Result<Option<(usize, String)>> {
    Ok(Lockstep::start(setup, cfg)?.run(ops, effects))
}

fn random(setup: &Setup, rng: &mut Rng, ops: u64, totals: &mut Totals) -> Result<Option<Failure>> {
    let start = Instant::now();
    let mut progress = Duration::ZERO;
    while totals.ops < ops {
        let mut gen = Generator::new(rng);
        let cfg = gen.config();
        let mut pair = Lockstep::start(setup, &cfg)?;
        let mut history: Vec<Op> = Vec::new();
        let end = ops.min(totals.ops + OPS_PER_START);

        while totals.ops < end {
            let episode = history.len();
            let len = gen.episode_length().min(end - totals.ops);
            totals.episodes += 1;
            gen.start(&cfg, pair.offered);
            let mut i = 0;
            while i < len {
                // What is next may depend on what has happened.
                let first = history.len();
                while i < len && history.len() - first < BATCH {
                    let op = match i {
                        0 if pair.running() => Op::SystemReset,
                        0 => Op::Cont,
                        1 => Op::Fill,
                        _ if i + 1 == len => Op::Check,
                        _ => gen.op(pair.broken(), pair.running()),
                    };
                    i += 1;
                    let last = op.uses_qmp();
                    *totals.kinds.entry(op.kind(&cfg)).or_default() += 1;
                    history.push(op);
                    if last {
                        break;
                    }
                }
                totals.ops += (history.len() - first) as u64;
                if let Some((at, what)) = pair.run(&history[first..], &mut totals.effects) {
                    history.truncate(first + at + 1);
                    return Ok(Some(Failure {
                        cfg,
                        ops: history,
                        episode,
                        what,
                    }));
                }
            }
        }
        if start.elapsed() - progress > Duration::from_secs(30) {
            progress = start.elapsed();
            eprintln!("{} operations in {} s", totals.ops, progress.as_secs());
        }
    }
    Ok(None)
}

/// Find a short sequence that shows a difference.
fn shrink(setup: &Setup, failure: Failure) -> Failure {
    let cfg = failure.cfg.clone();
    let mut tries = 0;
    // Do not end up with another difference.
    let class = |what: &str| what.split(':').next().map(str::to_owned);
    let wanted = class(&failure.what);
    let mut fails = |ops: &[Op]| -> bool {
        tries += 1;
        match run(setup, &cfg, ops, &mut Effects::default()) {
            Ok(Some((_, what))) => class(&what) == wanted,
            _ => false,
        }
    };

    let last = &failure.ops[failure.episode..];
    let ops = if fails(last) {
        last.to_vec()
    } else if fails(&failure.ops) {
        failure.ops.clone()
    } else {
        eprintln!("The difference does not show up again.");
        return failure;
    };
    let ops = shrink::shrink(ops, Op::simpler, &mut fails, 1000);
    eprintln!(
        "{} of {} operations left after {tries} runs",
        ops.len(),
        failure.ops.len()
    );
    match run(setup, &failure.cfg, &ops, &mut Effects::default()) {
        Ok(Some((i, what))) => Failure {
            ops: ops[..=i].to_vec(),
            what,
            ..failure
        },
        _ => failure,
    }
}

fn report(failure: &Failure, args: &Args) -> Result<()> {
    let mut text = String::new();
    for line in failure.what.lines() {
        text += &format!("# {line}\n");
    }
    text += &to_text(&failure.cfg, &failure.ops);
    println!("{text}");
    if let Some(path) = &args.save {
        std::fs::write(path, text)?;
    }
    Ok(())
}

fn summary(totals: &Totals, seed: Option<u64>, differences: u32, elapsed: Duration, args: &Args) {
    if args.kinds {
        for (kind, n) in &totals.kinds {
            println!("{n:8} {kind}");
        }
    }
    let e = &totals.effects;
    let events: Vec<_> = e.events.iter().map(|(k, v)| format!("{k} {v}")).collect();
    println!(
        "effects: {} elements used, {} pages discarded, {} times broken, {} config changes, {} \
         interrupts, {} statistics, {} migrations, {} refused; QMP: {} results, {} errors; \
         events: {}",
        e.used,
        e.discarded,
        e.broken,
        e.config,
        e.interrupts,
        e.stats,
        e.migrations,
        e.refused,
        e.qmp_results,
        e.qmp_errors,
        events.join(", ")
    );
    // If it was not used for long, something may have changed.
    let unused: Vec<_> = NAMED_DIFFERENCES
        .iter()
        .filter(|diff| diff.is_tolerated() && !e.named.contains_key(diff.name))
        .map(|diff| diff.name)
        .collect();
    if !unused.is_empty() {
        println!("tolerated, but not seen: {}", unused.join(", "));
    }
    let named: Vec<_> = e.named.iter().map(|(k, v)| format!("{k}: {v}")).collect();
    let seed = seed.map_or_else(|| "replay".to_owned(), |seed| format!("seed {seed}"));
    let secs = elapsed.as_secs_f64();
    eprintln!(
        "{secs:.1} s, {:.0} operations per second",
        totals.ops as f64 / secs
    );
    println!(
        "{} operations ({} kinds, {} episodes, {seed}): {differences} difference{}; named: {}",
        totals.ops,
        totals.kinds.len(),
        totals.episodes,
        if differences == 1 { "" } else { "s" },
        named.join(", ")
    );
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if args.list_named {
        for diff in NAMED_DIFFERENCES {
            println!("{}\n  C: {}\n  Rust: {}", diff.name, diff.c, diff.rust);
            println!("  Here: {}", diff.treatment);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let setup = Setup {
        a: args.a.clone(),
        b: args.b.clone(),
        b_args: args.b_arg.clone(),
        inject_fault: args.inject_fault,
    };
    let start = Instant::now();
    let mut totals = Totals::default();

    let (seed, failure) = if let Some(path) = &args.replay {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let (cfg, ops) = from_text(&text)?;
        let result = run(&setup, &cfg, &ops, &mut totals.effects)?;
        let len = result.as_ref().map_or(ops.len(), |(i, _)| i + 1);
        totals.ops = len as u64;
        totals.episodes = 1;
        for op in &ops[..len] {
            *totals.kinds.entry(op.kind(&cfg)).or_default() += 1;
        }
        let failure = result.map(|(_, what)| Failure {
            cfg,
            ops: ops[..len].to_vec(),
            episode: 0,
            what,
        });
        (None, failure)
    } else {
        let seed = args.seed.unwrap_or_else(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |t| t.as_secs())
        });
        let failure = random(&setup, &mut Rng::new(seed), args.ops, &mut totals)?;
        let elapsed = start.elapsed();
        let failure = failure.map(|failure| {
            eprintln!(
                "Difference after {} operations, at: {}\n{}\nShrinking ...",
                totals.ops,
                failure.ops.last().map(Op::to_string).unwrap_or_default(),
                failure.what
            );
            if let Some(path) = &args.save {
                std::fs::write(
                    path.with_extension("full"),
                    to_text(&failure.cfg, &failure.ops),
                )?;
            }
            Ok::<_, anyhow::Error>(shrink(&setup, failure))
        });
        let failure = failure.transpose()?;
        if let Some(failure) = &failure {
            report(failure, &args)?;
        }
        summary(
            &totals,
            Some(seed),
            failure.is_some().into(),
            elapsed,
            &args,
        );
        return Ok(exit_code(failure.is_some()));
    };
    if let Some(failure) = &failure {
        report(failure, &args)?;
    }
    summary(
        &totals,
        seed,
        failure.is_some().into(),
        start.elapsed(),
        &args,
    );
    Ok(exit_code(failure.is_some()))
}

fn exit_code(failed: bool) -> ExitCode {
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
