// SPDX-License-Identifier: GPL-2.0-or-later

//! Runs programs

use anyhow::{ensure, Result};

/// A way to run commands that shows what they print only if they fail
pub trait RunQuiet {
    /// Run the command.
    ///
    /// # Errors
    ///
    /// Fails with the output of the command if that fails.
    fn run_quiet(self) -> Result<()>;
}

impl RunQuiet for xshell::Cmd<'_> {
    fn run_quiet(self) -> Result<()> {
        let name = self.to_string();
        let out = self.quiet().ignore_status().output()?;
        ensure!(
            out.status.success(),
            "{name}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr).trim_end()
        );
        Ok(())
    }
}
