// SPDX-License-Identifier: GPL-2.0-or-later

//! `qemu-balloon-top`, with the Python packages that it needs

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use xshell::{cmd, Shell};

use crate::{
    env::{remove, sha256_of, Env},
    run::RunQuiet,
};

const NAME: &str = "qemu-balloon-top";

/// The packages, in the cache
fn libraries(env: &Env) -> Result<PathBuf> {
    let requirements = env.repo.join("balloon-top/requirements.txt");
    let hash = sha256_of(&[&fs::read(&requirements)?]);
    let dir = env.cache.join(format!("tools/balloon-top-{}", &hash[..12]));
    if !dir.join("complete").exists() {
        remove(&dir)?;
        let (sh, lib) = (Shell::new()?, dir.join("lib"));
        env.run(
            "getting what qemu-balloon-top needs",
            cmd!(
                sh,
                "python3 -m pip install --quiet --target {lib} --no-compile --require-hashes
                 --no-deps -r {requirements}"
            ),
        )?;
        // Programs of the packages, which are not for users
        remove(&lib.join("bin"))?;
        fs::write(dir.join("complete"), "")?;
    }
    Ok(dir.join("lib"))
}

/// Install the program below a directory, for example `/usr`.  Returns where it
/// is.
///
/// # Errors
///
/// Fails if something cannot be downloaded or written.
pub fn install(env: &Env, prefix: &Path) -> Result<PathBuf> {
    let lib = libraries(env)?;
    let from = env.repo.join("balloon-top");
    let (bin, share) = (prefix.join("bin"), prefix.join("share").join(NAME));
    let package = share.join("balloon_top");
    let sh = Shell::new()?;
    cmd!(sh, "mkdir -p {bin} {package}").run_quiet()?;
    let program = bin.join(NAME);
    fs::copy(from.join(NAME), &program)?;
    for file in sh.read_dir(from.join("balloon_top"))? {
        if file.extension().is_some_and(|ext| ext == "py") {
            fs::copy(&file, package.join(file.file_name().unwrap_or_default()))?;
        }
    }
    fs::copy(
        from.join("requirements.txt"),
        share.join("requirements.txt"),
    )?;
    cmd!(sh, "cp -r {lib} {share}").run_quiet()?;
    Ok(program)
}
