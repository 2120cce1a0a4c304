//! Measures checkpoints on one text, alone or beside one reference.

use std::path::{Path, PathBuf};

use kernels::Backend;
use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::families;
use crate::job::fewer_windows;
use crate::job::key::kept_of;
use crate::memory::{self, Device, Expected, Free, Tokens};
use crate::progress::Progress;
use crate::report::{Activations, HiddenStates, Limits, Protocol, Quality, Verdict, quality_text, states_text};
use crate::stray;
use crate::text::{HELD_OUT, ModelText, TextError, load_text};
use crate::verify::{Gives, Measured, Reference, compare_hidden, declared_activations, evaluate_all};
use crate::words::table;

/// What is to be measured, and how.
pub struct Evaluation<'a> {
    /// The models, at least one.
    pub models: &'a [PathBuf],
    /// A LoRA adapter that is merged into the one model.
    pub adapter: Option<&'a Path>,
    /// What they are measured beside.
    pub reference: Option<&'a Path>,
    /// A LoRA adapter that is merged into the reference.
    pub reference_adapter: Option<&'a Path>,
    /// A file or a bundled text; the bundled held-out text without.
    pub text: Option<&'a str>,
    /// Tokens of a window; cut down to what the models can take.
    pub context: usize,
    /// Windows at most; all that the text gives where it is not said.
    pub windows: Option<usize>,
    /// Which tokens are scored.
    pub protocol: Protocol,
    /// What linears and attention of the models read; without, what each model says.
    pub activations: Option<Activations>,
    /// Limits that each model is held to.
    pub limits: Limits,
}

/// What was found of one model.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Entry {
    /// How good its predictions are; nothing of a model that makes embeddings, or scores.
    #[serde(flatten)]
    pub quality: Option<Quality>,
    /// Beside the reference, of a model that makes embeddings or scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_states: Option<HiddenStates>,
    /// How large it is.
    #[serde(flatten)]
    pub size: Size,
    /// Whether it keeps the limits, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
}

/// How large a model is.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct Size {
    /// Bits per weight over all of its tensors.
    pub bpw: f64,
    /// Bytes of its tensors.
    pub bytes: u64,
}

/// What was found of every model, in the order in which they were named.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Evaluated {
    /// Of each model, in the order in which they were asked for.
    pub models: Vec<Entry>,
    /// The size of the reference.
    pub reference: Option<Size>,
    /// What there is to say of the text.
    pub notes: Vec<String>,
    /// What there is to say of the models.
    pub remarks: Vec<String>,
}

/// The models that go through the text together; what is known of each does not depend on it.
struct Opened {
    models: Vec<Checkpoint>,
    reference: Option<Checkpoint>,
    windows: Vec<Vec<u32>>,
    /// What comes out of them, by the reference if there is one.
    gives: Gives,
    /// What the tokenizer puts before a text, and after it.
    around: [Vec<u32>; 2],
}

impl Evaluation<'_> {
    /// Measures them: all at once where memory allows that, so that the reference runs once, else one after the other.
    ///
    /// Fails for limits without a reference, for one adapter with several models, and for models that make other tokens of the text than
    /// the rest, all before anything runs.
    pub fn run<B: Backend>(&self, backend: &B, progress: &mut Progress) -> Result<Evaluated> {
        self.check()?;
        let (mut notes, mut remarks) = (Vec::new(), Vec::new());
        let opened = self.open(&mut notes, &mut remarks)?;
        let Opened { models, reference, windows, gives, .. } = &opened;
        let reference = reference.as_ref();
        remarks.extend(gives.notes.iter().cloned());
        let states = self.states(backend, &opened, progress)?;
        if !gives.predicts {
            let entries =
                states.into_iter().zip(models).map(|(states, model)| self.entry(None, states, model)).collect();
            return Ok(Evaluated { models: entries, reference: reference.map(Size::of), notes, remarks });
        }
        let activations = |model| self.activations.unwrap_or_else(|| self.usual_activations(model));
        let asked: Vec<Measured<'_>> =
            models.iter().map(|model| Measured { model, activations: activations(model) }).collect();
        let (at_once, expected) = self.at_once(Device::of(backend), &opened)?;
        if let Some(expected) = expected {
            let tokens = windows.first().map_or(0, Vec::len);
            progress.say(&expected.line(&[format!("measuring {} windows of {tokens} tokens", windows.len())]));
        }
        if at_once < asked.len() && reference.is_some() {
            progress.say(&format!("the memory is too small for all models at once: {at_once} at a time are measured"));
        }
        let kept = reference.map(|model| kept_of(backend, model, None)).transpose()?.flatten();
        let beside = reference.map(|model| Reference { model, kept: kept.as_ref() });
        let mut found = Vec::new();
        for together in asked.chunks(at_once) {
            let called = match together {
                [_] if asked.len() == 1 => "the model".to_owned(),
                [one] => one.model.path().display().to_string(),
                all => format!("{} models", all.len()),
            };
            found.extend(evaluate_all(backend, &called, together, beside, windows, self.protocol, progress)?);
        }
        let all = found.into_iter().zip(states).zip(models);
        let entries = all.map(|((quality, states), model)| self.entry(Some(quality), states, model)).collect();
        Ok(Evaluated { models: entries, reference: reference.map(Size::of), notes, remarks })
    }

    /// What was found of a model.
    fn entry(&self, quality: Option<Quality>, hidden_states: Option<HiddenStates>, model: &Checkpoint) -> Entry {
        let beside = quality.as_ref().is_some_and(|quality| quality.beside.is_some()) || hidden_states.is_some();
        let verdict = beside.then(|| Verdict::of(self.limits, quality.as_ref(), hidden_states.as_ref())).flatten();
        Entry { verdict, size: Size::of(model), quality, hidden_states }
    }

    /// Of each model what it makes of texts beside the reference, where it is measured by that.
    ///
    /// Fails without a reference for models that predict nothing.
    fn states<B: Backend>(
        &self,
        backend: &B,
        opened: &Opened,
        progress: &mut Progress,
    ) -> Result<Vec<Option<HiddenStates>>> {
        let Opened { models, reference, windows, gives, around: [before, after] } = opened;
        let place = models[0].path().display().to_string();
        gives.check(&self.limits, &place)?;
        let reference = match reference {
            Some(reference) if gives.states() => reference,
            _ if gives.predicts => return Ok(models.iter().map(|_| None).collect()),
            _ => {
                let why = match families::graph_of(&models[0])?.head.missing {
                    true => "the model has no output projection, as its architectures say, and so no perplexity",
                    false => "the model makes embeddings, as modules.json beside it says",
                };
                return Err(Error::failed(format!(
                    "{place}: {why}: give --reference MODEL, with whose embeddings, scores or hidden states its own are compared"
                )));
            }
        };
        let texts = gives.texts(windows, [before, after]);
        let of = |model| compare_hidden(backend, gives, model, reference, &texts, progress).map(Some);
        models.iter().map(of).collect()
    }

    fn check(&self) -> Result<()> {
        self.limits.check()?;
        if self.limits.any() && self.reference.is_none() {
            return Err(Error::usage(
                "limits on the quality are kept or missed beside a reference: give --reference MODEL with --max-ppl-ratio, --max-kld, --baseline, \
                 --min-top1, --min-cosine and --min-spearman",
            ));
        }
        if self.adapter.is_some() && self.models.len() > 1 {
            return Err(Error::usage("--adapter is merged into one model, and several are to be measured"));
        }
        Ok(())
    }

    /// Opens the models, and makes the windows of the text in the tokens that they share.
    fn open(&self, notes: &mut Vec<String>, remarks: &mut Vec<String>) -> Result<Opened> {
        let models = self.models.iter().map(|path| Checkpoint::open_with(path, self.adapter));
        let models = models.collect::<Result<Vec<Checkpoint>>>()?;
        let reference = self.reference.map(|path| Checkpoint::open_with(path, self.reference_adapter)).transpose()?;
        for (index, checkpoint) in models.iter().chain(&reference).enumerate() {
            let own = if index < models.len() { checkpoint.remarks() } else { checkpoint.notices() };
            for note in [own, stray::left_out(checkpoint)?].concat() {
                if !remarks.contains(&note) {
                    remarks.push(note);
                }
            }
        }
        let mut text = load_text(self.text.unwrap_or(HELD_OUT)).map_err(Error::from)?;
        let first = &models[0];
        let tokenizer = first.tokenizer();
        remarks.extend(first.notes_on(&tokenizer));
        let tokenizer = ModelText::of(first, tokenizer?)?;
        let mut context = self.context;
        for model in &models {
            context = context.min(families::longest_context(model.config())?.unwrap_or(usize::MAX));
        }
        let needed = calibration::samples::needed(context, self.windows);
        let ids = tokenizer.first_ids(&text, needed).map_err(Error::from)?;
        for other in models[1..].iter().chain(&reference) {
            let own = ModelText::open(other)?.first_ids(&text, needed).map_err(Error::from)?;
            if own != ids {
                return Err(Error::failed(format!(
                    "{} and {} turn the text into different tokens: they cannot be compared",
                    self.models[0].display(),
                    other.path().display()
                )));
            }
        }
        let bos = match self.protocol {
            Protocol::Papers => None,
            Protocol::LlamaCpp => tokenizer.tokenizer.added_bos(),
        };
        let windows = calibration::samples::windows(&text.name, &ids, context, self.windows, bos)
            .map_err(|error| Error::from(TextError::from(error)))?;
        remarks.extend(fewer_windows(&text.name, windows.len(), context, self.windows));
        notes.append(&mut text.notes);
        let around = [tokenizer.tokenizer.prefix(), tokenizer.tokenizer.suffix()].map(<[u32]>::to_vec);
        let original = reference.as_ref().unwrap_or(&models[0]);
        let gives = Gives::of(&families::graph_of(original)?, original);
        Ok(Opened { models, reference, windows, gives, around })
    }

    /// What a model reads where nobody says: of a GGUF file in llama.cpp's protocol, and alone, what llama.cpp keeps.
    fn usual_activations(&self, model: &Checkpoint) -> Activations {
        let as_llama_cpp = self.protocol == Protocol::LlamaCpp && model.gguf().is_some() && self.reference.is_none();
        if as_llama_cpp { Activations::Runtime } else { declared_activations(model) }
    }

    /// How many models memory allows at once, and what that takes where it is the host's.
    fn at_once(&self, device: Device, opened: &Opened) -> Result<(usize, Option<Expected>)> {
        let Opened { models, reference, windows, .. } = opened;
        if device.room.is_some() {
            return Ok((models.len(), None));
        }
        let tokens = Tokens::of(windows.len(), windows.first().map_or(0, Vec::len));
        let graphs = models.iter().map(|model| families::graph_of(model)).collect::<Result<Vec<_>>>()?;
        let all: Vec<&Checkpoint> = models.iter().collect();
        let at_once = memory::fitting(&graphs[0], device, reference.as_ref(), &all, tokens);
        let expected = all.chunks(at_once).zip(graphs.chunks(at_once)).map(|(models, graphs)| {
            let sides: Vec<_> = models.iter().copied().chain(reference).map(Some).collect();
            memory::nothing(Free::now()).and_measuring(&graphs[0], device, &sides, tokens, "--context")
        });
        let expected = expected.collect::<Result<Vec<_>>>()?;
        Ok((at_once, expected.into_iter().max_by_key(|expected| expected.bytes)))
    }
}

impl Size {
    /// That of a checkpoint.
    #[cfg_attr(doc, doc(hidden))]
    pub fn of(model: &Checkpoint) -> Size {
        let values = |shape: &[usize]| shape.iter().product::<usize>() as u64;
        let bytes = model.entries().iter().map(|entry| entry.stored_bytes).sum::<u64>();
        let all = model.entries().iter().map(|entry| values(&entry.shape)).sum::<u64>();
        Size { bpw: bytes as f64 * 8.0 / all.max(1) as f64, bytes }
    }
}

impl Entry {
    /// Where the model is.
    fn model(&self) -> &str {
        let states = self.hidden_states.as_ref().map(|states| &states.model[..]);
        self.quality.as_ref().map(|quality| &quality.model[..]).or(states).unwrap_or_default()
    }

    /// For people: all that is known of it.
    fn text(&self) -> String {
        let quality = self.quality.as_ref().map(quality_text);
        quality.into_iter().chain(self.hidden_states.as_ref().map(states_text)).collect::<Vec<_>>().join("\n")
    }
}

impl Evaluated {
    /// For people: all that is known of one model; of several a table, with a line for the reference and one for each model.
    pub fn text(&self) -> String {
        match &self.models[..] {
            [] => String::new(),
            [one] => one.text(),
            [Entry { quality: Some(first), .. }, ..] => self.table(first) + &self.states_of_each(),
            _ => self.states_of_each(),
        }
    }

    /// For programs: an object for one model, and a list of such, each with its size, for several.
    ///
    /// Fails where a number cannot be written.
    #[cfg_attr(doc, doc(hidden))]
    pub fn json(&self) -> serde_json::Result<Value> {
        let [Entry { quality, hidden_states, verdict, .. }] = &self.models[..] else {
            return serde_json::to_value(&self.models);
        };
        let mut value = quality.as_ref().map_or(Ok(Value::Object(serde_json::Map::new())), serde_json::to_value)?;
        if let Some(states) = hidden_states {
            value["hidden_states"] = serde_json::to_value(states)?;
        }
        if let Some(verdict) = verdict {
            value["verdict"] = serde_json::to_value(verdict)?;
        }
        Ok(value)
    }

    /// Which limits were missed, and by which model.
    pub fn missed(&self) -> impl Iterator<Item = String> {
        let of = |entry: &Entry| {
            let missed = entry.verdict.iter().flat_map(|verdict| &verdict.missed);
            missed.map(|missed| format!("{}: {missed}", entry.model())).collect::<Vec<_>>()
        };
        self.models.iter().flat_map(of)
    }

    /// Of each model what was found of what it makes of texts.
    fn states_of_each(&self) -> String {
        let of = |entry: &Entry| Some(format!("\n{}\n{}", entry.model(), states_text(entry.hidden_states.as_ref()?)));
        self.models.iter().filter_map(of).collect()
    }

    fn table(&self, first: &Quality) -> String {
        let row = |cells: [String; 8]| cells.to_vec();
        let none = || "–".to_owned();
        let size = |size: &Size| [format!("{:.2}", size.bpw), format!("{:.2}", size.bytes as f64 / 1e6)];
        let names = ["model", "bpw", "MB", "perplexity", "ratio", "KL, mean", "KL, 99 %", "top-1"];
        let mut rows = vec![row(names.map(str::to_owned))];
        if let (Some(beside), Some(own)) = (&first.beside, &self.reference) {
            let [bpw, megabytes] = size(own);
            let (name, perplexity) = (beside.reference.clone(), format!("{:.4}", beside.reference_perplexity));
            rows.push(row([name, bpw, megabytes, perplexity, "reference".to_owned(), none(), none(), none()]));
        }
        for (quality, own) in self.models.iter().filter_map(|entry| Some((entry.quality.as_ref()?, &entry.size))) {
            let [bpw, megabytes] = size(own);
            let (name, perplexity) = (quality.model.clone(), format!("{:.4}", quality.perplexity));
            let [ratio, mean, most, same] = match &quality.beside {
                Some(beside) => [
                    format!("{:.5}", beside.perplexity_ratio),
                    format!("{:.5}", beside.kld_mean),
                    format!("{:.4}", beside.kld_p99),
                    format!("{:.2} %", 100.0 * beside.top1_agreement),
                ],
                None => [none(), none(), none(), none()],
            };
            rows.push(row([name, bpw, megabytes, perplexity, ratio, mean, most, same]));
        }
        let all: Vec<&Quality> = self.models.iter().filter_map(|entry| entry.quality.as_ref()).collect();
        let alike = all.iter().all(|quality| quality.activations == first.activations);
        let how = first.how(alike);
        let itself = first.beside.as_ref().and_then(|beside| beside.reference_quantized.as_ref());
        let itself = itself.map_or(String::new(), |how| format!("; the reference is itself quantized ({how})"));
        format!("{how}{itself}\n\n{}", table(&rows, 1))
    }
}
