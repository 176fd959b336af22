// SPDX-License-Identifier: GPL-2.0-or-later

//! Programs that QEMU's build needs, in the cache

use std::{
    env::{join_paths, split_paths, var_os},
    ffi::OsString,
    fs,
    path::PathBuf,
};

use anyhow::Result;
use xshell::{cmd, Shell};

use crate::env::{remove, sha256_of, Env};

const BINDGEN_VERSION: &str = "0.73.2";

/// Programs that QEMU's build system needs, and that are not taken from the
/// distribution
pub struct Tools {
    /// The Python virtual environment
    pub venv: PathBuf,
    /// Where bindgen is
    pub bin: PathBuf,
}

impl Tools {
    /// Install the tools that are missing.
    ///
    /// # Errors
    ///
    /// Fails if something cannot be downloaded or built.
    pub fn provide(env: &Env, bindgen: bool) -> Result<Self> {
        let sh = Shell::new()?;
        let root = env.cache.join("tools");
        let requirements = env.repo.join("xtask/requirements.txt");
        let hash = sha256_of(&[&fs::read(&requirements)?]);

        let venv = root.join(format!("venv-{}", &hash[..12]));
        if !venv.join("complete").exists() {
            // Virtual environments cannot be renamed
            remove(&venv)?;
            env.run(
                "creating a Python environment",
                cmd!(sh, "python3 -m venv {venv}"),
            )?;
            let pip = venv.join("bin/pip");
            env.run(
                "installing meson and other Python packages",
                cmd!(
                    sh,
                    "{pip} install --require-hashes --no-deps -r {requirements}"
                ),
            )?;
            fs::write(venv.join("complete"), "")?;
        }

        let bindgen_root = root.join(format!("bindgen-{BINDGEN_VERSION}"));
        if bindgen && !bindgen_root.join("bin/bindgen").exists() {
            // cargo install replaces the binary atomically
            env.run(
                "building bindgen, which takes some minutes",
                cmd!(
                    sh,
                    "cargo install bindgen-cli --locked --version {BINDGEN_VERSION}
                     --root {bindgen_root}"
                ),
            )?;
        }
        Ok(Self {
            venv,
            bin: bindgen_root.join("bin"),
        })
    }

    /// `PATH` with these tools first
    pub fn path(&self) -> OsString {
        let old = var_os("PATH").unwrap_or_default();
        let dirs = [self.bin.clone()].into_iter().chain(split_paths(&old));
        join_paths(dirs).unwrap_or(old)
    }
}
