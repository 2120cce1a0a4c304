//! Attention in both forms.

use ndarray::Array2;

use super::super::{Cuda, Operands};
use super::on_all;
use crate::backend::{AttentionShape, Forward, Memory};
use crate::ops::attention;
use crate::ops::testing::{Noise, close};

const PLAIN: AttentionShape = AttentionShape {
    heads: 1,
    kv_heads: 1,
    head_dim: 1,
    value_dim: 1,
    scale: 0.3,
    window: None,
    chunk: None,
    softcap: None,
    both_ways: false,
};

struct Case {
    q: Array2<f32>,
    k: Array2<f32>,
    v: Array2<f32>,
    sinks: Option<Vec<f32>>,
    shape: AttentionShape,
    lengths: Vec<usize>,
}

impl Case {
    /// Scores spread over some units, sinks among them.
    fn new(shape: AttentionShape, sunk: bool, lengths: &[usize], seed: u64) -> Case {
        let mut noise = Noise(seed);
        let tokens = lengths.iter().sum();
        Case {
            q: noise.matrix(tokens, shape.heads * shape.head_dim) * 2.0,
            k: noise.matrix(tokens, shape.kv_heads * shape.head_dim),
            v: noise.matrix(tokens, shape.kv_heads * shape.value_dim),
            sinks: sunk.then(|| (0..shape.heads).map(|_| 3.0 * noise.next()).collect()),
            shape,
            lengths: lengths.to_vec(),
        }
    }

    fn rounded(mut self) -> Case {
        for m in [&mut self.q, &mut self.k, &mut self.v] {
            m.mapv_inplace(|x| half::bf16::from_f32(x).to_f32());
        }
        self
    }

    fn reference(&self) -> Array2<f32> {
        let Case { q, k, v, sinks, shape, lengths } = self;
        attention::reference(q.view(), k.view(), v.view(), sinks.as_deref(), shape, lengths)
    }

    fn found(&self, relaxed: bool) -> Option<Array2<f32>> {
        on_all(|cuda| {
            let cuda = if relaxed { cuda.relaxed() } else { cuda.clone() };
            let [q, k, v] = [&self.q, &self.k, &self.v].map(|m| cuda.upload(m.clone()).unwrap());
            let out = cuda.attention(&q, &k, &v, self.sinks.as_deref(), &self.shape, &self.lengths).unwrap();
            assert_eq!(matches!(out, Operands::Rounded(_)), relaxed);
            widened(&cuda, &out)
        })
    }

    fn agrees_whole(&self) {
        let Some(found) = self.found(false) else { return };
        close(found.as_slice().unwrap(), self.reference().as_slice().unwrap(), 2e-6);
    }

    /// The result is rounded, by 2⁻⁸ of it at most, and so are the weights, whose errors mostly cancel.
    fn agrees_rounded(self) {
        let case = self.rounded();
        let Some(found) = case.found(true) else { return };
        let expected = case.reference();
        for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
            assert!((f - e).abs() <= e.abs() / 256.0 + 3e-3, "{:?}: value {i}: {f}, not {e}", case.shape);
        }
        if attention::can_round(&case.shape) {
            let Case { q, k, v, sinks, shape, lengths } = &case;
            let cpu = attention::rounded(q.view(), k.view(), v.view(), sinks.as_deref(), shape, lengths).widen();
            let equal = found.iter().zip(&cpu).filter(|(a, b)| a == b).count();
            close(found.as_slice().unwrap(), cpu.as_slice().unwrap(), 8e-3);
            // Both round the same values, apart from the running maximum that weights are taken against.
            assert!(equal * 10 >= found.len() * 6, "{shape:?}: {equal} of {} are those of the CPU", found.len());
        }
    }
}

/// What an operand holds: its product with the identity.
fn widened(cuda: &Cuda, x: &Operands) -> Array2<f32> {
    let one = Array2::eye(x.shape()[1]);
    let one = match x {
        Operands::Whole(_) => Operands::Whole(cuda.upload(one).unwrap()),
        Operands::Rounded(_) => cuda.weight(cuda.upload(one).unwrap()).unwrap(),
    };
    cuda.download(&cuda.linear(x, &one, None).unwrap()).unwrap()
}

fn shape(heads: [usize; 2], dims: [usize; 2]) -> AttentionShape {
    let ([heads, kv_heads], [head_dim, value_dim]) = (heads, dims);
    AttentionShape { heads, kv_heads, head_dim, value_dim, scale: (head_dim as f32).powf(-0.5), ..PLAIN }
}

/// Every option by itself and together, over borders of tiles.
fn options(of: AttentionShape) -> Vec<(AttentionShape, bool, Vec<usize>)> {
    let ragged = vec![67, 1, 0, 130];
    let with = |window, chunk, softcap| AttentionShape { window, chunk, softcap, ..of };
    let both = |window| AttentionShape { window, both_ways: true, ..of };
    vec![
        (of, false, ragged.clone()),
        (of, true, vec![64, 3]),
        (with(Some(1), None, None), false, vec![70]),
        (with(Some(5), None, None), true, ragged.clone()),
        (with(Some(70), None, None), false, vec![200]),
        (with(Some(1 << 40), Some(1 << 40), None), false, vec![66]),
        (with(None, Some(48), None), false, ragged.clone()),
        (with(None, None, Some(1.5)), false, ragged.clone()),
        (with(Some(90), Some(150), Some(4.0)), true, vec![161, 2]),
        (both(None), false, ragged.clone()),
        (both(Some(1)), false, vec![70]),
        (both(Some(5)), true, ragged),
        (both(Some(70)), false, vec![200, 64]),
    ]
}

#[test]
fn single_precision_agrees_with_the_plain_loop_under_every_option() {
    for (seed, (shape, sunk, lengths)) in options(shape([4, 2], [24, 20])).into_iter().enumerate() {
        Case::new(shape, sunk, &lengths, seed as u64).agrees_whole();
    }
}

#[test]
fn single_precision_agrees_for_heads_of_every_width() {
    for (heads, dims, lengths) in [
        ([1, 1], [1, 1], vec![1]),
        ([3, 1], [5, 7], vec![90, 3]),
        ([2, 2], [64, 64], vec![65]),
        ([2, 1], [70, 65], vec![80]),
        ([1, 1], [128, 128], vec![129]),
        ([2, 1], [192, 128], vec![66]),
        ([1, 1], [256, 256], vec![65]),
        ([1, 1], [576, 513], vec![65]),
    ] {
        Case::new(shape(heads, dims), dims[0] == 70, &lengths, 7).agrees_whole();
    }
}

#[test]
fn tensor_cores_agree_with_the_plain_loop_under_every_option() {
    for (seed, (shape, sunk, lengths)) in options(shape([4, 2], [48, 32])).into_iter().enumerate() {
        Case::new(shape, sunk, &lengths, seed as u64).agrees_rounded();
    }
}

#[test]
fn tensor_cores_agree_for_heads_of_every_width() {
    for (heads, dims, lengths) in [
        ([1, 1], [16, 16], vec![1]),
        ([2, 1], [64, 64], vec![130]),
        ([3, 1], [16, 64], vec![65]),
        ([1, 1], [80, 80], vec![70]),
        ([2, 2], [96, 96], vec![129, 4]),
        ([2, 1], [128, 128], vec![129]),
        ([1, 1], [64, 112], vec![66]),
        ([2, 1], [192, 128], vec![131]),
        ([1, 1], [256, 256], vec![100]),
        ([1, 1], [208, 144], vec![67]),
        ([1, 1], [64, 160], vec![33]),
    ] {
        Case::new(shape(heads, dims), dims[0] == 64, &lengths, 9).agrees_rounded();
    }
}

#[test]
fn heads_that_tensor_cores_do_not_take_are_computed_whole_and_then_rounded() {
    for dims in [[24, 16], [16, 8], [272, 64]] {
        let case = Case::new(shape([2, 1], dims), true, &[67], 3);
        let (Some(whole), Some(rounded)) = (case.found(false), case.found(true)) else { return };
        assert_eq!(whole.mapv(|x| half::bf16::from_f32(x).to_f32()), rounded);
    }
}

#[test]
fn large_and_equal_scores_overflow_nothing() {
    for relaxed in [false, true] {
        let mut case = Case::new(shape([1, 1], [16, 16]), false, &[70], 4).rounded();
        case.q.fill(64.0);
        case.k.fill(8.0);
        case.k.row_mut(69).fill(-8.0);
        let Some(found) = case.found(relaxed) else { return };
        close(found.as_slice().unwrap(), case.reference().as_slice().unwrap(), if relaxed { 4e-3 } else { 1e-6 });
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_no_work() {
    on_all(|cuda| {
        let m = |rows, cols| cuda.zeros(rows, cols).unwrap();
        let four = shape([4, 2], [8, 6]);
        let run = |q: [usize; 2], k: [usize; 2], v: [usize; 2], sinks: Option<&[f32]>, shape: &AttentionShape, n| {
            cuda.attention(&m(q[0], q[1]), &m(k[0], k[1]), &m(v[0], v[1]), sinks, shape, &[n]).map(|x| x.shape())
        };
        assert_eq!(run([5, 32], [5, 16], [5, 12], Some(&[0.0; 4]), &four, 5).unwrap(), [5, 24]);
        assert_eq!(run([0, 32], [0, 16], [0, 12], None, &four, 0).unwrap(), [0, 24]);
        for wrong in [
            run([5, 31], [5, 16], [5, 12], None, &four, 5),
            run([5, 32], [5, 15], [5, 12], None, &four, 5),
            run([5, 32], [5, 16], [5, 13], None, &four, 5),
            run([5, 32], [4, 16], [5, 12], None, &four, 5),
            run([5, 32], [5, 16], [5, 12], None, &four, 4),
            run([5, 32], [5, 16], [5, 12], Some(&[0.0; 3]), &four, 5),
            run([5, 32], [5, 16], [5, 12], None, &AttentionShape { window: Some(0), ..four }, 5),
            run([5, 32], [5, 16], [5, 12], None, &AttentionShape { chunk: Some(0), ..four }, 5),
            run([5, 32], [5, 16], [5, 12], None, &AttentionShape { kv_heads: 3, ..four }, 5),
            run([5, 32], [5, 16], [5, 12], None, &AttentionShape { chunk: Some(2), both_ways: true, ..four }, 5),
        ] {
            wrong.unwrap_err();
        }
    });
}
