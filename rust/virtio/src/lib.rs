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

pub use virtio_sys as bindings;

mod bh;
pub use bh::*;

mod device;
pub use device::*;

mod element;
pub use element::*;

// preserve one-item-per-"use" syntax, it is clearer
// for prelude-like modules
#[rustfmt::skip]
pub mod prelude;

mod queue;
pub use queue::*;

mod reader;
pub use reader::*;
