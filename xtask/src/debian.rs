// SPDX-License-Identifier: GPL-2.0-or-later

//! Another Debian, in a directory: for tests of packages, and of daemons, that
//! must not change the one that they run on

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use xshell::{cmd, Cmd, Shell};

use crate::{apt, env::Env, run::RunQuiet};

/// What it takes to have one
const PACKAGES: &[&str] = &["bubblewrap", "mmdebstrap"];

/// Space that it takes with libvirt and QEMU, in GiB
const DISK: u64 = 2;

/// A Debian in a directory.  Its programs see nothing else, except for devices,
/// the network, and directories that are shared with it.
pub struct Debian<'a> {
    env: &'a Env,
    /// What its programs call `/`
    pub dir: PathBuf,
    /// Options of bwrap for what is shared
    shared: Vec<String>,
}

impl<'a> Debian<'a> {
    /// Install the release that this system has: the smallest system with apt,
    /// and some packages.
    ///
    /// # Errors
    ///
    /// Fails if the packages cannot be downloaded or installed.
    pub fn install(env: &'a Env, dir: PathBuf, packages: &[&str]) -> Result<Self> {
        env.need_space(DISK)?;
        apt::ensure_packages(env, PACKAGES)?;
        let release = release()?;
        mmdebstrap(
            env,
            &format!("installing Debian {release} into a directory"),
            &["--mode=root", "--variant=minbase"],
            &release,
            &dir,
            packages,
        )?;
        let sh = Shell::new()?;
        let ssl = dir.join("etc/ssl");
        cmd!(sh, "cp -rL --remove-destination /etc/ssl/certs {ssl}").run_quiet()?;
        // There is no init that could start services.
        write_program(&dir.join("usr/sbin/policy-rc.d"), "exit 101\n")?;
        Ok(Self {
            env,
            dir,
            shared: Vec::new(),
        })
    }

    /// Let its programs use a file or directory, which has the same name for
    /// them.
    pub fn share(&mut self, path: &Path) {
        self.bind("--bind", path);
    }

    /// Let its programs read a file or directory, which has the same name for
    /// them.
    pub fn show(&mut self, path: &Path) {
        self.bind("--ro-bind", path);
    }

    fn bind(&mut self, option: &str, path: &Path) {
        let path = path.display().to_string();
        self.shared.extend([option.to_owned(), path.clone(), path]);
    }

    /// The options of bwrap with which a program runs inside
    fn options(&self) -> Vec<String> {
        let dir = self.dir.display().to_string();
        // Daemons make devices of their own.
        let fixed = [
            ["--cap-add", "ALL", "--unshare-pid", "--die-with-parent"].as_slice(),
            &["--dev-bind", &dir, "/", "--dev-bind", "/dev", "/dev"],
            &["--proc", "/proc", "--ro-bind", "/sys", "/sys"],
            &["--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf"],
            &["--ro-bind-try", "/etc/hosts", "/etc/hosts"],
        ];
        let fixed = fixed.concat();
        let fixed = fixed.into_iter().map(str::to_owned);
        fixed.chain(self.shared.iter().cloned()).collect()
    }

    /// A program inside
    pub fn command<'s>(&self, sh: &'s Shell, program: &[&str]) -> Cmd<'s> {
        let options = self.options();
        cmd!(sh, "bwrap {options...} {program...}").env("LC_ALL", "C")
    }

    /// Run a program inside, and return what it prints.
    ///
    /// # Errors
    ///
    /// Fails if the program does.
    pub fn read(&self, program: &[&str]) -> Result<String> {
        self.command(&Shell::new()?, program).read_quiet()
    }

    /// Install or remove packages.
    ///
    /// # Errors
    ///
    /// Fails if they cannot be, or are not installed as they should be.
    pub fn apt_get(&self, what: &str, args: &[&str]) -> Result<()> {
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

    /// Write a program for outside that runs one inside.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be written.
    pub fn write_wrapper(&self, path: &Path, program: &str) -> Result<()> {
        let options: Vec<_> = self.options().iter().map(|o| format!("'{o}'")).collect();
        let options = options.join(" ");
        write_program(path, &format!("exec bwrap {options} {program} \"$@\"\n"))
    }
}

/// Unpack packages of a suite of Debian, and those that they depend on, into a
/// directory.  Nothing is set up there, and the user need not be root.
///
/// # Errors
///
/// Fails if the packages cannot be downloaded.
pub fn unpack(env: &Env, suite: &str, dir: &Path, packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    mmdebstrap(
        env,
        &format!("getting {list} of Debian {suite}"),
        // No script of a package is run, which would need a chroot.
        &["--mode=chrootless", "--variant=extract"],
        suite,
        dir,
        packages,
    )
}

/// Put packages of a suite, and those that they depend on, into a directory, in
/// the way that the options tell.  They come from the mirror that this system
/// uses, and apt verifies them.
fn mmdebstrap(
    env: &Env,
    what: &str,
    options: &[&str],
    suite: &str,
    dir: &Path,
    packages: &[&str],
) -> Result<()> {
    let source = format!("deb {} {suite} main", apt::mirror(env)?);
    apt::ensure_packages(env, &["mmdebstrap"])?;
    let sh = Shell::new()?;
    let include = packages
        .iter()
        .map(|package| format!("--include={package}"));
    // How this system gets to the mirror; the apt inside does so, too.
    let tmp = env.temp_dir("mmdebstrap")?;
    let acquire = tmp.path().join("acquire");
    fs::write(&acquire, cmd!(sh, "apt-config dump Acquire").read_quiet()?)?;
    env.run(
        what,
        cmd!(
            sh,
            "mmdebstrap {options...} --aptopt={acquire} {include...} {suite} {dir} {source}"
        ),
    )
}

/// Write a program: what a shell does.
///
/// # Errors
///
/// Fails if it cannot be written.
pub fn write_program(path: &Path, commands: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{commands}"))?;
    let mode = fs::Permissions::from_mode(0o755);
    Ok(fs::set_permissions(path, mode)?)
}

/// The code name of the Debian that this is
///
/// # Errors
///
/// Fails if it is none.
pub fn release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    release_in(&text).context("this is not a release of Debian")
}

fn release_in(text: &str) -> Option<String> {
    let value = |name: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| {
            Some(
                line.strip_prefix(name)?
                    .strip_prefix('=')?
                    .trim_matches('"'),
            )
        })
    };
    (value("ID") == Some("debian"))
        .then(|| value("VERSION_CODENAME"))?
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        let debian = "PRETTY_NAME=\"x\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(release_in(debian).as_deref(), Some("bookworm"));
        let ubuntu = "VERSION_CODENAME=\"noble\"\nID=ubuntu\nID_LIKE=debian\n";
        assert_eq!(release_in(ubuntu), None);
        assert_eq!(release_in(""), None);
    }
}
