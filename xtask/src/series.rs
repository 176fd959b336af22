// SPDX-License-Identifier: GPL-2.0-or-later

//! Exports the project as a series of patches for an unmodified QEMU
//!
//! `patches/qemu` only edits files that QEMU has.  The files that are new are
//! added to the patch that `patches/series` names for them, so that QEMU can be
//! built after each patch.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use xshell::{cmd, Shell};

use crate::{
    env::{remove, Env},
    source::{mounted_files, RunQuiet, Source},
};

/// A line of `patches/series`: a patch, and the directories in QEMU's tree whose
/// new files go with it
#[derive(Debug, PartialEq, Eq)]
struct Step {
    patch: String,
    dirs: Vec<PathBuf>,
}

fn parse(text: &str) -> Vec<Step> {
    text.lines()
        .map(|line| line.split('#').next().unwrap_or(""))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some(Step {
                patch: words.next()?.to_owned(),
                dirs: words.map(PathBuf::from).collect(),
            })
        })
        .collect()
}

fn steps(env: &Env) -> Result<Vec<Step>> {
    let dir = env.repo.join("patches");
    let steps = parse(&fs::read_to_string(dir.join("series"))?);
    let named: Vec<_> = steps
        .iter()
        .map(|s| dir.join("qemu").join(&s.patch))
        .collect();
    ensure!(
        named == crate::source::patches_in(&dir.join("qemu"))?,
        "patches/series does not list exactly the files in patches/qemu, in order"
    );
    Ok(steps)
}

/// Check the pristine source out to `dir`, as far as the patches need it: all of
/// it takes a minute.
fn add_worktree(
    sh: &Shell,
    dir: &Path,
    patches: &[PathBuf],
    more: impl IntoIterator<Item = PathBuf>,
) -> Result<()> {
    let edited = cmd!(sh, "git apply --numstat {patches...}")
        .quiet()
        .read()?;
    let patterns: BTreeSet<_> = edited
        .lines()
        .filter_map(|line| Path::new(line.split('\t').nth(2)?).parent())
        .map(Path::to_owned)
        .chain(more)
        .map(|path| match path.to_string_lossy().as_ref() {
            "" => "/*\n!/*/\n".to_owned(),
            path => format!("/{path}/\n"),
        })
        .collect();

    remove(dir)?;
    cmd!(sh, "git worktree prune").run_quiet()?;
    cmd!(
        sh,
        "git worktree add -q --no-checkout --detach {dir} pristine"
    )
    .run_quiet()?;
    let inner = sh.clone();
    inner.change_dir(dir);
    cmd!(inner, "git sparse-checkout set --no-cone --stdin")
        .stdin(patterns.into_iter().collect::<String>())
        .run_quiet()?;
    cmd!(inner, "git checkout -q").run_quiet()
}

/// Write the series to a directory, which must not contain patches.  Returns
/// how many there are.
///
/// # Errors
///
/// Fails if the series does not apply, or misses files of this checkout.
pub fn export(env: &Env, out: &Path) -> Result<usize> {
    let source = Source::prepare(env, None)?;
    let steps = steps(env)?;
    let mut files = mounted_files(env)?;

    fs::create_dir_all(out)?;
    let out = fs::canonicalize(out)?;
    ensure!(
        crate::source::patches_in(&out)?.is_empty(),
        "{} contains patches already",
        out.display()
    );

    let scratch = source.dir.with_extension("series");
    let sh = source.git()?;
    let edited: Vec<_> = steps
        .iter()
        .map(|step| env.repo.join("patches/qemu").join(&step.patch))
        .collect();
    let dirs = steps.iter().flat_map(|step| step.dirs.clone());
    add_worktree(&sh, &scratch, &edited, dirs)?;

    let result = (|| {
        let inner = sh.clone();
        inner.change_dir(&scratch);
        for step in &steps {
            let patch = env.repo.join("patches/qemu").join(&step.patch);
            cmd!(inner, "git am -q {patch}")
                .run_quiet()
                .with_context(|| format!("{} does not apply", step.patch))?;
            let (add, rest): (Vec<_>, Vec<_>) = files
                .drain(..)
                .partition(|(_, to)| step.dirs.iter().any(|dir| to.starts_with(dir)));
            files = rest;
            if add.is_empty() {
                ensure!(step.dirs.is_empty(), "no files for {}", step.patch);
                continue;
            }
            for (from, to) in add {
                let dest = scratch.join(to);
                if let Some(dir) = dest.parent() {
                    fs::create_dir_all(dir)?;
                }
                remove(&dest)?;
                cmd!(inner, "cp -P {from} {dest}").run_quiet()?;
            }
            cmd!(inner, "git add -A -f .").run_quiet()?;
            cmd!(inner, "git commit -q --amend --no-edit").run_quiet()?;
        }
        ensure!(
            files.is_empty(),
            "patches/series does not say with which patch {} goes",
            files[0].1.display()
        );
        cmd!(
            inner,
            "git format-patch -q --no-signature --zero-commit -o {out} pristine"
        )
        .run_quiet()
    })();
    cmd!(sh, "git worktree remove --force {scratch}").run_quiet()?;
    result?;
    Ok(crate::source::patches_in(&out)?.len())
}

/// Check that the exported series applies to the pristine source and results in
/// the tree that was built, and that the patches are in QEMU's style.  Returns
/// the number of patches.
///
/// # Errors
///
/// Fails if any of this is not so.
pub fn check(env: &Env) -> Result<usize> {
    let source = Source::prepare(env, None)?;
    let out = env.cache.join("series-check");
    remove(&out)?;
    let count = export(env, &out)?;
    env.say("applying the series to the pristine source");

    let scratch = source.dir.with_extension("check");
    let sh = source.git()?;
    let patches = crate::source::patches_in(&out)?;
    add_worktree(&sh, &scratch, &patches, [])?;
    let result = check_in(env, &sh, &source, &scratch, &out);
    cmd!(sh, "git worktree remove --force {scratch}").run_quiet()?;
    result?;
    remove(&out)?;
    Ok(count)
}

fn check_in(env: &Env, sh: &Shell, source: &Source, scratch: &Path, out: &Path) -> Result<()> {
    let patches = crate::source::patches_in(out)?;
    let inner = sh.clone();
    inner.change_dir(scratch);
    let all = &patches;
    cmd!(inner, "git am -q {all...}").run_quiet()?;

    // What is checked out (with Debian's quirks on top, if any) and mounted
    let changed = cmd!(inner, "git diff --name-only pristine HEAD")
        .quiet()
        .read()?;
    let quirks = cmd!(sh, "git diff --name-only pristine HEAD")
        .quiet()
        .read()?;
    let ours = mounted_files(env)?;
    for file in changed.lines() {
        let (a, b) = (scratch.join(file), source.dir.join(file));
        let same = if a.is_symlink() {
            fs::read_link(&a)? == fs::read_link(&b)?
        } else {
            fs::read(&a)? == fs::read(&b).with_context(|| format!("{file} is not in the tree"))?
        };
        ensure!(same, "{file} differs from the tree that was built");
    }
    for file in quirks.lines() {
        let known = changed.lines().any(|f| f == file) || file == "meson.build";
        ensure!(
            known,
            "{file} is changed in the tree, but not by the series"
        );
    }
    for (_, to) in ours {
        ensure!(scratch.join(&to).exists(), "{} is missing", to.display());
    }

    env.say("checking the style of the patches");
    for patch in &patches {
        let name = patch.file_name().unwrap_or_default().to_string_lossy();
        // in the complete tree, which it insists on
        let report = cmd!(
            sh,
            "perl scripts/checkpatch.pl --terse --no-summary {patch}"
        )
        .quiet()
        .ignore_status()
        .read()?;
        let (warnings, errors): (Vec<_>, Vec<_>) = report
            .lines()
            .filter(|line| !is_expected(line))
            .partition(|line| line.contains("WARNING:"));
        for warning in warnings {
            env.say(warning);
        }
        ensure!(errors.is_empty(), "{name}:\n{}", errors.join("\n"));
    }
    Ok(())
}

/// Findings of checkpatch that are not about code: the patches are signed off
/// by those who send them, and MAINTAINERS is for the maintainers to decide.
fn is_expected(line: &str) -> bool {
    line.is_empty()
        || line.contains("Missing Signed-off-by")
        || line.contains("added, moved or deleted file(s)")
        // a link to the one of another crate
        || line.contains("build.rs' requires 'SPDX-License-Identifier'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifest() {
        let text = "# comment\n\n0001-a.patch\n0002-b.patch rust/virtio rust/x # why\n";
        assert_eq!(
            parse(text),
            [
                Step {
                    patch: "0001-a.patch".into(),
                    dirs: vec![]
                },
                Step {
                    patch: "0002-b.patch".into(),
                    dirs: vec!["rust/virtio".into(), "rust/x".into()]
                }
            ]
        );
    }

    #[test]
    fn only_formalities_are_expected() {
        assert!(is_expected(
            "x.patch:1: ERROR: Missing Signed-off-by: line(s)"
        ));
        assert!(!is_expected("x.patch:9: ERROR: trailing whitespace"));
    }
}
