// SPDX-License-Identifier: GPL-2.0-or-later

//! The offsets of the registers of virtio-mmio, and their addresses in a
//! microvm (virtio 1.3, section 4.2.2)

use anyhow::{bail, Result};

use crate::Qemu;

pub const MAGIC: u64 = 0x00;
pub const DEVICE_ID: u64 = 0x08;
pub const DEVICE_FEATURES: u64 = 0x10;
pub const DEVICE_FEATURES_SEL: u64 = 0x14;
pub const DRIVER_FEATURES: u64 = 0x20;
pub const DRIVER_FEATURES_SEL: u64 = 0x24;
pub const GUEST_PAGE_SIZE: u64 = 0x28;
pub const QUEUE_SEL: u64 = 0x30;
pub const QUEUE_NUM: u64 = 0x38;
pub const QUEUE_ALIGN: u64 = 0x3c;
pub const QUEUE_PFN: u64 = 0x40;
pub const QUEUE_READY: u64 = 0x44;
pub const QUEUE_NOTIFY: u64 = 0x50;
pub const INTERRUPT_STATUS: u64 = 0x60;
pub const INTERRUPT_ACK: u64 = 0x64;
pub const STATUS: u64 = 0x70;
pub const QUEUE_DESC: u64 = 0x80;
pub const QUEUE_AVAIL: u64 = 0x90;
pub const QUEUE_USED: u64 = 0xa0;
pub const CONFIG_GENERATION: u64 = 0xfc;
pub const CONFIG: u64 = 0x100;

/// The value of the register [`MAGIC`]
const VIRT: u64 = 0x7472_6976;
/// Device ID of the memory balloon
const BALLOON: u64 = 5;

/// Find the balloon of a microvm, and return the address of its registers.
///
/// # Errors
///
/// Fails if there is no balloon.
pub fn find_balloon(qemu: &mut Qemu) -> Result<u64> {
    for i in 0..32 {
        let base = 0xfeb0_0000 + i * 0x200;
        if qemu.query(&format!("readl {:#x}", base + MAGIC))? == VIRT
            && qemu.query(&format!("readl {:#x}", base + DEVICE_ID))? == BALLOON
        {
            return Ok(base);
        }
    }
    bail!("no balloon found")
}
