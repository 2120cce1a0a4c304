//! DeepSeek V2 and V3: latent attention, shared and routed experts, experts chosen by groups.

use kernels::{Activation, RopeLayout};

use super::build::{Base, activation};
use super::moe::router;
use super::rope::{rope, warmth};
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{
    Attention, Graph, Groups, Latent, Layer, Linear, Moe, Norm, Projections, RopeScaling, Scoring, Split,
};

/// DeepSeek V2 and V2-Lite.
pub const DEEPSEEK_V2: Family =
    Family { id: "deepseek_v2", model_types: &["deepseek_v2"], build: |config| build(config, false) };

/// DeepSeek V3 and R1, Kimi K2.
pub const DEEPSEEK_V3: Family =
    Family { id: "deepseek_v3", model_types: &["deepseek_v3", "kimi_k2"], build: |config| build(config, true) };

fn build(config: &Config<'_>, third: bool) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.kv_heads = base.heads;
    let [nope, rotated, value] =
        [config.count("qk_nope_head_dim")?, config.count("qk_rope_head_dim")?, config.count("v_head_dim")?];
    base.head_dim = nope + rotated;
    let latent = config.count("kv_lora_rank")?;
    let q_latent = config.optional_count("q_lora_rank")?;
    let bias = config.flag("attention_bias", false)?;
    // Transformers reads it for V2 alone, and for no routed expert.
    let mlp_bias = !third && config.flag("mlp_bias", false)?;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let rope = rope(config, rotated)?;
    let mut scale = ((nope + rotated) as f32).powf(-0.5);
    if let RopeScaling::Yarn { factor, mscale_all_dim, .. } = rope.scaling
        && mscale_all_dim != 0.0
    {
        scale *= (warmth(factor.into(), mscale_all_dim.into()) as f32).powi(2);
    }
    let experts = config.optional_count("n_routed_experts")?;
    let dense = config.count_or("first_k_dense_replace", 0)?;
    // Runtimes read it for V3 alone.
    let interleaved = !third || config.flag("rope_interleave", true)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        // Latents are normed with an epsilon of their own.
        let norm = |name: &str, width| Norm { eps: 1e-6, ..base.norm_of(&format!("{module}.{name}"), width) };
        let linear = |name: &str, rows, cols, bias| Linear::plain(format!("{module}.{name}"), rows, cols, bias);
        let (heads, hidden) = (base.heads, base.hidden);
        let wide = heads * (nope + rotated);
        let q = match q_latent {
            None => vec![linear("q_proj", wide, hidden, false)],
            Some(width) => {
                vec![linear("q_a_proj", width, hidden, bias), linear("q_b_proj", wide, width, false)]
            }
        };
        let kv_a = Linear {
            split: Split::of(&[latent, rotated]),
            ..linear("kv_a_proj_with_mqa", latent + rotated, hidden, bias)
        };
        let kv_b = Linear {
            split: Split { times: heads, lengths: vec![nope, value] },
            ..linear("kv_b_proj", heads * (nope + value), latent, false)
        };
        let o = linear("o_proj", hidden, heads * value, bias);
        let mut attention = Attention {
            projections: Projections::Latent(Box::new(Latent {
                q,
                q_norm: q_latent.map(|width| norm("q_a_layernorm", width)),
                kv_a,
                kv_norm: norm("kv_a_layernorm", latent),
                kv_b,
            })),
            layout: RopeLayout { head_dim: nope + rotated, first: nope, interleaved },
            ..base.attention_of(Vec::new(), o, Some(rope.clone()))
        };
        attention.shape.value_dim = value;
        attention.shape.scale = scale;
        let module = format!("{at}.mlp");
        let feed_forward = match experts.filter(|_| layer >= dense) {
            None => Layer::Mlp(base.gated(&module, inner, act, mlp_bias)),
            Some(experts) => {
                let mut moe = moe(&base, config, &module, experts, act, third, third)?;
                if let Some((shared, _)) = &mut moe.shared {
                    shared.inputs.iter_mut().chain([&mut shared.down]).for_each(|linear| linear.bias = mlp_bias);
                }
                Layer::Moe(moe)
            }
        };
        Ok(base.usual_block(at, attention, feed_forward))
    })?;
    let mut graph = base.graph(config, if third { "deepseek_v3" } else { "deepseek_v2" }, blocks)?;
    for layer in 0..config.count_or("num_nextn_predict_layers", 0)? {
        graph.aside.push((format!("{}.", base.at(base.layers + layer)), super::FURTHER));
    }
    Ok(graph)
}

/// DeepSeek's experts: those of V3 are chosen by sigmoids (`third`); `normed` says whether weights are divided by their sum
/// where config.json does not.
pub fn moe(
    base: &Base,
    config: &Config<'_>,
    module: &str,
    experts: usize,
    act: Activation,
    third: bool,
    normed: bool,
) -> Result<Moe> {
    let inner = config.count("moe_intermediate_size")?;
    let renormalize = config.flag("norm_topk_prob", normed)?;
    let mut router = router(base, format!("{module}.gate"), experts, config.count("num_experts_per_tok")?, renormalize);
    router.scale = config.number("routed_scaling_factor", 1.0)? as f32;
    let grouped = match third {
        true => {
            router.scoring = Scoring::Sigmoid;
            router.correction = Some((format!("{module}.gate.e_score_correction_bias"), vec![experts]));
            Some(2)
        }
        false => match config.get("topk_method").and_then(|v| v.as_str()).unwrap_or("greedy") {
            "greedy" => None,
            "group_limited_greedy" => Some(1),
            other => return Err(Error::failed(format!("config.json: topk_method `{other}` is not supported"))),
        },
    };
    router.groups = match grouped {
        None => None,
        Some(ranked_by) => {
            let count = config.optional_count("n_group")?.unwrap_or(1);
            if !experts.is_multiple_of(count) {
                return Err(Error::failed(format!("config.json: {experts} experts do not divide into {count} groups")));
            }
            let kept = config.optional_count("topk_group")?.unwrap_or(1);
            // Which of the others are taken then is left to the order in which a runtime sorts equal numbers.
            if experts / count * kept < router.top_k {
                return Err(Error::failed(format!(
                    "config.json: topk_group {kept} of {count} groups of {} experts hold fewer than the {} of \
                     num_experts_per_tok",
                    experts / count,
                    router.top_k
                )));
            }
            Some(Groups { count, kept, ranked_by })
        }
    };
    let shared = config.optional_count("n_shared_experts")?;
    let shared = shared.map(|n| (base.gated(&format!("{module}.shared_experts"), n * inner, act, false), None));
    let experts = (0..experts).map(|e| base.gated(&format!("{module}.experts.{e}"), inner, act, false)).collect();
    Ok(Moe { router, experts, shared, weigh_input: false })
}
