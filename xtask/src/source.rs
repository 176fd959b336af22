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

use anyhow::{anyhow, bail, ensure, Context, Result};
use walkdir::WalkDir;
use xshell::{cmd, Shell};

use crate::{
    apt,
    build::Tools,
    env::{one_line, remove, sha256, sha256_of, Env},
    manifest,
    version::QEMU,
};

/// Where meson looks for crates before it downloads them
const PACKAGE_CACHE: &str = "subprojects/packagecache";

/// Directories of this checkout, and where their files go in QEMU's tree
pub const MOUNTS: &[(&str, &str)] = &[
    ("rust/bindings/virtio-sys", "rust/bindings/virtio-sys"),
    ("rust/virtio", "rust/virtio"),
    ("hw-virtio-balloon", "rust/hw/virtio/balloon"),
    ("tests-qtest", "tests/qtest"),
    ("tests-functional", "tests/functional"),
];

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
        let tmp = self.dir.with_extension("tmp");
        remove(&tmp)?;
        fs::create_dir_all(&tmp)?;
        let result = self.unpack_to(env, qemu_src, &tmp);
        if result.is_err() {
            remove(&tmp)?;
        }
        result
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
        cmd!(sh, "git tag pristine").run_quiet()?;
        remove(&self.dir)?;
        fs::rename(tmp, &self.dir)?;
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

    /// The patches for Debian's tarball, if this is it, and those of the series
    fn patches(&self, env: &Env) -> Result<[Vec<PathBuf>; 2]> {
        let quirks = if self.is_debian()? {
            quirks(env)?
        } else {
            Vec::new()
        };
        Ok([quirks, patches_in(&env.repo.join("patches/qemu"))?])
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
        let scratch = self.dir.with_extension("am");
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

    /// The tree for the default source, as it is: nothing is applied or mounted.
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

    /// Put the crates that QEMU needs, and the meson files to build them, where
    /// meson looks for them before it tries to download them.
    fn provide_crates(&self, env: &Env) -> Result<()> {
        let wraps = self.wraps()?;
        self.link_overlays(env, &wraps)?;

        let cache = self.dir.join(PACKAGE_CACHE);
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

    /// The wrap files of the crates
    fn wraps(&self) -> Result<Vec<Wrap>> {
        let mut wraps = Vec::new();
        for entry in fs::read_dir(self.dir.join("subprojects"))? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with("-rs.wrap") {
                wraps.push(
                    Wrap::parse(&fs::read_to_string(&path)?)
                        .with_context(|| format!("cannot make sense of {}", path.display()))?,
                );
            }
        }
        Ok(wraps)
    }

    /// The meson files that Debian's tarball lacks
    fn link_overlays(&self, env: &Env, wraps: &[Wrap]) -> Result<()> {
        for wrap in wraps {
            let overlay = self
                .dir
                .join("subprojects/packagefiles")
                .join(&wrap.patch_directory);
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
        Ok(())
    }

    /// Check the pristine source out to another directory, with what Debian's
    /// tarball lacks, but without the series.  Nothing is mounted there.  It has the
    /// same name and place below `root` as the tree has below the cache, so that
    /// ccache finds that the files are the same.
    ///
    /// # Errors
    ///
    /// Fails if git does.
    pub fn pristine_worktree(&self, env: &Env, root: &Path) -> Result<Self> {
        let dir = root.join("src").join(&self.key);
        let sh = self.git()?;
        cmd!(sh, "git worktree prune").run_quiet()?;
        cmd!(sh, "git worktree add -q --detach {dir} pristine").run_quiet()?;
        let this = Self {
            dir,
            key: self.key.clone(),
        };
        if this.is_debian()? {
            let patches = quirks(env)?;
            let inner = this.git()?;
            cmd!(inner, "git am -q --keep-cr {patches...}").run_quiet()?;
        }
        this.link_overlays(env, &this.wraps()?)?;
        replace_link(&self.dir.join(PACKAGE_CACHE), &this.dir.join(PACKAGE_CACHE))?;
        Ok(this)
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

/// Makes git independent of the configuration of the user.
pub const GIT_ENV: [(&str, &str); 9] = [
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

/// Have all crates built again: meson does not notice that it has to do so if a
/// procedural macro that they use was changed.
///
/// # Errors
///
/// Fails if a file cannot be removed.
pub fn forget_crates(build: &Path) -> Result<()> {
    let files = WalkDir::new(build)
        .into_iter()
        .filter_map(std::result::Result::ok);
    for entry in files {
        if entry.path().extension().is_some_and(|ext| ext == "rlib") {
            remove(entry.path())?;
        }
    }
    Ok(())
}

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

/// Apply patches to the pristine source in a new worktree, which is removed
/// again, and return the commit.
fn am_in_worktree(sh: &Shell, scratch: &Path, patches: &[Vec<PathBuf>; 2]) -> Result<String> {
    remove(scratch)?;
    cmd!(sh, "git worktree prune").run_quiet()?;
    cmd!(sh, "git worktree add -q --detach {scratch} pristine").run_quiet()?;
    let inner = sh.clone();
    inner.change_dir(scratch);
    let [quirks, series] = patches;
    let am = |some: &[PathBuf]| match some {
        [] => Ok(()),
        some => cmd!(inner, "git am -q --keep-cr {some...}").run_quiet(),
    };
    let result = am(quirks)
        .and_then(|()| cmd!(inner, "git tag -f {BASE}").run_quiet())
        .and_then(|()| am(series));
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

/// The patches for what is different in Debian's tarball
///
/// # Errors
///
/// Fails if the directory cannot be read.
pub fn quirks(env: &Env) -> Result<Vec<PathBuf>> {
    patches_in(&env.repo.join("patches/debian-source"))
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

/// The variable that names a directory with source tarballs
const SOURCES_VAR: &str = "QEMU_SOURCES";

/// The variable that names a repository to use instead of upstream's, for
/// example a mirror of it
const REPOSITORY_VAR: &str = "QEMU_REPOSITORY";

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Get the source that the series is made for, from where it can be had.
fn obtain(env: &Env, dir: &Path) -> Result<()> {
    if let Some(tarball) = tarball_in(variable(SOURCES_VAR).as_deref())? {
        return untar(env, &tarball, dir);
    }
    let Err(no_tarball) = download_tarball(env).and_then(|tarball| untar(env, &tarball, dir))
    else {
        return Ok(());
    };

    let url = variable(REPOSITORY_VAR).unwrap_or_else(|| QEMU.repository.to_owned());
    env.say(&format!(
        "cannot get {} from Debian's mirror: trying {url}",
        QEMU.tarball_name()
    ));
    remove(dir)?;
    clone_of_upstream(env, &url, dir).map_err(|no_clone| {
        anyhow!(
            "cannot get QEMU {}: neither from Debian's mirror ({}), nor from {url} ({}); put {} \
             into a directory and name that in {SOURCES_VAR}, or give a source tree, a tarball \
             or a git repository with --qemu-src",
            QEMU.number,
            one_line(&no_tarball),
            one_line(&no_clone),
            QEMU.tarball_name()
        )
    })
}

/// The pinned tarball
///
/// # Errors
///
/// Fails if it is neither in the directory that the user has named nor on
/// Debian's mirror.
pub fn pinned_tarball(env: &Env) -> Result<PathBuf> {
    match tarball_in(variable(SOURCES_VAR).as_deref())? {
        Some(tarball) => Ok(tarball),
        None => download_tarball(env),
    }
}

/// The pinned tarball in a directory, if the directory has it
fn tarball_in(dir: Option<&str>) -> Result<Option<PathBuf>> {
    let Some(dir) = dir else {
        return Ok(None);
    };
    ensure!(
        Path::new(dir).is_dir(),
        "{SOURCES_VAR}={dir}: there is no such directory; unset it, or name one with {}",
        QEMU.tarball_name()
    );
    let tarball = Path::new(dir).join(QEMU.tarball_name());
    if !tarball.exists() {
        return Ok(None);
    }
    ensure!(
        sha256(&tarball)? == QEMU.tarball_sha256,
        "{} is not the tarball of QEMU {} (its SHA-256 is not {}); remove or replace it",
        tarball.display(),
        QEMU.number,
        QEMU.tarball_sha256
    );
    Ok(Some(tarball))
}

fn download_tarball(env: &Env) -> Result<PathBuf> {
    let tarball = env.cache.join("dl").join(QEMU.tarball_name());
    let uri = apt::mirror(env)? + QEMU.tarball;
    apt::download(env, &uri, &tarball, QEMU.tarball_sha256)?;
    Ok(tarball)
}

/// Clone upstream's repository; the result has the files of the pinned tarball.
fn clone_of_upstream(env: &Env, url: &str, dir: &Path) -> Result<()> {
    git_clone(env, url, &["--depth=1", "--branch", QEMU.tag], dir)?;
    check_version(dir)?;
    provide_subprojects(env, None, dir)?;
    env.say("comparing the files with those of the tarball");
    manifest::check(env, dir)
        .with_context(|| format!("{} there is not QEMU {}", QEMU.tag, QEMU.number))
}

/// Get a source that the user has given.
fn copy_of_user(env: &Env, src: &str, dir: &Path) -> Result<()> {
    let path = Path::new(src);
    if path.is_file() {
        untar(env, path, dir)
            .map_err(|err| anyhow!("--qemu-src {src}: cannot unpack this: {}", one_line(&err)))
    } else if path.join(".git").exists() || path.join("HEAD").exists() {
        git_clone(env, src, &[], dir)
    } else if path.join("VERSION").exists() {
        env.run(
            "copying the source tree",
            Command::new("cp")
                .args(["-a", "--no-preserve=ownership"])
                .arg(path.join("."))
                .arg(dir),
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
fn provide_subprojects(env: &Env, src: Option<&Path>, dir: &Path) -> Result<()> {
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
    env.run(
        &format!("downloading {}", missing.join(", ")),
        Command::new(tools.venv.join("bin/meson"))
            .args(["subprojects", "download", "--sourcedir"])
            .arg(dir)
            .args(&missing),
    )?;
    for name in missing {
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
            // The user's configuration has to do with proxies, but not with
            // what the files contain.
            .args(["clone", "-q", "-c", "core.autocrlf=false"])
            .args(["-c", "advice.detachedHead=false"])
            .args(args)
            .arg(src)
            .arg(dir)
            .env("GIT_TERMINAL_PROMPT", "0"),
    )
}

fn check_version(dir: &Path) -> Result<()> {
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
    fn tarballs_of_the_user() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().to_str();
        let error = |sources: Option<&str>| tarball_in(sources).unwrap_err().to_string();
        assert_eq!(tarball_in(None).unwrap(), None);
        assert_eq!(tarball_in(dir).unwrap(), None);

        let tarball = tmp.path().join(QEMU.tarball_name());
        fs::write(&tarball, "something else").unwrap();
        assert!(error(dir).contains(tarball.to_str().unwrap()));
        let nowhere = tmp.path().join("nowhere");
        assert!(error(nowhere.to_str()).contains("no such directory"));
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
