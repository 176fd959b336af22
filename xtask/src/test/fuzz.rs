// SPDX-License-Identifier: GPL-2.0-or-later

//! The inputs that the fuzzer has found before, with sanitizers

use std::fs;

use anyhow::{Context, Result};

use super::results::Count;
use crate::{
    build::Device,
    env::Env,
    fuzz::{Edges, Fuzzer},
};

/// The file that says how many edges are taken
const DOCUMENT: &str = "docs/security.md";

/// What precedes and follows the figure there, in per cent
const FIGURE: [&str; 2] = ["inputs of the repository take ", " % of the edges"];

fn documented(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once(FIGURE[0])?;
    rest.split_once(FIGURE[1])?.0.parse().ok()
}

pub fn fuzz(env: &Env) -> Result<Count> {
    let fuzzer = Fuzzer::prepare(env, Device::Rust)?;
    let Edges { taken, all } = fuzzer.edges(env)?;
    let percent = 100 * taken / all;
    println!("{taken} of {all} edges of the device and its bindings, {percent} %");
    let document = fs::read_to_string(env.repo.join(DOCUMENT))?;
    let before = documented(&document).with_context(|| format!("no figure in {DOCUMENT}"))?;
    // Some depend on the time.
    Ok(Count::from(percent + 1 >= before))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn figure_is_documented() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = fs::read_to_string(repo.join(DOCUMENT)).unwrap();
        assert!(documented(&text).is_some());
    }
}
