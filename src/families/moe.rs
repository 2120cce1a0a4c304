//! Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE: many feed-forward layers, of which each token takes a few.

use kernels::Activation;

use super::build::{Base, activation, sliding};
use super::olmo::whole_norms;
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer, Linear, Mlp, Moe, Router, Scoring, Split, Stored};
use crate::weights::Weights;

/// Mixtral.
pub const MIXTRAL: Family = Family { id: "mixtral", model_types: &["mixtral"], build: mixtral };

/// Qwen1.5-MoE and Qwen2-MoE.
pub const QWEN2_MOE: Family =
    Family { id: "qwen2_moe", model_types: &["qwen2_moe"], build: |config| qwen(config, "qwen2_moe") };

/// Qwen3-MoE.
pub const QWEN3_MOE: Family =
    Family { id: "qwen3_moe", model_types: &["qwen3_moe"], build: |config| qwen(config, "qwen3_moe") };

/// The language model of Qwen3-VL with experts, which are published in stacks.
pub const QWEN3_VL_MOE: Family =
    Family { id: "qwen3_vl_moe", model_types: &["qwen3_vl_moe_text"], build: |config| qwen(config, "qwen3_vl_moe") };

/// OLMoE.
pub const OLMOE: Family = Family { id: "olmoe", model_types: &["olmoe"], build: olmoe };

/// A router that takes the `top_k` of the softmax.
pub fn router(base: &Base, module: String, experts: usize, top_k: usize, renormalize: bool) -> Router {
    Router {
        linear: Linear::plain(module, experts, base.hidden, false),
        logits: 1.0,
        scoring: Scoring::Softmax,
        top_k,
        correction: None,
        groups: None,
        renormalize,
        scale: 1.0,
        factors: None,
        table: None,
    }
}

/// Experts that lie in two tensors, `[experts, 2·inner, hidden]` and `[experts, hidden, inner]`, or the last two
/// extents the other way round.
///
/// `halves` says how rows of the first divide into gate and up. Modules are named as if they were stored one by one:
/// `module.N.gate_proj`, `module.N.up_proj` and `module.N.down_proj`.
pub fn stacked(
    module: &str,
    tensors: [String; 2],
    biases: [Option<String>; 2],
    [experts, hidden, inner]: [usize; 3],
    transposed: bool,
    halves: Split,
    activation: Activation,
) -> Vec<Mlp> {
    let expert = |index: usize| {
        let linear = |stack: usize, name: &str, rows, cols, part| Linear {
            stored: Stored::Slice {
                tensor: tensors[stack].clone(),
                index,
                of: experts,
                transposed,
                bias: biases[stack].clone(),
                part,
            },
            ..Linear::plain(format!("{module}.{index}.{name}"), rows, cols, biases[stack].is_some())
        };
        Mlp {
            inputs: vec![
                linear(0, "gate_proj", inner, hidden, (halves.clone(), 0)),
                linear(0, "up_proj", inner, hidden, (halves.clone(), 1)),
            ],
            down: linear(1, "down_proj", hidden, inner, (Split::WHOLE, 0)),
            activation,
            scale: 1.0,
            learned: None,
            cut: None,
        }
    };
    (0..experts).map(expert).collect()
}

/// Takes experts from stacks where a checkpoint has them as transformers keeps them in memory, and not one by one:
/// `experts.gate_up_proj`, `[experts, 2·inner, hidden]`, and `experts.down_proj`, `[experts, hidden, inner]`. Those of Qwen3-VL are published
/// with the last two extents the other way round, and taken so unless their shape says otherwise.
///
/// One by one they have the names by which transformers collects them, of a checkpoint that was written with these, too.
pub(super) fn from_stacks(graph: &mut Graph, source: &dyn Weights) {
    let turned = graph.family == "qwen3_vl_moe";
    let collected = COLLECTED.iter().find(|(family, _)| *family == graph.family).map(|(_, at)| *at);
    for step in graph.blocks.iter_mut().flat_map(|block| &mut block.steps) {
        let Layer::Moe(moe) = &mut step.layer else { continue };
        if turned {
            straighten(moe, source);
        }
        let Some(Mlp { inputs, down, activation, .. }) = moe.experts.first() else { continue };
        let ([gate, up], Some((module, _))) = (&inputs[..], down.module.rsplit_once(".0.")) else { continue };
        let names = [gate, up, down].map(|linear| last_part(&linear.module).to_owned());
        let tensors = ["gate_up_proj", "down_proj"].map(|name| format!("{module}.{name}"));
        let there = |name: &str| source.entry(name).is_some();
        if down.stored != Stored::Plain || down.bias || there(&down.weight()) {
            continue;
        }
        if !tensors.iter().all(|name| there(name)) {
            if collected.is_some_and(|at| there(&format!("{}.weight", collected_as(&down.module, at)))) {
                collect(&mut moe.experts, collected);
            }
            continue;
        }
        let (sizes, halves) = ([moe.experts.len(), gate.cols, gate.rows], Split::of(&[gate.rows; 2]));
        let mut experts = stacked(module, tensors, [None, None], sizes, false, halves, *activation);
        // One by one they are called as the family calls them, w1 and the like.
        for Mlp { inputs, down, .. } in &mut experts {
            for (linear, name) in inputs.iter_mut().chain([down]).zip(&names) {
                let (before, _) = linear.module.rsplit_once('.').expect("named within its expert");
                linear.module = format!("{before}.{name}");
            }
        }
        collect(&mut experts, collected);
        moe.experts = experts;
    }
}

/// Families of whose experts transformers fills stacks by their published names alone, wherever the others have those that they have in
/// memory; and where experts stand there, in place of `.mlp.experts.`.
const COLLECTED: &[(&str, &str)] = &[("deepseek_v4", ".mlp.experts."), ("mistral_large4", ".experts.")];

/// Gives experts the names by which they are collected.
fn collect(experts: &mut [Mlp], at: Option<&str>) {
    let Some(at) = at else { return };
    for linear in experts.iter_mut().flat_map(|expert| expert.inputs.iter_mut().chain([&mut expert.down])) {
        linear.module = collected_as(&linear.module, at);
    }
}

/// What an expert's linear is called where experts stand at `at`.
fn collected_as(module: &str, at: &str) -> String {
    let (before, name) = module.rsplit_once('.').unwrap_or(("", module));
    let name = match name {
        "gate_proj" => "w1",
        "up_proj" => "w3",
        "down_proj" => "w2",
        published => published,
    };
    format!("{}.{name}", before.replacen(".mlp.experts.", at, 1))
}

/// Takes stacks whose rows are said to lie in columns as they are in memory, where the shape of one says that they do; the other may be as
/// wide as high.
fn straighten(moe: &mut Moe, source: &dyn Weights) {
    let Some(Mlp { inputs, down, .. }) = moe.experts.first() else { return };
    let as_in_memory = |linear: &Linear, rows: usize| match &linear.stored {
        Stored::Slice { tensor, of, transposed: true, .. } => {
            rows != linear.cols && source.entry(tensor).is_some_and(|stack| stack.shape == [*of, rows, linear.cols])
        }
        _ => false,
    };
    if !as_in_memory(&inputs[0], 2 * inputs[0].rows) && !as_in_memory(down, down.rows) {
        return;
    }
    for linear in moe.experts.iter_mut().flat_map(|expert| expert.inputs.iter_mut().chain([&mut expert.down])) {
        if let Stored::Slice { transposed, .. } = &mut linear.stored {
            *transposed = false;
        }
    }
}

/// What stands behind the last dot.
fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Granite's experts, stacked as linears are.
pub fn granite(base: &Base, config: &Config<'_>, at: &str, inner: usize, act: Activation) -> Result<Moe> {
    let experts = config.count("num_local_experts")?;
    let router = router(base, format!("{at}.router.layer"), experts, config.count("num_experts_per_tok")?, true);
    let tensors = ["input_linear", "output_linear"].map(|name| format!("{at}.{name}.weight"));
    let sizes = [experts, base.hidden, inner];
    let halves = Split::of(&[inner, inner]);
    let experts = stacked(&format!("{at}.experts"), tensors, [None, None], sizes, false, halves, act);
    Ok(Moe { router, experts, shared: None, weigh_input: false, latent: None, norms: None })
}

fn mixtral(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let window = config.optional_count("sliding_window")?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention = base.attention(&format!("{at}.self_attn"), [false, false], Some(rope.clone()));
        attention.shape.window = window;
        let module = format!("{at}.block_sparse_moe");
        let expert = |e| base.gated_of(&format!("{module}.experts.{e}"), ["w1", "w3", "w2"], inner, act, false);
        let moe = Moe {
            router: router(&base, format!("{module}.gate"), experts, top_k, true),
            experts: (0..experts).map(expert).collect(),
            shared: None,
            weigh_input: false,
            latent: None,
            norms: None,
        };
        Ok(base.usual_block(at, attention, Layer::Moe(moe)))
    })?;
    base.graph(config, "mixtral", blocks)
}

fn qwen(config: &Config<'_>, family: &'static str) -> Result<Graph> {
    let (third, sees) = (family != "qwen2_moe", family == "qwen3_vl_moe");
    // What a GGUF file says: its text becomes a Qwen3-MoE, whose experts are stored one by one.
    let stacks = sees && !config.has("n_deepstack_layers");
    let base = Base::read(config)?;
    let act = activation(config, Activation::Silu)?;
    let inner = config.count("intermediate_size")?;
    let expert_inner = config.count("moe_intermediate_size")?;
    let experts = config.count(if third { "num_local_experts" } else { "num_experts" })?;
    let top_k = config.count("num_experts_per_tok")?;
    let renormalize = sees || config.flag("norm_topk_prob", false)?;
    let step = config.optional_count("decoder_sparse_step")?.unwrap_or(1);
    let dense = config.layer_list("mlp_only_layers")?.unwrap_or_default();
    let shared_inner = config.optional_count("shared_expert_intermediate_size")?.filter(|_| !third);
    let biases = match third {
        false => [config.flag("qkv_bias", true)?, false],
        true => [config.flag("attention_bias", false)?; 2],
    };
    let window = match config.flag("use_sliding_window", false)? {
        true => config.optional_count("sliding_window")?,
        false => None,
    };
    let first_full = config.count_or("max_window_layers", 28)?;
    let local = match third {
        true => vec![true; base.layers],
        false => sliding(config, base.layers, |layer| layer % 2 == 0 && layer < first_full)?,
    };
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, biases, Some(rope.clone()));
        attention.shape.window = window.filter(|_| local[layer]);
        attention.norms = third.then(|| base.head_norms(&module));
        let module = format!("{at}.mlp");
        let feed_forward = if dense.contains(&layer) || (layer + 1) % step != 0 {
            Layer::Mlp(base.gated(&module, inner, act, false))
        } else {
            let expert = |e| base.gated(&format!("{module}.experts.{e}"), expert_inner, act, false);
            let shared = shared_inner.map(|inner| {
                let gate = Linear::plain(format!("{module}.shared_expert_gate"), 1, base.hidden, false);
                (base.gated(&format!("{module}.shared_expert"), inner, act, false), Some(gate))
            });
            let own = match stacks {
                true => {
                    let tensors = ["gate_up_proj", "down_proj"].map(|name| format!("{module}.experts.{name}"));
                    let (sizes, halves) = ([experts, base.hidden, expert_inner], Split::of(&[expert_inner; 2]));
                    stacked(&format!("{module}.experts"), tensors, [None, None], sizes, true, halves, act)
                }
                false => (0..experts).map(expert).collect(),
            };
            Layer::Moe(Moe {
                router: router(&base, format!("{module}.gate"), experts, top_k, renormalize),
                experts: own,
                shared,
                weigh_input: false,
                latent: None,
                norms: None,
            })
        };
        Ok(base.usual_block(at, attention, feed_forward))
    })?;
    base.graph(config, family, blocks)
}

fn olmoe(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let (experts, top_k) = (config.count("num_experts")?, config.count("num_experts_per_tok")?);
    let renormalize = config.flag("norm_topk_prob", false)?;
    let bias = config.flag("attention_bias", false)?;
    let clip = config.get("clip_qkv").map(|_| config.number("clip_qkv", 0.0)).transpose()?.map(|x| x as f32);
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        attention.norms = Some(whole_norms(&base, &module));
        attention.clip = clip;
        let module = format!("{at}.mlp");
        let moe = Moe {
            router: router(&base, format!("{module}.gate"), experts, top_k, renormalize),
            experts: (0..experts).map(|e| base.gated(&format!("{module}.experts.{e}"), inner, act, false)).collect(),
            shared: None,
            weigh_input: false,
            latent: None,
            norms: None,
        };
        Ok(base.usual_block(at, attention, Layer::Moe(moe)))
    })?;
    base.graph(config, "olmoe", blocks)
}
