// SPDX-License-Identifier: GPL-2.0-or-later

//! Operations, and their text format
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

use crate::driver::{F_HINT, F_VERSION_1};

/// With what options QEMU is started
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    pub legacy: bool,
    pub deflate_on_oom: bool,
    pub free_page_hint: bool,
    pub page_poison: bool,
    pub free_page_reporting: bool,
}

impl Config {
    const NAMES: [&'static str; 5] = [
        "legacy",
        "deflate-on-oom",
        "free-page-hint",
        "page-poison",
        "free-page-reporting",
    ];

    fn flags(&self) -> [bool; 5] {
        [
            self.legacy,
            self.deflate_on_oom,
            self.free_page_hint,
            self.page_poison,
            self.free_page_reporting,
        ]
    }

    /// From flags in the order of the fields
    pub fn from_flags(f: [bool; 5]) -> Self {
        Self {
            legacy: f[0],
            deflate_on_oom: f[1],
            free_page_hint: f[2],
            page_poison: f[3],
            free_page_reporting: f[4],
        }
    }

    /// The options for QEMU
    pub fn args(&self) -> Vec<String> {
        let mut device = String::from("virtio-balloon-device,id=balloon");
        for (name, value) in Self::NAMES.iter().zip(self.flags()).skip(1) {
            let value = if value { "on" } else { "off" };
            let _ = write!(device, ",{name}={value}");
        }
        if self.free_page_hint {
            device += ",iothread=io0";
        }
        let machine = ["-machine", "microvm", "-m", "64", "-object"];
        let mut args: Vec<String> = machine.map(String::from).into();
        args.extend(
            [
                "iothread,id=io0",
                "-global",
                "virtio-mmio.ioeventfd=off",
                "-global",
                if self.legacy {
                    "virtio-mmio.force-legacy=true"
                } else {
                    "virtio-mmio.force-legacy=false"
                },
                "-device",
                &device,
            ]
            .map(String::from),
        );
        args
    }
}

impl Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("config")?;
        for (name, value) in Self::NAMES.iter().zip(self.flags()) {
            write!(f, " {name}={}", u8::from(value))?;
        }
        Ok(())
    }
}

/// A part of the buffer of an element
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seg {
    /// Device-readable, with these bytes, at a place of the executor's choice
    Data(Vec<u8>),
    /// Device-readable
    Out { addr: u64, len: u32 },
    /// Device-writable
    In { addr: u64, len: u32 },
}

/// How the descriptors of an element are laid out
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// In the queue
    Direct,
    /// In the queue; data starts two bytes before the end of a page
    Cross,
    /// In an indirect table
    Indirect,
    /// The same, but the size of the table is odd
    IndirectOdd,
    /// The same, but the table is empty
    IndirectEmpty,
    /// The descriptor of the table has the flag for a next one, too
    IndirectNext,
    /// The table refers to another table
    IndirectNested,
    /// The last descriptor refers to the first
    Loop,
    /// The last descriptor refers to one that is not in the table
    BadNext,
    /// The head is not in the table
    BadHead,
    /// The available index is advanced by more than the queue's size
    Jump,
}

impl Mode {
    const ALL: [(&'static str, Self); 11] = [
        ("direct", Self::Direct),
        ("cross", Self::Cross),
        ("indirect", Self::Indirect),
        ("indirect-odd", Self::IndirectOdd),
        ("indirect-empty", Self::IndirectEmpty),
        ("indirect-next", Self::IndirectNext),
        ("indirect-nested", Self::IndirectNested),
        ("loop", Self::Loop),
        ("bad-next", Self::BadNext),
        ("bad-head", Self::BadHead),
        ("jump", Self::Jump),
    ];

    /// Name in the text format
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, mode)| *mode == self)
            .map_or("?", |(name, _)| name)
    }

    /// Those in which something is wrong
    pub fn bad() -> Vec<Self> {
        Self::ALL[3..].iter().map(|(_, mode)| *mode).collect()
    }
}

/// An operation of the driver or of the user
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Reset, negotiate features, set up all queues, and set `DRIVER_OK`
    Init { features: u64, size: u32 },
    /// The driver resets the device
    Reset,
    /// The legacy way to do that
    ResetPfn,
    /// Write the device status
    Status { value: u8 },
    /// Reset, and negotiate features; no more
    Negotiate { features: u64 },
    /// Write 32 of the features
    Features { sel: u32, value: u32 },
    /// Set up a queue
    Queue { q: u32, size: u32 },
    /// Reset, and set up everything, but one queue at the given addresses
    QueueAt {
        q: u32,
        size: u32,
        desc: u64,
        avail: u64,
        used: u64,
    },
    /// Write `QUEUE_READY`
    Ready { q: u32, value: u32 },
    /// Make an element available
    Elem {
        q: u32,
        kick: bool,
        mode: Mode,
        segs: Vec<Seg>,
    },
    /// Notify the device
    Kick { value: u32 },
    /// Write the flags of the available ring
    AvailFlags { q: u32, value: u16 },
    /// Write `used_event`, relative to the available index
    UsedEvent { q: u32, value: u16 },
    /// Write the configuration space
    CfgWrite { off: u64, width: u8, value: u64 },
    /// Read the configuration space
    CfgRead { off: u64, width: u8 },
    /// Read a register of the transport
    RegRead { off: u64, width: u8 },
    /// Acknowledge interrupts
    Ack { value: u32 },
    /// The guest writes to all pages of the window
    Fill,
    /// A QMP command
    Qmp { command: String },
    /// Stop the VM
    Stop,
    /// Continue the VM
    Cont,
    /// Reset the machine
    SystemReset,
    /// Each VM moves to the other's implementation.
    Migrate,
    /// Advance the clock
    Clock { ns: u64 },
    /// Compare all of the memory that is used
    Check,
}

impl Op {
    /// What is counted as a kind of operation
    pub fn kind(&self, cfg: &Config) -> String {
        let queue = |q: u32| match (q, cfg.free_page_hint) {
            (0, _) => "inflate",
            (1, _) => "deflate",
            (2, _) => "stats",
            (3, true) => "hint",
            (3, false) | (4, true) if cfg.free_page_reporting => "report",
            _ => "none",
        };
        match self {
            Self::Elem {
                q,
                kick,
                mode,
                segs,
            } => {
                let kick = if *kick { "" } else { " without kick" };
                let dirs = match (
                    segs.iter().any(|seg| !matches!(seg, Seg::In { .. })),
                    segs.iter().any(|seg| matches!(seg, Seg::In { .. })),
                ) {
                    (true, true) => "in+out",
                    (true, false) => "out",
                    (false, true) => "in",
                    (false, false) => "none",
                };
                format!("element {} {} {dirs}{kick}", queue(*q), mode.name())
            }
            Self::Kick { value } => format!("kick {}", queue(*value)),
            Self::Queue { q, .. } => format!("queue {}", queue(*q)),
            Self::QueueAt { q, .. } => format!("queue-at {}", queue(*q)),
            Self::CfgWrite { width, .. } => format!("cfg-write {}", width * 8),
            Self::CfgRead { width, .. } => format!("cfg-read {}", width * 8),
            Self::Qmp { command } => {
                let value: serde_json::Value = serde_json::from_str(command).unwrap_or_default();
                let args = &value["arguments"];
                let name = value["execute"].as_str().unwrap_or("?");
                let property = args["property"].as_str().unwrap_or("");
                format!("qmp {name} {property}").trim_end().to_owned()
            }
            _ => self
                .to_string()
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
        }
    }

    /// The QMP command that is to be sent
    pub fn qmp_command(&self) -> Option<&str> {
        match self {
            Self::Qmp { command } => Some(command),
            Self::Stop => Some(r#"{"execute":"stop"}"#),
            Self::Cont => Some(r#"{"execute":"cont"}"#),
            Self::SystemReset => Some(r#"{"execute":"system_reset"}"#),
            _ => None,
        }
    }

    /// Whether QMP is used
    pub fn uses_qmp(&self) -> bool {
        self.qmp_command().is_some() || *self == Self::Migrate
    }

    /// Simpler variants, for shrinking
    pub fn simpler(&self) -> Vec<Self> {
        let mut list = Vec::new();
        match self {
            Self::Elem {
                q,
                kick,
                mode,
                segs,
            } => {
                let mut add = |new_mode, new_segs| {
                    list.push(Self::Elem {
                        q: *q,
                        kick: *kick,
                        mode: new_mode,
                        segs: new_segs,
                    });
                };
                for i in (0..segs.len()).filter(|_| segs.len() > 1) {
                    let mut fewer = segs.clone();
                    fewer.remove(i);
                    add(*mode, fewer);
                }
                if *mode != Mode::Direct {
                    add(Mode::Direct, segs.clone());
                }
                for (i, seg) in segs.iter().enumerate() {
                    let Seg::Data(data) = seg else { continue };
                    for range in [data.len() / 8 * 4..data.len(), 0..data.len() / 8 * 4] {
                        let mut shorter = data.clone();
                        shorter.drain(range);
                        if shorter.len() < data.len() {
                            let mut fewer = segs.clone();
                            fewer[i] = Seg::Data(shorter);
                            add(*mode, fewer);
                        }
                    }
                }
            }
            Self::Init { features, size } => {
                const KEEP: u64 = F_HINT | F_VERSION_1;
                list = (0..64)
                    .map(|bit| 1 << bit)
                    .filter(|bit| features & bit != 0 && bit & KEEP == 0)
                    .map(|bit| Self::Init {
                        features: features & !bit,
                        size: *size,
                    })
                    .collect();
            }
            _ => {}
        }
        list
    }
}

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
    let mut flags = [false; 5];
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

#[cfg(test)]
mod tests {
    use qtest_client::rng::Rng;

    use super::*;
    use crate::gen::Generator;

    #[test]
    fn roundtrip() {
        for seed in 0..20 {
            let mut rng = Rng::new(seed);
            let mut gen = Generator::new(&mut rng);
            let cfg = gen.config();
            gen.start(&cfg, u64::MAX >> 20);
            let ops: Vec<_> = (0..500).map(|_| gen.op(false, true)).collect();
            let text = to_text(&cfg, &ops);
            let (cfg2, ops2) = from_text(&format!("# comment\n\n{text}")).unwrap();
            assert_eq!(cfg, cfg2);
            assert_eq!(ops, ops2);
        }
    }

    #[test]
    fn all_modes_and_segments() {
        for (name, mode) in Mode::ALL {
            let op = Op::Elem {
                q: 3,
                kick: true,
                mode,
                segs: vec![
                    Seg::Data(vec![]),
                    Seg::Data(vec![0, 0xff]),
                    Seg::Out {
                        addr: u64::MAX,
                        len: u32::MAX,
                    },
                    Seg::In { addr: 0, len: 1 },
                ],
            };
            assert!(op.to_string().contains(name));
            assert_eq!(op, op.to_string().parse().unwrap());
        }
    }

    #[test]
    fn bad_text() {
        from_text("").unwrap_err();
        from_text("reset").unwrap_err();
        from_text("config x=1").unwrap_err();
        from_text("config\nfoo").unwrap_err();
        from_text("config\nstatus value=256").unwrap_err();
        from_text("config\nelem q=0 kick=1 mode=direct seg=data:0").unwrap_err();
    }
}
