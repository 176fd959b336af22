// SPDX-License-Identifier: GPL-2.0-or-later

//! Migration of both VMs, each to the other device

use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{ensure, Result};
use qtest_client::{Qemu, TIMEOUT};
use serde_json::{json, Value};

use super::{io_threads, start_both, Lockstep};
use crate::{differences::Difference, effects::Effects};

fn migrate_command(command: &str, path: &Path) -> String {
    let mut arguments = json!({ "uri": format!("file:{}", path.display()) });
    if command == "migrate-incoming" {
        arguments["exit-on-error"] = json!(false);
    }
    json!({ "execute": command, "arguments": arguments }).to_string()
}

/// Wait for the end of a migration, and return the outcome.
fn migrated(qemu: &mut Qemu) -> Result<Value> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let info = qemu.qmp(r#"{"execute":"query-migrate"}"#)?["return"].take();
        if info["status"] == "completed" || info["status"] == "failed" {
            return Ok(info);
        }
        ensure!(Instant::now() < deadline, "migration does not end: {info}");
        sleep(Duration::from_millis(1));
    }
}

impl Lockstep {
    /// Move the state of each to a new instance of the other.  Returns false if
    /// it stays where it is.
    pub(super) fn migrate(
        &mut self,
        list: &mut Vec<String>,
        effects: &mut Effects,
    ) -> Result<bool> {
        if self.hint_blocked || self.bad_pages && self.both_broken()? {
            effects.name(Difference::ResumeAfterMigration);
            return Ok(false);
        }
        for qemu in &mut self.qemu {
            qemu.qmp(r#"{"execute":"stop"}"#)?;
            let path = qemu.dir().join("state");
            qemu.qmp(&migrate_command("migrate", &path))?;
            let info = migrated(qemu)?;
            ensure!(info["status"] == "completed", "cannot migrate: {info}");
        }
        self.compare_events(list, effects)?;

        let mut args = self.args.clone();
        args.extend(["-incoming", "defer"].map(String::from));
        let mut new = start_both(&self.setup, &args)?;
        let mut results = Vec::new();
        for (dst, src) in new.iter_mut().zip(self.qemu.iter().rev()) {
            let path = src.dir().join("state");
            dst.qmp(&migrate_command("migrate-incoming", &path))?;
            results.push(migrated(dst)?);
        }
        let status = |i: usize| &results[i]["status"];
        if status(0) != status(1) || results[0]["error-desc"] != results[1]["error-desc"] {
            list.push(format!("migration: A: {}, B: {}", results[0], results[1]));
        }
        let accepted = status(0) == "completed" && status(1) == "completed";
        if accepted {
            self.qemu = new;
            self.io_threads = io_threads(&mut self.qemu)?;
            effects.migrations += 1;
        } else {
            effects.refused += 1;
        }
        if self.running() {
            for qemu in &mut self.qemu {
                qemu.qmp(r#"{"execute":"cont"}"#)?;
            }
        }
        Ok(accepted)
    }
}
