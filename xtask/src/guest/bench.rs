// SPDX-License-Identifier: GPL-2.0-or-later

//! How long it takes a guest to inflate and deflate its balloon, for
//! `cargo xtask bench`

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use super::{program, provision, SUITE};
use crate::{
    build::Build,
    env::Env,
    run::{shell_in, RunQuiet},
};

/// Measure a guest with each of the builds, print the results, and return them by
/// the name of the device.
///
/// # Errors
///
/// Fails if a guest could not be measured.
pub fn bench(env: &Env, builds: &[Build]) -> Result<Value> {
    let assets = provision(env, SUITE)?;
    let mut results = Map::new();
    for build in builds {
        let device = build.device.name();
        env.say(&format!(
            "a guest inflates and deflates 2 GiB ({device} device)"
        ));
        let sh = shell_in(&build.dir)?;
        let out = program(env, &sh, build, &assets, "guest.py").output_quiet()?;
        let value: Value = serde_json::from_slice(&out).context("the results of the guest")?;
        println!("guest, {device} device: {value}");
        results.insert(device.to_owned(), value);
    }
    Ok(results.into())
}
