// SPDX-License-Identifier: GPL-2.0-or-later

//! Operations

mod config;
mod shrink;
#[cfg(test)]
mod tests;
mod text;

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use self::text::{hex_bytes, hex_number, name};
pub use self::{
    config::Config,
    text::{from_text, to_text},
};

/// A part of the buffer of an element
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seg {
    /// Device-readable, with these bytes, at a place of the executor's choice
    Data(#[serde(with = "hex_bytes")] Vec<u8>),
    /// Device-readable
    Out {
        #[serde(with = "hex_number")]
        addr: u64,
        len: u32,
    },
    /// Device-writable
    In {
        #[serde(with = "hex_number")]
        addr: u64,
        len: u32,
    },
}

/// How the descriptors of an element are laid out
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
    /// Those in which something is wrong
    pub const BAD: [Self; 8] = [
        Self::IndirectOdd,
        Self::IndirectEmpty,
        Self::IndirectNext,
        Self::IndirectNested,
        Self::Loop,
        Self::BadNext,
        Self::BadHead,
        Self::Jump,
    ];
}

/// An operation of the driver or of the user
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Op {
    /// Reset, negotiate features, set up all queues, and set `DRIVER_OK`
    Init {
        #[serde(with = "hex_number")]
        features: u64,
        size: u32,
    },
    /// The driver resets the device
    Reset,
    /// The legacy way to do that
    ResetPfn,
    /// Write the device status
    Status { value: u8 },
    /// Reset, and negotiate features; no more
    Negotiate {
        #[serde(with = "hex_number")]
        features: u64,
    },
    /// Write 32 of the features
    Features { sel: u32, value: u32 },
    /// Set up a queue
    Queue { q: u32, size: u32 },
    /// Reset, and set up everything, but one queue at the given addresses
    QueueAt {
        q: u32,
        size: u32,
        #[serde(with = "hex_number")]
        desc: u64,
        #[serde(with = "hex_number")]
        avail: u64,
        #[serde(with = "hex_number")]
        used: u64,
    },
    /// Reset a queue, and set it up again, unless the size is 0
    QueueReset { q: u32, size: u32 },
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
    CfgWrite {
        off: u64,
        width: u8,
        #[serde(with = "hex_number")]
        value: u64,
    },
    /// Read the configuration space
    CfgRead { off: u64, width: u8 },
    /// Read a register of the transport
    RegRead { off: u64, width: u8 },
    /// Acknowledge interrupts
    Ack { value: u32 },
    /// The guest writes to all pages of the window
    Fill,
    /// A QMP command
    Qmp { command: Value },
    /// Stop the VM
    Stop,
    /// Continue the VM
    Cont,
    /// Reset the machine
    SystemReset,
    /// Each VM moves to the other's implementation; it is stopped for that.
    Migrate,
    /// The same, but if it runs, it does not stop before the end.
    MigrateLive,
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
                format!("element {} {} {dirs}{kick}", queue(*q), name(mode))
            }
            Self::Kick { value } => format!("kick {}", queue(*value)),
            Self::Queue { q, .. } => format!("queue {}", queue(*q)),
            Self::QueueAt { q, .. } => format!("queue-at {}", queue(*q)),
            Self::QueueReset { q, .. } => format!("queue-reset {}", queue(*q)),
            Self::CfgWrite { width, .. } => format!("cfg-write {}", width * 8),
            Self::CfgRead { width, .. } => format!("cfg-read {}", width * 8),
            Self::Qmp { command } => {
                let execute = command["execute"].as_str().unwrap_or("?");
                let property = command["arguments"]["property"].as_str().unwrap_or("");
                format!("qmp {execute} {property}").trim_end().to_owned()
            }
            _ => name(self),
        }
    }

    /// The QMP command that is to be sent
    pub fn qmp_command(&self) -> Option<Value> {
        match self {
            Self::Qmp { command } => Some(command.clone()),
            Self::Stop => Some(json!({"execute": "stop"})),
            Self::Cont => Some(json!({"execute": "cont"})),
            Self::SystemReset => Some(json!({"execute": "system_reset"})),
            _ => None,
        }
    }

    /// Whether QMP is used
    pub fn uses_qmp(&self) -> bool {
        self.qmp_command().is_some() || matches!(self, Self::Migrate | Self::MigrateLive)
    }
}
