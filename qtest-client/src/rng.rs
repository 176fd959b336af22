// SPDX-License-Identifier: GPL-2.0-or-later

//! A small random number generator.  It does not come from a crate, because a
//! seed has to give the same sequence with every version of the dependencies:
//! reports of differences contain seeds, and measurements are compared with
//! older ones.

/// `SplitMix64`
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator with the given seed
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number less than `n`
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n.max(1)
    }

    /// A number from `low` to `high`, inclusive
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True with a probability of `n` percent
    pub fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }

    /// One of the given values
    pub fn pick<T: Clone>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize].clone()
    }

    /// Put a list in random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_of_a_seed_is_fixed() {
        // the output of the reference implementation
        let mut rng = Rng::new(1_234_567);
        assert_eq!(rng.next_u64(), 6_457_827_717_110_365_317);
        assert_eq!(rng.next_u64(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn shuffled_lists_have_the_same_items() {
        let mut list: Vec<_> = (0..100).collect();
        Rng::new(1).shuffle(&mut list);
        assert!(list.iter().enumerate().any(|(i, n)| i != *n));
        list.sort_unstable();
        assert_eq!(list, (0..100).collect::<Vec<_>>());
    }
}
