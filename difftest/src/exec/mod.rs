// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs operations on both devices in lock step, and compares them

mod migrate;
mod observe;
mod qmp;
mod tolerate;

use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use qtest_client::{
    transport::{Reg, Transport},
    Qemu,
};

use self::{
    observe::{explain, Observed},
    tolerate::may_discard,
};
use crate::{
    differences::Difference,
    driver::{Driver, Script, PAGE, WINDOW},
    effects::Effects,
    op::{Config, Op, Seg},
};

/// How many operations are sent at once, at most
pub const BATCH: usize = 16;

/// What to compare
#[derive(Debug, Clone)]
pub struct Setup {
    /// The one that works like the C device
    pub a: PathBuf,
    /// The other
    pub b: PathBuf,
    /// Additional options for the latter
    pub b_args: Vec<String>,
    /// Let the latter ignore one of the pages
    pub inject_fault: bool,
}

/// Two instances of QEMU with the same configuration
pub struct Lockstep {
    setup: Setup,
    args: Vec<String>,
    /// Of the devices, in QOM
    path: &'static str,
    qemu: [Qemu; 2],
    driver: [Driver; 2],
    hint_queue: Option<usize>,
    /// What the driver is offered
    pub offered: u64,
    /// Work for the hint queue may be left over from when the VM was stopped
    hint_blocked: bool,
    /// There was something for a queue whose elements are worked on together that
    /// may break the device
    bad_batch: bool,
    /// The VM has not run since it was migrated
    migrated: bool,
    /// The I/O thread was given something to do
    hints: bool,
    /// The I/O threads that work on hints
    io_threads: [u64; 2],
    /// Where reading the interrupt status clears it: what it would be otherwise
    isr: [u64; 2],
    last: Observed,
}

fn offered_features(qemu: &mut Qemu, transport: &Transport) -> Result<u64> {
    let mut features = 0;
    for sel in 0..2 {
        let select = transport.write(Reg::DeviceFeaturesSel, sel);
        qemu.send(&format!("{select}\n"))?;
        qemu.reply()?;
        let value = qemu.query(&transport.read(Reg::DeviceFeatures))?;
        features |= (value & 0xffff_ffff) << (32 * sel);
    }
    Ok(features)
}

fn start_both(setup: &Setup, args: &[String]) -> Result<[Qemu; 2]> {
    let b_args = [args, &setup.b_args].concat();
    Ok([
        Qemu::start(&setup.a, args)?,
        Qemu::start(&setup.b, &b_args)?,
    ])
}

fn io_threads(qemu: &mut [Qemu; 2]) -> Result<[u64; 2]> {
    let [a, b] = qemu;
    Ok([a.io_thread("io0")?, b.io_thread("io0")?])
}

/// The same operation, as a faulty device would see it
fn sabotage(op: &Op) -> Op {
    let mut op = op.clone();
    if let Op::Elem { q: 0, segs, .. } = &mut op {
        let page = ((WINDOW / PAGE) as u32 + 13).to_le_bytes();
        for seg in segs {
            if let Seg::Data(data) = seg {
                for pfn in data.chunks_exact_mut(4).filter(|pfn| **pfn == page) {
                    pfn.fill(0xff);
                }
            }
        }
    }
    op
}

impl Lockstep {
    /// Start both.
    pub fn start(setup: &Setup, cfg: &Config) -> Result<Self> {
        let args = cfg.args();
        let mut qemu = start_both(setup, &args)?;

        let transport = Transport::find_balloon(&mut qemu[0], cfg.pci)?;
        ensure!(
            Transport::find_balloon(&mut qemu[1], cfg.pci)? == transport,
            "different addresses"
        );
        let offered = offered_features(&mut qemu[0], &transport)?;
        ensure!(
            offered_features(&mut qemu[1], &transport)? == offered,
            "different features"
        );

        let io_threads = io_threads(&mut qemu)?;
        let driver = Driver::new(transport, cfg.legacy, cfg.num_queues(), offered);
        Ok(Self {
            setup: setup.clone(),
            path: cfg.device_path(),
            args,
            qemu,
            driver: [driver.clone(), driver],
            hint_queue: cfg.free_page_hint.then_some(3),
            offered,
            hint_blocked: false,
            hints: false,
            io_threads,
            bad_batch: false,
            migrated: false,
            isr: [0; 2],
            last: Observed::default(),
        })
    }

    /// Whether the device was seen to need a reset
    pub fn broken(&self) -> bool {
        self.last.status & 0x40 != 0
    }

    /// Whether the VM runs
    pub fn running(&self) -> bool {
        self.driver[0].running
    }

    /// Send the same to both, and get all answers.
    fn run_scripts(&mut self, scripts: [&Script; 2]) -> Result<[Vec<String>; 2]> {
        for (qemu, script) in self.qemu.iter_mut().zip(scripts) {
            qemu.send(&script.text)?;
        }
        let mut replies = [Vec::new(), Vec::new()];
        for (i, qemu) in self.qemu.iter_mut().enumerate() {
            for _ in 0..scripts[i].count {
                replies[i].push(
                    qemu.reply()
                        .with_context(|| format!("device {}", ["A", "B"][i]))?,
                );
            }
        }
        Ok(replies)
    }

    /// Run operations on both, and compare them after each.  Returns the index
    /// of the one after which there is a difference.
    pub fn run(&mut self, ops: &[Op], effects: &mut Effects) -> Option<(usize, String)> {
        let mut start = 0;
        while start < ops.len() {
            let end = ops[start..]
                .iter()
                .take(BATCH)
                .position(|op| !self.can_batch(op))
                .map_or_else(|| ops.len().min(start + BATCH), |n| start + n);
            // This one alone, or those that do not need to wait
            let end = end.max(start + 1);
            match self.step(&ops[start..end], effects) {
                Ok(None) => {}
                Ok(Some((i, list))) => return Some((start + i, list.join("\n"))),
                Err(err) => {
                    let [a, b] = self.qemu.each_mut().map(Qemu::post_mortem);
                    return Some((end - 1, format!("{err:#}\nA: {a}\nB: {b}")));
                }
            }
            start = end;
        }
        None
    }

    /// Whether the operation only consists of qtest commands, so that others
    /// can be sent before its result is known.
    fn can_batch(&self, op: &Op) -> bool {
        !op.uses_qmp()
            && *op != Op::Check
            && !self.hint_blocked
            && !self.kicks_hints(op)
            && !self.bad_batch
            && !self.may_break_batch(op)
    }

    fn step(&mut self, ops: &[Op], effects: &mut Effects) -> Result<Option<(usize, Vec<String>)>> {
        let mut list = Vec::new();
        let mut scripts = [Script::default(), Script::default()];
        // For each operation: the commands of its own, and all
        let mut counts = Vec::new();
        for op in ops {
            let before = scripts[0].count;
            for (i, script) in scripts.iter_mut().enumerate() {
                if i == 1 && self.setup.inject_fault {
                    self.driver[i].compile(&sabotage(op), script);
                } else {
                    self.driver[i].compile(op, script);
                }
            }
            if let Some(command) = op.qmp_command() {
                self.run_qmp(&command.to_string(), op, &mut list, effects)?;
            }
            let live = *op == Op::MigrateLive;
            let moved = (live || *op == Op::Migrate) && self.migrate(live, &mut list, effects)?;
            self.migrated |= moved;
            if moved || self.migrated && *op == Op::Cont {
                effects.name(Difference::ResumeAfterMigration);
                for (driver, script) in self.driver.iter().zip(&mut scripts) {
                    // The Rust device has begun with everything but statistics
                    // already, so that what is wrong with these comes last.
                    for q in (0..driver.num_queues).filter(|q| *q != 2).chain([2]) {
                        if self.hint_queue != Some(q as usize) {
                            driver.kick(script, q);
                        }
                    }
                }
            }
            self.migrated &= !self.running();
            let own = scripts[0].count - before;
            for script in &mut scripts {
                self.observe_script(script, may_discard(op));
            }
            counts.push((own, scripts[0].count - before, self.formats()));
        }

        let [replies_a, replies_b] = self.run_scripts([&scripts[0], &scripts[1]])?;
        let mut at = 0;
        for (i, (op, (own, count, formats))) in ops.iter().zip(counts).enumerate() {
            for k in at..at + own {
                if replies_a[k] != replies_b[k] {
                    let command = scripts[0].text.lines().nth(k).unwrap_or_default();
                    list.push(explain(command, &replies_a[k], &replies_b[k]));
                }
            }
            if let Op::Ack { value } = op {
                self.isr = self.isr.map(|isr| isr & !u64::from(*value));
            }
            let mut obs = [
                self.parse(0, &formats, &replies_a[at + own..at + count])?,
                self.parse(1, &formats, &replies_b[at + own..at + count])?,
            ];
            at += count;

            self.wait_for_hints(op, &mut obs, effects)?;
            if matches!(op, Op::Init { .. } | Op::SystemReset) {
                self.bad_batch = false;
            }
            self.bad_batch |= self.may_break_batch(op);
            self.tolerate_unreturned(&mut obs, effects)?;
            let mut different = self.compare(&obs);
            let late = !different.is_empty() && self.catch_up(&mut obs, effects)?;
            if late {
                different.clear();
            }
            list.extend(different);
            if late || i + 1 == ops.len() {
                self.compare_events(&mut list, effects)?;
            }
            if !list.is_empty() {
                return Ok(Some((i, list)));
            }
            if *op == Op::Fill {
                self.last.window.clear();
            }
            let [a, _] = obs;
            self.count_effects(a, effects);
            if late {
                // This is the state after the last operation already.
                break;
            }
        }
        Ok(None)
    }
}
