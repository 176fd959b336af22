// SPDX-License-Identifier: GPL-2.0-or-later

//! LLVM of the version that rustc has: only then, what clang and rustc
//! instrument fits together

use std::path::Path;

use anyhow::{Context, Result};
use xshell::cmd;

use crate::{
    apt,
    env::Env,
    run::{shell_in, RunQuiet},
};

/// A major version, for example "22"
pub struct Llvm(String);

impl Llvm {
    /// Install the tools.
    ///
    /// # Errors
    ///
    /// Fails if there are none of this version.
    pub fn provide(env: &Env) -> Result<Self> {
        let sh = shell_in(Path::new("."))?;
        let output = cmd!(sh, "rustc -vV").read_quiet()?;
        let version = major(&output).context("rustc does not print its version of LLVM")?;
        let packages = [
            format!("llvm-{version}"),
            format!("clang-{version}"),
            format!("libclang-rt-{version}-dev"),
        ];
        apt::ensure_packages(env, &packages.each_ref().map(String::as_str))?;
        Ok(Self(version.to_owned()))
    }

    /// The option for sanitizers that has them name functions; suppressions
    /// depend on it, too.
    pub fn symbolizer(&self) -> String {
        format!(
            "external_symbolizer_path=/usr/bin/{}",
            self.program("llvm-symbolizer")
        )
    }

    /// The name of a program
    pub fn program(&self, name: &str) -> String {
        format!("{name}-{}", self.0)
    }
}

/// The major version in the output of `rustc -vV`
fn major(output: &str) -> Option<&str> {
    output
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_of_rustc() {
        assert_eq!(major("release: 1.95.0\nLLVM version: 22.1.2"), Some("22"));
        assert_eq!(major("release: 1.95.0\n"), None);
    }
}
