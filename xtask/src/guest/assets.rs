// SPDX-License-Identifier: GPL-2.0-or-later

//! A small Linux guest: Debian's kernel for virtual machines, and an initramfs
//! with busybox and the drivers for the balloon

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use walkdir::WalkDir;
use xshell::{cmd, Shell};

use crate::{
    apt,
    env::{replace_dir, sha256_of, Env},
    run::{shell_in, RunQuiet},
    version::KERNELS,
};

/// The suite whose kernel the demo uses
pub const SUITE: &str = KERNELS[0].0;

/// What the guest needs to find the balloon and a disk; modules that they depend
/// on are added
const MODULES: &[&str] = &["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_balloon"];

const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
for module in /modules/*.ko; do
    insmod $module
done
# Memory that is in the balloon is not there for the heuristics of overcommit,
# which would fail allocations before the guest runs out of memory
echo 1 > /proc/sys/vm/overcommit_memory
export PS1='guest# '
echo Guest is ready
# For guests that nobody types anything into: RUN=\"commands\" on the kernel's
# command line
eval \"$RUN\"
exec setsid cttyhack sh
";

/// A guest that can be booted
pub struct Assets {
    /// The kernel image
    pub kernel: PathBuf,
    /// The initramfs
    pub initrd: PathBuf,
    /// The version of the kernel
    pub release: String,
}

impl Assets {
    /// What is, or will be, in a directory
    fn in_dir(dir: &Path, release: String) -> Self {
        Self {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.gz"),
            release,
        }
    }

    /// Write an initramfs that has other modules than this one, named as they
    /// are in it, and more programs.
    ///
    /// # Errors
    ///
    /// Fails if this one does not have the modules.
    pub fn with_files(
        &self,
        modules: &[(&str, &Path)],
        programs: &[(&str, &Path)],
        out: &Path,
    ) -> Result<()> {
        let tmp = tempfile::tempdir()?;
        let sh = shell_in(tmp.path())?;
        let initrd = &self.initrd;
        let list = cmd!(sh, "sh -c 'gzip -dc \"$0\" | cpio -t --quiet' {initrd}").read_quiet()?;
        for sub in ["bin", "modules"] {
            sh.create_dir(sub)?;
        }
        for (module, file) in modules {
            let dest = list
                .lines()
                .find(|path| path.ends_with(&format!("-{module}.ko")))
                .with_context(|| format!("the guest has no module {module}"))?;
            sh.copy_file(file, dest)?;
        }
        for (program, file) in programs {
            sh.copy_file(file, Path::new("bin").join(program))?;
        }
        // The kernel unpacks one archive after the other.
        fs::copy(initrd, out)?;
        pack(&sh, out)
    }
}

/// Append an archive of the current directory to an initramfs.
fn pack(sh: &Shell, initrd: &Path) -> Result<()> {
    cmd!(
        sh,
        "sh -c 'find . | cpio -o -H newc --quiet -R 0:0 | gzip -1 >> \"$0\"' {initrd}"
    )
    .run_quiet()
}

/// Where the guest with the kernel of a Debian suite is
fn guest_dir(env: &Env, suite: &str) -> PathBuf {
    let hash = sha256_of(&[INIT.as_bytes(), MODULES.join(" ").as_bytes()]);
    env.cache
        .join("guest")
        .join(format!("{suite}-amd64-{}", &hash[..12]))
}

/// Get the kernel of a Debian suite, and make an initramfs for it, unless that
/// was done before.
///
/// # Errors
///
/// Fails if the kernel cannot be downloaded, or has no balloon driver.
pub fn provision(env: &Env, suite: &str) -> Result<Assets> {
    let dir = guest_dir(env, suite);
    match fs::read_to_string(dir.join("release")) {
        Ok(release) => Ok(Assets::in_dir(&dir, release)),
        Err(_) => renew(env, suite),
    }
}

/// Whether the guest of the demo is there.
pub fn is_provisioned(env: &Env) -> bool {
    guest_dir(env, SUITE).join("release").exists()
}

/// Get the kernel that a Debian suite has now.
///
/// # Errors
///
/// Fails if the kernel cannot be downloaded, or has no balloon driver.
pub fn renew(env: &Env, suite: &str) -> Result<Assets> {
    let dir = guest_dir(env, suite);
    apt::ensure_packages(env, apt::GUEST_PACKAGES)?;
    let tmp = env.temp_dir("guest")?;
    let (root, initramfs) = (tmp.path().join("root"), tmp.path().join("initramfs"));
    let guest = tmp.path().join("guest");
    fs::create_dir(&root)?;
    fs::create_dir(&guest)?;

    let sh = Shell::new()?;
    let repo = apt::Suite::new(env, suite, "amd64")?;
    for package in kernel_packages(&repo)? {
        let deb = repo.download(env, &package)?;
        cmd!(sh, "dpkg-deb -x {deb} {root}").run_quiet()?;
    }
    let (kernel, release) = WalkDir::new(&root)
        .into_iter()
        .filter_map(std::result::Result::ok)
        .find_map(|entry| Some((entry.path().to_owned(), release_of(entry.path())?)))
        .context("the kernel package contains no vmlinuz")?;
    env.say(&format!("making an initramfs for Linux {release}"));
    fs::copy(&kernel, guest.join("vmlinuz"))?;

    // Debian's newer packages have everything below /usr
    let base = if root.join("lib/modules").exists() {
        root
    } else {
        root.join("usr")
    };
    cmd!(sh, "/sbin/depmod -b {base} {release}").run_quiet()?;
    let order = load_order(&sh, &base, &release)?;

    for sub in ["bin", "modules"] {
        fs::create_dir_all(initramfs.join(sub))?;
    }
    fs::copy("/bin/busybox", initramfs.join("bin/busybox"))?;
    for (i, module) in order.iter().enumerate() {
        let file = module.file_name().unwrap_or_default().to_string_lossy();
        let name = file.strip_suffix(".xz").unwrap_or(&file);
        let dest = initramfs.join(format!("modules/{i:02}-{name}"));
        if name == file {
            fs::copy(module, dest)?;
        } else {
            fs::write(dest, cmd!(sh, "xz -dc {module}").output_quiet()?)?;
        }
    }
    let init = initramfs.join("init");
    fs::write(&init, INIT)?;
    cmd!(sh, "chmod 755 {init}").run_quiet()?;
    sh.change_dir(&initramfs);
    pack(&sh, &guest.join("initrd.gz"))?;

    fs::write(guest.join("release"), &release)?;
    replace_dir(&guest, &dir)?;
    Ok(Assets::in_dir(&dir, release))
}

/// The release of a kernel image: `boot/vmlinuz-RELEASE`, or (since Debian 14)
/// `usr/lib/modules/RELEASE/vmlinuz`
fn release_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    if name == "vmlinuz" {
        let dir = path.parent()?.file_name()?.to_str()?;
        return Some(dir.to_owned());
    }
    name.strip_prefix("vmlinuz-").map(str::to_owned)
}

/// The packages with the current kernel and its modules.  Up to trixie they are
/// in one package; after that, the image depends on one for each of them.
fn kernel_packages(repo: &apt::Suite) -> Result<Vec<String>> {
    let image = repo
        .depends("linux-image-cloud-amd64")?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .context("linux-image-cloud-amd64 does not depend on a kernel")?;
    let parts: Vec<_> = repo
        .depends(&image)?
        .into_iter()
        .filter(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"))
        .collect();
    Ok(if parts.is_empty() { vec![image] } else { parts })
}

/// The files of [`MODULES`] and of those that they depend on, in the order in which
/// they have to be loaded
fn load_order(sh: &Shell, base: &Path, release: &str) -> Result<Vec<PathBuf>> {
    // Not as this system is configured to load modules.  It fails if there is no
    // module for a transport, which another kernel than Debian's can do without.
    let list = cmd!(
        sh,
        "/sbin/modprobe -C /dev/null -d {base} -S {release} -a --show-depends {MODULES...}"
    )
    .quiet()
    .ignore_status()
    .ignore_stderr()
    .read()?;
    let has_balloon = |line: &str| {
        line.ends_with("builtin virtio_balloon") || line.contains("/virtio_balloon.ko")
    };
    ensure!(
        list.lines().any(has_balloon),
        "the kernel has no module virtio_balloon"
    );
    Ok(files_to_load(&list))
}

/// The files in what modprobe prints, each once: `insmod FILE`, or `builtin NAME`
fn files_to_load(list: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in list.lines() {
        let file = line
            .strip_prefix("insmod ")
            .map(str::trim)
            .map(PathBuf::from);
        files.extend(file.filter(|file| !files.contains(file)));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_images() {
        let release = |path: &str| release_of(Path::new(path));
        assert_eq!(
            release("a/boot/vmlinuz-6.1.0-1").as_deref(),
            Some("6.1.0-1")
        );
        assert_eq!(
            release("usr/lib/modules/7.2.1/vmlinuz").as_deref(),
            Some("7.2.1")
        );
        assert_eq!(release("boot/config-6.1.0-1"), None);
        assert_eq!(release("lib/modules/6.1.0-1/modules.dep"), None);
    }

    #[test]
    fn each_module_is_loaded_once() {
        let list = "insmod /a/virtio.ko \ninsmod /a/virtio_pci.ko \nbuiltin virtio_blk\n\
                    insmod /a/virtio.ko \ninsmod /a/virtio_balloon.ko.xz \n";
        assert_eq!(
            files_to_load(list),
            [
                "/a/virtio.ko",
                "/a/virtio_pci.ko",
                "/a/virtio_balloon.ko.xz"
            ]
            .map(PathBuf::from)
        );
    }
}
