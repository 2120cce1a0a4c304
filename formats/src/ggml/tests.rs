//! Parity with gguf-py and ggml (`tests/make_gguf_vectors.py` says how the vectors came about), and what holds for all types.

use super::*;
use crate::encoding::SubScales;
use serde_json::Value;

fn json(name: &str) -> Value {
    let path = format!("{}/tests/vectors/gguf_{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(&path).expect(&path)).expect(&path)
}

fn bytes_of(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().expect("a string of hex digits");
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn ty(name: &str) -> GgmlType {
    GgmlType::from_name(name).expect(name)
}

/// SplitMix64, as in the script that made the vectors.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

/// Blocks made by ggml, values read from them by gguf-py.
#[test]
fn blocks_mean_what_ggml_says() {
    for name in [
        "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "tq1_0",
        "tq2_0", "mxfp4",
    ] {
        let v = json(name);
        let first = |a: &str, b: &str| v.get(a).or(v.get(b)).expect(a).clone();
        let bytes = bytes_of(&first("row0_hex_no_imatrix", "row0_hex"));
        let expected = first("row0_dequant_no_imatrix", "row0_dequant");
        let expected: Vec<f32> = expected.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        let ty = GgmlType::from_id(v["type_id"].as_u64().unwrap() as u32).unwrap();
        assert_eq!(ty, self::ty(name));
        assert_eq!(ty.name, v["type"].as_str().unwrap());
        assert_eq!(ty.block_len as u64, v["block_elems"].as_u64().unwrap());
        assert_eq!(ty.block_bytes as u64, v["block_bytes"].as_u64().unwrap());
        let mut out = vec![0.0; 256];
        ty.dequantize(&bytes, &mut out).unwrap();
        for (i, (ours, theirs)) in out.iter().zip(&expected).enumerate() {
            assert_eq!(ours, theirs, "{name} at {i}");
        }
    }
}

/// The scalar statement of a type: `scale · level − min` from its scales and codes is what `dequantize` gives.
#[test]
fn layouts_say_what_decoding_does() {
    const BLOCKS: usize = 300;
    for ty in TYPES.iter().filter(|ty| ty.layout().is_some()) {
        let layout = ty.layout().unwrap();
        let groups = ty.groups_per_block();
        assert_eq!(groups * layout.group(), ty.block_len, "{ty}");
        let bytes = Random(7).bytes(BLOCKS * ty.block_bytes);
        let mut blocks = vec![BlockScales::default(); BLOCKS];
        let mut codes = vec![0; BLOCKS * ty.block_len];
        ty.unpack(&bytes, &mut blocks, &mut codes);
        let mut values = vec![0.0; codes.len()];
        ty.dequantize(&bytes, &mut values).unwrap();
        let (mut scales, mut mins) = (vec![0.0; groups], vec![0.0; groups]);
        let mut compared = 0;
        for (index, block) in blocks.iter().enumerate() {
            ty.expand(block, &mut scales, &mut mins);
            if let Some(sub) = layout.sub() {
                assert!(block.scales[..groups].iter().all(|s| (sub.low..=sub.high).contains(s)), "{ty}: {block:?}");
                assert!(block.mins[..groups].iter().all(|&m| m <= sub.max_min), "{ty}: {block:?}");
            }
            if !block.d.is_finite() || !block.m.is_finite() {
                continue;
            }
            for i in 0..ty.block_len {
                let at = index * ty.block_len + i;
                let value = scales[i / layout.group()] * layout.levels.level(codes[at]) - mins[i / layout.group()];
                assert_eq!(value.to_bits(), values[at].to_bits(), "{ty}, block {index}, weight {i}: {value}");
                compared += 1;
            }
        }
        assert!(compared > BLOCKS * ty.block_len / 2, "{ty}: {compared}");
    }
}

#[test]
fn packing_inverts_unpacking() {
    for ty in TYPES.iter().filter(|ty| ty.layout().is_some()) {
        let mut random = Random(3);
        let mut inverted = 0;
        for index in 0..64 {
            let bytes = random.bytes(ty.block_bytes);
            let mut block = [BlockScales::default()];
            let mut codes = vec![0; ty.block_len];
            ty.unpack(&bytes, &mut block, &mut codes);
            if block[0].d.is_nan() || block[0].m.is_nan() {
                continue;
            }
            let mut packed = vec![0xa5; bytes.len()];
            ty.pack(&block, &codes, &mut packed);
            let (mut block_again, mut codes_again) = ([BlockScales::default()], vec![0; codes.len()]);
            ty.unpack(&packed, &mut block_again, &mut codes_again);
            assert_eq!((block, codes), (block_again, codes_again), "{ty}, block {index}");
            // Of TQ1_0 several bytes mean the same codes, and packing picks one.
            assert!(packed == bytes || ty.name == "TQ1_0", "{ty}, block {index}: {bytes:x?} became {packed:x?}");
            inverted += 1;
        }
        assert!(inverted > 40, "{ty}");
    }
}

#[test]
fn codes_and_scales_at_their_ends_keep_to_their_bits() {
    for ty in TYPES.iter().filter(|ty| ty.layout().is_some()) {
        let layout = ty.layout().unwrap();
        let groups = ty.groups_per_block();
        let sub = layout.sub().unwrap_or(SubScales { low: 0, high: 0, max_min: 0 });
        for at in 0..ty.block_len {
            let mut codes = vec![0; ty.block_len];
            codes[at] = (layout.levels.count() - 1) as u8;
            let mut block =
                BlockScales { d: 1.0, m: if layout.has_min() { 2.0 } else { 0.0 }, ..BlockScales::default() };
            block.scales[..groups].fill(if layout.sub().is_some() { sub.low } else { 0 });
            if layout.sub().is_some() {
                block.scales[at % groups] = sub.high;
                block.mins[at * 7 % groups] = sub.max_min;
            }
            let mut bytes = vec![0; ty.block_bytes];
            ty.pack(&[block], &codes, &mut bytes);
            let (mut again, mut codes_again) = ([BlockScales::default()], vec![0; ty.block_len]);
            ty.unpack(&bytes, &mut again, &mut codes_again);
            assert_eq!((block, &codes), (again[0], &codes_again), "{ty}, weight {at}");
        }
    }
}

#[test]
fn lengths_are_checked() {
    let q4_0 = ty("Q4_0");
    assert_eq!(q4_0.row_bytes(64), Some(36));
    assert_eq!(q4_0.row_bytes(48), None);
    let message = q4_0.dequantize(&[0; 17], &mut [0.0; 32]).unwrap_err().to_string();
    assert_eq!(message, "the data of 32 Q4_0 values is 17 bytes, expected 18 bytes");
    let message = q4_0.dequantize(&[0; 18], &mut [0.0; 33]).unwrap_err().to_string();
    assert_eq!(message, "the data of 33 Q4_0 values is 18 bytes, expected a multiple of 32 values");
    assert_eq!(GgmlType::from_id(9999), None);
}

#[test]
fn a_hand_made_block() {
    // Scale 2.0; weight j is the low nibble of byte j, weight j + 16 its high nibble.
    let mut bytes = vec![0x00, 0x40];
    bytes.extend((0..16).map(|j| j | (15 - j) << 4));
    let mut out = [0.0; 32];
    ty("q4_0").dequantize(&bytes, &mut out).unwrap();
    for j in 0..16 {
        assert_eq!(out[j], 2.0 * (j as f32 - 8.0));
        assert_eq!(out[j + 16], 2.0 * (7.0 - j as f32));
    }
}

#[test]
fn every_half_is_widened_exactly() {
    for bits in 0..=u16::MAX {
        let (ours, theirs) = (half(bits.to_le_bytes()), f16::from_bits(bits).to_f32());
        assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#x}: {ours} {theirs}");
    }
}

#[test]
fn ids_and_names_are_distinct() {
    for (i, a) in TYPES.iter().enumerate() {
        assert!(TYPES[i + 1..].iter().all(|b| a.id != b.id && a.name != b.name), "{a}");
        assert_eq!(GgmlType::from_name(&a.name.to_lowercase()), Some(*a));
    }
    assert_eq!(GgmlType::from_name("Q9_K"), None);
}

fn fnv(bytes: impl IntoIterator<Item = u8>) -> String {
    let hash = bytes
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn random_bytes_are_read_as_gguf_py_reads_them() {
    let vectors = json("parity");
    let cases = vectors["decoded"].as_object().unwrap();
    assert_eq!(cases.len(), TYPES.len());
    for (name, case) in cases {
        let ty = ty(name);
        assert_eq!(Some(u64::from(ty.id)), case["id"].as_u64());
        let decode = |bytes: &[u8]| {
            let mut values = vec![0.0f32; bytes.len() / ty.block_bytes * ty.block_len];
            ty.dequantize(bytes, &mut values).unwrap();
            values.into_iter().flat_map(|x| if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() }.to_le_bytes())
        };
        let values: Vec<u8> = decode(&bytes_of(&case["row"])).collect();
        let expected = bytes_of(&case["values"]);
        if let Some(at) = (0..256).find(|at| values[4 * at..4 * at + 4] != expected[4 * at..4 * at + 4]) {
            panic!("{name}, weight {at}: {:?}, expected {:?}", floats_of(&values)[at], floats_of(&expected)[at]);
        }
        let rows = case["rows"].as_u64().unwrap() as usize;
        let bytes = Random(vectors["seed"].as_u64().unwrap()).bytes(rows * ty.row_bytes(256).unwrap());
        assert_eq!(fnv(decode(&bytes)), case["fnv"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn rows_are_encoded_as_gguf_py_encodes_them() {
    let vectors = json("parity");
    let mut wrong = Vec::new();
    for (name, case) in vectors["encoded"].as_object().unwrap() {
        let ty = ty(name);
        let encode = |values: &[f32]| {
            let mut out = vec![0xa5; ty.row_bytes(values.len()).unwrap()];
            ty.encode(values, &mut out).expect(name);
            out
        };
        for (row, expected) in case["rows"].as_object().unwrap() {
            let values = floats_of(&bytes_of(&vectors["rows"][row]));
            let (bytes, mut expected) = (encode(&values), bytes_of(expected));
            if row == "zeros of both signs" && name.ends_with("_1") {
                // NumPy's smallest of 0 and −0 is either; ggml keeps the first it meets.
                for (block, values) in expected.chunks_mut(ty.block_bytes).zip(values.chunks(32)) {
                    block[3] = u8::from(values[0].is_sign_negative()) << 7;
                }
            }
            let blocks = bytes.chunks(ty.block_bytes).zip(expected.chunks(ty.block_bytes));
            if let Some((ours, theirs)) = blocks.into_iter().find(|(ours, theirs)| ours != theirs) {
                wrong.push(format!("{name}, row of {row}:\n{ours:02x?}, expected\n{theirs:02x?}"));
            }
        }
        // Floats of very different sizes, as in the script.
        let bytes = Random(vectors["seed"].as_u64().unwrap() + 1).bytes(32 * 256 * 4);
        let widely = |x: f32| f32::from_bits(x.to_bits() & 0x807f_ffff | ((x.to_bits() >> 23 & 31) + 100) << 23);
        let values: Vec<f32> = floats_of(&bytes).into_iter().map(widely).collect();
        if fnv(encode(&values)) != case["many"].as_str().unwrap() {
            wrong.push(format!("{name}, random rows"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let mut bytes = [0; 8];
    ty("F32").encode(&[1.0, -0.0], &mut bytes).unwrap();
    assert_eq!(bytes, [0, 0, 128, 63, 0, 0, 0, 128]);
    let searched = |ty: &&GgmlType| ty.encode(&vec![0.5; ty.block_len], &mut vec![0; ty.block_bytes]).is_none();
    let searched: Vec<&str> = TYPES.iter().filter(searched).map(|ty| ty.name).collect();
    assert_eq!(searched, ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]);
}
