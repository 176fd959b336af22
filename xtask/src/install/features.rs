// SPDX-License-Identifier: GPL-2.0-or-later

//! The features of QEMU that `cargo xtask install` asks for
//!
//! They are those of `debian/control` in Debian's package of the same version,
//! without what needs a desktop.  What is not listed is as QEMU's configure
//! decides.

use std::path::Path;

/// An option of configure, and what it needs
struct Feature {
    /// The name of the option, without `--enable-`
    option: &'static str,
    /// Whether it is asked for unless the user says otherwise
    default: bool,
    /// What configure calls it if it does not find it; empty if it is never
    /// missing
    library: &'static str,
    /// Debian's packages
    packages: &'static [&'static str],
}

const fn feature(
    option: &'static str,
    library: &'static str,
    packages: &'static [&'static str],
) -> Feature {
    Feature {
        option,
        default: true,
        library,
        packages,
    }
}

/// A feature that needs no library
const fn plain(option: &'static str) -> Feature {
    feature(option, "", &[])
}

/// A feature of Debian's package that a server has no use for
const fn optional(
    option: &'static str,
    library: &'static str,
    packages: &'static [&'static str],
) -> Feature {
    Feature {
        default: false,
        ..feature(option, library, packages)
    }
}

const FEATURES: &[Feature] = &[
    // Guests
    plain("kvm"),
    plain("tpm"),
    plain("attr"),
    feature("capstone", "capstone", &["libcapstone-dev"]),
    feature("numa", "numa", &["libnuma-dev"]),
    feature("libpmem", "libpmem", &["libpmem-dev"]),
    feature("seccomp", "libseccomp", &["libseccomp-dev"]),
    plain("virtfs"),
    feature("cap-ng", "cap-ng", &["libcap-ng-dev"]),
    feature("libudev", "libudev", &["libudev-dev"]),
    feature("libusb", "libusb-1.0", &["libusb-1.0-0-dev"]),
    feature(
        "usb-redir",
        "libusbredirparser-0.5",
        &["libusbredirparser-dev"],
    ),
    feature("smartcard", "libcacard", &["libcacard-dev"]),
    // vhost, also for virtiofs
    plain("vhost-kernel"),
    plain("vhost-net"),
    plain("vhost-user"),
    plain("vhost-user-blk-server"),
    plain("vhost-vdpa"),
    plain("vhost-crypto"),
    // Networks and migration
    feature("slirp", "slirp", &["libslirp-dev"]),
    feature("vde", "vdeplug", &["libvdeplug-dev"]),
    feature("bpf", "libbpf", &["libbpf-dev"]),
    feature("gnutls", "gnutls", &["libgnutls28-dev"]),
    feature("nettle", "nettle", &["nettle-dev"]),
    feature("zstd", "libzstd", &["libzstd-dev"]),
    feature(
        "rdma",
        "rdmacm",
        &["librdmacm-dev", "libibverbs-dev", "libibumad-dev"],
    ),
    // Disks
    feature("linux-aio", "aio", &["libaio-dev"]),
    feature("linux-io-uring", "liburing", &["liburing-dev"]),
    feature("curl", "libcurl", &["libcurl4-gnutls-dev"]),
    feature("fuse", "fuse3", &["libfuse3-dev"]),
    feature("libiscsi", "libiscsi", &["libiscsi-dev"]),
    feature("libnfs", "libnfs", &["libnfs-dev"]),
    feature("libssh", "libssh", &["libssh-dev"]),
    feature("rbd", "rbd", &["librbd-dev"]),
    // Displays
    plain("vnc"),
    feature("vnc-jpeg", "libjpeg", &["libjpeg-dev"]),
    feature("vnc-sasl", "sasl2", &["libsasl2-dev"]),
    feature("pixman", "pixman-1", &["libpixman-1-dev"]),
    feature("png", "libpng", &["libpng-dev"]),
    feature("curses", "curses", &["libncurses-dev"]),
    feature("spice", "spice-server", &["libspice-server-dev"]),
    feature(
        "opengl",
        "epoxy",
        &["libepoxy-dev", "libgbm-dev", "libdrm-dev"],
    ),
    feature("virglrenderer", "virglrenderer", &["libvirglrenderer-dev"]),
    feature("dbus-display", "gio-2.0", &["libglib2.0-dev"]),
    feature("alsa", "alsa", &["libasound2-dev"]),
    // Desktops
    optional("gtk", "gtk+-3.0", &["libgtk-3-dev"]),
    optional("vte", "vte-2.91", &["libvte-2.91-dev"]),
    optional("sdl", "sdl2", &["libsdl2-dev"]),
    optional("brlapi", "brlapi", &["libbrlapi-dev"]),
    optional("jack", "jack", &["libjack-dev"]),
    optional("pa", "libpulse", &["libpulse-dev"]),
    optional("pipewire", "libpipewire-0.3", &["libpipewire-0.3-dev"]),
    // Not in Debian 12
    optional("blkio", "blkio", &["libblkio-dev"]),
];

/// Options of configure that are no features
const OPTIONS: &[&str] = &[
    // As Debian: libraries for displays and remote disks are loaded when they
    // are used.
    "--enable-modules",
    "--enable-tools",
    "--disable-user",
    "--disable-xen",
    "--disable-containers",
    "--disable-gettext",
    "--disable-xkbcommon",
    "--disable-debug-info",
    "--enable-strip",
    // /etc/qemu/bridge.conf is an administrator's.
    "--sysconfdir=/etc",
    "--localstatedir=/var",
];

impl Feature {
    /// Whether it is asked for, given the options of the user, of which the
    /// last one counts
    fn wanted(&self, options: &[String]) -> bool {
        options
            .iter()
            .rev()
            .find_map(|option| {
                if option.strip_prefix("--enable-") == Some(self.option) {
                    Some(true)
                } else if option.strip_prefix("--disable-") == Some(self.option) {
                    Some(false)
                } else {
                    None
                }
            })
            .unwrap_or(self.default)
    }
}

/// The options of configure, which end with those of the user
pub fn configure_options(prefix: &Path, options: &[String]) -> Vec<String> {
    let switches = FEATURES.iter().map(|feature| {
        let switch = if feature.wanted(options) {
            "enable"
        } else {
            "disable"
        };
        format!("--{switch}-{}", feature.option)
    });
    [format!("--prefix={}", prefix.display())]
        .into_iter()
        .chain(OPTIONS.iter().map(ToString::to_string))
        .chain(switches)
        .chain(options.iter().cloned())
        .collect()
}

/// Debian's packages that the features need
pub fn packages(options: &[String]) -> Vec<&'static str> {
    FEATURES
        .iter()
        .filter(|feature| feature.wanted(options))
        .flat_map(|feature| feature.packages)
        .copied()
        .collect()
}

/// What to do if configure says that it has not found something
pub fn advice(error: &str) -> Option<String> {
    let feature = FEATURES.iter().find(|feature| {
        let library = feature.library;
        !library.is_empty()
            && [
                format!("Dependency \"{library}\" not found"),
                format!("Dependency '{library}' is required"),
                format!("Dependency lookup for {library} "),
                format!("library '{library}' not found"),
                format!("library \"{library}\" not found"),
            ]
            .iter()
            .any(|message| error.contains(message))
    })?;
    let option = feature.option;
    Some(format!(
        "--enable-{option} needs {}, which is in Debian's package {}; install it, or add \
         `-- --disable-{option}`",
        feature.library,
        feature.packages.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_user_has_the_last_word() {
        let args = |user: &str| configure_options(Path::new("/opt/x"), &options(user));
        assert_eq!(args("")[0], "--prefix=/opt/x");
        assert!(args("").contains(&"--enable-spice".to_owned()));
        assert!(args("").contains(&"--disable-gtk".to_owned()));
        let other = args("--disable-spice --enable-gtk --cpu=x");
        assert!(!other.contains(&"--enable-spice".to_owned()));
        assert!(!other.contains(&"--disable-gtk".to_owned()));
        assert_eq!(other.last().unwrap(), "--cpu=x");
    }

    #[test]
    fn packages_of_what_is_wanted() {
        assert!(packages(&[]).contains(&"libslirp-dev"));
        assert!(!packages(&[]).contains(&"libgtk-3-dev"));
        let other = packages(&options("--disable-slirp --enable-gtk"));
        assert!(!other.contains(&"libslirp-dev"));
        assert!(other.contains(&"libgtk-3-dev"));
        let twice = packages(&options("--disable-slirp --enable-slirp"));
        assert!(twice.contains(&"libslirp-dev"));
    }

    #[test]
    fn missing_libraries_are_named() {
        let meson =
            "../meson.build:1281:10: ERROR: Dependency \"slirp\" not found, tried pkgconfig";
        assert!(advice(meson).unwrap().contains("libslirp-dev"));
        let library = "meson.build:1: ERROR: C shared or static library 'aio' not found";
        assert!(advice(library).unwrap().contains("libaio-dev"));
        assert_eq!(advice("ERROR: something else"), None);
        assert_eq!(advice("Dependency \"\" not found"), None);
    }
}
