// SPDX-License-Identifier: GPL-2.0-or-later

//! The version of QEMU that the series is for, and the guests that it is tested
//! with
//!
//! Nothing else in xtask is specific to a version.  For another one, edit this
//! table, and port the patches.  `requirements.txt` follows `pythondeps.toml` in
//! QEMU's tree, and `patches/debian-source/overlays` follows
//! `subprojects/*.wrap`.

/// A file of Debian's source package
#[derive(Clone, Copy, Debug)]
pub struct PinnedFile {
    /// Where it is below the mirror
    pub path: &'static str,
    /// Its SHA-256
    pub sha256: &'static str,
}

/// What is known of a version of QEMU
#[derive(Clone, Copy, Debug)]
pub struct Version {
    /// As in the file `VERSION`
    pub number: &'static str,
    /// The series of stable releases that it is part of; the patches apply to
    /// all of these
    pub stable: &'static str,
    /// Upstream's tag
    pub tag: &'static str,
    /// The commit that the tag names, whose hash covers the content of all files
    pub commit: &'static str,
    /// The tarball of Debian's source package
    pub tarball: PinnedFile,
    /// Debian's packaging
    pub packaging: PinnedFile,
    /// Upstream's repository
    pub repository: &'static str,
    /// The subprojects in the tarball that upstream keeps in other repositories
    pub subprojects: &'static [&'static str],
}

/// The version of QEMU that the series is for
pub const QEMU: Version = Version {
    number: "11.1.1",
    stable: "11.1",
    tag: "v11.1.1",
    commit: "c3d48b7d1e89604920e5b81b91140c2ad39a1943",
    tarball: PinnedFile {
        path: "pool/main/q/qemu/qemu_11.1.1+ds.orig.tar.xz",
        sha256: "0b1376e75dbe3e2fea4e408f8669f88a723f419f36a5b7d74cc6a4cfe07e4f5e",
    },
    packaging: PinnedFile {
        path: "pool/main/q/qemu/qemu_11.1.1+ds-1.debian.tar.xz",
        sha256: "870a1193f28ce522ac91f68100d75dce5527e08d8958344b389c9fa24b44968f",
    },
    repository: "https://gitlab.com/qemu-project/qemu.git",
    subprojects: &[
        "berkeley-softfloat-3",
        "berkeley-testfloat-3",
        "keycodemapdb",
        "libvfio-user",
    ],
};

impl PinnedFile {
    /// The name of the file
    pub fn name(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

impl Version {
    /// Whether the series is meant for a tree with this in its file `VERSION`
    pub fn is_supported(&self, version: &str) -> bool {
        version
            .trim()
            .strip_prefix(self.stable)
            .is_some_and(|rest| rest.starts_with('.'))
    }
}

/// Debian's suites with the kernels for guests, from the oldest to the newest.
/// The number is missing where it changes: the kernel is named by the version
/// that is found.
pub const KERNELS: &[(&str, Option<&str>)] = &[
    ("bookworm", Some("6.1")),
    ("trixie", Some("6.12")),
    ("sid", None),
];

/// Debian's suite with the newest versions
pub const DEVELOPMENT: &str = KERNELS[KERNELS.len() - 1].0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_consistent() {
        let v = &QEMU;
        assert!(v.is_supported(v.number));
        assert_eq!(v.tag, format!("v{}", v.number));
        assert_eq!(
            v.tarball.name(),
            format!("qemu_{}+ds.orig.tar.xz", v.number)
        );
        let packaging = format!("qemu_{}+ds-", v.number);
        assert!(v.packaging.name().starts_with(&packaging));
        assert_eq!(v.commit.len(), 40);
        for hash in [v.tarball.sha256, v.packaging.sha256] {
            assert_eq!(hash.len(), 64, "{hash}");
        }
    }

    #[test]
    fn versions() {
        let is_supported = |version| QEMU.is_supported(version);
        assert!(is_supported("11.1.1\n"));
        assert!(is_supported("11.1.0"));
        assert!(is_supported("11.1.50"));
        assert!(!is_supported("11.1"));
        assert!(!is_supported("11.10.1"));
        assert!(!is_supported("11.0.3\n"));
        assert!(!is_supported("10.2.2\n"));
        assert!(!is_supported(""));
    }
}
