// SPDX-License-Identifier: GPL-2.0-or-later

//! The configuration space (virtio 1.3, section 5.5.4)
//!
//! It consists of four little-endian 32-bit fields, even for legacy drivers.
//! The last two are only there if the feature that they belong to is offered.

use crate::features::{has_feature, VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_PAGE_POISON};

const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const FREE_PAGE_HINT_CMD_ID: usize = 8;
const POISON_VAL: usize = 12;
const END: usize = 16;

/// The fields of the configuration space
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// How many pages the host wants to be in the balloon
    pub num_pages: u32,
    /// How many pages are in the balloon; written by the driver
    pub actual: u32,
    /// Which round of free page hinting is going on
    pub free_page_hint_cmd_id: u32,
    /// What the guest fills free pages with; written by the driver
    pub poison_val: u32,
}

/// Size of the configuration space in bytes.
///
/// Adding a field changes what is migrated, hence the ones that belong to
/// optional features are left out without them.
pub const fn config_size(host_features: u32) -> usize {
    if has_feature(host_features, VIRTIO_BALLOON_F_PAGE_POISON) {
        END
    } else if has_feature(host_features, VIRTIO_BALLOON_F_FREE_PAGE_HINT) {
        POISON_VAL
    } else {
        FREE_PAGE_HINT_CMD_ID
    }
}

fn put(data: &mut [u8], offset: usize, value: u32) {
    if let Some(field) = data.get_mut(offset..offset + 4) {
        field.copy_from_slice(&value.to_le_bytes());
    }
}

fn get(data: &[u8], offset: usize) -> u32 {
    data.get(offset..offset + 4)
        .and_then(|field| field.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

impl Config {
    /// Store the fields that fit into `data`.
    pub fn write_to(&self, data: &mut [u8]) {
        put(data, NUM_PAGES, self.num_pages);
        put(data, ACTUAL, self.actual);
        put(data, FREE_PAGE_HINT_CMD_ID, self.free_page_hint_cmd_id);
        put(data, POISON_VAL, self.poison_val);
    }

    /// Load the fields; those that are not in `data` are zero.
    pub fn read_from(data: &[u8]) -> Self {
        Self {
            num_pages: get(data, NUM_PAGES),
            actual: get(data, ACTUAL),
            free_page_hint_cmd_id: get(data, FREE_PAGE_HINT_CMD_ID),
            poison_val: get(data, POISON_VAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HINT: u32 = 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT;
    const POISON: u32 = 1 << VIRTIO_BALLOON_F_PAGE_POISON;

    #[test]
    fn size_for_each_feature_mix() {
        assert_eq!(config_size(0), 8);
        assert_eq!(config_size(HINT), 12);
        assert_eq!(config_size(POISON), 16);
        assert_eq!(config_size(HINT | POISON), 16);
        assert_eq!(config_size(1 << 2 | 1 << 5), 8);
    }

    const CONFIG: Config = Config {
        num_pages: 0x0403_0201,
        actual: 0x0807_0605,
        free_page_hint_cmd_id: 0x0c0b_0a09,
        poison_val: 0x100f_0e0d,
    };

    #[test]
    fn layout_is_little_endian() {
        let mut data = [0; 16];
        CONFIG.write_to(&mut data);
        assert_eq!(data, core::array::from_fn(|i| i as u8 + 1));
        assert_eq!(Config::read_from(&data), CONFIG);
    }

    #[test]
    fn short_config_space() {
        for size in 0..16 {
            let mut data = vec![0; size];
            CONFIG.write_to(&mut data);
            let read = Config::read_from(&data);
            assert_eq!(read.num_pages != 0, size >= 4);
            assert_eq!(read.actual != 0, size >= 8);
            assert_eq!(read.free_page_hint_cmd_id != 0, size >= 12);
            assert_eq!(read.poison_val, 0);
        }
    }
}
