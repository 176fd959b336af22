// SPDX-License-Identifier: GPL-2.0-or-later

//! Bytes as hexadecimal digits, as in the commands of the qtest protocol

use std::fmt::Write;

use anyhow::{ensure, Context, Result};

/// Encode each byte as two digits.
pub fn encode(data: &[u8]) -> String {
    let mut text = String::with_capacity(2 * data.len());
    for byte in data {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Decode the output of [`encode`].
///
/// # Errors
///
/// Fails if the text is not a sequence of pairs of digits.
pub fn decode(text: &str) -> Result<Vec<u8>> {
    ensure!(text.len() % 2 == 0 && text.is_ascii(), "odd hex: {text}");
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).context("bad hex"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roundtrip() {
        let data: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&data)).unwrap(), data);
        assert_eq!(encode(&[0, 0xa5]), "00a5");
    }

    #[test]
    fn not_hex() {
        for bad in ["0", "0x", "é", "g0"] {
            decode(bad).unwrap_err();
        }
        assert!(decode("").unwrap().is_empty());
    }
}
