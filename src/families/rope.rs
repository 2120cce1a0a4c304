//! Rotary frequencies from config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

use std::sync::Arc;

use super::Config;
use crate::error::{Error, Result};
use crate::graph::{Rope, RopeScaling};

/// What a family knows that config.json may not say.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// The base.
    pub theta: f64,
    /// Share of a head that is rotated.
    pub partial: f64,
}

impl Default for Defaults {
    fn default() -> Defaults {
        Defaults { theta: 10_000.0, partial: 1.0 }
    }
}

/// The rotation of heads of `head_dim` values.
pub fn rope(config: &Config<'_>, head_dim: usize, defaults: Defaults) -> Result<Arc<Rope>> {
    of_kind(config, None, head_dim, defaults)
}

/// The rotation in layers of one kind (`full_attention`, `sliding_attention`), where config.json tells them apart.
pub fn of_kind(config: &Config<'_>, kind: Option<&str>, head_dim: usize, defaults: Defaults) -> Result<Arc<Rope>> {
    let mut new = config.object("rope_parameters")?;
    if let (Some(all), Some(kind)) = (&new, kind)
        && let Some(own) = all.object(kind)?
    {
        new = Some(own);
    }
    let old = config.object("rope_scaling")?;
    let said = |key: &str| new.as_ref().filter(|new| new.get(key).is_some()).unwrap_or(config);
    let theta = match config.get("rotary_emb_base") {
        Some(_) => config.positive("rotary_emb_base", defaults.theta)?,
        None => said("rope_theta").positive("rope_theta", defaults.theta)?,
    };
    let partial = match config.get("rotary_pct") {
        Some(_) => config.number("rotary_pct", defaults.partial)?,
        None => said("partial_rotary_factor").number("partial_rotary_factor", defaults.partial)?,
    };
    let rotated = (head_dim as f64 * partial) as usize;
    if rotated < 2 || !rotated.is_multiple_of(2) || rotated > head_dim {
        return Err(Error::failed(format!(
            "config.json: {rotated} of {head_dim} values of a head are rotated, and it must be an even number of them"
        )));
    }
    scaled(config, new.or(old), theta, rotated).map(Arc::new)
}

/// The rotation of `rotated` values without any scaling.
pub fn unscaled(theta: f64, rotated: usize) -> Rope {
    Rope {
        inverse_frequencies: powers(theta, rotated).map(|power| 1.0 / power).collect(),
        theta: theta as f32,
        magnitude: 1.0,
        scaling: RopeScaling::None,
    }
}

fn powers(theta: f64, rotated: usize) -> impl Iterator<Item = f32> {
    (0..rotated / 2).map(move |i| (theta as f32).powf((2 * i) as f32 / rotated as f32))
}

/// YaRN's factor for attention over a context `factor` times as long.
pub fn warmth(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn scaled(config: &Config<'_>, scaling: Option<Config<'_>>, theta: f64, rotated: usize) -> Result<Rope> {
    let mut rope = unscaled(theta, rotated);
    let Some(scaling) = scaling else { return Ok(rope) };
    let kind = match ["rope_type", "type"].into_iter().find(|key| scaling.get(key).is_some()) {
        Some(key) => scaling.text(key)?,
        None => "default",
    };
    let positive = |config: &Config<'_>, key: &str| -> Result<Option<f64>> {
        match config.get(key) {
            None => Ok(None),
            Some(_) => Some(config.number(key, f64::NAN)?)
                .filter(|x| x.is_finite() && *x > 0.0)
                .map(Some)
                .ok_or_else(|| Error::failed(format!("config.json: rope scaling `{kind}` lacks a positive {key}"))),
        }
    };
    let needed = |key: &str| -> Result<f64> {
        positive(&scaling, key)?
            .ok_or_else(|| Error::failed(format!("config.json: rope scaling `{kind}` lacks a positive {key}")))
    };
    let original = || -> Result<usize> {
        let key = "original_max_position_embeddings";
        let outside = positive(config, key)?;
        let found = outside.or(positive(&scaling, key)?).or(positive(config, "max_position_embeddings")?);
        found.map(|n| n as usize).map_or_else(|| needed(key).map(|n| n as usize), Ok)
    };
    let factor_or_ratio = |original: usize| -> Result<f64> {
        match positive(&scaling, "factor")? {
            Some(factor) => Ok(factor),
            None => Ok(config.count("max_position_embeddings")? as f64 / original as f64),
        }
    };
    let divide = |rope: &mut Rope, factor: f32| rope.inverse_frequencies.iter_mut().for_each(|f| *f /= factor);
    rope.scaling = match kind {
        "default" | "mrope" => RopeScaling::None,
        "linear" => {
            let factor = needed("factor")? as f32;
            divide(&mut rope, factor);
            RopeScaling::Linear { factor }
        }
        "dynamic" => {
            let original = config.count("max_position_embeddings")?;
            RopeScaling::Dynamic { factor: needed("factor")? as f32, original }
        }
        "llama3" => {
            let factor = needed("factor")? as f32;
            let low = needed("low_freq_factor")? as f32;
            let high = needed("high_freq_factor")? as f32;
            let original = needed("original_max_position_embeddings")? as f32;
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
            RopeScaling::Llama3 { factor, low, high, original }
        }
        "yarn" => {
            let original = original()?;
            let factor = factor_or_ratio(original)?;
            let mscale = scaling.number("mscale", 0.0)?;
            let mscale_all_dim = scaling.number("mscale_all_dim", 0.0)?;
            let magnitude = match positive(&scaling, "attention_factor")? {
                Some(factor) => factor,
                None if mscale != 0.0 && mscale_all_dim != 0.0 => {
                    warmth(factor, mscale) / warmth(factor, mscale_all_dim)
                }
                None => warmth(factor, 1.0),
            };
            let beta_fast = positive(&scaling, "beta_fast")?.unwrap_or(32.0);
            let beta_slow = positive(&scaling, "beta_slow")?.unwrap_or(1.0);
            let turns = |turns: f64| {
                let circle = turns * 2.0 * std::f64::consts::PI;
                rotated as f64 * (original as f64 / circle).ln() / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (turns(beta_fast), turns(beta_slow));
            if scaling.flag("truncate", true)? {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(rotated as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            for (i, f) in rope.inverse_frequencies.iter_mut().enumerate() {
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                *f = *f / factor as f32 * ramp + *f * (1.0 - ramp);
            }
            rope.magnitude = magnitude as f32;
            RopeScaling::Yarn {
                factor: factor as f32,
                original,
                beta_fast: beta_fast as f32,
                beta_slow: beta_slow as f32,
                mscale_all_dim: mscale_all_dim as f32,
            }
        }
        "longrope" | "su" => {
            let original = original()?;
            let factor = factor_or_ratio(original)?;
            let list = |key: &str| -> Result<Vec<f32>> {
                let list = scaling.get(key).and_then(|v| v.as_array());
                let numbers = list.map(|list| list.iter().filter_map(|v| v.as_f64()).map(|x| x as f32).collect());
                numbers
                    .filter(|found: &Vec<f32>| found.len() == rotated / 2 && found.iter().all(|x| *x > 0.0))
                    .ok_or_else(|| {
                        Error::failed(format!(
                            "config.json: rope scaling `{kind}` needs {} positive numbers in {key}",
                            rotated / 2
                        ))
                    })
            };
            let (short, long) = (list("short_factor")?, list("long_factor")?);
            let magnitude = match positive(&scaling, "attention_factor")? {
                Some(factor) => factor,
                None if factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
            };
            rope.magnitude = magnitude as f32;
            let of = powers(theta, rotated).zip(&short).map(|(power, factor)| 1.0 / (factor * power));
            rope.inverse_frequencies = of.collect();
            RopeScaling::Long { short, long, original }
        }
        other => {
            return Err(Error::failed(format!(
                "config.json: rope scaling `{other}` is not supported, only default, linear, dynamic, llama3, yarn and longrope"
            )));
        }
    };
    Ok(rope)
}
