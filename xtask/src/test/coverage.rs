// SPDX-License-Identifier: GPL-2.0-or-later

//! How much of the device and of its bindings the tests execute
//!
//! The figures are in docs/security.md.  The suite fails if they become worse.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result};
use xshell::cmd;

use super::{
    compare,
    qtest::balloon_tests,
    results::{meson_test, Count},
};
use crate::{
    build::{Build, Device, Target, COVERAGE, UNSTABLE},
    env::{remove, Env},
    hugepages::{HugePages, FOR_QTESTS},
    llvm::Llvm,
    profile::{figures, Figures, Table, TOTAL},
    run::{shell_in, RunQuiet},
};

/// How many random operations the devices are compared with
const OPS: u64 = 20_000;

/// The file with the figures
const DOCUMENT: &str = "docs/security.md";

/// By how many per cent a figure may fall
const TOLERANCE: f64 = 0.5;

fn print(table: &Table) -> String {
    let mut text = "| file | lines | of them executed, % | branches | of them taken, % |\n\
                    |---|---|---|---|---|\n"
        .to_owned();
    for (name, Figures { lines, branches }) in table {
        let _ = writeln!(
            text,
            "| `{name}` | {} | {:.1} | {} | {:.1} |",
            lines.count,
            lines.percent(),
            branches.count,
            branches.percent()
        );
    }
    text
}

/// The percentages in the document: lines and branches
fn documented(text: &str) -> BTreeMap<String, [f64; 2]> {
    text.lines()
        .filter_map(|line| {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let [_, name, _, lines, _, branches, _] = cells[..] else {
                return None;
            };
            let name = name.strip_prefix('`')?.strip_suffix('`')?;
            Some((
                name.to_owned(),
                [lines.parse().ok()?, branches.parse().ok()?],
            ))
        })
        .collect()
}

/// What has become worse than it is in the document.  For single files, this is
/// only printed: what the main loop does between two commands of a test depends
/// on the time.
fn worse(table: &Table, documented: &BTreeMap<String, [f64; 2]>) -> Vec<String> {
    let mut worse = Vec::new();
    for (name, before) in documented {
        let figures = table.get(name).copied().unwrap_or_default();
        let after = figures.percent();
        for ((what, new), old) in ["lines", "branches"].into_iter().zip(after).zip(before) {
            if new < old - TOLERANCE {
                worse.push(format!("{name}: {what} {new:.1} %, was {old:.1} %"));
            }
        }
    }
    worse
}

/// The program of the tests of the models, with coverage
fn models(env: &Env, build: &Build, profile: &Path) -> Result<Vec<String>> {
    env.say("models with coverage");
    let sh = shell_in(&env.repo)?;
    let target = env.cache.join("coverage-target");
    // As in QEMU's build, so that both are the same files
    let remap = format!(
        "--remap-path-prefix={}/hw-virtio-balloon={}/../../../src/{}/rust/hw/virtio/balloon",
        env.repo.display(),
        build.dir.display(),
        build.source.key
    );
    let flags = format!("{} {remap}", COVERAGE.join(" "));
    let run = |args: &[&str]| -> Result<String> {
        cmd!(
            sh,
            "cargo test --locked --release -p tests-model --test properties --test hints {args...}"
        )
        .env("RUSTFLAGS", &flags)
        .env(UNSTABLE.0, UNSTABLE.1)
        .env("CARGO_TARGET_DIR", &target)
        .env("LLVM_PROFILE_FILE", profile)
        .read_quiet()
    };
    run(&[])?;
    let built = run(&["--no-run", "--message-format=json"])?;
    Ok(built
        .lines()
        .filter_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(message.get("executable")?.as_str()?.to_owned())
        })
        .collect())
}

pub fn coverage(env: &Env, seed: &str) -> Result<Count> {
    let llvm = Llvm::provide(env)?;
    let build = Build::prepare_coverage(env)?;
    build.build_qemu(env)?;
    let dir = env.cache.join("coverage");
    remove(&dir)?;
    fs::create_dir_all(&dir)?;
    // Processes share some files, and add to what these have.
    let profile = dir.join("%4m.profraw");

    let mut count = Count::default();
    let vars = [
        ("QTEST_BALLOON_DEVICE", Device::Rust.name().into()),
        ("LLVM_PROFILE_FILE", profile.clone()),
    ];
    {
        let _pages = HugePages::reserve(env, FOR_QTESTS);
        let tests: Vec<_> = balloon_tests(Device::Rust, Target::X86_64)
            .into_iter()
            .chain(["virtio-ring-test"])
            .map(|test| format!("qtest-{}/{test}", build.target.name()))
            .collect();
        let args: Vec<_> = tests.iter().map(String::as_str).collect();
        count += meson_test(env, &build, "qtests with coverage", &args, &vars)?;
    }
    let c = Build::prepare(env, Device::C, Target::X86_64, None)?;
    c.build_qemu(env)?;
    count += compare(env, [&c, &build], OPS, seed, &vars)?;
    let programs = models(env, &build, &profile)?;

    let mut objects = vec![build.qemu().display().to_string()];
    objects.extend(programs);
    let table = figures(&llvm, &dir, &objects)?;
    println!("{}", print(&table));

    let document = fs::read_to_string(env.repo.join(DOCUMENT))
        .with_context(|| format!("cannot read {DOCUMENT}"))?;
    let worse = worse(&table, &documented(&document));
    for line in &worse {
        println!("coverage: {line}");
    }
    count += Count::from(!worse.iter().any(|line| line.starts_with(TOTAL)));
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::example;

    #[test]
    fn what_is_printed_is_read() {
        let table = example();
        let read = documented(&print(&table));
        assert_eq!(read["hw-virtio-balloon/src/a.rs"], [75.0, 100.0]);
        assert_eq!(read["rust/virtio/src/b.rs"], [25.0, 25.0]);
        assert_eq!(read[TOTAL], [50.0, 25.0]);
        assert!(worse(&table, &read).is_empty());

        let mut before = read;
        before.insert(TOTAL.to_owned(), [50.4, 25.6]);
        before.insert("gone.rs".to_owned(), [0.0, 0.0]);
        assert_eq!(worse(&table, &before), ["all: branches 25.0 %, was 25.6 %"]);
    }

    #[test]
    fn figures_are_documented() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = fs::read_to_string(repo.join(DOCUMENT)).unwrap();
        assert!(documented(&text).contains_key(TOTAL));
    }
}
