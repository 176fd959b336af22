// SPDX-License-Identifier: GPL-2.0-or-later

//! How libvirt is told to use what was installed

use std::{
    fs::{self, File},
    io::ErrorKind,
    path::Path,
};

use crate::build::Target;

/// A domain that can be started as it is
const DOMAIN: &str = include_str!("domain.xml");

/// What the user copies into a domain of libvirt, and for a PC a whole domain;
/// and what has to be done before that works
pub fn instructions(prefix: &Path, emulator: &Path, target: Target) -> String {
    let mut text = format!("<emulator>{}</emulator>\n", emulator.display());
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if enabled.is_ok_and(|enabled| enabled.trim() == "Y") {
        text.push_str(&apparmor(prefix));
    }
    if target == Target::X86_64 {
        text = format!("{text}\n{}", domain(emulator));
    }
    text
}

/// What the user has to do if there is `AppArmor`
fn apparmor(prefix: &Path) -> String {
    let commands: Vec<_> = apparmor_commands(prefix)
        .lines()
        .map(|line| format!("  {line}\n"))
        .collect();
    format!(
        "\nAppArmor is active, and does not let libvirt start QEMU from here.  As root, \
         once:\n\n{}",
        commands.concat()
    )
}

/// How `AppArmor` is told that libvirt may start this QEMU: Debian's profiles only
/// have programs below /usr.
pub fn apparmor_commands(prefix: &Path) -> String {
    let local = "/etc/apparmor.d/local";
    let prefix = prefix.display();
    format!(
        "\
echo '{prefix}/bin/* PUx,' >> {local}/usr.sbin.libvirtd
mkdir -p {local}/abstractions
printf '%s\\n' '{prefix}/bin/* rmix,' '{prefix}/lib/** mr,' '{prefix}/share/** r,' \\
  >> {local}/abstractions/libvirt-qemu
systemctl reload apparmor
"
    )
}

/// Whether the kernel has KVM.  Containers can have the file without it.
fn has_kvm() -> bool {
    File::open("/dev/kvm").map_or_else(|err| err.kind() == ErrorKind::PermissionDenied, |_| true)
}

/// A domain of a PC
pub fn domain(emulator: &Path) -> String {
    DOMAIN
        .replace("@TYPE@", if has_kvm() { "kvm" } else { "qemu" })
        .replace("@EMULATOR@", &emulator.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_for_apparmor() {
        let text = apparmor(Path::new("/opt/x"));
        assert!(text.contains("'/opt/x/bin/* PUx,'"), "{text}");
        assert!(
            text.contains("printf '%s\\n' '/opt/x/bin/* rmix,'"),
            "{text}"
        );
    }

    #[test]
    fn the_domain_is_complete() {
        let emulator = Path::new("/opt/x/bin/qemu-system-x86_64");
        let xml = domain(emulator);
        assert!(!xml.contains('@'), "{xml}");
        let doc = roxmltree::Document::parse(&xml).unwrap();
        let root = doc.root_element();
        assert!(["kvm", "qemu"].map(Some).contains(&root.attribute("type")));
        let text = |tag| root.descendants().find(|n| n.has_tag_name(tag))?.text();
        assert_eq!(text("emulator"), emulator.to_str());
        let printed = |target| instructions(Path::new("/opt/x"), emulator, target);
        assert!(!printed(Target::S390x).contains("<domain"));
        assert!(printed(Target::X86_64).contains("<domain"));
    }
}
