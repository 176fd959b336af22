// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page reporting: pages that the driver reports as free
//!
//! Unlike an element of the page queues, a report can cover any amount of
//! memory.  Therefore an element is returned before the next one is popped.

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

    /// Discard pieces of buffers.  Their offsets and lengths are multiples of
    /// the host page size.
    fn discard(&self, elem: &Self::Element, pieces: &[Piece]);
}

/// The element that is being worked on
#[derive(Debug)]
pub struct ReportWork<E> {
    current: Option<E>,
    /// The next buffer of the element
    buffer: usize,
    /// How many bytes of that buffer are done
    done: u64,
}

impl<E> Default for ReportWork<E> {
    fn default() -> Self {
        Self {
            current: None,
            buffer: 0,
            done: 0,
        }
    }
}

impl<E, P: ReportPort<Element = E>> Work<P> for ReportWork<E> {
    fn step(&mut self, port: &P, budget: &mut Budget, phase: Phase) -> Progress {
        if self.current.is_none() && phase == Phase::Collect {
            self.current = port.pop();
            if let Some(elem) = &self.current {
                budget.charge_element(port.buffers(elem));
            }
        }
        if self.current.is_none() {
            return Progress::Idle;
        }
        // The device need not discard what is reported.  When the VM is
        // stopped, return the element without discarding the rest.
        let done = port.is_current() && (phase == Phase::Finish || self.discard(port, budget));
        if done && port.is_current() {
            if let Some(elem) = std::mem::take(self).current {
                port.push(elem);
                if port.is_current() {
                    port.notify();
                }
            }
        }
        Progress::More
    }

    fn is_empty(&self) -> bool {
        self.current.is_none()
    }

    fn put_back(&mut self, port: &P) {
        if let Some(elem) = std::mem::take(self).current {
            port.unpop(elem);
        }
    }
}

impl<E> ReportWork<E> {
    /// Discard buffers, as far as the budget allows.  Returns whether all
    /// buffers are done.
    fn discard<P>(&mut self, port: &P, budget: &mut Budget) -> bool
    where
        P: ReportPort<Element = E>,
    {
        let Some(elem) = &self.current else {
            return true;
        };
        if !port.may_discard() {
            return true;
        }
        let buffers = port.buffers(elem);
        let mut pieces = Vec::new();

        while self.buffer < buffers && !budget.is_discard_spent() {
            let range = port.range(elem, self.buffer);
            let (len, page_size) = range.map_or((0, 1), |r| (r.len, r.page_size));
            let cheap = range.is_some_and(|r| r.cheap);
            let left = len.saturating_sub(self.done);
            // a multiple of the host page size, at least one host page
            let piece = (budget.piece() & !(page_size - 1)).max(page_size).min(left);

            budget.charge_range(piece, cheap);
            if piece > 0 {
                pieces.push(Piece {
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
        if !pieces.is_empty() {
            port.discard(elem, &pieces);
        }
        self.buffer >= buffers
    }
}
