//! What two checkpoints have that the other has not: tensors, how they are held and what they stand for, settings, and what was measured.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, OF_WORDS};
use crate::error::Result;
use crate::report::read_report;
use crate::weights::Entry;
use crate::words::{counted, one_line, starred};

/// What differs between two checkpoints, A and B.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Diff {
    /// Where A is.
    pub a: String,
    /// Where B is.
    pub b: String,
    /// Bytes of all tensors of each.
    pub bytes: [u64; 2],
    /// Tensors that are the same in both, held alike.
    pub same: usize,
    /// The others, by name.
    pub tensors: Vec<Differing>,
    /// Settings of config.json that differ, by their path; null where one has none.
    pub config: BTreeMap<String, [Value; 2]>,
    /// Files of words and settings beside the weights that differ: tokenizer, chat templates, generation settings.
    pub files: Vec<DifferingFile>,
    /// What was asked for, where both have a report.
    pub recipe: BTreeMap<String, [Value; 2]>,
    /// Quality, where both have a report that says it.
    pub quality: BTreeMap<String, [Option<f64>; 2]>,
}

/// A tensor that differs.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Differing {
    /// Its Hugging Face name, whatever the formats.
    pub name: String,
    /// How A holds it; none where A has it not.
    pub a: Option<HeldAs>,
    /// How B holds it.
    pub b: Option<HeldAs>,
    /// Root of the sum of squared differences of what it stands for, as a share of that of A's values; none where it is not in both, or in
    /// other shapes.
    pub relative_error: Option<f64>,
}

/// A file beside the weights that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DifferingFile {
    /// Its name.
    pub name: String,
    /// The one that has it, `A` or `B`, where the other has none.
    pub only_in: Option<&'static str>,
    /// Its keys whose values differ, where it is an object in both.
    pub keys: Vec<String>,
}

/// How a tensor is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct HeldAs {
    /// Its shape, `[out, in]` for a linear.
    pub shape: Vec<usize>,
    /// How it is represented.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes, all parts together.
    pub bytes: u64,
}

/// Compares two checkpoints, whatever formats they are in. Reads all tensors that both have.
///
/// Fails where one cannot be opened, or a tensor of it not be read.
pub fn diff(a: &Path, b: &Path) -> Result<Diff> {
    let sides = [Checkpoint::open(a)?, Checkpoint::open(b)?];
    let names: BTreeSet<&str> = sides.iter().flat_map(|side| side.entries()).map(|entry| &*entry.name).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let found: Vec<Option<Differing>> =
        names.par_iter().map(|name| differing([&sides[0], &sides[1]], name)).collect::<Result<_>>()?;
    let same = found.iter().filter(|one| one.is_none()).count();
    let reports = [read_report(a)?, read_report(b)?];
    let (mut recipe, mut quality) = (BTreeMap::new(), BTreeMap::new());
    if let [Some(a), Some(b)] = &reports {
        compare(&a["recipe"], &b["recipe"], "", &mut recipe);
        for (name, path) in QUALITIES {
            let of = |report: &Value| report.pointer(path).and_then(Value::as_f64);
            let both = [of(a), of(b)];
            if both.iter().any(Option::is_some) {
                quality.insert((*name).to_owned(), both);
            }
        }
    }
    let mut config = BTreeMap::new();
    compare(sides[0].config(), sides[1].config(), "", &mut config);
    let files = OF_WORDS
        .iter()
        .chain(&["generation_config.json"])
        .filter_map(|name| differing_file(name, [&sides[0], &sides[1]]))
        .collect();
    Ok(Diff {
        files,
        a: a.display().to_string(),
        b: b.display().to_string(),
        bytes: [&sides[0], &sides[1]].map(|side| side.entries().iter().map(|entry| entry.stored_bytes).sum()),
        same,
        tensors: found.into_iter().flatten().collect(),
        config,
        recipe,
        quality,
    })
}

/// What differs in a file that lies beside the weights of directories; GGUF files spell what they hold of it in their own way.
fn differing_file(name: &str, sides: [&Checkpoint; 2]) -> Option<DifferingFile> {
    if sides.iter().any(|side| side.gguf().is_some()) {
        return None;
    }
    let both = sides.map(|side| std::fs::read(side.path().join(name)).ok());
    let differs = |only_in, keys| Some(DifferingFile { name: name.to_owned(), only_in, keys });
    let [a, b] = match &both {
        [Some(a), Some(b)] if a != b => [a, b],
        [Some(_), None] => return differs(Some("A"), Vec::new()),
        [None, Some(_)] => return differs(Some("B"), Vec::new()),
        _ => return None,
    };
    let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).ok();
    match (json(a), json(b)) {
        // Spaces and the order of keys say nothing.
        (Some(a), Some(b)) if a == b => None,
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).filter(|key| a.get(*key) != b.get(*key)).collect();
            differs(None, keys.into_iter().cloned().collect())
        }
        _ => differs(None, Vec::new()),
    }
}

/// What is compared of two reports, and where it stands in them.
const QUALITIES: &[(&str, &str)] = &[
    ("perplexity", "/quality/perplexity"),
    ("perplexity ratio", "/quality/beside/perplexity_ratio"),
    ("KL divergence, mean", "/quality/beside/kld_mean"),
    ("top-1 agreement", "/quality/beside/top1_agreement"),
    ("bits per weight", "/bpw/quantized"),
];

fn differing([a, b]: [&Checkpoint; 2], name: &str) -> Result<Option<Differing>> {
    let held = |side: &Checkpoint| {
        let entry = side.entry(name)?;
        Some(HeldAs { shape: entry.shape.clone(), kind: side.kind(entry), bytes: entry.stored_bytes })
    };
    let both = [held(a), held(b)];
    let relative_error = match (a.entry(name), b.entry(name)) {
        (Some(one), Some(other)) if one.shape == other.shape => relative_error([a, b], one)?,
        _ => None,
    };
    if both[0] == both[1] && relative_error == Some(0.0) {
        return Ok(None);
    }
    let [a, b] = both;
    Ok(Some(Differing { name: name.to_owned(), a, b, relative_error }))
}

fn relative_error([a, b]: [&Checkpoint; 2], entry: &Entry) -> Result<Option<f64>> {
    let name = &entry.name;
    let whole = |side: &Checkpoint| side.raw(name).is_some_and(|raw| !formats::tensor::is_float(raw.dtype));
    if whole(a) || whole(b) {
        let bytes = |side: &Checkpoint| side.raw(name).map(|raw| raw.data.to_vec());
        return Ok((bytes(a) == bytes(b)).then_some(0.0));
    }
    let (mut apart, mut all) = (0.0f64, 0.0f64);
    for piece in entry.pieces() {
        for (x, y) in a.load_piece(entry, piece.clone())?.into_iter().zip(b.load_piece(entry, piece)?) {
            apart += f64::from(x - y).powi(2);
            all += f64::from(x).powi(2);
        }
    }
    Ok(Some(if apart == 0.0 { 0.0 } else { (apart / all.max(f64::MIN_POSITIVE)).sqrt() }))
}

/// Collects what differs between two values, by its path.
fn compare(a: &Value, b: &Value, path: &str, found: &mut BTreeMap<String, [Value; 2]>) {
    match (a, b) {
        (Value::Object(one), Value::Object(other)) => {
            let keys: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(one.get(key).unwrap_or(&Value::Null), other.get(key).unwrap_or(&Value::Null), &path, found);
            }
        }
        (a, b) if a != b => {
            found.insert(path.to_owned(), [a.clone(), b.clone()]);
        }
        _ => {}
    }
}

impl Diff {
    /// Whether the two hold the same model in the same way.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.config.is_empty() && self.files.is_empty()
    }

    /// For people: tensors that only a number tells apart are one line.
    pub fn text(&self) -> String {
        let megabytes = self.bytes.map(|bytes| bytes as f64 / 1e6);
        let mut text = format!(
            "A {}: {:.1} MB\nB {}: {:.1} MB ({:+.1} %)\n{} tensors are the same, {} differ\n",
            one_line(&self.a),
            megabytes[0],
            one_line(&self.b),
            megabytes[1],
            100.0 * (megabytes[1] / megabytes[0].max(1e-9) - 1.0),
            self.same,
            self.tensors.len()
        );
        text += &self.tensor_lines();
        for (what, all) in [("config.json", &self.config), ("recipe", &self.recipe)] {
            for (key, [a, b]) in all {
                text += &one_line(&format!("{what}: {key}: {a} → {b}"));
                text.push('\n');
            }
        }
        for DifferingFile { name, only_in, keys } in &self.files {
            let how = match (only_in, &keys[..]) {
                (Some(side), _) => format!("only in {side}"),
                (None, []) => "differs".to_owned(),
                (None, keys) => format!("differs in {}", keys.join(", ")),
            };
            text += &format!("{}\n", one_line(&format!("{name}: {how}")));
        }
        for (name, [a, b]) in &self.quality {
            let of = |value: &Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.5}"));
            let change = a.zip(*b).map_or(String::new(), |(a, b)| format!(" ({:+.2} %)", 100.0 * (b / a - 1.0)));
            text += &format!("{name}: {} → {}{change}\n", of(a), of(b));
        }
        text
    }

    fn tensor_lines(&self) -> String {
        let mut lines: Vec<(String, String, usize, f64)> = Vec::new();
        for tensor in &self.tensors {
            let said = match (&tensor.a, &tensor.b) {
                (Some(a), None) => format!("{} only in A", a.kind),
                (None, Some(b)) => format!("{} only in B", b.kind),
                (Some(a), Some(b)) if a.shape != b.shape => format!("{:?} → {:?}", a.shape, b.shape),
                (Some(a), Some(b)) if a.kind != b.kind => format!("{} → {}", a.kind, b.kind),
                (Some(a), _) => format!("{}, other values", a.kind),
                (None, None) => String::new(),
            };
            let (name, error) = (starred(&tensor.name), tensor.relative_error.unwrap_or(0.0));
            match lines.iter_mut().find(|(other, also, ..)| *other == name && *also == said) {
                Some((.., count, most)) => (*count, *most) = (*count + 1, most.max(error)),
                None => lines.push((name, said, 1, error)),
            }
        }
        let with_error = |(name, said, count, error): (String, String, usize, f64)| {
            let error = if error > 0.0 { format!(", up to {:.3} % apart", 100.0 * error) } else { String::new() };
            (name, said + &error, count)
        };
        counted(&lines.into_iter().map(with_error).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_compared_by_their_paths() {
        let mut found = BTreeMap::new();
        let a = serde_json::json!({"x": 1, "y": {"z": [1, 2], "w": null}, "only": true});
        let b = serde_json::json!({"x": 1, "y": {"z": [1, 3]}});
        compare(&a, &b, "", &mut found);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["only", "y.z"]);
        assert_eq!(found["only"], [Value::from(true), Value::Null]);
    }
}
