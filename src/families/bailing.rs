//! Ling 3.0 (`bailing_hybrid`): most layers have a state whose channels decay each by itself (Kimi Delta Attention), the others DeepSeek's latent
//! attention with a gate for each head; experts are chosen as DeepSeek's are.

use kernels::Activation;

use super::build::{Base, activation, by_type, pre, with_experts};
use super::deepseek::{Chosen, LatentHeads, moe, warmed};
use super::kimi::{by_channel, in_words_of_deepseek};
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{Decay, DeltaNet, Graph, Layer, Linear};

/// Ling 3.0.
pub const BAILING_HYBRID: Family = Family { id: "bailing_hybrid", model_types: &["bailing_hybrid"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut settings = in_words_of_deepseek(config.0);
    // Its queries go through no latent, whatever config.json says.
    settings.as_object_mut().map(|settings| settings.remove("q_lora_rank"));
    let config = &Config(&settings);
    let mut base = Base { embedding: "model.word_embeddings", ..Base::read(config)? };
    let width = config.optional_count("linear_head_dim")?.unwrap_or(base.head_dim);
    let heads = LatentHeads::read(config, &mut base)?;
    let act = activation(config, Activation::Silu)?;
    let rope = rope(config, config.count("qk_rope_head_dim")?)?;
    let scale = warmed(base.head_dim, &rope);
    let every = config.count("layer_group_size")?;
    let kinds: [&[&str]; 2] = [&["full_attention"], &["linear_attention"]];
    let recurrent = by_type(config, "layer_types", kinds, base.layers, |layer| !(layer + 1).is_multiple_of(every))?;
    let dense = config.count_or("first_k_dense_replace", 2)?;
    let sparse = with_experts(config, base.layers, |layer| layer >= dense)?;
    let block = |at: String, recurrent: bool, sparse: bool| {
        let module = format!("{at}.attention");
        let attention = match recurrent {
            true => Layer::Delta(Box::new(delta(config, &base, &module, width, act)?)),
            false => {
                let mut attention = heads.attention(&base, &module, Some(rope.clone()), true);
                attention.shape.scale = scale;
                attention.o.module = format!("{module}.dense");
                attention.head_gate = Some(Linear::plain(format!("{module}.g_proj"), base.heads, base.hidden, false));
                Layer::Attention(attention)
            }
        };
        let module = format!("{at}.mlp");
        let after = match sparse {
            false => Layer::Mlp(base.gated(&module, config.count("intermediate_size")?, act, false)),
            true => {
                let experts = config.count("num_experts")?;
                let mut moe = moe(&base, config, &module, experts, act, Chosen::Sigmoid, true)?;
                moe.router.correction = Some((format!("{module}.gate.expert_bias"), vec![experts]));
                Layer::Moe(moe)
            }
        };
        let steps = vec![
            pre(base.norm(&format!("{at}.input_layernorm")), attention),
            pre(base.norm(&format!("{at}.post_attention_layernorm")), after),
        ];
        Ok(super::build::block(at, steps))
    };
    let blocks = base.each(|layer| block(base.at(layer), recurrent[layer], sparse[layer]))?;
    let mut graph = base.graph(config, "bailing_hybrid", blocks)?;
    for layer in base.layers..base.layers + config.count_or("num_nextn_predict_layers", 0)? {
        further::append(&mut graph, &base, &further::HUNYUAN, block(base.at(layer), false, true)?);
    }
    Ok(graph)
}

/// A layer with a state under `module`, of heads of `dim` values.
///
/// Fails where decays would be no decays: for a bound that is not negative.
fn delta(config: &Config<'_>, base: &Base, module: &str, dim: usize, act: Activation) -> Result<DeltaNet> {
    let heads = config.optional_count("linear_num_heads")?.unwrap_or(base.heads);
    let taps = match config.optional_count("linear_conv_kernel_dim")? {
        Some(taps) => taps,
        None => config.count("short_conv_kernel_size")?,
    };
    let bound = match config.flag("kda_safe_gate", true)? {
        false => None,
        true => Some(config.number("kda_lower_bound", -5.0)? as f32),
    };
    if bound.is_some_and(|bound| bound.is_nan() || bound >= 0.0) {
        return Err(Error::failed(format!(
            "config.json: kda_lower_bound must be less than 0, found {}",
            bound.unwrap_or_default()
        )));
    }
    let width = heads * dim;
    let linear = |name: &str, rows, cols| Linear::plain(format!("{module}.{name}"), rows, cols, false);
    let usual = by_channel(base, module, [heads, dim, taps], act);
    Ok(DeltaNet {
        inputs: ["q_proj", "k_proj", "v_proj", "g_proj"].map(|name| linear(name, width, base.hidden)).to_vec(),
        rates: vec![linear("b_proj", heads, base.hidden), linear("f_proj", width, base.hidden)],
        narrow: None,
        decay: Decay { rates: (format!("{module}.A_log"), vec![heads]), lower: bound, ..usual.decay },
        out: linear("dense", base.hidden, width),
        ..usual
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn queries_go_through_no_latent_whatever_is_said() {
        let of = |rank: Option<usize>| {
            let config = json!({
                "model_type": "bailing_hybrid", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                "first_k_dense_replace": 1, "layer_group_size": 1, "num_nextn_predict_layers": 0, "q_lora_rank": rank,
            });
            format!("{:?}", crate::families::build(&config).unwrap().tensors())
        };
        assert!(of(None).contains("attention.q_proj"));
        assert_eq!(of(Some(8)), of(None));
    }

    #[test]
    fn decays_are_bounded_from_below_0() {
        let with = |bound: f64| {
            let config = json!({
                "model_type": "bailing_hybrid", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                "kda_lower_bound": bound,
            });
            crate::families::build(&config).map(|_| ())
        };
        with(-5.0).unwrap();
        for bound in [0.0, 2.5] {
            let told = with(bound).unwrap_err().to_string();
            assert!(
                told.contains("kda_lower_bound must be less than 0") && told.contains(&bound.to_string()),
                "{told}"
            );
        }
    }
}
