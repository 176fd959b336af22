// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page reporting (virtio 1.3, section 5.5.6.8)

use std::time::Instant;

use bql::prelude::*;
use common::field;
use system::prelude::*;
use virtio::prelude::*;

use crate::{
    device::VirtIOBalloon,
    discard::{BUDGET, MAX_BYTES},
    events::trace_virtio_balloon_bad_addr,
};

/// The work that was not finished when the time was up
#[derive(Default)]
pub struct ReportQueue {
    /// Index of the queue, if there is one
    index: BqlCell<Option<u16>>,
    current: BqlRefCell<Option<Report>>,
    /// There are elements that nobody will tell the device about (again)
    pending: BqlCell<bool>,
    bh: BottomHalf,
}

struct Report {
    elem: VirtQueueElement,
    /// The next buffer of the element
    buffer: usize,
    /// The bytes of the buffer that are done
    done: u64,
}

impl ReportQueue {
    fn take(&self) -> Option<Report> {
        self.current.borrow_mut().take()
    }
}

impl VirtIOBalloon {
    /// The device is realized; the queue for reports is the last one.
    pub fn start_reports(&self, queue: u16) {
        self.reports.index.set(Some(queue));
        BottomHalf::init(
            self,
            field!(Self, reports.bh),
            c"virtio-balloon-reports",
            Self::continue_reports,
        );
    }

    /// The device is unrealized.
    pub fn stop_reports(&self) {
        self.reports.bh.delete();
        drop(self.reports.take());
        self.reports.index.set(None);
    }

    /// The device is reset.
    pub fn reset_reports(&self) {
        self.reports.pending.set(false);
        self.reports.bh.cancel();
        drop(self.reports.take());
    }

    /// The driver resets a queue.
    pub fn reset_report_queue(&self, queue: u32) {
        if self.reports.index.get().map(u32::from) == Some(queue) {
            self.reset_reports();
        }
    }

    /// The VM was stopped: nothing may be in flight.  Reports are only hints, so
    /// forget what is left of the current one.
    pub fn suspend_reports(&self) {
        self.reports.bh.cancel();
        let report = self.reports.take();
        if let (Some(report), Some(vq)) = (report, self.report_vq()) {
            report.elem.push(0);
            vq.notify();
        }
    }

    /// The VM is running (again).
    pub fn resume_reports(&self) {
        if self.reports.pending.get() {
            self.reports.bh.schedule();
        }
    }

    /// The VM has come from another QEMU, which may have left something in the
    /// queue.
    pub fn expect_reports(&self) {
        self.reports.pending.set(true);
    }

    fn report_vq(&self) -> Option<VirtQueue<'_>> {
        self.queue(self.reports.index.get()?)
    }

    fn continue_reports(&self) {
        if let Some(vq) = self.report_vq() {
            self.handle_reports(vq);
        }
    }

    /// The driver reports pages that are free at the moment.
    pub fn handle_reports(&self, vq: VirtQueue<'_>) {
        let deadline = Instant::now() + BUDGET;
        self.reports.pending.set(true);
        loop {
            let report = self.reports.take().or_else(|| {
                vq.pop().map(|elem| Report {
                    elem,
                    buffer: 0,
                    done: 0,
                })
            });
            let Some(mut report) = report else {
                self.reports.pending.set(false);
                return;
            };

            // A page that is discarded reads as zeroes when the guest uses it
            // again.  That is no good if somebody else is still using it, or
            // if the guest expects to find its poison there.
            let discard = !Self::discard_inhibited() && self.poison_val.get() == 0;
            if !discard || self.discard_report(&mut report, deadline) {
                report.elem.push(0);
                vq.notify();
            } else {
                // Not dropped while the cell is borrowed
                let old = self.reports.current.borrow_mut().replace(report);
                drop(old);
            }
            if Instant::now() >= deadline {
                if self.vm_running() {
                    self.reports.bh.schedule();
                } else {
                    self.suspend_reports();
                }
                return;
            }
        }
    }

    /// Returns false if there was not enough time.
    fn discard_report(&self, report: &mut Report, deadline: Instant) -> bool {
        for buf in report.elem.in_buffers().skip(report.buffer) {
            if let Some((block, offset, len)) = reported_range(&buf) {
                // of a multiple of the host page size, as both are powers of two
                let step = MAX_BYTES.max(block.page_size());
                while report.done < len {
                    if Instant::now() >= deadline {
                        return false;
                    }
                    let range = RAMBlockRange {
                        offset: offset + report.done,
                        length: step.min(len - report.done),
                    };
                    self.memory.discard(&block, &[range]);
                    report.done += range.length;
                }
            }
            report.buffer += 1;
            report.done = 0;
        }
        true
    }
}

/// What can be discarded of a buffer: all or nothing.  The offset in the block
/// and the length are in bytes.
fn reported_range<'a>(buf: &InBuffer<'a>) -> Option<(RamBlock<'a>, u64, u64)> {
    // Anything but RAM was mapped through a bounce buffer, and fails the lookup.
    let Some((block, offset)) = RamBlock::from_host(&buf.range) else {
        trace_virtio_balloon_bad_addr(buf.addr);
        return None;
    };

    let len = buf.range.size() as u64;
    let in_block = offset
        .checked_add(len)
        .is_some_and(|end| end <= block.used_length());
    // Ignore parts of host pages, and what exceeds the block.
    (in_block && (offset | len) & (block.page_size() - 1) == 0).then_some((block, offset, len))
}
