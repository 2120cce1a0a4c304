//! Safetensors: one file, and a writer that knows its layout before its data. Several files together are in
//! [`super::shards`].
//!
//! ```text
//! u64 header_len | JSON header, padded with spaces to 8 bytes | data, without gaps
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::{SafeTensorError, SafeTensors, TensorInfo};
use serde_json::{Map, Value};

use super::Bytes;
use super::placed::{Follower, PlacedFiles};
use super::stand_in::another;
use crate::error::{Error, Result};
use crate::tensor::{TensorSpec, TensorView, byte_len};

/// Headers beyond this are refused by every reader.
pub const MAX_HEADER_BYTES: usize = 100_000_000;

/// The usual limit for one shard, 5 GB.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// The file name of an unsharded checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";

/// The file name of a sharded checkpoint's index.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// One memory-mapped file whose header has been checked against its size.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    bytes: Bytes,
    metadata: BTreeMap<String, String>,
    tensors: Vec<Item>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Item {
    spec: TensorSpec,
    range: Range<usize>,
}

impl SafetensorsFile {
    /// Maps the file and checks that its header describes it wholly: sizes follow from shapes, data without gaps or
    /// overlaps, up to the last byte.
    pub fn open(path: impl AsRef<Path>) -> Result<SafetensorsFile> {
        let path = path.as_ref();
        Self::parse(path, Bytes::map(path)?)
    }

    /// [`SafetensorsFile::open`] of bytes in memory; `name` stands for the file in messages.
    pub fn from_bytes(name: impl AsRef<Path>, bytes: Vec<u8>) -> Result<SafetensorsFile> {
        Self::parse(name.as_ref(), Bytes::Owned(bytes))
    }

    /// Fails when the file was replaced or written to since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.bytes.check_unchanged()
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<SafetensorsFile> {
        let (header_len, header) =
            SafeTensors::read_metadata(&bytes).map_err(|error| diagnose(&bytes, error).in_file(path))?;
        let data_start = 8 + header_len;
        let mut tensors: Vec<Item> = header
            .tensors()
            .into_iter()
            .map(|(name, info)| Item {
                spec: TensorSpec { name, dtype: info.dtype, shape: info.shape.clone() },
                range: data_start + info.data_offsets.0..data_start + info.data_offsets.1,
            })
            .collect();
        tensors.sort_by(|a, b| {
            (a.range.start, a.range.end, &a.spec.name).cmp(&(b.range.start, b.range.end, &b.spec.name))
        });
        let by_name = tensors.iter().enumerate().map(|(i, item)| (item.spec.name.clone(), i)).collect();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(SafetensorsFile { path: path.to_path_buf(), bytes, metadata, tensors, by_name })
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Name, type and shape of every tensor, in the order of their data.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorSpec> {
        self.tensors.iter().map(|item| &item.spec)
    }

    /// Gives every tensor the name that `rename` makes of its own.
    pub(super) fn rename(&mut self, rename: &dyn Fn(&str) -> String) {
        self.by_name.clear();
        for (index, item) in self.tensors.iter_mut().enumerate() {
            item.spec.name = rename(&item.spec.name);
            self.by_name.insert(item.spec.name.clone(), index);
        }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let item = &self.tensors[*self.by_name.get(name)?];
        Some(TensorView { dtype: item.spec.dtype, shape: &item.spec.shape, data: &self.bytes[item.range.clone()] })
    }

    /// Tells the system that a tensor will be read soon.
    pub fn announce(&self, name: &str) {
        if let Some(&index) = self.by_name.get(name) {
            self.bytes.announce(self.tensors[index].range.clone());
        }
    }

    /// Gives the memory behind a tensor back to the system; reading it again is slower but still right.
    pub fn release(&self, name: &str) {
        if let Some(&index) = self.by_name.get(name) {
            self.bytes.release(self.tensors[index].range.clone());
        }
    }

    /// [`SafetensorsFile::release`] for the whole file.
    pub fn release_all(&self) {
        self.bytes.release(0..self.bytes.len());
    }
}

/// Finds which tensor a refused header is about, and says what was expected.
fn diagnose(bytes: &[u8], error: SafeTensorError) -> Error {
    if let Some(why) = another(bytes, "a safetensors file") {
        return Error::malformed(why);
    }
    let Some(prefix) = bytes.get(..8) else {
        return Error::malformed(format!("the file has {} bytes, too few for a safetensors header", bytes.len()));
    };
    let header_len = u64::from_le_bytes(prefix.try_into().expect("eight bytes"));
    if header_len > MAX_HEADER_BYTES as u64 {
        return Error::malformed(format!(
            "not a safetensors file: its header would be {header_len} bytes, more than the {MAX_HEADER_BYTES} allowed"
        ));
    }
    let data_start = 8 + header_len as usize;
    let Some(header) = bytes.get(8..data_start) else {
        return Error::malformed(format!(
            "the file is truncated inside its header: {} bytes, expected at least {data_start}; fetch it again",
            bytes.len()
        ));
    };
    let header: Map<String, Value> = match serde_json::from_slice(header) {
        Ok(header) => header,
        Err(error) => return Error::malformed(format!("the safetensors header is not a JSON object: {error}")),
    };
    let available = bytes.len() - data_start;
    let mut infos = Vec::new();
    for (name, value) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        match serde_json::from_value::<TensorInfo>(value.clone()) {
            Ok(info) => infos.push((name, info)),
            Err(error) => {
                return Error::malformed(format!("its header entry is invalid: {error}")).in_tensor(name);
            }
        }
    }
    infos.sort_by_key(|(name, info)| (info.data_offsets, *name));
    let mut end = 0;
    for (name, info) in infos {
        let (from, to) = info.data_offsets;
        let Some(size) = byte_len(info.dtype, &info.shape) else {
            return Error::malformed(format!("its shape {:?} of {} has no size in bytes", info.shape, info.dtype))
                .in_tensor(name);
        };
        if to < from || to - from != size {
            return Error::malformed(format!(
                "offsets {from}..{to} do not hold the {size} bytes of shape {:?} and type {}",
                info.shape, info.dtype
            ))
            .in_tensor(name);
        }
        if from != end {
            let what = if from < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Error::malformed(format!("its data starts at offset {from}, expected {end}: it {what}"))
                .in_tensor(name);
        }
        if to > available {
            return Error::malformed(format!(
                "the file is truncated: the tensor ends at byte {}, but the file has {} bytes; fetch it again",
                data_start as u128 + to as u128,
                bytes.len()
            ))
            .in_tensor(name);
        }
        end = to;
    }
    if end < available {
        return Error::malformed(format!("{} bytes follow the last tensor, expected none", available - end));
    }
    Error::malformed(format!("not a valid safetensors file: {error}"))
}

/// Writes tensors whose names, types and shapes are known up front, in any order and from any thread.
///
/// Tensors go to shards in the order given. Inside a shard those of larger elements come first, so that each is aligned
/// to its element; the order given decides among equals. All headers are written by [`ShardedWriter::create`].
#[derive(Debug)]
pub struct ShardedWriter {
    files: PlacedFiles,
    total: u64,
}

impl ShardedWriter {
    /// Lays the tensors out in `dir`, which must exist: `model.safetensors` when all fit in `shard_bytes`, else
    /// `model-00001-of-0000N.safetensors` and so on with their index. `__metadata__` is `metadata` and `format: pt`.
    pub fn create(
        dir: impl AsRef<Path>,
        specs: Vec<TensorSpec>,
        shard_bytes: u64,
        metadata: &BTreeMap<String, String>,
    ) -> Result<ShardedWriter> {
        Self::lay_out(dir.as_ref(), specs, shard_bytes, metadata, PlacedFiles::default())
    }

    /// Takes up what [`create`](Self::create) has laid out with the same arguments in another process, which did not finish. Nothing
    /// counts as written but what is [kept](Self::keep).
    ///
    /// Fails where files are missing or laid out otherwise.
    pub fn take_up(
        dir: impl AsRef<Path>,
        specs: Vec<TensorSpec>,
        shard_bytes: u64,
        metadata: &BTreeMap<String, String>,
    ) -> Result<ShardedWriter> {
        Self::lay_out(dir.as_ref(), specs, shard_bytes, metadata, PlacedFiles::taken_up())
    }

    /// Names and bytes of the files that [`create`](Self::create) would make with the same arguments, their index included.
    ///
    /// Fails as it does, but for what a disk may refuse.
    pub fn sizes(
        specs: Vec<TensorSpec>,
        shard_bytes: u64,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Vec<(PathBuf, u64)>> {
        Ok(Self::lay_out(Path::new(""), specs, shard_bytes, metadata, PlacedFiles::counted())?.files.sizes())
    }

    fn lay_out(
        dir: &Path,
        specs: Vec<TensorSpec>,
        shard_bytes: u64,
        metadata: &BTreeMap<String, String>,
        mut files: PlacedFiles,
    ) -> Result<ShardedWriter> {
        let mut metadata = metadata.clone();
        metadata.entry("format".into()).or_insert_with(|| "pt".into());

        let mut shards: Vec<Vec<(&TensorSpec, u64)>> = vec![Vec::new()];
        let mut names = BTreeSet::new();
        let (mut in_shard, mut total) = (0u64, 0u64);
        for spec in &specs {
            let bytes = spec.bytes().ok_or_else(|| {
                Error::invalid(format!("its shape {:?} of {} has no size in bytes", spec.shape, spec.dtype))
                    .in_tensor(&spec.name)
            })? as u64;
            if !names.insert(&spec.name) {
                return Err(Error::invalid("two tensors would be written under this name").in_tensor(&spec.name));
            }
            if in_shard > 0 && in_shard.saturating_add(bytes) > shard_bytes {
                shards.push(Vec::new());
                in_shard = 0;
            }
            shards.last_mut().expect("never empty").push((spec, bytes));
            in_shard += bytes;
            total = total.checked_add(bytes).ok_or_else(|| Error::invalid("the tensors overflow a file"))?;
        }

        let mut weight_map = Map::new();
        let count = shards.len();
        for (index, mut shard) in shards.into_iter().enumerate() {
            let name = match count {
                1 => SINGLE_FILE.to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            shard.sort_by_key(|(spec, _)| std::cmp::Reverse(spec.dtype.bitsize()));
            let mut header = Map::new();
            header.insert("__metadata__".into(), serde_json::json!(metadata));
            let mut offset = 0u64;
            for (spec, bytes) in &shard {
                let info = serde_json::json!({
                    "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + bytes],
                });
                header.insert(spec.name.clone(), info);
                weight_map.insert(spec.name.clone(), Value::String(name.clone()));
                offset += bytes;
            }
            let mut header = serde_json::to_vec(&header).expect("a JSON value");
            header.resize(header.len().next_multiple_of(8), b' ');
            let path = dir.join(name);
            if header.len() > MAX_HEADER_BYTES {
                return Err(Error::invalid(format!("its header would exceed {MAX_HEADER_BYTES} bytes")).in_file(path));
            }
            let mut prefix = (header.len() as u64).to_le_bytes().to_vec();
            prefix.extend(header);
            let mut at = prefix.len() as u64;
            files.create(&path, &prefix, at + offset)?;
            for (spec, bytes) in shard {
                files.place(&spec.name, at..at + bytes);
                at += bytes;
            }
        }
        if count > 1 {
            let path = dir.join(INDEX_FILE);
            let mut sorted: Vec<_> = weight_map.into_iter().collect();
            sorted.sort_by(|a, b| a.0.cmp(&b.0));
            let index = serde_json::json!({
                "metadata": {"total_size": total}, "weight_map": sorted.into_iter().collect::<Map<_, _>>(),
            });
            let text = serde_json::to_vec_pretty(&index).expect("a JSON value");
            files.write_beside(&path, &text)?;
        }
        Ok(ShardedWriter { files, total })
    }

    /// The weight files being written.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.paths()
    }

    /// A reader of each file, which reads what is there from its start while the rest is being written.
    pub fn follow(&self) -> Result<Vec<Follower>> {
        self.files.follow()
    }

    /// Bytes of all tensors together, headers not counted.
    pub fn total_bytes(&self) -> u64 {
        self.total
    }

    /// Writes one tensor, whole.
    pub fn write(&self, name: &str, data: &[u8]) -> Result<()> {
        self.files.write(name, data)
    }

    /// Writes part of a tensor, `offset` bytes from its start; the parts must cover it once.
    pub fn write_part(&self, name: &str, offset: u64, data: &[u8]) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;
    use proptest::prelude::*;

    fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
    }

    fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn refused(bytes: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let message = SafetensorsFile::open(&path).unwrap_err().to_string();
        message.strip_prefix(&format!("{}: ", path.display())).expect("names the file").to_string()
    }

    #[test]
    fn lying_headers_are_refused_with_tensor_expected_and_found() {
        let check = |header: &str, data: usize, message: &str| {
            assert_eq!(refused(&file_of(header, &vec![0; data])), message);
        };
        check(
            r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#,
            10,
            "tensor `a`: the file is truncated: the tensor ends at byte 81, but the file has 75 bytes; fetch it again",
        );
        check(
            r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,12]}}"#,
            12,
            "tensor `a`: offsets 0..12 do not hold the 16 bytes of shape [2, 2] and type F32",
        );
        check(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
            6,
            "tensor `b`: its data starts at offset 2, expected 4: it overlaps the tensor before it",
        );
        check(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
            8,
            "tensor `a`: its data starts at offset 4, expected 0: it leaves a gap before it",
        );
        check(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#,
            6,
            "2 bytes follow the last tensor, expected none",
        );
        check(
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
            4,
            "tensor `a`: its shape [4294967296, 4294967296] of F32 has no size in bytes",
        );
        assert_eq!(refused(b""), "the file is empty; fetch it again");
        assert_eq!(refused(b"abc"), "the file has 3 bytes, too few for a safetensors header");
        assert_eq!(
            refused(b"version https://git-lfs"),
            "not a safetensors file: its header would be 2336927755350992246 bytes, more than the 100000000 allowed"
        );
        assert_eq!(
            refused(&100u64.to_le_bytes()),
            "the file is truncated inside its header: 8 bytes, expected at least 108; fetch it again"
        );
        assert!(refused(&file_of("[1]", &[])).starts_with("the safetensors header is not a JSON object"));
        assert!(
            refused(&file_of(r#"{"a":{"dtype":"Q9"}}"#, &[])).starts_with("tensor `a`: its header entry is invalid")
        );
    }

    #[test]
    fn missing_file_is_an_error() {
        let message = SafetensorsFile::open("/nonexistent/x.safetensors").unwrap_err().to_string();
        assert!(message.starts_with("/nonexistent/x.safetensors: cannot open: "), "{message}");
    }

    proptest! {
        /// Whatever the bytes, opening either fails with a message or yields views inside the file.
        #[test]
        fn arbitrary_bytes_never_panic(mut header in "\\PC{0,60}", data in prop::collection::vec(any::<u8>(), 0..40), swap in any::<bool>(), a in 0usize..50, b in 0usize..50, n in any::<u64>()) {
            if swap {
                header = format!(r#"{{"a":{{"dtype":"F16","shape":[{n}, 2],"data_offsets":[{a},{b}]}}}}"#);
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("m.safetensors");
            std::fs::write(&path, file_of(&header, &data)).unwrap();
            if let Ok(file) = SafetensorsFile::open(&path) {
                for spec in file.tensors() {
                    let view = file.get(&spec.name).unwrap();
                    prop_assert_eq!(Some(view.data.len()), spec.bytes());
                }
            }
        }
    }

    fn sample() -> (Vec<TensorSpec>, Vec<Vec<u8>>) {
        let specs = vec![
            spec("w.qweight", Dtype::I32, &[4, 2]),
            spec("w.scale", Dtype::F16, &[3]),
            spec("w.bytes", Dtype::U8, &[5]),
            spec("w.shape", Dtype::I64, &[2]),
            spec("empty", Dtype::F32, &[0, 7]),
            spec("z", Dtype::BF16, &[2, 2]),
        ];
        let data = specs
            .iter()
            .enumerate()
            .map(|(i, s)| (0..s.bytes().unwrap()).map(|b| (16 * i + b) as u8).collect())
            .collect();
        (specs, data)
    }

    fn write(dir: &Path, shard_bytes: u64) -> (Vec<TensorSpec>, Vec<Vec<u8>>) {
        let (specs, data) = sample();
        let writer = ShardedWriter::create(dir, specs.clone(), shard_bytes, &BTreeMap::new()).unwrap();
        for (spec, data) in specs.iter().zip(&data).rev() {
            if spec.name == "w.qweight" {
                writer.write_part(&spec.name, 8, &data[8..]).unwrap();
                writer.write_part(&spec.name, 0, &data[..8]).unwrap();
            } else {
                writer.write(&spec.name, data).unwrap();
            }
        }
        writer.finish().unwrap();
        (specs, data)
    }

    #[test]
    fn what_is_written_is_read() {
        for (shard_bytes, count) in [(SHARD_BYTES, 1), (24, 3), (1, 5)] {
            let dir = tempfile::tempdir().unwrap();
            let (specs, data) = write(dir.path(), shard_bytes);
            let set = crate::SafetensorsSet::open(dir.path()).unwrap();
            assert_eq!(set.files().len(), count, "shards of {shard_bytes}");
            for (spec, data) in specs.iter().zip(&data) {
                let view = set.get(&spec.name).unwrap();
                assert_eq!((view.dtype, view.shape, view.data), (spec.dtype, &spec.shape[..], &data[..]));
                let offset = view.data.as_ptr() as usize;
                assert!(
                    view.data.is_empty() || offset.is_multiple_of(spec.dtype.bitsize() / 8),
                    "{} is aligned",
                    spec.name
                );
                set.release(&spec.name);
                assert_eq!(set.get(&spec.name).unwrap().data, &data[..], "after release");
            }
            assert_eq!(set.files()[0].metadata()["format"], "pt");
            assert_eq!(set.tensors().count(), specs.len());
        }
    }

    #[test]
    fn unwritten_unknown_double_and_oversized_writes_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let specs = vec![spec("a", Dtype::U8, &[4]), spec("b", Dtype::U8, &[4])];
        let writer = ShardedWriter::create(dir.path(), specs, SHARD_BYTES, &BTreeMap::new()).unwrap();
        writer.write("a", &[1; 4]).unwrap();
        let file = dir.path().join("model.safetensors").display().to_string();
        let message = |result: Result<()>| result.unwrap_err().to_string().replace(&file, "FILE");
        assert_eq!(message(writer.write("a", &[1; 4])), "FILE: tensor `a`: the tensor is written twice");
        assert_eq!(message(writer.write("b", &[1; 3])), "FILE: tensor `b`: the data is 3 bytes, expected 4 bytes");
        assert_eq!(message(writer.write("c", &[])), "tensor `c`: the tensor was not announced");
        assert_eq!(message(writer.finish()), "FILE: tensor `b`: 1 tensors were never written, this one first");
    }

    #[test]
    fn a_full_disk_names_the_file() {
        if !Path::new("/dev/full").exists() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let specs = vec![spec("a", Dtype::U8, &[4])];
        let mut writer = ShardedWriter::create(dir.path(), specs, SHARD_BYTES, &BTreeMap::new()).unwrap();
        writer.files.redirect(std::fs::File::options().write(true).open("/dev/full").unwrap());
        let message = writer.write("a", &[1; 4]).unwrap_err().to_string();
        assert!(message.contains("model.safetensors: tensor `a`: cannot write 4 bytes: No space left"), "{message}");
    }
}
