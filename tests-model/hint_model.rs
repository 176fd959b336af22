// SPDX-License-Identifier: GPL-2.0-or-later

// The main loop and an I/O thread that exchange elements with hints, in all
// interleavings of the threads.  This file is included by modules that define
// `balloon`, in which the locks are those of loom.

use std::{
    panic::{catch_unwind, AssertUnwindSafe},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, PoisonError,
    },
};

use balloon::{
    hint_exchange::{Command, HintElement, HintExchange, Processed},
    hinting::Hinting,
};

/// The numbers of the elements that were dropped.  This is not a lock of loom,
/// because elements are also dropped after loom has found a mistake.
type Dropped = Arc<std::sync::Mutex<Vec<u32>>>;

/// Records what happens.  Its lock is where loom lets other threads run.
#[derive(Default)]
struct Log {
    /// Hints that were passed on: element and index
    hints: Vec<(u32, usize)>,
    /// The main loop has returned from a function after which there must not be
    /// any hints.
    forbidden: bool,
    /// The main loop is about to wait in such a function.
    asked: bool,
    /// Hints that have begun since `asked` was set
    late: u32,
}

struct Element {
    number: u32,
    command: Command,
    buffers: usize,
    log: Arc<loom::sync::Mutex<Log>>,
    dropped: Dropped,
}

impl HintElement for Element {
    fn command(&self) -> Command {
        self.command
    }

    fn hint(&self, index: usize) -> bool {
        if index >= self.buffers {
            return false;
        }
        {
            let mut log = self.log.lock().unwrap();
            log.late += u32::from(log.asked);
            log.hints.push((self.number, index));
            assert!(!log.forbidden, "a hint begins afterwards");
        }
        // Passing on a hint takes time
        assert!(
            !self.log.lock().unwrap().forbidden,
            "a hint ends afterwards"
        );
        true
    }
}

impl Drop for Element {
    fn drop(&mut self) {
        let dropped = self.dropped.lock();
        dropped
            .unwrap_or_else(PoisonError::into_inner)
            .push(self.number);
    }
}

/// The number of hints after which the I/O thread has to be asked again
const HINTS: usize = 2;

/// Requests to the I/O thread, which it handles one by one
#[derive(Default)]
struct Requests {
    made: u32,
    done: u32,
    quit: bool,
}

#[derive(Default)]
struct Io {
    requests: loom::sync::Mutex<Requests>,
    changed: loom::sync::Condvar,
}

impl Io {
    fn change(&self, f: impl FnOnce(&mut Requests)) {
        f(&mut self.requests.lock().unwrap());
        self.changed.notify_all();
    }

    fn wait(&self, f: impl Fn(&Requests) -> bool) {
        let mut requests = self.requests.lock().unwrap();
        while !f(&requests) {
            requests = self.changed.wait(requests).unwrap();
        }
    }

    fn run(&self, exchange: &HintExchange<Element>) {
        loop {
            self.wait(|r| r.done < r.made || r.quit);
            let requests = self.requests.lock().unwrap();
            if requests.done == requests.made {
                return;
            }
            drop(requests);
            exchange.process(HINTS);
            self.change(|r| r.done += 1);
        }
    }
}

/// The thread that has the big QEMU lock
struct MainLoop {
    exchange: Arc<HintExchange<Element>>,
    log: Arc<loom::sync::Mutex<Log>>,
    dropped: Dropped,
    io: Arc<Io>,
    io_thread: loom::thread::JoinHandle<()>,
    added: u32,
    /// The elements that were returned, in order
    returned: Vec<Processed<Element>>,
}

impl MainLoop {
    /// Begins with a round that has been requested.
    fn new() -> Self {
        let exchange = Arc::<HintExchange<Element>>::default();
        let io = Arc::<Io>::default();
        let io_thread = {
            let (exchange, io) = (exchange.clone(), io.clone());
            loom::thread::spawn(move || io.run(&exchange))
        };
        let this = Self {
            exchange,
            io,
            io_thread,
            log: Arc::default(),
            dropped: Arc::default(),
            added: 0,
            returned: Vec::new(),
        };
        this.exchange.update(Hinting::request);
        this
    }

    /// The driver begins the round.
    fn begin(&mut self) {
        let id = self.exchange.state().cmd_id();
        self.add(Command::Id(id), 0);
    }

    fn add(&mut self, command: Command, buffers: usize) {
        let schedule = self.exchange.add(Element {
            number: self.added,
            command,
            buffers,
            log: self.log.clone(),
            dropped: self.dropped.clone(),
        });
        self.added += 1;
        if schedule {
            self.io.change(|r| r.made += 1);
        }
    }

    /// Wait until the I/O thread has processed everything.
    fn wait_for_io(&self) {
        loop {
            self.io.wait(|r| r.done == r.made);
            if !self.exchange.go_on() {
                break;
            }
            self.io.change(|r| r.made += 1);
        }
    }

    fn take_processed(&mut self) {
        let processed = std::iter::from_fn(|| self.exchange.next_processed());
        self.returned.extend(processed);
    }

    /// From now on, the log does not accept any hints.
    fn forbid(&self) {
        self.log.lock().unwrap().forbidden = true;
    }

    fn allow(&self) {
        self.log.lock().unwrap().forbidden = false;
    }

    /// Checks that each element was either dropped, or returned once and in
    /// order
    fn check(mut self) {
        self.wait_for_io();
        self.io.change(|r| r.quit = true);
        self.take_processed();
        let dropped = self.dropped.lock().unwrap().clone();
        let returned: Vec<_> = self.returned.iter().map(|p| p.elem.number).collect();
        let mut all = [&dropped[..], &returned].concat();
        assert!(returned.windows(2).all(|w| w[0] < w[1]), "not in order");
        all.sort_unstable();
        assert!(all.into_iter().eq(0..self.added), "lost, or twice");
        self.io_thread.join().unwrap();
    }

    fn hints(&self) -> Vec<(u32, usize)> {
        self.log.lock().unwrap().hints.clone()
    }
}

/// The main loop does not interrupt the I/O thread: all hints are passed on.
fn all_is_processed() {
    let mut main = MainLoop::new();
    main.begin();
    main.add(Command::None, 2);
    main.take_processed();
    main.add(Command::Bad, 1);
    main.wait_for_io();
    main.take_processed();
    main.add(Command::None, 1);
    main.wait_for_io();
    main.take_processed();
    assert_eq!(main.hints(), [(1, 0), (1, 1), (3, 0)]);
    let bad: Vec<_> = main.returned.iter().map(|p| p.bad_command).collect();
    assert_eq!(bad, [false, false, true, false]);
    main.check();
}

/// Migration ends the round, and begins another one.
fn stop(ended_early: &AtomicBool) {
    let mut main = MainLoop::new();
    main.begin();
    main.add(Command::None, 3);
    let log = main.log.clone();
    main.exchange.update(|state| {
        log.lock().unwrap().asked = true;
        state.stop()
    });
    main.forbid();
    assert!(
        log.lock().unwrap().late <= 1,
        "waits for more than one hint"
    );
    let hints = main.hints().len();
    if hints == 1 || hints == 2 {
        ended_early.store(true, Ordering::Relaxed);
    }
    main.add(Command::None, 1);
    main.wait_for_io();
    assert_eq!(main.hints().len(), hints);

    // That the main loop has waited has no effect on the next round.
    main.exchange.update(Hinting::request);
    main.allow();
    main.begin();
    main.add(Command::None, 1);
    main.wait_for_io();
    assert_eq!(main.hints().len(), hints + 1);
    main.check();
}

/// The queue is reset: all of its elements are dropped, and none is returned.
fn drop_all(ended_early: &AtomicBool) {
    let mut main = MainLoop::new();
    main.begin();
    main.add(Command::None, 3);
    main.add(Command::None, 1);
    main.exchange.drop_all();
    main.forbid();
    assert_eq!(
        main.dropped.lock().unwrap().len(),
        3,
        "not all were dropped"
    );
    if (1..3).contains(&main.hints().len()) {
        ended_early.store(true, Ordering::Relaxed);
    }
    main.take_processed();
    assert!(main.returned.is_empty(), "returned to another queue");
    main.add(Command::None, 0);
    main.check();
}

/// The VM is stopped: all elements are returned at once.
fn finish_all(ended_early: &AtomicBool) {
    let mut main = MainLoop::new();
    main.begin();
    main.add(Command::None, 3);
    main.add(Command::Id(0), 0);
    let processed = main.exchange.finish_all();
    main.forbid();
    main.returned.extend(processed);
    assert_eq!(main.returned.len(), 3, "not all were finished");
    assert!(!main.exchange.state().is_hinting(), "a command was ignored");
    if (1..3).contains(&main.hints().len()) {
        ended_early.store(true, Ordering::Relaxed);
    }
    main.add(Command::None, 0);
    main.check();
}

/// Limits the number of preemptions, as loom's authors recommend
fn explore(preemptions: u32, scenario: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions as usize);
    builder.check(scenario);
}

fn check_all(preemptions: u32) {
    explore(preemptions, all_is_processed);
    for (name, scenario) in [
        ("stop", stop as fn(&AtomicBool)),
        ("drop_all", drop_all),
        ("finish_all", finish_all),
    ] {
        let ended_early = Arc::new(AtomicBool::new(false));
        let flag = ended_early.clone();
        explore(preemptions, move || scenario(&flag));
        // At least in some interleavings, waiting must not take all hints of an
        // element.
        assert!(
            ended_early.load(Ordering::Relaxed),
            "{name} never ends an element"
        );
    }
}

/// Look for a mistake in all interleavings with up to `preemptions`
/// preemptions.
pub fn find_mistake(preemptions: u32) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| check_all(preemptions))).map_err(|panic| {
        panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default()
    })
}
