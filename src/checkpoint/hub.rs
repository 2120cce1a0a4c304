//! Models that are called as a hub calls them, where Hugging Face's cache on this disk holds them. Nothing is fetched.

use std::path::{Path, PathBuf};

use formats::container::file;

use crate::error::{Error, Result};

/// What a model is called on a hub: `org/name`, and after an @ the branch, tag or commit.
fn id(path: &Path) -> Option<(&str, Option<&str>)> {
    let text = path.to_str()?;
    let (id, revision) = match text.split_once('@') {
        Some((id, revision)) => (id, Some(revision)),
        None => (text, None),
    };
    let (owner, name) = id.split_once('/')?;
    let letter = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_name = |part: &str| !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(letter);
    let is_revision = |text: &str| !text.is_empty() && text.split('/').all(|part| !part.is_empty() && part != "..");
    (is_name(owner) && is_name(name) && revision.is_none_or(is_revision)).then_some((id, revision))
}

/// The folder of Hugging Face's cache that holds models: HF_HUB_CACHE, else `hub` in HF_HOME, else that in the user's cache.
fn cache() -> Option<PathBuf> {
    let said = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = || said("XDG_CACHE_HOME").or_else(|| Some(said("HOME")?.join(".cache")));
    let home = || said("HF_HOME").or_else(|| Some(user()?.join("huggingface")));
    said("HF_HUB_CACHE").or_else(|| said("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(home()?.join("hub")))
}

/// The snapshot that a name of a hub means, as `org/name` or `org/name@revision`; `None` for a path that exists, for what is no such name, and
/// where the cache has no model of it.
///
/// Fails where the cache has the model, and not that revision of it.
pub fn cached(path: &Path) -> Result<Option<PathBuf>> {
    if path.exists() {
        return Ok(None);
    }
    let Some((id, revision)) = id(path) else { return Ok(None) };
    let Some(folder) = cache().map(|cache| cache.join(format!("models--{}", id.replace('/', "--")))) else {
        return Ok(None);
    };
    let snapshots = folder.join("snapshots");
    if !snapshots.is_dir() {
        return Ok(None);
    }
    let named = |name: &str| file::read_text(&folder.join("refs").join(name), file::DESCRIPTION).ok();
    let listed = || {
        let entries = std::fs::read_dir(&snapshots).into_iter().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    // Without a revision the folder is that of a model like any other, of which the rest is told where it is opened.
    let Some(revision) = revision else { return Ok(Some(folder)) };
    let commit = named(revision).map_or_else(|| revision.to_owned(), |commit| commit.trim().to_owned());
    let matching: Vec<String> = listed().into_iter().filter(|name| name.starts_with(&commit)).collect();
    match &matching[..] {
        [one] => Ok(Some(snapshots.join(one))),
        _ => Err(Error::failed(format!(
            "{}: the cache holds {id}, and not this revision of it: fetch it with `hf download {id} --revision {revision}`, or give one that is \
             there: {}",
            path.display(),
            listed().join(", ")
        ))),
    }
}

/// What the model of a snapshot in Hugging Face's cache is called on the hub, as `org/name`.
pub fn hub_name(snapshot: &Path) -> Option<String> {
    let snapshots = snapshot.parent().filter(|folder| folder.file_name().is_some_and(|name| name == "snapshots"))?;
    let folder = snapshots.parent()?.file_name()?.to_str()?;
    let name = folder.strip_prefix("models--")?.replacen("--", "/", 1);
    id(Path::new(&name)).is_some_and(|(_, revision)| revision.is_none()).then_some(name)
}

/// What to do about a model that is nowhere on this disk; `None` for what is no name of a hub.
pub(super) fn download(path: &Path) -> Option<String> {
    let (id, revision) = id(path)?;
    let revision = revision.map_or(String::new(), |revision| format!(" --revision {revision}"));
    Some(format!(
        "download it first with `hf download {id}{revision}`, and it is found in Hugging Face's cache under the same name"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_tell_what_the_model_is_called() {
        let of = |text: &str| hub_name(Path::new(text));
        assert_eq!(of("/hub/models--org--small/snapshots/01ab").as_deref(), Some("org/small"));
        for path in ["/hub/models--org--small/01ab", "snapshots/01ab", "/hub/models--gpt2/snapshots/1", "model"] {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn names_of_a_hub_are_told_from_paths() {
        let of = |text: &'static str| id(Path::new(text));
        assert_eq!(of("meta-llama/Llama-3.2-1B"), Some(("meta-llama/Llama-3.2-1B", None)));
        assert_eq!(of("a/b@main"), Some(("a/b", Some("main"))));
        assert_eq!(of("a/b@refs/pr/1"), Some(("a/b", Some("refs/pr/1"))));
        for path in ["model", "/a/b", "./a/b", "../a", "a/b/c", "a/", "a/b@", "a/b@../x", "a b/c", "~/a"] {
            assert_eq!(of(path), None, "{path}");
        }
    }
}
