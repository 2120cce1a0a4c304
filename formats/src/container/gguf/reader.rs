//! Memory-mapped GGUF files, one or the several that a model is split into.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use gguf_rs_lib::format::MetadataValue;

use super::header::{Header, integer, short};
use super::split_path;
use crate::container::Bytes;
use crate::error::{Error, Result};
use crate::ggml::GgmlType;

/// A GGUF file, or the files of a split set, whose tables have been checked against their sizes.
#[derive(Debug, Default)]
pub struct GgufFile {
    /// The path it was opened from.
    path: PathBuf,
    /// One for each file.
    parts: Vec<Bytes>,
    /// Where these are.
    paths: Vec<PathBuf>,
    metadata: BTreeMap<String, MetadataValue>,
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
    part: usize,
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
    ///
    /// The first of the files that a model is split into stands for all of them; the others must lie beside it, under
    /// the names that llama.cpp gives them.
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile> {
        let path = path.as_ref();
        let mut file = GgufFile { path: path.to_path_buf(), ..GgufFile::default() };
        let split = file.add(path, Bytes::map(path)?)?;
        if let Some((number, count, tensors)) = split {
            file.add_siblings(number, count, tensors)?;
        }
        Ok(file)
    }

    /// [`GgufFile::open`] of one whole file in memory; `name` stands for it in messages.
    pub fn from_bytes(name: impl AsRef<Path>, bytes: Vec<u8>) -> Result<GgufFile> {
        let path = name.as_ref();
        let mut file = GgufFile { path: path.to_path_buf(), ..GgufFile::default() };
        match file.add(path, Bytes::Owned(bytes))? {
            None => Ok(file),
            Some((number, count, _)) => {
                let why = format!("it is file {} of {count} that a model is split into, not a whole one", number + 1);
                Err(Error::unsupported(why).in_file(path))
            }
        }
    }

    /// Fails when one of the files was replaced or written to since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.parts.iter().try_for_each(Bytes::check_unchanged)
    }

    /// Checks one file and takes its tensors, and the metadata of the first; gives its place among split files.
    fn add(&mut self, path: &Path, bytes: Bytes) -> Result<Option<(usize, usize, usize)>> {
        let header = Header::parse(&bytes).map_err(|error| error.in_file(path))?;
        let split = header.split().map_err(|error| error.in_file(path))?;
        let part = self.parts.len();
        for entry in header.tensors {
            if self.by_name.insert(entry.name.clone(), self.tensors.len()).is_some() {
                let why = "the tensor is in two of the files that the model is split into";
                return Err(Error::malformed(why).in_tensor(entry.name).in_file(path));
            }
            let range = entry.start..entry.start + entry.bytes;
            self.tensors.push(GgufSpec { name: entry.name, ty: entry.ty, shape: entry.shape, part, range });
        }
        if part == 0 {
            self.metadata = header.metadata;
        }
        self.parts.push(bytes);
        self.paths.push(path.to_path_buf());
        Ok(split)
    }

    fn add_siblings(&mut self, number: usize, count: usize, tensors: usize) -> Result<()> {
        let first = self.path.clone();
        let ending = |number: usize| split_path("", number, count).display().to_string();
        let name = first.file_name().unwrap_or_default().to_string_lossy();
        // The numbers are what tells the files apart; not every program keeps the ending behind them.
        let own = ending(number + 1);
        let own = own.strip_suffix(".gguf").expect("as split_path writes it");
        let Some((stem, rest)) = name.rsplit_once(own).filter(|(_, rest)| rest.is_empty() || rest.starts_with('.'))
        else {
            let expected = format!("a name that ends in {}", ending(number + 1));
            let what = format!("the name of file {} of {count} that a model is split into", number + 1);
            return Err(Error::mismatch(what, expected, name).in_file(&first));
        };
        let sibling = |number: usize| {
            let numbers = ending(number);
            first.with_file_name(format!("{stem}{}{rest}", numbers.strip_suffix(".gguf").expect("as above")))
        };
        if number != 0 {
            return Err(Error::unsupported(format!(
                "it is file {} of {count} that a model is split into; open the first, {}",
                number + 1,
                sibling(1).display()
            ))
            .in_file(&first));
        }
        for index in 1..count {
            let path = sibling(index + 1);
            if !path.exists() {
                let what = format!("file {} of {count} that the model is split into, {},", index + 1, path.display());
                return Err(Error::missing(what).in_file(&first));
            }
            let found = self.add(&path, Bytes::map(&path)?)?;
            if found != Some((index, count, tensors)) {
                let say = |split: Option<(usize, usize, usize)>| match split {
                    None => "a file that is whole".to_string(),
                    Some((index, count, tensors)) => format!("file {} of {count} with {tensors} tensors", index + 1),
                };
                let expected = say(Some((index, count, tensors)));
                return Err(Error::mismatch("by its metadata it", expected, say(found)).in_file(&path));
            }
        }
        if self.tensors.len() != tensors {
            let what = format!("the number of tensors in the {count} files that the model is split into");
            return Err(Error::mismatch(what, tensors, self.tensors.len()).in_file(&first));
        }
        Ok(())
    }

    /// The files, one or all that a model is split into.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
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
        self.metadata.keys().map(String::as_str).collect()
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
        self.typed(key, "a count", |value| integer(value).and_then(|n| usize::try_from(n).ok()))
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
            MetadataValue::Array(array) => array.iter().map(|value| integer(value)?.try_into().ok()).collect(),
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
        read(value)
            .map(Some)
            .ok_or_else(|| Error::mismatch(format!("metadata key `{key}`"), expected, short(value)).in_file(&self.path))
    }

    /// Name, type and shape of every tensor, in the order of the file's table.
    pub fn tensors(&self) -> &[GgufSpec] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<GgufView<'_>> {
        let spec = &self.tensors[*self.by_name.get(name)?];
        Some(GgufView { ty: spec.ty, shape: &spec.shape, data: &self.parts[spec.part][spec.range.clone()] })
    }

    /// Tells the system that a tensor will be read soon.
    pub fn announce(&self, name: &str) {
        if let Some(&index) = self.by_name.get(name) {
            let spec = &self.tensors[index];
            self.parts[spec.part].announce(spec.range.clone());
        }
    }

    /// Gives the memory behind a tensor back to the system.
    pub fn release(&self, name: &str) {
        if let Some(&index) = self.by_name.get(name) {
            let spec = &self.tensors[index];
            self.parts[spec.part].release(spec.range.clone());
        }
    }
}
