// SPDX-License-Identifier: GPL-2.0-or-later

//! Where things are, and how to tell the user what is going on

use std::{
    env,
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{bail, Context, Result};
use fs4::{FileExt, TryLockError};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

/// How often to tell the progress, if that goes to a file
const PROGRESS_INTERVAL: Duration = Duration::from_secs(20);

/// The environment of a command
pub struct Env {
    /// The checkout of this project
    pub repo: PathBuf,
    /// Everything that can be fetched or built again
    pub cache: PathBuf,
    quiet: bool,
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
        // Newer versions of the standard library have methods of the same names.
        match FileExt::try_lock(&lock) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("waiting for another cargo xtask to finish");
                FileExt::lock(&lock)?;
            }
            Err(TryLockError::Error(err)) => {
                return Err(err).with_context(|| format!("cannot lock {}", cache.display()));
            }
        }
        Ok(Self {
            repo,
            cache,
            quiet,
            start: Instant::now(),
            _lock: lock,
        })
    }

    /// Tell what is going on, unless the user wants silence.
    pub fn say(&self, msg: &str) {
        if !self.quiet {
            eprintln!("[{:4} s] {msg}", self.start.elapsed().as_secs());
        }
    }

    /// Run a command that may take long.  Its output goes to a log file in the
    /// cache; lines that start with a number like `[12/345]` are shown as
    /// progress.
    ///
    /// # Errors
    ///
    /// If the command fails, the end of the log is part of the error.
    pub fn run(&self, what: &str, cmd: &mut Command) -> Result<()> {
        self.say(what);
        let log_path = self.cache.join("last-command.log");
        let mut log = File::create(&log_path)?;
        let mut child = cmd
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot run {}", cmd.get_program().to_string_lossy()))?;

        // It draws nothing if standard error is not a terminal.
        let bar = if self.quiet {
            ProgressBar::hidden()
        } else {
            ProgressBar::no_length()
        };
        bar.set_style(ProgressStyle::with_template("  [{bar:30}] {pos}/{len}")?);
        let mut last = Instant::now();
        if let Some(out) = child.stdout.take() {
            for line in BufReader::new(out).split(b'\n') {
                let line = line?;
                log.write_all(&line)?;
                log.write_all(b"\n")?;
                let Some((done, all)) = progress(&String::from_utf8_lossy(&line)) else {
                    continue;
                };
                bar.set_length(all);
                bar.set_position(done);
                if bar.is_hidden() && last.elapsed() > PROGRESS_INTERVAL {
                    last = Instant::now();
                    self.say(&format!("{what}: {done} of {all}"));
                }
            }
        }
        bar.finish_and_clear();

        let status = child.wait()?;
        if !status.success() {
            let text = String::from_utf8_lossy(&fs::read(&log_path)?).into_owned();
            let lines: Vec<_> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            bail!("{what} failed ({status}):\n{tail}");
        }
        Ok(())
    }

    /// Fail early if the disk of the cache has less than `gib` GiB left.
    ///
    /// # Errors
    ///
    /// Fails if there is too little space.
    pub fn need_space(&self, gib: u64) -> Result<()> {
        let free = fs4::available_space(&self.cache)?;
        if free < gib << 30 {
            bail!(
                "{} has {} MiB left, but about {gib} GiB are needed; free some space or set \
                 XDG_CACHE_HOME to a directory on another disk",
                self.cache.display(),
                free >> 20
            );
        }
        Ok(())
    }
}

/// The numbers in the `[n/m]` at the start of a line of ninja's output
fn progress(line: &str) -> Option<(u64, u64)> {
    let (done, all) = line.strip_prefix('[')?.split_once(']')?.0.split_once('/')?;
    Some((done.trim().parse().ok()?, all.trim().parse().ok()?))
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
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of a number of byte strings, in hexadecimal
pub fn sha256_of(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

/// SHA-256 of a byte string, in hexadecimal
pub fn hash_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ninja_progress() {
        assert_eq!(progress("[12/345] Compiling x.c"), Some((12, 345)));
        assert_eq!(progress("[ 3/45] x"), Some((3, 45)));
        assert_eq!(progress("[note] no numbers"), None);
        assert_eq!(progress("FAILED: x.o"), None);
        assert_eq!(progress("["), None);
    }

    #[test]
    fn errors_in_one_line() {
        let log = anyhow::anyhow!("x failed (status 1):\nlong\nlog\nlast\n\n").context("why");
        assert_eq!(one_line(&log), "why: x failed (status 1): last");
        assert_eq!(one_line(&anyhow::anyhow!("short")), "short");
        let git = anyhow::anyhow!("x failed:\nfatal: no\nPlease check\n");
        assert_eq!(one_line(&git), "x failed: fatal: no");
    }

    #[test]
    fn hashes_tell_parts_apart() {
        assert_ne!(sha256_of(&[b"ab", b"c"]), sha256_of(&[b"a", b"bc"]));
        assert_eq!(sha256_of(&[]).len(), 64);
    }
}
