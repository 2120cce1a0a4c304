//! What a run will do, told before it does anything.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::memory::gigabytes;
use crate::report::{BitsPerWeight, Fate, TensorReport};
use crate::serving::{Finding, Fit, Splits};
use crate::words::{counted, one_line, starred};

/// A run that was planned.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Planned {
    /// Name and version of the program.
    pub tool: String,
    /// The device it would run on.
    pub device: String,
    /// The path of the input.
    pub model: String,
    /// What it calls itself.
    pub name: String,
    /// Its family.
    pub family: &'static str,
    /// Parameters in its tensors.
    pub parameters: u64,
    /// Bytes of its weight files.
    pub bytes: u64,
    /// Whether the output projection is the embedding, which is stored once.
    pub tied: bool,
    /// Each output, in the order in which they were asked for.
    pub outputs: Vec<PlannedOutput>,
    /// What the run takes of the machine.
    pub takes: Takes,
    /// How long it takes, in seconds, where it was asked for.
    pub seconds: Option<PlannedSeconds>,
}

/// One output of a planned run.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct PlannedOutput {
    /// Where it would be written; none where no place was named.
    pub path: Option<String>,
    /// The layout, as `--format` names it.
    pub format: String,
    /// The scheme, or a GGUF file's mix.
    pub scheme: String,
    /// How codes are chosen.
    pub method: &'static str,
    /// The files that hold its weights, with an index of them where there are several.
    pub files: Vec<PlannedFile>,
    /// Bytes of these files, headers and index included.
    pub bytes: u64,
    /// Bytes of everything that is copied beside them, config.json and report apart.
    pub beside_bytes: u64,
    /// Bits per weight: of the quantized linears, of the files, and of the original's.
    pub bpw: BitsPerWeight,
    /// Every linear of the blocks.
    pub linears: Vec<PlannedLinear>,
    /// The embedding and the head, where they are quantized.
    pub ends: Vec<PlannedLinear>,
    /// Every tensor of the input.
    pub tensors: Vec<TensorReport>,
    /// Channel scales that are searched and folded into what makes the channels.
    pub folds: Vec<PlannedFold>,
    /// What the report would say of it.
    pub notes: Vec<String>,
    /// What serving it takes.
    pub serving: Serving,
}

/// What serving an output takes.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Serving {
    /// Tokens of a sequence that were asked for.
    pub context: u64,
    /// Tokens of a sequence that the model takes.
    pub longest: Option<u64>,
    /// Sequences at a time.
    pub batch: u64,
    /// Bytes of their cache in 16 bits; none of a model of which only the linears are known.
    pub cache_16_bit: Option<u64>,
    /// The same in 8 bits.
    pub cache_8_bit: Option<u64>,
    /// Cards of the usual sizes.
    pub cards: Vec<Fit>,
    /// The runtime that was named.
    pub runtime: Option<&'static str>,
    /// What it, and the GPU that was named, will not do.
    pub findings: Vec<Finding>,
    /// GPUs that it was to be divided among.
    pub tensor_parallel: usize,
    /// Among how many it can be; none of a runtime that does not divide so, or where none was named.
    pub splits: Option<Splits>,
}

/// A file and its size.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct PlannedFile {
    /// Its name, without the folder.
    pub name: String,
    /// Its size in bytes, exactly.
    pub bytes: u64,
}

/// What becomes of a linear.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PlannedLinear {
    /// The module.
    pub name: String,
    /// Output and input features.
    pub shape: [usize; 2],
    /// The encoding of each part that it is written in; none where it stays as it is.
    pub parts: Vec<PlannedPart>,
    /// What was decided in place of what was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// A part of a linear as it is written.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PlannedPart {
    /// What the file calls it.
    pub name: String,
    /// How it is represented: ggml's type, or a scheme.
    #[serde(rename = "type")]
    pub ty: String,
    /// Width of a code.
    pub bits: u8,
    /// Columns per scale; −1 for a whole row.
    pub group_size: i64,
    /// Whether the levels lie around 0.
    pub symmetric: bool,
}

/// A fold of channel scales.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PlannedFold {
    /// The norm or linear that makes the channels.
    pub producer: String,
    /// The linears that read them.
    pub readers: Vec<String>,
}

/// What a run takes of the machine.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Takes {
    /// Bytes of the host's memory at the most, mapped files apart; none where a GPU's own memory is what counts.
    pub memory: Option<u64>,
    /// Bytes of the host's memory that can be had.
    pub memory_free: Option<u64>,
    /// Bytes of a GPU's memory without which it cannot work at all.
    pub gpu_memory: Option<u64>,
    /// Bytes of it that may be used, up to which what is kept is kept there.
    pub gpu_memory_free: Option<u64>,
    /// Bytes that are written beside the outputs' places, where they stay hidden until all of it is there.
    pub disk: u64,
    /// Bytes that are free there; none where no place was named.
    pub disk_free: Option<u64>,
}

/// How long the parts of a run take.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct PlannedSeconds {
    /// Running the model while it is quantized.
    pub forward: f64,
    /// Gathering statistics of inputs.
    pub observe: f64,
    /// Searching channel scales.
    pub smooth: f64,
    /// Factoring Hessians, searching scales, choosing codes.
    pub solve: f64,
    /// Measuring what was written beside the original.
    pub verify: f64,
    /// All of it, with what comes before and after.
    pub total: f64,
    /// How long was measured for it.
    pub measured: f64,
}

impl Planned {
    /// Whether the named runtime refuses an output.
    pub fn refused(&self) -> bool {
        self.outputs.iter().any(|output| output.serving.findings.iter().any(|finding| finding.refused))
    }

    /// For people. Linears that only a number tells apart are one line.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{}: {}, {:.2} million parameters, {}{}\n",
            one_line(&self.name),
            self.family,
            self.parameters as f64 / 1e6,
            size(self.bytes),
            if self.tied { ", the output projection is the embedding" } else { "" }
        );
        for output in &self.outputs {
            text += &output.text();
        }
        let seconds = self.seconds.map_or(String::new(), |seconds| seconds.text(&self.device));
        text + &self.takes.text() + &seconds
    }
}

/// Bytes as people read them, in two or three figures.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.0} KB", bytes as f64 / 1e3),
        1_000_000..10_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => gigabytes(bytes),
    }
}

impl PlannedPart {
    /// In a word or two.
    fn said(&self) -> String {
        let symmetric = if self.symmetric { "" } else { ", with zero points" };
        match self.group_size {
            _ if self.bits == 0 || self.ty.chars().next().is_some_and(char::is_lowercase) => self.ty.clone(),
            -1 => format!("{}, a scale for each row{symmetric}", self.ty),
            group => format!("{}, groups of {group}", self.ty),
        }
    }
}

impl PlannedLinear {
    fn said(&self) -> String {
        let mut parts: Vec<String> = self.parts.iter().map(PlannedPart::said).collect();
        parts.dedup();
        let said = if parts.is_empty() { "as it is".to_owned() } else { parts.join(" and ") };
        let own = |part: &PlannedPart| part.name != self.name && part.name != format!("{}.weight", self.name);
        let mut files: Vec<String> =
            self.parts.iter().filter(|part| own(part)).map(|part| starred(&part.name)).collect();
        files.dedup();
        let said = if files.is_empty() { said } else { format!("{said}, as {}", files.join(" and ")) };
        said + &self.fallback.as_ref().map_or(String::new(), |why| format!(" ({why})"))
    }
}

/// A name without the numbers in it, and how often it comes, with what is said of it, in the order of the first.
fn collapsed(all: impl Iterator<Item = (String, String)>) -> Vec<(String, String, usize)> {
    let mut found: Vec<(String, String, usize)> = Vec::new();
    let mut at: BTreeMap<(String, String), usize> = BTreeMap::new();
    for (name, said) in all {
        let key = (starred(&name), said);
        match at.get(&key) {
            Some(at) => found[*at].2 += 1,
            None => {
                at.insert(key.clone(), found.len());
                found.push((key.0, key.1, 1));
            }
        }
    }
    found
}

impl PlannedOutput {
    fn text(&self) -> String {
        let place = self.path.as_ref().map_or(String::new(), |path| format!("{}: ", one_line(path)));
        let mut text = format!(
            "\n{place}{} {}, method {}: {} ({:.2} bits per weight in quantized linears, {:.2} of the file)\n",
            self.format,
            self.scheme,
            self.method,
            size(self.bytes),
            self.bpw.quantized,
            self.bpw.file
        );
        for file in self.files.iter().filter(|_| self.files.len() > 1) {
            text += &format!("  {:<44} {:>14} bytes\n", one_line(&file.name), file.bytes);
        }
        let shape = |linear: &PlannedLinear| format!("{:?} {}", linear.shape, linear.said());
        text += &counted(&collapsed(self.linears.iter().map(|linear| (linear.name.clone(), shape(linear)))));
        text += &counted(&collapsed(self.ends.iter().map(|linear| (linear.name.clone(), shape(linear)))));
        let kept = self.tensors.iter().filter(|tensor| tensor.fate != Fate::Quantized);
        text += &counted(&collapsed(kept.map(|tensor| (tensor.name.clone(), fate(tensor)))));
        if !self.folds.is_empty() {
            text += "  folded, so that the model computes the same:\n";
            let folds =
                self.folds.iter().map(|fold| (fold.producer.clone(), format!("scales of {}", short(&fold.readers))));
            text += &counted(&collapsed(folds));
        }
        text += &self.serving.text();
        for note in &self.notes {
            text += &format!("  note: {}\n", one_line(note));
        }
        text
    }
}

/// The last parts of names.
fn short(names: &[String]) -> String {
    let mut all: Vec<&str> = names.iter().filter_map(|name| name.rsplit('.').next()).collect();
    all.dedup();
    all.join(", ")
}

fn fate(tensor: &TensorReport) -> String {
    let said = match &tensor.fate {
        Fate::Quantized => "quantized".to_owned(),
        Fate::Copied => "copied".to_owned(),
        Fate::Aside(what) => format!("copied, as {what}"),
        Fate::Tied => "not stored, for the embedding is the same".to_owned(),
        Fate::Dropped(why) => format!("left out: {why}"),
    };
    match tensor.ty {
        Some(ty) => format!("{said} as {ty}"),
        None => said,
    }
}

impl Serving {
    fn text(&self) -> String {
        let mut text = String::new();
        if let (Some(half), Some(byte)) = (self.cache_16_bit, self.cache_8_bit) {
            text += &format!(
                "  serving {} of {} tokens: a cache of {} in 16 bits, {} in 8\n",
                if self.batch == 1 { "one sequence".to_owned() } else { format!("{} sequences", self.batch) },
                self.context,
                size(half),
                size(byte)
            );
            let cards = if self.tensor_parallel == 1 {
                "a card of ".to_owned()
            } else {
                format!("{} cards of", self.tensor_parallel)
            };
            text += &format!("    {cards:<13} cache in 16 bits            cache in 8 bits\n");
            let of = |fits: bool, most: u64| match (fits, most) {
                (_, 0) => "does not fit".to_owned(),
                (true, most) => format!("fits, up to {most} tokens"),
                (false, most) => format!("only {most} tokens"),
            };
            // Larger cards than one that all of it fits on say nothing more.
            let whole = |card: &Fit| {
                card.fits_8_bit && card.fits_16_bit && self.longest.is_none_or(|all| card.context_16_bit >= all)
            };
            let last = self.cards.iter().position(whole).unwrap_or(self.cards.len());
            for card in self.cards.iter().take(last + 1) {
                let (half, byte) = (of(card.fits_16_bit, card.context_16_bit), of(card.fits_8_bit, card.context_8_bit));
                text += &format!("    {:>6} GB     {half:<27} {byte}\n", card.gib);
            }
        }
        if let Some(splits) = &self.splits {
            let works: Vec<String> = splits.works.iter().map(usize::to_string).collect();
            text += &format!("  divided among GPUs: {} work, {} at the most\n", works.join(", "), splits.largest);
        }
        for finding in &self.findings {
            let level = if finding.refused { "refused" } else { "told" };
            text += &format!("  {level}: {}\n", one_line(&finding.text));
        }
        if let (Some(runtime), true) = (self.runtime, self.findings.is_empty()) {
            text += &format!("  {runtime} is not known to refuse anything of it\n");
        }
        text
    }
}

impl Takes {
    fn text(&self) -> String {
        let beside = |free: Option<u64>| free.map_or(String::new(), |free| format!(" ({} can be had)", size(free)));
        let mut text = String::from("\n");
        if let Some(memory) = self.memory {
            text += &format!("memory    up to about {}{}\n", size(memory), beside(self.memory_free));
        }
        if let Some(memory) = self.gpu_memory {
            text += &format!(
                "GPU       {} at the least, and more as there is{}\n",
                size(memory),
                beside(self.gpu_memory_free)
            );
        }
        text + &format!("disk      {} while it is written, and after{}\n", size(self.disk), beside(self.disk_free))
    }
}

/// A time as people read it.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

impl PlannedSeconds {
    fn text(&self, device: &str) -> String {
        let PlannedSeconds { forward, observe, smooth, solve, verify, total, measured } = *self;
        let parts = [
            ("running the model", forward),
            ("statistics", observe),
            ("channel scales", smooth),
            ("choosing codes", solve),
            ("measuring the output", verify),
        ];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, s)| *s > 0.005 * total)
            .map(|(what, s)| format!("{what} {}", duration(*s)))
            .collect();
        format!(
            "time      about {} on {device}: {} (guessed from {measured:.1} s of trials)\n",
            duration(total),
            parts.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_number_tells_apart_are_one_line() {
        let all = ["m.0.q", "m.1.q", "m.10.q", "m.0.k", "head"].map(|name| (name.to_owned(), "4 bits".to_owned()));
        let found = collapsed(all.into_iter());
        let found: Vec<(&str, usize)> = found.iter().map(|(name, _, count)| (&**name, *count)).collect();
        assert_eq!(found, [("m.*.q", 3), ("m.*.k", 1), ("head", 1)]);
    }

    #[test]
    fn times_are_told_as_people_say_them() {
        assert_eq!([0.04, 9.94, 95.0, 600.0, 9000.0].map(duration), ["0.0 s", "9.9 s", "95 s", "10 min", "2.5 h"]);
    }
}
