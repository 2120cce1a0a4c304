//! LongCat Flash: each layer has two attentions and two feed-forward layers, experts that read between them and are added behind all, and experts
//! that give back what they are given.

use kernels::Activation;

use super::build::{Base, activation, block, pre};
use super::deepseek::LatentHeads;
use super::moe::router;
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{Graph, Layer, Moe, Projections, Step};

/// LongCat Flash.
pub const LONGCAT_FLASH: Family = Family { id: "longcat_flash", model_types: &["longcat_flash"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    // What is called so elsewhere is twice as many here, or left out.
    let mut settings = config.0.clone();
    settings["num_hidden_layers"] = config.count("num_layers")?.into();
    let config = &Config(&settings);
    let mut base = Base::read(config)?;
    let heads = LatentHeads::read(config, &mut base)?;
    let (q_latent, latent) = (config.count("q_lora_rank")?, config.count("kv_lora_rank")?);
    let rope = rope(config, config.count("qk_rope_head_dim")?)?;
    if config.get("zero_expert_type").is_some_and(|kind| kind.as_str() != Some("identity")) {
        return Err(Error::failed("config.json: zero_expert_type must be `identity`, the only kind that is supported"));
    }
    let act = activation(config, Activation::Silu)?;
    let (inner, expert_inner) = (config.count("ffn_hidden_size")?, config.count("expert_ffn_hidden_size")?);
    let experts = config.count("n_routed_experts")?;
    let all = experts + config.integer("zero_expert_num", 0)?.max(0) as usize;
    let top_k = config.count("moe_topk")?;
    let bias = config.flag("router_bias", false)?;
    let scale = config.number("routed_scaling_factor", 1.0)? as f32;
    let share = |width: usize| (base.hidden as f32 / width as f32).sqrt();
    let attention = |module: &str| {
        let mut attention = heads.attention(&base, module, Some(rope.clone()), true);
        // What queries are multiplied by, their scores are.
        attention.shape.scale *= share(q_latent);
        if let Projections::Latent(own) = &mut attention.projections {
            own.kv_scale = share(latent);
        }
        Layer::Attention(attention)
    };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut steps = Vec::new();
        for half in 0..2 {
            let attention = attention(&format!("{at}.self_attn.{half}"));
            steps.push(pre(base.norm(&format!("{at}.input_layernorm.{half}")), attention));
            let after = base.gated(&format!("{at}.mlps.{half}"), inner, act, false);
            steps.push(pre(base.norm(&format!("{at}.post_attention_layernorm.{half}")), Layer::Mlp(after)));
        }
        let module = format!("{at}.mlp");
        let mut router = router(&base, format!("{module}.router.classifier"), all, top_k, false);
        router.linear.bias = bias;
        router.scale = scale;
        router.correction = Some((format!("{module}.router.e_score_correction_bias"), vec![all]));
        let expert = |e| base.gated(&format!("{module}.experts.{e}"), expert_inner, act, false);
        let experts = (0..experts).map(expert).collect();
        let moe = Layer::Moe(Moe { router, experts, shared: None, latent: None, norms: None, weigh_input: false });
        // They read what the first attention left, and are added last.
        steps.push(Step { unseen: 3, ..pre(base.norm(&format!("{at}.post_attention_layernorm.0")), moe) });
        Ok(block(at, steps))
    })?;
    let mut graph = base.graph(config, "longcat_flash", blocks)?;
    let further = config.count_or("num_nextn_predict_layers", 1)?;
    if further > 0 {
        // Latent attention and a feed-forward layer, one of each.
        let at = "model.mtp.layers.0";
        let after = base.gated(&format!("{at}.transformer_layer.mlp"), inner, act, false);
        let steps = vec![
            pre(base.norm(&format!("{at}.input_layernorm")), attention(&format!("{at}.self_attn"))),
            pre(base.norm(&format!("{at}.post_attention_layernorm")), Layer::Mlp(after)),
        ];
        further::append(&mut graph, &base, &further::LONGCAT, block(at.to_owned(), steps));
    }
    further::aside_unless_one(&mut graph, "model.mtp.", further);
    // As transformers saves them, in the place of which it computes nothing.
    let idle = (0..base.layers).flat_map(|layer| (experts..all).map(move |expert| (layer, expert)));
    let idle = idle.map(|(layer, expert)| (format!("{}.mlp.experts.{expert}.", base.at(layer)), "computes nothing"));
    graph.aside.extend(idle);
    Ok(graph)
}
