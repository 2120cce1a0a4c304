//! Linears of what sees or hears beside a language model, which may be quantized without data.
//!
//! What they compute is not known here, so they are found as those of unknown families are: by name, shape, and where the class of
//! transformers has linears.

use super::linears::has_linears;
use super::unknown::Finder;
use crate::graph::{BESIDE, Graph};
use crate::weights::{Entry, Weights};

/// A linear of a tower or a projector.
#[derive(Clone, Debug, PartialEq)]
pub struct TowerLinear {
    /// Its name without `.weight`.
    pub module: String,
    /// Outputs and inputs.
    pub shape: [usize; 2],
}

/// Every linear that stands in a component which is not the language model, in the order of the files. Embeddings, filters, what goes over
/// patches, and matrices that transformers splits or joins as it loads them are not among them.
pub fn towers(graph: &Graph, source: &dyn Weights) -> Vec<TowerLinear> {
    let finder = Finder::new(source);
    let parts: Vec<&str> = graph
        .aside
        .iter()
        .filter(|(prefix, what)| *what == BESIDE && prefix.ends_with('.'))
        .map(|(p, _)| &**p)
        .collect();
    let known = has_linears(source.config());
    let linear = |entry: &Entry| {
        let part = parts.iter().find(|part| entry.name.starts_with(**part))?;
        let module = entry.name.strip_suffix(".weight")?;
        // Of a component that is one linear the name says nothing.
        let told = module.get(part.len()..)?;
        let called = || {
            let mut names = finder.loading.names(module);
            names.push(module.to_owned());
            // What a class has behind its base model's prefix is found without it, too.
            names.push(format!("model.{module}"));
            known.as_ref().is_none_or(|known| names.iter().any(|name| known(name)))
        };
        let found = finder.is_linear(entry, module, told) && !finder.loading.changes(module) && called();
        found.then(|| TowerLinear { module: module.to_owned(), shape: [entry.shape[0], entry.shape[1]] })
    };
    source.entries().iter().filter_map(linear).collect()
}
