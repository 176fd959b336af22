// SPDX-License-Identifier: GPL-2.0-or-later

//! Where things are, and how to tell the user what is going on

use std::{
    env,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{bail, Context, Result};
use indicatif::{MultiProgress, ProgressDrawTarget};
use nix::sys::statvfs::statvfs;
use sha2::{Digest, Sha256};
use tempfile::{Builder, TempDir};

/// The directory in the cache that has what is needed for one command only
const TEMPORARY: &str = "tmp";

/// The environment of a command
pub struct Env {
    /// The checkout of this project
    pub repo: PathBuf,
    /// Everything that can be fetched or built again
    pub cache: PathBuf,
    /// Shows how far several programs are
    pub bars: MultiProgress,
    /// Show no progress
    pub quiet: bool,
    start: Instant,
    _lock: File,
}

impl Env {
    /// Find the checkout and the cache directory.  Waits until no other
    /// command is using the cache.
    ///
    /// # Errors
    ///
    /// Fails if there is no home directory, or the cache cannot be created.
    pub fn new(quiet: bool) -> Result<Self> {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask is not in a checkout")?
            .to_owned();
        let base = env::var_os("XDG_CACHE_HOME")
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from)
            .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
            .context(
                "neither XDG_CACHE_HOME nor HOME is set, so there is no place for the cache",
            )?;
        let cache = base.join("qemu-virtio-balloon-rs");
        fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;

        let lock = File::create(cache.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("waiting for another cargo xtask to finish");
                lock.lock()?;
            }
            Err(TryLockError::Error(err)) => {
                return Err(err).with_context(|| format!("cannot lock {}", cache.display()));
            }
        }
        // Nobody uses these any more: that takes the lock.
        let temporary = cache.join(TEMPORARY);
        remove(&temporary)?;
        fs::create_dir(&temporary)?;
        Ok(Self {
            repo,
            cache,
            bars: bars(quiet),
            quiet,
            start: Instant::now(),
            _lock: lock,
        })
    }

    /// An environment with its cache in the given directory, for tests
    #[cfg(test)]
    pub fn for_tests(dir: &Path) -> Self {
        fs::create_dir(dir.join(TEMPORARY)).unwrap();
        Self {
            repo: dir.to_owned(),
            cache: dir.to_owned(),
            bars: bars(true),
            quiet: true,
            start: Instant::now(),
            _lock: File::create(dir.join("lock")).unwrap(),
        }
    }

    /// Tell what is going on, unless the user wants silence.
    pub fn say(&self, msg: &str) {
        if !self.quiet {
            let seconds = self.start.elapsed().as_secs();
            self.bars.suspend(|| eprintln!("[{seconds:4} s] {msg}"));
        }
    }

    /// A temporary directory on the disk of the cache.  Those that are left by
    /// a command that was killed are removed by the next one.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be created.
    pub fn temp_dir(&self, what: &str) -> Result<TempDir> {
        Ok(Builder::new()
            .prefix(&format!("{what}-"))
            .tempdir_in(self.cache.join(TEMPORARY))?)
    }

    /// Fail early if the disk of the cache has less than `gib` GiB left.
    ///
    /// # Errors
    ///
    /// Fails if there is too little space.
    pub fn need_space(&self, gib: u64) -> Result<()> {
        match self.lack_of_space(gib)? {
            Some(problem) => bail!(problem),
            None => Ok(()),
        }
    }

    /// What is wrong if the disk of the cache has less than `gib` GiB left
    ///
    /// # Errors
    ///
    /// Fails if that cannot be found out.
    pub fn lack_of_space(&self, gib: u64) -> Result<Option<String>> {
        let stat = statvfs(&self.cache)?;
        let free = stat.blocks_available() * stat.fragment_size();
        Ok((free < gib << 30).then(|| {
            format!(
                "{} has {} MiB left, but about {gib} GiB are needed; free some space or set \
                 XDG_CACHE_HOME to a directory on another disk",
                self.cache.display(),
                free >> 20
            )
        }))
    }
}

fn bars(quiet: bool) -> MultiProgress {
    MultiProgress::with_draw_target(if quiet {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    })
}

/// SHA-256 of a file, in hexadecimal
///
/// # Errors
///
/// Fails if the file cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash)?;
    Ok(format!("{:x}", hash.finalize()))
}

/// SHA-256 of a number of byte strings, in hexadecimal
pub fn sha256_of(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    format!("{:x}", hash.finalize())
}

/// An error as part of another one, without the log of a command that has
/// failed except for the line that tells the error, or the last one
pub fn one_line(err: &anyhow::Error) -> String {
    let text = format!("{err:#}");
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    let log: Vec<_> = lines.collect();
    let is_error = |line: &&&str| {
        // of git, apt and tar
        ["fatal: ", "error: ", "E: ", "tar: "]
            .iter()
            .any(|prefix| line.starts_with(prefix))
    };
    match log.iter().find(is_error).or_else(|| log.last()) {
        Some(line) => format!("{first} {line}"),
        None => first.to_owned(),
    }
}

/// Remove a file or directory, if it is there.
///
/// # Errors
///
/// Fails if it exists and cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path)?,
        Ok(_) => fs::remove_file(path)?,
        Err(_) => {}
    }
    Ok(())
}

/// Put a directory that is complete where it belongs, in place of what is
/// there.
///
/// # Errors
///
/// Fails if they are on different disks, for example.
pub fn replace_dir(complete: &Path, dir: &Path) -> Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    remove(dir)?;
    Ok(fs::rename(complete, dir)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_in_one_line() {
        let log = anyhow::anyhow!("x failed (status 1):\nlong\nlog\nlast\n\n").context("why");
        assert_eq!(one_line(&log), "why: x failed (status 1): last");
        assert_eq!(one_line(&anyhow::anyhow!("short")), "short");
        let git = anyhow::anyhow!("x failed:\nfatal: no\nPlease check\n");
        assert_eq!(one_line(&git), "x failed: fatal: no");
    }

    #[test]
    fn temporary_directories_go_away() {
        let tmp = tempfile::tempdir().unwrap();
        let env = Env::for_tests(tmp.path());
        let dir = env.temp_dir("x").unwrap();
        let path = dir.path().to_owned();
        assert!(path.starts_with(&env.cache) && path.is_dir());
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn known_hash() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(Path::new("/dev/null")).unwrap(), empty);
    }

    #[test]
    fn hashes_tell_parts_apart() {
        assert_ne!(sha256_of(&[b"ab", b"c"]), sha256_of(&[b"a", b"bc"]));
        assert_eq!(sha256_of(&[]).len(), 64);
    }
}
