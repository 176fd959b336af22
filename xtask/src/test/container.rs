// SPDX-License-Identifier: GPL-2.0-or-later

//! The steps of `ci/Containerfile`, on an image that is made here of Debian's
//! packages and the Rust toolchain of this system, as the network may have no
//! registry of images

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use serde_json::Value;
use xshell::{cmd, Shell};

use super::results::{skip, Count, PASS};
use crate::{
    apt,
    debian::Debian,
    env::{one_line, Env},
    run::{shell_in, RunQuiet},
};

/// The file, in the checkout
const FILE: &str = "ci/Containerfile";

/// What xtask expects of the image, in addition to Rust
const PACKAGES: &[&str] = &["ca-certificates", "gcc", "git", "libc6-dev"];

/// Where the official image of Rust has the toolchain
const RUSTUP: &str = "usr/local/rustup";
const CARGO: &str = "usr/local/cargo";

/// Variables of this system that tell how to get to registries begin so.
const NETWORK: &[&str] = &["CARGO_HTTP_", "CARGO_NET_", "PIP_", "SSL_CERT_"];

/// Space for the images, in GiB: each layer is a copy.
const DISK: u64 = 20;

/// Build the container, and run its tests.
pub fn container(env: &Env) -> Result<Count> {
    env.need_space(DISK)?;
    let dir = env.temp_dir("container")?;
    let start = || -> Result<_> { Ok((Buildah::new(env, dir.path())?, toolchain()?)) };
    let (buildah, toolchain) = match start() {
        Ok(both) => both,
        Err(err) => return Ok(skip("the container is", &one_line(&err))),
    };
    let text = fs::read_to_string(env.repo.join(FILE))?;
    buildah.import(env, dir.path(), &toolchain, base_image(&text)?)?;
    buildah.test(env)?;
    Ok(PASS)
}

/// The image that a Containerfile begins with
fn base_image(text: &str) -> Result<&str> {
    text.lines()
        .find_map(|line| line.strip_prefix("FROM "))
        .map(str::trim)
        .context("the Containerfile has no FROM")
}

/// buildah, with images in a directory
struct Buildah {
    sh: Shell,
    /// Options for all commands
    storage: Vec<String>,
}

impl Buildah {
    fn new(env: &Env, dir: &Path) -> Result<Self> {
        ensure!(apt::is_root(), "only root can install Debian's packages");
        apt::ensure_packages(env, &["buildah"])?;
        let path = |sub: &str| dir.join(sub).display().to_string();
        let storage = [
            "--storage-driver=vfs".to_owned(),
            format!("--root={}", path("images")),
            format!("--runroot={}", path("run")),
        ];
        // Layers are packed there.
        let sh = Shell::new()?;
        sh.set_var("TMPDIR", dir);
        Ok(Self {
            sh,
            storage: storage.to_vec(),
        })
    }

    /// Make the image that the Containerfile begins with.
    fn import(&self, env: &Env, dir: &Path, toolchain: &Path, image: &str) -> Result<()> {
        let Self { sh, storage } = self;
        let root = Debian::install(env, dir.join("root"), PACKAGES)?.dir;
        copy_toolchain(toolchain, &root)?;
        env.say("making an image of it");
        let name = cmd!(sh, "buildah {storage...} from scratch").read_quiet()?;
        cmd!(sh, "buildah {storage...} add -q {name} {root} /").run_quiet()?;
        let mut vars = vec![
            format!("RUSTUP_HOME=/{RUSTUP}"),
            format!("CARGO_HOME=/{CARGO}"),
            format!(
                "PATH=/{CARGO}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            ),
        ];
        vars.extend(
            std::env::vars()
                .filter(|(var, _)| NETWORK.iter().any(|start| var.starts_with(start)))
                .map(|(var, value)| format!("{var}={value}")),
        );
        let vars = vars.iter().flat_map(|var| ["--env", var]);
        cmd!(sh, "buildah {storage...} config {vars...} {name}").run_quiet()?;
        cmd!(sh, "buildah {storage...} commit -q --rm {name} {image}").run_quiet()?;
        Ok(fs::remove_dir_all(root)?)
    }

    /// Build the Containerfile on it, and run what it runs.
    fn test(&self, env: &Env) -> Result<()> {
        let Self { storage, .. } = self;
        let sh = shell_in(&env.repo)?;
        sh.set_var("TMPDIR", self.sh.var("TMPDIR")?);
        // What was compiled before is not compiled again.
        let ccache = env.cache.join("ccache").display().to_string();
        fs::create_dir_all(&ccache)?;
        let volume = format!("{ccache}:/root/.cache/qemu-virtio-balloon-rs/ccache");
        let options = ["--isolation=chroot", "--network=host"];
        env.run(
            &format!("building {FILE}"),
            cmd!(
                sh,
                "buildah {storage...} bud {options...} --pull-never --format=docker
                 --volume {volume} -f {FILE} -t test ."
            ),
        )?;
        let name = cmd!(sh, "buildah {storage...} from --pull-never test").read_quiet()?;
        let config = cmd!(sh, "buildah {storage...} inspect {name}").read_quiet()?;
        let command = command(&config)?;
        env.run(
            "running its tests",
            cmd!(
                sh,
                "buildah {storage...} run --isolation=chroot --volume {volume} {name} --
                 {command...}"
            ),
        )
    }
}

/// What a container runs, in what buildah tells about it
fn command(config: &str) -> Result<Vec<String>> {
    let config: Value = serde_json::from_str(config)?;
    let command = &config["OCIv1"]["config"]["Cmd"];
    serde_json::from_value(command.clone()).context("the Containerfile has no CMD")
}

/// The toolchain that rustup has chosen
fn toolchain() -> Result<PathBuf> {
    let sh = Shell::new()?;
    let sysroot = PathBuf::from(cmd!(sh, "rustc --print sysroot").read_quiet()?);
    let parent = sysroot.parent();
    ensure!(
        parent.is_some_and(|dir| dir.ends_with("toolchains")),
        "Rust is not from rustup"
    );
    Ok(sysroot)
}

/// Put Rust where the official image has it.
fn copy_toolchain(sysroot: &Path, root: &Path) -> Result<()> {
    let sh = Shell::new()?;
    let program = cmd!(sh, "which rustup").read_quiet()?;

    let name = sysroot.file_name().unwrap_or_default();
    let dest = root.join(RUSTUP);
    fs::create_dir_all(dest.join("toolchains"))?;
    let toolchain = dest.join("toolchains").join(name);
    cmd!(sh, "cp -r {sysroot} {toolchain}").run_quiet()?;
    fs::write(
        dest.join("settings.toml"),
        format!(
            "version = \"12\"\ndefault_toolchain = {:?}\nprofile = \"minimal\"\n",
            name.to_string_lossy()
        ),
    )?;
    let bin = root.join(CARGO).join("bin");
    fs::create_dir_all(&bin)?;
    fs::copy(program, bin.join("rustup"))?;
    // It is all of these programs.
    for tool in [
        "cargo",
        "rustc",
        "rustdoc",
        "rustfmt",
        "cargo-fmt",
        "cargo-clippy",
        "clippy-driver",
    ] {
        std::os::unix::fs::symlink("rustup", bin.join(tool))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base() {
        assert_eq!(base_image("# x\nFROM a/b:1\nRUN c\n").unwrap(), "a/b:1");
        base_image("RUN c\n").unwrap_err();
    }

    #[test]
    fn commands() {
        let config = r#"{"OCIv1": {"config": {"Cmd": ["cargo", "xtask"]}}}"#;
        assert_eq!(command(config).unwrap(), ["cargo", "xtask"]);
        command("{}").unwrap_err();
    }
}
