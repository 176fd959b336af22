// SPDX-License-Identifier: GPL-2.0-or-later

//! The packages that `cargo xtask deb` has built, in a Debian of their own: they
//! replace Debian's, boot the demo's guest, and go away again

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Result};

use super::results::{skip, Count};
use crate::{
    apt,
    build::{Build, Device, Target},
    deb::{built_packages, VERSION_SUFFIX},
    debian::{release, Debian},
    env::Env,
    guest,
    version::QEMU,
};

/// Debian's packages that are replaced, without those that these depend on
const REPLACED: &[&str] = &[
    "qemu-system-x86",
    "qemu-system-gui",
    "qemu-utils",
    "qemu-block-extra",
];

/// Our package that replaces none, and does not need QEMU
const TOP: &str = "qemu-balloon-top";

/// Prints packages that are installed, or have left something
const QUERY: &str = "-f=${Package} ${Version} ${db:Status-Status}\n";

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
        return Ok(skip("the packages are", "only root can install them"));
    }
    let dir = env.temp_dir("debian")?;
    let shared = dir.path().join("shared");
    fs::create_dir(&shared)?;
    let mut files = Vec::new();
    for package in packages {
        let dest = shared.join(package.file_name().unwrap_or_default());
        fs::copy(&package, &dest)?;
        files.push(dest);
    }
    let mut debian = Debian::install(env, dir.path().join("root"), &[])?;
    debian.share(&shared);
    // What the guest of the demo is made of, and where its sockets are
    guest::provision(env, guest::SUITE)?;
    debian.show(&env.cache.join("guest"));
    debian.share(&std::env::temp_dir());
    let mut test = Test {
        env,
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
    env: &'a Env,
    debian: Debian<'a>,
    files: Vec<PathBuf>,
    shared: PathBuf,
    /// The files that our packages have installed
    ours: BTreeSet<PathBuf>,
}

impl Test<'_> {
    /// The names of our packages
    fn names(&self) -> Vec<&str> {
        self.files.iter().filter_map(|file| name_of(file)).collect()
    }

    /// The packages of QEMU that are installed, and their versions
    fn installed(&self) -> Result<Vec<(String, String)>> {
        let list = self.debian.read(&["dpkg-query", "-W", QUERY])?;
        Ok(list
            .lines()
            .filter(|line| line.starts_with("qemu-"))
            .filter_map(|line| line.strip_suffix(" installed")?.split_once(' '))
            .map(|(name, version)| (name.to_owned(), version.to_owned()))
            .collect())
    }

    /// The files of packages
    fn files_of(&self, packages: &[&str]) -> Result<BTreeSet<PathBuf>> {
        let list = self.debian.read(&[&["dpkg", "-L"], packages].concat())?;
        Ok(list
            .lines()
            .filter_map(|line| line.strip_prefix('/'))
            .map(PathBuf::from)
            .filter(|file| !self.debian.dir.join(file).is_dir())
            .collect())
    }

    /// Install our packages: all, or those that are installed in another version.
    fn install_ours(&mut self, what: &str) -> Result<()> {
        let files: Vec<_> = self.files.iter().filter_map(|file| file.to_str()).collect();
        self.debian
            .apt_get(what, &[&["install"], &*files].concat())?;
        let installed = self.installed()?;
        let names = self.names();
        for name in &names {
            let version = installed.iter().find(|(package, _)| package == name);
            ensure!(
                version.is_some_and(|(_, version)| version.ends_with(VERSION_SUFFIX)),
                "{name}: {version:?}"
            );
        }
        self.ours = self.files_of(&names)?;
        Ok(())
    }

    /// Files of ours that are there, and belong to nobody
    fn leftovers(&self) -> Result<Vec<PathBuf>> {
        let installed = self.installed()?;
        let names: Vec<_> = installed.iter().map(|(name, _)| name.as_str()).collect();
        let theirs = if names.is_empty() {
            BTreeSet::new()
        } else {
            self.files_of(&names)?
        };
        Ok(self
            .ours
            .difference(&theirs)
            .filter(|file| self.debian.dir.join(file).symlink_metadata().is_ok())
            .cloned()
            .collect())
    }

    fn replace(&mut self) -> Result<()> {
        self.debian
            .apt_get("getting the package lists", &["update"])?;
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
        let help = self.debian.read(&[TOP, "--help"])?;
        ensure!(help.contains("--libvirt"), "{TOP}: {help}");
        Ok(())
    }

    fn demo(&mut self) -> Result<()> {
        let build = Build::prepare(self.env, Device::Rust, Target::X86_64, None)?;
        let qemu = self.shared.join("qemu-system-x86_64");
        self.debian
            .write_wrapper(&qemu, "/usr/bin/qemu-system-x86_64")?;
        ensure!(
            guest::demo_with(self.env, &build, &qemu)?,
            "not as expected"
        );
        Ok(())
    }

    fn go_back(&mut self) -> Result<()> {
        ensure!(!self.installed()?.is_empty(), "nothing was installed");
        let packages = go_back(&release()?);
        let mut args = vec!["install", "--allow-downgrades"];
        args.extend(packages.iter().map(String::as_str));
        self.debian
            .apt_get("installing Debian's packages again", &args)?;
        for (name, version) in self.installed()? {
            ensure!(
                name == TOP || !version.ends_with(VERSION_SUFFIX),
                "{name} {version}"
            );
        }
        let left = self.leftovers()?;
        ensure!(left.is_empty(), "still there: {left:?}");
        // Since QEMU 8.0 the changelogs of some packages are links to those of
        // another, which dpkg does not change back.
        let changed = self
            .debian
            .read(&[&["dpkg", "--verify"], REPLACED].concat())?;
        let mut changed = changed
            .lines()
            .filter(|line| !line.contains("/usr/share/doc/"));
        let first = changed.next();
        ensure!(first.is_none(), "a file differs: {first:?}");
        let version = self.debian.read(&["qemu-system-x86_64", "--version"])?;
        ensure!(!version.contains(QEMU.number), "{version}");
        Ok(())
    }

    fn install(&mut self) -> Result<()> {
        // qemu-system-common, too, which was installed by name with ours
        let names: Vec<_> = self
            .installed()?
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        let names = names.iter().map(String::as_str);
        let args: Vec<_> = ["purge", "--autoremove"].into_iter().chain(names).collect();
        self.debian.apt_get("removing Debian's QEMU", &args)?;
        if let Some(package) = self.installed()?.first() {
            bail!("{package:?} is still installed");
        }
        self.install_ours("installing the packages where there is no QEMU")?;
        self.look()
    }

    fn remove(&mut self) -> Result<()> {
        let names = self.names();
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
