// SPDX-License-Identifier: GPL-2.0-or-later

//! Host pages that are larger than balloon pages
//!
//! The host can only discard whole pages of its own.  With hugetlbfs, or a base
//! page size of 64 KiB, a host page is larger than a balloon page, and is
//! discarded when the last part of it goes into the balloon.  The caller
//! decides how long the parts in the balloon are remembered: for one element,
//! as in C, or until they leave the balloon.  The latter is only correct if the
//! driver tells the device before it uses a page again
//! (`VIRTIO_BALLOON_F_MUST_TELL_HOST`).
//!
//! Discarded host pages are remembered, too: they come from a pool, which can
//! be empty when the guest needs them again.

use std::{collections::BTreeMap, ops::Range};

use crate::{parts::Parts, spec::BALLOON_PAGE_SIZE};

/// The host pages of one `RAMBlock` of which a part is in the balloon, or that
/// were discarded.  Nothing is stored for other host pages.
#[derive(Debug)]
pub struct HostPages {
    /// The key is the index of the host page in the block.
    pages: BTreeMap<u64, HostPage>,
    /// Size of a host page in balloon pages
    pages_per_host_page: u64,
    /// How many have only [`Parts::Some`] in the balloon
    partial: u64,
    /// How many are discarded
    discarded: u64,
}

#[derive(Debug, Default)]
struct HostPage {
    parts: Parts,
    /// The host page was discarded, and may not have been populated since.
    discarded: bool,
    /// Guest-physical address at which a part of it went into the balloon
    gpa: u64,
}

/// What is remembered of the [first](HostPages::first) host page
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct First {
    /// Offset in the block, in bytes
    pub offset: u64,
    /// Guest-physical address at which a part of it was mapped, in bytes
    pub gpa: u64,
    /// Whether it was discarded
    pub discarded: bool,
}

impl HostPage {
    /// Whether it is neither discarded nor in the balloon
    const fn is_unused(&self) -> bool {
        !self.discarded && matches!(self.parts, Parts::None)
    }
}

impl HostPages {
    /// For a `RAMBlock` that consists of host pages of `host_page_size` bytes
    ///
    /// Returns `None` if that size is not a power of two, is not larger than a
    /// balloon page, or is larger than any real host page.
    pub fn new(host_page_size: u64) -> Option<Self> {
        let pages_per_host_page = host_page_size / BALLOON_PAGE_SIZE;
        (host_page_size.is_power_of_two()
            && pages_per_host_page > 1
            && u32::try_from(pages_per_host_page).is_ok())
        .then_some(Self {
            pages: BTreeMap::new(),
            pages_per_host_page,
            partial: 0,
            discarded: 0,
        })
    }

    /// Size of a host page in bytes
    pub const fn host_page_size(&self) -> u64 {
        self.pages_per_host_page * BALLOON_PAGE_SIZE
    }

    /// How many host pages are partly in the balloon
    pub const fn partial(&self) -> u64 {
        self.partial
    }

    /// How many host pages are discarded
    pub const fn discarded(&self) -> u64 {
        self.discarded
    }

    /// Whether nothing is remembered of any host page
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The balloon pages at `[offset, offset + len)`, in bytes, which are
    /// mapped at guest-physical address `gpa`, go into the balloon.  Calls
    /// `discard` with the offset and length in bytes of each range of host
    /// pages that have become complete.  `discard` returns whether it discards
    /// the range.
    ///
    /// A host page that is inserted as a whole is discarded even if it was
    /// already complete: what is remembered then makes no difference.
    pub fn insert(
        &mut self,
        offset: u64,
        len: u64,
        gpa: u64,
        mut discard: impl FnMut(u64, u64) -> bool,
    ) {
        let per = self.pages_per_host_page;
        let range = pages(offset, len);
        let mut pending: Option<Range<u64>> = None;
        let mut start = range.start;

        while start < range.end {
            let index = start / per;
            let end = ((index + 1) * per).min(range.end);
            let part = start - index * per..end - index * per;
            let page = self.pages.entry(index).or_default();

            self.partial -= u64::from(page.parts.is_partial());
            let added = page.parts.update(&part, per, true);
            self.partial += u64::from(page.parts.is_partial());
            page.gpa = gpa + (start - range.start) * BALLOON_PAGE_SIZE;

            let all = matches!(page.parts, Parts::All);
            if all && (added || part.end - part.start == per) {
                if let Some(done) = merge(&mut pending, index) {
                    self.discard(done, &mut discard);
                }
            }
            start = end;
        }
        if let Some(done) = pending {
            self.discard(done, &mut discard);
        }
    }

    /// Call `discard` for host pages, and remember whether it discards them.
    fn discard(&mut self, range: Range<u64>, discard: &mut impl FnMut(u64, u64) -> bool) {
        let size = self.host_page_size();
        if discard(range.start * size, (range.end - range.start) * size) {
            for (_, page) in self.pages.range_mut(range) {
                self.discarded += u64::from(!std::mem::replace(&mut page.discarded, true));
            }
        }
    }

    /// The balloon pages at `[offset, offset + len)`, in bytes, leave the
    /// balloon.  Calls `populate` with the offset and length in bytes of each
    /// range of discarded host pages that the guest needs now.
    pub fn remove(&mut self, offset: u64, len: u64, mut populate: impl FnMut(u64, u64)) {
        let per = self.pages_per_host_page;
        let size = self.host_page_size();
        let range = pages(offset, len);
        let touched = range.start / per..range.end.div_ceil(per);
        let mut pending: Option<Range<u64>> = None;
        let mut unused = false;

        for (&index, page) in self.pages.range_mut(touched.clone()) {
            let part = range.start.max(index * per) - index * per
                ..range.end.min((index + 1) * per) - index * per;
            self.partial -= u64::from(page.parts.is_partial());
            page.parts.update(&part, per, false);
            self.partial += u64::from(page.parts.is_partial());

            if page.discarded {
                if let Some(done) = merge(&mut pending, index) {
                    populate(done.start * size, (done.end - done.start) * size);
                }
            }
            unused |= page.is_unused();
        }
        if let Some(done) = pending {
            populate(done.start * size, (done.end - done.start) * size);
        }
        if unused {
            self.forget_unused(touched);
        }
    }

    /// The host pages at `[offset, offset + len)`, in bytes, were populated.
    pub fn populated(&mut self, offset: u64, len: u64) {
        let size = self.host_page_size();
        let range = offset / size..offset.saturating_add(len).div_ceil(size);
        for (_, page) in self.pages.range_mut(range.clone()) {
            self.discarded -= u64::from(std::mem::replace(&mut page.discarded, false));
        }
        self.forget_unused(range);
    }

    /// Remove the entries of host pages that are neither discarded nor in the
    /// balloon.
    fn forget_unused(&mut self, range: Range<u64>) {
        let unused: Vec<u64> = self
            .pages
            .range(range)
            .filter_map(|(index, page)| page.is_unused().then_some(*index))
            .collect();
        for index in unused {
            self.pages.remove(&index);
        }
    }

    /// Forget which parts of host pages are in the balloon, but not which host
    /// pages are discarded.
    pub fn forget_parts(&mut self) {
        self.pages.retain(|_, page| {
            if page.parts.is_partial() {
                page.parts = Parts::None;
            }
            !page.is_unused()
        });
        self.partial = 0;
    }

    /// The first host page of which anything is remembered
    pub fn first(&self) -> Option<First> {
        let size = self.host_page_size();
        self.pages.first_key_value().map(|(index, page)| First {
            offset: index * size,
            gpa: page.gpa,
            discarded: page.discarded,
        })
    }

    /// Forget the [`first`](Self::first) host page.
    pub fn forget_first(&mut self) {
        if let Some((_, page)) = self.pages.pop_first() {
            self.partial -= u64::from(page.parts.is_partial());
            self.discarded -= u64::from(page.discarded);
        }
    }
}

/// Add an index, which is larger than all previous ones, to the pending range.
/// If it does not follow that range, returns the range and begins another one.
fn merge(pending: &mut Option<Range<u64>>, index: u64) -> Option<Range<u64>> {
    match pending {
        Some(range) if range.end == index => {
            range.end += 1;
            None
        }
        _ => pending.replace(index..index + 1),
    }
}

/// The balloon pages of a range in bytes
const fn pages(offset: u64, len: u64) -> Range<u64> {
    offset / BALLOON_PAGE_SIZE..offset.saturating_add(len) / BALLOON_PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::tests::Rng;

    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;

    /// The ranges that are discarded, if the host can discard all of them
    fn insert(h: &mut HostPages, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        h.insert(offset, len, offset, |offset, len| {
            out.push((offset, len));
            true
        });
        out
    }

    /// The ranges that have to be populated
    fn remove(h: &mut HostPages, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        h.remove(offset, len, |offset, len| out.push((offset, len)));
        out
    }

    #[test]
    fn complete_with_the_last_page() {
        for order in [false, true] {
            let mut h = HostPages::new(2 * MIB).unwrap();
            for i in 0..512 {
                let n = if order { i } else { 511 - i };
                let done = insert(&mut h, 6 * MIB + n * 4096, 4096);
                assert_eq!(done.is_empty(), i < 511);
                assert_eq!(h.partial(), u64::from(i < 511));
                if i == 511 {
                    assert_eq!(done, [(6 * MIB, 2 * MIB)]);
                }
            }
            assert_eq!(h.discarded(), 1);
        }
    }

    #[test]
    fn elements_of_256_pages() {
        let mut h = HostPages::new(2 * MIB).unwrap();
        let freed: usize = (0..1024).map(|i| insert(&mut h, i * MIB, MIB).len()).sum();
        assert_eq!(freed, 512);
        assert_eq!(h.partial(), 0);
        assert_eq!(h.discarded(), 512);
    }

    #[test]
    fn ranges_are_merged() {
        let mut h = HostPages::new(64 * KIB).unwrap();
        assert_eq!(
            insert(&mut h, 60 * KIB, 200 * KIB),
            [(64 * KIB, 192 * KIB)],
            "of 4 and a part on either side"
        );
        assert_eq!(insert(&mut h, 0, 64 * KIB), [(0, 64 * KIB)]);
        assert_eq!(remove(&mut h, 4 * KIB, 200 * KIB), [(0, 256 * KIB)]);
    }

    /// Inserting a page again does not discard a whole host page again.
    #[test]
    fn only_what_is_new_is_discarded() {
        let mut h = HostPages::new(1024 * MIB).unwrap();
        assert_eq!(insert(&mut h, 0, 1024 * MIB), [(0, 1024 * MIB)]);
        assert_eq!(insert(&mut h, 7 * 4096, 4096), []);
        for i in 0..64 {
            assert_eq!(insert(&mut h, i * 16 * MIB, 16 * MIB), []);
        }
        // a whole host page is discarded, whatever is remembered
        assert_eq!(insert(&mut h, 0, 1024 * MIB), [(0, 1024 * MIB)]);
    }

    #[test]
    fn deflated_pages_are_forgotten() {
        let mut h = HostPages::new(2 * MIB).unwrap();
        assert_eq!(insert(&mut h, 0, 2 * MIB), [(0, 2 * MIB)]);
        assert_eq!(remove(&mut h, 4096, 4096), [(0, 2 * MIB)]);
        assert_eq!(h.partial(), 1);
        h.populated(0, 2 * MIB);
        assert_eq!(insert(&mut h, 8192, 4096), []);
        // the other pages are still in the balloon
        assert_eq!(insert(&mut h, 4096, 4096), [(0, 2 * MIB)]);
        assert_eq!(remove(&mut h, 0, 4 * MIB), [(0, 2 * MIB)]);
        assert_eq!(h.partial(), 0);
        h.populated(0, 2 * MIB);
        assert!(h.is_empty());
        assert_eq!(insert(&mut h, 0, 4096), []);
    }

    #[test]
    fn parts_are_forgotten() {
        let mut h = HostPages::new(8 * KIB).unwrap();
        for (offset, len) in [(0, 8 * KIB), (8 * KIB, 4 * KIB), (16 * KIB, 8 * KIB)] {
            insert(&mut h, offset, len);
        }
        h.remove(16 * KIB, 4 * KIB, |_, _| {});
        assert_eq!((h.partial(), h.discarded()), (2, 2));
        h.forget_parts();
        assert_eq!((h.partial(), h.discarded()), (0, 2));
        assert_eq!(insert(&mut h, 12 * KIB, 4 * KIB), []);
        // The host page is still discarded, so the guest has to wait for it.
        assert_eq!(remove(&mut h, 20 * KIB, 4 * KIB), [(16 * KIB, 8 * KIB)]);
    }

    /// A discarded host page is remembered until it is populated, however many
    /// attempts that takes.
    #[test]
    fn discarded_until_populated() {
        let mut h = HostPages::new(2 * MIB).unwrap();
        assert_eq!(insert(&mut h, 2 * MIB, 4 * MIB), [(2 * MIB, 4 * MIB)]);
        for _ in 0..3 {
            assert_eq!(remove(&mut h, 3 * MIB, 2 * MIB), [(2 * MIB, 4 * MIB)]);
        }
        h.populated(2 * MIB, 2 * MIB);
        assert_eq!(remove(&mut h, 3 * MIB, 2 * MIB), [(4 * MIB, 2 * MIB)]);
        assert_eq!((h.partial(), h.discarded()), (2, 1));

        // what could not be discarded needs no populating
        let mut other = HostPages::new(2 * MIB).unwrap();
        other.insert(0, 2 * MIB, 0, |_, _| false);
        assert_eq!(remove(&mut other, 0, 4096), []);
    }

    /// After a reset the guest uses all pages without having told the device.
    #[test]
    fn first_and_next() {
        let mut h = HostPages::new(64 * KIB).unwrap();
        assert_eq!(h.first(), None);
        h.insert(128 * KIB, 4096, 0x1_0000, |_, _| unreachable!());
        h.insert(640 * KIB, 64 * KIB, 0x8_0000, |_, _| true);
        let mut all = Vec::new();
        while let Some(first) = h.first() {
            all.push((first.offset, first.gpa, first.discarded));
            h.forget_first();
        }
        assert_eq!(
            all,
            [(128 * KIB, 0x1_0000, false), (640 * KIB, 0x8_0000, true)]
        );
        assert!(h.is_empty() && h.partial() == 0 && h.discarded() == 0);
        h.forget_first();
    }

    #[test]
    fn unusable_sizes() {
        for size in [0, 2048, 4096, 12288, 1 << 63] {
            assert!(HostPages::new(size).is_none());
        }
        assert_eq!(HostPages::new(65536).unwrap().host_page_size(), 65536);
        // smaller than a word of the bitmap
        let mut h = HostPages::new(8192).unwrap();
        assert_eq!(insert(&mut h, 4096, MIB), [(8192, MIB - 8192)]);
        assert_eq!(h.partial(), 2);
    }

    /// Against a set of pages, and one of host pages that were discarded
    #[test]
    fn same_as_single_pages() {
        let mut rng = Rng(2);
        for shift in [13, 16, 18, 21] {
            let size = 1u64 << shift;
            let per = size / 4096;
            let total = 8 * per;
            let mut h = HostPages::new(size).unwrap();
            let mut set = BTreeSet::new();
            let mut discarded: BTreeSet<u64> = BTreeSet::new();

            for _ in 0..800 {
                let start = u64::from(rng.below(total as u32));
                let len = 1 + u64::from(rng.below(3 * per as u32)).min(total - start - 1);
                let touched = start / per..=(start + len - 1) / per;
                let split = |ranges: Vec<(u64, u64)>| -> Vec<u64> {
                    ranges
                        .iter()
                        .flat_map(|&(o, l)| o / size..(o + l) / size)
                        .collect()
                };
                match rng.below(4) {
                    0 => {
                        let got = split(remove(&mut h, start * 4096, len * 4096));
                        (start..start + len).for_each(|p| {
                            set.remove(&p);
                        });
                        let expected: Vec<u64> =
                            touched.filter(|hp| discarded.contains(hp)).collect();
                        assert_eq!(got, expected);
                    }
                    1 => {
                        let hp = start / per;
                        h.populated(hp * size, size);
                        discarded.remove(&hp);
                    }
                    _ => {
                        let before = set.clone();
                        let works = rng.below(8) != 0;
                        let mut done = Vec::new();
                        h.insert(start * 4096, len * 4096, start * 4096, |offset, len| {
                            done.push((offset, len));
                            works
                        });
                        set.extend(start..start + len);
                        let full = |pages: &BTreeSet<u64>, hp: u64| {
                            (hp * per..(hp + 1) * per).all(|p| pages.contains(&p))
                        };
                        let whole = |hp: u64| start <= hp * per && (hp + 1) * per <= start + len;
                        let expected: Vec<u64> = touched
                            .filter(|&hp| full(&set, hp) && (whole(hp) || !full(&before, hp)))
                            .collect();
                        if works {
                            discarded.extend(&expected);
                        }
                        assert_eq!(split(done), expected);
                    }
                }
                let count = |hp: u64| set.range(hp * per..(hp + 1) * per).count() as u64;
                let partial = (0..8).filter(|&hp| (1..per).contains(&count(hp))).count();
                assert_eq!(h.partial(), partial as u64);
                assert_eq!(h.discarded(), discarded.len() as u64);
                let known = (0..8).find(|hp| count(*hp) > 0 || discarded.contains(hp));
                assert_eq!(h.first().map(|f| f.offset / size), known);
            }
        }
    }
}
