// SPDX-License-Identifier: GPL-2.0-or-later

//! Configures and builds QEMU

use std::{
    env::{join_paths, split_paths, var_os},
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, Result};
use clap::ValueEnum;
use xshell::{cmd, Shell};

use crate::{
    env::{remove, sha256_of, Env},
    run::{shell_in, RunQuiet},
    source::{forget_crates, Source},
    version::QEMU,
};

const BINDGEN_VERSION: &str = "0.73.2";

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

/// Programs that QEMU's build system needs, and that are not taken from the
/// distribution
pub struct Tools {
    /// The Python virtual environment
    pub venv: PathBuf,
    bin: PathBuf,
}

impl Tools {
    /// Install the tools that are missing.
    ///
    /// # Errors
    ///
    /// Fails if something cannot be downloaded or built.
    pub fn provide(env: &Env, bindgen: bool) -> Result<Self> {
        let sh = Shell::new()?;
        let root = env.cache.join("tools");
        let requirements = env.repo.join("xtask/requirements.txt");
        let hash = sha256_of(&[&fs::read(&requirements)?]);

        let venv = root.join(format!("venv-{}", &hash[..12]));
        if !venv.join("complete").exists() {
            // Virtual environments cannot be renamed
            remove(&venv)?;
            env.run(
                "creating a Python environment",
                cmd!(sh, "python3 -m venv {venv}"),
            )?;
            let pip = venv.join("bin/pip");
            env.run(
                "installing meson and other Python packages",
                cmd!(
                    sh,
                    "{pip} install --require-hashes --no-deps -r {requirements}"
                ),
            )?;
            fs::write(venv.join("complete"), "")?;
        }

        let bindgen_root = root.join(format!("bindgen-{BINDGEN_VERSION}"));
        if bindgen && !bindgen_root.join("bin/bindgen").exists() {
            // cargo install replaces the binary atomically
            env.run(
                "building bindgen, which takes some minutes",
                cmd!(
                    sh,
                    "cargo install bindgen-cli --locked --version {BINDGEN_VERSION}
                     --root {bindgen_root}"
                ),
            )?;
        }
        Ok(Self {
            venv,
            bin: bindgen_root.join("bin"),
        })
    }

    fn path(&self) -> OsString {
        let old = var_os("PATH").unwrap_or_default();
        let dirs = [self.bin.clone()].into_iter().chain(split_paths(&old));
        join_paths(dirs).unwrap_or(old)
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
    /// Whether it has sanitizers: `AddressSanitizer` and
    /// `UndefinedBehaviorSanitizer`
    sanitized: bool,
    tools: Tools,
    ccache: PathBuf,
}

/// Where the build for a source tree is, whether or not it exists
fn build_dir(root: &Path, source_key: &str, device: Device, target: Target) -> PathBuf {
    root.join("build")
        .join(source_key)
        .join(format!("{}-{}", target.name(), device.name()))
}

/// Where the build with sanitizers is: in a directory of its own
fn sanitized_dir(normal: &Path) -> PathBuf {
    let mut name = normal.file_name().unwrap_or_default().to_owned();
    name.push("-sanitized");
    normal.with_file_name(name)
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

    /// Prepare the source and configure it with sanitizers, in a build directory
    /// of its own.
    ///
    /// # Errors
    ///
    /// Fails if a step does; the next call resumes.
    pub fn prepare_sanitized(env: &Env, device: Device, target: Target) -> Result<Self> {
        let source = Source::prepare(env, None)?;
        let mut this = Self::new(env, &env.cache, source, device, target)?;
        this.dir = sanitized_dir(&this.dir);
        this.sanitized = true;
        this.configure_if_needed(env)
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
        Self::new(env, root, source, device, target)?.configure_if_needed(env)
    }

    fn new(env: &Env, root: &Path, source: Source, device: Device, target: Target) -> Result<Self> {
        Ok(Self {
            dir: build_dir(root, &source.key, device, target),
            target,
            device,
            source,
            sanitized: false,
            tools: Tools::provide(env, device == Device::Rust)?,
            ccache: env.cache.join("ccache"),
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
        // Have the builds for C and Rust share what is the same in both.
        sh.set_var("CCACHE_BASEDIR", self.ccache.parent().unwrap_or(&self.dir));
        sh.set_var("CCACHE_NOHASHDIR", "1");
        if var_os("CCACHE_DIR").is_none() {
            sh.set_var("CCACHE_DIR", &self.ccache);
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
        args.extend(
            [
                "--without-default-features",
                "--enable-system",
                "--enable-tcg",
                "--enable-kvm",
                "--enable-fdt",
                "--disable-docs",
                "--disable-tools",
                "--disable-guest-agent",
                "--disable-install-blobs",
                "--disable-download",
            ]
            .map(str::to_owned),
        );
        if self.sanitized {
            args.extend(["--enable-asan", "--enable-ubsan"].map(str::to_owned));
        }
        let sh = Shell::new()?;
        if cmd!(sh, "ccache --version").run_quiet().is_ok() {
            args.push("--cc=ccache cc".to_owned());
        }
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
        env.need_space(4)?;
        remove(&self.dir)?;
        fs::create_dir_all(&self.dir)?;
        let what = format!(
            "configuring QEMU for {} with the {} device{}",
            self.target.name(),
            self.device.name(),
            self.with_sanitizers()
        );
        let (sh, configure) = (self.shell()?, self.source.dir.join("configure"));
        env.run(&what, cmd!(sh, "{configure} {args...}"))
    }

    const fn with_sanitizers(&self) -> &'static str {
        if self.sanitized {
            ", with sanitizers"
        } else {
            ""
        }
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
                self.with_sanitizers()
            ),
            cmd!(sh, "ninja {targets...}"),
        )
    }

    /// Build QEMU itself, and put the firmware where it finds it.
    ///
    /// # Errors
    ///
    /// Fails if something does not compile.
    pub fn build_qemu(&self, env: &Env) -> Result<()> {
        self.ninja(env, &[self.qemu_name()])?;

        let bundle = self.dir.join("qemu-bundle/usr/local/share/qemu");
        fs::create_dir_all(&bundle)?;
        for dir in [
            "/usr/share/seabios",
            "/usr/share/qemu",
            "/usr/lib/ipxe/qemu",
        ] {
            let Ok(entries) = fs::read_dir(dir) else {
                continue;
            };
            for entry in entries {
                let path = entry?.path();
                let dest = bundle.join(path.file_name().unwrap_or_default());
                if path.is_file() && !dest.exists() {
                    remove(&dest)?;
                    std::os::unix::fs::symlink(&path, &dest)?;
                }
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

/// The path of a program that was built before from the default source.
///
/// # Errors
///
/// Fails if it was not built.
pub fn built_qemu(env: &Env, device: Device, target: Target) -> Result<PathBuf> {
    let name = format!("qemu-system-{}", target.name());
    let path = build_dir(&env.cache, QEMU.number, device, target).join(name);
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
