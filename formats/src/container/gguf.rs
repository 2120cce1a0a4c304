//! GGUF version 3: metadata, a table of tensors, aligned data.
//!
//! Header, metadata and table are parsed by gguf-rs-lib, which bounds every count before it allocates. What it cannot say
//! by name (which tensor leaves the file, which overlaps) is checked here.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;
use std::path::{Path, PathBuf};

use gguf_rs_lib::format::{Metadata, MetadataValue};
use gguf_rs_lib::reader::file_reader::{GGUFFileReader, GGUFReaderConfig};
use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::ggml::{self, GgmlType};

/// Decoded metadata beyond this is refused; vocabularies of half a million entries take a tenth of it.
pub const MAX_METADATA_BYTES: usize = 512 << 20;

/// A memory-mapped GGUF file whose tables have been checked against its size.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    tensors: Vec<GgufSpec>,
    by_name: HashMap<String, usize>,
}

/// Name, type and shape of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufSpec {
    /// The tensor's name in the file.
    pub name: String,
    /// Storage type.
    pub ty: GgmlType,
    /// Extents, slowest first (the file lists them the other way round).
    pub shape: Vec<usize>,
    range: Range<usize>,
}

impl GgufSpec {
    /// Bytes of the data.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }
}

/// One tensor's data.
#[derive(Clone, Copy, Debug)]
pub struct GgufView<'a> {
    /// Storage type.
    pub ty: GgmlType,
    /// Extents, slowest first.
    pub shape: &'a [usize],
    /// Whole blocks, row after row.
    pub data: &'a [u8],
}

impl<'a> GgufView<'a> {
    /// Weights in a row, and rows; a vector is one row.
    pub fn rows_and_width(&self) -> (usize, usize) {
        let width = self.shape.last().copied().unwrap_or(1);
        let rows = self.shape.iter().rev().skip(1).product();
        (rows, width)
    }

    /// The blocks of one row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let (rows, _) = self.rows_and_width();
        let row_bytes = self.data.len() / rows.max(1);
        &self.data[row * row_bytes..][..row_bytes]
    }
}

impl GgufFile {
    /// Maps the file and checks it: every tensor of a type that can be read, inside the file, overlapping no other.
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile> {
        let path = path.as_ref();
        let map = super::map(path)?;
        Self::parse(path, map).map_err(|error| error.in_file(path))
    }

    fn parse(path: &Path, map: Mmap) -> Result<GgufFile> {
        if !map.starts_with(b"GGUF") {
            return Err(Error::malformed("not a GGUF file: it does not start with `GGUF`"));
        }
        // Its own check of the ranges does not name the tensor of a truncated file.
        let config = GGUFReaderConfig {
            validate_integrity: false,
            max_decoded_metadata_size: MAX_METADATA_BYTES,
            ..GGUFReaderConfig::default()
        };
        let reader = GGUFFileReader::with_config(Cursor::new(&map[..]), config)
            .map_err(|error| Error::malformed(format!("not a valid GGUF file: {error}")))?;

        let mut tensors = Vec::new();
        let mut by_name = HashMap::new();
        for info in reader.tensor_infos() {
            let name = info.name().to_string();
            let spec = spec_of(info, reader.tensor_data_offset(), map.len()).map_err(|e| e.in_tensor(&name))?;
            if by_name.insert(name.clone(), tensors.len()).is_some() {
                return Err(Error::malformed("two tensors have this name").in_tensor(name));
            }
            tensors.push(spec);
        }
        let mut order: Vec<&GgufSpec> = tensors.iter().collect();
        order.sort_by_key(|spec| (spec.range.start, spec.range.end));
        for pair in order.windows(2) {
            if pair[1].range.start < pair[0].range.end {
                return Err(
                    Error::malformed(format!("its data overlaps that of `{}`", pair[0].name)).in_tensor(&pair[1].name)
                );
            }
        }
        let metadata = reader.metadata().clone();
        Ok(GgufFile { path: path.to_path_buf(), map, metadata, tensors, by_name })
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The raw metadata value under `key`.
    pub fn metadata(&self, key: &str) -> Option<&MetadataValue> {
        self.metadata.get(key)
    }

    /// Every metadata key, sorted.
    pub fn keys(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self.metadata.keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys
    }

    /// A string, or `None` when the key is absent.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            MetadataValue::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A boolean, or `None` when the key is absent.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |value| match value {
            MetadataValue::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// A count of any integer type, or `None` when the key is absent.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a count", |value| match value {
            // The crate's own conversion would also take floats.
            MetadataValue::F32(_) | MetadataValue::F64(_) | MetadataValue::Bool(_) => None,
            value => match (value.as_u64(), value.as_i64()) {
                (Some(n), _) => usize::try_from(n).ok(),
                (None, Some(n)) => usize::try_from(n).ok(),
                _ => None,
            },
        })
    }

    /// A float, or `None` when the key is absent. The shortest decimal that is the same `f32`.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a float", |value| match value {
            MetadataValue::F32(x) => x.to_string().parse().ok(),
            MetadataValue::F64(x) => Some(*x),
            _ => None,
        })
    }

    /// An array of strings, or `None` when the key is absent.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "an array of strings", |value| match value {
            MetadataValue::Array(array) => array.iter().map(MetadataValue::as_str).collect(),
            _ => None,
        })
    }

    /// An array of integers, or `None` when the key is absent.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.typed(key, "an array of integers", |value| match value {
            MetadataValue::Array(array) => array.iter().map(MetadataValue::as_i64).collect(),
            _ => None,
        })
    }

    /// An array of floats, or `None` when the key is absent.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "an array of floats", |value| match value {
            MetadataValue::Array(array) => array
                .iter()
                .map(|value| match value {
                    MetadataValue::F32(x) => Some(*x),
                    _ => None,
                })
                .collect(),
            _ => None,
        })
    }

    /// The value, or an error that says the key is missing.
    pub fn require<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::missing(format!("metadata key `{key}`")).in_file(&self.path))
    }

    fn typed<'s, T>(
        &'s self,
        key: &str,
        expected: &str,
        read: impl Fn(&'s MetadataValue) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            let found = match value {
                MetadataValue::Array(array) => format!("an array of {} values", array.len()),
                value => format!("{} ({:?})", short(value), value.value_type()),
            };
            Error::mismatch(format!("metadata key `{key}`"), expected, found).in_file(&self.path)
        })
    }

    /// Name, type and shape of every tensor, in the order of the file's table.
    pub fn tensors(&self) -> &[GgufSpec] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<GgufView<'_>> {
        let spec = &self.tensors[*self.by_name.get(name)?];
        Some(GgufView { ty: spec.ty, shape: &spec.shape, data: &self.map[spec.range.clone()] })
    }

    /// Gives the memory behind a tensor back to the system.
    pub fn release(&self, name: &str) {
        if let Some(&index) = self.by_name.get(name) {
            super::release(&self.map, self.tensors[index].range.clone());
        }
    }
}

fn short(value: &MetadataValue) -> String {
    let text = value.to_string_representation();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn spec_of(info: &gguf_rs_lib::tensor::TensorInfo, data_start: u64, file_len: usize) -> Result<GgufSpec> {
    let id = info.tensor_type() as u32;
    let ty = GgmlType::from_id(id).ok_or_else(|| {
        let known: Vec<&str> = ggml::TYPES.iter().map(|t| t.name).collect();
        Error::unsupported(format!(
            "it is stored as {}, which cannot be read ({})",
            info.tensor_type().name(),
            known.join(", ")
        ))
    })?;
    let overflow = || Error::malformed(format!("its shape {:?} overflows", info.shape().dims()));
    let mut shape = Vec::new();
    for &extent in info.shape().dims().iter().rev() {
        shape.push(usize::try_from(extent).map_err(|_| overflow())?);
    }
    let width = shape.last().copied().unwrap_or(1);
    let rows = shape.iter().rev().skip(1).try_fold(1usize, |n, &e| n.checked_mul(e)).ok_or_else(overflow)?;
    let row_bytes = ty.row_bytes(width).ok_or_else(|| {
        Error::malformed(format!("a row of {width} values does not split into {ty} blocks of {}", ty.block_len))
    })?;
    let bytes = rows.checked_mul(row_bytes).ok_or_else(overflow)?;
    let start =
        data_start.checked_add(info.data_offset()).and_then(|s| usize::try_from(s).ok()).ok_or_else(overflow)?;
    let end = start.checked_add(bytes).ok_or_else(overflow)?;
    if end > file_len {
        return Err(Error::malformed(format!(
            "the file is truncated: the tensor ends at byte {end}, but the file has {file_len} bytes"
        )));
    }
    Ok(GgufSpec { name: info.name().to_string(), ty, shape, range: start..end })
}

#[cfg(test)]
mod tests {
    use super::*;
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
            "tensor `w`: the file is truncated: the tensor ends at byte 168, but the file has 167 bytes",
        );
        check(
            Raw::default().tensor("a", &[16], 0, 0).tensor("b", &[16], 0, 32).data(&[0; 96]),
            "tensor `b`: its data overlaps that of `a`",
        );
        check(
            Raw::default().tensor("w", &[256], 16, 0).data(&[0; 66]),
            "tensor `w`: it is stored as IQ2_XXS, which cannot be read \
             (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, \
             MXFP4)",
        );
        for (raw, why) in [
            (Raw::default().tensor("w", &[48], 2, 0).data(&[0; 54]), "48"),
            (Raw::default().tensor("w", &[8], 0, 0).tensor("w", &[8], 0, 32).data(&[0; 64]), "w"),
            (Raw::default().tensor("w", &[8], 0, 5).data(&[0; 64]), "aligned"),
            (Raw::default().tensor("w", &[1 << 40, 1 << 40], 0, 0), ""),
            (Raw::default().key("a", 4, &[0; 4]).key("a", 4, &[0; 4]), "a"),
            (Raw::default().key("a", 9, &[&4u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat()), ""),
            (Raw { tensors: u64::MAX, ..Raw::default() }, ""),
            (Raw { keys: 90_000, ..Raw::default() }, ""),
        ] {
            let message = open(&raw.bytes()).unwrap_err();
            assert!(message.contains(why), "{message}");
        }
        assert_eq!(open(b"").unwrap_err(), "the file is empty");
        assert_eq!(open(b"PK\x03\x04").unwrap_err(), "not a GGUF file: it does not start with `GGUF`");
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
}
