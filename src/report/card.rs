//! The model card: a report for people.

use super::{AdapterReport, Quality, Report};
use crate::recipe::Recipe;
use crate::words::{called, one_line, table};

impl Report {
    /// A note without the places of the run's files, which differ between machines.
    fn without_places(&self, note: &str) -> String {
        let mut note = note.to_owned();
        let model = self.model.trim_end_matches(std::path::MAIN_SEPARATOR);
        if !model.is_empty() {
            note = note.replace(&format!("{model}{}", std::path::MAIN_SEPARATOR), "").replace(model, "the model");
        }
        let others = self.recipe.imatrix.iter().chain(&self.recipe.adapter).map(|path| path.display().to_string());
        for path in others.chain([self.recipe.calibration.clone()]) {
            note = note.replace(&path, called(&path));
        }
        note
    }

    /// The model card. Depends on nothing that changes between equal runs.
    pub fn card(&self) -> String {
        let Recipe { format, encoding, method, .. } = &self.recipe;
        let group = match encoding.group() {
            0 => "one scale per row".to_owned(),
            group => format!("groups of {group}"),
        };
        let scheme = self.recipe.width();
        let name = one_line(&self.name);
        let mut card = format!(
            "# {name}, {} ({})\n\nQuantized with {} to the {format} layout: {}, {group}, method {}.\n\n",
            scheme,
            method.name(),
            self.tool,
            scheme,
            method.name()
        );
        card += &format!(
            "- size: {:.2} bits per weight of the file ({:.2} of the quantized linears), the model as it was given {:.2}\n",
            self.bpw.file, self.bpw.quantized, self.bpw.original_file
        );
        if let Some(AdapterReport { path, kind, sha256, modules, replaced }) = &self.adapter {
            let name = one_line(called(path));
            card += &format!(
                "- merged with the {kind} adapter {name} (sha256 {sha256}): {modules} modules, {replaced} tensors replaced\n"
            );
        }
        match &self.calibration {
            Some(c) => {
                card += &format!(
                    "- calibrated on {} sequences of {} tokens of `{}` (seed {}; token ids sha256 {})\n",
                    c.sequences,
                    c.seq_len,
                    one_line(called(&c.name)),
                    c.seed,
                    c.tokens_sha256
                );
            }
            None => card += "- no calibration data was used\n",
        }
        let fallbacks = self.linears.iter().filter(|l| l.fallback.is_some()).count();
        card += &format!("- {} linears quantized, {fallbacks} with a fallback\n", self.linears.len());
        if let Some(quality) = &self.quality {
            card += "\n## Quality, measured on the files in this directory\n\n";
            card += &quality_markdown(quality);
        }
        for note in &self.notes {
            card += &format!("\n> {}\n", one_line(&self.without_places(note)));
        }
        card += "\nDetails of every tensor: report.json.\n";
        card
    }
}

/// What was measured in one evaluation, and what was found.
fn rows(quality: &Quality) -> Vec<[String; 2]> {
    let mut rows = vec![[quality.how(true), String::new()]];
    let mut row = |what: &str, value: String| rows.push([what.to_owned(), value]);
    row("perplexity", format!("{:.4} ± {:.4}", quality.perplexity, quality.perplexity_stderr));
    if let Some(b) = &quality.beside {
        let reference = match &b.reference_quantized {
            Some(how) => format!("perplexity of the reference, itself quantized ({how})"),
            None => "perplexity of the original".to_owned(),
        };
        row(&reference, format!("{:.4}", b.reference_perplexity));
        row("ratio", format!("{:.5} ± {:.5}", b.perplexity_ratio, b.perplexity_ratio_stderr));
        row("KL divergence, mean", format!("{:.5} ± {:.5}", b.kld_mean, b.kld_stderr));
        row(
            "KL divergence, median / 99 % / largest",
            format!("{:.5} / {:.4} / {:.3}", b.kld_median, b.kld_p99, b.kld_max),
        );
        row("same top token", format!("{:.2} %", 100.0 * b.top1_agreement));
    }
    rows
}

/// One evaluation as a table for people.
pub fn quality_text(quality: &Quality) -> String {
    let rows = rows(quality);
    let found: Vec<Vec<String>> = rows[1..].iter().map(|row| row.to_vec()).collect();
    format!("{}\n{}", rows[0][0], table(&found, 2))
}

/// One evaluation as a Markdown table.
fn quality_markdown(quality: &Quality) -> String {
    let mut table = String::new();
    for (index, [what, value]) in rows(quality).iter().enumerate() {
        table += &format!("| {} | {value} |\n", one_line(what));
        if index == 0 {
            table += "|---|---|\n";
        }
    }
    table
}
