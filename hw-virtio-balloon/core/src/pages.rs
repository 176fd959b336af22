// SPDX-License-Identifier: GPL-2.0-or-later

//! Balloon pages, and host pages that are larger than them

/// Log2 of [`BALLOON_PAGE_SIZE`]
pub const VIRTIO_BALLOON_PFN_SHIFT: u32 = 12;

/// Size in bytes of the pages in the balloon.  Virtio defines it, independently
/// of the page sizes of guest and host.
pub const BALLOON_PAGE_SIZE: u64 = 1 << VIRTIO_BALLOON_PFN_SHIFT;

/// Guest-physical address of a page.  Does not overflow, as PFNs have 32 bits.
pub const fn pfn_to_gpa(pfn: u32) -> u64 {
    (pfn as u64) << VIRTIO_BALLOON_PFN_SHIFT
}

/// Size in bytes of a number of pages
pub const fn pages_to_bytes(pages: u32) -> u64 {
    (pages as u64) << VIRTIO_BALLOON_PFN_SHIFT
}

/// The number of pages to be in the balloon for a guest that has `ram_size`
/// bytes of memory to be left with `target` bytes.
pub fn target_to_pages(ram_size: u64, target: u64) -> u32 {
    let pages = ram_size.saturating_sub(target) >> VIRTIO_BALLOON_PFN_SHIFT;
    u32::try_from(pages).unwrap_or(u32::MAX)
}

/// A host page that is larger than a balloon page, and is partly in the
/// balloon: it can be discarded once all of it is.
///
/// `B` identifies the block of memory that the host page belongs to.
#[derive(Debug)]
pub struct PartialHostPage<B> {
    /// The block and the offset of the host page in it
    page: Option<(B, u64)>,
    /// A bit for each balloon page
    bitmap: Vec<u64>,
    /// How many bits are still zero
    missing: u64,
}

impl<B> Default for PartialHostPage<B> {
    fn default() -> Self {
        Self {
            page: None,
            bitmap: Vec::new(),
            missing: 0,
        }
    }
}

impl<B: PartialEq> PartialHostPage<B> {
    /// Add the balloon page at `offset` in the block; both `offset` and
    /// `host_page_size`, a power of two, are in bytes.  Returns the offset of
    /// the host page if the balloon page was the last one that it lacked.
    ///
    /// Only one host page is remembered.  If the driver goes on to another one,
    /// the old one is forgotten.
    pub fn add(&mut self, block: B, offset: u64, host_page_size: u64) -> Option<u64> {
        if !host_page_size.is_power_of_two() || host_page_size < BALLOON_PAGE_SIZE {
            return None;
        }
        let host_page = offset & !(host_page_size - 1);
        let key = Some((block, host_page));
        if self.page != key {
            let subpages = host_page_size >> VIRTIO_BALLOON_PFN_SHIFT;
            self.bitmap.clear();
            self.bitmap
                .resize(usize::try_from(subpages.div_ceil(64)).ok()?, 0);
            self.missing = subpages;
            self.page = key;
        }

        let subpage = (offset - host_page) >> VIRTIO_BALLOON_PFN_SHIFT;
        let word = self.bitmap.get_mut(usize::try_from(subpage / 64).ok()?)?;
        let bit = 1u64 << (subpage % 64);
        if *word & bit == 0 {
            *word |= bit;
            self.missing -= 1;
        }

        if self.missing == 0 {
            self.page = None;
            Some(host_page)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn largest_pfn() {
        assert_eq!(pfn_to_gpa(u32::MAX), 0xfff_ffff_f000);
    }

    #[test]
    fn targets() {
        assert_eq!(target_to_pages(512 * MIB, 160 * MIB), 352 * 256);
        assert_eq!(target_to_pages(512 * MIB, 512 * MIB), 0);
        assert_eq!(target_to_pages(512 * MIB, u64::MAX), 0);
        assert_eq!(target_to_pages(8192, 1), 1);
        assert_eq!(target_to_pages(u64::MAX, 0), u32::MAX);
    }

    #[test]
    fn host_page_is_complete_with_its_last_page() {
        for order in [false, true] {
            let mut p = PartialHostPage::default();
            for i in 0..512 {
                let i = if order { i } else { 511 - i };
                let done = p.add('a', 6 * MIB + i * 4096, 2 * MIB);
                let last = if order { 511 } else { 0 };
                assert_eq!(done, (i == last).then_some(6 * MIB));
            }
        }
    }

    #[test]
    fn repeated_pages_do_not_count() {
        let mut p = PartialHostPage::default();
        for _ in 0..100 {
            assert_eq!(p.add('a', 0, 65536), None);
        }
        for i in 1..15 {
            assert_eq!(p.add('a', i * 4096, 65536), None);
        }
        assert_eq!(p.add('a', 15 * 4096, 65536), Some(0));
        // and starts over
        assert_eq!(p.add('a', 15 * 4096, 65536), None);
    }

    #[test]
    fn another_page_or_block_makes_it_forget() {
        let mut p = PartialHostPage::default();
        assert_eq!(p.add('a', 0, 8192), None);
        assert_eq!(p.add('b', 4096, 8192), None);
        assert_eq!(p.add('a', 4096, 8192), None);
        assert_eq!(p.add('a', 8192, 8192), None);
        assert_eq!(p.add('a', 0, 8192), None);
        assert_eq!(p.add('a', 4096, 8192), Some(0));
    }

    #[test]
    fn unusable_page_sizes() {
        let mut p = PartialHostPage::default();
        assert_eq!(p.add('a', 0, 0), None);
        assert_eq!(p.add('a', 0, 2048), None);
        assert_eq!(p.add('a', 0, 12288), None);
        assert_eq!(p.add('a', 4096, 4096), Some(4096));
    }
}
