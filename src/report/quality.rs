//! What was measured, and what limits it has to keep.

use serde::{Deserialize, Serialize};

use super::HiddenStates;
use crate::error::{Error, Result};

/// Which tokens of a window are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Protocol {
    /// All but the first, as in the papers on GPTQ and its successors.
    #[serde(rename = "papers")]
    Papers,
    /// The second half, as in llama.cpp's perplexity tool.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
}

impl Protocol {
    /// Every protocol, with the name users type.
    #[cfg_attr(doc, doc(hidden))]
    pub const ALL: &[(&str, Protocol)] = &[("papers", Protocol::Papers), ("llama.cpp", Protocol::LlamaCpp)];
}

/// What linears and attention read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Activations {
    /// What was computed.
    Exact,
    /// What a runtime keeps of it: the input of each linear rounded as its weight's encoding demands
    /// (`kernels::ActivationRounding::beside`), and, of a GGUF file, keys and values as llama.cpp's cache holds them, in half precision.
    Runtime,
}

impl Activations {
    /// Every kind, with the name users type.
    #[cfg_attr(doc, doc(hidden))]
    pub const ALL: &[(&str, Activations)] = &[("exact", Activations::Exact), ("runtime", Activations::Runtime)];
}

/// How good a model is, alone or beside its reference.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Quality {
    /// The checkpoint.
    pub model: String,
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Its standard error, tokens taken as independent.
    pub perplexity_stderr: f64,
    /// Tokens scored.
    pub tokens: usize,
    /// Tokens of a window.
    pub context: usize,
    /// Windows.
    pub windows: usize,
    /// Which tokens were scored.
    pub protocol: Protocol,
    /// What the model's linears and attention read; the reference's read what was computed.
    pub activations: Activations,
    /// Beside the reference.
    #[serde(flatten)]
    pub beside: Option<Beside>,
    /// What layers draft that predict further tokens, where the model has some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub further: Vec<Drafts>,
}

/// How often a layer that predicts further tokens drafts what the model itself would say.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Drafts {
    /// The prefix of its tensors.
    pub block: String,
    /// Drafted tokens that were compared with the model's own choice after the same text and what came before in it.
    pub tokens: usize,
    /// Share of them that are that choice.
    pub agreement: f64,
    /// The same of the reference and its own layer, on the same tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_agreement: Option<f64>,
}

impl Quality {
    /// What was measured, in a line; with what linears read where that is `shared` by all that the line is said of.
    #[cfg_attr(doc, doc(hidden))]
    pub fn how(&self, shared: bool) -> String {
        let (protocol, _) = Protocol::ALL.iter().find(|(_, known)| *known == self.protocol).expect("in the list");
        let rounded = match (self.activations, shared) {
            (Activations::Runtime, true) => ", inputs of linears rounded as the runtime does",
            (_, true) => "",
            (_, false) => ", inputs of some models' linears rounded as the runtime does",
        };
        format!("{} tokens, context {}, protocol {protocol}{rounded}", self.tokens, self.context)
    }
}

/// A model beside its reference, on the same tokens.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Beside {
    /// The reference checkpoint.
    pub reference: String,
    /// How it is stored where it is itself quantized, as `Q4_K and others`: it is the reference then, and no original.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_quantized: Option<String>,
    /// Its perplexity.
    pub reference_perplexity: f64,
    /// Perplexity over the reference's.
    pub perplexity_ratio: f64,
    /// Its standard error, from the difference token by token.
    pub perplexity_ratio_stderr: f64,
    /// Mean `KL(reference ‖ model)` in nats.
    pub kld_mean: f64,
    /// Its standard error.
    pub kld_stderr: f64,
    /// Median.
    pub kld_median: f64,
    /// 99th percentile.
    pub kld_p99: f64,
    /// Largest.
    pub kld_max: f64,
    /// Share of tokens on which both would say the same.
    pub top1_agreement: f64,
}

/// Limits that a quantized model must keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Limits {
    /// Largest perplexity over the reference's.
    pub max_ppl_ratio: Option<f64>,
    /// Largest mean divergence.
    pub max_kld: Option<f64>,
    /// Least share of tokens on which both would say the same; of a classifier, of equal labels.
    pub min_top1: Option<f64>,
    /// Least mean cosine of embeddings with the reference's, or of hidden states where none are made of them.
    pub min_cosine: Option<f64>,
    /// Least rank correlation of a reranker's or a reward model's scores with the reference's (Spearman).
    pub min_spearman: Option<f64>,
    /// What the baseline was measured on that set some of them, which is what has to be measured again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Measured>,
}

/// What something was measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Measured {
    /// Tokens of a window.
    pub context: usize,
    /// Windows, of `context` tokens each.
    pub windows: usize,
    /// Tokens whose prediction was scored, over all windows.
    pub tokens: usize,
}

impl Limits {
    /// Whether there is any.
    #[cfg_attr(doc, doc(hidden))]
    pub fn any(&self) -> bool {
        *self != Limits::default()
    }

    /// Fails on limits that nothing could keep, or nothing could miss: a usage error.
    #[cfg_attr(doc, doc(hidden))]
    pub fn check(&self) -> Result<()> {
        let check = |flag: &str, limit: Option<f64>, range: &str, allowed: fn(f64) -> bool| match limit {
            // Written so that a NaN is outside of every range.
            Some(limit) if !allowed(limit) => Err(Error::usage(format!("{flag} {limit}: must be {range}"))),
            _ => Ok(()),
        };
        check("--max-ppl-ratio", self.max_ppl_ratio, "a number above 0", |x| x > 0.0 && x.is_finite())?;
        check("--max-kld", self.max_kld, "a number of nats, 0 or more", |x| x >= 0.0 && x.is_finite())?;
        check("--min-top1", self.min_top1, "a share from 0 to 1", |x| (0.0..=1.0).contains(&x))?;
        let cosine: fn(f64) -> bool = |x| (-1.0..=1.0).contains(&x);
        check("--min-cosine", self.min_cosine, "a cosine from -1 to 1", cosine)?;
        check("--min-spearman", self.min_spearman, "a correlation from -1 to 1", cosine)
    }

    /// What was missed of the predictions of a model, or of what it makes of texts, one sentence each.
    #[cfg_attr(doc, doc(hidden))]
    pub fn missed(&self, quality: Option<&Quality>, states: Option<&HiddenStates>) -> Vec<String> {
        let mut missed = quality.map_or(Vec::new(), |quality| self.missed_in_predictions(quality));
        missed.extend(states.iter().flat_map(|states| self.missed_in(&states.made())));
        missed
    }

    fn missed_in_predictions(&self, quality: &Quality) -> Vec<String> {
        let Some(beside) = &quality.beside else { return Vec::new() };
        let mut missed = self.missed_by([beside.perplexity_ratio, beside.kld_mean, beside.top1_agreement]);
        let Quality { context, windows, tokens, .. } = *quality;
        let own = Measured { context, windows, tokens };
        missed.extend(self.baseline.filter(|baseline| *baseline != own).map(|baseline| {
            let of = |measured: Measured| {
                format!("{} tokens in {} windows of {}", measured.tokens, measured.windows, measured.context)
            };
            format!(
                "the baseline was measured on {}, and this on {}: measure both on the same text",
                of(baseline),
                of(own)
            )
        }));
        missed
    }

    /// What perplexity ratio, mean KL divergence and top-1 agreement miss, one sentence each.
    #[cfg_attr(doc, doc(hidden))]
    pub fn missed_by(&self, [ratio, kld, top1]: [f64; 3]) -> Vec<String> {
        let mut missed = Vec::new();
        let mut check = |what: &str, found: f64, limit: Option<f64>, most: bool| {
            if let Some(limit) = limit
                // Written so that a NaN misses every limit.
                && !(if most { found <= limit } else { found >= limit })
            {
                let side = if most { "above" } else { "below" };
                missed.push(format!("{what} is {found:.5}, {side} the limit of {limit}"));
            }
        };
        check("the perplexity ratio", ratio, self.max_ppl_ratio, true);
        check("the mean KL divergence", kld, self.max_kld, true);
        check("the top-1 agreement", top1, self.min_top1, false);
        missed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_mean_nothing_are_refused() {
        let limits = |[max_ppl_ratio, max_kld, min_top1]: [f64; 3]| {
            let [max_ppl_ratio, max_kld, min_top1] = [max_ppl_ratio, max_kld, min_top1].map(Some);
            Limits { max_ppl_ratio, max_kld, min_top1, ..Limits::default() }.check()
        };
        for good in [[1.01, 0.0, 0.0], [0.5, 7.0, 1.0]] {
            limits(good).unwrap();
        }
        Limits::default().check().unwrap();
        for (index, wrong) in [
            (0, 0.0),
            (0, -1.0),
            (0, f64::NAN),
            (0, f64::INFINITY),
            (1, -1e-9),
            (1, f64::NAN),
            (1, f64::INFINITY),
            (2, -0.1),
            (2, 1.1),
            (2, 95.0),
            (2, f64::NAN),
        ] {
            let mut all = [1.0; 3];
            all[index] = wrong;
            let error = limits(all).unwrap_err();
            let flag = ["--max-ppl-ratio", "--max-kld", "--min-top1"][index];
            assert!(error.exit_code() == 2 && error.to_string().starts_with(flag), "{error}");
        }
    }

    #[test]
    fn limits_name_what_was_missed() {
        let quality = Beside {
            reference: String::new(),
            reference_quantized: None,
            reference_perplexity: 10.0,
            perplexity_ratio: 1.1,
            perplexity_ratio_stderr: 0.0,
            kld_mean: f64::NAN,
            kld_stderr: 0.0,
            kld_median: 0.0,
            kld_p99: 0.0,
            kld_max: 0.0,
            top1_agreement: 0.9,
        };
        let limits = Limits { max_ppl_ratio: Some(1.2), max_kld: Some(0.1), min_top1: Some(0.95), ..Limits::default() };
        let quality = Quality {
            model: String::new(),
            perplexity: 11.0,
            perplexity_stderr: 0.0,
            tokens: 7,
            context: 8,
            windows: 1,
            protocol: Protocol::Papers,
            activations: Activations::Exact,
            beside: Some(quality),
            further: Vec::new(),
        };
        let missed = limits.missed(Some(&quality), None);
        assert_eq!(missed.len(), 2, "{missed:?}");
        // A baseline has to be measured on as much.
        let same = Measured { context: 8, windows: 1, tokens: 7 };
        let on =
            |baseline: Measured| Limits { baseline: Some(baseline), ..Limits::default() }.missed(Some(&quality), None);
        assert_eq!(on(same), Vec::<String>::new());
        assert!(
            on(Measured { windows: 2, ..same })[0]
                .contains("7 tokens in 2 windows of 8, and this on 7 tokens in 1 windows")
        );
        assert!(missed[1].contains("top-1 agreement is 0.90000, below the limit of 0.95"));
    }
}
