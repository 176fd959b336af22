// SPDX-License-Identifier: GPL-2.0-or-later

//! Checks what is exported

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use xshell::{cmd, Shell};

use super::{export, style::check_style};
use crate::{
    build::{Build, Device, Target},
    env::Env,
    run::RunQuiet,
    source::{in_worktree, local_patches, mounted_files, patches_in, Source},
};

/// Check that the exported series applies to the pristine source and results in
/// the tree that was built, and that the patches are in QEMU's style.  Returns
/// the number of patches.
///
/// With `each`, QEMU is also built after every patch, with and without Rust.
///
/// # Errors
///
/// Fails if any of this is not so.
pub fn check(env: &Env, each: bool) -> Result<usize> {
    let source = Source::prepare(env, None)?;
    let tmp = env.temp_dir("check")?;
    let out = tmp.path().join("patches");
    let count = export(env, &out)?;
    env.say("applying the series to the pristine source");

    let scratch = tmp.path().join("tree");
    let sh = source.git()?;
    let patches = patches_in(&out)?;
    let added = in_worktree(&sh, &scratch, "pristine", |inner| {
        check_result(env, inner, &source, &scratch, &patches)
    })?;
    check_maintainers(&sh, &added)?;
    check_style(env, &sh, &patches)?;
    if each {
        build_each(env, &source, &patches)?;
    }
    Ok(count)
}

/// Check that the patches result in the tree that is built, and return the
/// files that they add.
fn check_result(
    env: &Env,
    inner: &Shell,
    source: &Source,
    scratch: &Path,
    patches: &[PathBuf],
) -> Result<Vec<String>> {
    let sh = source.git()?;
    cmd!(inner, "git am -q {patches...}").run_quiet()?;

    // What is checked out (with the patches that are not for upstream) and mounted
    let changed = cmd!(inner, "git diff --name-only pristine HEAD").read_quiet()?;
    let changed: BTreeSet<_> = changed.lines().collect();
    let built = cmd!(sh, "git diff --name-only pristine HEAD").read_quiet()?;
    let local = local_patches(env)?;
    let local = cmd!(sh, "git apply --numstat {local...}").read_quiet()?;
    let local: BTreeSet<_> = local
        .lines()
        .filter_map(|line| line.split('\t').nth(2))
        .collect();

    for file in &changed {
        let (a, b) = (scratch.join(file), source.dir.join(file));
        let same = if local.contains(file) {
            true
        } else if a.is_symlink() {
            fs::read_link(&a)? == fs::read_link(&b)?
        } else {
            fs::read(&a)? == fs::read(&b).with_context(|| format!("{file} is not in the tree"))?
        };
        ensure!(same, "{file} differs from the tree that was built");
    }
    for file in built.lines() {
        ensure!(
            changed.contains(file) || local.contains(file),
            "{file} is changed in the tree, but not by the series"
        );
    }
    for (_, to) in mounted_files(env)? {
        let exists = fs::symlink_metadata(scratch.join(&to)).is_ok();
        ensure!(exists, "{} is missing", to.display());
    }
    let added = cmd!(inner, "git diff --name-only --diff-filter=A pristine HEAD").read_quiet()?;
    Ok(added.lines().map(str::to_owned).collect())
}

/// Check that `MAINTAINERS` has an entry for each new file, apart from those
/// for lists that get a copy of all patches.  `checkpatch.pl` only asks.
fn check_maintainers(sh: &Shell, files: &[String]) -> Result<()> {
    let mut orphans = Vec::new();
    for file in files {
        let sections = cmd!(
            sh,
            "perl scripts/get_maintainer.pl --nogit --nogit-fallback --subsystem --norolestats
             --noemail --nol --noweb --noscm -f {file}"
        )
        .read_quiet()?;
        if sections.lines().all(|line| line.ends_with(" CC here")) {
            orphans.push(file.as_str());
        }
    }
    ensure!(
        orphans.is_empty(),
        "MAINTAINERS has no section with: {}",
        orphans.join(", ")
    );
    Ok(())
}

/// Build QEMU after each patch, with and without Rust.
fn build_each(env: &Env, source: &Source, patches: &[PathBuf]) -> Result<()> {
    env.need_space(8)?;
    let root = env.temp_dir("each")?;
    let result = (|| {
        let tree = source.pristine_worktree(env, root.path())?;
        let sh = tree.git()?;
        let builds = [Device::C, Device::Rust].map(|device| {
            Build::configured(env, root.path(), tree.clone(), device, Target::X86_64)
        });
        let builds = builds.into_iter().collect::<Result<Vec<_>>>()?;
        for (i, patch) in patches.iter().enumerate() {
            let name = patch.file_name().unwrap_or_default().to_string_lossy();
            env.say(&format!("patch {} of {}: {name}", i + 1, patches.len()));
            cmd!(sh, "git am -q --keep-cr {patch}").run_quiet()?;
            let changed = cmd!(sh, "git diff --name-only HEAD~1 HEAD").read_quiet()?;
            for build in &builds {
                if changed.contains("rust/qemu-macros/") {
                    build.forget_crates()?;
                }
                build.ninja(env, &[build.qemu_name()]).with_context(|| {
                    format!(
                        "QEMU cannot be built {} Rust after {name}",
                        match build.device {
                            Device::C => "without",
                            Device::Rust => "with",
                        }
                    )
                })?;
            }
        }
        Ok(())
    })();
    root.close()?;
    let sh = source.git()?;
    cmd!(sh, "git worktree prune").run_quiet()?;
    result
}
