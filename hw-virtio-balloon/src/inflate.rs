// SPDX-License-Identifier: GPL-2.0-or-later

//! Pages that go into the balloon, and that leave it

use std::sync::Once;

use balloon_core::{
    pages::{pfn_to_gpa, PartialHostPage},
    BALLOON_PAGE_SIZE,
};
use system::{MemoryRegionSection, RamBlock, RamBlockId};
use util::report::warn_report;
use virtio::{
    events::{trace_virtio_balloon_bad_addr, trace_virtio_balloon_handle_output},
    VirtQueue, VirtQueueElement,
};

use crate::device::VirtIOBalloon;

/// Report a problem that the guest can cause as often as it likes.
macro_rules! warn_once {
    ($($args:tt)*) => {{
        static ONCE: Once = Once::new();
        ONCE.call_once(|| warn_report(format!($($args)*)));
    }};
}

impl VirtIOBalloon {
    /// The driver puts pages into the balloon.
    pub fn handle_inflate(&self, vq: VirtQueue<'_>) {
        while let Some(elem) = vq.pop() {
            let mut partial = PartialHostPage::default();
            for_each_page(&elem, |block, offset| {
                inflate_page(block, offset, &mut partial);
            });
            elem.push(0);
            vq.notify();
        }
    }

    /// The driver takes pages out of the balloon.
    pub fn handle_deflate(&self, vq: VirtQueue<'_>) {
        while let Some(elem) = vq.pop() {
            for_each_page(&elem, deflate_page);
            elem.push(0);
            vq.notify();
        }
    }
}

/// Look up all PFNs in an element, and call `f` for those that are RAM, unless
/// discarding is inhibited.  Other PFNs are ignored.
fn for_each_page(elem: &VirtQueueElement, mut f: impl FnMut(&RamBlock<'_>, u64)) {
    let inhibited = VirtIOBalloon::discard_inhibited();
    let mut pfns = elem.out_reader();

    while let Some(pfn) = pfns.read_u32() {
        let gpa = pfn_to_gpa(pfn);
        let Some(section) = find_ram_page(gpa) else {
            trace_virtio_balloon_bad_addr(gpa);
            continue;
        };

        trace_virtio_balloon_handle_output(section.region().name(), gpa);
        if inhibited {
            continue;
        }
        if let Some((block, offset)) = section.ram_block() {
            f(&block, offset);
        }
    }
}

/// Find a page of the guest's memory that is RAM, and nothing but RAM.
fn find_ram_page(gpa: u64) -> Option<MemoryRegionSection> {
    let section = MemoryRegionSection::find(gpa, BALLOON_PAGE_SIZE)?;
    let region = section.region();
    let usable = region.is_ram()
        && !region.is_rom()
        && !region.is_romd()
        && section.size() == BALLOON_PAGE_SIZE;

    usable.then_some(section)
}

fn inflate_page(block: &RamBlock<'_>, offset: u64, partial: &mut PartialHostPage<RamBlockId>) {
    let host_page_size = block.page_size();

    let page = if host_page_size == BALLOON_PAGE_SIZE {
        Some(offset)
    } else {
        // The piece of the host page cannot be discarded alone: wait until all
        // of the host page is in the balloon.
        warn_once!("Balloon used with backing page size > 4kiB, this may not be reliable");
        partial.add(block.id(), offset, host_page_size)
    };

    if let Some(page) = page {
        // An error was reported already.  It is not fatal: it just means that
        // the host does not get the memory.
        let _ = block.discard_range(page, host_page_size);
    }
}

fn deflate_page(block: &RamBlock<'_>, offset: u64) {
    // The hint is for the whole host page, because there is nothing smaller.
    if let Err(err) = block.advise_willneed(offset, BALLOON_PAGE_SIZE) {
        warn_once!("Couldn't MADV_WILLNEED on balloon deflate: {err}");
    }
}
