// SPDX-License-Identifier: GPL-2.0-or-later

//! How the device works on a queue: in turns, between which it yields to the
//! main loop
//!
//! A driver can request more work than the device can do in an acceptable time:
//! the main loop, and vCPUs that need the big QEMU lock, wait meanwhile.
//! Therefore each turn has a [`Budget`].  What exceeds it is kept in the
//! [`Engine`], and a bottom half begins the next turn a few iterations of the
//! main loop later.
//!
//! # Examples
//!
//! A device that returns elements as they are, one in each step.  The queue is
//! a list of numbers here.
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
//! Everything that a turn calls can call back into the device: the driver
//! chooses where the rings and the buffers are, and if one of them is a
//! register of a device, writing to it can notify a queue or reset the device.
//! Therefore:
//!
//! * A turn takes its work out of the engine, and nothing else is called while
//!   the engine is borrowed.
//! * If the queue is notified during a turn, no second turn begins; the active
//!   turn looks at the queue again.
//! * A reset makes the turn *stale*, see [`Port::is_current`].  A stale turn
//!   drops its elements instead of returning them, because the queue does not
//!   know them anymore.

use crate::budget::Budget;

/// Iterations of the main loop between two turns.  A command of the monitor
/// needs two, because it moves from one context of the main loop to another.
/// If each iteration had a turn, the command would wait for three turns instead
/// of one.
const PAUSE: u8 = 2;

/// The longest delay before the device tries again what the host could not do,
/// in milliseconds.  The delay begins with 1, and doubles each time.
const MAX_DELAY: u32 = 1000;

/// What an [`Engine`] works with: a virtqueue, and what the engine needs of the
/// device.  A port is made for one event, and only used while that event is
/// handled.
pub trait Port: Sized {
    /// A virtqueue element.  It is returned with [`push`](Self::push), put back
    /// with [`unpop`](Self::unpop), or dropped, which releases it without
    /// telling the driver.
    type Element;

    /// The elements in flight, and what is done with them; implements [`Work`]
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

    /// Whether the queue has been neither reset nor removed since the port was
    /// made
    fn is_current(&self) -> bool;

    /// Call `f` with the engine, which is borrowed meanwhile; `f` must not call
    /// anything but methods of the engine.
    fn engine<R>(&self, f: impl FnOnce(&mut Engine<Self::Work>) -> R) -> R;

    /// The budget of one turn
    fn budget(&self) -> Budget {
        Budget::TURN
    }

    /// Whether the VM is running
    fn vm_running(&self) -> bool;

    /// Request an [`Event::MainLoop`] in the next iteration of the main loop.
    /// That event can also happen without a request.
    fn schedule(&self);

    /// Request an [`Event::Retry`] after a delay in milliseconds.  That event
    /// can also happen without a request.
    fn schedule_after(&self, delay: u32);

    /// Handle an event: if a turn is due, work on the queue as far as the
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
                // Charge something for each step, so that the turn ends even if
                // the driver notifies the queue each time that the device looks
                // at it.
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

    /// The VM is stopped and may be migrated: leave nothing in flight.
    fn finish(&self, work: &mut Self::Work)
    where
        Self::Work: Work<Self>,
    {
        let mut budget = self.budget();
        // If the VM is migrated to a C device, and the transport there does not
        // notify the queues when the VM starts, the device does not look at
        // elements that were put back.  So finish at least a single element,
        // which is what Linux has in flight.
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
        let (next, delay, stale) = self.engine(|engine| {
            let more = engine.take_again() || (current && more);
            let next = match (more, running) {
                (false, _) => State::Idle,
                (true, false) => State::Pending,
                (true, true) if blocked => State::Blocked,
                (true, true) => State::Scheduled { pause: PAUSE },
            };
            engine.state = next;
            let stale = if current {
                engine.work = work;
                None
            } else {
                Some(work)
            };
            (next, engine.backoff(blocked), stale)
        });
        // Dropping an element calls into QEMU, so the engine must not be
        // borrowed.
        drop(stale);
        match next {
            State::Scheduled { .. } => self.schedule(),
            State::Blocked => self.schedule_after(delay),
            State::Idle | State::Pending | State::Active { .. } => {}
        }
    }
}

/// Elements that were popped from a queue, and how far the device is with them
pub trait Work<P>: Default {
    /// Work on elements, as far as the budget allows.  If the turn becomes
    /// stale, return without using the queue again.
    fn step(&mut self, port: &P, budget: &mut Budget, phase: Phase) -> Progress;

    /// How many elements are in flight.  The default is for implementations
    /// that keep no element from one step to the next.
    fn in_flight(&self) -> usize {
        0
    }

    /// Whether there is no element in flight
    fn is_empty(&self) -> bool {
        self.in_flight() == 0
    }

    /// Put all elements back into the queue, as if they had never been popped.
    fn put_back(&mut self, _port: &P) {}
}

/// A reason to look at a queue
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver has notified the queue.
    Notified,
    /// An iteration of the main loop has begun, see [`Port::schedule`].
    MainLoop,
    /// A delay is over, see [`Port::schedule_after`].
    Retry,
    /// The VM was started.
    Started,
    /// The VM was stopped.
    Stopped,
    /// The VM was migrated, and is about to start.  The queue may contain
    /// elements for which there will be no notification.
    Arrived,
}

/// Whether [`Work::step`] takes more elements from the queue
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It does when it has none left.
    Collect,
    /// It does not: the VM is stopped, and only what is in flight is finished.
    Finish,
}

/// What [`Work::step`] has achieved
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is, or may be, more to do.
    More,
    /// There is more to do, but the host has not enough memory for it at the
    /// moment.
    Blocked,
    /// There was nothing to do in this phase.
    Idle,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Nothing to do until the driver notifies the queue
    #[default]
    Idle,
    /// There may be elements, in the queue or in flight, for which there will
    /// be no notification.  The next turn comes after the VM was started.
    Pending,
    /// The next turn comes after `pause` iterations of the main loop.
    Scheduled { pause: u8 },
    /// The host could not do what was needed; the device tries again after a
    /// delay.
    Blocked,
    /// A turn is active, and has taken the work out of the engine.
    Active {
        /// The queue was notified during the turn.
        again: bool,
    },
}

/// The state of a queue between two turns
#[derive(Debug, Default)]
pub struct Engine<W> {
    state: State,
    /// The delay after the next turn, in milliseconds, if the host cannot do
    /// what is needed in that turn either; 0 if the latest turn was not blocked
    delay: u32,
    /// The elements in flight
    work: W,
}

impl<W: Default> Engine<W> {
    /// The elements in flight, except during a turn
    pub const fn work(&self) -> &W {
        &self.work
    }

    /// Whether the last turn ended because the host could not do what was
    /// needed
    pub const fn is_blocked(&self) -> bool {
        self.delay > 0
    }

    /// Begin a turn, if one is due.  Returns the work, and whether there may be
    /// more to do.
    fn begin(&mut self, event: Event) -> Option<(W, bool)> {
        let is_due = match (&mut self.state, event) {
            (State::Active { again }, Event::Notified) => {
                *again = true;
                false
            }
            // The active turn checks whether the VM is running.
            (State::Active { .. }, _) => false,
            // Notifications do not bring the next turn forward.
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

    /// Whether the queue was notified since the turn began or since the last
    /// call of this function
    fn take_again(&mut self) -> bool {
        matches!(
            std::mem::replace(&mut self.state, State::Active { again: false }),
            State::Active { again: true }
        )
    }

    /// The queue is reset or removed: give up what is in flight.  The caller
    /// has to drop the result after the borrow of the engine has ended.  A turn
    /// that is active becomes stale.
    #[must_use = "is to be dropped while the engine is not borrowed"]
    pub fn invalidate(&mut self) -> W {
        // A turn that is on the stack stays active until it checks
        // is_current().
        self.state = match self.state {
            State::Active { .. } => State::Active { again: false },
            _ => State::Idle,
        };
        self.delay = 0;
        std::mem::take(&mut self.work)
    }

    /// A turn has ended, which the host has blocked or not.  Returns the delay
    /// in milliseconds before the next turn if it has.
    fn backoff(&mut self, blocked: bool) -> u32 {
        let delay = self.delay.clamp(1, MAX_DELAY);
        self.delay = if blocked { 2 * delay } else { 0 };
        delay
    }
}
