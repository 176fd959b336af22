// SPDX-License-Identifier: GPL-2.0-or-later

//! Debian packages.  Everything goes through the apt of the machine, and the
//! mirror that it is configured with.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, Context, Result};
use xshell::{cmd, Cmd, Shell};

use crate::{
    env::{one_line, Env},
    run::RunQuiet,
    version::KERNELS,
};

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

/// Whether apt has a package to install.
///
/// # Errors
///
/// Fails if there is no apt.
pub fn is_available(package: &str) -> Result<bool> {
    let sh = Shell::new()?;
    let policy = cmd!(sh, "apt-cache policy {package}")
        .env("LC_ALL", "C")
        .read_quiet()?;
    Ok(has_candidate(&policy))
}

/// Whether the output of `apt-cache policy` has a version that can be installed
fn has_candidate(policy: &str) -> bool {
    policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .is_some_and(|version| version != "(none)")
}

/// Whether there are Debian packages here
pub fn is_debian() -> bool {
    Shell::new().is_ok_and(|sh| cmd!(sh, "dpkg-query --version").read_quiet().is_ok())
}

/// What somebody who is not root is told
pub fn please_install(missing: &[&str]) -> String {
    format!(
        "Debian packages are missing; please run: sudo apt-get install {}",
        missing.join(" ")
    )
}

/// Why nothing can be downloaded from the mirror, if so
///
/// # Errors
///
/// Fails if there is no temporary directory.
pub fn unreachable(env: &Env) -> Result<Option<String>> {
    let mirror = match mirror(env) {
        Ok(mirror) => mirror,
        Err(err) => return Ok(Some(format!("{err:#}"))),
    };
    let dir = env.temp_dir("mirror")?;
    let (sh, dest) = (Shell::new()?, dir.path().join("InRelease"));
    // Each mirror has this.
    let uri = format!("{mirror}dists/{}/InRelease", KERNELS[0].0);
    let options = ["-oAcquire::Retries=0", "-oAcquire::http::Timeout=20"];
    let result = cmd!(
        sh,
        "/usr/lib/apt/apt-helper {options...} download-file {uri} {dest}"
    )
    .run_quiet();
    Ok(result
        .err()
        .map(|err| format!("the mirror {mirror} does not answer: {}", one_line(&err))))
}

/// The packages that are not installed
///
/// # Errors
///
/// Fails if there is no current directory.
pub fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let sh = Shell::new()?;
    Ok(packages
        .iter()
        .copied()
        .filter(|package| !is_installed(&sh, package))
        .collect())
}

/// Install the packages that are missing.  None is removed for that.
///
/// # Errors
///
/// Fails if there are missing packages and the user is not root; the error
/// names them and the command that installs them.
pub fn ensure_packages(env: &Env, packages: &[&str]) -> Result<()> {
    if !is_debian() {
        env.say("not a Debian system: assuming that all build dependencies are installed");
        return Ok(());
    }
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root() {
        bail!(please_install(&missing));
    }
    let list = missing.join(" ");
    let sh = Shell::new()?;

    update(env, &sh)?;
    env.run(
        &format!("installing {list}"),
        cmd!(
            sh,
            "apt-get install -y --no-install-recommends --no-remove {missing...}"
        )
        .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

fn update(env: &Env, sh: &Shell) -> Result<()> {
    env.run("updating the package lists", cmd!(sh, "apt-get update"))
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
        cmd!(
            sh,
            "apt-get indextargets --format '$(REPO_URI) $(ORIGIN)/$(LABEL)'"
        )
        .read_quiet()
    };
    if let Some(uri) = main_archive(&query()?) {
        return Ok(uri);
    }
    if is_root() {
        update(env, &sh)?;
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
    let sh = Shell::new()?;
    env.run(
        &format!("downloading {name}"),
        cmd!(
            sh,
            "/usr/lib/apt/apt-helper download-file {uri} {partial} SHA256:{sha256}"
        ),
    )?;
    fs::rename(&partial, dest)?;
    Ok(())
}

/// An apt of our own, which knows a single suite and leaves the configuration
/// of the system alone.  Signatures and checksums are verified as usual.
pub struct Suite {
    dir: PathBuf,
    sh: Shell,
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
        for sub in ["etc/apt/preferences.d", "var/lib/apt/lists/partial"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        fs::write(
            dir.join("etc/apt/sources.list"),
            format!(
                "deb [arch={arch} signed-by={}] {} {suite} main\n",
                keyring.display(),
                mirror(env)?
            ),
        )?;
        let this = Self {
            dir,
            sh: Shell::new()?,
        };
        env.run(
            &format!("getting the package lists of {suite}"),
            this.apt("apt-get").arg("update"),
        )?;
        Ok(this)
    }

    fn apt(&self, program: &str) -> Cmd<'_> {
        let dir = &self.dir;
        cmd!(
            self.sh,
            "{program} -oDir={dir} -oDir::State::Status=/dev/null -oAPT::Sandbox::User=root
             -oAPT::Architectures="
        )
    }

    /// The packages that a package depends on
    ///
    /// # Errors
    ///
    /// Fails if apt does not know the package.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let list = self
            .apt("apt-cache")
            .args(["depends", "--important", package])
            .arg("-oAPT::Cache::ShowOnlyFirstOr=true")
            .read_quiet()
            .with_context(|| format!("cannot look up {package}"))?;
        let names = list
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            // <NAME> is in another suite
            .map(|name| name.trim_matches(['<', '>']));
        Ok(names.map(str::to_owned).collect())
    }

    /// Download a package and return the file.
    ///
    /// # Errors
    ///
    /// Fails if the package cannot be downloaded or verified.
    pub fn download(&self, env: &Env, package: &str) -> Result<PathBuf> {
        // 'URI' FILE SIZE HASH, as long as the file is not in the current directory
        let what = self
            .apt("apt-get")
            .args(["download", "--print-uris", package])
            .read_quiet()?;
        let file = what.split_whitespace().nth(1);
        let file = file.with_context(|| format!("apt-get does not tell about {package}"))?;
        let dir = self.dir.join("debs").join(package);
        fs::create_dir_all(&dir)?;
        let _there = self.sh.push_dir(&dir);
        env.run(
            &format!("downloading {package}"),
            self.apt("apt-get").args(["download", package]),
        )?;
        Ok(dir.join(file))
    }
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
    fn candidates() {
        assert!(has_candidate("x:\n  Installed: (none)\n  Candidate: 1.2\n"));
        assert!(!has_candidate(
            "x:\n  Installed: (none)\n  Candidate: (none)\n"
        ));
        assert!(!has_candidate(""));
    }
}
