// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page reporting (virtio 1.3, section 5.5.6.7)
//!
//! How elements are worked on is in [`virtio_balloon_core::report_work`].

use common::{field, Field};
use system::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::report_work::{self, ReportHost, ReportWork, ReportedRange};

use crate::{
    deferred::{self, Deferred, PartHost, QueuePart, WorksInTurns},
    events::trace_virtio_balloon_bad_addr,
    guest_memory::{is_cheap_to_discard, is_discard_inhibited},
    part::Context,
};

/// The part of the device for reports
#[derive(Default)]
pub struct Reporting {
    deferred: Deferred<ReportWork<VirtQueueElement>>,
}

impl Reporting {
    pub const BH: Field<Self, BottomHalf> = field!(Self, deferred).then(Deferred::BH);

    /// The driver reports pages that are free at the moment.
    #[doc(alias = "virtio_balloon_handle_report")]
    pub fn run(&self, cx: &dyn Context) {
        deferred::run(self, cx);
    }
}

impl QueuePart for Reporting {
    type Work = ReportWork<VirtQueueElement>;

    fn deferred(&self) -> &Deferred<Self::Work> {
        &self.deferred
    }
}

impl ReportHost for PartHost<'_, Reporting> {
    fn may_discard(&self) -> bool {
        // A page that is discarded reads as zeroes when the guest uses it again.
        // That is no good if somebody else is still using it, or if the guest
        // expects to find its poison there.
        !is_discard_inhibited() && self.cx.poison_val() == 0
    }

    fn range(&self, elem: &VirtQueueElement, buffer: usize) -> Option<ReportedRange> {
        let buf = elem.in_buffer(buffer)?;
        // Anything but RAM was mapped through a bounce buffer, and fails the
        // lookup.
        let Some((block, offset)) = RamBlock::from_host(&buf.range) else {
            trace_virtio_balloon_bad_addr(buf.addr);
            return None;
        };

        let len = buf.range.size() as u64;
        let page_size = block.page_size();
        let in_block = offset
            .checked_add(len)
            .is_some_and(|end| end <= block.used_length());
        // Ignore parts of host pages, and what exceeds the block.
        (in_block && (offset | len) & (page_size - 1) == 0).then_some(ReportedRange {
            len,
            page_size,
            cheap: is_cheap_to_discard(&block),
        })
    }

    fn discard(&self, elem: &VirtQueueElement, parts: &[report_work::Part]) {
        let memory = self.cx.memory();
        let mut current: Option<RamBlock<'_>> = None;
        let mut ranges = Vec::new();

        for part in parts {
            let buf = elem.in_buffer(part.buffer);
            let Some((block, offset)) = buf.and_then(|buf| RamBlock::from_host(&buf.range)) else {
                continue;
            };
            if let Some(previous) = current.replace(block) {
                if previous.id() != block.id() {
                    memory.discard(&previous, &ranges);
                    ranges.clear();
                }
            }
            ranges.push(RAMBlockRange {
                offset: offset + part.offset,
                length: part.len,
            });
        }
        if let Some(block) = current {
            memory.discard(&block, &ranges);
        }
    }
}

impl WorksInTurns for Reporting {}
