//! Mixtures of experts, which most runtimes keep in one stack a layer: who loads them as they are quantized.

use std::collections::HashMap;

use formats::codec::{is_expert, scheme_of};
use formats::{Codec, Encoding};

use crate::error::{Error, Result};
use crate::graph::{Graph, Linear};

/// The experts of one layer.
struct Mixture<'g> {
    /// What their names begin with: `model.layers.0.mlp`.
    at: &'g str,
    /// What each linear of an expert is called in it (`down_proj`), and how it is represented.
    linears: Vec<(&'g str, Option<Encoding>)>,
}

impl Mixture<'_> {
    /// Whether one linear of an expert is held as all others are.
    fn alike(&self) -> bool {
        self.linears.windows(2).all(|pair| pair[0].1 == pair[1].1)
    }

    /// Whether each linear is held as that of the same name in every other expert.
    fn alike_by_name(&self) -> bool {
        let mut known = HashMap::new();
        self.linears.iter().all(|(name, encoding)| known.entry(name).or_insert(encoding) == &encoding)
    }
}

/// The mixtures of a model, in the order of its layers.
fn mixtures<'g>(graph: &'g Graph, encodings: &HashMap<String, Encoding>) -> Vec<Mixture<'g>> {
    let mut found: Vec<Mixture<'g>> = Vec::new();
    for Linear { module, .. } in graph.linears().filter(|linear| is_expert(&linear.module)) {
        let Some((at, rest)) = module.split_once(".experts.") else { continue };
        let name = rest.split_once('.').map_or(rest, |(_, name)| name);
        let linear = (name, encodings.get(module).copied());
        match found.last_mut().filter(|last| last.at == at) {
            Some(last) => last.linears.push(linear),
            None => found.push(Mixture { at, linears: vec![linear] }),
        }
    }
    found
}

/// What to say of experts that are not all quantized alike.
///
/// # Errors
/// Where no runtime loads them.
pub fn uneven(graph: &Graph, encodings: &HashMap<String, Encoding>, codec: &dyn Codec) -> Result<Option<String>> {
    let mixtures = mixtures(graph, encodings);
    let uneven = mixtures.iter().find(|mixture| !mixture.alike());
    if codec.id() != "compressed-tensors" {
        return Ok(uneven.map(|mixture| {
            let (who, keep, load) = match codec.id() {
                "mlx" => ("mlx-lm", "keeps", "does"),
                _ => ("transformers and vLLM", "keep", "do"),
            };
            format!(
                "the experts of `{}` are not all quantized alike: {who} {keep} them in one stack and {load} not load that; give \
                 --ignore or a scheme for all experts of a layer",
                mixture.at
            )
        }));
    }
    // Llama 4's experts are modules of their own in transformers where linears are packed.
    let separate = graph.family == "llama4";
    let transformers = separate || read_by_transformers(&mixtures);
    match uneven {
        None if transformers => Ok(None),
        None => Ok(Some(between_layers(graph, &mixtures))),
        Some(mixture) if transformers => Ok(Some(format!(
            "the experts of `{}` are not all quantized alike: vLLM keeps them in one stack and does not load that; transformers does",
            mixture.at
        ))),
        Some(mixture) if graph.opaque => Ok(Some(format!(
            "the experts of `{}` are not all quantized alike: where transformers and vLLM keep them in one stack they fail, or load \
             wrong weights without a word; give all experts of the model one scheme, or write another --format",
            mixture.at
        ))),
        Some(mixture) => Err(Error::usage(format!(
            "the experts of `{}` would not all be quantized alike: transformers and vLLM keep them in one stack and do not load that; \
             give all experts of the model one scheme, or --format gguf",
            mixture.at
        ))),
    }
}

/// Whether transformers reads the experts right: it unpacks all of a model by one scheme, or multiplies what has a byte for a weight by
/// its scales, and then takes plain weights as they are.
fn read_by_transformers(mixtures: &[Mixture<'_>]) -> bool {
    let mut all = mixtures.iter().flat_map(|mixture| &mixture.linears).map(|(_, encoding)| encoding);
    let bytes = all.clone().all(|encoding| encoding.is_none_or(|encoding| encoding.activation.is_some()));
    let one = all.next().is_none_or(|first| all.all(|other| other == first));
    one || (bytes && mixtures.iter().all(Mixture::alike_by_name))
}

/// What to say where each layer's experts are alike, and those of one layer are not as those of another.
fn between_layers(graph: &Graph, mixtures: &[Mixture<'_>]) -> String {
    let of = |mixture: &Mixture<'_>| mixture.linears.first().and_then(|(_, encoding)| *encoding);
    let first = &mixtures[0];
    let other = mixtures.iter().find(|other| of(other) != of(first)).unwrap_or(first);
    let held = |mixture: &Mixture<'_>| match of(mixture) {
        Some(encoding) => {
            let name = scheme_of(&encoding).map(|scheme| scheme.name());
            let name = name.or(encoding.name().map(str::to_owned));
            name.map_or("otherwise".to_owned(), |name| format!("in {name}"))
        }
        None => "as they are".to_owned(),
    };
    let mut held = [held(first), held(other)];
    if held[0] == held[1] {
        held = ["in one way".to_owned(), "in another".to_owned()];
    }
    let stacks = if graph.opaque { "where it keeps experts in stacks, " } else { "" };
    format!(
        "the experts of `{}` are held {} and those of `{}` {}: {stacks}transformers reads the experts of all layers by one scheme and would \
         fail or load wrong weights, without a word; vLLM takes each layer for itself; for transformers give the experts of all layers one \
         scheme, leave all as they are, or mix only W8A8, FP8_DYNAMIC and experts that stay as they are",
        first.at, held[0], other.at, held[1],
    )
}
