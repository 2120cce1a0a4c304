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
    let ([tokens, cols], outs) = ([x.nrows(), x.ncols()], w.nrows());
    let tile = tile(tokens);
    let mut y = vec![0.0f32; tokens * outs];
    let (x_strides, w_strides) = (strides(&x), strides(&w));
    let tasks: Vec<(usize, usize)> = (0..tokens)
        .step_by(tile[0])
        .flat_map(|token| (0..outs).step_by(tile[1]).map(move |out| (token, out)))
        .collect();
    let target = Shared::new(&mut y);
    let (x_ptr, w_ptr) = (Shared(x.as_ptr().cast_mut()), Shared(w.as_ptr().cast_mut()));
    tasks.into_par_iter().for_each(|(token, out)| {
        let (m, n) = (tile[0].min(tokens - token), tile[1].min(outs - out));
        // SAFETY: the views cover these tiles, and every task writes its own tile of `y`.
        unsafe {
            gemm(
                [m, n, cols],
                target.at(token * outs + out),
                [outs, 1],
                false,
                x_ptr.at(token * x_strides[0]),
                x_strides,
                w_ptr.at(out * w_strides[0]),
                [w_strides[1], w_strides[0]],
                [0.0, 1.0],
            );
            if let Some(bias) = bias {
                for row in 0..m {
                    let y = std::slice::from_raw_parts_mut(target.at((token + row) * outs + out), n);
                    y.iter_mut().zip(&bias[out..]).for_each(|(y, b)| *y += b);
                }
            }
        }
    });
    Array2::from_shape_vec((tokens, outs), y).expect("one value a token and output")
}

fn strides(view: &ArrayView2<f32>) -> [usize; 2] {
    // One-row and one-column views may report any stride for the axis of length 1.
    let s = view.strides();
    [s[0].unsigned_abs(), s[1].unsigned_abs()]
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Noise, close};
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
}
