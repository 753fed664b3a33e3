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
/// Depth of a product done at a time: 256 x 16 floats fill half of a first-level cache of 32 KiB.
const KC: usize = 256;

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
                        let out = &mut out[block * block_depth * NR..(block + 1) * block_depth * NR];
                        // Sixteen rows at a time: a column's cache line is used up before it goes.
                        for (p, rows) in out.chunks_mut(NR * NR).enumerate() {
                            let source = source + p * NR * depth_stride;
                            for j in 0..width {
                                for (q, row) in rows.chunks_exact_mut(NR).enumerate() {
                                    // Bounds: checked above for the last block, depth and column.
                                    row[j] = *w.get_unchecked(source + q * depth_stride + j * column_stride);
                                }
                            }
                            for row in rows.chunks_exact_mut(NR) {
                                row[width..].fill(T::ZERO);
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

/// Where the rows of a product come from and go to.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Examples, each with the rows below.
    pub batch: usize,
    /// Elements between the examples of the input.
    pub in_batch: usize,
    /// Elements between the examples of the result.
    pub out_batch: usize,
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

/// `out[r] = bias + Σ_taps x[r·in_step + tap] · B_tap`, for each example; `x` starts at the first used channel of the
/// first row.
///
/// # Safety
/// All rows that [`Rows`] names must lie inside `x` and `out`, for every example; `b` holds `taps · width` rows.
pub(crate) unsafe fn product<T: Real>(
    x: &[T],
    b: &Packed<T>,
    bias: Option<&[T]>,
    out: Shared<T>,
    rows: &Rows,
) {
    let Rows { batch, in_batch, out_batch, .. } = *rows;
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
                    if (0..rows.in_rows as isize).contains(&row) {
                        let x = &x[example * in_batch + row as usize * rows.in_stride..][..rows.width];
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
    // A block of rows (96 KiB of f32 at most) stays in the second-level cache while all panels pass over it.
    let block = (96 * KC / b.depth.clamp(1, KC)).min(384).min(rows.n_rows.next_multiple_of(MR));
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
        let x = unsafe { x.as_ptr().add(example * in_batch) };
        // The depth is cut so that the part of a panel in use stays in the first-level cache. The sums go on from
        // where they were, so this changes no result.
        for depth in (0..b.depth.max(1)).step_by(KC) {
            let depth = depth..(depth + KC).min(b.depth);
            for panel in group * panels_per_group..((group + 1) * panels_per_group).min(n_panels) {
                let width = NR.min(b.n - panel * NR);
                let mut start = [T::ZERO; NR];
                if let Some(bias) = bias {
                    start[..width].copy_from_slice(&bias[panel * NR..panel * NR + width]);
                }
                let tile = Tile {
                    x,
                    zeros: zeros.as_ptr(),
                    rows,
                    dense,
                    depth: depth.clone(),
                    b: b.panel(panel),
                    // SAFETY: inside `out` by the caller's contract.
                    out: unsafe { out.ptr().add(example * out_batch + rows.out_start + panel * NR) },
                    width,
                    start,
                };
                let mut row = first;
                while row < end {
                    // Rows are spread evenly over the tiles left: 8 rows are 4 + 4, not 6 + 2.
                    let left = end - row;
                    let m = left.div_ceil(left.div_ceil(MR));
                    // SAFETY: the caller's contract; tiles write rows and columns of their own.
                    unsafe {
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
        }
    });
}

struct Tile<'a, T> {
    x: *const T,
    zeros: *const T,
    rows: &'a Rows<'a>,
    dense: bool,
    /// The part of the depth to add.
    depth: std::ops::Range<usize>,
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
        if self.depth.start > 0 {
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: written by the pass over the depth before.
                unsafe {
                    let out = self.out.add((row + i) * rows.out_step);
                    std::ptr::copy_nonoverlapping(out, acc.as_mut_ptr(), self.width);
                }
            }
        }
        let in_range = |r: isize| (0..rows.in_rows as isize).contains(&r);
        let base = (row * rows.in_step) as isize;
        let last = base + ((M - 1) * rows.in_step) as isize;
        let n_taps = rows.taps.len();
        let depth = self.depth.clone();
        // SAFETY: pointers are formed for rows in range only; the others read the row of zeros.
        unsafe {
            if self.dense
                && n_taps > 0
                && in_range(base + rows.taps[0])
                && in_range(last + rows.taps[n_taps - 1])
            {
                let mut a = [self.x; M];
                for (i, a) in a.iter_mut().enumerate() {
                    let r = base + (i * rows.in_step) as isize + rows.taps[0];
                    *a = self.x.offset(r * rows.in_stride as isize).add(depth.start);
                }
                T::tile(&mut acc, depth.len(), a, 1, self.b.add(depth.start * NR));
            } else if !depth.is_empty() {
                for tap in depth.start / rows.width..depth.end.div_ceil(rows.width) {
                    let (low, high) = (tap * rows.width, (tap + 1) * rows.width);
                    let part = depth.start.max(low)..depth.end.min(high);
                    let mut a = [self.zeros; M];
                    for (i, a) in a.iter_mut().enumerate() {
                        let r = base + (i * rows.in_step) as isize + rows.taps[tap];
                        if in_range(r) {
                            *a = self.x.offset(r * rows.in_stride as isize).add(part.start - low);
                        }
                    }
                    T::tile(&mut acc, part.len(), a, 1, self.b.add(part.start * NR));
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
pub(crate) unsafe fn weight_gradient<T: Real>(x: &[T], g: &[T], n: usize, rows: &Rows) -> Vec<T> {
    /// Elements between the copied rows of a tile: one register of f32.
    const WIDE: usize = 8;
    /// Panels that stay in the second-level cache while all tiles pass over them.
    const PANELS: usize = 32;
    let batch = rows.batch;
    let m = rows.taps.len() * rows.width;
    // Rows of `g` packed at a time. A small sum stays in the cache, and then 128 x 16 floats and the rows that meet
    // them fit the first level; a large one is read and written once per chunk, so fewer chunks win.
    let longest = if m * n < 1 << 17 { 128 } else { 384 };
    let depth = rows.n_rows.div_ceil(rows.n_rows.div_ceil(longest).max(1)).max(1);
    let chunks_per_example = rows.n_rows.div_ceil(depth);
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
        let first = (chunk % chunks_per_example) * depth;
        for (p, r) in (first..(first + depth).min(rows.n_rows)).enumerate() {
            let row = &g[example * rows.out_batch + r * rows.out_step + rows.out_start..][..n];
            for (panel, columns) in row.chunks(NR).enumerate() {
                packed[(panel * depth + p) * NR..][..columns.len()].copy_from_slice(columns);
            }
        }
    };
    let chunk_len = n_panels * depth * NR;
    // One task per chunk packs for itself; several share what is packed before.
    let packed_before = if row_parts > 1 {
        let mut all = vec![T::ZERO; n_chunks * chunk_len];
        let pointer = super::shared(&mut all);
        // SAFETY: each chunk has a range of its own.
        for_each(n_chunks, work.min(n_chunks * chunk_len), |chunk| {
            pack(chunk, unsafe { pointer.range(chunk * chunk_len, chunk_len) })
        });
        all
    } else {
        Vec::new()
    };

    let compute = |depth_part: usize, row_part: usize, sum: Shared<T>| {
        let m_range = row_part * rows_per_part..((row_part + 1) * rows_per_part).min(m);
        let mut own = vec![T::ZERO; if row_parts > 1 { 0 } else { chunk_len }];
        let mut copy = vec![T::ZERO; depth * WIDE];
        for chunk in depth_part * chunks_per_part..((depth_part + 1) * chunks_per_part).min(n_chunks) {
            let example = chunk / chunks_per_example;
            let first = (chunk % chunks_per_example) * depth;
            let end = (first + depth).min(rows.n_rows);
            let packed = if row_parts > 1 {
                &packed_before[chunk * chunk_len..(chunk + 1) * chunk_len]
            } else {
                pack(chunk, &mut own);
                &own[..]
            };
            // SAFETY: the callers pass rows whose input is inside for the taps of the tile; `len <= MR` rows of `sum`
            // from `i` on belong to this task.
            let mut tile = |i: usize, len: usize, r0: usize, r1: usize, panels: std::ops::Range<usize>| unsafe {
                let whole = x;
                let x = x.as_ptr().add(example * rows.in_batch);
                let k = r1 - r0;
                let mut a = [x; MR];
                for (j, a) in a.iter_mut().enumerate().take(len) {
                    let (tap, channel) = ((i + j) / rows.width, (i + j) % rows.width);
                    let row = r0 as isize * step + rows.taps[tap];
                    *a = x.offset(row * rows.in_stride as isize).add(channel);
                }
                let mut step = rows.in_step * rows.in_stride;
                // Several panels: a copy side by side saves each of them the walk through distant cache lines.
                if panels.len() > 1 {
                    let side_by_side = (1..len).all(|j| a[j] == a[0].add(j));
                    let last = a[0].add((k - 1) * step + WIDE);
                    if side_by_side && last <= whole.as_ptr_range().end {
                        for (p, copy) in copy.chunks_exact_mut(WIDE).take(k).enumerate() {
                            std::ptr::copy_nonoverlapping(a[0].add(p * step), copy.as_mut_ptr(), WIDE);
                        }
                    } else {
                        for (p, copy) in copy.chunks_exact_mut(WIDE).take(k).enumerate() {
                            for (slot, a) in copy.iter_mut().zip(&a[..len]) {
                                *slot = *a.add(p * step);
                            }
                        }
                    }
                    for (j, a) in a.iter_mut().enumerate() {
                        *a = copy.as_ptr().add(j);
                    }
                    step = WIDE;
                }
                for panel in panels {
                    let block = GradientTile {
                        a: &a,
                        step,
                        k,
                        b: packed.as_ptr().add((panel * depth + (r0 - first)) * NR),
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
