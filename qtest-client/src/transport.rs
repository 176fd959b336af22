// SPDX-License-Identifier: GPL-2.0-or-later

//! The registers that both transports have, accessed with qtest commands

use anyhow::Result;

use crate::{mmio, pci, pci::Pci, Qemu};

/// A register
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reg {
    DeviceFeaturesSel,
    DeviceFeatures,
    DriverFeaturesSel,
    DriverFeatures,
    QueueSel,
    QueueSize,
    QueueReady,
    InterruptStatus,
    Status,
    ConfigGeneration,
}

/// The location of a device
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Mmio { base: u64 },
    Pci(Pci),
}

impl Transport {
    /// Find the balloon of a microvm, or of a machine with PCI.
    ///
    /// # Errors
    ///
    /// Fails if there is no balloon.
    pub fn find_balloon(qemu: &mut Qemu, pci: bool) -> Result<Self> {
        Ok(if pci {
            Self::Pci(Pci::find_balloon(qemu)?)
        } else {
            Self::Mmio {
                base: mmio::find_balloon(qemu)?,
            }
        })
    }

    /// The suffix of the qtest commands, and the address
    fn place(&self, reg: Reg) -> (char, u64) {
        match self {
            Self::Mmio { base } => {
                let offset = match reg {
                    Reg::DeviceFeaturesSel => mmio::DEVICE_FEATURES_SEL,
                    Reg::DeviceFeatures => mmio::DEVICE_FEATURES,
                    Reg::DriverFeaturesSel => mmio::DRIVER_FEATURES_SEL,
                    Reg::DriverFeatures => mmio::DRIVER_FEATURES,
                    Reg::QueueSel => mmio::QUEUE_SEL,
                    Reg::QueueSize => mmio::QUEUE_NUM,
                    Reg::QueueReady => mmio::QUEUE_READY,
                    Reg::InterruptStatus => mmio::INTERRUPT_STATUS,
                    Reg::Status => mmio::STATUS,
                    Reg::ConfigGeneration => mmio::CONFIG_GENERATION,
                };
                ('l', base + offset)
            }
            Self::Pci(at) => {
                let (suffix, offset) = match reg {
                    Reg::DeviceFeaturesSel => ('l', pci::DEVICE_FEATURE_SELECT),
                    Reg::DeviceFeatures => ('l', pci::DEVICE_FEATURE),
                    Reg::DriverFeaturesSel => ('l', pci::DRIVER_FEATURE_SELECT),
                    Reg::DriverFeatures => ('l', pci::DRIVER_FEATURE),
                    Reg::QueueSel => ('w', pci::QUEUE_SELECT),
                    Reg::QueueSize => ('w', pci::QUEUE_SIZE),
                    Reg::QueueReady => ('w', pci::QUEUE_ENABLE),
                    Reg::Status => ('b', pci::DEVICE_STATUS),
                    Reg::ConfigGeneration => ('b', pci::CONFIG_GENERATION),
                    Reg::InterruptStatus => return ('b', at.isr),
                };
                (suffix, at.common + offset)
            }
        }
    }

    /// The command that reads a register, without the newline
    pub fn read(&self, reg: Reg) -> String {
        let (suffix, addr) = self.place(reg);
        format!("read{suffix} {addr:#x}")
    }

    /// The command that writes a register, without the newline
    pub fn write(&self, reg: Reg, value: u32) -> String {
        let (suffix, addr) = self.place(reg);
        let value = match suffix {
            'b' => value & 0xff,
            'w' => value & 0xffff,
            _ => value,
        };
        format!("write{suffix} {addr:#x} {value:#x}")
    }

    /// The commands that set the addresses of the selected queue
    pub fn write_addresses(&self, desc: u64, driver: u64, device: u64) -> Vec<String> {
        let places = match self {
            Self::Mmio { base } => [mmio::QUEUE_DESC, mmio::QUEUE_AVAIL, mmio::QUEUE_USED]
                .map(|register| base + register),
            Self::Pci(at) => [pci::QUEUE_DESC, pci::QUEUE_DRIVER, pci::QUEUE_DEVICE]
                .map(|register| at.common + register),
        };
        let mut commands = Vec::new();
        for (place, addr) in places.into_iter().zip([desc, driver, device]) {
            commands.push(format!("writel {place:#x} {:#x}", addr as u32));
            commands.push(format!("writel {:#x} {:#x}", place + 4, addr >> 32));
        }
        commands
    }

    /// The command that notifies the device; `None` if PCI has no notification
    /// address for the queue
    pub fn notify(&self, value: u32) -> Option<String> {
        match self {
            Self::Mmio { base } => {
                let addr = base + mmio::QUEUE_NOTIFY;
                Some(format!("writel {addr:#x} {value:#x}"))
            }
            Self::Pci(at) => {
                let queue = u64::from(value & 0xffff);
                let addr = at.notify + queue * at.notify_multiplier;
                (queue < 1024).then(|| format!("writel {addr:#x} {value:#x}"))
            }
        }
    }

    /// The command that resets the selected queue; only PCI has one
    pub fn reset_queue(&self) -> Option<String> {
        match self {
            Self::Mmio { .. } => None,
            Self::Pci(at) => Some(format!("writew {:#x} 1", at.common + pci::QUEUE_RESET)),
        }
    }

    /// The address of the configuration space
    pub fn config(&self) -> u64 {
        match self {
            Self::Mmio { base } => base + mmio::CONFIG,
            Self::Pci(at) => at.device,
        }
    }

    /// The address of the registers of the transport
    pub fn registers(&self) -> u64 {
        match self {
            Self::Mmio { base } => *base,
            Self::Pci(at) => at.common,
        }
    }

    /// Whether reading the interrupt status clears it
    pub fn interrupt_status_is_cleared(&self) -> bool {
        matches!(self, Self::Pci(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_of_registers() {
        let mmio = Transport::Mmio { base: 0x1000 };
        assert_eq!(mmio.write(Reg::Status, 0x1ff), "writel 0x1070 0x1ff");
        assert_eq!(mmio.notify(0x1_0003).unwrap(), "writel 0x1050 0x10003");
        let pci = Transport::Pci(Pci {
            common: 0x1000,
            isr: 0x2000,
            notify: 0x3000,
            notify_multiplier: 4,
            ..Pci::default()
        });
        assert_eq!(pci.write(Reg::Status, 0x1ff), "writeb 0x1014 0xff");
        assert_eq!(pci.write(Reg::QueueSize, 0x1_0010), "writew 0x1018 0x10");
        assert_eq!(pci.read(Reg::InterruptStatus), "readb 0x2000");
        assert_eq!(pci.notify(0x1_0003).unwrap(), "writel 0x300c 0x10003");
        assert!(pci.notify(0xffff_ffff).is_none());
        let commands = pci.write_addresses(1 << 32, 2, 3);
        assert_eq!(commands[..2], ["writel 0x1020 0x0", "writel 0x1024 0x1"]);
        assert_eq!(commands[4], "writel 0x1030 0x3");
    }
}
