// SPDX-License-Identifier: GPL-2.0-or-later

//! Checks the properties of the engine, whatever the driver does and whatever
//! happens during a turn

mod real {
    use virtio_balloon_core as balloon;
    include!("../model.rs");
}

#[test]
fn engine() {
    // Each run has the same scenarios; PROPTEST_CASES sets their number
    let cases = std::env::var("PROPTEST_CASES").map_or(5_000, |n| n.parse().unwrap());
    if let Err(mistake) = real::find_mistake(cases) {
        panic!("{mistake}");
    }
}
