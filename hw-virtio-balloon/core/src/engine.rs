// SPDX-License-Identifier: GPL-2.0-or-later

//! How the device works on a queue: in turns, between which it yields to the
//! main loop
//!
//! A driver can send more than what can be done in an acceptable time, as the
//! main loop and the vCPUs have to wait meanwhile.  Therefore a turn has a
//! [`Budget`].  What is left of it is kept in the [`Engine`], and the next turn
//! comes with a bottom half, a few iterations of the main loop later.
//!
//! # Examples
//!
//! A device that returns elements as they are, one in each step.  Here the queue
//! is a list of numbers.
//!
//! ```
//! use std::cell::{Cell, RefCell};
//! use virtio_balloon_core::{
//!     budget::Budget,
//!     engine::{Engine, Event, Phase, Port, Progress, Work},
//! };
//!
//! #[derive(Default)]
//! struct Device {
//!     available: RefCell<Vec<u32>>,
//!     used: RefCell<Vec<u32>>,
//!     engine: RefCell<Engine<Echo>>,
//!     scheduled: Cell<bool>,
//! }
//!
//! /// No element is kept from one step to the next.
//! #[derive(Default)]
//! struct Echo;
//!
//! impl Work<Device> for Echo {
//!     fn step(&mut self, device: &Device, budget: &mut Budget, _phase: Phase) -> Progress {
//!         let Some(elem) = device.pop() else {
//!             return Progress::Idle;
//!         };
//!         budget.charge_element(device.buffers(&elem));
//!         device.push(elem);
//!         device.notify();
//!         Progress::More
//!     }
//! }
//!
//! impl Port for Device {
//!     type Element = u32;
//!     type Work = Echo;
//!
//!     fn capacity(&self) -> usize {
//!         128
//!     }
//!     fn pop(&self) -> Option<u32> {
//!         self.available.borrow_mut().pop()
//!     }
//!     fn buffers(&self, _elem: &u32) -> usize {
//!         1
//!     }
//!     fn push(&self, elem: u32) {
//!         self.used.borrow_mut().push(elem);
//!     }
//!     fn unpop(&self, elem: u32) {
//!         self.available.borrow_mut().push(elem);
//!     }
//!     fn notify(&self) {}
//!     fn is_current(&self) -> bool {
//!         true
//!     }
//!     fn engine<R>(&self, f: impl FnOnce(&mut Engine<Echo>) -> R) -> R {
//!         f(&mut self.engine.borrow_mut())
//!     }
//!     fn vm_running(&self) -> bool {
//!         true
//!     }
//!     fn schedule(&self) {
//!         self.scheduled.set(true);
//!     }
//!     fn schedule_after(&self, _milliseconds: u32) {}
//! }
//!
//! let device = Device::default();
//! device.available.replace((0..5000).collect());
//! device.turn(Event::Notified);
//! // The budget is spent, but not all is done.
//! assert!((1000..5000).contains(&device.used.borrow().len()));
//! while device.scheduled.take() {
//!     device.turn(Event::MainLoop);
//! }
//! assert_eq!(device.used.borrow().len(), 5000);
//! ```
//!
//! # Reentrancy
//!
//! Everything that a turn calls can call back into the device: the rings and the
//! buffers are memory that the driver has chosen, and if that is a register of a
//! device, writing to it can notify a queue or reset the device.  Therefore:
//!
//! * A turn takes its work out of the engine, and the engine is never borrowed
//!   while anything else is called.
//! * If the queue is notified during a turn, no second turn begins; the first
//!   one looks at the queue again.
//! * A reset makes the turn *stale*, see [`Port::is_current`].  It drops its
//!   elements instead of returning them, because the queue does not know them
//!   anymore.

use crate::budget::Budget;

/// Iterations of the main loop between two turns.  The monitor needs two for a
/// command: it moves from one context of the main loop to another.  If each of
/// them had a turn of its own, it would have to wait for three turns instead of
/// one.
const PAUSE: u8 = 2;

/// The longest time until something is tried again that the host could not do, in
/// milliseconds.  It begins with 1, and doubles.
const MAX_DELAY: u32 = 1000;

/// What an [`Engine`] works with: a virtqueue, and the device as far as that
/// queue is concerned.  It is made for an event, and only used until that has
/// been handled.
pub trait Port: Sized {
    /// A request of the driver.  It is returned with [`push`](Self::push), put
    /// back with [`unpop`](Self::unpop), or dropped, which releases it without
    /// telling the driver.
    type Element;

    /// What is done with the elements; implements [`Work`]
    type Work: Default;

    /// How many elements can be in flight
    fn capacity(&self) -> usize;

    /// The next element that the driver has made available
    fn pop(&self) -> Option<Self::Element>;

    /// How many buffers an element consists of
    fn buffers(&self, elem: &Self::Element) -> usize;

    /// Return an element to the driver, without having written to it.
    fn push(&self, elem: Self::Element);

    /// Put back the element that was popped last, so that it is the next one to
    /// be popped.
    fn unpop(&self, elem: Self::Element);

    /// Tell the driver that elements were returned.
    fn notify(&self);

    /// Whether the queue was neither reset nor removed since the port was made
    fn is_current(&self) -> bool;

    /// Call `f` with the engine.  `f` does not call anything else.
    fn engine<R>(&self, f: impl FnOnce(&mut Engine<Self::Work>) -> R) -> R;

    /// What may be done in a turn
    fn budget(&self) -> Budget {
        Budget::TURN
    }

    /// Whether the VM is running
    fn vm_running(&self) -> bool;

    /// Have [`Event::MainLoop`] happen in the next iteration of the main loop.  It
    /// may also happen without that.
    fn schedule(&self);

    /// Have [`Event::Retry`] happen after a time in milliseconds.  It may also
    /// happen later without that.
    fn schedule_after(&self, delay: u32);

    /// Something has happened: work on the queue if it is time to, as far as the
    /// budget allows.
    fn turn(&self, event: Event)
    where
        Self::Work: Work<Self>,
    {
        let Some((mut work, mut more)) = self.engine(|engine| engine.begin(event)) else {
            if self.engine(|engine| matches!(engine.state, State::Scheduled { .. })) {
                self.schedule();
            }
            return;
        };
        let mut budget = self.budget();
        let mut blocked = false;
        if event != Event::Stopped {
            loop {
                let progress = work.step(self, &mut budget, Phase::Collect);
                blocked = progress == Progress::Blocked;
                if blocked || !self.is_current() {
                    more = true;
                    break;
                }
                // A driver that notifies the queue whenever the device looks at it
                // must not keep the turn from ending.
                budget.charge_element(0);
                more = progress == Progress::More || self.engine(Engine::take_again);
                if !more || budget.is_spent() {
                    break;
                }
            }
        }
        if !self.vm_running() && self.is_current() && !work.is_empty() {
            self.finish(&mut work);
            more = true;
        }
        self.end(work, more, blocked);
    }

    /// The VM is stopped, and will perhaps be migrated: nothing stays in flight.
    fn finish(&self, work: &mut Self::Work)
    where
        Self::Work: Work<Self>,
    {
        let mut budget = self.budget();
        // Without a transport that notifies the queues when the VM starts, the
        // C device does not look at what was put back.  So finish at least what
        // Linux has in flight, a single element.
        while work.step(self, &mut budget, Phase::Finish) == Progress::More
            && self.is_current()
            && !budget.is_spent()
        {}
        if self.is_current() && !work.is_empty() {
            work.put_back(self);
        }
    }

    /// End a turn.
    fn end(&self, work: Self::Work, more: bool, blocked: bool) {
        let (current, running) = (self.is_current(), self.vm_running());
        let blocked = blocked && current && running;
        let (delay, stale) = self.engine(|engine| {
            let more = engine.take_again() || (current && more);
            engine.state = match (more, running) {
                (false, _) => State::Idle,
                (true, false) => State::Pending,
                (true, true) if blocked => State::Blocked,
                (true, true) => State::Scheduled { pause: PAUSE },
            };
            let stale = if current {
                engine.work = work;
                None
            } else {
                Some(work)
            };
            (engine.backoff(blocked), stale)
        });
        // Not while the engine is borrowed
        drop(stale);
        match self.engine(|engine| engine.state) {
            State::Scheduled { .. } => self.schedule(),
            State::Blocked => self.schedule_after(delay),
            State::Idle | State::Pending | State::Active { .. } => {}
        }
    }
}

/// Elements that were taken from a queue, and how far the device is with them
pub trait Work<P>: Default {
    /// Do something, as far as the budget allows.  If the turn becomes stale,
    /// return without using the queue again.
    fn step(&mut self, port: &P, budget: &mut Budget, phase: Phase) -> Progress;

    /// Whether there is no element.  That is always so if no step leaves one.
    fn is_empty(&self) -> bool {
        true
    }

    /// Put all elements back into the queue, as if they had never been popped.
    fn put_back(&mut self, _port: &P) {}
}

/// A reason to look at a queue
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver has notified the queue.
    Notified,
    /// An iteration of the main loop, see [`Port::schedule`]
    MainLoop,
    /// A time has passed, see [`Port::schedule_after`].
    Retry,
    /// The VM was started.
    Started,
    /// The VM was stopped.
    Stopped,
    /// The VM comes from another QEMU, and is about to start.  There may be
    /// elements in the queue that nobody will notify the device of.
    Arrived,
}

/// Whether to take more elements from the queue
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Whenever there are none left
    Collect,
    /// Never: the VM is stopped, and only what is in flight is to be finished.
    Finish,
}

/// What [`Work::step`] has achieved
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do, or may be.
    More,
    /// There is more to do, but the host does not have what it takes.
    Blocked,
    /// There was nothing to do, apart from what is not for this phase.
    Idle,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Waits for the driver to notify the queue
    #[default]
    Idle,
    /// There may be elements, in the queue or in flight, that nobody will notify
    /// the device of (again).  The next turn comes when the VM is started.
    Pending,
    /// The next turn comes after so many iterations of the main loop.
    Scheduled { pause: u8 },
    /// The host could not do what was needed; it is tried again after a time.
    Blocked,
    /// There is a turn, which has taken the work.
    Active {
        /// The queue was notified meanwhile.
        again: bool,
    },
}

/// The state between turns
#[derive(Debug, Default)]
pub struct Engine<W> {
    state: State,
    /// How long the next turn has to wait, in milliseconds, if the host cannot
    /// do what is needed in it either
    delay: u32,
    /// In flight between two turns
    work: W,
}

impl<W: Default> Engine<W> {
    /// Whether the last turn ended because the host could not do what was needed
    pub const fn is_blocked(&self) -> bool {
        self.delay > 0
    }

    /// Begin a turn, if it is time to.  Returns the work, and whether there is more
    /// to do as far as is known.
    fn begin(&mut self, event: Event) -> Option<(W, bool)> {
        let is_due = match (&mut self.state, event) {
            (State::Active { again }, Event::Notified) => {
                *again = true;
                false
            }
            // A turn that is active will see that the VM is stopped.
            (State::Active { .. }, _) => false,
            // A driver that notifies the queue all the time does not get more
            // turns.
            (State::Scheduled { pause: 1.. } | State::Blocked, Event::Notified) => false,
            (_, Event::Notified | Event::Stopped) => true,
            (State::Scheduled { pause: 0 }, Event::MainLoop) => true,
            (State::Scheduled { pause }, Event::MainLoop) => {
                *pause -= 1;
                false
            }
            (state @ State::Blocked, Event::Retry) | (state @ State::Pending, Event::Started) => {
                *state = State::Scheduled { pause: PAUSE };
                false
            }
            (state @ State::Idle, Event::Arrived) => {
                *state = State::Pending;
                false
            }
            (_, Event::MainLoop | Event::Retry | Event::Started | Event::Arrived) => false,
        };
        is_due.then(|| {
            let active = State::Active { again: false };
            let before = std::mem::replace(&mut self.state, active);
            (std::mem::take(&mut self.work), before != State::Idle)
        })
    }

    /// Whether the queue was notified since the turn began, or since this was
    /// last called.
    fn take_again(&mut self) -> bool {
        matches!(
            std::mem::replace(&mut self.state, State::Active { again: false }),
            State::Active { again: true }
        )
    }

    /// The queue is reset, or removed: give up what is in flight, which the
    /// caller has to drop after having ended the borrow.  A turn that is active
    /// becomes stale.
    #[must_use = "is to be dropped while the engine is not borrowed"]
    pub fn invalidate(&mut self) -> W {
        // A turn on the stack remains active until it notices.
        self.state = match self.state {
            State::Active { .. } => State::Active { again: false },
            _ => State::Idle,
        };
        self.delay = 0;
        std::mem::take(&mut self.work)
    }

    /// The host was able to do something, or not.  Returns how long to wait, in
    /// milliseconds.
    fn backoff(&mut self, blocked: bool) -> u32 {
        let delay = self.delay.clamp(1, MAX_DELAY);
        self.delay = if blocked { 2 * delay } else { 0 };
        delay
    }
}
