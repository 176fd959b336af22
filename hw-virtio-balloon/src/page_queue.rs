// SPDX-License-Identifier: GPL-2.0-or-later

//! The inflate queue and the deflate queue (virtio 1.3, section 5.5.6)
//!
//! [`virtio_balloon_core::pages`] has the logic.

use bql::prelude::*;
use system::largest_page_size;
use virtio::prelude::*;
use virtio_balloon_core::{
    budget::Budget,
    counters::count,
    engine::{Event, Port},
    pages::{PagePort, PageWork, Pieces, Tally},
    runs::Runs,
    BALLOON_PAGE_SIZE,
};

use crate::{
    guest_memory::{is_discard_inhibited, Direction, DiscardBatch, Remember},
    part::{Context, Part, PartPort, Turns},
};

type InFlight = PageWork<VirtQueueElement>;

/// The part of the device that handles one of the two queues
pub struct PageQueue {
    direction: Direction,
    turns: Turns<InFlight>,
}

impl PageQueue {
    pub fn new(direction: Direction) -> Self {
        Self {
            direction,
            turns: Turns::default(),
        }
    }

    /// Whether elements are in flight because the host has no memory for them
    pub fn waits_for_memory(&self) -> bool {
        self.turns.is_blocked()
    }

    /// Whether the parts of a host page that go into the balloon are only
    /// remembered for the current element.  That is what C does, see
    /// `PartiallyBalloonedPage`.
    fn keeps_elements_apart(&self, cx: &Context<'_>) -> bool {
        self.direction == Direction::Inflate && !cx.completes_host_pages()
    }
}

impl Part for PageQueue {
    fn queue(&self) -> &BqlCell<Option<u16>> {
        self.turns.queue()
    }

    #[doc(alias = "virtio_balloon_handle_output")]
    fn handle(&self, cx: &Context<'_>, event: Event) {
        if let Some(port) = PartPort::new(self, &self.turns, cx) {
            port.turn(event);
        }
    }

    fn in_flight(&self, cx: &Context<'_>) -> usize {
        PartPort::new(self, &self.turns, cx).map_or(0, |port| port.in_flight())
    }

    fn drop_elements(&self, cx: &Context<'_>) {
        self.turns.drop_elements();
        if self.keeps_elements_apart(cx) {
            cx.memory.forget_parts();
        } else if self.direction == Direction::Inflate {
            cx.memory.forget_dropped();
        }
    }
}

impl PagePort for PartPort<'_, PageQueue, InFlight> {
    fn batch(&self) -> usize {
        let apart = match self.part.direction {
            Direction::Inflate => {
                self.part.keeps_elements_apart(self.cx) && largest_page_size() > BALLOON_PAGE_SIZE
            }
            // Otherwise, if the host has no memory for the pages of one
            // element, others that need less would wait, too.
            Direction::Deflate => self.cx.completes_host_pages(),
        };
        if apart {
            1
        } else {
            self.capacity()
        }
    }

    fn read_pfns(
        &self,
        elem: &VirtQueueElement,
        position: usize,
        max: usize,
        runs: &mut Runs,
    ) -> Option<usize> {
        let mut reader = elem.out_reader().skip(position);
        for _ in 0..max {
            runs.push(reader.read_u32()?);
        }
        (!reader.is_at_end()).then(|| reader.position())
    }

    fn discard(&self, pfns: usize, pieces: &mut Pieces<'_>, budget: &mut Budget) -> Option<Tally> {
        let remember = if self.cx.completes_host_pages() {
            Remember::Always
        } else {
            Remember::Element { pfns }
        };
        let mut batch = DiscardBatch::new(
            self.cx.memory,
            self.part.direction,
            is_discard_inhibited(),
            remember,
        );
        let mut tally = Tally::default();
        while let Some(run) = pieces.next(budget) {
            tally += batch.add(run, budget);
        }
        batch.flush().then_some(tally)
    }

    fn completed(&self, tally: Tally) {
        let memory = self.cx.memory;
        memory.count(|counters| {
            count(&mut counters.bad_pfns, tally.bad);
            match self.part.direction {
                Direction::Inflate => count(&mut counters.pages_inflated, tally.ram),
                Direction::Deflate => count(&mut counters.pages_deflated, tally.ram),
            }
        });
        memory.with_deflation(|deflation| match self.part.direction {
            Direction::Inflate => deflation.inflated(tally.ram),
            Direction::Deflate => deflation.deflated(tally.ram),
        });
    }

    fn ended(&self) {
        if self.part.keeps_elements_apart(self.cx) {
            self.cx.memory.forget_parts();
        }
    }
}
