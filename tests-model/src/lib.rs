// SPDX-License-Identifier: GPL-2.0-or-later

//! Property tests of `virtio_balloon_core`, which has no dependencies because it
//! is built as a part of QEMU
//!
//! `model.rs` is the model, with the properties.  `tests/properties.rs`
//! checks them, and `tests/mutations.rs` checks that they notice mistakes:
//! `mutations.rs`, which the build script turns into copies of the crate with
//! one mistake each.
