// SPDX-License-Identifier: GPL-2.0-or-later

//! Counts the results of tests, in what the runners write

use std::{fs, ops::AddAssign, path::PathBuf};

use anyhow::{bail, Context, Result};
use xshell::cmd;

use crate::{
    build::Build,
    env::{remove, Env},
    run::RunQuiet,
};

/// How many tests had which result
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
    /// What the runners said of those that failed, for the end of the output
    pub messages: Vec<String>,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.messages.extend(other.messages);
    }
}

pub const PASS: Count = Count {
    passed: 1,
    failed: 0,
    skipped: 0,
    messages: Vec::new(),
};

impl From<bool> for Count {
    /// One test, which has passed or failed
    fn from(good: bool) -> Self {
        Self {
            passed: good.into(),
            failed: (!good).into(),
            ..Self::default()
        }
    }
}

/// Tell why something is not tested.
pub fn skip(what: &str, reason: &str) -> Count {
    println!("{what} not tested: {reason}");
    Count {
        skipped: 1,
        ..Count::default()
    }
}

pub fn meson_list(build: &Build) -> Result<Vec<String>> {
    let (sh, meson) = (build.shell()?, build.meson());
    let list = cmd!(sh, "{meson} test --list").read_quiet()?;
    Ok(list
        .lines()
        // the suites, " - ", the project, ":", the name
        .filter_map(|line| line.split_once(" - ")?.1.split_once(':'))
        .map(|(_, name)| name.trim().to_owned())
        .collect())
}

/// Run tests with meson, and count them in the log that it writes.
pub fn meson_test(
    env: &Env,
    build: &Build,
    what: &str,
    args: &[&str],
    vars: &[(&'static str, PathBuf)],
) -> Result<Count> {
    let log = |name: &str| build.dir.join("meson-logs").join(name);
    let logs = ["testlog.junit.xml", "testlog-thorough.junit.xml"];
    for name in logs {
        remove(&log(name))?;
    }
    let (sh, meson) = (build.shell()?, build.meson());
    let result = env.run(
        what,
        cmd!(
            sh,
            "{meson} test --print-errorlogs --num-processes=2 {args...}"
        )
        .envs(vars.iter().map(|(k, v)| (k, v))),
    );

    let Some(junit) = logs.iter().map(|name| log(name)).find(|path| path.exists()) else {
        // nothing was run
        result?;
        bail!("{what}: meson has run no test");
    };
    let count = parse_junit(&fs::read_to_string(&junit)?)?;
    if let Err(err) = result {
        // Meson overwrites it the next time
        let kept = env
            .cache
            .join(format!("failed {what}.log").replace(' ', "-"));
        fs::copy(junit.with_extension("").with_extension("txt"), &kept)?;
        let message = format!("{err:#}\nThe complete log is in {}", kept.display());
        eprintln!("{message}");
        // even if meson does not say which test it was
        return Ok(Count {
            failed: count.failed.max(1),
            messages: vec![message],
            ..count
        });
    }
    println!(
        "{what}: {} passed, {} failed, {} skipped",
        count.passed, count.failed, count.skipped
    );
    Ok(count)
}

pub fn parse_junit(xml: &str) -> Result<Count> {
    let doc = roxmltree::Document::parse(xml).context("meson's test log is not valid XML")?;
    let mut count = Count::default();
    for case in doc.descendants().filter(|n| n.has_tag_name("testcase")) {
        let has = |tag| case.children().any(|n| n.has_tag_name(tag));
        if has("failure") || has("error") {
            count.failed += 1;
        } else if has("skipped") {
            count.skipped += 1;
        } else {
            count.passed += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junit_results() {
        let xml = "<testsuites><testsuite><testcase name='a'/><testcase \
                   name='b'><failure/></testcase><testcase \
                   name='c'><skipped/></testcase><testcase \
                   name='d'><error/></testcase></testsuite></testsuites>";
        assert_eq!(
            parse_junit(xml).unwrap(),
            Count {
                passed: 1,
                failed: 2,
                skipped: 1,
                messages: Vec::new(),
            }
        );
        parse_junit("<a>").unwrap_err();
    }
}
