// SPDX-License-Identifier: GPL-2.0-or-later

//! The QEMU that Debian has

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xshell::{cmd, Shell};

use super::SUITE;
use crate::{
    apt,
    debian::release,
    env::{one_line, replace_dir, Env},
    run::RunQuiet,
};

/// The QEMU of the distribution, for migration from and to it, and its version;
/// `None` if there is none that could be used.
pub fn stock_qemu(env: &Env) -> Option<(PathBuf, String)> {
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
        apt::ensure_packages(env, &["qemu-system-x86"]).map(|()| path)
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
    const PACKAGE: &str = "qemu-system-x86";
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
