// SPDX-License-Identifier: GPL-2.0-or-later

//! The directory that QEMU is installed into, and the list of what is in it

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};
use nix::unistd::{access, AccessFlags};
use walkdir::WalkDir;
use xshell::{cmd, Shell};

use crate::{env::remove, run::RunQuiet};

/// Below the prefix: the files that were installed, one per line
const MANIFEST: &str = "share/qemu-virtio-balloon-rs/files";

/// A directory that has an installation, or will have one
#[derive(Debug)]
pub struct Prefix {
    /// The directory
    pub dir: PathBuf,
    parent: PathBuf,
}

impl Prefix {
    /// # Errors
    ///
    /// Fails if the path cannot be one.
    pub fn new(dir: &Path) -> Result<Self> {
        let dir = std::path::absolute(dir)?;
        let text = dir.display().to_string();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._+-".contains(c);
        ensure!(
            text.chars().all(is_plain) && !dir.components().any(|c| c == Component::ParentDir),
            "--prefix {text}: QEMU's build only takes paths of letters, digits and ._+-"
        );
        let parent = dir.parent().context("--prefix cannot be /")?.to_owned();
        Ok(Self { dir, parent })
    }

    /// A directory beside this one, on the same disk
    fn beside(&self, suffix: &str) -> PathBuf {
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy();
        self.parent.join(format!(".{name}.{suffix}"))
    }

    /// What the directory is below another root
    pub fn below(&self, root: &Path) -> PathBuf {
        root.join(self.dir.strip_prefix("/").unwrap_or(&self.dir))
    }

    /// Why QEMU cannot be installed here, as far as that is known before it is
    /// built
    ///
    /// # Errors
    ///
    /// Fails if a directory cannot be looked at.
    pub fn problems(&self) -> Result<Vec<String>> {
        let mut problems: Vec<_> = self.foreign()?.into_iter().collect();
        let existing: Vec<_> = self.parent.ancestors().filter(|dir| dir.exists()).collect();
        for dir in &existing {
            let mode = fs::metadata(dir)?.permissions().mode();
            if mode & 0o001 == 0 {
                problems.push(format!(
                    "libvirt runs guests as libvirt-qemu, which could not get into {} (mode \
                     {:o}): choose another --prefix, or chmod o+x {0}",
                    dir.display(),
                    mode & 0o7777
                ));
            }
        }
        if let Some(dir) = existing.first() {
            if access(*dir, AccessFlags::W_OK).is_err() {
                problems.push(format!(
                    "you cannot write to {}: run this as root, or choose another --prefix",
                    dir.display()
                ));
            }
        }
        Ok(problems)
    }

    /// Why the directory is not ours to be replaced, if it is not
    fn foreign(&self) -> Result<Option<String>> {
        if !self.dir.exists() || is_empty(&self.dir)? {
            return Ok(None);
        }
        let Some(files) = self.manifest()? else {
            return Ok(Some(format!(
                "{} exists, and was not made by cargo xtask install",
                self.dir.display()
            )));
        };
        let foreign = files_in(&self.dir)?
            .into_iter()
            .find(|path| !files.contains(path));
        Ok(foreign.map(|path| {
            format!(
                "{}, which was not installed, would be lost",
                self.dir.join(path).display()
            )
        }))
    }

    /// The files that were installed; `None` if there is no installation
    fn manifest(&self) -> Result<Option<BTreeSet<PathBuf>>> {
        let path = self.dir.join(MANIFEST);
        if !path.exists() {
            return Ok(None);
        }
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let files = parse(&text).with_context(|| format!("{} is damaged", path.display()))?;
        Ok(Some(files))
    }

    /// Put a new installation here, in place of the old one.  `fill` gets an empty
    /// directory beside the prefix, and returns which part of it is the tree.
    ///
    /// # Errors
    ///
    /// Fails if `fill` does or the tree cannot be moved; then nothing has changed.
    pub fn replace(&self, fill: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<()> {
        create_for_all(&self.parent)?;
        let (staging, old) = (self.beside("new"), self.beside("old"));
        // left by one that was killed
        remove(&staging)?;
        remove(&old)?;
        let result = (|| {
            fs::create_dir(&staging)?;
            let tree = fill(&staging)?;
            write_manifest(&tree)?;
            let sh = Shell::new()?;
            // whatever the umask is
            cmd!(sh, "chmod -R a+rX,go-w {tree}").run_quiet()?;
            if self.dir.exists() {
                fs::rename(&self.dir, &old)?;
            }
            fs::rename(&tree, &self.dir).inspect_err(|_| {
                // The error that is returned is why there is none now.
                let _ = fs::rename(&old, &self.dir);
            })?;
            remove(&old)
        })();
        remove(&staging)?;
        result.with_context(|| format!("cannot install into {}", self.dir.display()))
    }

    /// Remove what was installed, and directories that are empty then.  Returns
    /// the other files, which are still there.
    ///
    /// # Errors
    ///
    /// Fails if there is no installation, or a file cannot be removed.
    pub fn remove(&self) -> Result<Vec<PathBuf>> {
        let Some(files) = self.manifest()? else {
            bail!(
                "{}: cargo xtask install has not installed anything here",
                self.dir.display()
            );
        };
        let cannot = |path: &Path| format!("cannot remove {}", path.display());
        // The list is the last file to go, so that this can be repeated.
        let (list, others): (Vec<_>, _) = files.iter().partition(|path| path.ends_with(MANIFEST));
        for path in others.into_iter().chain(list) {
            let path = self.dir.join(path);
            remove(&path).with_context(|| cannot(&path))?;
        }
        let dirs: BTreeSet<_> = files
            .iter()
            .flat_map(|path| path.ancestors().skip(1))
            .map(|dir| self.dir.join(dir))
            .collect();
        // A directory comes before what is in it.
        for dir in dirs.iter().rev() {
            if is_empty(dir)? {
                fs::remove_dir(dir).with_context(|| cannot(dir))?;
            }
        }
        remove(&self.beside("new"))?;
        remove(&self.beside("old"))?;
        if self.dir.exists() {
            files_in(&self.dir)
        } else {
            Ok(Vec::new())
        }
    }
}

fn is_empty(dir: &Path) -> Result<bool> {
    Ok(fs::read_dir(dir)?.next().is_none())
}

/// The files below a directory, relative to it
fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in WalkDir::new(dir).sort_by_file_name() {
        let entry = entry?;
        if !entry.file_type().is_dir() {
            files.push(entry.path().strip_prefix(dir)?.to_owned());
        }
    }
    Ok(files)
}

/// Create a directory that everybody can enter.
fn create_for_all(dir: &Path) -> Result<()> {
    if let (false, Some(parent)) = (dir.exists(), dir.parent()) {
        create_for_all(parent)?;
        fs::create_dir(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Write down which files a tree has, this list among them.
fn write_manifest(tree: &Path) -> Result<()> {
    let list = tree.join(MANIFEST);
    if let Some(dir) = list.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&list, "")?;
    let lines: Vec<_> = files_in(tree)?
        .iter()
        .map(|path| format!("{}\n", path.display()))
        .collect();
    Ok(fs::write(&list, lines.concat())?)
}

/// Read the list.  Whoever follows it removes files, so that it must not lead out
/// of the directory.
fn parse(text: &str) -> Result<BTreeSet<PathBuf>> {
    let files: BTreeSet<_> = text.lines().map(PathBuf::from).collect();
    for path in &files {
        let is_below = path.components().all(|c| matches!(c, Component::Normal(_)));
        ensure!(
            is_below && path.components().next().is_some(),
            "{path:?} is not below the prefix"
        );
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Install something that consists of a program.
    fn install(prefix: &Prefix, content: &str) -> Result<()> {
        prefix.replace(|staging| {
            let bin = prefix.below(staging).join("bin");
            fs::create_dir_all(&bin)?;
            fs::write(bin.join("qemu"), content)?;
            Ok(prefix.below(staging))
        })
    }

    fn reasons(prefix: &Prefix) -> String {
        prefix.problems().unwrap().join("; ")
    }

    /// A prefix in a directory that everybody can enter
    fn prefix_in(tmp: &Path) -> Prefix {
        fs::set_permissions(tmp, fs::Permissions::from_mode(0o755)).unwrap();
        Prefix::new(&tmp.join("a/qemu")).unwrap()
    }

    #[test]
    fn installed_and_removed() {
        let tmp = tempfile::tempdir().unwrap();
        let prefix = prefix_in(tmp.path());
        let program = prefix.dir.join("bin/qemu");
        assert_eq!(reasons(&prefix), "");
        install(&prefix, "1").unwrap();
        assert_eq!(reasons(&prefix), "");
        install(&prefix, "2").unwrap();
        assert_eq!(fs::read_to_string(&program).unwrap(), "2");
        assert_eq!(fs::read_dir(tmp.path().join("a")).unwrap().count(), 1);

        let note = prefix.dir.join("bin/note");
        fs::write(&note, "").unwrap();
        assert!(reasons(&prefix).contains("bin/note"));
        assert_eq!(prefix.remove().unwrap(), [PathBuf::from("bin/note")]);
        assert!(note.exists() && !program.exists());
        fs::remove_file(note).unwrap();
        prefix.remove().unwrap_err();
    }

    #[test]
    fn nothing_is_left() {
        let tmp = tempfile::tempdir().unwrap();
        let prefix = prefix_in(tmp.path());
        install(&prefix, "1").unwrap();
        assert!(prefix.remove().unwrap().is_empty());
        assert!(!prefix.dir.exists());
    }

    #[test]
    fn failures_change_nothing() {
        let tmp = tempfile::tempdir().unwrap();
        let prefix = prefix_in(tmp.path());
        install(&prefix, "1").unwrap();
        prefix.replace(|_| bail!("no")).unwrap_err();
        let program = prefix.dir.join("bin/qemu");
        assert_eq!(fs::read_to_string(program).unwrap(), "1");
        assert_eq!(fs::read_dir(tmp.path().join("a")).unwrap().count(), 1);
    }

    #[test]
    fn directories_of_others() {
        let tmp = tempfile::tempdir().unwrap();
        let prefix = prefix_in(tmp.path());
        fs::create_dir_all(&prefix.dir).unwrap();
        assert_eq!(reasons(&prefix), "");
        fs::write(prefix.dir.join("x"), "").unwrap();
        assert!(reasons(&prefix).contains("not made by"));
        prefix.remove().unwrap_err();

        fs::set_permissions(tmp.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let text = reasons(&prefix);
        assert!(
            text.contains("(mode 700)") && text.contains("not made by"),
            "{text}"
        );
    }

    #[test]
    fn paths() {
        Prefix::new(Path::new("/")).unwrap_err();
        Prefix::new(Path::new("/a b")).unwrap_err();
        Prefix::new(Path::new("/opt/../x")).unwrap_err();
        let prefix = Prefix::new(Path::new("/opt/x/")).unwrap();
        assert_eq!(prefix.below(Path::new("/tmp")), Path::new("/tmp/opt/x"));
        assert_eq!(prefix.beside("new"), Path::new("/opt/.x.new"));
    }

    #[test]
    fn lists_stay_below_the_prefix() {
        assert_eq!(parse("a\nb/c\n").unwrap().len(), 2);
        for bad in ["/etc/passwd\n", "../x\n", "a\n\n", "a/../../b"] {
            parse(bad).unwrap_err();
        }
    }
}
