// SPDX-License-Identifier: GPL-2.0-or-later

//! What the operations have brought about

use std::collections::BTreeMap;

use crate::differences::{Difference, Uses};

/// What happened
#[derive(Debug, Clone, Default)]
pub struct Effects {
    /// Elements that were returned, for each kind of queue
    pub used: u64,
    /// Pages that became zero
    pub discarded: u64,
    /// Devices that became broken
    pub broken: u64,
    /// Changes of the configuration space
    pub config: u64,
    /// Changes of the interrupt status to nonzero
    pub interrupts: u64,
    /// QMP events
    pub events: BTreeMap<String, u64>,
    /// Errors of QMP commands
    pub qmp_errors: u64,
    /// Successful QMP commands
    pub qmp_results: u64,
    /// `guest-stats` with values
    pub stats: u64,
    /// Migrations of both VMs
    pub migrations: u64,
    /// Those in which the VMs were running
    pub live_migrations: u64,
    /// Migrations after which the destinations had a different amount of work
    /// left
    pub unfinished: u64,
    /// Migrations that both destinations have refused
    pub refused: u64,
    /// Uses of named differences
    pub named: Uses,
}

impl Effects {
    /// Count the use of a named difference.
    pub fn name(&mut self, difference: Difference) {
        *self.named.entry(difference).or_default() += 1;
    }

    /// Count more uses of named differences.
    pub fn add_uses(&mut self, uses: Uses) {
        for (difference, count) in uses {
            *self.named.entry(difference).or_default() += count;
        }
    }
}
