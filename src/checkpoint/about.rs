//! What a GGUF file says about a model beside its shape, where that is found.

use std::path::Path;

use super::{Checkpoint, front_matter};
use crate::dialect::metadata::About;

impl About {
    /// A checkpoint's name and licence; the licence is that of a GGUF file, else of the model card (README.md).
    pub fn of(source: &Checkpoint) -> About {
        if let Some(file) = source.gguf() {
            let text = |key: &str| file.string(key).ok().flatten().map(str::to_owned);
            return About { name: text("general.name"), license: text("general.license") };
        }
        About { name: Some(source.name()), license: card_license(&source.path().join("README.md")) }
    }
}

/// The licence that the front matter of a model card names.
fn card_license(path: &Path) -> Option<String> {
    let front = front_matter(path)?;
    let line = front.lines().find_map(|line| line.strip_prefix("license:"))?;
    let name = line.trim().trim_matches(['"', '\'']);
    (!name.is_empty() && !name.starts_with(['[', '|', '>'])).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_card_names_the_licence() {
        let folder = tempfile::tempdir().unwrap();
        let card = |text: &str| {
            let path = folder.path().join("README.md");
            std::fs::write(&path, text).unwrap();
            card_license(&path)
        };
        assert_eq!(card("---\ntags: [a]\nlicense: \"apache-2.0\"\n---\n# x").as_deref(), Some("apache-2.0"));
        assert_eq!(card("# x\nlicense: mit\n"), None);
        assert_eq!(card("---\nlicense:\n- a\n---\n"), None);
        assert_eq!(card_license(&folder.path().join("none.md")), None);
    }
}
