// SPDX-License-Identifier: GPL-2.0-or-later

//! How much to do before yielding to the main loop
//!
//! The budget counts work instead of measuring time.  What the device does
//! therefore depends only on the guest and not on the speed of the host: it is
//! the same when the VM is replayed, and in every run of a test.

/// How much more memory is discarded in a turn if that is cheap
const CHEAP: u64 = 8;

/// What may still be done in a turn
///
/// Collecting elements stops when the budget has no buffers or PFNs left, and
/// discarding stops when it has no ranges or bytes left.  The limits are
/// separate because each of these four can dominate the cost of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Buffers of virtqueue elements to map; an element counts as one more
    pub buffers: usize,
    /// PFNs to read and to sort
    pub pfns: usize,
    /// Ranges of guest memory to discard or to populate
    pub ranges: usize,
    /// Memory to discard, in bytes.  A host page that is larger than what is
    /// left is discarded as a whole.
    pub bytes: u64,
    /// A range that exceeds the budget is divided at a multiple of this size,
    /// in bytes; a power of two, and at least the size of a balloon page
    pub align: u64,
}

impl Budget {
    /// The budget of one turn.
    ///
    /// * 4096 buffers: four elements of the largest size.
    /// * 32,768 PFNs: as many as Linux can put into a queue (128 elements of
    ///   256).
    /// * 512 ranges, which take up to 4 us each if the memory is shared.
    /// * 16 MiB of shared memory in small pages; 128 MiB of other memory, which
    ///   is what Linux reports at once (32 ranges of 4 MiB).  Ranges are divided
    ///   where transparent huge pages end.
    ///
    /// Looking up the memory region of a range is not charged, because a region
    /// is only looked up once for all ranges that it contains.
    ///
    /// docs/performance.md has the cost of the most expensive turn.
    pub const TURN: Self = Self {
        buffers: 4096,
        pfns: 128 * 256,
        ranges: 512,
        bytes: 16 << 20,
        align: 2 << 20,
    };

    /// Whether it is time to yield
    pub const fn is_spent(&self) -> bool {
        self.buffers == 0 || self.pfns == 0 || self.ranges == 0 || self.bytes == 0
    }

    /// Whether no more may be discarded in this turn
    pub const fn is_discard_spent(&self) -> bool {
        self.ranges == 0 || self.bytes == 0
    }

    /// An element with a number of buffers was taken from the queue.
    pub fn charge_element(&mut self, buffers: usize) {
        self.buffers = self.buffers.saturating_sub(buffers.saturating_add(1));
    }

    /// A number of PFNs was read.
    pub fn charge_pfns(&mut self, pfns: usize) {
        self.pfns = self.pfns.saturating_sub(pfns);
    }

    /// The most memory to discard at once, in bytes, see
    /// [`charge_range`](Self::charge_range)
    pub const fn piece(&self, cheap: bool) -> u64 {
        let bytes = if cheap {
            self.bytes.saturating_mul(CHEAP)
        } else {
            self.bytes
        };
        let whole = bytes & !(self.align - 1);
        if whole < self.align {
            self.align
        } else {
            whole
        }
    }

    /// A range of memory is about to be discarded or populated.
    ///
    /// Private anonymous memory and huge pages are `cheap`: the host needs less
    /// than half as long for each byte.  The charge is even lower, because fewer
    /// and larger calls are faster; a turn that discards 128 MiB of private
    /// memory in small pages takes up to four times as long as one that discards
    /// 16 MiB of shared memory (docs/performance.md).
    pub fn charge_range(&mut self, bytes: u64, cheap: bool) {
        let bytes = if cheap { bytes / CHEAP } else { bytes };
        self.ranges = self.ranges.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_ends_the_turn() {
        assert!(!Budget::TURN.is_spent());
        let spent = |f: &dyn Fn(&mut Budget)| {
            let mut budget = Budget::TURN;
            f(&mut budget);
            (budget.is_spent(), budget.is_discard_spent())
        };
        assert_eq!(spent(&|b| b.charge_element(4094)), (false, false));
        assert_eq!(spent(&|b| b.charge_element(4095)), (true, false));
        assert_eq!(spent(&|b| b.charge_element(usize::MAX)), (true, false));
        assert_eq!(spent(&|b| b.charge_pfns(32767)), (false, false));
        assert_eq!(spent(&|b| b.charge_pfns(usize::MAX)), (true, false));
        let bytes = |bytes, cheap| spent(&|b| b.charge_range(bytes, cheap));
        assert_eq!(bytes((16 << 20) - 1, false), (false, false));
        assert_eq!(bytes(16 << 20, false), (true, true));
        assert_eq!(bytes(u64::MAX, false), (true, true));
        assert_eq!(bytes((128 << 20) - 8, true), (false, false));
        assert_eq!(bytes(128 << 20, true), (true, true));
        assert_eq!(Budget::TURN.piece(true), 128 << 20);
        assert_eq!(Budget::TURN.piece(false), 16 << 20);
        let ranges = |n, cheap| spent(&|b| (0..n).for_each(|_| b.charge_range(0, cheap)));
        for cheap in [false, true] {
            assert_eq!(ranges(511, cheap), (false, false));
            assert_eq!(ranges(512, cheap), (true, true));
            assert_eq!(ranges(513, cheap), (true, true));
        }
    }
}
