// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page reporting: pages that the driver reports as free
//!
//! The elements that the driver has made available are discarded together, as
//! far as the budget allows, and returned together.  Some drivers report each
//! page in an element of its own, and each notification of the driver is an
//! interrupt.
//!
//! Unlike an element of the page queues, a report can cover any amount of
//! memory.  Therefore only one element is kept from one turn to the next.

use crate::{
    budget::Budget,
    engine::{Phase, Port, Progress, Work},
};

/// A buffer that can be discarded
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportedRange {
    /// Size of the buffer in bytes; a multiple of `page_size`
    pub len: u64,
    /// Size in bytes of the host pages; a power of two
    pub page_size: u64,
    /// Whether it is cheap to discard, see [`Budget::charge_range`]
    pub cheap: bool,
}

/// A piece of a buffer that can be discarded
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the element among those that are discarded together
    pub element: usize,
    /// Index of the buffer in the element
    pub buffer: usize,
    /// Offset in the buffer, in bytes
    pub offset: u64,
    /// Length in bytes
    pub len: u64,
}

/// The queue for reports
pub trait ReportPort: Port {
    /// Whether reported pages may be discarded at the moment
    fn may_discard(&self) -> bool;

    /// Describe a buffer; `None` if it cannot be discarded because it does not
    /// consist of whole host pages of RAM.
    fn range(&self, elem: &Self::Element, buffer: usize) -> Option<ReportedRange>;

    /// A number of buffers is returned without having been discarded.
    fn ignored(&self, buffers: usize);

    /// Discard pieces of the buffers of elements.  Their offsets and lengths are
    /// multiples of the host page size.
    fn discard(&self, elements: &[Self::Element], pieces: &[Piece]);
}

/// The elements that are being worked on
#[derive(Debug)]
pub struct ReportWork<E> {
    /// In the order in which they were popped; no more than one from one step
    /// to the next
    elements: Vec<E>,
    /// The next buffer of the last element
    buffer: usize,
    /// How many bytes of that buffer are done
    done: u64,
}

impl<E> Default for ReportWork<E> {
    fn default() -> Self {
        Self {
            elements: Vec::new(),
            buffer: 0,
            done: 0,
        }
    }
}

impl<E, P: ReportPort<Element = E>> Work<P> for ReportWork<E> {
    fn step(&mut self, port: &P, budget: &mut Budget, phase: Phase) -> Progress {
        let mut pieces = Vec::new();
        // How many of the elements are done
        let mut complete = 0;
        loop {
            if complete == self.elements.len() {
                let full = complete >= port.capacity() || budget.is_spent();
                if phase == Phase::Finish || full {
                    break;
                }
                let Some(elem) = port.pop() else {
                    break;
                };
                budget.charge_element(port.buffers(&elem));
                self.elements.push(elem);
                if !port.is_current() {
                    return Progress::More;
                }
            }
            // The device need not discard what is reported.  When the VM is
            // stopped, return the element without discarding the rest.
            if phase == Phase::Collect && !self.collect(port, budget, &mut pieces) {
                break;
            }
            complete += 1;
            self.buffer = 0;
            self.done = 0;
        }
        if self.elements.is_empty() {
            return Progress::Idle;
        }
        // Popping an element can have changed whether it may be discarded.
        if !pieces.is_empty() && port.may_discard() {
            port.discard(&self.elements, &pieces);
        }
        for elem in self.elements.drain(..complete) {
            // Returning an element can reset the device.
            if !port.is_current() {
                return Progress::More;
            }
            port.push(elem);
        }
        if complete > 0 && port.is_current() {
            port.notify();
        }
        Progress::More
    }

    fn in_flight(&self) -> usize {
        self.elements.len()
    }

    fn put_back(&mut self, port: &P) {
        while let Some(elem) = self.elements.pop() {
            port.unpop(elem);
        }
        *self = Self::default();
    }
}

impl<E> ReportWork<E> {
    /// Divide buffers of the last element into pieces, as far as the budget
    /// allows.  Returns whether that was the rest of the element.
    fn collect<P>(&mut self, port: &P, budget: &mut Budget, pieces: &mut Vec<Piece>) -> bool
    where
        P: ReportPort<Element = E>,
    {
        let Some(elem) = self.elements.last() else {
            return true;
        };
        let buffers = port.buffers(elem);
        if !port.may_discard() {
            port.ignored(buffers.saturating_sub(self.buffer));
            return true;
        }
        let element = self.elements.len() - 1;

        while self.buffer < buffers && !budget.is_discard_spent() {
            let range = port.range(elem, self.buffer);
            if range.is_none() {
                port.ignored(1);
            }
            let (len, page_size) = range.map_or((0, 1), |r| (r.len, r.page_size));
            let cheap = range.is_some_and(|r| r.cheap);
            let left = len.saturating_sub(self.done);
            // a multiple of the host page size, at least one host page
            let piece = (budget.piece(cheap) & !(page_size - 1)).max(page_size);
            let piece = piece.min(left);

            budget.charge_range(piece, cheap);
            if piece > 0 {
                pieces.push(Piece {
                    element,
                    buffer: self.buffer,
                    offset: self.done,
                    len: piece,
                });
            }
            if piece == left {
                self.buffer += 1;
                self.done = 0;
            } else {
                self.done += piece;
            }
        }
        self.buffer >= buffers
    }
}
