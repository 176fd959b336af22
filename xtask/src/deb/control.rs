// SPDX-License-Identifier: GPL-2.0-or-later

//! What is left out of `debian/control`
//!
//! Everything else that differs from Debian's packaging is in
//! `patches/debian-packaging`.

/// The binary packages that are built: emulation of PCs, what it is divided into,
/// and a program of ours
const PACKAGES: &[&str] = &[
    "qemu-balloon-top",
    "qemu-block-extra",
    "qemu-system-common",
    "qemu-system-gui",
    "qemu-system-modules-opengl",
    "qemu-system-modules-spice",
    "qemu-system-x86",
    "qemu-utils",
];

/// A package that QEMU can be built without
#[derive(Debug, PartialEq, Eq)]
pub struct Optional {
    /// The package, which has a line of its own in Build-Depends
    pub package: &'static str,
    /// The option of configure that goes with it
    pub option: &'static str,
}

/// What Debian 12 lacks
pub const OPTIONAL: &[Optional] = &[Optional {
    package: "libblkio-dev",
    option: "--disable-blkio",
}];

/// Keep the packages that are built, and drop what there is not from what they
/// are built with.
pub fn edit(control: &str, missing: &[&Optional]) -> String {
    let is_built = |stanza: &&str| {
        stanza
            .lines()
            .find_map(|line| line.strip_prefix("Package: "))
            .is_none_or(|name| PACKAGES.contains(&name))
    };
    let is_there = |line: &&str| {
        let first = line
            .strip_prefix(' ')
            .and_then(|line| line.split(|c: char| c.is_whitespace() || c == ',').next());
        !missing
            .iter()
            .any(|optional| first == Some(optional.package))
    };
    let stanzas: Vec<_> = control
        .split("\n\n")
        .filter(is_built)
        .map(|stanza| {
            stanza
                .lines()
                .filter(is_there)
                .collect::<Vec<_>>()
                .join("\n")
        })
        .collect();
    stanzas.join("\n\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROL: &str = "\
# generated
Source: qemu
Build-Depends-Arch: debhelper-compat (= 13),
# --enable-blkio\tamd64
 libblkio-dev\t       [amd64 arm64],
 libnuma-dev,

Package: qemu-system-arm
Depends: ipxe-qemu,

Package: qemu-system-x86
Depends: seabios,
";

    #[test]
    fn only_what_is_built_is_kept() {
        let text = edit(CONTROL, &[]);
        assert!(!text.contains("arm\n"));
        assert!(text.contains(" libblkio-dev\t       [amd64 arm64],\n libnuma-dev,\n"));
        assert!(text.ends_with("\n\nPackage: qemu-system-x86\nDepends: seabios,\n"));
    }

    #[test]
    fn what_is_missing_is_dropped() {
        let text = edit(CONTROL, &OPTIONAL.iter().collect::<Vec<_>>());
        assert!(text.contains("# --enable-blkio\tamd64\n libnuma-dev,\n"));
    }
}
