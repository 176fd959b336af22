// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs the test suites, with the runners that they are made for

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    ops::{AddAssign, Range},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    str::FromStr,
    thread,
};

use anyhow::{bail, ensure, Context, Result};
use clap::{Args, ValueEnum};
use serde_json::Value;
use xshell::cmd;

use crate::{
    bench::HugePages,
    build::{build_both, Build, Device, Target},
    env::{remove, Env},
    guest::{self, Assets},
    series,
    source::mounted_files,
    version::KERNELS,
};

/// A group of tests
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Everything that runs in seconds: unit tests, lints, formatting
    Unit,
    /// The device under QEMU's qtest, without a guest
    Qtest,
    /// Guests that boot Linux
    Functional,
    /// Random operations on both devices, which have to act alike
    Differential,
    /// The exported series of patches
    Series,
}

/// A kernel for the functional tests
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The suite of Debian that has it
    suite: &'static str,
    /// The version that the user wants, if that depends on the day
    wanted: Option<String>,
}

impl Kernel {
    fn all() -> Vec<Self> {
        KERNELS
            .iter()
            .map(|(suite, _)| Self {
                suite,
                wanted: None,
            })
            .collect()
    }

    /// Get the kernel.
    fn provision(&self, env: &Env) -> Result<Assets> {
        let assets = guest::provision(env, self.suite)?;
        if let Some(wanted) = &self.wanted {
            ensure!(
                assets.release.starts_with(&format!("{wanted}.")),
                "--kernel {wanted}: Debian {} has Linux {}; say --kernel {0} for whatever it has",
                self.suite,
                assets.release
            );
        }
        Ok(assets)
    }
}

impl FromStr for Kernel {
    type Err = String;

    /// A suite of Debian, or the version of a kernel: that of a stable suite, or
    /// any other version, which the development suite has at some time.
    fn from_str(text: &str) -> Result<Self, String> {
        let known = KERNELS
            .iter()
            .find(|(suite, version)| *suite == text || *version == Some(text));
        if let Some((suite, _)) = known {
            return Ok(Self {
                suite,
                wanted: None,
            });
        }
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let is_version = text
            .split_once('.')
            .is_some_and(|(major, minor)| is_number(major) && is_number(minor));
        match KERNELS.iter().find(|(_, version)| version.is_none()) {
            Some((suite, _)) if is_version => Ok(Self {
                suite,
                wanted: Some(text.to_owned()),
            }),
            _ => Err(format!(
                "name a suite of Debian ({}) or a version like 6.12",
                KERNELS.iter().map(|k| k.0).collect::<Vec<_>>().join(", ")
            )),
        }
    }
}

/// What the user has chosen
#[derive(Args)]
pub struct Options {
    /// Implementation of the balloon device, for qtest and functional
    /// [default: both]
    #[arg(long, value_enum)]
    device: Option<Device>,
    /// Guest architecture, for qtest
    #[arg(long, value_enum, default_value = "x86_64")]
    target: Target,
    /// Kernel of the guest, for functional: a version (6.1, 6.12) or a suite of
    /// Debian (sid); can be repeated [default: of all suites]
    #[arg(long = "kernel")]
    kernels: Vec<Kernel>,
    /// The short form of functional: fewer repetitions, and if no kernel is
    /// given, only the oldest
    #[arg(long)]
    quick: bool,
    /// Number of operations, for differential
    #[arg(long, default_value_t = 100_000)]
    ops: u64,
    /// Seed, for differential; others give other operations
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Build QEMU after each patch, with and without Rust, for series
    #[arg(long)]
    each: bool,
}

/// How many tests had which result
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

const PASS: Count = Count {
    passed: 1,
    failed: 0,
    skipped: 0,
};

/// The tests of the balloon that the build with a device has to have
const fn balloon_tests(device: Device) -> &'static [&'static str] {
    match device {
        Device::C => &["virtio-balloon-test"],
        Device::Rust => &["virtio-balloon-test", "virtio-balloon-rust-test"],
    }
}

/// Other tests that a build with either device has to pass, as far as there are
/// any for the target
const QTESTS: &[&str] = &[
    "virtio-packed-test",
    "qos-test",
    "device-introspect-test",
    "qom-test",
    "qmp-cmd-test",
    "test-hmp",
];

/// Those that start every machine there is; some Arm machines need firmware that
/// Debian does not have.
const NEED_FIRMWARE: &[&str] = &["qom-test", "test-hmp"];

/// Run the given suites, or all of them.
///
/// # Errors
///
/// Fails if a suite could not be run.  A test that has failed is reported
/// through the exit code instead.
pub fn run(env: &Env, suites: &[Suite], options: &Options) -> Result<ExitCode> {
    let Options { device, target, .. } = *options;
    // Long tests are only run if somebody asks for them.
    let quick = options.quick || suites.is_empty() && options.kernels.is_empty();
    let suites = if suites.is_empty() {
        Suite::value_variants()
    } else {
        suites
    };
    let mut total = Count::default();
    for suite in suites {
        env.say(&format!("== {suite:?} tests"));
        let count = match suite {
            Suite::Unit => unit(env)?,
            Suite::Qtest => qtest(env, device, target)?,
            Suite::Functional => functional(env, device, &options.kernels, quick)?,
            Suite::Differential => differential(env, options)?,
            Suite::Series => {
                let patches = series::check(env, options.each)?;
                println!("the {patches} patches of the series apply and result in the same tree");
                PASS
            }
        };
        println!(
            "{suite:?}: {} passed, {} failed",
            count.passed, count.failed
        );
        total += count;
    }

    println!(
        "{} passed, {} failed, {} skipped",
        total.passed, total.failed, total.skipped
    );
    Ok(if total.failed == 0 && total.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Run cargo on what needs no QEMU.
fn cargo(env: &Env, what: &str, args: &[&str]) -> Result<String> {
    env.say(what);
    let out = Command::new("cargo")
        .args(args)
        .current_dir(&env.repo)
        .output()?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(
        out.status.success(),
        "{what} failed:\n{stdout}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(stdout)
}

fn unit(env: &Env) -> Result<Count> {
    let mut count = parse_cargo_test(&cargo(
        env,
        "unit tests of the workspace",
        &["test", "--workspace", "--locked"],
    )?);
    cargo(
        env,
        "clippy on the workspace",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--quiet",
            "--",
            "-Dwarnings",
        ],
    )?;
    count += PASS;
    cargo(
        env,
        "rustfmt on the workspace",
        &["fmt", "--all", "--check"],
    )?;
    count += PASS;
    no_unsafe(env)?;
    count += PASS;

    let build = Build::prepare(env, Device::Rust, Target::X86_64, None)?;
    count += meson_test(env, &build, "Rust unit tests", &["--suite", "rust"], &[])?;

    let rust = build.source.dir.join("rust");
    let crates = [
        "common",
        "qom",
        "migration",
        "system",
        "hwcore",
        "util",
        "virtio",
        "virtio_balloon",
    ];
    let mut clippy = cargo_in_tree(&build, env, &rust);
    clippy.args([
        "clippy",
        "--offline",
        "--locked",
        "--quiet",
        "--message-format=short",
    ]);
    for name in crates {
        clippy.args(["-p", name]);
    }
    env.say("clippy with QEMU's lints on the crates in QEMU's tree");
    let out = clippy.output()?;
    let report = String::from_utf8_lossy(&out.stderr);
    let ours = mounted_files(env)?
        .into_iter()
        .filter_map(|(_, to)| Some(to.strip_prefix("rust").ok()?.to_owned()))
        .collect();
    let sh = build.source.git()?;
    let diff = cmd!(sh, "git diff -U0 pristine HEAD -- rust")
        .quiet()
        .read()?;
    let findings = clippy_findings(&report, &ours, &added_lines(&diff));
    ensure!(
        out.status.success() && findings.is_empty(),
        "clippy:\n{}",
        if findings.is_empty() {
            report.into_owned()
        } else {
            findings.join("\n")
        }
    );
    count += PASS;

    let mut rustfmt = Command::new("rustfmt");
    rustfmt
        .args(["--check", "--edition", "2021", "--config-path"])
        .arg(rust.join("rustfmt.toml"));
    for (from, _) in mounted_files(env)? {
        // build.rs is a link to another crate's
        if from.extension().is_some_and(|ext| ext == "rs") && !from.is_symlink() {
            rustfmt.arg(from);
        }
    }
    env.run("rustfmt on the crates in QEMU's tree", &mut rustfmt)?;
    count += PASS;
    Ok(count)
}

/// cargo in QEMU's workspace, which needs the bindings that meson has generated
fn cargo_in_tree(build: &Build, env: &Env, dir: &Path) -> Command {
    let mut cmd = build.command(build.meson());
    cmd.args(["devenv", "-C"])
        .arg(&build.dir)
        .arg("--workdir")
        .arg(dir)
        .arg("cargo")
        .env("CARGO_HOME", env.cache.join("cargo-home"))
        .env("CARGO_TARGET_DIR", build.dir.join("cargo-target"));
    cmd
}

/// The lines that a diff without context adds to the files below `rust/`, by the
/// path from there
fn added_lines(diff: &str) -> BTreeMap<&str, Vec<Range<usize>>> {
    let mut added: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let mut file = "";
    for line in diff.lines() {
        if let Some(path) = line.strip_prefix("+++ b/rust/") {
            file = path;
        } else if let Some(hunk) = line.strip_prefix("@@ ") {
            let new = hunk.split_whitespace().find_map(|w| w.strip_prefix('+'));
            let Some(new) = new else { continue };
            let (start, count) = new.split_once(',').unwrap_or((new, "1"));
            if let (Ok(start), Ok(count)) = (start.parse::<usize>(), count.parse::<usize>()) {
                added.entry(file).or_default().push(start..start + count);
            }
        }
    }
    added
}

/// What clippy has to say about code that is not generated, and that is ours:
/// newer versions of clippy find fault with older code.  Ours are the given
/// files, and the lines that the series adds to others.  Errors are reported
/// wherever they are.
fn clippy_findings<'a>(
    report: &'a str,
    files: &BTreeSet<PathBuf>,
    added: &BTreeMap<&str, Vec<Range<usize>>>,
) -> Vec<&'a str> {
    let is_ours = |finding: &str| {
        let mut words = finding.split(':');
        let (file, line) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        files.contains(Path::new(file))
            || added.get(file).is_some_and(|ranges| {
                line.parse()
                    .is_ok_and(|line| ranges.iter().any(|range| range.contains(&line)))
            })
    };
    report
        .lines()
        .filter(|line| line.contains(": warning: ") || line.contains(": error"))
        .filter(|line| !line.contains("bindings.inc.rs:") && !line.contains("/trace/trace-"))
        .filter(|line| line.contains(": error") || is_ours(line))
        .collect()
}

/// The device promises not to have unsafe code, which the compiler checks; make
/// sure that the promise stays there.  Only the trace points, which QEMU
/// generates, are exempt, and that is why the device cannot `forbid` it.
fn no_unsafe(env: &Env) -> Result<()> {
    for (lib, promise) in [
        ("hw-virtio-balloon/src/lib.rs", "#![deny(unsafe_code)]"),
        (
            "hw-virtio-balloon/core/src/lib.rs",
            "#![forbid(unsafe_code)]",
        ),
    ] {
        let text = fs::read_to_string(env.repo.join(lib))?;
        ensure!(text.contains(promise), "{lib} does not have {promise}");
    }
    for (from, to) in mounted_files(env)? {
        if to.starts_with("rust/hw/virtio/balloon") && from.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&from)?;
            ensure!(
                !text.contains("allow(unsafe_code)") || to.ends_with("src/events.rs"),
                "{} allows unsafe code",
                to.display()
            );
            let found = text.lines().any(|line| {
                let code = line.split("//").next().unwrap_or("");
                code.replace("unsafe_code", "").contains("unsafe")
            });
            ensure!(!found, "{} contains unsafe code", to.display());
        }
    }
    Ok(())
}

fn qtest(env: &Env, only: Option<Device>, target: Target) -> Result<Count> {
    let devices = only.map_or_else(|| vec![Device::C, Device::Rust], |d| vec![d]);
    let mut count = Count::default();
    let mut builds = Vec::new();
    // for two VMs with 128 MiB each
    let _pages = HugePages::reserve(env, 160);

    for device in devices {
        let build = Build::prepare(env, device, target, None)?;
        build.build_qemu(env)?;
        let listed = meson_list(&build)?;
        let full_name = |test: &&str| format!("qtest-{}/{test}", target.name());
        let mut names: Vec<_> = balloon_tests(device).iter().map(full_name).collect();
        for name in &names {
            ensure!(
                listed.contains(name),
                "{name} is not part of the build with the {} device",
                device.name()
            );
        }
        names.extend(
            QTESTS
                .iter()
                .filter(|test| target != Target::Aarch64 || !NEED_FIRMWARE.contains(test))
                .map(full_name)
                .filter(|name| listed.contains(name)),
        );
        let args: Vec<_> = names.iter().map(String::as_str).collect();
        let what = format!("qtests with the {} device", device.name());
        // A test must not skip what this device is meant to have.
        let vars = [("QTEST_BALLOON_DEVICE", device.name().into())];
        count += meson_test(env, &build, &what, &args, &vars)?;
        builds.push(build);
    }
    if let [a, b] = builds.as_slice() {
        count += compare_interfaces(env, a, b)?;
    }
    Ok(count)
}

/// Boot guests.  `quick` means with one kernel, and with fewer repetitions.
fn functional(env: &Env, only: Option<Device>, kernels: &[Kernel], quick: bool) -> Result<Count> {
    let mut kernels = kernels.to_vec();
    if kernels.is_empty() {
        kernels = Kernel::all();
        if quick {
            kernels.truncate(1);
        }
    }
    let builds @ [c, rust] = &build_both(env)?;
    let stock = guest::stock_qemu(env)?;

    let mut count = Count::default();
    for kernel in kernels {
        let assets = kernel.provision(env)?;
        let run = |build: &Build| {
            let mut vars = guest::python_env(build, &assets);
            vars.push(("BALLOON_DEVICE", build.device.name().into()));
            vars.push(("BALLOON_QUICK", u8::from(quick).to_string().into()));
            let mut args = vec![
                "--setup",
                "thorough",
                "func-x86_64-virtio_balloon_guest",
                "func-x86_64-virtio_balloon_oom",
            ];
            if only.is_none() && build.device == Device::Rust {
                args.push("func-x86_64-virtio_balloon_migration");
                vars.push(("BALLOON_QEMU_C", c.qemu()));
                vars.push(("BALLOON_QEMU_RUST", rust.qemu()));
                if let Some((stock, _)) = &stock {
                    vars.push(("BALLOON_STOCK_QEMU", stock.clone()));
                }
            }
            let what = format!(
                "Linux {} with the {} device",
                assets.release,
                build.device.name()
            );
            meson_test(env, build, &what, &args, &vars)
        };

        // Each guest has one vCPU, and mostly waits.
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = builds
                .iter()
                .filter(|build| only.is_none_or(|device| device == build.device))
                .map(|build| scope.spawn(|| run(build)))
                .collect();
            threads
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect()
        });
        for result in results {
            count += result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        if only.is_none() {
            let version = stock.as_ref().map_or("none", |(_, version)| version);
            println!(
                "migration of Linux {} (stock QEMU: {version}):",
                assets.release
            );
            print_matrix(rust)?;
        }
    }
    Ok(count)
}

/// Run random operations on both devices.
fn differential(env: &Env, options: &Options) -> Result<Count> {
    let Options { ops, seed, .. } = options;
    let [c, rust] = build_both(env)?;
    env.say(&format!("{ops} random operations on both devices"));
    let status = Command::new("cargo")
        .args(["run", "-q", "--release", "--locked", "-p", "difftest", "--"])
        .current_dir(&env.repo)
        .arg("--a")
        .arg(c.qemu())
        .arg("--b")
        .arg(rust.qemu())
        .args(["--ops", &ops.to_string()])
        .args(["--seed", &seed.to_string()])
        .arg("--save")
        .arg(env.cache.join("difference.txt"))
        .status()?;
    Ok(if status.success() {
        PASS
    } else {
        Count {
            failed: 1,
            ..Count::default()
        }
    })
}

/// Show the table of migrations, which is in the log of the test.
fn print_matrix(build: &Build) -> Result<()> {
    let log = fs::read_to_string(build.dir.join("meson-logs/testlog-thorough.txt"))?;
    for line in log.lines() {
        if let Some(row) = line.strip_prefix("# ").filter(|row| row.contains(" | ")) {
            println!("  {row}");
        }
    }
    Ok(())
}

fn meson_list(build: &Build) -> Result<Vec<String>> {
    let out = build
        .command(build.meson())
        .args(["test", "--list"])
        .output()?;
    ensure!(
        out.status.success(),
        "meson test --list: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8_lossy(&out.stdout)
        .lines()
        // the suites, " - ", the project, ":", the name
        .filter_map(|line| line.split_once(" - ")?.1.split_once(':'))
        .map(|(_, name)| name.trim().to_owned())
        .collect())
}

/// Run tests with meson, and count them in the log that it writes.
fn meson_test(
    env: &Env,
    build: &Build,
    what: &str,
    args: &[&str],
    vars: &[(&'static str, PathBuf)],
) -> Result<Count> {
    let log = |name: &str| build.dir.join("meson-logs").join(name);
    let logs = ["testlog.junit.xml", "testlog-thorough.junit.xml"];
    for name in logs {
        remove(&log(name))?;
    }
    let mut cmd = build.command(build.meson());
    cmd.args(["test", "--print-errorlogs", "--num-processes=2"])
        .args(args)
        .envs(vars.iter().map(|(k, v)| (k, v)));
    let result = env.run(what, &mut cmd);

    let Some(junit) = logs.iter().map(|name| log(name)).find(|path| path.exists()) else {
        // nothing was run
        result?;
        bail!("{what}: meson has run no test");
    };
    let count = parse_junit(&fs::read_to_string(&junit)?)?;
    if let Err(err) = result {
        eprintln!("{err:#}");
        // Meson overwrites it the next time
        let kept = env
            .cache
            .join(format!("failed {what}.log").replace(' ', "-"));
        fs::copy(junit.with_extension("").with_extension("txt"), &kept)?;
        eprintln!("The complete log is in {}", kept.display());
        // even if meson does not say which test it was
        return Ok(Count {
            failed: count.failed.max(1),
            ..count
        });
    }
    println!(
        "{what}: {} passed, {} failed, {} skipped",
        count.passed, count.failed, count.skipped
    );
    Ok(count)
}

fn parse_junit(xml: &str) -> Result<Count> {
    let doc = roxmltree::Document::parse(xml).context("meson's test log is not valid XML")?;
    let mut count = Count::default();
    for case in doc.descendants().filter(|n| n.has_tag_name("testcase")) {
        let has = |tag| case.children().any(|n| n.has_tag_name(tag));
        if has("failure") || has("error") {
            count.failed += 1;
        } else if has("skipped") {
            count.skipped += 1;
        } else {
            count.passed += 1;
        }
    }
    Ok(count)
}

/// Sum up lines like `test result: ok. 3 passed; 0 failed; 1 ignored; ...`
fn parse_cargo_test(out: &str) -> Count {
    let mut count = Count::default();
    for line in out.lines().filter(|l| l.starts_with("test result:")) {
        let get = |what: &str| -> usize {
            line.split([';', '.'])
                .filter_map(|part| part.trim().strip_suffix(what))
                .find_map(|n| n.trim().parse().ok())
                .unwrap_or(0)
        };
        count += Count {
            passed: get("passed"),
            failed: get("failed"),
            skipped: get("ignored"),
        };
    }
    count
}

/// Properties that only the Rust device has, on the device and on its proxies
const RUST_ONLY_PROPERTIES: &[&str] = &["balloon-counters"];

/// Check that both devices look the same to users and management tools.
fn compare_interfaces(env: &Env, a: &Build, b: &Build) -> Result<Count> {
    env.say("comparing the properties of both devices");
    let mut count = Count::default();
    let types: &[&str] = match a.target {
        Target::S390x => &["virtio-balloon-ccw", "virtio-balloon-device"],
        _ => &[
            "virtio-balloon-pci",
            "virtio-balloon-pci-transitional",
            "virtio-balloon-pci-non-transitional",
            "virtio-balloon-device",
        ],
    };
    for typ in types {
        for (what, get) in [
            ("-device help", device_help as fn(&Build, &str) -> Result<_>),
            ("qom-list-properties", qom_properties),
            ("device-list-properties", device_properties),
        ] {
            let (left, mut right) = (get(a, typ)?, get(b, typ)?);
            ensure!(!left.is_empty(), "{what}: {typ} has no properties");
            let missing: Vec<_> = RUST_ONLY_PROPERTIES
                .iter()
                .filter(|extra| right.remove(**extra).is_none())
                .collect();
            if left == right && missing.is_empty() {
                count += PASS;
            } else {
                count.failed += 1;
                if !missing.is_empty() {
                    eprintln!("{what}: {typ} in Rust lacks {missing:?}");
                }
                eprintln!(
                    "{what} differs for {typ}:\n{}: {left:#?}\n{}: {right:#?}",
                    a.device.name(),
                    b.device.name()
                );
            }
        }
    }
    Ok(count)
}

/// Name of a property, and all that is known of it
type Properties = BTreeMap<String, String>;

fn device_help(build: &Build, typ: &str) -> Result<Properties> {
    let out = build
        .command(build.qemu())
        .args(["-device", &format!("{typ},help")])
        .output()?;
    ensure!(out.status.success(), "-device {typ},help failed");
    Ok(String::from_utf8_lossy(&out.stdout)
        .lines()
        .map(|line| {
            let (name, rest) = line.trim().split_once('=').unwrap_or((line, ""));
            (name.to_owned(), rest.to_owned())
        })
        .collect())
}

fn qom_properties(build: &Build, typ: &str) -> Result<Properties> {
    query_properties(build, "qom-list-properties", typ)
}

fn device_properties(build: &Build, typ: &str) -> Result<Properties> {
    query_properties(build, "device-list-properties", typ)
}

fn query_properties(build: &Build, command: &str, typ: &str) -> Result<Properties> {
    let mut child = build
        .command(build.qemu())
        .args([
            "-machine",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-qmp",
            "stdio",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(stdin) = &mut child.stdin {
        writeln!(stdin, "{{'execute': 'qmp_capabilities'}}")?;
        writeln!(
            stdin,
            "{{'execute': '{command}', 'id': 'q', 'arguments': {{'typename': '{typ}'}}}}"
        )?;
        writeln!(stdin, "{{'execute': 'quit'}}")?;
    }
    let out = child.wait_with_output()?;
    let reply = String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|reply| reply.get("id") == Some(&Value::from("q")))
        .with_context(|| format!("no reply to {command}"))?;
    let list = reply
        .get("return")
        .and_then(Value::as_array)
        .with_context(|| format!("{command} {typ}: {reply}"))?;
    Ok(list
        .iter()
        .map(|prop| {
            let name = prop.get("name").and_then(Value::as_str).unwrap_or_default();
            (name.to_owned(), prop.to_string())
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_results_are_summed() {
        let out = "running 2 tests\n\
            test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
            test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured\n";
        assert_eq!(
            parse_cargo_test(out),
            Count {
                passed: 5,
                failed: 1,
                skipped: 1
            }
        );
        assert_eq!(parse_cargo_test("nothing"), Count::default());
    }

    #[test]
    fn clippy_on_generated_and_old_code() {
        let diff = "\
diff --git a/rust/hw/core/src/qdev.rs b/rust/hw/core/src/qdev.rs
--- a/rust/hw/core/src/qdev.rs
+++ b/rust/hw/core/src/qdev.rs
@@ -3 +3,2 @@ context
@@ -600,0 +601 @@ context
+++ b/rust/qom/src/new.rs
@@ -0,0 +1,5 @@
";
        let added = added_lines(diff);
        assert_eq!(added["hw/core/src/qdev.rs"], [3..5, 601..602]);
        let report = "\
/b/out/bindings.inc.rs:1:1: error: x
hw/core/src/qdev.rs:2:12: warning: old
hw/core/src/qdev.rs:4:12: warning: added
hw/core/src/qdev.rs:600:12: error: denied
virtio/src/queue.rs:1:1: warning: new file
qom/src/lib.rs:1:1: warning: old
warning: `x` generated 3 warnings
";
        let files = [PathBuf::from("virtio/src/queue.rs")].into();
        assert_eq!(
            clippy_findings(report, &files, &added),
            [
                "hw/core/src/qdev.rs:4:12: warning: added",
                "hw/core/src/qdev.rs:600:12: error: denied",
                "virtio/src/queue.rs:1:1: warning: new file"
            ]
        );
    }

    #[test]
    fn kernels() {
        let suite = |text: &str| text.parse::<Kernel>().map(|k| (k.suite, k.wanted));
        assert_eq!(suite("6.1"), Ok(("bookworm", None)));
        assert_eq!(suite("trixie"), Ok(("trixie", None)));
        assert_eq!(suite("7.2"), Ok(("sid", Some("7.2".to_owned()))));
        for bad in ["", "6", "6.x", "jessie", ".1"] {
            suite(bad).unwrap_err();
        }
    }

    #[test]
    fn no_qtest_is_forgotten() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests-qtest");
        for entry in fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let Some(test) = name.strip_suffix(".c").filter(|n| n.ends_with("-test")) else {
                continue;
            };
            let mut run = balloon_tests(Device::Rust).iter().chain(QTESTS);
            assert!(run.any(|t| *t == test), "{test} is not run");
        }
    }

    #[test]
    fn meson_has_all_suites() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let meson = fs::read_to_string(dir.join("../meson.build")).unwrap();
        for suite in Suite::value_variants() {
            let name = suite.to_possible_value().unwrap();
            let entry = format!("'{}': ", name.get_name());
            assert!(meson.contains(&entry), "meson.build lacks {entry}");
        }
    }

    #[test]
    fn junit_results() {
        let xml = "<testsuites><testsuite><testcase name='a'/>\
            <testcase name='b'><failure/></testcase>\
            <testcase name='c'><skipped/></testcase><testcase name='d'><error/></testcase>\
            </testsuite></testsuites>";
        assert_eq!(
            parse_junit(xml).unwrap(),
            Count {
                passed: 1,
                failed: 2,
                skipped: 1
            }
        );
        parse_junit("<a>").unwrap_err();
    }
}
