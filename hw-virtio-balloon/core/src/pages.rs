// SPDX-License-Identifier: GPL-2.0-or-later

//! Pages that go into the balloon, or leave it
//!
//! All elements that the driver has made available are worked on together: their
//! PFNs become runs of consecutive pages, which are discarded as a whole, and only
//! then the elements are returned, in the order in which they came.

use std::ops::AddAssign;

use crate::{
    budget::Budget,
    engine::{Phase, Port, Progress, Work},
    runs::{Run, Runs},
    spec::BALLOON_PAGE_SIZE,
};

/// What became of pages
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

    /// Discard pages, or populate those that leave the balloon, and charge the
    /// budget for the ranges of guest memory that they consist of.  The elements
    /// that they are from have so many PFNs, or more.  Returns `None` if the host
    /// has no memory for all of them at the moment; then it will be tried again
    /// with the same ones, and others.
    fn discard(&self, pfns: usize, pieces: &mut Pieces<'_>, budget: &mut Budget) -> Option<Tally>;

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
    /// Which of them are done
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

    fn is_empty(&self) -> bool {
        self.complete.is_empty() && self.unfinished.is_none()
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
    /// Take elements from the queue, as many as there is budget for, and make runs
    /// of their PFNs.
    fn collect<P: PagePort<Element = E>>(&mut self, port: &P, budget: &mut Budget) {
        // The driver can make more elements available than the queue has room
        // for, by reusing descriptors that were not returned yet.
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

    /// Return the elements of which all pages are done.
    fn complete<P: PagePort<Element = E>>(&mut self, port: &P) {
        self.runs.clear();
        self.done = Position::default();
        if self.complete.is_empty() {
            // A part of a large element
            return;
        }
        self.divided = self.unfinished.is_some();
        port.completed(std::mem::take(&mut self.tally));
        port.ended();
        for elem in self.complete.drain(..) {
            // Any of these can reset the device
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
    /// How many pages of that run are done; less than all of them
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
        // Does not overflow: less than the whole run is done
        let first = run.first + self.done.pages;
        let end = u64::from(first) + budget.piece() / BALLOON_PAGE_SIZE;
        // Divide it where a huge page ends, if one does
        let aligned = end - end % (budget.align / BALLOON_PAGE_SIZE);
        let end = if aligned > u64::from(first) {
            aligned
        } else {
            end
        };
        let last = u32::try_from(end - 1).map_or(run.last, |last| last.min(run.last));
        if last == run.last {
            self.done.run += 1;
            self.done.pages = 0;
        } else {
            self.done.pages = last - run.first + 1;
        }
        Some(Run { first, last })
    }
}
