// SPDX-License-Identifier: GPL-2.0-or-later

//! Finding the memory that is behind guest-physical addresses, and giving it
//! back to the host

use ::migration::precopy::{migration_in_bg_snapshot, migration_in_incoming_postcopy};
use bql::prelude::*;
use common::{field, Field};
use system::{prelude::*, ram_block_discard_is_disabled};
use util::{log::Log, log_mask_ln, warn_report_once};
use virtio_balloon_core::{
    budget::Budget,
    counters::Counters,
    host_pages::HostPages,
    page_work::{PageSink, Tally},
    pages::pfn_to_gpa,
    runs::Run,
    BALLOON_PAGE_SIZE,
};

use crate::events::{
    trace_virtio_balloon_bad_addr, trace_virtio_balloon_bad_addr_enabled,
    trace_virtio_balloon_handle_output, trace_virtio_balloon_handle_output_enabled,
};

/// Whether discarding memory would do harm: if it is pinned, in postcopy, and
/// while a background snapshot is taken.
#[doc(alias = "virtio_balloon_inhibited")]
pub fn is_discard_inhibited() -> bool {
    ram_block_discard_is_disabled()
        || migration_in_incoming_postcopy()
        || migration_in_bg_snapshot()
}

/// Whether it does not take the host long to discard memory, see
/// [`Budget::charge_range`]
pub fn is_cheap_to_discard(block: &RamBlock<'_>) -> bool {
    block.is_private_anonymous() || block.page_size() > BALLOON_PAGE_SIZE
}

/// Which way pages go
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into the balloon
    Inflate,
    /// Out of the balloon
    Deflate,
}

/// What the device remembers about the guest's memory
#[derive(Default)]
pub struct GuestMemory {
    /// For blocks with host pages that are larger than balloon pages: what is
    /// in the balloon
    host_pages: BqlRefCell<Vec<(RamBlockId, HostPages)>>,
    notifier: RamBlockNotifier,
    counters: BqlCell<Counters>,
}

impl GuestMemory {
    pub const NOTIFIER: Field<Self, RamBlockNotifier> = field!(Self, notifier);

    /// The device is unrealized.
    pub fn unrealize(&self) {
        self.notifier.unregister();
        self.reset();
    }

    /// What the device has done so far
    pub fn counters(&self) -> Counters {
        self.counters.get()
    }

    /// Change the counters.
    pub fn count(&self, f: impl FnOnce(&mut Counters)) {
        let mut counters = self.counters.get();
        f(&mut counters);
        self.counters.set(counters);
    }

    /// Host pages that are partly in the balloon
    pub fn partial_host_pages(&self) -> u64 {
        let host_pages = self.host_pages.borrow();
        host_pages.iter().map(|(_, pages)| pages.partial()).sum()
    }

    /// The balloon is empty.
    pub fn reset(&self) {
        self.host_pages.borrow_mut().clear();
    }

    /// A block is about to be freed.
    pub fn forget(&self, block: RamBlockId) {
        self.host_pages.borrow_mut().retain(|(id, _)| *id != block);
    }

    /// Call `f` with what is known about a block.  Returns false if it
    /// consists of pages that can be discarded as they are.
    fn with_host_pages(&self, block: &RamBlock<'_>, f: impl FnOnce(&mut HostPages)) -> bool {
        let page_size = block.page_size();
        if page_size <= BALLOON_PAGE_SIZE {
            return false;
        }

        let mut all = self.host_pages.borrow_mut();
        let size = block.used_length();
        // The block may have been resized
        all.retain(|(id, pages)| *id != block.id() || pages.is_for(size, page_size));
        if let Some((_, pages)) = all.iter_mut().find(|(id, _)| *id == block.id()) {
            f(pages);
        // Without enough memory to remember pages, none is discarded
        } else if let Some(mut pages) = HostPages::new(size, page_size) {
            f(&mut pages);
            all.push((block.id(), pages));
        }
        true
    }

    /// Discard parts of a block.  An error only means that the host does not
    /// get the memory.
    #[doc(alias = "balloon_inflate_page")]
    pub fn discard(&self, block: &RamBlock<'_>, ranges: &[RAMBlockRange]) {
        let bytes: u64 = ranges.iter().map(|range| range.length).sum();
        let result = block.discard_ranges(ranges);

        self.count(|c| {
            c.discard_calls += 1;
            c.discard_ranges += ranges.len() as u64;
            match &result {
                Ok(()) => c.bytes_discarded += bytes,
                Err(err) => c.discard_errors += err.failed as u64,
            }
        });
        if let Err(err) = result {
            warn_report_once!("Couldn't discard memory of the balloon: {}", err.error);
        }
    }
}

/// Ranges of one block that are to be discarded, or (when they leave the
/// balloon) populated
pub struct DiscardBatch<'a> {
    memory: &'a GuestMemory,
    direction: Direction,
    /// Discarding would do harm at the moment
    inhibited: bool,
    /// Owns a reference to the block
    section: Option<MemoryRegionSection>,
    ranges: Vec<RAMBlockRange>,
}

impl<'a> DiscardBatch<'a> {
    pub const fn new(memory: &'a GuestMemory, direction: Direction, inhibited: bool) -> Self {
        Self {
            memory,
            direction,
            inhibited,
            section: None,
            ranges: Vec::new(),
        }
    }

    /// Pages that are not RAM, at guest-physical addresses in bytes
    fn skip(start: u64, end: u64) -> Tally {
        if start >= end {
            return Tally::default();
        }
        log_mask_ln!(
            Log::GuestError,
            "virtio-balloon: no RAM at {start:#x} to {:#x}",
            end - 1
        );
        if trace_virtio_balloon_bad_addr_enabled() {
            for gpa in (start..end).step_by(BALLOON_PAGE_SIZE as usize) {
                trace_virtio_balloon_bad_addr(gpa);
            }
        }
        Tally {
            ram: 0,
            bad: (end - start) / BALLOON_PAGE_SIZE,
        }
    }

    /// Pages of RAM, at guest-physical addresses in bytes
    fn add_ram(
        &mut self,
        section: MemoryRegionSection,
        start: u64,
        end: u64,
        budget: &mut Budget,
    ) -> Tally {
        if trace_virtio_balloon_handle_output_enabled() {
            let name = section.region().name();
            for gpa in (start..end).step_by(BALLOON_PAGE_SIZE as usize) {
                trace_virtio_balloon_handle_output(name, gpa);
            }
        }
        let len = end - start;
        let tally = Tally {
            ram: len / BALLOON_PAGE_SIZE,
            bad: 0,
        };

        let id = section.ram_block().map(|(block, _)| block.id());
        let current = self
            .section
            .as_ref()
            .and_then(MemoryRegionSection::ram_block);
        if current.map(|(block, _)| block.id()) != id {
            self.flush();
        }
        let Some((block, section_offset)) = section.ram_block() else {
            return tally;
        };
        let first = section_offset + (start - section.address());
        let cheap = is_cheap_to_discard(&block);
        let direction = self.direction;
        let ranges = &mut self.ranges;
        let mut push = |offset, length| {
            ranges.push(RAMBlockRange { offset, length });
            match direction {
                Direction::Inflate => budget.charge_range(length, cheap),
                // Advice takes the same time for ranges of any size.
                Direction::Deflate => budget.charge_range(0, true),
            }
        };

        match self.direction {
            Direction::Inflate => {
                let tracked = self
                    .memory
                    .with_host_pages(&block, |known| known.insert(first, len, &mut push));
                if !tracked {
                    push(first, len);
                }
            }
            Direction::Deflate => {
                self.memory
                    .with_host_pages(&block, |known| known.remove(first, len));
                // There is nothing to be read ahead for memory that was
                // discarded, unless it has a file behind it.
                if !block.is_private_anonymous() {
                    push(first, len);
                }
            }
        }
        self.section = Some(section);
        tally
    }

    #[doc(alias = "balloon_deflate_page")]
    fn populate(&self, block: &RamBlock<'_>) {
        for range in &self.ranges {
            // The hint is for whole host pages, because there is nothing
            // smaller.
            if let Err(err) = block.advise_willneed(range.offset, range.length) {
                warn_report_once!("Couldn't MADV_WILLNEED on balloon deflate: {err}");
            }
        }
    }
}

impl PageSink for DiscardBatch<'_> {
    fn add(&mut self, run: Run, budget: &mut Budget) -> Tally {
        let end = pfn_to_gpa(run.last) + BALLOON_PAGE_SIZE;
        let mut gpa = pfn_to_gpa(run.first);
        let mut tally = Tally::default();

        while gpa < end {
            let Some(section) = MemoryRegionSection::find(gpa, end - gpa) else {
                return tally + Self::skip(gpa, end);
            };
            // A page is only good if all of it is
            let first = section.address().next_multiple_of(BALLOON_PAGE_SIZE);
            let section_end = section.address().saturating_add(section.size()).min(end);
            let last = section_end - section_end % BALLOON_PAGE_SIZE;
            let next = section_end.next_multiple_of(BALLOON_PAGE_SIZE);

            let region = section.region();
            if region.is_ram() && !region.is_rom() && !region.is_romd() && first < last {
                tally = tally
                    + Self::skip(gpa, first)
                    + self.add_ram(section, first, last, budget)
                    + Self::skip(last, next);
            } else {
                tally = tally + Self::skip(gpa, next);
            }
            gpa = next.max(gpa + BALLOON_PAGE_SIZE);
        }
        tally
    }

    fn flush(&mut self) {
        let section = self.section.take();
        if let Some((block, _)) = section.as_ref().and_then(MemoryRegionSection::ram_block) {
            if !self.inhibited && !self.ranges.is_empty() {
                match self.direction {
                    Direction::Inflate => self.memory.discard(&block, &self.ranges),
                    Direction::Deflate => self.populate(&block),
                }
            }
        }
        self.ranges.clear();
    }
}
