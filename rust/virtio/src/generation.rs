// SPDX-License-Identifier: GPL-2.0-or-later

//! Which elements the queues still know of.
//!
//! C code forgets the elements that are in flight when it resets or removes a
//! queue.  Returning them to it afterwards would corrupt its state: it would
//! count elements that it does not have, or divide by the size of a queue that
//! does not exist.  Devices are supposed to give up all elements by then, but
//! safe code must not be able to do harm if one does not.
//!
//! Therefore each queue has a number, its generation, from when it is added
//! until it is removed; it gets another one with each reset.  An element stores
//! the generation of its queue.

use std::{collections::BTreeMap, ptr::NonNull};

use bql::prelude::*;

use crate::bindings;

/// Tells the times between two resets of a queue, of all queues, apart
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation(u64);

struct Generations {
    /// The last one that was given to a queue; they are never used again.
    last: u64,
    /// By the address of the queue
    queues: BTreeMap<usize, Generation>,
}

static GENERATIONS: BqlRefCell<Generations> = BqlRefCell::new(Generations {
    last: 0,
    queues: BTreeMap::new(),
});

/// The queue is new, or about to be reset.
pub fn renew(vq: NonNull<bindings::VirtQueue>) {
    let mut this = GENERATIONS.borrow_mut();
    this.last += 1;
    let generation = Generation(this.last);
    this.queues.insert(vq.as_ptr() as usize, generation);
}

/// The queue is about to be removed.
pub fn remove(vq: NonNull<bindings::VirtQueue>) {
    GENERATIONS
        .borrow_mut()
        .queues
        .remove(&(vq.as_ptr() as usize));
}

/// The generation of a queue; `None` if it was removed.
///
/// # Panics
///
/// Panics if the big QEMU lock is not taken.
pub fn current(vq: NonNull<bindings::VirtQueue>) -> Option<Generation> {
    GENERATIONS
        .borrow()
        .queues
        .get(&(vq.as_ptr() as usize))
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_generations() {
        bql::start_test();
        let mut memory = [0u8; 2];
        let [a, b] = memory
            .each_mut()
            .map(|byte| NonNull::from(byte).cast::<bindings::VirtQueue>());
        assert_eq!(current(a), None);

        renew(a);
        renew(b);
        let first = current(a);
        assert!(first.is_some());
        assert_ne!(first, current(b));

        renew(a);
        let second = current(a);
        assert_ne!(first, second);

        // a queue at the same address is another one
        remove(a);
        assert_eq!(current(a), None);
        assert!(current(b).is_some());
        renew(a);
        assert_ne!(current(a), first);
        assert_ne!(current(a), second);
    }
}
