// SPDX-License-Identifier: GPL-2.0-or-later

//! The threads that work on hints: all interleavings, and mistakes in the locking

// The copies of the crate are not to be read, or improved.
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
    // seconds; there are six times as many with 4
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
