//! Importance matrices of llama.cpp: how large the inputs of each linear are, column by column.
//!
//! Read in both forms, written as GGUF, which llama-quantize takes:
//!
//! ```text
//! GGUF    general.type "imatrix", imatrix.datasets [string], imatrix.chunk_count u32, imatrix.chunk_size u32
//!         NAME.in_sum2 F32 [matrices, columns]   sums of squares over the tokens
//!         NAME.counts  F32 [matrices, 1]         the tokens
//! legacy  i32 entries × { i32 len | name | i32 calls | i32 n | f32[n] mean square × calls } | i32 chunks | i32 len | dataset
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Bytes;
use super::gguf::{GGUFValueType, GgufFile, GgufTensor, GgufWriter, MetadataValue, metadata_array};
use crate::error::{Error, Result};
use crate::ggml::GgmlType;

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
const DATASETS: &str = "imatrix.datasets";
const CHUNK_COUNT: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";

/// The importance of columns, by the GGUF names of weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// Under names such as `blk.0.attn_q.weight`.
    pub entries: BTreeMap<String, ImatrixEntry>,
    /// The texts it was computed on.
    pub datasets: Vec<String>,
    /// How many pieces of text that was; 0 when not known.
    pub chunk_count: u32,
    /// Tokens in a piece; 0 when not known.
    pub chunk_size: u32,
    /// The file it was read from, for messages.
    pub file: Option<PathBuf>,
}

/// What was seen before one weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImatrixEntry {
    /// Sums of squared inputs, `[matrices, columns]`.
    pub sums: Vec<f32>,
    /// How many inputs that is for each matrix: one for a linear, as many as experts where they are stacked (but one in
    /// the legacy form). Counts are tokens, in the legacy form pieces of text, to which the sums are then scaled.
    pub counts: Vec<f32>,
}

impl ImatrixEntry {
    /// Mean squares, `[matrices, columns]`; 1 for a matrix that saw nothing.
    fn means(&self) -> Vec<f32> {
        let columns = self.sums.len() / self.counts.len().max(1);
        let mean = |(i, &sum): (usize, &f32)| match self.counts[i / columns.max(1)] {
            0.0 => 1.0,
            count => sum / count,
        };
        self.sums.iter().enumerate().map(mean).collect()
    }

    fn check(&self) -> Result<()> {
        let (sums, counts) = (self.sums.len(), self.counts.len());
        if sums == 0 || counts == 0 || !sums.is_multiple_of(counts) {
            return Err(Error::malformed(format!("its {sums} sums do not split into {counts} matrices")));
        }
        for (what, values) in [("sum", &self.sums), ("count", &self.counts)] {
            if let Some(at) = values.iter().position(|x| !x.is_finite() || *x < 0.0) {
                return Err(Error::malformed(format!(
                    "its {what} {at} is {}, expected 0 or more; collect the importance matrix again",
                    values[at]
                )));
            }
        }
        Ok(())
    }
}

impl Imatrix {
    /// Reads a file of either form.
    pub fn read(path: impl AsRef<Path>) -> Result<Imatrix> {
        let path = path.as_ref();
        let bytes = Bytes::map(path)?;
        if bytes.starts_with(b"GGUF") {
            drop(bytes);
            return Self::from_gguf(&GgufFile::open(path)?);
        }
        Self::from_legacy(path, &bytes)
    }

    /// [`Imatrix::read`] of bytes in memory; `name` stands for the file in messages.
    pub fn from_bytes(name: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Imatrix> {
        match bytes.starts_with(b"GGUF") {
            true => Self::from_gguf(&GgufFile::from_bytes(name, bytes)?),
            false => Self::from_legacy(name.as_ref(), &bytes),
        }
    }

    /// Mean squares of the inputs of a weight, `None` when it has no entry. There are `columns` of them, which for stacked
    /// experts are those of all together; fails when the entry has another number.
    pub fn importance(&self, name: &str, columns: usize) -> Result<Option<Vec<f32>>> {
        let Some(entry) = self.entries.get(name) else { return Ok(None) };
        if entry.sums.len() != columns {
            let expected = format!("{columns}; the file was made for another model");
            let error = Error::mismatch("the width of its importance", expected, entry.sums.len()).in_tensor(name);
            return Err(match &self.file {
                Some(file) => error.in_file(file),
                None => error,
            });
        }
        Ok(Some(entry.means()))
    }

    /// Writes the GGUF form. A file of this name is replaced once the new one is complete.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let name = path.file_name().ok_or_else(|| Error::invalid("it is not the name of a file").in_file(path))?;
        let partial = path.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        // What an earlier run that was stopped has left.
        let _ = std::fs::remove_file(&partial);
        let written = self.write_new(&partial).map_err(|mut error| {
            error.file = Some(path.to_path_buf());
            error
        });
        let renamed = written
            .and_then(|()| std::fs::rename(&partial, path).map_err(|error| Error::io("create", error).in_file(path)));
        if renamed.is_err() {
            let _ = std::fs::remove_file(&partial);
        }
        renamed
    }

    fn write_new(&self, path: &Path) -> Result<()> {
        let datasets = self.datasets.iter().map(|name| MetadataValue::String(name.clone())).collect();
        let metadata = vec![
            ("general.type".into(), MetadataValue::String("imatrix".into())),
            (DATASETS.into(), metadata_array(datasets, GGUFValueType::String)?),
            (CHUNK_COUNT.into(), MetadataValue::U32(self.chunk_count)),
            (CHUNK_SIZE.into(), MetadataValue::U32(self.chunk_size)),
        ];
        let f32s = GgmlType::from_name("F32").expect("a type");
        let mut tensors = Vec::new();
        for (name, entry) in &self.entries {
            entry.check().map_err(|error| error.in_tensor(name))?;
            let matrices = entry.counts.len();
            let columns = entry.sums.len() / matrices;
            for (suffix, shape) in [(SUMS, [matrices, columns]), (COUNTS, [matrices, 1])] {
                // ggml has no leading extent of 1.
                let shape = shape[usize::from(matrices == 1)..].to_vec();
                tensors.push(GgufTensor { name: format!("{name}{suffix}"), ty: f32s, shape });
            }
        }
        let writer = GgufWriter::create(path, metadata, tensors)?;
        for (name, entry) in &self.entries {
            for (suffix, values) in [(SUMS, &entry.sums), (COUNTS, &entry.counts)] {
                let mut bytes = vec![0; 4 * values.len()];
                f32s.encode(values, &mut bytes).expect("floats are encoded");
                writer.write(&format!("{name}{suffix}"), &bytes)?;
            }
        }
        writer.finish()
    }

    fn from_gguf(file: &GgufFile) -> Result<Imatrix> {
        let in_file = |error: Error| error.in_file(file.path());
        if let Some(found) = file.string("general.type")?
            && found != "imatrix"
        {
            return Err(in_file(Error::mismatch("metadata key `general.type`", "`imatrix`", format!("`{found}`"))));
        }
        let count = |key| {
            let value = file.count(key)?.unwrap_or(0);
            u32::try_from(value).map_err(|_| in_file(Error::mismatch(format!("metadata key `{key}`"), "a u32", value)))
        };
        let mut imatrix = Imatrix {
            datasets: file.strings(DATASETS)?.unwrap_or_default().into_iter().map(str::to_string).collect(),
            chunk_count: count(CHUNK_COUNT)?,
            chunk_size: count(CHUNK_SIZE)?,
            file: Some(file.path().to_path_buf()),
            ..Imatrix::default()
        };
        let values = |name: &str, of: &str| -> Result<Vec<f32>> {
            let view = file.get(name).ok_or_else(|| Error::missing(format!("`{name}`")).in_tensor(of))?;
            if view.ty.name != "F32" {
                return Err(Error::mismatch("its type", "F32", view.ty).in_tensor(name));
            }
            let mut values = vec![0.0; view.data.len() / 4];
            view.ty.dequantize(view.data, &mut values)?;
            Ok(values)
        };
        for spec in file.tensors() {
            // Tensors with other endings are not what is looked for; some programs keep more statistics.
            if let Some(name) = spec.name.strip_suffix(SUMS) {
                let counts = values(&format!("{name}{COUNTS}"), name).map_err(in_file)?;
                let entry = ImatrixEntry { sums: values(&spec.name, name).map_err(in_file)?, counts };
                entry.check().map_err(|error| in_file(error.in_tensor(name)))?;
                imatrix.entries.insert(name.to_string(), entry);
            } else if let Some(name) = spec.name.strip_suffix(COUNTS)
                && file.get(&format!("{name}{SUMS}")).is_none()
            {
                return Err(in_file(Error::missing(format!("`{name}{SUMS}`")).in_tensor(name)));
            }
        }
        if imatrix.entries.is_empty() {
            return Err(in_file(Error::missing(format!("any tensor `NAME{SUMS}` of an importance matrix"))));
        }
        Ok(imatrix)
    }

    fn from_legacy(path: &Path, bytes: &[u8]) -> Result<Imatrix> {
        let mut rest = Legacy { rest: bytes };
        let read = |rest: &mut Legacy| -> Result<Imatrix> {
            let mut imatrix = Imatrix { file: Some(path.to_path_buf()), ..Imatrix::default() };
            // A name, two numbers and a value at least.
            let entries = rest.count("entries", 1, 1 + 4 * 4).map_err(|error| {
                Error::malformed(format!("not an importance matrix, neither as GGUF nor in the legacy form: {error}"))
            })?;
            for number in 1..=entries {
                let what = format!("entry {number} of {entries}");
                let name = rest.string(&format!("the name of {what}"), 1)?;
                let (name, entry) = (name.to_string(), rest.entry(&what).map_err(|error| error.in_tensor(name))?);
                if imatrix.entries.contains_key(&name) {
                    return Err(Error::malformed("two entries have this name").in_tensor(name));
                }
                imatrix.entries.insert(name, entry);
            }
            // Files of old versions end here.
            if !rest.rest.is_empty() {
                imatrix.chunk_count = rest.number("the number of chunks", 0)? as u32;
            }
            if !rest.rest.is_empty() {
                let dataset = rest.string("the name of the dataset", 0)?;
                imatrix.datasets.extend((!dataset.is_empty()).then(|| dataset.to_string()));
            }
            match rest.rest.len() {
                0 => Ok(imatrix),
                left => Err(Error::malformed(format!("{left} bytes follow the name of the dataset, expected none"))),
            }
        };
        read(&mut rest).map_err(|error| error.in_file(path))
    }
}

/// What is left to read of a legacy file.
struct Legacy<'a> {
    rest: &'a [u8],
}

impl<'a> Legacy<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or_else(|| {
            Error::malformed(format!("{what} takes {len} bytes, but only {} are left of the file", self.rest.len()))
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self, what: &str, least: i32) -> Result<usize> {
        let number = i32::from_le_bytes(self.take(4, what)?.try_into().expect("four bytes"));
        if number < least {
            return Err(Error::mismatch(what, format!("{least} or more"), number));
        }
        Ok(number as usize)
    }

    /// A number of things that take `bytes` each.
    fn count(&mut self, what: &str, least: i32, bytes: usize) -> Result<usize> {
        let count = self.number(&format!("the number of {what}"), least)?;
        if count > self.rest.len() / bytes {
            let left = self.rest.len();
            return Err(Error::malformed(format!(
                "it announces {count} {what}, but only {left} bytes are left; fetch it again"
            )));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str, least: i32) -> Result<&'a str> {
        let len = self.number(&format!("the length of {what}"), least)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes)
            .map_err(|_| Error::malformed(format!("{what}, {:?}, is not UTF-8", String::from_utf8_lossy(bytes))))
    }

    fn entry(&mut self, what: &str) -> Result<ImatrixEntry> {
        let calls = self.number(&format!("the number of calls of {what}"), 0)?;
        let values = self.count(&format!("values of {what}"), 1, 4)?;
        let bytes = self.take(4 * values, what)?;
        let sums = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
        // Without calls the values are used as they are.
        let entry = ImatrixEntry { sums, counts: vec![calls.max(1) as f32] };
        entry.check()?;
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Imatrix {
        let entry = |sums: &[f32], counts: &[f32]| ImatrixEntry { sums: sums.to_vec(), counts: counts.to_vec() };
        Imatrix {
            entries: BTreeMap::from([
                ("blk.0.attn_q.weight".into(), entry(&[8.0, 0.0, 2.0], &[4.0])),
                ("blk.0.ffn_up_exps.weight".into(), entry(&[1.0, 2.0, 3.0, 4.0], &[2.0, 0.0])),
            ]),
            datasets: vec!["calibration.txt".into(), "ü".into()],
            chunk_count: 3,
            chunk_size: 512,
            file: None,
        }
    }

    fn legacy(entries: i32, ending: &[u8]) -> Vec<u8> {
        let mut bytes = entries.to_le_bytes().to_vec();
        for (name, calls, values) in [("a.weight", 2i32, [4.0f32, 6.0]), ("b.weight", 0, [0.5, 0.0])] {
            bytes.extend((name.len() as i32).to_le_bytes());
            bytes.extend(name.as_bytes());
            bytes.extend(calls.to_le_bytes());
            bytes.extend(2i32.to_le_bytes());
            values.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        }
        bytes.extend(ending);
        bytes
    }

    fn ending(name: &str) -> Vec<u8> {
        [&7i32.to_le_bytes()[..], &(name.len() as i32).to_le_bytes(), name.as_bytes()].concat()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.gguf");
        std::fs::write(&path, "an older one").unwrap();
        sample().write(&path).unwrap();
        let read = Imatrix::read(&path).unwrap();
        assert_eq!(read, Imatrix { file: Some(path.clone()), ..sample() });
        assert_eq!(read.importance("blk.0.attn_q.weight", 3).unwrap().unwrap(), [2.0, 0.0, 0.5]);
        assert_eq!(read.importance("blk.0.ffn_up_exps.weight", 4).unwrap().unwrap(), [0.5, 1.0, 1.0, 1.0]);
        assert_eq!(read.importance("output.weight", 3).unwrap(), None);
        assert_eq!(
            read.importance("blk.0.attn_q.weight", 4).unwrap_err().to_string(),
            format!(
                "{}: tensor `blk.0.attn_q.weight`: the width of its importance is 3, expected 4; the file was made for another model",
                path.display()
            )
        );
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["i.gguf"], "nothing else is left");

        // As llama.cpp lays it out: dimensions fastest first, names in order, metadata under these keys and types.
        let file = GgufFile::open(&path).unwrap();
        let shapes: Vec<_> = file.tensors().iter().map(|t| (t.name.as_str(), &t.shape[..])).collect();
        assert_eq!(
            shapes,
            [
                ("blk.0.attn_q.weight.in_sum2", &[3][..]),
                ("blk.0.attn_q.weight.counts", &[1]),
                ("blk.0.ffn_up_exps.weight.in_sum2", &[2, 2]),
                ("blk.0.ffn_up_exps.weight.counts", &[2, 1]),
            ]
        );
        assert_eq!(file.string("general.type").unwrap(), Some("imatrix"));
        assert_eq!(file.metadata("imatrix.chunk_size"), Some(&MetadataValue::U32(512)));
    }

    #[test]
    fn the_legacy_form_is_read() {
        let read = |bytes: Vec<u8>| Imatrix::from_bytes("i.dat", bytes).unwrap();
        let imatrix = read(legacy(2, &ending("wiki.txt")));
        assert_eq!((imatrix.chunk_count, imatrix.chunk_size), (7, 0));
        assert_eq!(imatrix.datasets, ["wiki.txt"]);
        assert_eq!(imatrix.importance("a.weight", 2).unwrap().unwrap(), [2.0, 3.0]);
        assert_eq!(imatrix.importance("b.weight", 2).unwrap().unwrap(), [0.5, 0.0], "as they are without calls");
        assert_eq!(read(legacy(2, &[])).chunk_count, 0, "old files end after the entries");
        assert!(read(legacy(2, &ending(""))).datasets.is_empty());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.dat");
        std::fs::write(&path, legacy(2, &[])).unwrap();
        assert_eq!(Imatrix::read(&path).unwrap().entries.len(), 2);
    }

    fn refused(bytes: Vec<u8>) -> String {
        let message = Imatrix::from_bytes("i.dat", bytes).unwrap_err().to_string();
        message.strip_prefix("i.dat: ").expect(&message).to_string()
    }

    #[test]
    fn lying_legacy_files_are_refused() {
        let not = "not an importance matrix, neither as GGUF nor in the legacy form: ";
        assert_eq!(
            refused(vec![1, 0]),
            format!("{not}the number of entries takes 4 bytes, but only 2 are left of the file")
        );
        assert_eq!(refused(legacy(0, &[])), format!("{not}the number of entries is 0, expected 1 or more"));
        assert_eq!(
            refused(legacy(i32::MAX, &[])),
            format!("{not}it announces 2147483647 entries, but only 56 bytes are left; fetch it again")
        );
        let change = |at: usize, value: i32| {
            let mut bytes = legacy(2, &[]);
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            refused(bytes)
        };
        assert_eq!(change(4, 0), "the length of the name of entry 1 of 2 is 0, expected 1 or more");
        assert_eq!(
            change(4, i32::MAX),
            "the name of entry 1 of 2 takes 2147483647 bytes, but only 52 are left of the file"
        );
        assert!(change(8, 0x7474_74ff).starts_with("the name of entry 1 of 2, \"\u{fffd}tttight\", is not UTF-8"));
        assert_eq!(change(16, -1), "tensor `a.weight`: the number of calls of entry 1 of 2 is -1, expected 0 or more");
        assert_eq!(
            change(20, 1 << 30),
            "tensor `a.weight`: it announces 1073741824 values of entry 1 of 2, but only 36 bytes are left; fetch it again"
        );
        assert_eq!(
            change(24, -1),
            "tensor `a.weight`: its sum 0 is NaN, expected 0 or more; collect the importance matrix again"
        );
        assert_eq!(change(36, i32::from_le_bytes(*b"a.we")), "tensor `a.weight`: two entries have this name");
        assert_eq!(refused(legacy(2, &[0; 9])), "1 bytes follow the name of the dataset, expected none");
        assert_eq!(refused(legacy(2, &[0; 3])), "the number of chunks takes 4 bytes, but only 3 are left of the file");
    }

    #[test]
    fn lying_gguf_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.gguf");
        let check = |general: &str, tensors: &[(&str, &str, usize)], message: &str| {
            let _ = std::fs::remove_file(&path);
            let metadata = vec![("general.type".to_string(), MetadataValue::String(general.into()))];
            let tensor = |&(name, ty, len): &(&str, &str, usize)| GgufTensor {
                name: name.into(),
                ty: GgmlType::from_name(ty).unwrap(),
                shape: vec![len],
            };
            let tensors: Vec<GgufTensor> = tensors.iter().map(tensor).collect();
            let writer = GgufWriter::create(&path, metadata, tensors.clone()).unwrap();
            for tensor in &tensors {
                writer.write(&tensor.name, &vec![0xff; tensor.bytes().unwrap() as usize]).unwrap();
            }
            writer.finish().unwrap();
            let found = Imatrix::read(&path).unwrap_err().to_string();
            assert_eq!(found.replace(&path.display().to_string(), "FILE"), message);
        };
        check("model", &[], "FILE: metadata key `general.type` is `model`, expected `imatrix`");
        check("imatrix", &[], "FILE: any tensor `NAME.in_sum2` of an importance matrix is missing");
        check("imatrix", &[("w.in_sum2", "F32", 4)], "FILE: tensor `w`: `w.counts` is missing");
        check("imatrix", &[("w.counts", "F32", 4)], "FILE: tensor `w`: `w.in_sum2` is missing");
        check(
            "imatrix",
            &[("w.in_sum2", "F32", 4), ("w.counts", "F16", 1)],
            "FILE: tensor `w.counts`: its type is F16, expected F32",
        );
        check(
            "imatrix",
            &[("w.in_sum2", "F32", 4), ("w.counts", "F32", 3)],
            "FILE: tensor `w`: its 4 sums do not split into 3 matrices",
        );
        check(
            "imatrix",
            &[("w.in_sum2", "F32", 4), ("w.counts", "F32", 0)],
            "FILE: tensor `w`: its 4 sums do not split into 0 matrices",
        );
        check(
            "imatrix",
            &[("w.in_sum2", "F32", 4), ("w.counts", "F32", 1)],
            "FILE: tensor `w`: its sum 0 is NaN, expected 0 or more; collect the importance matrix again",
        );
    }

    #[test]
    fn what_cannot_be_written_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.gguf");
        std::fs::write(&path, "mine").unwrap();
        let mut imatrix = sample();
        imatrix.entries.get_mut("blk.0.attn_q.weight").unwrap().counts = vec![1.0, 1.0];
        let message = imatrix.write(&path).unwrap_err().to_string();
        let expected = "tensor `blk.0.attn_q.weight`: its 3 sums do not split into 2 matrices";
        assert_eq!(message, format!("{}: {expected}", path.display()));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
