//! The right-hand matrix of a product, packed into panels.

use super::{Real, Shared, filled, for_each};

/// Columns of a packed panel.
pub(crate) const NR: usize = 16;
/// Bytes of a cache line.
const LINE: usize = 64;

/// A matrix `[depth, n]` cut into panels of sixteen columns, each `[depth, 16]`, the last filled up with zeros.
pub(crate) struct Packed<T> {
    /// The panels begin at a cache line, so that no row of one lies in two.
    data: Vec<T>,
    /// See `data`.
    begin: usize,
    depth: usize,
    n: usize,
}

impl<T: Real> Packed<T> {
    /// Packs a matrix made of `blocks` of `block_depth` rows: element `(block, p, j)` lies at
    /// `start(block) + p * depth_stride + j * column_stride` of `w`.
    pub(crate) fn new(
        w: &[T],
        (blocks, block_depth, n): (usize, usize, usize),
        start: impl Fn(usize) -> usize + Sync,
        (depth_stride, column_stride): (usize, usize),
    ) -> Self {
        let depth = blocks * block_depth;
        let n_panels = n.div_ceil(NR);
        if depth * n > 0 {
            let last = (0..blocks).map(&start).max().unwrap_or(0);
            assert!(last + (block_depth - 1) * depth_stride + (n - 1) * column_stride < w.len());
        }
        // Where each row begins, in the order of the addresses: rows that are neighbours there are read together.
        let mut order: Vec<usize> = (0..blocks).collect();
        order.sort_by_key(|&block| start(block));
        let rows: Vec<(usize, usize)> = (0..block_depth)
            .flat_map(|p| order.iter().map(move |&block| (block, p)))
            .map(|(block, p)| (start(block) + p * depth_stride, block * block_depth + p))
            .collect();
        // SAFETY: every row of every panel is written; reads are inside as checked above.
        let (mut begin, len) = (0, n_panels * depth * NR);
        let data = unsafe {
            filled(len + LINE / size_of::<T>(), |out: Shared<T>| {
                begin = out.ptr().align_offset(LINE);
                out.range(0, begin).fill(T::ZERO);
                out.range(begin + len, LINE / size_of::<T>() - begin).fill(T::ZERO);
                let out = out.from(begin);
                for_each(n_panels, depth * n, |panel| {
                    let out = out.range(panel * depth * NR, depth * NR);
                    let width = NR.min(n - panel * NR);
                    let w = &w[(panel * NR * column_stride).min(w.len())..];
                    if column_stride == 1 {
                        for &(from, row) in &rows {
                            let to = &mut out[row * NR..][..NR];
                            to[..width].copy_from_slice(&w[from..from + width]);
                            to[width..].fill(T::ZERO);
                        }
                    } else {
                        pack_columns(w, &rows, column_stride, width, out);
                    }
                });
            })
        };
        Packed { data, begin, depth, n }
    }

    /// All rows.
    pub(crate) fn all(&self) -> Panels<'_, T> {
        self.part(0..self.depth)
    }

    /// Some of the rows.
    pub(crate) fn part(&self, rows: std::ops::Range<usize>) -> Panels<'_, T> {
        assert!(rows.start <= rows.end && rows.end <= self.depth);
        Panels { packed: self, first: rows.start, depth: rows.len() }
    }
}

/// Fills one panel from columns `column_stride` apart; `rows` are the addresses of the first column and the rows' places.
fn pack_columns<T: Real>(
    w: &[T],
    rows: &[(usize, usize)],
    column_stride: usize,
    width: usize,
    out: &mut [T],
) {
    let zeros = [T::ZERO; 8];
    let mut rest = rows;
    while let Some(&(base, _)) = rest.first() {
        // Rows within eight addresses: eight columns of them at a time go through the registers.
        let n = rest.iter().take_while(|(from, _)| (base..base + 8).contains(from)).count();
        let (window, later) = rest.split_at(n);
        rest = later;
        for first in [0, 8] {
            let (mut copies, mut unused) = ([[T::ZERO; 8]; 8], [T::ZERO; 8]);
            let from = std::array::from_fn(|j| {
                let start = base + (first + j) * column_stride;
                if first + j >= width {
                    zeros.as_ptr()
                } else if start + 8 <= w.len() {
                    w[start..].as_ptr()
                } else {
                    copies[j][..w.len() - start].copy_from_slice(&w[start..]);
                    copies[j].as_ptr()
                }
            });
            let mut to = [unused.as_mut_ptr(); 8];
            for &(address, row) in window {
                to[address - base] = out[row * NR + first..][..8].as_mut_ptr();
            }
            // SAFETY: eight elements each, by the slices above.
            unsafe { T::transpose(from, to) };
        }
    }
}

/// Consecutive rows of a [`Packed`] matrix.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a, T> {
    packed: &'a Packed<T>,
    first: usize,
    /// How many.
    pub depth: usize,
}

impl<T: Real> Panels<'_, T> {
    /// Columns of the matrix.
    pub(crate) fn n(&self) -> usize {
        self.packed.n
    }

    /// Elements between panels.
    pub(crate) fn step(&self) -> usize {
        self.packed.depth * NR
    }

    /// The first row of panel `i`.
    pub(crate) fn panel(&self, i: usize) -> *const T {
        self.packed.data[self.packed.begin + i * self.step() + self.first * NR..].as_ptr()
    }

    /// The first column.
    pub(crate) fn column(&self) -> Vec<T> {
        let first = &self.packed.data[self.packed.begin + self.first * NR..];
        first.iter().step_by(NR).take(self.depth).copied().collect()
    }
}
