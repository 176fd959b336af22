// SPDX-License-Identifier: GPL-2.0-or-later

//! The device under QEMU's qtest, without a guest

use anyhow::{ensure, Result};

use super::{
    interfaces::compare_interfaces,
    results::{meson_list, meson_test, Count},
};
use crate::{
    build::{Build, Device, Target},
    env::Env,
    hugepages::{HugePages, FOR_QTESTS},
};

/// The tests of the balloon that the build with a device has to have
pub fn balloon_tests(device: Device, target: Target) -> Vec<&'static str> {
    let mut tests = vec!["virtio-balloon-test"];
    if device == Device::Rust {
        tests.push("virtio-balloon-rust-test");
    }
    if target == Target::X86_64 {
        tests.extend(["virtio-balloon-kvm-test", "virtio-balloon-queue-reset-test"]);
    }
    // libqos has no driver for CCW.
    if target != Target::S390x {
        tests.extend([
            "virtio-balloon-config-test",
            "virtio-balloon-conformance-test",
            "virtio-balloon-drivers-test",
            "virtio-balloon-faults-test",
            "virtio-balloon-hint-faults-test",
            "virtio-balloon-huge-pages-test",
            "virtio-balloon-lifecycle-test",
            "virtio-balloon-migration-test",
            "virtio-balloon-pages-test",
            "virtio-balloon-reporting-test",
            "virtio-balloon-stats-test",
            "virtio-balloon-stream-test",
        ]);
        if device == Device::Rust {
            tests.extend([
                "virtio-balloon-messages-test",
                "virtio-balloon-oom-test",
                "virtio-balloon-status-test",
            ]);
        }
    }
    tests
}

/// Other tests that a build with either device has to pass, as far as there are
/// any for the target
const QTESTS: &[&str] = &[
    "hpet-test",
    "migration-discard-test",
    "migration-holes-test",
    "virtio-ring-test",
    "qos-test",
    "device-introspect-test",
    "qom-test",
    "qmp-cmd-test",
    "test-hmp",
];

/// Those that start every machine there is; some Arm machines need firmware
/// that Debian does not have.
const NEED_FIRMWARE: &[&str] = &["qom-test", "test-hmp"];

/// Run those of these programs that a build has.
pub fn run_qtests(env: &Env, build: &Build, programs: &[&str]) -> Result<Count> {
    let listed = meson_list(build)?;
    let names: Vec<_> = programs
        .iter()
        .map(|program| format!("qtest-{}/{program}", build.target.name()))
        .filter(|name| listed.contains(name))
        .collect();
    if names.is_empty() {
        return Ok(Count::default());
    }
    let args: Vec<_> = names.iter().map(String::as_str).collect();
    let what = format!("{} with the {} build", args.join(", "), build.device.name());
    meson_test(env, build, &what, &args, &[])
}

pub fn qtest(env: &Env, only: Option<Device>, target: Target) -> Result<Count> {
    let devices = only.map_or_else(|| vec![Device::C, Device::Rust], |d| vec![d]);
    let mut count = Count::default();
    let mut builds = Vec::new();
    let _pages = HugePages::reserve(env, FOR_QTESTS);

    for device in devices {
        let build = Build::prepare(env, device, target, None)?;
        build.build_qemu(env)?;
        let listed = meson_list(&build)?;
        let full_name = |test: &&str| format!("qtest-{}/{test}", target.name());
        let mut names: Vec<_> = balloon_tests(device, target)
            .iter()
            .map(full_name)
            .collect();
        for name in &names {
            ensure!(
                listed.contains(name),
                "{name} is not part of the build with the {} device",
                device.name()
            );
        }
        names.extend(
            QTESTS
                .iter()
                .filter(|test| target != Target::Aarch64 || !NEED_FIRMWARE.contains(test))
                .map(full_name)
                .filter(|name| listed.contains(name)),
        );
        let args: Vec<_> = names.iter().map(String::as_str).collect();
        let what = format!("qtests with the {} device", device.name());
        // A test must not skip what this device is meant to have.
        let vars = [("QTEST_BALLOON_DEVICE", device.name().into())];
        count += meson_test(env, &build, &what, &args, &vars)?;
        builds.push(build);
    }
    if let [a, b] = builds.as_slice() {
        count += compare_interfaces(env, a, b)?;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::build::qtest_program;

    #[test]
    fn no_qtest_is_forgotten() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests-qtest");
        for entry in fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let Some(test) = qtest_program(&name) else {
                continue;
            };
            let all = balloon_tests(Device::Rust, Target::X86_64);
            let mut run = all.iter().chain(QTESTS);
            assert!(run.any(|t| *t == test), "{test} is not run");
        }
    }
}
