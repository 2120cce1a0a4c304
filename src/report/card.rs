//! The model card: a report for people.

use super::{AdapterReport, Drafts, HiddenStates, Limits, Quality, Report, Verdict};
use crate::mixes::Mix;
use crate::recipe::Recipe;
use crate::words::{called, one_line, table};

/// What a model card says of the model that its own was made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Original {
    /// Lines of the front matter that name its licence, as its own card has them.
    pub license: Vec<String>,
    /// What it is called on a hub, as `org/name`, where that is known.
    pub base: Option<String>,
}

impl Recipe {
    /// The command by which a runtime takes what was written to `place`.
    pub fn runs(&self, place: &str) -> String {
        match &self.format[..] {
            "gguf" => format!("llama-cli -m {place}"),
            "mlx" => format!("mlx_lm.generate --model {place} --prompt \"Hello\""),
            _ => format!("vllm serve {place}"),
        }
    }
}

impl Report {
    /// The command by which a runtime takes what was written to `place`; `None` where it generates nothing, and where a note says that the
    /// runtime does not take it.
    #[cfg_attr(doc, doc(hidden))]
    pub fn runs(&self, place: &str) -> Option<String> {
        let runtime = match &self.recipe.format[..] {
            "gguf" => "llama.cpp",
            "mlx" => "mlx-lm",
            _ => "vLLM",
        };
        let refusals = ["not load", "refuse", "does not run", "does not find", "no output projection", "is not known"];
        let unsaid = |note: &String| {
            (note.contains(runtime) || note.contains("no output projection") || note.contains("type is not known"))
                && refusals.iter().any(|refusal| note.contains(refusal))
        };
        let embeds = self.quality.is_none() && self.hidden_states.is_some();
        (!embeds && !self.notes.iter().any(unsaid)).then(|| self.recipe.runs(place))
    }

    /// The commands by which Ollama takes a GGUF file that was written to `place`; `None` for what it does not read: other formats, files in
    /// parts, and what llama.cpp does not run.
    #[cfg_attr(doc, doc(hidden))]
    pub fn ollama(&self, place: &str) -> Option<String> {
        if self.recipe.format != "gguf" || self.outputs.len() > 1 {
            return None;
        }
        self.runs(place)?;
        let path = std::path::Path::new(place);
        // A name without a folder would be one of a model in Ollama's library.
        let from = if path.is_absolute() || place.starts_with('.') { place.to_owned() } else { format!("./{place}") };
        let letter =
            |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c.to_ascii_lowercase() } else { '-' };
        let name: String = path.file_stem()?.to_string_lossy().chars().map(letter).collect();
        Some(format!("echo 'FROM {from}' > Modelfile && ollama create {name} -f Modelfile && ollama run {name}"))
    }

    /// A note without the places of the run's files, which differ between machines.
    fn without_places(&self, note: &str) -> String {
        let mut note = note.to_owned();
        let separator = std::path::MAIN_SEPARATOR;
        let model = self.model.trim_end_matches(separator);
        // A name alone says nothing of a place, and may be a word of the note.
        if model.contains(separator) {
            note = note.replace(&format!("{model}{separator}"), "").replace(model, "the model");
        } else if let Some(rest) = note.strip_prefix(model).filter(|rest| rest.starts_with([separator, ' ', ':'])) {
            note = rest.strip_prefix(separator).map_or_else(|| format!("the model{rest}"), str::to_owned);
        }
        let others = self.recipe.imatrix.iter().chain(&self.recipe.adapter).map(|path| path.display().to_string());
        for path in others.chain([self.recipe.calibration.clone()]) {
            note = note.replace(&path, called(&path));
        }
        note
    }

    /// The front matter, in YAML.
    fn front(&self, original: &Original) -> String {
        let Recipe { format, encoding, method, .. } = &self.recipe;
        let mut front = vec!["---".to_owned()];
        front.extend(original.license.iter().cloned());
        if let Some(base) = &original.base {
            front.push(format!("base_model: {base}"));
            front.push("base_model_relation: quantized".to_owned());
        }
        let library = match &format[..] {
            "gguf" | "mlx" => format,
            _ => "transformers",
        };
        front.push(format!("library_name: {library}"));
        front.push("tags:".to_owned());
        let bits = match &self.recipe.gguf {
            Some(gguf) => Mix::parse(gguf.mix).map_or(0, |mix| mix.base().encoding().levels.bits()),
            None => encoding.levels.bits(),
        };
        let scheme = self.recipe.width().to_lowercase();
        let mut tags = vec![format.clone(), method.name().to_owned()];
        tags.extend((bits > 0).then(|| format!("{bits}-bit")));
        tags.push(scheme);
        tags.push("quantc".to_owned());
        // The format may be called as the method is.
        let mut told: Vec<String> = Vec::new();
        tags.into_iter().for_each(|tag| {
            if !told.contains(&tag) {
                told.push(tag);
            }
        });
        front.extend(told.into_iter().map(|tag| format!("- {tag}")));
        front.push("---\n\n".to_owned());
        front.join("\n")
    }

    /// The model card, beside which the report is called `report`. Depends on nothing that changes between equal runs.
    #[cfg_attr(doc, doc(hidden))]
    pub fn card(&self, original: &Original, report: &str) -> String {
        let Recipe { format, encoding, method, .. } = &self.recipe;
        let group = match encoding.group() {
            _ if self.recipe.gguf.is_some() => String::new(),
            0 => ", one scale per row".to_owned(),
            group => format!(", groups of {group}"),
        };
        let scheme = self.recipe.width();
        let name = one_line(&self.name);
        let base = original.base.as_ref().map_or(String::new(), |base| format!(" It was made of {base}."));
        let mut card = self.front(original)
            + &format!(
                "# {name}, {scheme} ({})\n\nThe language model {name}, quantized with {} to the {format} layout: {scheme}{group}, method \
                 {}.{base}\n\n",
                method.name(),
                self.tool,
                method.name()
            );
        card += &format!(
            "- size: {:.2} bits per weight of the file ({:.2} of the quantized linears), the model as it was given {:.2}\n",
            self.bpw.file, self.bpw.quantized, self.bpw.original_file
        );
        card += &self.usage();
        card += "\n## How it was made\n\n";
        card += &self.made().iter().map(|line| format!("- {line}\n")).collect::<String>();
        let measured = [self.quality.as_ref().map(rows), self.hidden_states.as_ref().map(HiddenStates::rows)];
        let measured: Vec<Vec<[String; 2]>> = measured.into_iter().flatten().collect();
        if !measured.is_empty() {
            card += &format!(
                "\n## Quality, measured on {}\n\n",
                match self.file() {
                    Some(file) if self.outputs.len() == 1 => file,
                    Some(_) => "the parts of the file",
                    None => "the files in this directory",
                }
            );
            card += &measured.iter().map(|rows| markdown(rows)).collect::<Vec<_>>().join("\n");
            card += &self.verdict.as_ref().map_or(String::new(), |verdict| format!("\n{}\n", verdict.sentence()));
        }
        let mut notes = self.notes.iter().map(|note| one_line(&self.without_places(note))).peekable();
        if notes.peek().is_some() {
            card += "\n## Notes\n";
        }
        notes.for_each(|note| card += &format!("\n> {note}\n"));
        card += &format!("\nDetails of every tensor: {report}.\n");
        card
    }

    /// The name of the GGUF file, or of the first of its parts; `None` for an output that is a folder.
    fn file(&self) -> Option<&str> {
        let first = self.outputs.first().filter(|_| self.recipe.format == "gguf")?;
        Some(&first.name)
    }

    /// The commands by which runtimes take the output, or nothing where none does.
    fn usage(&self) -> String {
        let Some(command) = self.runs(self.file().unwrap_or("PATH")) else { return String::new() };
        let mut usage = format!("\n## How to use it\n\n```sh\n{command}\n```\n");
        match self.file() {
            None => usage += "\nPATH is this folder, or the repository that it lies in.\n",
            Some(file) => {
                if let Some(projector) = &self.projector {
                    let command = format!(
                        "llama-mtmd-cli -m {file} --mmproj {} --image IMAGE -p \"What is this?\"",
                        projector.name
                    );
                    usage += &format!(
                        "\nWith an image, or with `--audio SOUND` where the model hears:\n\n```sh\n{command}\n```\n"
                    );
                }
                if let Some(command) = self.ollama(file) {
                    usage += &format!("\nIn Ollama:\n\n```sh\n{command}\n```\n");
                }
            }
        }
        usage
    }

    /// The recipe in words, a line for each part of it.
    fn made(&self) -> Vec<String> {
        let recipe = &self.recipe;
        let mut made = Vec::new();
        if let Some(AdapterReport { path, hub, kind, sha256, modules, replaced }) = &self.adapter {
            let name = one_line(hub.as_deref().unwrap_or_else(|| called(path)));
            made.push(format!(
                "merged with the {kind} adapter {name} (sha256 {sha256}): {modules} modules, {replaced} tensors replaced"
            ));
        }
        let idle = |key: &str| recipe.idle.contains(&key);
        let mut how = format!("method {}, scales chosen by {}", recipe.method.name(), recipe.observer);
        if !idle("damp") {
            let order = if recipe.act_order { "columns by falling energy" } else { "columns from left to right" };
            let refined =
                if recipe.refine && !idle("refine") { ", scales and codes moved once more after it" } else { "" };
            how += &format!(", damping {}, {order}{refined}", recipe.damp);
        }
        if recipe.desc_act {
            how += ", groups in processing order (desc_act)";
        }
        if recipe.moe_all_experts && !idle("moe_all_experts") {
            how += ", every expert calibrated on all tokens";
        }
        made.push(how);
        made.push(match &self.calibration {
            Some(c) => format!(
                "calibrated on {} sequences of {} tokens of `{}` (seed {}; token ids sha256 {})",
                c.sequences,
                c.seq_len,
                one_line(called(&c.name)),
                c.seed,
                c.tokens_sha256
            ),
            None => "no calibration data was used".to_owned(),
        });
        if let Some(imatrix) = recipe.imatrix.as_ref().filter(|_| !idle("imatrix")) {
            let path = imatrix.display().to_string();
            made.push(format!("importance of inputs from {}", one_line(called(&path))));
        }
        let listed = |patterns: Vec<&str>| patterns.iter().map(|p| format!("`{}`", one_line(p))).collect::<Vec<_>>();
        let ignored = recipe.overrides.iter().filter(|o| o.ignore).map(|o| &o.pattern[..]);
        let ignored = listed(recipe.ignore.iter().map(|p| &p[..]).chain(ignored).collect());
        if !ignored.is_empty() {
            made.push(format!("left as they are: {}", ignored.join(", ")));
        }
        let others = listed(recipe.overrides.iter().filter(|o| !o.ignore).map(|o| &o.pattern[..]).collect());
        if !others.is_empty() {
            made.push(format!("settings of their own: {}", others.join(", ")));
        }
        made.push(match self.fallbacks() {
            0 => format!("{} linears quantized", self.linears.len()),
            fallbacks => format!("{} linears quantized, {fallbacks} with a fallback", self.linears.len()),
        });
        made
    }
}

impl Verdict {
    /// What was asked for, and whether it was kept.
    fn sentence(&self) -> String {
        let Limits { max_ppl_ratio, max_kld, min_top1, min_cosine, min_spearman, .. } = self.limits;
        let asked: Vec<String> = [
            max_ppl_ratio.map(|limit| format!("a perplexity ratio of at most {limit}")),
            max_kld.map(|limit| format!("a mean KL divergence of at most {limit}")),
            min_top1.map(|limit| format!("a share of equal top tokens of at least {limit}")),
            min_cosine.map(|limit| format!("a mean cosine of at least {limit}")),
            min_spearman.map(|limit| format!("a rank correlation of at least {limit}")),
        ]
        .into_iter()
        .flatten()
        .collect();
        let found = if self.passed { "kept".to_owned() } else { format!("missed: {}", self.missed.join(", ")) };
        format!("Limits: {}; {found}.", asked.join(", "))
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
    for Drafts { block, agreement, reference_agreement, .. } in &quality.further {
        let reference = reference_agreement.map_or(String::new(), |share| format!(" ({:.2} % before)", 100.0 * share));
        row(&format!("drafts of {block} that the model would say"), format!("{:.2} %{reference}", 100.0 * agreement));
    }
    rows
}

/// One evaluation as a table for people.
pub fn quality_text(quality: &Quality) -> String {
    let rows = rows(quality);
    let found: Vec<Vec<String>> = rows[1..].iter().map(|row| row.to_vec()).collect();
    format!("{}\n{}", rows[0][0], table(&found, 2))
}

/// What was measured and found as a Markdown table.
fn markdown(rows: &[[String; 2]]) -> String {
    let mut table = String::new();
    for (index, [what, value]) in rows.iter().enumerate() {
        table += &format!("| {} | {value} |\n", one_line(what));
        if index == 0 {
            table += "|---|---|\n";
        }
    }
    table
}
