// SPDX-License-Identifier: GPL-2.0-or-later

//! The trace points of `hw/virtio` that the device uses; they are those of the
//! C implementation
//!
//! This is generated code, and the only code of the device that is allowed to
//! be unsafe: it reads flags, and calls `qemu_log()`.

#![allow(unsafe_code)]

::trace::include_trace!("hw_virtio");

pub use self::trace::{
    trace_virtio_balloon_bad_addr, trace_virtio_balloon_bad_addr_enabled,
    trace_virtio_balloon_get_config, trace_virtio_balloon_handle_output,
    trace_virtio_balloon_handle_output_enabled, trace_virtio_balloon_set_config,
    trace_virtio_balloon_to_target,
};
