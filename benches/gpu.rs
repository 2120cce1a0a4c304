//! What each operation takes on a GPU, beside the least that the card's peaks allow, for the shapes of an 8B Llama.
//!
//! ```text
//! gpu                                   # the table
//! gpu --synthesize DIR 8b|1b|70b        # a checkpoint of that shape with random weights
//! ```
//!
//! `benches/gpu.sh` packs this, the tests of the kernels and quantc itself, and runs them where there is a card.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use formats::ggml::GgmlType;
use formats::{Dtype, Float, Scheme, ShardedWriter, TensorSpec, WordLayout};
use kernels::cuda::{Card, Matrix, cards};
use kernels::{
    Activation, AttentionShape, Cuda, FitKind, Forward, GridSpec, Measure, Memory, Packing, Quantize, Result,
};
use ndarray::Array2;
use quantc::{demo, families};
use rayon::prelude::*;
use serde_json::{Value, json};

/// Peaks that floors are reckoned from, of an H200: bfloat16 and double-precision products, single precision, memory.
const BF16: f64 = 790e12;
const F64: f64 = 60e12;
const F32: f64 = 60e12;
const MEMORY: f64 = 4.3e12;
/// What a copy to pinned memory reaches.
const BUS: f64 = 50e9;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let done = match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--synthesize", folder, shape] => synthesize(Path::new(folder), shape),
        _ => table().map_err(|error| error.to_string()),
    };
    if let Err(error) = done {
        println!("{error}");
    }
}

fn noise(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
    let mut values = vec![0.0f32; rows * cols];
    values.par_chunks_mut(1 << 16).enumerate().for_each(|(part, values)| {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(part as u64 + 1);
        values.iter_mut().for_each(|value| *value = normal(&mut state));
    });
    Array2::from_shape_vec((rows, cols), values).expect("as long as its shape says")
}

/// A sum of four uniform numbers: nearly normal, of variance near 1.
fn normal(state: &mut u64) -> f32 {
    let mut sum = 0.0;
    for _ in 0..4 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        sum += (*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
    }
    sum * 1.7
}

/// One line: a name, how much work it is, and the peak that it runs against.
struct Line<'a> {
    name: &'a str,
    work: f64,
    peak: f64,
    unit: &'static str,
}

fn measure<T>(cuda: &Cuda, line: &Line<'_>, mut run: impl FnMut() -> Result<T>) -> Result<()> {
    run()?;
    cuda.synchronize()?;
    let (mut count, started) = (0, Instant::now());
    while count < 3 || (started.elapsed().as_secs_f64() < 0.5 && count < 50) {
        run()?;
        count += 1;
    }
    cuda.synchronize()?;
    let seconds = started.elapsed().as_secs_f64() / f64::from(count);
    let Line { name, work, peak, unit } = line;
    println!(
        "{name:<60} {:>10.3} ms {:>9.2} {unit:<7} {:>6.1} % of the floor's speed",
        seconds * 1e3,
        work / seconds / 1e12,
        work / peak / seconds * 100.0
    );
    Ok(())
}

fn table() -> Result<()> {
    let Some(card) = cards()?.into_iter().find(|card| card.unusable.is_none()) else {
        println!("no GPU that can be used");
        return Ok(());
    };
    println!(
        "{}, compute capability {}, {:.0} GiB",
        card.name,
        card.capability,
        card.memory as f64 / (1u64 << 30) as f64
    );
    let cuda = Cuda::new(Arc::new(Card::open(card.ordinal)?), None)?;
    let relaxed = cuda.relaxed();
    let tokens = 8192;
    let upload = |rows, cols, seed| cuda.upload(noise(rows, cols, seed));
    for (outs, cols) in [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)] {
        let x = relaxed.input(upload(tokens, cols, 1)?)?;
        let w = relaxed.weight(upload(outs, cols, 2)?)?;
        let name = format!("linear, {tokens} × {cols} → {outs}, bf16");
        let work = 2.0 * (tokens * outs * cols) as f64;
        measure(&cuda, &Line { name: &name, work, peak: BF16, unit: "TFLOP/s" }, || relaxed.linear(&x, &w, None))?;
    }
    let x = relaxed.input(upload(tokens, 4096, 1)?)?;
    let [gate, up] = [3, 4].map(|seed| upload(14336, 4096, seed).and_then(|w| relaxed.weight(w)));
    let (gate, up) = (gate?, up?);
    let line = Line {
        name: "gate and up, 4096 → 2 × 14336, bf16",
        work: 4.0 * (tokens * 4096 * 14336) as f64,
        peak: BF16,
        unit: "TFLOP/s",
    };
    measure(&cuda, &line, || relaxed.gated(&x, [&gate, &up], [None; 2], Activation::Silu))?;
    for cols in [4096, 14336] {
        let x = relaxed.input(upload(tokens, cols, 5)?)?;
        let mut gram = cuda.zeros(cols, cols)?;
        let name = format!("Hessian, {tokens} tokens, {cols} wide, bf16");
        let line = Line { name: &name, work: (tokens * cols * cols) as f64, peak: BF16, unit: "TFLOP/s" };
        measure(&cuda, &line, || relaxed.add_gram(&x, &mut gram))?;
    }
    let shape = AttentionShape {
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        value_dim: 128,
        scale: 128f32.powf(-0.5),
        window: None,
        chunk: None,
        softcap: None,
        both_ways: false,
    };
    let (q, k, v) = (upload(tokens, 4096, 6)?, upload(tokens, 1024, 7)?, upload(tokens, 1024, 8)?);
    let lengths = [2048; 4];
    let work = 2.0 * (tokens * 2048 * 4096) as f64;
    let line = Line { name: "attention, 4 × 2048 tokens, bf16", work, peak: BF16, unit: "TFLOP/s" };
    measure(&cuda, &line, || relaxed.attention(&q, &k, &v, None, &shape, &lengths))?;
    let line = Line { name: "attention, 4 × 2048 tokens, f32", work, peak: F32, unit: "TFLOP/s" };
    measure(&cuda, &line, || cuda.attention(&q, &k, &v, None, &shape, &lengths))?;
    let stream = upload(tokens, 4096, 9)?;
    let line =
        Line { name: "root mean square norm, 4096 wide", work: (8 * tokens * 4096) as f64, peak: MEMORY, unit: "TB/s" };
    measure(&cuda, &line, || cuda.rms_norm(&stream, &[1.0; 4096], 1e-5))?;

    for cols in [4096usize, 14336] {
        let x = relaxed.input(upload(2 * cols, cols, 10)?)?;
        let mut gram = cuda.zeros(cols, cols)?;
        relaxed.add_gram(&x, &mut gram)?;
        drop(x);
        let order: Vec<u32> = (0..cols as u32).rev().collect();
        let name = format!("factorization, {cols} wide, f64");
        let line = Line { name: &name, work: (cols as f64).powi(3) / 3.0, peak: F64, unit: "TFLOP/s" };
        measure(&cuda, &line, || cuda.factor(&gram, order.clone(), 0.05))?;
        let factor = cuda.factor(&gram, order, 0.05)?;
        let rows = if cols == 4096 { 14336 } else { 4096 };
        let weight = upload(rows, cols, 11)?;
        let energy = cuda.diagonal(&gram)?;
        let bytes = (4 * rows * cols) as f64;
        for (name, symmetric) in [("symmetric", true), ("with zeros", false)] {
            let scheme = Scheme { bits: 4, group: Some(128), symmetric };
            let spec = GridSpec::of(scheme.encoding(Float::F16, 0), cols);
            let name = format!("scale search, {rows} × {cols}, {name}");
            let line = Line { name: &name, work: bytes, peak: MEMORY, unit: "TB/s" };
            measure(&cuda, &line, || cuda.fit(&weight, &spec, FitKind::Weighted(&energy)))?;
        }
        let spec = GridSpec::of(Scheme { bits: 4, group: Some(128), symmetric: true }.encoding(Float::F16, 0), cols);
        let grid = cuda.fit(&weight, &spec, FitKind::Weighted(&energy))?;
        let name = format!("sweep, {rows} × {cols}");
        let line = Line { name: &name, work: (rows * cols * cols) as f64, peak: F32, unit: "TFLOP/s" };
        measure(&cuda, &line, || cuda.sweep(&[(&weight, &grid)], &factor))?;
        let codes = cuda.sweep(&[(&weight, &grid)], &factor)?.remove(0).codes;
        if cols == 4096 {
            let heads = [(4096, 14), (1024, 15), (1024, 16)].map(|(rows, seed)| upload(rows, cols, seed));
            let [q, k, v] = heads;
            let fitted = |weight: Matrix| Ok((cuda.fit(&weight, &spec, FitKind::MinMax)?, weight));
            let heads = [q?, k?, v?].map(fitted).into_iter().collect::<Result<Vec<_>>>()?;
            let targets: Vec<_> = heads.iter().map(|(grid, weight)| (weight, grid)).collect();
            let line = Line {
                name: "sweep of q, k and v, 6144 × 4096",
                work: 6144.0 * 4096.0 * 4096.0,
                peak: F32,
                unit: "TFLOP/s",
            };
            measure(&cuda, &line, || cuda.sweep(&targets, &factor))?;
        }
        for (name, cuda) in [("in halves where that is faster", &relaxed), ("f32", &cuda)] {
            let name = format!("loss, {rows} × {cols}, {name}");
            let line = Line { name: &name, work: (rows * cols * cols) as f64, peak: F32, unit: "TFLOP/s" };
            measure(cuda, &line, || cuda.quadratic(&weight, &gram))?;
        }
        let name = format!("dequantizing, {rows} × {cols}");
        let line = Line { name: &name, work: (5 * rows * cols) as f64, peak: MEMORY, unit: "TB/s" };
        measure(&cuda, &line, || cuda.dequantize(&codes, &grid))?;
        for (name, layout) in
            [("rows", WordLayout::Rows), ("GPTQ", WordLayout::RowsTransposed), ("AWQ", WordLayout::Awq)]
        {
            let name = format!("packing and its way to the host, {rows} × {cols}, {name}");
            let line = Line { name: &name, work: (rows * cols / 2) as f64, peak: BUS, unit: "TB/s" };
            measure(&cuda, &line, || cuda.pack(&codes, Packing::Words { bits: 4, layout }))?;
        }
        drop(codes);
        let ty = GgmlType::from_name("Q4_K").expect("a type");
        let spec = GridSpec::of(ty.encoding(), cols);
        let name = format!("Q4_K: search, {rows} × {cols}");
        let line = Line { name: &name, work: bytes, peak: MEMORY, unit: "TB/s" };
        measure(&cuda, &line, || cuda.fit(&weight, &spec, FitKind::Weighted(&energy)))?;
        let grid = cuda.fit(&weight, &spec, FitKind::Weighted(&energy))?;
        let name = format!("Q4_K: sweep, {rows} × {cols}");
        let line = Line { name: &name, work: (rows * cols * cols) as f64, peak: F32, unit: "TFLOP/s" };
        measure(&cuda, &line, || cuda.sweep(&[(&weight, &grid)], &factor))?;
        let mut codes = cuda.sweep(&[(&weight, &grid)], &factor)?.remove(0).codes;
        let name = format!("Q4_K: refinement, {rows} × {cols}");
        let line = Line { name: &name, work: 8.0 * (rows * cols * cols) as f64, peak: F32, unit: "TFLOP/s" };
        measure(&cuda, &line, || cuda.refine(&weight, &gram, 0.05, &mut grid.clone(), &mut codes))?;
        let name = format!("Q4_K: packing and its way to the host, {rows} × {cols}");
        let line = Line { name: &name, work: (rows * cols / 256 * 144) as f64, peak: BUS, unit: "TB/s" };
        measure(&cuda, &line, || cuda.pack(&codes, Packing::Blocks(&grid)))?;
    }
    let [p, q] = [upload(1024, 128_256, 12)?, upload(1024, 128_256, 13)?];
    let line =
        Line { name: "KL divergence, 1024 tokens", work: (8 * 1024 * 128_256) as f64, peak: MEMORY, unit: "TB/s" };
    measure(&cuda, &line, || cuda.compare(&p, &q, &[7; 1024]))?;
    Ok(())
}

/// A Llama of a published shape: `[hidden, inner, heads, key heads, layers, vocabulary]`.
fn config(shape: &str) -> Option<Value> {
    let [hidden, inner, heads, kv_heads, layers, vocabulary] = match shape {
        "1b" => [2048, 8192, 32, 8, 16, 128_256],
        "8b" => [4096, 14336, 32, 8, 32, 128_256],
        "70b" => [8192, 28672, 64, 8, 80, 128_256],
        _ => return None,
    };
    Some(json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "tie_word_embeddings": false, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "max_position_embeddings": 8192
    }))
}

/// Writes a checkpoint with random weights, each tensor by itself; the tokenizer is the built-in model's.
fn synthesize(folder: &Path, shape: &str) -> std::result::Result<(), String> {
    let config = config(shape).ok_or_else(|| format!("`{shape}` is not a shape: there are 1b, 8b and 70b"))?;
    let told = |error: &dyn std::fmt::Display| error.to_string();
    demo::export(folder).map_err(|e| told(&e))?;
    std::fs::remove_file(folder.join("model.safetensors")).map_err(|e| told(&e))?;
    std::fs::write(folder.join("config.json"), config.to_string()).map_err(|e| told(&e))?;
    let graph = families::build(&config).map_err(|e| told(&e))?;
    let tensors = graph.tensors();
    let specs =
        tensors.iter().map(|(name, shape)| TensorSpec { name: name.clone(), dtype: Dtype::BF16, shape: shape.clone() });
    let writer = ShardedWriter::create(folder, specs.collect(), 5_000_000_000, &std::collections::BTreeMap::new())
        .map_err(|e| told(&e))?;
    for (index, (name, shape)) in tensors.iter().enumerate() {
        let count: usize = shape.iter().product();
        let mut bytes = vec![0u8; 2 * count];
        let norm = shape.len() == 1;
        let spread = (*shape.last().expect("a shape") as f32).powf(-0.5);
        bytes.par_chunks_mut(1 << 17).enumerate().for_each(|(part, bytes)| {
            let mut state = ((index as u64) << 32 | part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
            for pair in bytes.chunks_exact_mut(2) {
                let value = if norm { 1.0 } else { spread * normal(&mut state) };
                pair.copy_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
            }
        });
        writer.write(name, &bytes).map_err(|e| told(&e))?;
    }
    writer.finish().map_err(|e| told(&e))?;
    println!("{}: {} tensors", folder.display(), tensors.len());
    Ok(())
}
