//! Apertus: no gate, and an activation whose curve each layer has learned.

use kernels::Activation;

use super::build::{Base, activation, block, pre};
use super::rope::rope;
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{Graph, Layer, Mlp};
use crate::weights::Weights;

/// Apertus.
pub const APERTUS: Family = Family { id: "apertus", model_types: &["apertus"], build };

/// What the activation's tensors are called below its module, and their shapes: the factors above and below 0, the slope at 0 and the
/// largest exponent.
const NUMBERS: [(&str, &[usize]); 4] = [("alpha_p", &[1]), ("alpha_n", &[1]), ("beta", &[]), ("eps", &[])];

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let learned = config.get("hidden_act").is_none_or(|name| name == "xielu");
    // As the class begins; what a checkpoint holds is in `settle`.
    let act = match learned {
        true => curve([0.8f64.exp_m1().ln(), 0.3f64.exp_m1().ln(), 0.5, -1e-6]),
        false => activation(config, Activation::Silu)?,
    };
    let bias = config.flag("attention_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        attention.norms = Some(base.head_norms(&module));
        let names = ["up_proj", "down_proj"].map(|name| format!("{at}.mlp.{name}"));
        let mut mlp = base.ungated(names, inner, act, false);
        if learned {
            mlp.learned =
                Some(Box::new(NUMBERS.map(|(name, shape)| (format!("{at}.mlp.act_fn.{name}"), shape.to_vec()))));
        }
        let norm = |name: &str| base.norm(&format!("{at}.{name}"));
        let steps = vec![
            pre(norm("attention_layernorm"), Layer::Attention(attention)),
            pre(norm("feedforward_layernorm"), Layer::Mlp(mlp)),
        ];
        Ok(block(at, steps))
    })?;
    base.graph(config, "apertus", blocks)
}

/// The activation that these numbers stand for, in the order of [`NUMBERS`].
fn curve([above, below, beta, eps]: [f64; 4]) -> Activation {
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let [positive, negative, beta, eps] = [softplus(above), beta + softplus(below), beta, eps].map(|x| x as f32);
    Activation::Xielu { positive, negative, beta, eps }
}

/// Gives layers the activations whose numbers stand in the checkpoint, as far as they are there.
///
/// Fails for numbers that are not stored as numbers, or are not finite.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) -> Result<()> {
    for step in graph.blocks.iter_mut().flat_map(|block| &mut block.steps) {
        let Layer::Mlp(Mlp { activation, learned, .. }) = &mut step.layer else { continue };
        let mut numbers = Vec::new();
        for (name, _) in learned.iter().flat_map(|learned| learned.iter()) {
            let Some(view) = source.raw(name) else { continue };
            let values = view
                .to_f32()
                .map_err(|error| Error::failed(format!("{}: {name}: {error}", source.path().display())))?;
            match values[..] {
                [number] if number.is_finite() => numbers.push(f64::from(number)),
                _ => {
                    return Err(Error::failed(format!(
                        "{}: {name} has to be a single finite number, as that of an activation is, found {values:?}",
                        source.path().display()
                    )));
                }
            }
        }
        if let [above, below, beta, eps] = numbers[..] {
            *activation = curve([above, below, beta, eps]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_made_positive_as_they_were_in_training() {
        let Activation::Xielu { positive, negative, beta, eps } = curve([0.0, -2.0, 0.5, -1e-6]) else {
            panic!("the function with numbers")
        };
        let found = [positive, negative, beta, eps];
        // ln 2, and a half and ln (1 + e^-2).
        let expected = [std::f32::consts::LN_2, 0.626_928, 0.5, -1e-6];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()), "{found:?}");
        // Where the exponential would overflow it is the number itself.
        let Activation::Xielu { positive, .. } = curve([800.0, 0.0, 0.5, 0.0]) else { panic!() };
        assert_eq!(positive, 800.0);
    }
}
