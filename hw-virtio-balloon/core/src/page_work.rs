// SPDX-License-Identifier: GPL-2.0-or-later

//! Pages that go into the balloon, or leave it
//!
//! All elements that the driver has made available are worked on together: their
//! PFNs become runs, which are discarded as a whole, and only then the elements
//! are returned, in the order in which they came.

use std::ops::Add;

use crate::{
    budget::Budget,
    engine::{Host, Phase, Progress, Queue, Turn, Work},
    pages::BALLOON_PAGE_SIZE,
    runs::{Run, Runs},
};

/// What became of pages
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages that are RAM
    pub ram: u64,
    /// PFNs at which there is no RAM
    pub bad: u64,
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            ram: self.ram + other.ram,
            bad: self.bad + other.bad,
        }
    }
}

/// Discards pages, or populates those that leave the balloon
pub trait PageSink {
    /// Add a run of pages, and charge the budget for the ranges of guest memory
    /// that it consists of.  Nothing may have happened to them before
    /// [`flush`](Self::flush).
    fn add(&mut self, run: Run, budget: &mut Budget) -> Tally;

    /// Discard, or populate, what was added.  Returns false if the host has no
    /// memory for all of it at the moment.  Then it has to be added again, all of
    /// it, when that is tried again.
    #[must_use]
    fn flush(&mut self) -> bool;
}

/// The inflate queue or the deflate queue
pub trait PageHost: Queue {
    /// See [`PageSink`]
    type Sink<'a>: PageSink
    where
        Self: 'a;

    /// Begin to discard pages of elements that have so many PFNs, or more
    fn sink(&self, pfns: usize) -> Self::Sink<'_>;

    /// How many elements may be worked on together.  If what is known of large
    /// host pages is only good for a single element, that is one.
    fn batch(&self) -> usize {
        self.capacity()
    }

    /// Read PFNs of an element, at most `max`, from a position on that is in
    /// bytes.  Returns the position behind the last of them, or `None` if there
    /// are no more.
    fn read_pfns(
        &self,
        elem: &Self::Element,
        position: usize,
        max: usize,
        runs: &mut Runs,
    ) -> Option<usize>;

    /// A batch of elements is about to be returned.
    fn completed(&self, tally: Tally);

    /// A batch of elements is not worked on any more: it is about to be returned,
    /// or put back.
    fn ended(&self);
}

/// The elements that are being worked on
#[derive(Debug)]
pub struct PageWork<E> {
    /// Elements of which all PFNs are in `runs`, in the order in which they were
    /// popped
    complete: Vec<E>,
    /// The last element, if there was no room for all of its PFNs, and the
    /// number of bytes of it that are in `runs`
    unfinished: Option<(E, usize)>,
    /// An element was divided, so that `runs` only has a part of its PFNs
    divided: bool,
    /// Disjoint, in ascending order
    runs: Runs,
    /// The next run to work on
    next: usize,
    /// How many pages of that run are done; less than all of them
    done: u32,
    tally: Tally,
}

impl<E> Default for PageWork<E> {
    fn default() -> Self {
        Self {
            complete: Vec::new(),
            unfinished: None,
            divided: false,
            runs: Runs::default(),
            next: 0,
            done: 0,
            tally: Tally::default(),
        }
    }
}

impl<E> PageWork<E> {
    /// Read the PFNs of an element from a position on.
    fn add<H>(&mut self, host: &H, elem: E, position: usize, budget: &mut Budget)
    where
        H: PageHost<Element = E>,
    {
        let before = self.runs.pfns();
        let next = host.read_pfns(&elem, position, budget.pfns, &mut self.runs);

        budget.charge_pfns(self.runs.pfns() - before);
        match next {
            Some(next) => {
                self.unfinished = Some((elem, next));
                self.divided = true;
            }
            None => self.complete.push(elem),
        }
    }

    /// Take elements from the queue, as many as there is budget for.
    fn collect<H>(&mut self, host: &H, turn: Turn, budget: &mut Budget)
    where
        H: PageHost<Element = E> + Host<Work = Self>,
    {
        if let Some((elem, position)) = self.unfinished.take() {
            self.add(host, elem, position, budget);
        }
        // The driver can make more elements available than the queue has room
        // for, by reusing descriptors that were not returned yet.
        let batch = host.batch().min(host.capacity());
        while self.unfinished.is_none()
            && self.complete.len() < batch
            && budget.buffers > 0
            && budget.pfns > 0
        {
            let Some(elem) = host.pop() else {
                break;
            };
            budget.charge_element(host.buffers(&elem));
            self.add(host, elem, 0, budget);
            if !turn.is_current(host) {
                return;
            }
        }
        self.runs.merge();
    }

    /// Discard runs, as far as the budget allows.  Returns whether all are done,
    /// or `None` if the host does not have the memory to go on.
    fn discard<H: PageHost>(&mut self, host: &H, budget: &mut Budget) -> Option<bool> {
        let pfns = if self.divided {
            usize::MAX
        } else {
            self.runs.pfns()
        };
        let mut sink = host.sink(pfns);
        let before = (self.next, self.done, self.tally);

        while let Some(run) = self.runs.as_slice().get(self.next) {
            if budget.is_discard_spent() {
                break;
            }
            // Does not overflow: less than the whole run is done
            let first = run.first + self.done;
            let end = u64::from(first) + budget.piece() / BALLOON_PAGE_SIZE;
            // Divide it where a huge page ends, if one does
            let aligned = end - end % (budget.align / BALLOON_PAGE_SIZE);
            let end = if aligned > u64::from(first) {
                aligned
            } else {
                end
            };
            let last = u32::try_from(end - 1).map_or(run.last, |last| last.min(run.last));

            self.tally = self.tally + sink.add(Run { first, last }, budget);
            if last == run.last {
                self.next += 1;
                self.done = 0;
            } else {
                self.done = last - run.first + 1;
            }
        }
        if !sink.flush() {
            (self.next, self.done, self.tally) = before;
            return None;
        }
        Some(self.next == self.runs.as_slice().len())
    }

    /// Return the elements of which all pages are done.
    fn complete<H>(&mut self, host: &H, turn: Turn)
    where
        H: PageHost<Element = E> + Host<Work = Self>,
    {
        self.runs.clear();
        self.next = 0;
        if self.complete.is_empty() {
            // A part of a large element
            return;
        }
        self.divided = self.unfinished.is_some();
        host.completed(std::mem::take(&mut self.tally));
        host.ended();
        for elem in self.complete.drain(..) {
            // Any of these can reset the device
            if !turn.is_current(host) {
                return;
            }
            host.push(elem);
        }
        if turn.is_current(host) {
            host.notify();
        }
    }
}

impl<E, H> Work<H> for PageWork<E>
where
    H: PageHost<Element = E> + Host<Work = Self>,
{
    fn is_empty(&self) -> bool {
        self.complete.is_empty() && self.unfinished.is_none()
    }

    fn step(&mut self, host: &H, turn: Turn, budget: &mut Budget, phase: Phase) -> Progress {
        if self.runs.as_slice().is_empty() {
            if phase == Phase::Finish {
                return Progress::Idle;
            }
            self.collect(host, turn, budget);
            if Work::<H>::is_empty(self) {
                return Progress::Idle;
            }
        }
        if turn.is_current(host) {
            let Some(all) = self.discard(host, budget) else {
                return Progress::Blocked;
            };
            if all && turn.is_current(host) {
                self.complete(host, turn);
            }
        }
        Progress::More
    }

    fn put_back(&mut self, host: &H) {
        host.ended();
        if let Some((elem, _)) = self.unfinished.take() {
            host.unpop(elem);
        }
        while let Some(elem) = self.complete.pop() {
            host.unpop(elem);
        }
        *self = Self::default();
    }
}
