// SPDX-License-Identifier: GPL-2.0-or-later

//! What the parts of the device have in common
//!
//! Imports go one way: the device knows its parts, and these know the guest's
//! memory.  A part does not know the device, only a [`Context`].

use qom::prelude::*;
use system::prelude::*;
use virtio::prelude::*;

use crate::guest_memory::GuestMemory;

/// What the parts need from the device
pub trait Context {
    /// The queue with an index; `None` if the device is not realized.
    fn queue(&self, index: u16) -> Option<VirtQueue<'_>>;

    /// Whether the VM is running
    fn vm_running(&self) -> bool;

    /// Whether the driver has accepted a feature
    fn has_feature(&self, bit: u32) -> bool;

    /// The guest's memory, and what of it is in the balloon
    fn memory(&self) -> &GuestMemory;

    /// Whether a host page that is larger than a balloon page is discarded when
    /// the last part of it goes into the balloon, whatever elements the parts are
    /// in: the user wants that, and the driver has promised to tell before it uses
    /// a part.
    fn completes_host_pages(&self) -> bool;

    /// What the guest fills free pages with; 0 if it has not told
    fn poison_val(&self) -> u32;

    /// The `iothread` property
    fn iothread(&self) -> Option<Owned<IOThread>>;

    /// Tell the driver that the configuration space has changed.
    fn notify_config(&self);

    /// The driver has violated the specification: stop using the queues until
    /// the device is reset.
    fn error(&self, msg: &str);

    /// A function that can be called in any thread.  It has the main loop call
    /// [`FreePageHinting::return_processed`](crate::hinting::FreePageHinting::return_processed),
    /// and keeps the device alive until then.
    fn hints_processed(&self) -> Box<dyn FnOnce() + Send>;
}

/// A part of the device that works on a queue: what happens to all of them
///
/// All functions are called with the big QEMU lock taken.
pub trait Part {
    /// The device is realized, with the part's queue at an index.
    fn realize(&self, cx: &dyn Context, queue: u16);

    /// The device is unrealized.
    fn unrealize(&self, cx: &dyn Context);

    /// The device is reset.
    fn reset(&self, cx: &dyn Context);

    /// The driver resets a queue, which can be that of another part.
    fn queue_reset(&self, cx: &dyn Context, queue: u32);

    /// The VM was started or stopped, or the driver has written the device
    /// status.  When the VM is stopped, it will perhaps be migrated, and nothing
    /// may be in flight.
    fn vm_state_change(&self, cx: &dyn Context, running: bool);

    /// The VM begins to run after it has come from another QEMU, which may have
    /// left something in the queue.  Only called if the driver is ready.
    fn post_load(&self, _cx: &dyn Context) {}
}
