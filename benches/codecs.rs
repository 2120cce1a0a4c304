//! Packing and unpacking of one 4096 x 4096 weight, and decoding and encoding as many values of each ggml type; one
//! thread.
//!
//! In all of them bytes are those of the same weights in f16, two a weight, whatever the packed form takes.

mod common;

use criterion::{Throughput, criterion_group, criterion_main};
use formats::codec::{Awq, Codec, CompressedTensors, Declared, Gptq};
use formats::ggml::TYPES;
use formats::{Dtype, QuantizedWeight, Scheme};

use common::{Criterion, measure, noise};

const SIDE: usize = 4096;
const WORK: Throughput = Throughput::BytesDecimal((2 * SIDE * SIDE) as u64);

/// Asymmetric, groups of 128.
fn weight(bits: u8) -> QuantizedWeight {
    let scheme = Scheme { bits, group: Some(128), symmetric: false };
    let grids = SIDE * scheme.groups(SIDE);
    let middle = f32::from(scheme.midpoint());
    let code = |x: &f32| (middle + x * middle / 3.0).clamp(0.0, f32::from(scheme.max_code())) as u8;
    QuantizedWeight {
        rows: SIDE,
        cols: SIDE,
        encoding: scheme.into(),
        codes: noise(SIDE * SIDE, 1).iter().map(code).collect(),
        scales: vec![0.0625; grids],
        // GPTQ cannot store a zero of 0.
        zeros: noise(grids, 2).iter().map(|x| code(x).max(1)).collect(),
        mins: Vec::new(),
        global: None,
        group_of: None,
    }
}

fn pack(c: &mut Criterion) {
    let cases: [(&dyn Codec, u8); 5] =
        [(&CompressedTensors, 4), (&CompressedTensors, 3), (&Gptq, 4), (&Gptq, 3), (&Awq, 4)];
    for (name, packing) in [("pack", true), ("unpack", false)] {
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        for (codec, bits) in cases {
            let make = || {
                let weight = weight(bits);
                let parts = codec.encode(&weight, Dtype::F16).expect("a weight it can hold");
                (weight, parts)
            };
            let name = format!("{} W{bits}", codec.id());
            measure(&mut group, &name, WORK, make, |(weight, parts)| {
                let declared = Declared { encoding: weight.encoding, zeros_minus_one: codec.id() == "gptq" };
                match packing {
                    true => codec.encode(weight, Dtype::F16).map(drop),
                    false => codec.decode(&|part| parts.get(part), &declared).map(drop),
                }
            });
        }
    }
}

fn dequantize(c: &mut Criterion) {
    let mut group = c.benchmark_group("dequantize");
    group.sample_size(10);
    for ggml in TYPES {
        // Any bytes are a block.
        let make = || {
            let bytes = ggml.row_bytes(SIDE * SIDE).expect("whole blocks");
            let bytes: Vec<u8> = noise(bytes, 3).iter().map(|x| (x * 64.0) as i32 as u8).collect();
            (bytes, vec![0.0f32; SIDE * SIDE])
        };
        measure(&mut group, ggml.name, WORK, make, |(bytes, out)| ggml.dequantize(bytes, out));
    }
}

/// The types whose reference encoder needs no search.
fn encode(c: &mut Criterion) {
    let mut group = c.benchmark_group("encode");
    group.sample_size(10);
    for ggml in TYPES.iter().filter(|ty| ty.encode(&vec![0.0; ty.block_len], &mut vec![0; ty.block_bytes]).is_some()) {
        let make = || (noise(SIDE * SIDE, 4), vec![0u8; ggml.row_bytes(SIDE * SIDE).expect("whole blocks")]);
        measure(&mut group, ggml.name, WORK, make, |(values, out)| ggml.encode(values, out).ok_or(()));
    }
}

criterion_group!(name = benches; config = common::criterion(); targets = pack, dequantize, encode);
criterion_main!(benches);
