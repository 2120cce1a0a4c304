//! `y = x wᵀ + bias`: `x` is `[tokens, in]`, `w` `[out, in]`, `y` `[tokens, out]`.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::{Shared, gemm};

/// Tokens and outputs of one task. Depends on the shape alone, so that sums do not depend on the number of threads.
fn tile(tokens: usize) -> [usize; 2] {
    if tokens <= 256 { [256, 256] } else { [512, 1024] }
}

/// The plain loop, sums in `f64`.
pub fn reference(x: ArrayView2<f32>, w: ArrayView2<f32>, bias: Option<&[f32]>) -> Array2<f32> {
    Array2::from_shape_fn((x.nrows(), w.nrows()), |(token, out)| {
        let dot: f64 = x.row(token).iter().zip(w.row(out)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        (dot + bias.map_or(0.0, |b| f64::from(b[out]))) as f32
    })
}

/// Blocked, one task a tile.
pub fn run(x: ArrayView2<f32>, w: ArrayView2<f32>, bias: Option<&[f32]>) -> Array2<f32> {
    let (tokens, outs) = (x.nrows(), w.nrows());
    let tile = tile(tokens);
    let mut y = vec![0.0f32; tokens * outs];
    let tasks: Vec<(usize, usize)> = (0..tokens)
        .step_by(tile[0])
        .flat_map(|token| (0..outs).step_by(tile[1]).map(move |out| (token, out)))
        .collect();
    let (target, w_strides) = (Shared::new(&mut y), strides(&w));
    let w_ptr = Shared(w.as_ptr().cast_mut());
    tasks.into_par_iter().for_each(|(token, out)| {
        let size = [tile[0].min(tokens - token), tile[1].min(outs - out)];
        // SAFETY: the view covers these rows, and every task writes its own tile of `y`.
        unsafe { product(&x, w_ptr.at(out * w_strides[0]), w_strides, bias, &target, outs, [token, out], size) };
    });
    Array2::from_shape_vec((tokens, outs), y).expect("one value a token and output")
}

/// The same, of a weight `[outs, in]` that is in memory a tile at a time: `rows` writes those from the given one on.
///
/// Each `at_once` tokens get the bits that [`run`] gives for them alone; `at_once` is at most 256 unless there are no more tokens.
pub fn run_by_rows(
    x: ArrayView2<f32>,
    outs: usize,
    rows: &(dyn Fn(usize, &mut [f32]) + Sync),
    bias: Option<&[f32]>,
    at_once: usize,
) -> Array2<f32> {
    let [tokens, cols] = [x.nrows(), x.ncols()];
    let at_once = at_once.clamp(1, tokens.max(1));
    let tile = tile(at_once);
    assert!(at_once <= tile[0] || at_once == tokens, "more at once than one tile");
    let step = tile[0].min(at_once);
    let mut y = vec![0.0f32; tokens * outs];
    let target = Shared::new(&mut y);
    let tasks: Vec<usize> = (0..outs).step_by(tile[1]).collect();
    tasks.into_par_iter().for_each_init(Vec::new, |w, out| {
        let n = tile[1].min(outs - out);
        w.resize(n * cols, 0.0);
        rows(out, w);
        for token in (0..tokens).step_by(step) {
            let size = [step.min(tokens - token), n];
            // SAFETY: `w` holds these rows, and every task writes its own tiles of `y`.
            unsafe { product(&x, w.as_ptr(), [cols, 1], bias, &target, outs, [token, out], size) };
        }
    });
    Array2::from_shape_vec((tokens, outs), y).expect("one value a token and output")
}

/// One tile of `y` `[tokens, outs]`, at `[token, out]`.
///
/// # Safety
/// `w` points to as many rows as the tile has outputs, `x` holds its tokens, and nobody else writes the tile.
unsafe fn product(
    x: &ArrayView2<f32>,
    w: *const f32,
    w_strides: [usize; 2],
    bias: Option<&[f32]>,
    y: &Shared<f32>,
    outs: usize,
    [token, out]: [usize; 2],
    [m, n]: [usize; 2],
) {
    let x_strides = strides(x);
    // SAFETY: the caller's promise.
    unsafe {
        gemm(
            [m, n, x.ncols()],
            y.at(token * outs + out),
            [outs, 1],
            false,
            x.as_ptr().add(token * x_strides[0]),
            x_strides,
            w,
            [w_strides[1], w_strides[0]],
            [0.0, 1.0],
        );
        if let Some(bias) = bias {
            for row in 0..m {
                let y = std::slice::from_raw_parts_mut(y.at((token + row) * outs + out), n);
                y.iter_mut().zip(&bias[out..]).for_each(|(y, b)| *y += b);
            }
        }
    }
}

fn strides(view: &ArrayView2<f32>) -> [usize; 2] {
    // One-row and one-column views may report any stride for the axis of length 1.
    let s = view.strides();
    [s[0].unsigned_abs(), s[1].unsigned_abs()]
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Noise, close};
    use ndarray::Axis;

    use super::*;

    #[test]
    fn agrees_with_the_plain_loop_on_ragged_shapes() {
        let mut noise = Noise(1);
        for (tokens, cols, outs) in [(1, 1, 1), (3, 7, 5), (17, 64, 1031), (513, 33, 19), (1025, 5, 1025)] {
            let (x, w) = (noise.matrix(tokens, cols), noise.matrix(outs, cols));
            let bias: Vec<f32> = (0..outs).map(|_| noise.next()).collect();
            let (fast, slow) = (run(x.view(), w.view(), Some(&bias)), reference(x.view(), w.view(), Some(&bias)));
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 1e-6);
            let (fast, slow) = (run(x.view(), w.view(), None), reference(x.view(), w.view(), None));
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 1e-6);
        }
    }

    #[test]
    fn a_weight_that_comes_by_rows_gives_the_same_bits() {
        let mut noise = Noise(2);
        for (tokens, cols, outs) in [(1, 1, 1), (3, 7, 5), (17, 64, 1031), (170, 96, 2049), (600, 33, 2100)] {
            let (x, w) = (noise.matrix(tokens, cols), noise.matrix(outs, cols));
            let bias: Vec<f32> = (0..outs).map(|_| noise.next()).collect();
            let rows = |from: usize, out: &mut [f32]| {
                assert!(out.len() <= 1024 * cols);
                out.copy_from_slice(&w.as_slice().unwrap()[from * cols..][..out.len()]);
            };
            for bias in [None, Some(&bias[..])] {
                let found = run_by_rows(x.view(), outs, &rows, bias, usize::MAX);
                assert!(found == run(x.view(), w.view(), bias), "{outs} outputs");
                for at_once in [1, 31, 256] {
                    let found = run_by_rows(x.view(), outs, &rows, bias, at_once);
                    for (found, x) in found.axis_chunks_iter(Axis(0), at_once).zip(x.axis_chunks_iter(Axis(0), at_once))
                    {
                        assert!(found == run(x, w.view(), bias), "{outs} outputs, {at_once} tokens");
                    }
                }
            }
        }
    }
}
