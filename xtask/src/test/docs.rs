// SPDX-License-Identifier: GPL-2.0-or-later

//! QEMU's manual, which has pages that the series adds or changes

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Result};
use xshell::{cmd, Shell};

use super::results::{Count, PASS};
use crate::{
    apt,
    env::{remove, Env},
    run::RunQuiet,
    source::{Source, BASE},
};

/// What builds it
pub const PACKAGES: &[&str] = &["python3-sphinx", "python3-sphinx-rtd-theme"];

/// Where QEMU has the manual
const MANUAL: &str = "docs";

/// The file that Sphinx makes of a page of the manual; `None` for other files
fn output(html: &Path, file: &str) -> Option<PathBuf> {
    let page = Path::new(file).strip_prefix(MANUAL).ok()?;
    page.extension()
        .is_some_and(|ext| ext == "rst")
        .then(|| html.join(page).with_extension("html"))
}

/// Build the manual of the patched tree, with warnings as errors.
///
/// # Errors
///
/// Fails with the warnings, if there are any.
pub fn docs(env: &Env) -> Result<Count> {
    apt::ensure_packages(env, PACKAGES)?;
    let source = Source::prepare(env, None)?;
    build(
        env,
        &source.git()?,
        &env.cache.join("docs").join(&source.key),
    )
}

/// Build the manual of the tree that the shell is in.
fn build(env: &Env, sh: &Shell, dir: &Path) -> Result<Count> {
    let (html, doctrees) = (dir.join("html"), dir.join("doctrees"));

    let changed = cmd!(
        sh,
        "git diff --name-only --diff-filter=d {BASE} -- {MANUAL}"
    )
    .read_quiet()?;
    let pages: Vec<_> = changed
        .lines()
        .filter_map(|file| output(&html, file))
        .collect();
    ensure!(
        !pages.is_empty(),
        "the series changes no page of the manual"
    );
    // Sphinx looks a page's references up when it writes the page.  The page that
    // one of them leads to may have changed since then.
    for page in &pages {
        remove(page)?;
    }
    let complete = dir.join("complete");
    if !complete.exists() {
        // Sphinx does not repeat its warnings about a page that it has read.
        remove(dir)?;
    }
    remove(&complete)?;
    env.run(
        "building QEMU's manual",
        // as QEMU's build system does, if warnings are errors
        cmd!(
            sh,
            "sphinx-build -q -W --keep-going -Dkerneldoc_werror=1 -b html -d {doctrees}
             {MANUAL} {html}"
        ),
    )?;
    fs::write(&complete, "")?;
    for page in &pages {
        ensure!(page.exists(), "Sphinx has not made {}", page.display());
    }
    println!(
        "Sphinx builds QEMU's manual without warnings, with {} pages of the series",
        pages.len()
    );
    Ok(PASS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_among_files() {
        let output = |file| output(Path::new("/html"), file);
        assert_eq!(
            output("docs/devel/rust.rst"),
            Some("/html/devel/rust.html".into())
        );
        assert_eq!(output("docs/defs.rst.inc"), None);
        assert_eq!(output("rust/a.rst"), None);
    }
}
