// SPDX-License-Identifier: GPL-2.0-or-later

//! Exports the project as a series of patches for an unmodified QEMU
//!
//! It consists of envelopes, which are parts that can be used by themselves.
//! `patches/qemu` only edits files that QEMU has.  The files that are new are
//! added to the patch that `patches/series` names for them, so that QEMU can be
//! built after each patch.

mod check;
mod envelopes;
mod export;
mod import;
mod style;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use anyhow::{anyhow, ensure, Result};

pub use self::{
    check::{check, Depth},
    export::export,
    import::import,
};
use crate::{env::Env, source::patches_in};

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
        .filter(|line| envelopes::heading(line).is_none())
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
/// names the longest part of its path, so that it can be named by itself
/// although its directory goes with another patch.
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn files(paths: &[&str]) -> Vec<(PathBuf, PathBuf)> {
        paths
            .iter()
            .map(|path| (Path::new("/repo").join(path), path.into()))
            .collect()
    }

    #[test]
    fn list_of_patches() {
        let text =
            "# comment\n\n[1-x] 0-y\n0001-a.patch\n0002-b.patch rust/virtio rust/x/y.rs # why\n";
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
}
