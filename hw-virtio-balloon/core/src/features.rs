// SPDX-License-Identifier: GPL-2.0-or-later

//! Feature bits of virtio-balloon (virtio 1.3, section 5.5.3)

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

/// Whether the mask of host features includes a bit.
pub const fn has_feature(features: u32, bit: u32) -> bool {
    bit < u32::BITS && features & (1 << bit) != 0
}

/// The features that are offered to the driver: `requested`, i.e. what the
/// transport and the common code support; `host_features`, i.e. what the user
/// has configured; and statistics, which always exist.  See
/// `virtio_balloon_get_features()` in C.
pub const fn offered(requested: u64, host_features: u32) -> u64 {
    requested | host_features as u64 | 1 << VIRTIO_BALLOON_F_STATS_VQ
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn has_feature_out_of_range() {
        assert!(has_feature(u32::MAX, 31));
        assert!(!has_feature(u32::MAX, 32));
        assert!(!has_feature(u32::MAX, u32::MAX));
        assert!(!has_feature(!(1 << 4), 4));
    }
}
