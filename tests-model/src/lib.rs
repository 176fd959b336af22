// SPDX-License-Identifier: GPL-2.0-or-later

//! Property tests of `virtio_balloon_core`, which has no dependencies because it
//! is built as a part of QEMU
//!
//! `model.rs` is the model, with the properties.  `tests/properties.rs`
//! checks them, and `tests/mutations.rs` checks that they notice mistakes:
//! `mutations.rs`, which the build script turns into copies of the crate with
//! one mistake each.

/// The copies of the crate, by the name of the mistake; each with a function that
/// looks for it, as long as its argument tells
pub type Mutants = [(&'static str, fn(u32) -> Result<(), String>)];

/// The names of the mistakes that `find` does not notice
pub fn missed(
    mutants: &Mutants,
    find: impl Fn(fn(u32) -> Result<(), String>) -> Result<(), String>,
) -> Vec<&'static str> {
    mutants
        .iter()
        .filter(|(name, find_mistake)| {
            let found = find(*find_mistake);
            if let Err(mistake) = &found {
                println!("{name}: {}", mistake.lines().next().unwrap_or_default());
            }
            found.is_ok()
        })
        .map(|(name, _)| *name)
        .collect()
}
