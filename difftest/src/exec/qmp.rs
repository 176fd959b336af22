// SPDX-License-Identifier: GPL-2.0-or-later

//! QMP commands, and events

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::Lockstep;
use crate::{differences::Difference, effects::Effects, op::Op};

fn mask_times(value: &mut Value) -> bool {
    match value["return"].get_mut("last-update") {
        Some(time) if time.as_i64() != Some(0) => {
            *time = json!("masked");
            true
        }
        _ => false,
    }
}

/// A device says that the guest has less than no memory, and the other one that it
/// has none.
/// `member` is what contains `actual`.
fn mask_excess(a: &mut Value, b: &mut Value, member: &str) -> bool {
    let actual = |value: &Value| value[member]["actual"].as_i64();
    let excess = match (actual(a), actual(b)) {
        (Some(a), Some(b)) => a.min(b) < 0 && a.max(b) == 0,
        _ => false,
    };
    if excess {
        a[member]["actual"] = json!(0);
        b[member]["actual"] = json!(0);
    }
    excess
}

impl Lockstep {
    pub(super) fn run_qmp(
        &mut self,
        command: &str,
        op: &Op,
        list: &mut Vec<String>,
        effects: &mut Effects,
    ) -> Result<()> {
        for qemu in &mut self.qemu {
            qemu.qmp_send(command)?;
        }
        let mut answers = Vec::new();
        for (qemu, name) in self.qemu.iter_mut().zip(["A", "B"]) {
            answers.push(
                qemu.qmp_reply()
                    .with_context(|| format!("QMP of device {name}"))?,
            );
            if *op == Op::SystemReset {
                qemu.wait_event("RESET")?;
            }
        }
        let different = answers[0] != answers[1];
        if answers[0].get("error").is_some() {
            effects.qmp_errors += 1;
        } else {
            effects.qmp_results += 1;
        }
        let mut masked = false;
        for answer in &mut answers {
            masked |= mask_times(answer);
        }
        effects.stats += u64::from(masked);
        if different && answers[0] == answers[1] {
            effects.name(Difference::LastUpdate);
        }
        if let [a, b] = answers.as_mut_slice() {
            if mask_excess(a, b, "return") {
                effects.name(Difference::ExcessPages);
            }
        }
        let queue = answers[0]["return"]["queue-index"].as_u64();
        if answers[0] != answers[1] && queue.is_some_and(|q| self.is_batched(q as u32)) {
            for answer in &mut answers {
                answer["return"]["signalled-used"] = Value::Null;
                answer["return"]["signalled-used-valid"] = Value::Null;
            }
            if answers[0] == answers[1] {
                effects.name(Difference::BatchNotification);
            }
        }
        if answers[0] != answers[1] && self.bad_batch && self.both_broken()? {
            for name in [
                "used-idx",
                "inuse",
                "signalled-used",
                "signalled-used-valid",
            ] {
                for answer in &mut answers {
                    answer["return"][name] = Value::Null;
                }
            }
            effects.name(Difference::ErrorInBatch);
        }
        if answers[0] != answers[1] {
            list.push(format!("QMP: A: {}\n     B: {}", answers[0], answers[1]));
        }
        Ok(())
    }

    pub(super) fn compare_events(
        &mut self,
        list: &mut Vec<String>,
        effects: &mut Effects,
    ) -> Result<()> {
        let mut a = self.qemu[0].take_events()?;
        let mut b = self.qemu[1].take_events()?;
        for (left, right) in a.iter_mut().zip(&mut b) {
            if mask_excess(left, right, "data") {
                effects.name(Difference::ExcessPages);
            }
        }
        if a != b {
            list.push(format!("events: A: {}, B: {}", json!(a), json!(b)));
        }
        for event in a {
            let name = event["event"].as_str().unwrap_or("?").to_owned();
            *effects.events.entry(name).or_default() += 1;
        }
        Ok(())
    }
}
