// SPDX-License-Identifier: GPL-2.0-or-later

//! Makes the commits of the patched tree the patches

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{bail, ensure, Context, Result};
use xshell::{cmd, Shell};

use super::{envelopes::heading, parse};
use crate::{
    env::{remove, Env},
    run::RunQuiet,
    source::{in_worktree, mounted_files, patches_in, Source, BASE},
};

/// Make the commits of the patched tree the series: what was edited, reordered
/// or divided there with git becomes `patches/qemu`.  Returns how many patches
/// there are.
///
/// # Errors
///
/// Fails if something is not committed, or if a commit has a file that lives in
/// this checkout.
pub fn import(env: &Env) -> Result<usize> {
    let tree = Source::existing(env)?;
    let place = tree.dir.display();
    let sh = tree.git()?;
    for state in [
        "rebase-merge",
        "rebase-apply",
        "MERGE_HEAD",
        "CHERRY_PICK_HEAD",
    ] {
        ensure!(
            !tree.dir.join(".git").join(state).exists(),
            "git is in the middle of something in {place}: finish it first"
        );
    }
    let mounted: BTreeSet<_> = mounted_files(env)?.into_iter().map(|file| file.1).collect();
    let is_ours = |path: &str| mounted.contains(Path::new(path));
    let edited = cmd!(sh, "git diff --name-only HEAD").read_quiet()?;
    if let Some(file) = edited.lines().find(|file| !is_ours(file)) {
        bail!("{file} is edited, but not committed in {place}: commit or discard it first");
    }
    cmd!(sh, "git merge-base --is-ancestor {BASE} HEAD")
        .run_quiet()
        .with_context(|| format!("the commit in {place} is not based on the tag {BASE}"))?;
    let committed = cmd!(sh, "git diff --name-only {BASE} HEAD").read_quiet()?;
    if let Some(file) = committed.lines().find(|file| is_ours(file)) {
        bail!("a commit in {place} has {file}, which is a file of this checkout: leave it out");
    }

    let dir = env.temp_dir("series")?;
    let tmp = dir.path();
    format_patches(&sh, &tmp.join("tree"), tmp)?;
    let patches = patches_in(tmp)?;
    ensure!(!patches.is_empty(), "there are no commits in {place}");

    let ours = env.repo.join("patches/qemu");
    let list = env.repo.join("patches/series");
    let names: Vec<_> = patches
        .iter()
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    let (text, lost) = renumber(&fs::read_to_string(&list)?, &names);
    for old in patches_in(&ours)? {
        remove(&old)?;
    }
    for (patch, name) in patches.iter().zip(&names) {
        fs::copy(patch, ours.join(name))?;
    }
    fs::write(&list, text)?;
    tree.series_is_applied(env)?;
    for path in lost {
        eprintln!("patches/series lacks {path}: its patch has another subject now");
    }
    Ok(names.len())
}

/// Write the commits of the tree as patches for the pristine source.  The tree has
/// other patches below them, by which lines would be shifted.
fn format_patches(sh: &Shell, scratch: &Path, out: &Path) -> Result<()> {
    in_worktree(sh, scratch, "HEAD", |inner| {
        cmd!(inner, "git rebase -q --onto pristine {BASE}")
            .run_quiet()
            .context(
                "the commits depend on patches/libvirt or patches/debian-source, which are not \
                 part of the series",
            )?;
        cmd!(
            inner,
            "git format-patch -q --abbrev=7 --no-signature --zero-commit -N -o {out} pristine"
        )
        .run_quiet()
    })
}

/// The list of patches for new names, and the lines of the old list for which
/// there is no patch: patches are the same if they are but for the number.  An
/// envelope begins with the patch with which it began before.
fn renumber(old: &str, names: &[String]) -> (String, Vec<String>) {
    fn subject(name: &str) -> &str {
        name.split_once('-').map_or(name, |(_, rest)| rest)
    }
    let mut paths: BTreeMap<_, _> = parse(old)
        .into_iter()
        .filter(|step| !step.paths.is_empty())
        .map(|step| {
            let all: Vec<_> = step.paths.iter().map(|p| p.display().to_string()).collect();
            (subject(&step.patch).to_owned(), all.join(" "))
        })
        .collect();
    let mut headings = BTreeMap::new();
    let mut lines = old.lines().filter(|line| !line.is_empty());
    while let Some(line) = lines.next() {
        if heading(line).is_some() {
            let first = lines.next().and_then(|patch| patch.split(' ').next());
            headings.insert(subject(first.unwrap_or_default()), line);
        }
    }
    let mut text = String::new();
    for comment in old.lines().take_while(|line| line.starts_with('#')) {
        text += comment;
        text.push('\n');
    }
    let width = names.iter().map(String::len).max().unwrap_or(0);
    for name in names {
        if let Some(line) = headings.remove(subject(name)) {
            text += &format!("\n{line}\n");
        }
        let with = paths.remove(subject(name)).unwrap_or_default();
        text += format!("{name:width$} {with}").trim_end();
        text.push('\n');
    }
    let lost = headings.into_values().map(str::to_owned);
    (text, paths.into_values().chain(lost).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imported_patches_keep_their_files() {
        let old = "# why\n# how\n\n[1-a]\n0001-a.patch\n\n[2-b] 1-a\n0002-b.patch x y/z\n\n[3-c]\n\
                   0003-c.patch w\n";
        let names = ["0001-b.patch", "0002-new-one.patch", "0003-a.patch"].map(str::to_owned);
        let (text, lost) = renumber(old, &names);
        assert_eq!(
            text,
            "# why\n# how\n\n[2-b] 1-a\n0001-b.patch       x y/z\n0002-new-one.patch\n\n[1-a]\n\
             0003-a.patch\n"
        );
        assert_eq!(lost, ["w", "[3-c]"]);
    }
}
