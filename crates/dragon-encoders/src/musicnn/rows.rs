//! Which outputs of a convolution over time the windows of a spectrogram need: each is computed once.

use super::network::N_FRAMES;

/// Which outputs of a 'same' convolution over time are needed, and where each window finds its own.
pub(super) struct Rows {
    pub rows: Vec<Row>,
    /// Row of frame `t`, uncut; `usize::MAX` where no window needs it.
    whole: Vec<usize>,
    pub starts: Vec<usize>,
    /// First of the cut rows of each window: `before` at its start, then `after` at its end.
    cut: Vec<usize>,
    pub before: usize,
    pub after: usize,
}

/// One output: frame `t` with the taps that see frames `from..to`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    pub t: usize,
    pub from: usize,
    pub to: usize,
}

impl Rows {
    /// For a kernel of `n_taps` frames: TensorFlow puts the smaller half of an even number of padding frames first.
    pub fn new(n_frames: usize, starts: &[usize], n_taps: usize) -> Self {
        let (before, after) = ((n_taps - 1) / 2, n_taps / 2);
        let mut rows = Vec::new();
        let mut whole = vec![usize::MAX; n_frames];
        for &start in starts {
            let inside = start + before..start + N_FRAMES - after;
            for (row, t) in whole[inside.clone()].iter_mut().zip(inside) {
                if *row == usize::MAX {
                    *row = rows.len();
                    rows.push(Row { t, from: t - before, to: t + after + 1 });
                }
            }
        }
        let mut cut = Vec::new();
        for &start in starts {
            cut.push(rows.len());
            let end = start + N_FRAMES;
            rows.extend((start..start + before).map(|t| Row { t, from: start, to: t + after + 1 }));
            rows.extend((end - after..end).map(|t| Row { t, from: t - before, to: end }));
        }
        Rows { rows, whole, starts: starts.to_vec(), cut, before, after }
    }

    /// The row of frame `i` of a window.
    pub fn of(&self, window: usize, i: usize) -> usize {
        if i < self.before {
            self.cut[window] + i
        } else if i + self.after >= N_FRAMES {
            self.cut[window] + self.before + i + self.after - N_FRAMES
        } else {
            self.whole[self.starts[window] + i]
        }
    }
}
