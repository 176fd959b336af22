// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page reporting (virtio 1.3, section 5.5.6.7)
//!
//! [`virtio_balloon_core::reports`] has the logic.

use bql::prelude::*;
use system::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::{
    counters::count,
    engine::{Event, Port},
    reports::{Piece, ReportPort, ReportWork, ReportedRange},
};

use crate::{
    guest_memory::{is_cheap_to_discard, is_discard_inhibited},
    part::{Context, Part, PartPort, Turns},
    trace::trace_virtio_balloon_bad_addr,
};

type InFlight = ReportWork<VirtQueueElement>;

/// The part of the device that handles reports
#[derive(Default)]
pub struct Reporting {
    turns: Turns<InFlight>,
}

impl Part for Reporting {
    fn queue(&self) -> &BqlCell<Option<u16>> {
        self.turns.queue()
    }

    #[doc(alias = "virtio_balloon_handle_report")]
    fn handle(&self, cx: &Context<'_>, event: Event) {
        if let Some(port) = PartPort::new(self, &self.turns, cx) {
            port.turn(event);
        }
    }

    fn in_flight(&self, cx: &Context<'_>) -> usize {
        PartPort::new(self, &self.turns, cx).map_or(0, |port| port.in_flight())
    }

    fn drop_elements(&self, _cx: &Context<'_>) {
        self.turns.drop_elements();
    }
}

impl ReportPort for PartPort<'_, Reporting, InFlight> {
    fn may_discard(&self) -> bool {
        // A page that was discarded reads as zeroes when the guest uses it
        // again.  This would do harm if the page is pinned or needed for a
        // snapshot, or if the guest expects its poison value there.
        !is_discard_inhibited() && self.cx.poison_val.get() == 0
    }

    fn range(&self, elem: &VirtQueueElement, buffer: usize) -> Option<ReportedRange> {
        let buf = elem.in_buffer(buffer)?;
        // Anything but RAM was mapped through a bounce buffer, for which there
        // is no block.
        let Some((block, offset)) = RamBlock::from_host(&buf.range) else {
            trace_virtio_balloon_bad_addr(buf.addr);
            return None;
        };

        let len = buf.range.size() as u64;
        let page_size = block.page_size();
        let in_block = offset
            .checked_add(len)
            .is_some_and(|end| end <= block.used_length());
        // Ignore buffers that are not whole host pages, or that exceed the
        // block.
        (in_block && (offset | len) & (page_size - 1) == 0).then_some(ReportedRange {
            len,
            page_size,
            cheap: is_cheap_to_discard(&block),
        })
    }

    fn ignored(&self, buffers: usize) {
        let memory = self.cx.memory;
        memory.count(|c| count(&mut c.reports_ignored, buffers as u64));
    }

    fn discard(&self, elements: &[VirtQueueElement], pieces: &[Piece]) {
        let memory = self.cx.memory;
        // A range that does not fit into the budget is divided.
        let reports = pieces.iter().filter(|piece| piece.offset == 0).count();
        let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
        memory.count(|c| {
            count(&mut c.reports, reports as u64);
            count(&mut c.bytes_reported, bytes);
        });
        let mut current: Option<RamBlock<'_>> = None;
        let mut ranges = Vec::new();

        for piece in pieces {
            let elem = elements.get(piece.element);
            let buf = elem.and_then(|elem| elem.in_buffer(piece.buffer));
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
                offset: offset + piece.offset,
                length: piece.len,
            });
        }
        if let Some(block) = current {
            memory.discard(&block, &ranges);
        }
    }
}
