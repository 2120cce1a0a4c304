//! Matrix products of inputs rounded to bfloat16, summed in single precision: what a model in bfloat16 computes anyway.
//!
//! Twice as fast as single precision on CPUs with AVX512-BF16, where one instruction adds two products to each of 16
//! sums. Products are exact; only the inputs are rounded. Used for calibration, never for evaluation.
//!
//! Both operands are packed as pairs of consecutive terms, in panels of 12 rows and of 32 columns:
//! `a[panel][pair][12]`, `b[panel][pair][32]`, each element `first | second << 16`.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::Shared;
use crate::simd_fn;

/// Rows and columns of the tile that stays in registers.
const MR: usize = 12;
const NR: usize = 32;
/// Pairs that go through a tile before the next one is taken up: a panel of `b` then fits the first-level cache.
const PAIRS: usize = 256;
/// Rows of one task of a linear layer, and side of the squares of a Hessian.
const TASK_ROWS: usize = 8 * MR;
const SQUARE: usize = 192;

/// Whether this CPU has the instruction.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512bf16") && crate::simd::level() == crate::simd::Level::Avx512
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// The nearest bfloat16, ties to even, as its bits. NaN is not preserved.
#[inline(always)]
pub fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
}

/// `y = x wᵀ + bias`; `None` where the CPU lacks the instruction.
pub fn linear(x: ArrayView2<f32>, w: ArrayView2<f32>, bias: Option<&[f32]>) -> Option<Array2<f32>> {
    if !available() {
        return None;
    }
    let ([tokens, cols], outs) = ([x.nrows(), x.ncols()], w.nrows());
    let pairs = cols.div_ceil(2);
    let (x, w) = (x.to_slice()?, w.to_slice()?);
    let mut b = vec![0u32; outs.div_ceil(NR) * pairs * NR];
    b.par_chunks_exact_mut(pairs * NR).zip(w.par_chunks(NR * cols)).for_each(|(b, w)| pack_rows::<NR>(w, cols, b));
    let mut y = vec![0.0f32; tokens * outs];
    y.par_chunks_mut(TASK_ROWS * outs).zip(x.par_chunks(TASK_ROWS * cols)).for_each_init(Vec::new, |a, (y, x)| {
        let rows = x.len() / cols;
        a.clear();
        a.resize(rows.div_ceil(MR) * pairs * MR, 0);
        for (a, x) in a.chunks_exact_mut(pairs * MR).zip(x.chunks(MR * cols)) {
            pack_rows::<MR>(x, cols, a);
        }
        let c = Shared::new(y);
        for start in (0..pairs).step_by(PAIRS) {
            let count = PAIRS.min(pairs - start);
            for (panel, b) in b.chunks_exact(pairs * NR).enumerate() {
                let col = panel * NR;
                for (block, a) in a.chunks_exact(pairs * MR).enumerate() {
                    let row = block * MR;
                    let size = [MR.min(rows - row), NR.min(outs - col)];
                    let (a, b) = (&a[start * MR..][..count * MR], &b[start * NR..][..count * NR]);
                    // SAFETY: the tile lies in this task's rows of `y`.
                    unsafe { tile(a, b, c.at(row * outs + col), outs, size, start > 0) };
                }
            }
        }
        if let Some(bias) = bias {
            y.chunks_exact_mut(outs).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        }
    });
    Array2::from_shape_vec((tokens, outs), y).ok()
}

/// Adds `xᵀ x` to the lower triangle of `gram`; false where the CPU lacks the instruction. Above the diagonal is scratch.
pub fn gram(x: ArrayView2<f32>, gram: &mut Array2<f32>) -> bool {
    if !available() {
        return false;
    }
    let (tokens, cols) = (x.nrows(), x.ncols());
    let pairs = tokens.div_ceil(2);
    let (Some(x), Some(gram)) = (x.to_slice(), gram.as_slice_mut()) else { return false };
    let mut a = vec![0u32; cols.div_ceil(MR) * pairs * MR];
    let mut b = vec![0u32; cols.div_ceil(NR) * pairs * NR];
    a.par_chunks_exact_mut(pairs * MR).enumerate().for_each(|(panel, a)| pack_columns::<MR>(x, cols, panel * MR, a));
    b.par_chunks_exact_mut(pairs * NR).enumerate().for_each(|(panel, b)| pack_columns::<NR>(x, cols, panel * NR, b));
    let mut tasks: Vec<(usize, usize)> =
        (0..cols).step_by(SQUARE).flat_map(|row| (0..=row).step_by(SQUARE).map(move |col| (row, col))).collect();
    tasks.sort_by_key(|(row, col)| row == col);
    let c = Shared::new(gram);
    tasks.into_par_iter().with_max_len(1).for_each(|(first_row, first_col)| {
        for start in (0..pairs).step_by(PAIRS) {
            let count = PAIRS.min(pairs - start);
            for col in (first_col..cols.min(first_col + SQUARE)).step_by(NR) {
                let b = &b[(col / NR * pairs + start) * NR..][..count * NR];
                for row in (first_row..cols.min(first_row + SQUARE)).step_by(MR) {
                    if col > row + MR - 1 {
                        continue;
                    }
                    let a = &a[(row / MR * pairs + start) * MR..][..count * MR];
                    let size = [MR.min(cols - row), NR.min(cols - col)];
                    // SAFETY: the tile lies in this task's square.
                    unsafe { tile(a, b, c.at(row * cols + col), cols, size, true) };
                }
            }
        }
    });
    true
}

/// Packs up to `R` rows of `x` `[rows, cols]` as pairs along the row: `out[pair][row]`.
fn pack_rows<const R: usize>(x: &[f32], cols: usize, out: &mut [u32]) {
    for (row, values) in x.chunks_exact(cols).enumerate() {
        let mut pairs = values.chunks_exact(2);
        for (pair, slot) in pairs.by_ref().zip(out.chunks_exact_mut(R)) {
            slot[row] = round(pair[0]) | round(pair[1]) << 16;
        }
        if let [last] = pairs.remainder() {
            out[cols / 2 * R + row] = round(*last);
        }
    }
}

/// Packs columns `first..first + R` of `x` `[tokens, cols]` as pairs of tokens: `out[pair][column]`.
fn pack_columns<const R: usize>(x: &[f32], cols: usize, first: usize, out: &mut [u32]) {
    let width = R.min(cols - first);
    for (rows, slot) in x.chunks(2 * cols).zip(out.chunks_exact_mut(R)) {
        let upper = &rows[first..][..width];
        if rows.len() > cols {
            join(upper, &rows[cols + first..][..width], slot);
        } else {
            slot.iter_mut().zip(upper).for_each(|(s, x)| *s = round(*x));
        }
    }
}

simd_fn! {
    fn join(first: &[f32], second: &[f32], out: &mut [u32]) {
        for ((o, a), b) in out.iter_mut().zip(first).zip(second) {
            *o = round(*a) | round(*b) << 16;
        }
    }
}

/// `c[..m, ..n] ← a b`, or `c + a b` to `add`: `a` is `[pairs][12]`, `b` `[pairs][32]`, `c` has rows `stride` apart.
///
/// # Safety
/// `c` points to `m` rows of `n` values that no other task touches, and the CPU has the instruction.
unsafe fn tile(a: &[u32], b: &[u32], c: *mut f32, stride: usize, [m, n]: [usize; 2], add: bool) {
    debug_assert_eq!(a.len() / MR, b.len() / NR);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; a ragged tile goes through a whole one of its own.
    unsafe {
        if m == MR && n == NR {
            x86::tile(a, b, c, stride, add);
            return;
        }
        let mut whole = [0.0f32; MR * NR];
        x86::tile(a, b, whole.as_mut_ptr(), NR, false);
        for (row, values) in whole.chunks_exact(NR).enumerate().take(m) {
            let target = std::slice::from_raw_parts_mut(c.add(row * stride), n);
            target.iter_mut().zip(values).for_each(|(c, v)| *c = if add { *c + v } else { *v });
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (c, stride, m, n, add);
        unreachable!("available() was false");
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{MR, NR};

    /// A whole tile.
    ///
    /// # Safety
    /// As [`super::tile`], with `m = 12` and `n = 32`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn tile(a: &[u32], b: &[u32], c: *mut f32, stride: usize, add: bool) {
        let pair = |v: __m512i| -> __m512bh {
            // SAFETY: both are 64 bytes of bits.
            unsafe { std::mem::transmute(v) }
        };
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
            // SAFETY: a chunk of `b` holds two vectors.
            let (low, high) = unsafe {
                (pair(_mm512_loadu_si512(b.as_ptr().cast())), pair(_mm512_loadu_si512(b.as_ptr().add(16).cast())))
            };
            for row in 0..MR {
                let value = pair(_mm512_set1_epi32(a[row] as i32));
                sums[row][0] = _mm512_dpbf16_ps(sums[row][0], value, low);
                sums[row][1] = _mm512_dpbf16_ps(sums[row][1], value, high);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let target = c.add(row * stride + 16 * half);
                    let value = if add { _mm512_add_ps(_mm512_loadu_ps(target), *sum) } else { *sum };
                    _mm512_storeu_ps(target, value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Noise;
    use super::*;

    fn rounded(x: &Array2<f32>) -> Array2<f32> {
        x.mapv(|v| f32::from_bits(round(v) << 16))
    }

    #[test]
    fn rounding_is_that_of_the_type() {
        let mut noise = Noise(20);
        for x in (0..1000).map(|_| noise.next()).chain([0.0, -0.0, 257.0 / 256.0, 259.0 / 256.0, 3e38, 1e-40]) {
            assert_eq!(round(x), u32::from(half::bf16::from_f32(x).to_bits()), "{x}");
        }
    }

    #[test]
    fn products_are_exact_for_rounded_inputs() {
        if !available() {
            eprintln!("skipped: this CPU has no AVX512-BF16");
            return;
        }
        let mut noise = Noise(21);
        for (tokens, cols, outs) in [(1, 1, 1), (13, 7, 33), (12, 1030, 32), (100, 96, 70), (97, 515, 31)] {
            let (x, w) = (noise.matrix(tokens, cols), noise.matrix(outs, cols));
            let bias: Vec<f32> = (0..outs).map(|_| noise.next()).collect();
            let fast = linear(x.view(), w.view(), Some(&bias)).unwrap();
            let slow = super::super::linear::reference(rounded(&x).view(), rounded(&w).view(), Some(&bias));
            super::super::testing::close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);

            let mut found = Array2::zeros((cols, cols));
            assert!(gram(x.view(), &mut found) && gram(x.view(), &mut found));
            let expected = super::super::gram::reference(rounded(&x).view()) * 2.0;
            for i in 0..cols {
                for j in 0..=i {
                    let (f, e) = (found[[i, j]], expected[[i, j]]);
                    assert!((f - e).abs() <= 1e-5 * (tokens as f32).sqrt(), "[{i}, {j}] of {cols}: {f}, not {e}");
                }
            }
        }
    }
}
