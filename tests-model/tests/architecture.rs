// SPDX-License-Identifier: GPL-2.0-or-later

//! Checks what docs/architecture.md says of the modules of the device, and that
//! imports between the modules of xtask go one way, too

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Files should not have more lines than about this.
const MAX_LINES: usize = 500;

fn device() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../hw-virtio-balloon")
}

/// All source files below a directory, with their paths relative to it
fn sources(dir: &Path) -> BTreeMap<String, String> {
    let mut sources = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.is_file() && path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                sources.insert(name, fs::read_to_string(path).unwrap());
            }
        }
    }
    assert!(!sources.is_empty());
    sources
}

/// The module that a file belongs to
fn module(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

/// The modules of the same crate that each module imports.  Comments do not
/// count.
fn imports(sources: &BTreeMap<String, String>) -> BTreeMap<&str, BTreeSet<&str>> {
    let modules: BTreeSet<&str> = sources.keys().map(|file| module(file)).collect();
    let mut imports: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (file, text) in sources {
        let code: String = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect::<Vec<_>>()
            .join(" ");
        // crate::a, and each name in crate::{a::.., b::..}
        for part in code.split("crate::").skip(1) {
            let list = part.split(';').next().unwrap();
            let words = list.split(|c: char| !c.is_alphanumeric() && c != '_');
            let n = if list.starts_with('{') { usize::MAX } else { 1 };
            let used = words.take(n).filter_map(|word| modules.get(word));
            let me = module(file);
            imports
                .entry(me)
                .or_default()
                .extend(used.filter(|used| **used != me));
        }
    }
    imports
}

#[test]
fn imports_go_one_way() {
    for dir in ["src", "core/src", "../rust/virtio/src", "../xtask/src"] {
        let sources = sources(&device().join(dir));
        let mut left = imports(&sources);
        // Remove modules that import none of the others, until nothing is left
        while !left.is_empty() {
            let modules: BTreeSet<&str> = left.keys().copied().collect();
            left.retain(|_, used| used.iter().any(|m| modules.contains(m)));
            assert!(left.len() < modules.len(), "these form a circle: {left:?}");
        }
    }
}

#[test]
fn only_the_device_knows_its_type() {
    for (file, text) in sources(&device().join("src")) {
        assert!(
            module(&file) == "device" || !text.contains("VirtIOBalloon"),
            "{file} names the type of the device"
        );
    }
}

#[test]
fn no_file_is_too_long() {
    for dir in [
        "hw-virtio-balloon",
        "rust",
        "xtask/src",
        "difftest/src",
        "qtest-client",
        "bench",
        "tests-functional",
    ] {
        let dir = device().join("..").join(dir);
        for (file, text) in sources(&dir) {
            let lines = text.lines().count();
            // allow for a tenth more
            assert!(lines <= MAX_LINES * 11 / 10, "{file} has {lines} lines");
        }
    }
}

#[test]
fn a_circle_is_found() {
    let of = |files: &[(&str, &str)]| {
        let sources = files.iter().map(|(a, b)| ((*a).into(), (*b).into()));
        let sources: BTreeMap<String, String> = sources.collect();
        imports(&sources)
            .into_iter()
            .map(|(a, b)| format!("{a}: {b:?}"))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        of(&[
            ("a.rs", "use crate::{\n b::B,\n c::C,\n};\n// crate::d"),
            ("b.rs", "use crate::a::b;"),
            ("c.rs", "pub use crate::C; use super::a;"),
            ("d/e.rs", "use crate::d::D; fn f() { crate::c::f(); }"),
        ]),
        [r#"a: {"b", "c"}"#, r#"b: {"a"}"#, "c: {}", r#"d: {"c"}"#]
    );
}

/// The bodies of all functions with this name in a file.  A body ends with a
/// brace that is indented like the function.
fn bodies(text: &str, name: &str) -> Vec<String> {
    let lines: Vec<_> = text.lines().collect();
    let is_it = |line: &str| {
        let after = line.split(&format!("fn {name}")).nth(1);
        after.is_some_and(|rest| rest.starts_with(['(', '<']))
    };
    (0..lines.len())
        .filter(|n| is_it(lines[*n]))
        .map(|n| {
            let indent = lines[n].len() - lines[n].trim_start().len();
            let end = format!("{}}}", " ".repeat(indent));
            let body = lines[n + 1..].iter().take_while(|line| **line != end);
            body.copied().collect::<Vec<_>>().join("\n")
        })
        .collect()
}

/// Functions that are called through a function pointer, macro or type
/// parameter, and the text of the call
const INDIRECT: &[(&str, &str)] = &[("handle_output", "F::call(")];

#[test]
fn the_path_of_a_pfn_is_as_documented() {
    let root = device().join("..");
    let text = fs::read_to_string(root.join("docs/architecture.md")).unwrap();
    let path = text.split("```text\n").nth(1).unwrap();
    let patches: String = fs::read_dir(root.join("patches/qemu"))
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();

    let mut callers: Vec<(usize, Vec<String>)> = Vec::new();
    let mut count = 0;
    for line in path.lines().take_while(|line| *line != "```") {
        let mut words = line.split_whitespace();
        let (name, file) = (words.next().unwrap(), words.next().unwrap());
        let depth = line.len() - line.trim_start().len();
        callers.retain(|(other, _)| *other < depth);
        if let Some((_, bodies)) = callers.last() {
            let indirect = INDIRECT.iter().find(|(callee, _)| *callee == name);
            let call = indirect.map_or_else(|| format!("{name}("), |(_, call)| (*call).to_owned());
            let called = bodies.iter().any(|body| body.contains(&call));
            assert!(called, "{name} is not called where it is listed");
        }
        let code = fs::read_to_string(root.join(file)).unwrap_or_default();
        if code.is_empty() {
            assert!(patches.contains(&format!("+++ b/{file}")), "{file}");
            assert!(patches.contains(&format!("fn {name}(")), "{name}");
        }
        let generated = code.contains(&format!("!({name}, "));
        let found = bodies(&code, name);
        assert!(
            code.is_empty() || generated || !found.is_empty(),
            "{file}: {name}"
        );
        callers.push((depth, found));
        count += 1;
    }
    assert!(count > 10);
}
