// SPDX-License-Identifier: GPL-2.0-or-later

//! Pages that go into the balloon or leave it
//!
//! The elements that the driver has made available are worked on together:
//! their PFNs become runs of consecutive pages, and each run is discarded as a
//! whole.  Only then are the elements returned, in the order in which they were
//! popped.

use std::ops::AddAssign;

use crate::{
    budget::Budget,
    engine::{Phase, Port, Progress, Work},
    runs::{Run, Runs},
    spec::BALLOON_PAGE_SIZE,
};

/// How many pages were RAM, and how many were not
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages that are RAM
    pub ram: u64,
    /// PFNs at which there is no RAM
    pub bad: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.ram += other.ram;
        self.bad += other.bad;
    }
}

/// The inflate queue or the deflate queue
pub trait PagePort: Port {
    /// How many elements may be worked on together.  This has to be 1 if the
    /// parts of a large host page are only remembered for one element.
    fn batch(&self) -> usize {
        self.capacity()
    }

    /// Read up to `max` PFNs of an element, beginning at `position` (in
    /// bytes).  Returns the position after the last PFN that was read, or
    /// `None` if the element has no more PFNs.
    fn read_pfns(
        &self,
        elem: &Self::Element,
        position: usize,
        max: usize,
        runs: &mut Runs,
    ) -> Option<usize>;

    /// Discard pages, or populate those that leave the balloon, and charge the
    /// budget for the ranges of guest memory that they consist of.  No element
    /// that the pages come from has more than `pfns` PFNs.  Returns `None` if
    /// the host does not have enough memory to populate all pages; the same
    /// pages are then tried again in a later turn.
    fn discard(&self, pfns: usize, pieces: &mut Pieces<'_>, budget: &mut Budget) -> Option<Tally>;

    /// All pages of a batch of elements are done, and the elements are about to
    /// be returned.
    fn completed(&self, tally: Tally);

    /// The work on a batch of elements has ended: they are about to be returned
    /// or put back.
    fn ended(&self);
}

/// The elements that are being worked on
#[derive(Debug)]
pub struct PageWork<E> {
    /// Elements of which all PFNs are in `runs`, in the order in which they
    /// were popped
    complete: Vec<E>,
    /// The last element, if the budget was not enough for all of its PFNs, and
    /// the number of bytes of it that were read
    unfinished: Option<(E, usize)>,
    /// The PFNs of one of the elements did not all fit into `runs`.
    divided: bool,
    /// Disjoint, in ascending order
    runs: Runs,
    /// How many of the pages in `runs` are done
    done: Position,
    tally: Tally,
}

impl<E> Default for PageWork<E> {
    fn default() -> Self {
        Self {
            complete: Vec::new(),
            unfinished: None,
            divided: false,
            runs: Runs::default(),
            done: Position::default(),
            tally: Tally::default(),
        }
    }
}

impl<E, P: PagePort<Element = E>> Work<P> for PageWork<E> {
    fn step(&mut self, port: &P, budget: &mut Budget, phase: Phase) -> Progress {
        if self.runs.as_slice().is_empty() {
            if phase == Phase::Finish {
                return Progress::Idle;
            }
            self.collect(port, budget);
            if Work::<P>::is_empty(self) {
                return Progress::Idle;
            }
        }
        if !port.is_current() {
            return Progress::More;
        }
        let pfns = if self.divided {
            usize::MAX
        } else {
            self.runs.pfns()
        };
        let mut pieces = Pieces {
            runs: self.runs.as_slice(),
            done: self.done,
        };
        let Some(tally) = port.discard(pfns, &mut pieces, budget) else {
            return Progress::Blocked;
        };
        self.tally += tally;
        self.done = pieces.done;
        if self.done.run == self.runs.as_slice().len() && port.is_current() {
            self.complete(port);
        }
        Progress::More
    }

    fn in_flight(&self) -> usize {
        self.complete.len() + usize::from(self.unfinished.is_some())
    }

    fn put_back(&mut self, port: &P) {
        port.ended();
        if let Some((elem, _)) = self.unfinished.take() {
            port.unpop(elem);
        }
        while let Some(elem) = self.complete.pop() {
            port.unpop(elem);
        }
        *self = Self::default();
    }
}

impl<E> PageWork<E> {
    /// Pop elements as far as the budget allows, and make runs of their PFNs.
    fn collect<P: PagePort<Element = E>>(&mut self, port: &P, budget: &mut Budget) {
        // By reusing descriptors that were not returned yet, the driver can
        // make more elements available than the queue has room for.
        let batch = port.batch().min(port.capacity());
        let mut unfinished = self.unfinished.take();
        while let Some((elem, position)) = unfinished.take().or_else(|| {
            let elem = port.pop()?;
            budget.charge_element(port.buffers(&elem));
            Some((elem, 0))
        }) {
            let before = self.runs.pfns();
            let end = port.read_pfns(&elem, position, budget.pfns, &mut self.runs);
            budget.charge_pfns(self.runs.pfns() - before);
            match end {
                Some(end) => {
                    self.unfinished = Some((elem, end));
                    self.divided = true;
                }
                None => self.complete.push(elem),
            }
            if !port.is_current() {
                return;
            }
            if self.unfinished.is_some()
                || self.complete.len() >= batch
                || budget.buffers == 0
                || budget.pfns == 0
            {
                break;
            }
        }
        self.runs.merge();
    }

    /// All runs are done: return the elements, unless they have more PFNs.
    fn complete<P: PagePort<Element = E>>(&mut self, port: &P) {
        self.runs.clear();
        self.done = Position::default();
        if self.complete.is_empty() {
            // The runs were a part of one large element, which has more PFNs.
            return;
        }
        self.divided = self.unfinished.is_some();
        port.completed(std::mem::take(&mut self.tally));
        port.ended();
        for elem in self.complete.drain(..) {
            // Returning an element can reset the device.
            if !port.is_current() {
                return;
            }
            port.push(elem);
        }
        if port.is_current() {
            port.notify();
        }
    }
}

/// How far runs are done
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    /// The first run that is not done
    run: usize,
    /// How many pages of that run are done; fewer than it has
    pages: u32,
}

/// What is left of runs, in pieces that fit into the budget
#[derive(Debug)]
pub struct Pieces<'a> {
    runs: &'a [Run],
    done: Position,
}

impl Pieces<'_> {
    /// The next piece, unless the budget is spent
    pub fn next(&mut self, budget: &Budget) -> Option<Run> {
        if budget.is_discard_spent() {
            return None;
        }
        let run = self.runs.get(self.done.run)?;
        // This cannot overflow, because the run has more pages than are done.
        let first = run.first + self.done.pages;
        // It is not known yet whether the memory is cheap to discard.
        let pages = budget.piece(false) / BALLOON_PAGE_SIZE;
        let last = if u64::from(run.last - first) < pages {
            run.last
        } else {
            // Divide the run at the end of a huge page, if there is one in the
            // piece.  The piece ends in the run, hence with a 32-bit PFN.
            let end = u64::from(first) + pages;
            let aligned = end - end % (budget.align / BALLOON_PAGE_SIZE);
            let end = if aligned > u64::from(first) {
                aligned
            } else {
                end
            };
            u32::try_from(end - 1).unwrap_or(run.last)
        };
        if last == run.last {
            self.done.run += 1;
            self.done.pages = 0;
        } else {
            self.done.pages = last - run.first + 1;
        }
        Some(Run { first, last })
    }
}
