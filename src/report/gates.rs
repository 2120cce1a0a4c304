//! What a pipeline reads of a run: JUnit XML, a summary in Markdown, annotations, and limits that an earlier report sets.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{HiddenStates, Limits, Measured, Quality, Report, read_report};
use crate::error::{Error, Result};

/// What was measured of an earlier output, as far as a later one is compared with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Earlier {
    /// Perplexity over the reference's.
    pub perplexity_ratio: f64,
    /// Mean divergence from the reference, in nats.
    pub kld_mean: f64,
    /// Share of tokens on which both would say the same.
    pub top1_agreement: f64,
    /// Bytes of its weight files.
    pub bytes: u64,
}

impl Earlier {
    /// What a report says; `None` where it says nothing of quality.
    pub fn of(report: &Value) -> Option<Earlier> {
        let number = |name: &str| report["quality"][name].as_f64();
        let files = report["outputs"].as_array()?;
        Some(Earlier {
            perplexity_ratio: number("perplexity_ratio")?,
            kld_mean: number("kld_mean")?,
            top1_agreement: number("top1_agreement")?,
            bytes: files.iter().filter_map(|file| file["bytes"].as_u64()).sum(),
        })
    }

    /// What is known of an output that lies at a place now; `None` where there is none, or nothing was measured of it.
    pub fn at(place: &Path) -> Option<Earlier> {
        Earlier::of(&read_report(place).ok()??)
    }
}

/// A share, as `5%` or `0.05`. Fails for anything else, and below 0.
pub fn share(flag: &str, text: &str) -> Result<f64> {
    let (number, of) = text.trim().strip_suffix('%').map_or((text.trim(), 1.0), |number| (number.trim_end(), 100.0));
    match number.parse::<f64>() {
        Ok(number) if number >= 0.0 && number.is_finite() => Ok(number / of),
        _ => Err(Error::usage(format!("{flag} `{text}`: say a share, as 5% or 0.05"))),
    }
}

/// What limits are asked for: numbers, and what an earlier output kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[non_exhaustive]
pub struct Bounds {
    /// The most that the perplexity may be, as a ratio to the original's.
    pub max_ppl_ratio: Option<f64>,
    /// The most that the mean KL divergence from the original may be, in nats.
    pub max_kld: Option<f64>,
    /// The least share of tokens that output and original predict alike, from 0 to 1; of a classifier, of equal labels.
    pub min_top1: Option<f64>,
    /// The least that the mean cosine of embeddings with the original's may be, or of hidden states where none are made of them.
    pub min_cosine: Option<f64>,
    /// The least that the rank correlation of a reranker's or a reward model's scores with the original's may be (Spearman).
    pub min_spearman: Option<f64>,
    /// An earlier output, or its report.json: the perplexity ratio and the mean KL divergence may not be worse.
    pub baseline: Option<PathBuf>,
    /// How much worse than the baseline's they may be, as "5%" or "0.05": 0 where it is not said.
    pub max_regression: Option<String>,
}

impl Bounds {
    /// The limits, as they were given and as a baseline sets them, which is read where `within` finds it.
    ///
    /// Fails where nothing could keep or miss a limit, and where the baseline has no report, or says nothing of quality.
    #[cfg_attr(doc, doc(hidden))]
    pub fn limits(&self, within: &dyn Fn(&Path) -> PathBuf) -> Result<Limits> {
        let Bounds { max_ppl_ratio, max_kld, min_top1, min_cosine, min_spearman, .. } = *self;
        let limits = Limits { max_ppl_ratio, max_kld, min_top1, min_cosine, min_spearman, baseline: None };
        let regression = self.max_regression.as_deref().map(|text| share("--max-regression", text)).transpose()?;
        let limits = match &self.baseline {
            Some(baseline) => limits.relative(&within(baseline), regression.unwrap_or(0.0))?,
            None => limits,
        };
        limits.check()?;
        Ok(limits)
    }
}

impl Limits {
    /// These limits, and those that an earlier report sets: its mean KL divergence may grow by this share, and the perplexity too.
    ///
    /// `baseline` is the report, or the output beside which it lies. Fails where there is none, or it says nothing of quality.
    #[cfg_attr(doc, doc(hidden))]
    pub fn relative(self, baseline: &Path, regression: f64) -> Result<Limits> {
        let shown = baseline.display();
        let is_report = baseline.is_file() && baseline.extension().is_some_and(|ending| ending == "json");
        let report: Option<Value> = match is_report {
            true => {
                let bytes = std::fs::read(baseline).map_err(Error::io(baseline, "read"))?;
                let report = serde_json::from_slice(&bytes);
                Some(report.map_err(|error| Error::usage(format!("{shown}: is no report of quantc: {error}")))?)
            }
            false => read_report(baseline)?,
        };
        let report = report.ok_or_else(|| {
            Error::usage(format!(
                "--baseline {shown}: there is no report; give a report.json, or an output beside which one lies"
            ))
        })?;
        let earlier = Earlier::of(&report).ok_or_else(|| {
            Error::usage(format!("--baseline {shown}: says nothing of quality; make it without --verify-text none"))
        })?;
        let number = |name: &str| report["quality"][name].as_u64().unwrap_or(0) as usize;
        let baseline =
            Some(Measured { context: number("context"), windows: number("windows"), tokens: number("tokens") });
        let tighter = |limit: Option<f64>, other: f64| Some(limit.map_or(other, |limit| limit.min(other)));
        Ok(Limits {
            max_kld: tighter(self.max_kld, earlier.kld_mean * (1.0 + regression)),
            max_ppl_ratio: tighter(self.max_ppl_ratio, earlier.perplexity_ratio * (1.0 + regression)),
            baseline,
            ..self
        })
    }

    /// Each limit in words, and what there is to say where it was missed.
    #[cfg_attr(doc, doc(hidden))]
    pub fn checks(&self, quality: Option<&Quality>, states: Option<&HiddenStates>) -> Vec<(String, Option<String>)> {
        let none = Limits::default();
        let single = [
            (self.max_ppl_ratio, "perplexity ratio at most", Limits { max_ppl_ratio: self.max_ppl_ratio, ..none }),
            (self.max_kld, "mean KL divergence at most", Limits { max_kld: self.max_kld, ..none }),
            (self.min_top1, "top-1 agreement at least", Limits { min_top1: self.min_top1, ..none }),
            (self.min_cosine, "mean cosine at least", Limits { min_cosine: self.min_cosine, ..none }),
            (self.min_spearman, "rank correlation at least", Limits { min_spearman: self.min_spearman, ..none }),
        ];
        let missed = |alone: Limits| alone.missed(quality, states).into_iter().next();
        let check =
            |(limit, what, alone): (Option<f64>, &str, Limits)| Some((format!("{what} {}", limit?), missed(alone)));
        let mut all: Vec<_> = single.into_iter().filter_map(check).collect();
        if self.baseline.is_some() {
            all.push(("measured as the baseline".to_owned(), missed(Limits { baseline: self.baseline, ..none })));
        }
        all
    }
}

/// What JUnit is told of one output.
pub struct Case {
    /// The output's place, which becomes the name of the class.
    pub output: String,
    /// How long it took.
    pub seconds: f64,
    /// What was tested, and what there is to say where it failed.
    pub checks: Vec<(String, Option<String>)>,
}

impl Case {
    /// That of an output that was written.
    pub fn of(path: &Path, report: &Report) -> Case {
        let mut checks = vec![("written".to_owned(), None)];
        if let Some(verdict) = &report.verdict {
            checks.extend(verdict.limits.checks(report.quality.as_ref(), report.hidden_states.as_ref()));
        }
        Case { output: path.display().to_string(), seconds: report.seconds.total, checks }
    }
}

impl Report {
    /// What is told of an output at a place, as an event.
    #[cfg_attr(doc, doc(hidden))]
    pub fn event(&self, place: &Path) -> Value {
        json!({
            "event": "output",
            "path": place.display().to_string(),
            "format": self.recipe.format,
            "scheme": self.recipe.scheme_name(),
            "bpw": self.bpw,
            "files": self.outputs,
            "quality": self.quality,
            "hidden_states": self.hidden_states,
            "verdict": self.verdict,
            "notes": self.notes,
            "seconds": self.seconds.total,
        })
    }
}

/// A text as it stands in XML, without the signs that XML has no way to write.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\n' | '\t' => out.push(' '),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// JUnit XML of outputs.
pub fn junit(outputs: &[Case]) -> String {
    let (mut cases, mut tests, mut failures, mut seconds) = (String::new(), 0, 0, 0.0);
    for case in outputs {
        let class = escaped(&case.output);
        for (index, (name, missed)) in case.checks.iter().enumerate() {
            let time = if index == 0 { case.seconds } else { 0.0 };
            let name = escaped(name);
            cases += &format!("    <testcase classname=\"{class}\" name=\"{name}\" time=\"{time:.3}\"");
            match missed {
                None => cases += "/>\n",
                Some(why) => {
                    let why = escaped(why);
                    cases +=
                        &format!(">\n      <failure message=\"{why}\">{class}: {why}</failure>\n    </testcase>\n");
                    failures += 1;
                }
            }
            tests += 1;
        }
        seconds += case.seconds;
    }
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n  <testsuite name=\"quantc\" tests=\"{tests}\" failures=\"{failures}\" \
         errors=\"0\" time=\"{seconds:.3}\">\n{cases}  </testsuite>\n</testsuites>\n"
    )
}

/// A summary in Markdown of targets that were not made: up to date or not, and what they miss.
pub fn standing(targets: &[Case]) -> String {
    let mut text = String::from("### quantc\n\n| output | state |\n|---|---|\n");
    for case in targets {
        let missed: Vec<&String> = case.checks.iter().filter_map(|(_, missed)| missed.as_ref()).collect();
        let state = match missed[..] {
            [] => "✅ up to date".to_owned(),
            _ => format!("❌ {}", cell(&missed.iter().map(|why| why.as_str()).collect::<Vec<_>>().join("; "))),
        };
        text += &format!("| {} | {state} |\n", cell(&case.output));
    }
    text
}

/// A text as it stands in a cell of a Markdown table.
fn cell(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '|' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '\\' | '#' => out.extend(['\\', c]),
            '\n' | '\r' => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// A summary in Markdown: of each output verdict and figures, and how these differ from what lay at its place before.
pub fn summary(outputs: &[(&Path, &Report)], earlier: &[Option<Earlier>]) -> String {
    let mut text = String::from(
        "### quantc\n\n| output | verdict | bits per weight | MB | perplexity ratio | KL divergence, mean | top-1 agreement |\n\
         |---|---|---:|---:|---:|---:|---:|\n",
    );
    let mut missed = String::new();
    for ((path, report), before) in outputs.iter().zip(earlier) {
        let name = cell(&path.display().to_string());
        let bytes: u64 = report.outputs.iter().map(|file| file.bytes).sum();
        let with = |now: String, change: Option<f64>| match change {
            Some(change) if change.is_finite() && change != 0.0 => format!("{now} ({change:+.2} %)"),
            Some(_) => format!("{now} (same)"),
            None => now,
        };
        let of = |now: f64, before: f64| 100.0 * (now / before - 1.0);
        let quality = report.quality.as_ref().and_then(|quality| quality.beside.as_ref());
        let figure = |get: fn(&super::Beside) -> f64, then: fn(&Earlier) -> f64, digits: usize| {
            quality.map_or("–".to_owned(), |beside| {
                with(format!("{:.digits$}", get(beside)), before.as_ref().map(|before| of(get(beside), then(before))))
            })
        };
        let verdict = match &report.verdict {
            None => "written",
            Some(verdict) if verdict.passed => "✅ limits kept",
            Some(_) => "❌ limits missed",
        };
        text += &format!(
            "| {name} | {verdict} | {:.2} | {} | {} | {} | {} |\n",
            report.bpw.quantized,
            with(format!("{:.2}", bytes as f64 / 1e6), before.map(|before| of(bytes as f64, before.bytes as f64))),
            figure(|b| b.perplexity_ratio, |e| e.perplexity_ratio, 4),
            figure(|b| b.kld_mean, |e| e.kld_mean, 5),
            figure(|b| b.top1_agreement, |e| e.top1_agreement, 4),
        );
        for why in report.verdict.iter().flat_map(|verdict| &verdict.missed) {
            missed += &format!("- {name}: {}\n", cell(why));
        }
    }
    if earlier.iter().any(Option::is_some) {
        text += "\nIn brackets the change from the output that was there before.\n";
    }
    if missed.is_empty() { text } else { format!("{text}\n{missed}") }
}

/// A line by which GitHub Actions marks a run: `level` is error, warning or notice.
pub fn annotation(level: &str, title: &str, text: &str) -> String {
    let value = |text: &str| text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    let property = |text: &str| value(text).replace(':', "%3A").replace(',', "%2C");
    format!("::{level} title={}::{}", property(title), value(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_as_people_write_them() {
        assert_eq!([share("x", "5%").unwrap(), share("x", "0.05").unwrap(), share("x", " 5 % ").unwrap()], [0.05; 3]);
        for text in ["", "%", "-1%", "five", "inf"] {
            assert_eq!(share("--max-regression", text).unwrap_err().exit_code(), 2, "{text}");
        }
    }

    #[test]
    fn names_break_neither_xml_nor_tables_nor_commands() {
        assert_eq!(escaped("a<b>&\"c\u{1}\n"), "a&lt;b&gt;&amp;&quot;c\u{fffd} ");
        assert_eq!(cell("a|b\n`c`"), "a\\|b \\`c\\`");
        assert_eq!(annotation("error", "a:b,c", "50 %\nnext"), "::error title=a%3Ab%2Cc::50 %25%0Anext");
    }
}
