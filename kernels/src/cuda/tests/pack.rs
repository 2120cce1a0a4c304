//! Packed codes, byte for byte those of the codecs.

use formats::codec::Declared;
use formats::ggml::{BlockScales, TYPES};
use formats::grid::Scheme;
use formats::{Codec, Dtype, Encoding, Float, GgmlType, PackedWeight, QuantizedWeight, WordLayout, codec};
use ndarray::Array2;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::on_all;
use crate::Cpu;
use crate::backend::{Grid, GridSpec, Memory, Packing, Quantize};

/// What the device makes of codes `[rows, cols]`; nothing without a device.
fn packed(codes: &[u8], rows: usize, cols: usize, bits: u8, layout: WordLayout) -> Option<Vec<u8>> {
    let codes = Array2::from_shape_vec((rows, cols), codes.to_vec()).unwrap();
    on_all(|cuda| cuda.pack(&cuda.send_codes(&codes).unwrap(), Packing::Words { bits, layout }).unwrap())
}

/// Packs the parts of a weight that hold codes and compares them with what its codec writes.
fn check(id: &str, weight: &QuantizedWeight, parts: &[(&str, bool, WordLayout)]) {
    let codec: &dyn Codec = codec::codec(id).unwrap();
    let expected = codec.encode(weight, Dtype::F16).unwrap();
    for &(name, zeros, layout) in parts {
        let (values, cols) = if zeros { (&weight.zeros, weight.groups()) } else { (&weight.codes, weight.cols) };
        let Some(found) = packed(values, weight.rows, cols, weight.encoding.levels.bits(), layout) else { return };
        let context =
            format!("{name} of {id}, {} × {} at {} bits", weight.rows, weight.cols, weight.encoding.levels.bits());
        assert_eq!(found, expected.get(name).unwrap().data, "{context}");
    }
}

/// Sends what a codec reads of its own parts, in words, and compares with the reals of the codes.
fn check_unpacked(id: &str, weight: &QuantizedWeight) {
    let codec: &dyn Codec = codec::codec(id).unwrap();
    let parts = codec.encode(weight, Dtype::F16).unwrap();
    let declared = Declared { encoding: weight.encoding, zeros_minus_one: id == "gptq" };
    let stored = codec.decode_packed(&|name| parts.get(name), &declared).unwrap();
    let found = on_all(|cuda| {
        let layout = codec.word_layout();
        let matrix = cuda.upload_packed(stored.clone(), layout).unwrap();
        let short = PackedWeight { words: stored.words[1..].to_vec(), ..stored.clone() };
        cuda.upload_packed(short, layout).map(|_| ()).unwrap_err();
        cuda.download(&matrix).unwrap()
    });
    let Some(found) = found else { return };
    let encoding = weight.encoding;
    assert_eq!(found.as_slice().unwrap(), weight.dequantize(), "{id}, {encoding:?} [{}, {}]", weight.rows, weight.cols);
    let host = Cpu::default().upload_packed(stored, codec.word_layout()).unwrap();
    assert_eq!(host.as_slice().unwrap(), weight.dequantize(), "{id}, {encoding:?}, on the host");
}

/// Some codes and zeros, every one of them below `2^bits`.
fn weight(rows: usize, cols: usize, bits: u8, group: usize) -> QuantizedWeight {
    let scheme = Scheme { bits, group: Some(group), symmetric: false };
    let groups = scheme.groups(cols);
    let mut state = (rows * 31 + cols * 7 + usize::from(bits)) as u64;
    let mut next = |from: u32| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (from + (state >> 40) as u32 % ((1 << bits) - from)) as u8
    };
    QuantizedWeight {
        rows,
        cols,
        encoding: scheme.into(),
        codes: (0..rows * cols).map(|_| next(0)).collect(),
        scales: vec![0.5; rows * groups],
        zeros: (0..rows * groups).map(|_| next(1)).collect(),
        mins: Vec::new(),
        global: None,
        group_of: None,
    }
}

#[test]
fn words_are_those_of_compressed_tensors() {
    for bits in 2..=8 {
        for (rows, cols, group) in [(1, 1, 1), (3, 7, 7), (37, 97, 97), (33, 64, 16)] {
            let parts = [
                ("weight_packed", false, WordLayout::Rows),
                ("weight_zero_point", true, WordLayout::ColumnsTransposed),
            ];
            check("compressed-tensors", &weight(rows, cols, bits, group), &parts);
        }
    }
}

#[test]
fn words_are_those_of_gptq() {
    for bits in [2, 3, 4, 8] {
        for (rows, cols, group) in [(32, 32, 32), (64, 160, 32), (96, 96, 96)] {
            let parts = [("qweight", false, WordLayout::RowsTransposed), ("qzeros", true, WordLayout::ColumnsLessOne)];
            check("gptq", &weight(rows, cols, bits, group), &parts);
        }
    }
}

#[test]
fn words_are_those_of_awq() {
    for (rows, cols, group) in [(8, 1, 1), (24, 37, 37), (64, 96, 32)] {
        let parts = [("qweight", false, WordLayout::Awq), ("qzeros", true, WordLayout::Awq)];
        check("awq", &weight(rows, cols, 4, group), &parts);
    }
}

#[test]
fn what_was_packed_is_unpacked_where_it_is_needed() {
    for bits in 2..=8 {
        for (rows, cols, group) in [(1, 1, 1), (3, 7, 7), (37, 97, 97), (33, 64, 16)] {
            check_unpacked("compressed-tensors", &weight(rows, cols, bits, group));
        }
        if [2, 3, 4, 8].contains(&bits) {
            check_unpacked("gptq", &weight(64, 160, bits, 32));
            let group_of = Some((0..160).map(|col| (col * 7 % 5) as u32).collect());
            check_unpacked("gptq", &QuantizedWeight { group_of, ..weight(32, 160, bits, 32) });
        }
    }
    check_unpacked("awq", &weight(24, 37, 4, 37));
    check_unpacked("awq", &weight(64, 96, 4, 32));
    for bits in [4, 8] {
        let mut mlx = weight(9, 128, bits, 64);
        mlx.encoding = Encoding::mlx(bits, 64, Float::F16);
        mlx.mins = (0..mlx.scales.len()).map(|i| i as f32 * 0.25 - 1.0).collect();
        mlx.zeros.fill(0);
        check_unpacked("mlx", &mlx);
    }
    let mut floats = weight(5, 48, 4, 16);
    (floats.encoding, floats.global) = (Encoding::NVFP4, Some(0.5));
    floats.zeros.fill(0);
    check_unpacked("compressed-tensors", &floats);
}

/// Scales of a block, those at the ends of what a half holds among them.
fn scales(ty: &GgmlType) -> impl Strategy<Value = BlockScales> + use<> {
    let encoding = ty.layout().unwrap();
    let real = prop_oneof![
        -1.0f32..1.0,
        -8e4f32..8e4,
        -1e-7f32..1e-7,
        prop::sample::select(vec![0.0, -0.0, 1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 65519.9, 65520.0, f32::INFINITY]),
    ];
    // A power of two, a subnormal one too, or what lies beside it.
    let power = (prop_oneof![0u32..4, 0u32..256], -1i32..2).prop_map(|(e, beside)| {
        let power = if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 };
        f32::from_bits(power.saturating_add_signed(beside))
    });
    let d = if encoding.precision() == Float::E8M0 {
        prop_oneof![power, -1.0f32..1.0].boxed()
    } else {
        real.clone().boxed()
    };
    let (low, high, max_min) = encoding.sub().map_or((0, 0, 0), |sub| (sub.low, sub.high, sub.max_min));
    let m = if encoding.has_min() { real.boxed() } else { Just(0.0).boxed() };
    (d, m, prop::array::uniform16(low..=high), prop::array::uniform16(0..=max_min))
        .prop_map(|(d, m, scales, mins)| BlockScales { d, m, scales, mins })
}

#[test]
fn blocks_are_those_of_ggml_in_every_type() {
    let mut seen = 0;
    for ty in TYPES.iter().filter(|ty| ty.layout().is_some()) {
        let top = ty.encoding().max_code();
        let (rows, per_row) = (3, 5);
        let strategy = (
            prop::collection::vec(scales(ty), rows * per_row),
            prop::collection::vec(0..=top, rows * per_row * ty.block_len),
        );
        let runner = &mut TestRunner::new_with_rng(
            Config { cases: 24, ..Config::default() },
            proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
        );
        let tested = runner.run(&strategy, |(blocks, codes)| {
            let grid = Grid::of_blocks(GridSpec::of(ty.encoding(), per_row * ty.block_len), rows, blocks);
            let shaped = Array2::from_shape_vec((rows, grid.cols()), codes.clone()).unwrap();
            let found = on_all(|cuda| cuda.pack(&cuda.send_codes(&shaped).unwrap(), Packing::Blocks(&grid)).unwrap());
            let mut expected = vec![0; rows * per_row * ty.block_bytes];
            ty.pack(&grid.blocks, &codes, &mut expected);
            prop_assert!(found.is_none_or(|found| found == expected), "{ty}");
            Ok(())
        });
        tested.unwrap();
        seen += 1;
    }
    assert_eq!(seen, 15, "types with blocks");
}

#[test]
fn what_cannot_be_packed_is_refused_and_nothing_is_no_work() {
    on_all(|cuda| {
        let words = |rows, cols, bits, layout| {
            cuda.pack(&cuda.send_codes(&Array2::zeros((rows, cols))).unwrap(), Packing::Words { bits, layout })
        };
        assert!(words(0, 8, 4, WordLayout::Rows).unwrap().is_empty());
        assert!(words(8, 0, 4, WordLayout::Awq).unwrap().is_empty());
        assert_eq!(words(8, 8, 8, WordLayout::Rows).unwrap(), [0; 64]);
        words(8, 8, 9, WordLayout::Rows).unwrap_err();
        words(8, 8, 0, WordLayout::Rows).unwrap_err();
        words(8, 8, 3, WordLayout::Awq).unwrap_err();
        words(4, 8, 4, WordLayout::Awq).unwrap_err();
        let ty = GgmlType::from_name("Q8_0").unwrap();
        let grid = Grid::of_blocks(GridSpec::of(ty.encoding(), 64), 1, vec![BlockScales::default(); 2]);
        let codes = cuda.send_codes(&Array2::zeros((1, 64))).unwrap();
        assert_eq!(cuda.pack(&codes, Packing::Blocks(&grid)).unwrap().len(), 68);
        cuda.pack(&codes, Packing::Blocks(&Grid { spec: GridSpec::of(ty.encoding(), 63), ..grid.clone() }))
            .unwrap_err();
        cuda.pack(&codes, Packing::Blocks(&Grid { rows: 2, ..grid.clone() })).unwrap_err();
        let integers = GridSpec::of(Scheme { bits: 4, group: Some(32), symmetric: true }.encoding(Float::F16, 0), 64);
        let integers = Grid::of_integers(integers, 1, vec![1.0; 2], vec![8; 2]);
        cuda.pack(&codes, Packing::Blocks(&integers)).unwrap_err();
        let empty = Grid::of_blocks(GridSpec::of(ty.encoding(), 64), 0, Vec::new());
        assert!(
            cuda.pack(&cuda.send_codes(&Array2::zeros((0, 64))).unwrap(), Packing::Blocks(&empty)).unwrap().is_empty()
        );
    });
}
