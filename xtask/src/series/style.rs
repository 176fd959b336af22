// SPDX-License-Identifier: GPL-2.0-or-later

//! The style of the patches

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};
use xshell::{cmd, Shell};

use crate::env::Env;

/// Which findings of checkpatch are allowed, and why
const ALLOWED: &str = "patches/checkpatch-allowed";

/// Check the patches with QEMU's `checkpatch.pl`.
pub fn check_style(env: &Env, sh: &Shell, patches: &[PathBuf]) -> Result<()> {
    env.say("checking the style of the patches");
    let mut reports = String::new();
    for patch in patches {
        // in the complete tree, which it insists on
        let report = cmd!(
            sh,
            "perl scripts/checkpatch.pl --terse --no-summary {patch}"
        )
        .quiet()
        .ignore_status()
        .read()?;
        // Name the patch, not the directory that is in the way
        let dir = patch.parent().unwrap_or_else(|| Path::new(""));
        reports += &report.replace(&format!("{}/", dir.display()), "");
        reports.push('\n');
    }
    let allowed = fs::read_to_string(env.repo.join(ALLOWED))
        .with_context(|| format!("cannot read {ALLOWED}"))?;
    let allowed = Allowed::parse(&allowed)?;
    let problems = allowed.judge(&reports);
    ensure!(
        problems.is_empty(),
        "the style of the patches:\n{}",
        problems.join("\n")
    );
    Ok(())
}

/// Findings that are allowed
struct Allowed<'a>(Vec<&'a str>);

impl<'a> Allowed<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let mut list = Vec::new();
        for line in text.lines() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match line.split_once(" # ") {
                Some((finding, reason)) if !reason.trim().is_empty() => list.push(finding.trim()),
                _ => bail!("{ALLOWED}: there is no reason after \" # \" in: {line}"),
            }
        }
        Ok(Self(list))
    }

    /// The findings that are not allowed, and what is allowed although nothing
    /// was found.
    fn judge(&self, reports: &str) -> Vec<String> {
        let findings: Vec<_> = reports.lines().filter(|line| !line.is_empty()).collect();
        let mut problems: Vec<_> = findings
            .iter()
            .filter(|line| !self.0.iter().any(|allowed| line.contains(allowed)))
            .map(ToString::to_string)
            .collect();
        for allowed in &self.0 {
            if !findings.iter().any(|line| line.contains(allowed)) {
                problems.push(format!(
                    "{ALLOWED}: no patch has this any more, so remove it: {allowed}"
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_need_a_reason() {
        let allowed = Allowed::parse("# comment\n\nline over 80 # a table\n").unwrap();
        assert!(allowed
            .judge("1.patch:3: WARNING: line over 80 characters\n\n")
            .is_empty());
        let problems = allowed.judge("1.patch:9: ERROR: trailing whitespace\n");
        assert_eq!(problems.len(), 2);
        assert!(problems[0].contains("trailing whitespace"));
        assert!(problems[1].contains("remove it: line over 80"));
        assert!(Allowed::parse("no reason\n").is_err());
        assert!(Allowed::parse("no reason # \n").is_err());
    }
}
