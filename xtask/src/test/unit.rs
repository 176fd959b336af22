// SPDX-License-Identifier: GPL-2.0-or-later

//! What runs in seconds: unit tests, lints, formatting

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use xshell::cmd;

use super::results::{meson_test, parse_cargo_test, Count, PASS};
use crate::{
    build::{Build, Device, Target},
    env::Env,
    run::{shell_in, RunQuiet},
    source::mounted_files,
};

pub fn unit(env: &Env) -> Result<Count> {
    let mut count = parse_cargo_test(&cargo(
        env,
        "unit tests of the workspace",
        &["test", "--workspace", "--locked"],
    )?);
    cargo(
        env,
        "clippy on the workspace",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--quiet",
            "--",
            "-Dwarnings",
        ],
    )?;
    count += PASS;
    cargo(
        env,
        "rustfmt on the workspace",
        &["fmt", "--all", "--check"],
    )?;
    count += PASS;
    no_unsafe(env)?;
    count += PASS;

    let build = Build::prepare(env, Device::Rust, Target::X86_64, None)?;
    count += meson_test(env, &build, "Rust unit tests", &["--suite", "rust"], &[])?;
    overflow_checks(&fs::read_to_string(build.dir.join("build.ninja"))?)?;
    count += PASS;

    let rust = build.source.dir.join("rust");
    let crates = [
        "common",
        "qom",
        "migration",
        "system",
        "hwcore",
        "util",
        "virtio",
        "virtio_balloon",
    ];
    let packages = crates.map(|name| format!("-p{name}"));
    env.say("clippy with QEMU's lints on the crates in QEMU's tree");
    let (sh, meson, dir) = (build.shell()?, build.meson(), &build.dir);
    // cargo in QEMU's workspace, which needs the bindings that meson has generated,
    // and the trace points, which the tests do not
    build.ninja(env, &["trace/trace-hw_virtio.rs".to_owned()])?;
    let out = cmd!(
        sh,
        "{meson} devenv -C {dir} --workdir {rust} cargo clippy --offline --locked --quiet
         --message-format=short {packages...}"
    )
    .env("CARGO_HOME", env.cache.join("cargo-home"))
    .env("CARGO_TARGET_DIR", dir.join("cargo-target"))
    .quiet()
    .ignore_status()
    .output()?;
    let report = String::from_utf8_lossy(&out.stderr);
    let ours = mounted_files(env)?
        .into_iter()
        .filter_map(|(_, to)| Some(to.strip_prefix("rust").ok()?.to_owned()))
        .collect();
    let tree = build.source.git()?;
    let diff = cmd!(tree, "git diff -U0 pristine HEAD -- rust").read_quiet()?;
    let findings = clippy_findings(&report, &ours, &added_lines(&diff));
    ensure!(
        out.status.success() && findings.is_empty(),
        "clippy:\n{}",
        if findings.is_empty() {
            report.into_owned()
        } else {
            findings.join("\n")
        }
    );
    count += PASS;

    let config = rust.join("rustfmt.toml");
    let files: Vec<_> = mounted_files(env)?
        .into_iter()
        .map(|(from, _)| from)
        // build.rs is a link to another crate's
        .filter(|from| from.extension().is_some_and(|ext| ext == "rs") && !from.is_symlink())
        .collect();
    env.run(
        "rustfmt on the crates in QEMU's tree",
        cmd!(
            sh,
            "rustfmt --check --edition 2021 --config-path {config} {files...}"
        ),
    )?;
    count += PASS;
    Ok(count)
}

/// Run cargo on what needs no QEMU.
fn cargo(env: &Env, what: &str, args: &[&str]) -> Result<String> {
    env.say(what);
    let sh = shell_in(&env.repo)?;
    cmd!(sh, "cargo {args...}")
        .read_quiet()
        .with_context(|| format!("{what} failed"))
}

/// The lines that a diff without context adds to the files below `rust/`, by
/// the path from there
fn added_lines(diff: &str) -> BTreeMap<&str, Vec<Range<usize>>> {
    let mut added: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let mut file = "";
    for line in diff.lines() {
        if let Some(path) = line.strip_prefix("+++ b/rust/") {
            file = path;
        } else if let Some(hunk) = line.strip_prefix("@@ ") {
            let new = hunk.split_whitespace().find_map(|w| w.strip_prefix('+'));
            let Some(new) = new else { continue };
            let (start, count) = new.split_once(',').unwrap_or((new, "1"));
            if let (Ok(start), Ok(count)) = (start.parse::<usize>(), count.parse::<usize>()) {
                added.entry(file).or_default().push(start..start + count);
            }
        }
    }
    added
}

/// What clippy has to say about code that is not generated, and that is ours:
/// newer versions of clippy find fault with older code.  Ours are the given
/// files, and the lines that the series adds to others.  Errors are reported
/// wherever they are.
fn clippy_findings<'a>(
    report: &'a str,
    files: &BTreeSet<PathBuf>,
    added: &BTreeMap<&str, Vec<Range<usize>>>,
) -> Vec<&'a str> {
    let is_ours = |finding: &str| {
        let mut words = finding.split(':');
        let (file, line) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        files.contains(Path::new(file))
            || added.get(file).is_some_and(|ranges| {
                line.parse()
                    .is_ok_and(|line| ranges.iter().any(|range| range.contains(&line)))
            })
    };
    report
        .lines()
        .filter(|line| line.contains(": warning: ") || line.contains(": error"))
        // Code that is generated is in the build directory, and has its whole path.
        .filter(|line| !line.starts_with('/'))
        .filter(|line| line.contains(": error") || is_ours(line))
        .collect()
}

/// The device promises not to have unsafe code, which the compiler checks; make
/// sure that the promise stays there.  Only the trace points, which QEMU
/// generates, are exempt, and that is why the device cannot `forbid` it.
fn no_unsafe(env: &Env) -> Result<()> {
    for (lib, promise) in [
        ("hw-virtio-balloon/src/lib.rs", "#![deny(unsafe_code)]"),
        (
            "hw-virtio-balloon/core/src/lib.rs",
            "#![forbid(unsafe_code)]",
        ),
    ] {
        let text = fs::read_to_string(env.repo.join(lib))?;
        ensure!(text.contains(promise), "{lib} does not have {promise}");
    }
    for (from, to) in mounted_files(env)? {
        if to.starts_with("rust/hw/virtio/balloon") && from.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&from)?;
            ensure!(
                !text.contains("allow(unsafe_code)") || to.ends_with("src/events.rs"),
                "{} allows unsafe code",
                to.display()
            );
            let found = text.lines().any(|line| {
                let code = line.split("//").next().unwrap_or("");
                code.replace("unsafe_code", "").contains("unsafe")
            });
            ensure!(!found, "{} contains unsafe code", to.display());
        }
    }
    Ok(())
}

/// Check that the crates that work with the guest's numbers are compiled with
/// overflow checks, which QEMU's build system turns off: the last option counts.
fn overflow_checks(ninja: &str) -> Result<()> {
    for name in ["virtio", "virtio_balloon", "virtio_balloon_core"] {
        let output = format!("/lib{name}.rlib: rust_COMPILER ");
        let args = ninja
            .lines()
            .skip_while(|line| !(line.starts_with("build ") && line.contains(&output)))
            .find_map(|line| line.strip_prefix(" ARGS = "))
            .with_context(|| format!("{name} is not compiled"))?;
        let last = args
            .split_whitespace()
            .rev()
            .find_map(|arg| arg.split_once("overflow-checks="));
        ensure!(
            last.is_some_and(|(_, value)| value == "yes"),
            "{name} is compiled without overflow checks"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_overflow_check_counts() {
        let ninja = |last: &str| {
            ["virtio", "virtio_balloon", "virtio_balloon_core"]
                .map(|name| {
                    format!(
                        "build rust/lib{name}.rlib: rust_COMPILER ../lib.rs | lib{name}.rlib\n \
                         ARGS = -C overflow-checks=no -C overflow-checks={last} ../lib.rs\n"
                    )
                })
                .concat()
        };
        overflow_checks(&ninja("yes")).unwrap();
        overflow_checks(&ninja("no")).unwrap_err();
        overflow_checks("").unwrap_err();
    }

    #[test]
    fn clippy_on_generated_and_old_code() {
        let diff = "\
diff --git a/rust/hw/core/src/qdev.rs b/rust/hw/core/src/qdev.rs
--- a/rust/hw/core/src/qdev.rs
+++ b/rust/hw/core/src/qdev.rs
@@ -3 +3,2 @@ context
@@ -600,0 +601 @@ context
+++ b/rust/qom/src/new.rs
@@ -0,0 +1,5 @@
";
        let added = added_lines(diff);
        assert_eq!(added["hw/core/src/qdev.rs"], [3..5, 601..602]);
        let report = "\
/b/out/bindings.inc.rs:1:1: error: x
hw/core/src/qdev.rs:2:12: warning: old
hw/core/src/qdev.rs:4:12: warning: added
hw/core/src/qdev.rs:600:12: error: denied
virtio/src/queue.rs:1:1: warning: new file
qom/src/lib.rs:1:1: warning: old
warning: `x` generated 3 warnings
";
        let files = [PathBuf::from("virtio/src/queue.rs")].into();
        assert_eq!(
            clippy_findings(report, &files, &added),
            [
                "hw/core/src/qdev.rs:4:12: warning: added",
                "hw/core/src/qdev.rs:600:12: error: denied",
                "virtio/src/queue.rs:1:1: warning: new file"
            ]
        );
    }
}
