// SPDX-License-Identifier: GPL-2.0-or-later

//! What the device does, and why it does nothing: the `balloon-status` property
//!
//! An operator sees that a balloon does nothing, but not why.  [`Status`] is
//! what the device knows, and [`Summary`] what somebody who knows the device
//! would say after reading it.

use std::ffi::CStr;

use crate::{
    backing::{Backing, Discarding, LINUX_ELEMENT},
    spec::{
        VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_FREE_PAGE_HINT,
        VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
        VIRTIO_BALLOON_F_STATS_VQ,
    },
};

/// How long a driver may take to send statistics, in seconds, until the summary
/// mentions it
const SLOW: u64 = 5;

/// For how long the summary mentions that the guest was out of memory, in
/// seconds
const RECENT: u64 = 10;

/// Names of the features, in the order of their bits
pub const FEATURES: [(u32, &CStr); 6] = [
    (VIRTIO_BALLOON_F_MUST_TELL_HOST, c"must-tell-host"),
    (VIRTIO_BALLOON_F_STATS_VQ, c"guest-stats"),
    (VIRTIO_BALLOON_F_DEFLATE_ON_OOM, c"deflate-on-oom"),
    (VIRTIO_BALLOON_F_FREE_PAGE_HINT, c"free-page-hint"),
    (VIRTIO_BALLOON_F_PAGE_POISON, c"page-poison"),
    (VIRTIO_BALLOON_F_REPORTING, c"free-page-reporting"),
];

/// What is known of the driver
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// No driver has used the device since it was reset.  The guest may have
    /// found it: Linux sets the bit ACKNOWLEDGE even if it has no driver.
    None,
    /// A driver has found the device, but has not finished its initialization.
    Found,
    Ready,
    /// The driver has given up on the device.
    Failed,
    /// The driver did something that is not allowed.  The device does nothing
    /// until it is reset.
    Broken,
}

impl Driver {
    /// From the status register, and whether the device is broken
    pub const fn new(status: u8, broken: bool) -> Self {
        const DRIVER: u8 = 2;
        const DRIVER_OK: u8 = 4;
        const FAILED: u8 = 128;
        if broken {
            Self::Broken
        } else if status & FAILED != 0 {
            Self::Failed
        } else if status & DRIVER_OK != 0 {
            Self::Ready
        } else if status & DRIVER != 0 {
            Self::Found
        } else {
            Self::None
        }
    }

    pub const fn name(self) -> &'static CStr {
        match self {
            Self::None => c"none",
            Self::Found => c"found",
            Self::Ready => c"ready",
            Self::Failed => c"failed",
            Self::Broken => c"broken",
        }
    }
}

/// What is known of the statistics of the guest
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsState {
    /// The driver is not ready, or does not send statistics.
    Unsupported,
    /// The driver could have sent statistics, but never did.
    NeverSent,
    /// The driver was asked a number of seconds ago, and has not answered.
    Asked(u64),
    /// The driver has answered, or was not asked.
    Answered,
}

impl StatsState {
    pub const fn name(self) -> &'static CStr {
        match self {
            Self::Unsupported => c"unsupported",
            Self::NeverSent => c"never-sent",
            Self::Asked(_) => c"asked",
            Self::Answered => c"answered",
        }
    }
}

/// Why memory is not discarded at the moment
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inhibitor {
    /// Memory is pinned, for example for a device that is passed through.
    PinnedMemory,
    /// Incoming postcopy migration
    IncomingPostcopy,
    BackgroundSnapshot,
}

impl Inhibitor {
    pub const fn name(self) -> &'static CStr {
        match self {
            Self::PinnedMemory => c"pinned-memory",
            Self::IncomingPostcopy => c"incoming-postcopy",
            Self::BackgroundSnapshot => c"background-snapshot",
        }
    }
}

/// What somebody who knows the device would say
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Summary {
    Broken,
    Failed,
    NoDriver,
    NotReady,
    NoMemory,
    Stopped,
    Pinned,
    Postcopy,
    Snapshot,
    Locked,
    ReadOnlyFile,
    HugePages,
    Poisoned,
    Hold,
    OutOfMemory,
    NoStats,
    TooMuch,
    TooLittle,
    Good,
}

impl Summary {
    /// Why no page of such a block is discarded, if that is so
    const fn obstacle(backing: &Backing) -> Option<Self> {
        match backing.discarding() {
            Discarding::Locked => Some(Self::Locked),
            Discarding::ReadOnlyFile => Some(Self::ReadOnlyFile),
            Discarding::HostPagesOfElement if backing.page_size > LINUX_ELEMENT => {
                Some(Self::HugePages)
            }
            Discarding::Pages | Discarding::HostPages | Discarding::HostPagesOfElement => None,
        }
    }

    /// All of them, in the order in which they are considered
    pub const ALL: [Self; 19] = [
        Self::Broken,
        Self::Failed,
        Self::NoDriver,
        Self::NotReady,
        Self::NoMemory,
        Self::Stopped,
        Self::Pinned,
        Self::Postcopy,
        Self::Snapshot,
        Self::Locked,
        Self::ReadOnlyFile,
        Self::HugePages,
        Self::Poisoned,
        Self::Hold,
        Self::OutOfMemory,
        Self::NoStats,
        Self::TooMuch,
        Self::TooLittle,
        Self::Good,
    ];

    /// A sentence for people.  docs/status.md has all of them, with their
    /// conditions.
    pub const fn text(self) -> &'static CStr {
        match self {
            Self::Broken => {
                c"the driver has made a mistake, and the device does nothing until it is reset"
            }
            Self::Failed => c"the guest's driver has given up on the balloon",
            Self::NoDriver => c"the guest has no balloon driver",
            Self::NotReady => c"the guest's driver has found the balloon, but is not ready yet",
            Self::NoMemory => {
                c"the host has no memory for pages that leave the balloon, and the guest waits"
            }
            Self::Stopped => c"the VM is stopped",
            Self::Pinned => c"memory is not returned to the host, because it is pinned",
            Self::Postcopy => {
                c"memory is not returned to the host until postcopy migration is complete"
            }
            Self::Snapshot => c"memory is not returned to the host until the snapshot is complete",
            Self::Locked => c"memory is not returned to the host, because it is locked",
            Self::ReadOnlyFile => {
                c"memory is not returned to the host, because its file is open for reading only"
            }
            Self::HugePages => {
                c"memory is not returned to the host, because it consists of huge pages: see huge-pages"
            }
            Self::Poisoned => {
                c"reported memory is not returned to the host, because the guest fills free pages"
            }
            Self::Hold => {
                c"the guest was out of memory and has deflated the balloon: it is asked again later"
            }
            Self::OutOfMemory => {
                c"the guest is out of memory, and cannot give back as much as it is asked for"
            }
            Self::NoStats => {
                c"the guest does not send statistics that it was asked for: is its service running?"
            }
            Self::TooMuch => c"the guest has not given back as much memory as it is asked for",
            Self::TooLittle => c"the guest has not taken back as much memory as it may",
            Self::Good => c"the balloon has the size that was asked for",
        }
    }
}

/// The members of the property that the summary depends on; sizes are in bytes
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status<'a> {
    pub vm_running: bool,
    pub driver: Driver,
    /// The memory that the guest is to have
    pub target: u64,
    /// The target that the driver sees
    pub shown_target: u64,
    /// The memory that the guest has, according to the driver
    pub actual: u64,
    pub stats: StatsState,
    pub inhibitors: &'a [Inhibitor],
    /// The blocks of the guest's memory
    pub memory: &'a [Backing],
    /// The driver has accepted free page reporting.
    pub reporting: bool,
    /// The driver fills free pages with a value other than 0.
    pub poisoned: bool,
    /// Pages are in the balloon, or are to go into it.
    pub in_use: bool,
    /// For how long, in seconds, the guest has not deflated the balloon unasked;
    /// `None` if it never did
    pub since_unasked: Option<u64>,
    /// The guest waits because the host has no memory for it.
    pub waiting_for_memory: bool,
}

impl Status<'_> {
    /// Why no block of the guest's memory is discarded, if that is so for all
    /// of them, and if it matters
    fn obstacle(&self) -> Option<Summary> {
        let first = Summary::obstacle(self.memory.first()?)?;
        // What Linux reports consists of whole huge pages.
        let matters = if first == Summary::HugePages {
            self.in_use && !self.reporting
        } else {
            self.in_use || self.reporting
        };
        let all = self
            .memory
            .iter()
            .all(|m| Summary::obstacle(m) == Some(first));
        (matters && all).then_some(first)
    }

    /// The most important of what there is to say
    pub fn summary(&self) -> Summary {
        let applies = |summary: &Summary| match summary {
            Summary::Broken => self.driver == Driver::Broken,
            Summary::Failed => self.driver == Driver::Failed,
            Summary::NoDriver => self.driver == Driver::None,
            Summary::NotReady => self.driver == Driver::Found,
            Summary::NoMemory => self.waiting_for_memory,
            Summary::Stopped => !self.vm_running,
            Summary::Pinned => self.inhibitors.contains(&Inhibitor::PinnedMemory),
            Summary::Postcopy => self.inhibitors.contains(&Inhibitor::IncomingPostcopy),
            Summary::Snapshot => self.inhibitors.contains(&Inhibitor::BackgroundSnapshot),
            Summary::Locked | Summary::ReadOnlyFile | Summary::HugePages => {
                self.obstacle() == Some(*summary)
            }
            Summary::Poisoned => self.reporting && self.poisoned,
            Summary::Hold => self.shown_target != self.target,
            Summary::OutOfMemory => {
                self.actual > self.target && self.since_unasked.is_some_and(|time| time < RECENT)
            }
            Summary::NoStats => matches!(self.stats, StatsState::Asked(time) if time >= SLOW),
            Summary::TooMuch => self.actual > self.target,
            Summary::TooLittle => self.actual < self.target,
            Summary::Good => true,
        };
        Summary::ALL
            .into_iter()
            .find(applies)
            .unwrap_or(Summary::Good)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::tests::{HUGE, LOCKED, NORMAL, READ_ONLY};

    const GOOD: Status<'static> = Status {
        vm_running: true,
        driver: Driver::Ready,
        target: 100,
        shown_target: 100,
        actual: 100,
        stats: StatsState::Answered,
        inhibitors: &[],
        memory: &[NORMAL],
        reporting: false,
        poisoned: false,
        in_use: true,
        since_unasked: None,
        waiting_for_memory: false,
    };

    #[test]
    fn driver_states() {
        assert_eq!(Driver::new(0, false), Driver::None);
        assert_eq!(Driver::new(1, false), Driver::None);
        assert_eq!(Driver::new(3, false), Driver::Found);
        assert_eq!(Driver::new(15, false), Driver::Ready);
        assert_eq!(Driver::new(15, true), Driver::Broken);
        assert_eq!(Driver::new(0x83, false), Driver::Failed);
    }

    #[test]
    fn features_are_in_the_order_of_their_bits() {
        assert!((0..6).zip(FEATURES).all(|(i, (bit, _))| bit == i));
    }

    #[test]
    fn every_sentence_has_a_condition() {
        let inhibited = |inhibitors| Status { inhibitors, ..GOOD };
        let driver = |driver| Status { driver, ..GOOD };
        let stats = |stats| Status { stats, ..GOOD };
        let size = |target, shown_target, actual| Status {
            target,
            shown_target,
            actual,
            ..GOOD
        };
        let stopped = Status {
            vm_running: false,
            ..GOOD
        };
        let waiting = Status {
            waiting_for_memory: true,
            ..GOOD
        };
        let memory = |memory| Status { memory, ..GOOD };
        let out_of_memory = |time| Status {
            since_unasked: Some(time),
            ..size(50, 50, 100)
        };
        let poisoned = Status {
            reporting: true,
            poisoned: true,
            ..GOOD
        };
        let found = [
            driver(Driver::Broken),
            driver(Driver::Failed),
            driver(Driver::None),
            driver(Driver::Found),
            waiting,
            stopped,
            inhibited(&[Inhibitor::PinnedMemory]),
            inhibited(&[Inhibitor::IncomingPostcopy]),
            inhibited(&[Inhibitor::BackgroundSnapshot]),
            memory(&[LOCKED]),
            memory(&[READ_ONLY, READ_ONLY]),
            memory(&[HUGE]),
            poisoned,
            size(50, 100, 100),
            out_of_memory(RECENT - 1),
            stats(StatsState::Asked(SLOW)),
            size(50, 50, 100),
            size(100, 100, 50),
            GOOD,
        ]
        .map(|status| status.summary());
        assert_eq!(found, Summary::ALL);
        let soon = stats(StatsState::Asked(SLOW - 1));
        assert_eq!(soon.summary(), Summary::Good);
        assert_eq!(stats(StatsState::NeverSent).summary(), Summary::Good);
        assert_eq!(out_of_memory(RECENT).summary(), Summary::TooMuch);
    }

    /// An obstacle is only mentioned if it is one.
    #[test]
    fn obstacles() {
        let memory = |memory| Status { memory, ..GOOD };
        assert_eq!(memory(&[LOCKED, NORMAL]).summary(), Summary::Good);
        assert_eq!(memory(&[LOCKED, HUGE]).summary(), Summary::Good);
        assert_eq!(memory(&[]).summary(), Summary::Good);
        // With base pages of 64 KiB, an element of Linux has whole host pages.
        let base = Backing {
            page_size: 1 << 16,
            ..NORMAL
        };
        assert_eq!(memory(&[base]).summary(), Summary::Good);
        for (blocks, reported) in [
            (&[LOCKED], Summary::Locked),
            (&[READ_ONLY], Summary::ReadOnlyFile),
            (&[HUGE], Summary::Good),
        ] {
            let idle = Status {
                memory: blocks,
                in_use: false,
                ..GOOD
            };
            assert_eq!(idle.summary(), Summary::Good);
            for in_use in [false, true] {
                let reporting = Status {
                    reporting: true,
                    in_use,
                    ..idle
                };
                assert_eq!(reporting.summary(), reported);
            }
        }
    }
}
