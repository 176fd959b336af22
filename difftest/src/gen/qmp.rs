// SPDX-License-Identifier: GPL-2.0-or-later

//! QMP commands

use serde_json::{json, Value};

use super::Generator;
use crate::{driver::RAM_SIZE, op::Op};

const PATH: &str = "/machine/peripheral/balloon";

impl Generator<'_> {
    pub(super) fn qmp(&mut self) -> Op {
        let mib = 1u64 << 20;
        let command = match self.rng.below(20) {
            0..=4 => {
                let value = match self.rng.below(12) {
                    0 => json!(0),
                    1 => json!(1),
                    2 => json!(-1),
                    3 => json!(i64::MIN),
                    4 => json!(i64::MAX),
                    5 => json!(u64::MAX),
                    6 => json!("64M"),
                    7 => json!(RAM_SIZE + self.rng.below(3) - 1),
                    8 => json!(1.5),
                    _ => json!(self.rng.range(1, 64) * mib),
                };
                json!({"execute": "balloon", "arguments": {"value": value}})
            }
            5..=6 => json!({"execute": "query-balloon"}),
            7..=8 => get("guest-stats"),
            9 => get("guest-stats-polling-interval"),
            10..=13 => {
                let value = match self.rng.below(12) {
                    0 | 1 => json!(0),
                    2..=4 => json!(1),
                    5 => json!(self.rng.range(2, 60)),
                    6 => json!(-1),
                    7 => json!(u32::MAX),
                    8 => json!(u64::from(u32::MAX) + 1),
                    9 => json!("2"),
                    10 => json!(i64::MIN),
                    _ => json!(u64::MAX),
                };
                set("guest-stats-polling-interval", value)
            }
            14 => set("guest-stats", json!({})),
            15 => {
                let name = self.property();
                get(name)
            }
            16 => {
                let name = self.property();
                let value =
                    self.rng
                        .pick(&[json!(true), json!(false), json!(1), json!("/objects/io0")]);
                set(name, value)
            }
            17 => json!({"execute": "x-query-virtio-status",
                         "arguments": {"path": self.cfg.device_path()}}),
            18 => {
                let q = self.queue_index();
                // What the hint queue looks like depends on how far the I/O
                // thread is.
                let q = if Some(q) == self.hint_queue() { 7 } else { q };
                json!({"execute": "x-query-virtio-queue-status",
                       "arguments": {"path": self.cfg.device_path(), "queue": q}})
            }
            _ => json!({"execute": self.rng.pick(&["query-status", "query-memory-size-summary"])}),
        };
        Op::Qmp { command }
    }

    pub(super) fn property(&mut self) -> &'static str {
        self.rng.pick(&[
            "deflate-on-oom",
            "free-page-hint",
            "page-poison",
            "free-page-reporting",
            "iothread",
            "hotplugged",
            "indirect_desc",
            "packed",
            "in_order",
            "no-such-property",
        ])
    }
}

fn get(property: &str) -> Value {
    json!({"execute": "qom-get", "arguments": {"path": PATH, "property": property}})
}

fn set(property: &str, value: Value) -> Value {
    json!({"execute": "qom-set",
           "arguments": {"path": PATH, "property": property, "value": value}})
}
