//! Everything before the data of one file, read from bytes that cannot be trusted.

use std::collections::{BTreeMap, HashSet};

use gguf_rs_lib::GGUFError;
use gguf_rs_lib::format::{GGUFTensorType, GGUFValueType, MetadataValue};

use super::{ALIGNMENT, MAX_DIMS, NAME_BYTES, SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS};
use crate::container::stand_in::another;
use crate::error::{Error, Result};
use crate::ggml::{self, GgmlType};

/// Decoded metadata beyond this is refused; vocabularies of half a million entries take a tenth of it.
pub const MAX_METADATA_BYTES: usize = 512 << 20;

/// Bytes that the shortest key, and the shortest entry of the table, take.
const KEY_BYTES: u64 = 8 + 1 + 4 + 1;
const ENTRY_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// Longer keys are refused, as the specification demands.
const MAX_KEY_BYTES: u64 = (1 << 16) - 1;

/// What stands before the data.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, MetadataValue>,
    pub tensors: Vec<Entry>,
}

/// One tensor of the table; its bytes lie inside the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    pub ty: GgmlType,
    /// Slowest first.
    pub shape: Vec<usize>,
    pub start: usize,
    pub bytes: usize,
}

impl Header {
    /// Reads and checks the header of a file with these bytes.
    pub fn parse(file: &[u8]) -> Result<Header> {
        Header::parse_within(file, MAX_METADATA_BYTES)
    }

    /// [`Header::parse`] with another limit for decoded metadata.
    pub(super) fn parse_within(file: &[u8], limit: usize) -> Result<Header> {
        if !file.starts_with(b"GGUF") {
            let why = another(file, "a GGUF file")
                .unwrap_or_else(|| "this is not a GGUF file: it does not start with `GGUF`; fetch it again".into());
            return Err(Error::malformed(why));
        }
        let mut at = Cursor { rest: &file[4..] };
        let version = at.u32("the version")?;
        match version {
            2 | 3 => {}
            _ if version.trailing_zeros() >= 16 && version != 0 => {
                return Err(Error::unsupported(
                    "it is a big-endian GGUF file, which cannot be read; swap its bytes with llama.cpp's gguf_convert_endian.py",
                ));
            }
            _ => {
                return Err(Error::unsupported(format!(
                    "its GGUF version is {version}, which cannot be read (2 or 3); convert the original checkpoint again"
                )));
            }
        }
        let tensors = at.count("tensors", ENTRY_BYTES)?;
        let keys = at.count("metadata keys", KEY_BYTES)?;
        let metadata = at.metadata(keys, limit)?;
        let alignment = alignment(&metadata)?;
        let mut table = at.table(tensors)?;

        let data_start = (file.len() - at.rest.len()).next_multiple_of(alignment);
        for entry in &mut table {
            entry.locate(data_start, alignment, file.len()).map_err(|e| e.in_tensor(&entry.name))?;
        }
        let mut order: Vec<&Entry> = table.iter().filter(|entry| entry.bytes > 0).collect();
        order.sort_by_key(|entry| entry.start);
        for pair in order.windows(2) {
            if pair[1].start < pair[0].start + pair[0].bytes {
                return Err(
                    Error::malformed(format!("its data overlaps that of `{}`", pair[0].name)).in_tensor(&pair[1].name)
                );
            }
        }
        Ok(Header { metadata, tensors: table })
    }

    /// Which file of how many this is, from 0, and the tensors in all of them; `None` for a file that is whole.
    pub fn split(&self) -> Result<Option<(usize, usize, usize)>> {
        let integer = |key: &str| match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => integer(value)
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| Error::mismatch(format!("metadata key `{key}`"), "a count", short(value)))
                .map(Some),
        };
        let require = |key: &str| integer(key)?.ok_or_else(|| Error::missing(format!("metadata key `{key}`")));
        match integer(SPLIT_COUNT)? {
            None | Some(0 | 1) => Ok(None),
            Some(count) => Ok(Some((require(SPLIT_NO)?, count, require(SPLIT_TENSORS)?))),
        }
    }
}

impl Entry {
    /// Checks where the data lies; until then `start` is its offset from the beginning of all data.
    fn locate(&mut self, data_start: usize, alignment: usize, file_len: usize) -> Result<()> {
        if !self.start.is_multiple_of(alignment) {
            return Err(Error::malformed(format!("its offset {} is not a multiple of {alignment}", self.start)));
        }
        let end = data_start.checked_add(self.start).and_then(|start| start.checked_add(self.bytes));
        match end {
            None => Err(Error::malformed(format!("its offset {} overflows", self.start))),
            Some(end) if end > file_len => Err(Error::malformed(format!(
                "the file is truncated: the tensor ends at byte {end}, but the file has {file_len} bytes; fetch it again"
            ))),
            Some(_) => {
                self.start += data_start;
                Ok(())
            }
        }
    }
}

/// A value of any integer type.
pub(super) fn integer(value: &MetadataValue) -> Option<i128> {
    value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from))
}

/// A value as it stands in messages.
pub(super) fn short(value: &MetadataValue) -> String {
    if let MetadataValue::Array(array) = value {
        return format!("an array of {} values", array.len());
    }
    let text = value.to_string_representation();
    let text = match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    };
    format!("{text} ({:?})", value.value_type())
}

fn alignment(metadata: &BTreeMap<String, MetadataValue>) -> Result<usize> {
    let key = "general.alignment";
    match metadata.get(key) {
        None => Ok(ALIGNMENT as usize),
        Some(MetadataValue::U32(n)) if n.is_power_of_two() => Ok(*n as usize),
        Some(value) => Err(Error::mismatch(format!("metadata key `{key}`"), "a power of two (U32)", short(value))),
    }
}

/// What is left to read.
struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let split = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (taken, rest) = split.ok_or_else(|| {
            Error::malformed(format!(
                "the file is truncated: {what} takes {len} bytes, but only {} are left; fetch it again",
                self.rest.len()
            ))
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4, what)?.try_into().expect("four bytes")))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8, what)?.try_into().expect("eight bytes")))
    }

    /// A number of things that take `least` bytes each.
    fn count(&mut self, what: &str, least: u64) -> Result<u64> {
        let count = self.u64(&format!("the number of {what}"))?;
        let most = self.rest.len() as u64 / least;
        if count > most {
            return Err(Error::malformed(format!(
                "it announces {count} {what}, but the {} bytes that follow hold at most {most}; fetch it again",
                self.rest.len()
            )));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str, longest: u64) -> Result<&'a str> {
        let len = self.u64(what)?;
        if len == 0 || len > longest {
            return Err(Error::mismatch(format!("the length of {what}"), format!("1 to {longest} bytes"), len));
        }
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes)
            .map_err(|_| Error::malformed(format!("{what}, {:?}, is not UTF-8", String::from_utf8_lossy(bytes))))
    }

    fn metadata(&mut self, keys: u64, limit: usize) -> Result<BTreeMap<String, MetadataValue>> {
        let mut metadata = BTreeMap::new();
        let mut decoded = 0;
        for number in 1..=keys {
            let key = self.string(&format!("metadata key {number} of {keys}"), MAX_KEY_BYTES)?;
            let value = self.value(key)?;
            // One value is bounded by the library; here they are together.
            decoded += key.len() + decoded_bytes(&value);
            if decoded > limit {
                return Err(Error::unsupported(format!(
                    "its metadata up to key `{key}` takes more than the {limit} bytes allowed"
                )));
            }
            if metadata.insert(key.to_string(), value).is_some() {
                return Err(Error::malformed(format!("metadata key `{key}` stands twice")));
            }
        }
        Ok(metadata)
    }

    fn value(&mut self, key: &str) -> Result<MetadataValue> {
        let id = self.u32(&format!("the type of metadata key `{key}`"))?;
        let ty = GGUFValueType::from_u32(id).map_err(|_| {
            Error::malformed(format!("metadata key `{key}` has the value type {id}, which does not exist"))
        })?;
        let left = self.rest.len();
        MetadataValue::read_from(&mut self.rest, ty).map_err(|error| {
            Error::malformed(match error {
                GGUFError::Io(_) | GGUFError::UnexpectedEof => {
                    format!(
                        "the file is truncated: the value of metadata key `{key}` goes beyond the {left} bytes left; fetch it again"
                    )
                }
                error => format!("the value of metadata key `{key}` is invalid: {error}"),
            })
        })
    }

    fn table(&mut self, tensors: u64) -> Result<Vec<Entry>> {
        let mut table = Vec::new();
        let mut names = HashSet::new();
        for number in 1..=tensors {
            let what = format!("the name of tensor {number} of {tensors}");
            let name = self.string(&what, NAME_BYTES as u64)?;
            table.push(self.entry(name).map_err(|error| error.in_tensor(name))?);
            if !names.insert(name) {
                return Err(Error::malformed("two tensors have this name").in_tensor(name));
            }
        }
        Ok(table)
    }

    fn entry(&mut self, name: &str) -> Result<Entry> {
        let dims = self.u32("its number of dimensions")? as usize;
        if dims == 0 || dims > MAX_DIMS {
            return Err(Error::mismatch("its number of dimensions", format!("1 to {MAX_DIMS}"), dims));
        }
        let mut extents = Vec::with_capacity(dims);
        for _ in 0..dims {
            extents.push(self.u64("its shape")?);
        }
        let id = self.u32("its type")?;
        let offset = self.u64("its offset")?;
        let ty = GgmlType::from_id(id).ok_or_else(|| {
            let known: Vec<&str> = ggml::TYPES.iter().map(|t| t.name).collect();
            let found = GGUFTensorType::from_u32(id).map_or(format!("type {id}"), |ty| ty.name().to_string());
            Error::unsupported(format!(
                "it is stored as {found}, which cannot be read ({}); give the checkpoint that the file was made from, or a file of it in another \
                 type",
                known.join(", ")
            ))
        })?;
        let overflow = || Error::malformed(format!("its shape {extents:?} overflows"));
        let mut shape = Vec::with_capacity(dims);
        for &extent in extents.iter().rev() {
            shape.push(usize::try_from(extent).map_err(|_| overflow())?);
        }
        // Extents of 0 count as 1 here, so that the product of some of them does not overflow either.
        shape.iter().try_fold(1usize, |n, &e| n.checked_mul(e.max(1))).ok_or_else(overflow)?;
        let (width, rows) = shape.split_last().expect("a dimension");
        let rows = rows.iter().product::<usize>();
        if !width.is_multiple_of(ty.block_len) {
            let why = format!("a row of {width} values does not split into {ty} blocks of {}", ty.block_len);
            return Err(Error::malformed(why));
        }
        let row_bytes = ty.row_bytes(*width).ok_or_else(overflow)?;
        let bytes = rows.checked_mul(row_bytes).ok_or_else(overflow)?;
        let start = usize::try_from(offset).map_err(|_| Error::malformed(format!("its offset {offset} overflows")))?;
        Ok(Entry { name: name.to_string(), ty, shape, start, bytes })
    }
}

/// Memory that a value takes.
fn decoded_bytes(value: &MetadataValue) -> usize {
    size_of::<MetadataValue>()
        + match value {
            MetadataValue::String(text) => text.capacity(),
            MetadataValue::Array(array) => array.iter().map(decoded_bytes).sum(),
            _ => 0,
        }
}
