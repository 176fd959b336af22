// SPDX-License-Identifier: GPL-2.0-or-later

//! Guests of libvirt, with the QEMU that `cargo xtask install` has installed

use std::{fs, path::Path};

use anyhow::{bail, ensure, Result};
use xshell::{cmd, Shell};

use super::results::{parse_junit, Count};
use crate::{
    apt,
    env::{remove, Env},
    guest, install,
    run::{shell_in, RunQuiet},
};

/// libvirt, and Debian's QEMU with its parts, to compare with
const PACKAGES: &[&str] = &[
    "libvirt-clients",
    "libvirt-daemon-system",
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

/// Drive guests with libvirt.
pub fn libvirt(env: &Env, prefix: &Path) -> Result<Count> {
    let emulator = install::emulator(prefix)?;
    if let Some(reason) = why_not(env)? {
        println!("libvirt is not tested: {reason}");
        return Ok(Count {
            skipped: 1,
            ..Count::default()
        });
    }
    let guest = guest::provision(env, guest::SUITE)?;
    let Some((stock, _)) = guest::installed_qemu(env)? else {
        unreachable!("the packages have it");
    };

    let dir = env.temp_dir("libvirt")?;
    let domain = dir.path().join("domain.xml");
    fs::write(&domain, install::domain(&emulator))?;
    let junit = env.cache.join("libvirt.junit.xml");
    remove(&junit)?;
    let sh = shell_in(&env.repo)?;
    let result = env.run(
        "driving guests with libvirt",
        cmd!(sh, "python3 tests-libvirt/test_libvirt.py")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("BALLOON_EMULATOR", &emulator)
            .env("BALLOON_STOCK_QEMU", stock)
            .env("BALLOON_GUEST_KERNEL", &guest.kernel)
            .env("BALLOON_GUEST_INITRD", &guest.initrd)
            .env("BALLOON_DOMAIN", &domain)
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

/// Why libvirt cannot be tested here, if so
fn why_not(env: &Env) -> Result<Option<String>> {
    let sh = Shell::new()?;
    if !apt::is_root() {
        return Ok(Some("only root can have guests of another user".to_owned()));
    }
    if cmd!(sh, "unshare --mount --pid --fork true")
        .run_quiet()
        .is_err()
    {
        return Ok(Some("this root has no namespaces".to_owned()));
    }
    let mut packages = PACKAGES.to_vec();
    for package in NEWER_PACKAGES {
        if apt::is_available(package)? {
            packages.push(package);
        }
    }
    let missing = apt::missing(&packages)?;
    // Their installation starts services of the system.
    if !missing.is_empty() && Path::new("/run/systemd/system").exists() {
        return Ok(Some(format!(
            "that would start services here; to have them, run: apt-get install {}",
            missing.join(" ")
        )));
    }
    Ok(apt::ensure_packages(env, &packages)
        .err()
        .map(|err| crate::env::one_line(&err)))
}
