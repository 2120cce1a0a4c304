//! What a GGUF file says about a model beside its shape, where that is found.

use std::path::Path;

use super::beside::front_matter;
use super::{Checkpoint, hub_name};
use crate::dialect::metadata::About;
use crate::report::Original;

impl About {
    /// A checkpoint's name and licence; the licence is that of a GGUF file, else of the model card (README.md).
    pub fn of(source: &Checkpoint) -> About {
        if let Some(file) = source.gguf() {
            let text = |key: &str| file.string(key).ok().flatten().map(str::to_owned);
            return About { name: text("general.name"), license: text("general.license") };
        }
        About { name: Some(source.name()), license: license(&card_licenses(source.path())) }
    }
}

impl Original {
    /// What a checkpoint's model card, or the metadata of its GGUF file, says of its licence, and what it is called on a hub.
    pub fn of(source: &Checkpoint) -> Original {
        let license = match source.gguf() {
            Some(_) => About::of(source).license.map(|name| format!("license: {name}")).into_iter().collect(),
            None => card_licenses(source.path()),
        };
        Original { license, base: hub_name(source.path()) }
    }
}

/// The lines on the licence in the front matter of the model card in a folder.
fn card_licenses(folder: &Path) -> Vec<String> {
    let front = front_matter(&folder.join("README.md")).unwrap_or_default();
    let keys = ["license:", "license_name:", "license_link:"];
    front.lines().filter(|line| keys.iter().any(|key| line.starts_with(key))).map(str::to_owned).collect()
}

/// The licence that one of these lines names.
fn license(lines: &[String]) -> Option<String> {
    let name = lines.iter().find_map(|line| line.strip_prefix("license:"))?.trim().trim_matches(['"', '\'']);
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
            license(&card_licenses(folder.path()))
        };
        assert_eq!(card("---\ntags: [a]\nlicense: \"apache-2.0\"\n---\n# x").as_deref(), Some("apache-2.0"));
        assert_eq!(card("# x\nlicense: mit\n"), None);
        assert_eq!(card("---\nlicense:\n- a\n---\n"), None);
        assert_eq!(license(&card_licenses(&folder.path().join("none"))), None);
    }
}
