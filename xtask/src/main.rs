// SPDX-License-Identifier: GPL-2.0-or-later

//! `cargo xtask`: everything that can be done with this repository

mod apt;
mod bench;
mod build;
mod deb;
mod debian;
mod env;
mod fuzz;
mod guest;
mod hugepages;
mod install;
mod llvm;
mod preflight;
mod profile;
mod run;
mod series;
mod source;
mod test;
mod tools;
mod top;
mod version;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::{
    build::{built_qemu, Build, Device, Target},
    env::Env,
    preflight::Needs,
    source::Source,
    test::Suite,
};

/// virtio-balloon in Rust for QEMU
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    /// Do not show progress
    #[arg(short, long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Args, Clone, Copy)]
struct What {
    /// Implementation of the balloon device
    #[arg(long, value_enum, default_value = "rust")]
    device: Device,
    /// Guest architecture
    #[arg(long, value_enum, default_value = "x86_64")]
    target: Target,
}

#[derive(Subcommand)]
enum Cmd {
    /// Build qemu-system-*, and all that is needed for it
    Build {
        #[command(flatten)]
        what: What,
        /// Source of QEMU: a directory, a tarball, or a git repository
        /// [default: the version that the series is made for, from the
        /// directory `QEMU_SOURCES`, the Debian mirror or upstream's
        /// repository]
        #[arg(long)]
        qemu_src: Option<String>,
    },
    /// Print the path of the qemu-system-* that was built
    Path {
        #[command(flatten)]
        what: What,
        /// Print the path of the patched source tree instead
        #[arg(long, conflicts_with_all = ["device", "target"])]
        source: bool,
    },
    /// Build QEMU with all features that a server has use for, and install it
    Install {
        /// A directory that only this installation is in
        #[arg(long, default_value = install::DEFAULT_PREFIX)]
        prefix: PathBuf,
        /// Guest architecture
        #[arg(long, value_enum, default_value = "x86_64")]
        target: Target,
        /// Options for QEMU's configure, for example --disable-spice
        #[arg(last = true)]
        options: Vec<String>,
    },
    /// Remove what install has installed
    Uninstall {
        /// The directory that it was installed into
        #[arg(long, default_value = install::DEFAULT_PREFIX)]
        prefix: PathBuf,
    },
    /// Build Debian packages that replace qemu-system-x86
    Deb {
        /// Directory for the packages [default: deb in the cache]
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Boot a Linux guest that runs out of memory, without and with
    /// deflate-on-oom
    Demo,
    /// Make a guest with the kernel of a Debian suite, for tests of one's own
    Guest {
        /// For example bookworm, trixie or sid
        #[arg(long, default_value = guest::SUITE)]
        suite: String,
    },
    /// Run the tests
    Test {
        /// What to run [default: all, with the short form of functional]
        #[arg(value_enum)]
        suites: Vec<Suite>,
        #[command(flatten)]
        options: test::Options,
    },
    /// Look for inputs of guests and operators that QEMU does not survive
    Fuzz {
        /// For how long, on all processors
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
        minutes: u64,
        /// Implementation of the balloon device
        #[arg(long, value_enum, default_value = "rust")]
        device: Device,
        /// Write what was found to this repository, for the suite "fuzz"
        #[arg(long)]
        save: bool,
    },
    /// Measure the C device and the Rust device
    Bench {
        /// How often to measure everything
        #[arg(long, default_value_t = 5)]
        reps: usize,
        /// Only cases whose name contains this, for example "memfd", "latency",
        /// "hugetlb" or "guest"
        #[arg(long, default_value = "")]
        only: String,
        /// Write the results, as JSON
        #[arg(long)]
        json: Option<PathBuf>,
        /// Draw a chart, as SVG
        #[arg(long)]
        chart: Option<PathBuf>,
    },
    /// Measure what guests do with deflate-on-oom, with the balloon drivers that
    /// Linux has had
    GuestPolicies(guest::policies::Options),
    /// Export patches for git am, in envelopes that can be used by themselves
    Series {
        /// Envelopes; those that they build on are exported, too [default: all]
        #[arg(conflicts_with = "import")]
        envelopes: Vec<String>,
        /// Directory for the patches
        #[arg(long, required_unless_present = "import")]
        out: Option<PathBuf>,
        /// The other way round: make the commits of the patched source tree the
        /// patches in patches/qemu
        #[arg(long, conflicts_with = "out")]
        import: bool,
    },
}

impl Cmd {
    /// What has to be there before the command starts
    fn needs(&self) -> Result<Option<Needs>> {
        Ok(Some(match self {
            Self::Build { .. } | Self::Fuzz { .. } | Self::Series { .. } => Needs::build(),
            Self::Install {
                prefix, options, ..
            } => install::needs(prefix, options)?,
            Self::Deb { .. } => deb::needs(),
            Self::Demo | Self::Guest { .. } | Self::Bench { .. } | Self::GuestPolicies(_) => {
                Needs::guest()
            }
            Self::Test { suites, .. } => test::needs(suites),
            Self::Path { .. } | Self::Uninstall { .. } => return Ok(None),
        }))
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let env = Env::new(cli.quiet)?;
    if let Some(needs) = cli.command.needs()? {
        needs.check(&env)?;
    }
    match cli.command {
        Cmd::Build { what, qemu_src } => {
            let build = Build::prepare(&env, what.device, what.target, qemu_src.as_deref())?;
            build.build_qemu(&env)?;
            println!("{}", build.qemu().display());
        }
        Cmd::Path { source: true, .. } => println!("{}", Source::existing(&env)?.dir.display()),
        Cmd::Path { what, .. } => {
            println!("{}", built_qemu(&env, what.device, what.target)?.display());
        }
        Cmd::Install {
            prefix,
            target,
            options,
        } => print!("{}", install::install(&env, &prefix, target, &options)?),
        Cmd::Uninstall { prefix } => {
            for file in install::uninstall(&prefix)? {
                env.say(&format!("not ours, and still there: {}", file.display()));
            }
        }
        Cmd::Deb { out } => {
            for package in deb::deb(&env, out.as_deref())? {
                println!("{}", package.display());
            }
        }
        Cmd::Demo => return guest::demo(&env),
        Cmd::Guest { suite } => {
            let assets = guest::provision(&env, &suite)?;
            println!("{}", assets.kernel.display());
            println!("{}", assets.initrd.display());
        }
        Cmd::Test { suites, options } => return test::run(&env, &suites, &options),
        Cmd::Fuzz {
            minutes,
            device,
            save,
        } => fuzz::fuzz(&env, device, minutes, save)?,
        Cmd::Bench {
            reps,
            only,
            json,
            chart,
        } => bench::run(&env, reps, &only, json.as_deref(), chart.as_deref())?,
        Cmd::GuestPolicies(options) => guest::policies::run(&env, &options)?,
        Cmd::Series { out, envelopes, .. } => match out {
            Some(out) => {
                let patches = series::export(&env, &out, &envelopes)?;
                println!(
                    "{} patches: git am {}/*/*.patch",
                    patches.len(),
                    out.display()
                );
            }
            None => println!("{} patches in patches/qemu", series::import(&env)?),
        },
    }
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use clap::CommandFactory;

    use super::*;

    /// The commands in a text: each is a subcommand and its options
    fn commands(text: &str) -> Vec<Vec<&str>> {
        text.split("cargo xtask ")
            .skip(1)
            .map(|rest| {
                let end = rest.find(['`', '\n', '#', ';']).unwrap_or(rest.len());
                rest[..end]
                    .split(|c: char| c.is_whitespace() || "[]|()\"\\".contains(c))
                    .take_while(|word| *word != "--")
                    .filter(|word| !word.is_empty() && *word != "-q")
                    .enumerate()
                    .filter(|(i, word)| *i == 0 || word.starts_with("--"))
                    .map(|(_, word)| word)
                    .collect()
            })
            .collect()
    }

    #[test]
    fn commands_are_found() {
        let text = "`cargo xtask build [--device rust\\|c]`: x\ncargo xtask -q test unit --ops 3  # y --no";
        assert_eq!(
            commands(text),
            [vec!["build", "--device"], vec!["test", "--ops"]]
        );
    }

    /// Whatever README and the other documents tell to run exists.
    #[test]
    fn documented_commands_exist() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let docs = fs::read_dir(root.join("docs")).unwrap();
        let mut files: Vec<_> = docs.map(|entry| entry.unwrap().path()).collect();
        files.extend(
            [
                "README.md",
                "CONTRIBUTING.md",
                ".ci/run",
                ".gitlab-ci.yml",
                ".github/workflows/test.yml",
                "ci/Containerfile",
            ]
            .map(|file| root.join(file)),
        );
        let cli = Cli::command();
        let mut checked = 0;

        for file in files {
            if file.extension().is_some_and(|e| e == "svg") {
                continue;
            }
            let text = fs::read_to_string(&file).unwrap();
            for command in commands(&text) {
                let Some((name, options)) = command.split_first() else {
                    continue;
                };
                if name.starts_with("--") {
                    continue;
                }
                let file = file.display();
                let sub = cli
                    .find_subcommand(name)
                    .unwrap_or_else(|| panic!("{file}: no command {name}"));
                for option in options {
                    assert!(
                        sub.get_arguments()
                            .chain(cli.get_arguments())
                            .any(|arg| arg.get_long() == option.strip_prefix("--")),
                        "{file}: {name} has no {option}"
                    );
                }
                checked += 1;
            }
        }
        assert!(checked > 20, "only {checked} commands");
    }
}
