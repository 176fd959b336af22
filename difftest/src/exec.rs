// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs operations on both devices in lock step, and compares them

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context, Result};
use qtest_client::{mmio::find_balloon, value, Qemu, TIMEOUT};
use serde_json::{json, Value};

use crate::{
    driver::{reg, Driver, Script, F_HINT, PAGE, WINDOW, WINDOW_PAGES},
    op::{Config, Mode, Op, Seg},
};

/// A difference that is intended
#[derive(Debug)]
pub struct NamedDifference {
    /// Name, for the summary
    pub name: &'static str,
    /// What the C device does
    pub c: &'static str,
    /// What the Rust device does
    pub rust: &'static str,
    /// How it is treated here
    pub treatment: &'static str,
}

impl NamedDifference {
    /// Whether both devices may get to where they differ
    pub fn is_tolerated(&self) -> bool {
        self.treatment.starts_with("tolerated")
    }
}

/// All differences that are not failures
pub const NAMED_DIFFERENCES: &[NamedDifference] = &[
    NamedDifference {
        name: "hint-notification",
        c: "sets VRING_USED_F_NO_NOTIFY and avail_event of the hint queue while it polls",
        rust: "does not touch them",
        treatment: "tolerated: flags and avail_event of this queue's used ring are not compared",
    },
    NamedDifference {
        name: "hint-interrupt",
        c: "also sends an interrupt for the hint queue when it finds it empty",
        rust: "sends one only when it has returned elements",
        treatment: "tolerated if, after work for the hint queue was pending, bit 0 of the ISR is \
                    set by the C device only; it is then acknowledged",
    },
    NamedDifference {
        name: "hint-not-negotiated",
        c: "returns hints while the VM is stopped, or blocks until the next time that the feature \
            is accepted (if the VM was stopped when it was)",
        rust: "returns them after the next notification while the VM runs",
        treatment: "avoided: hints only if the feature was accepted",
    },
    NamedDifference {
        name: "hint-on-arrival",
        c: "returns hints while the VM is stopped, if it has arrived in this state and did not run \
            since: nothing has blocked the I/O thread",
        rust: "returns them when the VM runs",
        treatment: "avoided: no hints until the VM runs",
    },
    NamedDifference {
        name: "hint-jump",
        c: "takes and returns one hint at a time, even if more are available than fit in the queue",
        rust: "takes all that are available, and is broken if these are more than fit in the queue",
        treatment: "avoided: the available index of the hint queue does not jump",
    },
    NamedDifference {
        name: "hint-error-on-resume",
        c: "finds a bad element in the I/O thread after the VM continues; NEEDS_RESET is lost if \
            that is before virtio_set_status() stores the status",
        rust: "finds it later, and NEEDS_RESET stays",
        treatment: "avoided: no bad elements for the hint queue while the VM is stopped",
    },
    NamedDifference {
        name: "batch-notification",
        c: "notifies the driver after each element that was inflated or deflated",
        rust: "notifies the driver after all elements that were available",
        treatment: "tolerated: signalled-used of x-query-virtio-queue-status is not compared; \
                    the driver does not change its mind about features that have to do with \
                    notifications, which legacy ones could do at any time",
    },
    NamedDifference {
        name: "bounce-buffers",
        c: "maps one element at a time",
        rust: "maps all elements for inflating that are available; if their buffers are in device \
               memory, QEMU has no room for that many copies, and the device is broken",
        treatment: "avoided: there are no other elements if a buffer is in device memory",
    },
    NamedDifference {
        name: "error-in-batch",
        c: "returns elements one by one until it finds a bad one",
        rust: "returns none of those that were made available together with the bad one, because \
               the device is broken then",
        treatment: "tolerated if both are broken: the used rings of the queues for inflating and \
                    deflating are made the same; avoided for the queue for hints",
    },
    NamedDifference {
        name: "hint-mmio",
        c: "deadlocks if buffers of the hint queue are in device memory",
        rust: "does not",
        treatment: "avoided: buffers of the hint queue are in RAM",
    },
    NamedDifference {
        name: "stats-limit",
        c: "reads all statistics of a buffer",
        rust: "reads at most 1024",
        treatment: "avoided: shorter buffers",
    },
    NamedDifference {
        name: "resume-after-migration",
        c: "looks at the queues again when the driver notifies it",
        rust: "also looks at them when the VM runs for the first time",
        treatment:
            "avoided: the driver notifies all queues after migration, and when the VM runs; \
                    no migration while there may be work for the hint queue, or after an error \
                    in a batch",
    },
    NamedDifference {
        name: "turns",
        c: "is done with an element for inflating or deflating when the notification is",
        rust: "lets others have their turn after 2 ms",
        treatment: "tolerated if both are the same when none of them has elements in flight",
    },
    NamedDifference {
        name: "last-update",
        c: "the real time at which it received statistics",
        rust: "the same, but it may be the next second already",
        treatment: "tolerated: only zero and nonzero are told apart",
    },
];

/// How many operations are sent at once, at most
pub const BATCH: usize = 16;

const QUERY_STATUS: &str = r#"{"execute":"x-query-virtio-status",
    "arguments":{"path":"/machine/peripheral/balloon"}}"#;

/// What happened
#[derive(Debug, Clone, Default)]
pub struct Effects {
    /// Elements that were returned, for each kind of queue
    pub used: u64,
    /// Pages that became zero
    pub discarded: u64,
    /// Devices that became broken
    pub broken: u64,
    /// Changes of the configuration space
    pub config: u64,
    /// Changes of the interrupt status to nonzero
    pub interrupts: u64,
    /// QMP events
    pub events: BTreeMap<String, u64>,
    /// Errors of QMP commands
    pub qmp_errors: u64,
    /// Successful QMP commands
    pub qmp_results: u64,
    /// `guest-stats` with values
    pub stats: u64,
    /// Migrations of both VMs
    pub migrations: u64,
    /// Migrations that both destinations have refused
    pub refused: u64,
    /// Uses of named differences
    pub named: BTreeMap<&'static str, u64>,
}

impl Effects {
    fn name(&mut self, name: &'static str) {
        debug_assert!(NAMED_DIFFERENCES.iter().any(|diff| diff.name == name));
        *self.named.entry(name).or_default() += 1;
    }
}

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
    qemu: [Qemu; 2],
    driver: [Driver; 2],
    hint_queue: Option<usize>,
    /// What the driver is offered
    pub offered: u64,
    /// Work for the hint queue may be left over from when the VM was stopped
    hint_blocked: bool,
    /// There was an element for inflating or deflating that breaks the device
    bad_pages: bool,
    /// The VM has not run since it was migrated
    migrated: bool,
    /// The I/O thread was given something to do
    hints: bool,
    /// The I/O threads that work on hints
    io_threads: [u64; 2],
    last: Observed,
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Observed {
    status: u64,
    isr: u64,
    generation: String,
    config: String,
    used: Vec<String>,
    window: Vec<bool>,
}

fn offered_features(qemu: &mut Qemu, base: u64) -> Result<u64> {
    let mut features = 0;
    for sel in 0..2 {
        let addr = base + reg::DEVICE_FEATURES_SEL;
        qemu.send(&format!("writel {addr:#x} {sel}\n"))?;
        qemu.reply()?;
        let value = qemu.query(&format!("readl {:#x}", base + reg::DEVICE_FEATURES))?;
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

/// Used ring without what only tells the driver when to send notifications
fn ring_entries(hex: &str) -> &str {
    let start = "OK 0x".len() + 4;
    hex.get(start..hex.len().saturating_sub(4)).unwrap_or(hex)
}

fn used_idx(reply: &str) -> u16 {
    let digits = reply.get(9..13).unwrap_or("0");
    u16::from_str_radix(digits, 16).unwrap_or(0).swap_bytes()
}

fn mask_times(value: &mut Value) -> bool {
    match value["return"].get_mut("last-update") {
        Some(time) if time.as_i64() != Some(0) => {
            *time = json!("masked");
            true
        }
        _ => false,
    }
}

/// Whether the element is for inflating or deflating, and may break the device
fn is_bad_page_element(op: &Op) -> bool {
    let Op::Elem { q, mode, segs, .. } = op else {
        return false;
    };
    let good = |seg: &Seg| matches!(seg, Seg::Data(data) if !data.is_empty());
    *q < 2 && (Mode::bad().contains(mode) || segs.is_empty() || !segs.iter().all(good))
}

impl Lockstep {
    /// Start both.
    pub fn start(setup: &Setup, cfg: &Config) -> Result<Self> {
        let args = cfg.args();
        let mut qemu = start_both(setup, &args)?;

        let base = find_balloon(&mut qemu[0])?;
        ensure!(find_balloon(&mut qemu[1])? == base, "different addresses");
        let offered = offered_features(&mut qemu[0], base)?;
        ensure!(
            offered_features(&mut qemu[1], base)? == offered,
            "different features"
        );

        let io_threads = io_threads(&mut qemu)?;
        let num_queues = 3 + u32::from(cfg.free_page_hint) + u32::from(cfg.free_page_reporting);
        let driver = Driver::new(base, cfg.legacy, num_queues);
        Ok(Self {
            setup: setup.clone(),
            args,
            qemu,
            driver: [driver.clone(), driver],
            hint_queue: cfg.free_page_hint.then_some(3),
            offered,
            hint_blocked: false,
            hints: false,
            io_threads,
            bad_pages: false,
            migrated: false,
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

    fn observe_script(&self, s: &mut Script, window: bool) {
        let base = self.driver[0].base;
        s.push(format_args!("readl {:#x}", base + reg::STATUS));
        s.push(format_args!("readl {:#x}", base + reg::INTERRUPT_STATUS));
        s.push(format_args!("readl {:#x}", base + reg::CONFIG_GENERATION));
        s.push(format_args!("read {:#x} 20", base + reg::CONFIG));
        for q in 0..self.driver[0].num_queues {
            let queue = &self.driver[0].queues[q as usize];
            let len = 4 + 8 * queue.size.clamp(1, 32) + 2;
            s.push(format_args!("read {:#x} {len}", queue.used));
        }
        if window {
            for page in 0..WINDOW_PAGES {
                s.push(format_args!("readb {:#x}", WINDOW + page * PAGE));
            }
        }
    }

    fn parse(&self, replies: &[String]) -> Result<Observed> {
        let queues = self.driver[0].num_queues as usize;
        ensure!(replies.len() >= 4 + queues, "too few replies");
        Ok(Observed {
            status: value(&replies[0])?,
            isr: value(&replies[1])?,
            generation: replies[2].clone(),
            config: replies[3].clone(),
            used: replies[4..4 + queues].to_vec(),
            window: replies[4 + queues..]
                .iter()
                .map(|reply| value(reply).map(|v| v == 0))
                .collect::<Result<_>>()?,
        })
    }

    /// Differences between two observations
    fn compare(&self, obs: &[Observed; 2]) -> Vec<String> {
        let mut list = Vec::new();
        let mut check = |name: &str, a: &str, b: &str| {
            if a != b {
                list.push(format!("{name}: A: {a}, B: {b}"));
            }
        };
        let [a, b] = obs;
        check(
            "status",
            &format!("{:#x}", a.status),
            &format!("{:#x}", b.status),
        );
        check("interrupt status", &a.isr.to_string(), &b.isr.to_string());
        check("config generation", &a.generation, &b.generation);
        check("configuration space", &a.config, &b.config);
        for (q, (used_a, used_b)) in a.used.iter().zip(&b.used).enumerate() {
            let name = format!("used ring of queue {q}");
            if self.hint_queue == Some(q) {
                check(&name, ring_entries(used_a), ring_entries(used_b));
            } else {
                check(&name, used_a, used_b);
            }
        }
        for (page, (zero_a, zero_b)) in a.window.iter().zip(&b.window).enumerate() {
            check(
                &format!("page {page} of the window is zero"),
                &zero_a.to_string(),
                &zero_b.to_string(),
            );
        }
        list
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
            && !self.bad_pages
            && !is_bad_page_element(op)
    }

    /// Whether the I/O thread gets something to do
    fn kicks_hints(&self, op: &Op) -> bool {
        match op {
            Op::Elem { q, kick: true, .. } => self.hint_queue == Some(*q as usize),
            Op::Kick { value } => self.hint_queue == Some((*value & 0xffff) as usize),
            _ => false,
        }
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
                self.run_qmp(command, op, &mut list, effects)?;
            }
            let moved = *op == Op::Migrate && self.migrate(&mut list, effects)?;
            self.migrated |= moved;
            if moved || self.migrated && *op == Op::Cont {
                // see NAMED_DIFFERENCES, resume-after-migration
                for (driver, script) in self.driver.iter().zip(&mut scripts) {
                    for q in 0..driver.num_queues {
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
            counts.push((own, scripts[0].count - before));
        }

        let [replies_a, replies_b] = self.run_scripts([&scripts[0], &scripts[1]])?;
        let mut at = 0;
        for (i, (op, (own, count))) in ops.iter().zip(counts).enumerate() {
            for k in at..at + own {
                if replies_a[k] != replies_b[k] {
                    let command = scripts[0].text.lines().nth(k).unwrap_or_default();
                    list.push(explain(command, &replies_a[k], &replies_b[k]));
                }
            }
            let mut obs = [
                self.parse(&replies_a[at + own..at + count])?,
                self.parse(&replies_b[at + own..at + count])?,
            ];
            at += count;

            self.wait_for_hints(op, &mut obs, effects)?;
            if matches!(op, Op::Init { .. } | Op::SystemReset) {
                self.bad_pages = false;
            }
            self.bad_pages |= is_bad_page_element(op);
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

    /// Look at both devices.
    fn observe(&mut self, window: bool) -> Result<[Observed; 2]> {
        let mut script = Script::default();
        self.observe_script(&mut script, window);
        let [a, b] = self.run_scripts([&script, &script])?;
        Ok([self.parse(&a)?, self.parse(&b)?])
    }

    /// Look at both devices when nothing happens in them any more by itself:
    /// what the main loop and the I/O thread have asked each other to do is
    /// done after some turns of the former.
    fn observe_idle(&mut self, window: bool) -> Result<[Observed; 2]> {
        let deadline = Instant::now() + TIMEOUT;
        let mut last = None;
        loop {
            for (qemu, thread) in self.qemu.iter().zip(self.io_threads) {
                qemu.wait_asleep(thread)?;
            }
            let obs = self.observe(window)?;
            let progress = self.progress()?;
            let mut idle = true;
            for (list, broken) in progress.iter().zip(self.broken_devices()?) {
                // A broken device keeps what it has.
                idle &= broken || list.iter().all(|(_, inuse)| *inuse == 0);
            }
            let now = (obs, progress);
            if idle && last.as_ref() == Some(&now) || Instant::now() >= deadline {
                return Ok(now.0);
            }
            last = Some(now);
        }
    }

    /// How far each device is with each queue on which it works step by step:
    /// the index of the next element, and how many are in flight
    fn progress(&mut self) -> Result<[Vec<(i64, i64)>; 2]> {
        let mut result = [Vec::new(), Vec::new()];
        for (qemu, list) in self.qemu.iter_mut().zip(&mut result) {
            // The device keeps the element of the queue for statistics.
            for q in (0..self.driver[0].num_queues).filter(|q| *q != 2) {
                let command = json!({
                    "execute": "x-query-virtio-queue-status",
                    "arguments": {"path": "/machine/peripheral/balloon", "queue": q},
                });
                let answer = qemu.qmp(&command.to_string())?;
                // There is nothing to tell of a queue that is not set up.
                let get = |name: &str| answer["return"][name].as_i64().unwrap_or(0);
                list.push((get("last-avail-idx"), get("inuse")));
            }
        }
        Ok(result)
    }

    /// If both devices are different, see whether one of them is only late.
    fn catch_up(&mut self, obs: &mut [Observed; 2], effects: &mut Effects) -> Result<bool> {
        let late = |q: &usize| used_idx(&obs[0].used[*q]) != used_idx(&obs[1].used[*q]);
        if !(0..obs[0].used.len()).any(|q| q != 2 && late(&q)) {
            return Ok(false);
        }
        let mut last = None;
        loop {
            *obs = self.observe_idle(true)?;
            self.tolerate_unreturned(obs, effects)?;
            if (obs[0].isr ^ obs[1].isr) == 1 {
                // The driver acknowledged the interrupt before it was there
                self.acknowledge(obs)?;
            }
            let seen = Some(obs.clone());
            if self.running() || self.compare(obs).is_empty() || seen == last {
                break;
            }
            last = seen;
            // While the VM is stopped, only a notification makes a device that
            // has interrupted its work go on, and nothing if there is no work.
            let mut kicks = Script::default();
            for q in (0..self.driver[0].num_queues).filter(|q| *q != 2) {
                if self.hint_queue != Some(q as usize) {
                    self.driver[0].kick(&mut kicks, q);
                }
            }
            self.run_scripts([&kicks, &kicks])?;
        }
        let caught_up = self.compare(obs).is_empty();
        if caught_up {
            effects.name("turns");
        }
        Ok(caught_up)
    }

    /// Acknowledge the interrupt for used elements.
    fn acknowledge(&mut self, obs: &mut [Observed; 2]) -> Result<()> {
        let mut ack = Script::default();
        let addr = self.driver[0].base + reg::INTERRUPT_ACK;
        ack.push(format_args!("writel {addr:#x} 1"));
        self.run_scripts([&ack, &ack])?;
        for each in obs {
            each.isr &= !1;
        }
        Ok(())
    }

    /// Accept that a device which is broken has not returned elements that were
    /// made available together with a bad one.
    fn tolerate_unreturned(
        &mut self,
        obs: &mut [Observed; 2],
        effects: &mut Effects,
    ) -> Result<()> {
        for q in 0..2 {
            let [a, b] = [&obs[0].used[q], &obs[1].used[q]];
            if !self.bad_pages || a == b || !self.both_broken()? {
                continue;
            }
            effects.name("error-in-batch");
            // From here on they are the same
            let hex = a.trim_start_matches("OK ").to_owned();
            let mut script = Script::default();
            script.push(format_args!(
                "write {:#x} {} {hex}",
                self.driver[1].queues[q].used,
                (hex.len() - 2) / 2
            ));
            self.qemu[1].send(&script.text)?;
            self.qemu[1].reply()?;
            obs[1].used[q] = obs[0].used[q].clone();
        }
        Ok(())
    }

    /// If the I/O thread has something to do after an operation, wait for it.
    fn wait_for_hints(
        &mut self,
        op: &Op,
        obs: &mut [Observed; 2],
        effects: &mut Effects,
    ) -> Result<()> {
        let hint_kick = self.kicks_hints(op);
        let resumed = self.hint_blocked
            && matches!(
                op,
                Op::Cont | Op::Status { .. } | Op::Init { .. } | Op::Negotiate { .. }
            );
        if hint_kick && !self.running() {
            self.hint_blocked = true;
        }
        if self.running() && (hint_kick || resumed) {
            // The C device is blocked until the driver accepts the feature.
            self.hint_blocked &= self.driver[0].features & F_HINT == 0;
            self.hints = true;
        }
        // Even if it was given no work now, there may be some left
        if self.hints && (hint_kick || resumed || !self.compare(obs).is_empty()) {
            self.settle(obs, may_discard(op), effects)?;
        }
        Ok(())
    }

    fn run_qmp(
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
            effects.name("last-update");
        }
        if answers[0] != answers[1]
            && matches!(answers[0]["return"]["queue-index"].as_u64(), Some(0 | 1))
        {
            for answer in &mut answers {
                answer["return"]["signalled-used"] = Value::Null;
                answer["return"]["signalled-used-valid"] = Value::Null;
            }
            if answers[0] == answers[1] {
                effects.name("batch-notification");
            }
        }
        if answers[0] != answers[1] && self.bad_pages && self.both_broken()? {
            // see NAMED_DIFFERENCES, error-in-batch
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
            effects.name("error-in-batch");
        }
        if answers[0] != answers[1] {
            list.push(format!("QMP: A: {}\n     B: {}", answers[0], answers[1]));
        }
        Ok(())
    }

    /// Move the state of each to a new instance of the other.  Returns false if
    /// it stays where it is.
    fn migrate(&mut self, list: &mut Vec<String>, effects: &mut Effects) -> Result<bool> {
        if self.hint_blocked || self.bad_pages && self.both_broken()? {
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

    /// Whether the devices are broken, which the legacy interface does not tell
    fn broken_devices(&mut self) -> Result<[bool; 2]> {
        let mut broken = [false; 2];
        for (qemu, flag) in self.qemu.iter_mut().zip(&mut broken) {
            *flag = qemu.qmp(QUERY_STATUS)?["return"]["broken"] == true;
        }
        Ok(broken)
    }

    fn both_broken(&mut self) -> Result<bool> {
        Ok(self.broken_devices()? == [true, true])
    }

    /// Wait until the I/O thread is done with the hint queue.
    fn settle(
        &mut self,
        obs: &mut [Observed; 2],
        window: bool,
        effects: &mut Effects,
    ) -> Result<()> {
        *obs = self.observe_idle(window)?;
        if obs[0].isr == obs[1].isr | 1 && obs[0].isr != obs[1].isr && self.compare(obs).len() == 1
        {
            effects.name("hint-interrupt");
            self.acknowledge(obs)?;
        }
        if let Some(q) = self.hint_queue {
            if obs[0].used[q] != obs[1].used[q]
                && ring_entries(&obs[0].used[q]) == ring_entries(&obs[1].used[q])
            {
                effects.name("hint-notification");
            }
        }
        Ok(())
    }

    fn compare_events(&mut self, list: &mut Vec<String>, effects: &mut Effects) -> Result<()> {
        let a = self.qemu[0].take_events()?;
        let b = self.qemu[1].take_events()?;
        if a != b {
            list.push(format!("events: A: {}, B: {}", json!(a), json!(b)));
        }
        for event in a {
            let name = event["event"].as_str().unwrap_or("?").to_owned();
            *effects.events.entry(name).or_default() += 1;
        }
        Ok(())
    }

    fn count_effects(&mut self, mut new: Observed, effects: &mut Effects) {
        let old = &self.last;
        effects.used += old
            .used
            .iter()
            .zip(&new.used)
            .map(|(old, new)| used_idx(new).wrapping_sub(used_idx(old)))
            .filter(|n| *n < 256)
            .map(u64::from)
            .sum::<u64>();
        effects.broken += u64::from(new.status & !old.status & 0x40 != 0);
        effects.config += u64::from(new.config != old.config);
        effects.interrupts += u64::from(new.isr & !old.isr != 0);
        if new.window.is_empty() {
            new.window.clone_from(&old.window);
        } else {
            effects.discarded += new
                .window
                .iter()
                .enumerate()
                .filter(|(page, zero)| **zero && !old.window.get(*page).unwrap_or(&false))
                .count() as u64;
        }
        self.last = new;
    }
}

/// Whether to look at the window; what else discards pages is noticed by
/// [`Op::Check`].
fn may_discard(op: &Op) -> bool {
    match op {
        Op::Elem { q, kick: true, .. } => *q != 1 && *q != 2,
        Op::Kick { .. } | Op::Migrate => true,
        _ => false,
    }
}

/// Describe replies that differ; long ones only from where they do.
fn explain(command: &str, a: &str, b: &str) -> String {
    let at = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let cut = |s: &str| -> String {
        if s.len() <= 200 {
            s.to_owned()
        } else {
            let part: String = s.chars().skip(at).take(80).collect();
            format!("...{part}... (from character {at})")
        }
    };
    format!("{command}: A: {}, B: {}", cut(a), cut(b))
}
