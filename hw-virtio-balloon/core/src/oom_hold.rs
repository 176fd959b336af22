// SPDX-License-Identifier: GPL-2.0-or-later

//! How long to hold back the target when the guest deflates the balloon because
//! it is out of memory, although the host wants the pages to stay there
//!
//! Linux inflates the balloon until it has the size that the configuration
//! space shows.  If the guest runs out of memory before that, it deflates the
//! balloon, inflates it again, and so on without end.  If the user has
//! configured a hold, the device does not show the target for some time, but
//! the size that the guest was able to reach, so that the guest stops
//! inflating.

/// The longest hold, as a multiple of the configured time
const MAX_FACTOR: u32 = 64;

/// The state of the hold.  All times are in milliseconds, of a clock that stops
/// while the VM is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// When the hold ends; `None` if the target is not held back
    until: Option<u64>,
    /// The duration of the latest hold as a multiple of the configured time; 0
    /// if there was no hold since the target was set
    factor: u32,
    /// When the latest hold ended
    ended: u64,
}

impl Hold {
    /// Whether the target is held back
    pub const fn is_active(&self) -> bool {
        self.until.is_some()
    }

    /// The size of the balloon that the driver sees as its target, in pages
    pub fn shown(&self, target: u32, actual: u32) -> u32 {
        if self.is_active() {
            target.min(actual)
        } else {
            target
        }
    }

    /// The balloon has become smaller although the host did not ask for that.
    /// `time` is the configured time.  Returns when the hold ends.
    ///
    /// If the guest deflates the balloon during a hold, the hold starts again.
    /// If the guest does so after a hold, and no more time has passed than the
    /// hold took, the next hold takes twice as long.
    pub fn deflated(&mut self, now: u64, time: u64) -> u64 {
        if !self.is_active() {
            let again = now < self.ended.saturating_add(self.duration(time));
            self.factor = if self.factor > 0 && again {
                MAX_FACTOR.min(self.factor.saturating_mul(2))
            } else {
                1
            };
        }
        let until = now.saturating_add(self.duration(time));
        self.until = Some(until);
        until
    }

    fn duration(&self, time: u64) -> u64 {
        time.saturating_mul(self.factor.into())
    }

    /// The timer has expired.  Returns whether the driver has to be shown the
    /// target again.
    pub fn elapsed(&mut self, now: u64) -> bool {
        let over = self.until.is_some_and(|until| until <= now);
        if over {
            self.until = None;
            self.ended = now;
        }
        over
    }

    /// The VM was migrated; at the source, the driver saw `shown` as its
    /// target.  That tells whether there was a hold, but not when it began, so
    /// it starts again.  Returns when it ends.
    pub fn arrive(
        &mut self,
        shown: u32,
        target: u32,
        actual: u32,
        now: u64,
        time: u64,
    ) -> Option<u64> {
        *self = Self::default();
        (shown == actual && actual < target).then(|| self.deflated(now, time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_held_back_for_a_time() {
        let mut hold = Hold::default();
        assert_eq!(hold.shown(100, 60), 100);
        assert!(!hold.elapsed(1000));

        assert_eq!(hold.deflated(1000, 500), 1500);
        assert_eq!(hold.shown(100, 60), 60);
        // a target below the size of the balloon is always shown
        assert_eq!(hold.shown(50, 60), 50);
        assert!(!hold.elapsed(1499));
        assert!(hold.is_active());
        assert!(hold.elapsed(1500));
        assert!(!hold.elapsed(1500));
        assert_eq!(hold.shown(100, 60), 100);
    }

    #[test]
    fn it_takes_longer_if_it_repeats() {
        let mut hold = Hold::default();
        let mut now = 1000;
        for factor in [1, 2, 4, 8, 16, 32, 64, 64] {
            assert_eq!(hold.deflated(now, 10), now + 10 * factor);
            // again, during the hold
            now += 5;
            assert_eq!(hold.deflated(now, 10), now + 10 * factor);
            now += 10 * factor;
            assert!(hold.elapsed(now));
            now += 10 * factor - 1;
        }
        // more time has passed than the hold took
        now += 1;
        assert_eq!(hold.deflated(now, 10), now + 10);
    }

    #[test]
    fn no_time_is_too_long() {
        let mut hold = Hold::default();
        let time = u64::from(u32::MAX) * 1000;
        for _ in 0..10 {
            let until = hold.deflated(u64::MAX - 1, time);
            assert_eq!(until, u64::MAX);
            assert!(hold.elapsed(u64::MAX));
        }
    }

    #[test]
    fn migration_continues_it() {
        let mut hold = Hold::default();
        // The guest has what it was asked for
        assert_eq!(hold.arrive(100, 100, 100, 7, 10), None);
        // It is still inflating
        assert_eq!(hold.arrive(100, 100, 60, 7, 10), None);
        assert!(!hold.is_active());
        assert_eq!(hold.arrive(60, 100, 60, 7, 10), Some(17));
        assert_eq!(hold.shown(100, 60), 60);
        // A hold at the destination is not kept after another migration either
        assert_eq!(hold.arrive(100, 100, 60, 7, 10), None);
        assert!(!hold.is_active());
    }
}
