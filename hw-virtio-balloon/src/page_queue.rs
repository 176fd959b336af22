// SPDX-License-Identifier: GPL-2.0-or-later

//! The inflate queue and the deflate queue (virtio 1.3, section 5.5.6)
//!
//! How elements are worked on is in [`virtio_balloon_core::page_work`].

use common::{field, Field};
use system::largest_page_size;
use util::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::{
    counters::count,
    engine::Queue,
    page_work::{PageHost, PageWork, Tally},
    runs::Runs,
    BALLOON_PAGE_SIZE,
};

use crate::{
    deferred::{self, Deferred, PartHost, QueuePart, WorksInTurns},
    guest_memory::{is_discard_inhibited, Direction, DiscardBatch, Remember},
    part::Context,
};

/// The part of the device for one of the two queues
pub struct PageQueue {
    direction: Direction,
    deferred: Deferred<PageWork<VirtQueueElement>>,
}

impl PageQueue {
    pub const BH: Field<Self, BottomHalf> = field!(Self, deferred).then(Deferred::BH);
    pub const RETRY: Field<Self, Timer> = field!(Self, deferred).then(Deferred::RETRY);

    pub fn new(direction: Direction) -> Self {
        Self {
            direction,
            deferred: Deferred::default(),
        }
    }

    /// The driver puts pages into the balloon, or takes them out of it.
    #[doc(alias = "virtio_balloon_handle_output")]
    pub fn run(&self, cx: &dyn Context) {
        deferred::run(self, cx);
    }

    /// Whether the driver waits for memory of the host
    pub fn waits_for_memory(&self) -> bool {
        self.deferred.is_blocked()
    }

    /// There may be memory now for pages that leave the balloon.
    pub fn retry(&self) {
        self.deferred.retry();
    }

    /// Whether it is only known for the current element which parts of a host page
    /// go into the balloon.  That is what C does, see `PartiallyBalloonedPage`.
    fn keeps_elements_apart(&self, cx: &dyn Context) -> bool {
        self.direction == Direction::Inflate && !cx.completes_host_pages()
    }
}

impl QueuePart for PageQueue {
    type Work = PageWork<VirtQueueElement>;

    fn deferred(&self) -> &Deferred<Self::Work> {
        &self.deferred
    }
}

impl PageHost for PartHost<'_, PageQueue> {
    type Sink<'a>
        = DiscardBatch<'a>
    where
        Self: 'a;

    fn sink(&self, pfns: usize) -> DiscardBatch<'_> {
        DiscardBatch::new(
            self.cx.memory(),
            self.part.direction,
            is_discard_inhibited(),
            if self.cx.completes_host_pages() {
                Remember::Always
            } else {
                Remember::Element { pfns }
            },
        )
    }

    fn batch(&self) -> usize {
        let apart = match self.part.direction {
            Direction::Inflate => {
                self.part.keeps_elements_apart(self.cx) && largest_page_size() > BALLOON_PAGE_SIZE
            }
            // None has to wait for the memory that another one needs.
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

    fn completed(&self, tally: Tally) {
        let memory = self.cx.memory();
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
            self.cx.memory().forget_parts();
        }
    }
}

impl WorksInTurns for PageQueue {}
