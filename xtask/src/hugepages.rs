// SPDX-License-Identifier: GPL-2.0-or-later

//! Huge pages of the host, for tests and the benchmark

use std::fs;

use crate::env::Env;

/// Huge pages that were reserved, and are given back in the end
pub struct HugePages(Option<u64>);

/// What qtests need: two VMs with 128 MiB each.  One test at a time uses huge
/// pages.
pub const FOR_QTESTS: u64 = 128;

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// Have at least `count` huge pages.  It takes root; tests that need them
    /// are skipped otherwise.
    pub fn reserve(env: &Env, count: u64) -> Self {
        let read = || fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse().ok();
        let Some(before) = read().filter(|n: &u64| *n < count) else {
            return Self(None);
        };
        let enough = fs::write(NR_HUGEPAGES, count.to_string()).is_ok()
            && read().is_some_and(|n: u64| n >= count);
        if !enough {
            env.say("cannot reserve huge pages: what needs them is skipped");
        }
        Self(Some(before))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            // It is only memory that stays reserved
            let _ = fs::write(NR_HUGEPAGES, before.to_string());
        }
    }
}
