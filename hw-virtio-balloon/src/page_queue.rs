// SPDX-License-Identifier: GPL-2.0-or-later

//! The inflate queue and the deflate queue (virtio 1.3, section 5.5.6)
//!
//! How elements are worked on is in [`virtio_balloon_core::page_work`].

use common::{field, Field};
use virtio::prelude::*;
use virtio_balloon_core::{
    page_work::{PageHost, PageWork, Tally},
    runs::Runs,
};

use crate::{
    deferred::{self, Deferred, PartHost, QueuePart, WorksInTurns},
    guest_memory::{is_discard_inhibited, Direction, DiscardBatch},
    part::Context,
};

/// The part of the device for one of the two queues
pub struct PageQueue {
    direction: Direction,
    deferred: Deferred<PageWork<VirtQueueElement>>,
}

impl PageQueue {
    pub const BH: Field<Self, BottomHalf> = field!(Self, deferred).then(Deferred::BH);

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

    fn sink(&self) -> DiscardBatch<'_> {
        DiscardBatch::new(
            self.cx.memory(),
            self.part.direction,
            is_discard_inhibited(),
        )
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
        let asked = self.cx.wants_deflation();
        self.cx.memory().count(|counters| {
            counters.bad_pfns += tally.bad;
            match self.part.direction {
                Direction::Inflate => counters.pages_inflated += tally.ram,
                Direction::Deflate => {
                    counters.pages_deflated += tally.ram;
                    if !asked {
                        counters.pages_deflated_unasked += tally.ram;
                    }
                }
            }
        });
    }
}

impl WorksInTurns for PageQueue {}
