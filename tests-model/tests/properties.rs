// SPDX-License-Identifier: GPL-2.0-or-later

//! The engine keeps what it promises, whatever the driver does and whatever
//! happens meanwhile.

mod real {
    use virtio_balloon_core as balloon;
    include!("../model.rs");
}

#[test]
fn engine() {
    // The same scenarios in each run, unless there are to be more
    let cases = std::env::var("PROPTEST_CASES").map_or(5_000, |n| n.parse().unwrap());
    if let Err(mistake) = real::find_mistake(cases) {
        panic!("{mistake}");
    }
}
