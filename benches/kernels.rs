//! The operations of the CPU backend, on the shapes of SmolLM2-135M and of an 8B.
//!
//! Elements are floating-point operations where arithmetic is the limit (`peak` is what to divide by), weights in `fit`
//! and `round`; where memory is the limit, bytes are those that must be read and written. See README.md.

mod common;

use criterion::{BatchSize, SamplingMode, Throughput, criterion_group, criterion_main};
use formats::{ScalePrecision, Scheme};
use kernels::{AttentionShape, Backend, Cpu, Factor, FitKind, Grid, GridSpec, Result};
use ndarray::Array2;

use common::{Criterion, measure, noise};

const TOKENS: usize = 4096;

fn matrix(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
    Array2::from_shape_vec((rows, cols), noise(rows * cols, seed)).expect("one value an element")
}

fn flops(count: usize) -> Throughput {
    Throughput::Elements(count as u64)
}

/// Bytes of `values` in `f32`.
fn traffic(values: usize) -> Throughput {
    Throughput::BytesDecimal(4 * values as u64)
}

/// The backend in single precision and, where this CPU has the instruction, with inputs rounded to bfloat16.
fn precisions() -> Vec<(&'static str, Cpu)> {
    let mut list = vec![("f32", Cpu::exact())];
    if kernels::ops::bf16::available() {
        list.push(("bf16", Cpu::default().relaxed()));
    }
    list
}

/// The most that arithmetic gives here: a product large enough to hide its edges.
fn peak(c: &mut Criterion) {
    // Not a power of two: rows that far apart fall on the same lines of the caches.
    const SIDE: usize = 960;
    let mut group = c.benchmark_group("peak");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for (precision, cpu) in precisions() {
        for (name, threads) in [("1 thread", 1), ("all threads", 0)] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            let make = || [matrix(TOKENS, SIDE, 1), matrix(SIDE, SIDE, 2)];
            let name = format!("{precision}, {name}");
            measure(&mut group, &name, flops(2 * TOKENS * SIDE * SIDE), make, |[x, w]| {
                pool.install(|| cpu.linear(x, w, None))
            });
        }
    }
}

fn linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear");
    group.sample_size(10);
    for [tokens, cols, rows] in [[TOKENS, 576, 576], [TOKENS, 576, 1536], [TOKENS, 1536, 576], [512, 4096, 4096]] {
        for (precision, cpu) in precisions() {
            let make = || [matrix(tokens, cols, 1), matrix(rows, cols, 2)];
            let name = format!("{tokens} x {cols} -> {rows}, {precision}");
            measure(&mut group, &name, flops(2 * tokens * cols * rows), make, |[x, w]| cpu.linear(x, w, None));
        }
    }
}

/// The lower triangle with its diagonal: half of a full product.
fn gram(c: &mut Criterion) {
    let mut group = c.benchmark_group("add_gram");
    group.sample_size(10);
    for cols in [576, 1536] {
        for (precision, cpu) in precisions() {
            let make = || (matrix(TOKENS, cols, 1), Array2::zeros((cols, cols)));
            let name = format!("{TOKENS} x {cols}, {precision}");
            measure(&mut group, &name, flops(TOKENS * cols * (cols + 1)), make, |(x, gram)| cpu.add_gram(x, gram));
        }
    }
}

/// Scores and mixture of the keys that a token may see; the softmax is not counted.
fn attention(c: &mut Criterion) {
    let shape = AttentionShape { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, window: None };
    let lengths = [512; 8];
    let make = || [9, 3, 3].map(|heads| matrix(TOKENS, 64 * heads, heads as u64));
    let pairs: usize = lengths.iter().map(|length| length * (length + 1) / 2).sum();
    let mut group = c.benchmark_group("attention");
    group.sample_size(10);
    let work = flops(4 * pairs * shape.heads * shape.head_dim);
    measure(&mut group, "8 x 512, 9 heads on 3 of 64", work, make, |[q, k, v]| {
        Cpu::exact().attention(q, k, v, &shape, &lengths)
    });
}

/// A Hessian of fewer tokens than a real one has, which the damping makes definite.
fn hessian(n: usize) -> Array2<f32> {
    let mut gram = Array2::zeros((n, n));
    Cpu::exact().add_gram(&matrix(n.min(1024), n, 3), &mut gram).expect("shapes fit");
    gram
}

fn factored(gram: &Array2<f32>) -> Result<Factor<Array2<f32>>> {
    Cpu::exact().factor(gram, (0..gram.nrows() as u32).collect(), 0.05)
}

/// In double precision: half of the `f32` peak is all there is.
fn factor(c: &mut Criterion) {
    let mut group = c.benchmark_group("factor");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for n in [576usize, 1536, 4096] {
        measure(&mut group, &n.to_string(), flops(n.pow(3) / 3), || hessian(n), |gram| factored(gram));
    }
}

/// 4 bits in groups of 64.
fn spec(symmetric: bool, cols: usize) -> GridSpec {
    GridSpec::contiguous(Scheme { bits: 4, group: Some(64), symmetric }, ScalePrecision::F16, 0, cols)
}

fn grid(weight: &Array2<f32>) -> Grid {
    Cpu::exact().fit(weight, &spec(true, weight.ncols()), FitKind::MinMax).expect("shapes fit")
}

fn sweep(c: &mut Criterion) {
    let mut group = c.benchmark_group("sweep");
    group.sample_size(10);
    for [rows, cols] in [[1536, 576], [576, 1536]] {
        let make = || {
            let weight = matrix(rows, cols, 4);
            (factored(&hessian(cols)).expect("definite"), grid(&weight), weight)
        };
        let name = format!("{rows} x {cols}");
        measure(&mut group, &name, flops(rows * cols * cols), make, |(factor, grid, weight)| {
            Cpu::exact().sweep(weight, factor, grid)
        });
    }
}

fn fit(c: &mut Criterion) {
    const SHAPE: [usize; 2] = [1536, 576];
    let [rows, cols] = SHAPE;
    let mut group = c.benchmark_group("fit");
    group.sample_size(10);
    let weights = Throughput::Elements((rows * cols) as u64);
    let make = || (matrix(rows, cols, 4), hessian(cols));
    let energy: Vec<f32> = noise(cols, 5).iter().map(|x| x * x + 0.1).collect();
    for (name, symmetric) in [("sym", true), ("asym", false)] {
        let spec = spec(symmetric, cols);
        measure(&mut group, &format!("min-max, {name}"), weights.clone(), make, |(weight, _)| {
            Cpu::exact().fit(weight, &spec, FitKind::MinMax)
        });
        measure(&mut group, &format!("weighted, {name}"), weights.clone(), make, |(weight, _)| {
            Cpu::exact().fit(weight, &spec, FitKind::Weighted(&energy))
        });
        measure(&mut group, &format!("block Hessian, {name}"), weights.clone(), make, |(weight, hessian)| {
            Cpu::exact().fit(weight, &spec, FitKind::BlockHessian(hessian))
        });
    }
    group.finish();
    let make = || {
        let weight = matrix(rows, cols, 4);
        (grid(&weight), weight)
    };
    let mut group = c.benchmark_group("round");
    measure(&mut group, &format!("{rows} x {cols}"), weights, make, |(grid, weight)| Cpu::exact().round(weight, grid));
}

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    group.sample_size(20);
    let make = || (matrix(TOKENS, 576, 6), noise(576, 7));
    measure(&mut group, "rms_norm 4096 x 576", traffic(2 * TOKENS * 576), make, |(x, weight)| {
        Cpu::exact().rms_norm(x, weight, 1e-5)
    });
    // Each time from a fresh gate: what it does to its own result over and over would end in zeros.
    let mut inputs = None;
    group.throughput(traffic(3 * TOKENS * 1536));
    group.bench_function("silu_mul 4096 x 1536", |bencher| {
        let [gate, up] = inputs.get_or_insert_with(|| [matrix(TOKENS, 1536, 8), matrix(TOKENS, 1536, 9)]);
        bencher.iter_batched_ref(
            || gate.clone(),
            |gate| Cpu::exact().silu_mul(gate, up).expect("equal shapes"),
            BatchSize::LargeInput,
        );
    });
    group.finish();

    let mut group = c.benchmark_group("compare");
    group.sample_size(10);
    let targets: Vec<u32> = (0..256).map(|token| token * 191).collect();
    let make = || [matrix(256, 49_152, 10), matrix(256, 49_152, 11)];
    measure(&mut group, "256 x 49152 logits", traffic(2 * 256 * 49_152), make, |[reference, model]| {
        Cpu::exact().compare(reference, model, &targets)
    });
}

criterion_group!(name = benches; config = common::criterion(); targets = peak, linear, gram, attention, factor, sweep, fit, elementwise);
criterion_main!(benches);
