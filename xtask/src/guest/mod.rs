// SPDX-License-Identifier: GPL-2.0-or-later

//! Linux guests: what they are made of, and what is done with them.  The Python
//! code that drives them is in `tests-functional/`.

mod assets;
mod bench;
mod demo;
pub mod policies;
pub mod policy;
mod stock;

use std::path::PathBuf;

use xshell::{cmd, Cmd, Shell};

pub use self::{
    assets::{is_provisioned, provision, renew, Assets, SUITE},
    bench::bench,
    demo::{demo, demo_with},
    stock::stock_qemu,
};
use crate::{build::Build, env::Env};

/// A program of `tests-functional/`, with the guest and the QEMU that it boots it
/// with
pub fn program<'a>(
    env: &Env,
    sh: &'a Shell,
    build: &Build,
    assets: &Assets,
    name: &str,
) -> Cmd<'a> {
    let (python, script) = (build.python(), env.repo.join("tests-functional").join(name));
    cmd!(sh, "{python} {script}").envs(python_env(build, assets))
}

/// Environment variables for the Python code that boots guests
pub fn python_env(build: &Build, assets: &Assets) -> Vec<(&'static str, PathBuf)> {
    let tree = &build.source.dir;
    let mut path = tree.join("python").into_os_string();
    path.push(":");
    path.push(tree.join("tests/functional"));
    vec![
        ("PYTHONPATH", path.into()),
        ("PYTHONDONTWRITEBYTECODE", "1".into()),
        ("QEMU_TEST_QEMU_BINARY", build.qemu()),
        ("MESON_BUILD_ROOT", build.dir.clone()),
        ("BALLOON_GUEST_KERNEL", assets.kernel.clone()),
        ("BALLOON_GUEST_INITRD", assets.initrd.clone()),
    ]
}
