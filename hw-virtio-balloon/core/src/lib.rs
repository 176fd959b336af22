// SPDX-License-Identifier: GPL-2.0-or-later

//! The logic of virtio-balloon that needs nothing from QEMU.
//!
//! There is no FFI and no unsafe code here, so that the tests of this crate run
//! with plain `cargo test`, with Miri, and in a fuzzer.
//!
//! Sizes are in bytes unless they are called pages; a page is always a balloon
//! page of 4096 bytes ([`BALLOON_PAGE_SIZE`]), whatever page size the guest and
//! the host use.

#![forbid(unsafe_code)]

pub mod config;
pub mod features;
pub mod hinting;
pub mod pages;
pub mod stats;

pub use pages::BALLOON_PAGE_SIZE;
