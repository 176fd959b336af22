// SPDX-License-Identifier: GPL-2.0-or-later

//! Finds the memory at guest-physical addresses, and gives it back to the host

use std::io;

use ::migration::precopy::{migration_in_bg_snapshot, migration_in_incoming_postcopy};
use bql::prelude::*;
use common::{field, Field};
use system::{prelude::*, ram_block_discard_is_disabled, PopulateError};
use util::{log::Log, log_mask_ln, prelude::*};
use virtio_balloon_core::{
    budget::Budget,
    counters::{count, Counters},
    deflation::Deflation,
    host_pages::{First, HostPages},
    pages::Tally,
    runs::Run,
    spec::pfn_to_gpa,
    status::Inhibitor,
    BALLOON_PAGE_SIZE,
};

use crate::trace::{
    trace_virtio_balloon_bad_addr, trace_virtio_balloon_bad_addr_enabled,
    trace_virtio_balloon_handle_output, trace_virtio_balloon_handle_output_enabled,
};

/// Whether discarding memory would do harm: while memory is pinned, in
/// postcopy, and while a background snapshot is taken
#[doc(alias = "virtio_balloon_inhibited")]
pub fn is_discard_inhibited() -> bool {
    !inhibitors().is_empty()
}

/// The reasons for which [`is_discard_inhibited`] is true
pub fn inhibitors() -> Vec<Inhibitor> {
    [
        (ram_block_discard_is_disabled(), Inhibitor::PinnedMemory),
        (
            migration_in_incoming_postcopy(),
            Inhibitor::IncomingPostcopy,
        ),
        (migration_in_bg_snapshot(), Inhibitor::BackgroundSnapshot),
    ]
    .into_iter()
    .filter_map(|(applies, inhibitor)| applies.then_some(inhibitor))
    .collect()
}

/// The text that C prints for an error of the operating system
fn describe(err: &io::Error) -> String {
    let text = err.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    text[..end].to_owned()
}

/// Whether the host can discard memory of this block quickly, see
/// [`Budget::charge_range`]
pub fn is_cheap_to_discard(block: &RamBlock<'_>) -> bool {
    block.is_private_anonymous() || block.page_size() > BALLOON_PAGE_SIZE
}

/// The direction in which pages move
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into the balloon
    Inflate,
    /// Out of the balloon
    Deflate,
}

/// How long the device remembers which parts of a host page are in the balloon
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remember {
    /// While it works on one element, which has no more than `pfns` PFNs
    Element { pfns: usize },
    /// Until the parts leave the balloon
    Always,
}

/// The result of [`GuestMemory::repopulate`]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repopulated {
    /// All pages have memory again.
    All,
    /// The budget is spent, and there are more pages.
    Some,
    /// The host has not enough memory at the moment.
    NoMemory,
}

/// What the device remembers of the guest's memory
#[derive(Default)]
pub struct GuestMemory {
    /// For blocks whose host pages are larger than balloon pages: which parts
    /// of them are in the balloon
    host_pages: BqlRefCell<Vec<(RamBlockId, HostPages)>>,
    /// The host pages that were in the balloon when the device was reset, and
    /// may not have been populated since then
    lost: BqlRefCell<Vec<(RamBlockId, HostPages)>>,
    /// The device was migrated, so it does not know which of the host pages in
    /// the balloon were discarded at the source.
    arrived: BqlCell<bool>,
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

    /// Access the count of pages in the balloon.
    pub fn with_deflation<R>(&self, f: impl FnOnce(&mut Deflation) -> R) -> R {
        let mut deflation = self.deflation.get();
        let result = f(&mut deflation);
        self.deflation.set(deflation);
        result
    }

    /// How many host pages are partly in the balloon
    pub fn partial_host_pages(&self) -> u64 {
        let host_pages = self.host_pages.borrow();
        host_pages.iter().map(|(_, pages)| pages.partial()).sum()
    }

    /// The device was migrated to this QEMU.
    pub fn arrive(&self) {
        self.arrived.set(true);
    }

    /// The device was reset, and the balloon is empty.
    pub fn reset(&self) {
        self.arrived.set(false);
        let known = std::mem::take(&mut *self.host_pages.borrow_mut());
        let lost = known.into_iter().filter(|(_, p)| p.discarded() > 0);
        self.lost.borrow_mut().extend(lost);
    }

    /// The work on an element has ended: what is remembered of parts of host
    /// pages does not apply to other elements.
    pub fn forget_parts(&self) {
        self.host_pages.borrow_mut().clear();
    }

    /// Elements of the queue for inflating are dropped: the driver may use their
    /// pages, but the parts of host pages that they had in common with others
    /// are not known.
    pub fn forget_dropped(&self) {
        for (_, pages) in self.host_pages.borrow_mut().iter_mut() {
            pages.forget_parts();
        }
    }

    /// A range of a block has been unmapped, or mapped differently.  If it is
    /// mapped again, it is not in the balloon; but what was discarded may still
    /// have to be populated.
    pub fn unmapped(&self, block: RamBlockId, range: RAMBlockRange) {
        let mut all = self.host_pages.borrow_mut();
        if let Some((_, pages)) = all.iter_mut().find(|(id, _)| *id == block) {
            pages.remove(range.offset, range.length, |_, _| {});
        }
        all.retain(|(_, pages)| !pages.is_empty());
    }

    /// Balloon pages at an offset of a block, in bytes, which are mapped at
    /// guest-physical address `gpa`, go into the balloon, see
    /// [`HostPages::insert`].  The host pages of the block must be larger than
    /// balloon pages.
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
        if let Some((_, pages)) = all
            .iter_mut()
            .find(|(id, pages)| *id == block.id() && pages.host_page_size() == page_size)
        {
            pages.insert(offset, len, gpa, discard);
        } else if let Some(mut pages) = HostPages::new(page_size) {
            // A block that was unplugged may have had the same ID, and another
            // page size.
            all.retain(|(id, _)| *id != block.id());
            pages.insert(offset, len, gpa, discard);
            all.push((block.id(), pages));
        }
    }

    /// Call `f` with what is remembered of a block, if there is anything.
    fn with_host_pages(&self, block: RamBlockId, f: impl FnOnce(&mut HostPages)) {
        let mut all = self.host_pages.borrow_mut();
        if let Some((_, pages)) = all.iter_mut().find(|(id, _)| *id == block) {
            f(pages);
        }
    }

    /// Have the host allocate a range of a block.  Returns false if it does not
    /// have enough memory for that.
    fn populate(&self, block: &RamBlock<'_>, range: &RAMBlockRange) -> bool {
        let err = match block.populate(range.offset, range.length) {
            Ok(()) => return true,
            Err(PopulateError::NoMemory(err)) => err,
            // It would fail again, so the guest should not wait.
            Err(PopulateError::Other(err)) if err.kind() == io::ErrorKind::InvalidInput => {
                warn_report_once!(
                    "virtio-balloon: cannot allocate huge pages before the guest uses them, which \
                     needs Linux 5.14"
                );
                return true;
            }
            Err(PopulateError::Other(err)) => {
                warn_report_once!(
                    "virtio-balloon: cannot allocate huge pages before the guest uses them: {}",
                    describe(&err)
                );
                return true;
            }
        };
        self.count(|c| count(&mut c.populate_errors, 1));
        warn_report_once!(
            "virtio-balloon: the host has no memory for pages that leave the balloon ({}): the \
             guest waits until there are huge pages",
            describe(&err)
        );
        false
    }

    /// Whether [`repopulate`](Self::repopulate) has to be called before the
    /// guest runs
    pub fn lacks_memory(&self) -> bool {
        !self.lost.borrow().is_empty()
    }

    /// Have the host allocate the host pages that were discarded before a
    /// reset.
    pub fn repopulate(&self, budget: &mut Budget) -> Repopulated {
        loop {
            let Some((id, size, first)) = self.first_lost() else {
                return Repopulated::All;
            };
            if budget.is_discard_spent() {
                return Repopulated::Some;
            }
            budget.charge_range(if first.discarded { size } else { 0 }, false);
            // The memory may have been unplugged after the reset.
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

    /// The next host page to repopulate: its block, its size in bytes, and the
    /// page
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

    /// Discard ranges of a block.  After an error, the guest keeps the memory,
    /// so the caller has nothing to do.
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

/// Collects ranges of one section of guest memory, which are then discarded or,
/// when they leave the balloon, populated
pub struct DiscardBatch<'a> {
    memory: &'a GuestMemory,
    direction: Direction,
    /// See [`is_discard_inhibited`]
    inhibited: bool,
    remember: Remember,
    /// The section that was looked up last, with the ranges; holds a reference
    /// to the block
    section: Option<MemoryRegionSection>,
    /// Whether the section is RAM that the guest can write to
    is_ram: bool,
    /// The size of its host pages, in bytes, see [`RamBlock::page_size`]
    page_size: u64,
    /// See [`is_cheap_to_discard`]
    cheap: bool,
    /// Ranges to discard or to populate
    ranges: Vec<RAMBlockRange>,
    /// The host did not have enough memory for some of the ranges to populate.
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
            is_ram: false,
            page_size: BALLOON_PAGE_SIZE,
            cheap: false,
            ranges: Vec::new(),
            failed: false,
        }
    }

    /// Add pages, and charge the budget for the ranges of guest memory that
    /// they consist of.  Discarding or populating them may be delayed until
    /// [`flush`](Self::flush).
    pub fn add(&mut self, run: Run, budget: &mut Budget) -> Tally {
        let end = pfn_to_gpa(run.last) + BALLOON_PAGE_SIZE;
        let mut gpa = pfn_to_gpa(run.first);
        let mut tally = Tally::default();

        while gpa < end {
            let is_in =
                |s: &MemoryRegionSection| gpa >= s.address() && gpa - s.address() < s.size();
            if !self.section.as_ref().is_some_and(is_in) {
                self.flush();
                self.find(gpa);
            }
            let Some(section) = &self.section else {
                tally += Self::skip(gpa, end);
                break;
            };
            // Only pages that are completely in the section
            let start = section.address().clamp(gpa, end);
            let first = start.next_multiple_of(BALLOON_PAGE_SIZE);
            let section_end = section.address().saturating_add(section.size()).min(end);
            let last = section_end - section_end % BALLOON_PAGE_SIZE;
            let next = section_end.next_multiple_of(BALLOON_PAGE_SIZE);

            if self.is_ram && first < last {
                tally += Self::skip(gpa, first);
                tally += self.add_ram(first, last, budget);
                tally += Self::skip(last, next);
            } else {
                tally += Self::skip(gpa, next);
            }
            gpa = next.max(gpa + BALLOON_PAGE_SIZE);
        }
        tally
    }

    /// Look up the section at a guest-physical address, in bytes.
    fn find(&mut self, gpa: u64) {
        // Up to the end of the region, as the next run is probably in it, too
        self.section = MemoryRegionSection::find(gpa, u64::MAX - gpa);
        let Some(section) = &self.section else {
            return;
        };
        let region = section.region();
        self.is_ram = region.is_ram() && !region.is_rom() && !region.is_romd();
        if let Some((block, _)) = section.ram_block() {
            self.page_size = block.page_size();
            self.cheap = is_cheap_to_discard(&block);
        }
    }

    /// Guest-physical addresses, in bytes, at which there is no RAM
    #[inline]
    fn skip(start: u64, end: u64) -> Tally {
        if start >= end {
            return Tally::default();
        }
        Self::bad(start, end)
    }

    #[cold]
    fn bad(start: u64, end: u64) -> Tally {
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

    /// Guest-physical addresses, in bytes, of pages of RAM that are in the
    /// section
    fn add_ram(&mut self, start: u64, end: u64, budget: &mut Budget) -> Tally {
        let len = end - start;
        let tally = Tally {
            ram: len / BALLOON_PAGE_SIZE,
            bad: 0,
        };
        let Some(section) = &self.section else {
            return tally;
        };
        if trace_virtio_balloon_handle_output_enabled() {
            let name = section.region().name();
            for gpa in (start..end).step_by(BALLOON_PAGE_SIZE as usize) {
                trace_virtio_balloon_handle_output(name, gpa);
            }
        }
        let Some((block, section_offset)) = section.ram_block() else {
            return tally;
        };
        let first = section_offset + (start - section.address());
        let (ranges, cheap) = (&mut self.ranges, self.cheap);
        let pages = self.page_size / BALLOON_PAGE_SIZE;

        match self.direction {
            Direction::Inflate => {
                let discarded = self.remember == Remember::Always && !self.inhibited;
                let mut push = |offset, length| {
                    ranges.push(RAMBlockRange { offset, length });
                    budget.charge_range(length, cheap);
                    discarded
                };
                if pages <= 1 {
                    push(first, len);
                } else {
                    let can_complete = match self.remember {
                        Remember::Always => true,
                        Remember::Element { pfns } => {
                            warn_report_once!(
                                "Balloon used with backing page size > 4kiB, this may not be \
                                 reliable"
                            );
                            // An element with fewer PFNs cannot contain a whole
                            // host page.
                            pfns as u64 >= pages
                        }
                    };
                    if can_complete {
                        self.memory.insert(&block, first, len, start, push);
                    }
                }
            }
            // What was discarded is a hole, in which the host has nothing to read
            // ahead.  So unlike C, do not advise it of MADV_WILLNEED.
            Direction::Deflate if pages <= 1 => {}
            Direction::Deflate => {
                let mut push = |offset, length| {
                    ranges.push(RAMBlockRange { offset, length });
                    budget.charge_range(length, false);
                };
                self.memory
                    .with_host_pages(block.id(), |known| known.remove(first, len, &mut push));
                if self.memory.arrived.get() && self.remember == Remember::Always {
                    push(first, len);
                }
            }
        }
        tally
    }

    /// Discard or populate what was added.  Returns false if the host does not
    /// have enough memory for all of it at the moment.
    pub fn flush(&mut self) -> bool {
        let section = self.section.take();
        let ranges = std::mem::take(&mut self.ranges);
        if let Some((block, _)) = section.as_ref().and_then(MemoryRegionSection::ram_block) {
            // While discarding is inhibited, all memory that leaves the balloon is
            // populated: pinning it has populated it, and so has the preparation of
            // a background snapshot.  During a snapshot the memory is
            // write-protected, and populating it would wait for the snapshot.
            if !self.inhibited && !ranges.is_empty() {
                match self.direction {
                    Direction::Inflate => self.memory.discard(&block, &ranges),
                    Direction::Deflate => self.populate(&block, &ranges),
                }
            }
        }
        !self.failed
    }

    #[doc(alias = "balloon_deflate_page")]
    fn populate(&mut self, block: &RamBlock<'_>, ranges: &[RAMBlockRange]) {
        for range in ranges {
            if !self.memory.populate(block, range) {
                self.failed = true;
                return;
            }
            self.memory.with_host_pages(block.id(), |known| {
                known.populated(range.offset, range.length);
            });
        }
    }
}
