//! Matrix products over rows that are gathered on the way: the core of the linear and convolution layers.
//!
//! One micro-kernel ([`Real::tile`]) multiplies a few rows, read through pointers, with one or two panels of
//! sixteen packed columns. Since rows are pointers, a convolution needs neither padding nor an unfolded copy of its input: each tap
//! points into the activations, or at a row of zeros. Where many panels pass over the same rows, the part of them that is
//! in use is copied side by side first. Every element is a sum in the order of its depth, whatever the
//! number of rows, tiles or threads, so results depend on none of these.

use super::packed::{NR, Panels};
use super::real::{Ahead, Start, Target};
use super::{Real, Shared, filled, for_each};

/// Rows and panels of a tile. 6 x 16 fills twelve of the sixteen vector registers of AVX2, 8 x 32 sixteen of the 32 of
/// AVX-512.
const MR: usize = if cfg!(target_feature = "avx512f") { 8 } else { 6 };
/// See [`MR`].
const PANELS: usize = if cfg!(target_feature = "avx512f") { 2 } else { 1 };
/// Depth of a product done at a time: long enough to make little of reading and writing the sums, short enough for the
/// columns of a tile to stay near.
pub(crate) const KC: usize = 256;
/// Elements between the copied rows of a tile: one register of f32 of AVX2.
const WIDE: usize = 8;
/// Rows from which on threads have blocks enough if these are large.
const MANY_ROWS: usize = 2048;
/// Panels from which on a block's rows are copied side by side: with few, a copy costs more than it saves.
const COPY_FROM: usize = 32;

/// Evaluates an expression in which `$m` stands for the number of rows of a tile.
macro_rules! by_rows {
    ($rows:expr, $m:ident => $body:expr) => {
        by_rows!(@ $rows, $m, $body, 1 2 3 4 5 6 7 8)
    };
    (@ $rows:expr, $m:ident, $body:expr, $($n:literal)*) => {
        match $rows {
            $($n => {
                const $m: usize = if $n < MR { $n } else { MR };
                $body
            })*
            _ => unreachable!("a tile has 1 to {MR} rows"),
        }
    };
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
    /// Whether the sums go on from what the result holds: the depth came in parts, and this is not the first.
    pub go_on: bool,
}

/// `out[r] = bias + Σ_taps x[r·in_step + tap] · B_tap`, for each example; `x` starts at the first used channel of the
/// first row.
///
/// # Safety
/// All rows that [`Rows`] names must lie inside `x` and `out`, for every example; `b` holds `taps · width` rows.
pub(crate) unsafe fn product<T: Real>(
    x: &[T],
    b: Panels<T>,
    bias: Option<&[T]>,
    out: Shared<T>,
    rows: &Rows,
) {
    let Rows { batch, in_batch, out_batch, .. } = *rows;
    let n = b.n();
    assert_eq!(b.depth, rows.taps.len() * rows.width);
    if rows.n_rows == 0 || n == 0 || batch == 0 {
        return;
    }
    let zeros = vec![T::ZERO; rows.width];
    if n == 1 {
        assert!(!rows.go_on);
        let work = if rows.parallel { batch * rows.n_rows * b.depth } else { 0 };
        let weights = b.column();
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
                        sum += super::dot(x, w);
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
    // A block of rows (192 KiB of f32, or 96 where there are few and each thread needs several) stays in the second-level
    // cache while all panels pass over it.
    let elements = if rows.parallel && batch * rows.n_rows < MANY_ROWS { 96 * 256 } else { 192 * 256 };
    let block = (elements / b.depth.clamp(1, 256) / MR * MR).min(384).min(rows.n_rows.next_multiple_of(MR));
    let n_blocks = rows.n_rows.div_ceil(block);
    let n_panels = n.div_ceil(NR);
    // Few rows: the panels are split too, so that every thread has work. Fixed by the shape alone.
    let panel_groups = if rows.parallel { 16usize.div_ceil(n_blocks * batch).min(n_panels) } else { 1 };
    let panels_per_group = n_panels.div_ceil(panel_groups).next_multiple_of(PANELS);
    let panel_groups = n_panels.div_ceil(panels_per_group);
    let work = if rows.parallel { batch * rows.n_rows * n * b.depth / 8 } else { 0 };
    for_each(batch * n_blocks * panel_groups, work, |task| {
        let (example, rest) = (task / (n_blocks * panel_groups), task % (n_blocks * panel_groups));
        let (block_index, group) = (rest / panel_groups, rest % panel_groups);
        let (first, end) = (block_index * block, ((block_index + 1) * block).min(rows.n_rows));
        let panels = group * panels_per_group..((group + 1) * panels_per_group).min(n_panels);
        // Rows are spread evenly over the tiles: 10 rows are 5 + 5, not 8 + 2.
        let n_tiles = (end - first).div_ceil(MR);
        let tile_rows = |i: usize| {
            let row = |i: usize| first + i * (end - first) / n_tiles;
            (row(i), row(i + 1) - row(i))
        };
        // Many panels: rows that lie side by side save each of them the walk through distant pages.
        let row_of = |r: usize| (r * rows.in_step) as isize + rows.taps.first().copied().unwrap_or(0);
        let inside =
            row_of(first) >= 0 && row_of(end - 1) + rows.taps.len() as isize <= rows.in_rows as isize;
        let copies = dense && inside && b.depth > 0 && panels.len() >= COPY_FROM;
        let tile_len = WIDE * b.depth.min(KC);
        let mut copy = vec![T::ZERO; if copies { n_tiles * tile_len } else { 0 }];
        // SAFETY: inside `x` by the caller's contract.
        let x = unsafe { x.as_ptr().add(example * in_batch) };
        // The depth is cut so that the part of a panel in use stays in the first-level cache. The sums go on from
        // where they were, so this changes no result.
        for depth in (0..b.depth.max(1)).step_by(KC) {
            let depth = depth..(depth + KC).min(b.depth);
            if copies {
                for (i, copy) in copy.chunks_exact_mut(tile_len).enumerate() {
                    let (row, m) = tile_rows(i);
                    // SAFETY: rows in range, see `inside`; the lanes beyond `m` repeat the first row.
                    unsafe {
                        let from = std::array::from_fn(|j| {
                            let r = row_of(if j < m { row + j } else { row });
                            x.offset(r * rows.in_stride as isize).add(depth.start)
                        });
                        side_by_side(from, depth.len(), copy);
                    }
                }
            }
            for panel in panels.clone().step_by(PANELS) {
                let width = (PANELS * NR).min(n - panel * NR);
                let start = match bias {
                    _ if depth.start > 0 || rows.go_on => Start::Target,
                    Some(bias) => Start::Bias(bias[panel * NR..panel * NR + width].as_ptr()),
                    None => Start::Zero,
                };
                let tile = Tile {
                    x,
                    zeros: zeros.as_ptr(),
                    rows,
                    dense,
                    depth: depth.clone(),
                    b: b.panel(panel),
                    panel: b.step(),
                    to: Target {
                        // SAFETY: inside `out` by the caller's contract.
                        out: unsafe { out.ptr().add(example * out_batch + rows.out_start + panel * NR) },
                        step: rows.out_step,
                        width,
                        start,
                    },
                };
                let next_panel = b.panel(panel).wrapping_add(PANELS * b.step() + depth.start * NR);
                let per_tile = depth.len().div_ceil(n_tiles);
                let mut wanted = if panel + PANELS < panels.end { depth.len() } else { 0 };
                for i in 0..n_tiles {
                    let (row, m) = tile_rows(i);
                    let near = copies.then(|| copy[i * tile_len..].as_ptr());
                    let part = per_tile.min(wanted);
                    let ahead = Ahead {
                        // Below, or the next panel's columns of the first row.
                        out: match i + 1 < n_tiles {
                            true => tile.to.out.wrapping_add((row + m) * rows.out_step),
                            false => tile.to.out.wrapping_add(first * rows.out_step + PANELS * NR),
                        },
                        b: next_panel.wrapping_add((depth.len() - wanted) * NR),
                        rows: part,
                    };
                    wanted -= part;
                    // SAFETY: the caller's contract; tiles write rows and columns of their own.
                    unsafe {
                        if width > NR {
                            by_rows!(m, M => tile.run::<M, PANELS>(row, near, ahead));
                        } else {
                            by_rows!(m, M => tile.run::<M, 1>(row, near, ahead));
                        }
                    }
                }
            }
        }
    });
}

/// `to[p * 8 + j] = from[j][p]` for `p < k`.
///
/// # Safety
/// `k` elements must be readable at each of `from`.
unsafe fn side_by_side<T: Real>(from: [*const T; WIDE], k: usize, to: &mut [T]) {
    let whole = k / WIDE * WIDE;
    for p in (0..whole).step_by(WIDE) {
        let to = &mut to[p * WIDE..][..WIDE * WIDE];
        // SAFETY: eight elements each, by the contract and the slice.
        unsafe {
            let to = to.as_mut_ptr();
            T::transpose(from.map(|from| from.add(p)), std::array::from_fn(|i| to.add(i * WIDE)));
        }
    }
    for p in whole..k {
        for (to, from) in to[p * WIDE..][..WIDE].iter_mut().zip(from) {
            // SAFETY: the caller's contract.
            *to = unsafe { *from.add(p) };
        }
    }
}

struct Tile<'a, T> {
    x: *const T,
    zeros: *const T,
    rows: &'a Rows<'a>,
    dense: bool,
    /// The part of the depth to add.
    depth: std::ops::Range<usize>,
    b: *const T,
    /// Elements between panels.
    panel: usize,
    /// The columns of row 0.
    to: Target<T>,
}

impl<T: Real> Tile<'_, T> {
    /// # Safety
    /// As [`product`], for rows `row..row + M` and `P` panels; `near` is what [`side_by_side`] made of them.
    unsafe fn run<const M: usize, const P: usize>(
        &self,
        row: usize,
        near: Option<*const T>,
        ahead: Ahead<T>,
    ) {
        let rows = self.rows;
        let in_range = |r: isize| (0..rows.in_rows as isize).contains(&r);
        let base = (row * rows.in_step) as isize;
        let last = base + ((M - 1) * rows.in_step) as isize;
        let n_taps = rows.taps.len();
        let depth = self.depth.clone();
        // SAFETY: pointers are formed for rows in range only; the others read the row of zeros.
        unsafe {
            let to = Target { out: self.to.out.add(row * rows.out_step), ..self.to };
            let b = self.b.add(depth.start * NR);
            if let Some(near) = near {
                let a = std::array::from_fn(|i| near.add(i));
                T::tile::<M, P>(std::iter::once((a, depth.len())), WIDE, b, self.panel, to, ahead);
                return;
            }
            if self.dense
                && n_taps > 0
                && in_range(base + rows.taps[0])
                && in_range(last + rows.taps[n_taps - 1])
            {
                let a = std::array::from_fn(|i| {
                    let r = base + (i * rows.in_step) as isize + rows.taps[0];
                    self.x.offset(r * rows.in_stride as isize).add(depth.start)
                });
                T::tile::<M, P>(std::iter::once((a, depth.len())), 1, b, self.panel, to, ahead);
                return;
            }
            // Tap by tap; a tap's part of the depth may begin or end inside of it.
            let taps = match rows.width {
                0 => 0..0,
                width => depth.start / width..depth.end.div_ceil(width),
            };
            let segments = taps.map(|tap| {
                let (low, high) = (tap * rows.width, (tap + 1) * rows.width);
                let part = depth.start.max(low)..depth.end.min(high);
                let a = std::array::from_fn(|i| {
                    let r = base + (i * rows.in_step) as isize + rows.taps[tap];
                    if in_range(r) {
                        self.x.offset(r * rows.in_stride as isize).add(part.start - low)
                    } else {
                        self.zeros
                    }
                });
                (a, part.len())
            });
            T::tile::<M, P>(segments, 1, b, self.panel, to, ahead);
        }
    }
}

/// The gradient of [`product`]'s matrix: `dB[tap·width + i, j] = Σ_batch Σ_r x[r·in_step + tap, i] · g[r, j]`,
/// to `out` as `[taps · width, n]`, row-major; `add` to what it holds, for callers that are one task of many, or in its
/// place.
///
/// `g` holds the rows of the result's gradient: row `r` of an example starts at `r * out_step + out_start`.
///
/// # Safety
/// As for [`product`], with `g` in the place of `out`; `out` has `taps · width · n` elements, which hold numbers if `add`.
pub(crate) unsafe fn weight_gradient<T: Real>(
    x: &[T],
    g: &[T],
    n: usize,
    rows: &Rows,
    out: Shared<T>,
    add: bool,
) {
    assert!(!add || !rows.parallel);
    /// Panels that stay in the second-level cache while all tiles pass over them.
    const NEAR: usize = 32;
    let batch = rows.batch;
    let m = rows.taps.len() * rows.width;
    // Rows of `g` packed at a time: the sum is read and written once per chunk.
    let depth = rows.n_rows.div_ceil(rows.n_rows.div_ceil(256).max(1)).max(1);
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
                let to = &mut packed[(panel * depth + p) * NR..][..NR];
                to[..columns.len()].copy_from_slice(columns);
                to[columns.len()..].fill(T::ZERO);
            }
        }
    };
    let chunk_len = n_panels * depth * NR;
    // One task per chunk packs for itself; several share what is packed before.
    let packed_before = if row_parts > 1 {
        // SAFETY: each chunk has a range of its own; of it, only the rows written here are read.
        unsafe {
            filled(n_chunks * chunk_len, |all| {
                for_each(n_chunks, work.min(n_chunks * chunk_len), |chunk| {
                    pack(chunk, all.range(chunk * chunk_len, chunk_len));
                });
            })
        }
    } else {
        Vec::new()
    };

    let compute = |depth_part: usize, row_part: usize, sum: Shared<T>| {
        let m_range = (row_part * rows_per_part).min(m)..((row_part + 1) * rows_per_part).min(m);
        let chunks = depth_part * chunks_per_part..((depth_part + 1) * chunks_per_part).min(n_chunks);
        // The rows of a chunk that all taps see.
        let seen = |chunk: usize| {
            let first = (chunk % chunks_per_example) * depth;
            let end = (first + depth).min(rows.n_rows);
            (first.max(inner.0).min(end), end.min(inner.1).max(first))
        };
        // The first chunk's sums take the place of what is there, if they reach every element.
        let replaces = !add && chunks.clone().next().map(seen).is_some_and(|(r0, r1)| r0 < r1);
        if !add && !replaces {
            // SAFETY: the rows of this task, inside of the buffer.
            unsafe { sum.range(m_range.start * n, m_range.len() * n) }.fill(T::ZERO);
        }
        let mut own = vec![T::ZERO; if row_parts > 1 { 0 } else { chunk_len }];
        let mut copy = vec![T::ZERO; depth * WIDE];
        for chunk in chunks.clone() {
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
            let mut tile = |i: usize,
                            len: usize,
                            (r0, r1): (usize, usize),
                            panels: std::ops::Range<usize>,
                            start: Start<T>| unsafe {
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
                // Many panels: a copy side by side saves each of them the walk through distant cache lines.
                if panels.len() > 2 * PANELS {
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
                for panel in panels.step_by(PANELS) {
                    let width = (PANELS * NR).min(n - panel * NR);
                    let out = sum.ptr().add(i * n + panel * NR);
                    let to = Target { out, step: n, width, start };
                    // What the sums are added to is wanted when they are made; what is packed is near.
                    let ahead = Ahead { out, b: x, rows: 0 };
                    let b = packed.as_ptr().add((panel * depth + (r0 - first)) * NR);
                    if width > NR {
                        by_rows!(len, M => gradient_tile::<T, M, PANELS>(&a, k, step, b, depth * NR, to, ahead));
                    } else {
                        by_rows!(len, M => gradient_tile::<T, M, 1>(&a, k, step, b, depth * NR, to, ahead));
                    }
                }
            };
            let (r0, r1) = seen(chunk);
            if r0 < r1 {
                let start = if replaces && chunk == chunks.start { Start::Zero } else { Start::Added };
                for group in (0..n_panels).step_by(NEAR) {
                    for i in m_range.clone().step_by(MR) {
                        let panels = group..(group + NEAR).min(n_panels);
                        tile(i, MR.min(m_range.end - i), (r0, r1), panels, start);
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
                            tile(i, MR.min(i1 - i), (r0, r1), 0..n_panels, Start::Added);
                        }
                    }
                }
            }
        }
    };

    if depth_parts == 1 {
        for_each(row_parts, work, |row_part| compute(0, row_part, out));
        return;
    }
    // SAFETY: the tasks together write every part; tasks of one part write different rows.
    let parts = unsafe {
        filled(depth_parts * m * n, |parts| {
            for_each(depth_parts * row_parts, work, |task| {
                let (part, row_part) = (task / row_parts, task % row_parts);
                compute(part, row_part, parts.from(part * m * n));
            });
        })
    };
    super::for_chunks(m * n, super::CHUNK, depth_parts * m * n, |start, end| {
        // SAFETY: each task has elements of its own.
        let sum = unsafe { out.range(start, end - start) };
        sum.copy_from_slice(&parts[start..end]);
        for part in parts.chunks_exact(m * n).skip(1) {
            for (s, &p) in sum.iter_mut().zip(&part[start..end]) {
                *s += p;
            }
        }
    });
}

/// `M` rows of a gradient, `P` panels: `to[i] += Σ_p a[i][p · step] · b[p]`.
///
/// # Safety
/// As [`Real::tile`].
unsafe fn gradient_tile<T: Real, const M: usize, const P: usize>(
    a: &[*const T; MR],
    k: usize,
    step: usize,
    b: *const T,
    panel: usize,
    to: Target<T>,
    ahead: Ahead<T>,
) {
    // SAFETY: the caller's contract.
    unsafe {
        T::tile::<M, P>(std::iter::once((std::array::from_fn(|i| a[i]), k)), step, b, panel, to, ahead)
    };
}
