// SPDX-License-Identifier: GPL-2.0-or-later

//! `cargo xtask install`: a QEMU for use outside of tests, below a directory of
//! its own

mod domain;
mod features;
mod prefix;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{anyhow, ensure, Context, Result};
use serde::Deserialize;
use xshell::cmd;

pub use self::domain::{apparmor_commands, domain};
use self::prefix::Prefix;
use crate::{
    apt,
    build::{firmware, Build, Target},
    env::{one_line, Env},
    preflight::Needs,
    run::RunQuiet,
    top,
};

/// What meson writes on something that can be built
#[derive(Deserialize)]
struct MesonTarget {
    installed: bool,
    filename: Vec<PathBuf>,
}

/// Where it is installed if the user does not say
pub const DEFAULT_PREFIX: &str = "/opt/qemu-virtio-balloon-rs";

/// Debian's packages that it takes in addition to those for tests
fn packages(options: &[String]) -> Vec<&'static str> {
    let mut packages = features::packages(options);
    packages.push("chrpath");
    packages
}

/// What it takes to do so
///
/// # Errors
///
/// Fails if the directory cannot be one.
pub fn needs(dir: &Path, options: &[String]) -> Result<Needs> {
    Ok(Needs {
        problems: Prefix::new(dir)?.problems()?,
        ..Needs::build().with(&packages(options))
    })
}

/// Build QEMU with all features, and install it.  Returns what the user puts
/// into a domain of libvirt.
///
/// # Errors
///
/// Fails if the directory cannot be used, or QEMU cannot be built; then what was
/// installed before is still there.
pub fn install(env: &Env, dir: &Path, target: Target, options: &[String]) -> Result<String> {
    let prefix = Prefix::new(dir)?;
    apt::ensure_packages(env, &packages(options))?;
    let configure = features::configure_options(&prefix.dir, options);
    let build =
        Build::prepare_full(env, target, configure).map_err(|err| {
            match features::advice(&format!("{err:#}")) {
                Some(advice) => anyhow!("{}: {advice}", one_line(&err)),
                None => err,
            }
        })?;
    build.ninja(env, &installed_targets(&build)?)?;

    env.say(&format!("installing into {}", prefix.dir.display()));
    prefix.replace(|staging| {
        let (sh, meson) = (build.shell()?, build.meson());
        env.run(
            "installing QEMU",
            cmd!(sh, "{meson} install --no-rebuild").env("DESTDIR", staging),
        )?;
        let tree = prefix.below(staging);
        copy_firmware(&tree)?;
        top::install(env, &tree)?;
        let qemu = tree.join("bin").join(build.qemu_name());
        // meson adds the directory of Rust's libraries, which nobody but the one who
        // builds has, and of which QEMU needs none.
        cmd!(sh, "chrpath -d {qemu}").run_quiet()?;
        // It works from anywhere.
        cmd!(sh, "{qemu} --version").run_quiet()?;
        Ok(tree)
    })?;
    let emulator = prefix.dir.join("bin").join(build.qemu_name());
    Ok(domain::instructions(&prefix.dir, &emulator, target))
}

/// What is installed: a third of what is built if nothing is named, which has
/// QEMU's tests.
fn installed_targets(build: &Build) -> Result<Vec<String>> {
    // If its files have changed, meson looks for libraries again, and can find more
    // than before.
    let sh = build.shell()?;
    cmd!(sh, "ninja build.ninja").run_quiet()?;
    let json = fs::read_to_string(build.dir.join("meson-info/intro-targets.json"))
        .context("meson has not written what it builds")?;
    let targets: Vec<MesonTarget> = serde_json::from_str(&json)?;
    let files = targets
        .into_iter()
        .filter(|target| target.installed)
        .flat_map(|target| target.filename)
        .filter_map(|path| Some(path.strip_prefix(&build.dir).ok()?.display().to_string()));
    // The first one is what the user is told.
    Ok([build.qemu_name()].into_iter().chain(files).collect())
}

/// Where QEMU for PCs was installed
///
/// # Errors
///
/// Fails if it was not.
pub fn emulator(prefix: &Path) -> Result<PathBuf> {
    let name = format!("qemu-system-{}", Target::X86_64.name());
    let path = Prefix::new(prefix)?.dir.join("bin").join(name);
    ensure!(
        path.exists(),
        "{} is not installed: run cargo xtask install, or name another --prefix",
        path.display()
    );
    Ok(path)
}

/// Put the firmware that QEMU needs where it looks for it.  These are copies, so
/// that an installation does not change with Debian's packages.
fn copy_firmware(tree: &Path) -> Result<()> {
    let data = tree.join("share/qemu");
    let files = firmware()?;
    ensure!(
        files.iter().any(|path| path.ends_with("bios-256k.bin")),
        "there is no firmware for guests: Debian's packages seabios, ipxe-qemu and \
         qemu-system-data have it"
    );
    for path in files {
        let dest = data.join(path.file_name().unwrap_or_default());
        // QEMU brings some data of its own, which fits it.
        if !dest.exists() {
            fs::copy(&path, &dest).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

/// Remove what was installed; returns files that somebody else has put there.
///
/// # Errors
///
/// Fails if nothing was installed there, or a file cannot be removed.
pub fn uninstall(dir: &Path) -> Result<Vec<PathBuf>> {
    Prefix::new(dir)?.remove()
}
