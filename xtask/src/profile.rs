// SPDX-License-Identifier: GPL-2.0-or-later

//! How much of the device and of its bindings was executed, by llvm-cov

use std::{collections::BTreeMap, path::Path};

use anyhow::{ensure, Result};
use serde::Deserialize;
use xshell::cmd;

use crate::{
    llvm::Llvm,
    run::{shell_in, RunQuiet},
};

/// The environment variable that says where a program writes its profile
pub const PROFILE: &str = "LLVM_PROFILE_FILE";

/// The environment variable for a program that is to write none
pub const NO_PROFILE: (&str, &str) = (PROFILE, "/dev/null");

/// Directories in QEMU's tree that are measured, and where they are in this
/// repository
const MEASURED: [(&str, &str); 2] = [
    ("rust/hw/virtio/balloon/", "hw-virtio-balloon/"),
    ("rust/virtio/", "rust/virtio/"),
];

/// What llvm-cov exports
#[derive(Deserialize)]
struct Export {
    data: Vec<Data>,
}

#[derive(Deserialize)]
struct Data {
    files: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    filename: String,
    summary: Figures,
}

/// How much of a file is executed
#[derive(Clone, Copy, Default, Deserialize)]
pub struct Figures {
    pub lines: Ratio,
    pub branches: Ratio,
}

#[derive(Clone, Copy, Default, Deserialize)]
pub struct Ratio {
    pub count: u64,
    covered: u64,
}

impl Figures {
    /// How much of the lines and of the branches was executed, in per cent
    pub fn percent(self) -> [f64; 2] {
        [self.lines, self.branches].map(Ratio::percent)
    }
}

impl Ratio {
    pub fn percent(self) -> f64 {
        if self.count == 0 {
            return 100.0;
        }
        100.0 * self.covered as f64 / self.count as f64
    }

    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.covered += other.covered;
    }
}

/// Figures by file, and of everything
pub type Table = BTreeMap<String, Figures>;

/// The name of the row with the sum
pub const TOTAL: &str = "all";

/// The figures of the files that are measured, and their sum.
fn table(export: Export) -> Table {
    let mut table = Table::new();
    let mut total = Figures::default();
    for file in export.data.into_iter().flat_map(|data| data.files) {
        let name = MEASURED.iter().find_map(|(dir, ours)| {
            let (_, rest) = file.filename.split_once(dir)?;
            Some(format!("{ours}{rest}"))
        });
        if let Some(name) = name {
            total.lines.add(file.summary.lines);
            total.branches.add(file.summary.branches);
            // If the paths of two programs differ, the same file is there twice.
            let old = table.insert(name.clone(), file.summary);
            assert!(old.is_none(), "{name} is there twice");
        }
    }
    table.insert(TOTAL.to_owned(), total);
    table
}

/// The figures of what has written profiles, with the extension `profraw`, to a
/// directory.
///
/// # Errors
///
/// Fails if there are none, or if they are not those of the programs.
pub fn figures(llvm: &Llvm, dir: &Path, programs: &[String]) -> Result<Table> {
    let sh = shell_in(dir)?;
    let mut raw = sh.read_dir(dir)?;
    raw.retain(|path| path.extension().is_some_and(|e| e == "profraw"));
    let (profdata, cov) = (llvm.program("llvm-profdata"), llvm.program("llvm-cov"));
    cmd!(sh, "{profdata} merge -sparse {raw...} -o all.profdata").read_quiet()?;
    let objects = programs.iter().flat_map(|program| ["-object", program]);
    let export = cmd!(
        sh,
        "{cov} export -summary-only -instr-profile all.profdata {objects...}"
    )
    .read_quiet()?;
    let table = table(serde_json::from_str(&export)?);
    ensure!(
        table.len() > 20,
        "llvm-cov has exported {} files",
        table.len()
    );
    Ok(table)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    const EXPORT: &str = r#"{ "data": [ { "files": [
        { "filename": "/x/rust/hw/virtio/balloon/src/a.rs",
          "summary": { "lines": { "count": 200, "covered": 150 },
                       "branches": { "count": 0, "covered": 0 } } },
        { "filename": "../rust/virtio/src/b.rs",
          "summary": { "lines": { "count": 200, "covered": 50 },
                       "branches": { "count": 4, "covered": 1 } } },
        { "filename": "/x/rust/qom/src/c.rs",
          "summary": { "lines": { "count": 9, "covered": 9 },
                       "branches": { "count": 9, "covered": 9 } } } ] } ] }"#;

    pub fn example() -> Table {
        table(serde_json::from_str(EXPORT).unwrap())
    }

    #[test]
    fn sums() {
        let table = example();
        assert_eq!(table.len(), 3);
        assert_eq!(table["rust/virtio/src/b.rs"].lines.percent(), 25.0);
        assert_eq!(table[TOTAL].lines.percent(), 50.0);
        assert_eq!(Ratio::default().percent(), 100.0);
    }
}
