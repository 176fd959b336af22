// SPDX-License-Identifier: GPL-2.0-or-later

//! What the parts of the device have in common
//!
//! Imports go in one direction: the device imports its parts, and these import
//! guest memory.  A part does not import the device; all that it can access of
//! the device is in a [`Context`].
//!
//! # Examples
//!
//! A part that returns all elements as they are, as far as the budget allows:
//!
//! ```ignore
//! #[derive(Default)]
//! pub struct Echo {
//!     turns: Turns<EchoWork>,
//! }
//!
//! #[derive(Default)]
//! struct EchoWork;
//!
//! impl Work<PartPort<'_, Echo, Self>> for EchoWork {
//!     fn step(&mut self, port: &PartPort<'_, Echo, Self>, budget: &mut Budget, _: Phase) -> Progress {
//!         let Some(elem) = port.pop() else {
//!             return Progress::Idle;
//!         };
//!         budget.charge_element(port.buffers(&elem));
//!         port.push(elem);
//!         port.notify();
//!         Progress::More
//!     }
//! }
//!
//! impl Part for Echo {
//!     fn queue(&self) -> &BqlCell<Option<u16>> {
//!         self.turns.queue()
//!     }
//!
//!     fn handle(&self, cx: &Context<'_>, event: Event) {
//!         if let Some(port) = PartPort::new(self, &self.turns, cx) {
//!             port.turn(event);
//!         }
//!     }
//!
//!     fn in_flight(&self, _cx: &Context<'_>) -> usize {
//!         0
//!     }
//!
//!     fn drop_elements(&self, _cx: &Context<'_>) {
//!         self.turns.drop_elements();
//!     }
//! }
//! ```

use bql::prelude::*;
use util::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::{
    engine::{Engine, Event, Port, Work},
    spec::VIRTIO_BALLOON_F_MUST_TELL_HOST,
};

use crate::guest_memory::GuestMemory;

/// What the parts can access of the device
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The virtio device, for what all virtio devices have in common
    pub vdev: &'a VirtIODevice,
    /// The guest's memory, and which pages of it are in the balloon
    pub memory: &'a GuestMemory,
    /// What the guest fills free pages with; 0 if it did not tell the device
    pub poison_val: &'a BqlCell<u32>,
    /// When scheduled, has all parts handle [`Event::MainLoop`]
    pub bh: &'a BottomHalf,
    /// When it expires, has all parts handle [`Event::Retry`]
    pub retry: &'a Timer,
}

impl Context<'_> {
    /// Whether a host page that is larger than a balloon page is discarded when
    /// the last part of it goes into the balloon, even if the parts come from
    /// different elements.  This needs the user to offer the feature, and the
    /// driver to promise that it tells the device before it uses a page of the
    /// balloon.
    pub fn completes_host_pages(&self) -> bool {
        self.vdev.has_feature(VIRTIO_BALLOON_F_MUST_TELL_HOST)
    }
}

/// A part of the device that works on a queue
///
/// All functions are called with the big QEMU lock taken.
pub trait Part {
    /// The index of the queue; `None` unless the device is realized and has the
    /// queue
    fn queue(&self) -> &BqlCell<Option<u16>>;

    /// Something has happened because of which the part should look at its
    /// queue.  On [`Event::Stopped`] the VM may be migrated next, so no element
    /// may stay in flight, except for the one with statistics, which the
    /// destination recovers.
    fn handle(&self, cx: &Context<'_>, event: Event);

    /// How many elements of the queue are in flight
    fn in_flight(&self, cx: &Context<'_>) -> usize;

    /// The queue is reset or removed: drop all elements that were popped from
    /// it, without returning them.
    fn drop_elements(&self, cx: &Context<'_>);

    /// The device is reset.
    fn reset(&self, cx: &Context<'_>) {
        self.drop_elements(cx);
    }
}

/// The state of a part that works in turns.  `W` holds the elements in flight.
#[derive(Default)]
pub struct Turns<W> {
    queue: BqlCell<Option<u16>>,
    engine: BqlRefCell<Engine<W>>,
}

impl<W: Default> Turns<W> {
    /// See [`Part::queue`]
    pub const fn queue(&self) -> &BqlCell<Option<u16>> {
        &self.queue
    }

    /// Whether the part waits because the host could not do what was needed
    pub fn is_blocked(&self) -> bool {
        self.engine.borrow().is_blocked()
    }

    /// See [`Part::drop_elements`]
    pub fn drop_elements(&self) {
        // Dropping elements calls into QEMU, so the cell must not be borrowed
        let work = self.engine.borrow_mut().invalidate();
        drop(work);
    }
}

/// The [`Port`] of a part that works in turns
pub struct PartPort<'a, P, W> {
    pub part: &'a P,
    pub cx: &'a Context<'a>,
    engine: &'a BqlRefCell<Engine<W>>,
    vq: VirtQueue<'a>,
}

impl<'a, P, W> PartPort<'a, P, W> {
    /// Returns `None` if the part has no queue.
    pub fn new(part: &'a P, turns: &'a Turns<W>, cx: &'a Context<'a>) -> Option<Self> {
        Some(Self {
            part,
            cx,
            engine: &turns.engine,
            vq: VirtQueue::of(cx.vdev, turns.queue.get()?)?,
        })
    }

    /// See [`Part::in_flight`]
    pub fn in_flight(&self) -> usize
    where
        W: Work<Self>,
    {
        self.engine.borrow().work().in_flight()
    }
}

impl<P, W: Default> Port for PartPort<'_, P, W> {
    type Element = VirtQueueElement;
    type Work = W;

    fn capacity(&self) -> usize {
        self.vq.size()
    }

    fn pop(&self) -> Option<VirtQueueElement> {
        self.vq.pop()
    }

    fn buffers(&self, elem: &VirtQueueElement) -> usize {
        elem.buffers()
    }

    fn push(&self, elem: VirtQueueElement) {
        elem.push(0);
    }

    fn unpop(&self, elem: VirtQueueElement) {
        elem.unpop();
    }

    fn notify(&self) {
        self.vq.notify();
    }

    fn is_current(&self) -> bool {
        self.vq.is_current()
    }

    fn engine<R>(&self, f: impl FnOnce(&mut Engine<W>) -> R) -> R {
        f(&mut self.engine.borrow_mut())
    }

    fn vm_running(&self) -> bool {
        self.cx.vdev.vm_running()
    }

    fn schedule(&self) {
        self.cx.bh.schedule();
    }

    fn schedule_after(&self, delay: u32) {
        let now = CLOCK_VIRTUAL.get_ms();
        self.cx.retry.modify(now + u64::from(delay));
    }
}
