// SPDX-License-Identifier: GPL-2.0-or-later

//! Property tests of `virtio_balloon_core`.  They are not in that crate because
//! it is built as a part of QEMU, and cannot have dependencies.
//!
//! `model.rs` has the model and the properties.  `tests/properties.rs` checks
//! the properties.  `tests/mutations.rs` checks that they notice mistakes: the
//! build script makes copies of the crate, each with one mistake from
//! `mutations.rs`.

/// The copies of the crate: the name of the mistake, and a function that looks
/// for it.  Its argument says how much to try.
pub type Mutants = [(&'static str, fn(u32) -> Result<(), String>)];

/// The names of the mistakes that `find` does not find
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
