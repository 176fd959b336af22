// SPDX-License-Identifier: GPL-2.0-or-later

//! Tells the user what was found

use std::time::Duration;

use anyhow::Result;

use crate::{
    differences::describe_uses,
    op::to_text,
    search::{Failure, Totals},
    Args,
};

/// Print the operations that show a difference, and save them.
pub fn report(failure: &Failure, args: &Args) -> Result<()> {
    let mut text = String::new();
    for line in failure.what.lines() {
        text += &format!("# {line}\n");
    }
    text += &to_text(&failure.cfg, &failure.ops)?;
    println!("{text}");
    if let Some(path) = &args.save {
        std::fs::write(path, text)?;
    }
    Ok(())
}

/// Print what has happened in the whole run.
pub fn summary(totals: &Totals, origin: &str, different: bool, elapsed: Duration, args: &Args) {
    if args.kinds {
        for (kind, n) in &totals.kinds {
            println!("{n:8} {kind}");
        }
    }
    let e = &totals.effects;
    let events: Vec<_> = e.events.iter().map(|(k, v)| format!("{k} {v}")).collect();
    println!(
        "effects: {} elements used, {} pages discarded, {} times broken, {} config changes, {} \
         interrupts, {} statistics, {} migrations ({} live, {} with work left), {} refused; QMP: {} results, {} errors; \
         events: {}",
        e.used,
        e.discarded,
        e.broken,
        e.config,
        e.interrupts,
        e.stats,
        e.migrations,
        e.live_migrations,
        e.unfinished,
        e.refused,
        e.qmp_results,
        e.qmp_errors,
        events.join(", ")
    );
    for (name, n) in &totals.configurations {
        println!("{n:8} operations with {name}");
    }
    // The operations of a file are too few to say anything about the others.
    if args.replay.is_none() {
        print!("named differences:\n{}", describe_uses(&e.named));
    }
    let secs = elapsed.as_secs_f64();
    eprintln!(
        "{secs:.1} s, {:.0} operations per second",
        totals.ops as f64 / secs
    );
    println!(
        "{} operations ({} kinds, {} episodes, {origin}): {}",
        totals.ops,
        totals.kinds.len(),
        totals.episodes,
        if different {
            "1 difference"
        } else {
            "0 differences"
        }
    );
}
