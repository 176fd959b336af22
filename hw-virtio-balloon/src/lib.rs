// SPDX-License-Identifier: GPL-2.0-or-later

//! The virtio memory balloon device (virtio 1.3, section 5.5)
//!
//! The driver gives pages of guest memory to the device ("inflates" the
//! balloon), which gives them back to the host, until it is told to take fewer
//! pages ("deflate").  The user sets the size with the `balloon` command.
//! Besides, the driver can send statistics, hint to migration which pages are
//! free, and report free pages for the host to reclaim.
//!
//! What does not depend on QEMU is in the `balloon_core` crate.

#![forbid(unsafe_code)]

use std::ffi::CStr;

mod device;
mod discard;
mod hinting;
mod inflate;
mod migration;
mod reporting;
mod stats;

/// Name of the QOM type; the C implementation has the same.
pub const TYPE_VIRTIO_BALLOON: &CStr = c"virtio-balloon-device";
