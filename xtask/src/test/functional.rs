// SPDX-License-Identifier: GPL-2.0-or-later

//! Guests that boot Linux

use std::{fs, str::FromStr, thread};

use anyhow::{ensure, Result};

use super::results::{meson_test, Count};
use crate::{
    build::{build_both, Build, Device},
    env::Env,
    guest::{self, policy, Assets},
    hugepages::HugePages,
    run::RunQuiet,
    top,
    version::KERNELS,
};

/// A kernel for the functional tests
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The suite of Debian that has it
    suite: &'static str,
    /// The version that the user wants, if that depends on the day
    wanted: Option<String>,
}

impl Kernel {
    fn all() -> Vec<Self> {
        KERNELS
            .iter()
            .map(|(suite, _)| Self {
                suite,
                wanted: None,
            })
            .collect()
    }

    /// Get the kernel.
    fn provision(&self, env: &Env) -> Result<Assets> {
        let mut assets = guest::provision(env, self.suite)?;
        if let Some(wanted) = &self.wanted {
            let is_wanted = |kernel: &Assets| kernel.release.starts_with(&format!("{wanted}."));
            // The suite may have moved on since it was downloaded.
            if !is_wanted(&assets) {
                assets = guest::renew(env, self.suite)?;
            }
            ensure!(
                is_wanted(&assets),
                "--kernel {wanted}: Debian {} has Linux {}; say --kernel {0} for whatever it has",
                self.suite,
                assets.release
            );
        }
        Ok(assets)
    }
}

impl FromStr for Kernel {
    type Err = String;

    /// A suite of Debian, or the version of a kernel: that of a stable suite,
    /// or any other version, which the development suite has at some time.
    fn from_str(text: &str) -> Result<Self, String> {
        let known = KERNELS
            .iter()
            .find(|(suite, version)| *suite == text || *version == Some(text));
        if let Some((suite, _)) = known {
            return Ok(Self {
                suite,
                wanted: None,
            });
        }
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let is_version = text
            .split_once('.')
            .is_some_and(|(major, minor)| is_number(major) && is_number(minor));
        match KERNELS.iter().find(|(_, version)| version.is_none()) {
            Some((suite, _)) if is_version => Ok(Self {
                suite,
                wanted: Some(text.to_owned()),
            }),
            _ => Err(format!(
                "name a suite of Debian ({}) or a version like 6.12",
                KERNELS.iter().map(|k| k.0).collect::<Vec<_>>().join(", ")
            )),
        }
    }
}

/// Boot guests.  `quick` means with one kernel, and with fewer repetitions.
pub fn functional(
    env: &Env,
    only: Option<Device>,
    kernels: &[Kernel],
    quick: bool,
) -> Result<Count> {
    let mut kernels = kernels.to_vec();
    if kernels.is_empty() {
        kernels = Kernel::all();
        if quick {
            kernels.truncate(1);
        }
    }
    // for two guests with 512 MiB each
    let _pages = HugePages::reserve(env, 512);
    let builds @ [c, rust] = &build_both(env)?;
    let [stock, latest] = match only {
        None => guest::stock_qemu(env),
        Some(_) => [None, None],
    };

    let mut count = Count::default();
    for kernel in kernels {
        let assets = kernel.provision(env)?;
        // There are patches for the driver of one kernel.
        let policies = (kernel.suite == guest::SUITE)
            .then(|| policy::provision(env, kernel.suite))
            .transpose()?;
        let run = |build: &Build| {
            let mut vars = guest::python_env(build, &assets);
            vars.push(("BALLOON_DEVICE", build.device.name().into()));
            vars.push(("BALLOON_QUICK", u8::from(quick).to_string().into()));
            let mut args = vec![
                "--setup",
                "thorough",
                "func-x86_64-virtio_balloon_guest",
                "func-x86_64-virtio_balloon_oom",
            ];
            if build.device == Device::Rust {
                args.push("func-x86_64-virtio_balloon_status");
            }
            if let Some((_, dir)) = &policies {
                vars.push(("BALLOON_GUEST_POLICIES", dir.clone()));
            }
            if only.is_none() && build.device == Device::Rust {
                args.push("func-x86_64-virtio_balloon_migration");
                args.push("func-x86_64-virtio_balloon_memory");
                vars.push(("BALLOON_QEMU_C", c.qemu()));
                vars.push(("BALLOON_QEMU_RUST", rust.qemu()));
                for (name, qemu) in [
                    ("BALLOON_STOCK_QEMU", &stock),
                    ("BALLOON_LATEST_QEMU", &latest),
                ] {
                    vars.extend(qemu.iter().map(|(path, _)| (name, path.clone())));
                }
            }
            let what = format!(
                "Linux {} with the {} device",
                assets.release,
                build.device.name()
            );
            meson_test(env, build, &what, &args, &vars)
        };

        // Each guest has one vCPU, and mostly waits.
        if kernel.suite == guest::SUITE && only != Some(Device::C) {
            count += top(env, rust, &assets)?;
        }
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = builds
                .iter()
                .filter(|build| only.is_none_or(|device| device == build.device))
                .map(|build| scope.spawn(|| run(build)))
                .collect();
            threads
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect()
        });
        for result in results {
            count += result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        if only.is_none() {
            let [stock, latest] =
                [&stock, &latest].map(|qemu| qemu.as_ref().map_or("none", |(_, version)| version));
            println!(
                "migration of Linux {} (stock QEMU: {stock}, latest: {latest}):",
                assets.release
            );
            print_matrix(rust)?;
        }
    }
    Ok(count)
}

/// qemu-balloon-top, which is not in QEMU's tree
fn top(env: &Env, build: &Build, assets: &Assets) -> Result<Count> {
    env.say("qemu-balloon-top with a guest");
    let dir = env.temp_dir("top")?;
    let program = top::install(env, dir.path())?;
    let good = guest::program(env, &build.shell()?, build, assets, "test_balloon_top.py")
        .env("VIRTIO_BALLOON_TOP", program)
        .succeeds()?;
    Ok(good.into())
}

/// Show the tables of migrations, which are in the logs of the tests.
fn print_matrix(build: &Build) -> Result<()> {
    let log = fs::read_to_string(build.dir.join("meson-logs/testlog-thorough.txt"))?;
    for line in log.lines() {
        if let Some(row) = line.strip_prefix("# ").filter(|row| row.contains(" | ")) {
            println!("  {row}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels() {
        let suite = |text: &str| text.parse::<Kernel>().map(|k| (k.suite, k.wanted));
        assert_eq!(suite("6.1"), Ok(("bookworm", None)));
        assert_eq!(suite("trixie"), Ok(("trixie", None)));
        assert_eq!(suite("7.2"), Ok(("sid", Some("7.2".to_owned()))));
        for bad in ["", "6", "6.x", "jessie", ".1"] {
            suite(bad).unwrap_err();
        }
    }
}
