// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs programs: long ones with [`Env::run`], which shows how far they are,
//! and others with [`RunQuiet`].  Both take the commands of `xshell`.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use xshell::{Cmd, Shell};

use crate::env::Env;

/// How often to tell the progress, if that goes to a file
const PROGRESS_INTERVAL: Duration = Duration::from_secs(20);

/// As long as nobody knows how much there is to do
const UNKNOWN: &str = "  {spinner} {msg} ({elapsed})";
const KNOWN: &str = "  {msg} [{bar:30}] {pos}/{len} ({elapsed})";

/// The last lines of what a program has printed
pub fn end_of(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// A shell in a directory
///
/// # Errors
///
/// Fails if there is no current directory.
pub fn shell_in(dir: impl AsRef<Path>) -> Result<Shell> {
    let sh = Shell::new()?;
    sh.change_dir(dir);
    Ok(sh)
}

/// A way to run commands that shows what they print only if they fail
pub trait RunQuiet: Sized {
    /// Run the command, and return what it has written to standard output.
    ///
    /// # Errors
    ///
    /// Fails with the output of the command if that fails.
    fn output_quiet(self) -> Result<Vec<u8>>;

    /// Run the command.
    ///
    /// # Errors
    ///
    /// Fails with the output of the command if that fails.
    fn run_quiet(self) -> Result<()> {
        self.output_quiet().map(drop)
    }

    /// Run the command, and return what it has written to standard output, as
    /// text without a newline at the end.
    ///
    /// # Errors
    ///
    /// Fails with the output of the command if that fails.
    fn read_quiet(self) -> Result<String> {
        let out = self.output_quiet()?;
        let text = String::from_utf8_lossy(&out);
        Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
    }

    /// Run the command, which may print what it likes, and return whether it
    /// was successful.
    ///
    /// # Errors
    ///
    /// Fails if there is no such program.
    fn succeeds(self) -> Result<bool>;
}

impl RunQuiet for Cmd<'_> {
    fn output_quiet(self) -> Result<Vec<u8>> {
        let name = self.to_string();
        let Output {
            status,
            stdout,
            stderr,
        } = self.quiet().ignore_status().output()?;
        ensure!(
            status.success(),
            "{name}: {}{}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr).trim_end()
        );
        Ok(stdout)
    }

    fn succeeds(self) -> Result<bool> {
        let name = self.to_string();
        let status = Command::from(self)
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("cannot run {name}"))?;
        Ok(status.success())
    }
}

impl Env {
    /// Run a command that may take long.  Its output goes to a log file in the
    /// cache; lines of ninja and `meson test` that say how far they are are
    /// shown as progress.
    ///
    /// # Errors
    ///
    /// If the command fails, the end of the log is part of the error.
    pub fn run(&self, what: &str, cmd: Cmd<'_>) -> Result<()> {
        self.say(what);
        let logs = self.cache.join("logs");
        fs::create_dir_all(&logs)?;
        let log_path = logs.join(file_name(what));
        let name = cmd.to_string();
        let bar = self.bars.add(ProgressBar::no_length());
        let status = self.follow(what, cmd, &log_path, &bar);
        bar.finish_and_clear();

        let status = status.with_context(|| format!("cannot run {name}"))?;
        if !status.success() {
            let tail = end_of(&fs::read(&log_path)?);
            bail!("{what} failed ({status}):\n{tail}");
        }
        Ok(())
    }

    /// Run a command, write its output to a log, and show its progress.
    fn follow(
        &self,
        what: &str,
        cmd: Cmd<'_>,
        log_path: &Path,
        bar: &ProgressBar,
    ) -> Result<std::process::ExitStatus> {
        let mut log = File::create(log_path)?;
        let mut child = Command::from(cmd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?)
            .spawn()?;

        // They draw nothing if standard error is not a terminal.
        bar.set_style(ProgressStyle::with_template(UNKNOWN)?);
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        let known = ProgressStyle::with_template(KNOWN)?;
        let mut last = Instant::now();
        if let Some(out) = child.stdout.take() {
            for line in BufReader::new(out).split(b'\n') {
                let line = line?;
                log.write_all(&line)?;
                log.write_all(b"\n")?;
                let Some((done, all)) = progress(&String::from_utf8_lossy(&line)) else {
                    continue;
                };
                if bar.length().is_none() {
                    bar.set_style(known.clone());
                }
                bar.set_length(all);
                bar.set_position(done);
                if bar.is_hidden() && last.elapsed() > PROGRESS_INTERVAL {
                    last = Instant::now();
                    self.say(&format!("{what}: {done} of {all}"));
                }
            }
        }
        Ok(child.wait()?)
    }
}

/// The name of a log: what is done, in letters that any shell can be given
fn file_name(what: &str) -> String {
    let name: String = what
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '-'
            }
        })
        .take(80)
        .collect();
    format!("{}.log", name.trim_matches('-'))
}

/// The numbers at the start of a line of ninja's output (`[n/m]`), or of that
/// of `meson test` (`n/m`)
fn progress(line: &str) -> Option<(u64, u64)> {
    let counts = match line.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?.0,
        None => line.trim_start().split_once(' ')?.0,
    };
    let (done, all) = counts.split_once('/')?;
    Some((done.trim().parse().ok()?, all.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use xshell::cmd;

    use super::*;

    #[test]
    fn ninja_progress() {
        assert_eq!(progress("[12/345] Compiling x.c"), Some((12, 345)));
        assert_eq!(progress("[ 3/45] x"), Some((3, 45)));
        assert_eq!(progress("[note] no numbers"), None);
        assert_eq!(progress("FAILED: x.o"), None);
        assert_eq!(progress("["), None);
        assert_eq!(progress("/usr/bin/cc x.c"), None);
    }

    #[test]
    fn meson_progress() {
        assert_eq!(progress(" 2/16 qtest - qemu:x OK 1.00s"), Some((2, 16)));
        assert_eq!(progress("Ok:                2"), None);
    }

    #[test]
    fn names_of_logs() {
        assert_eq!(file_name("building x (C)"), "building-x--C.log");
        assert_eq!(file_name("../../x"), "..-..-x.log");
    }

    #[test]
    fn errors_have_the_log() {
        let tmp = tempfile::tempdir().unwrap();
        let env = Env::for_tests(tmp.path());
        let sh = shell_in(tmp.path()).unwrap();
        let script = "echo '[1/2] one'; echo two >&2; pwd; exit 3";
        let err = env.run("a test", cmd!(sh, "sh -c {script}")).unwrap_err();
        let text = format!("{err:#}");
        let dir = tmp.path().display();
        assert!(text.starts_with("a test failed (exit status: 3):\n"));
        for part in ["[1/2] one\n", "two\n", &format!("{dir}")] {
            assert!(text.contains(part), "{text}");
        }
        let missing = env.run("another", cmd!(sh, "no-such-program")).unwrap_err();
        assert!(format!("{missing:#}").starts_with("cannot run no-such-program: "));
        env.run("good", cmd!(sh, "true")).unwrap();
    }

    #[test]
    fn output_of_failing_commands() {
        let sh = Shell::new().unwrap();
        let script = "echo out; echo err >&2; exit 1";
        let err = cmd!(sh, "sh -c {script}").run_quiet().unwrap_err();
        assert!(err.to_string().ends_with(": out\nerr"));
        assert_eq!(cmd!(sh, "echo a").read_quiet().unwrap(), "a");
        assert!(cmd!(sh, "true").succeeds().unwrap());
        assert!(!cmd!(sh, "false").succeeds().unwrap());
        cmd!(sh, "no-such-program").succeeds().unwrap_err();
    }
}
