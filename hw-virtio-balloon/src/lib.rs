// SPDX-License-Identifier: GPL-2.0-or-later

//! The virtio memory balloon device (virtio 1.3, section 5.5)
//!
//! The driver gives pages of guest memory to the device ("inflates" the
//! balloon), which gives them back to the host, until the driver takes them out
//! of the balloon again ("deflates" it).  The user sets the size of the balloon
//! with the `balloon` command.  The driver can also send statistics, hint to
//! migration which pages are free, and report free pages for the host to
//! reclaim.
//!
//! The code that does not depend on QEMU is in the `virtio_balloon_core` crate.

#![deny(unsafe_code)]

use std::ffi::CStr;

mod device;
mod guest_memory;
mod hinting;
mod oom_hold;
mod page_queue;
mod part;
mod repopulation;
mod reporting;
mod stats;
mod trace;

/// The core crate cannot use QEMU's headers, and therefore defines the
/// constants of the specification itself.  Check that they are the same.
const _: () = {
    use virtio::bindings;
    use virtio_balloon_core::{hinting, spec, stats};

    assert!(spec::VIRTIO_BALLOON_F_MUST_TELL_HOST == bindings::VIRTIO_BALLOON_F_MUST_TELL_HOST);
    assert!(spec::VIRTIO_BALLOON_F_STATS_VQ == bindings::VIRTIO_BALLOON_F_STATS_VQ);
    assert!(spec::VIRTIO_BALLOON_F_DEFLATE_ON_OOM == bindings::VIRTIO_BALLOON_F_DEFLATE_ON_OOM);
    assert!(spec::VIRTIO_BALLOON_F_FREE_PAGE_HINT == bindings::VIRTIO_BALLOON_F_FREE_PAGE_HINT);
    assert!(spec::VIRTIO_BALLOON_F_PAGE_POISON == bindings::VIRTIO_BALLOON_F_PAGE_POISON);
    assert!(spec::VIRTIO_BALLOON_F_REPORTING == bindings::VIRTIO_BALLOON_F_REPORTING);
    assert!(hinting::VIRTIO_BALLOON_CMD_ID_STOP == bindings::VIRTIO_BALLOON_CMD_ID_STOP);
    assert!(hinting::VIRTIO_BALLOON_CMD_ID_DONE == bindings::VIRTIO_BALLOON_CMD_ID_DONE);
    assert!(spec::VIRTIO_BALLOON_PFN_SHIFT == bindings::VIRTIO_BALLOON_PFN_SHIFT);
    assert!(stats::VIRTIO_BALLOON_S_NR == bindings::VIRTIO_BALLOON_S_NR as usize);
};

/// Name of the QOM type, which is that of the C implementation
pub const TYPE_VIRTIO_BALLOON: &CStr = c"virtio-balloon-device";
