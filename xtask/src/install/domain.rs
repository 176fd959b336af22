// SPDX-License-Identifier: GPL-2.0-or-later

//! How libvirt is told to use what was installed

use std::path::Path;

use anyhow::Result;
use xshell::{cmd, Shell};

use crate::{build::Target, run::RunQuiet};

/// A domain that can be started as it is
const DOMAIN: &str = include_str!("domain.xml");

/// What the user copies into a domain of libvirt, and for a PC a whole domain
///
/// # Errors
///
/// Fails if there is no current directory.
pub fn instructions(emulator: &Path, target: Target) -> Result<String> {
    let line = format!("<emulator>{}</emulator>\n", emulator.display());
    Ok(if target == Target::X86_64 {
        format!("{line}\n{}", domain(emulator, has_kvm(emulator)?))
    } else {
        line
    })
}

/// Whether a virtual machine can have KVM: there are hosts on which `/dev/kvm`
/// can be opened, but nothing more.
fn has_kvm(emulator: &Path) -> Result<bool> {
    let sh = Shell::new()?;
    let machine = ["-machine", "none", "-nodefaults", "-display", "none"];
    Ok(
        cmd!(sh, "{emulator} -accel kvm {machine...} -monitor stdio")
            .stdin("quit\n")
            .run_quiet()
            .is_ok(),
    )
}

/// A domain of a PC
fn domain(emulator: &Path, kvm: bool) -> String {
    DOMAIN
        .replace("@TYPE@", if kvm { "kvm" } else { "qemu" })
        .replace("@EMULATOR@", &emulator.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_domain_is_complete() {
        let emulator = Path::new("/opt/x/bin/qemu-system-x86_64");
        for (kvm, kind) in [(true, "kvm"), (false, "qemu")] {
            let xml = domain(emulator, kvm);
            assert!(!xml.contains('@'), "{xml}");
            let doc = roxmltree::Document::parse(&xml).unwrap();
            let root = doc.root_element();
            assert_eq!(root.attribute("type"), Some(kind));
            let text = |tag| root.descendants().find(|n| n.has_tag_name(tag))?.text();
            assert_eq!(text("emulator"), emulator.to_str());
        }
        let others = instructions(emulator, Target::S390x).unwrap();
        assert!(!others.contains("<domain"));
        // There is no such program.
        let ours = instructions(emulator, Target::X86_64).unwrap();
        assert!(ours.contains("<domain type='qemu'>"));
    }
}
