// SPDX-License-Identifier: GPL-2.0-or-later

//! How elements with hints get from the main loop to the I/O thread, and back
//!
//! The main loop [adds](HintExchange::add) elements, and [takes](HintExchange::next_processed)
//! them when the I/O thread has [processed](HintExchange::process) them.
//! Everything but `process()` is called by one thread at a time: with the
//! big QEMU lock taken.
//!
//! There is one lock, which is only held for moments; in particular not while a
//! hint is passed to migration, which can take tens of milliseconds.  Instead,
//! the I/O thread takes the lock before *each* hint, and does not pass it on if
//! hinting has ended, or if somebody waits for the thread.  Thus those who have
//! to wait, because
//!
//! * after [`update`](HintExchange::update) no hint may come that the previous
//!   state has permitted; and
//! * [`drop_all`](HintExchange::drop_all) and [`finish_all`](HintExchange::finish_all)
//!   want all elements,
//!
//! wait for one hint, however many there are in an element.

use std::{
    collections::VecDeque,
    mem::take,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::hinting::Hinting;

/// What an element has for the device to read
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing
    None,
    /// A command ID
    Id(u32),
    /// Something that is too short to be one
    Bad,
}

/// An element of the queue for hints
pub trait HintElement {
    fn command(&self) -> Command;

    /// Pass on the hint that a buffer is; returns false if there is no buffer
    /// with that index.  This can take long.
    fn hint(&self, index: usize) -> bool;
}

/// An element that is to be returned
#[derive(Debug)]
pub struct Processed<E> {
    pub elem: E,
    /// The driver has sent something that is too short to be a command
    pub bad_command: bool,
}

/// What the I/O thread and the main loop share
#[derive(Debug)]
pub struct HintExchange<E> {
    inner: Mutex<Inner<E>>,
    /// The I/O thread is done with an element
    finished: Condvar,
}

#[derive(Debug)]
struct Inner<E> {
    state: Hinting,
    /// To be processed by the I/O thread
    pending: VecDeque<E>,
    /// To be returned by the main loop
    done: VecDeque<Processed<E>>,
    /// The I/O thread has been asked to look at `pending`
    scheduled: bool,
    /// How many elements the I/O thread has taken from `pending`
    taken: u64,
    /// How many of these it has put into `done`: all, or all but one
    finished: u64,
    /// Somebody waits for the I/O thread to finish an element
    waiting: bool,
}

impl<E> Default for HintExchange<E> {
    fn default() -> Self {
        Self {
            inner: Mutex::new(Inner {
                state: Hinting::default(),
                pending: VecDeque::new(),
                done: VecDeque::new(),
                scheduled: false,
                taken: 0,
                finished: 0,
                waiting: false,
            }),
            finished: Condvar::new(),
        }
    }
}

impl<E: HintElement> HintExchange<E> {
    /// A panic would have ended QEMU.
    fn lock(&self) -> MutexGuard<'_, Inner<E>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait until the I/O thread has finished the element that it has, if any,
    /// for which it needs the time that a hint takes.
    fn wait<'a>(&self, mut inner: MutexGuard<'a, Inner<E>>) -> MutexGuard<'a, Inner<E>> {
        // It may take another one before this thread runs
        let taken = inner.taken;
        inner.waiting = true;
        while inner.finished < taken {
            inner = self
                .finished
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        inner.waiting = false;
        inner
    }

    /// The current state
    pub fn state(&self) -> Hinting {
        self.lock().state
    }

    /// Change the state, such that hinting is not going on afterwards.  When
    /// this returns, there are no more hints to come that were permitted by the
    /// previous state.
    // The lint does not see that wait() consumes the guard.
    #[allow(clippy::significant_drop_tightening)]
    pub fn update<R>(&self, f: impl FnOnce(&mut Hinting) -> R) -> R {
        let mut inner = self.lock();
        let result = f(&mut inner.state);
        drop(self.wait(inner));
        result
    }

    /// Add an element for the I/O thread.  Returns whether that has to be asked
    /// to [`process`](Self::process).
    pub fn add(&self, elem: E) -> bool {
        let mut inner = self.lock();
        inner.pending.push_back(elem);
        !std::mem::replace(&mut inner.scheduled, true)
    }

    /// Whether the I/O thread has to be asked again, because it has returned from
    /// [`process`](Self::process) before everything was done
    pub fn go_on(&self) -> bool {
        let mut inner = self.lock();
        !inner.pending.is_empty() && !std::mem::replace(&mut inner.scheduled, true)
    }

    /// Process elements that are pending, at most until `hints` hints were passed
    /// on.  To be called in the I/O thread.
    pub fn process(&self, hints: usize) {
        let mut left = hints;
        while let Some(elem) = self.next(left) {
            let command = elem.command();
            self.lock().state.apply(command);
            let mut index = 0;
            while command != Command::Bad && self.may_hint() && elem.hint(index) {
                index += 1;
            }
            left = left.saturating_sub(index);
            self.finish(Processed {
                elem,
                bad_command: command == Command::Bad,
            });
        }
    }

    fn next(&self, left: usize) -> Option<E> {
        let mut inner = self.lock();
        let elem = (left > 0).then(|| inner.pending.pop_front()).flatten();
        if elem.is_some() {
            inner.taken += 1;
        } else {
            inner.scheduled = false;
        }
        elem
    }

    fn may_hint(&self) -> bool {
        let inner = self.lock();
        inner.state.is_hinting() && !inner.waiting
    }

    fn finish(&self, processed: Processed<E>) {
        let mut inner = self.lock();
        inner.done.push_back(processed);
        inner.finished += 1;
        drop(inner);
        self.finished.notify_all();
    }

    /// Take the first of the elements that the I/O thread is done with.
    pub fn next_processed(&self) -> Option<Processed<E>> {
        self.lock().done.pop_front()
    }

    /// Take all elements from the I/O thread: those that it is done with, and
    /// those that it did not begin with.
    // The lint does not see that wait() consumes the guard.
    #[allow(clippy::significant_drop_tightening)]
    fn take_all(&self) -> (VecDeque<Processed<E>>, VecDeque<E>) {
        let mut inner = self.lock();
        // It must not begin with another one
        let pending = take(&mut inner.pending);
        let mut inner = self.wait(inner);
        (take(&mut inner.done), pending)
    }

    /// Take all elements from the I/O thread, and drop them.
    pub fn drop_all(&self) {
        drop(self.take_all());
    }

    /// Take all elements from the I/O thread, in the order in which they came.
    /// Those that it did not process are processed now, but hints are optional,
    /// so do not wait for migration to take them.
    pub fn finish_all(&self) -> VecDeque<Processed<E>> {
        let (mut done, pending) = self.take_all();
        done.extend(pending.into_iter().map(|elem| {
            let command = elem.command();
            self.lock().state.apply(command);
            Processed {
                elem,
                bad_command: command == Command::Bad,
            }
        }));
        done
    }
}

impl Hinting {
    fn apply(&mut self, command: Command) {
        if let Command::Id(id) = command {
            self.command(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::hinting::HintStatus;

    struct Element<'a> {
        command: Command,
        buffers: usize,
        hints: &'a Cell<usize>,
    }

    impl<'a> Element<'a> {
        const fn new(command: Command, buffers: usize, hints: &'a Cell<usize>) -> Self {
            Self {
                command,
                buffers,
                hints,
            }
        }
    }

    impl HintElement for Element<'_> {
        fn command(&self) -> Command {
            self.command
        }

        fn hint(&self, index: usize) -> bool {
            let exists = index < self.buffers;
            self.hints.set(self.hints.get() + usize::from(exists));
            exists
        }
    }

    #[test]
    fn goes_on_when_asked() {
        let hints = Cell::new(0);
        let exchange = HintExchange::default();
        let add = |command, buffers| exchange.add(Element::new(command, buffers, &hints));

        exchange.update(Hinting::request);
        assert!(add(Command::Id(exchange.state().cmd_id()), 0));
        assert!(!exchange.go_on());
        for _ in 0..3 {
            assert!(!add(Command::None, 4));
        }
        // whole elements only
        exchange.process(5);
        assert_eq!(hints.get(), 8);
        assert!(exchange.go_on());
        assert!(!add(Command::None, 4) && !exchange.go_on());
        exchange.process(8);
        assert_eq!(hints.get(), 16);
        assert!(!exchange.go_on());
        assert!(add(Command::None, 4));
        assert_eq!(std::iter::from_fn(|| exchange.next_processed()).count(), 5);
    }

    #[test]
    fn commands_and_hints() {
        let hints = Cell::new(0);
        let exchange = HintExchange::default();
        let add = |command, buffers| exchange.add(Element::new(command, buffers, &hints));

        exchange.update(Hinting::request);
        let id = exchange.state().cmd_id();
        // the first one asks for the I/O thread
        assert!(add(Command::None, 5));
        assert!(!add(Command::Id(id), 0));
        assert!(!add(Command::None, 1024));
        // hints can be in the same element
        assert!(!add(Command::Id(0), 7));
        let take = || std::iter::from_fn(|| exchange.next_processed()).collect::<Vec<_>>();
        assert!(take().is_empty());
        exchange.process(usize::MAX);
        assert_eq!(hints.get(), 1024);
        assert_eq!(exchange.state().status(), HintStatus::Stop);
        assert_eq!(take().len(), 4);

        exchange.update(Hinting::request);
        assert!(add(Command::Id(id + 1), 3));
        assert!(!add(Command::Bad, 9));
        exchange.process(usize::MAX);
        assert_eq!(hints.get(), 1027);
        let bad = take();
        assert_eq!(bad.iter().filter(|p| p.bad_command).count(), 1);
        assert!(bad[1].bad_command);

        // what is left over is read, but not hinted
        assert!(add(Command::None, 2));
        assert!(!add(Command::Bad, 2));
        assert!(!add(Command::Id(0), 2));
        let rest = exchange.finish_all();
        assert_eq!(
            rest.iter().map(|p| p.bad_command).collect::<Vec<_>>(),
            [false, true, false]
        );
        assert_eq!(exchange.state().status(), HintStatus::Stop);

        // the I/O thread was asked, and finds nothing
        assert!(!add(Command::None, 2));
        exchange.drop_all();
        exchange.process(usize::MAX);
        assert!(take().is_empty());
        assert!(add(Command::None, 2));
        assert_eq!(hints.get(), 1027);
    }
}
