//! Importance matrices beside a model: which entry is whose, and how much they say.

use std::collections::HashSet;
use std::path::Path;

use formats::{Imatrix, ImatrixEntry};

use crate::dialect::names::ExportTensor;
use crate::error::{Error, Result};
use crate::words::listed;

/// Tokens below which an importance matrix is called short: sixteen of llama.cpp's pieces of text.
const FEW_TOKENS: u64 = 8192;

/// The importance of the columns of one part of a tensor.
pub fn importance_of(imatrix: &Imatrix, tensor: &ExportTensor, part: usize) -> Result<Option<Vec<f32>>> {
    let ([_, width], matrices) = (tensor.extents(), tensor.matrices());
    let Some(all) = imatrix.importance(&tensor.gguf, matrices * width)? else { return Ok(None) };
    let at = if matrices > 1 { part } else { 0 };
    Ok(Some(all[at * width..][..width].to_vec()))
}

/// Fails unless every entry that names one of the model's linears has its width, and some entry does. Returns what the user should know
/// of those that are missing or say nothing.
///
/// `linears` are their names with where each goes; `known` are all tensors of the file that is to be written.
pub fn check_importance<'a>(
    imatrix: &Imatrix,
    path: &Path,
    linears: impl Iterator<Item = (&'a str, &'a ExportTensor, usize)>,
    known: &HashSet<&str>,
) -> Result<Vec<String>> {
    let (mut all, mut without, mut unseen, mut flat) = (0, Vec::new(), Vec::new(), Vec::new());
    for (name, tensor, part) in linears {
        all += 1;
        match importance_of(imatrix, tensor, part)? {
            None => without.push(name),
            Some(importance) => {
                let entry = &imatrix.entries[&tensor.gguf];
                let at = if tensor.matrices() > 1 { part } else { 0 };
                if count_of(entry, at) == 0.0 {
                    unseen.push(name);
                } else if importance.len() > 1 && importance.iter().all(|x| *x == importance[0]) {
                    flat.push(name);
                }
            }
        }
    }
    let shown = path.display();
    if without.len() == all {
        return Err(Error::failed(format!(
            "{shown}: none of its {} entries is for a linear of this model; it was made for another one",
            imatrix.entries.len()
        )));
    }
    if without.len() + unseen.len() + flat.len() == all {
        return Err(Error::failed(format!(
            "{shown}: it tells the inputs of none of the model's {all} linears apart, as all are 0, equal or not counted; collect \
             it again on text, or leave --imatrix out"
        )));
    }
    let mut notes = Vec::new();
    let mut tell = |names: &[&str], what: &str| {
        if !names.is_empty() {
            let (count, names) = (names.len(), listed(names));
            notes.push(format!(
                "{shown}: {what} {count} of {all} linears ({names}), which were rounded as without importance"
            ));
        }
    };
    tell(&without, "it has no entry for");
    tell(&unseen, "it saw no token before");
    tell(&flat, "all inputs are equally important in its entries for");
    let others: Vec<&str> = imatrix.entries.keys().map(String::as_str).filter(|name| !known.contains(name)).collect();
    if !others.is_empty() {
        notes.push(format!(
            "{shown}: {} of its {} entries ({}) are for tensors that this model does not have; it seems to be another model's",
            others.len(),
            imatrix.entries.len(),
            listed(&others)
        ));
    }
    let (chunks, tokens) = seen(imatrix);
    if tokens.map_or(chunks < 16, |tokens| tokens < FEW_TOKENS) {
        let found = tokens.map_or(format!("{chunks} pieces of text"), |tokens| format!("{tokens} tokens"));
        notes.push(format!(
            "{shown}: it was computed on {found}, which are few; the importance of inputs is a rough guess"
        ));
    }
    Ok(notes)
}

/// How many inputs matrix `at` saw.
fn count_of(entry: &ImatrixEntry, at: usize) -> f32 {
    entry.counts.get(at).or(entry.counts.first()).copied().unwrap_or(0.0)
}

/// Pieces of text, and tokens where they are known.
fn seen(imatrix: &Imatrix) -> (u64, Option<u64>) {
    match (u64::from(imatrix.chunk_count), u64::from(imatrix.chunk_size)) {
        (0, _) => {
            let counts = imatrix.entries.values().flat_map(|entry| &entry.counts);
            (counts.fold(0.0f32, |most, count| most.max(*count)) as u64, None)
        }
        (chunks, 0) => (chunks, None),
        (chunks, size) => (chunks, Some(chunks * size)),
    }
}
