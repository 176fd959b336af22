// SPDX-License-Identifier: GPL-2.0-or-later

//! Finds out what a command will be short of, and says all of it before anything
//! is started

use std::fs;

use anyhow::{ensure, Result};

use crate::{apt, env::Env, guest, source::Source};

/// What a command needs, rounded up from what was measured on two cores; see
/// `docs/install.md`.
#[derive(Default)]
pub struct Needs {
    /// Debian packages
    pub packages: Vec<&'static str>,
    /// Space for the cache, in GiB, if nothing is there yet
    pub disk: u64,
    /// Memory, in GiB
    pub memory: u64,
    /// Whether a Linux guest is booted
    pub guest: bool,
    /// What else is in the way
    pub problems: Vec<String>,
}

impl Needs {
    /// What it takes to build QEMU for tests
    pub fn build() -> Self {
        Self {
            packages: apt::BUILD_PACKAGES.to_vec(),
            disk: 4,
            memory: 2,
            ..Self::default()
        }
    }

    /// And to boot guests
    pub fn guest() -> Self {
        let mut needs = Self::build();
        needs.packages.extend(apt::GUEST_PACKAGES);
        needs.guest = true;
        needs
    }

    /// And other packages
    pub fn with(mut self, packages: &[&'static str]) -> Self {
        self.packages.extend(packages);
        self
    }

    /// Find out what is missing.
    ///
    /// # Errors
    ///
    /// Fails with a list of all that is missing.
    pub fn check(mut self, env: &Env) -> Result<()> {
        let built = Source::existing(env).is_ok();
        // What has been built is in the space that is needed.
        if !built {
            self.problems.extend(env.lack_of_space(self.disk)?);
        }
        self.problems.extend(lack_of_memory(
            &fs::read_to_string("/proc/meminfo").unwrap_or_default(),
            self.memory,
        ));
        self.packages.sort_unstable();
        self.packages.dedup();
        let missing = if apt::is_debian() {
            apt::missing(&self.packages)?
        } else {
            Vec::new()
        };
        if !missing.is_empty() && !apt::is_root() {
            self.problems.push(apt::please_install(&missing));
        }
        let downloads = !missing.is_empty() || !built || self.guest && !guest::is_provisioned(env);
        if downloads && apt::is_debian() {
            self.problems.extend(apt::unreachable(env)?);
        }
        ensure!(self.problems.is_empty(), "{}", message(&self.problems));
        Ok(())
    }
}

/// All problems, one per line
fn message(problems: &[String]) -> String {
    match problems {
        [only] => only.clone(),
        all => {
            let lines: Vec<_> = all
                .iter()
                .map(|problem| format!("\n  - {problem}"))
                .collect();
            format!("this cannot be done here:{}", lines.concat())
        }
    }
}

/// What is wrong if the available memory is less than `gib` GiB
fn lack_of_memory(meminfo: &str, gib: u64) -> Option<String> {
    let kib: u64 = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?
        .trim()
        .strip_suffix(" kB")?
        .parse()
        .ok()?;
    (kib < gib << 20).then(|| {
        format!(
            "{} MiB of memory are available, but about {gib} GiB are needed",
            kib >> 10
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory() {
        let meminfo = "MemTotal:       24000000 kB\nMemAvailable:    1048576 kB\n";
        assert_eq!(lack_of_memory(meminfo, 1), None);
        let problem = lack_of_memory(meminfo, 2).unwrap();
        assert!(problem.starts_with("1024 MiB "), "{problem}");
        assert_eq!(lack_of_memory("", 2), None);
    }

    #[test]
    fn all_at_once() {
        assert_eq!(message(&["a".to_owned()]), "a");
        let text = message(&["a".to_owned(), "b".to_owned()]);
        assert_eq!(text, "this cannot be done here:\n  - a\n  - b");
    }

    #[test]
    fn problems_are_reported_together() {
        let tmp = tempfile::tempdir().unwrap();
        let env = Env::for_tests(tmp.path());
        let needs = Needs {
            disk: 1 << 30,
            memory: 1 << 30,
            problems: vec!["something else".to_owned()],
            ..Needs::default()
        };
        // The mirror may be unreachable as well.
        let text = needs.check(&env).unwrap_err().to_string();
        for part in ["something else", "GiB are needed", "of memory"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
