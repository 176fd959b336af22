// SPDX-License-Identifier: GPL-2.0-or-later

//! The differences between the devices that are not failures

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
        c: "returns hints while the VM is stopped, if it has arrived in this state and did not \
            run since: nothing has blocked the I/O thread",
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
        treatment: "tolerated: signalled-used of x-query-virtio-queue-status is not compared; the \
                    driver does not change its mind about features that have to do with \
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
        treatment: "avoided: the driver notifies all queues after migration, and when the VM \
                    runs; no migration while there may be work for the hint queue, or after an \
                    error in a batch",
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
