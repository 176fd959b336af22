// SPDX-License-Identifier: GPL-2.0-or-later

//! Delta debugging: find a short sequence that still fails

/// Remove what is not necessary for `fails` to return true, trying at most
/// `budget` sequences.
///
/// `simpler` lists simpler variants of an item, best first.
pub fn shrink<T: Clone>(
    items: Vec<T>,
    simpler: impl Fn(&T) -> Vec<T>,
    mut fails: impl FnMut(&[T]) -> bool,
    budget: usize,
) -> Vec<T> {
    let mut left = budget;
    let mut check = |candidate: &[T]| -> bool {
        left > 0 && {
            left -= 1;
            fails(candidate)
        }
    };

    let mut best = items;
    let mut chunk = best.len() / 2;
    loop {
        chunk = chunk.max(1);
        // Backwards, because later items depend on earlier ones.
        let mut end = best.len();
        let mut removed = false;
        while end > 0 {
            let start = end.saturating_sub(chunk);
            let candidate = [&best[..start], &best[end..]].concat();
            if check(&candidate) {
                best = candidate;
                removed = true;
            }
            end = start;
        }
        if chunk > 1 {
            chunk /= 2;
        } else if !removed {
            break;
        }
    }

    let mut i = 0;
    while i < best.len() {
        let found = simpler(&best[i]).into_iter().find_map(|item| {
            let mut candidate = best.clone();
            candidate[i] = item;
            check(&candidate).then_some(candidate)
        });
        match found {
            Some(candidate) => best = candidate,
            None => i += 1,
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_everything_else() {
        let mut tries = 0;
        let result = shrink(
            (0..500).collect(),
            |_| Vec::new(),
            |items| {
                tries += 1;
                items.contains(&17) && items.contains(&333)
            },
            1000,
        );
        assert_eq!(result, [17, 333]);
        assert!(tries < 200);
    }

    #[test]
    fn simplifies_items() {
        let result = shrink(
            vec![1, 80, 9, 60],
            |&n| if n > 0 { vec![n / 2, n - 1] } else { vec![] },
            |items| items.iter().sum::<i32>() >= 50,
            1000,
        );
        assert_eq!(result, [50]);
    }

    #[test]
    fn respects_order_and_budget() {
        let mut tries = 0;
        let result = shrink(
            (0..100).collect::<Vec<i32>>(),
            |_| Vec::new(),
            |items| {
                tries += 1;
                items.iter().filter(|n| *n % 10 == 0).count() == 10
            },
            40,
        );
        assert_eq!(tries, 40);
        assert!(result.windows(2).all(|w| w[0] < w[1]));
    }
}
