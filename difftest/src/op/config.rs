// SPDX-License-Identifier: GPL-2.0-or-later

//! The options of QEMU

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// With what options QEMU is started
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct Config {
    pub legacy: bool,
    pub deflate_on_oom: bool,
    pub free_page_hint: bool,
    pub page_poison: bool,
    pub free_page_reporting: bool,
    /// Packed rings are offered.
    pub packed: bool,
    /// That elements are returned in order is offered.
    #[serde(rename = "in_order")]
    pub in_order: bool,
    /// PCI instead of virtio-mmio
    pub pci: bool,
    /// PCI: the older of the machines that have it
    pub i440fx: bool,
}

impl Config {
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
        for (name, value) in [
            ("deflate-on-oom", self.deflate_on_oom),
            ("free-page-hint", self.free_page_hint),
            ("page-poison", self.page_poison),
            ("free-page-reporting", self.free_page_reporting),
            ("packed", self.packed),
            ("in_order", self.in_order),
        ] {
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
