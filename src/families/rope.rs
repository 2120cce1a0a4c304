//! Rotary frequencies from `rope_parameters`, into which [`super::spelling`] has brought all that config.json says of them.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Config;
use crate::error::{Error, Result};
use crate::graph::{Rope, RopeScaling};
use crate::json::real;

/// The rotation of heads of `head_dim` values.
pub fn rope(config: &Config<'_>, head_dim: usize) -> Result<Arc<Rope>> {
    rotation(config, needed_object(config, "rope_parameters")?, head_dim)
}

/// The rotation in layers of one kind (`full_attention`, `sliding_attention`), where the family tells them apart.
pub fn of_kind(config: &Config<'_>, kind: &str, head_dim: usize) -> Result<Arc<Rope>> {
    rotation(config, needed_object(&needed_object(config, "rope_parameters")?, kind)?, head_dim)
}

/// The rotation that `parameters` alone say, `rope_parameters` in one spelling, in a context of so many tokens.
pub fn of(parameters: &Value, context: &Value, head_dim: usize) -> Result<Arc<Rope>> {
    let config = json!({"max_position_embeddings": context});
    rotation(&Config(&config), Config(parameters), head_dim)
}

/// Whether two settings or factors of a rotation are one but for rounding in single precision.
pub fn near(a: f32, b: f32) -> bool {
    (a - b).abs() <= 1e-5 * a.abs().max(b.abs())
}

/// The same of as many factors each.
pub fn all_near(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| near(*a, *b))
}

fn needed_object<'a>(config: &Config<'a>, key: &str) -> Result<Config<'a>> {
    config.object(key)?.ok_or_else(|| Error::failed(format!("config.json: {key} must be an object, found nothing")))
}

fn rotation(config: &Config<'_>, own: Config<'_>, head_dim: usize) -> Result<Arc<Rope>> {
    let theta = own.positive("rope_theta", 10_000.0)?;
    let partial = own.number("partial_rotary_factor", 1.0)?;
    if own.text("rope_type")? == "proportional" {
        return proportional(&own, theta, partial, head_dim).map(Arc::new);
    }
    let rotated = (head_dim as f64 * partial) as usize;
    if rotated < 2 || !rotated.is_multiple_of(2) || rotated > head_dim {
        return Err(Error::failed(format!(
            "config.json: {rotated} of {head_dim} values of a head are rotated, and it must be an even number of them"
        )));
    }
    let kind = own.text("rope_type")?;
    Scaling { config, own, kind, theta, rotated }.rope().map(Arc::new)
}

/// Frequencies of the whole head, of which only the first `partial` turn.
fn proportional(own: &Config<'_>, theta: f64, partial: f64, head_dim: usize) -> Result<Rope> {
    let turning = (head_dim as f64 * partial / 2.0).floor() as usize;
    let factor = own.number("factor", 1.0)?;
    let turns = head_dim.is_multiple_of(2) && (1..=head_dim / 2).contains(&turning);
    if !(turns && factor.is_finite() && factor > 0.0) {
        return Err(Error::failed(format!(
            "config.json: rope scaling `proportional` needs a positive factor and a part of {head_dim} values of a head to rotate, found {factor} \
             and {partial}"
        )));
    }
    let mut rope = unscaled(theta, head_dim);
    for (i, frequency) in rope.inverse_frequencies.iter_mut().enumerate() {
        *frequency = if i < turning { *frequency / factor as f32 } else { 0.0 };
    }
    rope.scaling = match turning == head_dim / 2 {
        true if factor == 1.0 => RopeScaling::None,
        true => RopeScaling::Linear { factor: factor as f32 },
        false => RopeScaling::Proportional,
    };
    Ok(rope)
}

/// The rotation of `rotated` values without any scaling.
pub fn unscaled(theta: f64, rotated: usize) -> Rope {
    Rope {
        inverse_frequencies: powers(theta, rotated).map(|power| 1.0 / power).collect(),
        theta: theta as f32,
        magnitude: 1.0,
        scaling: RopeScaling::None,
        learned: None,
    }
}

fn powers(theta: f64, rotated: usize) -> impl Iterator<Item = f32> {
    (0..rotated / 2).map(move |i| (theta as f32).powf((2 * i) as f32 / rotated as f32))
}

/// YaRN's factor for attention over a context `factor` times as long.
pub fn warmth(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// How the rotation of a model's heads is scaled to longer texts.
struct Scaling<'a> {
    /// The model's settings.
    config: &'a Config<'a>,
    /// The settings of the rotation.
    own: Config<'a>,
    /// Its `rope_type`.
    kind: &'a str,
    /// Base of the frequencies.
    theta: f64,
    /// Values of a head that are rotated, two for each frequency.
    rotated: usize,
}

impl Scaling<'_> {
    /// The rotation of this kind. Fails for a kind that is not known, and for settings that it needs and that are not there.
    fn rope(&self) -> Result<Rope> {
        let mut rope = unscaled(self.theta, self.rotated);
        rope.scaling = match self.kind {
            "default" => RopeScaling::None,
            "linear" => {
                let factor = self.needed("factor")? as f32;
                rope.inverse_frequencies.iter_mut().for_each(|f| *f /= factor);
                RopeScaling::Linear { factor }
            }
            "dynamic" => {
                let original = self.config.count("max_position_embeddings")?;
                RopeScaling::Dynamic { factor: self.needed("factor")? as f32, original }
            }
            "llama3" => self.llama3(&mut rope)?,
            "yarn" => self.yarn(&mut rope)?,
            "longrope" => self.longrope(&mut rope)?,
            other => {
                return Err(Error::failed(format!(
                    "config.json: rope scaling `{other}` is not supported, only default, linear, dynamic, llama3, yarn, longrope and proportional"
                )));
            }
        };
        Ok(rope)
    }

    /// A setting of the rotation, where it is there. Fails for one that is not a positive number.
    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.own.get(key) {
            None => Ok(None),
            Some(_) => Some(self.own.number(key, f64::NAN)?)
                .filter(|x| x.is_finite() && *x > 0.0)
                .map(Some)
                .ok_or_else(|| self.lacks(key)),
        }
    }

    /// The same of a setting that has to be there.
    fn needed(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.lacks(key))
    }

    fn lacks(&self, key: &str) -> Error {
        Error::failed(format!("config.json: rope scaling `{}` lacks a positive {key}", self.kind))
    }

    /// Tokens of the longest text that the model was trained with before.
    fn original(&self) -> Result<usize> {
        self.own.count("original_max_position_embeddings")
    }

    /// How many times longer texts may be than `original`.
    fn factor_or_ratio(&self, original: usize) -> Result<f64> {
        match self.positive("factor")? {
            Some(factor) => Ok(factor),
            None => Ok(self.config.count("max_position_embeddings")? as f64 / original as f64),
        }
    }

    /// Divides long wavelengths by a factor, leaves short ones, and blends between the two.
    fn llama3(&self, rope: &mut Rope) -> Result<RopeScaling> {
        let factor = self.needed("factor")? as f32;
        let low = self.needed("low_freq_factor")? as f32;
        let high = self.needed("high_freq_factor")? as f32;
        let original = self.original()? as f32;
        for f in &mut rope.inverse_frequencies {
            let wavelength = 2.0 * std::f32::consts::PI / *f;
            *f = if wavelength > original / low {
                *f / factor
            } else if wavelength < original / high {
                *f
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * (*f / factor) + smooth * *f
            };
        }
        Ok(RopeScaling::Llama3 { factor, low, high, original })
    }

    /// Divides the frequencies that turn seldom in the original context, along a ramp, and warms attention.
    fn yarn(&self, rope: &mut Rope) -> Result<RopeScaling> {
        let original = self.original()?;
        let factor = self.factor_or_ratio(original)?;
        let mscale = self.own.number("mscale", 0.0)?;
        let mscale_all_dim = self.own.number("mscale_all_dim", 0.0)?;
        let magnitude = match self.positive("attention_factor")? {
            Some(factor) => factor,
            None if mscale != 0.0 && mscale_all_dim != 0.0 => warmth(factor, mscale) / warmth(factor, mscale_all_dim),
            None => warmth(factor, 1.0),
        };
        // To Python a zero is none.
        let beta = |key: &str, usual: f64| match self.own.number(key, 0.0)? {
            0.0 => Ok(usual),
            _ => self.needed(key),
        };
        let (beta_fast, beta_slow) = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
        let turns = |turns: f64| {
            let circle = turns * 2.0 * std::f64::consts::PI;
            self.rotated as f64 * (original as f64 / circle).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (turns(beta_fast), turns(beta_slow));
        if self.own.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(self.rotated as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        for (i, f) in rope.inverse_frequencies.iter_mut().enumerate() {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
            *f = *f / factor as f32 * ramp + *f * (1.0 - ramp);
        }
        rope.magnitude = magnitude as f32;
        Ok(RopeScaling::Yarn {
            factor: factor as f32,
            original,
            beta_fast: beta_fast as f32,
            beta_slow: beta_slow as f32,
            mscale_all_dim: mscale_all_dim as f32,
        })
    }

    /// Divides each frequency by a factor of its own, of which there are two lists: for texts within the original context, which
    /// are those of the rotation, and for longer ones.
    fn longrope(&self, rope: &mut Rope) -> Result<RopeScaling> {
        let original = self.original()?;
        let factor = self.factor_or_ratio(original)?;
        let (short, long) = (self.factors("short_factor")?, self.factors("long_factor")?);
        let magnitude = match self.positive("attention_factor")? {
            Some(factor) => factor,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        rope.magnitude = magnitude as f32;
        let of = powers(self.theta, self.rotated).zip(&short).map(|(power, factor)| 1.0 / (factor * power));
        rope.inverse_frequencies = of.collect();
        Ok(RopeScaling::Long { short, long, original })
    }

    /// One positive factor for each frequency.
    fn factors(&self, key: &str) -> Result<Vec<f32>> {
        let list = self.own.get(key).and_then(|v| v.as_array());
        let numbers = list.map(|list| list.iter().filter_map(real).map(|x| x as f32).collect());
        numbers.filter(|found: &Vec<f32>| found.len() == self.rotated / 2 && found.iter().all(|x| *x > 0.0)).ok_or_else(
            || {
                Error::failed(format!(
                    "config.json: rope scaling `{}` needs {} positive numbers in {key}",
                    self.kind,
                    self.rotated / 2
                ))
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::build;
    use crate::graph::RopeScaling;

    /// Frequencies as transformers 5.23 has them for this class and width of a head.
    #[test]
    fn pairs_beyond_the_part_of_proportional_positions_stand_still() {
        let of = |key: &str, rope: Value, partial: Option<f64>| {
            let mut config = json!({
                "model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "intermediate_size": 32,
                "num_hidden_layers": 1, "vocab_size": 8, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
            });
            config[key] = rope;
            if let Some(partial) = partial {
                config["partial_rotary_factor"] = partial.into();
            }
            let graph = build(&config).map_err(|error| error.to_string())?;
            let rope = graph.blocks[0].attention().unwrap().rope.clone().unwrap();
            Ok::<_, String>((rope.inverse_frequencies.clone(), rope.scaling.clone()))
        };
        let near = |found: &[f32], expected: [f32; 8]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-6 * b), "{found:?}");
        };
        let half = json!({"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 4.0});
        let (found, scaling) = of("rope_parameters", half, None).unwrap();
        near(&found, [0.25, 0.079_056_94, 0.025, 0.007_905_695, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(scaling, RopeScaling::Proportional);
        let outside = json!({"type": "proportional", "rope_theta": 5e5});
        let (found, _) = of("rope_scaling", outside.clone(), Some(0.3)).unwrap();
        near(&found, [1.0, 0.193_922_76, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let whole = json!({"rope_type": "proportional", "rope_theta": 5e5, "factor": 2.0});
        let (found, scaling) = of("rope_parameters", whole, None).unwrap();
        near(&found[..3], [0.5, 0.096_961_38, 0.018_803_015, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(scaling, RopeScaling::Linear { factor: 2.0 });
        assert!(of("rope_scaling", outside, Some(1.5)).unwrap_err().contains("a part of 16 values"));
    }
}
