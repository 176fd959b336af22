// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs of consecutive pages
//!
//! The host needs hardly more time to discard a large range of memory than to
//! discard one page, but drivers send one PFN for each page.  Linux sends them
//! in descending order, as they come from its buddy allocator.

/// Pages with consecutive PFNs, `first` to `last` inclusive
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// PFN of the first page
    pub first: u32,
    /// PFN of the last page; not less than `first`
    pub last: u32,
}

impl Run {
    /// Number of pages in the run
    pub const fn pages(&self) -> u64 {
        (self.last - self.first) as u64 + 1
    }
}

/// Collects PFNs and makes runs of them.
///
/// A PFN that extends the latest run, at either end, is merged with it at
/// once.  With the drivers that exist, this leaves few runs to sort.
#[derive(Debug, Default)]
pub struct Runs {
    runs: Vec<Run>,
    /// A buffer for `radix_sort()`, kept to avoid allocations
    scratch: Vec<Run>,
    pfns: usize,
}

const DIGIT_BITS: u32 = 11;
const DIGITS: usize = 1 << DIGIT_BITS;

/// From this number of runs on, radix sort is faster than a sort by
/// comparison.  If the PFNs are in random order, there are as many runs as
/// pages: with 32,768 of them, radix sort takes 5 ns for each page instead of
/// 13.  Where the host has little to do (deflating private memory, hugetlbfs),
/// the device takes 80 to 110 ns for each page in total.
const RADIX_SORT_MIN: usize = 1024;

/// Sort by `first`, beginning with the least significant digit.  Digits in
/// which no two runs differ are skipped, so there are two passes if the guest
/// has less than 16 GiB of memory.
fn radix_sort(runs: &mut Vec<Run>, scratch: &mut Vec<Run>) {
    let (all, any) = runs.iter().fold((u32::MAX, 0), |(all, any), run| {
        (all & run.first, any | run.first)
    });
    let differing = all ^ any;

    for shift in (0..u32::BITS).step_by(DIGIT_BITS as usize) {
        if (differing >> shift) as usize % DIGITS == 0 {
            continue;
        }
        let digit = |run: &Run| (run.first >> shift) as usize % DIGITS;

        let mut positions = [0usize; DIGITS];
        for run in runs.iter() {
            positions[digit(run)] += 1;
        }
        let mut next = 0;
        for position in &mut positions {
            next += std::mem::replace(position, next);
        }
        scratch.clone_from(runs);
        for run in scratch.iter() {
            let position = &mut positions[digit(run)];
            // In bounds, because each run was counted above
            runs[*position] = *run;
            *position += 1;
        }
    }
}

impl Runs {
    /// Add a page.
    // inline because another crate calls it for each page
    #[inline]
    pub fn push(&mut self, pfn: u32) {
        self.pfns += 1;
        if let Some(run) = self.runs.last_mut() {
            if pfn.wrapping_sub(1) == run.last && pfn != 0 {
                run.last = pfn;
                return;
            }
            if pfn.wrapping_add(1) == run.first && run.first != 0 {
                run.first = pfn;
                return;
            }
            if (run.first..=run.last).contains(&pfn) {
                return;
            }
        }
        self.runs.push(Run {
            first: pfn,
            last: pfn,
        });
    }

    /// How often [`push`](Self::push) was called since the last
    /// [`clear`](Self::clear)
    #[inline]
    pub const fn pfns(&self) -> usize {
        self.pfns
    }

    /// Sort the runs, and merge those that overlap or are adjacent.
    pub fn merge(&mut self) {
        if self.runs.len() < RADIX_SORT_MIN {
            self.runs.sort_unstable_by_key(|run| run.first);
        } else {
            radix_sort(&mut self.runs, &mut self.scratch);
        }
        self.runs.dedup_by(|next, run| {
            // `next` comes after `run`, and is removed if this returns true
            let joined = next.first <= run.last || next.first - run.last == 1;
            if joined {
                run.last = run.last.max(next.last);
            }
            joined
        });
    }

    /// The runs, which are disjoint and in ascending order if nothing was added
    /// after [`merge`](Self::merge)
    pub fn as_slice(&self) -> &[Run] {
        &self.runs
    }

    /// Forget all pages.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.pfns = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::tests::Rng;

    fn runs(pfns: impl IntoIterator<Item = u32>) -> Vec<(u32, u32)> {
        let mut runs = Runs::default();
        pfns.into_iter().for_each(|pfn| runs.push(pfn));
        runs.merge();
        runs.as_slice().iter().map(|r| (r.first, r.last)).collect()
    }

    #[test]
    fn orders() {
        assert_eq!(runs([]), []);
        assert_eq!(runs(5..300), [(5, 299)]);
        assert_eq!(runs((5..300).rev()), [(5, 299)]);
        assert_eq!(runs([7, 5, 6, 6, 5, 7]), [(5, 7)]);
        assert_eq!(runs([9, 1, 8, 2, 4]), [(1, 2), (4, 4), (8, 9)]);
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(runs([0, u32::MAX]), [(0, 0), (u32::MAX, u32::MAX)]);
        assert_eq!(runs([u32::MAX, 0]), [(0, 0), (u32::MAX, u32::MAX)]);
        assert_eq!(runs([u32::MAX, u32::MAX - 1]), [(u32::MAX - 1, u32::MAX)]);
        assert_eq!(runs([1, 0]), [(0, 1)]);
        assert_eq!(runs([0, 0]), [(0, 0)]);
        let all = Run {
            first: 0,
            last: u32::MAX,
        };
        assert_eq!(all.pages(), 1 << 32);
    }

    #[test]
    fn radix_sort_is_a_sort() {
        let mut rng = Rng(3);
        for bits in [1, 8, 12, 22, 23, 32] {
            let mut runs: Vec<_> = (0..5000)
                .map(|i| Run {
                    first: rng.below(u32::MAX) >> (32 - bits),
                    last: i,
                })
                .collect();
            let mut sorted = runs.clone();
            sorted.sort_by_key(|run| run.first);
            radix_sort(&mut runs, &mut Vec::new());
            assert_eq!(runs, sorted);
        }
        radix_sort(&mut Vec::new(), &mut Vec::new());
    }

    #[test]
    fn cleared() {
        let mut r = Runs::default();
        r.push(1);
        r.push(1);
        assert_eq!(r.pfns(), 2);
        r.clear();
        assert_eq!(r.pfns(), 0);
        assert!(r.as_slice().is_empty());
    }

    /// Compares with a set of single pages.
    #[test]
    fn same_as_single_pages() {
        let mut rng = Rng(1);
        for round in 0..2000 {
            let space = 1 + rng.below(600);
            let base = if round % 2 == 0 { 0 } else { u32::MAX - space };
            let mut pfns = Vec::new();
            // in some rounds, enough runs for radix sort
            let many = if round % 100 == 0 { 4000 } else { 0 };
            for _ in 0..rng.below(40) + many {
                let (first, len) = (rng.below(space), 1 + rng.below(20));
                let part = (first..(first + len).min(space + 1)).map(|pfn| base + pfn);
                if rng.below(2) == 0 {
                    pfns.extend(part);
                } else {
                    pfns.extend(part.rev());
                }
            }

            let set: BTreeSet<u32> = pfns.iter().copied().collect();
            let runs = runs(pfns);
            let expanded: Vec<u32> = runs.iter().flat_map(|&(a, b)| a..=b).collect();
            assert!(expanded.iter().eq(&set));
            // no two runs can be merged
            let gaps = runs.windows(2).all(|w| w[1].0 - w[0].1 > 1);
            assert!(gaps, "{runs:?}");
        }
    }
}
