// SPDX-License-Identifier: GPL-2.0-or-later

//! Checks that the tests exist that docs/conformance.md names

use std::{ffi::OsStr, fs, path::Path};

use virtio_balloon_core::{
    counters::{Counters, State},
    status::Summary,
};

/// The sentences of `balloon-status` are in docs/status.md, in the same order.
#[test]
fn sentences_are_documented() {
    let document = include_str!("../../docs/status.md");
    let rows = document.split("| sentence |").nth(1).unwrap();
    let sentences = rows.lines().skip(2).map_while(|row| row.split('|').nth(1));
    let ours = Summary::ALL.map(|summary| summary.text().to_str().unwrap());
    assert!(sentences.map(str::trim).eq(ours));
}

/// All counters, in the same order
#[test]
fn counters_are_documented() {
    let document = include_str!("../../docs/status.md");
    let rows = document.split("| counter | metric |").nth(1).unwrap();
    let names = rows.lines().skip(2).map_while(|row| row.split('`').nth(1));
    let members = Counters::default().members(&State::default());
    assert!(names.eq(members.map(|(name, _)| name.to_str().unwrap())));
}

const DOCUMENT: &str = include_str!("../../docs/conformance.md");

/// Directories with tests
const TESTS: [&str; 4] = [
    "tests-qtest",
    "tests-functional",
    "tests-model",
    "hw-virtio-balloon",
];

/// The text of all tests below a directory, except for this file, where each
/// name would be found
fn read_tests(dir: &Path, text: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_tests(&path, text);
        } else if path.is_file()
            && !path.ends_with(file!())
            && ["c", "py", "rs"]
                .map(OsStr::new)
                .contains(&path.extension().unwrap_or_default())
        {
            *text += &fs::read_to_string(path).unwrap();
        }
    }
}

/// Whether there is a test with this name: a function, or a row in a table of
/// qtests. `config/NAME` is a qtest for the layout NAME of the configuration
/// space.
fn exists(name: &str, tests: &str) -> bool {
    let layout = name.strip_prefix("config/").unwrap_or(name);
    let in_rust = |code: &str| {
        tests.match_indices(code).any(|(start, _)| {
            let before = tests.get(..start).unwrap_or_default();
            before.trim_end().ends_with("#[test]")
        })
    };
    [
        format!("    {{ \"{name}\", test_"),
        format!("    {{ \"{layout}\", \""),
        format!("static void {name}("),
        format!("    def {name}("),
    ]
    .iter()
    .any(|definition| tests.contains(definition))
        || in_rust(&format!("fn {name}()"))
}

/// The rows of the tables, without the headings
fn rows(document: &str) -> Vec<Vec<&str>> {
    let mut rows = Vec::new();
    let mut in_body = false;
    for line in document.lines() {
        let Some(cells) = line.strip_prefix('|').and_then(|l| l.strip_suffix('|')) else {
            in_body = false;
            continue;
        };
        if cells.starts_with("---") {
            in_body = true;
        } else if in_body {
            rows.push(cells.split('|').map(str::trim).collect());
        }
    }
    rows
}

/// The text of all tests
fn all_tests() -> String {
    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut tests = String::new();
    for dir in TESTS {
        read_tests(&repo.join(dir), &mut tests);
    }
    tests
}

/// Each sentence of docs/status.md has a test.
#[test]
fn sentences_are_tested() {
    let tests = all_tests();
    let rows = rows(include_str!("../../docs/status.md"));
    let named = rows.iter().filter_map(|row| match row[..] {
        [sentence, _, test]
            if Summary::ALL
                .iter()
                .any(|s| s.text().to_str() == Ok(sentence)) =>
        {
            Some(test.split('`').skip(1).step_by(2).collect::<Vec<_>>())
        }
        _ => None,
    });
    let named: Vec<_> = named.collect();
    assert_eq!(named.len(), Summary::ALL.len());
    for names in named {
        assert!(
            !names.is_empty() && names.iter().all(|name| exists(name, &tests)),
            "{names:?}"
        );
    }
}

#[test]
fn all_tests_that_are_named_exist() {
    let tests = all_tests();
    assert!(!exists("config/nothing", &tests) && !exists("nothing", &tests));

    let rows = rows(DOCUMENT);
    assert!(rows.len() > 40);
    for row in rows {
        let [section, what, does, test] = row[..] else {
            panic!("not four columns: {row:?}");
        };
        assert!(section.starts_with(|c: char| c.is_ascii_digit()), "{what}");
        assert!(!does.is_empty(), "{what}");
        // names are between backquotes
        let named: Vec<_> = test.split('`').skip(1).step_by(2).collect();
        for name in &named {
            assert!(exists(name, &tests), "{what}: there is no test {name}");
        }
        let reason = test.strip_prefix("none: ");
        assert!(
            reason.is_some_and(|reason| !reason.is_empty()) == named.is_empty(),
            "{what}: either tests, or why there is none"
        );
    }
}
