// SPDX-License-Identifier: GPL-2.0-or-later

//! Makes copies of `virtio_balloon_core` with one mistake each; see
//! `mutations.rs`.

use std::{env, fmt::Write, fs, path::Path};

use anyhow::{ensure, Context, Result};

/// Name, file, text to replace, and its replacement
type Mutation = (&'static str, &'static str, &'static str, &'static str);

const CORE: &str = "../hw-virtio-balloon/core/src";

/// A set of copies of some modules of the crate
struct Copies {
    /// Name of the generated file, which includes them
    name: &'static str,
    mutations: &'static [Mutation],
    /// The modules with mistakes, and the modules that they depend on
    modules: &'static [&'static str],
    /// The file with the test: it has a function `find_mistake(u32)`
    model: &'static str,
    /// Replacements in all copies: file, text, replacement
    replacements: &'static [(&'static str, &'static str, &'static str)],
}

const COPIES: [Copies; 2] = [
    Copies {
        name: "mutants",
        mutations: include!("mutations.rs"),
        modules: &["budget", "engine", "pages", "reports", "runs", "spec"],
        model: "model.rs",
        replacements: &[],
    },
    Copies {
        name: "hint_mutants",
        mutations: include!("hint_mutations.rs"),
        modules: &["hint_exchange", "hinting"],
        model: "hint_model.rs",
        // loom has to know when a lock is taken.
        replacements: &[(
            "hint_exchange.rs",
            "sync::{Condvar, Mutex, MutexGuard, PoisonError},\n};",
            "sync::PoisonError,\n};\nuse loom::sync::{Condvar, Mutex, MutexGuard};",
        )],
    },
];

fn replace_once(text: &str, file: &str, old: &str, new: &str) -> Result<String> {
    ensure!(
        text.matches(old).count() == 1,
        "{file} does not contain this exactly once: {old}"
    );
    Ok(text.replace(old, new))
}

fn make_copies(copies: &Copies, out: &Path) -> Result<()> {
    let model = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join(copies.model);
    let mut modules = String::new();
    let mut list = String::new();
    for (name, file, old, new) in copies.mutations {
        let dir = out.join(name);
        fs::create_dir_all(&dir)?;
        writeln!(modules, "mod {name} {{ mod balloon {{")?;
        for module in copies.modules {
            let source = format!("{module}.rs");
            let mut text = fs::read_to_string(Path::new(CORE).join(&source))?;
            if source == *file {
                text = replace_once(&text, file, old, new).context(*name)?;
            }
            for (_, std, loom) in copies.replacements.iter().filter(|r| r.0 == source) {
                text = replace_once(&text, &source, std, loom)?;
            }
            // Leave out the unit tests, which are for the original
            let end = text.find("#[cfg(test)]").unwrap_or(text.len());
            let path = dir.join(&source);
            fs::write(&path, text[..end].replace("crate::", "super::"))
                .with_context(|| path.display().to_string())?;
            writeln!(modules, "#[path = {path:?}] pub mod {module};")?;
        }
        writeln!(modules, "}} include!({model:?}); }}")?;
        writeln!(list, "({name:?}, {name}::find_mistake),")?;
    }
    fs::write(
        out.join(copies.name).with_extension("rs"),
        format!("{modules}\nconst MUTANTS: &[(&str, fn(u32) -> Result<(), String>)] = &[{list}];"),
    )?;
    Ok(())
}

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed={CORE}");
    println!("cargo::rerun-if-changed=mutations.rs");
    println!("cargo::rerun-if-changed=hint_mutations.rs");

    let out = env::var("OUT_DIR")?;
    COPIES
        .iter()
        .try_for_each(|copies| make_copies(copies, Path::new(&out)))
}
