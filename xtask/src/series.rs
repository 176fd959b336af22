// SPDX-License-Identifier: GPL-2.0-or-later

//! Exports the project as a series of patches for an unmodified QEMU
//!
//! `patches/qemu` only edits files that QEMU has.  The files that are new are
//! added to the patch that `patches/series` names for them, so that QEMU can be
//! built after each patch.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{anyhow, bail, ensure, Context, Result};
use xshell::{cmd, Shell};

use crate::{
    build::{Build, Device, Target},
    env::{remove, Env},
    source::{mounted_files, patches_in, quirks, RunQuiet, Source, BASE},
    version::QEMU,
};

/// The name of the cover letter.  It does not end in `.patch`, because `git am`
/// stops at a mail without a patch.
const COVER_LETTER: &str = "0000-cover-letter.txt";

/// A line of `patches/series`: a patch, and the files and directories in QEMU's
/// tree that are new with it
#[derive(Debug, PartialEq, Eq)]
struct Step {
    patch: String,
    paths: Vec<PathBuf>,
}

fn parse(text: &str) -> Vec<Step> {
    text.lines()
        .map(|line| line.split('#').next().unwrap_or(""))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some(Step {
                patch: words.next()?.to_owned(),
                paths: words.map(PathBuf::from).collect(),
            })
        })
        .collect()
}

/// Divide the new files among the patches.  A file goes with the patch that
/// names the longest part of its path, so that it can be named by itself although
/// its directory goes with another patch.
fn assign<'a>(
    steps: &[Step],
    files: &'a [(PathBuf, PathBuf)],
) -> Result<BTreeMap<usize, Vec<&'a (PathBuf, PathBuf)>>> {
    let mut result: BTreeMap<usize, Vec<_>> = BTreeMap::new();
    let mut used = BTreeSet::new();
    for file in files {
        let (step, path) = steps
            .iter()
            .enumerate()
            .flat_map(|(i, step)| step.paths.iter().map(move |path| (i, path)))
            .filter(|(_, path)| file.1.starts_with(path))
            .max_by_key(|(_, path)| path.components().count())
            .ok_or_else(|| {
                anyhow!(
                    "patches/series does not say with which patch {} goes",
                    file.1.display()
                )
            })?;
        used.insert(path);
        result.entry(step).or_default().push(file);
    }
    for step in steps {
        for path in &step.paths {
            ensure!(
                used.contains(path),
                "patches/series: there are no files for {} ({})",
                path.display(),
                step.patch
            );
        }
    }
    Ok(result)
}

fn steps(env: &Env) -> Result<Vec<Step>> {
    let dir = env.repo.join("patches");
    let steps = parse(&fs::read_to_string(dir.join("series"))?);
    let named: Vec<_> = steps
        .iter()
        .map(|s| dir.join("qemu").join(&s.patch))
        .collect();
    ensure!(
        named == patches_in(&dir.join("qemu"))?,
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
        .map(|parent| match parent.to_string_lossy().as_ref() {
            "" => "/*\n!/*/\n".to_owned(),
            path => format!("/{path}/\n"),
        })
        .chain(
            more.into_iter()
                .map(|path| format!("/{}\n", path.display())),
        )
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
    let steps = steps(env)?;
    let files = mounted_files(env)?;
    let new = assign(&steps, &files)?;
    let cover_letter = fs::read_to_string(env.repo.join("patches/cover-letter.txt"))
        .context("cannot read patches/cover-letter.txt")?;
    let existing = if out.exists() {
        patches_in(out)?
    } else {
        Vec::new()
    };
    ensure!(
        existing.is_empty(),
        "{} contains patches already; remove them, or name another directory",
        out.display()
    );

    let source = Source::prepare(env, None)?;
    let scratch = source.dir.with_extension("series");
    // The directory of the user gets all patches or none.
    let tmp = env.cache.join("series.tmp");
    remove(&tmp)?;
    let sh = source.git()?;
    let edited: Vec<_> = steps
        .iter()
        .map(|step| env.repo.join("patches/qemu").join(&step.patch))
        .collect();
    let paths = steps.iter().flat_map(|step| step.paths.clone());
    add_worktree(&sh, &scratch, &edited, paths)?;

    let result = (|| {
        let inner = sh.clone();
        inner.change_dir(&scratch);
        for (i, patch) in edited.iter().enumerate() {
            cmd!(inner, "git am -q {patch}")
                .run_quiet()
                .with_context(|| format!("{} does not apply", steps[i].patch))?;
            let Some(add) = new.get(&i) else {
                continue;
            };
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
        cmd!(
            inner,
            "git format-patch -q --no-signature --zero-commit --cover-letter -o {tmp} pristine"
        )
        .run_quiet()
    })();
    cmd!(sh, "git worktree remove --force {scratch}").run_quiet()?;
    result?;

    let draft = tmp.join("0000-cover-letter.patch");
    let letter = fill_in(&fs::read_to_string(&draft)?, &cover_letter)?;
    remove(&draft)?;
    let patches = patches_in(&tmp)?;
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    for patch in &patches {
        fs::copy(patch, out.join(patch.file_name().unwrap_or_default()))?;
    }
    fs::write(out.join(COVER_LETTER), letter)?;
    remove(&tmp)?;
    Ok(patches.len())
}

/// Put our text into the cover letter that git has made, and the commit on which
/// the patches are based at its end.
fn fill_in(draft: &str, text: &str) -> Result<String> {
    let (subject, body) = text
        .split_once("\n\n")
        .context("patches/cover-letter.txt needs a subject, an empty line and a text")?;
    let mut letter = draft.to_owned();
    for (placeholder, content) in [
        ("*** SUBJECT HERE ***", subject.trim()),
        ("*** BLURB HERE ***", body.trim()),
    ] {
        ensure!(
            letter.contains(placeholder),
            "the cover letter of git format-patch has no {placeholder}"
        );
        letter = letter.replacen(placeholder, content, 1);
    }
    let base = match QEMU.commit {
        Some(commit) => format!("base-commit: {commit}"),
        // The tarball does not tell the commit.
        None => format!("base: {}", QEMU.tag),
    };
    Ok(format!("{}\n\n{base}\n", letter.trim_end()))
}

/// Make the commits of the patched tree the series: what was edited, reordered or
/// divided there with git becomes `patches/qemu`.  Returns how many patches there
/// are.
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
    let edited = cmd!(sh, "git diff --name-only HEAD").quiet().read()?;
    if let Some(file) = edited.lines().find(|file| !is_ours(file)) {
        bail!("{file} is edited, but not committed in {place}: commit or discard it first");
    }
    cmd!(sh, "git merge-base --is-ancestor {BASE} HEAD")
        .run_quiet()
        .with_context(|| format!("the commit in {place} is not based on the tag {BASE}"))?;
    let committed = cmd!(sh, "git diff --name-only {BASE} HEAD")
        .quiet()
        .read()?;
    if let Some(file) = committed.lines().find(|file| is_ours(file)) {
        bail!("a commit in {place} has {file}, which is a file of this checkout: leave it out");
    }

    let tmp = env.cache.join("series.tmp");
    remove(&tmp)?;
    cmd!(
        sh,
        "git format-patch -q --no-signature --zero-commit -N -o {tmp} {BASE}"
    )
    .run_quiet()?;
    let patches = patches_in(&tmp)?;
    ensure!(!patches.is_empty(), "there are no commits in {place}");

    let dir = env.repo.join("patches/qemu");
    let list = env.repo.join("patches/series");
    let names: Vec<_> = patches
        .iter()
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    let (text, lost) = renumber(&fs::read_to_string(&list)?, &names);
    for old in patches_in(&dir)? {
        remove(&old)?;
    }
    for (patch, name) in patches.iter().zip(&names) {
        fs::copy(patch, dir.join(name))?;
    }
    fs::write(&list, text)?;
    tree.series_is_applied(env)?;
    remove(&tmp)?;
    for path in lost {
        eprintln!("add {path} to a line of patches/series: its patch has another subject now");
    }
    Ok(names.len())
}

/// The list of patches for new names, and the paths of the old list for which
/// there is no patch: patches are the same if they are but for the number.
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
    let mut text = String::new();
    for comment in old.lines().take_while(|line| line.starts_with('#')) {
        text += comment;
        text.push('\n');
    }
    let width = names.iter().map(String::len).max().unwrap_or(0);
    for name in names {
        let with = paths.remove(subject(name)).unwrap_or_default();
        text += format!("{name:width$} {with}").trim_end();
        text.push('\n');
    }
    (text, paths.into_values().collect())
}

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
    let out = env.cache.join("series-check");
    remove(&out)?;
    let count = export(env, &out)?;
    env.say("applying the series to the pristine source");

    let scratch = source.dir.with_extension("check");
    let sh = source.git()?;
    let patches = patches_in(&out)?;
    add_worktree(&sh, &scratch, &patches, [])?;
    let result = check_result(env, &sh, &source, &scratch, &patches);
    cmd!(sh, "git worktree remove --force {scratch}").run_quiet()?;
    check_maintainers(&sh, &result?)?;
    check_style(env, &sh, &patches)?;
    if each {
        build_each(env, &source, &patches)?;
    }
    remove(&out)?;
    Ok(count)
}

/// Check that the patches result in the tree that is built, and return the files
/// that they add.
fn check_result(
    env: &Env,
    sh: &Shell,
    source: &Source,
    scratch: &Path,
    patches: &[PathBuf],
) -> Result<Vec<String>> {
    let inner = sh.clone();
    inner.change_dir(scratch);
    cmd!(inner, "git am -q {patches...}").run_quiet()?;

    // What is checked out (with Debian's quirks on top, if any) and mounted
    let changed = cmd!(inner, "git diff --name-only pristine HEAD")
        .quiet()
        .read()?;
    let changed: BTreeSet<_> = changed.lines().collect();
    let built = cmd!(sh, "git diff --name-only pristine HEAD")
        .quiet()
        .read()?;
    let quirks = quirks(env)?;
    let quirks = cmd!(sh, "git apply --numstat {quirks...}").quiet().read()?;
    let quirks: BTreeSet<_> = quirks
        .lines()
        .filter_map(|line| line.split('\t').nth(2))
        .collect();

    for file in &changed {
        let (a, b) = (scratch.join(file), source.dir.join(file));
        let same = if quirks.contains(file) {
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
            changed.contains(file) || quirks.contains(file),
            "{file} is changed in the tree, but not by the series"
        );
    }
    for (_, to) in mounted_files(env)? {
        let exists = fs::symlink_metadata(scratch.join(&to)).is_ok();
        ensure!(exists, "{} is missing", to.display());
    }
    let added = cmd!(inner, "git diff --name-only --diff-filter=A pristine HEAD")
        .quiet()
        .read()?;
    Ok(added.lines().map(str::to_owned).collect())
}

/// Check that `MAINTAINERS` has an entry for each new file, apart from those for
/// lists that get a copy of all patches.  `checkpatch.pl` only asks.
fn check_maintainers(sh: &Shell, files: &[String]) -> Result<()> {
    let mut orphans = Vec::new();
    for file in files {
        let sections = cmd!(
            sh,
            "perl scripts/get_maintainer.pl --nogit --nogit-fallback --subsystem --norolestats
             --noemail --nol --noweb --noscm -f {file}"
        )
        .quiet()
        .read()?;
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

/// Check the patches with QEMU's `checkpatch.pl`.
fn check_style(env: &Env, sh: &Shell, patches: &[PathBuf]) -> Result<()> {
    env.say("checking the style of the patches");
    let mut reports = String::new();
    for patch in patches {
        // in the complete tree, which it insists on
        let report = cmd!(
            sh,
            "perl scripts/checkpatch.pl --terse --no-summary {patch}"
        )
        .quiet()
        .ignore_status()
        .read()?;
        // Name the patch, not the directory that is in the way
        let dir = patch.parent().unwrap_or_else(|| Path::new(""));
        reports += &report.replace(&format!("{}/", dir.display()), "");
        reports.push('\n');
    }
    let allowed = fs::read_to_string(env.repo.join(ALLOWED))
        .with_context(|| format!("cannot read {ALLOWED}"))?;
    let allowed = Allowed::parse(&allowed)?;
    let problems = allowed.judge(&reports);
    ensure!(
        problems.is_empty(),
        "the style of the patches:\n{}",
        problems.join("\n")
    );
    Ok(())
}

/// Which findings of checkpatch are allowed, and why
const ALLOWED: &str = "patches/checkpatch-allowed";

/// Findings that are allowed
struct Allowed<'a>(Vec<&'a str>);

impl<'a> Allowed<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let mut list = Vec::new();
        for line in text.lines() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match line.split_once(" # ") {
                Some((finding, reason)) if !reason.trim().is_empty() => list.push(finding.trim()),
                _ => bail!("{ALLOWED}: there is no reason after \" # \" in: {line}"),
            }
        }
        Ok(Self(list))
    }

    /// The findings that are not allowed, and what is allowed although nothing
    /// was found.
    fn judge(&self, reports: &str) -> Vec<String> {
        let findings: Vec<_> = reports.lines().filter(|line| !line.is_empty()).collect();
        let mut problems: Vec<_> = findings
            .iter()
            .filter(|line| !self.0.iter().any(|allowed| line.contains(allowed)))
            .map(ToString::to_string)
            .collect();
        for allowed in &self.0 {
            if !findings.iter().any(|line| line.contains(allowed)) {
                problems.push(format!(
                    "{ALLOWED}: no patch has this any more, so remove it: {allowed}"
                ));
            }
        }
        problems
    }
}

/// Build QEMU after each patch, with and without Rust.
fn build_each(env: &Env, source: &Source, patches: &[PathBuf]) -> Result<()> {
    env.need_space(8)?;
    let root = env.cache.join("each");
    remove(&root)?;
    let result = (|| {
        let tree = source.pristine_worktree(env, &root)?;
        let sh = tree.git()?;
        let builds = [Device::C, Device::Rust]
            .map(|device| Build::configured(env, &root, tree.clone(), device, Target::X86_64));
        let builds = builds.into_iter().collect::<Result<Vec<_>>>()?;
        for (i, patch) in patches.iter().enumerate() {
            let name = patch.file_name().unwrap_or_default().to_string_lossy();
            env.say(&format!("patch {} of {}: {name}", i + 1, patches.len()));
            cmd!(sh, "git am -q --keep-cr {patch}").run_quiet()?;
            let changed = cmd!(sh, "git diff --name-only HEAD~1 HEAD")
                .quiet()
                .read()?;
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
    remove(&root)?;
    let sh = source.git()?;
    cmd!(sh, "git worktree prune").run_quiet()?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<(PathBuf, PathBuf)> {
        paths
            .iter()
            .map(|path| (Path::new("/repo").join(path), path.into()))
            .collect()
    }

    #[test]
    fn list_of_patches() {
        let text = "# comment\n\n0001-a.patch\n0002-b.patch rust/virtio rust/x/y.rs # why\n";
        assert_eq!(
            parse(text),
            [
                Step {
                    patch: "0001-a.patch".into(),
                    paths: vec![]
                },
                Step {
                    patch: "0002-b.patch".into(),
                    paths: vec!["rust/virtio".into(), "rust/x/y.rs".into()]
                }
            ]
        );
    }

    #[test]
    fn files_go_with_the_patch_that_names_them_best() {
        let steps = parse("1.patch a\n2.patch\n3.patch a/b/c.rs d\n");
        let files = files(&["a/b/c.rs", "a/b/d.rs", "a/e", "d/f"]);
        let new = assign(&steps, &files).unwrap();
        assert_eq!(new.len(), 2);
        assert_eq!(new[&0], [&files[1], &files[2]]);
        assert_eq!(new[&2], [&files[0], &files[3]]);
    }

    #[test]
    fn files_and_patches_have_to_match() {
        let steps = parse("1.patch a\n");
        let error = |files: &[_]| assign(&steps, files).unwrap_err().to_string();
        assert!(error(&files(&["a/x", "ab/x"])).contains("ab/x"));
        assert!(error(&[]).contains("no files for a (1.patch)"));
    }

    #[test]
    fn imported_patches_keep_their_files() {
        let old = "# why\n# how\n0001-a.patch\n0002-b.patch x y/z\n0003-c.patch w\n";
        let names = ["0001-b.patch", "0002-new-one.patch", "0003-a.patch"].map(str::to_owned);
        let (text, lost) = renumber(old, &names);
        assert_eq!(
            text,
            "# why\n# how\n0001-b.patch       x y/z\n0002-new-one.patch\n0003-a.patch\n"
        );
        assert_eq!(lost, ["w"]);
    }

    #[test]
    fn cover_letter() {
        let draft = "Subject: [PATCH 00/02] *** SUBJECT HERE ***\n\n*** BLURB HERE ***\n\nx (2):\n";
        let letter = fill_in(draft, "subject\n\ntext\n\nmore\n").unwrap();
        let (start, base) = letter.rsplit_once("\n\n").unwrap();
        assert_eq!(
            start,
            "Subject: [PATCH 00/02] subject\n\ntext\n\nmore\n\nx (2):"
        );
        assert!(base.starts_with("base"));
        fill_in(draft, "only a subject\n").unwrap_err();
        fill_in("Subject: x\n", "subject\n\ntext\n").unwrap_err();
    }

    #[test]
    fn findings_need_a_reason() {
        let allowed = Allowed::parse("# comment\n\nline over 80 # a table\n").unwrap();
        assert!(allowed
            .judge("1.patch:3: WARNING: line over 80 characters\n\n")
            .is_empty());
        let problems = allowed.judge("1.patch:9: ERROR: trailing whitespace\n");
        assert_eq!(problems.len(), 2);
        assert!(problems[0].contains("trailing whitespace"));
        assert!(problems[1].contains("remove it: line over 80"));
        assert!(Allowed::parse("no reason\n").is_err());
        assert!(Allowed::parse("no reason # \n").is_err());
    }
}
