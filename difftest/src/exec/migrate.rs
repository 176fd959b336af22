// SPDX-License-Identifier: GPL-2.0-or-later

//! Migration of both VMs, each to the other device
//!
//! If the VMs run during it, the devices have something to do that takes several
//! turns.  There are no other operations meanwhile: when it ends depends on the
//! host.

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
    /// Whether migration is not to be tried, because the VMs would differ
    fn must_not_migrate(&mut self, effects: &mut Effects) -> Result<bool> {
        let must_not = self.hint_blocked || self.bad_batch && self.both_broken()?;
        if must_not {
            effects.name(Difference::ResumeAfterMigration);
        }
        Ok(must_not)
    }

    /// Give the devices something to do that takes several turns.
    fn begin_long_work(&mut self) -> Result<()> {
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
        if !self.bad_batch {
            for (driver, script) in self.driver.iter_mut().zip(&mut scripts) {
                driver.compile(&op, script);
            }
        }
        self.run_scripts([&scripts[0], &scripts[1]])?;
        Ok(())
    }

    /// Move the state of each to a new instance of the other.  Returns false if
    /// it stays where it is.
    pub(super) fn migrate(
        &mut self,
        live: bool,
        list: &mut Vec<String>,
        effects: &mut Effects,
    ) -> Result<bool> {
        if self.must_not_migrate(effects)? {
            return Ok(false);
        }
        let live = live && self.running();
        if live {
            self.begin_long_work()?;
        }
        for qemu in &mut self.qemu {
            if !live {
                qemu.qmp(r#"{"execute":"stop"}"#)?;
            }
            let path = qemu.dir().join("state");
            qemu.qmp(&migrate_command("migrate", &path))?;
        }
        for qemu in &mut self.qemu {
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
