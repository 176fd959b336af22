// SPDX-License-Identifier: GPL-2.0-or-later

//! What the guest's memory consists of, and what the host can do when pages of
//! it go into the balloon

use std::ffi::CStr;

use crate::spec::BALLOON_PAGE_SIZE;

/// The memory that Linux puts into the balloon with one element, in bytes
pub const LINUX_ELEMENT: u64 = 256 * BALLOON_PAGE_SIZE;

/// What a block of the guest's memory consists of
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Size of its host pages in bytes
    pub page_size: u64,
    /// It is a mapping of a file, which includes a memfd
    pub has_file: bool,
    pub shared: bool,
    /// The file was opened for reading only.
    pub read_only_file: bool,
    /// The user wants QEMU to lock its memory.
    pub locked: bool,
    /// The driver has accepted `VIRTIO_BALLOON_F_MUST_TELL_HOST`, see
    /// [`HostPages`](crate::host_pages::HostPages).
    pub completes_host_pages: bool,
}

/// What the host can do when pages of a block go into the balloon
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarding {
    /// It frees each of them.
    Pages,
    /// It frees a host page when all of it is in the balloon.
    HostPages,
    /// It frees a host page if all of it goes into the balloon with one element.
    HostPagesOfElement,
    /// Nothing, because the memory is locked
    Locked,
    /// Nothing, because the file was opened for reading only
    ReadOnlyFile,
}

impl Backing {
    /// Whether the memory is a file, and who can see what the guest writes
    pub const fn file(&self) -> &'static CStr {
        match (self.has_file, self.shared) {
            (false, _) => c"none",
            (true, false) => c"private",
            (true, true) => c"shared",
        }
    }

    /// Mirrors what `ram_block_discard_range()` does.
    pub const fn discarding(&self) -> Discarding {
        // The kernel can neither lock huge pages nor refuse to remove pages
        // from a file.
        let can_be_locked = !(self.has_file && self.shared) && self.page_size < LINUX_ELEMENT;
        if self.read_only_file {
            Discarding::ReadOnlyFile
        } else if self.locked && can_be_locked {
            Discarding::Locked
        } else if self.page_size <= BALLOON_PAGE_SIZE {
            Discarding::Pages
        } else if self.completes_host_pages {
            Discarding::HostPages
        } else {
            Discarding::HostPagesOfElement
        }
    }
}

impl Discarding {
    pub const fn name(self) -> &'static CStr {
        match self {
            Self::Pages => c"pages",
            Self::HostPages => c"host-pages",
            Self::HostPagesOfElement => c"host-pages-of-element",
            Self::Locked => c"locked",
            Self::ReadOnlyFile => c"read-only-file",
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub const NORMAL: Backing = Backing {
        page_size: BALLOON_PAGE_SIZE,
        has_file: false,
        shared: false,
        read_only_file: false,
        locked: false,
        completes_host_pages: false,
    };
    pub const LOCKED: Backing = Backing {
        locked: true,
        ..NORMAL
    };
    pub const READ_ONLY: Backing = Backing {
        has_file: true,
        read_only_file: true,
        ..NORMAL
    };
    pub const HUGE: Backing = Backing {
        page_size: 2 << 20,
        has_file: true,
        shared: true,
        ..NORMAL
    };

    #[test]
    fn what_is_discarded() {
        let check = |backing: Backing, file: &CStr, discarding| {
            assert_eq!(backing.file(), file);
            assert_eq!(backing.discarding(), discarding);
        };
        check(NORMAL, c"none", Discarding::Pages);
        check(LOCKED, c"none", Discarding::Locked);
        check(READ_ONLY, c"private", Discarding::ReadOnlyFile);
        check(HUGE, c"shared", Discarding::HostPagesOfElement);
        let locked = |backing| Backing {
            locked: true,
            ..backing
        };
        check(locked(HUGE), c"shared", Discarding::HostPagesOfElement);
        let memfd = Backing {
            page_size: BALLOON_PAGE_SIZE,
            ..HUGE
        };
        check(locked(memfd), c"shared", Discarding::Pages);
        let private = Backing {
            shared: false,
            ..memfd
        };
        check(private, c"private", Discarding::Pages);
        check(locked(private), c"private", Discarding::Locked);
        let on = Backing {
            completes_host_pages: true,
            ..HUGE
        };
        check(on, c"shared", Discarding::HostPages);
        // With base pages of 64 KiB, an element of Linux has whole host pages.
        let base = Backing {
            page_size: 1 << 16,
            ..NORMAL
        };
        check(base, c"none", Discarding::HostPagesOfElement);
    }
}
