//! Files laid out before their data is known: every tensor has its place, and is written there once, in any order.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Open files and the place of each tensor in them.
#[derive(Debug, Default)]
pub(super) struct PlacedFiles {
    files: Vec<(PathBuf, File)>,
    slots: HashMap<String, Slot>,
    shared: Arc<Shared>,
    laid_out: LaidOut,
    /// Of files that are only counted, their bytes.
    counted: Vec<(PathBuf, u64)>,
}

/// Where the files come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LaidOut {
    /// They are created.
    #[default]
    Anew,
    /// They are there already, laid out by an earlier process.
    Before,
    /// They are nowhere: only their sizes are asked for.
    Counted,
}

#[derive(Debug)]
struct Slot {
    file: usize,
    /// Which of the file's.
    index: usize,
    range: Range<u64>,
    /// Bytes that writers have taken on themselves.
    written: AtomicU64,
    /// Bytes that are in the file.
    landed: AtomicU64,
}

/// How far the files can be read while they are written.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    files: Vec<Extent>,
    /// Nothing more will be written.
    closed: bool,
}

/// What of a file is there.
#[derive(Debug)]
struct Extent {
    len: u64,
    /// Starts of the tensors, ascending, and whether they are written.
    slots: Vec<(u64, bool)>,
    /// The first tensor that is not.
    next: usize,
}

impl Extent {
    /// Bytes from the start that will not change any more.
    fn ready(&self) -> u64 {
        self.slots.get(self.next).map_or(self.len, |&(start, _)| start)
    }

    /// Passes by what is written.
    fn advance(&mut self) {
        while self.slots.get(self.next).is_some_and(|&(_, done)| done) {
            self.next += 1;
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a file from its start while it is being written; waits where it is not yet.
///
/// Reading fails once the writer is gone without having written everything.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    file: File,
    index: usize,
    at: u64,
    shared: Arc<Shared>,
}

impl Follower {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Read for Follower {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let ready = {
            let mut state = self.shared.state();
            loop {
                let extent = &state.files[self.index];
                let ready = extent.ready();
                if ready > self.at || self.at == extent.len {
                    break ready;
                }
                if state.closed {
                    return Err(std::io::Error::other("the file was not finished"));
                }
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let most = usize::try_from(ready - self.at).map_or(buffer.len(), |most| most.min(buffer.len()));
        let read = self.file.read(&mut buffer[..most])?;
        if read == 0 && most > 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.at += read as u64;
        Ok(read)
    }
}

impl Drop for PlacedFiles {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.changed.notify_all();
    }
}

impl PlacedFiles {
    /// Files that an earlier process has laid out alike, and not finished.
    pub fn taken_up() -> PlacedFiles {
        let mut files = PlacedFiles::default();
        files.laid_out = LaidOut::Before;
        files
    }

    /// Files that are never made, whose sizes alone are asked for.
    pub fn counted() -> PlacedFiles {
        let mut files = PlacedFiles::default();
        files.laid_out = LaidOut::Counted;
        files
    }

    /// The files that were only counted, with their bytes.
    pub fn sizes(&self) -> Vec<(PathBuf, u64)> {
        self.counted.clone()
    }

    /// Creates a file of `len` bytes that starts with `header` and is zero elsewhere; fails if there is one already.
    pub fn create(&mut self, path: &Path, header: &[u8], len: u64) -> Result<()> {
        if self.laid_out == LaidOut::Counted {
            self.counted.push((path.to_path_buf(), len));
            return Ok(());
        }
        let taken_up = self.laid_out == LaidOut::Before;
        let create = || -> std::io::Result<File> {
            if taken_up {
                return take_up(path, header, len);
            }
            let file = File::options().read(true).write(true).create_new(true).open(path)?;
            file.set_len(len)?;
            write_all_at(&file, header, 0)?;
            Ok(file)
        };
        let doing = if taken_up { "take up" } else { "create" };
        let file = create().map_err(|e| Error::io(doing, e).in_file(path))?;
        self.files.push((path.to_path_buf(), file));
        self.shared.state().files.push(Extent { len, slots: Vec::new(), next: 0 });
        Ok(())
    }

    /// Writes a file beside them, whole.
    pub fn write_beside(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        if self.laid_out == LaidOut::Counted {
            self.counted.push((path.to_path_buf(), content.len() as u64));
            return Ok(());
        }
        std::fs::write(path, content).map_err(|e| Error::io("write", e).in_file(path))
    }

    /// Gives a tensor these bytes of the file created last, behind those of the tensor placed before it; false when the
    /// name has a place already.
    pub fn place(&mut self, name: &str, range: Range<u64>) -> bool {
        if self.laid_out == LaidOut::Counted {
            return true;
        }
        let file = self.files.len() - 1;
        let index = {
            let extent = &mut self.shared.state().files[file];
            debug_assert!(extent.slots.last().is_none_or(|&(start, _)| start <= range.start));
            extent.slots.push((range.start, range.is_empty()));
            extent.advance();
            extent.slots.len() - 1
        };
        let slot = Slot { file, index, range, written: AtomicU64::new(0), landed: AtomicU64::new(0) };
        self.slots.insert(name.to_string(), slot).is_none()
    }

    /// A reader of each file that keeps behind its writing. Call it when all tensors are placed.
    pub fn follow(&self) -> Result<Vec<Follower>> {
        let follow = |(index, (path, _)): (usize, &(PathBuf, File))| {
            let file = File::open(path).map_err(|e| Error::io("open", e).in_file(path))?;
            Ok(Follower { path: path.clone(), file, index, at: 0, shared: self.shared.clone() })
        };
        self.files.iter().enumerate().map(follow).collect()
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
            .map_err(|e| Error::io(format!("write {len} bytes"), e).in_tensor(name).in_file(path))?;
        if len > 0 && slot.landed.fetch_add(len, Ordering::AcqRel) + len == size {
            begin_flush(file, &slot.range);
            let extent = &mut self.shared.state().files[slot.file];
            extent.slots[slot.index].1 = true;
            extent.advance();
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// Takes a tensor of a file that was taken up as it is there.
    pub fn keep(&self, name: &str) -> Result<()> {
        let slot = self.slot(name)?;
        let size = slot.range.end - slot.range.start;
        slot.written.store(size, Ordering::Relaxed);
        slot.landed.store(size, Ordering::Release);
        let extent = &mut self.shared.state().files[slot.file];
        extent.slots[slot.index].1 = true;
        extent.advance();
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Reads what is there of a tensor, `offset` bytes from its start.
    pub fn read_part(&self, name: &str, offset: u64, data: &mut [u8]) -> Result<()> {
        let slot = self.slot(name)?;
        let (path, file) = &self.files[slot.file];
        debug_assert!(offset + data.len() as u64 <= slot.range.end - slot.range.start);
        read_exact_at(file, data, slot.range.start + offset)
            .map_err(|e| Error::io(format!("read {} bytes", data.len()), e).in_tensor(name).in_file(path))
    }

    /// Waits until what is written so far is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.files.iter().try_for_each(|(path, file)| file.sync_data().map_err(|e| Error::io("flush", e).in_file(path)))
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

/// Opens a file that was laid out before.
fn take_up(path: &Path, header: &[u8], len: u64) -> std::io::Result<File> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut found = vec![0; header.len()];
    if file.metadata()?.len() != len || read_exact_at(&file, &mut found, 0).is_err() || found != header {
        return Err(std::io::Error::other("it was laid out otherwise"));
    }
    Ok(file)
}

#[cfg(unix)]
fn read_exact_at(file: &File, data: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, data, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut data: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !data.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, data, offset)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        data = &mut data[n..];
        offset += n as u64;
    }
    Ok(())
}

#[cfg(unix)]
fn write_all_at(file: &File, data: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, data, offset)
}

/// Sends bytes on their way to the disk while others are still being computed; [`PlacedFiles::finish`] waits for them.
#[cfg(target_os = "linux")]
fn begin_flush(file: &File, range: &Range<u64>) {
    use std::os::fd::AsRawFd;
    let (Ok(start), Ok(len)) = (range.start.try_into(), (range.end - range.start).try_into()) else { return };
    // SAFETY: the descriptor is open as long as `file` is borrowed, and no memory is passed. Failure only costs time.
    unsafe { libc::sync_file_range(file.as_raw_fd(), start, len, libc::SYNC_FILE_RANGE_WRITE) };
}

#[cfg(not(target_os = "linux"))]
fn begin_flush(_: &File, _: &Range<u64>) {}

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

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of a header and three tensors, the second of which is empty, and the bytes it will have.
    fn laid_out(dir: &Path) -> (PlacedFiles, Vec<u8>) {
        let mut files = PlacedFiles::default();
        files.create(&dir.join("f"), b"head", 30).unwrap();
        files.place("a", 4..14);
        files.place("empty", 16..16);
        files.place("b", 16..26);
        (files, [&b"head"[..], &[1; 10], &[0; 2], &[2; 10], &[0; 4]].concat())
    }

    #[test]
    fn a_follower_reads_what_cannot_change_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let (files, expected) = laid_out(dir.path());
        let mut follower = files.follow().unwrap().pop().unwrap();
        let mut found = vec![0; 64];
        assert_eq!(follower.read(&mut found).unwrap(), 4);
        // The second tensor is there and half of the first: nothing may be read yet, so another thread writes the rest.
        files.write("b", &[2; 10]).unwrap();
        files.write_part("a", 5, &[1; 5]).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                files.write_part("a", 0, &[1; 5]).unwrap();
            });
            let mut rest = Vec::new();
            follower.read_to_end(&mut rest).unwrap();
            assert_eq!([b"head", &rest[..]].concat(), expected);
        });
        files.finish().unwrap();
    }

    #[test]
    fn what_was_laid_out_alike_is_taken_up_and_tensors_are_kept_or_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let (files, expected) = laid_out(dir.path());
        files.write("a", &[1; 10]).unwrap();
        files.write_part("b", 0, &[9; 5]).unwrap();
        files.sync().unwrap();
        drop(files);
        let mut files = PlacedFiles::taken_up();
        let path = dir.path().join("f");
        for (header, len) in [(&b"Head"[..], 30), (b"head", 31), (&[0; 40], 30)] {
            let told = PlacedFiles::taken_up().create(&path, header, len).unwrap_err().to_string();
            assert!(told.contains("laid out otherwise"), "{told}");
        }
        assert!(PlacedFiles::taken_up().create(&dir.path().join("g"), b"head", 30).is_err());
        files.create(&path, b"head", 30).unwrap();
        files.place("a", 4..14);
        files.place("empty", 16..16);
        files.place("b", 16..26);
        files.keep("a").unwrap();
        let mut found = [0; 4];
        files.read_part("a", 6, &mut found).unwrap();
        assert_eq!(found, [1; 4]);
        assert!(files.write_part("a", 0, &[3; 5]).is_err(), "what is kept is not written again");
        let mut follower = files.follow().unwrap().pop().unwrap();
        files.write("b", &[2; 10]).unwrap();
        let mut read = Vec::new();
        follower.read_to_end(&mut read).unwrap();
        assert_eq!(read, expected);
        files.finish().unwrap();
    }

    #[test]
    fn a_follower_of_a_file_that_is_given_up_fails() {
        let dir = tempfile::tempdir().unwrap();
        let (files, _) = laid_out(dir.path());
        files.write("a", &[1; 10]).unwrap();
        let mut follower = files.follow().unwrap().pop().unwrap();
        drop(files);
        let mut found = Vec::new();
        assert_eq!(follower.read_to_end(&mut found).unwrap_err().to_string(), "the file was not finished");
        assert_eq!(found.len(), 16, "what is there is read");
    }
}
