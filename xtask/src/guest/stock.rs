// SPDX-License-Identifier: GPL-2.0-or-later

//! The QEMUs that Debian has

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use xshell::{cmd, Shell};

use super::SUITE;
use crate::{
    apt,
    debian::{release, unpack, write_program},
    env::{one_line, replace_dir, Env},
    run::RunQuiet,
    version::{DEVELOPMENT, QEMU},
};

/// The package with the QEMU
const PACKAGE: &str = "qemu-system-x86";

/// Runs a QEMU that was unpacked with all that it depends on: the C library of
/// this system is too old for it.
const WITH_LIBRARIES: &str = r#"usr=${0%/*}/usr
exec "$usr/lib64/ld-linux-x86-64.so.2" --inhibit-cache \
    --library-path "$usr/lib/x86_64-linux-gnu" "$usr/bin/qemu-system-x86_64" \
    -L "$usr/share/qemu" -L "$usr/share/seabios" "$@"
"#;

/// A QEMU that can be run, and its version
pub type Stock = (PathBuf, String);

/// The QEMUs of Debian, for migration from and to them: that of the distribution,
/// and the latest one.  `None` is one that cannot be used, and the user is told
/// why.
pub fn stock_qemu(env: &Env) -> [Option<Stock>; 2] {
    let latest = latest_qemu(env)
        .inspect_err(|err| {
            let why = one_line(err);
            env.say(&format!("no migration from and to the latest QEMU: {why}"));
        })
        .ok();
    [distribution_qemu(env), latest]
}

/// The QEMU of the distribution
fn distribution_qemu(env: &Env) -> Option<Stock> {
    let with_version = |path: PathBuf| qemu_version(&path).map(|version| (path, version));
    let path = PathBuf::from("/usr/bin/qemu-system-x86_64");
    let installed = with_version(path.clone());
    // The emulation of the CPU in QEMU 7.2 has bugs that recent kernels trigger.
    let is_old = |(_, version): &(_, String)| version.starts_with("7.");
    if installed.as_ref().is_some_and(|qemu| !is_old(qemu)) {
        return installed;
    }
    let newer = if release().is_ok_and(|release| release == SUITE) {
        backported_qemu(env)
    } else {
        apt::ensure_packages(env, &[PACKAGE]).map(|()| path)
    };
    let newer = newer.and_then(|qemu| with_version(qemu).context("it cannot be run here"));
    newer
        .inspect_err(|err| env.say(&format!("no newer QEMU of Debian: {}", one_line(err))))
        .ok()
        .or(installed)
}

/// The version of a QEMU; `None` if it cannot be run.
fn qemu_version(path: &Path) -> Option<String> {
    let sh = Shell::new().ok()?;
    let text = cmd!(sh, "{path} --version").read_quiet().ok()?;
    let version = text.strip_prefix("QEMU emulator version ")?;
    Some(version.split_whitespace().next()?.to_owned())
}

/// The QEMU of the backports suite.  It is not installed, as that would remove the
/// other one, but the libraries that it needs are.
fn backported_qemu(env: &Env) -> Result<PathBuf> {
    let suite = format!("{SUITE}-backports");
    let dir = env.cache.join("guest").join(format!("qemu-{suite}"));
    let path = dir.join("usr/bin/qemu-system-x86_64");
    if qemu_version(&path).is_none() {
        let tmp = env.temp_dir("qemu")?;
        let root = tmp.path().join("root");
        let repo = apt::Suite::new(env, &suite, "amd64")?;
        let deb = repo.download(env, PACKAGE)?;
        let sh = Shell::new()?;
        cmd!(sh, "dpkg-deb -x {deb} {root}").run_quiet()?;
        let depends = repo.depends(PACKAGE)?;
        let libraries = depends.iter().map(String::as_str);
        let libraries: Vec<_> = libraries.filter(|name| name.starts_with("lib")).collect();
        apt::ensure_packages(env, &libraries)?;
        replace_dir(&root, &dir)?;
    }
    Ok(path)
}

/// The QEMU of the development suite, unless the one that is tested is as new.
/// It has its own libraries.
fn latest_qemu(env: &Env) -> Result<Stock> {
    let dir = env.cache.join("guest").join(format!("qemu-{DEVELOPMENT}"));
    let path = dir.join("qemu");
    let version = || {
        qemu_version(&path)
            .with_context(|| format!("that of Debian {DEVELOPMENT} cannot be run here"))
    };
    if !version().is_ok_and(|version| is_newer(&version, QEMU.number)) {
        let tmp = env.temp_dir("qemu")?;
        let root = tmp.path().join("root");
        env.need_space(1)?;
        unpack(env, DEVELOPMENT, &root, &[PACKAGE])?;
        write_program(&root.join("qemu"), WITH_LIBRARIES)?;
        replace_dir(&root, &dir)?;
    }
    let version = version()?;
    ensure!(
        is_newer(&version, QEMU.number),
        "Debian {DEVELOPMENT} has {version}, which is not newer than {}",
        QEMU.number
    );
    Ok((path, version))
}

/// Whether a version like 11.1.3 is newer than another one
fn is_newer(version: &str, than: &str) -> bool {
    let numbers = |text: &str| -> Vec<u32> {
        let parts = text.split('.').map_while(|part| part.parse().ok());
        parts.collect()
    };
    numbers(version) > numbers(than)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_versions() {
        for newer in ["11.1.2", "11.1.10", "11.2.0", "12.0.0"] {
            assert!(is_newer(newer, "11.1.1"), "{newer}");
        }
        for not in ["", "11.1.1", "11.1.0", "11.0.9", "9.2.4"] {
            assert!(!is_newer(not, "11.1.1"), "{not}");
        }
    }
}
