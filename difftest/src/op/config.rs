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
}

impl Config {
    pub(super) const NAMES: [&'static str; 5] = [
        "legacy",
        "deflate-on-oom",
        "free-page-hint",
        "page-poison",
        "free-page-reporting",
    ];

    fn flags(&self) -> [bool; 5] {
        [
            self.legacy,
            self.deflate_on_oom,
            self.free_page_hint,
            self.page_poison,
            self.free_page_reporting,
        ]
    }

    /// From flags in the order of the fields
    pub fn from_flags(f: [bool; 5]) -> Self {
        Self {
            legacy: f[0],
            deflate_on_oom: f[1],
            free_page_hint: f[2],
            page_poison: f[3],
            free_page_reporting: f[4],
        }
    }

    /// The options for QEMU
    pub fn args(&self) -> Vec<String> {
        let mut device = String::from("virtio-balloon-device,id=balloon");
        for (name, value) in Self::NAMES.iter().zip(self.flags()).skip(1) {
            let value = if value { "on" } else { "off" };
            let _ = write!(device, ",{name}={value}");
        }
        if self.free_page_hint {
            device += ",iothread=io0";
        }
        let machine = ["-machine", "microvm", "-m", "64", "-object"];
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
