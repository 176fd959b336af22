// SPDX-License-Identifier: GPL-2.0-or-later

//! Host pages that are larger than balloon pages
//!
//! The host can only discard whole pages of its own: with hugetlbfs, or a base
//! page size of 64 KiB, that is more than a balloon page.  Therefore remember
//! which balloon pages are in the balloon, and discard a host page when the last
//! one of it goes in.

use std::ops::Range;

use crate::pages::BALLOON_PAGE_SIZE;

const WORD_BITS: u64 = u64::BITS as u64;

/// The balloon pages of one block of memory that are in the balloon, a bit for
/// each.
#[derive(Debug)]
pub struct HostPages {
    bitmap: Vec<u64>,
    /// Size of the block in balloon pages
    pages: u64,
    /// How many bits are set for each host page, so that none has to be looked
    /// at to know: a host page can be 262,144 balloon pages
    set: Vec<u32>,
    /// Size of a host page in balloon pages
    pages_per_host_page: u64,
    /// Host pages of which some, but not all, balloon pages are set
    partial: u64,
}

/// The bits of a word that are part of `range`, where the word starts at bit
/// `start`
const fn mask(range: &Range<u64>, start: u64) -> u64 {
    let end = start + WORD_BITS;
    if range.end <= start || range.start >= end {
        return 0;
    }
    let mut mask = u64::MAX;
    if range.start > start {
        mask &= u64::MAX << (range.start - start);
    }
    if range.end < end {
        mask &= u64::MAX >> (end - range.end);
    }
    mask
}

/// How many balloon pages of a host page are set
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fill {
    Empty,
    Partial,
    Full,
}

impl HostPages {
    /// For a block of `size` bytes that consists of host pages of
    /// `host_page_size` bytes.  Takes a bit for each balloon page, and four bytes
    /// for each host page.
    ///
    /// `None` if `host_page_size` is not a power of two that is larger than a
    /// balloon page, or if the block is too large for this host.
    pub fn new(size: u64, host_page_size: u64) -> Option<Self> {
        if !host_page_size.is_power_of_two() || host_page_size <= BALLOON_PAGE_SIZE {
            return None;
        }
        let pages_per_host_page = host_page_size / BALLOON_PAGE_SIZE;
        let pages = size
            .div_ceil(host_page_size)
            .checked_mul(pages_per_host_page)?;
        // Larger than any host page, and a count of its pages has to fit
        u32::try_from(pages_per_host_page).ok()?;
        Some(Self {
            bitmap: zeroes(pages.div_ceil(WORD_BITS))?,
            set: zeroes(pages / pages_per_host_page)?,
            pages,
            pages_per_host_page,
            partial: 0,
        })
    }

    /// Whether this is for a block of the given sizes in bytes
    pub const fn is_for(&self, size: u64, host_page_size: u64) -> bool {
        self.pages_per_host_page * BALLOON_PAGE_SIZE == host_page_size
            && self.pages == size.div_ceil(host_page_size) * self.pages_per_host_page
    }

    /// Host pages that could be discarded if the rest of them was in the
    /// balloon
    pub const fn partial(&self) -> u64 {
        self.partial
    }

    /// The words of the bitmap that `range`, in balloon pages, is part of.  Pages
    /// outside of the block are ignored.
    fn words(&mut self, range: &Range<u64>) -> impl Iterator<Item = (u64, &mut u64)> {
        let len = self.bitmap.len() as u64;
        let first = (range.start / WORD_BITS).min(len);
        let last = range.end.div_ceil(WORD_BITS).clamp(first, len);
        // both are at most the length, so they fit
        self.bitmap[first as usize..last as usize]
            .iter_mut()
            .zip(first..)
            .map(|(word, i)| (i * WORD_BITS, word))
    }

    const fn fill(&self, set: u32) -> Fill {
        if set == 0 {
            Fill::Empty
        } else if (set as u64) < self.pages_per_host_page {
            Fill::Partial
        } else {
            Fill::Full
        }
    }

    /// Call `f` for each host page that `range`, in balloon pages, touches, with
    /// the part of the range that it contains.
    fn for_each_host_page(&mut self, range: Range<u64>, mut f: impl FnMut(&mut Self, Range<u64>)) {
        let per = self.pages_per_host_page;
        let range_end = range.end.min(self.pages);
        let mut start = range.start;
        while start < range_end {
            let end = ((start / per + 1) * per).min(range_end);
            f(self, start..end);
            start = end;
        }
    }

    fn host_page_of(&self, page: u64) -> Range<u64> {
        let start = page - page % self.pages_per_host_page;
        start..start + self.pages_per_host_page
    }

    /// Set or clear the bits of `part`, which is in one host page.  Returns what
    /// has become of that.
    fn update(&mut self, part: &Range<u64>, insert: bool) -> Fill {
        let (mut added, mut removed) = (0, 0);
        for (start, word) in self.words(part) {
            let mask = mask(part, start);
            let new = if insert { *word | mask } else { *word & !mask };
            added += (new & !*word).count_ones();
            removed += (*word & !new).count_ones();
            *word = new;
        }
        let Some(set) = usize::try_from(part.start / self.pages_per_host_page)
            .ok()
            .and_then(|i| self.set.get_mut(i))
        else {
            return Fill::Empty;
        };
        let before = *set;
        // Not less than zero: what is removed was counted when it was added
        *set = before + added - removed;
        let after = self.fill(before + added - removed);
        self.partial += u64::from(after == Fill::Partial);
        self.partial -= u64::from(self.fill(before) == Fill::Partial);
        after
    }

    /// Pages at `[offset, offset + len)`, in bytes, go into the balloon.  Calls
    /// `discard` with the offset and the length in bytes of ranges of host pages
    /// that are completely in the balloon now.
    ///
    /// That includes host pages that were so before, if all of their pages were
    /// inserted again: the guest may have used them in the meantime.
    pub fn insert(&mut self, offset: u64, len: u64, mut discard: impl FnMut(u64, u64)) {
        let mut pending: Option<Range<u64>> = None;
        self.for_each_host_page(pages(offset, len), |this, part| {
            if this.update(&part, true) != Fill::Full {
                return;
            }
            let host_page = this.host_page_of(part.start);
            match &mut pending {
                Some(range) if range.end == host_page.start => range.end = host_page.end,
                _ => {
                    if let Some(range) = pending.replace(host_page) {
                        discard_pages(&range, &mut discard);
                    }
                }
            }
        });
        if let Some(range) = pending {
            discard_pages(&range, &mut discard);
        }
    }

    /// Pages at `[offset, offset + len)`, in bytes, leave the balloon.
    pub fn remove(&mut self, offset: u64, len: u64) {
        self.for_each_host_page(pages(offset, len), |this, part| {
            this.update(&part, false);
        });
    }
}

/// `None` if there is not enough memory
fn zeroes<T: Copy + Default>(len: u64) -> Option<Vec<T>> {
    let len = usize::try_from(len).ok()?;
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).ok()?;
    vec.resize(len, T::default());
    Some(vec)
}

/// From bytes to whole balloon pages
const fn pages(offset: u64, len: u64) -> Range<u64> {
    offset / BALLOON_PAGE_SIZE..offset.saturating_add(len) / BALLOON_PAGE_SIZE
}

fn discard_pages(range: &Range<u64>, discard: &mut impl FnMut(u64, u64)) {
    discard(
        range.start * BALLOON_PAGE_SIZE,
        (range.end - range.start) * BALLOON_PAGE_SIZE,
    );
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::tests::Rng;

    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;

    fn insert(h: &mut HostPages, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        h.insert(offset, len, |offset, len| out.push((offset, len)));
        out
    }

    #[test]
    fn complete_with_the_last_page() {
        for order in [false, true] {
            let mut h = HostPages::new(8 * MIB, 2 * MIB).unwrap();
            for i in 0..512 {
                let n = if order { i } else { 511 - i };
                let done = insert(&mut h, 6 * MIB + n * 4096, 4096);
                assert_eq!(done.is_empty(), i < 511);
                assert_eq!(h.partial(), u64::from(i < 511));
                if i == 511 {
                    assert_eq!(done, [(6 * MIB, 2 * MIB)]);
                }
            }
        }
    }

    #[test]
    fn elements_of_256_pages() {
        let mut h = HostPages::new(1024 * MIB, 2 * MIB).unwrap();
        let mut freed = 0;
        for i in 0..1024 {
            freed += insert(&mut h, i * MIB, MIB).len();
        }
        assert_eq!(freed, 512);
        assert_eq!(h.partial(), 0);
    }

    #[test]
    fn ranges_are_merged() {
        let mut h = HostPages::new(16 * MIB, 64 * KIB).unwrap();
        assert_eq!(insert(&mut h, 4 * KIB, MIB), [(64 * KIB, 960 * KIB)]);
        assert_eq!(h.partial(), 2);
        assert_eq!(insert(&mut h, 0, 4 * KIB), [(0, 64 * KIB)]);
        assert_eq!(h.partial(), 1);
    }

    #[test]
    fn deflated_pages_are_forgotten() {
        let mut h = HostPages::new(4 * MIB, 2 * MIB).unwrap();
        assert_eq!(insert(&mut h, 0, 2 * MIB), [(0, 2 * MIB)]);
        h.remove(4096, 4096);
        assert_eq!(h.partial(), 1);
        assert_eq!(insert(&mut h, 8192, 4096), []);
        // the others are still in the balloon
        assert_eq!(insert(&mut h, 4096, 4096), [(0, 2 * MIB)]);
        h.remove(0, 4 * MIB);
        assert_eq!(h.partial(), 0);
        assert_eq!(insert(&mut h, 0, 4096), []);
    }

    #[test]
    fn outside_of_the_block() {
        let mut h = HostPages::new(2 * MIB, MIB).unwrap();
        assert_eq!(insert(&mut h, u64::MAX - 4096, 4096), []);
        assert_eq!(insert(&mut h, MIB, u64::MAX >> 20 << 4), [(MIB, MIB)]);
        h.remove(4 * MIB, MIB);
        assert_eq!(h.partial(), 0);
    }

    #[test]
    fn unusable_sizes() {
        for size in [0, 2048, 4096, 12288] {
            assert!(HostPages::new(MIB, size).is_none());
        }
        assert!(HostPages::new(u64::MAX, 8192).is_none());
        assert_eq!(HostPages::new(0, 8192).unwrap().partial(), 0);
        let other = HostPages::new(MIB, 65536).unwrap();
        assert!(other.is_for(MIB, 65536));
        assert!(!other.is_for(2 * MIB, 65536) && !other.is_for(MIB, 8192));
        // smaller than a word of the bitmap
        let mut h = HostPages::new(8192, 8192).unwrap();
        assert_eq!(insert(&mut h, 0, MIB), [(0, 8192)]);
    }

    /// Against a set of pages for each host page
    #[test]
    fn same_as_single_pages() {
        let mut rng = Rng(2);
        for shift in [13, 16, 18, 21] {
            let host_page_size = 1u64 << shift;
            let per = host_page_size / 4096;
            let total = 8 * per;
            let mut h = HostPages::new(total * 4096, host_page_size).unwrap();
            let mut set = BTreeSet::new();

            for _ in 0..if cfg!(miri) { 20 } else { 800 } {
                let start = u64::from(rng.below(total as u32));
                let len = 1 + u64::from(rng.below(3 * per as u32)).min(total - start - 1);
                if rng.below(3) == 0 {
                    h.remove(start * 4096, len * 4096);
                    (start..start + len).for_each(|p| {
                        set.remove(&p);
                    });
                } else {
                    let done = insert(&mut h, start * 4096, len * 4096);
                    set.extend(start..start + len);
                    let full = |hp: u64| (hp * per..(hp + 1) * per).all(|p| set.contains(&p));
                    let expected: Vec<u64> = (start / per..=(start + len - 1) / per)
                        .filter(|&hp| full(hp))
                        .collect();
                    let got: Vec<u64> = done
                        .iter()
                        .flat_map(|&(o, l)| o / host_page_size..(o + l) / host_page_size)
                        .collect();
                    assert_eq!(got, expected);
                }
                let count = |hp: u64| set.range(hp * per..(hp + 1) * per).count() as u64;
                let partial = (0..8).filter(|&hp| (1..per).contains(&count(hp))).count();
                assert_eq!(h.partial(), partial as u64);
            }
        }
    }
}
