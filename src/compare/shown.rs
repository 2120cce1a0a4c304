//! The table for a terminal, as Markdown and as CSV.

use super::Compared;
use super::row::{Measurement, Origin, Row};
use crate::words::{one_line, table};

/// What stands for a figure that there is not.
const NONE: &str = "–";

/// Columns of CSV: what they are called, and their value for a row.
type Column = (&'static str, fn(&Measurement) -> Option<f64>);

const COLUMNS: &[Column] = &[
    ("bytes", |found| Some(found.files.bytes as f64)),
    ("bpw_file", |found| Some(found.files.bpw)),
    ("bpw_quantized", |found| found.files.bpw_quantized),
    ("perplexity", |found| Some(found.text.perplexity)),
    ("perplexity_stderr", |found| Some(found.text.perplexity_stderr)),
    ("perplexity_ratio", |found| Some(found.text.ratio)),
    ("perplexity_ratio_stderr", |found| Some(found.text.ratio_stderr)),
    ("kld_mean", |found| Some(found.text.kld_mean)),
    ("kld_stderr", |found| Some(found.text.kld_stderr)),
    ("kld_median", |found| Some(found.text.kld_median)),
    ("kld_p99", |found| Some(found.text.kld_p99)),
    ("kld_max", |found| Some(found.text.kld_max)),
    ("top1", |found| Some(found.text.top1)),
    ("top1_stderr", |found| Some(found.text.top1_stderr)),
    ("tasks_accuracy", |found| found.tasks.as_ref().map(|tasks| tasks.accuracy)),
    ("tasks_accuracy_stderr", |found| found.tasks.as_ref().map(|tasks| tasks.accuracy_stderr)),
    ("tasks_difference", |found| found.tasks.as_ref().map(|tasks| tasks.difference)),
    ("tasks_difference_stderr", |found| found.tasks.as_ref().map(|tasks| tasks.difference_stderr)),
    ("tasks_changed", |found| found.tasks.as_ref().map(|tasks| tasks.changed as f64)),
    ("tasks_kld_mean", |found| found.tasks.as_ref().map(|tasks| tasks.kld_mean)),
    ("tasks_top1", |found| found.tasks.as_ref().map(|tasks| tasks.top1)),
];

/// A share in per cent.
fn percent(share: f64) -> String {
    format!("{:.2}", 100.0 * share)
}

/// A divergence: three digits of it, however small.
fn nats(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value.abs() < 1e-4 => format!("{value:.2e}"),
        value => format!("{value:.5}"),
    }
}

impl Compared {
    /// What was measured, in a line.
    #[cfg_attr(doc, doc(hidden))]
    pub fn how(&self) -> String {
        let first = self.rows.iter().find_map(|row| row.found.as_ref());
        let text = first.map_or(String::new(), |found| {
            let figures = &found.text;
            let (tokens, context, windows) = (figures.tokens, figures.context, figures.windows);
            let windows = if windows == 1 { "a window".to_owned() } else { format!("{windows} windows") };
            format!("{tokens} tokens of {}, in {windows} of {context}", one_line(&self.text))
        });
        let tasks =
            self.tasks.as_ref().map(|name| format!("; {} questions ({})", self.questions.len(), one_line(name)));
        format!("{}: {text}{}", one_line(&self.model), tasks.unwrap_or_default())
    }

    /// The main table, with a heading; * marks the rows of the Pareto front.
    fn main(&self) -> Vec<Vec<String>> {
        let names = [
            "",
            "",
            "MB",
            "bpw",
            "linears",
            "perplexity",
            "ratio",
            "KL mean",
            "KL 99 %",
            "KL max",
            "top-1 %",
            "tasks %",
            "tasks Δ",
        ];
        let row = |row: &Row| {
            let mark = if row.pareto { "*" } else { "" };
            let mut cells = vec![mark.to_owned(), row.name.clone()];
            let Some(found) = &row.found else {
                cells.push("failed".to_owned());
                cells.resize(names.len(), NONE.to_owned());
                return cells;
            };
            let text = &found.text;
            let tasks =
                |figure: fn(&super::tasks::Tasks) -> String| found.tasks.as_ref().map_or(NONE.to_owned(), figure);
            cells.extend([
                format!("{:.2}", found.files.bytes as f64 / 1e6),
                format!("{:.2}", found.files.bpw),
                found.files.bpw_quantized.map_or(NONE.to_owned(), |bpw| format!("{bpw:.2}")),
                format!("{:.3}", text.perplexity),
                format!("{:.4}", text.ratio),
                nats(text.kld_mean),
                nats(text.kld_p99),
                nats(text.kld_max),
                format!("{} ± {}", percent(text.top1), percent(text.top1_stderr)),
                tasks(|tasks| format!("{:.1}", 100.0 * tasks.accuracy)),
                tasks(|tasks| format!("{:+.1} ± {:.1}", 100.0 * tasks.difference, 100.0 * tasks.difference_stderr)),
            ]);
            if row.origin == Origin::Original {
                // It is what the others are compared with.
                [7, 8, 9, 10, 12].into_iter().for_each(|cell| cells[cell] = NONE.to_owned());
            }
            cells
        };
        let names = names.map(str::to_owned).to_vec();
        std::iter::once(names).chain(self.rows.iter().map(row)).collect()
    }

    /// KL and top-1 by domain.
    fn domains(&self) -> Vec<Vec<String>> {
        let mut heading = vec![String::new()];
        heading.extend(self.passages.iter().map(|passage| passage.domain.clone()));
        let measured = self.rows.iter().filter(|row| row.origin != Origin::Original);
        let rows = measured.filter_map(|row| {
            let figures = row.found.as_ref()?.domains.iter().map(|domain| &domain.figures);
            let cells = figures.map(|figures| format!("{} / {}", nats(figures.kld_mean), percent(figures.top1)));
            Some(std::iter::once(row.name.clone()).chain(cells).collect())
        });
        std::iter::once(heading).chain(rows).collect()
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n\n{}", self.how(), table(&self.main(), 2));
        let domains = self.domains();
        if domains.len() > 1 && domains[0].len() > 1 {
            text += &format!("\nKL mean / top-1 % by domain\n\n{}", table(&domains, 1));
        }
        text + "\n* no other row is both smaller and closer to the original.\n"
    }

    /// As Markdown.
    #[cfg_attr(doc, doc(hidden))]
    pub fn markdown(&self) -> String {
        let mut text = format!("# Comparison of {}\n\n{}.\n\n", escaped(&self.model), escaped(&self.how()));
        text += &markdown(&self.main(), 2);
        text += "\n\\* no other row is both smaller and closer to the original. linears: bits per weight of the quantized linears. tasks Δ: the \
                 share of right answers less the original's, with the standard error of the differences.\n";
        let domains = self.domains();
        if domains.len() > 1 && domains[0].len() > 1 {
            text += &format!("\n## By domain: KL mean / top-1 %\n\n{}", markdown(&domains, 1));
        }
        let failed: Vec<String> =
            self.failed().map(|(name, why)| format!("- {}: {}\n", escaped(name), escaped(why))).collect();
        if !failed.is_empty() {
            text += &format!("\n## What failed\n\n{}", failed.concat());
        }
        let notes = self.said();
        if !notes.is_empty() {
            text +=
                &format!("\n## Notes\n\n{}", notes.iter().map(|n| format!("- {}\n", escaped(n))).collect::<String>());
        }
        text + &format!("\nMade by {} on {}. All figures: compare.json.\n", self.tool, escaped(&self.device))
    }

    /// What there is to say of the texts, and of each row.
    #[cfg_attr(doc, doc(hidden))]
    pub fn said(&self) -> Vec<String> {
        let mut said = self.notes.clone();
        for row in &self.rows {
            let Some(found) = &row.found else { continue };
            let beside = found.beside.iter().map(|lead| {
                format!("calibrated on the inputs that the weights of {lead} make; --independent calibrates each scheme by itself")
            });
            said.extend(beside.chain(found.notes.iter().cloned()).map(|note| format!("{}: {note}", row.name)));
        }
        said
    }

    /// As CSV, a line for each row, with every figure unrounded.
    #[cfg_attr(doc, doc(hidden))]
    pub fn csv(&self) -> String {
        let domains: Vec<&str> = self.passages.iter().map(|passage| &passage.domain[..]).collect();
        let mut heading = vec!["name".to_owned(), "origin".to_owned(), "pareto".to_owned(), "failed".to_owned()];
        heading.extend(COLUMNS.iter().map(|(name, _)| (*name).to_owned()));
        heading.extend(domains.iter().flat_map(|domain| [format!("kld_mean_{domain}"), format!("top1_{domain}")]));
        let row = |row: &Row| {
            let origin = serde_json::to_value(row.origin).ok().and_then(|value| Some(value.as_str()?.to_owned()));
            let mut cells = vec![
                row.name.clone(),
                origin.unwrap_or_default(),
                u8::from(row.pareto).to_string(),
                row.failed.clone().unwrap_or_default(),
            ];
            let found = row.found.as_ref();
            let figure = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
            cells.extend(COLUMNS.iter().map(|(_, value)| figure(found.and_then(|found| value(found)))));
            for domain in &domains {
                let own = found.and_then(|found| found.domains.iter().find(|own| own.name == *domain));
                cells.extend([figure(own.map(|own| own.figures.kld_mean)), figure(own.map(|own| own.figures.top1))]);
            }
            cells
        };
        let lines = std::iter::once(heading).chain(self.rows.iter().map(row));
        lines.map(|cells| cells.iter().map(|cell| quoted(cell)).collect::<Vec<_>>().join(",") + "\n").collect()
    }
}

/// A cell of CSV; one that a spreadsheet would take for a formula is shown as text.
fn quoted(cell: &str) -> String {
    let formula =
        cell.starts_with(['=', '@', '\t', '\r']) || cell.starts_with(['+', '-']) && cell.parse::<f64>().is_err();
    let cell = if formula { format!("'{cell}") } else { cell.to_owned() };
    match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell,
    }
}

/// What stands for itself in Markdown; an underscore within a word does so anyway, and no figure or name suffers elsewhere.
fn escaped(text: &str) -> String {
    one_line(text).chars().flat_map(|c| if "\\`*[]<>|#&".contains(c) { vec!['\\', c] } else { vec![c] }).collect()
}

/// Rows as a table of Markdown, the first as its heading; all columns after the first `left` end at the right.
fn markdown(rows: &[Vec<String>], left: usize) -> String {
    let line =
        |cells: &[String]| format!("| {} |\n", cells.iter().map(|cell| escaped(cell)).collect::<Vec<_>>().join(" | "));
    let Some((heading, rows)) = rows.split_first() else { return String::new() };
    let under = (0..heading.len()).map(|column| if column < left { "---" } else { "---:" }).collect::<Vec<_>>();
    let rule = format!("| {} |\n", under.join(" | "));
    line(heading) + &rule + &rows.iter().map(|row| line(row)).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_what_they_are_of() {
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
        assert_eq!([quoted("=1+1"), quoted("-0.5"), quoted("-x")], ["'=1+1", "-0.5", "'-x"]);
        assert_eq!(escaped("a|b\n<i>"), "a\\|b\\\\n\\<i\\>");
        assert_eq!([nats(0.0), nats(1.234e-6), nats(0.0123456)], ["0", "1.23e-6", "0.01235"]);
        let rows = [["", "x"], ["a", "1"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(markdown(&rows, 1), "|  | x |\n| --- | ---: |\n| a | 1 |\n");
    }
}
