// SPDX-License-Identifier: GPL-2.0-or-later

//! A guest that runs out of memory, and one that frees memory: `cargo xtask
//! demo`

use std::{path::Path, process::ExitCode};

use anyhow::Result;

use super::{program, provision, SUITE};
use crate::{
    build::{Build, Device, Target},
    env::Env,
    run::{shell_in, RunQuiet},
};

/// Build QEMU, boot a guest without and with deflate-on-oom, and one with free
/// page reporting, and report what happens.
///
/// # Errors
///
/// Fails if it did not get as far as booting.
pub fn demo(env: &Env) -> Result<ExitCode> {
    let build = Build::prepare(env, Device::Rust, Target::X86_64, None)?;
    build.build_qemu(env)?;
    Ok(if demo_with(env, &build, &build.qemu())? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Do that with some QEMU, with the Python code of a build.  Returns whether all
/// was as it should be.
///
/// # Errors
///
/// Fails if it did not get as far as booting.
pub fn demo_with(env: &Env, build: &Build, qemu: &Path) -> Result<bool> {
    let assets = provision(env, SUITE)?;
    let sh = shell_in(&build.dir)?;
    program(env, &sh, build, &assets, "demo.py")
        .env("QEMU_TEST_QEMU_BINARY", qemu)
        .succeeds()
}
