// SPDX-License-Identifier: GPL-2.0-or-later

//! How the device works on a queue: in turns, between which it yields to the
//! main loop
//!
//! A driver can send more than what can be done in an acceptable time, as the
//! main loop and the vCPUs have to wait meanwhile.  Therefore a turn has a
//! [`Budget`].  What is left of it is kept in the [`Engine`], and the next turn
//! comes with a bottom half, a few iterations of the main loop later.
//!
//! Everything that a turn calls can call back into the device: the rings and the
//! buffers are memory that the driver has chosen, and if that is a register of a
//! device, writing to it can notify a queue or reset the device.  Therefore:
//!
//! * A turn takes its work out of the engine, and the engine is never borrowed
//!   while anything else is called.
//! * If the queue is notified during a turn, no second turn begins; the first
//!   one looks at the queue again.
//! * A reset makes the turn *stale*.  It drops its elements instead of
//!   returning them, because the queue that they come from does not exist
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

/// A virtqueue
pub trait Queue {
    /// A request of the driver.  It is returned with [`push`](Self::push), put
    /// back with [`unpop`](Self::unpop), or dropped, which releases it without
    /// telling the driver.
    type Element;

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
}

/// What an [`Engine`] is embedded in: the device, as far as one queue is
/// concerned
pub trait Host: Queue + Sized {
    /// What is done with the elements of the queue
    type Work: Default;

    /// Call `f` with the engine.  `f` does not call anything else.
    fn engine<R>(&self, f: impl FnOnce(&mut Engine<Self::Work>) -> R) -> R;

    /// What may be done in a turn
    fn budget(&self) -> Budget {
        Budget::TURN
    }

    /// Whether the VM is running
    fn vm_running(&self) -> bool;

    /// Have the main loop call [`resume`] in its next iteration.
    fn schedule(&self);

    /// Have the main loop call [`resume`] after a time in milliseconds.
    fn schedule_after(&self, delay: u32);

    /// Do not call [`resume`], if it was scheduled.
    fn cancel(&self);
}

/// Elements that were taken from a queue, and how far the device is with them
pub trait Work<H> {
    /// Whether there is no element
    fn is_empty(&self) -> bool;

    /// Do something, as far as the budget allows.  If the turn becomes stale,
    /// return without using the queue again.
    fn step(&mut self, host: &H, turn: Turn, budget: &mut Budget, phase: Phase) -> Progress;

    /// Put all elements back into the queue, as if they had never been popped.
    fn put_back(&mut self, host: &H);
}

/// Whether to take more elements from the queue
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Whenever there are none left
    Collect,
    /// No: the VM is stopped, and only what is in flight is to be finished.
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

/// Identifies a turn, or rather the life of the queue in which it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    epoch: u32,
}

impl Turn {
    /// Whether the queue still is the one that it was when the turn began
    pub fn is_current<H: Host>(self, host: &H) -> bool {
        host.engine(|engine| engine.epoch == self.epoch)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Waits for the driver to notify the queue
    #[default]
    Idle,
    /// There may be elements, in the queue or in flight, that nobody will notify
    /// the device of (again).
    Pending,
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
    /// Identifies the current life of the queue, from one reset to the next
    epoch: u32,
    /// Iterations of the main loop that are left until the next turn.  It is
    /// only not zero if [`Host::schedule`] was called, or if the VM is stopped
    /// and [`vm_started`] will do so.
    pause: u8,
    /// How long the next turn has to wait, in milliseconds, if the host cannot
    /// do what is needed in it either
    delay: u32,
    /// In flight between two turns
    work: W,
}

impl<W: Default> Engine<W> {
    /// To find out later whether the queue was reset in the meantime
    pub const fn life(&self) -> Turn {
        Turn { epoch: self.epoch }
    }

    /// Whether the last turn ended because the host could not do what was needed
    pub const fn is_blocked(&self) -> bool {
        self.delay > 0
    }

    /// Begin a turn, unless there is one.
    fn begin(&mut self) -> Option<(Turn, W)> {
        if let State::Active { again } = &mut self.state {
            *again = true;
            return None;
        }
        self.state = State::Active { again: false };
        self.pause = 0;
        let turn = Turn { epoch: self.epoch };
        Some((turn, std::mem::take(&mut self.work)))
    }

    /// Whether the queue was notified since the turn began, or since this was
    /// last called.
    fn take_again(&mut self) -> bool {
        matches!(
            std::mem::replace(&mut self.state, State::Active { again: false }),
            State::Active { again: true }
        )
    }

    /// End a turn.  Returns whether there has to be another one, and the work if
    /// it has become stale.
    fn end(&mut self, turn: Turn, work: W, more: bool) -> (bool, Option<W>) {
        let again = self.take_again();
        let current = turn.epoch == self.epoch;
        let pending = again || (current && more);

        if pending {
            self.state = State::Pending;
            self.pause = PAUSE;
        } else {
            self.state = State::Idle;
        }
        if current {
            self.work = work;
            (pending, None)
        } else {
            (pending, Some(work))
        }
    }

    /// The queue is reset, or removed: give up what is in flight, which the
    /// caller has to drop after having ended the borrow.  A turn that is active
    /// becomes stale.
    #[must_use = "is to be dropped while the engine is not borrowed"]
    pub fn invalidate(&mut self) -> W {
        self.epoch = self.epoch.wrapping_add(1);
        // A turn on the stack remains active until it notices.
        self.state = match self.state {
            State::Active { .. } => State::Active { again: false },
            State::Idle | State::Pending => State::Idle,
        };
        self.pause = 0;
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

    /// There may be elements in the queue that nobody will notify the device
    /// of, because the VM comes from another QEMU.
    pub fn expect(&mut self) {
        if self.state == State::Idle {
            self.state = State::Pending;
        }
    }
}

/// The driver has notified the queue.
pub fn run<H>(host: &H)
where
    H: Host,
    H::Work: Work<H>,
{
    // A driver that notifies the queue all the time does not get more turns.
    // If the VM is stopped, nobody else will begin one.
    if host.engine(|engine| engine.pause == 0) || !host.vm_running() {
        turn(host);
    }
}

/// A bottom half runs, because of [`Host::schedule`].
pub fn resume<H>(host: &H)
where
    H: Host,
    H::Work: Work<H>,
{
    let pause = host.engine(|engine| {
        let pause = engine.pause;
        engine.pause = pause.saturating_sub(1);
        pause
    });
    if pause == 0 {
        turn(host);
    } else {
        host.schedule();
    }
}

/// Work on the queue, as far as the budget allows.
fn turn<H>(host: &H)
where
    H: Host,
    H::Work: Work<H>,
{
    let Some((turn, mut work)) = host.engine(Engine::begin) else {
        return;
    };
    let mut budget = host.budget();
    let mut blocked = false;
    let more = loop {
        let progress = work.step(host, turn, &mut budget, Phase::Collect);
        if !turn.is_current(host) {
            break false;
        }
        if progress == Progress::Blocked {
            blocked = true;
            break true;
        }
        // A driver that notifies the queue whenever the device looks at it must
        // not keep the turn from ending.
        budget.charge_element(0);
        let more = progress == Progress::More || host.engine(Engine::take_again);
        if !more || budget.is_spent() {
            break more;
        }
    };
    end(host, turn, work, more, blocked);
}

/// End a turn.  If the VM is stopped, nothing stays in flight.
fn end<H>(host: &H, turn: Turn, mut work: H::Work, mut more: bool, blocked: bool)
where
    H: Host,
    H::Work: Work<H>,
{
    if !host.vm_running() && turn.is_current(host) && !work.is_empty() {
        let mut budget = host.budget();
        // Without a transport that notifies the queues when the VM starts, the
        // C device does not look at what was put back.  So finish at least what
        // Linux has in flight, a single element.
        while work.step(host, turn, &mut budget, Phase::Finish) == Progress::More
            && turn.is_current(host)
            && !budget.is_spent()
        {}
        if turn.is_current(host) && !work.is_empty() {
            work.put_back(host);
        }
        more = true;
    }
    let blocked = blocked && host.vm_running();
    let ((pending, stale), delay) =
        host.engine(|engine| (engine.end(turn, work, more), engine.backoff(blocked)));
    drop(stale);
    if pending && host.vm_running() {
        if blocked {
            host.schedule_after(delay);
        } else {
            host.schedule();
        }
    }
}

/// The VM was stopped, and will perhaps be migrated: nothing may be in flight.
pub fn vm_stopped<H>(host: &H)
where
    H: Host,
    H::Work: Work<H>,
{
    host.cancel();
    if host.engine(|engine| engine.work.is_empty()) {
        // Either nothing is in flight, or a turn is active, which will see that
        // the VM is stopped.
        return;
    }
    if let Some((turn, work)) = host.engine(Engine::begin) {
        end(host, turn, work, true, false);
    }
}

/// The VM is running (again): look for elements that were left.
pub fn vm_started<H: Host>(host: &H) {
    if host.engine(|engine| engine.state == State::Pending) {
        host.schedule();
    }
}
