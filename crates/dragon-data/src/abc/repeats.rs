//! Bars as written to bars as played: repeats, endings, upbeats.

use super::{Bar, Note};

/// Longest tune kept, in bars after repeats; hostile repeats cannot grow it further.
const MAX_BARS: usize = 1000;

/// A bar as written, with its repeat marks.
#[derive(Debug, Clone, Default)]
pub(super) struct Written {
    pub bar: Bar,
    /// `|:` before it.
    pub starts_repeat: bool,
    /// `:|` after it.
    pub ends_repeat: bool,
    /// First bar of this ending (`[1`, `|2`).
    pub ending: Option<u8>,
    /// A double bar after it, which closes an ending.
    pub closes: bool,
}

/// Bars in playing order: each repeated part twice, with its first ending the first time and its second the second.
pub(super) fn expand(written: &[Written]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let (mut start, mut i, mut pass) = (0, 0, 1u8);
    let mut ending: Option<u8> = None;
    let mut repeated = vec![false; written.len()];
    while i < written.len() && bars.len() < MAX_BARS {
        let w = &written[i];
        if w.starts_repeat && start != i {
            (start, pass, ending) = (i, 1, None);
        }
        if w.ending.is_some() {
            ending = w.ending;
        }
        if ending.is_none_or(|e| e == pass || e > 2) {
            bars.push(w.bar.clone());
        }
        let wrong_ending = ending.is_some_and(|e| e != pass && e <= 2);
        if w.ends_repeat && !repeated[i] && pass == 1 && !wrong_ending {
            repeated[i] = true;
            (i, pass, ending) = (start, 2, None);
            continue;
        }
        let repeat_is_done = w.ends_repeat && !(wrong_ending && pass == 2);
        if repeat_is_done || w.closes && ending == Some(2) {
            (start, pass, ending) = (i + 1, 1, None);
        }
        i += 1;
    }
    bars
}

/// Joins neighbouring bars that fill one bar together: the end of a part and the upbeat of the next.
pub(super) fn join_halves(bars: Vec<Bar>, bar: u32) -> Vec<Bar> {
    let mut joined: Vec<Bar> = Vec::new();
    for next in bars {
        match joined.last_mut() {
            Some(last) if last.length < bar && last.length + next.length == bar => {
                let shift = last.length;
                last.notes.extend(next.notes.iter().map(|n| Note { onset: n.onset + shift, ..*n }));
                last.length = bar;
            }
            _ => joined.push(next),
        }
    }
    joined
}
