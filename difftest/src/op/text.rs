// SPDX-License-Identifier: GPL-2.0-or-later

//! The text format of operations
//!
//! A line is a JSON object: the first is the configuration, and each of the others
//! an operation.  Empty lines and those that start with `#` are ignored.

use std::fmt::{self, Display};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use super::{Config, Op};

impl Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

/// What a value, or the variant of an enum, is called in the text format
pub(super) fn name(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    let name = match &value {
        Value::Object(fields) => &fields["op"],
        plain => plain,
    };
    name.as_str().unwrap_or("?").to_owned()
}

/// A configuration and operations, as text
pub fn to_text(cfg: &Config, ops: &[Op]) -> Result<String> {
    let mut text = serde_json::to_string(cfg)? + "\n";
    for op in ops {
        text += &format!("{op}\n");
    }
    Ok(text)
}

/// The opposite of [`to_text`]
pub fn from_text(text: &str) -> Result<(Config, Vec<Op>)> {
    let mut lines = text
        .lines()
        .zip(1..)
        .filter(|(line, _)| !line.trim().is_empty() && !line.starts_with('#'));

    let (first, _) = lines.next().context("no configuration")?;
    let cfg = serde_json::from_str(first).context("not a configuration")?;
    let ops = lines
        .map(|(line, n)| serde_json::from_str(line).with_context(|| format!("line {n}: {line}")))
        .collect::<Result<_>>()?;
    Ok((cfg, ops))
}

/// Numbers that are easier to read in hexadecimal
pub(super) mod hex_number {
    use serde::{de::Error, Deserialize, Deserializer, Serializer};

    // serde wants references.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub fn serialize<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{number:#x}"))
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        let digits = text.strip_prefix("0x").unwrap_or_default();
        u64::from_str_radix(digits, 16).map_err(|_| D::Error::custom(format!("not hex: {text}")))
    }
}

/// Bytes as hexadecimal digits
pub(super) mod hex_bytes {
    use qtest_client::hex;
    use serde::{de::Error, Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hex::encode(bytes))
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}
