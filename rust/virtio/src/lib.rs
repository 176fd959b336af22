// SPDX-License-Identifier: GPL-2.0-or-later

//! Bindings to write virtio devices in Rust.
//!
//! * [`VirtIODevice`] is the parent class of all virtio devices; a device
//!   implements [`VirtioDeviceImpl`], which fills in [`VirtioDeviceClass`], and
//!   calls the functions in [`VirtioDeviceMethods`].
//!
//! * [`VirtioRealize`] is handed to the device's realize function and is the
//!   only way to add queues.
//!
//! * [`VirtQueue`] refers to a queue of a device, and provides
//!   [`VirtQueueElement`]s: the requests of the driver.  An element is owned;
//!   it returns to the driver exactly once.
//!
//! * [`OutReader`] reads what the driver wrote into an element.

::trace::include_trace!("hw_virtio");

/// Trace points of `hw/virtio`, as far as they are used by devices in Rust and
/// have no arguments that are raw pointers
pub mod events {
    pub use super::trace::{
        trace_virtio_balloon_bad_addr, trace_virtio_balloon_get_config,
        trace_virtio_balloon_handle_output, trace_virtio_balloon_set_config,
        trace_virtio_balloon_to_target,
    };
}

pub mod bindings;

mod bh;
pub use bh::*;

mod device;
pub use device::*;

mod element;
pub use element::*;

mod queue;
pub use queue::*;

mod reader;
pub use reader::*;
