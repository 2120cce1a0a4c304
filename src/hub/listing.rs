//! What a repository of the hub holds, and which of it a model needs.

use serde_json::Value;

use super::client::{Client, Fault, quoted};
use crate::checkpoint::{ADAPTER_FILES, HubName, INDEX, gguf_files, goes_along, is_commit};
use crate::error::{Error, Result};

/// Pages of a listing at most; a page has a thousand files.
const PAGES: usize = 1000;

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its path within.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// What the cache calls its content: the SHA-256 of a large file, and git's hash of another.
    pub blob: String,
    /// Whether that is the SHA-256.
    pub hashed: bool,
}

/// A repository at a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The commit.
    pub commit: String,
    /// Its files.
    pub files: Vec<Listed>,
}

/// Files that have to be fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A folder: these first, then the weights, which an index among them may name.
    Folder(Vec<Listed>),
    /// The parts of a GGUF file.
    Gguf(Vec<Listed>),
    /// An adapter, and what lies beside it.
    Adapter(Vec<Listed>),
}

/// The commit that a name means now.
pub fn commit(client: &Client, name: &HubName) -> Result<String, Fault> {
    let revision = name.revision.as_deref().unwrap_or("main");
    let url = client.at(&format!("/api/models/{}/revision/{}", name.id, quoted(revision, false)));
    let (info, _) = client.json("GET", &url, None)?;
    let commit = info["sha"].as_str().filter(|sha| is_commit(sha));
    commit.map(str::to_owned).ok_or_else(|| strange(&url, "names no commit"))
}

/// What a repository holds.
pub fn list(client: &Client, name: &HubName) -> Result<Listing, Fault> {
    let commit = commit(client, name)?;
    let files = files_of(client, &name.id, &commit)?;
    Ok(Listing { commit, files })
}

/// The files of a repository at a revision.
pub fn files_of(client: &Client, id: &str, revision: &str) -> Result<Vec<Listed>, Fault> {
    let mut url = client.at(&format!("/api/models/{id}/tree/{revision}?recursive=true"));
    let mut files = Vec::new();
    for _ in 0..PAGES {
        let (page, next) = client.json("GET", &url, None)?;
        let entries = page.as_array().ok_or_else(|| strange(&url, "lists no files"))?;
        for entry in entries.iter().filter(|entry| entry["type"] == "file") {
            files.push(listed(entry).ok_or_else(|| strange(&url, "lists a file that cannot be"))?);
        }
        match next {
            Some(next) => url = next,
            None => return Ok(files),
        }
    }
    Err(strange(&url, "does not end"))
}

fn strange(url: &str, what: &str) -> Fault {
    Fault::Other(Error::failed(format!("{url}: the hub's answer {what}; check HF_ENDPOINT, or try again later")))
}

/// A file as a listing has it; `None` for one that must not be written.
fn listed(entry: &Value) -> Option<Listed> {
    let path = entry["path"].as_str()?;
    let part = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', '\0', ':']);
    let large = &entry["lfs"];
    let (blob, digits) = match large["oid"].as_str() {
        Some(oid) => (oid.trim_start_matches("sha256:"), 64),
        None => (entry["oid"].as_str()?, 40),
    };
    let whole = blob.len() == digits && blob.bytes().all(|byte| byte.is_ascii_hexdigit());
    let bytes = large["size"].as_u64().or_else(|| entry["size"].as_u64())?;
    let fits = whole && path.split('/').all(part);
    fits.then(|| Listed { path: path.to_owned(), bytes, blob: blob.to_ascii_lowercase(), hashed: digits == 64 })
}

/// What has to be fetched of a model.
///
/// Fails where it has no form that is read, and where it is not said which of several GGUF files is meant.
pub fn wanted(name: &HubName, listing: &Listing) -> Result<Wanted> {
    let names: Vec<String> = listing.files.iter().map(|file| file.path.clone()).collect();
    let at_top = |ending: &str| names.iter().any(|name| !name.contains('/') && name.ends_with(ending));
    let is_folder = at_top("config.json") && names.iter().any(|name| name == "config.json") && at_top(".safetensors");
    let named = |path: &&Listed, paths: &[String]| paths.contains(&path.path);
    if name.file.is_none() && (is_folder || names.iter().any(|name| name == INDEX)) {
        let side =
            |file: &&Listed| ["config.json", INDEX].contains(&&file.path[..]) || goes_along(&file.path, file.bytes);
        return Ok(Wanted::Folder(listing.files.iter().filter(side).cloned().collect()));
    }
    let id = &name.id;
    let among =
        |files: &[String]| files.iter().take(40).map(|file| format!("{id}:{file}")).collect::<Vec<_>>().join(", ");
    match (gguf_files(&names, name.file.as_deref()), &name.file) {
        (Ok(parts), _) => Ok(Wanted::Gguf(listing.files.iter().filter(|file| named(file, &parts)).cloned().collect())),
        (Err(files), Some(file)) if files.is_empty() => {
            Err(Error::failed(format!("{name}: {id} holds no GGUF file, so that :{file} means nothing; leave it out")))
        }
        (Err(files), Some(file)) => Err(Error::failed(format!(
            "{name}: :{file} is not the name or type of one GGUF file; say one of {}",
            among(&files)
        ))),
        (Err(files), None) if !files.is_empty() => Err(Error::failed(format!(
            "{name}: {id} holds {} GGUF models; say which, by its type after a colon, as {id}:Q4_K_M, or by its name: {}",
            files.len(),
            among(&files)
        ))),
        (Err(_), None) => {
            let shown: Vec<&str> =
                names.iter().map(String::as_str).filter(|name| !name.starts_with('.')).take(12).collect();
            let pickles = names.iter().any(|name| [".bin", ".pth", ".pt"].iter().any(|ending| name.ends_with(ending)));
            let adapter = names.iter().any(|name| name == "adapter_config.json");
            let why = match () {
                () if adapter => "it is an adapter; give the model that it was made for, and this name with --adapter",
                () if names.iter().any(|name| name.ends_with(".distcp") || name.starts_with("global_step")) => {
                    "it holds a checkpoint of training, whose weights are divided among processes; download it, and the message about the \
                     folder says how to make a model of it"
                }
                () if pickles => {
                    "PyTorch pickles are not read, as opening one can run what it contains; save the model as safetensors once, with transformers"
                }
                () => "a model has config.json and safetensors files, or is a GGUF file",
            };
            Err(Error::failed(format!("{name}: nothing was downloaded: {why}; {id} holds {}", shown.join(", "))))
        }
    }
}

/// What has to be fetched of an adapter: PEFT's two files, and the tokenizer and templates that training programs save with it.
///
/// Fails where it is none, or is saved otherwise.
pub fn adapter(name: &HubName, listing: &Listing) -> Result<Wanted> {
    let holds = |path: &str| listing.files.iter().any(|file| file.path == path);
    if let Some(lacking) = ADAPTER_FILES.into_iter().find(|path| !holds(path)) {
        let id = &name.id;
        let why = match () {
            () if holds("adapter_model.bin") => {
                "adapter_model.bin is a PyTorch pickle, which is not read; load the adapter with PEFT once and save it again".to_owned()
            }
            () if holds("config.json") => format!("{id} is a model and no adapter; give it in the model's place"),
            () => format!("{id} has no {lacking} at its top, and an adapter is what PEFT's save_pretrained writes"),
        };
        return Err(Error::failed(format!("{name}: nothing was downloaded: {why}")));
    }
    let needed = |file: &&Listed| {
        ADAPTER_FILES.contains(&&file.path[..]) || !file.path.contains('/') && goes_along(&file.path, file.bytes)
    };
    Ok(Wanted::Adapter(listing.files.iter().filter(needed).cloned().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, files: &[(&str, u64)]) -> std::result::Result<Vec<String>, String> {
        let file = |(path, bytes): &(&str, u64)| Listed {
            path: (*path).to_owned(),
            bytes: *bytes,
            blob: String::new(),
            hashed: false,
        };
        let listing = Listing { commit: String::new(), files: files.iter().map(file).collect() };
        let (Wanted::Folder(files) | Wanted::Gguf(files) | Wanted::Adapter(files)) =
            wanted(&HubName::parse(name).unwrap(), &listing).map_err(|error| error.to_string())?;
        Ok(files.into_iter().map(|file| file.path).collect())
    }

    #[test]
    fn what_a_folder_needs_is_fetched_and_other_forms_of_it_are_not() {
        let kept = [
            ("config.json", 1),
            ("generation_config.json", 1),
            ("tokenizer.json", 20 << 20),
            ("tokenizer.model", 1),
            ("chat_template.jinja", 1),
            ("preprocessor_config.json", 1),
            ("additional_chat_templates/tool.jinja", 1),
            ("quantize_config.json", 1),
            ("LICENSE", 1),
            ("README.md", 1),
            (INDEX, 1),
            ("2_Dense/model.safetensors", 1 << 20),
        ];
        let left = [
            (".gitattributes", 1),
            ("pytorch_model.bin", 1 << 30),
            ("pytorch_model.bin.index.json", 1),
            ("model-00001-of-00002.safetensors", 5 << 30),
            ("model-00002-of-00002.safetensors", 5 << 30),
            ("consolidated.safetensors", 5 << 30),
            ("original/consolidated.00.pth", 1 << 30),
            ("original/tokenizer.model", 1),
            ("onnx/model.onnx", 1 << 20),
            ("m-Q4_K_M.gguf", 1 << 20),
            ("tf_model.h5", 1 << 20),
            ("flax_model.msgpack", 1 << 20),
            ("assets/picture.png", 1),
            ("training_args.bin", 1),
            ("optimizer.pt", 1),
        ];
        let names: Vec<String> = kept.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(of("a/b", &[&kept[..], &left[..]].concat()), Ok(names));
        // The GGUF file beside it is meant where it is said.
        assert_eq!(of("a/b:Q4_K_M", &[&kept[..], &left[..]].concat()), Ok(vec!["m-Q4_K_M.gguf".to_owned()]));
    }

    #[test]
    fn what_cannot_be_read_is_told_before_anything_is_fetched() {
        let files = [("README.md", 1), ("m-Q4_K_M.gguf", 9), ("m-Q8_0.gguf", 9), ("config.json", 1)];
        let told = of("a/b", &files).unwrap_err();
        assert!(told.contains("holds 2 GGUF models") && told.contains("a/b:m-Q4_K_M.gguf, a/b:m-Q8_0.gguf"), "{told}");
        let told = of("a/b:Q5_K_M", &files).unwrap_err();
        assert!(told.contains(":Q5_K_M is not the name or type of one"), "{told}");
        let told = of("a/b", &[("config.json", 1), ("pytorch_model.bin", 9)]).unwrap_err();
        assert!(
            told.contains("pickles are not read") && told.contains("holds config.json, pytorch_model.bin"),
            "{told}"
        );
        let told = of("a/b", &[("adapter_config.json", 1), ("adapter_model.safetensors", 9)]).unwrap_err();
        assert!(told.contains("it is an adapter"), "{told}");
        let told = of("a/b", &[("config.json", 1), ("global_step9/x_optim_states.pt", 9)]).unwrap_err();
        assert!(told.contains("a checkpoint of training"), "{told}");
        let told = of("a/b:Q8_0", &[("config.json", 1), ("model.safetensors", 9)]).unwrap_err();
        assert!(told.contains("holds no GGUF file"), "{told}");
    }

    #[test]
    fn files_that_must_not_be_written_are_refused() {
        let entry = |path: &str, oid: &str| serde_json::json!({"type": "file", "path": path, "oid": oid, "size": 3});
        let sha1 = "0123456789abcdef0123456789abcdef01234567";
        assert!(listed(&entry("a/b.json", sha1)).is_some());
        for (path, oid) in
            [("../b", sha1), ("/b", sha1), ("a//b", sha1), ("a\\..\\b", sha1), ("b", "../../x"), ("b", "")]
        {
            assert_eq!(listed(&entry(path, oid)), None, "{path} {oid}");
        }
        let large = serde_json::json!({"type": "file", "path": "m", "oid": sha1, "size": 130, "lfs": {"oid": sha1.repeat(2)[..64], "size": 9}});
        assert_eq!(listed(&large).map(|file| (file.bytes, file.hashed)), Some((9, true)));
    }
}
