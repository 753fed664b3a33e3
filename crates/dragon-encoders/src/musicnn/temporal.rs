//! Temporal filters: 128, 64 or 32 frames by one band, summed once for all windows.

use super::lanes::{LANES, Lanes};
use super::network::{N_MELS, TEMPORAL_CHANNELS};
use super::norm::PooledNorm;
use super::rows::Rows;

/// Filters over many frames and one band, 'same' in time, maximum over frequency.
pub(super) struct Temporal {
    /// `[channel / 4][tap][4]`, zeros for the 52nd channel.
    taps: Vec<[f32; TILE_CHANNELS]>,
    pub n_taps: usize,
    pooled: PooledNorm,
}

/// Channels and groups of eight bands computed at once: 12 accumulators, 3 inputs and a weight make 16 registers.
const TILE_CHANNELS: usize = 4;
const TILE_BANDS: usize = 3;
type Tile = [[Lanes; TILE_BANDS]; TILE_CHANNELS];

impl Temporal {
    pub fn new(n_taps: usize, kernel: &[f32], pooled: PooledNorm) -> Self {
        let mut taps = Vec::new();
        for group in 0..TEMPORAL_CHANNELS.div_ceil(TILE_CHANNELS) {
            for tap in 0..n_taps {
                taps.push(std::array::from_fn(|i| {
                    let channel = group * TILE_CHANNELS + i;
                    if channel < TEMPORAL_CHANNELS {
                        kernel[tap * TEMPORAL_CHANNELS + channel] * pooled.sign[channel]
                    } else {
                        0.0
                    }
                }));
            }
        }
        Temporal { taps, n_taps, pooled }
    }

    /// The features of the given rows, `[rows, 51]`, of normalised frames `x [T, 96]`.
    pub fn forward(&self, x: &[f32], rows: &Rows) -> Vec<f32> {
        let n_frames = x.len() / N_MELS;
        let (before, after) = (rows.before, rows.after);
        let mut out = vec![0.0; rows.rows.len() * TEMPORAL_CHANNELS];
        // Rows of one frame share their sums.
        let mut by_frame: Vec<Vec<usize>> = vec![Vec::new(); n_frames];
        for (i, row) in rows.rows.iter().enumerate() {
            by_frame[row.t].push(i);
        }
        let x: Vec<[Lanes; N_MELS / LANES]> = x
            .chunks_exact(N_MELS)
            .map(|frame| {
                std::array::from_fn(|i| {
                    Lanes::from_array(std::array::from_fn(|lane| frame[i * LANES + lane]))
                })
            })
            .collect();
        let mut largest: Vec<[Lanes; TILE_CHANNELS]> = Vec::new();
        let mut beyond: Vec<Tile> = Vec::new();
        for (t, wanted) in by_frame.iter().enumerate().filter(|(_, wanted)| !wanted.is_empty()) {
            let (first, last) = (t.saturating_sub(before), n_frames.min(t + after + 1));
            // Frames at which a window begins (from > first) or ends (to < last), latest first.
            let mut cuts: Vec<(usize, Cut)> = Vec::new();
            for (slot, &i) in wanted.iter().enumerate() {
                let row = rows.rows[i];
                if row.from > first {
                    cuts.push((row.from, Cut::Begins(slot)));
                } else {
                    cuts.push((row.to, Cut::Ends(slot)));
                }
            }
            cuts.sort_by_key(|cut| std::cmp::Reverse(cut.0));
            for (group, taps) in self.taps.chunks_exact(self.n_taps).enumerate() {
                largest.clear();
                largest.resize(wanted.len(), [Lanes::splat(f32::NEG_INFINITY); TILE_CHANNELS]);
                for band in (0..N_MELS / LANES).step_by(TILE_BANDS) {
                    let mut sum: Tile = [[Lanes::zero(); TILE_BANDS]; TILE_CHANNELS];
                    let mut done = last;
                    beyond.clear();
                    for &(at, cut) in &cuts {
                        sum = accumulate(sum, &x[at..done], band, &taps[at + before - t..]);
                        done = at;
                        match cut {
                            Cut::Begins(slot) => raise(&mut largest[slot], &sum),
                            Cut::Ends(_) => beyond.push(sum),
                        }
                    }
                    sum = accumulate(sum, &x[first..done], band, &taps[first + before - t..]);
                    let mut beyond = beyond.iter();
                    for (_, cut) in &cuts {
                        if let Cut::Ends(slot) = cut {
                            let beyond = beyond.next().expect("pushed once per cut above");
                            let mut inside = sum;
                            for (inside, beyond) in inside.iter_mut().flatten().zip(beyond.iter().flatten()) {
                                *inside = *inside - *beyond;
                            }
                            raise(&mut largest[*slot], &inside);
                        }
                    }
                }
                for (largest, &row) in largest.iter().zip(wanted) {
                    let first = group * TILE_CHANNELS;
                    for channel in first..TEMPORAL_CHANNELS.min(first + TILE_CHANNELS) {
                        let largest = largest[channel - first].max_lane();
                        out[row * TEMPORAL_CHANNELS + channel] = self.pooled.apply(channel, largest);
                    }
                }
            }
        }
        out
    }
}

/// What happens at a frame of the sum for an output slot.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Begins(usize),
    Ends(usize),
}

/// `sum + Σ_i x[i] taps[i]`, from the last to the first.
#[inline(always)]
fn accumulate(
    mut sum: Tile,
    x: &[[Lanes; N_MELS / LANES]],
    band: usize,
    taps: &[[f32; TILE_CHANNELS]],
) -> Tile {
    let taps = &taps[..x.len()];
    for (x, taps) in x.iter().zip(taps).rev() {
        let x: &[Lanes; TILE_BANDS] = x[band..band + TILE_BANDS].try_into().expect("a whole tile");
        for (sum, &tap) in sum.iter_mut().zip(taps) {
            let tap = Lanes::splat(tap);
            for (sum, x) in sum.iter_mut().zip(x) {
                *sum = x.mul_add(tap, *sum);
            }
        }
    }
    sum
}

#[inline(always)]
fn raise(largest: &mut [Lanes; TILE_CHANNELS], values: &Tile) {
    for (largest, values) in largest.iter_mut().zip(values) {
        for value in values {
            *largest = largest.max(*value);
        }
    }
}
