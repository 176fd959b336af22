// SPDX-License-Identifier: GPL-2.0-or-later

//! The files of the pinned tarball, to recognize the same source in upstream's
//! repository
//!
//! A manifest has a line for each file: eight hexadecimal digits of the
//! SHA-256 of its content, a letter (`f`, `x` if it is executable, `l` if it is
//! a symbolic link) and its path.  That makes it small, and suffices to name a
//! file that differs, but not to tell that no file was tampered with.  A hash
//! of the whole does that: the SHA-256 of such lines with all 64 digits,
//! sorted, which stands in `version.rs`.
//!
//! Git submodules (the sources of firmware, and of the containers of upstream's
//! CI) are left out: no build of ours uses them, a clone does not have them,
//! and they are two thirds of the files.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};
use walkdir::WalkDir;
use xshell::{cmd, Shell};

use crate::{
    env::{hash_bytes, sha256, Env},
    run::RunQuiet,
    source,
    version::QEMU,
};

/// Digits of a hash in the manifest
const SHORT: usize = 8;

/// The kind and the SHA-256 of a file; `None` if there is no such file
fn entry(path: &Path) -> Result<Option<(char, String)>> {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return Ok(None);
    };
    Ok(if meta.is_symlink() {
        let target = fs::read_link(path)?;
        Some(('l', hash_bytes(target.as_os_str().as_bytes())))
    } else if meta.is_file() {
        let kind = if meta.permissions().mode() & 0o111 == 0 {
            'f'
        } else {
            'x'
        };
        Some((kind, sha256(path)?))
    } else {
        None
    })
}

/// The directories of the git submodules of a tree
fn submodules(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(dir.join(".gitmodules")).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(key, _)| key.trim() == "path")
        .map(|(_, path)| path.trim().into())
        .collect()
}

/// Make the manifest of a tree, and compute the hash of the whole.
///
/// # Errors
///
/// Fails if a file cannot be read, or has a name that is not UTF-8.
fn generate(dir: &Path) -> Result<(String, String)> {
    let skip: Vec<_> = submodules(dir).iter().map(|sub| dir.join(sub)).collect();
    let walk = WalkDir::new(dir).into_iter().filter_entry(|entry| {
        // meson makes the latter when it downloads a subproject
        !skip.iter().any(|sub| sub == entry.path())
            && entry.file_name() != ".meson-subproject-wrap-hash.txt"
    });
    let mut entries = BTreeMap::new();
    for file in walk {
        let file = file?;
        if let Some((kind, hash)) = entry(file.path())? {
            let path = file.path().strip_prefix(dir)?;
            let name = path
                .to_str()
                .with_context(|| format!("{} is not UTF-8", path.display()))?;
            entries.insert(name.to_owned(), (kind, hash));
        }
    }

    let (mut text, mut full) = (String::new(), String::new());
    for (path, (kind, hash)) in entries {
        let _ = writeln!(text, "{} {kind} {path}", &hash[..SHORT]);
        let _ = writeln!(full, "{hash} {kind} {path}");
    }
    Ok((text, hash_bytes(full.as_bytes())))
}

/// Check that a tree has all files of a manifest, with the same content.
///
/// # Errors
///
/// Fails if that is not so; the error names a file.
fn verify(dir: &Path, manifest: &str, tree_sha256: &str) -> Result<()> {
    let mut full = String::new();
    let mut found = Vec::new();
    for line in manifest.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(short), Some(wanted), Some(path)) = (words.next(), words.next(), words.next())
        else {
            bail!("the manifest has a line that is not one: {line}");
        };
        match entry(&dir.join(path))? {
            None => found.push(format!("{path} is missing")),
            Some((kind, hash)) => {
                if !hash.starts_with(short) || kind.to_string() != wanted {
                    found.push(format!("{path} differs"));
                }
                let _ = writeln!(full, "{hash} {kind} {path}");
            }
        }
    }
    match found.as_slice() {
        [] => ensure!(
            hash_bytes(full.as_bytes()) == tree_sha256,
            "the files do not have the expected content"
        ),
        [only] => bail!("{only}"),
        [first, rest @ ..] => bail!("{first}, and so on for {} more files", rest.len()),
    }
    Ok(())
}

/// Check that a tree has all files of the pinned tarball, with the same
/// content.
///
/// # Errors
///
/// Fails if that is not so, or if the manifest cannot be read.
pub fn check(env: &Env, dir: &Path) -> Result<()> {
    let path = env.repo.join(QEMU.manifest);
    let sh = Shell::new()?;
    let text = cmd!(sh, "xz -dc {path}").output_quiet()?;
    verify(dir, &String::from_utf8(text)?, QEMU.tree_sha256)
}

/// Write the manifest of the pinned tarball, and return the hash of the whole.
///
/// # Errors
///
/// Fails if the tarball cannot be obtained.
pub fn write(env: &Env) -> Result<String> {
    let tarball = source::pinned_tarball(env)?;
    let dir = env.temp_dir("manifest")?;
    source::untar(env, &tarball, dir.path())?;
    let (text, hash) = generate(dir.path())?;

    let path = env.repo.join(QEMU.manifest);
    let tmp = path.with_extension("part");
    let sh = Shell::new()?;
    fs::write(&tmp, cmd!(sh, "xz -9e -c").stdin(text).output_quiet()?)?;
    fs::rename(&tmp, &path)?;
    Ok(hash)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::tempdir;

    use super::*;

    /// A tree that looks a bit like QEMU's
    fn make_tree(dir: &Path) {
        for (path, content) in [
            ("VERSION", "11.1.1\n"),
            ("hw/a.c", "int a;\n"),
            ("hw/b c.h", ""),
            ("configure", "#!/bin/sh\n"),
            (
                ".gitmodules",
                "[submodule \"x\"]\n\tpath = roms/x\n\turl = y\n",
            ),
        ] {
            let file = dir.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
        fs::set_permissions(dir.join("configure"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("a.c", dir.join("hw/link.c")).unwrap();
    }

    /// The manifest of a tarball and the clone of a repository with the same
    /// files, as far as upstream's repository has them
    fn tarball_and_clone(tmp: &Path) -> (String, String, PathBuf) {
        let sh = Shell::new().unwrap();
        let (tree, unpacked, clone) = (tmp.join("tree"), tmp.join("unpacked"), tmp.join("clone"));
        make_tree(&tree);
        let tarball = tmp.join("qemu.tar");
        sh.change_dir(tmp);
        for name in source::GIT_ENV {
            sh.set_var(name.0, name.1);
        }
        cmd!(sh, "git init -q {tree}").run().unwrap();
        cmd!(sh, "git -C {tree} add -A").run().unwrap();
        cmd!(sh, "git -C {tree} commit -q -m x").run().unwrap();
        // as upstream's script does it
        fs::create_dir_all(tree.join("roms/x")).unwrap();
        fs::write(tree.join("roms/x/firmware.c"), "x").unwrap();
        cmd!(sh, "tar --exclude=.git -cf {tarball} tree")
            .run()
            .unwrap();
        fs::create_dir(&unpacked).unwrap();
        cmd!(sh, "tar -C {unpacked} --strip-components=1 -xf {tarball}")
            .run()
            .unwrap();
        cmd!(sh, "git clone -q {tree} {clone}").run().unwrap();
        let (text, hash) = generate(&unpacked).unwrap();
        (text, hash, clone)
    }

    #[test]
    fn the_same_files_are_accepted() {
        let tmp = tempdir().unwrap();
        let (text, hash, clone) = tarball_and_clone(tmp.path());
        assert_eq!(text.lines().count(), 6);
        assert!(!text.contains("firmware.c"));
        verify(&clone, &text, &hash).unwrap();
        // files that only the clone has
        fs::write(clone.join("more"), "").unwrap();
        verify(&clone, &text, &hash).unwrap();
    }

    #[test]
    fn other_files_are_rejected_by_name() {
        let tmp = tempdir().unwrap();
        let (text, hash, clone) = tarball_and_clone(tmp.path());
        let error = |wanted: &str| verify(&clone, &text, wanted).unwrap_err().to_string();

        fs::write(clone.join("hw/a.c"), "int b;\n").unwrap();
        assert_eq!(error(&hash), "hw/a.c differs");
        fs::remove_file(clone.join("hw/b c.h")).unwrap();
        assert_eq!(error(&hash), "hw/a.c differs, and so on for 1 more files");
        fs::write(clone.join("hw/a.c"), "int a;\n").unwrap();
        assert_eq!(error(&hash), "hw/b c.h is missing");
        fs::write(clone.join("hw/b c.h"), "").unwrap();

        let configure = clone.join("configure");
        fs::set_permissions(&configure, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(error(&hash), "configure differs");
        fs::set_permissions(&configure, fs::Permissions::from_mode(0o755)).unwrap();

        fs::remove_file(clone.join("hw/link.c")).unwrap();
        symlink("b c.h", clone.join("hw/link.c")).unwrap();
        assert_eq!(error(&hash), "hw/link.c differs");
        fs::remove_file(clone.join("hw/link.c")).unwrap();
        symlink("a.c", clone.join("hw/link.c")).unwrap();

        // a manifest that was made to fit
        assert_eq!(
            error(&"0".repeat(64)),
            "the files do not have the expected content"
        );
        verify(&clone, &text, &hash).unwrap();
    }
}
