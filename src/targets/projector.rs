//! The file from which llama.cpp makes tokens of images, beside a GGUF file of the language model.

use std::path::Path;

use formats::{GgufTensor, GgufWriter};
use serde_json::{Map, Value};

use crate::checkpoint::{Checkpoint, read_loaded};
use crate::dialect::projector::{self, Projector, Types};
use crate::error::{Error, Result};
use crate::families::component;
use crate::graph::{BESIDE, Graph};
use crate::output::Staging;
use crate::recipe::{Patterns, Recipe, Said, Towers};
use crate::report::projector_beside;
use crate::words::listed;

/// What is to be written of a model, for a language model of this architecture, and what to say of it; neither for one that sees nothing.
/// `types` are those of its matrices.
///
/// Fails where a file that says how pictures become numbers was cut short, as where it is copied.
pub fn plan(
    source: &Checkpoint,
    graph: &Graph,
    architecture: &str,
    types: &Types,
) -> Result<(Option<Projector>, Option<String>)> {
    // What is wrong with a tokenizer is told where the model's own file is planned.
    let files = || source.tokenizer().ok().flatten();
    let token = |name: &str| files()?.tokenizer.token_to_id(name);
    let preprocessor = preprocessor(source.path())?;
    let planned = projector::plan(source, &graph.embedding.tensor, &token, &preprocessor, architecture, types);
    let why = match planned {
        Some(Ok(found)) => {
            let note = "what makes tokens of images or sound is written beside the GGUF file, as mmproj-NAME: llama.cpp takes it with --mmproj";
            return Ok((Some(found), Some(note.to_owned())));
        }
        Some(Err(why)) => Some(why),
        None => undescribed(graph, source),
    };
    let told = |why| format!("the GGUF file holds the language model alone, and no mmproj file is written: {why}");
    Ok((None, why.map(told)))
}

/// Why nothing is made of what sees or hears that config.json says nothing of; nothing where the checkpoint has nothing of the kind.
fn undescribed(graph: &Graph, source: &Checkpoint) -> Option<String> {
    const SENSES: &[&str] = &["vision", "visual", "image", "video", "audio", "speech"];
    let there = |part: &str| {
        SENSES.iter().any(|sense| part.contains(sense)) && source.entries().iter().any(|e| e.name.starts_with(part))
    };
    let parts = graph.aside.iter().filter(|(part, what)| *what == BESIDE && !part.is_empty() && there(part));
    let parts: Vec<&str> = parts.map(|(part, _)| part.trim_end_matches('.')).collect();
    (!parts.is_empty()).then(|| {
        format!(
            "config.json says nothing of what sees or hears (vision_config, audio_config), and the weights hold {}; fetch config.json again",
            listed(&parts)
        )
    })
}

/// The types that a recipe gives the matrices of what sees or hears; what its patterns name counts as matched.
///
/// Fails for a scheme that is no type that matrices are rounded to without a search.
pub fn types(graph: &Graph, source: &Checkpoint, recipe: &Recipe, patterns: &mut Patterns) -> Result<Types> {
    let mut types = Types { all: recipe.towers.ggml(), ..Types::default() };
    let beside = |name: &str| graph.aside.iter().any(|(part, what)| *what == BESIDE && name.starts_with(part));
    let matrices = source.entries().iter().filter(|entry| entry.shape.len() > 1 && beside(&entry.name));
    for module in matrices.filter_map(|entry| entry.name.strip_suffix(".weight")) {
        let ty = match recipe.said_of(module, patterns) {
            Said::Nothing => continue,
            Said::Ignored => None,
            Said::Otherwise(change_to) => {
                let scheme = change_to.scheme.as_deref().expect("resolved");
                let choice = Towers::parse(scheme, "gguf").map_err(|_| {
                    Error::usage(format!(
                        "`{module}` stands in {}, whose matrices have types that need no search for scales, as Q8_0, Q5_1 or Q4_0, and not {scheme}",
                        component(module).trim_end_matches('.')
                    ))
                })?;
                choice.ggml()
            }
        };
        types.some.insert(module.to_owned(), ty);
    }
    Ok(types)
}

/// From here on a value becomes infinite in F16.
const LARGEST: f32 = 65520.0;

/// How pictures become numbers, by the files beside the model. What processor_config.json says counts where both files say it, as in
/// transformers and for llama.cpp's converter. Fails for a file that is no JSON object.
fn preprocessor(folder: &Path) -> Result<Value> {
    let read = |name: &str| -> Result<Map<String, Value>> {
        // A single file has none beside it.
        let settings = if folder.is_dir() { read_loaded(&folder.join(name))? } else { None };
        Ok(settings.unwrap_or_default())
    };
    let (mut settings, mut processor) = (read("preprocessor_config.json")?, read("processor_config.json")?);
    let images = processor.remove("image_processor");
    settings.extend(processor);
    if let Some(Value::Object(images)) = images {
        settings.extend(images);
    }
    Ok(Value::Object(settings))
}

fn tensors(projector: &Projector) -> Vec<GgufTensor> {
    let tensor = |tensor: &projector::Tensor| GgufTensor {
        name: tensor.gguf.clone(),
        ty: tensor.ty,
        shape: tensor.shape.clone(),
    };
    projector.tensors.iter().map(tensor).collect()
}

/// Bytes of its tensors.
pub fn bytes(projector: &Projector) -> u64 {
    tensors(projector).iter().filter_map(|tensor| tensor.bytes().ok()).sum()
}

/// Writes it beside the model's own file.
///
/// Fails on values that are not finite or beyond the type of their tensor, and where the disk is full.
pub fn write(projector: &Projector, source: &Checkpoint, staging: &Staging) -> Result<()> {
    let path = staging.folder().join(projector_beside(staging.name()));
    if path.exists() {
        // Of a run that ended before its output had appeared.
        std::fs::remove_file(&path).map_err(Error::io(&path, "remove"))?;
    }
    let writer = GgufWriter::create(&path, projector.metadata.clone(), tensors(projector))?;
    for tensor in &projector.tensors {
        let values = match tensor.row() {
            None => source.load(&tensor.from)?,
            Some(row) => {
                let mut values = vec![0.0; tensor.shape[0]];
                source.load_rows(&tensor.from, &[row], &mut values)?;
                values
            }
        };
        let values = tensor.values(values);
        // With scales of F16, larger values may well be held.
        if let Some(beyond) = values.iter().find(|value| tensor.ty.name == "F16" && value.abs() >= LARGEST) {
            let name = &tensor.from;
            return Err(Error::failed(format!(
                "{}: tensor `{name}`: the value {beyond:e} is beyond F16's largest, 65504; --towers F32 or --towers BF16 holds it",
                source.file_of(name).display()
            )));
        }
        let mut bytes = vec![0; tensor.ty.row_bytes(values.len()).expect("whole blocks")];
        tensor.ty.encode(&values, &mut bytes).expect("whole blocks");
        writer.write(&tensor.gguf, &bytes)?;
        source.release(&tensor.from);
    }
    Ok(writer.finish()?)
}
