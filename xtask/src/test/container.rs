// SPDX-License-Identifier: GPL-2.0-or-later

//! The container of `ci/Containerfile`, which runs the tests

use anyhow::Result;
use xshell::cmd;

use super::results::{skip, Count, PASS};
use crate::{
    env::Env,
    run::{shell_in, RunQuiet},
};

const FILE: &str = "ci/Containerfile";
const IMAGE: &str = "qemu-virtio-balloon-rs";

/// Build the container, and run its tests.
pub fn container(env: &Env) -> Result<Count> {
    let sh = shell_in(&env.repo)?;
    // docker can be installed without its daemon.
    let works = |program: &&str| cmd!(sh, "{program} info").run_quiet().is_ok();
    let Some(program) = ["podman", "docker"].into_iter().find(works) else {
        return Ok(skip(
            "the container is",
            "neither podman nor docker works here",
        ));
    };
    env.run(
        &format!("building {FILE}"),
        cmd!(sh, "{program} build -f {FILE} -t {IMAGE} ."),
    )?;
    env.run("running its tests", cmd!(sh, "{program} run --rm {IMAGE}"))?;
    Ok(PASS)
}
