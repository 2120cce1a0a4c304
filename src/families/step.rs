//! Step 3.5 and 3.7 Flash, the text model: layers with a window have more heads, each head of attention has a gate, experts are chosen by sigmoids, and
//! what is gated in a layer is limited.

use kernels::Activation;
use serde_json::Value;

use super::build::{Base, sliding, window_of, with_experts};
use super::moe::router;
use super::rope::of_kind;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{FURTHER, Graph, Layer, Linear, Mlp, Moe, Scoring, Split, Stored};
use crate::json::{integer, real};

/// Step 3.5 Flash, and the language model of Step 3.7 Flash.
pub const STEP3P5: Family = Family { id: "step3p5", model_types: &["step3p5"], build };

/// Lists of what is said of each layer, which may also say it of those that predict further tokens.
const LISTS: [&str; 4] = ["layer_types", "mlp_layer_types", "swiglu_limits", "swiglu_limits_shared"];

fn build(config: &Config<'_>) -> Result<Graph> {
    let base = Base { norm_offset: 1.0, ..Base::read(config)? };
    let further = config.count_or("num_nextn_predict_layers", 0)?;
    let (own, all) = of_all_layers(config.0, base.layers, further);
    told_of_all(&own, base.layers, further, all)?;
    let config = &Config(&own);
    let local = sliding(config, all, |_| false)?;
    let window = window_of(config, &local)?;
    let chosen = experts_in(config)?;
    let sparse = with_experts(config, all, |layer| match &chosen {
        Some(layers) => layers.contains(&layer),
        None => (3..base.layers).contains(&layer),
    })?;
    let heads = heads(config, &base, &local)?;
    let [limits, shared_limits] = ["swiglu_limits", "swiglu_limits_shared"].map(|key| limits(config, key, all));
    let (limits, shared_limits) = (limits?, shared_limits?);
    let bias = config.flag("attention_bias", false)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    let scale = (config.positive("query_pre_attn_scalar", base.head_dim as f64)? as f32).powf(-0.5);
    let mut ropes = Vec::new();
    for near in [true, false] {
        let kind = if near { "sliding_attention" } else { "full_attention" };
        ropes.push(match local.contains(&near) {
            true => Some(of_kind(config, kind, base.head_dim)?),
            false => None,
        });
    }
    let block = |layer: usize| {
        let at = base.at(layer);
        let own = Base { heads: heads[layer], ..base.clone() };
        let module = format!("{at}.self_attn");
        let rope = ropes[usize::from(!local[layer])].clone();
        let mut attention = own.attention(&module, [bias, bias], rope);
        attention.shape.scale = scale;
        attention.shape.window = window.filter(|_| local[layer]);
        attention.norms = Some(own.head_norms(&module));
        attention.head_gate = Some(Linear::plain(format!("{module}.g_proj"), own.heads, own.hidden, false));
        let within = within(shared_limits[layer]);
        let feed_forward = match sparse[layer] {
            false => Layer::Mlp(base.gated(&format!("{at}.mlp"), config.count("intermediate_size")?, within, mlp_bias)),
            true => {
                let inner = config.count("share_expert_dim")?;
                let shared = base.gated(&format!("{at}.share_expert"), inner, within, mlp_bias);
                Layer::Moe(mixture(&base, config, &format!("{at}.moe"), limits[layer], shared)?)
            }
        };
        Ok(base.usual_block(at, attention, feed_forward))
    };
    let mut graph = base.graph(config, "step3p5", base.each(block)?)?;
    for layer in base.layers..all {
        further::append(&mut graph, &base, &further::STEP, block(layer)?);
    }
    // Of others it is not told what they see.
    let untold = if all > base.layers { 0 } else { further };
    graph.aside.extend((0..untold).map(|layer| (format!("{}.", base.at(base.layers + layer)), FURTHER)));
    Ok(graph)
}

/// Settings whose lists tell of so many layers: of the model's own, and of those behind them that predict further tokens, if it is said what
/// these see, in `layer_types` or, as transformers saves it, in `mtp_layer_types`.
fn of_all_layers(settings: &Value, layers: usize, further: usize) -> (Value, usize) {
    let mut own = settings.clone();
    let list = |key: &str| settings.get(key).and_then(Value::as_array);
    for (key, behind) in [("layer_types", "mtp_layer_types"), ("mlp_layer_types", "mtp_mlp_layer_types")] {
        if let (Some(of), Some(more)) = (list(key), list(behind))
            && of.len() == layers
        {
            own[key] = of.iter().chain(more).cloned().collect();
        }
    }
    let told = own["layer_types"].as_array().is_some_and(|types| types.len() == layers + further);
    let all = if told { layers + further } else { layers };
    for key in LISTS {
        let behind = if key == "mlp_layer_types" { "dense".into() } else { Value::Null };
        if let Some(list) = own.get_mut(key).and_then(Value::as_array_mut)
            && [layers, layers + further].contains(&list.len())
        {
            list.resize(all, behind);
        }
    }
    (own, all)
}

/// Fails for lists that tell neither of the model's layers nor of all.
fn told_of_all(own: &Value, layers: usize, further: usize, all: usize) -> Result<()> {
    let mut lists = LISTS[..2].iter().filter_map(|key| Some((key, own[*key].as_array()?.len())));
    let Some((key, found)) = lists.find(|(_, found)| *found != all) else { return Ok(()) };
    Err(Error::failed(format!(
        "config.json: {key} has {found} entries, and num_hidden_layers is {layers} and num_nextn_predict_layers {further}: it must have as many \
         as the first says, or as both together; take the config.json that belongs to the model"
    )))
}

/// Layers with experts, where `moe_layers_enum` names them: a list, or numbers with commas between them.
fn experts_in(config: &Config<'_>) -> Result<Option<Vec<usize>>> {
    let Some(said) = config.get("moe_layers_enum") else { return Ok(None) };
    let layers: Option<Vec<usize>> = match said {
        Value::String(text) => {
            text.split(',').filter(|part| !part.trim().is_empty()).map(|part| part.trim().parse().ok()).collect()
        }
        Value::Array(list) => list.iter().map(|layer| integer(layer).and_then(|layer| layer.try_into().ok())).collect(),
        _ => None,
    };
    match layers {
        Some(layers) => Ok(Some(layers)),
        None => Err(Error::failed(format!(
            "config.json: moe_layers_enum must be numbers of layers with commas between them, found {}",
            crate::json::shown(said)
        ))),
    }
}

/// Heads of queries of each layer: those with a window may have others.
fn heads(config: &Config<'_>, base: &Base, local: &[bool]) -> Result<Vec<usize>> {
    let each = config.object("per_layer_config")?;
    let other = config.object("attention_other_setting")?;
    let near = match config.optional_count("num_sliding_attention_heads")? {
        Some(heads) => heads,
        None => {
            other.map(|other| other.optional_count("num_attention_heads")).transpose()?.flatten().unwrap_or(base.heads)
        }
    };
    let of_layer = |(layer, local): (usize, &bool)| -> Result<usize> {
        let heads = match &each {
            Some(each) if layer < base.layers => {
                let own = each.object(&layer.to_string())?;
                own.map(|own| own.optional_count("num_attention_heads")).transpose()?.flatten().unwrap_or(base.heads)
            }
            _ if *local => near,
            _ => base.heads,
        };
        if !heads.is_multiple_of(base.kv_heads) {
            return Err(Error::failed(format!(
                "config.json: {heads} heads of layer {layer} cannot share {} key and value heads",
                base.kv_heads
            )));
        }
        Ok(heads)
    };
    local.iter().enumerate().map(of_layer).collect()
}

/// What is gated in each layer is limited to this; nothing and 0 are no limit.
fn limits(config: &Config<'_>, key: &str, layers: usize) -> Result<Vec<Option<f32>>> {
    let Some(list) = config.list(key)? else { return Ok(vec![None; layers]) };
    let number = |limit: &Value| match limit {
        Value::Null => Some(None),
        other => real(other).filter(|limit| *limit >= 0.0).map(|limit| (limit > 0.0).then_some(limit as f32)),
    };
    let limits: Option<Vec<Option<f32>>> = list.iter().map(number).collect();
    limits.filter(|limits| limits.len() == layers).ok_or_else(|| {
        Error::failed(format!(
            "config.json: {key} must be a number of at least 0, or null, for each of {layers} layers"
        ))
    })
}

fn within(limit: Option<f32>) -> Activation {
    limit.map_or(Activation::Silu, |limit| Activation::SiluWithin { limit })
}

/// Experts that lie in a stack for each of their linears, beside one that all tokens take.
fn mixture(base: &Base, config: &Config<'_>, module: &str, limit: Option<f32>, shared: Mlp) -> Result<Moe> {
    let (experts, inner) = (config.count("n_routed_experts")?, config.count("moe_intermediate_size")?);
    let mut router = router(base, format!("{module}.gate"), experts, config.count("num_experts_per_tok")?, true);
    router.scoring = Scoring::Sigmoid;
    router.correction = Some((format!("{module}.router_bias"), vec![experts]));
    router.scale = config.number("moe_router_scaling_factor", 1.0)? as f32;
    let expert = |index: usize| {
        let linear = |name: &str, rows, cols| Linear {
            stored: Stored::Slice {
                tensor: format!("{module}.{name}.weight"),
                index,
                of: experts,
                transposed: false,
                bias: None,
                part: (Split::WHOLE, 0),
            },
            ..Linear::plain(format!("{module}.experts.{index}.{name}"), rows, cols, false)
        };
        Mlp {
            inputs: vec![linear("gate_proj", inner, base.hidden), linear("up_proj", inner, base.hidden)],
            down: linear("down_proj", base.hidden, inner),
            activation: within(limit),
            scale: 1.0,
            learned: None,
            cut: None,
        }
    };
    let experts = (0..experts).map(expert).collect();
    Ok(Moe { router, experts, shared: Some((shared, None)), weigh_input: false, latent: None, norms: None })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    #[test]
    fn what_cannot_be_is_refused_with_the_key() {
        let with = |key: &str, value: Value| {
            let mut config = json!({
                "model_type": "step3p5", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_attention_groups": 2, "head_dim": 8, "sliding_window": 8, "num_nextn_predict_layers": 1,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"], "moe_layers_enum": "1", "moe_num_experts": 4,
                "moe_top_k": 2, "rope_theta": [1000.0, 100.0, 1000.0],
            });
            config[key] = value;
            crate::families::build(&config).map(|_| ())
        };
        with("moe_layers_enum", json!([0, 1])).unwrap();
        with("swiglu_limits", json!([null, 0.0, 7])).unwrap();
        for (key, value, said) in [
            ("moe_layers_enum", json!("1,two"), "with commas between them, found"),
            ("swiglu_limits", json!([1.0]), "for each of 3 layers"),
            ("swiglu_limits_shared", json!([1.0, -1.0]), "at least 0"),
            ("rope_theta", json!([1000.0]), "none for layer 1"),
            ("layer_types", json!(["full_attention"]), "num_hidden_layers is 2 and num_nextn_predict_layers 1"),
            ("num_nextn_predict_layers", json!(5), "layer_types has 3 entries, and num_hidden_layers is 2"),
            ("num_nextn_predict_layers", json!(0), "take the config.json that belongs to the model"),
        ] {
            let told = with(key, value).unwrap_err().to_string();
            assert!(told.contains(key) && told.contains(said), "{key}: {told}");
        }
        let told = with("num_sliding_attention_heads", json!(3)).unwrap_err().to_string();
        assert!(told.contains("3 heads of layer 1 cannot share 2"), "{told}");
    }
}
