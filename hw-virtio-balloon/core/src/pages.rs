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

/// How much memory a guest that has `ram_size` bytes of it is left with, in bytes,
/// if there are that many pages in the balloon.  0 if the driver claims that there
/// are more than all of them.
pub const fn pages_to_actual(ram_size: u64, pages: u32) -> u64 {
    ram_size.saturating_sub(pages_to_bytes(pages))
}

/// The number of pages to be in the balloon for a guest that has `ram_size`
/// bytes of memory to be left with `target` bytes.  The field in the configuration
/// space has room for 16 TiB less a page; C takes the lower 32 bits of what is more.
pub fn target_to_pages(ram_size: u64, target: u64) -> u32 {
    let pages = ram_size.saturating_sub(target) >> VIRTIO_BALLOON_PFN_SHIFT;
    u32::try_from(pages).unwrap_or(u32::MAX)
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
        // the largest that fits, and what is larger
        assert_eq!(target_to_pages(20 << 40, 4 << 40), u32::MAX);
        assert_eq!(target_to_pages(20 << 40, (4 << 40) + 4096), u32::MAX);
        assert_eq!(target_to_pages(20 << 40, (4 << 40) + 8192), u32::MAX - 1);
    }

    #[test]
    fn actual() {
        assert_eq!(pages_to_actual(512 * MIB, 352 * 256), 160 * MIB);
        assert_eq!(pages_to_actual(512 * MIB, 512 * 256), 0);
        assert_eq!(pages_to_actual(512 * MIB, 512 * 256 + 1), 0);
        assert_eq!(pages_to_actual(0, u32::MAX), 0);
    }
}
