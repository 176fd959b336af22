// SPDX-License-Identifier: GPL-2.0-or-later

//! Migration of both VMs, each to the other device
//!
//! If the VMs run during it, it begins with so little bandwidth that it does
//! not end before it is allowed to.

use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{ensure, Result};
use qtest_client::{Qemu, TIMEOUT};
use serde_json::{json, Value};

use super::{io_threads, start_both, Lockstep};
use crate::{
    differences::Difference,
    driver::{Script, LONG_BUFFER},
    effects::Effects,
    op::{Mode, Op, Seg},
};

/// Bytes in a second: some pages that are zero.  The memory that is compared is
/// far away from the beginning of RAM.
const SLOW: u64 = 1000;
/// All at once
const FAST: u64 = 1 << 40;

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

fn set_bandwidth(qemu: &mut Qemu, bandwidth: u64) -> Result<()> {
    let command = json!({
        "execute": "migrate-set-parameters",
        "arguments": {"max-bandwidth": bandwidth},
    });
    let answer = qemu.qmp(&command.to_string())?;
    ensure!(answer["error"].is_null(), "{answer}");
    Ok(())
}

impl Lockstep {
    /// Whether migration is not to be tried, because the VMs would differ
    fn must_not_migrate(&mut self, effects: &mut Effects) -> Result<bool> {
        let must_not = self.hint_blocked || self.bad_pages && self.both_broken()?;
        if must_not {
            effects.name(Difference::ResumeAfterMigration);
        }
        Ok(must_not)
    }

    /// Begin to migrate both VMs while they run.
    pub(super) fn migrate_start(&mut self, effects: &mut Effects) -> Result<()> {
        if self.live || !self.running() || self.must_not_migrate(effects)? {
            return Ok(());
        }
        for qemu in &mut self.qemu {
            set_bandwidth(qemu, SLOW)?;
            let path = qemu.dir().join("state");
            qemu.qmp(&migrate_command("migrate", &path))?;
        }
        let deadline = Instant::now() + TIMEOUT;
        for qemu in &mut self.qemu {
            // The device has been told of it when all of RAM is dirty.
            loop {
                let info = qemu.qmp(r#"{"execute":"query-migrate"}"#)?["return"].take();
                if info["status"] == "active" && info["ram"]["dirty-sync-count"].as_u64() > Some(0)
                {
                    break;
                }
                ensure!(Instant::now() < deadline, "no migration: {info}");
                sleep(Duration::from_millis(1));
            }
        }
        self.live = true;
        Ok(())
    }

    /// Give the devices something to do that takes several turns, and let
    /// migration go on before they have done it.
    fn migrate_end(&mut self) -> Result<()> {
        let op = Op::Elem {
            q: 0,
            kick: true,
            mode: Mode::Direct,
            segs: vec![Seg::Out {
                addr: LONG_BUFFER.0,
                len: LONG_BUFFER.1,
            }],
        };
        let mut scripts = [Script::default(), Script::default()];
        if self.running() && !self.bad_pages {
            for (driver, script) in self.driver.iter_mut().zip(&mut scripts) {
                driver.compile(&op, script);
            }
        }
        self.run_scripts([&scripts[0], &scripts[1]])?;
        for qemu in &mut self.qemu {
            set_bandwidth(qemu, FAST)?;
        }
        self.live = false;
        Ok(())
    }

    /// Move the state of each to a new instance of the other.  Returns false if
    /// it stays where it is.
    pub(super) fn migrate(
        &mut self,
        list: &mut Vec<String>,
        effects: &mut Effects,
    ) -> Result<bool> {
        if self.must_not_migrate(effects)? {
            return Ok(false);
        }
        let live = self.live;
        if live {
            self.migrate_end()?;
        }
        for qemu in &mut self.qemu {
            if !live {
                qemu.qmp(r#"{"execute":"stop"}"#)?;
                let path = qemu.dir().join("state");
                qemu.qmp(&migrate_command("migrate", &path))?;
            }
            let info = migrated(qemu)?;
            ensure!(info["status"] == "completed", "cannot migrate: {info}");
        }
        self.compare_events(list, effects)?;

        let mut args = self.args.clone();
        args.extend(["-S", "-incoming", "defer"].map(String::from));
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
            effects.live_migrations += u64::from(live);
            let [a, b] = self.progress()?;
            effects.unfinished += u64::from(a != b);
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
