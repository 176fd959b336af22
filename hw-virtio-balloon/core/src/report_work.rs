// SPDX-License-Identifier: GPL-2.0-or-later

//! Pages that the driver reports to be free
//!
//! Unlike in the page queues, an element can consist of memory of any size; so
//! it is returned as soon as it is done, before the next one is looked at.

use crate::{
    budget::Budget,
    engine::{Host, Phase, Progress, Queue, Turn, Work},
};

/// Discards what is reported
pub trait ReportSink<E> {
    /// What can be discarded of a buffer; `None` if it is not the start of whole
    /// host pages of RAM.
    fn range(&mut self, elem: &E, buffer: usize) -> Option<ReportedRange>;

    /// Add a part of a buffer for which there is a [`range`](Self::range).
    /// `offset` and `len` are in bytes, and multiples of the host page size.
    /// Nothing may have happened to it before [`flush`](Self::flush).
    fn add(&mut self, elem: &E, buffer: usize, offset: u64, len: u64);

    /// Discard what was added.
    fn flush(&mut self);
}

/// See [`ReportSink::range`]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportedRange {
    /// Size of the buffer in bytes
    pub len: u64,
    /// Size in bytes of the host pages; a power of two
    pub page_size: u64,
}

/// The queue for reports
pub trait ReportQueue: Queue {
    /// See [`ReportSink`]
    type Sink<'a>: ReportSink<Self::Element>
    where
        Self: 'a;

    /// Begin to discard reported pages.  `None` if they must not be discarded at
    /// the moment.
    fn sink(&self) -> Option<Self::Sink<'_>>;
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

impl<E> ReportWork<E> {
    /// Discard buffers, as far as the budget allows.  Returns whether all are
    /// done.
    fn discard<Q>(&mut self, host: &Q, budget: &mut Budget) -> bool
    where
        Q: ReportQueue<Element = E>,
    {
        let (Some(elem), Some(mut sink)) = (&self.current, host.sink()) else {
            return true;
        };
        let buffers = host.buffers(elem);

        while self.buffer < buffers && !budget.is_discard_spent() {
            let range = sink.range(elem, self.buffer);
            let (len, page_size) = range.map_or((0, 1), |r| (r.len, r.page_size));
            let left = len.saturating_sub(self.done);
            // of whole host pages, at least one
            let part = (budget.bytes & !(page_size - 1)).max(page_size).min(left);

            budget.charge_range(part);
            if part > 0 {
                sink.add(elem, self.buffer, self.done, part);
            }
            if part == left {
                self.buffer += 1;
                self.done = 0;
            } else {
                self.done += part;
            }
        }
        sink.flush();
        self.buffer >= buffers
    }
}

impl<E, H> Work<H> for ReportWork<E>
where
    H: ReportQueue<Element = E> + Host<Work = Self>,
{
    fn is_empty(&self) -> bool {
        self.current.is_none()
    }

    fn step(&mut self, host: &H, turn: Turn, budget: &mut Budget, phase: Phase) -> Progress {
        if self.current.is_none() && phase == Phase::Collect {
            self.current = host.pop();
            if let Some(elem) = &self.current {
                budget.charge_element(host.buffers(elem));
            }
        }
        if self.current.is_none() {
            return Progress::Idle;
        }
        // Reports are only hints, so when the VM is stopped forget the rest.
        let done = turn.is_current(host) && (phase == Phase::Finish || self.discard(host, budget));
        if done && turn.is_current(host) {
            if let Some(elem) = std::mem::take(self).current {
                host.push(elem);
                if turn.is_current(host) {
                    host.notify();
                }
            }
        }
        Progress::More
    }

    fn put_back(&mut self, host: &H) {
        if let Some(elem) = std::mem::take(self).current {
            host.unpop(elem);
        }
    }
}
