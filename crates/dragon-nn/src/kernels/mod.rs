//! What the fast CPU operations share: float functions, uninitialised output buffers, parallel loops whose results
//! never depend on the number of threads, and the matrix products.

pub(crate) mod conv;
pub(crate) mod correlation;
pub(crate) mod gemm;
pub(crate) mod norm;
pub(crate) mod packed;
mod real;

pub(crate) use real::Real;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor};
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Deref;

/// Elements of an element-wise loop that one task takes: 64 KiB of f32, well inside the second-level cache.
pub(crate) const CHUNK: usize = 1 << 14;

/// Whether the fast kernels take these tensors: all on the CPU, all of one dtype, f32 or f64.
pub(crate) fn fast(tensors: &[&Tensor]) -> bool {
    let dtype = tensors[0].dtype();
    matches!(dtype, DType::F32 | DType::F64)
        && tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == dtype)
}

/// The elements of a contiguous tensor, for as long as this value lives.
pub(crate) struct View<'a, T> {
    storage: StorageRef<'a>,
    start: usize,
    end: usize,
    dtype: PhantomData<T>,
}

impl<T: Real> Deref for View<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(storage) => {
                &storage.as_slice::<T>().expect("checked by `view`")[self.start..self.end]
            }
            _ => unreachable!("checked by `view`"),
        }
    }
}

/// Borrows the elements of a contiguous CPU tensor of dtype `T`.
pub(crate) fn view<T: Real>(t: &Tensor) -> Result<View<'_, T>> {
    let (storage, layout) = t.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("expected a contiguous tensor, got {:?}", t.layout())
    };
    match &*storage {
        Storage::Cpu(cpu) => cpu.as_slice::<T>().map(|_| ())?,
        _ => candle_core::bail!("expected a tensor on the CPU"),
    }
    Ok(View { storage, start, end, dtype: PhantomData })
}

/// The elements behind a storage and layout, which must be contiguous.
pub(crate) fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("expected a contiguous tensor, got {layout:?}")
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// The dtype of a storage.
pub(crate) fn dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// A CPU tensor that owns `data`.
pub(crate) fn tensor<T: Real>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

/// Evaluates an expression in which `$t` stands for `f32` or `f64`, by a dtype.
macro_rules! by_dtype {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            other => candle_core::bail!("the CPU kernels take f32 and f64, got {other:?}"),
        }
    };
}
pub(crate) use by_dtype;

/// A pointer that tasks share; each writes elements no other touches.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: the pointer itself may cross threads; every use keeps the written ranges apart.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn ptr(self) -> *mut T {
        self.0
    }

    /// The buffer from an element on.
    ///
    /// # Safety
    /// The element must lie inside the buffer.
    pub(crate) unsafe fn from(self, start: usize) -> Self {
        // SAFETY: the caller's contract.
        Shared(unsafe { self.0.add(start) })
    }

    /// # Safety
    /// The range must lie inside the buffer and overlap no range another task uses at the same time.
    pub(crate) unsafe fn range<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// A vector of `len` elements that `fill` writes completely; saves zeroing what is overwritten anyway.
///
/// # Safety
/// `fill` must write every element and read none before it wrote it.
pub(crate) unsafe fn filled<T: Real>(len: usize, fill: impl FnOnce(Shared<T>)) -> Vec<T> {
    let mut data: Vec<T> = Vec::with_capacity(len);
    fill(Shared(data.as_mut_ptr()));
    // SAFETY: the caller wrote all of them.
    unsafe { data.set_len(len) };
    data
}

/// A zeroed vector and its pointer's use by tasks.
pub(crate) fn shared<T>(data: &mut [T]) -> Shared<T> {
    Shared(data.as_mut_ptr())
}

/// Runs `f(0..n)`, on several threads if `work` (an estimate in simple operations) is worth it.
pub(crate) fn for_each(n: usize, work: usize, f: impl Fn(usize) + Sync + Send) {
    // A parallel call costs about ten microseconds, some 30 000 simple operations.
    if n < 2 || work < 1 << 16 || rayon::current_num_threads() == 1 {
        (0..n).for_each(f);
    } else {
        (0..n).into_par_iter().for_each(f);
    }
}

/// Splits `0..len` into chunks of `chunk` and runs `f(start, end)` on each, in parallel.
pub(crate) fn for_chunks(len: usize, chunk: usize, work: usize, f: impl Fn(usize, usize) + Sync + Send) {
    for_each(len.div_ceil(chunk), work, |i| f(i * chunk, ((i + 1) * chunk).min(len)));
}

/// `y[i] = f(x[i])`.
pub(crate) fn map<T: Real>(x: &[T], f: impl Fn(T) -> T + Sync + Send) -> Vec<T> {
    // SAFETY: the chunks cover the vector.
    unsafe {
        filled(x.len(), |y| {
            for_chunks(x.len(), CHUNK, x.len() * 8, |start, end| {
                for (y, &x) in y.range(start, end - start).iter_mut().zip(&x[start..end]) {
                    *y = f(x);
                }
            });
        })
    }
}

/// `z[i] = f(x[i], y[i])`.
pub(crate) fn map2<T: Real>(x: &[T], y: &[T], f: impl Fn(T, T) -> T + Sync + Send) -> Vec<T> {
    assert_eq!(x.len(), y.len());
    // SAFETY: the chunks cover the vector.
    unsafe {
        filled(x.len(), |z| {
            for_chunks(x.len(), CHUNK, x.len() * 8, |start, end| {
                let z = z.range(start, end - start);
                for ((z, &x), &y) in z.iter_mut().zip(&x[start..end]).zip(&y[start..end]) {
                    *z = f(x, y);
                }
            });
        })
    }
}

/// Adds up `n_parts` vectors of length `len`, in order, each produced by `f(part, &mut zeroed)` on some thread.
pub(crate) fn ordered_sum<T: Real>(
    n_parts: usize,
    len: usize,
    work: usize,
    f: impl Fn(usize, &mut [T]) + Sync + Send,
) -> Vec<T> {
    let mut parts = vec![T::ZERO; n_parts.max(1) * len];
    let pointer = shared(&mut parts);
    // SAFETY: each task has a range of its own.
    for_each(n_parts, work, |i| f(i, unsafe { pointer.range(i * len, len) }));
    let (sum, rest) = parts.split_at_mut(len);
    for part in rest.chunks_exact(len.max(1)) {
        for (s, &p) in sum.iter_mut().zip(part) {
            *s += p;
        }
    }
    parts.truncate(len);
    parts
}

/// Sums of the columns of `[rows, cols]`, in an order fixed by the shape.
pub(crate) fn column_sums<T: Real>(x: &[T], cols: usize) -> Vec<T> {
    let rows = x.len() / cols.max(1);
    let rows_per_part = rows_per_part(rows);
    ordered_sum(rows.div_ceil(rows_per_part), cols, x.len(), |part, sum| {
        let end = ((part + 1) * rows_per_part).min(rows);
        for row in x[part * rows_per_part * cols..end * cols].chunks_exact(cols) {
            for (s, &v) in sum.iter_mut().zip(row) {
                *s += v;
            }
        }
    })
}

/// Rows per partial sum: at most 32 parts, so that the parts stay small beside what they add up.
pub(crate) fn rows_per_part(rows: usize) -> usize {
    rows.div_ceil(32).max(64)
}

/// `Σ f(i)` over `0..n` in sixteen interleaved sums, added up pairwise: a fixed order that vectorises.
#[inline(always)]
pub(crate) fn lane_sum<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; 16];
    let mut start = 0;
    // In this form the compiler sees that `start + j` stays below `n`, and checks no index.
    while n - start >= 16 {
        for j in 0..16 {
            lanes[j] += f(start + j);
        }
        start += 16;
    }
    for i in start..n {
        lanes[i - start] += f(i);
    }
    fold(lanes)
}

/// `Σ x[i] y[i]` in sixteen interleaved sums, added up pairwise.
#[inline(always)]
pub(crate) fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    let mut lanes = [T::ZERO; 16];
    let (xs, ys) = (x.chunks_exact(16), y.chunks_exact(16));
    for (j, (&x, &y)) in xs.remainder().iter().zip(ys.remainder()).enumerate() {
        lanes[j] = x * y;
    }
    for (x, y) in xs.zip(ys) {
        for j in 0..16 {
            lanes[j] = x[j].fma(y[j], lanes[j]);
        }
    }
    fold(lanes)
}

/// The sum of sixteen numbers, pairwise.
#[inline(always)]
pub(crate) fn fold<T: Real>(mut lanes: [T; 16]) -> T {
    for width in [8, 4, 2, 1] {
        for j in 0..width {
            let other = lanes[j + width];
            lanes[j] += other;
        }
    }
    lanes[0]
}

/// The largest element; `-inf` of none.
#[inline(always)]
pub(crate) fn lane_max<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = v.max_(*lane);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane = v.max_(*lane);
    }
    lanes.into_iter().fold(T::NEG_INFINITY, |a, b| b.max_(a))
}

/// Rows of `cols` elements that one task of a row-wise operation takes.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (CHUNK / cols.max(1)).max(1)
}
