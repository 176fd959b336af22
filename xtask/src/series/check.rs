// SPDX-License-Identifier: GPL-2.0-or-later

//! Checks what is exported

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    slice::from_ref,
};

use anyhow::{ensure, Context, Result};
use xshell::{cmd, Shell};

use super::{
    envelopes::{choose, envelopes, Envelope},
    export,
    style::check_style,
};
use crate::{
    build::{qtest_program, Build, Device, Target},
    env::Env,
    hugepages::{HugePages, FOR_QTESTS},
    run::RunQuiet,
    source::{in_worktree, local_patches, mounted_files, Source},
};

/// How much is built
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth<'a> {
    /// Nothing
    Apply,
    /// QEMU with each envelope and those that it builds on; if there are names,
    /// only with these
    Envelopes(&'a [String]),
    /// QEMU after each patch
    Patches,
}

/// Check that the exported series applies to the pristine source and results in
/// the tree that was built, that each envelope applies with those that it builds
/// on alone, and that the patches are in QEMU's style.  Returns the number of
/// patches.
///
/// What is built is built with and without Rust, and `run_qtests` is called with
/// the build and the programs of qtests that are new or changed.
///
/// # Errors
///
/// Fails if any of this is not so.
pub fn check(
    env: &Env,
    depth: Depth<'_>,
    mut run_qtests: impl FnMut(&Build, &[&str]) -> Result<()>,
) -> Result<()> {
    let source = Source::prepare(env, None)?;
    let tmp = env.temp_dir("check")?;
    let out = tmp.path().join("patches");
    let patches = export(env, &out, &[])?;
    env.say("applying the series to the pristine source");

    let scratch = tmp.path().join("tree");
    let sh = source.git()?;
    let added = in_worktree(&sh, &scratch, "pristine", |inner| {
        check_result(env, inner, &source, &scratch, &patches)
    })?;
    check_maintainers(&sh, &added)?;
    check_style(env, &sh, &patches)?;

    env.say("applying each envelope to the pristine source");
    let all = envelopes(&fs::read_to_string(env.repo.join("patches/series"))?)?;
    let mut sequences = Vec::new();
    for envelope in &all {
        let mut sequence = Vec::new();
        for Envelope { patches: range, .. } in choose(&all, from_ref(&envelope.name))? {
            sequence.extend_from_slice(&patches[range.clone()]);
        }
        sequences.push((envelope, sequence));
    }
    in_worktree(&sh, &scratch, "pristine", |inner| {
        for (envelope, sequence) in &sequences {
            cmd!(inner, "git reset -q --hard pristine").run_quiet()?;
            cmd!(inner, "git am -q {sequence...}")
                .run_quiet()
                .with_context(|| format!("{} does not apply", envelope.name))?;
        }
        Ok(())
    })?;
    println!(
        "the {} patches of the series apply and result in the same tree, and each of the {} \
         envelopes applies with those that it builds on",
        patches.len(),
        all.len()
    );

    match depth {
        Depth::Apply => {}
        Depth::Envelopes(names) => {
            // An unknown name is an error.
            choose(&all, names)?;
            sequences.retain(|(envelope, _)| names.is_empty() || names.contains(&envelope.name));
            let stages: Vec<_> = sequences
                .iter()
                .map(|(envelope, sequence)| {
                    let (bases, own) = sequence.split_at(sequence.len() - envelope.patches.len());
                    Stage {
                        name: envelope.name.clone(),
                        bases: Some(bases),
                        own,
                    }
                })
                .collect();
            build_stages(env, &source, &stages, &mut run_qtests)?;
        }
        Depth::Patches => {
            let stages: Vec<_> = patches
                .iter()
                .map(|patch| Stage {
                    name: patch
                        .file_name()
                        .unwrap_or_default()
                        .to_string_lossy()
                        .into(),
                    bases: None,
                    own: from_ref(patch),
                })
                .collect();
            build_stages(env, &source, &stages, &mut run_qtests)?;
        }
    }
    Ok(())
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
    check_kconfig(inner)?;
    for (_, to) in mounted_files(env)? {
        let exists = fs::symlink_metadata(scratch.join(&to)).is_ok();
        ensure!(exists, "{} is missing", to.display());
    }
    let added = cmd!(inner, "git diff --name-only --diff-filter=A pristine HEAD").read_quiet()?;
    Ok(added.lines().map(str::to_owned).collect())
}

/// Check that either device can be built in a QEMU with Rust.
fn check_kconfig(tree: &Shell) -> Result<()> {
    const C: &str = "CONFIG_VIRTIO_BALLOON_C=y";
    const RUST: &str = "CONFIG_X_VIRTIO_BALLOON_RUST=y";
    for (devices, host, expected) in [
        ("", "CONFIG_HAVE_RUST=n", C),
        ("", "CONFIG_HAVE_RUST=y", RUST),
        (C, "CONFIG_HAVE_RUST=y", C),
    ] {
        tree.write_file("xtask.mak", format!("CONFIG_PCI_DEVICES=y\n{devices}\n"))?;
        let config = cmd!(
            tree,
            "python3 scripts/minikconf.py --defconfig xtask.out xtask.d xtask.mak Kconfig
             CONFIG_LINUX=y CONFIG_FDT=y CONFIG_TCG=y CONFIG_X86_64=y {host}"
        )
        .read_quiet()?;
        let chosen: Vec<_> = config.lines().filter(|l| [C, RUST].contains(l)).collect();
        ensure!(
            chosen == [expected],
            "with {host} and \"{devices}\", QEMU is built with {chosen:?}"
        );
    }
    Ok(())
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

/// A tree that is built
struct Stage<'a> {
    /// For what is told to the user
    name: String,
    /// If there are any, the tree is the pristine source with these patches and
    /// then `own`; otherwise, it is that of the last stage with `own`.
    bases: Option<&'a [PathBuf]>,
    /// The patches whose tests are run
    own: &'a [PathBuf],
}

/// Build QEMU with and without Rust in each stage, and run the qtests that are
/// new or changed.  Only what has changed is built again.
fn build_stages(
    env: &Env,
    source: &Source,
    stages: &[Stage<'_>],
    run_qtests: &mut impl FnMut(&Build, &[&str]) -> Result<()>,
) -> Result<()> {
    env.need_space(8)?;
    let root = env.temp_dir("stages")?;
    let _pages = HugePages::reserve(env, FOR_QTESTS);
    let result = (|| {
        let tree = source.pristine_worktree(env, root.path())?;
        let sh = tree.git()?;
        let head = || cmd!(sh, "git rev-parse HEAD").read_quiet();
        let am = |patches: &[PathBuf]| match patches {
            [] => Ok(()),
            patches => cmd!(sh, "git am -q --keep-cr {patches...}").run_quiet(),
        };
        let pristine = head()?;
        let mut builds = Vec::new();
        for (i, Stage { name, bases, own }) in stages.iter().enumerate() {
            env.say(&format!("stage {} of {}: {name}", i + 1, stages.len()));
            let last = head()?;
            if let Some(bases) = bases {
                cmd!(sh, "git reset -q --hard {pristine}").run_quiet()?;
                am(bases)?;
            }
            let before = head()?;
            am(own)?;
            if builds.is_empty() {
                for device in [Device::C, Device::Rust] {
                    let tree = tree.clone();
                    builds.push(Build::configured(
                        env,
                        root.path(),
                        tree,
                        device,
                        Target::X86_64,
                    )?);
                }
            }
            let changed = cmd!(sh, "git diff --name-only {last} HEAD").read_quiet()?;
            let files =
                cmd!(sh, "git diff --name-only --diff-filter=AM {before} HEAD").read_quiet()?;
            for build in &builds {
                if changed.contains("rust/qemu-macros/") {
                    build.forget_crates()?;
                }
                build.build_qemu(env).with_context(|| {
                    let how = match build.device {
                        Device::C => "without",
                        Device::Rust => "with",
                    };
                    format!("QEMU cannot be built {how} Rust after {name}")
                })?;
                run_qtests(build, &qtests_among(&files))?;
            }
        }
        Ok(())
    })();
    root.close()?;
    let sh = source.git()?;
    cmd!(sh, "git worktree prune").run_quiet()?;
    result
}

/// The programs of qtests among files
fn qtests_among(files: &str) -> Vec<&str> {
    files
        .lines()
        .filter_map(|file| qtest_program(file.strip_prefix("tests/qtest/")?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qtests_among_files() {
        let files = "tests/qtest/a-test.c\ntests/qtest/b.c\ntests/unit/c-test.c\ndocs/d.rst\n\
                     tests/qtest/e-qos-test.c";
        assert_eq!(qtests_among(files), ["a-test", "qos-test"]);
    }
}
