//! Whether the head is the embedding: what config.json says, held against what the files have.
//!
//! Runtimes do not agree on whom to ask. vLLM and llama.cpp's converter follow the flag of the language model's settings
//! and skip a stored head; transformers 5 follows the flag of the whole model, and compares where both tensors are stored.
//! So both flags say the same in what is written, and what the files have decides.

use serde_json::Value;

use super::{published, tied};
use crate::weights::Weights;

const FLAG: &str = "tie_word_embeddings";

/// config.json with flags that agree with the tensors, and a note on what was changed; `None` where they do.
///
/// A head that is stored and differs from the embedding is no tied one. One that is not stored is tied if either flag says
/// so; if none does, config.json stays as it is, for whoever needs the head to miss it.
pub fn settled(source: &dyn Weights) -> Option<(Value, String)> {
    let config = source.config();
    let (head, embedding, tied, missing) = match published(source) {
        Ok(graph) => (graph.head.linear.weight(), graph.embedding.tensor, graph.head.tied, graph.head.missing),
        Err(_) => {
            let (head, embedding) = by_name(source)?;
            (head, embedding, self::tied(config).unwrap_or(false), false)
        }
    };
    let inner = config.get(super::text_key(config)).filter(|inner| inner.is_object());
    let flags: Vec<Option<bool>> = [Some(config), inner].into_iter().flatten().map(flag_of).collect();
    let stored = source.entry(&head).is_some();
    let ties = tied || flags.contains(&Some(true));
    let truth = match stored {
        false if ties => true,
        true if ties && !is_same(source, &head, &embedding) => false,
        // A copy of the embedding, which an output may leave out.
        true if tied => true,
        _ => return None,
    };
    let said_otherwise = flags.contains(&Some(!truth));
    // A model without a wrapper says it once, or leaves it to what is usual in its family.
    let half_said = inner.is_some() && truth && flags.contains(&Some(true));
    let unsaid = flags.contains(&None) && (tied != truth || half_said);
    if !said_otherwise && !unsaid {
        return None;
    }
    let mut settled = config.clone();
    set(&mut settled, truth);
    let why = match (truth, said_otherwise) {
        (false, _) => format!("`{head}` is stored and is not the embedding, though config.json ties the two"),
        (true, true) if missing => "the model has no head, and config.json says that it has one of its own".to_owned(),
        (true, true) => "config.json ties the head to the embedding in one place and not in another".to_owned(),
        (true, false) => {
            "config.json ties the head to the embedding in one of the two places where runtimes look".to_owned()
        }
    };
    Some((settled, format!("{why}; {FLAG} is {truth} wherever it is written")))
}

/// Says in every place where runtimes look whether the head is the embedding.
pub fn set(config: &mut Value, tied: bool) {
    config[FLAG] = tied.into();
    if let Some(inner) = config.get_mut(super::text_key(config)).filter(|inner| inner.is_object()) {
        inner[FLAG] = tied.into();
    }
}

fn flag_of(config: &Value) -> Option<bool> {
    config.get(FLAG)?.as_bool()
}

/// Whether two tensors hold the same bytes. Memory behind them is given back.
fn is_same(source: &dyn Weights, head: &str, embedding: &str) -> bool {
    let same = match (source.raw(head), source.raw(embedding)) {
        (Some(head), Some(embedding)) => (head.dtype, head.data) == (embedding.dtype, embedding.data),
        // One of them is quantized, and the other is not made of it.
        _ => source.entry(embedding).is_none(),
    };
    source.release(head);
    source.release(embedding);
    same
}

/// Head and embedding of a model whose family is not known, by their usual names.
fn by_name(source: &dyn Weights) -> Option<(String, String)> {
    let ends = |name: &str, word: &str| name == word || name.ends_with(&format!(".{word}"));
    let find = |words: &[&str]| {
        let mut found = source.entries().iter().filter(|entry| words.iter().any(|word| ends(&entry.name, word)));
        found.next().filter(|_| found.next().is_none())
    };
    let head = find(&["lm_head.weight", "embed_out.weight", "output.weight"])?;
    let embedding = find(&[
        "embed_tokens.weight",
        "wte.weight",
        "word_embeddings.weight",
        "embed_in.weight",
        "tok_embeddings.weight",
    ])?;
    (head.shape == embedding.shape).then(|| (head.name.clone(), embedding.name.clone()))
}
