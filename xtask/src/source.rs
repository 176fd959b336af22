// SPDX-License-Identifier: GPL-2.0-or-later

//! The patched source tree of QEMU
//!
//! It is a git repository in the cache: the commit `pristine` is what was
//! downloaded or given by the user, and the checked out commit has the series
//! applied.  Files that are new in QEMU are links into this checkout, so that
//! an edit is only one `ninja` away from running.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{bail, ensure, Context, Result};
use walkdir::WalkDir;
use xshell::{cmd, Shell};

use crate::{
    apt,
    env::{remove, sha256, sha256_of, Env},
};

/// The version of QEMU that the series is for
pub const QEMU_VERSION: &str = "10.2";

/// Below the mirror of the Debian archive
const ORIG_PATH: &str = "pool/main/q/qemu/qemu_10.2.2+ds.orig.tar.xz";
const ORIG_SHA256: &str = "be05230fe47a6937cd29f28f562932c8125f9c93c2a82c625198f7a4aa601dfb";

/// Directories of this checkout, and where their files go in QEMU's tree
pub const MOUNTS: &[(&str, &str)] = &[
    ("rust/virtio", "rust/virtio"),
    ("hw-virtio-balloon", "rust/hw/virtio/balloon"),
    ("tests-qtest", "tests/qtest"),
    ("tests-functional", "tests/functional"),
];

/// A patched source tree
pub struct Source {
    /// The tree
    pub dir: PathBuf,
    /// Distinguishes it from those of other `--qemu-src`
    pub key: String,
}

impl Source {
    /// Prepare the tree: download or copy, patch, mount.
    ///
    /// # Errors
    ///
    /// Fails if the source cannot be obtained, is not the right version, or
    /// the series does not apply.
    pub fn prepare(env: &Env, qemu_src: Option<&str>) -> Result<Self> {
        apt::ensure_packages(env, apt::BUILD_PACKAGES)?;

        let key = match qemu_src {
            None => "10.2.2".to_owned(),
            Some(src) => {
                let path = fs::canonicalize(src).unwrap_or_else(|_| src.into());
                sha256_of(&[path.as_os_str().as_encoded_bytes()])[..12].to_owned()
            }
        };
        let dir = env.cache.join("src").join(&key);
        let this = Self { dir, key };

        if !this.dir.join(".git").exists() {
            this.unpack(env, qemu_src)?;
        }
        this.apply_series(env)?;
        // first, because our crates are members of QEMU's workspace
        this.mount(env)?;
        this.provide_crates(env)?;
        Ok(this)
    }

    /// A shell in the tree, in which git is not influenced by the configuration
    /// of the user.
    ///
    /// # Errors
    ///
    /// Fails if there is no current directory.
    pub fn git(&self) -> Result<Shell> {
        let sh = Shell::new()?;
        sh.change_dir(&self.dir);
        // The user's configuration must not get in the way.
        for (name, value) in GIT_ENV {
            sh.set_var(name, value);
        }
        Ok(sh)
    }

    fn unpack(&self, env: &Env, qemu_src: Option<&str>) -> Result<()> {
        env.need_space(4)?;
        let tmp = self.dir.with_extension("tmp");
        remove(&tmp)?;
        fs::create_dir_all(&tmp)?;

        match qemu_src {
            None => {
                let tarball = env.cache.join("dl/qemu_10.2.2+ds.orig.tar.xz");
                let uri = apt::mirror(env)? + ORIG_PATH;
                apt::download(env, &uri, &tarball, ORIG_SHA256)?;
                untar(env, &tarball, &tmp)?;
            }
            Some(src) if Path::new(src).is_file() => untar(env, Path::new(src), &tmp)?,
            Some(src) if Path::new(src).join(".git").exists() => git_clone(env, src, &[], &tmp)?,
            Some(src) if Path::new(src).join("VERSION").exists() => env.run(
                "copying the source tree",
                Command::new("cp")
                    .args(["-a", "--no-preserve=ownership"])
                    .arg(Path::new(src).join("."))
                    .arg(&tmp),
            )?,
            Some(src) if src.contains("://") => {
                git_clone(env, src, &["--depth=1", "--branch=v10.2.2"], &tmp)?;
            }
            Some(src) => bail!(
                "--qemu-src {src}: neither a source tree of QEMU, nor a tarball, nor a git \
                 repository"
            ),
        }
        check_version(&tmp)?;

        env.say("recording the pristine source");
        let sh = Self {
            dir: tmp.clone(),
            key: String::new(),
        }
        .git()?;
        remove(&tmp.join(".git"))?;
        cmd!(sh, "git init -q").run_quiet()?;
        // also what .gitignore excludes
        cmd!(sh, "git add -A -f .").run_quiet()?;
        cmd!(sh, "git commit -q -m pristine").run_quiet()?;
        cmd!(sh, "git tag pristine").run_quiet()?;
        remove(&self.dir)?;
        fs::rename(&tmp, &self.dir)?;
        Ok(())
    }

    /// Whether this is Debian's repacked tarball, which lacks some files
    fn is_debian(&self) -> Result<bool> {
        let sh = self.git()?;
        Ok(cmd!(sh, "git ls-tree pristine subprojects/packagefiles")
            .quiet()
            .read()?
            .is_empty())
    }

    fn patches(&self, env: &Env) -> Result<Vec<PathBuf>> {
        let mut patches = Vec::new();
        if self.is_debian()? {
            patches.extend(patches_in(&env.repo.join("patches/debian-source"))?);
        }
        patches.extend(patches_in(&env.repo.join("patches/qemu"))?);
        Ok(patches)
    }

    fn apply_series(&self, env: &Env) -> Result<()> {
        let patches = self.patches(env)?;
        let contents = patches
            .iter()
            .map(fs::read)
            .collect::<std::io::Result<Vec<_>>>()?;
        let parts: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
        let wanted = sha256_of(&parts);
        let stamp = self.dir.join(".git/series");
        if fs::read_to_string(&stamp).is_ok_and(|s| s == wanted) {
            return Ok(());
        }

        env.say(&format!("applying {} patches", patches.len()));
        // In a scratch tree, so that checking out the result only touches the
        // files that differ from the previous one; and so that the tree is
        // left alone if the series does not apply.
        let scratch = self.dir.with_extension("am");
        let commit = am_in_worktree(&self.git()?, &scratch, &patches)
            .context("the series does not apply to this source; it is made for QEMU 10.2.2")?;

        let sh = self.git()?;
        // Files that are mounted over QEMU's own, and others left by a build
        cmd!(sh, "git checkout -q --force --detach {commit}").run_quiet()?;
        // meson does not notice that crates have to be rebuilt if a procedural
        // macro that they use was.
        for entry in WalkDir::new(env.cache.join("build").join(&self.key)) {
            let entry = match entry {
                Ok(entry) => entry,
                Err(_) => break,
            };
            if entry.path().extension().is_some_and(|ext| ext == "rlib") {
                remove(entry.path())?;
            }
        }
        fs::write(stamp, wanted)?;
        Ok(())
    }

    /// Put the crates that QEMU needs, and the meson files to build them, where
    /// meson looks for them before it tries to download them.
    fn provide_crates(&self, env: &Env) -> Result<()> {
        let subprojects = self.dir.join("subprojects");
        let mut wraps = Vec::new();
        for entry in fs::read_dir(&subprojects)? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with("-rs.wrap") {
                wraps.push(
                    Wrap::parse(&fs::read_to_string(&path)?)
                        .with_context(|| format!("cannot make sense of {}", path.display()))?,
                );
            }
        }

        for wrap in &wraps {
            let overlay = subprojects.join("packagefiles").join(&wrap.patch_directory);
            let ours = env
                .repo
                .join("patches/debian-source/overlays")
                .join(&wrap.patch_directory);
            let link = overlay.join("meson.build");
            if ours.is_dir() && (!link.exists() || link.is_symlink()) {
                fs::create_dir_all(&overlay)?;
                replace_link(&ours.join("meson.build"), &link)?;
            }
        }

        let cache = subprojects.join("packagecache");
        fs::create_dir_all(&cache)?;
        if wraps
            .iter()
            .all(|w| cache.join(&w.source_filename).exists())
        {
            return Ok(());
        }
        // A directory of its own, so that it is known where the files end up
        let home = env.cache.join("cargo-home");
        fs::create_dir_all(&home)?;
        inherit_cargo_config(&home)?;
        env.run(
            "fetching QEMU's Rust crates",
            Command::new("cargo")
                .args(["fetch", "--locked", "--manifest-path"])
                .arg(self.dir.join("rust/Cargo.toml"))
                .env("CARGO_HOME", &home),
        )?;
        for wrap in &wraps {
            let name = format!("{}.crate", wrap.directory);
            let file = WalkDir::new(home.join("registry/cache"))
                .into_iter()
                .filter_map(std::result::Result::ok)
                .find(|entry| entry.file_name().to_string_lossy() == name)
                .with_context(|| format!("cargo has not fetched {name}"))?;
            ensure!(
                sha256(file.path())? == wrap.source_hash,
                "{name} does not have the checksum that QEMU expects"
            );
            let tmp = cache.join("partial");
            fs::copy(file.path(), &tmp)?;
            fs::rename(&tmp, cache.join(&wrap.source_filename))?;
        }
        Ok(())
    }

    fn mount(&self, env: &Env) -> Result<()> {
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
            replace_link(&target, &dest)?;
        }
        // Links to files that were removed or renamed meanwhile
        for (_, to) in MOUNTS {
            for entry in WalkDir::new(self.dir.join(to)) {
                let entry = entry?;
                if entry.path_is_symlink() && !entry.path().exists() {
                    remove(entry.path())?;
                }
            }
        }
        Ok(())
    }
}

const GIT_ENV: [(&str, &str); 6] = [
    ("GIT_CONFIG_GLOBAL", "/dev/null"),
    ("GIT_CONFIG_SYSTEM", "/dev/null"),
    ("GIT_AUTHOR_NAME", "xtask"),
    ("GIT_AUTHOR_EMAIL", "xtask@localhost"),
    ("GIT_COMMITTER_NAME", "xtask"),
    ("GIT_COMMITTER_EMAIL", "xtask@localhost"),
];

/// Apply patches to the pristine source in a new worktree, which is removed
/// again, and return the commit.
fn am_in_worktree(sh: &Shell, scratch: &Path, patches: &[PathBuf]) -> Result<String> {
    remove(scratch)?;
    cmd!(sh, "git worktree prune").run_quiet()?;
    cmd!(sh, "git worktree add -q --detach {scratch} pristine").run_quiet()?;
    let inner = sh.clone();
    inner.change_dir(scratch);
    let result = cmd!(inner, "git am -q --keep-cr {patches...}").run_quiet();
    let commit = cmd!(inner, "git rev-parse HEAD").quiet().read();
    cmd!(sh, "git worktree remove --force {scratch}").run_quiet()?;
    result?;
    Ok(commit?)
}

/// A way to run commands that shows what they print only if they fail
pub trait RunQuiet {
    /// Run the command.
    ///
    /// # Errors
    ///
    /// Fails with the output of the command if that fails.
    fn run_quiet(self) -> Result<()>;
}

impl RunQuiet for xshell::Cmd<'_> {
    fn run_quiet(self) -> Result<()> {
        let name = self.to_string();
        let out = self.quiet().ignore_status().output()?;
        ensure!(
            out.status.success(),
            "{name}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr).trim_end()
        );
        Ok(())
    }
}

/// The patches in a directory, in order
///
/// # Errors
///
/// Fails if the directory cannot be read.
pub fn patches_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut patches = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    patches.retain(|path| path.extension().is_some_and(|ext| ext == "patch"));
    patches.sort();
    Ok(patches)
}

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

fn replace_link(target: &Path, link: &Path) -> Result<()> {
    if fs::read_link(link).is_ok_and(|old| old == target) {
        return Ok(());
    }
    remove(link)?;
    symlink(target, link)
        .with_context(|| format!("cannot link {} to {}", link.display(), target.display()))
}

fn untar(env: &Env, tarball: &Path, dir: &Path) -> Result<()> {
    env.run(
        "unpacking QEMU",
        Command::new("tar")
            .args(["--no-same-owner", "--strip-components=1", "-xf"])
            .arg(tarball)
            .arg("-C")
            .arg(dir),
    )
}

fn git_clone(env: &Env, src: &str, args: &[&str], dir: &Path) -> Result<()> {
    env.run(
        &format!("cloning {src}"),
        Command::new("git")
            .args(["clone", "-q"])
            .args(args)
            .arg(src)
            .arg(dir),
    )
}

fn check_version(dir: &Path) -> Result<()> {
    let version = fs::read_to_string(dir.join("VERSION"))
        .context("this is not a source tree of QEMU: it has no file called VERSION")?;
    ensure!(
        is_supported(&version),
        "this is QEMU {}, but the series is for {QEMU_VERSION}.x; give a source tree, tarball or \
         git repository of QEMU 10.2.2 with --qemu-src",
        version.trim()
    );
    Ok(())
}

fn is_supported(version: &str) -> bool {
    version
        .trim()
        .strip_prefix(QEMU_VERSION)
        .is_some_and(|rest| rest.starts_with('.'))
}

/// A private `CARGO_HOME` has to use the same registry as the user's.
fn inherit_cargo_config(home: &Path) -> Result<()> {
    let users = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|dir| Path::new(&dir).join(".cargo")));
    for name in ["config.toml", "config"] {
        if let Some(config) = users.as_ref().map(|dir| dir.join(name)) {
            if config.exists() {
                fs::copy(config, home.join(name))?;
            }
        }
    }
    Ok(())
}

/// What a wrap file of a crate says
#[derive(Debug, PartialEq, Eq)]
struct Wrap {
    directory: String,
    source_filename: String,
    source_hash: String,
    patch_directory: String,
}

impl Wrap {
    fn parse(text: &str) -> Option<Self> {
        let get = |key: &str| {
            text.lines().find_map(|line| {
                let (k, v) = line.split_once('=')?;
                (k.trim() == key).then(|| v.trim().to_owned())
            })
        };
        Some(Self {
            directory: get("directory")?,
            source_filename: get("source_filename")?,
            source_hash: get("source_hash")?,
            patch_directory: get("patch_directory")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert!(is_supported("10.2.2\n"));
        assert!(is_supported("10.2.0"));
        assert!(is_supported("10.2.50"));
        assert!(!is_supported("10.2"));
        assert!(!is_supported("10.20.1"));
        assert!(!is_supported("10.1.3\n"));
        assert!(!is_supported("11.0.0\n"));
        assert!(!is_supported(""));
    }

    #[test]
    fn wraps() {
        let wrap = Wrap::parse(
            "[wrap-file]\ndirectory = either-1.12.0\nsource_filename = either-1.12.0.tar.gz\n\
             source_hash = 3dca\n#method = cargo\npatch_directory = either-1-rs\n",
        );
        assert_eq!(
            wrap,
            Some(Wrap {
                directory: "either-1.12.0".into(),
                source_filename: "either-1.12.0.tar.gz".into(),
                source_hash: "3dca".into(),
                patch_directory: "either-1-rs".into(),
            })
        );
        assert_eq!(Wrap::parse("[wrap-git]\ndirectory = x\n"), None);
    }
}
