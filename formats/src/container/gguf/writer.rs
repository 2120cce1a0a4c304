//! Writes GGUF version 3: laid out before its data is known, whole or split as llama.cpp splits.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use gguf_rs_lib::format::{GGUFHeader, GGUFValueType, MetadataArray, MetadataValue, TensorInfo};

use super::{ALIGNMENT, MAX_DIMS, NAME_BYTES, SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, split_path};
use crate::container::placed::{Follower, PlacedFiles};
use crate::error::{Error, Result};
use crate::ggml::GgmlType;

/// What will be written under a name, known before the data is.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// The tensor's name in the file, shorter than 64 bytes.
    pub name: String,
    /// Storage type.
    pub ty: GgmlType,
    /// Extents, slowest first (the file lists them the other way round); one to four.
    pub shape: Vec<usize>,
}

impl GgufTensor {
    /// Bytes of the data, without padding; fails when the shape does not split into blocks or overflows.
    pub fn bytes(&self) -> Result<u64> {
        let check = || {
            let Some((width, rows)) = self.shape.split_last().filter(|_| self.shape.len() <= MAX_DIMS) else {
                return Err(Error::invalid(format!("its shape {:?} has not 1 to {MAX_DIMS} dimensions", self.shape)));
            };
            if !width.is_multiple_of(self.ty.block_len) {
                let (ty, len) = (self.ty, self.ty.block_len);
                return Err(Error::invalid(format!(
                    "a row of {width} values does not split into {ty} blocks of {len}"
                )));
            }
            // Extents of 0 count as 1, so that no reader's product of some of them overflows.
            let blocks = (width / self.ty.block_len).max(1);
            let most =
                rows.iter().try_fold(blocks.checked_mul(self.ty.block_bytes), |n, &e| Some(n?.checked_mul(e.max(1))));
            let most = most.flatten().filter(|&n| n as u64 <= i64::MAX as u64);
            let most = most.ok_or_else(|| Error::invalid(format!("its shape {:?} overflows", self.shape)))?;
            Ok(if self.shape.contains(&0) { 0 } else { most })
        };
        check().map(|bytes| bytes as u64).map_err(|error| error.in_tensor(&self.name))
    }
}

/// An array of metadata; its element type is that of the first value, or `empty` without one.
///
/// Fails unless all values are of one type.
pub fn metadata_array(values: Vec<MetadataValue>, empty: GGUFValueType) -> Result<MetadataValue> {
    let ty = values.first().map_or(empty, MetadataValue::value_type);
    let array = MetadataArray::new(ty, values).map_err(|error| Error::invalid(error.to_string()))?;
    Ok(MetadataValue::Array(Box::new(array)))
}

/// Writes tensors whose names, types and shapes are known up front, in any order and from any thread.
///
/// The files hold them in the order given, each at a multiple of 32 bytes and followed by zeros up to the next.
#[derive(Debug)]
pub struct GgufWriter {
    files: PlacedFiles,
    total: u64,
}

impl GgufWriter {
    /// Lays out one file, which must not exist yet. Metadata is written in the order given.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: Vec<(String, MetadataValue)>,
        tensors: Vec<GgufTensor>,
    ) -> Result<GgufWriter> {
        Self::lay_out(path.as_ref(), metadata, tensors, PlacedFiles::default())
    }

    /// Takes up what [`create`](Self::create), or with `max_bytes` [`create_split`](Self::create_split), has laid out with the same
    /// arguments in another process, which did not finish. Nothing counts as written but what is [kept](Self::keep).
    ///
    /// Fails where files are missing or laid out otherwise.
    pub fn take_up(
        path: impl AsRef<Path>,
        max_bytes: Option<u64>,
        metadata: Vec<(String, MetadataValue)>,
        tensors: Vec<GgufTensor>,
    ) -> Result<GgufWriter> {
        match max_bytes {
            None => Self::lay_out(path.as_ref(), metadata, tensors, PlacedFiles::taken_up()),
            Some(most) => Self::lay_out_split(path.as_ref(), most, metadata, tensors, PlacedFiles::taken_up()),
        }
    }

    /// Names and bytes of the files that [`create`](Self::create), or with `max_bytes` [`create_split`](Self::create_split), would make
    /// with the same arguments.
    ///
    /// Fails as they do, but for what a disk may refuse.
    pub fn sizes(
        path: impl AsRef<Path>,
        max_bytes: Option<u64>,
        metadata: Vec<(String, MetadataValue)>,
        tensors: Vec<GgufTensor>,
    ) -> Result<Vec<(PathBuf, u64)>> {
        let (path, files) = (path.as_ref(), PlacedFiles::counted());
        let laid_out = match max_bytes {
            None => Self::lay_out(path, metadata, tensors, files),
            Some(most) => Self::lay_out_split(path, most, metadata, tensors, files),
        };
        Ok(laid_out?.files.sizes())
    }

    fn lay_out(
        path: &Path,
        metadata: Vec<(String, MetadataValue)>,
        tensors: Vec<GgufTensor>,
        files: PlacedFiles,
    ) -> Result<GgufWriter> {
        let in_file = |error: Error| error.in_file(path);
        check_metadata(&metadata).map_err(in_file)?;
        let sizes = check_tensors(&tensors).map_err(in_file)?;
        let mut writer = GgufWriter { files, total: 0 };
        writer.add(path, &metadata, &tensors, &sizes)?;
        Ok(writer)
    }

    /// Lays the tensors out in files `STEM-00001-of-0000N.gguf`, none of which may exist yet.
    ///
    /// The tensors of a file take at most `max_bytes`, headers not counted, unless a single one takes more. The first file
    /// carries the metadata; all say which of how many they are. There may be just one.
    pub fn create_split(
        stem: impl AsRef<Path>,
        max_bytes: u64,
        metadata: Vec<(String, MetadataValue)>,
        tensors: Vec<GgufTensor>,
    ) -> Result<GgufWriter> {
        Self::lay_out_split(stem.as_ref(), max_bytes, metadata, tensors, PlacedFiles::default())
    }

    fn lay_out_split(
        stem: &Path,
        max_bytes: u64,
        metadata: Vec<(String, MetadataValue)>,
        tensors: Vec<GgufTensor>,
        files: PlacedFiles,
    ) -> Result<GgufWriter> {
        let in_file = |error: Error| error.in_file(split_path(stem, 1, 1));
        check_metadata(&metadata).map_err(in_file)?;
        let sizes = check_tensors(&tensors).map_err(in_file)?;
        let mut starts = vec![0];
        let mut in_file_bytes = 0u64;
        for (index, size) in sizes.iter().enumerate() {
            let size = size.next_multiple_of(ALIGNMENT);
            if in_file_bytes > 0 && in_file_bytes + size > max_bytes {
                starts.push(index);
                in_file_bytes = 0;
            }
            in_file_bytes += size;
        }
        let (Ok(count), Ok(total)) = (u16::try_from(starts.len()), i32::try_from(tensors.len())) else {
            let why = format!("{} files of {max_bytes} bytes are more than can be numbered", starts.len());
            return Err(in_file(Error::invalid(why)));
        };
        let mut writer = GgufWriter { files, total: 0 };
        let mut metadata = metadata;
        for number in 0..count {
            let from = starts[usize::from(number)];
            let to = starts.get(usize::from(number) + 1).copied().unwrap_or(tensors.len());
            metadata.push((SPLIT_NO.into(), MetadataValue::U16(number)));
            metadata.push((SPLIT_COUNT.into(), MetadataValue::U16(count)));
            metadata.push((SPLIT_TENSORS.into(), MetadataValue::I32(total)));
            let path = split_path(stem, usize::from(number) + 1, usize::from(count));
            writer.add(&path, &metadata, &tensors[from..to], &sizes[from..to])?;
            metadata.clear();
        }
        Ok(writer)
    }

    fn add(
        &mut self,
        path: &Path,
        metadata: &[(String, MetadataValue)],
        tensors: &[GgufTensor],
        sizes: &[u64],
    ) -> Result<()> {
        let mut offsets = Vec::with_capacity(tensors.len());
        let mut end = 0u64;
        for size in sizes {
            offsets.push(end);
            end = end
                .checked_add(size.next_multiple_of(ALIGNMENT))
                .filter(|&end| end <= i64::MAX as u64)
                .ok_or_else(|| Error::invalid("the tensors overflow a file").in_file(path))?;
        }
        let mut header = header(metadata, tensors, &offsets).map_err(|error| error.in_file(path))?;
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        let data_start = header.len() as u64;
        self.files.create(path, &header, data_start + end)?;
        for ((tensor, offset), size) in tensors.iter().zip(offsets).zip(sizes) {
            let start = data_start + offset;
            self.files.place(&tensor.name, start..start + size);
            self.total += size;
        }
        Ok(())
    }

    /// The files being written.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.paths()
    }

    /// A reader of each file, which reads what is there from its start while the rest is being written.
    pub fn follow(&self) -> Result<Vec<Follower>> {
        self.files.follow()
    }

    /// Bytes of all tensors together, headers and padding not counted.
    pub fn total_bytes(&self) -> u64 {
        self.total
    }

    /// Writes one tensor, whole.
    pub fn write(&self, name: &str, data: &[u8]) -> Result<()> {
        self.files.write(name, data)
    }

    /// Writes part of a tensor, `offset` bytes from its start; the parts must cover it once.
    pub fn write_at(&self, name: &str, offset: u64, data: &[u8]) -> Result<()> {
        self.files.write_part(name, offset, data)
    }

    /// Takes a tensor as it is in files that were taken up.
    pub fn keep(&self, name: &str) -> Result<()> {
        self.files.keep(name)
    }

    /// Reads what is there of a tensor, `offset` bytes from its start.
    pub fn read_part(&self, name: &str, offset: u64, data: &mut [u8]) -> Result<()> {
        self.files.read_part(name, offset, data)
    }

    /// Waits until what is written so far is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.files.sync()
    }

    /// Checks that every tensor was written and waits until the files are on disk.
    pub fn finish(self) -> Result<()> {
        self.files.finish()
    }
}

fn check_metadata(metadata: &[(String, MetadataValue)]) -> Result<()> {
    let mut keys = HashSet::new();
    for (key, value) in metadata {
        if key.is_empty() || key.len() > usize::from(u16::MAX) {
            return Err(Error::invalid(format!("a metadata key of {} bytes cannot be written", key.len())));
        }
        if !keys.insert(key) {
            return Err(Error::invalid(format!("metadata key `{key}` would be written twice")));
        }
        if [SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS].contains(&key.as_str()) {
            return Err(Error::invalid(format!("metadata key `{key}` is the writer's own")));
        }
        if key == "general.alignment" && *value != MetadataValue::U32(ALIGNMENT as u32) {
            return Err(Error::invalid(format!("data is aligned to {ALIGNMENT} bytes, whatever `{key}` says")));
        }
    }
    Ok(())
}

/// The sizes, once all tensors can be written.
fn check_tensors(tensors: &[GgufTensor]) -> Result<Vec<u64>> {
    let mut names = HashSet::new();
    let mut sizes = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let len = tensor.name.len();
        if len == 0 || len >= NAME_BYTES {
            let why = format!("its name has {len} bytes, ggml reads 1 to {}", NAME_BYTES - 1);
            return Err(Error::invalid(why).in_tensor(&tensor.name));
        }
        if !names.insert(&tensor.name) {
            return Err(Error::invalid("two tensors would be written under this name").in_tensor(&tensor.name));
        }
        sizes.push(tensor.bytes()?);
    }
    Ok(sizes)
}

fn header(metadata: &[(String, MetadataValue)], tensors: &[GgufTensor], offsets: &[u64]) -> Result<Vec<u8>> {
    let refused = |error: gguf_rs_lib::GGUFError| Error::invalid(error.to_string());
    let mut out = Vec::new();
    GGUFHeader::new(tensors.len() as u64, metadata.len() as u64).write_to(&mut out).map_err(refused)?;
    for (key, value) in metadata {
        out.extend((key.len() as u64).to_le_bytes());
        out.extend(key.as_bytes());
        out.extend((value.value_type() as u32).to_le_bytes());
        value
            .write_to(&mut out)
            .map_err(|error| Error::invalid(format!("metadata key `{key}` cannot be written: {error}")))?;
    }
    for (tensor, &offset) in tensors.iter().zip(offsets) {
        let extents = tensor.shape.iter().rev().map(|&extent| extent as u64).collect();
        TensorInfo::new(tensor.name.clone(), extents, tensor.ty.id, offset)
            .write_to(&mut out)
            .map_err(|error| refused(error).in_tensor(&tensor.name))?;
    }
    Ok(out)
}
