// SPDX-License-Identifier: GPL-2.0-or-later

//! Parts of the series that can be applied, built and tested by themselves
//!
//! In `patches/series`, an envelope begins with a line that has its name in
//! brackets, and the names of the envelopes that it builds on:
//!
//! ```text
//! [05-vectored-discards] 04-balloon-tests
//! 0030-system-physmem-let-the-discard-functions-return-erro.patch
//! ```

use std::{collections::BTreeSet, ops::Range};

use anyhow::{ensure, Context, Result};

/// Patches that follow each other in the series
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub name: String,
    /// Indices of the envelopes that it builds on, of which it names some; these
    /// are before it
    pub bases: BTreeSet<usize>,
    /// Indices of its patches
    pub patches: Range<usize>,
}

/// The name and the bases in a line that begins an envelope
pub fn heading(line: &str) -> Option<(&str, impl Iterator<Item = &str>)> {
    let (name, bases) = line.strip_prefix('[')?.split_once(']')?;
    Some((name, bases.split_whitespace()))
}

/// Find the envelopes in `patches/series`.
///
/// # Errors
///
/// Fails if a patch is in no envelope, an envelope is empty, or its bases are not
/// before it.
pub fn envelopes(text: &str) -> Result<Vec<Envelope>> {
    let mut all: Vec<Envelope> = Vec::new();
    let mut patch = 0;
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or("").trim();
        if let Some((name, named)) = heading(line) {
            let mut bases = BTreeSet::new();
            for base in named {
                let index = all
                    .iter()
                    .position(|envelope| envelope.name == base)
                    .with_context(|| format!("patches/series: {name} is not behind {base}"))?;
                bases.insert(index);
                bases.extend(&all[index].bases);
            }
            all.push(Envelope {
                name: name.to_owned(),
                bases,
                patches: patch..patch,
            });
        } else if !line.is_empty() {
            let last = all
                .last_mut()
                .with_context(|| format!("patches/series: {line} is in no envelope"))?;
            patch += 1;
            last.patches.end = patch;
        }
    }
    for Envelope { name, patches, .. } in &all {
        ensure!(!patches.is_empty(), "patches/series: {name} is empty");
    }
    Ok(all)
}

/// The envelopes with these names, and those that they build on; all if there are
/// no names.
///
/// # Errors
///
/// Fails if there is no such envelope.
pub fn choose<'a>(all: &'a [Envelope], names: &[String]) -> Result<Vec<&'a Envelope>> {
    let mut chosen = BTreeSet::new();
    for name in names {
        let (index, envelope) = all
            .iter()
            .enumerate()
            .find(|(_, envelope)| envelope.name == *name)
            .with_context(|| {
                let existing: Vec<_> = all.iter().map(|e| e.name.as_str()).collect();
                format!(
                    "there is no envelope {name}; there are {}",
                    existing.join(", ")
                )
            })?;
        chosen.insert(index);
        chosen.extend(&envelope.bases);
    }
    Ok(all
        .iter()
        .enumerate()
        .filter(|(index, _)| names.is_empty() || chosen.contains(index))
        .map(|(_, envelope)| envelope)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "# why\n[1-a]\n1.patch\n2.patch x # y\n\n[2-b]\n3.patch\n[3-c] 1-a\n4.patch\n\
                        [4-d] 3-c # z\n5.patch\n";

    #[test]
    fn envelopes_and_their_bases() {
        let all = envelopes(TEXT).unwrap();
        let names: Vec<_> = all.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["1-a", "2-b", "3-c", "4-d"]);
        let ranges: Vec<_> = all.iter().map(|e| e.patches.clone()).collect();
        assert_eq!(ranges, [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(all[3].bases, BTreeSet::from([0, 2]));
    }

    #[test]
    fn chosen_envelopes_come_with_their_bases() {
        let all = envelopes(TEXT).unwrap();
        let choose = |names: &[&str]| -> Result<Vec<String>> {
            let names: Vec<_> = names.iter().map(ToString::to_string).collect();
            let chosen = choose(&all, &names)?;
            Ok(chosen.iter().map(|e| e.name.clone()).collect())
        };
        assert_eq!(choose(&[]).unwrap().len(), 4);
        assert_eq!(choose(&["4-d"]).unwrap(), ["1-a", "3-c", "4-d"]);
        assert_eq!(choose(&["4-d", "2-b"]).unwrap().len(), 4);
        let error = choose(&["5-e"]).unwrap_err().to_string();
        assert!(error.ends_with("there are 1-a, 2-b, 3-c, 4-d"), "{error}");
    }

    #[test]
    fn mistakes() {
        for (text, expected) in [
            ("1.patch\n", "1.patch is in no envelope"),
            ("[1-a]\n[2-b]\n1.patch\n", "1-a is empty"),
            (
                "[1-a] 2-b\n1.patch\n[2-b]\n2.patch\n",
                "1-a is not behind 2-b",
            ),
        ] {
            let error = envelopes(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
