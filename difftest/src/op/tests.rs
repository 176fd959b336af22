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
