// SPDX-License-Identifier: GPL-2.0-or-later

//! Memory statistics (virtio 1.3, section 5.5.6.3)

use std::ffi::CStr;

/// Number of statistics that the specification defines
pub const VIRTIO_BALLOON_S_NR: usize = 16;

/// The most entries that the device reads from a buffer.  A driver needs one
/// entry for each statistic, but a buffer can be as large as the guest's
/// memory.
pub const MAX_ENTRIES: usize = 1024;

/// Names of the statistics in the `guest-stats` property; the index is the tag
/// that identifies the statistic in the queue.
pub const NAMES: [&CStr; VIRTIO_BALLOON_S_NR] = [
    c"stat-swap-in",
    c"stat-swap-out",
    c"stat-major-faults",
    c"stat-minor-faults",
    c"stat-free-memory",
    c"stat-total-memory",
    c"stat-available-memory",
    c"stat-disk-caches",
    c"stat-htlb-pgalloc",
    c"stat-htlb-pgfail",
    c"stat-oom-kills",
    c"stat-alloc-stalls",
    c"stat-async-scans",
    c"stat-direct-scans",
    c"stat-async-reclaims",
    c"stat-direct-reclaims",
];

/// The latest statistics of the guest
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// A statistic is `None` if the driver did not send it.
    values: [Option<u64>; VIRTIO_BALLOON_S_NR],
    /// When the driver sent them, in seconds since the Unix epoch; 0 if it
    /// never did
    pub last_update: i64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            values: [None; VIRTIO_BALLOON_S_NR],
            last_update: 0,
        }
    }
}

impl Stats {
    /// Replace all values with what the driver sent: pairs of tag and value.
    /// Unknown tags, which may come from a newer driver, are ignored.  If a tag
    /// occurs more than once, the last value counts.  Statistics that are
    /// missing become unknown.  Only the first [`MAX_ENTRIES`] entries are
    /// read.
    pub fn update(&mut self, entries: impl IntoIterator<Item = (u16, u64)>, now: i64) {
        self.values = [None; VIRTIO_BALLOON_S_NR];
        for (tag, value) in entries.into_iter().take(MAX_ENTRIES) {
            if let Some(slot) = self.values.get_mut(usize::from(tag)) {
                *slot = Some(value);
            }
        }
        self.last_update = now;
    }

    /// The names and values of all statistics
    pub fn iter(&self) -> impl Iterator<Item = (&'static CStr, Option<u64>)> + '_ {
        NAMES.into_iter().zip(self.values)
    }
}

/// Check a new value of `guest-stats-polling-interval`, in seconds; 0 disables
/// polling.
///
/// # Errors
///
/// Fails with the message for the user if the value is negative or does not fit
/// into 32 bits.
pub const fn check_poll_interval(value: i64) -> Result<u32, &'static str> {
    if value < 0 {
        Err("timer value must be greater than zero")
    } else if value > u32::MAX as i64 {
        Err("timer value is too big")
    } else {
        Ok(value as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(stats: &Stats, name: &CStr) -> Option<u64> {
        stats.iter().find(|(n, _)| *n == name).unwrap().1
    }

    #[test]
    fn nothing_is_known_at_first() {
        let stats = Stats::default();
        assert_eq!(stats.iter().count(), VIRTIO_BALLOON_S_NR);
        assert!(stats.iter().all(|(_, v)| v.is_none()));
        assert_eq!(stats.last_update, 0);
    }

    #[test]
    fn names_are_distinct() {
        let mut names = NAMES.to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), VIRTIO_BALLOON_S_NR);
    }

    #[test]
    fn partial_update_forgets_the_rest() {
        let mut stats = Stats::default();
        stats.update((0..16).map(|tag| (tag, 100 + u64::from(tag))), 1);
        assert_eq!(value(&stats, c"stat-swap-in"), Some(100));
        assert_eq!(value(&stats, c"stat-direct-reclaims"), Some(115));

        stats.update([(4, 7), (5, 8)], 2);
        assert_eq!(value(&stats, c"stat-free-memory"), Some(7));
        assert_eq!(value(&stats, c"stat-total-memory"), Some(8));
        assert_eq!(stats.iter().filter(|(_, v)| v.is_none()).count(), 14);
        assert_eq!(stats.last_update, 2);
    }

    #[test]
    fn unknown_and_repeated_tags() {
        let mut stats = Stats::default();
        stats.update([(16, 1), (u16::MAX, 2), (10, 3), (10, 4)], 1);
        assert_eq!(value(&stats, c"stat-oom-kills"), Some(4));
        assert_eq!(stats.iter().filter(|(_, v)| v.is_none()).count(), 15);
    }

    #[test]
    fn endless_input_ends() {
        let mut stats = Stats::default();
        stats.update(std::iter::repeat((3, 9)), 1);
        assert_eq!(value(&stats, c"stat-minor-faults"), Some(9));
    }

    #[test]
    fn poll_interval_limits() {
        assert_eq!(check_poll_interval(0), Ok(0));
        assert_eq!(check_poll_interval(i64::from(u32::MAX)), Ok(u32::MAX));
        assert_eq!(
            check_poll_interval(-1),
            Err("timer value must be greater than zero")
        );
        assert_eq!(
            check_poll_interval(i64::MIN),
            Err("timer value must be greater than zero")
        );
        assert_eq!(
            check_poll_interval(i64::from(u32::MAX) + 1),
            Err("timer value is too big")
        );
    }
}
