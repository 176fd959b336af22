// SPDX-License-Identifier: GPL-2.0-or-later

//! Which parts of a host page are in the balloon

use std::ops::Range;

const WORD_BITS: u64 = u64::BITS as u64;

/// Which balloon pages of a host page are in the balloon
#[derive(Debug, Default)]
pub enum Parts {
    #[default]
    None,
    Some {
        bitmap: Box<[u64]>,
        /// How many bits are set
        count: u64,
    },
    All,
}

/// A mask of the bits of `range` that are in the word that begins with bit
/// `start`
const fn mask(range: &Range<u64>, start: u64) -> u64 {
    let end = start + WORD_BITS;
    if range.end <= start || range.start >= end {
        return 0;
    }
    let mut mask = u64::MAX;
    if range.start > start {
        mask &= u64::MAX << (range.start - start);
    }
    if range.end < end {
        mask &= u64::MAX >> (end - range.end);
    }
    mask
}

impl Parts {
    pub const fn is_partial(&self) -> bool {
        matches!(self, Self::Some { .. })
    }

    /// Add or remove `range`, which is relative to the host page.  The host
    /// page consists of `per` balloon pages.  Returns whether this has changed
    /// anything.
    pub fn update(&mut self, range: &Range<u64>, per: u64, insert: bool) -> bool {
        match (&*self, insert) {
            (Self::None, false) | (Self::All, true) => return false,
            _ if range.end - range.start >= per => {
                *self = if insert { Self::All } else { Self::None };
                return true;
            }
            _ => {}
        }
        let (mut bitmap, old) = match std::mem::take(self) {
            Self::Some { bitmap, count } => (bitmap, count),
            parts => {
                let all = matches!(parts, Self::All);
                // HostPages::new() limits per to 32 bits.
                let mut bitmap = vec![0u64; per.div_ceil(WORD_BITS) as usize];
                if all {
                    for (start, word) in (0..).step_by(WORD_BITS as usize).zip(&mut bitmap) {
                        *word = mask(&(0..per), start);
                    }
                }
                (bitmap.into_boxed_slice(), if all { per } else { 0 })
            }
        };
        let first = range.start / WORD_BITS;
        let words = range.end.div_ceil(WORD_BITS) - first;
        let mut count = old;
        for (i, word) in (first..)
            .zip(bitmap.iter_mut().skip(first as usize))
            .take(words as usize)
        {
            let mask = mask(range, i * WORD_BITS);
            let new = if insert { *word | mask } else { *word & !mask };
            count += u64::from((new & !*word).count_ones());
            count -= u64::from((*word & !new).count_ones());
            *word = new;
        }
        *self = if count == 0 {
            Self::None
        } else if count >= per {
            Self::All
        } else {
            Self::Some { bitmap, count }
        };
        count != old
    }
}
