// SPDX-License-Identifier: GPL-2.0-or-later

//! The differences between the devices that are not failures
//!
//! `docs/differences.md` describes them, and others that cannot be seen here.

use std::{collections::BTreeMap, fmt::Write};

/// The list for users
const DOCUMENT: &str = include_str!("../../docs/differences.md");

/// A difference that is intended
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    BatchNotification,
    BounceBuffers,
    ErrorInBatch,
    ExcessPages,
    HintCmdId,
    HintErrorOnResume,
    HintInterrupt,
    HintJump,
    HintMmio,
    HintNotNegotiated,
    HintNotification,
    HintOnArrival,
    InflatedRing,
    LastUpdate,
    QueueReset,
    ResumeAfterMigration,
    StatsLimit,
    Turns,
}

/// What is done about a difference
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Both devices may get to where they differ.
    Tolerated,
    /// The generator, or the executor, does something else instead.
    Avoided,
    /// There is no operation that could lead to it.
    Absent,
}

impl Treatment {
    /// For the user
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tolerated => "tolerated",
            Self::Avoided => "avoided",
            Self::Absent => "no such operations",
        }
    }
}

/// A row of the table
#[derive(Debug)]
pub struct NamedDifference {
    pub difference: Difference,
    /// The name in the document
    pub name: &'static str,
    pub treatment: Treatment,
    /// What exactly is compared, or not done
    pub how: &'static str,
}

const fn row(
    difference: Difference,
    name: &'static str,
    treatment: Treatment,
    how: &'static str,
) -> NamedDifference {
    NamedDifference {
        difference,
        name,
        treatment,
        how,
    }
}

/// All differences that are not failures
pub const NAMED_DIFFERENCES: &[NamedDifference] = &[
    row(
        Difference::BatchNotification,
        "batch-notification",
        Treatment::Tolerated,
        "signalled-used of x-query-virtio-queue-status is not compared; the driver does not \
         change its mind about features that have to do with notifications, which legacy ones \
         could do at any time",
    ),
    row(
        Difference::BounceBuffers,
        "bounce-buffers",
        Treatment::Avoided,
        "there are no other elements if a buffer is in device memory",
    ),
    row(
        Difference::ErrorInBatch,
        "error-in-batch",
        Treatment::Tolerated,
        "if both are broken, bit 0 of the ISR is acknowledged, and the used rings of the queues for \
         inflating, deflating and reports are made the same; there is only one element at a time in \
         the queue for hints",
    ),
    row(
        Difference::ExcessPages,
        "excess-pages",
        Treatment::Tolerated,
        "if query-balloon returns less than zero with one device, and zero with the other",
    ),
    row(
        Difference::HintCmdId,
        "hint-cmd-id",
        Treatment::Absent,
        "VMs are stopped before they are migrated, so that nobody asks for hints",
    ),
    row(
        Difference::HintErrorOnResume,
        "hint-error-on-resume",
        Treatment::Avoided,
        "no bad elements for the queue for hints while the VM is stopped",
    ),
    row(
        Difference::HintInterrupt,
        "hint-interrupt",
        Treatment::Tolerated,
        "if, after work for the queue for hints was pending, bit 0 of the ISR is set by one \
         device only, it is acknowledged",
    ),
    row(
        Difference::HintJump,
        "hint-jump",
        Treatment::Avoided,
        "the available index of the queue for hints does not jump",
    ),
    row(
        Difference::HintMmio,
        "hint-mmio",
        Treatment::Avoided,
        "buffers of the queue for hints are in RAM",
    ),
    row(
        Difference::HintNotNegotiated,
        "hint-not-negotiated",
        Treatment::Avoided,
        "hints only if the feature was accepted; it is not given up while the VM is stopped",
    ),
    row(
        Difference::HintNotification,
        "hint-notification",
        Treatment::Tolerated,
        "flags and avail_event in the used ring of the queue for hints are not compared",
    ),
    row(
        Difference::HintOnArrival,
        "hint-on-arrival",
        Treatment::Avoided,
        "no hints after migration until the VM runs",
    ),
    row(
        Difference::InflatedRing,
        "inflated-ring",
        Treatment::Avoided,
        "no pages that a ring at an unusual address is in",
    ),
    row(
        Difference::LastUpdate,
        "last-update",
        Treatment::Tolerated,
        "only zero and nonzero are told apart",
    ),
    row(
        Difference::QueueReset,
        "queue-reset",
        Treatment::Avoided,
        "no reset of the queues for statistics and hints alone",
    ),
    row(
        Difference::ResumeAfterMigration,
        "resume-after-migration",
        Treatment::Avoided,
        "the driver notifies all queues after migration, and when the VM runs; no migration while \
         there may be work for the queue for hints, or after an error in a batch, or while \
         there may be one; no old elements, which may be large, while the VM is stopped",
    ),
    row(
        Difference::StatsLimit,
        "stats-limit",
        Treatment::Absent,
        "buffers for statistics are shorter",
    ),
    row(
        Difference::Turns,
        "turns",
        Treatment::Tolerated,
        "if both are the same when none of them has elements in flight",
    ),
];

/// How often a difference has made a difference to the test
pub type Uses = BTreeMap<Difference, u64>;

/// How often each difference was used, and which ones were not used at all:
/// these may be gone, or not be tested any more.
pub fn describe_uses(uses: &Uses) -> String {
    let mut text = String::new();
    let mut never = Vec::new();
    let mut absent = Vec::new();
    for row in NAMED_DIFFERENCES {
        let treatment = row.treatment.name();
        match uses.get(&row.difference) {
            Some(count) => {
                let _ = writeln!(text, "{count:8} {} ({treatment})", row.name);
            }
            None if row.treatment == Treatment::Absent => absent.push(row.name),
            None => never.push(format!("{} ({treatment})", row.name)),
        }
    }
    let list = |names: &[&str]| match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let never: Vec<_> = never.iter().map(String::as_str).collect();
    let _ = writeln!(text, "   never used: {}", list(&never));
    let _ = writeln!(text, "   no such operations: {}", list(&absent));
    text
}

/// The entries of the document: name, and text
fn documented(document: &str) -> Vec<(&str, String)> {
    let mut entries: Vec<(&str, String)> = Vec::new();
    let mut open = false;
    for line in document.lines() {
        let start = line
            .strip_prefix("- `")
            .and_then(|rest| rest.split_once("`: "));
        if let Some((name, text)) = start {
            entries.push((name, text.trim().to_owned()));
            open = true;
        } else if !line.starts_with("  ") {
            open = false;
        } else if let Some((_, text)) = entries.last_mut().filter(|_| open) {
            text.push(' ');
            text.push_str(line.trim());
        }
    }
    entries
}

/// All that is known of the differences that are treated here
pub fn describe_all() -> String {
    let mut text = String::new();
    let entries = documented(DOCUMENT);
    for row in NAMED_DIFFERENCES {
        let entry = entries.iter().find(|(name, _)| *name == row.name);
        let entry = entry.map_or("not in docs/differences.md", |(_, entry)| entry);
        let _ = writeln!(
            text,
            "{}\n  {entry}\n  Here: {}: {}",
            row.name,
            row.treatment.name(),
            row.how
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        ffi::OsStr,
        fs,
        path::{Path, PathBuf},
    };

    use super::*;

    /// What stands in an entry after `Check:`
    fn check<'a>(name: &str, text: &'a str) -> &'a str {
        let (_, check) = text
            .split_once("Check: ")
            .unwrap_or_else(|| panic!("{name} does not say what checks it"));
        check
    }

    /// The text of all tests that the document may name
    fn all_tests() -> String {
        fn read(dir: PathBuf, text: &mut String) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    read(path, text);
                } else if !path.is_symlink()
                    && ["c", "py", "rs"]
                        .map(OsStr::new)
                        .contains(&path.extension().unwrap_or_default())
                {
                    *text += &fs::read_to_string(path).unwrap();
                }
            }
        }
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut text = String::new();
        for dir in [
            "tests-qtest",
            "tests-functional",
            "hw-virtio-balloon",
            "rust",
            "tests-model",
        ] {
            read(repo.join(dir), &mut text);
        }
        text
    }

    #[test]
    fn table_and_document_have_the_same_differences() {
        let mut ours: BTreeMap<_, _> = NAMED_DIFFERENCES
            .iter()
            .map(|row| (row.name, row.treatment))
            .collect();
        for (name, text) in documented(DOCUMENT) {
            let check = check(name, &text);
            let claim = match () {
                () if check.contains("difftest tolerates it") => Some(Treatment::Tolerated),
                () if check.contains("difftest avoids it") => Some(Treatment::Avoided),
                () if check.contains("difftest does not have it") => Some(Treatment::Absent),
                () => None,
            };
            assert_eq!(ours.remove(name), claim, "{name}: {check}");
        }
        assert!(ours.is_empty(), "not in docs/differences.md: {ours:?}");
    }

    #[test]
    fn document_says_what_checks_each_difference() {
        let entries = documented(DOCUMENT);
        let names: BTreeSet<_> = entries.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), entries.len(), "a name is used twice");
        let items = DOCUMENT.lines().filter(|line| line.starts_with("- "));
        assert_eq!(items.count(), entries.len(), "an entry has no name");

        let tests = all_tests();
        for (name, text) in &entries {
            let check = check(name, text);
            // those between two backquotes
            let named: Vec<_> = check.split('`').skip(1).step_by(2).collect();
            for test in &named {
                let found = [
                    format!("\"{test}\""),
                    format!("/{test}\""),
                    format!("def {test}("),
                    format!("fn {test}("),
                ]
                .iter()
                .any(|definition| tests.contains(definition));
                assert!(found, "{name}: there is no test {test}");
            }
            let reason = check.strip_prefix("none; ");
            assert!(
                reason.is_some_and(|reason| reason.len() > 10)
                    || check.contains("difftest")
                    || !named.is_empty(),
                "{name}: {check}"
            );
        }
    }

    #[test]
    fn entries_end() {
        let text = "intro\n- `a`: x\n  y. Check: none\n\n  not part\n- `b`: z\n";
        assert_eq!(
            documented(text),
            [("a", "x y. Check: none".to_owned()), ("b", "z".to_owned())]
        );
    }

    #[test]
    fn unused_differences_are_listed() {
        let uses = Uses::from([(Difference::Turns, 3)]);
        let text = describe_uses(&uses);
        assert!(text.contains("       3 turns (tolerated)\n"));
        let never = text
            .lines()
            .find(|line| line.contains("never used"))
            .unwrap();
        assert!(never.contains("hint-jump (avoided)"));
        assert!(!never.contains("turns") && !never.contains("stats-limit"));
        assert!(text.contains("no such operations: hint-cmd-id, stats-limit\n"));
    }
}
