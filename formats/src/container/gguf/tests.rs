//! Files written byte by byte, files written by [`GgufWriter`], and files that lie.

use super::header::Header;
use super::*;
use crate::error::{Error, Result};
use crate::ggml::{GgmlType, TYPES};
use proptest::prelude::*;

/// A file written byte by byte from the specification, independent of the parser.
#[derive(Default)]
struct Raw {
    metadata: Vec<u8>,
    keys: u64,
    table: Vec<u8>,
    tensors: u64,
    data: Vec<u8>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Raw {
    fn key(mut self, key: &str, ty: u32, value: &[u8]) -> Raw {
        self.metadata.extend([&string(key), &ty.to_le_bytes()[..], value].concat());
        self.keys += 1;
        self
    }

    fn tensor(mut self, name: &str, ne: &[u64], ty: u32, offset: u64) -> Raw {
        self.table.extend(string(name));
        self.table.extend((ne.len() as u32).to_le_bytes());
        ne.iter().for_each(|e| self.table.extend(e.to_le_bytes()));
        self.table.extend(ty.to_le_bytes());
        self.table.extend(offset.to_le_bytes());
        self.tensors += 1;
        self
    }

    fn data(mut self, bytes: &[u8]) -> Raw {
        self.data.extend(bytes);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.keys.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.table);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}

fn open(bytes: &[u8]) -> Result<GgufFile, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path).map_err(|e| e.to_string().replace(&format!("{}: ", path.display()), ""))
}

fn sample() -> Raw {
    let strings = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &string("a"), &string("ü")].concat();
    let ints = [&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &1i32.to_le_bytes(), &3i32.to_le_bytes()].concat();
    Raw::default()
        .key("general.architecture", 8, &string("llama"))
        .key("llama.block_count", 4, &7u32.to_le_bytes())
        .key("eps", 6, &1e-5f32.to_le_bytes())
        .key("flag", 7, &[1])
        .key("list", 9, &strings)
        .key("ints", 9, &ints)
        .tensor("norm", &[3], 0, 0)
        .tensor("w", &[32, 2], 2, 32)
        .data(&[0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64])
        .data(&[0; 20])
        .data(&[0x5a; 36])
}

#[test]
fn metadata_and_tensors_are_read() {
    let file = open(&sample().bytes()).unwrap();
    assert_eq!(file.string("general.architecture").unwrap(), Some("llama"));
    assert_eq!(file.count("llama.block_count").unwrap(), Some(7));
    assert_eq!(file.float("eps").unwrap(), Some(1e-5));
    assert_eq!(file.bool("flag").unwrap(), Some(true));
    assert_eq!(file.strings("list").unwrap(), Some(vec!["a", "ü"]));
    assert_eq!(file.integers("ints").unwrap(), Some(vec![1, 3]));
    assert_eq!(file.string("absent").unwrap(), None);
    assert_eq!(file.keys().len(), 6);
    let norm = file.get("norm").unwrap();
    assert_eq!((norm.ty.name, norm.shape, norm.rows_and_width()), ("F32", &[3][..], (1, 3)));
    let mut values = [0.0; 3];
    norm.ty.dequantize(norm.data, &mut values).unwrap();
    assert_eq!(values, [1.0, 2.0, 3.0]);
    let w = file.get("w").unwrap();
    assert_eq!((w.ty.name, w.shape, w.row(1)), ("Q4_0", &[2, 32][..], &[0x5a; 18][..]));
    file.release("w");
    assert_eq!(file.get("w").unwrap().data, [0x5a; 36]);
}

#[test]
fn wrong_types_name_the_key() {
    let file = open(&sample().bytes()).unwrap();
    let message = |error: Error| error.kind.to_string();
    assert_eq!(
        message(file.count("general.architecture").unwrap_err()),
        "metadata key `general.architecture` is llama (String), expected a count"
    );
    assert_eq!(
        message(file.string("list").unwrap_err()),
        "metadata key `list` is an array of 2 values, expected a string"
    );
    assert_eq!(message(file.count("eps").unwrap_err()), "metadata key `eps` is 0.00001 (F32), expected a count");
    assert_eq!(
        message(file.integers("list").unwrap_err()),
        "metadata key `list` is an array of 2 values, expected an array of integers"
    );
    assert_eq!(message(file.require::<u8>("x.y", None).unwrap_err()), "metadata key `x.y` is missing");
}

#[test]
fn lying_tables_are_refused_by_name() {
    let check = |raw: Raw, message: &str| assert_eq!(open(&raw.bytes()).unwrap_err(), message);
    check(
        Raw::default().tensor("w", &[32, 4], 2, 0).data(&[0; 71]),
        "tensor `w`: the file is truncated: the tensor ends at byte 168, but the file has 167 bytes; fetch it again",
    );
    check(
        Raw::default().tensor("a", &[16], 0, 0).tensor("b", &[16], 0, 32).data(&[0; 96]),
        "tensor `b`: its data overlaps that of `a`",
    );
    check(
        Raw::default().tensor("w", &[256], 16, 0).data(&[0; 66]),
        "tensor `w`: it is stored as IQ2_XXS, which cannot be read \
         (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, \
         MXFP4); give the checkpoint that the file was made from, or a file of it in another type",
    );
    check(
        Raw::default().tensor("w", &[48], 2, 0).data(&[0; 54]),
        "tensor `w`: a row of 48 values does not split into Q4_0 blocks of 32",
    );
    check(
        Raw::default().tensor("w", &[8], 0, 0).tensor("w", &[8], 0, 32).data(&[0; 64]),
        "tensor `w`: two tensors have this name",
    );
    check(Raw::default().tensor("w", &[8], 0, 5).data(&[0; 64]), "tensor `w`: its offset 5 is not a multiple of 32");
    check(
        Raw::default().tensor("w", &[8], 0, u64::MAX - 31).data(&[0; 64]),
        "tensor `w`: its offset 18446744073709551584 overflows",
    );
    check(
        Raw::default().tensor("w", &[1 << 40, 1 << 40], 0, 0),
        "tensor `w`: its shape [1099511627776, 1099511627776] overflows",
    );
    check(
        Raw::default().tensor("w", &[0, u64::MAX, 2], 0, 0),
        "tensor `w`: its shape [0, 18446744073709551615, 2] overflows",
    );
    // Empty, but some of the extents overflow.
    check(
        Raw::default().tensor("w", &[1, 1 << 40, 1 << 40, 0], 0, 0),
        "tensor `w`: its shape [1, 1099511627776, 1099511627776, 0] overflows",
    );
    check(
        Raw::default().tensor("w", &[1, 1, 1, 1, 1], 0, 0).data(&[0; 4]),
        "tensor `w`: its number of dimensions is 5, expected 1 to 4",
    );
    check(Raw::default().tensor("w", &[], 0, 0), "tensor `w`: its number of dimensions is 0, expected 1 to 4");
    check(
        Raw::default().tensor("w", &[1], 77, 0),
        "tensor `w`: it is stored as type 77, which cannot be read (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, \
         Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4); give the checkpoint that the file was made from, or a file of it in \
         another type",
    );
    check(
        Raw::default().tensor(&"n".repeat(65), &[1], 0, 0),
        "the length of the name of tensor 1 of 1 is 65, expected 1 to 64 bytes",
    );
    check(
        Raw { tensors: u64::MAX, ..Raw::default() },
        "it announces 18446744073709551615 tensors, but the 16 bytes that follow hold at most 0; fetch it again",
    );
    assert_eq!(open(b"").unwrap_err(), "the file is empty; fetch it again");
    assert_eq!(
        open(b"PK\x03\x04").unwrap_err(),
        "this is not a GGUF file but a zip archive, as torch.save writes too; unpack it, or save the model as safetensors"
    );
}

#[test]
fn lying_metadata_is_refused_by_key() {
    let check = |raw: Raw, message: &str| assert_eq!(open(&raw.bytes()).unwrap_err(), message);
    let u32s = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    check(
        Raw { keys: 90_000, ..Raw::default() },
        "it announces 90000 metadata keys, but the 8 bytes that follow hold at most 0; fetch it again",
    );
    check(Raw::default().key("a", 4, &[0; 4]).key("a", 4, &[0; 4]), "metadata key `a` stands twice");
    check(Raw::default().key("", 4, &[0; 4]), "the length of metadata key 1 of 1 is 0, expected 1 to 65535 bytes");
    check(Raw::default().key("a", 99, &[0; 4]), "metadata key `a` has the value type 99, which does not exist");
    check(
        Raw::default().key("a", 7, &[2]),
        "the value of metadata key `a` is invalid: Invalid metadata: Invalid boolean value: 2 (expected 0 or 1)",
    );
    check(
        Raw::default().key("a", 8, &[&1000u64.to_le_bytes()[..], b"short"].concat()),
        "the file is truncated: the value of metadata key `a` goes beyond the 27 bytes left; fetch it again",
    );
    let metadata = [&2u64.to_le_bytes()[..], &[0xff, b'k'], &u32s(&[4, 1])].concat();
    let key = Raw { metadata, keys: 1, ..Raw::default() };
    check(key, "metadata key 1 of 1, \"\u{fffd}k\", is not UTF-8");
    let message = |raw: Raw| open(&raw.bytes()).unwrap_err();
    let not_text = message(Raw::default().key("a", 8, &[&1u64.to_le_bytes()[..], &[0xff]].concat()));
    assert!(
        not_text.starts_with("the value of metadata key `a` is invalid: Format error: Invalid UTF-8"),
        "{not_text}"
    );
    let huge = message(Raw::default().key("a", 9, &[&u32s(&[4])[..], &u64::MAX.to_le_bytes()].concat()));
    assert!(huge.starts_with("the value of metadata key `a` is invalid: "), "{huge}");
    let large = message(Raw::default().key("a", 9, &[&u32s(&[0])[..], &(1u64 << 40).to_le_bytes()].concat()));
    assert!(large.contains("exceeds budget"), "{large}");
    // An array of one array of one array, and so on.
    let nested = message(Raw::default().key("a", 9, &[&u32s(&[9, 1, 0])[..]].concat().repeat(100_000)));
    assert!(nested.starts_with("the value of metadata key `a` is invalid: ") && nested.contains("nesting"), "{nested}");
    for (ty, value) in [(4, u32s(&[0])), (4, u32s(&[48])), (10, u32s(&[32, 0])), (8, string("32"))] {
        let message = message(Raw::default().key("general.alignment", ty, &value));
        let found = message.strip_prefix("metadata key `general.alignment` is ").expect(&message);
        assert!(found.ends_with(", expected a power of two (U32)"), "{message}");
    }
    // Many small arrays, each within the limit for one.
    let bytes = [&u32s(&[0])[..], &1000u64.to_le_bytes(), &[1; 1000]].concat();
    let many = (0..6).fold(Raw::default(), |raw, i| raw.key(&format!("a{i}"), 9, &bytes)).bytes();
    assert_eq!(Header::parse(&many).unwrap().metadata.len(), 6);
    let message = Header::parse_within(&many, 100_000).unwrap_err().to_string();
    assert_eq!(message, "its metadata up to key `a4` takes more than the 100000 bytes allowed");
}

#[test]
fn only_versions_2_and_3_are_read() {
    let open_as = |version: u32| {
        let mut bytes = sample().bytes();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        open(&bytes).map(|file| file.tensors().len())
    };
    assert_eq!((open_as(2), open_as(3)), (Ok(2), Ok(2)));
    assert_eq!(
        open_as(1).unwrap_err(),
        "its GGUF version is 1, which cannot be read (2 or 3); convert the original checkpoint again"
    );
    assert_eq!(
        open_as(4).unwrap_err(),
        "its GGUF version is 4, which cannot be read (2 or 3); convert the original checkpoint again"
    );
    assert_eq!(
        open_as(3 << 24).unwrap_err(),
        "it is a big-endian GGUF file, which cannot be read; swap its bytes with llama.cpp's gguf_convert_endian.py"
    );
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = sample().bytes();
    for len in 0..bytes.len() {
        assert!(open(&bytes[..len]).is_err(), "of {} bytes, {len} were enough", bytes.len());
    }
}

proptest! {
    /// Whatever byte is changed, opening fails or every tensor lies in the file.
    #[test]
    fn changed_bytes_never_panic(at in 0usize..400, value in any::<u8>()) {
        let mut bytes = sample().bytes();
        let len = bytes.len();
        bytes[at % len] = value;
        if let Ok(file) = open(&bytes) {
            for spec in file.tensors() {
                let view = file.get(&spec.name).unwrap();
                let mut out = vec![0.0; view.shape.iter().product()];
                view.ty.dequantize(view.data, &mut out).unwrap();
            }
        }
    }
}

fn tensor(name: &str, ty: &str, shape: &[usize]) -> GgufTensor {
    GgufTensor { name: name.into(), ty: GgmlType::from_name(ty).unwrap(), shape: shape.to_vec() }
}

fn text(value: &str) -> MetadataValue {
    MetadataValue::String(value.into())
}

type Pairs = Vec<(String, MetadataValue)>;

/// Metadata of every type and tensors of every type.
fn written() -> (Pairs, Vec<GgufTensor>, Vec<Vec<u8>>) {
    let strings = metadata_array(vec![text("a"), text(""), text("ü")], GGUFValueType::String).unwrap();
    let floats = metadata_array(vec![MetadataValue::F32(-0.5), MetadataValue::F32(f32::MIN)], GGUFValueType::F32);
    let metadata = [
        ("general.architecture", text("command-r")),
        ("command-r.block_count", MetadataValue::U32(7)),
        ("z.u8", MetadataValue::U8(200)),
        ("z.i8", MetadataValue::I8(-3)),
        ("z.u16", MetadataValue::U16(60000)),
        ("z.i16", MetadataValue::I16(-30000)),
        ("z.i32", MetadataValue::I32(i32::MIN)),
        ("z.u64", MetadataValue::U64(u64::MAX)),
        ("z.i64", MetadataValue::I64(i64::MIN)),
        ("z.f32", MetadataValue::F32(1e-5)),
        ("z.f64", MetadataValue::F64(std::f64::consts::PI)),
        ("z.bool", MetadataValue::Bool(true)),
        ("a.strings", strings),
        ("a.floats", floats.unwrap()),
        ("a.empty", metadata_array(Vec::new(), GGUFValueType::I32).unwrap()),
    ];
    let mut tensors: Vec<GgufTensor> =
        TYPES.iter().enumerate().map(|(i, ty)| tensor(&format!("blk.{i}.w"), ty.name, &[3, 256])).collect();
    tensors.push(tensor("norm.weight", "F32", &[5]));
    tensors.push(tensor("experts", "Q8_0", &[2, 3, 64]));
    tensors.push(tensor("none", "F16", &[0, 8]));
    let bytes = |(i, t): (usize, &GgufTensor)| (0..t.bytes().unwrap()).map(|b| (31 * i as u64 + b) as u8).collect();
    let data = tensors.iter().enumerate().map(bytes).collect();
    (metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect(), tensors, data)
}

fn compare(file: &GgufFile, tensors: &[GgufTensor], data: &[Vec<u8>]) {
    assert_eq!(file.tensors().len(), tensors.len());
    for (tensor, data) in tensors.iter().zip(data) {
        let view = file.get(&tensor.name).unwrap();
        assert_eq!((view.ty, view.shape, view.data), (tensor.ty, &tensor.shape[..], &data[..]), "{}", tensor.name);
        file.release(&tensor.name);
        assert_eq!(file.get(&tensor.name).unwrap().data, &data[..], "after release");
    }
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let (metadata, tensors, data) = written();
    let writer = GgufWriter::create(&path, metadata.clone(), tensors.clone()).unwrap();
    assert_eq!(writer.files().collect::<Vec<_>>(), [path.as_path()]);
    assert_eq!(writer.total_bytes(), data.iter().map(|d| d.len() as u64).sum::<u64>());
    for (tensor, data) in tensors.iter().zip(&data).rev() {
        if tensor.name == "experts" {
            writer.write_at(&tensor.name, 34, &data[34..]).unwrap();
            writer.write_at(&tensor.name, 0, &data[..34]).unwrap();
        } else {
            writer.write(&tensor.name, data).unwrap();
        }
    }
    writer.finish().unwrap();
    let file = GgufFile::open(&path).unwrap();
    compare(&file, &tensors, &data);
    assert_eq!(file.keys().len(), metadata.len());
    for (key, value) in &metadata {
        assert_eq!(file.metadata(key), Some(value), "{key}");
    }
    assert_eq!(file.count("z.u16").unwrap(), Some(60000));

    // Padding: a whole number of 32 bytes, zero between the tensors and after the last, which is empty, and before it.
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes.len().is_multiple_of(32));
    let last = file.get("experts").unwrap().data;
    assert!(bytes.ends_with(&[last, &vec![0; last.len().next_multiple_of(32) - last.len()]].concat()));
    let from_bytes = GgufFile::from_bytes("memory", bytes).unwrap();
    compare(&from_bytes, &tensors, &data);
}

/// The bytes that the specification asks for, written by hand.
#[test]
fn the_file_is_as_specified() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let expected = sample().bytes();
    let strings = metadata_array(vec![text("a"), text("ü")], GGUFValueType::String).unwrap();
    let ints = metadata_array(vec![MetadataValue::I32(1), MetadataValue::I32(3)], GGUFValueType::I32).unwrap();
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.block_count", MetadataValue::U32(7)),
        ("eps", MetadataValue::F32(1e-5)),
        ("flag", MetadataValue::Bool(true)),
        ("list", strings),
        ("ints", ints),
    ];
    let metadata = metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    let tensors = vec![tensor("norm", "F32", &[3]), tensor("w", "Q4_0", &[2, 32])];
    let writer = GgufWriter::create(&path, metadata, tensors).unwrap();
    writer.write("w", &[0x5a; 36]).unwrap();
    writer.write("norm", &[0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64]).unwrap();
    writer.finish().unwrap();
    let mut padded = expected;
    padded.resize(padded.len().next_multiple_of(32), 0);
    assert!(std::fs::read(&path).unwrap() == padded);
}

#[test]
fn a_split_model_is_opened_by_its_first_file() {
    let (metadata, tensors, data) = written();
    for (max_bytes, count) in [(u64::MAX, 1), (2000, 7), (1, 21)] {
        let dir = tempfile::tempdir().unwrap();
        let stem = dir.path().join("m.Q4_K");
        let writer = GgufWriter::create_split(&stem, max_bytes, metadata.clone(), tensors.clone()).unwrap();
        let paths: Vec<PathBuf> = writer.files().map(Path::to_path_buf).collect();
        let names: Vec<_> = paths.iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_string()).collect();
        let expected: Vec<String> = (1..=count).map(|n| format!("m.Q4_K-{n:05}-of-{count:05}.gguf")).collect();
        assert_eq!(names, expected);
        for (tensor, data) in tensors.iter().zip(&data) {
            writer.write(&tensor.name, data).unwrap();
        }
        writer.finish().unwrap();
        let file = GgufFile::open(&paths[0]).unwrap();
        compare(&file, &tensors, &data);
        assert_eq!(file.keys().len(), metadata.len() + 3);
        assert_eq!(file.metadata("split.tensors.count"), Some(&MetadataValue::I32(tensors.len() as i32)));
        assert_eq!(file.metadata("split.count"), Some(&MetadataValue::U16(count)));
        for path in &paths[1..] {
            assert!(std::fs::metadata(path).unwrap().len() <= max_bytes.max(1000) + 1000, "{}", path.display());
        }
    }
}

#[test]
fn an_incomplete_split_set_names_what_is_wrong() {
    let check = |spoil: &dyn Fn(&Path), open: usize, message: &str| {
        let dir = tempfile::tempdir().unwrap();
        let tensors: Vec<GgufTensor> = ["a", "b", "c"].iter().map(|name| tensor(name, "F32", &[8])).collect();
        let writer = GgufWriter::create_split(dir.path().join("m"), 32, Vec::new(), tensors).unwrap();
        ["a", "b", "c"].iter().for_each(|name| writer.write(name, &[0; 32]).unwrap());
        writer.finish().unwrap();
        spoil(dir.path());
        let path = split_path(dir.path().join("m"), open, 3);
        let path = if path.exists() { path } else { dir.path().join("other.gguf") };
        let found = GgufFile::open(path).unwrap_err().to_string();
        assert_eq!(found.replace(&dir.path().display().to_string(), "DIR"), message);
    };
    let copy = |dir: &Path, from: usize, to: usize| {
        std::fs::copy(split_path(dir.join("m"), from, 3), split_path(dir.join("m"), to, 3)).unwrap();
    };
    check(
        &|dir| std::fs::remove_file(dir.join("m-00003-of-00003.gguf")).unwrap(),
        1,
        "DIR/m-00001-of-00003.gguf: file 3 of 3 that the model is split into, DIR/m-00003-of-00003.gguf, is missing",
    );
    check(
        &|_| {},
        2,
        "DIR/m-00002-of-00003.gguf: it is file 2 of 3 that a model is split into; open the first, \
         DIR/m-00001-of-00003.gguf",
    );
    check(
        &|dir| std::fs::rename(dir.join("m-00001-of-00003.gguf"), dir.join("other.gguf")).unwrap(),
        1,
        "DIR/other.gguf: the name of file 1 of 3 that a model is split into is other.gguf, expected a name that ends in \
         -00001-of-00003.gguf",
    );
    check(
        &|dir| copy(dir, 1, 2),
        1,
        "DIR/m-00002-of-00003.gguf: tensor `a`: the tensor is in two of the files that the model is split into",
    );
    check(
        &|dir| copy(dir, 3, 2),
        1,
        "DIR/m-00002-of-00003.gguf: by its metadata it is file 3 of 3 with 3 tensors, expected file 2 of 3 with 3 tensors",
    );
    check(
        &|dir| std::fs::write(dir.join("m-00002-of-00003.gguf"), sample().bytes()).unwrap(),
        1,
        "DIR/m-00002-of-00003.gguf: by its metadata it is a file that is whole, expected file 2 of 3 with 3 tensors",
    );
    let split = Raw::default().key("split.count", 2, &[2, 0]).key("split.no", 2, &[0, 0]);
    assert_eq!(open(&split.bytes()).unwrap_err(), "metadata key `split.tensors.count` is missing");
    let negative = Raw::default().key("split.count", 5, &(-2i32).to_le_bytes());
    assert_eq!(open(&negative.bytes()).unwrap_err(), "metadata key `split.count` is -2 (I32), expected a count");
}

#[test]
fn what_cannot_be_written_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let refused = |metadata: Vec<(&str, MetadataValue)>, tensors: Vec<GgufTensor>| {
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        let message = GgufWriter::create(&path, metadata, tensors).unwrap_err().to_string();
        assert!(!path.exists(), "{message}");
        message.replace(&path.display().to_string(), "FILE")
    };
    let one = || MetadataValue::U32(1);
    assert_eq!(refused(vec![("a", one()), ("a", one())], vec![]), "FILE: metadata key `a` would be written twice");
    assert_eq!(refused(vec![("", one())], vec![]), "FILE: a metadata key of 0 bytes cannot be written");
    assert_eq!(refused(vec![("split.no", one())], vec![]), "FILE: metadata key `split.no` is the writer's own");
    assert_eq!(
        refused(vec![("general.alignment", MetadataValue::U32(64))], vec![]),
        "FILE: data is aligned to 32 bytes, whatever `general.alignment` says"
    );
    let mixed = MetadataArray { element_type: GGUFValueType::U32, length: 1, values: vec![text("x")] };
    let message = refused(vec![("a.b", MetadataValue::Array(Box::new(mixed)))], vec![]);
    assert!(message.starts_with("FILE: metadata key `a.b` cannot be written: "), "{message}");
    assert!(metadata_array(vec![one(), text("x")], GGUFValueType::U32).is_err());

    let w = |shape: &[usize]| tensor("w", "Q4_0", shape);
    assert_eq!(
        refused(vec![], vec![w(&[32]), w(&[32])]),
        "FILE: tensor `w`: two tensors would be written under this name"
    );
    assert_eq!(
        refused(vec![], vec![w(&[2, 48])]),
        "FILE: tensor `w`: a row of 48 values does not split into Q4_0 blocks of 32"
    );
    assert_eq!(refused(vec![], vec![w(&[])]), "FILE: tensor `w`: its shape [] has not 1 to 4 dimensions");
    assert_eq!(
        refused(vec![], vec![w(&[1, 1, 1, 1, 32])]),
        "FILE: tensor `w`: its shape [1, 1, 1, 1, 32] has not 1 to 4 dimensions"
    );
    assert_eq!(
        refused(vec![], vec![w(&[1 << 60, 32])]),
        "FILE: tensor `w`: its shape [1152921504606846976, 32] overflows"
    );
    assert_eq!(
        refused(vec![], vec![w(&[0, 1 << 40, 1 << 40, 32])]),
        "FILE: tensor `w`: its shape [0, 1099511627776, 1099511627776, 32] overflows"
    );
    let long = "n".repeat(64);
    assert_eq!(
        refused(vec![], vec![tensor(&long, "F32", &[1])]),
        format!("FILE: tensor `{long}`: its name has 64 bytes, ggml reads 1 to 63")
    );
    std::fs::write(&path, "mine").unwrap();
    let message = GgufWriter::create(&path, vec![], vec![]).unwrap_err().to_string();
    assert!(message.contains("m.gguf: cannot create: "), "{message}");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn each_tensor_is_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let tensors = vec![tensor("a", "F16", &[2]), tensor("b", "F16", &[2])];
    let writer = GgufWriter::create(&path, vec![], tensors).unwrap();
    writer.write("a", &[1; 4]).unwrap();
    let file = path.display().to_string();
    let message = |result: Result<()>| result.unwrap_err().to_string().replace(&file, "FILE");
    assert_eq!(message(writer.write("a", &[1; 4])), "FILE: tensor `a`: the tensor is written twice");
    assert_eq!(message(writer.write("b", &[1; 3])), "FILE: tensor `b`: the data is 3 bytes, expected 4 bytes");
    assert_eq!(
        message(writer.write_at("b", 2, &[1; 3])),
        "FILE: tensor `b`: 3 bytes at 2 do not fit in the 4 bytes of the tensor"
    );
    assert_eq!(message(writer.write("c", &[])), "tensor `c`: the tensor was not announced");
    assert_eq!(message(writer.finish()), "FILE: tensor `b`: 1 tensors were never written, this one first");
}
