// SPDX-License-Identifier: GPL-2.0-or-later

//! Writes the patches

use std::{fs, path::Path};

use anyhow::{ensure, Context, Result};
use xshell::cmd;

use super::{assign, steps};
use crate::{
    env::{remove, Env},
    run::RunQuiet,
    source::{in_worktree, mounted_files, patches_in, Source},
    version::QEMU,
};

/// The name of the cover letter.  It does not end in `.patch`, because `git am`
/// stops at a mail without a patch.
const COVER_LETTER: &str = "0000-cover-letter.txt";

/// Write the series to a directory, which must not contain patches.  Returns
/// how many there are.
///
/// # Errors
///
/// Fails if the series does not apply, or misses files of this checkout.
pub fn export(env: &Env, out: &Path) -> Result<usize> {
    let steps = steps(env)?;
    let files = mounted_files(env)?;
    let new = assign(&steps, &files)?;
    let cover_letter = fs::read_to_string(env.repo.join("patches/cover-letter.txt"))
        .context("cannot read patches/cover-letter.txt")?;
    let existing = if out.exists() {
        patches_in(out)?
    } else {
        Vec::new()
    };
    ensure!(
        existing.is_empty(),
        "{} contains patches already; remove them, or name another directory",
        out.display()
    );

    let source = Source::prepare(env, None)?;
    let dir = env.temp_dir("series")?;
    let scratch = dir.path().join("tree");
    // The directory of the user gets all patches or none.
    let tmp = dir.path().join("patches");
    let sh = source.git()?;
    let edited: Vec<_> = steps
        .iter()
        .map(|step| env.repo.join("patches/qemu").join(&step.patch))
        .collect();
    in_worktree(&sh, &scratch, "pristine", |inner| {
        for (i, patch) in edited.iter().enumerate() {
            cmd!(inner, "git am -q {patch}")
                .run_quiet()
                .with_context(|| format!("{} does not apply", steps[i].patch))?;
            let Some(add) = new.get(&i) else {
                continue;
            };
            for (from, to) in add {
                let dest = scratch.join(to);
                if let Some(parent) = dest.parent() {
                    fs::create_dir_all(parent)?;
                }
                remove(&dest)?;
                cmd!(inner, "cp -P {from} {dest}").run_quiet()?;
            }
            cmd!(inner, "git add -A -f .").run_quiet()?;
            cmd!(inner, "git commit -q --amend --no-edit").run_quiet()?;
        }
        cmd!(
            inner,
            "git format-patch -q --abbrev=7 --no-signature --zero-commit --cover-letter -o {tmp} pristine"
        )
        .run_quiet()
    })?;

    let draft = tmp.join("0000-cover-letter.patch");
    let letter = fill_in(&fs::read_to_string(&draft)?, &cover_letter)?;
    remove(&draft)?;
    let patches = patches_in(&tmp)?;
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    for patch in &patches {
        fs::copy(patch, out.join(patch.file_name().unwrap_or_default()))?;
    }
    fs::write(out.join(COVER_LETTER), letter)?;
    Ok(patches.len())
}

/// Put our text into the cover letter that git has made, and upstream's commit on
/// which the patches are based at its end.
fn fill_in(draft: &str, text: &str) -> Result<String> {
    let (subject, body) = text
        .split_once("\n\n")
        .context("patches/cover-letter.txt needs a subject, an empty line and a text")?;
    let mut letter = draft.to_owned();
    for (placeholder, content) in [
        ("*** SUBJECT HERE ***", subject.trim()),
        ("*** BLURB HERE ***", body.trim()),
    ] {
        ensure!(
            letter.contains(placeholder),
            "the cover letter of git format-patch has no {placeholder}"
        );
        letter = letter.replacen(placeholder, content, 1);
    }
    // git format-patch --base would name the commit of our repository.
    Ok(format!(
        "{}\n\nbase-commit: {}\n",
        letter.trim_end(),
        QEMU.commit
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cover_letter() {
        let draft = "Subject: [PATCH 00/02] *** SUBJECT HERE ***\n\n*** BLURB HERE ***\n\nx (2):\n";
        let letter = fill_in(draft, "subject\n\ntext\n\nmore\n").unwrap();
        assert_eq!(
            letter,
            format!(
                "Subject: [PATCH 00/02] subject\n\ntext\n\nmore\n\nx (2):\n\nbase-commit: {}\n",
                QEMU.commit
            )
        );
        fill_in(draft, "only a subject\n").unwrap_err();
        fill_in("Subject: x\n", "subject\n\ntext\n").unwrap_err();
    }
}
