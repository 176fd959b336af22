// SPDX-License-Identifier: GPL-2.0-or-later

//! Tests on a build with `AddressSanitizer`, `LeakSanitizer` and
//! `UndefinedBehaviorSanitizer`
//!
//! C code is instrumented with all of them, and Rust code with the first.  Rust's
//! standard library is not; but it allocates with the same `malloc()`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{
    compare,
    qtest::balloon_tests,
    results::{meson_test, Count, PASS},
};
use crate::{
    build::{Build, Device, Target},
    env::{remove, Env},
    guest::{self, SUITE},
    hugepages::{HugePages, FOR_QTESTS},
    llvm::Llvm,
    profile::NO_PROFILE,
};

/// How many random operations the devices are compared with
const OPS: u64 = 5_000;

/// Sanitizers and TCG make everything slower.
const SLOWER: &str = "--timeout-multiplier=6";

/// Where sanitizers write to
struct Reports {
    dir: PathBuf,
    vars: [(&'static str, PathBuf); 4],
}

impl Reports {
    fn new(env: &Env, symbolizer: &str) -> Result<Self> {
        let dir = env.cache.join("sanitizer-reports");
        remove(&dir)?;
        fs::create_dir_all(&dir)?;
        let suppressions = env.repo.join("xtask/lsan-suppressions.txt");
        let log = dir.join("report");
        let vars = [
            (NO_PROFILE.0, NO_PROFILE.1.to_owned()),
            // A file for each process, whatever becomes of its stderr
            (
                "ASAN_OPTIONS",
                format!("log_path={}:{symbolizer}", log.display()),
            ),
            // There is no "ERROR" in these reports: let the test fail.
            (
                "UBSAN_OPTIONS",
                format!("halt_on_error=1:abort_on_error=1:print_stacktrace=1:{symbolizer}"),
            ),
            (
                "LSAN_OPTIONS",
                format!(
                    "suppressions={}:print_suppressions=0",
                    suppressions.display()
                ),
            ),
        ]
        .map(|(name, value)| (name, value.into()));
        Ok(Self { dir, vars })
    }

    /// These variables, and others
    fn vars(&self, more: &[(&'static str, PathBuf)]) -> Vec<(&'static str, PathBuf)> {
        self.vars.iter().chain(more).cloned().collect()
    }

    /// Show the reports; each is a test that has failed.  There are warnings,
    /// too, which have no "ERROR": about coroutines, for example.
    fn count(&self) -> Result<Count> {
        let mut reports = read_all(&self.dir)?;
        reports.retain(|(_, text)| text.contains("==ERROR: "));
        for (path, text) in &reports {
            eprintln!("{}:\n{text}", path.display());
        }
        Ok(Count {
            failed: reports.len(),
            ..if reports.is_empty() {
                PASS
            } else {
                Count::default()
            }
        })
    }
}

/// The files in a directory, in the order of their names, and their contents
fn read_all(dir: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        files.push((path, String::from_utf8_lossy(&text).into_owned()));
    }
    files.sort();
    Ok(files)
}

/// Run the qtests on both devices, and some tests of each kind on the Rust
/// device.
pub fn sanitize(env: &Env, seed: &str) -> Result<Count> {
    let llvm = Llvm::provide(env)?;
    let [c, rust] = [Device::C, Device::Rust]
        .map(|device| Build::prepare_sanitized(env, &llvm, device, Target::X86_64));
    let (c, rust) = (c?, rust?);
    let reports = Reports::new(env, &llvm.symbolizer())?;
    let mut count = Count::default();
    for build in [&c, &rust] {
        build.build_qemu(env)?;
        count += qtests(env, build, &reports)?;
    }
    count += guest(env, &rust, &reports)?;
    count += compare(env, [&c, &rust], OPS, seed, &reports.vars)?;
    count += reports.count()?;
    Ok(count)
}

/// The qtests of the balloon; there are 100 hotplugs among them.
fn qtests(env: &Env, build: &Build, reports: &Reports) -> Result<Count> {
    let _pages = HugePages::reserve(env, FOR_QTESTS);
    let tests: Vec<_> = balloon_tests(build.device, Target::X86_64)
        .iter()
        .map(|test| format!("qtest-x86_64/{test}"))
        .collect();
    let mut args = vec![SLOWER];
    args.extend(tests.iter().map(String::as_str));
    let device = build.device.name();
    let vars = reports.vars(&[("QTEST_BALLOON_DEVICE", device.into())]);
    let what = format!("qtests ({device} device) with sanitizers");
    meson_test(env, build, &what, &args, &vars)
}

/// A guest that runs out of memory
fn guest(env: &Env, build: &Build, reports: &Reports) -> Result<Count> {
    let assets = guest::provision(env, SUITE)?;
    let mut vars = reports.vars(&guest::python_env(build, &assets));
    vars.push(("BALLOON_DEVICE", Device::Rust.name().into()));
    let what = format!("Linux {} with sanitizers", assets.release);
    let args = [
        SLOWER,
        "--setup=thorough",
        "--test-args=VirtioBalloonOom.test_deflate_on_oom",
        "func-x86_64-virtio_balloon_oom",
    ];
    meson_test(env, build, &what, &args, &vars)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_failures() {
        let tmp = tempfile::tempdir().unwrap();
        let env = Env::for_tests(tmp.path());
        let reports = Reports::new(&env, "").unwrap();
        assert_eq!(reports.count().unwrap(), PASS);
        let write = |pid, text| fs::write(reports.dir.join(format!("report.{pid}")), text).unwrap();
        write(3, "==3==WARNING: ASan doesn't fully support swapcontext\n");
        assert_eq!(reports.count().unwrap(), PASS);
        write(2, "==2==ERROR: LeakSanitizer: detected memory leaks\n");
        write(
            1,
            "==1==WARNING: x\n==1==ERROR: AddressSanitizer: use after free\n",
        );
        let count = reports.count().unwrap();
        assert_eq!((count.passed, count.failed), (0, 2));
        // They are those of the last time.
        let next = Reports::new(&env, "").unwrap();
        assert_eq!(next.count().unwrap(), PASS);
    }

    #[test]
    fn each_suppression_has_a_reason() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = fs::read_to_string(dir.join("lsan-suppressions.txt")).unwrap();
        let mut previous = "";
        for line in text.lines() {
            if let Some(what) = line.strip_prefix("leak:") {
                assert!(previous.starts_with("# "), "{what} has no reason");
                assert!(!what.contains("balloon"), "{what} is ours");
            } else {
                assert!(line.is_empty() || line.starts_with('#'), "{line}");
            }
            previous = line;
        }
    }
}
