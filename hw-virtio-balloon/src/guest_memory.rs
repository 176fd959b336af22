// SPDX-License-Identifier: GPL-2.0-or-later

//! Finding the memory that is behind guest-physical addresses, and giving it
//! back to the host

use std::io;

use ::migration::precopy::{migration_in_bg_snapshot, migration_in_incoming_postcopy};
use bql::prelude::*;
use common::{field, Field};
use system::{prelude::*, ram_block_discard_is_disabled};
use util::{log::Log, log_mask_ln, prelude::*};
use virtio_balloon_core::{
    budget::Budget,
    counters::{count, Counters},
    deflation::Deflation,
    host_pages::{First, HostPages},
    pages::Tally,
    runs::Run,
    spec::pfn_to_gpa,
    BALLOON_PAGE_SIZE,
};

use crate::trace::{
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

/// What C prints for an error of the operating system
fn describe(err: &io::Error) -> String {
    let text = err.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    text[..end].to_owned()
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

/// How long it is remembered which parts of a host page are in the balloon
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remember {
    /// While an element is worked on, which has so many PFNs, or more
    Element { pfns: usize },
    /// Until they leave the balloon
    Always,
}

/// What [`GuestMemory::repopulate`] has achieved
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repopulated {
    /// There is nothing left to do.
    All,
    /// The budget is spent.
    Some,
    /// The host has no memory.
    NoMemory,
}

/// What the device remembers about the guest's memory
#[derive(Default)]
pub struct GuestMemory {
    /// For blocks with host pages that are larger than balloon pages: what is
    /// in the balloon
    host_pages: BqlRefCell<Vec<(RamBlockId, HostPages)>>,
    /// What was in the balloon when the device was reset, and may be missing on the
    /// host since then
    lost: BqlRefCell<Vec<(RamBlockId, HostPages)>>,
    listener: MemoryListener,
    counters: BqlCell<Counters>,
    deflation: BqlCell<Deflation>,
}

impl GuestMemory {
    pub const LISTENER: Field<Self, MemoryListener> = field!(Self, listener);

    /// The device is unrealized.
    pub fn unrealize(&self) {
        self.listener.unregister();
        self.host_pages.borrow_mut().clear();
        self.lost.borrow_mut().clear();
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

    /// Change what is known of the size of the balloon.
    pub fn with_deflation<R>(&self, f: impl FnOnce(&mut Deflation) -> R) -> R {
        let mut deflation = self.deflation.get();
        let result = f(&mut deflation);
        self.deflation.set(deflation);
        result
    }

    /// Host pages that are partly in the balloon
    pub fn partial_host_pages(&self) -> u64 {
        let host_pages = self.host_pages.borrow();
        host_pages.iter().map(|(_, pages)| pages.partial()).sum()
    }

    /// The balloon is empty.
    pub fn reset(&self) {
        let known = std::mem::take(&mut *self.host_pages.borrow_mut());
        let lost = known.into_iter().filter(|(_, p)| p.discarded() > 0);
        self.lost.borrow_mut().extend(lost);
    }

    /// What is known of parts of host pages is not good for other elements.
    pub fn forget_parts(&self) {
        self.host_pages.borrow_mut().clear();
    }

    /// A part of a block is not mapped any more, at least not as it was.  If it
    /// comes back, it is not in the balloon; but what was discarded may still be
    /// missing on the host.
    pub fn unmapped(&self, block: RamBlockId, range: RAMBlockRange) {
        let mut all = self.host_pages.borrow_mut();
        if let Some((_, pages)) = all.iter_mut().find(|(id, _)| *id == block) {
            pages.remove(range.offset, range.length, |_, _| {});
        }
        all.retain(|(_, pages)| !pages.is_empty());
    }

    /// Pages at an offset of a block, in bytes, which are mapped at a
    /// guest-physical address, go into the balloon.  See [`HostPages::insert`].
    /// Only for blocks with host pages that are larger than balloon pages.
    fn insert(
        &self,
        block: &RamBlock<'_>,
        offset: u64,
        len: u64,
        gpa: u64,
        discard: impl FnMut(u64, u64) -> bool,
    ) {
        let page_size = block.page_size();
        let mut all = self.host_pages.borrow_mut();
        // Another block may have been where this one is now
        all.retain(|(id, pages)| *id != block.id() || pages.host_page_size() == page_size);
        if let Some((_, pages)) = all.iter_mut().find(|(id, _)| *id == block.id()) {
            pages.insert(offset, len, gpa, discard);
        } else if let Some(mut pages) = HostPages::new(page_size) {
            pages.insert(offset, len, gpa, discard);
            all.push((block.id(), pages));
        }
    }

    /// Call `f` with what is known about a block, if anything is.
    fn with_host_pages(&self, block: RamBlockId, f: impl FnOnce(&mut HostPages)) {
        let mut all = self.host_pages.borrow_mut();
        if let Some((_, pages)) = all.iter_mut().find(|(id, _)| *id == block) {
            f(pages);
        }
    }

    /// Have the host allocate a range of a block.  Returns false if it has no
    /// memory for that.
    fn populate(&self, block: &RamBlock<'_>, range: &RAMBlockRange) -> bool {
        let Err(err) = block.populate(range.offset, range.length) else {
            return true;
        };
        if err.kind() == io::ErrorKind::InvalidInput {
            warn_report_once!(
                "virtio-balloon: cannot allocate huge pages before the guest uses them, which \
                 needs Linux 5.14"
            );
            return true;
        }
        self.count(|c| count(&mut c.populate_errors, 1));
        warn_report_once!(
            "virtio-balloon: the host has no memory for pages that leave the balloon ({}): the \
             guest waits until there are huge pages",
            describe(&err)
        );
        false
    }

    /// Whether [`repopulate`](Self::repopulate) has to be called before the guest
    /// runs
    pub fn lacks_memory(&self) -> bool {
        !self.lost.borrow().is_empty()
    }

    /// Have the host allocate what was in the balloon before a reset.
    pub fn repopulate(&self, budget: &mut Budget) -> Repopulated {
        loop {
            let Some((id, size, first)) = self.first_lost() else {
                return Repopulated::All;
            };
            if budget.is_discard_spent() {
                return Repopulated::Some;
            }
            budget.charge_range(if first.discarded { size } else { 0 }, false);
            // It may be that it was unplugged since then
            let section = MemoryRegionSection::find(first.gpa, BALLOON_PAGE_SIZE);
            let found = section.as_ref().and_then(MemoryRegionSection::ram_block);
            if let Some((block, offset)) = found.filter(|_| first.discarded) {
                let range = RAMBlockRange {
                    offset: first.offset,
                    length: size,
                };
                if block.id() == id
                    && offset - offset % size == first.offset
                    && !self.populate(&block, &range)
                {
                    return Repopulated::NoMemory;
                }
            }
            if let Some((_, pages)) = self.lost.borrow_mut().last_mut() {
                pages.forget_first();
            }
        }
    }

    /// The next host page to repopulate, the size of it in bytes, and its block
    fn first_lost(&self) -> Option<(RamBlockId, u64, First)> {
        let mut lost = self.lost.borrow_mut();
        loop {
            let (id, pages) = lost.last()?;
            if let Some(first) = pages.first() {
                return Some((*id, pages.host_page_size(), first));
            }
            lost.pop();
        }
    }

    /// Discard parts of a block.  An error only means that the host does not
    /// get the memory.
    #[doc(alias = "balloon_inflate_page")]
    pub fn discard(&self, block: &RamBlock<'_>, ranges: &[RAMBlockRange]) {
        let bytes: u64 = ranges.iter().map(|range| range.length).sum();
        let result = block.discard_ranges(ranges);

        self.count(|c| {
            count(&mut c.discard_calls, 1);
            count(&mut c.discard_ranges, ranges.len() as u64);
            match &result {
                Ok(()) => count(&mut c.bytes_discarded, bytes),
                Err(err) => count(&mut c.discard_errors, err.failed as u64),
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
    remember: Remember,
    /// Owns a reference to the block
    section: Option<MemoryRegionSection>,
    /// To be discarded, or to be advised on
    ranges: Vec<RAMBlockRange>,
    /// To be populated
    lost: Vec<RAMBlockRange>,
    /// The host has no memory for some of what was to be populated.
    failed: bool,
}

impl<'a> DiscardBatch<'a> {
    pub const fn new(
        memory: &'a GuestMemory,
        direction: Direction,
        inhibited: bool,
        remember: Remember,
    ) -> Self {
        Self {
            memory,
            direction,
            inhibited,
            remember,
            section: None,
            ranges: Vec::new(),
            lost: Vec::new(),
            failed: false,
        }
    }

    /// Add pages, and charge the budget for the ranges of guest memory that they
    /// consist of.  Nothing may have happened to them before
    /// [`flush`](Self::flush).
    pub fn add(&mut self, run: Run, budget: &mut Budget) -> Tally {
        let end = pfn_to_gpa(run.last) + BALLOON_PAGE_SIZE;
        let mut gpa = pfn_to_gpa(run.first);
        let mut tally = Tally::default();

        while gpa < end {
            let Some(section) = MemoryRegionSection::find(gpa, end - gpa) else {
                tally += Self::skip(gpa, end);
                break;
            };
            // Only pages that are in the section as a whole
            let first = section.address().next_multiple_of(BALLOON_PAGE_SIZE);
            let section_end = section.address().saturating_add(section.size()).min(end);
            let last = section_end - section_end % BALLOON_PAGE_SIZE;
            let next = section_end.next_multiple_of(BALLOON_PAGE_SIZE);

            let region = section.region();
            if region.is_ram() && !region.is_rom() && !region.is_romd() && first < last {
                tally += Self::skip(gpa, first);
                tally += self.add_ram(section, first, last, budget);
                tally += Self::skip(last, next);
            } else {
                tally += Self::skip(gpa, next);
            }
            gpa = next.max(gpa + BALLOON_PAGE_SIZE);
        }
        tally
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
        let ranges = &mut self.ranges;

        match self.direction {
            Direction::Inflate => {
                let discarded = self.remember == Remember::Always && !self.inhibited;
                let pages = block.page_size() / BALLOON_PAGE_SIZE;
                let mut push = |offset, length| {
                    ranges.push(RAMBlockRange { offset, length });
                    budget.charge_range(length, cheap);
                    discarded
                };
                if pages <= 1 {
                    push(first, len);
                } else if let Remember::Element { pfns } = self.remember {
                    warn_report_once!(
                        "Balloon used with backing page size > 4kiB, this may not be reliable"
                    );
                    // There cannot be all of a host page in less.
                    if pfns as u64 >= pages {
                        self.memory.insert(&block, first, len, start, push);
                    }
                } else {
                    self.memory.insert(&block, first, len, start, push);
                }
            }
            Direction::Deflate => {
                let lost = &mut self.lost;
                self.memory.with_host_pages(block.id(), |known| {
                    known.remove(first, len, |offset, length| {
                        lost.push(RAMBlockRange { offset, length });
                        budget.charge_range(length, false);
                    });
                });
                // There is nothing to be read ahead for memory that was
                // discarded, unless it has a file behind it.
                if !block.is_private_anonymous() {
                    ranges.push(RAMBlockRange {
                        offset: first,
                        length: len,
                    });
                    budget.charge_advice(len);
                }
            }
        }
        self.section = Some(section);
        tally
    }

    /// Discard, or populate, what was added.  Returns false if the host has no
    /// memory for all of it at the moment.
    pub fn flush(&mut self) -> bool {
        let section = self.section.take();
        if let Some((block, _)) = section.as_ref().and_then(MemoryRegionSection::ram_block) {
            self.populate(&block);
            if !self.inhibited && !self.ranges.is_empty() {
                match self.direction {
                    Direction::Inflate => self.memory.discard(&block, &self.ranges),
                    Direction::Deflate => self.advise(&block),
                }
            }
        }
        self.ranges.clear();
        self.lost.clear();
        !self.failed
    }

    fn populate(&mut self, block: &RamBlock<'_>) {
        // Then all of the memory is there: it is pinned, or was touched before a
        // background snapshot, which would have to be waited for.
        if self.inhibited {
            return;
        }
        for range in &self.lost {
            if !self.memory.populate(block, range) {
                self.failed = true;
                return;
            }
            self.memory.with_host_pages(block.id(), |known| {
                known.populated(range.offset, range.length);
            });
        }
    }

    #[doc(alias = "balloon_deflate_page")]
    fn advise(&self, block: &RamBlock<'_>) {
        for range in &self.ranges {
            // The hint is for whole host pages, because there is nothing
            // smaller.
            if let Err(err) = block.advise_willneed(range.offset, range.length) {
                warn_report_once!(
                    "Couldn't MADV_WILLNEED on balloon deflate: {}",
                    describe(&err)
                );
            }
        }
    }
}
