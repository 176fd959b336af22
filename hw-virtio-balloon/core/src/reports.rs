// SPDX-License-Identifier: GPL-2.0-or-later

//! Pages that the driver reports to be free
//!
//! Unlike in the page queues, an element can consist of memory of any size; so
//! it is returned as soon as it is done, before the next one is looked at.

use crate::{
    budget::Budget,
    engine::{Phase, Port, Progress, Work},
};

/// What can be discarded of a buffer: all or nothing
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportedRange {
    /// Size of the buffer in bytes; a multiple of `page_size`
    pub len: u64,
    /// Size in bytes of the host pages; a power of two
    pub page_size: u64,
    /// Whether it is cheap to discard, see [`Budget::charge_range`]
    pub cheap: bool,
}

/// A piece of a buffer for which there is a [`ReportedRange`]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which buffer of the element
    pub buffer: usize,
    /// In bytes, from the start of the buffer
    pub offset: u64,
    /// In bytes
    pub len: u64,
}

/// The queue for reports
pub trait ReportPort: Port {
    /// Whether reported pages may be discarded at the moment
    fn may_discard(&self) -> bool;

    /// What can be discarded of a buffer; `None` if it does not consist of whole
    /// host pages of RAM.
    fn range(&self, elem: &Self::Element, buffer: usize) -> Option<ReportedRange>;

    /// Discard pieces of buffers, of which offsets and lengths are multiples of
    /// the host page size.
    fn discard(&self, elem: &Self::Element, pieces: &[Piece]);
}

/// The element that is being worked on
#[derive(Debug)]
pub struct ReportWork<E> {
    current: Option<E>,
    /// The next buffer of the element
    buffer: usize,
    /// The bytes of that buffer that are done
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
        // Reports are only hints, so when the VM is stopped forget the rest.
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
    /// Discard buffers, as far as the budget allows.  Returns whether all are
    /// done.
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
            // of whole host pages, at least one
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
