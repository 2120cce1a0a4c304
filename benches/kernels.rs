//! The operations of the CPU backend, on the shapes of SmolLM2-135M and of an 8B.
//!
//! Elements are floating-point operations where arithmetic is the limit (`peak` is what to divide by), weights in `fit`
//! and `round`; where memory is the limit, bytes are those that must be read and written. Of ggml's block types bytes are
//! those of the same weights in f16, as in codecs.rs. See README.md.
//!
//! Operands of products lie ready: in bf16, weights were packed and activations rounded before the clock started
//! (`operands` measures that). What products of bf16 hand on rounded, as `gated` and `attention` do, is rounded inside.

mod common;

use std::cell::LazyCell;

use criterion::{BatchSize, SamplingMode, Throughput, criterion_group, criterion_main};
use formats::ggml::{GgmlType, TYPES};
use formats::{Float, Scheme};
use kernels::ops::{activation, bf16};
use kernels::{
    Activation, AttentionShape, Cpu, DeltaShape, Entries, Factor, FitKind, Forward, Grid, GridSpec, HyperParameters,
    HyperShape, IndexShape, Measure, Memory, NormKind, Quantize, Result, cpu,
};
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

/// The backend in single precision and, where this CPU has the instruction, with operands in bfloat16.
fn precisions() -> Vec<(&'static str, Cpu)> {
    let mut list = vec![("f32", Cpu::exact())];
    if bf16::available() {
        list.push(("bf16", Cpu::default().relaxed()));
    }
    list
}

/// An activation in the form that this backend multiplies.
fn input(cpu: &Cpu, rows: usize, cols: usize, seed: u64) -> cpu::Input {
    cpu.input(matrix(rows, cols, seed)).expect("any matrix is an input")
}

/// A weight in the form that this backend multiplies.
fn weight(cpu: &Cpu, rows: usize, cols: usize, seed: u64) -> cpu::Weight {
    cpu.weight(matrix(rows, cols, seed)).expect("any matrix is a weight")
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
            let make = || (input(&cpu, TOKENS, SIDE, 1), weight(&cpu, SIDE, SIDE, 2));
            let name = format!("{precision}, {name}");
            measure(&mut group, &name, flops(2 * TOKENS * SIDE * SIDE), make, |(x, w)| {
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
            let make = || (input(&cpu, tokens, cols, 1), weight(&cpu, rows, cols, 2));
            let name = format!("{tokens} x {cols} -> {rows}, {precision}");
            measure(&mut group, &name, flops(2 * tokens * cols * rows), make, |(x, w)| cpu.linear(x, w, None));
        }
    }
}

/// The two products of a gated MLP, its activation function not counted; in bf16 the result is rounded too.
fn gated(c: &mut Criterion) {
    let [cols, rows] = [576, 1536];
    let mut group = c.benchmark_group("gated");
    group.sample_size(10);
    for (precision, cpu) in precisions() {
        let make = || (input(&cpu, TOKENS, cols, 1), [2, 3].map(|seed| weight(&cpu, rows, cols, seed)));
        let name = format!("{TOKENS} x {cols} -> 2 x {rows}, {precision}");
        measure(&mut group, &name, flops(4 * TOKENS * cols * rows), make, |(x, [gate, up])| {
            cpu.gated(x, [gate, up], [None, None], Activation::Silu)
        });
    }
}

/// What products in bf16 want done first: bytes of the f32 read and of the bf16 written.
fn operands(c: &mut Criterion) {
    if !bf16::available() {
        return;
    }
    let mut group = c.benchmark_group("operands");
    group.sample_size(20);
    let bytes = |values: usize| Throughput::BytesDecimal(6 * values as u64);
    let make = || matrix(TOKENS, 1536, 1);
    measure(&mut group, &format!("round {TOKENS} x 1536"), bytes(TOKENS * 1536), make, |x| {
        Result::Ok(bf16::Rows::of(x.view()))
    });
    let make = || matrix(1536, 576, 2);
    measure(&mut group, "pack 1536 x 576", bytes(1536 * 576), make, |w| Result::Ok(bf16::Panels::of(w.view())));
}

/// The lower triangle with its diagonal: half of a full product.
fn gram(c: &mut Criterion) {
    let mut group = c.benchmark_group("add_gram");
    group.sample_size(10);
    for cols in [576, 1536] {
        for (precision, cpu) in precisions() {
            let make = || (input(&cpu, TOKENS, cols, 1), Array2::zeros((cols, cols)));
            let name = format!("{TOKENS} x {cols}, {precision}");
            measure(&mut group, &name, flops(TOKENS * cols * (cols + 1)), make, |(x, gram)| cpu.add_gram(x, gram));
        }
    }
}

/// Scores and mixture of the keys that a token may see; the softmax is not counted. In bf16 queries, keys and values are
/// f32 when the clock starts, and are rounded inside, as is the result.
fn attention(c: &mut Criterion) {
    let shape = AttentionShape {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        value_dim: 64,
        scale: 0.125,
        window: None,
        chunk: None,
        softcap: None,
        both_ways: false,
    };
    let mut group = c.benchmark_group("attention");
    group.sample_size(10);
    for length in [512, 2048] {
        let lengths = vec![length; TOKENS / length];
        let pairs: usize = lengths.iter().map(|length| length * (length + 1) / 2).sum();
        let work = flops(4 * pairs * shape.heads * shape.head_dim);
        for (precision, cpu) in precisions() {
            let make = || [9, 3, 3].map(|heads| matrix(TOKENS, 64 * heads, heads as u64));
            let name = format!("{} x {length}, 9 heads on 3 of 64, {precision}", lengths.len());
            measure(&mut group, &name, work.clone(), make, |[q, k, v]| cpu.attention(q, k, v, None, &shape, &lengths));
        }
    }
}

/// An indexer's choice, and attention to what it chose.
fn sparse(c: &mut Criterion) {
    let index = IndexShape {
        heads: 16,
        head_dim: 64,
        scale: 0.03,
        count: 256,
        block: 1,
        local: 0,
        apart: false,
        pooled: false,
        entries: false,
    };
    let shape = AttentionShape {
        heads: 9,
        kv_heads: 9,
        head_dim: 64,
        value_dim: 64,
        scale: 0.125,
        window: None,
        chunk: None,
        softcap: None,
        both_ways: false,
    };
    let mut group = c.benchmark_group("sparse_attention");
    let cpu = Cpu::exact();
    // The second is so long that what is seen is gathered.
    for length in [1024, 4096] {
        let lengths = [length];
        let scored = flops(length * length * 16 * 64);
        let indexed = || [matrix(length, 16 * 64, 1), matrix(length, 64, 2), matrix(length, 16, 3)];
        measure(&mut group, &format!("{length}, choosing 256"), scored, indexed, |[q, k, weights]| {
            cpu.select(q, k, Some(weights), &index, &lengths)
        });
        let seen = || {
            let [q, k, weights] = indexed();
            let chosen = cpu.select(&q, &k, Some(&weights), &index, &lengths).expect("shapes fit");
            let [q, k, v] = [4, 5, 6].map(|seed| matrix(length, 64 * 9, seed));
            [q, k, v, chosen]
        };
        let work = flops(4 * length * 256 * 64 * 9);
        measure(&mut group, &format!("{length}, 9 heads of 64 that see 256"), work, seen, |[q, k, v, chosen]| {
            cpu.attention_to([q, k, v], chosen, None, &shape, &index, &lengths)
        });
    }
    // One head of keys that are values, a window, and an entry for each few tokens; with a choice of them.
    let shape = AttentionShape { kv_heads: 1, window: Some(128), ..shape };
    let index = IndexShape { block: 4, pooled: true, entries: true, ..index };
    for length in [1024, 8192] {
        let lengths = [length];
        let seen = || {
            let [iq, ik, weights] = [matrix(length, 16 * 64, 1), matrix(length, 64, 2), matrix(length, 16, 3)];
            let chosen = cpu.select(&iq, &ik, Some(&weights), &index, &lengths).expect("shapes fit");
            let [k, values] = [4, 5].map(|seed| matrix(length, 64, seed));
            [matrix(length, 64 * 9, 6), k, values, chosen]
        };
        let most = [(128, length / 128), (4, 256.min(length / 4))];
        for (block, entries) in most {
            let work = flops(4 * length * (128 + entries) * 64 * 9);
            let name = format!("{length}, a window of 128 and {entries} entries");
            measure(&mut group, &name, work, seen, |[q, k, values, chosen]| {
                let entries = Entries { values, block, chosen: (block == 4).then_some(&*chosen) };
                cpu.attention_beside([q, k, k], &entries, None, &shape, &lengths)
            });
        }
    }
}

/// Streams that are read and written: the weights of each token, by the bytes of its streams; what is read; and what is written.
fn hyper(c: &mut Criterion) {
    let (streams, hidden) = (4, 576);
    let cpu = Cpu::exact();
    let mut group = c.benchmark_group("hyper_connections");
    group.sample_size(20);
    for rounds in [0, 20] {
        let shape = HyperShape { streams, norm_eps: 1e-6, eps: 1e-6, writes: Some([2.0, 0.0]), rounds };
        let of_layer = || {
            let projection = matrix(shape.weights(), streams * hidden, 1);
            (projection.into_raw_vec_and_offset().0, vec![0.1; shape.weights()], vec![0.5; shape.kinds()])
        };
        let weigh = |h: &Array2<f32>, (projection, base, scale): &(Vec<f32>, Vec<f32>, Vec<f32>)| {
            cpu.hyper_weights(h, HyperParameters { projection, base, scale }, &shape)
        };
        let bytes = traffic(TOKENS * streams * hidden);
        let make = || (matrix(TOKENS, streams * hidden, 2), of_layer());
        measure(&mut group, &format!("weights, {rounds} rounds"), bytes, make, |(h, of)| weigh(h, of));
        let make = || {
            let h = matrix(TOKENS, streams * hidden, 2);
            let weights = weigh(&h, &of_layer()).expect("shapes fit");
            (h, weights, matrix(TOKENS, hidden, 3))
        };
        let read =
            |(h, weights, _): &mut (Array2<f32>, Array2<f32>, Array2<f32>)| cpu.read_streams(h, weights, streams);
        measure(&mut group, &format!("read, {rounds} rounds"), traffic(TOKENS * (streams + 1) * hidden), make, read);
        let name = format!("write, {rounds} rounds");
        measure(&mut group, &name, traffic(TOKENS * (2 * streams + 1) * hidden), make, |(h, weights, y)| {
            cpu.write_streams(y, weights, &shape, h)
        });
    }
}

/// Streams side by side, of which each takes some of all, and a gate that lets few values through; each time from fresh ones.
fn streams(c: &mut Criterion) {
    const COUNT: usize = 4;
    const WIDTH: usize = 576;
    let mut group = c.benchmark_group("streams");
    let cpu = Cpu::exact();
    let wide = || matrix(TOKENS, COUNT * WIDTH, 1);
    let make = || [wide(), matrix(TOKENS, COUNT * COUNT, 2)];
    let work = flops(2 * TOKENS * COUNT * COUNT * WIDTH);
    measure(&mut group, "mixing 4 of 576", work, make, |[x, coefficients]| {
        let mut y = x.clone();
        cpu.mix_streams(x, coefficients, WIDTH, &mut y).map(|()| y)
    });
    let moved = traffic(2 * TOKENS * COUNT * WIDTH);
    measure(&mut group, "matching 4 of 576", moved.clone(), wide, |x| {
        let mut x = x.clone();
        cpu.match_streams(&mut x, WIDTH, 1e-5).map(|()| x)
    });
    let make = || [wide(), matrix(TOKENS, COUNT * WIDTH, 3)];
    measure(&mut group, "comparing 4 of 576", moved.clone(), make, |[x, y]| cpu.agree_streams(x, y, WIDTH, 1e-6));
    measure(&mut group, "cutting 2304", moved, wide, |x| {
        let mut x = x.clone();
        cpu.cut(&mut x, 1.6).map(|()| x)
    });
}

/// Linear attention of the same width as [`attention`] measures; the work is that of one token after another, while chunks do more.
fn delta(c: &mut Criterion) {
    let replaces = DeltaShape {
        key_heads: 9,
        value_heads: 9,
        key_dim: 64,
        value_dim: 64,
        scale: 0.125,
        replaces: true,
        by_channel: false,
    };
    linear_attention(c, "delta_rule", replaces, 6);
    linear_attention(c, "delta_rule_by_channel", DeltaShape { by_channel: true, ..replaces }, 6);
    // As Mamba 2 has it: one pair of keys and queries for all heads.
    linear_attention(c, "state_space", DeltaShape { key_heads: 1, replaces: false, ..replaces }, 4);
}

/// `operations` on each number of a state for every token.
fn linear_attention(c: &mut Criterion, name: &str, shape: DeltaShape, operations: usize) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    let cpu = Cpu::exact();
    for length in [512, 2048] {
        let lengths = vec![length; TOKENS / length];
        let work = flops(operations * TOKENS * shape.value_heads * shape.key_dim * shape.value_dim);
        let make = || {
            let unit = |seed| {
                let mut x = matrix(TOKENS, 64 * shape.key_heads, seed);
                cpu.norm_heads(&mut x, 64, NormKind::Length, &[1.0; 64], None, 1e-6).expect("shapes fit");
                x
            };
            let decay = matrix(TOKENS, shape.decays(), 5).mapv(|x| -x.abs());
            let beta = matrix(TOKENS, 9, 6).mapv(|x| 1.0 / (1.0 + (-x).exp()));
            [unit(1), unit(2), matrix(TOKENS, 64 * 9, 3), decay, beta]
        };
        let name = format!("{} x {length}, 9 heads of 64", lengths.len());
        measure(&mut group, &name, work, make, |[q, k, v, decay, beta]| {
            cpu.delta_rule([q, k, v], decay, beta, &shape, &lengths)
        });
    }
}

/// A Hessian of fewer tokens than a real one has, which the damping makes definite.
fn hessian(n: usize) -> Array2<f32> {
    let mut gram = Array2::zeros((n, n));
    let cpu = Cpu::exact();
    cpu.add_gram(&input(&cpu, n.min(1024), n, 3), &mut gram).expect("shapes fit");
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
    GridSpec::of(Scheme { bits: 4, group: Some(64), symmetric }.encoding(Float::F16, 0), cols)
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
            Cpu::exact().sweep(&[(weight, grid)], factor)
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

/// What each of ggml's types takes of a [512, 1024] weight: the search for its blocks' scales without and with importance,
/// rounding onto them, and the refinement after a sweep, from one start each time.
fn blocks(c: &mut Criterion) {
    const SHAPE: [usize; 2] = [512, 1024];
    let [rows, cols] = SHAPE;
    let work = Throughput::BytesDecimal((2 * rows * cols) as u64);
    let importance: Vec<f32> = noise(cols, 5).iter().map(|x| x * x + 0.1).collect();
    let cpu = Cpu::exact();
    let types = || TYPES.iter().filter(|ty| ty.layout().is_some());
    let weight = || matrix(rows, cols, 4);
    let fit = |ty: &GgmlType, weight: &Array2<f32>, importance: Option<&[f32]>| {
        cpu.fit(weight, &GridSpec::of(ty.encoding(), cols), importance.map_or(FitKind::MinMax, FitKind::Weighted))
    };
    let fitted = |ty: &GgmlType| fit(ty, &weight(), Some(&importance)).expect("shapes fit");
    let mut group = c.benchmark_group("fit blocks");
    group.sample_size(10);
    for ty in types() {
        for (name, importance) in [("", None), (", importance", Some(&*importance))] {
            let name = format!("{}{name}", ty.name);
            measure(&mut group, &name, work.clone(), weight, |weight| fit(ty, weight, importance));
        }
    }
    group.finish();
    let mut group = c.benchmark_group("round blocks");
    group.sample_size(10);
    for ty in types() {
        let make = || (weight(), fitted(ty));
        measure(&mut group, ty.name, work.clone(), make, |(weight, grid)| cpu.round(weight, grid));
    }
    group.finish();
    let mut group = c.benchmark_group("refine blocks");
    group.sample_size(10);
    let gram = LazyCell::new(|| hessian(cols));
    for ty in types() {
        let make = || {
            let (weight, grid) = (weight(), fitted(ty));
            let swept =
                cpu.sweep(&[(&weight, &grid)], &factored(&gram).expect("definite")).expect("shapes fit").remove(0);
            (weight, grid, swept.codes)
        };
        measure(&mut group, ty.name, work.clone(), make, |(weight, grid, codes)| {
            let (mut grid, mut codes) = (grid.clone(), codes.clone());
            cpu.refine(weight, &gram, 0.05, &mut grid, &mut codes)
        });
    }
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
            |gate| {
                let [gate, up] = [gate.as_slice_mut(), up.as_slice_mut()].map(|slice| slice.expect("contiguous"));
                activation::gate(Activation::Silu, gate, up);
            },
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

criterion_group!(name = benches; config = common::criterion(); targets = peak, linear, gated, operands, gram, attention, sparse, hyper, streams, delta, factor, sweep, fit, blocks, elementwise);
criterion_main!(benches);
