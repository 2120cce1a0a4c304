//! Shows what is in a checkpoint.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::dialect::names::{self, ExportTensor};
use crate::dialect::projector;
use crate::error::{Error, Result};
use crate::families;
use crate::graph::{Graph, Linear};
use crate::program::{Shown, shown};
use crate::weights::Entry;
use crate::words::{listed, one_line};

/// A checkpoint's content.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct Inspection {
    /// Where it is.
    pub path: String,
    /// `model_type` of its configuration.
    pub model_type: Option<String>,
    /// Values in all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bits per value over everything.
    pub bpw: f64,
    /// Share of each way of storing.
    pub types: Vec<TypeShare>,
    /// Every tensor.
    pub tensors: Vec<TensorInfo>,
    /// Whether it is a GGUF file.
    #[serde(skip)]
    pub single: bool,
    /// What blocks compute, where that was asked for.
    #[cfg_attr(doc, doc(hidden))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<Vec<Shown>>,
    /// What there is to say of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// All tensors stored in one way.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct TypeShare {
    /// The way.
    #[serde(rename = "type")]
    pub kind: String,
    /// How many.
    pub tensors: usize,
    /// Values in them.
    pub parameters: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Bits per value.
    pub bpw: f64,
}

/// One tensor.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// What GGUF calls it, as --tensor-type wants it; none of a model that GGUF has not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gguf: Option<String>,
    /// Its extents.
    pub shape: Vec<usize>,
    /// How it is stored.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes, all parts together.
    pub bytes: u64,
    /// Bits per value.
    pub bpw: f64,
}

fn bits(bytes: u64, values: u64) -> f64 {
    bytes as f64 * 8.0 / values.max(1) as f64
}

fn values(entry: &Entry) -> u64 {
    entry.shape.iter().product::<usize>() as u64
}

/// Looks through a checkpoint's headers; no weights are read.
pub fn inspect(checkpoint: &Checkpoint) -> Inspection {
    let mut types: BTreeMap<String, (usize, u64, u64)> = BTreeMap::new();
    let mut tensors = Vec::new();
    let mut called = names_in_gguf(checkpoint);
    for entry in checkpoint.entries() {
        let (kind, count) = (checkpoint.kind(entry), values(entry));
        let share = types.entry(kind.clone()).or_default();
        *share = (share.0 + 1, share.1 + count, share.2 + entry.stored_bytes);
        tensors.push(TensorInfo {
            name: entry.name.clone(),
            gguf: called.remove(&entry.name),
            shape: entry.shape.clone(),
            kind,
            bytes: entry.stored_bytes,
            bpw: bits(entry.stored_bytes, count),
        });
    }
    let (parameters, bytes) = types.values().fold((0, 0), |(p, b), share| (p + share.1, b + share.2));
    Inspection {
        path: checkpoint.path().display().to_string(),
        model_type: checkpoint.config().get("model_type").and_then(|v| v.as_str()).map(str::to_owned),
        parameters,
        bytes,
        bpw: bits(bytes, parameters),
        types: types
            .into_iter()
            .map(|(kind, (tensors, parameters, bytes))| TypeShare {
                kind,
                tensors,
                parameters,
                bytes,
                bpw: bits(bytes, parameters),
            })
            .collect(),
        tensors,
        single: checkpoint.gguf().is_some(),
        program: None,
        notes: checkpoint.remarks().into_iter().chain(missing(checkpoint)).collect(),
    }
}

/// What stands in the way of running a model, if anything does.
fn missing(checkpoint: &Checkpoint) -> Vec<String> {
    if !checkpoint.config().get("model_type").is_some_and(|said| said.is_string()) {
        return Vec::new();
    }
    match families::graph_of(checkpoint) {
        Ok(graph) if graph.opaque => {
            let mut notes = vec![of_unknown_family(&graph, checkpoint)];
            notes.extend(families::check_whole(checkpoint).unwrap_or_else(|error| vec![error.to_string()]));
            notes
        }
        Ok(graph) => {
            let beside =
                families::check_beside(&graph, checkpoint).into_iter().chain(projector::faults(&graph, checkpoint));
            let beside = beside.chain(families::not_whole(&graph));
            let cannot = graph.unrunnable;
            let cannot = cannot.map(|why| format!("{why}: it can be quantized without data alone, and not measured"));
            cannot.into_iter().chain(beside).collect()
        }
        Err(error) => vec![format!("it cannot be quantized: {error}")],
    }
}

/// What is known of a model whose family is not, and what its family would have to say.
fn of_unknown_family(graph: &Graph, checkpoint: &Checkpoint) -> String {
    let linears: HashSet<String> = graph.linears().map(Linear::weight).collect();
    let (found, others): (Vec<&Entry>, Vec<&Entry>) =
        checkpoint.entries().iter().partition(|entry| linears.contains(&entry.name));
    let bytes = |entries: &[&Entry]| entries.iter().map(|entry| entry.stored_bytes).sum::<u64>();
    let share = 100.0 * bytes(&found) as f64 / (bytes(&found) + bytes(&others)).max(1) as f64;
    let kept: Vec<&str> = others
        .iter()
        .filter(|entry| entry.shape.len() > 1)
        .map(|entry| entry.name.trim_end_matches(".weight"))
        .collect();
    let kept = if kept.is_empty() { String::new() } else { format!("; not among them are {}", listed(&kept)) };
    format!(
        "no family describes models of the type `{}`, so that nothing is known of what its blocks compute: {} linears, {share:.0} % of its bytes, \
         were found by name and shape{kept}. They can be quantized without data (--method rtn --verify-text none) and not be measured; how a \
         family is added is in docs/models.md",
        checkpoint.config()["model_type"].as_str().map(one_line).unwrap_or_default(),
        found.len()
    )
}

/// What GGUF calls the tensors of a checkpoint, by their names in it; nothing of a model that GGUF has not.
fn names_in_gguf(checkpoint: &Checkpoint) -> HashMap<String, String> {
    let planned = families::graph_of(checkpoint).and_then(|graph| names::plan(&graph));
    let tensors = planned.map_or(Vec::new(), |plan| plan.tensors);
    let named = |tensor: &ExportTensor| -> Vec<(String, String)> {
        tensor.parts().iter().map(|part| (part.from.tensor().to_owned(), tensor.gguf.clone())).collect()
    };
    tensors.iter().flat_map(named).collect()
}

/// What the blocks of a model compute, one of each kind.
///
/// Fails for a family that is not known, of which only the linears are.
pub fn program(checkpoint: &Checkpoint) -> Result<Vec<Shown>> {
    let graph = families::graph_of(checkpoint)?;
    shown(&graph.blocks).ok_or_else(|| {
        Error::failed(format!(
            "{}: what its blocks compute is not known, for its family is none of docs/models.md: leave out --program",
            checkpoint.path().display()
        ))
    })
}

impl Inspection {
    /// For people: the program where there is one, the tensors otherwise.
    pub fn text(&self) -> String {
        if let Some(program) = &self.program {
            return program.iter().map(Shown::text).collect::<Vec<_>>().join("\n");
        }
        let mut text = format!(
            "{}: {}, {:.2} million parameters, {:.2} MB, {:.2} bits per weight\n\n",
            self.path,
            one_line(self.model_type.as_deref().unwrap_or("unknown family")),
            self.parameters as f64 / 1e6,
            self.bytes as f64 / 1e6,
            self.bpw
        );
        for share in &self.types {
            text += &format!(
                "{:<44} {:>5} tensors {:>12} values {:>12} bytes {:>7.3} bpw\n",
                share.kind, share.tensors, share.parameters, share.bytes, share.bpw
            );
        }
        text += "\n";
        // Of a GGUF file under the names that it has itself.
        for tensor in &self.tensors {
            let name = match &tensor.gguf {
                Some(gguf) if self.single => one_line(gguf),
                _ => one_line(&tensor.name),
            };
            text += &format!(
                "{:<56} {:<16} {:<44} {:>7.3} bpw\n",
                name,
                format!("{:?}", tensor.shape),
                tensor.kind,
                tensor.bpw
            );
        }
        text
    }
}
