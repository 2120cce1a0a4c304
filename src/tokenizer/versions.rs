//! The tokenizer.json of a folder that has several, each for later versions of transformers than the one before.

use serde_json::Value;

use super::FILE;
use super::added::CONFIG;

/// The version that is followed here.
const FOLLOWED: [u64; 3] = [5, 23, 0];

/// The file that transformers reads in place of tokenizer.json by `fast_tokenizer_files`, such as `tokenizer.4.0.0.json`; `None` where
/// that is tokenizer.json itself. Fails, with the reason, for a list that transformers loads no tokenizer with.
pub(super) fn file(config: &Value) -> Result<Option<String>, String> {
    let list = match &config["fast_tokenizer_files"] {
        Value::Null => return Ok(None),
        list => list.as_array().ok_or_else(|| format!("fast_tokenizer_files in {CONFIG} is no list of names"))?,
    };
    let mut versions: Vec<(&str, &str)> = Vec::new();
    for name in list {
        let name =
            name.as_str().ok_or_else(|| format!("fast_tokenizer_files in {CONFIG} has {name}, which is no name"))?;
        let version = name.split_once("tokenizer.").and_then(|(_, behind)| Some(behind.rsplit_once(".json")?.0));
        versions.extend(version.map(|version| (version, name)));
    }
    // By spelling, as transformers does, and no further than the first that is too new; the last of two counts.
    versions.sort_by_key(|(version, _)| *version);
    let mut found = None;
    for (version, name) in versions {
        let numbers: Option<Vec<u64>> = version.split('.').map(|part| part.parse().ok()).collect();
        let mut numbers =
            numbers.ok_or_else(|| format!("`{name}` of fast_tokenizer_files in {CONFIG} names no version"))?;
        numbers.resize(numbers.len().max(FOLLOWED.len()), 0);
        if numbers[..] > FOLLOWED[..] {
            break;
        }
        found = Some(name);
    }
    if let Some(name) = found.filter(|name| name.contains(['/', '\\'])) {
        return Err(format!("`{name}` of fast_tokenizer_files in {CONFIG} lies in another folder"));
    }
    Ok(found.filter(|name| *name != FILE).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What transformers 5.23's `get_fast_tokenizer_file` gives for each list.
    #[test]
    fn the_file_is_the_one_that_transformers_takes() {
        let of = |list: Value| file(&json!({"fast_tokenizer_files": list}));
        let some = |name: &str| Ok(Some(name.to_owned()));
        assert_eq!(file(&json!({})), Ok(None));
        assert_eq!(of(json!([])), Ok(None));
        assert_eq!(of(json!(["tokenizer.json"])), Ok(None));
        assert_eq!(of(json!(["tokenizer.4.0.0.json", "tokenizer.json"])), some("tokenizer.4.0.0.json"));
        assert_eq!(of(json!(["tokenizer.5.23.json", "tokenizer.4.0.0.json"])), some("tokenizer.5.23.json"));
        assert_eq!(of(json!(["tokenizer.5.24.0.json", "tokenizer.4.9.json"])), some("tokenizer.4.9.json"));
        assert_eq!(of(json!(["tokenizer.10.json", "tokenizer.4.0.json"])), Ok(None));
        assert_eq!(of(json!(["tokenizer.99.json"])), Ok(None));
        assert_eq!(of(json!(["tokenizer.5.23.0.1.json", "tokenizer.5.json"])), some("tokenizer.5.json"));
        for (list, words) in [
            (json!("tokenizer.4.json"), "is no list of names"),
            (json!([4]), "has 4, which is no name"),
            (json!(["tokenizer.new.json"]), "names no version"),
            (json!(["../tokenizer.4.json"]), "lies in another folder"),
        ] {
            assert!(of(list.clone()).unwrap_err().contains(words), "{list}");
        }
    }
}
