// SPDX-License-Identifier: GPL-2.0-or-later

//! Configures and builds QEMU

use std::{
    env::var_os,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, Result};
use clap::ValueEnum;
use xshell::{cmd, Shell};

use crate::{
    env::{remove, sha256_of, Env},
    llvm::Llvm,
    run::{shell_in, RunQuiet},
    source::{forget_crates, Source},
    tools::Tools,
    version::QEMU,
};

/// Options of configure for all builds
const ALWAYS: [&str; 7] = [
    "--enable-system",
    "--enable-tcg",
    "--enable-fdt",
    "--disable-docs",
    "--disable-guest-agent",
    // Debian's tarball has none.
    "--disable-install-blobs",
    "--disable-download",
];

/// Options of configure for tests
const MINIMAL: [&str; 3] = [
    "--without-default-features",
    "--enable-kvm",
    "--disable-tools",
];

/// Options of the Rust compiler to count which lines and branches are executed
pub const COVERAGE: [&str; 2] = ["-Cinstrument-coverage", "-Zcoverage-options=branch"];

/// Has a stable compiler accept options that are not stable: for `COVERAGE`, and
/// for what QEMU's build system uses for sanitizers and for fuzzing
pub const UNSTABLE: (&str, &str) = ("RUSTC_BOOTSTRAP", "1");

/// Where Debian's packages have firmware
const FIRMWARE_DIRS: [&str; 3] = [
    "/usr/share/seabios",
    "/usr/share/qemu",
    "/usr/lib/ipxe/qemu",
];

/// In a build directory: written when configure has succeeded
const CONFIGURED: &str = "xtask-configured";

/// Which implementation of the device QEMU has
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The one in this repository
    Rust,
    /// The one of upstream QEMU
    C,
}

impl Device {
    /// The name on the command line
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rust => "rust",
            Self::C => "c",
        }
    }
}

/// Which guest architecture QEMU emulates
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// PC
    #[value(name = "x86_64")]
    X86_64,
    /// 64-bit ARM; the balloon is on PCI or virtio-mmio
    #[value(name = "aarch64")]
    Aarch64,
    /// IBM Z; the balloon is on CCW
    #[value(name = "s390x")]
    S390x,
}

impl Target {
    /// The name on the command line, and QEMU's
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
            Self::S390x => "s390x",
        }
    }
}

/// Build both devices for x86, and return the C build and the Rust build.
///
/// # Errors
///
/// Fails if one of them cannot be built.
pub fn build_both(env: &Env) -> Result<[Build; 2]> {
    let build = |device| -> Result<Build> {
        let build = Build::prepare(env, device, Target::X86_64, None)?;
        build.build_qemu(env)?;
        Ok(build)
    };
    Ok([build(Device::C)?, build(Device::Rust)?])
}

/// The program that a file in tests/qtest belongs to, if it has test cases
pub fn qtest_program(file: &str) -> Option<&str> {
    let name = file.strip_suffix(".c").filter(|n| n.ends_with("-test"))?;
    // Those for all machines that libqos knows are linked into one program.
    Some(if name.ends_with("-qos-test") {
        "qos-test"
    } else {
        name
    })
}

/// What a build is for
enum Kind {
    /// Tests: it has only what they need
    Minimal,
    /// The same with `AddressSanitizer` and `UndefinedBehaviorSanitizer`, and
    /// what a fuzzer needs, by this compiler; lines and branches are counted, too
    Sanitized { cc: String },
    /// Tests, while the executed lines and branches of Rust code are counted
    Coverage,
    /// Users, with these options of configure
    Full(Vec<String>),
}

impl Kind {
    /// At the end of the name of the directory
    const fn suffix(&self) -> &'static str {
        match self {
            Self::Minimal => "",
            Self::Sanitized { .. } => "-sanitized",
            Self::Coverage => "-coverage",
            Self::Full(_) => "-full",
        }
    }

    /// For what is told to the user
    const fn description(&self) -> &'static str {
        match self {
            Self::Minimal => "",
            Self::Sanitized { .. } => ", with sanitizers",
            Self::Coverage => ", with coverage",
            Self::Full(_) => ", with all features",
        }
    }

    /// The space that a build needs, in GiB
    const fn space(&self) -> u64 {
        match self {
            Self::Minimal | Self::Sanitized { .. } | Self::Coverage => 4,
            Self::Full(_) => 6,
        }
    }
}

/// A build directory
pub struct Build {
    /// The directory
    pub dir: PathBuf,
    /// The guest architecture
    pub target: Target,
    /// The implementation of the device
    pub device: Device,
    /// The source tree
    pub source: Source,
    kind: Kind,
    tools: Tools,
    /// Environment variables
    vars: Vec<(&'static str, OsString)>,
}

/// Environment variables for ccache: builds share what is the same in all, and
/// the cache is with everything else, unless the user says otherwise.
pub fn ccache_env(env: &Env) -> Vec<(&'static str, OsString)> {
    let dir = var_os("CCACHE_DIR").unwrap_or_else(|| env.cache.join("ccache").into());
    vec![
        ("CCACHE_BASEDIR", env.cache.clone().into()),
        ("CCACHE_NOHASHDIR", "1".into()),
        ("CCACHE_DIR", dir),
    ]
}

/// Where the build for a source tree is, whether or not it exists
fn build_dir(
    root: &Path,
    source_key: &str,
    device: Device,
    target: Target,
    kind: &Kind,
) -> PathBuf {
    root.join("build").join(source_key).join(format!(
        "{}-{}{}",
        target.name(),
        device.name(),
        kind.suffix()
    ))
}

impl Build {
    /// Prepare the source and configure it, unless that was done before.
    ///
    /// # Errors
    ///
    /// Fails if a step does; the next call resumes.
    pub fn prepare(
        env: &Env,
        device: Device,
        target: Target,
        qemu_src: Option<&str>,
    ) -> Result<Self> {
        let source = Source::prepare(env, qemu_src)?;
        Self::configured(env, &env.cache, source, device, target)
    }

    /// Prepare the source and configure it with sanitizers and for fuzzing, in a
    /// build directory of its own.
    ///
    /// # Errors
    ///
    /// Fails if a step does; the next call resumes.
    pub fn prepare_sanitized(
        env: &Env,
        llvm: &Llvm,
        device: Device,
        target: Target,
    ) -> Result<Self> {
        let source = Source::prepare(env, None)?;
        let cc = llvm.program("clang");
        let kind = Kind::Sanitized { cc };
        Self::new(env, &env.cache, source, device, target, kind)?.configure_if_needed(env)
    }

    /// Prepare the source and configure it so that the coverage of the Rust
    /// device can be measured, in a build directory of its own.
    ///
    /// # Errors
    ///
    /// Fails if a step does; the next call resumes.
    pub fn prepare_coverage(env: &Env) -> Result<Self> {
        let source = Source::prepare(env, None)?;
        let target = Target::X86_64;
        Self::new(
            env,
            &env.cache,
            source,
            Device::Rust,
            target,
            Kind::Coverage,
        )?
        .configure_if_needed(env)
    }

    /// Prepare the source and configure it for use outside of tests, in a build
    /// directory of its own, with the Rust device and the given options.
    ///
    /// # Errors
    ///
    /// Fails if a step does; the next call resumes.
    pub fn prepare_full(env: &Env, target: Target, options: Vec<String>) -> Result<Self> {
        let source = Source::prepare(env, None)?;
        let kind = Kind::Full(options);
        Self::new(env, &env.cache, source, Device::Rust, target, kind)?.configure_if_needed(env)
    }

    /// Configure a source tree, unless that was done before.  The build is
    /// below `root`.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be configured.
    pub fn configured(
        env: &Env,
        root: &Path,
        source: Source,
        device: Device,
        target: Target,
    ) -> Result<Self> {
        Self::new(env, root, source, device, target, Kind::Minimal)?.configure_if_needed(env)
    }

    fn new(
        env: &Env,
        root: &Path,
        source: Source,
        device: Device,
        target: Target,
        kind: Kind,
    ) -> Result<Self> {
        let mut vars = ccache_env(env);
        if matches!(kind, Kind::Coverage | Kind::Sanitized { .. }) {
            vars.push((UNSTABLE.0, UNSTABLE.1.into()));
        }
        Ok(Self {
            dir: build_dir(root, &source.key, device, target, &kind),
            target,
            device,
            source,
            kind,
            tools: Tools::provide(env, device == Device::Rust)?,
            vars,
        })
    }

    fn configure_if_needed(self, env: &Env) -> Result<Self> {
        let args = self.configure_args()?;
        let stamp = self.dir.join(CONFIGURED);
        let wanted = self.stamp(&args);
        if !fs::read_to_string(&stamp).is_ok_and(|s| s == wanted) {
            self.configure(env, &args)?;
            fs::write(stamp, wanted)?;
        }
        Ok(self)
    }

    /// A shell in the build directory, with the tools in the path
    ///
    /// # Errors
    ///
    /// Fails if there is no current directory.
    pub fn shell(&self) -> Result<Shell> {
        let sh = shell_in(&self.dir)?;
        sh.set_var("PATH", self.tools.path());
        for (name, value) in &self.vars {
            sh.set_var(name, value);
        }
        Ok(sh)
    }

    /// The Python interpreter of QEMU's build, which has all that tests need
    pub fn python(&self) -> PathBuf {
        self.tools.venv.join("bin/python3")
    }

    /// meson, to run tests
    pub fn meson(&self) -> PathBuf {
        self.dir.join("pyvenv/bin/meson")
    }

    fn configure_args(&self) -> Result<Vec<String>> {
        let mut args = vec![
            format!("--python={}", self.python().display()),
            format!("--target-list={}-softmmu", self.target.name()),
            match self.device {
                Device::Rust => "--enable-rust",
                Device::C => "--disable-rust",
            }
            .to_owned(),
        ];
        let coverage = format!("-Drust_args={}", COVERAGE.join(" "));
        let mut add = |options: &[&str]| args.extend(options.iter().map(ToString::to_string));
        match &self.kind {
            Kind::Minimal => add(&MINIMAL),
            Kind::Sanitized { .. } => {
                add(&MINIMAL);
                add(&["--enable-asan", "--enable-ubsan", "--enable-fuzzing"]);
                if self.device == Device::Rust {
                    add(&[&coverage]);
                }
            }
            Kind::Coverage => {
                add(&MINIMAL);
                add(&[&coverage]);
            }
            Kind::Full(_) => {}
        }
        add(&ALWAYS);
        if let Kind::Full(options) = &self.kind {
            args.extend_from_slice(options);
        }
        let cc = match &self.kind {
            Kind::Sanitized { cc } => cc,
            _ => "cc",
        };
        let sh = Shell::new()?;
        let ccache = cmd!(sh, "ccache --version").run_quiet().is_ok();
        args.push(format!("--cc={}{cc}", if ccache { "ccache " } else { "" }));
        Ok(args)
    }

    /// What the build directory was configured with, so that it is made again
    /// if that changes: meson would keep the old tools and options.
    fn stamp(&self, args: &[String]) -> String {
        let tools = [self.tools.bin.as_os_str(), self.tools.venv.as_os_str()];
        let parts: Vec<_> = tools
            .into_iter()
            .map(OsStr::as_encoded_bytes)
            .chain(args.iter().map(String::as_bytes))
            .collect();
        sha256_of(&parts)
    }

    fn configure(&self, env: &Env, args: &[String]) -> Result<()> {
        env.need_space(self.kind.space())?;
        remove(&self.dir)?;
        fs::create_dir_all(&self.dir)?;
        let what = format!(
            "configuring QEMU for {} with the {} device{}",
            self.target.name(),
            self.device.name(),
            self.kind.description()
        );
        let (sh, configure) = (self.shell()?, self.source.dir.join("configure"));
        env.run(&what, cmd!(sh, "{configure} {args...}"))
    }

    /// Have all crates built again.
    ///
    /// # Errors
    ///
    /// Fails if a file cannot be removed.
    pub fn forget_crates(&self) -> Result<()> {
        forget_crates(&self.dir)
    }

    /// Build the given targets.
    ///
    /// # Errors
    ///
    /// Fails if something does not compile.
    pub fn ninja(&self, env: &Env, targets: &[String]) -> Result<()> {
        env.need_space(1)?;
        let sh = self.shell()?;
        env.run(
            &format!(
                "building {} ({} device{})",
                targets.first().map_or("QEMU", String::as_str),
                self.device.name(),
                self.kind.description()
            ),
            cmd!(sh, "ninja {targets...}"),
        )
    }

    /// Build QEMU itself.
    ///
    /// # Errors
    ///
    /// Fails if something does not compile.
    pub fn build_qemu(&self, env: &Env) -> Result<()> {
        self.build_program(env, self.qemu_name())
    }

    /// Build a program that emulates a machine, and put the firmware where it
    /// finds it.
    ///
    /// # Errors
    ///
    /// Fails if something does not compile.
    pub fn build_program(&self, env: &Env, name: String) -> Result<()> {
        self.ninja(env, &[name])?;

        let bundle = self.dir.join("qemu-bundle/usr/local/share/qemu");
        fs::create_dir_all(&bundle)?;
        for file in firmware()? {
            let dest = bundle.join(file.file_name().unwrap_or_default());
            if !dest.exists() {
                remove(&dest)?;
                std::os::unix::fs::symlink(&file, &dest)?;
            }
        }
        Ok(())
    }

    /// Name of the program
    pub fn qemu_name(&self) -> String {
        format!("qemu-system-{}", self.target.name())
    }

    /// Path of the program
    pub fn qemu(&self) -> PathBuf {
        self.dir.join(self.qemu_name())
    }
}

/// The firmware that Debian's packages have installed
///
/// # Errors
///
/// Fails if a directory cannot be read.
pub fn firmware() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for dir in FIRMWARE_DIRS {
        let Ok(entries) = fs::read_dir(dir) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            if path.is_file() {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// The path of a program that was built before from the default source.
///
/// # Errors
///
/// Fails if it was not built.
pub fn built_qemu(env: &Env, device: Device, target: Target) -> Result<PathBuf> {
    let name = format!("qemu-system-{}", target.name());
    let path = build_dir(&env.cache, QEMU.number, device, target, &Kind::Minimal).join(name);
    if !is_executable(&path) {
        bail!(
            "not built yet: run cargo xtask build --device {} --target {}",
            device.name(),
            target.name()
        );
    }
    Ok(path)
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
