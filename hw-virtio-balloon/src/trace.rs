// SPDX-License-Identifier: GPL-2.0-or-later

//! Trace points of `hw/virtio` that the device uses, the same as in C
//!
//! They are generated, and the only code of the device that is allowed to be
//! unsafe: they read flags, and call `qemu_log()`.

#![allow(unsafe_code)]

::trace::include_trace!("hw_virtio");

pub use self::trace::{
    trace_virtio_balloon_bad_addr, trace_virtio_balloon_bad_addr_enabled,
    trace_virtio_balloon_get_config, trace_virtio_balloon_handle_output,
    trace_virtio_balloon_handle_output_enabled, trace_virtio_balloon_set_config,
    trace_virtio_balloon_to_target,
};
