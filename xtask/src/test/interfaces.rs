// SPDX-License-Identifier: GPL-2.0-or-later

//! Compares what both devices look like to users and management tools

use std::collections::BTreeMap;

use anyhow::{ensure, Context, Result};
use serde_json::{json, Value};
use xshell::cmd;

use super::results::{Count, PASS};
use crate::{
    build::{Build, Target},
    env::Env,
    run::RunQuiet,
};

/// Properties that only the Rust device has, on the device and on its proxies
const RUST_ONLY_PROPERTIES: &[&str] = &[
    "balloon-counters",
    "balloon-status",
    "guest-stats-request",
    "huge-pages",
    "oom-hold-time",
];

/// Check that both devices look the same to users and management tools.
pub fn compare_interfaces(env: &Env, a: &Build, b: &Build) -> Result<Count> {
    env.say("comparing the properties of both devices");
    let mut count = Count::default();
    let types: &[&str] = match a.target {
        Target::S390x => &["virtio-balloon-ccw", "virtio-balloon-device"],
        _ => &[
            "virtio-balloon-pci",
            "virtio-balloon-pci-transitional",
            "virtio-balloon-pci-non-transitional",
            "virtio-balloon-device",
        ],
    };
    for typ in types {
        for (what, get) in [
            ("-device help", device_help as fn(&Build, &str) -> Result<_>),
            ("qom-list-properties", qom_properties),
            ("device-list-properties", device_properties),
        ] {
            let (left, mut right) = (get(a, typ)?, get(b, typ)?);
            ensure!(!left.is_empty(), "{what}: {typ} has no properties");
            let missing: Vec<_> = RUST_ONLY_PROPERTIES
                .iter()
                .filter(|extra| right.remove(**extra).is_none())
                .collect();
            if left == right && missing.is_empty() {
                count += PASS;
            } else {
                count.failed += 1;
                if !missing.is_empty() {
                    eprintln!("{what}: {typ} in Rust lacks {missing:?}");
                }
                eprintln!(
                    "{what} differs for {typ}:\n{}: {left:#?}\n{}: {right:#?}",
                    a.device.name(),
                    b.device.name()
                );
            }
        }
    }
    Ok(count)
}

/// Name of a property, and all that is known of it
type Properties = BTreeMap<String, String>;

fn device_help(build: &Build, typ: &str) -> Result<Properties> {
    let (sh, qemu) = (build.shell()?, build.qemu());
    let help = cmd!(sh, "{qemu} -device {typ},help").read_quiet()?;
    Ok(help
        .lines()
        .map(|line| {
            let (name, rest) = line.trim().split_once('=').unwrap_or((line, ""));
            (name.to_owned(), rest.to_owned())
        })
        .collect())
}

fn qom_properties(build: &Build, typ: &str) -> Result<Properties> {
    query_properties(build, "qom-list-properties", typ)
}

fn device_properties(build: &Build, typ: &str) -> Result<Properties> {
    query_properties(build, "device-list-properties", typ)
}

fn query_properties(build: &Build, command: &str, typ: &str) -> Result<Properties> {
    let (sh, qemu) = (build.shell()?, build.qemu());
    let commands = [
        json!({"execute": "qmp_capabilities"}),
        json!({"execute": command, "id": "q", "arguments": {"typename": typ}}),
        json!({"execute": "quit"}),
    ]
    .map(|qmp| qmp.to_string());
    let replies = cmd!(
        sh,
        "{qemu} -machine none -nodefaults -display none -qmp stdio"
    )
    .stdin(commands.join("\n"))
    .read_quiet()?;
    let reply = replies
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|reply| reply.get("id") == Some(&Value::from("q")))
        .with_context(|| format!("no reply to {command}"))?;
    let list = reply
        .get("return")
        .and_then(Value::as_array)
        .with_context(|| format!("{command} {typ}: {reply}"))?;
    Ok(list
        .iter()
        .map(|prop| {
            let name = prop.get("name").and_then(Value::as_str).unwrap_or_default();
            (name.to_owned(), prop.to_string())
        })
        .collect())
}
