// SPDX-License-Identifier: GPL-2.0-or-later

//! The options of QEMU

use std::fmt::{self, Display, Write};

/// With what options QEMU is started
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    pub legacy: bool,
    pub deflate_on_oom: bool,
    pub free_page_hint: bool,
    pub page_poison: bool,
    pub free_page_reporting: bool,
    /// Packed rings are offered.
    pub packed: bool,
    /// That elements are returned in order is offered.
    pub in_order: bool,
    /// PCI instead of virtio-mmio
    pub pci: bool,
    /// PCI: the older of the machines that have it
    pub i440fx: bool,
}

const N: usize = 9;

impl Config {
    pub(super) const NAMES: [&'static str; N] = [
        "legacy",
        "deflate-on-oom",
        "free-page-hint",
        "page-poison",
        "free-page-reporting",
        "packed",
        "in_order",
        "pci",
        "i440fx",
    ];
    /// Those that are properties of the device
    const PROPERTIES: std::ops::Range<usize> = 1..7;

    fn flags(&self) -> [bool; N] {
        [
            self.legacy,
            self.deflate_on_oom,
            self.free_page_hint,
            self.page_poison,
            self.free_page_reporting,
            self.packed,
            self.in_order,
            self.pci,
            self.i440fx,
        ]
    }

    /// From flags in the order of the fields
    pub fn from_flags(f: [bool; N]) -> Self {
        Self {
            legacy: f[0],
            deflate_on_oom: f[1],
            free_page_hint: f[2],
            page_poison: f[3],
            free_page_reporting: f[4],
            packed: f[5],
            in_order: f[6],
            pci: f[7],
            i440fx: f[8],
        }
    }

    /// Which of the counted configurations it is
    pub fn name(&self) -> String {
        let transport = if self.pci { "pci" } else { "mmio" };
        let ring = if self.packed { "packed" } else { "split" };
        let order = if self.in_order { " in order" } else { "" };
        format!("{transport} {ring}{order}")
    }

    /// How many queues the device has
    pub fn num_queues(&self) -> u32 {
        3 + u32::from(self.free_page_hint) + u32::from(self.free_page_reporting)
    }

    /// Where QOM has the device without its transport
    pub fn device_path(&self) -> &'static str {
        if self.pci {
            "/machine/peripheral/balloon/virtio-backend"
        } else {
            "/machine/peripheral/balloon"
        }
    }

    /// The options for QEMU
    pub fn args(&self) -> Vec<String> {
        let mut device = match self.pci {
            true => String::from("virtio-balloon-pci,id=balloon,ioeventfd=off"),
            false => String::from("virtio-balloon-device,id=balloon"),
        };
        let flags = self.flags();
        for (name, value) in Self::PROPERTIES.map(|i| (Self::NAMES[i], flags[i])) {
            let value = if value { "on" } else { "off" };
            let _ = write!(device, ",{name}={value}");
        }
        if self.free_page_hint {
            device += ",iothread=io0";
        }
        let machine = match (self.pci, self.i440fx) {
            (false, _) => "microvm",
            (true, false) => "q35",
            (true, true) => "pc",
        };
        let machine = ["-machine", machine, "-m", "64", "-object"];
        let mut args: Vec<String> = machine.map(String::from).into();
        args.extend(
            [
                "iothread,id=io0",
                "-global",
                "virtio-mmio.ioeventfd=off",
                "-global",
                if self.legacy {
                    "virtio-mmio.force-legacy=true"
                } else {
                    "virtio-mmio.force-legacy=false"
                },
                "-device",
                &device,
            ]
            .map(String::from),
        );
        args
    }
}

impl Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("config")?;
        for (name, value) in Self::NAMES.iter().zip(self.flags()) {
            write!(f, " {name}={}", u8::from(value))?;
        }
        Ok(())
    }
}
