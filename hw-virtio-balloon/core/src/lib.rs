// SPDX-License-Identifier: GPL-2.0-or-later

//! The logic of virtio-balloon that does not depend on QEMU
//!
//! This crate has no FFI and no unsafe code, so its tests run with plain `cargo
//! test`.
//!
//! Sizes are in bytes unless they are called pages.  A page is always a balloon
//! page of 4096 bytes ([`BALLOON_PAGE_SIZE`]), whatever the page sizes of the
//! guest and the host are.

#![forbid(unsafe_code)]

pub mod backing;
pub mod budget;
pub mod counters;
pub mod deflation;
pub mod engine;
pub mod hint_exchange;
pub mod hinting;
pub mod host_pages;
pub mod oom_hold;
pub mod pages;
mod parts;
pub mod reports;
pub mod runs;
pub mod spec;
pub mod stats;
pub mod status;

pub use spec::BALLOON_PAGE_SIZE;

#[cfg(test)]
mod tests {
    /// Random numbers for tests (xorshift); QEMU's tree has no crate for them
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
