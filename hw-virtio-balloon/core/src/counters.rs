// SPDX-License-Identifier: GPL-2.0-or-later

//! Counters for the `balloon-counters` property

use std::ffi::CStr;

/// What the device has done since it was created.  The counters are not
/// migrated, and wrap around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages that the driver has put into the balloon
    pub pages_inflated: u64,
    /// Pages that the driver has taken out of the balloon
    pub pages_deflated: u64,
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
    /// How often the host had no memory to populate pages that leave the
    /// balloon
    pub populate_errors: u64,
    /// Ranges that the driver has reported as free, and that the device has
    /// tried to discard
    pub reports: u64,
    /// Size of those ranges in bytes
    pub bytes_reported: u64,
    /// Ranges that the driver has reported as free, and that the device has not
    /// tried to discard
    pub reports_ignored: u64,
    /// Ranges that the driver has given as hints, and that migration need not
    /// send
    pub hints: u64,
    /// How often the driver was asked for statistics
    pub stats_requests: u64,
    /// How often the driver has sent statistics
    pub stats_answers: u64,
}

/// What the property shows in addition to the counters
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Pages that were taken out of the balloon because the guest was out of
    /// memory, see [`Deflation`](crate::deflation::Deflation)
    pub pages_deflated_unasked: u64,
    /// Host pages of which only a part is in the balloon
    pub partial_host_pages: u64,
    /// Whether the guest waits for memory of the host
    pub waiting_for_memory: bool,
    /// How often the target was held back
    pub oom_holds: u64,
    /// Whether the target is held back
    pub oom_hold_active: bool,
}

/// Add to a counter.  It wraps around, because an overflow would end the VM.
pub fn count(counter: &mut u64, n: u64) {
    *counter = counter.wrapping_add(n);
}

impl Counters {
    /// Names and values of the members of the `balloon-counters` property
    pub const fn members(&self, state: &State) -> [(&'static CStr, u64); 19] {
        [
            (c"pages-inflated", self.pages_inflated),
            (c"pages-deflated", self.pages_deflated),
            (c"pages-deflated-unasked", state.pages_deflated_unasked),
            (c"discard-calls", self.discard_calls),
            (c"discard-ranges", self.discard_ranges),
            (c"bytes-discarded", self.bytes_discarded),
            (c"discard-errors", self.discard_errors),
            (c"bad-pfns", self.bad_pfns),
            (c"partial-host-pages", state.partial_host_pages),
            (c"populate-errors", self.populate_errors),
            (c"waiting-for-memory", state.waiting_for_memory as u64),
            (c"oom-holds", state.oom_holds),
            (c"oom-hold-active", state.oom_hold_active as u64),
            (c"reports", self.reports),
            (c"bytes-reported", self.bytes_reported),
            (c"reports-ignored", self.reports_ignored),
            (c"hints", self.hints),
            (c"stats-requests", self.stats_requests),
            (c"stats-answers", self.stats_answers),
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
            discard_calls: 3,
            discard_ranges: 4,
            bytes_discarded: 5,
            discard_errors: 6,
            bad_pfns: 7,
            populate_errors: 8,
            reports: 12,
            bytes_reported: 13,
            reports_ignored: 14,
            hints: 15,
            stats_requests: 16,
            stats_answers: 17,
        };
        let state = State {
            pages_deflated_unasked: 9,
            partial_host_pages: 10,
            waiting_for_memory: false,
            oom_holds: 11,
            oom_hold_active: true,
        };
        let mut values = counters.members(&state).map(|(_, value)| value);
        values.sort_unstable();
        let expected: Vec<u64> = [0, 1].into_iter().chain(1..=17).collect();
        assert_eq!(values.as_slice(), expected);
    }

    #[test]
    fn counters_wrap() {
        let mut counter = u64::MAX - 1;
        count(&mut counter, 5);
        assert_eq!(counter, 3);
    }
}
