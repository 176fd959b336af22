// SPDX-License-Identifier: GPL-2.0-or-later

//! The text format of operations
//!
//! A line is the name of the operation, and `key=value` pairs.  The argument of
//! `qmp` is the rest of the line.  Empty lines and those that start with `#`
//! are ignored.

use std::{
    fmt::{self, Display, Write},
    str::FromStr,
};

use anyhow::{anyhow, bail, ensure, Context, Error, Result};
use qtest_client::hex;

use super::{Config, Mode, Op, Seg};

fn number(s: &str) -> Result<u64> {
    match s.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => s.parse(),
    }
    .with_context(|| format!("bad number: {s}"))
}

impl Display for Seg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(data) => write!(f, "data:{}", hex::encode(data)),
            Self::Out { addr, len } => write!(f, "out:{addr:#x}+{len}"),
            Self::In { addr, len } => write!(f, "in:{addr:#x}+{len}"),
        }
    }
}

impl FromStr for Seg {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let (typ, rest) = s.split_once(':').context("bad segment")?;
        if typ == "data" {
            return Ok(Self::Data(hex::decode(rest)?));
        }
        let (addr, len) = rest.split_once('+').context("bad segment")?;
        let (addr, len) = (number(addr)?, number(len)?.try_into()?);
        match typ {
            "out" => Ok(Self::Out { addr, len }),
            "in" => Ok(Self::In { addr, len }),
            _ => bail!("bad segment: {s}"),
        }
    }
}

impl Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Init { features, size } => write!(f, "init features={features:#x} size={size}"),
            Self::Reset => f.write_str("reset"),
            Self::ResetPfn => f.write_str("reset-pfn"),
            Self::Status { value } => write!(f, "status value={value:#x}"),
            Self::Negotiate { features } => write!(f, "negotiate features={features:#x}"),
            Self::Features { sel, value } => write!(f, "features sel={sel} value={value:#x}"),
            Self::Queue { q, size } => write!(f, "queue q={q} size={size}"),
            Self::QueueAt {
                q,
                size,
                desc,
                avail,
                used,
            } => write!(
                f,
                "queue-at q={q} size={size} desc={desc:#x} avail={avail:#x} used={used:#x}"
            ),
            Self::Ready { q, value } => write!(f, "ready q={q} value={value}"),
            Self::Elem {
                q,
                kick,
                mode,
                segs,
            } => {
                let kick = u8::from(*kick);
                write!(f, "elem q={q} kick={kick} mode={}", mode.name())?;
                segs.iter().try_for_each(|seg| write!(f, " seg={seg}"))
            }
            Self::Kick { value } => write!(f, "kick value={value:#x}"),
            Self::AvailFlags { q, value } => write!(f, "avail-flags q={q} value={value}"),
            Self::UsedEvent { q, value } => write!(f, "used-event q={q} value={value}"),
            Self::CfgWrite { off, width, value } => {
                write!(f, "cfg-write off={off} width={width} value={value:#x}")
            }
            Self::CfgRead { off, width } => write!(f, "cfg-read off={off} width={width}"),
            Self::RegRead { off, width } => write!(f, "reg-read off={off:#x} width={width}"),
            Self::Ack { value } => write!(f, "ack value={value}"),
            Self::Fill => f.write_str("fill"),
            Self::Qmp { command } => write!(f, "qmp {command}"),
            Self::Stop => f.write_str("stop"),
            Self::Cont => f.write_str("cont"),
            Self::SystemReset => f.write_str("system-reset"),
            Self::Migrate => f.write_str("migrate"),
            Self::MigrateLive => f.write_str("migrate-live"),
            Self::QueueReset { q, size } => write!(f, "queue-reset q={q} size={size}"),
            Self::Clock { ns } => write!(f, "clock ns={ns}"),
            Self::Check => f.write_str("check"),
        }
    }
}

impl FromStr for Op {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let (name, rest) = s.split_once(' ').unwrap_or((s, ""));
        if name == "qmp" {
            return Ok(Self::Qmp {
                command: rest.to_owned(),
            });
        }
        let pairs = rest
            .split_whitespace()
            .map(|pair| pair.split_once('=').context("not key=value"))
            .collect::<Result<Vec<_>>>()?;
        let text = |key: &str| {
            pairs
                .iter()
                .find(|(k, _)| *k == key)
                .map(|(_, v)| *v)
                .ok_or_else(|| anyhow!("no {key}"))
        };
        let num = |key: &str| number(text(key)?);
        let num32 = |key: &str| -> Result<u32> { Ok(num(key)?.try_into()?) };
        let num16 = |key: &str| -> Result<u16> { Ok(num(key)?.try_into()?) };
        let num8 = |key: &str| -> Result<u8> { Ok(num(key)?.try_into()?) };
        let q = || num32("q");

        Ok(match name {
            "init" => Self::Init {
                features: num("features")?,
                size: num32("size")?,
            },
            "reset" => Self::Reset,
            "reset-pfn" => Self::ResetPfn,
            "status" => Self::Status {
                value: num8("value")?,
            },
            "negotiate" => Self::Negotiate {
                features: num("features")?,
            },
            "features" => Self::Features {
                sel: num32("sel")?,
                value: num32("value")?,
            },
            "queue" => Self::Queue {
                q: q()?,
                size: num32("size")?,
            },
            "queue-at" => Self::QueueAt {
                q: q()?,
                size: num32("size")?,
                desc: num("desc")?,
                avail: num("avail")?,
                used: num("used")?,
            },
            "ready" => Self::Ready {
                q: q()?,
                value: num32("value")?,
            },
            "elem" => Self::Elem {
                q: q()?,
                kick: num("kick")? != 0,
                mode: {
                    let mode = text("mode")?;
                    Mode::ALL
                        .iter()
                        .find(|(n, _)| *n == mode)
                        .map(|(_, mode)| *mode)
                        .with_context(|| format!("no mode {mode}"))?
                },
                segs: pairs
                    .iter()
                    .filter(|(k, _)| *k == "seg")
                    .map(|(_, v)| v.parse())
                    .collect::<Result<_>>()?,
            },
            "kick" => Self::Kick {
                value: num32("value")?,
            },
            "avail-flags" => Self::AvailFlags {
                q: q()?,
                value: num16("value")?,
            },
            "used-event" => Self::UsedEvent {
                q: q()?,
                value: num16("value")?,
            },
            "cfg-write" => Self::CfgWrite {
                off: num("off")?,
                width: num8("width")?,
                value: num("value")?,
            },
            "cfg-read" => Self::CfgRead {
                off: num("off")?,
                width: num8("width")?,
            },
            "reg-read" => Self::RegRead {
                off: num("off")?,
                width: num8("width")?,
            },
            "ack" => Self::Ack {
                value: num32("value")?,
            },
            "fill" => Self::Fill,
            "stop" => Self::Stop,
            "cont" => Self::Cont,
            "system-reset" => Self::SystemReset,
            "migrate" => Self::Migrate,
            "migrate-live" => Self::MigrateLive,
            "queue-reset" => Self::QueueReset {
                q: q()?,
                size: num32("size")?,
            },
            "clock" => Self::Clock { ns: num("ns")? },
            "check" => Self::Check,
            _ => bail!("no operation {name}"),
        })
    }
}

/// A configuration and operations, as text
pub fn to_text(cfg: &Config, ops: &[Op]) -> String {
    ops.iter().fold(format!("{cfg}\n"), |mut s, op| {
        let _ = writeln!(s, "{op}");
        s
    })
}

/// The opposite of [`to_text`]
pub fn from_text(text: &str) -> Result<(Config, Vec<Op>)> {
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));

    let (_, first) = lines.next().context("no configuration")?;
    let mut words = first.split_whitespace();
    ensure!(words.next() == Some("config"), "not a configuration");
    let mut flags = [false; Config::NAMES.len()];
    for word in words {
        let (name, value) = word.split_once('=').context("not name=value")?;
        let i = Config::NAMES
            .iter()
            .position(|n| *n == name)
            .with_context(|| format!("no option {name}"))?;
        flags[i] = value == "1";
    }
    let ops = lines
        .map(|(n, line)| line.parse().with_context(|| format!("line {n}: {line}")))
        .collect::<Result<_>>()?;
    Ok((Config::from_flags(flags), ops))
}
