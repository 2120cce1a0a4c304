//! What a run has finished, so that the same command goes on where an earlier process was killed.
//!
//! ```text
//! {"tool": …, "model": …, "recipe": …}          who may go on: the same program, inputs and recipe
//! {"linears": […], "folded": {…}}               a finished block; its weights were on the disk before this line was
//! {"linears": […], "fol                         a line that was cut off is none
//! ```
//!
//! The stream of hidden states is not kept. Whoever goes on runs the finished blocks with what the staged files hold of them, which is what
//! the earlier process ran them with.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::report::{LinearReport, SmoothingReport};

/// The journal's name in a staging folder.
pub const NAME: &str = ".quantc-journal";

/// Who may go on with what is staged: an object of which every entry has to be the same.
pub type Key = Value;

/// One finished block of a target.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Finished {
    /// Its quantized linears, in the order of the work.
    pub linears: Vec<LinearReport>,
    /// Channel scales that were folded into it.
    pub smoothings: Vec<SmoothingReport>,
    /// Tensors that lost values in being written, with the share of these.
    pub lost: Vec<(String, f64)>,
    /// Tensors that the folding has changed, as bits of f32.
    pub folded: BTreeMap<String, Vec<u32>>,
    /// What was seen before its tensors, for an imatrix: sums and counts, as bits of f32.
    pub importance: BTreeMap<String, [Vec<u32>; 2]>,
}

/// The journal of an output that is being written.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Mutex<File>,
    /// What an earlier process has finished.
    finished: Vec<Finished>,
}

impl Journal {
    /// Begins one in a staging folder.
    pub fn begin(folder: &Path, key: &Key) -> Result<Journal> {
        let path = folder.join(NAME);
        let create = || {
            let mut file = File::create(&path)?;
            file.write_all(format!("{key}\n").as_bytes())?;
            Ok(file)
        };
        let file = create().map_err(Error::io(&path, "write"))?;
        Ok(Journal { path, file: Mutex::new(file), finished: Vec::new() })
    }

    /// Goes on with one that [`read`] has found.
    pub fn go_on(folder: &Path, finished: Vec<Finished>) -> Result<Journal> {
        let path = folder.join(NAME);
        let file = File::options().append(true).open(&path).map_err(Error::io(&path, "write"))?;
        Ok(Journal { path, file: Mutex::new(file), finished })
    }

    /// Blocks that an earlier process has finished.
    pub fn finished(&self) -> usize {
        self.finished.len()
    }

    /// Takes the first of them as finished, and forgets the others, for they are done again: the next block that is added comes after
    /// these.
    pub fn take_up(&self, blocks: usize) -> Result<&[Finished]> {
        let kept = || {
            let text = fs::read(&self.path)?;
            let lines = text.split_inclusive(|byte| *byte == b'\n').take(1 + blocks);
            self.lock().set_len(lines.map(<[u8]>::len).sum::<usize>() as u64)
        };
        kept().map_err(Error::io(&self.path, "write"))?;
        Ok(&self.finished[..blocks])
    }

    /// Another block is finished; its weights are on the disk. Waits until that is on the disk, too.
    pub fn add(&self, block: &Finished) -> Result<()> {
        let line = serde_json::to_string(block).expect("plain data") + "\n";
        let mut file = self.lock();
        file.write_all(line.as_bytes()).and_then(|()| file.sync_data()).map_err(Error::io(&self.path, "write"))
    }

    fn lock(&self) -> MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key and the finished blocks of a staging folder; `None` where there is no journal.
pub fn read(folder: &Path) -> Option<(Key, Vec<Finished>)> {
    let text = fs::read(folder.join(NAME)).ok()?;
    let mut lines = text.split_inclusive(|byte| *byte == b'\n').take_while(|line| line.ends_with(b"\n"));
    let key = serde_json::from_slice(lines.next()?).ok()?;
    Some((key, lines.map_while(|line| serde_json::from_slice(line).ok()).collect()))
}

/// What is otherwise in one key than in another, in words.
pub fn differences(then: &Key, now: &Key) -> Vec<String> {
    let mut found = Vec::new();
    compare("", then, now, &mut found);
    found
}

fn compare(name: &str, then: &Value, now: &Value, found: &mut Vec<String>) {
    if then == now {
        return;
    }
    if let (Value::Object(then), Value::Object(now)) = (then, now) {
        let mut keys: Vec<&String> = then.keys().chain(now.keys()).collect();
        keys.sort();
        keys.dedup();
        for key in keys {
            let inner = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            compare(&inner, then.get(key).unwrap_or(&Value::Null), now.get(key).unwrap_or(&Value::Null), found);
        }
        return;
    }
    let told = |value: &Value| {
        let text = value.to_string();
        if value.is_array() || value.is_object() || text.chars().count() > 60 { None } else { Some(text) }
    };
    found.push(match (told(then), told(now)) {
        (Some(then), Some(now)) => format!("{name} was {then} and is {now}"),
        _ => format!("{name} is another"),
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn whole_lines_are_finished_blocks_and_the_rest_is_written_again() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).is_none());
        let key = json!({"tool": "quantc 0", "recipe": {"bits": 4, "seed": 0}});
        let journal = Journal::begin(dir.path(), &key).unwrap();
        let block = |name: &str| Finished {
            lost: vec![(name.to_owned(), 0.5)],
            folded: [(name.to_owned(), vec![f32::MIN_POSITIVE.to_bits(), 0x7f7f_ffff])].into(),
            ..Finished::default()
        };
        journal.add(&block("a")).unwrap();
        journal.add(&block("b")).unwrap();
        let path = dir.path().join(NAME);
        let text = fs::read(&path).unwrap();
        // However it was cut off.
        for len in 0..=text.len() {
            fs::write(&path, &text[..len]).unwrap();
            let lines = text[..len].iter().filter(|byte| **byte == b'\n').count();
            let Some((found, finished)) = read(dir.path()) else {
                assert_eq!(lines, 0);
                continue;
            };
            assert_eq!((&found, finished.len()), (&key, lines - 1));
            let count = finished.len();
            let journal = Journal::go_on(dir.path(), finished).unwrap();
            assert_eq!((journal.finished(), journal.take_up(count).unwrap().len()), (count, count));
            journal.add(&block("c")).unwrap();
            let (_, finished) = read(dir.path()).unwrap();
            assert_eq!(finished.len(), lines);
            assert_eq!(finished.last().unwrap().folded, block("c").folded);
        }
    }

    /// Of several outputs one may have a block more than another; all go on after those that all have.
    #[test]
    fn blocks_that_are_done_again_are_no_longer_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let block = |name: &str| Finished { lost: vec![(name.to_owned(), 0.5)], ..Finished::default() };
        let journal = Journal::begin(dir.path(), &json!({})).unwrap();
        ["a", "b", "c"].iter().for_each(|name| journal.add(&block(name)).unwrap());
        let journal = Journal::go_on(dir.path(), read(dir.path()).unwrap().1).unwrap();
        assert_eq!(journal.take_up(1).unwrap()[0].lost[0].0, "a");
        journal.add(&block("d")).unwrap();
        let names: Vec<String> = read(dir.path()).unwrap().1.into_iter().map(|block| block.lost[0].0.clone()).collect();
        assert_eq!(names, ["a", "d"]);
    }

    #[test]
    fn what_differs_is_told() {
        let then = json!({"tool": "1", "recipe": {"bits": 4, "method": "gptq"}, "model": ["x".repeat(80)]});
        let now = json!({"tool": "1", "recipe": {"bits": 3, "method": "gptq"}, "model": ["y"], "device": "cpu"});
        let expected = ["device was null and is \"cpu\"", "model is another", "recipe.bits was 4 and is 3"];
        assert_eq!(differences(&then, &now), expected);
        assert!(differences(&now, &now).is_empty());
    }
}
