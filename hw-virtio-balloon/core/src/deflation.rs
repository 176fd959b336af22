// SPDX-License-Identifier: GPL-2.0-or-later

//! Recognizes a guest that makes the balloon smaller because it is out of
//! memory
//!
//! With `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`, a driver may take pages out of the
//! balloon although the host wants them to stay there.  A page can also leave
//! the balloon for other reasons:
//!
//! * Linux moves pages of the balloon when it compacts memory: it inflates one
//!   page and deflates another.  The size of the balloon does not change, and
//!   the driver does not write it.
//! * A driver that is about to be removed or suspended empties the balloon,
//!   writes the size once, and resets the device.
//! * The host may want a smaller balloon, or may have wanted one for some time.
//!
//! Therefore the pages in the balloon are counted.  What matters is by how much
//! that number has decreased between two writes of the size by the driver.  The
//! value that the driver writes is not enough, because legacy drivers write it
//! byte by byte.

/// The time that a driver may take between emptying the balloon and resetting
/// the device, in milliseconds
const RESET_TIME: u64 = 1000;

/// The state from which unasked deflation is recognized; sizes are in balloon
/// pages
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deflation {
    /// Pages in the balloon, as counted from what was inflated and deflated
    level: u64,
    /// `level` when the driver last wrote the size
    settled: u64,
    /// The smallest size that the host has wanted since the driver last wrote
    /// the size
    lowest_target: u32,
    /// How many pages left the balloon unasked when it was emptied, and when
    /// that was
    emptied: Option<(u64, u64)>,
    /// Other pages that have left the balloon unasked
    unasked: u64,
    /// When they last did
    last: Option<u64>,
}

impl Deflation {
    /// Pages that have left the balloon although the host wanted them to stay.
    /// `now` is the time in milliseconds.
    pub fn unasked(&self, now: u64) -> u64 {
        self.unasked
            .wrapping_add(self.emptied_unasked(now).map_or(0, |(pages, _)| pages))
    }

    /// `emptied`, if the driver has had the time to reset the device
    fn emptied_unasked(&self, now: u64) -> Option<(u64, u64)> {
        self.emptied
            .filter(|(_, when)| now.saturating_sub(*when) >= RESET_TIME)
    }

    /// For how long no pages have left the balloon unasked, in milliseconds;
    /// `None` if none have since the device was reset or migrated.
    pub fn since_unasked(&self, now: u64) -> Option<u64> {
        let emptied = self.emptied_unasked(now).map(|(_, when)| when);
        emptied.or(self.last).map(|when| now.saturating_sub(when))
    }

    /// Pages in the balloon
    pub fn level(&self) -> u32 {
        u32::try_from(self.level).unwrap_or(u32::MAX)
    }

    /// The driver continues to use the balloon, so emptying it was not the
    /// preparation of a reset.
    fn go_on(&mut self) {
        if let Some((pages, when)) = self.emptied.take() {
            self.unasked = self.unasked.wrapping_add(pages);
            self.last = Some(when);
        }
    }

    /// Pages have gone into the balloon.
    pub fn inflated(&mut self, pages: u64) {
        self.go_on();
        self.level = self.level.saturating_add(pages);
    }

    /// Pages have left the balloon.
    pub fn deflated(&mut self, pages: u64) {
        self.go_on();
        self.level = self.level.saturating_sub(pages);
    }

    /// The host wants another size of the balloon.
    pub fn target_changed(&mut self, target: u32) {
        self.lowest_target = self.lowest_target.min(target);
    }

    /// The driver has written the size of the balloon, or some bytes of it; the
    /// field contains `actual` now.  `target` is the size that the host wants,
    /// and `may_deflate` tells whether the driver has accepted
    /// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
    pub fn size_written(&mut self, actual: u32, target: u32, may_deflate: bool, now: u64) {
        let wanted = self.settled.min(self.lowest_target.into());
        let missing = wanted.saturating_sub(self.level);
        if may_deflate && missing > 0 {
            if self.level == 0 {
                self.emptied = Some((missing, now));
            } else {
                self.unasked = self.unasked.wrapping_add(missing);
                self.last = Some(now);
            }
        }
        // A page that is being moved is counted twice for a moment.
        self.settled = self.level.min(actual.into());
        self.lowest_target = target;
    }

    /// The device was reset or migrated: `size` pages are in the balloon now.
    pub fn restart(&mut self, size: u32, target: u32) {
        self.level = size.into();
        self.settled = size.into();
        self.lowest_target = target;
        self.emptied = None;
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that behaves like the one of Linux
    struct Driver {
        deflation: Deflation,
        actual: u32,
        target: u32,
        accepted: bool,
        now: u64,
    }

    impl Driver {
        fn new(target: u32, actual: u32) -> Self {
            let mut driver = Self {
                deflation: Deflation::default(),
                actual: 0,
                target: 0,
                accepted: true,
                now: 0,
            };
            driver.set_target(target);
            driver.inflate(actual);
            assert_eq!(driver.unasked(), 0);
            driver
        }

        fn set_target(&mut self, target: u32) {
            self.target = target;
            self.deflation.target_changed(target);
        }

        fn write_size(&mut self, actual: u32) {
            self.actual = actual;
            self.deflation
                .size_written(actual, self.target, self.accepted, self.now);
        }

        fn inflate(&mut self, pages: u32) {
            self.deflation.inflated(pages.into());
            self.write_size(self.actual + pages);
        }

        fn deflate(&mut self, pages: u32) {
            self.deflation.deflated(pages.into());
            self.write_size(self.actual - pages);
        }

        fn unasked(&self) -> u64 {
            self.deflation.unasked(self.now)
        }
    }

    #[test]
    fn out_of_memory() {
        let mut driver = Driver::new(10_000, 8_000);
        for i in 1..4 {
            driver.deflate(256);
            assert_eq!(driver.unasked(), 256 * i);
        }
        // the driver inflates again, and runs out of memory again
        driver.inflate(512);
        driver.deflate(100);
        assert_eq!(driver.unasked(), 868);
        driver.now += 70;
        assert_eq!(driver.deflation.since_unasked(driver.now), Some(70));
        driver.deflation.restart(0, 0);
        assert_eq!(driver.deflation.since_unasked(driver.now), None);
    }

    #[test]
    fn without_the_feature() {
        let mut driver = Driver::new(10_000, 8_000);
        driver.accepted = false;
        driver.deflate(256);
        driver.deflate(7744);
        driver.now += 5000;
        assert_eq!(driver.unasked(), 0);
    }

    /// What the host has asked for at any time is not counted as unasked.
    #[test]
    fn asked() {
        let mut driver = Driver::new(1000, 1000);
        driver.set_target(400);
        driver.deflate(256);
        assert_eq!(driver.unasked(), 0);
        driver.set_target(2000);
        driver.deflate(256);
        assert_eq!(driver.unasked(), 0);
        driver.deflate(10);
        assert_eq!(driver.unasked(), 10);

        // the driver deflates more than the host wants
        driver.set_target(470);
        driver.deflate(18);
        assert_eq!((driver.actual, driver.unasked()), (460, 20));
    }

    #[test]
    fn pages_are_moved() {
        let mut driver = Driver::new(1000, 800);
        for _ in 0..100 {
            driver.deflation.inflated(1);
            driver.deflation.deflated(1);
        }
        driver.deflate(1);
        assert_eq!(driver.unasked(), 1);
        // The driver writes the size while a page is counted twice.
        driver.deflation.inflated(1);
        driver.inflate(10);
        driver.deflation.deflated(1);
        driver.inflate(10);
        assert_eq!(driver.unasked(), 1);
        driver.deflation.inflated(1);
        driver.deflation.deflated(1);
        driver.deflate(2);
        assert_eq!(driver.unasked(), 3);
    }

    /// The driver is unbound, or unloaded, or the guest is suspended.
    #[test]
    fn a_reset_explains_it() {
        let mut driver = Driver::new(1000, 800);
        driver.deflate(100);
        driver.deflation.deflated(300);
        driver.deflation.deflated(400);
        driver.write_size(0);
        driver.now += 3;
        assert_eq!(driver.unasked(), 100);
        driver.deflation.restart(0, 1000);
        driver.now += 5000;
        assert_eq!(driver.unasked(), 100);
        driver.inflate(500);
        assert_eq!(driver.unasked(), 100);
    }

    /// The balloon becomes empty without a reset: the driver continues to use
    /// the balloon, or does nothing.
    #[test]
    fn emptied() {
        let mut driver = Driver::new(1000, 800);
        driver.deflate(800);
        assert_eq!(driver.unasked(), 0);
        driver.now += RESET_TIME - 1;
        assert_eq!(driver.unasked(), 0);
        assert_eq!(driver.deflation.since_unasked(driver.now), None);
        driver.now += 1;
        assert_eq!(driver.unasked(), 800);
        let since = |d: &Driver| d.deflation.since_unasked(d.now);
        assert_eq!(since(&driver), Some(RESET_TIME));
        driver.inflate(100);
        assert_eq!(driver.unasked(), 800);
        assert_eq!(since(&driver), Some(RESET_TIME));
        driver.deflate(100);
        driver.inflate(1);
        assert_eq!(driver.unasked(), 900);
    }

    /// Legacy drivers write the lowest byte first.
    #[test]
    fn byte_by_byte() {
        for (old, new) in [(0x1_0200, 0x1_0100), (0x1_0000, 0xff00), (0x1_0010, 0xff10)] {
            let mut driver = Driver::new(0x2_0000, old);
            driver.deflation.deflated((old - new).into());
            for bytes in 1..=4 {
                let mask = u32::MAX >> (32 - 8 * bytes);
                driver.write_size(old & !mask | new & mask);
                assert_eq!(driver.unasked(), u64::from(old - new));
            }
            // and back
            driver.deflation.inflated((old - new).into());
            for bytes in 1..=4 {
                let mask = u32::MAX >> (32 - 8 * bytes);
                driver.write_size(new & !mask | old & mask);
                assert_eq!(driver.unasked(), u64::from(old - new));
            }
            driver.deflate(1);
            assert_eq!(driver.unasked(), u64::from(old - new) + 1);
        }
    }

    #[test]
    fn a_driver_that_makes_no_sense() {
        let mut driver = Driver::new(1000, 0);
        driver.deflation.deflated(5);
        driver.write_size(u32::MAX);
        driver.deflation.inflated(u64::MAX);
        driver.deflation.inflated(u64::MAX);
        driver.write_size(0);
        driver.deflation.deflated(u64::MAX - 1);
        driver.write_size(7);
        assert_eq!(driver.unasked(), 0);
    }
}
