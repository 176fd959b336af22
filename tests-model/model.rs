// SPDX-License-Identifier: GPL-2.0-or-later

// A model of a driver, and of the rest of the device.  This file is included by
// modules that define `balloon`: the crate, or a copy of it with a mistake.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap, VecDeque},
    rc::Rc,
};

use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner},
};

use self::balloon::{
    budget::Budget,
    engine::{Engine, Event, Port, Work},
    pages::{PagePort, PageWork, Pieces, Tally},
    reports::{Piece, ReportPort, ReportWork, ReportedRange},
    runs::{Run, Runs},
};

/// More calls than any scenario needs
const ENDLESS: u32 = 200_000;
/// Size of the pages that are reported, in bytes
const PAGE: u64 = 4096;

/// A request of the driver
#[derive(Clone, Debug)]
struct Request {
    pfns: Vec<u32>,
    /// Sizes in host pages; `None` if a buffer is not RAM
    buffers: Vec<Option<u64>>,
}

/// What happens during a call of the device
#[derive(Clone, Copy, Debug)]
enum Nested {
    Nothing,
    Kick,
    /// The driver sends a request, and notifies the queue
    Send,
    /// The driver resets the queue or the device
    Reset,
    /// The driver resets the queue, sends a request, and notifies the queue
    ResetAndSend,
}

#[derive(Clone, Debug)]
enum Op {
    /// Send requests, and notify the queue
    Send(Vec<Request>),
    /// Make a request available without notifying the queue
    Add(Request),
    Kick,
    /// Iterations of the main loop, whether or not the device has asked for
    /// them
    MainLoop(u8),
    Stop,
    Cont,
    Reset,
    /// Migrate to another QEMU
    Migrate,
    /// Whether reports may be discarded
    Inhibit(bool),
    /// Whether the host has memory to populate pages
    Memory(bool),
}

#[derive(Clone, Debug)]
struct Scenario {
    ops: Vec<Op>,
    nested: Vec<Nested>,
    budget: (usize, usize, usize, u64),
    capacity: usize,
    /// How many elements the device may work on together
    batch: usize,
    /// Host page size in pages
    page_size: u64,
}

fn request() -> impl Strategy<Value = Request> {
    let pfns = prop_oneof![
        3 => (0u32..200, 0u32..24).prop_map(|(a, n)| (a..a + n).rev().collect()),
        2 => prop::collection::vec(0u32..100, 0..12),
        1 => Just(vec![u32::MAX, 0, u32::MAX - 1]),
        1 => (0u32..1000, 1usize..9).prop_map(|(a, n)| (a..).step_by(n).take(40).collect()),
    ];
    let buffers = prop::collection::vec(prop::option::weighted(0.8, 0u64..12), 0..6);
    (pfns, buffers).prop_map(|(pfns, buffers)| Request { pfns, buffers })
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let op = prop_oneof![
        6 => prop::collection::vec(request(), 1..5).prop_map(Op::Send),
        1 => request().prop_map(Op::Add),
        1 => Just(Op::Kick),
        6 => (1u8..4).prop_map(Op::MainLoop),
        2 => Just(Op::Stop),
        3 => Just(Op::Cont),
        1 => Just(Op::Reset),
        1 => Just(Op::Migrate),
        1 => any::<bool>().prop_map(Op::Inhibit),
        2 => any::<bool>().prop_map(Op::Memory),
    ];
    let nested = prop_oneof![
        20 => Just(Nested::Nothing),
        2 => Just(Nested::Kick),
        2 => Just(Nested::Send),
        1 => Just(Nested::Reset),
        1 => Just(Nested::ResetAndSend),
    ];
    (
        prop::collection::vec(op, 1..16),
        prop::collection::vec(nested, 0..60),
        (1usize..12, 1usize..40, 1usize..10, 1u64..30),
        1usize..6,
        prop::sample::select(vec![1, 2, usize::MAX]),
        prop::sample::select(vec![1u64, 2, 4]),
    )
        .prop_map(|(ops, nested, budget, capacity, batch, page_size)| Scenario {
            ops,
            nested,
            budget,
            capacity,
            batch,
            page_size,
        })
}

/// The state of an element
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    InFlight,
    Returned,
    PutBack,
    Dropped,
}

/// An element that the device has popped
struct Element {
    id: usize,
    /// The life of the queue in which it was popped.  A reset begins a new
    /// life.
    life: u32,
    popped_at: u64,
    request: Rc<Request>,
    log: Rc<Log>,
    fate: Cell<Fate>,
}

#[derive(Default)]
struct Log {
    /// Elements in flight that were popped in the current life of the queue
    in_flight: RefCell<Vec<usize>>,
    /// The number of elements that exist, from any life
    alive: Cell<usize>,
    life: Cell<u32>,
}

impl Drop for Element {
    fn drop(&mut self) {
        self.log.alive.set(self.log.alive.get() - 1);
        if self.fate.replace(Fate::Dropped) == Fate::InFlight && !std::thread::panicking() {
            assert_ne!(
                self.life,
                self.log.life.get(),
                "element {} was lost",
                self.id
            );
        }
    }
}

/// The driver, the queue, the memory and the main loop
struct World<W> {
    engine: RefCell<Engine<W>>,
    log: Rc<Log>,
    budget: Budget,
    capacity: usize,
    batch: usize,
    page_size: u64,
    running: Cell<bool>,
    has_memory: Cell<bool>,
    /// The host had no memory in the current call of the device.
    refused: Cell<bool>,
    /// The latest delay of the timer
    delay: Cell<u32>,
    /// The timer is armed.
    timer: Cell<bool>,
    /// How many PFNs the device has read, and how many pages it has counted
    read: Cell<u64>,
    counted: Cell<u64>,
    scheduled: Cell<bool>,
    /// Whether the current call of the device has requested another one
    left_work: Cell<bool>,
    /// Iterations of the main loop since the last turn; `None` if that turn has
    /// left no work
    since_turn: Cell<Option<u32>>,
    inhibited: Cell<bool>,
    /// IDs and requests, in the order in which the driver sent them
    available: RefCell<VecDeque<(usize, Rc<Request>)>>,
    next_id: Cell<usize>,
    /// All requests, by ID
    requests: RefCell<HashMap<usize, Rc<Request>>>,
    /// The device was notified, or will be, of requests with lower IDs than
    /// this
    notified: Cell<usize>,
    returned: RefCell<BTreeSet<usize>>,
    last_returned: Cell<Option<usize>>,
    /// The time, which is the number of calls
    now: Cell<u64>,
    /// When each page was last discarded
    discarded: RefCell<HashMap<u64, u64>>,
    /// How many bytes of each buffer were discarded
    reported: RefCell<HashMap<(usize, usize), u64>>,
    to_be_notified: Cell<bool>,
    /// The queue was reset, and not notified since then
    fresh: Cell<bool>,
    nested: RefCell<VecDeque<Nested>>,
    depth: Cell<u32>,
    calls: Cell<u32>,
    /// The part of the budget that the current call has used
    used: Cell<(usize, usize, usize, u64)>,
}

impl<W: Default> World<W> {
    fn new(s: &Scenario) -> Self {
        let (buffers, pfns, ranges, pages) = s.budget;
        Self {
            engine: RefCell::default(),
            log: Rc::default(),
            budget: Budget {
                buffers,
                pfns,
                ranges,
                bytes: pages * PAGE,
                align: PAGE,
            },
            capacity: s.capacity,
            batch: s.batch,
            page_size: s.page_size,
            running: Cell::new(true),
            has_memory: Cell::new(true),
            refused: Cell::new(false),
            delay: Cell::new(0),
            timer: Cell::new(false),
            read: Cell::new(0),
            counted: Cell::new(0),
            scheduled: Cell::new(false),
            left_work: Cell::new(false),
            since_turn: Cell::new(None),
            inhibited: Cell::new(false),
            available: RefCell::default(),
            next_id: Cell::new(0),
            requests: RefCell::default(),
            notified: Cell::new(0),
            returned: RefCell::default(),
            last_returned: Cell::new(None),
            now: Cell::new(0),
            discarded: RefCell::default(),
            reported: RefCell::default(),
            to_be_notified: Cell::new(false),
            fresh: Cell::new(false),
            nested: RefCell::new(s.nested.clone().into()),
            depth: Cell::new(0),
            calls: Cell::new(0),
            used: Cell::default(),
        }
    }

    fn tick(&self) -> u64 {
        self.calls.set(self.calls.get() + 1);
        assert!(self.calls.get() < ENDLESS, "does not end");
        self.now.set(self.now.get() + 1);
        self.now.get()
    }

    fn add(&self, request: Request) {
        let id = self.next_id.replace(self.next_id.get() + 1);
        let shared = Rc::new(request);
        self.requests.borrow_mut().insert(id, shared.clone());
        self.available.borrow_mut().push_back((id, shared));
    }

    fn forget(&self) {
        self.log.life.set(self.log.life.get() + 1);
        self.log.in_flight.borrow_mut().clear();
        self.available.borrow_mut().clear();
        self.notified.set(self.next_id.get());
        self.to_be_notified.set(false);
        self.last_returned.set(None);
    }

    fn pop(&self) -> Option<Element> {
        let popped_at = self.tick();
        let (id, request) = self.available.borrow_mut().pop_front()?;
        let mut in_flight = self.log.in_flight.borrow_mut();
        in_flight.push(id);
        assert!(in_flight.len() <= self.capacity, "too many in flight");
        self.log.alive.set(self.log.alive.get() + 1);
        Some(Element {
            id,
            life: self.log.life.get(),
            popped_at,
            request,
            log: self.log.clone(),
            fate: Cell::new(Fate::InFlight),
        })
    }

    fn push(&self, elem: &Element) {
        self.tick();
        assert_eq!(elem.fate.replace(Fate::Returned), Fate::InFlight);
        assert_eq!(elem.life, self.log.life.get(), "returned after a reset");
        assert!(self.last_returned.get() < Some(elem.id), "order");
        self.last_returned.set(Some(elem.id));
        self.log.in_flight.borrow_mut().retain(|id| *id != elem.id);
        assert!(self.returned.borrow_mut().insert(elem.id));
        self.to_be_notified.set(true);
    }

    fn unpop(&self, elem: &Element) {
        self.tick();
        assert_eq!(elem.fate.replace(Fate::PutBack), Fate::InFlight);
        assert_eq!(elem.life, self.log.life.get(), "put back after a reset");
        let last = self.log.in_flight.borrow_mut().pop();
        assert_eq!(last, Some(elem.id), "not the last one");
        self.available
            .borrow_mut()
            .push_front((elem.id, elem.request.clone()));
    }

    fn charge(&self, buffers: usize, pfns: usize, ranges: usize, bytes: u64) {
        let (a, b, c, d) = self.used.get();
        self.used
            .set((a + buffers, b + pfns, c + ranges, d + bytes));
    }
}

/// The port of one of the queues, made for one life of the queue
trait Device: Port<Element = Element>
where
    Self::Work: Work<Self>,
{
    /// The port for the current life of the queue
    fn now(world: &Rc<World<Self::Work>>) -> Self;
    fn world(&self) -> &Rc<World<Self::Work>>;

    fn kick(&self) {
        let w = self.world();
        w.notified.set(w.next_id.get());
        let before = w.now.get();
        let at_once = w.fresh.replace(false) && w.depth.get() == 0;
        self.handle(Event::Notified);
        assert!(!at_once || w.now.get() > before, "a reset does not end the pause");
    }

    /// Call the device.  Unless this is a nested call, check what it did.
    fn handle(&self, event: Event) {
        let w = self.world();
        let outermost = w.depth.get() == 0;
        w.depth.set(w.depth.get() + 1);
        if outermost {
            w.used.set((0, 0, 0, 0));
            w.left_work.set(false);
            w.refused.set(false);
        }
        Self::now(w).turn(event);
        w.depth.set(w.depth.get() - 1);
        if outermost {
            let may_work = w.running.get() || matches!(event, Event::Notified | Event::Stopped);
            let idle = w.used.get() == (0, 0, 0, 0);
            assert!(may_work || idle, "works although the VM is stopped");
            self.check_turn();
            self.check_pause();
        }
    }

    fn reset(&self) {
        let w = self.world();
        w.since_turn.set(None);
        w.delay.set(0);
        w.fresh.set(true);
        w.forget();
        let work = w.engine.borrow_mut().invalidate();
        drop(work);
    }

    /// The device has called something, which can call the device.
    fn called(&self) {
        let w = self.world();
        let nested = w.nested.borrow_mut().pop_front();
        let request = || Request {
            pfns: vec![7, 3],
            buffers: vec![Some(1)],
        };
        // In QEMU, the reentrancy guard limits the depth
        if w.depth.get() > 3 {
            return;
        }
        match nested.unwrap_or(Nested::Nothing) {
            Nested::Nothing => {}
            Nested::Kick => self.kick(),
            Nested::Send => {
                w.add(request());
                self.kick();
            }
            Nested::Reset => self.reset(),
            Nested::ResetAndSend => {
                self.reset();
                w.add(request());
                self.kick();
            }
        }
    }

    /// Checks after a turn
    fn check_turn(&self) {
        let w = self.world();
        assert!(!w.to_be_notified.get(), "the driver was not notified");
        // When the VM is stopped, finishing what is in flight has a budget of
        // its own
        let n = if w.running.get() { 1 } else { 2 };
        let (buffers, pfns, ranges, bytes) = w.used.get();
        // An element has at most 5 buffers here
        assert!(buffers <= w.budget.buffers + 5, "budget for buffers");
        assert!(pfns <= w.budget.pfns, "budget for PFNs");
        // Each range is charged as two
        assert!(ranges <= n * w.budget.ranges.next_multiple_of(2), "budget for ranges");
        let page = w.page_size * PAGE;
        let limit = n as u64 * w.budget.bytes.next_multiple_of(page);
        assert!(bytes <= limit, "budget for bytes");
        if !w.running.get() {
            assert!(
                w.log.in_flight.borrow().is_empty(),
                "in flight after a stop"
            );
        }
        let in_flight = w.log.in_flight.borrow().len();
        assert_eq!(w.log.alive.get(), in_flight, "kept over a reset");
    }

    /// The main loop runs twice before the device works again, however often
    /// the driver notifies the queue.
    fn check_pause(&self) {
        let w = self.world();
        if w.used.get() == (0, 0, 0, 0) {
            return;
        }
        let since = w.since_turn.get();
        assert!(since.is_none_or(|n| n >= 2), "no pause between turns");
        w.since_turn.set(w.left_work.get().then_some(0));
    }

    fn cont(&self) {
        if !self.world().running.replace(true) {
            self.handle(Event::Started);
        }
    }

    fn stop(&self) {
        let w = self.world();
        if w.running.replace(false) {
            w.since_turn.set(None);
            // Elements that waited for memory are put back.
            w.delay.set(0);
            self.handle(Event::Stopped);
        }
    }

    fn main_loop(&self) {
        let w = self.world();
        w.scheduled.set(false);
        w.since_turn.set(w.since_turn.get().map(|n| n + 1));
        // The clock of the timer is stopped while the VM is.
        if w.running.get() && w.timer.replace(false) {
            self.handle(Event::Retry);
        }
        self.handle(Event::MainLoop);
    }

    fn apply(&self, op: &Op) {
        let w = self.world();
        match op {
            Op::Send(requests) => {
                requests.iter().cloned().for_each(|r| w.add(r));
                self.kick();
            }
            Op::Add(request) => w.add(request.clone()),
            Op::Kick => self.kick(),
            Op::MainLoop(n) => (0..*n).for_each(|_| self.main_loop()),
            Op::Stop => self.stop(),
            Op::Cont => self.cont(),
            Op::Reset => {
                self.reset();
                assert_eq!(w.log.alive.get(), 0, "kept over a reset");
            }
            Op::Migrate => {
                self.stop();
                let old = w.engine.replace(Engine::default());
                drop(old);
                w.scheduled.set(false);
                w.timer.set(false);
                w.fresh.set(false);
                self.handle(Event::Arrived);
                // the new device looks at all available requests
                w.notified.set(w.next_id.get());
                self.cont();
            }
            Op::Inhibit(inhibited) => w.inhibited.set(*inhibited),
            Op::Memory(has_memory) => w.has_memory.set(*has_memory),
        }
    }

    /// Checks that all requests of which the device was notified are done in
    /// the end
    fn finish_all(&self) {
        let w = self.world();
        w.has_memory.set(true);
        self.cont();
        for _ in 0..10_000 {
            if !w.scheduled.get() && !w.timer.get() {
                break;
            }
            self.main_loop();
        }
        assert!(!w.scheduled.get(), "does not end");
        let left = w.available.borrow().front().map(|(id, _)| *id);
        assert!(
            left.is_none_or(|id| id >= w.notified.get()),
            "request {left:?} is forgotten"
        );
        assert!(w.log.in_flight.borrow().is_empty(), "never returned");
    }
}

include!(concat!(env!("CARGO_MANIFEST_DIR"), "/queues.rs"));

fn check<D: Device>(s: &Scenario)
where
    D::Work: Work<D>,
{
    let device = D::now(&Rc::new(World::new(s)));
    s.ops.iter().for_each(|op| device.apply(op));
    device.finish_all();
}

/// Try random scenarios.  If one fails, returns the reason, and the smallest
/// scenario that was found to fail.
fn try_all<D: Device>(cases: u32) -> Result<(), (String, Box<Scenario>)>
where
    D::Work: Work<D>,
{
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    // Each scenario that fails panics, and many do while proptest looks for the
    // smallest one.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = TestRunner::new_with_rng(config, rng).run(&scenario(), |s| {
        check::<D>(&s);
        Ok(())
    });
    std::panic::set_hook(hook);
    match result {
        Ok(()) => Ok(()),
        Err(TestError::Fail(reason, s)) => Err((reason.to_string(), Box::new(s))),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

/// Try random scenarios for each kind of queue.
pub fn find_mistake(cases: u32) -> Result<(), String> {
    let result = try_all::<Pages>(cases).and_then(|()| try_all::<Reports>(cases));
    result.map_err(|(reason, scenario)| format!("{reason}\n{scenario:?}"))
}
