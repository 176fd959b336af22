// SPDX-License-Identifier: GPL-2.0-or-later

//! Finding the memory that is behind guest-physical addresses, and giving it
//! back to the host

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bql::prelude::*;
use system::prelude::*;
use util::warn_report_once;
use virtio_balloon_core::{counters::Counters, host_pages::HostPages, BALLOON_PAGE_SIZE};

use crate::events::{
    trace_virtio_balloon_bad_addr, trace_virtio_balloon_bad_addr_enabled,
    trace_virtio_balloon_handle_output, trace_virtio_balloon_handle_output_enabled,
};

/// The most ranges that are discarded at once.  Linux takes 1024, and single
/// pages are so much more expensive than ranges that it would be too long
/// until the next look at the clock if there were more.
const MAX_RANGES: usize = 1024;

/// How long to work before others have their turn
pub const BUDGET: Duration = Duration::from_millis(2);

/// The most memory that is discarded at once, in bytes, unless a host page is
/// larger; this takes 1 to 3 ms.
pub const MAX_BYTES: u64 = 16 << 20;

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
pub struct Memory {
    /// For blocks with host pages that are larger than balloon pages: what is
    /// in the balloon.  Not protected by the BQL, because blocks can be freed
    /// without it.
    host_pages: Mutex<Vec<(RamBlockId, HostPages)>>,
    pub notifier: RamBlockNotifier,
    pub counters: BqlCell<Counters>,
}

impl Memory {
    pub fn count(&self, f: impl FnOnce(&mut Counters)) {
        let mut counters = self.counters.get();
        f(&mut counters);
        self.counters.set(counters);
    }

    fn host_pages(&self) -> MutexGuard<'_, Vec<(RamBlockId, HostPages)>> {
        // A panic would have ended QEMU.
        self.host_pages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Host pages that are partly in the balloon
    pub fn partial_host_pages(&self) -> u64 {
        let host_pages = self.host_pages();
        host_pages.iter().map(|(_, pages)| pages.partial()).sum()
    }

    /// The balloon is empty.
    pub fn reset(&self) {
        self.host_pages().clear();
    }

    /// A block is about to be freed.  This can happen in any thread.
    pub fn forget(&self, block: RamBlockId) {
        self.host_pages().retain(|(id, _)| *id != block);
    }

    /// Call `f` with what is known about a block.  Returns false if it
    /// consists of pages that can be discarded as they are.
    fn with_host_pages(&self, block: &RamBlock<'_>, f: impl FnOnce(&mut HostPages)) -> bool {
        let page_size = block.page_size();
        if page_size <= BALLOON_PAGE_SIZE {
            return false;
        }

        let mut all = self.host_pages();
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
}

/// Ranges of one block that are to be discarded, or (when they leave the
/// balloon) populated
pub struct Ranges<'a> {
    memory: &'a Memory,
    direction: Direction,
    /// Discarding would do harm at the moment
    inhibited: bool,
    /// The host has not asked for pages to be deflated
    unasked: bool,
    /// Owns a reference to the block
    section: Option<MemoryRegionSection>,
    ranges: Vec<RAMBlockRange>,
    bytes: u64,
}

impl<'a> Ranges<'a> {
    pub const fn new(
        memory: &'a Memory,
        direction: Direction,
        inhibited: bool,
        unasked: bool,
    ) -> Self {
        Self {
            memory,
            direction,
            inhibited,
            unasked,
            section: None,
            ranges: Vec::new(),
            bytes: 0,
        }
    }

    /// Whether it is time to [`flush`](Self::flush)
    pub fn is_full(&self) -> bool {
        self.ranges.len() >= MAX_RANGES || self.bytes >= MAX_BYTES
    }

    /// Add the pages from `start` to `end`, guest-physical addresses in bytes.
    /// What is not RAM is ignored.
    pub fn add(&mut self, start: u64, end: u64) {
        let mut gpa = start;
        while gpa < end {
            let Some(section) = MemoryRegionSection::find(gpa, end - gpa) else {
                self.bad(gpa, end);
                return;
            };
            // A page is only good if all of it is
            let first = section.address().next_multiple_of(BALLOON_PAGE_SIZE);
            let section_end = section.address().saturating_add(section.size()).min(end);
            let last = section_end - section_end % BALLOON_PAGE_SIZE;
            let next = section_end.next_multiple_of(BALLOON_PAGE_SIZE);

            let region = section.region();
            if region.is_ram() && !region.is_rom() && !region.is_romd() && first < last {
                self.bad(gpa, first);
                self.good(section, first, last);
                self.bad(last, next);
            } else {
                self.bad(gpa, next);
            }
            gpa = next.max(gpa + BALLOON_PAGE_SIZE);
        }
    }

    fn bad(&self, start: u64, end: u64) {
        if trace_virtio_balloon_bad_addr_enabled() {
            for gpa in (start..end).step_by(BALLOON_PAGE_SIZE as usize) {
                trace_virtio_balloon_bad_addr(gpa);
            }
        }
        self.memory
            .count(|c| c.bad_pfns += end.saturating_sub(start) / BALLOON_PAGE_SIZE);
    }

    fn good(&mut self, section: MemoryRegionSection, start: u64, end: u64) {
        if trace_virtio_balloon_handle_output_enabled() {
            let name = section.region().name();
            for gpa in (start..end).step_by(BALLOON_PAGE_SIZE as usize) {
                trace_virtio_balloon_handle_output(name, gpa);
            }
        }
        let len = end - start;
        let pages = len / BALLOON_PAGE_SIZE;
        self.memory.count(|c| match self.direction {
            Direction::Inflate => c.pages_inflated += pages,
            Direction::Deflate => {
                c.pages_deflated += pages;
                if self.unasked {
                    c.pages_deflated_unasked += pages;
                }
            }
        });

        let id = section.ram_block().map(|(block, _)| block.id());
        let current = self
            .section
            .as_ref()
            .and_then(MemoryRegionSection::ram_block);
        if current.map(|(block, _)| block.id()) != id {
            self.flush();
        }
        let Some((block, section_offset)) = section.ram_block() else {
            return;
        };
        let first = section_offset + (start - section.address());
        let (ranges, bytes) = (&mut self.ranges, &mut self.bytes);
        let mut push = |offset, length| {
            ranges.push(RAMBlockRange { offset, length });
            *bytes += length;
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
    }

    /// Discard the ranges that were added, or advise the host that they will be
    /// used.
    pub fn flush(&mut self) {
        let section = self.section.take();
        if let Some((block, _)) = section.as_ref().and_then(MemoryRegionSection::ram_block) {
            if !self.inhibited && !self.ranges.is_empty() {
                match self.direction {
                    Direction::Inflate => self.memory.discard(&block, &self.ranges),
                    Direction::Deflate => self.advise(&block),
                }
            }
        }
        self.ranges.clear();
        self.bytes = 0;
    }

    fn advise(&self, block: &RamBlock<'_>) {
        for range in &self.ranges {
            // The hint is for whole host pages, because there is nothing
            // smaller.
            if let Err(err) = block.advise_willneed(range.offset, range.length) {
                warn_report_once!("Couldn't MADV_WILLNEED on balloon deflate: {err}");
            }
        }
    }
}

impl Memory {
    /// Discard parts of a block.  An error only means that the host does not
    /// get the memory.
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
