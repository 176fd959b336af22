// SPDX-License-Identifier: GPL-2.0-or-later

//! The properties notice mistakes.

// The copies of the crate are not to be read, or improved.
#![allow(
    unused,
    clippy::all,
    clippy::nursery,
    clippy::pedantic,
    clippy::restriction
)]

include!(concat!(env!("OUT_DIR"), "/mutants.rs"));

#[test]
fn each_mistake_is_found() {
    // README.md and docs/architecture.md say so
    assert_eq!(MUTANTS.len(), 37);
    let missed = tests_model::missed(MUTANTS, |find_mistake| find_mistake(5_000));
    assert!(missed.is_empty(), "not found: {missed:?}");
}
