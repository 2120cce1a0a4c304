//! Layers that predict further tokens, under the names that families give them.
//!
//! transformers leaves most of them out; what they compute is what vLLM, SGLang and llama.cpp make of them.

use std::collections::HashSet;

use super::build::Base;
use super::unknown::block as numbered;
use crate::graph::{Block, Collapse, FURTHER, Further, Graph, Joining, Layer, Linear, Lookup, Partial, Step};
use crate::weights::Weights;

/// What tensors aside are of such a layer of which some are missing.
const PARTIAL: &str = "predicts further tokens, and is not whole";

/// What they are of a whole one behind it.
const BEHIND: &str = "predicts further tokens, and comes behind a layer that is not whole";

/// What the parts of such a layer are called besides those of any block, and what it is given.
pub struct Spelling {
    /// What the names of its tensors begin with; those of its block, and a dot, where there is nothing. Here `{n}` is the number, too.
    prefix: Option<&'static str>,
    /// Norms of the embedding and of the state. In all names `{n}` is the number of the layer among those that predict further tokens.
    norms: [&'static str; 2],
    /// The state is what the last norm is given, and not what it makes of that.
    raw: bool,
    projections: Projections,
    /// Behind the block; the model's last norm where there is nothing.
    norm: Option<&'static str>,
    /// Copies of the embedding and of the output projection that files may hold.
    copies: [Option<&'static str>; 2],
    /// Runtimes load no codes of such a layer.
    whole: bool,
}

/// What makes the stream of the layer.
#[derive(Clone, Copy)]
enum Projections {
    /// One reads the embedding and then the state.
    One(&'static str),
    /// One reads the state and then the embedding.
    StateFirst(&'static str),
    /// One reads the embedding and the other every stream of the model, normed each by itself.
    Apart([&'static str; 2]),
    /// The same, with all streams normed together.
    ApartOfAll([&'static str; 2]),
}

/// DeepSeek V3's, which most families took over.
pub const DEEPSEEK: Spelling = Spelling {
    prefix: None,
    norms: ["enorm", "hnorm"],
    raw: false,
    projections: Projections::One("eh_proj"),
    norm: Some("shared_head.norm"),
    copies: [Some("embed_tokens"), Some("shared_head.head")],
    whole: false,
};

/// Of Hunyuan 3, which calls the last norm otherwise and always takes the model's embedding and head.
pub const HUNYUAN: Spelling = Spelling { norm: Some("final_layernorm"), copies: [None; 2], ..DEEPSEEK };

/// Of MiMo, which puts the state before the embedding.
pub const MIMO: Spelling = Spelling {
    norms: ["token_layernorm", "hidden_layernorm"],
    projections: Projections::StateFirst("input_proj"),
    ..HUNYUAN
};

/// Of Qwen3-Next, which has one under names of its own.
pub const QWEN: Spelling = Spelling {
    prefix: Some("mtp."),
    norms: ["pre_fc_norm_embedding", "pre_fc_norm_hidden"],
    projections: Projections::One("fc"),
    norm: Some("norm"),
    ..HUNYUAN
};

/// Of MiniMax M3, whose block has a name of its own in such a layer.
pub const MINIMAX_M3: Spelling = Spelling { prefix: Some("model.mtp.layers.{n}."), ..HUNYUAN };

/// Of MiMo V2, whose layers are given what the model's last norm is given.
pub const MIMO_V2: Spelling = Spelling { raw: true, ..HUNYUAN };

/// Of Step 3.5: as MiMo V2's, and each has a head of its own.
pub const STEP: Spelling = Spelling {
    raw: true,
    norm: Some("transformer.shared_head.norm"),
    copies: [None, Some("transformer.shared_head.output")],
    ..DEEPSEEK
};

/// Of ERNIE 4.5, behind whose blocks the model's last norm stands.
pub const ERNIE: Spelling = Spelling {
    prefix: Some("model.mtp_"),
    norms: ["emb_norm.{n}", "hidden_norm.{n}"],
    projections: Projections::One("linear_proj.{n}"),
    norm: None,
    ..HUNYUAN
};

/// Of Nemotron 3, whose attention and mixture are layers of their own.
pub const NEMOTRON: Spelling = Spelling {
    prefix: Some("mtp."),
    norms: ["layers.0.enorm", "layers.0.hnorm"],
    projections: Projections::One("layers.0.eh_proj"),
    norm: Some("layers.1.final_layernorm"),
    ..HUNYUAN
};

/// Of LongCat Flash, whose layer vLLM and SGLang load under a list of names that has none of codes.
pub const LONGCAT: Spelling = Spelling {
    prefix: Some("model.mtp."),
    norms: ["layers.0.enorm.m", "layers.0.hnorm.m"],
    projections: Projections::One("layers.0.eh_proj"),
    norm: Some("norm"),
    copies: [Some("embed_tokens"), None],
    whole: true,
    ..DEEPSEEK
};

/// What such layers of a family are called in `disable_quant_module` of config.json, by which runtimes know that they have no codes.
pub fn without_codes(family: &str) -> Option<&'static str> {
    (family == super::longcat::LONGCAT_FLASH.id).then_some("mtp")
}

/// Of DeepSeek V4, whose layers are given all streams, and leave as many.
pub const DEEPSEEK_V4: Spelling = Spelling {
    raw: true,
    projections: Projections::Apart(["e_proj", "h_proj"]),
    norm: Some("norm"),
    copies: [Some("emb.tok_emb"), Some("head")],
    ..DEEPSEEK
};

/// Of Qwen 4, whose layer is given all streams, too; what makes one of those that it leaves stands in the place of the last norm.
pub const QWEN4: Spelling = Spelling {
    projections: Projections::ApartOfAll(["fc_embedding", "fc_hidden"]),
    raw: true,
    norm: Some("hyper_connection_mixer.hc_norm"),
    ..QWEN
};

/// Adds a layer behind the model, whose block is `block`, which has one stream where the model has several.
///
/// Of a model that reads its streams through gates there is no such layer.
pub fn append(graph: &mut Graph, base: &Base, spelling: &Spelling, block: Block) {
    append_with(graph, base, spelling, block, None);
}

/// The same of a layer whose block has as many streams as the model, of which `ending` makes one, if that is there.
pub fn append_with(graph: &mut Graph, base: &Base, spelling: &Spelling, mut block: Block, ending: Option<Collapse>) {
    let &Spelling { prefix, norms: [of_token, of_state], raw, projections, norm, copies, whole } = spelling;
    let number = graph.predictors().len().to_string();
    let prefix = prefix.map_or_else(|| format!("{}.", block.name), |prefix| prefix.replace("{n}", &number));
    let module = |name: &str| format!("{prefix}{}", name.replace("{n}", &number));
    let [embedding, head] = copies.map(|copy| copy.map(module));
    let before = graph.predictors().last().and_then(Block::further).map_or(&graph.final_norm, |last| &last.norm);
    let (hidden, streams) = (base.hidden, ending.as_ref().map_or(1, Collapse::streams));
    let linear = |name: &str, cols| Linear::plain(module(name), hidden, cols, false);
    let joining = match projections {
        Projections::One(name) => Joining::Beside { projection: linear(name, 2 * hidden), state_first: false },
        Projections::StateFirst(name) => Joining::Beside { projection: linear(name, 2 * hidden), state_first: true },
        Projections::Apart([token, state]) | Projections::ApartOfAll([token, state]) => {
            Joining::Apart { token: linear(token, hidden), state: linear(state, hidden), streams }
        }
    };
    let normed = if matches!(projections, Projections::ApartOfAll(_)) { streams * hidden } else { hidden };
    // Gates take what is normed of all streams.
    let ended = if matches!(ending, Some(Collapse::Gated(_))) { streams * hidden } else { hidden };
    let further = Further {
        collapse: graph.collapse.clone().filter(|_| ending.is_none() && graph.predictors().is_empty()),
        before: (!raw).then(|| before.clone()),
        embedding: Lookup::whole(
            embedding.map_or_else(|| graph.embedding.tensor.clone(), |module| format!("{module}.weight")),
            [graph.vocabulary, hidden],
        ),
        of_token: base.norm(&module(of_token)),
        of_state: base.norm_of(&module(of_state), normed),
        joining,
        ending,
        norm: norm.map_or_else(|| graph.final_norm.clone(), |norm| base.norm_of(&module(norm), ended)),
        head: head.map(|module| Linear::plain(module, base.vocabulary, hidden, false)),
        prefix: prefix.clone(),
        whole,
    };
    let first = Step {
        pre: None,
        layer: Layer::Further(Box::new(further)),
        post: None,
        scale: 1.0,
        given: 1.0,
        unseen: 0,
        hyper: None,
    };
    block.steps.insert(0, first);
    graph.blocks.push(block);
}

/// Puts aside what begins with `prefix`, unless config.json counts one such layer: several would share what comes before and behind them.
///
/// [`settle`] takes that back where the file holds no more than the one that is built.
pub fn aside_unless_one(graph: &mut Graph, prefix: &str, count: usize) {
    if count != 1 {
        graph.aside.push((prefix.to_owned(), FURTHER));
    }
}

/// Takes the model's embedding and head where a file has no copies of them, and sets those layers aside that it does not hold, or not whole.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) {
    let (embedding, own) = (graph.embedding.tensor.clone(), graph.trunk().len());
    for step in graph.blocks[own..].iter_mut().flat_map(|block| &mut block.steps) {
        let Layer::Further(further) = &mut step.layer else { continue };
        if source.entry(&further.embedding.tensor).is_none() {
            further.embedding.tensor.clone_from(&embedding);
        }
        further.head = further.head.take().filter(|head| source.entry(&head.weight()).is_some());
    }
    one_of_several(graph, source);
    // Of each what names begin with, and which of its tensors are there and which are missing.
    let found: Vec<(String, [Vec<Tensor>; 2])> =
        graph.predictors().iter().map(|block| looked_for(graph, block, source)).collect();
    let there = |at: usize| {
        let (prefix, [held, _]) = &found[at];
        let shared = at > 0 && found[at - 1].0 == *prefix;
        !held.is_empty() || !shared && source.entries().iter().any(|entry| entry.name.starts_with(prefix))
    };
    let whole = found.iter().take_while(|(_, [_, missing])| missing.is_empty()).count();
    let last = (0..found.len()).rfind(|at| there(*at)).map_or(0, |last| last + 1);
    graph.held.count = (0..last).filter(|at| there(*at)).count();
    for (at, (prefix, [held, missing])) in found.iter().enumerate().take(last).skip(whole) {
        if let Some(tensor) = missing.first() {
            graph.held.partial.push(Partial {
                layer: graph.blocks[own + at].name.clone(),
                tensor: tensor.clone(),
                others: missing.len() - 1,
                followed: at + 1 < last,
            });
        }
        let what = if missing.is_empty() { BEHIND } else { PARTIAL };
        let shared = found[..whole].iter().any(|(other, _)| other == prefix);
        match shared {
            true => graph.aside.extend(held.iter().map(|(name, _)| (name.clone(), what))),
            false => graph.aside.push((prefix.clone(), what)),
        }
    }
    graph.blocks.truncate(own + whole);
}

/// A tensor's name and shape.
type Tensor = (String, Vec<usize>);

/// What the names of such a layer begin with, and of its tensors those that a file holds, and those that it does not.
fn looked_for(graph: &Graph, block: &Block, source: &dyn Weights) -> (String, [Vec<Tensor>; 2]) {
    let mut one = Graph { blocks: vec![block.clone()], ..graph.without_blocks() };
    super::as_stored(&mut one, source);
    let prefix = block.further().expect("one of these").prefix.clone();
    let of_it = one.tensors().into_iter().filter(|(name, _)| name.starts_with(&prefix));
    let (held, missing) = of_it.partition(|(name, _)| source.entry(name).is_some());
    (prefix, [held, missing])
}

/// Where config.json counts several that would share what comes before and behind them, what the names of all begin with is aside, too: they
/// are not known, and stay there, unless the file holds no more than the one that is built.
fn one_of_several(graph: &mut Graph, source: &dyn Weights) {
    let is_aside = |prefix: &String| graph.aside.iter().any(|(aside, _)| aside == prefix);
    let Some(prefix) = graph.of_predictors().into_iter().find(is_aside) else { return };
    let tensors = graph.tensors();
    let own: HashSet<&str> = tensors.iter().filter_map(|(name, _)| numbered(name)).collect();
    let mut of_it = source.entries().iter().filter(|entry| entry.name.starts_with(&prefix));
    match of_it.any(|entry| numbered(&entry.name).is_some_and(|layer| !own.contains(layer))) {
        true => *graph = graph.without_predictors(),
        false => graph.aside.retain(|(aside, _)| *aside != prefix),
    }
}

/// What to say of those that are not whole.
pub fn not_whole(graph: &Graph) -> Vec<String> {
    let told = |Partial { layer, tensor: (name, shape), others, followed }: &Partial| {
        let missing = match others {
            0 => format!("`{name}` {shape:?} is missing"),
            others => format!("`{name}` {shape:?} and {others} more of its tensors are missing"),
        };
        let behind = if *followed { ", nor those behind it" } else { "" };
        format!(
            "`{layer}`, which predicts further tokens, is not whole, and is neither quantized nor measured{behind}: {missing}; download the \
             weights again, or have it left out (--mtp drop)"
        )
    };
    graph.held.partial.iter().map(told).collect()
}

/// What stands in the names of such layers and of no others, as one part of them.
const MARKS: &[&str] = &["enorm", "hnorm", "eh_proj", "token_layernorm", "hidden_layernorm"];

/// What the names of such layers begin with that a file holds and config.json does not count, each once.
pub fn uncounted(graph: &Graph, source: &dyn Weights) -> Vec<String> {
    let known: Vec<String> = graph.tensors().into_iter().map(|(name, _)| name).collect();
    let mut found: Vec<String> = Vec::new();
    for name in source.entries().iter().map(|entry| &entry.name[..]) {
        let parts: Vec<&str> = name.split('.').collect();
        let mark = parts.iter().position(|part| MARKS.contains(part)).filter(|at| *at > 0);
        let beside = |part: &&str| *part == "mtp" || part.starts_with("mtp_") || *part == "nextn";
        // With its number, where it has one.
        let is_number = |at: usize| parts.get(at).is_some_and(|part| part.parse::<usize>().is_ok());
        let count = parts.iter().position(beside).map(|at| if is_number(at + 1) { at + 2 } else { at + 1 }).or(mark);
        let Some(prefix) = count.map(|count| format!("{}.", parts[..count].join("."))) else { continue };
        // Of a family that is not known everything is aside, which is said by no name.
        let aside = graph.aside.iter().any(|(prefix, _)| !prefix.is_empty() && name.starts_with(prefix));
        let dropped = graph.dropped.iter().any(|rule| name.starts_with(&rule.prefix) && name.ends_with(rule.suffix));
        let counted = known.iter().any(|known| known.starts_with(&prefix));
        if !(aside || dropped || counted || found.contains(&prefix)) {
            found.push(prefix);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    /// How many such layers a model has whose config.json says so, and what of it is aside.
    fn found(config: &Value) -> (usize, Vec<String>) {
        let graph = crate::families::build(config).unwrap();
        (graph.predictors().len(), graph.aside.into_iter().map(|(prefix, _)| prefix).collect())
    }

    fn with(config: &Value, changes: Value) -> Value {
        let mut config = config.clone();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    #[test]
    fn what_layers_see_has_to_be_told() {
        let step = json!({
            "model_type": "step3p5", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_attention_groups": 2, "head_dim": 8, "sliding_window": 8, "num_nextn_predict_layers": 1, "moe_layers_enum": "", "moe_num_experts": 4,
            "moe_top_k": 2, "layer_types": ["full_attention", "sliding_attention"],
        });
        assert_eq!(found(&step), (0, vec!["model.layers.2.".to_owned()]));
        // In the words of published files, and of transformers.
        let three = json!({"layer_types": ["full_attention", "sliding_attention", "full_attention"]});
        for told in [three, json!({"mtp_layer_types": ["sliding_attention"]})] {
            assert_eq!(found(&with(&step, told)), (1, Vec::new()));
        }
    }

    #[test]
    fn other_forms_than_those_known_stay_as_they_are() {
        let nemotron = json!({
            "model_type": "nemotron_h", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 8, "hybrid_override_pattern": "*E", "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
            "moe_shared_expert_intermediate_size": 8, "num_nextn_predict_layers": 1, "mamba_num_heads": 2, "mamba_head_dim": 8, "n_groups": 1,
            "ssm_state_size": 8, "conv_kernel": 4,
        });
        assert_eq!(found(&nemotron), (1, Vec::new()));
        for other in [json!({"mtp_hybrid_override_pattern": "*"}), json!({"mtp_layers_block_type": ["moe"]})] {
            assert_eq!(found(&with(&nemotron, other)), (0, vec!["mtp.".to_owned()]));
        }
        // Of several the file tells whether it holds more than one.
        assert_eq!(found(&with(&nemotron, json!({"num_nextn_predict_layers": 2}))), (1, vec!["mtp.".to_owned()]));
        let ernie = json!({
            "model_type": "ernie4_5_moe", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 8, "num_nextn_predict_layers": 1,
        });
        assert_eq!(found(&ernie), (1, Vec::new()));
        for other in [json!({"use_bias": true}), json!({"num_nextn_predict_layers": 0})] {
            assert_eq!(found(&with(&ernie, other)), (0, vec!["model.mtp_".to_owned()]));
        }
    }
}
