// SPDX-License-Identifier: GPL-2.0-or-later

//! Bindings to write virtio devices in Rust.
//!
//! * [`VirtIODevice`] is the parent class of all virtio devices.  A device
//!   implements [`VirtioDeviceImpl`], which fills in [`VirtioDeviceClass`], and
//!   calls the functions of [`VirtioDeviceMethods`].
//!
//! * [`VirtioRealize`] is passed to the device's realize function, and is the
//!   only way to add queues.
//!
//! * [`VirtQueue`] refers to a queue of a device until the queue is reset.  It
//!   provides the requests of the driver as [`VirtQueueElement`]s.  An element
//!   is owned, so it is returned to the driver only once.
//!
//! * [`OutReader`] reads the data that the driver sends in an element;
//!   [`InWriter`] writes the data that the device sends back.
//!
//! * [`BottomHalf`] runs a function later, in the main loop.
//!
//! # Rules
//!
//! Functions of [`VirtioDeviceImpl`] and handlers have the big QEMU lock.
//!
//! **Realize.**  Check the properties first.  If the function fails, only the
//! queues are removed; it has to undo everything else.  For example, the bottom
//! half must not exist if the device is realized again.
//!
//! **Unrealize** undoes all of it: delete bottom halves and timers, and give up
//! all elements and other references to the device.  An element refers to the
//! device, so a device that keeps one is never freed.  The queues still exist;
//! after it has returned, [`VirtQueue::of`] returns `None`.
//!
//! **Reset**, of the device or of a queue.  Drop the elements, as the queue
//! forgets them.  A reset of the device also cancels bottom halves, and sets
//! the state to what a new driver expects.  The features that the old driver
//! has accepted are still there until the function returns.
//!
//! **Callbacks.**  The handler of a queue is also called when there are no new
//! elements.  A bottom half also runs while the VM is stopped, and so does a
//! timer unless its clock is stopped; see
//! [`vm_running`](VirtioDeviceMethods::vm_running).
//! [`SET_STATUS`](VirtioDeviceImpl::SET_STATUS) is also called when the VM is
//! stopped or started.  When it is stopped, return all elements, because they
//! are not migrated; a device that has to keep some calls
//! [`VirtQueue::rewind`] after migration.
//!
//! **Re-entry.**  The driver chooses the addresses of rings, buffers and
//! interrupt messages.  If there is a register of a device, an access to it can
//! notify, reset or unplug this device before it returns.  Functions that do
//! this: those that pop or return an element, or drop it;
//! [`VirtQueue::set_notification`] and [`VirtQueue::notify`];
//! [`notify_config`](VirtioDeviceMethods::notify_config) and
//! [`error`](VirtioDeviceMethods::error).
//!
//! * Do not borrow a `BqlRefCell` meanwhile, as the next borrow would panic.
//!   Take the value out of the cell, in a statement of its own: with `if let
//!   Some(elem) = cell.borrow_mut().take()`, the borrow lasts until the end of
//!   the block.
//! * If the device was reset, a [`VirtQueue`] or an element from before does
//!   nothing, but the fields of the device belong to the new driver: look at
//!   [`VirtQueue::is_current`] before changing them.
//! * `self` is valid until a handler, bottom half or timer returns, even if the
//!   device is unplugged.
//! * While a bottom half runs, accesses to the registers of the device fail.
//!   That prevents neither a reset nor an unplug by other means; nor is it so
//!   in the handler of a queue that the main loop calls.
//!
//! **Threads.**  Another thread can access the contents of a
//! [`VirtQueueElement`].  Almost everything else panics without the big QEMU
//! lock: popping, returning and dropping an element, for example.  The main
//! loop has to get the elements back, also when the device is reset or
//! unrealized, or the VM is stopped.
//!
//! **Panics** end QEMU, and with it the VM.  Check what the driver controls
//! before it is an index, a shift count or an operand, and never `unwrap()` it.
//! Report mistakes of the driver with [`error`](VirtioDeviceMethods::error).
//! An overflow is a panic only with `overflow-checks=yes` in `meson.build`;
//! otherwise the number wraps around.
//!
//! # Examples
//!
//! A device that sends the data that it gets from the driver back to it, up to
//! a limit that the user sets.  The work is done in a bottom half.
//!
//! ```no_run
//! use std::ffi::CStr;
//!
//! use bql::prelude::*;
//! use common::field;
//! use hwcore::prelude::*;
//! use migration::prelude::*;
//! use qom::prelude::*;
//! use util::{prelude::*, Result};
//! use virtio::{prelude::*, virtio_vmstate};
//!
//! /// A feature bit of this device: the limit is in the configuration space
//! const VIRTIO_ECHO_F_LIMIT: u32 = 0;
//!
//! #[repr(C)]
//! #[derive(qom::Object, hwcore::Device)]
//! pub struct VirtIOEcho {
//!     parent_obj: ParentField<VirtIODevice>,
//!
//!     /// The most bytes to send back
//!     #[property(rename = "limit", default = 4096)]
//!     limit: u32,
//!
//!     /// Bytes that were sent back since the last reset
//!     count: BqlCell<u64>,
//!     /// The index of the queue, once the device is realized
//!     queue: BqlCell<u16>,
//!     bh: BottomHalf,
//! }
//!
//! virtio_device_type!(VirtIOEcho, c"virtio-echo-device");
//!
//! impl VirtIOEcho {
//!     fn realize(&self, queues: &mut VirtioRealize<'_, Self>) -> Result<()> {
//!         ensure!(self.limit > 0, "'limit' must not be 0");
//!         self.queue.set(queues.add_queue(64, &Self::handle_output));
//!         BottomHalf::init(self, field!(Self, bh), c"virtio-echo", Self::echo);
//!         Ok(())
//!     }
//!
//!     fn unrealize(&self) {
//!         self.bh.delete();
//!     }
//!
//!     fn handle_output(&self, _vq: VirtQueue<'_>) {
//!         self.bh.schedule();
//!     }
//!
//!     /// The contents of an element that are sent back, and their size.
//!     fn echo_one(&self, elem: &VirtQueueElement) -> usize {
//!         let mut reader = elem.out_reader();
//!         let mut writer = elem.in_writer();
//!         while writer.position() < self.limit as usize {
//!             let Some(byte) = reader.read_u8() else {
//!                 break;
//!             };
//!             if writer.write_u8(byte).is_none() {
//!                 break;
//!             }
//!         }
//!         writer.position()
//!     }
//!
//!     fn echo(&self) {
//!         // None if the device is not realized
//!         let Some(vq) = VirtQueue::of(self, self.queue.get()) else {
//!             return;
//!         };
//!         while let Some(elem) = vq.pop() {
//!             if !vq.is_current() {
//!                 // Popping the element has reset the device
//!                 return;
//!             }
//!             if !elem.has_out() {
//!                 // The element is dropped; the device is unusable until the
//!                 // driver resets it
//!                 self.error("nothing to send back");
//!                 return;
//!             }
//!             let written = self.echo_one(&elem);
//!             self.count.set(self.count.get() + written as u64);
//!             elem.push(written);
//!         }
//!         vq.notify();
//!     }
//!
//!     fn config_size(&self) -> usize {
//!         size_of::<u32>()
//!     }
//!
//!     fn get_config(&self, config: &mut [u8]) {
//!         config.copy_from_slice(&self.limit.to_le_bytes());
//!     }
//!
//!     fn get_features(&self, features: u64) -> Result<u64> {
//!         Ok(features | 1 << VIRTIO_ECHO_F_LIMIT)
//!     }
//!
//!     fn reset(&self) {
//!         self.bh.cancel();
//!         self.count.set(0);
//!     }
//! }
//!
//! impl ObjectImpl for VirtIOEcho {
//!     type ParentType = VirtIODevice;
//!     const INSTANCE_INIT: Option<InstanceInitFn<Self>> = hwcore::instance_init!(VirtIOEcho {
//!         parent: [parent_obj],
//!         properties: [limit],
//!         count: BqlCell::new(0),
//!         queue: BqlCell::new(0),
//!         bh: BottomHalf::default(),
//!     });
//!     const CLASS_INIT: fn(&mut Self::Class) = Self::Class::class_init::<Self>;
//! }
//!
//! impl DeviceImpl for VirtIOEcho {
//!     // What is common to all virtio devices
//!     const VMSTATE: Option<VMStateDescription<Self>> = Some(virtio_vmstate(c"virtio-echo", 1));
//! }
//!
//! impl ResettablePhasesImpl for VirtIOEcho {}
//!
//! impl VirtioDeviceImpl for VirtIOEcho {
//!     const DEVICE_ID: u16 = 63;
//!     const CONFIG_SIZE: fn(&Self) -> usize = Self::config_size;
//!     const REALIZE: fn(&Self, &mut VirtioRealize<'_, Self>) -> Result<()> = Self::realize;
//!     const UNREALIZE: Option<fn(&Self)> = Some(Self::unrealize);
//!     const GET_FEATURES: fn(&Self, u64) -> Result<u64> = Self::get_features;
//!     const GET_CONFIG: Option<fn(&Self, &mut [u8])> = Some(Self::get_config);
//!     const RESET: Option<fn(&Self)> = Some(Self::reset);
//!     // What is specific to this device
//!     const VIRTIO_VMSTATE: Option<VMStateDescription<Self>> = Some(
//!         VMStateDescriptionBuilder::<Self>::new()
//!             .name(c"virtio-echo-device")
//!             .version_id(1)
//!             .minimum_version_id(1)
//!             .fields(vmstate_fields! {
//!                 vmstate_of!(VirtIOEcho, count),
//!             })
//!             .build(),
//!     );
//! }
//! ```

pub use virtio_sys as bindings;

mod bh;
pub use bh::*;

mod class;
pub use class::*;

mod cursor;

mod device;
pub use device::{VirtIODevice, VirtioDeviceClass, VirtioDeviceMethods};

mod element;
pub use element::{InBuffer, VirtQueueElement};

// preserve one-item-per-"use" syntax, it is clearer
// for prelude-like modules
#[rustfmt::skip]
pub mod prelude;

mod queue;
pub use queue::*;

mod reader;
pub use reader::*;

mod writer;
pub use writer::*;
