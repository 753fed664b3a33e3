//! Timbral filters: 7 frames by 38 or 67 bands, by the correlation theorem along the bands.

use super::lanes::{BINS, Complex, InverseFft, LANES, LENGTH, Lanes};
use super::network::{N_MELS, TIMBRAL, TIMBRAL_CHANNELS, TIMBRAL_FRAMES};
use super::norm::PooledNorm;
use super::rows::Rows;

/// Filters over 7 frames and many bands, 'same' in time and 'valid' in frequency, maximum over frequency.
pub(super) struct Timbral {
    /// Number of positions along the bands.
    positions: usize,
    /// `[group][bin][tap]`: conjugate spectrum of the filters over 96, real and imaginary.
    spectra: Vec<Complex>,
    pooled: PooledNorm,
}

/// Rows computed at once: their accumulators, two weights and two inputs fit the registers.
const TILE_ROWS: usize = 4;
/// Rows whose packed spectra stay in the second-level cache while all filters pass.
const BLOCK_ROWS: usize = 32;

impl Timbral {
    pub fn new(fft: &InverseFft, bands: usize, kernel: &[f32], pooled: PooledNorm) -> Self {
        let groups = TIMBRAL_CHANNELS.div_ceil(LANES);
        let mut spectra = vec![[[0.0; LANES]; 2]; groups * BINS * TIMBRAL_FRAMES];
        for channel in 0..TIMBRAL_CHANNELS {
            for tap in 0..TIMBRAL_FRAMES {
                let scale = pooled.sign[channel] / LENGTH as f32;
                let filter: Vec<f32> = (0..bands)
                    .map(|band| kernel[(tap * bands + band) * TIMBRAL_CHANNELS + channel] * scale)
                    .collect();
                for (bin, [re, im]) in fft.forward(&filter).into_iter().enumerate() {
                    let slot = &mut spectra[((channel / LANES) * BINS + bin) * TIMBRAL_FRAMES + tap];
                    slot[0][channel % LANES] = re;
                    slot[1][channel % LANES] = -im;
                }
            }
        }
        let spectra = spectra.into_iter().map(|parts| parts.map(Lanes::from_array)).collect();
        Timbral { positions: N_MELS - bands + 1, spectra, pooled }
    }
}

/// Both kinds of timbral features of the given rows: `[rows, 2 * 204]`.
pub(super) fn features(fft: &InverseFft, filters: &[Timbral; 2], x: &[f32], rows: &Rows) -> Vec<f32> {
    const TAPS: usize = TIMBRAL_FRAMES;
    let width = TIMBRAL;
    let spectra: Vec<[[f32; 2]; BINS]> = x.chunks(N_MELS).map(|frame| fft.forward(frame)).collect();
    let mut out = vec![0.0; rows.rows.len() * width];
    let mut packed = vec![[[0.0f32; 2]; TILE_ROWS]; BLOCK_ROWS / TILE_ROWS * BINS * TAPS];
    let mut products = [[[Lanes::zero(); 2]; BINS]; TILE_ROWS];
    let mut pairs = [[Lanes::zero(); 2]; LENGTH / 2];
    for (block, rows) in rows.rows.chunks(BLOCK_ROWS).enumerate() {
        packed.fill([[0.0; 2]; TILE_ROWS]);
        for (r, row) in rows.iter().enumerate() {
            for tap in 0..TAPS {
                let frame = (row.t + tap).wrapping_sub(TAPS / 2);
                if (row.from..row.to).contains(&frame) {
                    for (bin, value) in spectra[frame].iter().enumerate() {
                        packed[((r / TILE_ROWS) * BINS + bin) * TAPS + tap][r % TILE_ROWS] = *value;
                    }
                }
            }
        }
        for (side, filters) in filters.iter().enumerate() {
            for (group, weights) in filters.spectra.chunks(BINS * TAPS).enumerate() {
                for (tile, inputs) in
                    packed.chunks(BINS * TAPS).take(rows.len().div_ceil(TILE_ROWS)).enumerate()
                {
                    multiply(inputs, weights, &mut products);
                    for (r, products) in products.iter().enumerate() {
                        let row = tile * TILE_ROWS + r;
                        if row >= rows.len() {
                            break;
                        }
                        fft.run(products, &mut pairs);
                        let mut largest = pairs[0][0].max(pairs[0][1]);
                        for pair in &pairs[1..filters.positions / 2] {
                            largest = largest.max(pair[0]).max(pair[1]);
                        }
                        if filters.positions % 2 == 1 {
                            largest = largest.max(pairs[filters.positions / 2][0]);
                        }
                        let largest = largest.to_array();
                        let out = &mut out[(block * BLOCK_ROWS + row) * width + side * TIMBRAL_CHANNELS..];
                        let first = group * LANES;
                        for channel in first..TIMBRAL_CHANNELS.min(first + LANES) {
                            out[channel] = filters.pooled.apply(channel, largest[channel - first]);
                        }
                    }
                }
            }
        }
    }
    out
}

/// Sums over the taps of input spectrum times filter spectrum, per bin and row.
#[inline(always)]
fn multiply(inputs: &[[[f32; 2]; TILE_ROWS]], weights: &[Complex], out: &mut [[Complex; BINS]; TILE_ROWS]) {
    let inputs = inputs.chunks_exact(TIMBRAL_FRAMES);
    let weights = weights.chunks_exact(TIMBRAL_FRAMES);
    for (bin, (inputs, weights)) in inputs.zip(weights).enumerate() {
        let mut sums = [[Lanes::zero(); 2]; TILE_ROWS];
        for (input, [re, im]) in inputs.iter().zip(weights) {
            for (sum, &[xr, xi]) in sums.iter_mut().zip(input) {
                let (xr, xi) = (Lanes::splat(xr), Lanes::splat(xi));
                sum[0] = xi.neg_mul_add(*im, xr.mul_add(*re, sum[0]));
                sum[1] = xi.mul_add(*re, xr.mul_add(*im, sum[1]));
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            out[bin] = sum;
        }
    }
}
