//! What was measured of a model that predicts no tokens: its hidden states, and the embeddings or the scores that it makes of them.

use serde::{Deserialize, Serialize};

use super::Limits;
use crate::words::table;

/// How far what a model makes of texts is from what its reference makes of them, where that is not the next token.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct HiddenStates {
    /// The checkpoint.
    pub model: String,
    /// The reference checkpoint.
    pub reference: String,
    /// How it is stored where it is itself quantized: it is the reference then, and no original.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_quantized: Option<String>,
    /// Tokens whose hidden states were compared.
    pub tokens: usize,
    /// Mean cosine between both of a token.
    pub cosine_mean: f64,
    /// The lowest of all tokens, where a single bad one shows.
    pub cosine_min: f64,
    /// Length of the difference as a share of the reference's, all tokens together.
    pub relative_error: f64,
    /// Of a model that makes embeddings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Embeddings>,
    /// Of a classifier, a reranker or a reward model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
}

/// Embeddings of texts beside the reference's.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Embeddings {
    /// How they are made of hidden states, as the files of sentence-transformers say.
    pub made_by: String,
    /// Values of one.
    pub dimensions: usize,
    /// Texts.
    pub texts: usize,
    /// Mean cosine between both of a text.
    pub cosine_mean: f64,
    /// The lowest of all texts, where a single bad one shows.
    pub cosine_min: f64,
}

/// What is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Scored {
    /// A text as a whole.
    Texts,
    /// Each of its tokens.
    Tokens,
}

/// Scores beside the reference's.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Scores {
    /// Texts or tokens.
    pub of: Scored,
    /// How many of them were scored.
    pub scored: usize,
    /// Scores of each.
    pub labels: usize,
    /// Share of them to which both give the same label; where several labels may hold, the share of scores of the same sign. Nothing of one
    /// score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_agreement: Option<f64>,
    /// Mean size of the difference of a score.
    pub difference_mean: f64,
    /// The largest.
    pub difference_max: f64,
    /// Spearman's rank correlation of both, of one score: 1 where both put the texts into the same order. Nothing where one of them gives all
    /// texts the same score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_correlation: Option<f64>,
}

/// Of all this, what limits are set on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Made {
    /// Mean cosine of embeddings, or of hidden states where nothing is made of them.
    cosine: f64,
    /// Share of equal labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    labels: Option<f64>,
    /// Spearman's rank correlation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ranks: Option<f64>,
}

impl HiddenStates {
    /// What limits are set on.
    #[cfg_attr(doc, doc(hidden))]
    pub fn made(&self) -> Made {
        Made {
            cosine: self.embeddings.as_ref().map_or(self.cosine_mean, |embeddings| embeddings.cosine_mean),
            labels: self.scores.as_ref().and_then(|scores| scores.label_agreement),
            ranks: self.scores.as_ref().and_then(|scores| scores.rank_correlation),
        }
    }

    /// What was measured and what was found, a line each; the first says what was measured.
    pub(super) fn rows(&self) -> Vec<[String; 2]> {
        let beside = match &self.reference_quantized {
            Some(how) => format!("the reference, itself quantized ({how})"),
            None => "the original".to_owned(),
        };
        let mut rows = vec![[format!("{} tokens, beside {beside}", self.tokens), String::new()]];
        let mut row = |what: &str, value: String| rows.push([what.to_owned(), value]);
        let cosines = |mean: f64, lowest: f64| format!("{mean:.5} / {lowest:.5}");
        if let Some(Embeddings { made_by, dimensions, texts, cosine_mean, cosine_min }) = &self.embeddings {
            let what = format!("cosine of {texts} embeddings of {dimensions} ({made_by}), mean / lowest");
            row(&what, cosines(*cosine_mean, *cosine_min));
        }
        if let Some(scores) = &self.scores {
            let of = match scores.of {
                Scored::Texts => "texts",
                Scored::Tokens => "tokens",
            };
            if let Some(share) = scores.label_agreement {
                row(&format!("same label of {} {of}", scores.scored), format!("{:.2} %", 100.0 * share));
            }
            let difference = format!("{:.5} / {:.5}", scores.difference_mean, scores.difference_max);
            row("difference of scores, mean / largest", difference);
            if let Some(correlation) = scores.rank_correlation {
                let what = format!("rank correlation of {} {of} (Spearman)", scores.scored);
                row(&what, format!("{correlation:.5}"));
            }
        }
        row("cosine of hidden states, mean / lowest", cosines(self.cosine_mean, self.cosine_min));
        row("difference of hidden states", format!("{:.2} % of their length", 100.0 * self.relative_error));
        rows
    }
}

/// What was found of a model that predicts no tokens, as a table for people.
pub fn states_text(states: &HiddenStates) -> String {
    let rows = states.rows();
    let found: Vec<Vec<String>> = rows[1..].iter().map(|row| row.to_vec()).collect();
    format!("{}\n{}", rows[0][0], table(&found, 2))
}

impl Limits {
    /// What of cosine, equal labels and rank correlation is missed, one sentence each.
    #[cfg_attr(doc, doc(hidden))]
    pub fn missed_in(&self, made: &Made) -> Vec<String> {
        let mut missed = Vec::new();
        let mut check = |what: &str, found: Option<f64>, limit: Option<f64>| {
            // Written so that a NaN misses every limit, and so does what could not be had.
            if let Some(limit) = limit
                && !found.is_some_and(|found| found >= limit)
            {
                let found = found.map_or("none".to_owned(), |found| format!("{found:.5}"));
                missed.push(format!("{what} is {found}, below the limit of {limit}"));
            }
        };
        check("the mean cosine", Some(made.cosine), self.min_cosine);
        if made.labels.is_some() {
            check("the share of equal labels", made.labels, self.min_top1);
        }
        check("the rank correlation", made.ranks, self.min_spearman);
        missed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_on_what_is_made_name_what_was_missed() {
        let made = Made { cosine: 0.98, labels: Some(0.5), ranks: None };
        let limits = |min_cosine, min_top1, min_spearman| {
            Limits { min_cosine, min_top1, min_spearman, ..Limits::default() }.missed_in(&made)
        };
        assert_eq!(limits(Some(0.9), Some(0.5), None), Vec::<String>::new());
        let missed = limits(Some(0.99), Some(0.6), Some(0.1));
        assert_eq!(missed.len(), 3, "{missed:?}");
        assert_eq!(missed[0], "the mean cosine is 0.98000, below the limit of 0.99");
        assert!(missed[2].starts_with("the rank correlation is none, below"), "{missed:?}");
        assert_eq!(
            Limits { min_cosine: Some(0.0), ..Limits::default() }.missed_in(&Made { cosine: f64::NAN, ..made }).len(),
            1
        );
    }
}
