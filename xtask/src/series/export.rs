// SPDX-License-Identifier: GPL-2.0-or-later

//! Writes the patches

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use xshell::cmd;

use super::{
    assign,
    envelopes::{choose, envelopes, Envelope},
    steps,
};
use crate::{
    env::{remove, Env},
    run::RunQuiet,
    source::{in_worktree, mounted_files, patches_in, Source},
    version::QEMU,
};

/// The name of the cover letter.  It does not end in `.patch`, because `git am`
/// stops at a mail without a patch.
const COVER_LETTER: &str = "0000-cover-letter.txt";

/// What each cover letter begins with
const PROVENANCE: &str = "provenance";

/// Write envelopes to a directory, which must not have any, and return the patches
/// in order.  Each envelope is a directory with patches and a cover letter.
/// Without names, these are all envelopes; otherwise, these and those that they
/// build on.
///
/// # Errors
///
/// Fails if the series does not apply, or misses files of this checkout, or if
/// there is no such envelope.
pub fn export(env: &Env, out: &Path, names: &[String]) -> Result<Vec<PathBuf>> {
    let steps = steps(env)?;
    let files = mounted_files(env)?;
    let new = assign(&steps, &files)?;
    let all = envelopes(&fs::read_to_string(env.repo.join("patches/series"))?)?;
    let chosen = choose(&all, names)?;
    let text = |name: &str| {
        let path = format!("patches/cover-letters/{name}.txt");
        fs::read_to_string(env.repo.join(&path)).with_context(|| format!("cannot read {path}"))
    };
    let provenance = text(PROVENANCE)?;
    for envelope in &chosen {
        let dir = out.join(&envelope.name);
        ensure!(
            !dir.exists(),
            "{} exists already; remove it, or name another directory",
            dir.display()
        );
    }

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
        for Envelope { name, patches, .. } in &chosen {
            let place = tmp.join(name);
            let [before, last] =
                [patches.start, patches.end].map(|n| format!("HEAD~{}", edited.len() - n));
            cmd!(
                inner,
                "git format-patch -q --abbrev=7 --no-signature --zero-commit --cover-letter
                 -o {place} {before}..{last}"
            )
            .run_quiet()?;
            let draft = place.join("0000-cover-letter.patch");
            let letter = fill_in(&fs::read_to_string(&draft)?, &provenance, &text(name)?)?;
            fs::write(place.join(COVER_LETTER), letter)?;
            remove(&draft)?;
        }
        Ok(())
    })?;

    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let mut written = Vec::new();
    for Envelope { name, .. } in &chosen {
        cmd!(sh, "cp -r {tmp}/{name} {out}").run_quiet()?;
        written.extend(patches_in(&out.join(name))?);
    }
    Ok(written)
}

/// Put our text into the cover letter that git has made, and the release on which
/// the patches are based at its end.
fn fill_in(draft: &str, provenance: &str, text: &str) -> Result<String> {
    let (subject, body) = text
        .split_once("\n\n")
        .context("a cover letter needs a subject, an empty line and a text")?;
    let mut letter = draft.to_owned();
    let body = format!("{}\n\n{}", provenance.trim(), body.trim());
    for (placeholder, content) in [
        ("*** SUBJECT HERE ***", subject.trim()),
        ("*** BLURB HERE ***", &body),
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
        let letter = fill_in(draft, "who\n", "subject\n\ntext\n\nmore\n").unwrap();
        assert_eq!(
            letter,
            format!(
                "Subject: [PATCH 00/02] subject\n\nwho\n\ntext\n\nmore\n\nx (2):\n\nbase-commit: {}\n",
                QEMU.commit
            )
        );
        fill_in(draft, "who", "only a subject\n").unwrap_err();
        fill_in("Subject: x\n", "who", "subject\n\ntext\n").unwrap_err();
    }
}
