//! Correlations of scores with ratings.

use crate::{Error, Result};

/// Pearson's linear correlation (PLCC), in [-1, 1].
///
/// # Errors
/// If the lengths differ, there are fewer than two values, one is not finite, or one side is constant.
pub fn pearson(a: &[f64], b: &[f64]) -> Result<f64> {
    check(a, b)?;
    let n = a.len() as f64;
    let (ma, mb) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (dx, dy) = (x - ma, y - mb);
        ab += dx * dy;
        aa += dx * dx;
        bb += dy * dy;
    }
    if aa == 0.0 || bb == 0.0 {
        return Err(Error::Parameter {
            name: "spread of the scores",
            expected: "above 0 on both sides (a constant has no correlation)",
            found: "0".into(),
        });
    }
    Ok((ab / aa.sqrt() / bb.sqrt()).clamp(-1.0, 1.0))
}

/// Spearman's rank correlation (SRCC): Pearson's on ranks, ties share the mean of their ranks. In [-1, 1].
///
/// # Errors
/// As [`pearson`].
pub fn spearman(a: &[f64], b: &[f64]) -> Result<f64> {
    check(a, b)?;
    pearson(&ranks(a), &ranks(b))
}

/// SRCC within each prompt, averaged over the prompts (paper 5.1), and how many prompts took part.
///
/// `prompts[i]` is any label of the prompt of item `i`. Prompts with fewer than two items, or with a constant side,
/// have no rank correlation and are left out.
///
/// # Errors
/// If the lengths differ, a value is not finite, or no prompt is left.
pub fn per_prompt_spearman(prompts: &[usize], a: &[f64], b: &[f64]) -> Result<(f64, usize)> {
    if prompts.len() != a.len() {
        return Err(Error::Dimension { what: "scores", expected: prompts.len(), found: a.len() });
    }
    check(a, b)?;
    let mut groups: std::collections::BTreeMap<usize, (Vec<f64>, Vec<f64>)> = Default::default();
    for ((p, x), y) in prompts.iter().zip(a).zip(b) {
        let group = groups.entry(*p).or_default();
        group.0.push(*x);
        group.1.push(*y);
    }
    let varies = |x: &[f64]| x.iter().any(|v| *v != x[0]);
    let mut values = Vec::new();
    for (x, y) in groups.values() {
        if varies(x) && varies(y) {
            values.push(spearman(x, y)?);
        }
    }
    if values.is_empty() {
        return Err(Error::TooFew {
            what: "prompts with at least two different scores",
            expected: 1,
            found: 0,
        });
    }
    Ok((values.iter().sum::<f64>() / values.len() as f64, values.len()))
}

/// Ranks from 1; equal values share the mean of their ranks.
pub fn ranks(x: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&i, &j| x[i].partial_cmp(&x[j]).unwrap_or(std::cmp::Ordering::Equal));
    let mut ranks = vec![0.0; x.len()];
    let mut start = 0;
    while start < order.len() {
        let mut end = start;
        while end < order.len() && x[order[end]] == x[order[start]] {
            end += 1;
        }
        let end = end.max(start + 1); // a NaN equals nothing, not even itself
        for &i in &order[start..end] {
            ranks[i] = (start + end + 1) as f64 / 2.0;
        }
        start = end;
    }
    ranks
}

fn check(a: &[f64], b: &[f64]) -> Result<()> {
    if a.len() != b.len() {
        return Err(Error::Dimension { what: "second list of scores", expected: a.len(), found: b.len() });
    }
    if a.len() < 2 {
        return Err(Error::TooFew { what: "scores for a correlation", expected: 2, found: a.len() });
    }
    for side in [a, b] {
        if let Some(row) = side.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite { what: "scores", row, column: 0, value: side[row] });
        }
    }
    Ok(())
}
