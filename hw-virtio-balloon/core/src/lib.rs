// SPDX-License-Identifier: GPL-2.0-or-later

//! The logic of virtio-balloon that needs nothing from QEMU.
//!
//! There is no FFI and no unsafe code here, so that the tests of this crate run
//! with plain `cargo test`.
//!
//! Sizes are in bytes unless they are called pages; a page is always a balloon
//! page of 4096 bytes ([`BALLOON_PAGE_SIZE`]), whatever page size the guest and
//! the host use.

#![forbid(unsafe_code)]

pub mod budget;
pub mod counters;
pub mod deflation;
pub mod engine;
pub mod hint_exchange;
pub mod hinting;
pub mod host_pages;
pub mod oom_hold;
pub mod pages;
pub mod reports;
pub mod spec;
pub mod stats;

pub use spec::BALLOON_PAGE_SIZE;

#[cfg(test)]
mod tests {
    /// Random numbers for tests: xorshift, which needs no crate in QEMU's tree
    pub struct Rng(pub u64);

    impl Rng {
        /// From 0 to `n` - 1
        pub fn below(&mut self, n: u32) -> u32 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            ((self.0 >> 32) % u64::from(n)) as u32
        }
    }
}
