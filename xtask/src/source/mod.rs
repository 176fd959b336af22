// SPDX-License-Identifier: GPL-2.0-or-later

//! The patched source tree of QEMU
//!
//! It is a git repository in the cache: the commit `pristine` is what was
//! downloaded or given by the user, and the checked out commit has the series
//! applied.  Files that are new in QEMU are links into this checkout, so that
//! an edit is only one `ninja` away from running.

mod crates;
mod mount;
mod obtain;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use walkdir::WalkDir;
use xshell::{cmd, Shell};

pub use self::{
    crates::forget_crates,
    mount::mounted_files,
    obtain::{pinned_file, untar},
};
use self::{
    crates::PACKAGE_CACHE,
    mount::replace_link,
    obtain::{check_version, copy_of_user, obtain, provide_subprojects},
};
use crate::{
    apt,
    env::{remove, replace_dir, sha256_of, Env},
    run::RunQuiet,
    version::QEMU,
};

/// A patched source tree
#[derive(Clone)]
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
            None => QEMU.number.to_owned(),
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
        let tmp = env.temp_dir("source")?;
        let tree = tmp.path().join("tree");
        fs::create_dir(&tree)?;
        self.unpack_to(env, qemu_src, &tree)?;
        replace_dir(&tree, &self.dir)
    }

    fn unpack_to(&self, env: &Env, qemu_src: Option<&str>, tmp: &Path) -> Result<()> {
        match qemu_src {
            None => obtain(env, tmp)?,
            Some(src) => {
                copy_of_user(env, src, tmp)?;
                check_version(tmp)?;
                provide_subprojects(env, Some(Path::new(src)), tmp)?;
            }
        }

        env.say("recording the pristine source");
        // Of the tree itself, and of what is checked out within it: git would
        // record the latter as submodules, without the files
        let git_dirs: Vec<_> = WalkDir::new(tmp)
            .max_depth(4)
            .into_iter()
            .filter_map(std::result::Result::ok)
            .filter(|entry| entry.file_name() == ".git")
            .map(walkdir::DirEntry::into_path)
            .collect();
        for dir in git_dirs {
            remove(&dir)?;
        }
        let sh = Self {
            dir: tmp.to_owned(),
            key: String::new(),
        }
        .git()?;
        cmd!(sh, "git init -q").run_quiet()?;
        // also what .gitignore excludes
        cmd!(sh, "git add -A -f .").run_quiet()?;
        cmd!(sh, "git commit -q -m pristine").run_quiet()?;
        cmd!(sh, "git tag pristine").run_quiet()
    }

    /// Whether this is Debian's repacked tarball, which lacks some files
    fn is_debian(&self) -> Result<bool> {
        let sh = self.git()?;
        Ok(cmd!(sh, "git ls-tree pristine subprojects/packagefiles")
            .read_quiet()?
            .is_empty())
    }

    /// The patches that are not for upstream, and those of the series
    fn patches(&self, env: &Env) -> Result<[Vec<PathBuf>; 2]> {
        let mut local = patches_for_libvirt(env)?;
        if self.is_debian()? {
            local.extend(patches_for_tarball(env)?);
        }
        Ok([local, patches_in(&env.repo.join("patches/qemu"))?])
    }

    /// Where it is written which patches the tree has
    fn stamp(&self) -> PathBuf {
        self.dir.join(".git/series")
    }

    fn apply_series(&self, env: &Env) -> Result<()> {
        let patches = self.patches(env)?;
        let wanted = hash_patches(&patches)?;
        if fs::read_to_string(self.stamp()).is_ok_and(|s| s == wanted) {
            return Ok(());
        }

        let count = patches.iter().map(Vec::len).sum::<usize>();
        env.say(&format!("applying {count} patches"));
        // In a scratch tree, so that checking out the result only touches the
        // files that differ from the previous one; and so that the tree is
        // left alone if the series does not apply.
        let tmp = env.temp_dir("am")?;
        let scratch = tmp.path().join("tree");
        let commit = am_in_worktree(&self.git()?, &scratch, &patches).with_context(|| {
            format!(
                "the series does not apply to this source; it is made for QEMU {}",
                QEMU.number
            )
        })?;

        let sh = self.git()?;
        // Files that are mounted over QEMU's own, and others left by a build
        cmd!(sh, "git checkout -q --force --detach {commit}").run_quiet()?;
        forget_crates(&env.cache.join("build").join(&self.key))?;
        fs::write(self.stamp(), wanted)?;
        Ok(())
    }

    /// Note that the tree has the patches of this checkout: they were made from
    /// it.
    ///
    /// # Errors
    ///
    /// Fails if a patch cannot be read.
    pub fn series_is_applied(&self, env: &Env) -> Result<()> {
        let wanted = hash_patches(&self.patches(env)?)?;
        fs::write(self.stamp(), wanted)?;
        Ok(())
    }

    /// The tree for the default source, as it is: nothing is applied or
    /// mounted.
    ///
    /// # Errors
    ///
    /// Fails if there is none yet.
    pub fn existing(env: &Env) -> Result<Self> {
        let key = QEMU.number.to_owned();
        let dir = env.cache.join("src").join(&key);
        ensure!(
            dir.join(".git/series").exists(),
            "there is no patched tree of QEMU yet: run cargo xtask build"
        );
        Ok(Self { dir, key })
    }

    /// Check the pristine source out to another directory, with what Debian's
    /// tarball lacks, but without the series, unless that was done before.
    /// Nothing is mounted there.  It
    /// has the same name and place below `root` as the tree has below the
    /// cache, so that ccache finds that the files are the same.
    ///
    /// # Errors
    ///
    /// Fails if git does.
    pub fn pristine_worktree(&self, env: &Env, root: &Path) -> Result<Self> {
        let dir = root.join("src").join(&self.key);
        let sh = self.git()?;
        let this = Self {
            dir: dir.clone(),
            key: self.key.clone(),
        };
        let complete = root.join("src").join(format!("{}.complete", self.key));
        if complete.exists() && dir.exists() {
            return Ok(this);
        }
        remove(&dir)?;
        cmd!(sh, "git worktree prune").run_quiet()?;
        cmd!(sh, "git worktree add -q --detach {dir} pristine").run_quiet()?;
        if this.is_debian()? {
            let patches = patches_for_tarball(env)?;
            let inner = this.git()?;
            cmd!(inner, "git am -q --keep-cr {patches...}").run_quiet()?;
        }
        this.provide_overlays(env, &this.wraps()?)?;
        replace_link(&self.dir.join(PACKAGE_CACHE), &this.dir.join(PACKAGE_CACHE))?;
        fs::write(complete, "")?;
        Ok(this)
    }
}

/// Makes git independent of the configuration of the user.
const GIT_ENV: [(&str, &str); 9] = [
    ("GIT_CONFIG_GLOBAL", "/dev/null"),
    ("GIT_CONFIG_SYSTEM", "/dev/null"),
    ("GIT_AUTHOR_NAME", "xtask"),
    ("GIT_AUTHOR_EMAIL", "xtask@localhost"),
    ("GIT_COMMITTER_NAME", "xtask"),
    ("GIT_COMMITTER_EMAIL", "xtask@localhost"),
    // It would repack the whole tree in the background, for the few commits there
    // are.
    ("GIT_CONFIG_COUNT", "1"),
    ("GIT_CONFIG_KEY_0", "gc.auto"),
    ("GIT_CONFIG_VALUE_0", "0"),
];

fn hash_patches(patches: &[Vec<PathBuf>; 2]) -> Result<String> {
    let contents = patches
        .iter()
        .flatten()
        .map(fs::read)
        .collect::<std::io::Result<Vec<_>>>()?;
    let parts: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
    Ok(sha256_of(&parts))
}

/// The tag of the commit that the series is applied to: the pristine source, or
/// what makes it of Debian's
pub const BASE: &str = "base";

/// Do something in a new worktree, which is removed again.
///
/// # Errors
///
/// Fails if there cannot be one, or if that fails.
pub fn in_worktree<T>(
    sh: &Shell,
    scratch: &Path,
    commit: &str,
    f: impl FnOnce(&Shell) -> Result<T>,
) -> Result<T> {
    cmd!(sh, "git worktree prune").run_quiet()?;
    cmd!(sh, "git worktree add -q --detach {scratch} {commit}").run_quiet()?;
    let inner = sh.clone();
    inner.change_dir(scratch);
    let result = f(&inner);
    cmd!(sh, "git worktree remove --force {scratch}").run_quiet()?;
    result
}

/// Apply patches to the pristine source in a new worktree, and return the commit.
fn am_in_worktree(sh: &Shell, scratch: &Path, patches: &[Vec<PathBuf>; 2]) -> Result<String> {
    let [local, series] = patches;
    in_worktree(sh, scratch, "pristine", |inner| {
        let am = |some: &[PathBuf]| match some {
            [] => Ok(()),
            some => cmd!(inner, "git am -q --keep-cr {some...}").run_quiet(),
        };
        am(local)?;
        cmd!(inner, "git tag -f {BASE}").run_quiet()?;
        am(series)?;
        cmd!(inner, "git rev-parse HEAD").read_quiet()
    })
}

/// The patches that are not for upstream: the trees that are built have them, but
/// not the exported series
///
/// # Errors
///
/// Fails if a directory cannot be read.
pub fn local_patches(env: &Env) -> Result<Vec<PathBuf>> {
    let mut patches = patches_for_libvirt(env)?;
    patches.extend(patches_for_tarball(env)?);
    Ok(patches)
}

/// The patches for what is different in Debian's tarball
fn patches_for_tarball(env: &Env) -> Result<Vec<PathBuf>> {
    patches_in(&env.repo.join("patches/debian-source"))
}

/// The patches that let the libvirt of Debian's releases work with QEMU
///
/// # Errors
///
/// Fails if the directory cannot be read.
pub fn patches_for_libvirt(env: &Env) -> Result<Vec<PathBuf>> {
    patches_in(&env.repo.join("patches/libvirt"))
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
