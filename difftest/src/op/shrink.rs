// SPDX-License-Identifier: GPL-2.0-or-later

//! Simpler variants of an operation

use super::{Mode, Op, Seg};
use crate::driver::{F_HINT, F_VERSION_1};

impl Op {
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
