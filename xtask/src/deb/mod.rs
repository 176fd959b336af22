// SPDX-License-Identifier: GPL-2.0-or-later

//! `cargo xtask deb`: Debian's packages of QEMU with the series

mod control;

use std::{
    env::{join_paths, split_paths},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use xshell::{cmd, Shell};

use self::control::{edit, Optional, OPTIONAL};
use crate::{
    apt,
    build::ccache_env,
    env::{replace_dir, Env},
    preflight::Needs,
    run::{shell_in, RunQuiet},
    series,
    source::{patches_for_libvirt, patches_in, pinned_file, untar, Source},
    tools::Tools,
    top,
    version::QEMU,
};

/// What is needed to build packages, in addition to what QEMU needs
const PACKAGES: &[&str] = &[
    "debhelper",
    "devscripts",
    "dpkg-dev",
    "fakeroot",
    "lintian",
    "patch",
];

/// Space that the build takes, in GiB
const DISK: u64 = 8;

/// Build profiles of Debian's packaging: no tests, which take longer than the
/// build, and only system emulation
const PROFILES: &str = "nocheck,pkg.qemu.omit-user,pkg.qemu.omit-system-xen";

/// At the end of the version: more than Debian's, and less than its next one
pub const VERSION_SUFFIX: &str = "+balloon1";

/// What it takes, apart from what Debian's packaging asks for
pub fn needs() -> Needs {
    Needs {
        disk: DISK,
        ..Needs::build().with(PACKAGES)
    }
}

/// Build the packages.  Returns where they are.
///
/// # Errors
///
/// Fails if a step does, or if lintian finds an error.
pub fn deb(env: &Env, out: Option<&Path>) -> Result<Vec<PathBuf>> {
    env.need_space(DISK)?;
    apt::ensure_packages(env, PACKAGES)?;
    let source = Source::prepare(env, None)?;
    let tools = Tools::provide(env, true)?;
    let dir = env.temp_dir("deb")?;
    let tree = dir.path().join(format!("qemu-{}", QEMU.number));
    let missing = unpack(env, &source, &tree)?;
    install_build_dependencies(env, &tree)?;
    build(env, &tree, &tools, &missing)?;
    lint(env, dir.path())?;

    let complete = dir.path().join("complete");
    fs::create_dir(&complete)?;
    for package in packages_in(dir.path())? {
        fs::rename(
            &package,
            complete.join(package.file_name().unwrap_or_default()),
        )?;
    }
    replace_dir(&complete, &built(env))?;
    let packages = built_packages(env)?;
    let Some(out) = out else {
        return Ok(packages);
    };
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    for package in &packages {
        let dest = out.join(package.file_name().unwrap_or_default());
        fs::copy(package, &dest).with_context(|| format!("cannot write {}", dest.display()))?;
    }
    packages_in(out)
}

/// Where the packages are that were built last
fn built(env: &Env) -> PathBuf {
    env.cache.join("deb")
}

/// The packages that were built last
///
/// # Errors
///
/// Fails if there are none.
pub fn built_packages(env: &Env) -> Result<Vec<PathBuf>> {
    let dir = built(env);
    ensure!(
        dir.exists(),
        "there are no packages: run cargo xtask deb first"
    );
    packages_in(&dir)
}

/// The packages in a directory
fn packages_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut packages = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ext| ext == "deb") {
            packages.push(path);
        }
    }
    packages.sort();
    Ok(packages)
}

/// Unpack QEMU and Debian's packaging, and make our edits.  Returns what the
/// packages are built without.
fn unpack(env: &Env, source: &Source, tree: &Path) -> Result<Vec<&'static Optional>> {
    let debian = tree.join("debian");
    fs::create_dir_all(&debian)?;
    untar(env, &pinned_file(env, &QEMU.tarball)?, tree)?;
    untar(env, &pinned_file(env, &QEMU.packaging)?, &debian)?;
    let sh = shell_in(tree)?;

    // The crates, and meson's files for them: neither is in Debian's tarball.
    let subprojects = source.dir.join("subprojects");
    for part in ["packagecache", "packagefiles"] {
        let from = subprojects.join(part);
        cmd!(sh, "cp -rL {from} subprojects/").run_quiet()?;
    }

    // After Debian's own patches
    let exported = tree.join("debian/balloon");
    let series = series::export(env, &exported, &[])?;
    let list = debian.join("patches/series");
    let mut lines = fs::read_to_string(&list)?;
    let local = patches_for_libvirt(env)?;
    for (kind, patches) in [("libvirt", local), ("balloon", series)] {
        for (i, patch) in patches.iter().enumerate() {
            let name = patch.file_name().unwrap_or_default().to_string_lossy();
            let name = format!("{kind}-{:03}-{name}", i + 1);
            fs::copy(patch, debian.join("patches").join(&name))?;
            lines.push_str(&format!("{name}\n"));
        }
    }
    fs::write(list, lines)?;
    fs::remove_dir_all(exported)?;

    for patch in patches_in(&env.repo.join("patches/debian-packaging"))? {
        cmd!(sh, "patch -s -p1 -F0 -i {patch}")
            .run_quiet()
            .context("Debian's packaging is not what our patches are for")?;
    }
    top::install(env, &debian.join("balloon-top"))?;
    env.say("built with meson, pycotap and qemu.qmp of the cache, not of Debian");
    let mut missing = Vec::new();
    for optional in OPTIONAL {
        if !apt::is_available(optional.package)? {
            env.say(&format!(
                "built without {}, which Debian does not have: {}",
                optional.package, optional.option
            ));
            missing.push(optional);
        }
    }
    let control = debian.join("control");
    fs::write(&control, edit(&fs::read_to_string(&control)?, &missing))?;
    add_changelog(&sh)?;
    Ok(missing)
}

/// Add an entry to the changelog, which has the version of the packages.
fn add_changelog(sh: &Shell) -> Result<()> {
    let version = cmd!(sh, "dpkg-parsechangelog -S Version").read_quiet()? + VERSION_SUFFIX;
    let text = "virtio-balloon: replace the C device by an implementation in Rust.";
    cmd!(
        sh,
        "dch --newversion {version} --distribution UNRELEASED --force-distribution {text}"
    )
    .env("DEBFULLNAME", "virtio-balloon-rs developers")
    .env("DEBEMAIL", "virtio-balloon-rs@example.org")
    .run_quiet()
}

/// Install what the packaging asks for.
fn install_build_dependencies(env: &Env, tree: &Path) -> Result<()> {
    let sh = shell_in(tree)?;
    let check = cmd!(sh, "dpkg-checkbuilddeps -B -P{PROFILES}").read_quiet();
    let Err(missing) = check else {
        return Ok(());
    };
    ensure!(
        apt::is_root(),
        "Debian packages are missing; please install them: {missing}"
    );
    env.run(
        "installing what the packages are built with",
        cmd!(
            sh,
            "apt-get build-dep -y --no-install-recommends --arch-only -P{PROFILES} ./"
        )
        .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// Run Debian's build.
fn build(env: &Env, tree: &Path, tools: &Tools, missing: &[&Optional]) -> Result<()> {
    let python = tools.venv.join("bin/python3");
    let rust = format!("--enable-rust --python={}", python.display());
    let mut options = format!("{rust} --target-list=i386-softmmu,x86_64-softmmu");
    for optional in missing {
        options = format!("{options} {}", optional.option);
    }
    let sh = shell_in(tree)?;
    let jobs = std::thread::available_parallelism()?.to_string();
    env.run(
        "building the packages",
        cmd!(sh, "dpkg-buildpackage -B -us -uc -P{PROFILES} -j{jobs}")
            .env("PATH", with_ccache(tools)?)
            .env("DEB_BUILD_OPTIONS", "nocheck noautodbgsym terse")
            .env("QEMU_CONFIGURE_OPTIONS", options)
            .env("QEMU_MICROVM_CONFIGURE_OPTIONS", rust)
            .envs(ccache_env(env)),
    )
}

/// `PATH` with bindgen, and with ccache for the compiler, as Debian has it
fn with_ccache(tools: &Tools) -> Result<OsString> {
    let path = tools.path();
    let dirs = [PathBuf::from("/usr/lib/ccache")].into_iter();
    Ok(join_paths(dirs.chain(split_paths(&path)))?)
}

/// Have lintian look at the packages.
fn lint(env: &Env, dir: &Path) -> Result<()> {
    env.say("checking the packages with lintian");
    let sh = shell_in(dir)?;
    let changes = fs::read_dir(dir)?
        .filter_map(std::result::Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ext| ext == "changes"))
        .context("dpkg-buildpackage has written no .changes")?;
    cmd!(sh, "lintian --fail-on error {changes}").run_quiet()
}
