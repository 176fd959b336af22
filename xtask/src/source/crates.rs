// SPDX-License-Identifier: GPL-2.0-or-later

//! The crates that QEMU needs

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use walkdir::WalkDir;
use xshell::{cmd, Shell};

use super::Source;
use crate::env::{remove, sha256, Env};

/// Where meson looks for crates before it downloads them
pub(super) const PACKAGE_CACHE: &str = "subprojects/packagecache";

impl Source {
    /// Put the crates that QEMU needs, and the meson files to build them, where
    /// meson looks for them before it tries to download them.
    pub(super) fn provide_crates(&self, env: &Env) -> Result<()> {
        let wraps = self.wraps()?;
        self.provide_overlays(env, &wraps)?;

        let cache = self.dir.join(PACKAGE_CACHE);
        fs::create_dir_all(&cache)?;
        if wraps
            .iter()
            .all(|w| cache.join(&w.source_filename).exists())
        {
            return Ok(());
        }
        // A directory of its own, so that it is known where the files end up
        let home = env.cache.join("cargo-home");
        fs::create_dir_all(&home)?;
        inherit_cargo_config(&home)?;
        let sh = Shell::new()?;
        let manifest = self.dir.join("rust/Cargo.toml");
        env.run(
            "fetching QEMU's Rust crates",
            cmd!(sh, "cargo fetch --locked --manifest-path {manifest}").env("CARGO_HOME", &home),
        )?;
        for wrap in &wraps {
            let name = format!("{}.crate", wrap.directory);
            let file = WalkDir::new(home.join("registry/cache"))
                .into_iter()
                .filter_map(std::result::Result::ok)
                .find(|entry| entry.file_name().to_string_lossy() == name)
                .with_context(|| format!("cargo has not fetched {name}"))?;
            ensure!(
                sha256(file.path())? == wrap.source_hash,
                "{name} does not have the checksum that QEMU expects"
            );
            let tmp = cache.join("partial");
            fs::copy(file.path(), &tmp)?;
            fs::rename(&tmp, cache.join(&wrap.source_filename))?;
        }
        Ok(())
    }

    /// The wrap files of the crates
    pub(super) fn wraps(&self) -> Result<Vec<Wrap>> {
        let mut wraps = Vec::new();
        for entry in fs::read_dir(self.dir.join("subprojects"))? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with("-rs.wrap") {
                wraps.push(
                    Wrap::parse(&fs::read_to_string(&path)?)
                        .with_context(|| format!("cannot make sense of {}", path.display()))?,
                );
            }
        }
        Ok(wraps)
    }

    /// The meson files that Debian's tarball lacks
    pub(super) fn provide_overlays(&self, env: &Env, wraps: &[Wrap]) -> Result<()> {
        for wrap in wraps {
            let overlay = self
                .dir
                .join("subprojects/packagefiles")
                .join(&wrap.patch_directory);
            let ours = env
                .repo
                .join("patches/debian-source/overlays")
                .join(&wrap.patch_directory);
            let (ours, copy) = (ours.join("meson.build"), overlay.join("meson.build"));
            // A link would be in what meson unpacks, and this checkout can go away.
            if ours.exists() && (!copy.exists() || copy.is_symlink()) {
                fs::create_dir_all(&overlay)?;
                remove(&copy)?;
                fs::copy(&ours, &copy)?;
            }
        }
        Ok(())
    }
}

/// Have all crates built again: meson does not notice that it has to do so if a
/// procedural macro that they use was changed.
///
/// # Errors
///
/// Fails if a file cannot be removed.
pub fn forget_crates(build: &Path) -> Result<()> {
    let files = WalkDir::new(build)
        .into_iter()
        .filter_map(std::result::Result::ok);
    for entry in files {
        if entry.path().extension().is_some_and(|ext| ext == "rlib") {
            remove(entry.path())?;
        }
    }
    Ok(())
}

/// A private `CARGO_HOME` has to use the same registry as the user's.
fn inherit_cargo_config(home: &Path) -> Result<()> {
    let users = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|dir| Path::new(&dir).join(".cargo")));
    for name in ["config.toml", "config"] {
        if let Some(config) = users.as_ref().map(|dir| dir.join(name)) {
            if config.exists() {
                fs::copy(config, home.join(name))?;
            }
        }
    }
    Ok(())
}

/// What a wrap file of a crate says
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrap {
    directory: String,
    source_filename: String,
    source_hash: String,
    patch_directory: String,
}

impl Wrap {
    fn parse(text: &str) -> Option<Self> {
        let get = |key: &str| {
            text.lines().find_map(|line| {
                let (k, v) = line.split_once('=')?;
                (k.trim() == key).then(|| v.trim().to_owned())
            })
        };
        Some(Self {
            directory: get("directory")?,
            source_filename: get("source_filename")?,
            source_hash: get("source_hash")?,
            patch_directory: get("patch_directory")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wraps() {
        let wrap = Wrap::parse(
            "[wrap-file]\ndirectory = either-1.12.0\nsource_filename = \
             either-1.12.0.tar.gz\nsource_hash = 3dca\n#method = cargo\npatch_directory = \
             either-1-rs\n",
        );
        assert_eq!(
            wrap,
            Some(Wrap {
                directory: "either-1.12.0".into(),
                source_filename: "either-1.12.0.tar.gz".into(),
                source_hash: "3dca".into(),
                patch_directory: "either-1-rs".into(),
            })
        );
        assert_eq!(Wrap::parse("[wrap-git]\ndirectory = x\n"), None);
    }
}
