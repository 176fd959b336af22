// SPDX-License-Identifier: GPL-2.0-or-later

//! Looks for operations with different outcomes, and for fewer that still show
//! the difference

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use qtest_client::rng::Rng;

use crate::{
    effects::Effects,
    exec::{Lockstep, Setup, BATCH},
    gen::{Generator, Wanted},
    op::{Config, Op},
    shrink,
};

/// Operations after which QEMU is started again, with other options
const OPS_PER_START: u64 = 2000;

/// How often QEMU is started, at least
const MIN_STARTS: u64 = 8;

/// How often to tell the progress
const PROGRESS_INTERVAL: Duration = Duration::from_secs(30);

/// Counts for the summary
#[derive(Debug, Default)]
pub struct Totals {
    /// Do not show progress
    pub quiet: bool,
    pub ops: u64,
    pub episodes: u64,
    pub kinds: BTreeMap<String, u64>,
    /// Operations with each configuration of the transport
    pub configurations: BTreeMap<String, u64>,
    pub effects: Effects,
}

/// Operations with different outcomes; the last is where it was noticed.
pub struct Failure {
    pub cfg: Config,
    /// Operations since QEMU was started
    pub ops: Vec<Op>,
    /// The start of the last episode
    pub episode: usize,
    pub what: String,
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

/// Run the given operations.
pub fn replay(
    setup: &Setup,
    cfg: Config,
    ops: &[Op],
    totals: &mut Totals,
) -> Result<Option<Failure>> {
    let result = run(setup, &cfg, ops, &mut totals.effects)?;
    let len = result.as_ref().map_or(ops.len(), |(i, _)| i + 1);
    totals.ops = len as u64;
    totals.episodes = 1;
    for op in &ops[..len] {
        *totals.kinds.entry(op.kind(&cfg)).or_default() += 1;
    }
    Ok(result.map(|(_, what)| Failure {
        cfg,
        ops: ops[..len].to_vec(),
        episode: 0,
        what,
    }))
}

/// Run random operations until there is a difference.
pub fn random(
    setup: &Setup,
    rng: &mut Rng,
    ops: u64,
    wanted: &Wanted,
    totals: &mut Totals,
) -> Result<Option<Failure>> {
    let start = Instant::now();
    let mut progress = Duration::ZERO;
    // All configurations get a part of them.
    let per_start = OPS_PER_START.min(ops.div_ceil(MIN_STARTS));
    let mut starts = 0;
    while totals.ops < ops {
        let mut gen = Generator::new(rng);
        let cfg = gen.config(wanted, starts);
        starts += 1;
        let mut pair = Lockstep::start(setup, &cfg)?;
        let mut history: Vec<Op> = Vec::new();
        let end = ops.min(totals.ops + per_start);

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
                totals.effects.add_uses(gen.take_avoided());
                let done = (history.len() - first) as u64;
                totals.ops += done;
                *totals.configurations.entry(cfg.name()).or_default() += done;
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
        if !totals.quiet && start.elapsed() - progress > PROGRESS_INTERVAL {
            progress = start.elapsed();
            eprintln!(
                "{} of {ops} operations in {} s",
                totals.ops,
                progress.as_secs()
            );
        }
    }
    Ok(None)
}

/// Find a short sequence that shows a difference.
pub fn shrink(setup: &Setup, failure: Failure) -> Failure {
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
