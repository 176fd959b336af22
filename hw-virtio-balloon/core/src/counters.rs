// SPDX-License-Identifier: GPL-2.0-or-later

//! What the device has done so far, for those who operate it

use std::ffi::CStr;

/// Counters since the device was created; they are not migrated
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages that the driver has put into the balloon
    pub pages_inflated: u64,
    /// Pages that the driver has taken out of the balloon
    pub pages_deflated: u64,
    /// Those of them for which the host had not asked: with `deflate-on-oom`,
    /// the guest was running out of memory
    pub pages_deflated_unasked: u64,
    /// Batches of ranges that were discarded
    pub discard_calls: u64,
    /// Ranges in those batches
    pub discard_ranges: u64,
    /// Memory that was discarded, in bytes
    pub bytes_discarded: u64,
    /// Ranges that the host could not discard
    pub discard_errors: u64,
    /// PFNs at which there is no RAM
    pub bad_pfns: u64,
}

impl Counters {
    /// Names and values of the members of the `balloon-counters` property.
    /// `partial_host_pages` is the current number of host pages that wait for
    /// the rest of them to be inflated, `oom_holds` how often the target was
    /// held back, and `oom_hold_active` whether it is.
    pub const fn members(
        &self,
        partial_host_pages: u64,
        oom_holds: u64,
        oom_hold_active: bool,
    ) -> [(&'static CStr, u64); 11] {
        [
            (c"pages-inflated", self.pages_inflated),
            (c"pages-deflated", self.pages_deflated),
            (c"pages-deflated-unasked", self.pages_deflated_unasked),
            (c"discard-calls", self.discard_calls),
            (c"discard-ranges", self.discard_ranges),
            (c"bytes-discarded", self.bytes_discarded),
            (c"discard-errors", self.discard_errors),
            (c"bad-pfns", self.bad_pfns),
            (c"partial-host-pages", partial_host_pages),
            (c"oom-holds", oom_holds),
            (c"oom-hold-active", oom_hold_active as u64),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_shown() {
        let counters = Counters {
            pages_inflated: 1,
            pages_deflated: 2,
            pages_deflated_unasked: 3,
            discard_calls: 4,
            discard_ranges: 5,
            bytes_discarded: 6,
            discard_errors: 7,
            bad_pfns: 8,
        };
        let mut values = counters.members(9, 10, true).map(|(_, value)| value);
        values.sort_unstable();
        assert_eq!(values, [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }
}
