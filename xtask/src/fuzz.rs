// SPDX-License-Identifier: GPL-2.0-or-later

//! Fuzzes the device with libFuzzer, guided by coverage
//!
//! Inputs that reach something that others do not are in a file of this
//! repository, one in a line, as hexadecimal digits.

use std::{fmt::Write as _, fs, path::PathBuf, thread::available_parallelism};

use anyhow::{bail, ensure, Context, Result};
use xshell::{cmd, Shell};

use crate::{
    build::{Build, Device, Target},
    env::{remove, sha256_of, Env},
    hugepages::HugePages,
    llvm::Llvm,
    profile::{figures, Figures, NO_PROFILE, PROFILE, TOTAL},
    run::{end_of, shell_in},
};

/// The file with the inputs
const CORPUS: &str = "xtask/fuzz-corpus.txt";

/// QEMU with all fuzz targets
const PROGRAM: &str = "qemu-fuzz-x86_64";

/// The target in tests/qtest/fuzz
const TARGET: &str = "--fuzz-target=virtio-balloon";

/// For all runs: the device's messages are not shown, an input has a minute,
/// and the memory of QEMU is not taken for a leak.
const ALWAYS: [&str; 4] = [
    "-close_fd_mask=3",
    "-timeout=60",
    "-rss_limit_mb=0",
    "-detect_leaks=0",
];

/// Huge pages for a part of the guest's memory, for each process
const HUGE_PAGES: u64 = 12;

/// A build for fuzzing, and a directory with inputs
pub struct Fuzzer {
    program: PathBuf,
    sh: Shell,
    /// Inputs; there are others after [`Self::run`]
    corpus: PathBuf,
    findings: PathBuf,
    jobs: usize,
    llvm: Llvm,
    _pages: HugePages,
}

impl Fuzzer {
    /// Build it, and write the inputs of the repository to files.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be built.
    pub fn prepare(env: &Env, device: Device) -> Result<Self> {
        let llvm = Llvm::provide(env)?;
        let build = Build::prepare_sanitized(env, &llvm, device, Target::X86_64)?;
        build.build_program(env, PROGRAM.to_owned())?;
        let dir = env.cache.join(format!("fuzz-{}", device.name()));
        let (corpus, findings) = (dir.join("corpus"), dir.join("findings"));
        remove(&dir)?;
        fs::create_dir_all(&findings)?;
        fs::create_dir_all(&corpus)?;
        for input in parse(&fs::read_to_string(env.repo.join(CORPUS))?)? {
            fs::write(corpus.join(sha256_of(&[&input])), input)?;
        }

        let symbolizer = llvm.symbolizer();
        let sh = shell_in(&dir)?;
        sh.set_var(NO_PROFILE.0, NO_PROFILE.1);
        sh.set_var(
            "ASAN_OPTIONS",
            format!("detect_leaks=0:allocator_may_return_null=1:{symbolizer}"),
        );
        sh.set_var(
            "UBSAN_OPTIONS",
            format!("halt_on_error=1:print_stacktrace=1:{symbolizer}"),
        );
        let jobs = available_parallelism()?.get();
        Ok(Self {
            program: build.dir.join(PROGRAM),
            sh,
            corpus,
            findings,
            jobs,
            llvm,
            _pages: HugePages::reserve(env, HUGE_PAGES * (jobs as u64 + 1)),
        })
    }

    /// Look for more inputs; return how many were run in a second.
    ///
    /// # Errors
    ///
    /// Fails if QEMU does with one of them what it must not.
    fn run(&self, env: &Env, minutes: u64) -> Result<String> {
        let Self {
            program,
            sh,
            corpus,
            findings,
            jobs,
            ..
        } = self;
        let (seconds, jobs) = (60 * minutes, jobs.to_string());
        let args = [
            format!("-max_total_time={seconds}"),
            format!("-jobs={jobs}"),
            format!("-workers={jobs}"),
            format!("-artifact_prefix={}/", findings.display()),
            "-print_final_stats=1".to_owned(),
            "-max_len=512".to_owned(),
        ];
        let what = format!("fuzzing for {minutes} minutes, {jobs} at a time");
        let result = env.run(
            &what,
            cmd!(sh, "{program} {TARGET} {ALWAYS...} {args...} {corpus}"),
        );
        let found: Vec<_> = sh
            .read_dir(findings)?
            .iter()
            .map(|path| format!("\n{}", path.display()))
            .collect();
        ensure!(
            found.is_empty(),
            "QEMU did with these inputs what it must not:{}\nThe reports are beside them; run \
             {} {TARGET} FILE to repeat one.",
            found.concat(),
            program.display()
        );
        result?;
        let mut executions = 0;
        for i in 0..self.jobs {
            let log = fs::read_to_string(sh.current_dir().join(format!("fuzz-{i}.log")))?;
            executions += executed(&log).context("libFuzzer does not say what it did")?;
        }
        Ok(format!(
            "{executions} inputs in {minutes} minutes, {} in a second",
            executions / seconds.max(1)
        ))
    }

    /// Remove inputs that reach nothing that others do not.
    fn minimize(&mut self, env: &Env) -> Result<()> {
        let all = std::mem::replace(&mut self.corpus, self.sh.current_dir().join("minimized"));
        let (program, corpus) = (&self.program, &self.corpus);
        fs::create_dir_all(corpus)?;
        env.run(
            "removing inputs that are not needed",
            cmd!(
                self.sh,
                "{program} {TARGET} {ALWAYS...} -merge=1 {corpus} {all}"
            ),
        )
    }

    /// Run all inputs once, and return how much of the Rust device and of its
    /// bindings they execute.
    ///
    /// # Errors
    ///
    /// Fails if QEMU does with an input what it must not, or has the device in C.
    pub fn replay(&self, env: &Env) -> Result<Figures> {
        env.say("running the inputs of the fuzzer");
        let (program, corpus) = (&self.program, &self.corpus);
        let dir = self.sh.current_dir();
        // What libFuzzer says is on standard error.
        let output = cmd!(self.sh, "{program} {TARGET} {ALWAYS...} -runs=0 {corpus}")
            .env(PROFILE, dir.join("inputs.profraw"))
            .quiet()
            .ignore_status()
            .output()?;
        ensure!(
            output.status.success(),
            "QEMU did with an input what it must not:\n{}",
            end_of(&output.stderr)
        );
        let mut table = figures(&self.llvm, &dir, &[program.display().to_string()])?;
        table.remove(TOTAL).context("llvm-cov has no sum")
    }

    /// Write the inputs to the repository.
    fn save(&self, env: &Env) -> Result<()> {
        let mut inputs = Vec::new();
        for path in self.sh.read_dir(&self.corpus)? {
            inputs.push(fs::read(path)?);
        }
        fs::write(env.repo.join(CORPUS), print(inputs))?;
        Ok(())
    }
}

/// Fuzz a device, and print what was done.
///
/// # Errors
///
/// Fails if QEMU does with an input what it must not.
pub fn fuzz(env: &Env, device: Device, minutes: u64, save: bool) -> Result<()> {
    let mut fuzzer = Fuzzer::prepare(env, device)?;
    let executions = fuzzer.run(env, minutes)?;
    fuzzer.minimize(env)?;
    println!("{executions}");
    let inputs = fuzzer.sh.read_dir(&fuzzer.corpus)?.len();
    match device {
        Device::Rust => println!("{inputs} inputs {}", describe(fuzzer.replay(env)?)),
        Device::C => println!("{inputs} inputs"),
    }
    if save {
        fuzzer.save(env)?;
        println!("they are in {CORPUS}");
    }
    Ok(())
}

/// How many inputs were run, by the log of libFuzzer
fn executed(log: &str) -> Option<u64> {
    log.lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?
        .trim()
        .parse()
        .ok()
}

/// What is before, between and behind the figures in [`describe`]
pub const DESCRIPTION: [&str; 3] = [
    "execute ",
    " % of the lines of the device and of its bindings, and take ",
    " % of the branches",
];

/// What inputs do
pub fn describe(figures: Figures) -> String {
    let [before, between, behind] = DESCRIPTION;
    let [lines, branches] = figures.percent();
    format!("{before}{lines:.1}{between}{branches:.1}{behind}")
}

/// The inputs in a text
fn parse(text: &str) -> Result<Vec<Vec<u8>>> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let digits: Option<Vec<_>> = line.chars().map(|c| c.to_digit(16)).collect();
            match digits {
                Some(digits) if digits.len() % 2 == 0 => Ok(digits
                    .chunks_exact(2)
                    .map(|pair| (pair[0] << 4 | pair[1]) as u8)
                    .collect()),
                _ => bail!("{CORPUS}: not hexadecimal: {line}"),
            }
        })
        .collect()
}

/// The inputs as text, short ones first
fn print(mut inputs: Vec<Vec<u8>>) -> String {
    inputs.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    let mut text = "# Inputs of cargo xtask fuzz, see docs/security.md\n".to_owned();
    for input in inputs {
        for byte in input {
            let _ = write!(text, "{byte:02x}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_is_printed_is_read() {
        let inputs = vec![vec![1, 2], vec![0xff], vec![]];
        let text = print(inputs);
        assert!(text.ends_with("\n\nff\n0102\n"));
        assert_eq!(parse(&text).unwrap(), [vec![], vec![0xff], vec![1, 2]]);
        parse("0g").unwrap_err();
        parse("012").unwrap_err();
    }

    #[test]
    fn output_of_libfuzzer() {
        let log = "Done 7 runs in 1 second(s)\nstat::number_of_executed_units: 7\n";
        assert_eq!(executed(log), Some(7));
        assert_eq!(executed(""), None);
    }

    #[test]
    fn there_are_inputs() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join(CORPUS);
        let inputs = parse(&fs::read_to_string(path).unwrap()).unwrap();
        assert!(inputs.len() > 100);
    }
}
