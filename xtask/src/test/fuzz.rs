// SPDX-License-Identifier: GPL-2.0-or-later

//! The inputs that the fuzzer has found before, with sanitizers

use std::fs;

use anyhow::{Context, Result};

use super::results::Count;
use crate::{
    build::Device,
    env::Env,
    fuzz::{describe, Fuzzer, DESCRIPTION},
};

/// The file that says how much is executed
const DOCUMENT: &str = "docs/security.md";

/// By how many per cent a figure may fall: some lines depend on the time
const TOLERANCE: f64 = 1.0;

fn documented(text: &str) -> Option<[f64; 2]> {
    // The text may be divided into lines anywhere.
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let [before, between, behind] = DESCRIPTION;
    let (_, rest) = text.split_once(&format!("inputs of the repository {before}"))?;
    let (lines, rest) = rest.split_once(between)?;
    let (branches, _) = rest.split_once(behind)?;
    Some([lines.parse().ok()?, branches.parse().ok()?])
}

/// Whether no figure has become worse
fn as_good(after: [f64; 2], before: [f64; 2]) -> bool {
    after
        .iter()
        .zip(before)
        .all(|(after, before)| after + TOLERANCE >= before)
}

pub fn fuzz(env: &Env) -> Result<Count> {
    let fuzzer = Fuzzer::prepare(env, Device::Rust)?;
    let figures = fuzzer.replay(env)?;
    println!("the inputs {}", describe(figures));
    let document = fs::read_to_string(env.repo.join(DOCUMENT))?;
    let before = documented(&document).with_context(|| format!("no figures in {DOCUMENT}"))?;
    Ok(Count::from(as_good(figures.percent(), before)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn figures_are_documented() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = fs::read_to_string(repo.join(DOCUMENT)).unwrap();
        let before = documented(&text).unwrap();
        assert!(as_good(before, before));
        assert!(!as_good([100.0, before[1] - 2.0], before));
        assert!(!as_good([before[0] - 2.0, 100.0], before));
    }
}
