// SPDX-License-Identifier: GPL-2.0-or-later

//! The threads that process hints: all interleavings, and mistakes in the
//! locking

// Lints do not matter in generated copies of the crate.
#![allow(
    unused,
    clippy::all,
    clippy::nursery,
    clippy::pedantic,
    clippy::restriction
)]

include!(concat!(env!("OUT_DIR"), "/hint_mutants.rs"));

#[test]
fn all_interleavings() {
    // this takes seconds; with 4 preemptions there are six times as many
    // interleavings
    unchanged::find_mistake(3).unwrap();
}

#[test]
fn each_mistake_is_found() {
    let mistakes: Vec<_> = MUTANTS
        .iter()
        .copied()
        .filter(|(name, _)| *name != "unchanged")
        .collect();
    let missed = tests_model::missed(&mistakes, |find_mistake| {
        find_mistake(2).and_then(|()| find_mistake(3))
    });
    assert!(missed.is_empty(), "not found: {missed:?}");
}
