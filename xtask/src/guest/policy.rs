// SPDX-License-Identifier: GPL-2.0-or-later

//! Guests whose balloon drivers deflate on OOM as different versions of Linux
//! did.  The drivers are built from Debian's source of the kernel that all other
//! guests have, and the patches in `patches/linux`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use xshell::{cmd, Shell};

use super::{assets, Assets};
use crate::{
    apt,
    env::{replace_dir, sha256_of, Env},
    run::{shell_in, RunQuiet},
};

/// When the driver takes pages out of the balloon by itself
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// In the OOM notifier; how many is a parameter of the module (Linux 3.19)
    #[value(name = "oom-notifier-2014")]
    OomNotifier2014,
    /// Whenever memory is reclaimed (Linux 4.19)
    #[value(name = "shrinker-2018")]
    Shrinker2018,
    /// In the OOM notifier (Linux 5.7 and later)
    #[value(name = "oom-notifier-2020")]
    OomNotifier2020,
}

impl Policy {
    /// The name on the command line, and of the patch
    pub const fn name(self) -> &'static str {
        match self {
            Self::OomNotifier2014 => "oom-notifier-2014",
            Self::Shrinker2018 => "shrinker-2018",
            Self::OomNotifier2020 => "oom-notifier-2020",
        }
    }

    /// The patch that makes the driver of Linux `version` follow the policy;
    /// `None` if it does so by itself
    fn patch(self, env: &Env, version: &str) -> Option<PathBuf> {
        let dir = env.repo.join("patches/linux").join(version);
        (self != Self::OomNotifier2020).then(|| dir.join(format!("{}.patch", self.name())))
    }
}

/// What is needed to build modules, besides the compiler of the kernel
const PACKAGES: &[&str] = &["libc6-dev", "libelf1", "make", "patch", "xz-utils"];

const DRIVER: &str = "drivers/virtio/virtio_balloon.c";
const KBUILD: &str = "obj-m := virtio_balloon.o\n";

/// A process that wants memory
const PROGRAM: &str = "tests-functional/memory.c";

/// Get the kernel of a Debian suite, and a directory with an initramfs for each
/// of the policies, `NAME.gz`, unless that was done before.
///
/// # Errors
///
/// Fails if there are no patches for this kernel, or packages are missing.
pub fn provision(env: &Env, suite: &str) -> Result<(Assets, PathBuf)> {
    let base = assets::provision(env, suite)?;
    let version = version_of(&base.release)?;
    let mut parts = vec![
        fs::read(&base.initrd)?,
        fs::read(env.repo.join(PROGRAM))?,
        KBUILD.into(),
    ];
    for policy in Policy::value_variants() {
        if let Some(patch) = policy.patch(env, version) {
            parts.push(
                fs::read(&patch)
                    .with_context(|| format!("there is no patch for Linux {version}"))?,
            );
        }
    }
    let hash = sha256_of(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let dir = env
        .cache
        .join("guest")
        .join(format!("policies-{}-{}", base.release, &hash[..12]));
    if !dir.exists() {
        make(env, suite, &base, &dir)?;
    }
    Ok((base, dir))
}

/// Build the drivers, and the directory with the initramfs.
fn make(env: &Env, suite: &str, base: &Assets, dir: &Path) -> Result<()> {
    let version = version_of(&base.release)?;
    let tmp = env.temp_dir("policies")?;
    let (root, done) = (tmp.path().join("root"), tmp.path().join("done"));
    fs::create_dir(&root)?;
    fs::create_dir(&done)?;
    let compiler = unpack(env, suite, base, &root)?;
    let source = root.join(format!("usr/src/linux-source-{version}"));
    let sh = Shell::new()?;

    let (program, memory) = (env.repo.join(PROGRAM), tmp.path().join("memory"));
    cmd!(sh, "{compiler} -O2 -Wall -static -o {memory} {program}").run_quiet()?;
    for policy in Policy::value_variants() {
        let name = policy.name();
        env.say(&format!("building the driver with {name}"));
        let build = tmp.path().join(name);
        fs::create_dir(&build)?;
        fs::copy(source.join(DRIVER), build.join("virtio_balloon.c"))?;
        fs::write(build.join("Kbuild"), KBUILD)?;
        if let Some(patch) = policy.patch(env, version) {
            cmd!(sh, "patch -s -F0 -d {build} -p3 -i {patch}").run_quiet()?;
        }
        let headers = headers(&root, &base.release);
        cmd!(sh, "make -C {headers} M={build} CC={compiler} modules").run_quiet()?;
        base.with_files(
            &[("virtio_balloon", &build.join("virtio_balloon.ko"))],
            &[("memory", &memory)],
            &done.join(format!("{name}.gz")),
        )?;
    }
    replace_dir(&done, dir)
}

/// Unpack what is needed to build modules for a kernel, and the source of the
/// driver, below `root`, and return the name of the compiler.
fn unpack(env: &Env, suite: &str, base: &Assets, root: &Path) -> Result<String> {
    let version = version_of(&base.release)?;
    let repo = apt::Suite::new(env, suite, "amd64")?;
    let package = format!("linux-headers-{}", base.release);
    let depends = repo.depends(&package).with_context(|| {
        format!(
            "Debian {suite} does not have Linux {} any more; remove {} to get the one it has",
            base.release,
            base.initrd.with_file_name("release").display()
        )
    })?;
    let compiler = depends
        .iter()
        .find_map(|name| compiler_of(name))
        .with_context(|| format!("{package} does not depend on a compiler"))?;
    apt::ensure_packages(env, &[PACKAGES, &[compiler]].concat())?;

    let sh = shell_in(root)?;
    let source = format!("linux-source-{version}");
    let rest = depends
        .iter()
        .filter(|name| name.starts_with("linux-") && compiler_of(name).is_none());
    for name in [&package, &source].into_iter().chain(rest) {
        let deb = repo.download(env, name)?;
        cmd!(sh, "dpkg-deb -x {deb} .").run_quiet()?;
    }
    // The package refers to another one by its absolute path.
    let makefile = headers(root, &base.release).join("Makefile");
    let text = fs::read_to_string(&makefile)?;
    let here = format!("include {}/usr/src/", root.display());
    fs::write(&makefile, text.replace("include /usr/src/", &here))?;
    sh.change_dir("usr/src");
    cmd!(
        sh,
        "tar -xJf {source}.tar.xz --occurrence=1 {source}/{DRIVER}"
    )
    .run_quiet()?;
    Ok(compiler.to_owned())
}

/// The headers of a kernel, below `root`
fn headers(root: &Path, release: &str) -> PathBuf {
    root.join(format!("usr/src/linux-headers-{release}"))
}

/// `6.1.0-50-cloud-amd64` is a Linux 6.1.
fn version_of(release: &str) -> Result<&str> {
    let end = release.match_indices('.').nth(1);
    let (end, _) = end.with_context(|| format!("{release} is not the release of a kernel"))?;
    Ok(&release[..end])
}

/// `linux-compiler-gcc-12-x86` depends on `gcc-12`.
fn compiler_of(package: &str) -> Option<&str> {
    package
        .strip_prefix("linux-compiler-")?
        .strip_suffix("-x86")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for policy in Policy::value_variants() {
            let value = policy.to_possible_value().unwrap();
            assert_eq!(value.get_name(), policy.name());
        }
        assert_eq!(version_of("6.1.0-50-cloud-amd64").unwrap(), "6.1");
        assert_eq!(version_of("6.12.1+deb13-cloud-amd64").unwrap(), "6.12");
        version_of("6").unwrap_err();
        assert_eq!(compiler_of("linux-compiler-gcc-12-x86"), Some("gcc-12"));
        assert_eq!(compiler_of("linux-kbuild-6.1"), None);
    }
}
