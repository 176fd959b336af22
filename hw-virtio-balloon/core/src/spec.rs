// SPDX-License-Identifier: GPL-2.0-or-later

//! What the specification defines: pages, feature bits and the configuration
//! space (virtio 1.3, sections 5.5.3, 5.5.4 and 5.5.6)

/// Log2 of [`BALLOON_PAGE_SIZE`]
pub const VIRTIO_BALLOON_PFN_SHIFT: u32 = 12;

/// Size of a balloon page in bytes.  The specification defines it,
/// independently of the page sizes of the guest and the host.
pub const BALLOON_PAGE_SIZE: u64 = 1 << VIRTIO_BALLOON_PFN_SHIFT;

/// Guest-physical address of a page.  The shift cannot overflow, because PFNs
/// have 32 bits.
pub const fn pfn_to_gpa(pfn: u32) -> u64 {
    (pfn as u64) << VIRTIO_BALLOON_PFN_SHIFT
}

/// Size in bytes of a number of pages
pub const fn pages_to_bytes(pages: u32) -> u64 {
    (pages as u64) << VIRTIO_BALLOON_PFN_SHIFT
}

/// How many bytes of memory are left to a guest with `ram_size` bytes if
/// `pages` pages are in the balloon.  Returns 0 if the driver claims that the
/// balloon has more pages than the guest.
pub const fn pages_to_actual(ram_size: u64, pages: u32) -> u64 {
    ram_size.saturating_sub(pages_to_bytes(pages))
}

/// The number of pages that have to be in the balloon to leave `target` bytes
/// of memory to a guest with `ram_size` bytes.  The field in the configuration
/// space can express up to 16 TiB less one page.  A larger balloon is limited
/// to that; C truncates the number of pages to 32 bits.
pub fn target_to_pages(ram_size: u64, target: u64) -> u32 {
    let pages = ram_size.saturating_sub(target) >> VIRTIO_BALLOON_PFN_SHIFT;
    u32::try_from(pages).unwrap_or(u32::MAX)
}

/// The driver must tell the host before it uses pages of the balloon
pub const VIRTIO_BALLOON_F_MUST_TELL_HOST: u32 = 0;
/// There is a queue for memory statistics
pub const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
/// The driver may take pages out of the balloon when it runs out of memory
pub const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
/// The device can ask the driver which pages are free
pub const VIRTIO_BALLOON_F_FREE_PAGE_HINT: u32 = 3;
/// The driver tells with which value it fills free pages
pub const VIRTIO_BALLOON_F_PAGE_POISON: u32 = 4;
/// The driver can report free pages without being asked
pub const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

/// Whether bit `bit` of `features` is set; false if `bit` is 32 or more
pub const fn includes(features: u32, bit: u32) -> bool {
    bit < u32::BITS && features & (1 << bit) != 0
}

/// The features that are offered to the driver: `requested`, which the
/// transport and common code support; `host_features`, which the user has
/// configured; and the statistics queue, which is always offered.  See
/// `virtio_balloon_get_features()` in C.
pub const fn offered(requested: u64, host_features: u32) -> u64 {
    requested | host_features as u64 | 1 << VIRTIO_BALLOON_F_STATS_VQ
}

const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const FREE_PAGE_HINT_CMD_ID: usize = 8;
const POISON_VAL: usize = 12;
const END: usize = 16;

/// The configuration space.  It consists of four 32-bit fields, which are
/// little-endian even for legacy drivers.  [`config_size`] says when the last
/// two fields exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// How many pages the host wants in the balloon
    pub num_pages: u32,
    /// How many pages are in the balloon; written by the driver
    pub actual: u32,
    /// The current round of free page hinting
    pub free_page_hint_cmd_id: u32,
    /// What the guest fills free pages with; written by the driver
    pub poison_val: u32,
}

/// Size of the configuration space in bytes.
///
/// The configuration space is a part of the migration stream, which must not
/// change for devices without the optional features.  Therefore fields at the
/// end are left out if no feature that is offered needs them.
pub const fn config_size(host_features: u32) -> usize {
    if includes(host_features, VIRTIO_BALLOON_F_PAGE_POISON) {
        END
    } else if includes(host_features, VIRTIO_BALLOON_F_FREE_PAGE_HINT) {
        POISON_VAL
    } else {
        FREE_PAGE_HINT_CMD_ID
    }
}

fn put(data: &mut [u8], offset: usize, value: u32) {
    if let Some(field) = data.get_mut(offset..offset + 4) {
        field.copy_from_slice(&value.to_le_bytes());
    }
}

fn get(data: &[u8], offset: usize) -> u32 {
    data.get(offset..offset + 4)
        .and_then(|field| field.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

impl Config {
    /// Store the fields that fit into `data`.
    pub fn write_to(&self, data: &mut [u8]) {
        put(data, NUM_PAGES, self.num_pages);
        put(data, ACTUAL, self.actual);
        put(data, FREE_PAGE_HINT_CMD_ID, self.free_page_hint_cmd_id);
        put(data, POISON_VAL, self.poison_val);
    }

    /// Load the fields; those that are not in `data` are zero.
    pub fn read_from(data: &[u8]) -> Self {
        Self {
            num_pages: get(data, NUM_PAGES),
            actual: get(data, ACTUAL),
            free_page_hint_cmd_id: get(data, FREE_PAGE_HINT_CMD_ID),
            poison_val: get(data, POISON_VAL),
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
        // the largest number that fits, and larger ones
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

    #[test]
    fn deflate_on_oom_is_bit_2() {
        assert_eq!(
            offered(0, 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM),
            0b110,
            "statistics are always there"
        );
    }

    #[test]
    fn offered_keeps_what_was_requested() {
        assert_eq!(offered(1 << 32 | 1 << 28, 0), 1 << 32 | 1 << 28 | 1 << 1);
    }

    #[test]
    fn bits_out_of_range() {
        assert!(includes(u32::MAX, 31));
        assert!(!includes(u32::MAX, 32));
        assert!(!includes(u32::MAX, u32::MAX));
        assert!(!includes(!(1 << 4), 4));
    }

    const HINT: u32 = 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT;
    const POISON: u32 = 1 << VIRTIO_BALLOON_F_PAGE_POISON;

    #[test]
    fn size_for_each_feature_mix() {
        assert_eq!(config_size(0), 8);
        assert_eq!(config_size(HINT), 12);
        assert_eq!(config_size(POISON), 16);
        assert_eq!(config_size(HINT | POISON), 16);
        assert_eq!(config_size(1 << 2 | 1 << 5), 8);
    }

    const CONFIG: Config = Config {
        num_pages: 0x0403_0201,
        actual: 0x0807_0605,
        free_page_hint_cmd_id: 0x0c0b_0a09,
        poison_val: 0x100f_0e0d,
    };

    #[test]
    fn layout_is_little_endian() {
        let mut data = [0; 16];
        CONFIG.write_to(&mut data);
        assert_eq!(data, core::array::from_fn(|i| i as u8 + 1));
        assert_eq!(Config::read_from(&data), CONFIG);
    }

    #[test]
    fn short_config_space() {
        for size in 0..16 {
            let mut data = vec![0; size];
            CONFIG.write_to(&mut data);
            let read = Config::read_from(&data);
            assert_eq!(read.num_pages != 0, size >= 4);
            assert_eq!(read.actual != 0, size >= 8);
            assert_eq!(read.free_page_hint_cmd_id != 0, size >= 12);
            assert_eq!(read.poison_val, 0);
        }
    }
}
