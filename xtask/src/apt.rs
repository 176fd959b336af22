// SPDX-License-Identifier: GPL-2.0-or-later

//! Debian packages.  Everything goes through the apt of the machine, and the
//! mirror that it is configured with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{bail, Context, Result};
use xshell::{cmd, Shell};

use crate::env::Env;

/// What is needed to build QEMU and to run its tests
pub const BUILD_PACKAGES: &[&str] = &[
    "bison",
    "ccache",
    "clang",
    "device-tree-compiler",
    "flex",
    "gcc",
    "git",
    "ipxe-qemu",
    "libclang-dev",
    "libfdt-dev",
    "libglib2.0-dev",
    "libpixman-1-dev",
    "ninja-build",
    "pkg-config",
    "python3-venv",
    "qemu-system-data",
    "seabios",
    "xz-utils",
    "zlib1g-dev",
];

/// What is needed to make an initramfs
pub const GUEST_PACKAGES: &[&str] = &["busybox-static", "cpio", "kmod", "xz-utils"];

/// Whether packages can be installed
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn is_installed(sh: &Shell, package: &str) -> bool {
    cmd!(sh, "dpkg-query -W -f '${Status}' {package}")
        .quiet()
        .ignore_stderr()
        .read()
        .is_ok_and(|status| status.contains("ok installed"))
}

/// Install the packages that are missing.
///
/// # Errors
///
/// Fails if there are missing packages and the user is not root; the error
/// names them and the command that installs them.
pub fn ensure_packages(env: &Env, packages: &[&str]) -> Result<()> {
    let sh = Shell::new()?;
    if cmd!(sh, "dpkg-query --version").quiet().read().is_err() {
        env.say("not a Debian system: assuming that all build dependencies are installed");
        return Ok(());
    }
    let missing: Vec<_> = packages
        .iter()
        .filter(|package| !is_installed(&sh, package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" ");
    if !is_root() {
        bail!("Debian packages are missing; please run: sudo apt-get install {list}");
    }

    env.run("updating the package lists", &mut apt_get(&["update"]))?;
    let mut install = apt_get(&["install", "-y", "--no-install-recommends"]);
    install.args(missing);
    env.run(&format!("installing {list}"), &mut install)
}

fn apt_get(args: &[&str]) -> Command {
    let mut cmd = Command::new("apt-get");
    cmd.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    cmd
}

/// The mirror of the Debian archive that apt is configured with, ending in a
/// slash.
///
/// # Errors
///
/// Fails if apt has no such source.
pub fn mirror(env: &Env) -> Result<String> {
    let sh = Shell::new()?;
    let query = || -> Result<String> {
        Ok(cmd!(
            sh,
            "apt-get indextargets --format '$(REPO_URI) $(ORIGIN)/$(LABEL)'"
        )
        .quiet()
        .read()?)
    };
    if let Some(uri) = main_archive(&query()?) {
        return Ok(uri);
    }
    if is_root() {
        env.run("updating the package lists", &mut apt_get(&["update"]))?;
        if let Some(uri) = main_archive(&query()?) {
            return Ok(uri);
        }
    }
    bail!("apt has no source for the Debian archive, or no package lists: run apt-get update")
}

/// Pick the main archive from lines of URI, origin and label.
fn main_archive(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let uri = line.strip_suffix(" Debian/Debian")?;
        Some(format!("{}/", uri.trim_end_matches('/')))
    })
}

/// Download a file, unless it is there already, and check what it contains.
///
/// # Errors
///
/// Fails if the file cannot be downloaded or has another checksum.
pub fn download(env: &Env, uri: &str, dest: &Path, sha256: &str) -> Result<()> {
    if dest.exists() && crate::env::sha256(dest)? == sha256 {
        return Ok(());
    }
    if let Some(dir) = dest.parent() {
        fs::create_dir_all(dir)?;
    }
    let partial = dest.with_extension("part");
    let name = dest.file_name().unwrap_or_default().to_string_lossy();
    env.run(
        &format!("downloading {name}"),
        Command::new("/usr/lib/apt/apt-helper")
            .args(["download-file", uri])
            .arg(&partial)
            .arg(format!("SHA256:{sha256}")),
    )?;
    fs::rename(&partial, dest)?;
    Ok(())
}

/// An apt of our own, which knows a single suite and leaves the configuration
/// of the system alone.  Signatures and checksums are verified as usual.
pub struct Suite {
    dir: PathBuf,
}

impl Suite {
    /// Get the package lists of a suite.
    ///
    /// # Errors
    ///
    /// Fails if the lists cannot be downloaded or verified.
    pub fn new(env: &Env, suite: &str, arch: &str) -> Result<Self> {
        let keyring = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        if !keyring.exists() {
            bail!("please install the package debian-archive-keyring");
        }
        let dir = env.cache.join("apt").join(format!("{suite}-{arch}"));
        for sub in ["lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        fs::write(
            dir.join("sources.list"),
            format!(
                "deb [arch={arch} signed-by={}] {} {suite} main\n",
                keyring.display(),
                mirror(env)?
            ),
        )?;
        fs::write(dir.join("status"), "")?;
        let this = Self { dir };
        env.run(
            &format!("getting the package lists of {suite}"),
            this.apt("apt-get").arg("update"),
        )?;
        Ok(this)
    }

    fn apt(&self, program: &str) -> Command {
        let mut cmd = Command::new(program);
        let mut opt = |name: &str, value: &Path| {
            cmd.arg("-o").arg(format!("{name}={}", value.display()));
        };
        opt("Dir::Etc::SourceList", &self.dir.join("sources.list"));
        opt("Dir::Etc::SourceParts", &self.dir.join("parts"));
        opt("Dir::State::Lists", &self.dir.join("lists"));
        opt("Dir::State::Status", &self.dir.join("status"));
        opt("Dir::Cache", &self.dir.join("cache"));
        cmd.args(["-o", "APT::Sandbox::User=root", "-o", "APT::Architectures="]);
        cmd
    }

    /// The packages that a package depends on
    ///
    /// # Errors
    ///
    /// Fails if apt does not know the package.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let out = self
            .apt("apt-cache")
            .args(["show", "--no-all-versions", package])
            .output()?;
        if !out.status.success() {
            bail!(
                "cannot look up {package}: {}",
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok(parse_depends(&String::from_utf8_lossy(&out.stdout)))
    }

    /// Download a package and return the file.
    ///
    /// # Errors
    ///
    /// Fails if the package cannot be downloaded or verified.
    pub fn download(&self, env: &Env, package: &str) -> Result<PathBuf> {
        let dir = self.dir.join("debs").join(package);
        fs::create_dir_all(&dir)?;
        env.run(
            &format!("downloading {package}"),
            self.apt("apt-get")
                .args(["download", package])
                .current_dir(&dir),
        )?;
        let newest = fs::read_dir(&dir)?
            .filter_map(std::result::Result::ok)
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|ext| ext == "deb"))
            .max_by_key(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok());
        newest.with_context(|| format!("apt-get has not downloaded {package}"))
    }
}

/// The names in the Depends field of a package
fn parse_depends(record: &str) -> Vec<String> {
    record
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))
        .unwrap_or("")
        .split(',')
        .filter_map(|dep| dep.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn main_archive_is_neither_security_nor_third_party() {
        let targets = "\
https://packages.example/apt example/example
http://mirror.example/debian-security \
                       Debian/Debian-Security
http://mirror.example/debian/ Debian/Debian
";
        assert_eq!(
            main_archive(targets).as_deref(),
            Some("http://mirror.example/debian/")
        );
        assert_eq!(main_archive("http://x.example/ubuntu Ubuntu/Ubuntu"), None);
        assert_eq!(main_archive(""), None);
    }

    #[test]
    fn dependencies() {
        let record = "Package: a\nDepends: linux-image-6.1 (= 6.1.1-1), b | c\nSize: 1\n";
        assert_eq!(parse_depends(record), ["linux-image-6.1", "b"]);
        assert!(parse_depends("Package: a\n").is_empty());
    }
}
