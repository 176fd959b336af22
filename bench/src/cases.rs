// SPDX-License-Identifier: GPL-2.0-or-later

//! The cases that are measured

use std::fmt::Write as _;

use qtest_client::rng::Rng;

use crate::ring::{ELEMENT, ELEMENTS, PAGE, REGION};

/// The number of PFNs in a full ring
pub const PAGES: usize = ELEMENT * ELEMENTS;

/// The kind of memory that backs the guest's RAM
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Backing {
    pub name: &'static str,
    /// Options for QEMU
    pub args: &'static [&'static str],
    /// Whether the memory may consist of transparent huge pages
    pub thp: bool,
    /// Options for the Rust device that the C device does not have
    pub rust_options: &'static str,
}

impl Backing {
    /// Whether the memory consists of huge pages from the pool
    pub fn is_hugetlb(&self) -> bool {
        self.name.starts_with("hugetlb")
    }
}

const HUGETLB: Backing = Backing {
    name: "hugetlb",
    args: &[
        "-object",
        "memory-backend-memfd,id=ram0,size=512M,hugetlb=on,hugetlbsize=2M",
        "-machine",
        "memory-backend=ram0",
    ],
    thp: true,
    rust_options: "",
};

/// All kinds of memory
pub const BACKINGS: [Backing; 5] = [
    Backing {
        name: "thp",
        args: &[],
        thp: true,
        rust_options: "",
    },
    Backing {
        name: "nothp",
        args: &[],
        thp: false,
        rust_options: "",
    },
    Backing {
        name: "memfd",
        args: &[
            "-object",
            "memory-backend-memfd,id=ram0,size=512M,share=on",
            "-machine",
            "memory-backend=ram0",
        ],
        thp: true,
        rust_options: "",
    },
    HUGETLB,
    Backing {
        name: "hugetlb-on",
        rust_options: ",huge-pages=on",
        ..HUGETLB
    },
];

/// The order in which the driver sends the PFNs
pub const ORDERS: [&str; 4] = ["descending", "ascending", "runs", "random"];

/// The order of the PFNs in a hostile element: the first has as many ranges as
/// possible, the second as much memory as possible
pub const HOSTILE: [&str; 2] = ["random", "ascending"];

/// A number of PFNs, relative to the region
pub fn pfns(order: &str, count: usize) -> Vec<u32> {
    let n = count as u32;
    let mut rng = Rng::new(1);
    match order {
        "descending" => (0..n).rev().collect(),
        "ascending" => (0..n).collect(),
        "random" => {
            // Every second page, so that no two are adjacent
            let mut list: Vec<u32> = (0..n).map(|i| 2 * i).collect();
            rng.shuffle(&mut list);
            list
        }
        _ => {
            // Runs of 1 to 64 pages, with a gap of one page between them
            let (mut runs, mut done, mut next) = (Vec::new(), 0, 0);
            while done < n {
                let len = (1 + rng.below(64) as u32).min(n - done);
                runs.push(next..next + len);
                done += len;
                next += len + 1;
            }
            rng.shuffle(&mut runs);
            runs.into_iter().flatten().collect()
        }
    }
}

/// Memory that the driver reports as free, in buffers of equal size
pub struct Reported {
    pub name: &'static str,
    pub buffers: usize,
    /// The size of a buffer, in pages
    pub pages: u32,
    /// The distance from one buffer to the next, in pages
    pub distance: u32,
    /// Whether one element has all buffers, instead of one buffer in each
    /// element
    pub chain: bool,
}

/// All cases of free page reporting.  Linux sends the first, a driver for
/// Windows (virtio-win) the second.  In the third there is a used page between
/// the pages, because otherwise the driver would report them as one buffer.
pub const REPORTED: [Reported; 3] = [
    Reported {
        name: "reporting 32 x 4 MiB",
        buffers: 32,
        pages: 1024,
        distance: 1024,
        chain: true,
    },
    Reported {
        name: "reporting 128 x 2 MiB",
        buffers: 128,
        pages: 512,
        distance: 512,
        chain: false,
    },
    Reported {
        name: "reporting 1024 x 4 KiB",
        buffers: 1024,
        pages: 1,
        distance: 2,
        chain: false,
    },
];

/// Sizes of guests, in GiB, that are compared to see whether the cost of a page
/// depends on the size.  The last is almost the most that a microvm can have.
pub const GUESTS: [u64; 4] = [1, 4, 16, 512];

/// The order of the PFNs for these guests, and how many rings are filled, so
/// that the pages are in 512 MiB of memory
pub const SPREAD: [(&str, usize); 2] = [("descending", 4), ("random", 2)];

/// Memory of 512 MiB in chunks that are spread evenly over a guest, from
/// `REGION` on.  It is the same amount for all guests, so that a large guest
/// does not need more memory of the host.
pub struct Spread {
    /// The distance from one chunk to the next, in pages
    distance: u32,
}

impl Spread {
    const CHUNKS: u32 = 32;
    /// The size of a chunk, in pages
    pub const CHUNK: u32 = (16 << 20) / PAGE as u32;
    /// Where there is no RAM in a microvm, relative to the region and in pages:
    /// from 3 GiB to 4 GiB
    const GAP: u32 = (((3 << 30) - REGION) / PAGE) as u32;
    const GAP_SIZE: u32 = ((1 << 30) / PAGE) as u32;

    /// Chunks for a guest of this size.  They begin at multiples of 2 MiB, so
    /// that they consist of whole transparent huge pages.  With the sizes in
    /// [`GUESTS`], the gap is between two chunks and not in a chunk.
    pub const fn new(gib: u64) -> Self {
        Self {
            distance: (((gib << 30) - REGION) / PAGE) as u32 / Self::CHUNKS / 512 * 512,
        }
    }

    /// The offset of a page in the RAM; both are in pages, and the result is
    /// relative to the region.
    pub const fn offset(&self, page: u32) -> u32 {
        page / Self::CHUNK * self.distance + page % Self::CHUNK
    }

    /// The PFN of a page, relative to the region
    pub const fn pfn(&self, page: u32) -> u32 {
        let offset = self.offset(page);
        if offset < Self::GAP {
            offset
        } else {
            offset + Self::GAP_SIZE
        }
    }

    /// The PFNs of the first pages of all chunks, relative to the region
    pub fn chunks(&self) -> impl Iterator<Item = u32> + '_ {
        (0..Self::CHUNKS).map(|i| self.pfn(i * Self::CHUNK))
    }
}

/// The runs that the PFNs of each group form, as input for limit.c
pub fn runs(pfns: &[u32], group_size: usize) -> String {
    let mut text = String::new();
    for group in pfns.chunks(group_size) {
        let mut sorted = group.to_vec();
        sorted.sort_unstable();
        for run in sorted.chunk_by(|a, b| *b == a + 1) {
            let _ = writeln!(text, "{} {}", run[0], run.len());
        }
        text.push('\n');
    }
    text
}
