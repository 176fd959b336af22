// SPDX-License-Identifier: GPL-2.0-or-later

//! Passes elements with hints from the main loop to the I/O thread, and back
//!
//! The main loop [adds](HintExchange::add) elements, and
//! [takes](HintExchange::next_processed) them when the I/O thread has
//! [processed](HintExchange::process) them.  Only one thread at a time calls
//! the functions other than `process()`: the one that has taken the big QEMU
//! lock.
//!
//! There is one lock, which is only held for a short time.  In particular, it
//! is not held while a hint is passed to migration, which can take tens of
//! milliseconds.  Instead, the I/O thread takes the lock before *each* hint,
//! and does not pass the hint on if hinting has ended, or if another thread
//! waits for the I/O thread.  There are two reasons to wait:
//!
//! * [`update`](HintExchange::update) must not return while the I/O thread
//!   passes on a hint that only the previous state has permitted.
//! * [`drop_all`](HintExchange::drop_all) and
//!   [`finish_all`](HintExchange::finish_all) need the element that the I/O
//!   thread is processing.
//!
//! In either case, the wait is over after one hint, even if the element has
//! more of them.

use std::{
    collections::VecDeque,
    mem::take,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::hinting::Hinting;

/// What the device can read in an element
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing
    None,
    /// A command ID
    Id(u32),
    /// Data that is too short to be a command ID
    Bad,
}

/// An element of the queue for hints
pub trait HintElement {
    fn command(&self) -> Command;

    /// Pass the buffer with this index on to migration as a hint.  Returns
    /// false if there is no such buffer.  This can take tens of milliseconds.
    fn hint(&self, index: usize) -> bool;
}

/// An element that has to be returned to the driver
#[derive(Debug)]
pub struct Processed<E> {
    pub elem: E,
    /// The element has a command that is too short
    pub bad_command: bool,
    /// How many of its buffers were passed on as hints
    pub hints: usize,
}

/// What the I/O thread and the main loop share
#[derive(Debug)]
pub struct HintExchange<E> {
    inner: Mutex<Inner<E>>,
    /// Notified when the I/O thread has finished an element
    finished: Condvar,
}

#[derive(Debug)]
struct Inner<E> {
    state: Hinting,
    /// To be processed by the I/O thread
    pending: VecDeque<E>,
    /// To be returned by the main loop
    done: VecDeque<Processed<E>>,
    /// The I/O thread has been asked to process `pending`.
    scheduled: bool,
    /// How many elements the I/O thread has taken from `pending`
    taken: u64,
    /// How many of those elements it has put into `done`: all of them, or all
    /// but one
    finished: u64,
    /// Another thread waits for the I/O thread to finish an element.
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
    /// Poisoning is ignored, because a panic ends QEMU.
    fn lock(&self) -> MutexGuard<'_, Inner<E>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait until the I/O thread has finished the element that it is
    /// processing, if there is one.  It takes no longer than one hint.
    fn wait<'a>(&self, mut inner: MutexGuard<'a, Inner<E>>) -> MutexGuard<'a, Inner<E>> {
        // The I/O thread may take another element before this thread runs.
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

    /// How many elements were added, and not taken back yet
    pub fn in_flight(&self) -> usize {
        let inner = self.lock();
        let active = usize::from(inner.finished < inner.taken);
        inner.pending.len() + active + inner.done.len()
    }

    /// Change the state to one in which hints are not permitted.  When this
    /// returns, migration does not get any more hints that the previous state
    /// has permitted.
    // The lint does not see that wait() consumes the guard.
    #[allow(clippy::significant_drop_tightening)]
    pub fn update<R>(&self, f: impl FnOnce(&mut Hinting) -> R) -> R {
        let mut inner = self.lock();
        let result = f(&mut inner.state);
        drop(self.wait(inner));
        result
    }

    /// Add an element for the I/O thread.  Returns whether the caller has to
    /// ask the I/O thread to call [`process`](Self::process).
    pub fn add(&self, elem: E) -> bool {
        let mut inner = self.lock();
        inner.pending.push_back(elem);
        !std::mem::replace(&mut inner.scheduled, true)
    }

    /// Whether the caller has to ask the I/O thread again, because
    /// [`process`](Self::process) has returned before all elements were
    /// processed
    pub fn go_on(&self) -> bool {
        let mut inner = self.lock();
        !inner.pending.is_empty() && !std::mem::replace(&mut inner.scheduled, true)
    }

    /// Process pending elements, until at least `hints` hints have been passed
    /// on.  Called in the I/O thread.
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
                hints: index,
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

    /// Take the next element that the I/O thread has processed.
    pub fn next_processed(&self) -> Option<Processed<E>> {
        self.lock().done.pop_front()
    }

    /// Take all elements from the I/O thread: those that it has processed, and
    /// those that it has not begun to process.
    // The lint does not see that wait() consumes the guard.
    #[allow(clippy::significant_drop_tightening)]
    fn take_all(&self) -> (VecDeque<Processed<E>>, VecDeque<E>) {
        let mut inner = self.lock();
        // The I/O thread must not begin with another element.
        let pending = take(&mut inner.pending);
        let mut inner = self.wait(inner);
        (take(&mut inner.done), pending)
    }

    /// Take all elements from the I/O thread, and drop them.
    pub fn drop_all(&self) {
        drop(self.take_all());
    }

    /// Take all elements from the I/O thread, in the order in which they were
    /// added.  This thread reads the commands of those that were not
    /// processed.  It does not pass on their hints, because they are optional,
    /// and migration could take long.
    pub fn finish_all(&self) -> VecDeque<Processed<E>> {
        let (mut done, pending) = self.take_all();
        done.extend(pending.into_iter().map(|elem| {
            let command = elem.command();
            self.lock().state.apply(command);
            Processed {
                elem,
                bad_command: command == Command::Bad,
                hints: 0,
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
        // elements are not divided
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
        // only the first element needs the I/O thread to be asked
        assert!(add(Command::None, 5));
        assert!(!add(Command::Id(id), 0));
        assert!(!add(Command::None, 1024));
        // an element can have both a command and hints
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

        // the commands of the remaining elements are read, but their hints are
        // not passed on
        assert!(add(Command::None, 2));
        assert!(!add(Command::Bad, 2));
        assert!(!add(Command::Id(0), 2));
        let rest = exchange.finish_all();
        assert_eq!(
            rest.iter().map(|p| p.bad_command).collect::<Vec<_>>(),
            [false, true, false]
        );
        assert_eq!(exchange.state().status(), HintStatus::Stop);

        // the I/O thread was asked, but finds no element
        assert!(!add(Command::None, 2));
        exchange.drop_all();
        exchange.process(usize::MAX);
        assert!(take().is_empty());
        assert!(add(Command::None, 2));
        assert_eq!(hints.get(), 1027);
    }
}
