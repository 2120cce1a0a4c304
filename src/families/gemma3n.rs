//! Gemma 3n (text): several streams of which blocks work on one, a residual of low rank beside attention, gates that let few values through,
//! and, as in Gemma 4, rows of a table for the tokens and layers that read the keys and values of earlier ones.

use kernels::Activation;

use super::build::{Base, activation_of, block, post, sandwich, sliding, window_of};
use super::gemma4::{keys, per_layer, share, unit, unused};
use super::rope::of_kind;
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{AltUp, Graph, HeadNorms, Laurel, Layer, Linear};
use crate::json::real;

/// Gemma 3n, the text model.
pub const GEMMA3N: Family = Family { id: "gemma3n", model_types: &["gemma3n_text"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let base = Base { tied: true, ..Base::read(config)? };
    let act = activation_of(config, "hidden_activation", Activation::GeluTanh)?;
    let local = sliding(config, base.layers, |layer| (layer + 1) % 5 != 0)?;
    let window = window_of(config, &local)?;
    let keys = keys(config, &local)?;
    let inner = widths(config, base.layers)?;
    let cuts = cuts(config, base.layers)?;
    let bias = config.flag("attention_bias", false)?;
    let ropes = [true, false].map(|near| {
        let kind = if near { "sliding_attention" } else { "full_attention" };
        of_kind(config, kind, base.head_dim)
    });
    let [near, full] = ropes;
    let (near, full) = (near?, full?);
    let streams = Alternating::of(config)?;
    let (width, rows) = (config.count("hidden_size_per_layer_input")?, config.count("vocab_size_per_layer_input")?);
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let rope = if local[layer] { &near } else { &full };
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        attention.shape.scale = 1.0;
        attention.shape.window = window.filter(|_| local[layer]);
        attention.norms = Some(HeadNorms { v: Some(unit(&base, base.head_dim)), ..base.head_norms(&module) });
        share(&mut attention, keys[layer], false);
        let mut mlp = base.gated(&format!("{at}.mlp"), inner[layer], act, false);
        mlp.cut = cuts[layer];
        let norm = |name: &str| base.norm(&format!("{at}.{name}"));
        let per_layer = per_layer(&base, layer, act, width, rows);
        let steps = vec![
            sandwich(norm("input_layernorm"), Layer::Attention(attention), norm("post_attention_layernorm")),
            sandwich(norm("pre_feedforward_layernorm"), Layer::Mlp(mlp), norm("post_feedforward_layernorm")),
            post(Layer::PerLayer(Box::new(per_layer)), norm("post_per_layer_input_norm")),
        ];
        let mut block = block(at.clone(), steps);
        block.altup = Some(Box::new(streams.block(&base, layer)));
        Ok(block)
    })?;
    let mut graph = base.graph(config, "gemma3n", blocks)?;
    graph.embedding.scale = (graph.hidden as f32).sqrt();
    graph.head.softcap = Some(config.positive("final_logit_softcapping", 30.0)? as f32);
    graph.dropped.extend(unused(&base, &keys));
    if !streams.scales {
        let idle = |layer| (format!("{}.altup.correct_output_scale", base.at(layer)), "a scale that is switched off");
        graph.aside.extend((0..base.layers).map(idle));
    }
    Ok(graph)
}

/// The width of each feed-forward layer: one for all, or a list.
fn widths(config: &Config<'_>, layers: usize) -> Result<Vec<usize>> {
    match config.get("intermediate_size") {
        Some(list) if list.is_array() => config.counts("intermediate_size", layers),
        _ => Ok(vec![config.count("intermediate_size")?; layers]),
    }
}

/// By how many standard deviations a value of each layer's gate has to be above their mean; `activation_sparsity_pattern` says which share is not.
fn cuts(config: &Config<'_>, layers: usize) -> Result<Vec<Option<f32>>> {
    const USUAL: f64 = 0.95;
    let Some(shares) = config.list("activation_sparsity_pattern")? else {
        let sparse = if layers > 10 { 10 } else { 0 };
        return Ok((0..layers).map(|layer| (layer < sparse).then(|| quantile(USUAL))).collect());
    };
    let number = |share| real(share).filter(|share| (0.0..1.0).contains(share));
    let shares: Option<Vec<f64>> = shares.iter().map(number).collect();
    match shares.filter(|shares| shares.len() == layers) {
        Some(shares) => Ok(shares.into_iter().map(|share| (share > 0.0).then(|| quantile(share))).collect()),
        None => Err(Error::failed(format!(
            "config.json: activation_sparsity_pattern must be a share from 0 to less than 1 for each of {layers} layers"
        ))),
    }
}

/// How many standard deviations above its mean a share of a normal distribution ends, by Newton's method on a series for the distribution.
fn quantile(share: f64) -> f32 {
    let density = |z: f64| (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
    // φ(z) (z + z³/3 + z⁵/(3·5) + …)
    let below = |z: f64| {
        let (mut term, mut sum) = (z, z);
        for odd in 1..400 {
            term *= z * z / f64::from(2 * odd + 1);
            sum += term;
        }
        0.5 + density(z) * sum
    };
    let mut z = 0.0;
    for _ in 0..60 {
        // Beyond this no share can be told from all in double precision.
        z = (z - (below(z) - share) / density(z)).clamp(-8.0, 8.0);
    }
    z as f32
}

/// The streams of a model.
struct Alternating {
    count: usize,
    active: usize,
    rank: usize,
    /// Whether the active stream is multiplied by a tensor before it meets rows of a table.
    scales: bool,
}

impl Alternating {
    fn of(config: &Config<'_>) -> Result<Alternating> {
        let count = config.count("altup_num_inputs")?;
        let active = config.count_or("altup_active_idx", 0)?;
        if active >= count || count > 64 {
            return Err(Error::failed(format!(
                "config.json: altup_active_idx is {active} and altup_num_inputs {count}: the first must be less than the second, and that 64 at most"
            )));
        }
        Ok(Alternating {
            count,
            active,
            rank: config.count("laurel_rank")?,
            scales: config.flag("altup_correct_scale", true)?,
        })
    }

    fn block(&self, base: &Base, layer: usize) -> AltUp {
        let Alternating { count, active, rank, scales } = *self;
        let (at, hidden) = (base.at(layer), base.hidden);
        let linear = |name: &str, rows, cols| Linear::plain(format!("{at}.{name}"), rows, cols, false);
        let ends = |name: &str, here: bool| {
            let others = if here { count - 1 } else { 0 };
            (0..others).map(|other| Linear::plain(format!("model.{name}.{other}"), hidden, hidden, false)).collect()
        };
        AltUp {
            count,
            active,
            norm: base.norm(&format!("{at}.altup.router_norm")),
            given: 1.0 / hidden as f32,
            router: linear("altup.modality_router", count, hidden),
            predict: linear("altup.prediction_coefs", count * count, count),
            correct: linear("altup.correction_coefs", count, count),
            scale: scales.then(|| (format!("{at}.altup.correct_output_scale"), vec![hidden])),
            laurel: Laurel {
                left: linear("laurel.linear_left", rank, hidden),
                right: linear("laurel.linear_right", hidden, rank),
                norm: base.norm(&format!("{at}.laurel.post_laurel_norm")),
                share: 0.5f32.sqrt(),
            },
            widen: ends("altup_projections", layer == 0),
            narrow: ends("altup_unembed_projections", layer + 1 == base.layers),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::quantile;

    #[test]
    fn what_cannot_be_is_refused_with_the_key() {
        let with = |key: &str, value: Value| {
            let mut config = json!({
                "model_type": "gemma3n_text", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "num_kv_shared_layers": 0,
            });
            config[key] = value;
            crate::families::build(&config).map(|graph| graph.width())
        };
        assert_eq!(with("altup_num_inputs", json!(3)).unwrap(), 3 * 16);
        for (key, value, said) in [
            ("activation_sparsity_pattern", json!([0.5, 0.0]), "for each of 5 layers"),
            ("activation_sparsity_pattern", json!([0.5, 0.0, 1.0, 0.0, 0.0]), "from 0 to less than 1"),
            ("altup_active_idx", json!(4), "altup_active_idx is 4 and altup_num_inputs 4"),
            ("altup_num_inputs", json!(100), "64 at most"),
            ("intermediate_size", json!([32, 32]), "each of 5 layers"),
            ("num_kv_shared_layers", json!(5), "no layer of its type"),
        ] {
            let told = with(key, value).unwrap_err().to_string();
            assert!(told.contains(key) && told.contains(said), "{key}: {told}");
        }
    }

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        // As scipy.stats.norm.ppf has them.
        for (share, expected) in
            [(0.95, 1.644_853_6), (0.5, 0.0), (0.1, -1.281_551_6), (0.999, 3.090_232_3), (1e-6, -4.753_424)]
        {
            assert!((quantile(share) - expected).abs() < 1e-5, "{share}: {}", quantile(share));
        }
    }
}
