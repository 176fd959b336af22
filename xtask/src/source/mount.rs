// SPDX-License-Identifier: GPL-2.0-or-later

//! The files that are new in QEMU, and live in this checkout

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context, Result};
use walkdir::WalkDir;

use super::Source;
use crate::env::{remove, Env};

/// Directories of this checkout, and where their files go in QEMU's tree
pub const MOUNTS: &[(&str, &str)] = &[
    ("rust/bindings/virtio-sys", "rust/bindings/virtio-sys"),
    ("rust/virtio", "rust/virtio"),
    ("hw-virtio-balloon", "rust/hw/virtio/balloon"),
    ("tests-qtest", "tests/qtest"),
    ("tests-functional/qemu", "tests/functional"),
];

/// The files of this checkout that are new in QEMU: where they are, and the
/// path in QEMU's tree
///
/// # Errors
///
/// Fails if a directory cannot be read.
pub fn mounted_files(env: &Env) -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut files = Vec::new();
    for (from, to) in MOUNTS {
        let root = env.repo.join(from);
        if !root.exists() {
            continue;
        }
        let walk = WalkDir::new(&root)
            .sort_by_file_name()
            .into_iter()
            .filter_entry(|entry| {
                !["target", "__pycache__"].contains(&&*entry.file_name().to_string_lossy())
            });
        for entry in walk {
            let entry = entry?;
            if !entry.file_type().is_dir() {
                let rel = entry.path().strip_prefix(&root)?;
                files.push((entry.path().to_owned(), Path::new(to).join(rel)));
            }
        }
    }
    Ok(files)
}

/// Returns whether the link has changed.
pub(super) fn replace_link(target: &Path, link: &Path) -> Result<bool> {
    if fs::read_link(link).is_ok_and(|old| old == target) {
        return Ok(false);
    }
    remove(link)?;
    symlink(target, link)
        .with_context(|| format!("cannot link {} to {}", link.display(), target.display()))?;
    Ok(true)
}

impl Source {
    pub(super) fn mount(&self, env: &Env) -> Result<()> {
        for (from, to) in mounted_files(env)? {
            let dest = self.dir.join(&to);
            if let Some(parent) = dest.parent() {
                fs::create_dir_all(parent)?;
            }
            // Relative links are part of the tree, like build.rs
            let target = if from.is_symlink() {
                fs::read_link(&from)?
            } else {
                from
            };
            if replace_link(&target, &dest)? && target.is_absolute() {
                // Objects may have been made of the file of another checkout,
                // after this one was changed.  Who cannot do this has not changed
                // it.
                let _ = File::open(&target)?.set_modified(SystemTime::now());
            }
        }
        // Links to files that were removed or renamed meanwhile
        for (_, to) in MOUNTS {
            let dir = self.dir.join(to);
            if !dir.exists() {
                continue;
            }
            for entry in WalkDir::new(dir) {
                let entry = entry?;
                if entry.path_is_symlink() && !entry.path().exists() {
                    remove(entry.path())?;
                }
            }
        }
        Ok(())
    }
}
