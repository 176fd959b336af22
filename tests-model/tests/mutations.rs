// SPDX-License-Identifier: GPL-2.0-or-later

//! Checks that the properties notice mistakes

// Lints do not matter in generated copies of the crate.
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
    // README.md and docs/architecture.md have this number
    assert_eq!(MUTANTS.len(), 42);
    let missed = tests_model::missed(MUTANTS, |find_mistake| find_mistake(5_000));
    assert!(missed.is_empty(), "not found: {missed:?}");
}
