// SPDX-License-Identifier: GPL-2.0-or-later

//! Pages that go into the balloon, and that leave it
//!
//! All elements that the driver has made available are worked on together: their
//! PFNs become runs, which are looked up and discarded as a whole, and only then
//! the elements are returned.
//!
//! A driver can send more than what can be done in an acceptable time, as the
//! main loop and the vCPUs have to wait meanwhile.  Therefore a batch has a
//! limited size; and after some milliseconds a bottom half takes over, so that
//! others have their turn.  Elements that were not returned by then are in
//! [`PageQueue`], which has to be emptied before the queue's state is saved or
//! reset.

use std::{
    mem::{replace, take},
    time::Instant,
};

use bql::prelude::*;
use common::{field, Field};
use system::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::{pages::pfn_to_gpa, runs::Runs, BALLOON_PAGE_SIZE};

use crate::{
    device::{VirtIOBalloon, DEFLATE_QUEUE, INFLATE_QUEUE},
    discard::{Direction, Ranges, BUDGET},
};

/// The most PFNs in a batch: as many as Linux can put into the queue
const MAX_BATCH: usize = 128 * 256;

/// The most pages of a run to work on without looking at the clock
const MAX_STEP: u32 = 4096;

/// After how many runs to look at the clock
const CLOCK_INTERVAL: usize = 64;

/// Work that was not finished, of the queue for either direction
#[derive(Default)]
pub struct PageQueue {
    batch: BqlRefCell<Batch>,
    /// A function is working on the batch, and has taken it
    busy: BqlCell<bool>,
    /// There are elements that nobody will tell the device about (again)
    pending: BqlCell<bool>,
    /// Incremented when the batch becomes invalid
    epoch: BqlCell<u32>,
    bh: BottomHalf,
}

#[derive(Default)]
struct Batch {
    /// Elements of which all PFNs are in `runs`
    complete: Vec<VirtQueueElement>,
    /// The last element, if the batch was full before its end, and the number
    /// of bytes of it that are in `runs`
    unfinished: Option<(VirtQueueElement, usize)>,
    runs: Runs,
    /// The next run to work on
    next: usize,
    /// How many pages of that are done
    done: u32,
}

impl Batch {
    /// Whether there is nothing to do
    fn is_empty(&self) -> bool {
        self.complete.is_empty() && self.unfinished.is_none()
    }

    /// Read the PFNs in an element from a position on.
    fn add(&mut self, elem: VirtQueueElement, position: usize) {
        let mut reader = elem.out_reader().skip(position);
        while self.runs.pfns() < MAX_BATCH {
            let Some(pfn) = reader.read_u32() else {
                self.complete.push(elem);
                return;
            };
            self.runs.push(pfn);
        }
        let end = reader.position();
        self.unfinished = Some((elem, end));
    }

    /// Fill the batch with as much as it can take, or as there is time for.
    fn collect(&mut self, vq: &VirtQueue<'_>, deadline: Instant) {
        if let Some((elem, position)) = self.unfinished.take() {
            self.add(elem, position);
        }
        // The device would be broken if there were more elements in flight than
        // the queue has room for; the driver can make more available by reusing
        // descriptors that were not returned yet.
        while self.unfinished.is_none()
            && self.runs.pfns() < MAX_BATCH
            && self.complete.len() < vq.size()
        {
            let Some(elem) = vq.pop() else {
                break;
            };
            self.add(elem, 0);
            if Instant::now() >= deadline {
                break;
            }
        }
        self.runs.merge();
    }

    /// Work on the runs until the deadline.  Returns whether all are done.
    fn work(&mut self, ranges: &mut Ranges<'_>, deadline: Option<Instant>) -> bool {
        let mut steps = 0;
        while let Some(run) = self.runs.as_slice().get(self.next) {
            // Neither overflows: less than the whole run is done
            let first = run.first + self.done;
            let last = run.last.min(first.saturating_add(MAX_STEP - 1));

            ranges.add(pfn_to_gpa(first), pfn_to_gpa(last) + BALLOON_PAGE_SIZE);
            if last == run.last {
                self.next += 1;
                self.done = 0;
            } else {
                self.done += MAX_STEP;
            }

            steps += 1;
            if ranges.is_full() {
                ranges.flush();
            } else if steps % CLOCK_INTERVAL != 0 {
                continue;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                break;
            }
        }
        ranges.flush();

        let finished = self.next == self.runs.as_slice().len();
        if finished {
            self.runs.clear();
            self.next = 0;
        }
        finished
    }
}

impl VirtIOBalloon {
    /// The driver puts pages into the balloon.
    pub fn handle_inflate(&self, _vq: VirtQueue<'_>) {
        self.work_on_inflate();
    }

    /// The driver takes pages out of the balloon.
    pub fn handle_deflate(&self, _vq: VirtQueue<'_>) {
        self.work_on_deflate();
    }

    fn work_on_inflate(&self) {
        self.work_on_pages(Direction::Inflate);
    }

    fn work_on_deflate(&self) {
        self.work_on_pages(Direction::Deflate);
    }

    const fn page_queue(&self, direction: Direction) -> (&PageQueue, u16) {
        match direction {
            Direction::Inflate => (&self.inflate, INFLATE_QUEUE),
            Direction::Deflate => (&self.deflate, DEFLATE_QUEUE),
        }
    }

    /// The device is realized.
    pub fn start_pages(&self) {
        BottomHalf::init(
            self,
            field!(Self, inflate).then(PageQueue::BH),
            c"virtio-balloon-inflate",
            Self::work_on_inflate,
        );
        BottomHalf::init(
            self,
            field!(Self, deflate).then(PageQueue::BH),
            c"virtio-balloon-deflate",
            Self::work_on_deflate,
        );
        RamBlockNotifier::register(self, field!(Self, memory.notifier), Self::block_freed);
    }

    fn block_freed(&self, block: RamBlockId) {
        self.memory.forget(block);
    }

    /// The device is unrealized.
    pub fn stop_pages(&self) {
        self.memory.notifier.unregister();
        for queue in [&self.inflate, &self.deflate] {
            queue.bh.delete();
            queue.invalidate();
        }
        self.memory.reset();
    }

    /// The device is reset.
    pub fn reset_pages(&self) {
        self.inflate.invalidate();
        self.deflate.invalidate();
        self.memory.reset();
    }

    /// The driver resets a queue.
    pub fn reset_page_queue(&self, index: u32) {
        for direction in [Direction::Inflate, Direction::Deflate] {
            let (queue, i) = self.page_queue(direction);
            if u32::from(i) == index {
                queue.invalidate();
            }
        }
    }

    fn work_on_pages(&self, direction: Direction) {
        let (queue, index) = self.page_queue(direction);
        let Some(vq) = self.queue(index) else {
            return;
        };
        // Writing to the queue can, if the driver has placed it in device
        // memory, get here again.
        if queue.busy.replace(true) {
            return;
        }

        let deadline = Instant::now() + BUDGET;
        queue.pending.set(true);
        loop {
            if !self.work_on_batch(queue, &vq, direction, Some(deadline)) {
                queue.pending.set(false);
                break;
            }
            if Instant::now() >= deadline {
                if self.vm_running() {
                    queue.bh.schedule();
                } else {
                    self.finish_batch(direction);
                }
                break;
            }
        }
        queue.busy.set(false);
    }

    /// Continue with the batch, or begin a new one.  Returns false if there is
    /// nothing left to do.
    fn work_on_batch(
        &self,
        queue: &PageQueue,
        vq: &VirtQueue<'_>,
        direction: Direction,
        deadline: Option<Instant>,
    ) -> bool {
        let epoch = queue.epoch.get();
        let mut batch = take(&mut *queue.batch.borrow_mut());

        if batch.runs.as_slice().is_empty() {
            if let Some(deadline) = deadline {
                batch.collect(vq, deadline);
            }
            if batch.is_empty() {
                return false;
            }
        }
        let unasked = self.num_pages.get() >= self.actual.get();
        let mut ranges = Ranges::new(&self.memory, direction, Self::discard_inhibited(), unasked);
        let finished = batch.work(&mut ranges, deadline);

        let mut pushed = false;
        if finished {
            for elem in batch.complete.drain(..) {
                // The device may be reset by any of these, as it is guest
                // memory that is written
                if queue.epoch.get() == epoch {
                    elem.push(0);
                    pushed = true;
                }
            }
        }
        if queue.epoch.get() != epoch {
            return false;
        }
        // Not dropped while the cell is borrowed
        let old = replace(&mut *queue.batch.borrow_mut(), batch);
        drop(old);
        if pushed {
            vq.notify();
        }
        true
    }

    /// Return all elements to the driver, or to the queue.
    fn finish_batch(&self, direction: Direction) {
        let (queue, index) = self.page_queue(direction);
        let Some(vq) = self.queue(index) else {
            return;
        };
        queue.bh.cancel();
        if !queue.batch.borrow().runs.as_slice().is_empty() {
            self.work_on_batch(queue, &vq, direction, None);
        }
        // What does not fit into a batch begins anew
        let unfinished = queue.batch.borrow_mut().unfinished.take();
        if let Some((elem, _)) = unfinished {
            elem.unpop();
        }
    }

    /// The VM was stopped, and will perhaps be migrated: nothing may be in
    /// flight.
    pub fn suspend_pages(&self) {
        self.finish_batch(Direction::Inflate);
        self.finish_batch(Direction::Deflate);
    }

    /// The VM is running (again): look for elements that
    /// [`suspend_pages`](Self::suspend_pages) has left in the queues.
    pub fn resume_pages(&self) {
        for queue in [&self.inflate, &self.deflate] {
            if queue.pending.get() {
                queue.bh.schedule();
            }
        }
    }

    /// The VM has come from another QEMU, which may have left something in the
    /// queues.
    pub fn expect_pages(&self) {
        self.inflate.pending.set(true);
        self.deflate.pending.set(true);
    }
}

impl PageQueue {
    const BH: Field<Self, BottomHalf> = field!(Self, bh);

    /// Drop what is in the batch.
    fn invalidate(&self) {
        self.epoch.set(self.epoch.get().wrapping_add(1));
        self.pending.set(false);
        self.bh.cancel();
        let batch = take(&mut *self.batch.borrow_mut());
        drop(batch);
    }
}
