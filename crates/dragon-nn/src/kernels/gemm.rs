//! Matrix products over rows that are gathered on the way: the core of the linear and convolution layers.
//!
//! One micro-kernel ([`Real::tile`]) multiplies up to six rows, read in place through pointers, with sixteen packed
//! columns. Since rows are pointers, a convolution needs neither padding nor an unfolded copy of its input: each tap
//! points into the activations, or at a row of zeros. Every element is a sum in the order of its depth, whatever the
//! number of rows, tiles or threads, so results depend on none of these.

use super::{Real, Shared, filled, for_each, ordered_sum};

/// Columns of a packed panel.
pub(crate) const NR: usize = 16;
/// Rows of a tile: 6 x 16 fills twelve of the sixteen vector registers of AVX2.
const MR: usize = 6;

/// A matrix `[depth, n]` cut into panels of sixteen columns, each `[depth, 16]`, the last filled up with zeros.
pub(crate) struct Packed<T> {
    data: Vec<T>,
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
        // SAFETY: every element of every panel is written: `width` columns, then zeros.
        let data = unsafe {
            filled(n_panels * depth * NR, |out| {
                for_each(n_panels, depth * n, |panel| {
                    let out = out.range(panel * depth * NR, depth * NR);
                    let width = NR.min(n - panel * NR);
                    for block in 0..blocks {
                        let source = start(block) + panel * NR * column_stride;
                        let rows = out[block * block_depth * NR..(block + 1) * block_depth * NR].chunks_exact_mut(NR);
                        for (p, row) in rows.enumerate() {
                            let source = source + p * depth_stride;
                            for (j, slot) in row.iter_mut().enumerate() {
                                // Bounds: checked above for the last block, depth and column.
                                *slot = if j < width { *w.get_unchecked(source + j * column_stride) } else { T::ZERO };
                            }
                        }
                    }
                });
            })
        };
        Packed { data, depth, n }
    }

    fn panel(&self, i: usize) -> *const T {
        self.data[i * self.depth * NR..].as_ptr()
    }
}

/// Where the rows of a product come from and go to, for one example of a batch.
pub(crate) struct Rows<'a> {
    /// Rows of the product.
    pub n_rows: usize,
    /// Row `r`, tap `i` reads input row `r * in_step + taps[i]`; outside `0..in_rows` it reads zeros.
    pub in_step: usize,
    /// Rows of the input.
    pub in_rows: usize,
    /// Offsets of the taps, in input rows.
    pub taps: &'a [isize],
    /// Elements read per tap.
    pub width: usize,
    /// Elements between input rows.
    pub in_stride: usize,
    /// First element of row `r` of the result is `r * out_step + out_start`.
    pub out_step: usize,
    /// See `out_step`.
    pub out_start: usize,
    /// Whether to use several threads; not inside a task that is one of many.
    pub parallel: bool,
}

/// `out[r] = bias + Σ_taps x[r·in_step + tap] · B_tap`, for each of `batch` examples.
///
/// `x` starts at the first used channel of the first row; examples lie `x_batch` and `out_batch` elements apart.
///
/// # Safety
/// All rows that [`Rows`] names must lie inside `x` and `out`, for every example; `b` holds `taps · width` rows.
pub(crate) unsafe fn product<T: Real>(
    x: &[T],
    x_batch: usize,
    b: &Packed<T>,
    bias: Option<&[T]>,
    out: Shared<T>,
    out_batch: usize,
    batch: usize,
    rows: &Rows,
) {
    assert_eq!(b.depth, rows.taps.len() * rows.width);
    if rows.n_rows == 0 || b.n == 0 || batch == 0 {
        return;
    }
    let zeros = vec![T::ZERO; rows.width];
    if b.n == 1 {
        let work = if rows.parallel { batch * rows.n_rows * b.depth } else { 0 };
        let weights: Vec<T> = (0..b.depth).map(|p| b.data[p * NR]).collect();
        let start = bias.map_or(T::ZERO, |bias| bias[0]);
        let per_task = super::rows_per_task(b.depth);
        let tasks = rows.n_rows.div_ceil(per_task);
        for_each(batch * tasks, work, |task| {
            let (example, first) = (task / tasks, task % tasks * per_task);
            for r in first..(first + per_task).min(rows.n_rows) {
                let mut sum = start;
                for (&tap, w) in rows.taps.iter().zip(weights.chunks_exact(rows.width)) {
                    let row = (r * rows.in_step) as isize + tap;
                    if 0 <= row && row < rows.in_rows as isize {
                        let x = &x[example * x_batch + row as usize * rows.in_stride..][..rows.width];
                        sum += super::lane_sum(rows.width, |i| x[i] * w[i]);
                    }
                }
                // SAFETY: one element per row, inside by the caller's contract.
                unsafe { *out.ptr().add(example * out_batch + r * rows.out_step + rows.out_start) = sum };
            }
        });
        return;
    }
    // Taps that follow each other in memory are one longer tap.
    let dense = rows.width == rows.in_stride && rows.taps.windows(2).all(|w| w[1] == w[0] + 1);
    // A block of rows stays in the second-level cache while all panels pass over it.
    let block = ((1 << 16) / b.depth.max(1)).clamp(8, 64) * MR;
    let block = block.min(rows.n_rows.div_ceil(MR) * MR);
    let n_blocks = rows.n_rows.div_ceil(block);
    let n_panels = b.n.div_ceil(NR);
    // Few rows: the panels are split too, so that every thread has work. Fixed by the shape alone.
    let panel_groups = (16usize.div_ceil(n_blocks * batch)).min(n_panels).max(1);
    let panels_per_group = n_panels.div_ceil(panel_groups);
    let panel_groups = n_panels.div_ceil(panels_per_group);
    let work = if rows.parallel { batch * rows.n_rows * b.n * b.depth / 8 } else { 0 };
    for_each(batch * n_blocks * panel_groups, work, |task| {
        let (example, rest) = (task / (n_blocks * panel_groups), task % (n_blocks * panel_groups));
        let (block_index, group) = (rest / panel_groups, rest % panel_groups);
        let (first, end) = (block_index * block, ((block_index + 1) * block).min(rows.n_rows));
        // SAFETY: inside `x` by the caller's contract.
        let x = unsafe { x.as_ptr().add(example * x_batch) };
        for panel in group * panels_per_group..((group + 1) * panels_per_group).min(n_panels) {
            let width = NR.min(b.n - panel * NR);
            let mut start = [T::ZERO; NR];
            if let Some(bias) = bias {
                start[..width].copy_from_slice(&bias[panel * NR..panel * NR + width]);
            }
            let mut row = first;
            while row < end {
                // Rows are spread evenly over the tiles left: 8 rows are 4 + 4, not 6 + 2.
                let left = end - row;
                let m = left.div_ceil(left.div_ceil(MR));
                // SAFETY: the caller's contract; tiles write rows and columns of their own.
                unsafe {
                    let tile = Tile {
                        x,
                        zeros: zeros.as_ptr(),
                        rows,
                        dense,
                        b: b.panel(panel),
                        out: out.ptr().add(example * out_batch + rows.out_start + panel * NR),
                        width,
                        start,
                    };
                    match m {
                        1 => tile.run::<1>(row),
                        2 => tile.run::<2>(row),
                        3 => tile.run::<3>(row),
                        4 => tile.run::<4>(row),
                        5 => tile.run::<5>(row),
                        _ => tile.run::<6>(row),
                    }
                }
                row += m;
            }
        }
    });
}

struct Tile<'a, T> {
    x: *const T,
    zeros: *const T,
    rows: &'a Rows<'a>,
    dense: bool,
    b: *const T,
    out: *mut T,
    width: usize,
    start: [T; NR],
}

impl<T: Real> Tile<'_, T> {
    /// # Safety
    /// As [`product`], for rows `row..row + M`.
    unsafe fn run<const M: usize>(&self, row: usize) {
        let rows = self.rows;
        let mut acc = [self.start; M];
        let in_range = |r: isize| 0 <= r && r < rows.in_rows as isize;
        let base = (row * rows.in_step) as isize;
        let last = base + ((M - 1) * rows.in_step) as isize;
        let n_taps = rows.taps.len();
        // SAFETY: pointers are formed for rows in range only; the others read the row of zeros.
        unsafe {
            if self.dense && n_taps > 0 && in_range(base + rows.taps[0]) && in_range(last + rows.taps[n_taps - 1]) {
                let mut a = [self.x; M];
                for (i, a) in a.iter_mut().enumerate() {
                    let r = base + (i * rows.in_step) as isize + rows.taps[0];
                    *a = self.x.offset(r * rows.in_stride as isize);
                }
                T::tile(&mut acc, n_taps * rows.width, a, 1, self.b);
            } else {
                for (tap, &offset) in rows.taps.iter().enumerate() {
                    let mut a = [self.zeros; M];
                    for (i, a) in a.iter_mut().enumerate() {
                        let r = base + (i * rows.in_step) as isize + offset;
                        if in_range(r) {
                            *a = self.x.offset(r * rows.in_stride as isize);
                        }
                    }
                    T::tile(&mut acc, rows.width, a, 1, self.b.add(tap * rows.width * NR));
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                let out = self.out.add((row + i) * rows.out_step);
                if self.width == NR {
                    std::ptr::copy_nonoverlapping(acc.as_ptr(), out, NR);
                } else {
                    std::ptr::copy_nonoverlapping(acc.as_ptr(), out, self.width);
                }
            }
        }
    }
}

/// The gradient of [`product`]'s matrix: `dB[tap·width + i, j] = Σ_batch Σ_r x[r·in_step + tap, i] · g[r, j]`,
/// as `[taps · width, n]`, row-major.
///
/// `g` holds the rows of the result's gradient: row `r` of an example starts at `r * out_step + out_start`.
///
/// # Safety
/// As for [`product`], with `g` in the place of `out`.
pub(crate) unsafe fn weight_gradient<T: Real>(
    x: &[T],
    x_batch: usize,
    g: &[T],
    g_batch: usize,
    n: usize,
    batch: usize,
    rows: &Rows,
) -> Vec<T> {
    /// Rows of `g` packed at a time: 256 x 16 floats fill half of the first-level cache.
    const DEPTH: usize = 256;
    /// Panels that stay in the second-level cache while all tiles pass over them.
    const PANELS: usize = 8;
    let m = rows.taps.len() * rows.width;
    let chunks_per_example = rows.n_rows.div_ceil(DEPTH);
    let n_chunks = batch * chunks_per_example;
    // Parallel over the depth as long as the partial sums stay small (4M elements), else over the result's rows.
    let depth_parts = (n_chunks / 4).clamp(1, 16).min(((1 << 22) / (m * n).max(1)).max(1));
    let depth_parts = if rows.parallel { depth_parts } else { 1 };
    let chunks_per_part = n_chunks.div_ceil(depth_parts);
    let depth_parts = n_chunks.div_ceil(chunks_per_part.max(1)).max(1);
    let row_parts = if rows.parallel { 16usize.div_ceil(depth_parts).min(m.div_ceil(MR)).max(1) } else { 1 };
    let rows_per_part = m.div_ceil(row_parts).next_multiple_of(MR);
    let n_panels = n.div_ceil(NR);
    let work = if rows.parallel { batch * rows.n_rows * m * n / 8 } else { 0 };
    let step = rows.in_step as isize;
    // Rows r of a tap whose input lies inside: 0 <= r * in_step + tap < in_rows.
    let inside = |tap: isize| {
        let lowest = if tap < 0 { (-tap + step - 1) / step } else { 0 };
        let highest = (rows.in_rows as isize - tap + step - 1).div_euclid(step).max(0);
        (lowest as usize, highest as usize)
    };
    // Rows for which this holds for every tap.
    let inner = rows.taps.iter().fold((0, usize::MAX), |(lo, hi), &tap| {
        let (low, high) = inside(tap);
        (lo.max(low), hi.min(high))
    });

    // Packs the rows of one chunk of `g` into panels.
    let pack = |chunk: usize, packed: &mut [T]| {
        let example = chunk / chunks_per_example;
        let first = (chunk % chunks_per_example) * DEPTH;
        for (p, r) in (first..(first + DEPTH).min(rows.n_rows)).enumerate() {
            let row = &g[example * g_batch + r * rows.out_step + rows.out_start..][..n];
            for (panel, columns) in row.chunks(NR).enumerate() {
                packed[(panel * DEPTH + p) * NR..][..columns.len()].copy_from_slice(columns);
            }
        }
    };
    let chunk_len = n_panels * DEPTH * NR;
    // One task per chunk packs for itself; several share what is packed before.
    let packed_before = if row_parts > 1 {
        let mut all = vec![T::ZERO; n_chunks * chunk_len];
        let pointer = super::shared(&mut all);
        // SAFETY: each chunk has a range of its own.
        for_each(n_chunks, work.min(n_chunks * chunk_len), |chunk| pack(chunk, unsafe {
            pointer.range(chunk * chunk_len, chunk_len)
        }));
        all
    } else {
        Vec::new()
    };

    let compute = |depth_part: usize, row_part: usize, sum: Shared<T>| {
        let m_range = row_part * rows_per_part..((row_part + 1) * rows_per_part).min(m);
        let mut own = vec![T::ZERO; if row_parts > 1 { 0 } else { chunk_len }];
        for chunk in depth_part * chunks_per_part..((depth_part + 1) * chunks_per_part).min(n_chunks) {
            let example = chunk / chunks_per_example;
            let first = (chunk % chunks_per_example) * DEPTH;
            let end = (first + DEPTH).min(rows.n_rows);
            let packed = if row_parts > 1 {
                &packed_before[chunk * chunk_len..(chunk + 1) * chunk_len]
            } else {
                pack(chunk, &mut own);
                &own[..]
            };
            // SAFETY: the callers pass rows whose input is inside for the taps of the tile; `len <= MR` rows of `sum`
            // from `i` on belong to this task.
            let tile = |i: usize, len: usize, r0: usize, r1: usize, panels: std::ops::Range<usize>| unsafe {
                let x = x.as_ptr().add(example * x_batch);
                let mut a = [x; MR];
                for (j, a) in a.iter_mut().enumerate().take(len) {
                    let (tap, channel) = ((i + j) / rows.width, (i + j) % rows.width);
                    let row = r0 as isize * step + rows.taps[tap];
                    *a = x.offset(row * rows.in_stride as isize).add(channel);
                }
                for panel in panels {
                    let block = GradientTile {
                        a: &a,
                        step: rows.in_step * rows.in_stride,
                        k: r1 - r0,
                        b: packed.as_ptr().add((panel * DEPTH + (r0 - first)) * NR),
                        out: sum.ptr().add(i * n + panel * NR),
                        out_stride: n,
                        width: NR.min(n - panel * NR),
                    };
                    match len {
                        1 => block.run::<1>(),
                        2 => block.run::<2>(),
                        3 => block.run::<3>(),
                        4 => block.run::<4>(),
                        5 => block.run::<5>(),
                        _ => block.run::<6>(),
                    }
                }
            };
            let (r0, r1) = (first.max(inner.0).min(end), end.min(inner.1).max(first));
            if r0 < r1 {
                for group in (0..n_panels).step_by(PANELS) {
                    for i in m_range.clone().step_by(MR) {
                        tile(i, MR.min(m_range.end - i), r0, r1, group..(group + PANELS).min(n_panels));
                    }
                }
            }
            // The edges, where taps see different rows: tap by tap.
            let edges = if r0 < r1 { [(first, r0), (r1, end)] } else { [(first, end), (end, end)] };
            for (tap, &offset) in rows.taps.iter().enumerate() {
                let (low, high) = inside(offset);
                let (i0, i1) = (m_range.start.max(tap * rows.width), m_range.end.min((tap + 1) * rows.width));
                for (start, stop) in edges {
                    let (r0, r1) = (start.max(low), stop.min(high));
                    if r0 < r1 {
                        for i in (i0..i1.max(i0)).step_by(MR) {
                            tile(i, MR.min(i1 - i), r0, r1, 0..n_panels);
                        }
                    }
                }
            }
        }
    };

    if depth_parts == 1 {
        let mut sum = vec![T::ZERO; m * n];
        let pointer = super::shared(&mut sum);
        for_each(row_parts, work, |row_part| compute(0, row_part, pointer));
        return sum;
    }
    if row_parts == 1 {
        return ordered_sum(depth_parts, m * n, work, |part, sum| compute(part, 0, super::shared(sum)));
    }
    let mut parts = vec![T::ZERO; depth_parts * m * n];
    let pointer = super::shared(&mut parts);
    for_each(depth_parts * row_parts, work, |task| {
        let (part, row_part) = (task / row_parts, task % row_parts);
        // SAFETY: inside the buffer; tasks of one part write different rows.
        let sum = unsafe { pointer.range(part * m * n, m * n) };
        compute(part, row_part, super::shared(sum));
    });
    let (sum, rest) = parts.split_at_mut(m * n);
    for part in rest.chunks_exact(m * n) {
        for (s, &p) in sum.iter_mut().zip(part) {
            *s += p;
        }
    }
    parts.truncate(m * n);
    parts
}

/// `M` rows of a gradient, sixteen columns: `out[i] += Σ_p a[i][p · step] · b[p]`.
struct GradientTile<'a, T> {
    a: &'a [*const T; MR],
    step: usize,
    k: usize,
    b: *const T,
    out: *mut T,
    out_stride: usize,
    width: usize,
}

impl<T: Real> GradientTile<'_, T> {
    /// # Safety
    /// `a[i][p · step]` for `i < M`, `b[16 p..]` and `width` columns of `M` rows of `out` must be valid.
    unsafe fn run<const M: usize>(&self) {
        let mut acc = [[T::ZERO; NR]; M];
        let mut rows = [self.b; M];
        rows.copy_from_slice(&self.a[..M]);
        // SAFETY: the caller's contract.
        unsafe {
            T::tile(&mut acc, self.k, rows, self.step, self.b);
            for (i, acc) in acc.iter().enumerate() {
                let out = std::slice::from_raw_parts_mut(self.out.add(i * self.out_stride), self.width);
                for (o, &v) in out.iter_mut().zip(acc) {
                    *o += v;
                }
            }
        }
    }
}
