// SPDX-License-Identifier: GPL-2.0-or-later

//! What to do if the guest takes pages out of the balloon because it runs out of
//! memory, while the host wants them to be there
//!
//! Linux inflates the balloon until it has the size that the configuration space
//! shows.  If it cannot have that size without running out of memory, it deflates
//! the balloon again, and so on, for ever.  Optionally, the device shows the size
//! that the guest was able to reach instead of the target for some time, so that
//! the guest comes to rest.

/// The longest time is this times the configured one.
const MAX_FACTOR: u32 = 64;

/// Whether the target is being held back.  All times are in milliseconds, of a
/// clock that stands still while the VM does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// When the target is to be shown again, if it is not now
    until: Option<u64>,
    /// How long the latest hold took, as a multiple of the configured time; 0 if
    /// there was none since the target was set
    factor: u32,
    /// When the latest one ended
    ended: u64,
}

impl Hold {
    /// Whether the target is held back
    pub const fn is_active(&self) -> bool {
        self.until.is_some()
    }

    /// The size of the balloon that the driver is to see as its target, in pages
    pub fn shown(&self, target: u32, actual: u32) -> u32 {
        if self.is_active() {
            target.min(actual)
        } else {
            target
        }
    }

    /// The balloon has become smaller without having been asked to.  `time` is
    /// the configured one.  Returns when the hold ends.
    ///
    /// If the guest deflates during a hold, that begins again.  If it does after
    /// one, before as much time has passed as that took, the next one takes twice
    /// the time.
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

    /// Time has passed.  Returns whether the target has to be shown again.
    pub fn elapsed(&mut self, now: u64) -> bool {
        let over = self.until.is_some_and(|until| until <= now);
        if over {
            self.until = None;
            self.ended = now;
        }
        over
    }

    /// The VM comes from another QEMU, where the driver saw `shown` as its
    /// target.  It tells whether there was a hold, but not since when, so that
    /// it begins again.  Returns when it ends.
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
        // less than what the guest has in the balloon is always shown
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
        // not soon enough
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
        // Neither does it last over the next migration
        assert_eq!(hold.arrive(100, 100, 60, 7, 10), None);
        assert!(!hold.is_active());
    }
}
