//! The safetensors files of a checkpoint directory: one, or shards, with or without an index.
//!
//! Runtimes ask an index only which files to open, and then take every tensor that is in them. So a tensor that the index
//! does not name is read as well, one that it names and no file holds is missed only by those who need it, and whatever
//! index and files do not agree on is a note.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::file;
use super::safetensors::{INDEX_FILE, SINGLE_FILE, SafetensorsFile};
use super::stand_in::stand_in;
use crate::error::{Error, Result};
use crate::tensor::{TensorSpec, TensorView};

/// A checkpoint directory's tensors: one file, or shards.
#[derive(Debug)]
pub struct SafetensorsSet {
    files: Vec<SafetensorsFile>,
    by_name: HashMap<String, usize>,
    index: PathBuf,
    /// Shards of tensors that the index names and no file holds.
    absent: BTreeMap<String, String>,
    notes: Vec<String>,
}

impl SafetensorsSet {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`, or without both the only other file or
    /// complete set of shards in `dir`.
    ///
    /// Fails where a shard is missing. Of a tensor in two shards that of the index counts, else the last one.
    pub fn open(dir: impl AsRef<Path>) -> Result<SafetensorsSet> {
        let dir = dir.as_ref();
        let single = dir.join(SINGLE_FILE);
        let index = dir.join(INDEX_FILE);
        if single.exists() {
            let set = Self::of(vec![SafetensorsFile::open(&single)?], &index, BTreeMap::new());
            // transformers does not open the index then, so that it may be broken.
            let others = match read_index(&index) {
                Ok(map) => map.values().any(|file| file != SINGLE_FILE),
                Err(_) => index.exists(),
            };
            return Ok(set.noted(others.then(|| {
                format!(
                    "{} was read and {INDEX_FILE} beside it, which names other files, was not: transformers prefers the file, \
                     vLLM the index",
                    single.display()
                )
            })));
        }
        if index.exists() {
            return Self::from_index(dir, &index);
        }
        let (names, note) = without_index(dir)?;
        let files = names.iter().map(|name| SafetensorsFile::open(dir.join(name))).collect::<Result<_>>()?;
        Ok(Self::of(files, &index, BTreeMap::new()).noted(note))
    }

    fn from_index(dir: &Path, index: &Path) -> Result<SafetensorsSet> {
        let weight_map = read_index(index)?;
        let mut files = Vec::new();
        for name in weight_map.values().collect::<BTreeSet<_>>() {
            let path = dir.join(name);
            if !path.exists() {
                let mut held = weight_map.iter().filter(|(_, file)| *file == name).map(|(tensor, _)| tensor);
                let first = held.next().expect("it was named");
                let more = match held.count() {
                    0 => String::new(),
                    n => format!(" and {n} more tensors"),
                };
                return Err(
                    Error::missing(format!("shard {name}, which the index names for `{first}`{more},")).in_file(index)
                );
            }
            files.push(SafetensorsFile::open(path)?);
        }
        Ok(Self::of(files, index, weight_map))
    }

    /// Puts files together in the order of their names; an empty `weight_map` is no index.
    fn of(files: Vec<SafetensorsFile>, index: &Path, weight_map: BTreeMap<String, String>) -> SafetensorsSet {
        let mut places: HashMap<&str, Vec<usize>> = HashMap::new();
        for (at, file) in files.iter().enumerate() {
            file.tensors().for_each(|spec| places.entry(&spec.name).or_default().push(at));
        }
        let is = |at: usize, name: &str| files[at].path() == index.with_file_name(name);
        let (mut by_name, mut twice) = (HashMap::new(), BTreeMap::new());
        for (name, found) in &places {
            let last = *found.last().expect("one at least");
            let named = weight_map.get(*name).and_then(|file| found.iter().copied().find(|at| is(*at, file)));
            let chosen = named.unwrap_or(last);
            if found.iter().any(|at| files[*at].get(name) != files[chosen].get(name)) {
                twice.insert(*name, (chosen, last));
            }
            if found.len() > 1 {
                found.iter().for_each(|at| files[*at].release(name));
            }
            by_name.insert((*name).to_owned(), chosen);
        }
        let mut absent = BTreeMap::new();
        let mut elsewhere = Vec::new();
        for (name, file) in &weight_map {
            match by_name.get(name) {
                None => drop(absent.insert(name.clone(), file.clone())),
                Some(at) if !is(*at, file) => elsewhere.push(name.as_str()),
                Some(_) => {}
            }
        }
        let mut unnamed: Vec<&str> = match weight_map.is_empty() {
            true => Vec::new(),
            false => by_name.keys().map(String::as_str).filter(|name| !weight_map.contains_key(*name)).collect(),
        };
        unnamed.sort_unstable();
        let place = index.display();
        let mut notes: Vec<String> = broken_promise(index, &absent).into_iter().collect();
        if let Some(names) = some_of(&elsewhere) {
            notes.push(format!("{place} places {names} in another shard than the one that holds them"));
        }
        if let Some(names) = some_of(&unnamed) {
            notes.push(format!("{place} does not name {names}, read from the shards all the same, as runtimes do"));
        }
        for (name, (chosen, last)) in twice {
            let file = |at: usize| files[at].path().file_name().unwrap_or_default().to_string_lossy().into_owned();
            let why = match (chosen == last, weight_map.contains_key(name)) {
                (true, _) => "the last was read, as runtimes do".to_owned(),
                (false, _) => {
                    format!("that of the index was read; transformers and vLLM would take that of {}", file(last))
                }
            };
            notes.push(format!(
                "{}: two shards hold different values of `{name}`: {why}",
                files[chosen].path().display()
            ));
        }
        SafetensorsSet { files, by_name, index: index.to_path_buf(), absent, notes }
    }

    /// Gives every tensor the name that `rename` makes of its own. Fails when two would be called alike.
    pub fn renamed(mut self, rename: &dyn Fn(&str) -> String) -> Result<SafetensorsSet> {
        self.files.iter_mut().for_each(|file| file.rename(rename));
        let mut by_name = HashMap::new();
        for (name, at) in self.by_name {
            let new = rename(&name);
            if by_name.insert(new.clone(), at).is_some() {
                return Err(Error::malformed("two tensors would be called so by the names that the architecture has; take one of the two out of the file")
                    .in_tensor(new)
                    .in_file(self.files[at].path()));
            }
        }
        self.by_name = by_name;
        Ok(self)
    }

    fn noted(mut self, note: Option<String>) -> SafetensorsSet {
        self.notes.extend(note);
        self
    }

    /// What index and files do not agree on, a sentence each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// That one of the [notes](SafetensorsSet::notes) which tells of tensors that the index names and no shard holds.
    pub fn broken_promise(&self) -> Option<String> {
        broken_promise(&self.index, &self.absent)
    }

    /// The shard that should hold a tensor, or a part of the module whose weight it is, and does not; and the index that
    /// says so.
    pub fn promised(&self, name: &str) -> Option<(&str, &Path)> {
        let module = name.strip_suffix(".weight");
        let part = |(own, _): &(&String, &String)| {
            module.is_some_and(|module| own.strip_prefix(module).is_some_and(|rest| rest.starts_with('.')))
        };
        let found = self.absent.get(name).or_else(|| self.absent.iter().find(part).map(|(_, file)| file));
        found.map(|file| (file.as_str(), &*self.index))
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// Fails when a file was replaced or written to since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(SafetensorsFile::check_unchanged)
    }

    /// Name, type and shape of every tensor, file by file, each once.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        let files = self.files.iter().enumerate();
        files.flat_map(move |(at, file)| file.tensors().filter(move |spec| self.by_name[&spec.name] == at))
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.files[*self.by_name.get(name)?].get(name)
    }

    /// The file that holds the tensor of this name.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        Some(self.files[*self.by_name.get(name)?].path())
    }

    /// [`SafetensorsFile::announce`] for a tensor of any file.
    pub fn announce(&self, name: &str) {
        if let Some(&file) = self.by_name.get(name) {
            self.files[file].announce(name);
        }
    }

    /// Gives the memory behind a tensor back to the system.
    pub fn release(&self, name: &str) {
        if let Some(&file) = self.by_name.get(name) {
            self.files[file].release(name);
        }
    }

    /// [`SafetensorsSet::release`] for every tensor.
    pub fn release_all(&self) {
        self.files.iter().for_each(SafetensorsFile::release_all);
    }
}

/// What to say of tensors that an index names and no shard holds.
fn broken_promise(index: &Path, absent: &BTreeMap<String, String>) -> Option<String> {
    let missing: Vec<&str> = absent.keys().map(String::as_str).collect();
    let them = if missing.len() == 1 { "it" } else { "them" };
    Some(format!("{} names {}, and no shard holds {them}", index.display(), some_of(&missing)?))
}

/// `a`, or `a` and how many more; nothing of nothing.
fn some_of(names: &[&str]) -> Option<String> {
    match names {
        [] => None,
        [one] => Some(format!("`{one}`")),
        [first, more @ ..] => Some(format!("`{first}` and {} more tensors", more.len())),
    }
}

/// The file of every tensor that an index names.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    let bytes = file::read(index, file::DESCRIPTION).map_err(|e| Error::io("read", e).in_file(index))?;
    if let Some(why) = stand_in(&bytes) {
        return Err(Error::malformed(why).in_file(index));
    }
    if let Some(why) = file::misencoded(&bytes) {
        return Err(Error::malformed(why).in_file(index));
    }
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Error::malformed(format!("the index is not JSON: {e}")).in_file(index))?;
    let weight_map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::missing("the object `weight_map`").in_file(index))?;
    let place = |(tensor, file): (&String, &Value)| {
        // In the folder or in one within it, as transformers joins the two.
        let inside = |name: &&str| {
            let path = Path::new(name);
            path.file_name().is_some()
                && path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        };
        let name = file.as_str().filter(inside);
        let name = name.ok_or_else(|| {
            let expected = "a file in the index's folder or in one within it";
            Error::mismatch("its entry in `weight_map`", expected, file).in_tensor(tensor).in_file(index)
        })?;
        Ok((tensor.clone(), name.to_owned()))
    };
    weight_map.iter().map(place).collect()
}

/// The files of a directory without `model.safetensors` and without an index, and what to say of the choice: the only one,
/// for old GPTQ tools call theirs `gptq_model-4bit-128g.safetensors` and the like, or shards that are all there.
fn without_index(dir: &Path) -> Result<(Vec<String>, Option<String>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", e).in_file(dir))? {
        let name = entry.map_err(|e| Error::io("list", e).in_file(dir))?.file_name();
        found.extend(name.into_string().ok().filter(|name| name.ends_with(".safetensors")));
    }
    found.sort();
    // Another layout of the same weights, or what is to be added to them.
    let beside = |name: &String| name.starts_with("consolidated") || name.starts_with("adapter_model");
    if !found.iter().all(beside) {
        found.retain(|name| !beside(name));
    }
    let [first, others @ ..] = &found[..] else {
        return Err(Error::missing(format!("{SINGLE_FILE} or {INDEX_FILE}")).in_file(dir));
    };
    let Some((stem, count)) = shard_of(first) else {
        return match others.len() {
            0 => {
                let note = format!(
                    "{}: {first} was read, the only safetensors file of a model there; transformers looks for {SINGLE_FILE} unless \
                     config.json names another",
                    dir.display()
                );
                Ok((found, Some(note)))
            }
            n => Err(Error::malformed(format!(
                "{} safetensors files but no {INDEX_FILE} to say which belong together; fetch the index, or leave only the files of one model",
                n + 1
            ))
            .in_file(dir)),
        };
    };
    if let Some(other) = others.iter().find(|name| shard_of(name).is_none_or(|(own, n)| (own, n) != (stem, count))) {
        return Err(Error::malformed(format!("{first} and {other} but no {INDEX_FILE} to say which belong together; fetch the index, or leave only the files of one model"))
            .in_file(dir));
    }
    // All are called alike but for the number, which has as many digits everywhere.
    let called = |number: usize| {
        let rest = &first[stem.len() + 1..];
        let digits = rest.find('-').unwrap_or(5);
        format!("{stem}-{number:0digits$}{}", &rest[digits..])
    };
    let absent: Vec<String> = (1..=count).map(called).filter(|name| !found.contains(name)).collect();
    if let [one, more @ ..] = &absent[..] {
        let more = if more.is_empty() { String::new() } else { format!(" (and {} more)", more.len()) };
        return Err(Error::missing(format!("shard {one}{more} of the {count} that {first} is one of")).in_file(dir));
    }
    let note = format!(
        "{} has no {INDEX_FILE}: its {count} shards, {first} the first, were read together, as vLLM and llama.cpp's \
         converter do; transformers does not load them",
        dir.display()
    );
    Ok((found, (count > 1).then_some(note)))
}

/// What comes before the number in `model-00001-of-00002.safetensors`, and how many shards there are.
fn shard_of(name: &str) -> Option<(&str, usize)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let (number, count) = (number.parse::<usize>().ok()?, count.parse().ok()?);
    (1..=count).contains(&number).then_some((stem, count))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Map, json};

    use super::*;
    use crate::ShardedWriter;
    use crate::tensor::Dtype;

    /// Files by name, each with tensors of one byte.
    fn folder(files: &[(&str, &[(&str, u8)])], index: Option<Value>) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (file, tensors) in files {
            let mut header = Map::new();
            for (at, (name, _)) in tensors.iter().enumerate() {
                header.insert((*name).into(), json!({"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]}));
            }
            let header = serde_json::to_vec(&header).unwrap();
            let data: Vec<u8> = tensors.iter().map(|(_, value)| *value).collect();
            let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
            std::fs::write(dir.path().join(file), bytes).unwrap();
        }
        if let Some(weight_map) = index {
            let index = json!({"metadata": {"total_size": 77}, "weight_map": weight_map});
            std::fs::write(dir.path().join(INDEX_FILE), index.to_string()).unwrap();
        }
        dir
    }

    /// The tensors in their order with their values, and the notes.
    fn opened(dir: &Path) -> (Vec<(String, u8)>, Vec<String>) {
        let set = SafetensorsSet::open(dir).unwrap();
        let tensors = set.tensors().map(|spec| (spec.name.clone(), set.get(&spec.name).unwrap().data[0])).collect();
        let notes = set.notes().iter().map(|note| note.replace(&dir.display().to_string(), "DIR")).collect();
        (tensors, notes)
    }

    fn refused(dir: &Path) -> String {
        SafetensorsSet::open(dir).unwrap_err().to_string().replace(&dir.display().to_string(), "DIR")
    }

    fn of(tensors: &[(&str, u8)]) -> Vec<(String, u8)> {
        tensors.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    const A: &str = "a.safetensors";
    const B: &str = "b.safetensors";

    #[test]
    fn an_index_that_agrees_says_nothing_whatever_its_total_size() {
        let dir = folder(&[(A, &[("x", 1)]), (B, &[("y", 2)])], Some(json!({"x": A, "y": B})));
        assert_eq!(opened(dir.path()), (of(&[("x", 1), ("y", 2)]), vec![]));
    }

    #[test]
    fn what_the_index_does_not_name_is_read_and_what_no_shard_holds_is_remembered() {
        let map = json!({"x": A, "y": A, "ghost": B, "q.qweight": A});
        let dir =
            folder(&[(A, &[("x", 1), ("extra", 3)]), (B, &[("y", 2)]), ("other.safetensors", &[("z", 9)])], Some(map));
        let (tensors, notes) = opened(dir.path());
        assert_eq!(tensors, of(&[("x", 1), ("extra", 3), ("y", 2)]), "and the file that it does not name is left");
        assert_eq!(
            notes,
            [
                "DIR/model.safetensors.index.json names `ghost` and 1 more tensors, and no shard holds them",
                "DIR/model.safetensors.index.json places `y` in another shard than the one that holds them",
                "DIR/model.safetensors.index.json does not name `extra`, read from the shards all the same, as runtimes do",
            ]
        );
        let set = SafetensorsSet::open(dir.path()).unwrap();
        assert_eq!(set.promised("ghost").unwrap().0, B);
        assert_eq!(set.promised("q.weight").unwrap(), (A, &*dir.path().join(INDEX_FILE)));
        assert_eq!((set.promised("x"), set.promised("nowhere.weight")), (None, None));
    }

    #[test]
    fn of_a_tensor_in_two_shards_that_of_the_index_counts() {
        let files: &[(&str, &[(&str, u8)])] = &[(A, &[("x", 1), ("s", 5)]), (B, &[("x", 2), ("s", 5)])];
        let (tensors, notes) = opened(folder(files, Some(json!({"x": A, "s": A}))).path());
        // Files that hold nothing that counts are opened all the same: the index does not name them here.
        assert_eq!((tensors, notes), (of(&[("x", 1), ("s", 5)]), vec![]));
        let (tensors, notes) = opened(folder(files, Some(json!({"x": A, "s": B}))).path());
        assert_eq!(tensors, of(&[("x", 1), ("s", 5)]), "equal values are no matter");
        let told = "two shards hold different values of `x`";
        assert_eq!(
            notes,
            [format!("DIR/{A}: {told}: that of the index was read; transformers and vLLM would take that of {B}")]
        );
        let (tensors, notes) = opened(folder(files, Some(json!({"x": B, "s": A}))).path());
        assert_eq!(tensors, of(&[("s", 5), ("x", 2)]));
        assert_eq!(notes, [format!("DIR/{B}: {told}: the last was read, as runtimes do")]);
        let files: &[(&str, &[(&str, u8)])] = &[(A, &[("x", 1), ("k", 5)]), (B, &[("x", 2)])];
        let (tensors, notes) = opened(folder(files, Some(json!({"k": A, "t": B}))).path());
        assert_eq!(tensors, of(&[("k", 5), ("x", 2)]), "without a word of the index the last");
        assert!(notes.iter().any(|note| note.contains("the last was read")), "{notes:?}");
    }

    #[test]
    fn the_one_file_goes_before_an_index() {
        let files: &[(&str, &[(&str, u8)])] = &[(SINGLE_FILE, &[("x", 1)]), (A, &[("x", 2)])];
        let (tensors, notes) = opened(folder(files, Some(json!({"x": A}))).path());
        assert_eq!(tensors, of(&[("x", 1)]));
        assert!(notes.len() == 1 && notes[0].contains("DIR/model.safetensors was read"), "{notes:?}");
        for index in [json!({"x": SINGLE_FILE}), json!({})] {
            assert_eq!(opened(folder(files, Some(index)).path()), (of(&[("x", 1)]), vec![]));
        }
        let dir = folder(files, None);
        std::fs::write(dir.path().join(INDEX_FILE), "{").unwrap();
        assert_eq!(opened(dir.path()).1.len(), 1, "though it is broken");
    }

    #[test]
    fn without_an_index_the_only_file_or_all_shards_are_read() {
        let shard = |n: usize| format!("m-{n:05}-of-00002.safetensors");
        let (first, second) = (shard(1), shard(2));
        let both: &[(&str, &[(&str, u8)])] = &[(&first, &[("x", 1)]), (&second, &[("y", 2)])];
        let (tensors, notes) = opened(folder(both, None).path());
        assert_eq!(tensors, of(&[("x", 1), ("y", 2)]));
        assert!(notes.len() == 1 && notes[0].contains("its 2 shards, m-00001-of-00002.safetensors the first"));
        let beside: &[(&str, &[(&str, u8)])] = &[(A, &[("x", 1)]), ("consolidated.safetensors", &[("w", 2)])];
        for (files, value) in [(beside, ("x", 1)), (&beside[1..], ("w", 2))] {
            let (tensors, notes) = opened(folder(files, None).path());
            assert_eq!(tensors, of(&[value]));
            assert!(notes.len() == 1 && notes[0].contains("was read, the only safetensors file"), "{notes:?}");
        }
        let message = refused(folder(&both[..1], None).path());
        assert!(
            message.contains(
                "shard m-00002-of-00002.safetensors of the 2 that m-00001-of-00002.safetensors is one of is missing"
            ),
            "{message}"
        );
        for files in [&[(A, both[0].1), (B, both[1].1)][..], &[both[0], both[1], (A, &[("z", 1)])]] {
            let message = refused(folder(files, None).path());
            assert!(message.contains("no model.safetensors.index.json to say which belong together"), "{message}");
        }
        let message = refused(folder(&[], None).path());
        assert!(message.contains("model.safetensors or model.safetensors.index.json is missing"), "{message}");
    }

    #[test]
    fn a_shard_that_is_missing_or_elsewhere_is_named() {
        let files: &[(&str, &[(&str, u8)])] = &[(A, &[("x", 1)])];
        assert_eq!(
            refused(folder(files, Some(json!({"x": A, "y": B, "z": B}))).path()),
            "DIR/model.safetensors.index.json: shard b.safetensors, which the index names for `y` and 1 more tensors, is missing"
        );
        assert_eq!(
            refused(folder(files, Some(json!({"x": A, "z": "../evil.safetensors"}))).path()),
            "DIR/model.safetensors.index.json: tensor `z`: its entry in `weight_map` is \"../evil.safetensors\", \
             expected a file in the index's folder or in one within it"
        );
    }

    #[test]
    fn tensors_without_extents_and_without_values_are_tensors() {
        let dir = tempfile::tempdir().unwrap();
        let specs = [("scalar", vec![]), ("none", vec![0])].map(|(name, shape)| TensorSpec {
            name: name.into(),
            dtype: Dtype::F32,
            shape,
        });
        let writer = ShardedWriter::create(dir.path(), specs.to_vec(), 1 << 20, &BTreeMap::new()).unwrap();
        writer.write("scalar", &1f32.to_le_bytes()).unwrap();
        writer.write("none", &[]).unwrap();
        writer.finish().unwrap();
        let set = SafetensorsSet::open(dir.path()).unwrap();
        assert_eq!(set.get("scalar").unwrap().to_f32().unwrap(), [1.0]);
        assert_eq!(set.get("none").unwrap().to_f32().unwrap(), [0f32; 0]);
    }

    #[test]
    fn a_name_twice_in_one_file_is_refused() {
        let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[1, 2]].concat();
        let message = SafetensorsFile::from_bytes("F", bytes).unwrap_err().to_string();
        assert!(message.starts_with("F: "), "{message}");
    }
}
