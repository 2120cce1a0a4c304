//! Matrix products of inputs rounded to bfloat16, summed in single precision: what a model in bfloat16 computes anyway.
//!
//! Twice as fast as single precision on CPUs with AVX512-BF16, where one instruction adds two products to each of 16
//! sums. Products are exact; only the inputs are rounded. Used for calibration, never for evaluation.
//!
//! The left operand is read as it lies, [`Rows`]; the right one in [`Panels`] of a few vectors of columns, each element a
//! pair of consecutive terms, `first | second << 16`.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::{Shared, activation};
use crate::backend::Activation;
use crate::simd_fn;

/// Rows of the tile that stays in registers, and vectors in a row of it.
const MR: usize = 8;
const NV: usize = 3;
/// Columns of a panel.
const NR: usize = 16 * NV;
/// Most pairs that go through a tile before the next one is taken up.
const PAIRS: usize = 320;
/// Rows of one task of a linear layer, and side of the squares of a Hessian.
const TASK_ROWS: usize = 64;
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
    round_up(x) >> 16
}

/// The same in the upper half; the lower half holds rubbish.
#[inline(always)]
fn round_up(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + ((bits >> 16) & 1))
}

simd_fn! {
    /// Rounds `x` into pairs, `first | second << 16`; the last of an odd number is paired with 0.
    pub(super) fn round_pairs(x: &[f32], out: &mut [u32]) {
        let pairs = x.chunks_exact(2);
        if let ([last], Some(slot)) = (pairs.remainder(), out.get_mut(x.len() / 2)) {
            *slot = round(*last);
        }
        for (slot, pair) in out.iter_mut().zip(pairs) {
            *slot = round(pair[0]) | (round_up(pair[1]) & 0xffff_0000);
        }
    }
}

/// A matrix `[rows, cols]` in bfloat16, row after row.
#[derive(Clone, Debug)]
pub struct Rows {
    /// Pairs of values, rows `stride` apart; at least [`MR`] − 1 rows of anything after the last.
    data: Vec<u32>,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Rows {
    /// Zeros.
    pub(super) fn zeros(rows: usize, cols: usize) -> Rows {
        let mut stride = cols.div_ceil(2);
        // Rows whole pages apart would share one set of the first-level cache.
        if stride.is_multiple_of(512) {
            stride += 16;
        }
        Rows { data: vec![0; rows.next_multiple_of(MR) * stride], rows, cols, stride }
    }

    /// Rounds `x`.
    pub fn of(x: ArrayView2<f32>) -> Rows {
        let mut rows = Rows::zeros(x.nrows(), x.ncols());
        if let (false, Some(x)) = (x.is_empty(), x.to_slice()) {
            let (cols, stride) = (rows.cols, rows.stride);
            rows.data.par_chunks_mut(TASK_ROWS * stride).zip(x.par_chunks(TASK_ROWS * cols)).for_each(|(out, x)| {
                out.chunks_exact_mut(stride).zip(x.chunks_exact(cols)).for_each(|(out, x)| round_pairs(x, out));
            });
        }
        rows
    }

    /// The pairs, and how far apart rows are.
    pub(super) fn parts_mut(&mut self) -> (&mut [u32], usize) {
        (&mut self.data, self.stride)
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The values, widened.
    pub fn widen(&self) -> Array2<f32> {
        Array2::from_shape_fn((self.rows, self.cols), |(row, col)| {
            let pair = self.data[row * self.stride + col / 2];
            f32::from_bits(if col % 2 == 0 { pair << 16 } else { pair & 0xffff_0000 })
        })
    }

    /// Adds `Σ|x|` and `Σ x²` of each column to `magnitude` and `energy`.
    pub fn moments(&self, magnitude: &mut [f64], energy: &mut [f64]) {
        let (cols, stride) = (self.cols, self.stride);
        let partial: Vec<[Vec<f32>; 2]> = self.data[..self.rows * stride]
            .par_chunks(stride * 512)
            .map(|rows| {
                let [mut first, mut second] = [vec![0.0f32; 2 * stride], vec![0.0f32; 2 * stride]];
                for row in rows.chunks_exact(stride) {
                    for ((first, second), pair) in first.chunks_exact_mut(2).zip(second.chunks_exact_mut(2)).zip(row) {
                        for (side, bits) in [pair << 16, pair & 0xffff_0000].into_iter().enumerate() {
                            let x = f32::from_bits(bits);
                            first[side] += x.abs();
                            second[side] += x * x;
                        }
                    }
                }
                [first, second]
            })
            .collect();
        for [first, second] in partial {
            magnitude.iter_mut().zip(&first[..cols]).for_each(|(sum, x)| *sum += f64::from(*x));
            energy.iter_mut().zip(&second[..cols]).for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }
}

/// A weight matrix `[outs, cols]` in bfloat16, in panels of 48 rows: `[panel][pair][48]`.
#[derive(Clone, Debug)]
pub struct Panels {
    data: Vec<u32>,
    outs: usize,
    cols: usize,
}

impl Panels {
    /// Rounds and packs `w`.
    pub fn of(w: ArrayView2<f32>) -> Panels {
        let (outs, cols) = (w.nrows(), w.ncols());
        let pairs = cols.div_ceil(2);
        let mut data = vec![0u32; outs.div_ceil(NR) * pairs * NR];
        if let (false, Some(w)) = (w.is_empty(), w.to_slice()) {
            data.par_chunks_exact_mut(pairs * NR)
                .zip(w.par_chunks(NR * cols))
                .for_each(|(panel, w)| pack_rows::<NR>(w, cols, panel));
        }
        Panels { data, outs, cols }
    }

    /// `[outs, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.outs, self.cols]
    }

    fn panel(&self, index: usize) -> &[u32] {
        let pairs = self.cols.div_ceil(2);
        &self.data[index * pairs * NR..][..pairs * NR]
    }
}

/// Pairs in equal pieces of at most [`PAIRS`]: start and length.
fn pieces(pairs: usize) -> impl Iterator<Item = (usize, usize)> {
    let size = pairs.div_ceil(pairs.div_ceil(PAIRS).max(1)).max(1);
    (0..pairs).step_by(size).map(move |start| (start, size.min(pairs - start)))
}

/// `c[..rows, ..outs] ← x[first..][..rows] · panelᵀ`, or added to `c`.
///
/// # Safety
/// `c` is this task's own, `rows` rows `stride` apart; the rows lie in `x`, and the CPU has the instruction.
unsafe fn strip(
    x: &Rows,
    first: usize,
    rows: usize,
    panel: &[u32],
    c: *mut f32,
    stride: usize,
    outs: usize,
    add: bool,
) {
    for (start, count) in pieces(panel.len() / NR) {
        for row in (0..rows).step_by(MR) {
            let size = [MR.min(rows - row), outs];
            // SAFETY: `x` is padded to whole tiles; the caller's promise for `c`.
            unsafe {
                let a = x.data.as_ptr().add((first + row) * x.stride + start);
                let b = &panel[start * NR..][..count * NR];
                tile::<NV>(a, [x.stride, 1], b, c.add(row * stride), stride, size, add || start > 0);
            }
        }
    }
}

/// `y = x wᵀ + bias`, or that added to `y`.
fn product(x: &Rows, w: &Panels, bias: Option<&[f32]>, y: Shared<f32>, add: bool) {
    assert!(available() && x.cols == w.cols, "checked by the caller");
    let outs = w.outs;
    (0..x.rows.div_ceil(TASK_ROWS)).into_par_iter().with_max_len(1).for_each(|task| {
        let first = task * TASK_ROWS;
        let rows = TASK_ROWS.min(x.rows - first);
        for col in (0..outs).step_by(NR) {
            let width = NR.min(outs - col);
            // SAFETY: every task writes its own rows of `y`.
            unsafe { strip(x, first, rows, w.panel(col / NR), y.at(first * outs + col), outs, width, add) };
        }
        if let Some(bias) = bias {
            for row in first..first + rows {
                // SAFETY: as above; the row has been written.
                let y = unsafe { std::slice::from_raw_parts_mut(y.at(row * outs), outs) };
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    });
}

/// `y = x wᵀ + bias`.
///
/// # Panics
/// Where the CPU lacks the instruction, or if the widths differ.
pub fn linear(x: &Rows, w: &Panels, bias: Option<&[f32]>) -> Array2<f32> {
    let mut y: Vec<f32> = Vec::with_capacity(x.rows * w.outs);
    if x.cols == 0 {
        y.resize(x.rows * w.outs, 0.0);
    }
    product(x, w, bias, Shared(y.as_mut_ptr()), false);
    // SAFETY: every value has been written: tasks cover all rows, panels all columns.
    unsafe { y.set_len(x.rows * w.outs) };
    Array2::from_shape_vec((x.rows, w.outs), y).expect("one value a token and output")
}

/// `y ← y + x wᵀ + bias`.
///
/// # Panics
/// As [`linear`], or if `y` is not `[tokens, outs]`.
pub fn add_linear(x: &Rows, w: &Panels, bias: Option<&[f32]>, y: &mut Array2<f32>) {
    assert_eq!(y.dim(), (x.rows, w.outs), "checked by the caller");
    product(x, w, bias, Shared::new(y.as_slice_mut().expect("a contiguous matrix")), true);
}

/// `act(x gᵀ + b) · (x uᵀ + b)` for `[gate, up]`, a panel of both at a time, so that neither ever leaves the cache.
///
/// # Panics
/// As [`linear`], or if the two weights differ in shape.
pub fn gated(x: &Rows, weights: [&Panels; 2], biases: [Option<&[f32]>; 2], activation: Activation) -> Rows {
    fused(x, weights, biases, |[gate, up]| activation::gate_chunk(activation, gate, up))
}

/// `act(x wᵀ + b)`, likewise.
///
/// # Panics
/// As [`linear`].
pub fn activated(x: &Rows, w: &Panels, bias: Option<&[f32]>, activation: Activation) -> Rows {
    fused(x, [w], [bias], |[y]| activation::run_chunk(activation, y))
}

/// What `finish` makes, in the first of its slices, of a few rows of a panel of every product.
fn fused<const N: usize>(
    x: &Rows,
    weights: [&Panels; N],
    biases: [Option<&[f32]>; N],
    finish: impl Fn([&mut [f32]; N]) + Sync,
) -> Rows {
    let shape = [weights[0].outs, x.cols];
    assert!(available() && weights.iter().all(|w| w.shape() == shape), "checked by the caller");
    let outs = shape[0];
    let mut out = Rows::zeros(x.rows, outs);
    let stride = out.stride;
    let tasks = out.data.par_chunks_mut(TASK_ROWS * stride).take(x.rows.div_ceil(TASK_ROWS)).enumerate();
    tasks.with_max_len(1).for_each_init(
        || [(); N].map(|()| vec![0.0f32; TASK_ROWS * NR]),
        |scratch, (task, out)| {
            let first = task * TASK_ROWS;
            let rows = TASK_ROWS.min(x.rows - first);
            for col in (0..outs).step_by(NR) {
                let width = NR.min(outs - col);
                for ((weight, bias), c) in weights.into_iter().zip(biases).zip(&mut *scratch) {
                    // SAFETY: the scratch is this task's, and holds the strip.
                    unsafe { strip(x, first, rows, weight.panel(col / NR), c.as_mut_ptr(), NR, NR, false) };
                    if let Some(bias) = bias {
                        for row in c.chunks_exact_mut(NR) {
                            row.iter_mut().zip(&bias[col..]).for_each(|(y, b)| *y += b);
                        }
                    }
                }
                finish(scratch.each_mut().map(|c| &mut c[..rows * NR]));
                for (y, out) in scratch[0].chunks_exact(NR).zip(out.chunks_exact_mut(stride)).take(rows) {
                    round_pairs(&y[..width], &mut out[col / 2..]);
                }
            }
        },
    );
    out
}

/// Adds `xᵀ x` to the lower triangle of `gram`. Above the diagonal is scratch.
///
/// # Panics
/// Where the CPU lacks the instruction, or if `gram` does not have `x`'s width.
pub fn gram(x: &Rows, gram: &mut Array2<f32>) {
    assert!(available() && gram.dim() == (x.cols, x.cols), "checked by the caller");
    let (tokens, cols) = (x.rows, x.cols);
    let pairs = tokens.div_ceil(2);
    let mut panels = vec![0u32; cols.div_ceil(NR) * pairs * NR];
    panels.par_chunks_exact_mut(pairs * NR).enumerate().for_each(|(panel, out)| {
        let (first, width) = (panel * NR / 2, NR.min(cols - panel * NR).div_ceil(2));
        for (pair, slot) in out.chunks_exact_mut(NR).enumerate() {
            let upper = &x.data[2 * pair * x.stride + first..][..width];
            if 2 * pair + 1 < tokens {
                interleave(upper, &x.data[(2 * pair + 1) * x.stride + first..][..width], slot);
            } else {
                slot.chunks_exact_mut(2).zip(upper).for_each(|(s, x)| (s[0], s[1]) = (x & 0xffff, x >> 16));
            }
        }
    });
    let mut tasks: Vec<(usize, usize)> =
        (0..cols).step_by(SQUARE).flat_map(|row| (0..=row).step_by(SQUARE).map(move |col| (row, col))).collect();
    tasks.sort_by_key(|(row, col)| row == col);
    let c = Shared::new(gram.as_slice_mut().expect("a contiguous matrix"));
    tasks.into_par_iter().with_max_len(1).for_each(|(first_row, first_col)| {
        for (start, count) in pieces(pairs) {
            for col in (first_col..cols.min(first_col + SQUARE)).step_by(NR) {
                let b = &panels[(col / NR * pairs + start) * NR..][..count * NR];
                for row in (first_row..cols.min(first_row + SQUARE)).step_by(MR) {
                    if row + MR <= col {
                        continue;
                    }
                    // Rows of the tile are columns of a panel: MR divides NR.
                    let a = &panels[(row / NR * pairs + start) * NR + row % NR..];
                    let size = [MR.min(cols - row), NR.min(cols - col)];
                    // SAFETY: the tile lies in this task's square, and `count` pairs of the panel follow `a`.
                    unsafe { tile::<NV>(a.as_ptr(), [1, NR], b, c.at(row * cols + col), cols, size, true) };
                }
            }
        }
    });
}

simd_fn! {
    /// From pairs of columns of two rows to pairs of rows of each column.
    fn interleave(first: &[u32], second: &[u32], out: &mut [u32]) {
        for ((out, a), b) in out.chunks_exact_mut(2).zip(first).zip(second) {
            out[0] = (a & 0xffff) | b << 16;
            out[1] = a >> 16 | (b & 0xffff_0000);
        }
    }
}

/// Packs up to `R` rows of `x` `[rows, cols]` as pairs along the row: `out[pair][row]`.
pub(super) fn pack_rows<const R: usize>(x: &[f32], cols: usize, out: &mut [u32]) {
    for (row, values) in x.chunks_exact(cols).enumerate() {
        pack_row::<R>(values, row, out);
    }
}

/// Packs one row: `out[pair][row]`.
#[inline(always)]
pub(super) fn pack_row<const R: usize>(values: &[f32], row: usize, out: &mut [u32]) {
    let mut pairs = values.chunks_exact(2);
    for (pair, slot) in pairs.by_ref().zip(out.chunks_exact_mut(R)) {
        slot[row] = round(pair[0]) | round(pair[1]) << 16;
    }
    if let [last] = pairs.remainder() {
        out[values.len() / 2 * R + row] = round(*last);
    }
}

/// `c[..m, ..n] ← a b`, or `c + a b` to `add`, for `m` up to 8 and `n` up to `16 V`.
///
/// The pair `p` of row `r` of `a` is at `a + r·strides[0] + p·strides[1]`; `b` is `[pairs][16 V]`; `c` has rows `stride`
/// apart.
///
/// # Safety
/// All 8 rows of `a` can be read, `c` points to `m` rows of `n` values that no other task touches, and the CPU has the
/// instruction.
pub(super) unsafe fn tile<const V: usize>(
    a: *const u32,
    strides: [usize; 2],
    b: &[u32],
    c: *mut f32,
    stride: usize,
    [m, n]: [usize; 2],
    add: bool,
) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; a ragged tile goes through a whole one of its own.
    unsafe {
        if m == MR && n == 16 * V {
            x86::tile::<V>(a, strides, b, c, stride, add);
            return;
        }
        let mut whole = [0.0f32; MR * NR];
        x86::tile::<V>(a, strides, b, whole.as_mut_ptr(), 16 * V, false);
        for (row, values) in whole.chunks_exact(16 * V).enumerate().take(m) {
            let target = c.add(row * stride);
            for (col, value) in values[..n].iter().enumerate() {
                *target.add(col) = if add { *target.add(col) + value } else { *value };
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (a, strides, b, c, stride, m, n, add);
        unreachable!("available() was false");
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::MR;

    /// A whole tile.
    ///
    /// # Safety
    /// As [`super::tile`], with `m = 8` and `n = 16 V`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn tile<const V: usize>(
        a: *const u32,
        strides: [usize; 2],
        b: &[u32],
        c: *mut f32,
        stride: usize,
        add: bool,
    ) {
        let pair = |v: __m512i| -> __m512bh {
            // SAFETY: both are 64 bytes of bits.
            unsafe { std::mem::transmute(v) }
        };
        let mut sums = [[_mm512_setzero_ps(); V]; MR];
        let mut a = a;
        for b in b.chunks_exact(16 * V) {
            // SAFETY: a chunk of `b` holds `V` vectors; the caller's promise for `a`.
            unsafe {
                let mut right = [_mm512_set1_epi32(0); V];
                for (v, right) in right.iter_mut().enumerate() {
                    *right = _mm512_loadu_si512(b.as_ptr().add(16 * v).cast());
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = pair(_mm512_set1_epi32(*a.add(row * strides[0]) as i32));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_dpbf16_ps(*sum, value, pair(right));
                    }
                }
                a = a.add(strides[1]);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (part, sum) in sums.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let target = c.add(row * stride + 16 * part);
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
            let (rows, panels) = (Rows::of(x.view()), Panels::of(w.view()));
            assert_eq!(rows.widen(), rounded(&x));
            let mut fast = linear(&rows, &panels, Some(&bias));
            let slow = super::super::linear::reference(rounded(&x).view(), rounded(&w).view(), Some(&bias));
            super::super::testing::close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
            add_linear(&rows, &panels, None, &mut fast);
            let twice = &slow * 2.0 - &Array2::from_shape_fn(slow.dim(), |(_, out)| bias[out]);
            super::super::testing::close(fast.as_slice().unwrap(), twice.as_slice().unwrap(), 4e-6);

            let up = noise.matrix(outs, cols);
            let panels = [panels, Panels::of(up.view())];
            let up = super::super::linear::reference(rounded(&x).view(), rounded(&up).view(), None);
            for activation in activation::ALL {
                let found = gated(&rows, panels.each_ref(), [Some(&bias), None], activation).widen();
                let expected = |g: &f32, u: &f32| activation::gate_reference(activation, *g, *u);
                let expected = ndarray::Zip::from(&slow).and(&up).map_collect(expected);
                super::super::testing::close(found.as_slice().unwrap(), expected.as_slice().unwrap(), 5e-3);
                let found = activated(&rows, &panels[0], Some(&bias), activation).widen();
                let expected = slow.mapv(|x| activation::reference(activation, x));
                super::super::testing::close(found.as_slice().unwrap(), expected.as_slice().unwrap(), 5e-3);
            }

            let mut found = Array2::zeros((cols, cols));
            gram(&rows, &mut found);
            gram(&rows, &mut found);
            let [mut magnitude, mut energy] = [vec![0.0; cols], vec![0.0; cols]];
            rows.moments(&mut magnitude, &mut energy);
            let expected = super::super::gram::reference(rounded(&x).view()) * 2.0;
            for i in 0..cols {
                for j in 0..=i {
                    let (f, e) = (found[[i, j]], expected[[i, j]]);
                    assert!((f - e).abs() <= 1e-5 * (tokens as f32).sqrt(), "[{i}, {j}] of {cols}: {f}, not {e}");
                }
                let first: f32 = rounded(&x).column(i).iter().map(|v| v.abs()).sum();
                assert!((magnitude[i] as f32 - first).abs() <= 1e-5 * first);
                assert!((energy[i] as f32 - expected[[i, i]] / 2.0).abs() <= 1e-5 * expected[[i, i]]);
            }
        }
    }
}
