// SPDX-License-Identifier: GPL-2.0-or-later

//! The cases that are measured

use std::fmt::Write as _;

use qtest_client::rng::Rng;

use crate::ring::{ELEMENT, ELEMENTS};

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

/// The PFNs of a full ring, relative to the region
pub fn pfns(order: &str) -> Vec<u32> {
    let n = PAGES as u32;
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
            let (mut runs, mut count, mut next) = (Vec::new(), 0, 0);
            while count < n {
                let len = (1 + rng.below(64) as u32).min(n - count);
                runs.push(next..next + len);
                count += len;
                next += len + 1;
            }
            rng.shuffle(&mut runs);
            runs.into_iter().flatten().collect()
        }
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
