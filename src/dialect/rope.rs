//! How a GGUF file scales rotary positions, as llama.cpp computes it: every pair of values is divided by one factor, and what is
//! rotated is multiplied by another.

use formats::Result;
use serde_json::{Value, json};

use crate::dialect::same::truncated;
use crate::dialect::settings::Settings;
use crate::families::rope::{unscaled, warmth};
use crate::graph::RopeScaling;

impl Settings {
    /// `rope.scaling.factor`, or what it was called before; one where the type says that nothing is scaled.
    fn scaling_factor(&self) -> Result<(&str, f64)> {
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.float("rope.scale_linear")?,
        };
        let factor = factor.filter(|factor| *factor != 0.0);
        match self.text("rope.scaling.type")?.unwrap_or("linear") {
            kind @ ("linear" | "longrope") => Ok((kind, factor.unwrap_or(1.0))),
            "none" => Ok(("none", 1.0)),
            "yarn" => Ok(("yarn", factor.unwrap_or(1.0))),
            other => Err(self.unsupported(format!(
                "`{}` is `{other}`, which is no type that llama.cpp knows (none, linear, yarn, longrope)",
                self.key("rope.scaling.type")
            ))),
        }
    }

    /// The scaling of a file with a factor for each pair, `factors`, where there is more than these.
    pub(super) fn scaled_factors(&self, factors: &[f32], warm: f64) -> Result<Option<Value>> {
        match self.scaling_factor()? {
            ("yarn", _) => Err(self.unsupported(format!(
                "`{}` is `yarn` in a file that has a factor for each rotary frequency as well, which config.json has no word for; \
                 quantize the checkpoint that the file was made from",
                self.key("rope.scaling.type")
            ))),
            (_, 1.0) if warm == 1.0 => Ok(None),
            (_, factor) => self.divided(factors.iter().map(|x| f64::from(*x) * factor).collect(), warm).map(Some),
        }
    }

    /// Rotary frequencies that are divided by `factors` whatever the length of a text, and what is rotated multiplied by `warm`.
    pub(super) fn divided(&self, factors: Vec<f64>, warm: f64) -> Result<Value> {
        let id = self.architecture.id;
        // There layers with a window would be multiplied too; here the attention itself.
        if warm != 1.0 && (self.architecture.latent || ["gemma3", "gemma-embedding", "olmo2", "qwen2vl"].contains(&id))
        {
            return Err(self.unsupported(format!(
                "`{}` of {warm} without YaRN cannot be said in the config.json of such a model; quantize the checkpoint that the file was made \
                 from",
                self.key("rope.scaling.attn_factor")
            )));
        }
        Ok(json!({
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": self.required("context_length")?, "attention_factor": warm,
        }))
    }

    /// The scaling of a file without factors of its own for each pair; `warm` is its `rope.scaling.attn_factor`.
    pub(super) fn scaling_by_type(&self, theta: f64, warm: f64, latent: bool) -> Result<Option<Value>> {
        let original = self.count("rope.scaling.original_context_length")?;
        // Its configurations know LongRoPE alone.
        let long = self.architecture.id == "phi3";
        match self.scaling_factor()? {
            ("yarn", factor) => {
                let original = original.map_or_else(|| self.required("context_length"), Ok)?;
                if long {
                    return self.divided(self.stretched(theta, factor, original)?, warmth(factor, 1.0) * warm).map(Some);
                }
                let mut scaling = json!({
                    "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                });
                match latent {
                    true => self.latent_yarn(&mut scaling, factor, warm)?,
                    false => self.plain_yarn(&mut scaling, factor, warm)?,
                }
                Ok(Some(scaling))
            }
            (_, factor) if latent && (factor != 1.0 || warm != 1.0) => Err(self.unsupported(format!(
                "rotary positions that are scaled without YaRN: for architecture {} llama.cpp multiplies attention too then, which \
                 config.json has no word for; quantize the checkpoint that the file was made from",
                self.architecture.id
            ))),
            (_, 1.0) if warm == 1.0 => Ok(None),
            (_, factor) if warm == 1.0 && !long => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            (_, factor) => self.divided(vec![factor; self.rotated()? / 2], warm).map(Some),
        }
    }

    /// How many values of a head are rotated.
    fn rotated(&self) -> Result<usize> {
        let whole = match self.count("attention.key_length")? {
            Some(width) => width,
            None => self.required("embedding_length")? / self.required("attention.head_count")?,
        };
        Ok(self.count("rope.dimension_count")?.unwrap_or(whole))
    }

    /// What YaRN divides each frequency by.
    fn stretched(&self, theta: f64, factor: f64, original: usize) -> Result<Vec<f64>> {
        let mut rope = unscaled(theta, self.rotated()?);
        let plain = rope.inverse_frequencies.clone();
        let (beta_fast, beta_slow, mscale_all_dim) = (32.0, 1.0, 0.0);
        rope.scaling = RopeScaling::Yarn { factor: factor as f32, original, beta_fast, beta_slow, mscale_all_dim };
        let scaled = truncated(&rope).expect("YaRN with the usual turns");
        Ok(plain.iter().zip(scaled).map(|(plain, scaled)| f64::from(*plain) / f64::from(scaled)).collect())
    }

    /// YaRN's further settings, which llama.cpp reads for few architectures.
    fn plain_yarn(&self, scaling: &mut Value, factor: f64, warm: f64) -> Result<()> {
        let mut magnitude = warmth(factor, 1.0) * warm;
        if self.architecture.id == "mistral3" {
            for (key, usual) in [("beta_fast", 32.0), ("beta_slow", 1.0)] {
                if let Some(beta) = self.float(&format!("rope.scaling.yarn_{key}"))?.filter(|beta| *beta != usual) {
                    scaling[key] = beta.into();
                }
            }
            if let Some(log) = self.float("rope.scaling.yarn_log_multiplier")?.filter(|log| *log != 0.0) {
                magnitude /= warmth(factor, log);
            }
        }
        scaling["attention_factor"] = magnitude.into();
        Ok(())
    }

    /// YaRN of attention through a latent, whose scores are multiplied as well: by `m²`, of which `mscale_all_dim` is
    /// `(m − 1) / (0.1 ln factor)`.
    fn latent_yarn(&self, scaling: &mut Value, factor: f64, warm: f64) -> Result<()> {
        // The file has a tenth of it.
        let log = self.float("rope.scaling.yarn_log_multiplier")?.filter(|log| *log != 0.0);
        let log = log.map(|log| (f64::from((log / 0.1) as f32) * 1e6).round() / 1e6);
        if let (Some(log), 1.0) = (log, warm) {
            scaling["mscale"] = log.into();
            scaling["mscale_all_dim"] = log.into();
            return Ok(());
        }
        // Without a logarithm of its own it is the usual one, and the scores are multiplied by what the rotation is.
        let magnitude = if log.is_some() { warm } else { warmth(factor, 1.0) * warm };
        let scores = magnitude * log.map_or(1.0, |log| warmth(factor, log));
        scaling["attention_factor"] = magnitude.into();
        if scores != 1.0 {
            if factor <= 1.0 {
                return Err(self.unsupported(format!(
                    "`{}` of {warm} where positions are not stretched cannot be said in config.json; quantize the checkpoint that the file \
                     was made from",
                    self.key("rope.scaling.attn_factor")
                )));
            }
            scaling["mscale_all_dim"] = ((scores - 1.0) / (0.1 * factor.ln())).into();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use formats::container::gguf::MetadataValue;

    use super::*;
    use crate::dialect::architectures::Architecture;

    fn settings(id: &str, further: &[(&str, f32)]) -> Settings {
        let count = |key: &str, n| (format!("{id}.{key}"), MetadataValue::U32(n));
        let mut keys: HashMap<String, MetadataValue> = [
            count("context_length", 256),
            count("embedding_length", 32),
            count("attention.head_count", 4),
            count("rope.scaling.original_context_length", 64),
        ]
        .into();
        keys.extend(further.iter().map(|(key, x)| (format!("{id}.rope.scaling.{key}"), MetadataValue::F32(*x))));
        let architecture = Architecture::named(id).unwrap();
        Settings { architecture, keys, tensors: HashMap::new(), factors: HashMap::new(), asked: Default::default() }
    }

    fn typed(id: &str, kind: &str, further: &[(&str, f32)]) -> (Settings, Result<Option<Value>>) {
        let mut settings = settings(id, further);
        settings.keys.insert(format!("{id}.rope.scaling.type"), MetadataValue::String(kind.to_owned()));
        let warm = settings.float("rope.scaling.attn_factor").unwrap().unwrap_or(1.0);
        let found = settings.scaling_by_type(10_000.0, warm, id == "deepseek2");
        (settings, found)
    }

    fn scaling(id: &str, kind: &str, further: &[(&str, f32)]) -> Value {
        typed(id, kind, further).1.unwrap().unwrap()
    }

    fn near(value: &Value, expected: f64) -> bool {
        (value.as_f64().unwrap() - expected).abs() < 1e-6
    }

    const BETAS: [(&str, f32); 4] =
        [("factor", 4.0), ("yarn_beta_fast", 16.0), ("yarn_beta_slow", 2.0), ("yarn_log_multiplier", 1.0)];

    #[test]
    fn further_settings_of_yarn_are_read_where_llama_cpp_reads_them() {
        let (settings, found) = typed("llama", "yarn", &BETAS);
        assert_eq!(found.unwrap().unwrap(), scaling("llama", "yarn", &BETAS[..1]));
        let ignored = ["yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier"];
        for key in ignored {
            assert!(settings.unread().contains(&&*format!("llama.rope.scaling.{key}")), "{key}");
        }
        let (settings, found) = typed("mistral3", "yarn", &BETAS);
        let found = found.unwrap().unwrap();
        assert_eq!((&found["beta_fast"], &found["beta_slow"]), (&json!(16.0), &json!(2.0)));
        assert!(near(&found["attention_factor"], 1.0), "{found}");
        assert!(settings.unread().iter().all(|key| !key.contains("yarn")));
    }

    #[test]
    fn a_factor_without_yarn_is_said_as_one_for_each_pair() {
        let warm = [("factor", 2.0), ("attn_factor", 1.5)];
        for kind in ["linear", "longrope"] {
            let found = scaling("llama", kind, &warm);
            assert_eq!(found["short_factor"], json!([2.0, 2.0, 2.0, 2.0]));
            assert_eq!((&found["long_factor"], &found["attention_factor"]), (&found["short_factor"], &json!(1.5)));
            assert_eq!(scaling("llama", kind, &warm[..1]), json!({"rope_type": "linear", "factor": 2.0}));
        }
        assert_eq!(scaling("llama", "none", &warm)["short_factor"], json!([1.0, 1.0, 1.0, 1.0]));
        assert_eq!(typed("llama", "none", &warm[..1]).1.unwrap(), None);
        for (id, kind) in [("gemma3", "linear"), ("deepseek2", "linear"), ("deepseek2", "none")] {
            let told = typed(id, kind, &warm).1.unwrap_err().to_string();
            assert!(told.contains("quantize the checkpoint"), "{told}");
        }
        assert!(typed("llama", "foo", &[]).1.unwrap_err().to_string().contains("`foo`"));
    }

    #[test]
    fn phi_3_has_every_scaling_as_factors_of_its_pairs() {
        let found = scaling("phi3", "yarn", &BETAS[..1]);
        let factors: Vec<f64> = found["short_factor"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        // From the frequencies that turn often within the first context to those that never do.
        assert!(near(&json!(factors[0]), 1.0) && near(&json!(factors[3]), 4.0) && factors.is_sorted(), "{factors:?}");
        assert!(near(&found["attention_factor"], 1.0 + 0.1 * 4f64.ln()));
        assert_eq!(scaling("phi3", "linear", &[("factor", 2.0)])["long_factor"], json!([2.0, 2.0, 2.0, 2.0]));
    }

    #[test]
    fn factors_of_each_pair_and_one_for_all_are_both_taken() {
        let of = |further: &[(&str, f32)], warm| settings("llama", further).scaled_factors(&[1.0, 3.0], warm).unwrap();
        assert_eq!(of(&[], 1.0), None);
        assert_eq!(of(&[("factor", 2.0)], 1.0).unwrap()["long_factor"], json!([2.0, 6.0]));
        assert_eq!(of(&[], 1.25).unwrap()["attention_factor"], 1.25);
    }

    #[test]
    fn scores_of_latent_attention_are_multiplied_as_llama_cpp_does() {
        let stretched = 0.1 * 4f64.ln();
        let plain = scaling("deepseek2", "yarn", &BETAS[..1]);
        assert!(near(&plain["attention_factor"], 1.0 + stretched) && near(&plain["mscale_all_dim"], 1.0), "{plain}");
        let usual = scaling("deepseek2", "yarn", &[("factor", 4.0), ("yarn_log_multiplier", 0.0707)]);
        assert!(near(&usual["mscale_all_dim"], 0.707) && usual["mscale"] == usual["mscale_all_dim"], "{usual}");
        let all = [("factor", 4.0), ("yarn_log_multiplier", 0.1), ("attn_factor", 1.25)];
        let warm = scaling("deepseek2", "yarn", &all);
        assert!(near(&warm["attention_factor"], 1.25), "{warm}");
        let scores = 1.0 + warm["mscale_all_dim"].as_f64().unwrap() * stretched;
        assert!((scores - 1.25 * (1.0 + stretched)).abs() < 1e-6, "{warm}");
    }
}
