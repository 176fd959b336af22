// SPDX-License-Identifier: GPL-2.0-or-later

//! What runs in seconds: unit tests, lints, formatting

use std::fs;

use anyhow::{ensure, Context, Result};
use xshell::cmd;

use super::results::{meson_test, Count, PASS};
use crate::{
    build::{Build, Device, Target},
    env::Env,
    run::{shell_in, RunQuiet},
    source::mounted_files,
};

/// The crates in QEMU's tree that the series adds or changes
const CRATES: &[&str] = &[
    "common",
    "hpet",
    "hwcore",
    "migration",
    "qemu_macros",
    "qom",
    "system",
    "util",
    "virtio",
    "virtio_balloon",
    "virtio_balloon_core",
];

pub fn unit(env: &Env) -> Result<Count> {
    let tests = cargo(
        env,
        "unit tests of the workspace",
        &["test", "--workspace", "--locked"],
    )?;
    let lines_with = |result: &str| tests.lines().filter(|line| line.ends_with(result)).count();
    // If one fails, cargo does.
    let mut count = Count {
        passed: lines_with(" ... ok"),
        skipped: lines_with(" ... ignored"),
        ..Count::default()
    };
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

    let repo = shell_in(&env.repo)?;
    env.run(
        "unit tests of qemu-balloon-top",
        cmd!(repo, "python3 -B -m unittest discover -s balloon-top/tests"),
    )?;
    count += PASS;

    let build = Build::prepare(env, Device::Rust, Target::X86_64, None)?;
    count += meson_test(env, &build, "Rust unit tests", &["--suite", "rust"], &[])?;
    overflow_checks(&fs::read_to_string(build.dir.join("build.ninja"))?)?;
    count += PASS;

    clippy_in_qemu(env, &build)?;
    count += PASS;

    let sh = build.shell()?;
    let config = build.source.dir.join("rust/rustfmt.toml");
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

/// Run clippy with QEMU's lints.
fn clippy_in_qemu(env: &Env, build: &Build) -> Result<()> {
    env.say("clippy with QEMU's lints on the crates in QEMU's tree");
    let (sh, meson, dir) = (build.shell()?, build.meson(), &build.dir);
    let rust = build.source.dir.join("rust");
    let packages = CRATES.iter().map(|name| format!("-p{name}"));
    // cargo in QEMU's workspace, which needs the bindings that meson has generated,
    // and the trace points, which the tests do not
    let trace = ["hw_timer", "hw_virtio"].map(|name| format!("trace/trace-{name}.rs"));
    build.ninja(env, &trace)?;
    // The bindings themselves are not for clippy; the trace points are part of the
    // device, and some have many arguments.
    cmd!(
        sh,
        "{meson} devenv -C {dir} --workdir {rust} cargo clippy --offline --locked --quiet
         --no-deps {packages...} -- -Dwarnings -Aclippy::too_many_arguments"
    )
    .env("CARGO_HOME", env.cache.join("cargo-home"))
    .env("CARGO_TARGET_DIR", dir.join("cargo-target"))
    .run_quiet()
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
                !text.contains("allow(unsafe_code)") || to.ends_with("src/trace.rs"),
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
}
