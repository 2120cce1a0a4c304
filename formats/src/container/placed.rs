//! Files laid out before their data is known: every tensor has its place, and is written there once, in any order.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Open files and the place of each tensor in them.
#[derive(Debug, Default)]
pub(super) struct PlacedFiles {
    files: Vec<(PathBuf, File)>,
    slots: HashMap<String, Slot>,
}

#[derive(Debug)]
struct Slot {
    file: usize,
    range: Range<u64>,
    written: AtomicU64,
}

impl PlacedFiles {
    /// Creates a file of `len` bytes that starts with `header` and is zero elsewhere; fails if there is one already.
    pub fn create(&mut self, path: &Path, header: &[u8], len: u64) -> Result<()> {
        let create = || -> std::io::Result<File> {
            let file = File::create_new(path)?;
            file.set_len(len)?;
            write_all_at(&file, header, 0)?;
            Ok(file)
        };
        let file = create().map_err(|e| Error::io("create", e).in_file(path))?;
        self.files.push((path.to_path_buf(), file));
        Ok(())
    }

    /// Gives a tensor these bytes of the file created last; false when the name has a place already.
    pub fn place(&mut self, name: &str, range: Range<u64>) -> bool {
        let file = self.files.len() - 1;
        self.slots.insert(name.to_string(), Slot { file, range, written: AtomicU64::new(0) }).is_none()
    }

    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// Writes one tensor, whole.
    pub fn write(&self, name: &str, data: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        let size = slot.range.end - slot.range.start;
        if data.len() as u64 != size {
            return Err(Error::mismatch("the data", format!("{size} bytes"), format!("{} bytes", data.len()))
                .in_tensor(name)
                .in_file(&self.files[slot.file].0));
        }
        self.write_part(name, 0, data)
    }

    /// Writes part of a tensor, `offset` bytes from its start; the parts must cover it once.
    pub fn write_part(&self, name: &str, offset: u64, data: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        let (path, file) = &self.files[slot.file];
        let (size, len) = (slot.range.end - slot.range.start, data.len() as u64);
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::invalid(format!(
                "{len} bytes at {offset} do not fit in the {size} bytes of the tensor"
            ))
            .in_tensor(name)
            .in_file(path));
        }
        if slot.written.fetch_add(len, Ordering::Relaxed) + len > size {
            return Err(Error::invalid("the tensor is written twice").in_tensor(name).in_file(path));
        }
        write_all_at(file, data, slot.range.start + offset)
            .map_err(|e| Error::io(format!("write {len} bytes"), e).in_tensor(name).in_file(path))
    }

    fn slot(&self, name: &str) -> Result<&Slot> {
        self.slots.get(name).ok_or_else(|| Error::invalid("the tensor was not announced").in_tensor(name))
    }

    /// Checks that every tensor was written and waits until the files are on disk.
    pub fn finish(self) -> Result<()> {
        let unwritten = |slot: &Slot| slot.written.load(Ordering::Relaxed) < slot.range.end - slot.range.start;
        let mut missing: Vec<_> = self.slots.iter().filter(|(_, slot)| unwritten(slot)).collect();
        missing.sort_by_key(|(_, slot)| (slot.file, slot.range.start));
        if let Some((name, slot)) = missing.first() {
            return Err(Error::invalid(format!("{} tensors were never written, this one first", missing.len()))
                .in_tensor(*name)
                .in_file(&self.files[slot.file].0));
        }
        for (path, file) in &self.files {
            file.sync_all().map_err(|e| Error::io("flush", e).in_file(path))?;
        }
        Ok(())
    }

    /// Replaces the file created last, to see what happens when the disk is full.
    #[cfg(test)]
    pub fn redirect(&mut self, to: File) {
        self.files.last_mut().expect("a file").1 = to;
    }
}

#[cfg(unix)]
fn write_all_at(file: &File, data: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, data, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut data: &[u8], mut offset: u64) -> std::io::Result<()> {
    while !data.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, data, offset)?;
        if n == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        data = &data[n..];
        offset += n as u64;
    }
    Ok(())
}
