//! What most families have in common: sizes under their usual names, and the usual parts under their usual names.

use std::sync::Arc;

use kernels::{Activation, AttentionShape, NormKind, RopeLayout};

use super::Config;
use crate::error::{Error, Result};
use crate::graph::{
    Attention, Block, Decay, Embedding, Graph, Head, HeadNorms, Held, Keys, Layer, Linear, Mlp, Norm, Projections,
    Rope, Split, Step,
};

/// Sizes of a decoder, and its names' prefix.
#[derive(Clone, Debug)]
pub struct Base {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Kind of all norms.
    pub norm: NormKind,
    /// Added to the stored weights of all norms.
    pub norm_offset: f32,
    /// Whether norms have biases.
    pub norm_bias: bool,
    /// Of all norms.
    pub eps: f32,
    /// Whether the head uses the embedding, if config.json does not say.
    pub tied: bool,
    /// Prefix of the tensors of blocks, as in `model.layers`.
    pub blocks: &'static str,
    /// Name of the embedding.
    pub embedding: &'static str,
    /// Name of the last norm.
    pub final_norm: &'static str,
    /// Name of the output projection.
    pub head: &'static str,
}

impl Base {
    /// Reads what config.json says under the names of Llama's.
    pub fn read(config: &Config<'_>) -> Result<Base> {
        let hidden = config.count("hidden_size")?;
        let heads = config.count("num_attention_heads")?;
        let kv_heads = config.optional_count("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = config.optional_count("head_dim")?.unwrap_or(hidden / heads);
        if heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(Error::failed(format!(
                "config.json: {heads} heads of {head_dim} values cannot share {kv_heads} key and value heads in pairs of values"
            )));
        }
        Ok(Base {
            hidden,
            vocabulary: config.count("vocab_size")?,
            layers: config.count("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            norm: NormKind::Rms,
            norm_offset: 0.0,
            norm_bias: false,
            eps: config.positive("rms_norm_eps", 1e-6)? as f32,
            tied: false,
            blocks: "model.layers",
            embedding: "model.embed_tokens",
            final_norm: "model.norm",
            head: "lm_head",
        })
    }

    /// The prefix of a block's tensors.
    pub fn at(&self, layer: usize) -> String {
        format!("{}.{layer}", self.blocks)
    }

    /// A norm of `width` values.
    pub fn norm_of(&self, module: &str, width: usize) -> Norm {
        let bias = self.norm_bias.then(|| format!("{module}.bias"));
        let weights = vec![format!("{module}.weight")];
        Norm { kind: self.norm, weights, offset: self.norm_offset, bias, shape: vec![width], eps: self.eps }
    }

    /// A norm of the residual stream.
    pub fn norm(&self, module: &str) -> Norm {
        self.norm_of(module, self.hidden)
    }

    /// Heads as config.json says, with the usual scale, all tokens visible.
    pub fn shape(&self) -> AttentionShape {
        let Base { heads, kv_heads, head_dim, .. } = *self;
        let scale = (head_dim as f32).powf(-0.5);
        AttentionShape {
            heads,
            kv_heads,
            head_dim,
            value_dim: head_dim,
            scale,
            window: None,
            chunk: None,
            softcap: None,
            both_ways: false,
        }
    }

    /// `q_proj`, `k_proj`, `v_proj`, `o_proj` under `module`; biases of the first three, and of the last.
    pub fn attention(&self, module: &str, biases: [bool; 2], rope: Option<Arc<Rope>>) -> Attention {
        let (wide, narrow) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let linear = |part: &str, rows| Linear::plain(format!("{module}.{part}"), rows, self.hidden, biases[0]);
        let linears = vec![linear("q_proj", wide), linear("k_proj", narrow), linear("v_proj", narrow)];
        self.attention_of(linears, Linear::plain(format!("{module}.o_proj"), self.hidden, wide, biases[1]), rope)
    }

    /// Attention of given linears.
    pub fn attention_of(&self, linears: Vec<Linear>, o: Linear, rope: Option<Arc<Rope>>) -> Attention {
        Attention {
            projections: Projections::Direct(linears),
            keys: Keys::Own,
            gated: false,
            head_gate: None,
            o,
            shape: self.shape(),
            rope,
            layout: RopeLayout { head_dim: self.head_dim, first: 0, interleaved: false },
            norms: None,
            clip: None,
            sinks: None,
            temperature: None,
            choice: None,
            value_scale: 1.0,
            beside: None,
        }
    }

    /// Gives attention under Llama's names a gate, of which each head's rows follow those of its queries.
    pub fn gate_heads(&self, attention: &mut Attention) {
        let Projections::Direct(linears) = &mut attention.projections else { return };
        let q = &mut linears[0];
        q.rows *= 2;
        q.split = Split { times: self.heads, lengths: vec![self.head_dim; 2] };
        attention.gated = true;
    }

    /// One linear for queries, keys and values, one after the other.
    pub fn fused_qkv(&self, module: String, bias: bool) -> Linear {
        let (wide, narrow) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let split = Split::of(&[wide, narrow, narrow]);
        Linear { split, ..Linear::plain(module, wide + 2 * narrow, self.hidden, bias) }
    }

    /// Norms of queries and keys, `q_norm` and `k_norm` under `module`, each head by itself.
    pub fn head_norms(&self, module: &str) -> HeadNorms {
        let norm = |name: &str| self.norm_of(&format!("{module}.{name}"), self.head_dim);
        HeadNorms { q: norm("q_norm"), k: Some(norm("k_norm")), v: None, per_head: true, after_rope: false }
    }

    /// `gate_proj`, `up_proj`, `down_proj` under `module`.
    pub fn gated(&self, module: &str, inner: usize, activation: Activation, bias: bool) -> Mlp {
        self.gated_of(module, ["gate_proj", "up_proj", "down_proj"], inner, activation, bias)
    }

    /// A gated layer with other names.
    pub fn gated_of(&self, module: &str, names: [&str; 3], inner: usize, activation: Activation, bias: bool) -> Mlp {
        let linear = |name: &str, rows, cols| Linear::plain(format!("{module}.{name}"), rows, cols, bias);
        let [gate, up, down] = names;
        let inputs = vec![linear(gate, inner, self.hidden), linear(up, inner, self.hidden)];
        Mlp { inputs, down: linear(down, self.hidden, inner), activation, scale: 1.0, learned: None, cut: None }
    }

    /// A layer without a gate.
    pub fn ungated(&self, names: [String; 2], inner: usize, activation: Activation, bias: bool) -> Mlp {
        let [up, down] = names;
        let inputs = vec![Linear::plain(up, inner, self.hidden, bias)];
        Mlp {
            inputs,
            down: Linear::plain(down, self.hidden, inner, bias),
            activation,
            scale: 1.0,
            learned: None,
            cut: None,
        }
    }

    /// Attention and a feed-forward layer one after the other, each behind a norm, under Llama's names.
    pub fn usual_block(&self, at: String, attention: Attention, feed_forward: Layer) -> Block {
        let steps = vec![
            pre(self.norm(&format!("{at}.input_layernorm")), Layer::Attention(attention)),
            pre(self.norm(&format!("{at}.post_attention_layernorm")), feed_forward),
        ];
        block(at, steps)
    }

    /// The same with the norms behind the layers, under OLMo 2's names.
    pub fn post_block(&self, at: String, attention: Attention, feed_forward: Layer) -> Block {
        let steps = vec![
            post(Layer::Attention(attention), self.norm(&format!("{at}.post_attention_layernorm"))),
            post(feed_forward, self.norm(&format!("{at}.post_feedforward_layernorm"))),
        ];
        block(at, steps)
    }

    /// Puts blocks together.
    pub fn graph(&self, config: &Config<'_>, family: &'static str, blocks: Vec<Block>) -> Result<Graph> {
        let linear = Linear::plain(self.head, self.vocabulary, self.hidden, false);
        let tied = config.flag("tie_word_embeddings", self.tied)?;
        Ok(Graph {
            family,
            hidden: self.hidden,
            vocabulary: self.vocabulary,
            embedding: Embedding { tensor: format!("{}.weight", self.embedding), scale: 1.0, positions: None },
            blocks,
            collapse: None,
            final_norm: self.norm(self.final_norm),
            head: Head { linear, tied, missing: false, scale: 1.0, softcap: None },
            dropped: super::DROPPED.to_vec(),
            aside: Vec::new(),
            held: Held::default(),
            opaque: false,
            unrunnable: None,
        })
    }

    /// A block for every layer.
    pub fn each(&self, block: impl FnMut(usize) -> Result<Block>) -> Result<Vec<Block>> {
        (0..self.layers).map(block).collect()
    }
}

/// How fast the state of each of so many heads forgets, by the tensors that most classes have for it.
pub fn decay(module: &str, heads: usize) -> Decay {
    let of_heads = |name: &str| (format!("{module}.{name}"), vec![heads]);
    Decay { rates: of_heads("A_log"), bias: of_heads("dt_bias"), limits: Decay::UNLIMITED, lower: None }
}

/// `h ← h + layer(norm(h))`.
pub fn pre(norm: Norm, layer: Layer) -> Step {
    Step { pre: Some(norm), layer, post: None, scale: 1.0, given: 1.0, unseen: 0, hyper: None }
}

/// `h ← h + norm(layer(h))`.
pub fn post(layer: Layer, norm: Norm) -> Step {
    Step { pre: None, layer, post: Some(norm), scale: 1.0, given: 1.0, unseen: 0, hyper: None }
}

/// `h ← h + after(layer(before(h)))`.
pub fn sandwich(before: Norm, layer: Layer, after: Norm) -> Step {
    Step { pre: Some(before), layer, post: Some(after), scale: 1.0, given: 1.0, unseen: 0, hyper: None }
}

/// Steps one after the other.
pub fn block(name: String, steps: Vec<Step>) -> Block {
    Block { name, steps, parallel: false, scale: None, altup: None }
}

/// The activation that config.json names under the usual key.
pub fn activation(config: &Config<'_>, default: Activation) -> Result<Activation> {
    activation_of(config, "hidden_act", default)
}

/// The activation under the key that the family reads: others may be there too.
pub fn activation_of(config: &Config<'_>, key: &str, default: Activation) -> Result<Activation> {
    if config.get(key).is_none() {
        return Ok(default);
    }
    named_activation(config.text(key)?).ok_or_else(|| {
        Error::failed(format!(
            "config.json: {key} is `{}`, and only silu, gelu, gelu_pytorch_tanh, gelu_new, relu and relu2 are supported",
            config.text(key).unwrap_or_default()
        ))
    })
}

/// Activations of transformers that cannot be computed here, and have no weights.
const ELSEWHERE: &[&str] = &[
    "gelu_10",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu6",
    "sigmoid",
    "sqrtsoftplus",
    "tanh",
];

/// Settings with an activation that is known in place of one that is only known elsewhere, and with attention to what came before in
/// place of attention to all; `None` where there is neither.
pub fn with_known_arithmetic(settings: &serde_json::Value) -> Option<serde_json::Value> {
    let keys = ["hidden_act", "hidden_activation", "activation_function"];
    let elsewhere = |key: &&str| settings[*key].as_str().is_some_and(|name| ELSEWHERE.contains(&name));
    let mut other = settings.clone();
    let found: Vec<&str> = keys.into_iter().filter(elsewhere).collect();
    found.iter().for_each(|key| other[*key] = "silu".into());
    let both_ways = ["true", "\"all\""].contains(&&*other["use_bidirectional_attention"].to_string());
    if both_ways {
        other["use_bidirectional_attention"] = false.into();
    }
    (both_ways || !found.is_empty()).then_some(other)
}

fn named_activation(name: &str) -> Option<Activation> {
    Some(match name {
        "silu" | "swish" => Activation::Silu,
        "gelu" | "gelu_python" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" | "gelu_python_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "relu2" => Activation::Relu2,
        _ => return None,
    })
}

/// The window of those layers that see one, of which each needs one.
pub fn window_of(config: &Config<'_>, local: &[bool]) -> Result<Option<usize>> {
    match (config.optional_count("sliding_window")?, local.iter().position(|local| *local)) {
        (None, Some(layer)) => Err(Error::failed(format!(
            "config.json: sliding_window must be a positive number, found nothing, and layer {layer} sees only a window"
        ))),
        (window, _) => Ok(window),
    }
}

/// Which layers have experts: `mlp_layer_types`, or else what the family's rule says.
///
/// Fails for a list of another length than there are layers, and for what is neither `dense` nor `sparse`.
pub fn with_experts(config: &Config<'_>, layers: usize, rule: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    by_type(config, "mlp_layer_types", [&["dense"], &["sparse"]], layers, rule)
}

/// Which layers see only a window: `layer_types`, or else what the family's rule says.
pub fn sliding(config: &Config<'_>, layers: usize, rule: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let kinds: [&[&str]; 2] = [&["full_attention"], &["sliding_attention", "chunked_attention"]];
    by_type(config, "layer_types", kinds, layers, rule)
}

/// Which layers are of the second of two kinds, by the list under `key` that names the kind of each, or else by a rule.
pub fn by_type(
    config: &Config<'_>,
    key: &str,
    [first, second]: [&[&str]; 2],
    layers: usize,
    rule: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let Some(types) = config.list(key)? else { return Ok((0..layers).map(rule).collect()) };
    if types.len() != layers {
        return Err(Error::failed(format!(
            "config.json: {key} has {} entries, and there are {layers} layers",
            types.len()
        )));
    }
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some(kind) if first.contains(&kind) => Ok(false),
            Some(kind) if second.contains(&kind) => Ok(true),
            _ => Err(Error::failed(format!("config.json: layer type {kind} is not supported"))),
        })
        .collect()
}
