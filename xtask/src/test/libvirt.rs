// SPDX-License-Identifier: GPL-2.0-or-later

//! Guests of libvirt, with the QEMU that `cargo xtask install` has installed

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{bail, ensure, Context, Result};
use walkdir::WalkDir;
use xshell::{cmd, Shell};

use super::results::{parse_junit, skip, Count};
use crate::{
    apt,
    debian::Debian,
    env::{one_line, Env},
    guest, install,
    run::RunQuiet,
};

/// libvirt, and Debian's QEMU with its parts, to compare with
const PACKAGES: &[&str] = &[
    "apparmor",
    "libvirt-clients",
    "libvirt-daemon-system",
    "openssl",
    "ovmf",
    "qemu-block-extra",
    "qemu-system-gui",
    "qemu-system-x86",
    "qemu-utils",
    "swtpm",
    "swtpm-tools",
    "virtinst",
];

/// What is divided further in Debian 13
const NEWER_PACKAGES: &[&str] = &["qemu-system-modules-opengl", "qemu-system-modules-spice"];

/// Debian's QEMU, where libvirt runs
const STOCK_QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Drive guests with libvirt.
pub fn libvirt(env: &Env, prefix: &Path) -> Result<Count> {
    let emulator = install::emulator(prefix)?;
    let dir = env.temp_dir("libvirt")?;
    let debian = match debian(env, &emulator, dir.path()) {
        Ok(debian) => debian,
        Err(err) => return Ok(skip("libvirt is", &one_line(&err))),
    };
    run(env, debian, &emulator, dir.path())
}

/// Install libvirt, and what the emulator needs to run there, into a directory.
fn debian<'a>(env: &'a Env, emulator: &Path, dir: &Path) -> Result<Debian<'a>> {
    ensure!(apt::is_root(), "only root can have guests of another user");
    let mut packages = PACKAGES.to_vec();
    for package in NEWER_PACKAGES {
        if apt::is_available(package)? {
            packages.push(package);
        }
    }
    let prefix = prefix_of(emulator)?;
    let libraries = libraries(prefix)?;
    packages.extend(libraries.iter().map(String::as_str));
    let mut debian = Debian::install(env, dir.join("root"), &packages)?;
    debian.show(prefix);
    Ok(debian)
}

/// The directory with bin/ and the rest
fn prefix_of(emulator: &Path) -> Result<&Path> {
    emulator.ancestors().nth(2).context("no prefix")
}

/// The packages of the shared libraries that what was installed is linked with
fn libraries(prefix: &Path) -> Result<BTreeSet<String>> {
    let sh = Shell::new()?;
    let mut files = BTreeSet::new();
    for entry in WalkDir::new(prefix) {
        let entry = entry?;
        if entry.file_type().is_file() {
            let path = entry.path();
            // Not all files are programs.
            let list = cmd!(sh, "ldd {path}").read_quiet().unwrap_or_default();
            files.extend(list.lines().filter_map(library).map(str::to_owned));
        }
    }
    // /lib is a link to /usr/lib, and packages have files in both.
    let all: Vec<_> = files
        .iter()
        .flat_map(|file| {
            let plain = file.strip_prefix("/usr").unwrap_or(file);
            [plain.to_owned(), format!("/usr{plain}")]
        })
        .collect();
    let owners = cmd!(sh, "dpkg-query -S {all...}")
        .quiet()
        .ignore_status()
        .ignore_stderr()
        .read()?;
    // libz1:amd64: /usr/lib/x86_64-linux-gnu/libz.so.1
    Ok(owners
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.to_owned()))
        .collect())
}

/// The file in a line of ldd, `libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x7f)`
fn library(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(" => ")?;
    let file = rest.split_whitespace().next()?;
    file.starts_with('/').then_some(file)
}

/// Run the tests.
fn run(env: &Env, mut debian: Debian<'_>, emulator: &Path, dir: &Path) -> Result<Count> {
    let guest = guest::provision(env, guest::SUITE)?;
    let tests = env.repo.join("tests-libvirt");
    let shared = dir.join("shared");
    fs::create_dir(&shared)?;
    let (domain, junit) = (shared.join("domain.xml"), shared.join("junit.xml"));
    fs::write(&domain, install::domain(emulator))?;
    let apparmor = shared.join("apparmor.sh");
    fs::write(&apparmor, install::apparmor_commands(prefix_of(emulator)?))?;
    for path in [&guest.kernel, &guest.initrd, &tests] {
        debian.show(path);
    }
    debian.share(&shared);
    let script = tests.join("test_libvirt.py").display().to_string();
    let sh = Shell::new()?;
    let result = env.run(
        "driving guests with libvirt",
        debian
            .command(&sh, &["python3", &script])
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("BALLOON_EMULATOR", emulator)
            .env("BALLOON_STOCK_QEMU", STOCK_QEMU)
            .env("BALLOON_GUEST_KERNEL", &guest.kernel)
            .env("BALLOON_GUEST_INITRD", &guest.initrd)
            .env("BALLOON_DOMAIN", &domain)
            .env("BALLOON_APPARMOR", &apparmor)
            .env("BALLOON_JUNIT", &junit),
    );
    let Ok(xml) = fs::read_to_string(&junit) else {
        // nothing was run
        result?;
        bail!("the tests of libvirt have written no results");
    };
    let count = parse_junit(&xml)?;
    if let Err(err) = result {
        eprintln!("{err:#}");
        ensure!(count.failed > 0, "the tests of libvirt have not ended well");
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ldd() {
        let line = "\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f)";
        assert_eq!(library(line), Some("/lib/x86_64-linux-gnu/libz.so.1"));
        for none in [
            "\tlinux-vdso.so.1 (0x00007f)",
            "\tlibx.so => not found",
            "\tstatically linked",
        ] {
            assert_eq!(library(none), None);
        }
    }
}
