//! GPT-2, GPT-NeoX (Pythia) and StarCoder2: layer norms, biases, feed-forward layers without a gate.

use kernels::{Activation, NormKind};

use super::build::{Base, activation, activation_of, block, pre};
use super::rope::rope;
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{Block, DropRule, Graph, Layer, Linear, Split, Stored};

/// GPT-2.
pub const GPT2: Family = Family { id: "gpt2", model_types: &["gpt2"], build: gpt2 };

/// GPT-NeoX and Pythia.
pub const GPT_NEOX: Family = Family { id: "gpt_neox", model_types: &["gpt_neox"], build: gpt_neox };

/// StarCoder2.
pub const STARCODER2: Family = Family { id: "starcoder2", model_types: &["starcoder2"], build: starcoder2 };

const MASKS: &[DropRule] = &[
    DropRule { prefix: String::new(), suffix: ".attn.bias", reason: "the causal mask" },
    DropRule { prefix: String::new(), suffix: ".attn.masked_bias", reason: "the value of masked scores" },
    DropRule { prefix: String::new(), suffix: ".attention.bias", reason: "the causal mask" },
    DropRule { prefix: String::new(), suffix: ".attention.masked_bias", reason: "the value of masked scores" },
];

fn gpt2(config: &Config<'_>) -> Result<Graph> {
    let (hidden, heads) = (config.count("n_embd")?, config.count("n_head")?);
    let head_dim = hidden / heads;
    let base = Base {
        hidden,
        vocabulary: config.count("vocab_size")?,
        layers: config.count("n_layer")?,
        heads,
        kv_heads: heads,
        head_dim,
        norm: NormKind::Layer,
        norm_offset: 0.0,
        norm_bias: true,
        eps: config.positive("layer_norm_epsilon", 1e-5)? as f32,
        tied: true,
        blocks: "transformer.h",
        embedding: "transformer.wte",
        final_norm: "transformer.ln_f",
        head: "lm_head",
    };
    let inner = config.optional_count("n_inner")?.unwrap_or(4 * hidden);
    let act = activation_of(config, "activation_function", Activation::GeluTanh)?;
    let positions = config.count("n_positions")?;
    let scaled = config.flag("scale_attn_weights", true)?;
    let by_layer = config.flag("scale_attn_by_inverse_layer_idx", false)?;
    let linear =
        |module: String, rows, cols| Linear { stored: Stored::Transposed, ..Linear::plain(module, rows, cols, true) };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let qkv = Linear { split: Split::of(&[hidden; 3]), ..linear(format!("{at}.attn.c_attn"), 3 * hidden, hidden) };
        let mut attention = base.attention_of(vec![qkv], linear(format!("{at}.attn.c_proj"), hidden, hidden), None);
        attention.shape.scale = if scaled { attention.shape.scale } else { 1.0 };
        if by_layer {
            attention.shape.scale /= (layer + 1) as f32;
        }
        let mut mlp = base.ungated(["c_fc", "c_proj"].map(|name| format!("{at}.mlp.{name}")), inner, act, true);
        for linear in mlp.inputs.iter_mut().chain([&mut mlp.down]) {
            linear.stored = Stored::Transposed;
        }
        let steps = vec![
            pre(base.norm(&format!("{at}.ln_1")), Layer::Attention(attention)),
            pre(base.norm(&format!("{at}.ln_2")), Layer::Mlp(mlp)),
        ];
        Ok(block(at, steps))
    })?;
    let mut graph = base.graph(config, "gpt2", blocks)?;
    graph.embedding.positions = Some(("transformer.wpe.weight".to_owned(), positions));
    graph.dropped.extend(MASKS.to_vec());
    Ok(graph)
}

fn gpt_neox(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm = NormKind::Layer;
    base.norm_bias = true;
    base.eps = config.positive("layer_norm_eps", 1e-5)? as f32;
    base.kv_heads = base.heads;
    // A width of heads that config.json has beside these is that of the rotation alone.
    let turning = base.head_dim;
    base.head_dim = base.hidden / base.heads;
    base.blocks = "gpt_neox.layers";
    base.embedding = "gpt_neox.embed_in";
    base.final_norm = "gpt_neox.final_layer_norm";
    base.head = "embed_out";
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Gelu)?;
    let bias = config.flag("attention_bias", true)?;
    let parallel = config.flag("use_parallel_residual", true)?;
    let rope = rope(config, turning)?;
    if base.hidden % base.heads != 0 || 2 * rope.inverse_frequencies.len() > base.head_dim {
        return Err(Error::failed(format!(
            "config.json: head_dim {turning} has {} values of a head rotated, and {} heads of {} values cannot be: take head_dim out of \
             config.json",
            2 * rope.inverse_frequencies.len(),
            base.heads,
            base.head_dim
        )));
    }
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let qkv = Linear {
            split: Split { times: base.heads, lengths: vec![base.head_dim; 3] },
            ..Linear::plain(format!("{at}.attention.query_key_value"), 3 * base.hidden, base.hidden, bias)
        };
        let o = Linear::plain(format!("{at}.attention.dense"), base.hidden, base.hidden, bias);
        let attention = base.attention_of(vec![qkv], o, Some(rope.clone()));
        let names = ["dense_h_to_4h", "dense_4h_to_h"].map(|name| format!("{at}.mlp.{name}"));
        let mlp = base.ungated(names, inner, act, true);
        Ok(Block { parallel, ..base.usual_block(at, attention, Layer::Mlp(mlp)) })
    })?;
    let mut graph = base.graph(config, "gpt_neox", blocks)?;
    graph.dropped.extend(MASKS.to_vec());
    Ok(graph)
}

fn starcoder2(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm = NormKind::Layer;
    base.norm_bias = true;
    base.eps = config.positive("norm_epsilon", 1e-5)? as f32;
    base.tied = true;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::GeluTanh)?;
    let bias = config.flag("use_bias", true)?;
    let window = config.optional_count("sliding_window")?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention = base.attention(&format!("{at}.self_attn"), [bias, bias], Some(rope.clone()));
        attention.shape.window = window;
        let mlp = base.ungated(["c_fc", "c_proj"].map(|name| format!("{at}.mlp.{name}")), inner, act, bias);
        Ok(base.usual_block(at, attention, Layer::Mlp(mlp)))
    })?;
    base.graph(config, "starcoder2", blocks)
}
