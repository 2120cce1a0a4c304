//! OLMo 1 (norms without weights), 2 and 3 (norms behind the layers, and of whole queries and keys), and FlexOlmo (OLMo 2 with experts).

use kernels::{Activation, NormKind};

use super::build::{Base, activation, block, pre, sliding, window_of};
use super::moe::router;
use super::rope::{of_kind, rope};
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, HeadNorms, Layer, Moe};

/// OLMo 1.
pub const OLMO: Family = Family { id: "olmo", model_types: &["olmo"], build: olmo };

/// OLMo 2.
pub const OLMO2: Family = Family { id: "olmo2", model_types: &["olmo2"], build: |config| later(config, "olmo2") };

/// OLMo 3.
pub const OLMO3: Family = Family { id: "olmo3", model_types: &["olmo3"], build: |config| later(config, "olmo3") };

/// FlexOlmo.
pub const FLEX_OLMO: Family =
    Family { id: "flex_olmo", model_types: &["flex_olmo"], build: |config| later(config, "flex_olmo") };

fn olmo(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm = NormKind::Layer;
    base.eps = 1e-5;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let clip = config.get("clip_qkv").map(|_| config.number("clip_qkv", 0.0)).transpose()?.map(|x| x as f32);
    let rope = rope(config, base.head_dim)?;
    let mut norm = base.norm("");
    norm.weights.clear();
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention = base.attention(&format!("{at}.self_attn"), [bias, bias], Some(rope.clone()));
        attention.clip = clip;
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, false);
        Ok(block(at, vec![pre(norm.clone(), Layer::Attention(attention)), pre(norm.clone(), Layer::Mlp(mlp))]))
    })?;
    let mut graph = base.graph(config, "olmo", blocks)?;
    graph.final_norm = norm;
    Ok(graph)
}

/// Norms of all queries together, and of all keys.
pub fn whole_norms(base: &Base, module: &str) -> HeadNorms {
    let norm = |name: &str, heads: usize| base.norm_of(&format!("{module}.{name}"), heads * base.head_dim);
    HeadNorms { q: norm("q_norm", base.heads), k: norm("k_norm", base.kv_heads), per_head: false, after_rope: false }
}

fn later(config: &Config<'_>, family: &'static str) -> Result<Graph> {
    let mut base = Base::read(config)?;
    let sparse = family == "flex_olmo";
    base.eps = config.positive("rms_norm_eps", if sparse { 1e-6 } else { 1e-5 })? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let third = family == "olmo3";
    let local = match third {
        true => sliding(config, base.layers, |layer| (layer + 1) % 4 != 0)?,
        false => vec![false; base.layers],
    };
    let window = window_of(config, &local)?;
    let of = |kind: &str| match third {
        true => of_kind(config, kind, base.head_dim),
        false => rope(config, base.head_dim),
    };
    let (wide, near) = (of("full_attention")?, of("sliding_attention")?);
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let rope = if local[layer] { &near } else { &wide };
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        attention.shape.window = window.filter(|_| local[layer]);
        attention.norms = Some(whole_norms(&base, &module));
        let module = format!("{at}.mlp");
        let feed_forward = match sparse {
            false => Layer::Mlp(base.gated(&module, inner, act, false)),
            true => {
                let (experts, top_k) = (config.count("num_experts")?, config.count("num_experts_per_tok")?);
                let renormalize = config.flag("norm_topk_prob", false)?;
                let router = router(&base, format!("{module}.gate"), experts, top_k, renormalize);
                let expert = |e| base.gated(&format!("{module}.experts.{e}"), inner, act, false);
                let experts = (0..experts).map(expert).collect();
                Layer::Moe(Moe { router, experts, shared: None, weigh_input: false, latent: None })
            }
        };
        Ok(base.post_block(at, attention, feed_forward))
    })?;
    base.graph(config, family, blocks)
}
