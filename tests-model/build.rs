// SPDX-License-Identifier: GPL-2.0-or-later

//! Makes copies of `virtio_balloon_core` with one mistake each; see
//! `mutations.rs`.

use std::{env, fmt::Write, fs, path::Path};

use anyhow::{ensure, Context, Result};

/// Name, file, what to replace, and by what
type Mutation = (&'static str, &'static str, &'static str, &'static str);

const MUTATIONS: &[Mutation] = include!("mutations.rs");
const CORE: &str = "../hw-virtio-balloon/core/src";
/// What there are mistakes in, and what that depends on
const MODULES: [&str; 6] = [
    "budget",
    "engine",
    "page_work",
    "pages",
    "report_work",
    "runs",
];

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed={CORE}");
    println!("cargo::rerun-if-changed=mutations.rs");

    let out = env::var("OUT_DIR")?;
    let model = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("model.rs");
    let mut modules = String::new();
    let mut list = String::new();
    for (name, file, old, new) in MUTATIONS {
        let dir = Path::new(&out).join(name);
        fs::create_dir_all(&dir)?;
        writeln!(modules, "mod {name} {{ mod balloon {{")?;
        for module in MODULES {
            let source = format!("{module}.rs");
            let mut text = fs::read_to_string(Path::new(CORE).join(&source))?;
            if source == *file {
                ensure!(
                    text.matches(old).count() == 1,
                    "{name}: {file} does not contain this exactly once: {old}"
                );
                text = text.replace(old, new);
            }
            // Without its tests, which are for the crate
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
        Path::new(&out).join("mutants.rs"),
        format!("{modules}\nconst MUTANTS: &[(&str, fn(u32) -> Result<(), String>)] = &[{list}];"),
    )?;
    Ok(())
}
