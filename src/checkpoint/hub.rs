//! Models that are called as a hub calls them, and where Hugging Face's cache on this disk holds them. Nothing is fetched here; `crate::hub` does so.

use std::fmt;
use std::path::{Path, PathBuf};

use formats::container::file;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::json::read_json;

/// What a model is called on a hub: `org/name`, after an @ the branch, tag or commit, after a colon which of its GGUF files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `org/name`.
    pub id: String,
    /// The branch, tag or commit; `None` for the branch that the hub shows.
    pub revision: Option<String>,
    /// A GGUF file, or the type in its name, as `Q4_K_M`.
    pub file: Option<String>,
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)?;
        self.revision.as_ref().map_or(Ok(()), |revision| write!(f, "@{revision}"))?;
        self.file.as_ref().map_or(Ok(()), |file| write!(f, ":{file}"))
    }
}

/// The model of a name in Hugging Face's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached {
    /// The folder or GGUF file that is opened.
    pub place: PathBuf,
    /// The commit that it is of.
    pub commit: String,
    /// What is not there of the files that a model consists of.
    pub lacks: Option<String>,
}

/// What a name of a hub is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    /// A model.
    Model,
    /// A LoRA adapter as PEFT writes it.
    Adapter,
}

/// The files that an adapter consists of.
pub const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Letters and signs of an owner or a name.
fn is_name(part: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(letter)
}

/// Whether a path stays in the folder that it is seen from.
fn stays_inside(path: &str) -> bool {
    !path.is_empty() && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

impl HubName {
    /// What stands in a model's place as the name of one on a hub: `org/name[@revision][:file]`, with or without `hf://` before it.
    pub fn parse(text: &str) -> Option<HubName> {
        let text = text.strip_prefix("hf://").unwrap_or(text);
        let (text, file) = match text.split_once(':') {
            Some((text, file)) => (text, Some(file)),
            None => (text, None),
        };
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = id.split_once('/')?;
        let fits =
            is_name(owner) && is_name(name) && revision.is_none_or(stays_inside) && file.is_none_or(stays_inside);
        let owned = |text: Option<&str>| text.map(str::to_owned);
        fits.then(|| HubName { id: id.to_owned(), revision: owned(revision), file: owned(file) })
    }

    /// The name that stands in a path's place; `None` for a path that exists, and for what is no such name. With `hf://` before it it is a
    /// name in any case.
    ///
    /// Fails where `hf://` is followed by no name.
    pub fn of(path: &Path) -> Result<Option<HubName>> {
        let Some(text) = path.to_str() else { return Ok(None) };
        if text.starts_with("hf://") {
            let wrong = || {
                Error::usage(format!(
                    "{text}: not a model on a hub: say hf://org/name, with @revision or :Q4_K_M after it"
                ))
            };
            return HubName::parse(text).ok_or_else(wrong).map(Some);
        }
        Ok(HubName::parse(text).filter(|_| !path.exists()))
    }

    /// The folder of a cache that the model lies in.
    pub fn folder(&self) -> String {
        format!("models--{}", self.id.replace('/', "--"))
    }

    /// The revision, where it is a whole commit, which never changes.
    pub fn commit(&self) -> Option<&str> {
        self.revision.as_deref().filter(|revision| is_commit(revision))
    }

    /// What a cache holds of it, if anything.
    pub fn cached(&self, cache: &Path, sought: Sought) -> Option<Cached> {
        let folder = cache.join(self.folder());
        let snapshots = folder.join("snapshots");
        let entries = std::fs::read_dir(&snapshots).ok()?;
        let all: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        let named = |name: &str| file::read_text(&folder.join("refs").join(name), file::DESCRIPTION).ok();
        let commit = match &self.revision {
            Some(revision) => named(revision).map_or_else(|| revision.clone(), |commit| commit.trim().to_owned()),
            None => named("main").map(|commit| commit.trim().to_owned()).or(match &all[..] {
                [one] => Some(one.clone()),
                _ => None,
            })?,
        };
        let matching: Vec<&String> = all.iter().filter(|name| name.starts_with(&commit)).collect();
        let [one] = matching[..] else { return None };
        let snapshot = snapshots.join(one);
        let (place, lacks) = match sought {
            Sought::Model => look(&snapshot, self.file.as_deref()),
            Sought::Adapter => {
                let lacks = ADAPTER_FILES.into_iter().find(|name| !snapshot.join(name).is_file());
                (snapshot, lacks.map(str::to_owned))
            }
        };
        Some(Cached { place, commit: one.clone(), lacks })
    }
}

/// Whether these are the 40 hexadecimal digits of a commit.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The folder of Hugging Face's cache that holds models: HF_HUB_CACHE, else `hub` in HF_HOME, else that in the user's cache.
pub fn cache() -> Option<PathBuf> {
    said("HF_HUB_CACHE").or_else(|| said("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(hub_home()?.join("hub")))
}

/// Where Hugging Face's programs keep what they share: HF_HOME, else a folder in the user's cache.
pub fn hub_home() -> Option<PathBuf> {
    let user = || said("XDG_CACHE_HOME").or_else(|| Some(said("HOME")?.join(".cache")));
    said("HF_HOME").or_else(|| Some(user()?.join("huggingface")))
}

/// What a variable of the environment says; a path that begins with ~/ is one in the user's folder.
fn said(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)?;
    match (path.strip_prefix("~"), std::env::var_os("HOME")) {
        (Ok(inner), Some(home)) => Some(Path::new(&home).join(inner)),
        _ => Some(path),
    }
}

/// Files of which every tokenizer has one.
const TOKENIZERS: &[&str] =
    &["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json", "spiece.model"];

/// What of a snapshot is opened, and what it lacks of a model.
fn look(snapshot: &Path, wanted: Option<&str>) -> (PathBuf, Option<String>) {
    let names = names_in(snapshot, Path::new(""), 0);
    let holds = |name: &str| names.iter().any(|known| known == name);
    if wanted.is_some() || !holds("config.json") {
        return match gguf_files(&names, wanted) {
            Ok(parts) if is_whole(&parts) => (snapshot.join(&parts[0]), None),
            Ok(parts) => (snapshot.join(&parts[0]), Some("some parts of the GGUF file".to_owned())),
            Err(_) if wanted.is_some() => (snapshot.to_owned(), Some("the GGUF file".to_owned())),
            Err(_) => (snapshot.to_owned(), Some("config.json".to_owned())),
        };
    }
    let weights = weights_of(snapshot, &names);
    let missing = weights.iter().find(|name| !holds(name)).cloned();
    let missing = missing.or_else(|| weights.is_empty().then(|| "safetensors files".to_owned()));
    let tokenizer = || {
        let any = names.iter().any(|name| TOKENIZERS.contains(&&name[..]) || name.ends_with(".tiktoken"));
        (!any).then(|| "a tokenizer".to_owned())
    };
    (snapshot.to_owned(), missing.or_else(tokenizer))
}

/// The files in a folder and those within it, seen from `root`, sorted; links to nothing are none.
fn names_in(root: &Path, at: &Path, depth: usize) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root.join(at)).into_iter().flatten().flatten() {
        let inner = at.join(entry.file_name());
        let path = root.join(&inner);
        if path.is_file() {
            names.extend(inner.to_str().map(str::to_owned));
        } else if depth < 4 && path.is_dir() && !path.is_symlink() {
            names.extend(names_in(root, &inner, depth + 1));
        }
    }
    names.sort();
    names
}

/// The index of a model in shards.
pub const INDEX: &str = "model.safetensors.index.json";

/// The files of weights that a folder with these files is read from: the only one, those that the index beside it names, or those that lie
/// there.
pub fn weights_of(folder: &Path, names: &[String]) -> Vec<String> {
    let holds = |name: &str| names.iter().any(|known| known == name);
    if holds("model.safetensors") {
        return vec!["model.safetensors".to_owned()];
    }
    let index = if holds(INDEX) { read_json(&folder.join(INDEX)).ok().flatten() } else { None };
    if let Some(Value::Object(map)) = index.as_ref().map(|index| &index["weight_map"]) {
        let named = map.values().filter_map(|name| name.as_str().filter(|name| stays_inside(name)).map(str::to_owned));
        let mut files: Vec<String> = named.collect();
        files.sort();
        files.dedup();
        return files;
    }
    let at_top = |name: &&String| !name.contains('/') && name.ends_with(".safetensors");
    let beside = |name: &&String| name.starts_with("consolidated") || name.starts_with("adapter_model");
    let found: Vec<String> = names.iter().filter(at_top).cloned().collect();
    let own: Vec<String> = found.iter().filter(|name| !beside(name)).cloned().collect();
    if own.is_empty() { found } else { own }
}

/// What a GGUF file is called without its ending and the number of a part.
fn stem(name: &str) -> &str {
    let stem = &name[..name.len() - ".gguf".len()];
    let number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let parts = stem.rsplit_once("-of-").and_then(|(rest, count)| Some((rest.rsplit_once('-')?, count)));
    match parts {
        Some(((before, part), count)) if number(part) && number(count) => before,
        _ => stem,
    }
}

/// The GGUF file that is meant among these files, as its parts in order: the only one, or that whose name, or the type in it, is `wanted`.
///
/// Fails with the files among which it is not told which is meant; of a file in parts with the first.
pub fn gguf_files(names: &[String], wanted: Option<&str>) -> std::result::Result<Vec<String>, Vec<String>> {
    let last = |name: &str| name.rsplit('/').next().unwrap_or(name).to_lowercase();
    // Beside a model lie what turns pictures into tokens, and statistics.
    let is_model = |name: &&String| {
        let last = last(name);
        last.ends_with(".gguf") && !last.contains("mmproj") && !last.contains("imatrix")
    };
    let mut all: Vec<&String> = names.iter().filter(is_model).collect();
    all.sort();
    let mut models: Vec<Vec<String>> = Vec::new();
    for name in all {
        match models.last_mut().filter(|parts| stem(&parts[0]) == stem(name)) {
            Some(parts) => parts.push(name.clone()),
            None => models.push(vec![name.clone()]),
        }
    }
    let wanted = wanted.map(str::to_lowercase);
    let exactly = |parts: &&Vec<String>| {
        let Some(wanted) = &wanted else { return false };
        let first = parts[0].to_lowercase();
        [first.clone(), last(&first), stem(&first).to_owned()].contains(wanted)
    };
    let alike = |parts: &&Vec<String>| {
        let Some(wanted) = &wanted else { return true };
        let first = stem(&parts[0]).to_lowercase();
        let ends = |part: &str| {
            part.strip_suffix(&wanted[..]).is_some_and(|rest| rest.is_empty() || rest.ends_with(['-', '.', '_']))
        };
        first.split('/').any(ends)
    };
    let mut found: Vec<&Vec<String>> = models.iter().filter(exactly).collect();
    if found.is_empty() {
        found = models.iter().filter(alike).collect();
    }
    match found[..] {
        [one] => Ok(one.clone()),
        [] => Err(models.iter().map(|parts| parts[0].clone()).collect()),
        _ => Err(found.iter().map(|parts| parts[0].clone()).collect()),
    }
}

/// Whether all parts of a GGUF file are there.
fn is_whole(parts: &[String]) -> bool {
    let count = parts[0].trim_end_matches(".gguf").rsplit_once("-of-").and_then(|(_, count)| count.parse().ok());
    stem(&parts[0]).len() + ".gguf".len() == parts[0].len() || count == Some(parts.len())
}

/// The model's name on the hub, the commit, and the path within, of what lies in a snapshot of Hugging Face's cache.
pub fn in_snapshot(path: &Path) -> Option<(String, String, PathBuf)> {
    let is_snapshots = |folder: &Path| folder.file_name().is_some_and(|name| name == "snapshots");
    let snapshot = path.ancestors().find(|folder| folder.parent().is_some_and(is_snapshots))?;
    let folder = snapshot.parent()?.parent()?.file_name()?.to_str()?;
    let name = folder.strip_prefix("models--")?.replacen("--", "/", 1);
    let known = HubName::parse(&name).is_some_and(|name| name.revision.is_none() && name.file.is_none());
    let commit = snapshot.file_name()?.to_str()?.to_owned();
    known.then(|| (name, commit, path.strip_prefix(snapshot).unwrap_or(Path::new("")).to_owned()))
}

/// What the model of a snapshot in Hugging Face's cache is called on the hub, as `org/name`.
pub fn hub_name(snapshot: &Path) -> Option<String> {
    in_snapshot(snapshot).map(|(name, ..)| name)
}

/// What to do about a model that is nowhere on this disk; `None` for what is no name of a hub.
pub(super) fn advice(text: &str) -> Option<String> {
    let name = HubName::parse(text)?;
    Some(format!("if the model on the hub is meant, say hf://{name}, and it is downloaded"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_tell_what_the_model_is_called() {
        let of = |text: &str| hub_name(Path::new(text));
        assert_eq!(of("/hub/models--org--small/snapshots/01ab").as_deref(), Some("org/small"));
        assert_eq!(of("/hub/models--org--small/snapshots/01ab/q/m.gguf").as_deref(), Some("org/small"));
        for path in ["/hub/models--org--small/01ab", "snapshots/01ab", "/hub/models--gpt2/snapshots/1", "model"] {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn names_of_a_hub_are_told_from_paths() {
        let of = |text: &str| HubName::parse(text).map(|name| (name.id, name.revision, name.file));
        let named = |id: &str, revision: Option<&str>, file: Option<&str>| {
            Some((id.to_owned(), revision.map(str::to_owned), file.map(str::to_owned)))
        };
        assert_eq!(of("meta-llama/Llama-3.2-1B"), named("meta-llama/Llama-3.2-1B", None, None));
        assert_eq!(of("hf://a/b@main"), named("a/b", Some("main"), None));
        assert_eq!(of("a/b@refs/pr/1"), named("a/b", Some("refs/pr/1"), None));
        assert_eq!(of("a/b:Q4_K_M"), named("a/b", None, Some("Q4_K_M")));
        assert_eq!(of("a/b@v1:q/m.gguf"), named("a/b", Some("v1"), Some("q/m.gguf")));
        for path in
            ["model", "/a/b", "./a/b", "../a", "a/b/c", "a/", "a/b@", "a/b@../x", "a b/c", "~/a", "a/b:", "a/b:../x"]
        {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn a_gguf_file_is_found_by_its_type_its_name_or_alone() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let all = names(&[
            "README.md",
            "m-Q4_K_M.gguf",
            "m-Q4_K_S.gguf",
            "m-UD-Q4_K_M.gguf",
            "mmproj-f16.gguf",
            "Q8_0/m-Q8_0-00001-of-00002.gguf",
            "Q8_0/m-Q8_0-00002-of-00002.gguf",
        ]);
        let both = names(&["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"]);
        assert_eq!(gguf_files(&all, Some("q8_0")), Ok(both.clone()));
        assert_eq!(gguf_files(&all, Some("m-Q4_K_M.gguf")), Ok(names(&["m-Q4_K_M.gguf"])));
        assert_eq!(gguf_files(&all, Some("ud-q4_k_m")), Ok(names(&["m-UD-Q4_K_M.gguf"])));
        // Two have this type, and none has that; nothing is said.
        assert_eq!(gguf_files(&all, Some("Q4_K_M")), Err(names(&["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf"])));
        let firsts = names(&["Q8_0/m-Q8_0-00001-of-00002.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-UD-Q4_K_M.gguf"]);
        assert_eq!(gguf_files(&all, Some("Q4_K")), Err(firsts.clone()));
        assert_eq!(gguf_files(&all, None), Err(firsts));
        assert_eq!(gguf_files(&names(&["m.gguf", "mmproj-m.gguf"]), None), Ok(names(&["m.gguf"])));
        assert_eq!(gguf_files(&names(&["README.md"]), None), Err(Vec::new()));
        assert!(is_whole(&both) && !is_whole(&both[..1]) && is_whole(&names(&["m.gguf"])));
    }
}
