// SPDX-License-Identifier: GPL-2.0-or-later

use qtest_client::rng::Rng;

use super::*;
use crate::gen::{Generator, Wanted};

#[test]
fn roundtrip() {
    for seed in 0..20 {
        let mut rng = Rng::new(seed);
        let mut gen = Generator::new(&mut rng);
        let cfg = gen.config(&Wanted::default(), seed);
        gen.start(&cfg, u64::MAX >> 20);
        let ops: Vec<_> = (0..500).map(|_| gen.op(false, true)).collect();
        let text = to_text(&cfg, &ops).unwrap();
        assert_eq!(from_text(&format!("# why\n\n{text}")).unwrap(), (cfg, ops));
    }
}

#[test]
fn readable() {
    let segs = vec![
        Seg::Data(vec![0, 0xff]),
        Seg::In {
            addr: u64::MAX,
            len: 4096,
        },
    ];
    let op = Op::Elem {
        q: 3,
        kick: true,
        mode: Mode::BadNext,
        segs,
    };
    assert_eq!(
        op.to_string(),
        r#"{"op":"elem","q":3,"kick":true,"mode":"bad-next","segs":[{"data":"00ff"},{"in":{"addr":"0xffffffffffffffff","len":4096}}]}"#
    );
    assert_eq!(Op::ResetPfn.kind(&Config::default()), "reset-pfn");
    assert_eq!(op.kind(&Config::default()), "element none bad-next in+out");
}

#[test]
fn bad_text() {
    let (config, _) = from_text(r#"{"in_order": true}"#).unwrap();
    assert!(config.in_order && !config.packed);
    for text in [
        "",
        r#"{"op":"reset"}"#,
        r#"{"x":true}"#,
        "{}\nfoo",
        "{}\n{\"op\":\"foo\"}",
        "{}\n{\"op\":\"status\",\"value\":256}",
        "{}\n{\"op\":\"kick\",\"value\":1,\"q\":1}",
        "{}\n{\"op\":\"negotiate\",\"features\":\"10\"}",
        "{}\n{\"op\":\"elem\",\"q\":0,\"kick\":true,\"mode\":\"direct\",\"segs\":[{\"data\":\"0\"}]}",
    ] {
        assert!(from_text(text).is_err(), "{text}");
    }
}
