// SPDX-License-Identifier: GPL-2.0-or-later

//! What the parts use to work on a queue in turns
//!
//! This connects `virtio_balloon_core::engine` with QEMU: the virtqueue, and a
//! bottom half that runs the next turn.

use bql::prelude::*;
use common::{field, Field};
use util::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::engine::{self, Engine, Host, Queue, Work};

use crate::part::{Context, Part};

/// The state of a part that works on a queue; `W` are the elements in flight.
#[derive(Default)]
pub struct Deferred<W> {
    /// Index of the queue, while the device is realized
    index: BqlCell<Option<u16>>,
    engine: BqlRefCell<Engine<W>>,
    /// Runs the next turn
    bh: BottomHalf,
    /// Schedules that, if the host could not do what was needed
    retry: Timer,
}

/// A part that works on a queue
pub trait QueuePart: Sized {
    /// See [`Deferred`]
    type Work: Default;

    fn deferred(&self) -> &Deferred<Self::Work>;
}

/// A part, together with what it needs to work
pub struct PartHost<'a, P> {
    pub part: &'a P,
    pub cx: &'a dyn Context,
    vq: VirtQueue<'a>,
}

impl<'a, P: QueuePart> PartHost<'a, P> {
    /// `None` if there is no queue.
    pub fn new(part: &'a P, cx: &'a dyn Context) -> Option<Self> {
        let vq = cx.queue(part.deferred().index.get()?)?;
        Some(Self { part, cx, vq })
    }
}

impl<P: QueuePart> Queue for PartHost<'_, P> {
    type Element = VirtQueueElement;

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
}

impl<P: QueuePart> Host for PartHost<'_, P> {
    type Work = P::Work;

    fn engine<R>(&self, f: impl FnOnce(&mut Engine<P::Work>) -> R) -> R {
        f(&mut self.part.deferred().engine.borrow_mut())
    }

    fn vm_running(&self) -> bool {
        self.cx.vm_running()
    }

    fn schedule(&self) {
        self.part.deferred().bh.schedule();
    }

    fn schedule_after(&self, delay: u32) {
        let retry = &self.part.deferred().retry;
        retry.modify(CLOCK_VIRTUAL.get_ms() + u64::from(delay));
    }

    fn cancel(&self) {
        self.part.deferred().cancel();
    }
}

impl<W: Default> Deferred<W> {
    pub const BH: Field<Self, BottomHalf> = field!(Self, bh);
    pub const RETRY: Field<Self, Timer> = field!(Self, retry);

    fn cancel(&self) {
        self.bh.cancel();
        self.retry.delete();
    }

    /// Whether the host could not do what was needed, and it is tried again
    pub fn is_blocked(&self) -> bool {
        self.engine.borrow().is_blocked()
    }

    /// The timer has expired.
    pub fn retry(&self) {
        self.bh.schedule();
    }

    pub fn realize(&self, queue: u16) {
        self.index.set(Some(queue));
    }

    pub fn unrealize(&self) {
        self.reset();
        self.bh.delete();
        self.index.set(None);
    }

    /// The queue is reset: drop what is in flight.
    pub fn reset(&self) {
        self.cancel();
        // Not dropped while the cell is borrowed
        let work = self.engine.borrow_mut().invalidate();
        drop(work);
    }

    /// Whether this is for the queue with an index.
    pub fn is_for(&self, queue: u32) -> bool {
        self.index.get().map(u32::from) == Some(queue)
    }

    /// There may be elements that nobody will notify the device of.
    pub fn expect(&self) {
        self.engine.borrow_mut().expect();
    }
}

/// The driver has notified the queue of a part.
pub fn run<'a, P>(part: &'a P, cx: &'a dyn Context)
where
    P: QueuePart,
    P::Work: Work<PartHost<'a, P>>,
{
    if let Some(host) = PartHost::new(part, cx) {
        engine::run(&host);
    }
}

/// The bottom half of a part runs.
pub fn resume<'a, P>(part: &'a P, cx: &'a dyn Context)
where
    P: QueuePart,
    P::Work: Work<PartHost<'a, P>>,
{
    if let Some(host) = PartHost::new(part, cx) {
        engine::resume(&host);
    }
}

/// See [`Part::vm_state_change`](crate::part::Part::vm_state_change)
pub fn vm_state_change<'a, P>(part: &'a P, cx: &'a dyn Context, running: bool)
where
    P: QueuePart,
    P::Work: Work<PartHost<'a, P>>,
{
    if let Some(host) = PartHost::new(part, cx) {
        if running {
            engine::vm_started(&host);
        } else {
            engine::vm_stopped(&host);
        }
    }
}

/// A part that does nothing but work on its queue, in turns
pub trait WorksInTurns: QueuePart {}

impl<P: WorksInTurns> Part for P
where
    for<'a> P::Work: Work<PartHost<'a, P>>,
{
    fn realize(&self, _cx: &dyn Context, queue: u16) {
        self.deferred().realize(queue);
    }

    fn unrealize(&self, _cx: &dyn Context) {
        self.deferred().unrealize();
    }

    fn reset(&self, _cx: &dyn Context) {
        self.deferred().reset();
    }

    fn queue_reset(&self, cx: &dyn Context, queue: u32) {
        if self.deferred().is_for(queue) {
            self.reset(cx);
        }
    }

    fn vm_state_change(&self, cx: &dyn Context, running: bool) {
        vm_state_change(self, cx, running);
    }

    fn post_load(&self, _cx: &dyn Context) {
        self.deferred().expect();
    }
}
