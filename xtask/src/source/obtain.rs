// SPDX-License-Identifier: GPL-2.0-or-later

//! Where QEMU's source comes from

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{anyhow, bail, ensure, Context, Result};
use xshell::{cmd, Shell};

use crate::{
    apt,
    env::{one_line, remove, sha256, Env},
    run::RunQuiet,
    tools::Tools,
    version::{PinnedFile, QEMU},
};

/// The variable that names a directory with source tarballs
const SOURCES_VAR: &str = "QEMU_SOURCES";

/// The variable that names a repository to use instead of upstream's, for
/// example a mirror of it
const REPOSITORY_VAR: &str = "QEMU_REPOSITORY";

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Get the source that the series is made for, from where it can be had.
pub(super) fn obtain(env: &Env, dir: &Path) -> Result<()> {
    if let Some(tarball) = file_in(variable(SOURCES_VAR).as_deref(), &QEMU.tarball)? {
        return untar(env, &tarball, dir);
    }
    let Err(no_tarball) =
        download(env, &QEMU.tarball).and_then(|tarball| untar(env, &tarball, dir))
    else {
        return Ok(());
    };

    let url = variable(REPOSITORY_VAR).unwrap_or_else(|| QEMU.repository.to_owned());
    env.say(&format!(
        "cannot get {} from Debian's mirror: trying {url}",
        QEMU.tarball.name()
    ));
    remove(dir)?;
    clone_of_upstream(env, &url, dir).map_err(|no_clone| {
        anyhow!(
            "cannot get QEMU {}: neither from Debian's mirror ({}), nor from {url} ({}); put {} \
             into a directory and name that in {SOURCES_VAR}, or give a source tree, a tarball or \
             a git repository with --qemu-src",
            QEMU.number,
            one_line(&no_tarball),
            one_line(&no_clone),
            QEMU.tarball.name()
        )
    })
}

/// A pinned file of Debian's source package
///
/// # Errors
///
/// Fails if it is neither in the directory that the user has named nor on
/// Debian's mirror.
pub fn pinned_file(env: &Env, file: &PinnedFile) -> Result<PathBuf> {
    match file_in(variable(SOURCES_VAR).as_deref(), file)? {
        Some(path) => Ok(path),
        None => download(env, file),
    }
}

/// A pinned file in a directory, if the directory has it
fn file_in(dir: Option<&str>, file: &PinnedFile) -> Result<Option<PathBuf>> {
    let Some(dir) = dir else {
        return Ok(None);
    };
    ensure!(
        Path::new(dir).is_dir(),
        "{SOURCES_VAR}={dir}: there is no such directory; unset it, or name one with {}",
        file.name()
    );
    let path = Path::new(dir).join(file.name());
    if !path.exists() {
        return Ok(None);
    }
    ensure!(
        sha256(&path)? == file.sha256,
        "{} is not that of QEMU {} (its SHA-256 is not {}); remove or replace it",
        path.display(),
        QEMU.number,
        file.sha256
    );
    Ok(Some(path))
}

fn download(env: &Env, file: &PinnedFile) -> Result<PathBuf> {
    let path = env.cache.join("dl").join(file.name());
    let uri = apt::mirror(env)? + file.path;
    apt::download(env, &uri, &path, file.sha256)?;
    Ok(path)
}

/// Clone upstream's repository, at the pinned commit.
fn clone_of_upstream(env: &Env, url: &str, dir: &Path) -> Result<()> {
    // git computes the hashes of what it fetches, but not of what it links from a
    // directory.
    let args = ["--no-local", "--depth=1", "--branch", QEMU.tag];
    git_clone(env, url, &args, dir)?;
    check_commit(dir, QEMU.commit)?;
    provide_subprojects(env, None, dir)
}

/// Check that a clone is at a commit.
fn check_commit(dir: &Path, commit: &str) -> Result<()> {
    let sh = Shell::new()?;
    let head = cmd!(sh, "git -C {dir} rev-parse HEAD").read_quiet()?;
    ensure!(
        head == commit,
        "{} there is not QEMU {}: it is the commit {head}, not {commit}",
        QEMU.tag,
        QEMU.number
    );
    Ok(())
}

/// Get a source that the user has given.
pub(super) fn copy_of_user(env: &Env, src: &str, dir: &Path) -> Result<()> {
    let path = Path::new(src);
    if path.is_file() {
        untar(env, path, dir)
            .map_err(|err| anyhow!("--qemu-src {src}: cannot unpack this: {}", one_line(&err)))
    } else if path.join(".git").exists() || path.join("HEAD").exists() {
        git_clone(env, src, &[], dir)
    } else if path.join("VERSION").exists() {
        let (sh, all) = (Shell::new()?, path.join("."));
        env.run(
            "copying the source tree",
            cmd!(sh, "cp -a --no-preserve=ownership {all} {dir}"),
        )
    } else if src.contains("://") {
        git_clone(env, src, &["--depth=1", "--branch", QEMU.tag], dir)
            .map_err(|err| anyhow!("--qemu-src {src}: cannot clone this: {}", one_line(&err)))
    } else {
        bail!(
            "--qemu-src {src}: neither a source tree of QEMU, nor a tarball, nor a git repository"
        )
    }
}

/// Get the subprojects that upstream keeps in other repositories, and that are
/// part of the tarball.  The commit is pinned by QEMU's wrap files.
pub(super) fn provide_subprojects(env: &Env, src: Option<&Path>, dir: &Path) -> Result<()> {
    let below = |tree: &Path, name: &str| tree.join("subprojects").join(name);
    let mut missing = Vec::new();
    for name in QEMU.subprojects {
        let dest = below(dir, name);
        if dest.exists() {
            continue;
        }
        let users = src.map(|src| below(src, name)).filter(|path| path.is_dir());
        if let Some(users) = users {
            let sh = Shell::new()?;
            cmd!(sh, "cp -a --no-preserve=ownership {users} {dest}").run_quiet()?;
        } else {
            missing.push(*name);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }

    let tools = Tools::provide(env, false)?;
    let (sh, meson, names) = (Shell::new()?, tools.venv.join("bin/meson"), &missing);
    env.run(
        &format!("downloading {}", missing.join(", ")),
        cmd!(
            sh,
            "{meson} subprojects download --sourcedir {dir} {names...}"
        ),
    )?;
    for name in &missing {
        ensure!(
            below(dir, name).is_dir(),
            "meson has not downloaded subprojects/{name}"
        );
    }
    Ok(())
}

/// Unpack a tarball, whose files are all in one directory.
///
/// # Errors
///
/// Fails if it is no tarball.
pub fn untar(env: &Env, tarball: &Path, dir: &Path) -> Result<()> {
    let sh = Shell::new()?;
    env.run(
        "unpacking QEMU",
        cmd!(
            sh,
            "tar --no-same-owner --strip-components=1 -xf {tarball} -C {dir}"
        ),
    )
}

fn git_clone(env: &Env, src: &str, args: &[&str], dir: &Path) -> Result<()> {
    let sh = Shell::new()?;
    // The user's configuration has to do with proxies, but not with what the files
    // contain.
    let config = ["core.autocrlf=false", "advice.detachedHead=false"].map(|c| format!("-c{c}"));
    env.run(
        &format!("cloning {src}"),
        cmd!(sh, "git clone -q {config...} {args...} {src} {dir}").env("GIT_TERMINAL_PROMPT", "0"),
    )
}

pub(super) fn check_version(dir: &Path) -> Result<()> {
    let version = fs::read_to_string(dir.join("VERSION"))
        .context("this is not a source tree of QEMU: it has no file called VERSION")?;
    ensure!(
        QEMU.is_supported(&version),
        "this is QEMU {}, but the series is for {}.x; give a source tree, a tarball or a git \
         repository of QEMU {} with --qemu-src",
        version.trim(),
        QEMU.stable,
        QEMU.number
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;

    #[test]
    fn tarballs_of_the_user() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().to_str();
        let error =
            |sources: Option<&str>| file_in(sources, &QEMU.tarball).unwrap_err().to_string();
        assert_eq!(file_in(None, &QEMU.tarball).unwrap(), None);
        assert_eq!(file_in(dir, &QEMU.tarball).unwrap(), None);

        let tarball = tmp.path().join(QEMU.tarball.name());
        fs::write(&tarball, "something else").unwrap();
        assert!(error(dir).contains(tarball.to_str().unwrap()));
        let nowhere = tmp.path().join("nowhere");
        assert!(error(nowhere.to_str()).contains("no such directory"));
    }

    #[test]
    fn clones_are_told_by_their_commit() {
        let tmp = tempfile::tempdir().unwrap();
        let env = Env::for_tests(tmp.path());
        let (upstream, clone) = (tmp.path().join("upstream"), tmp.path().join("clone"));
        fs::create_dir(&upstream).unwrap();
        let source = Source {
            dir: upstream.clone(),
            key: String::new(),
        };
        let sh = source.git().unwrap();
        cmd!(sh, "git init -q").run().unwrap();
        cmd!(sh, "git commit -q --allow-empty -m x").run().unwrap();
        let head = cmd!(sh, "git rev-parse HEAD").read().unwrap();

        git_clone(&env, upstream.to_str().unwrap(), &["--no-local"], &clone).unwrap();
        check_commit(&clone, &head).unwrap();
        let error = check_commit(&clone, QEMU.commit).unwrap_err().to_string();
        assert!(
            error.contains("there is not QEMU") && error.contains(&head),
            "{error}"
        );
    }
}
