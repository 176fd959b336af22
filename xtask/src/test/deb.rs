// SPDX-License-Identifier: GPL-2.0-or-later

//! The packages that `cargo xtask deb` has built, in a Debian of their own: they
//! replace Debian's, boot the demo's guest, and go away again

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Result};
use xshell::{cmd, Cmd, Shell};

use super::results::Count;
use crate::{
    apt,
    build::{Build, Device, Target},
    deb::{built_packages, VERSION_SUFFIX},
    env::Env,
    guest,
    run::RunQuiet,
    version::QEMU,
};

/// What is needed to have another Debian in a directory
pub const PACKAGES: &[&str] = &["bubblewrap", "ca-certificates", "mmdebstrap"];

/// Debian's packages that are replaced, without those that these depend on
const REPLACED: &[&str] = &[
    "qemu-system-x86",
    "qemu-system-gui",
    "qemu-utils",
    "qemu-block-extra",
];

/// Prints packages that are installed, or have left something
const QUERY: &str = "-f=${Package} ${Version} ${db:Status-Status}\n";

/// A Debian in a directory, with programs that see nothing else except for
/// directories that are named
struct Debian<'a> {
    env: &'a Env,
    dir: PathBuf,
    /// Directories that are the same inside and outside
    shared: Vec<PathBuf>,
}

impl<'a> Debian<'a> {
    /// Install the smallest system that has apt.
    fn new(env: &'a Env, dir: PathBuf, shared: Vec<PathBuf>) -> Result<Self> {
        let sh = Shell::new()?;
        let source = format!("deb {} {} main", apt::mirror(env)?, guest::SUITE);
        let suite = guest::SUITE;
        env.run(
            &format!("installing Debian {suite} into a directory"),
            cmd!(
                sh,
                "mmdebstrap --mode=root --variant=minbase {suite} {dir} {source}"
            ),
        )?;
        // How the host gets to the mirror
        let acquire = cmd!(sh, "apt-config dump Acquire").read_quiet()?;
        fs::write(dir.join("etc/apt/apt.conf.d/99host"), acquire)?;
        cmd!(sh, "cp -rL /etc/ssl/certs {dir}/etc/ssl/").run_quiet()?;
        Ok(Self { env, dir, shared })
    }

    /// The options of bwrap, with which a program runs inside
    fn options(&self) -> Vec<String> {
        let dir = self.dir.display().to_string();
        let mut options = ["--die-with-parent", "--bind", &dir, "/"]
            .map(str::to_owned)
            .to_vec();
        options.extend(["--dev", "/dev", "--proc", "/proc"].map(str::to_owned));
        for path in &self.shared {
            let path = path.display().to_string();
            options.extend(["--bind".to_owned(), path.clone(), path]);
        }
        for path in ["/etc/resolv.conf", "/etc/hosts"] {
            options.extend(["--ro-bind-try", path, path].map(str::to_owned));
        }
        options
    }

    /// A program inside
    fn command<'s>(&self, sh: &'s Shell, program: &[&str]) -> Cmd<'s> {
        let options = self.options();
        cmd!(sh, "bwrap {options...} {program...}").env("LC_ALL", "C")
    }

    /// Run a program, and return what it prints.
    fn read(&self, program: &[&str]) -> Result<String> {
        self.command(&Shell::new()?, program).read_quiet()
    }

    /// Install or remove packages.
    fn apt_get(&self, what: &str, args: &[&str]) -> Result<()> {
        let sh = Shell::new()?;
        let program = [&["apt-get", "-y", "--no-install-recommends"], args].concat();
        let command = self.command(&sh, &program);
        self.env
            .run(what, command.env("DEBIAN_FRONTEND", "noninteractive"))?;
        // Whatever is half installed is listed.
        let audit = self.read(&["dpkg", "--audit"])?;
        ensure!(audit.is_empty(), "{audit}");
        Ok(())
    }

    /// The packages of QEMU that are installed, and their versions
    fn installed(&self) -> Result<Vec<(String, String)>> {
        let list = self.read(&["dpkg-query", "-W", QUERY])?;
        Ok(list
            .lines()
            .filter(|line| line.starts_with("qemu-"))
            .filter_map(|line| line.strip_suffix(" installed")?.split_once(' '))
            .map(|(name, version)| (name.to_owned(), version.to_owned()))
            .collect())
    }

    /// The files of packages
    fn files_of(&self, packages: &[&str]) -> Result<BTreeSet<PathBuf>> {
        let list = self.read(&[&["dpkg", "-L"], packages].concat())?;
        Ok(list
            .lines()
            .filter_map(|line| line.strip_prefix('/'))
            .map(PathBuf::from)
            .filter(|file| !self.dir.join(file).is_dir())
            .collect())
    }

    /// A program outside that runs QEMU inside
    fn write_wrapper(&self, path: &Path, program: &str) -> Result<()> {
        let options: Vec<_> = self.options().iter().map(|o| format!("'{o}'")).collect();
        let options = options.join(" ");
        fs::write(
            path,
            format!("#!/bin/sh\nexec bwrap {options} {program} \"$@\"\n"),
        )?;
        Ok(fs::set_permissions(
            path,
            fs::Permissions::from_mode(0o755),
        )?)
    }
}

/// How the documentation tells to go back
fn go_back(suite: &str) -> Vec<String> {
    REPLACED
        .iter()
        .map(|package| format!("{package}/{suite}"))
        .collect()
}

/// Install the packages over Debian's, use them, and remove them.
pub fn deb(env: &Env) -> Result<Count> {
    let packages = built_packages(env)?;
    if !apt::is_root() {
        println!("the packages are not tested: only root can install them");
        return Ok(Count {
            skipped: 1,
            ..Count::default()
        });
    }
    apt::ensure_packages(env, PACKAGES)?;
    let dir = env.temp_dir("debian")?;
    let shared = dir.path().join("shared");
    fs::create_dir(&shared)?;
    let mut files = Vec::new();
    for package in packages {
        let dest = shared.join(package.file_name().unwrap_or_default());
        fs::copy(&package, &dest)?;
        files.push(dest);
    }
    // What a guest of the test is given, and where its sockets are
    let visible = vec![shared.clone(), env.cache.join("guest"), "/tmp".into()];
    fs::create_dir_all(&visible[1])?;
    let debian = Debian::new(env, dir.path().join("root"), visible)?;
    let mut test = Test {
        debian,
        files,
        shared,
        ours: BTreeSet::new(),
    };
    let steps: [(&str, Step<'_>); 6] = [
        ("they replace Debian's", Test::replace),
        ("their QEMU has the device", Test::look),
        ("the demo", Test::demo),
        ("back to Debian's", Test::go_back),
        ("installed where there is no QEMU", Test::install),
        ("removed", Test::remove),
    ];
    let mut count = Count::default();
    for (name, step) in steps {
        // Each starts where the one before has ended.
        match step(&mut test) {
            Ok(()) => {
                println!("{name}: ok");
                count.passed += 1;
            }
            Err(err) => {
                println!("{name}: FAILED: {err:#}");
                count.failed += 1;
                break;
            }
        }
    }
    Ok(count)
}

type Step<'a> = fn(&mut Test<'a>) -> Result<()>;

/// What the steps share
struct Test<'a> {
    debian: Debian<'a>,
    files: Vec<PathBuf>,
    shared: PathBuf,
    /// The files that our packages have installed
    ours: BTreeSet<PathBuf>,
}

impl Test<'_> {
    /// Install our packages: all, or those that are installed in another version.
    fn install_ours(&mut self, what: &str) -> Result<()> {
        let files: Vec<_> = self.files.iter().filter_map(|file| file.to_str()).collect();
        self.debian
            .apt_get(what, &[&["install"], &*files].concat())?;
        let installed = self.debian.installed()?;
        let names: Vec<_> = self.files.iter().filter_map(|file| name_of(file)).collect();
        for name in &names {
            let version = installed.iter().find(|(package, _)| package == name);
            ensure!(
                version.is_some_and(|(_, version)| version.ends_with(VERSION_SUFFIX)),
                "{name}: {version:?}"
            );
        }
        self.ours = self.debian.files_of(&names)?;
        Ok(())
    }

    /// Files of ours that are there, and belong to nobody
    fn leftovers(&self) -> Result<Vec<PathBuf>> {
        let installed = self.debian.installed()?;
        let names: Vec<_> = installed.iter().map(|(name, _)| name.as_str()).collect();
        let theirs = if names.is_empty() {
            BTreeSet::new()
        } else {
            self.debian.files_of(&names)?
        };
        Ok(self
            .ours
            .difference(&theirs)
            .filter(|file| self.debian.dir.join(file).symlink_metadata().is_ok())
            .cloned()
            .collect())
    }

    fn replace(&mut self) -> Result<()> {
        let args = [&["install"], REPLACED].concat();
        self.debian.apt_get("installing Debian's QEMU", &args)?;
        self.install_ours("installing the packages in place of Debian's")
    }

    fn look(&mut self) -> Result<()> {
        for (program, device) in [
            ("qemu-system-x86_64", "virtio-balloon-pci"),
            ("qemu-system-x86_64-microvm", "virtio-balloon-device"),
            ("qemu-system-i386", "virtio-balloon-pci"),
        ] {
            let version = self.debian.read(&[program, "--version"])?;
            ensure!(
                version.contains(QEMU.number) && version.contains(VERSION_SUFFIX),
                "{program}: {version}"
            );
            // Only the Rust device has this property.
            let help = format!("{device},help");
            let properties = self.debian.read(&[program, "-device", &help])?;
            ensure!(
                properties.contains("oom-hold-time"),
                "{program}: {properties}"
            );
        }
        Ok(())
    }

    fn demo(&mut self) -> Result<()> {
        let env = self.debian.env;
        let build = Build::prepare(env, Device::Rust, Target::X86_64, None)?;
        let qemu = self.shared.join("qemu-system-x86_64");
        self.debian
            .write_wrapper(&qemu, "/usr/bin/qemu-system-x86_64")?;
        ensure!(guest::demo_with(env, &build, &qemu)?, "not as expected");
        Ok(())
    }

    fn go_back(&mut self) -> Result<()> {
        let there: BTreeSet<_> = self.debian.installed()?.into_iter().collect();
        let packages = go_back(guest::SUITE);
        let mut args = vec!["install", "--allow-downgrades"];
        args.extend(packages.iter().map(String::as_str));
        self.debian
            .apt_get("installing Debian's packages again", &args)?;
        for (name, version) in self.debian.installed()? {
            ensure!(!version.ends_with(VERSION_SUFFIX), "{name} {version}");
        }
        ensure!(!there.is_empty(), "nothing was installed");
        let left = self.leftovers()?;
        ensure!(left.is_empty(), "still there: {left:?}");
        let changed = self
            .debian
            .read(&[&["dpkg", "--verify"], REPLACED].concat())?;
        ensure!(changed.is_empty(), "files differ: {changed}");
        let version = self.debian.read(&["qemu-system-x86_64", "--version"])?;
        ensure!(!version.contains(QEMU.number), "{version}");
        Ok(())
    }

    fn install(&mut self) -> Result<()> {
        let args = [&["purge", "--autoremove"], REPLACED].concat();
        self.debian.apt_get("removing Debian's QEMU", &args)?;
        if let Some(package) = self.debian.installed()?.first() {
            bail!("{package:?} is still installed");
        }
        self.install_ours("installing the packages where there is no QEMU")?;
        self.look()
    }

    fn remove(&mut self) -> Result<()> {
        let names: Vec<_> = self.files.iter().filter_map(|file| name_of(file)).collect();
        let args = [&["purge", "--autoremove"], &*names].concat();
        self.debian.apt_get("removing the packages", &args)?;
        // purged: nothing but what others had before
        let all = self.debian.read(&["dpkg-query", "-W", QUERY])?;
        let left: Vec<_> = all.lines().filter(|l| l.starts_with("qemu-")).collect();
        ensure!(left.is_empty(), "{left:?}");
        let files = self.leftovers()?;
        ensure!(files.is_empty(), "still there: {files:?}");
        Ok(())
    }
}

/// `qemu-utils_11.1.1_amd64.deb` has the package `qemu-utils`.
fn name_of(file: &Path) -> Option<&str> {
    let name = file.file_name().and_then(OsStr::to_str)?;
    Some(name.split_once('_')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let file = Path::new("/a_b/qemu-utils_1%3a11.1.1+ds-1_amd64.deb");
        assert_eq!(name_of(file), Some("qemu-utils"));
        assert_eq!(name_of(Path::new("x.deb")), None);
    }

    /// What is tested is what the documentation tells.
    #[test]
    fn documented() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/install.md");
        let text = fs::read_to_string(docs).unwrap();
        let names: Vec<_> = REPLACED
            .iter()
            .map(|name| name.strip_prefix("qemu-").unwrap())
            .collect();
        let names = names.join(",");
        let command = format!(
            "apt-get install --allow-downgrades qemu-{{{names}}}/{}",
            guest::SUITE
        );
        assert!(text.contains(&command), "{command}");
    }
}
