//! A checkpoint's tokenizer, and what is wrong with it and with the chat templates, told by every command that writes a model,
//! whatever it reads of them.

use std::path::Path;

use calibration::samples::{ChatTemplate, Message, SampleError, TokenizerConfig};
use serde_json::{Value, json};

use super::Checkpoint;
use crate::dialect::tokenizer::knows_as_end;
use crate::dialect::tokenizer::rebuilt;
use crate::error::Result;
use crate::families;
use crate::json::integer;
use crate::json::read_json;
use crate::supervisor::within;
use crate::tokenizer::added::NAMES;
use crate::tokenizer::sentencepiece;
use crate::tokenizer::templates::DEFAULT;
use crate::tokenizer::{FILE, Other, TokenizerFiles, classes, other_tokenizer, without_one};

/// What the user says in the conversation that a template is tried with.
const QUESTION: &str = "Where do zebras graze?";
/// What the assistant answers.
const ANSWER: &str = "On savannas.";

/// A file of settings, and the ids at which it says that generation stops.
type Stops = (&'static str, Vec<u32>);

impl Checkpoint {
    /// The tokenizer; `None` for a directory without one that can be read.
    pub fn tokenizer(&self) -> Result<Option<TokenizerFiles>> {
        match self.gguf() {
            Some(file) => rebuilt::tokenizer_files(file).map(Some),
            None => TokenizerFiles::of_folder(self.path(), families::type_of(self.config())),
        }
    }

    /// What the reader of a report should know of the tokenizer and the chat templates: that there are none or that they
    /// cannot be read, what the files disagree about, templates that no conversation gets through, special tokens
    /// without a row of the embedding, and turns that nothing ends.
    pub fn tokenizer_notes(&self) -> Vec<String> {
        self.notes_on(&self.tokenizer())
    }

    /// [`Checkpoint::tokenizer_notes`] on what [`Checkpoint::tokenizer`] gave, for callers that go on to use it.
    pub fn notes_on(&self, files: &Result<Option<TokenizerFiles>>) -> Vec<String> {
        let files = match files {
            Ok(Some(files)) => files,
            Ok(None) => {
                return vec![without_tokenizer(self.path(), families::type_of(self.config()))];
            }
            Err(error) => {
                return vec![format!("{error}: runtimes will not load this tokenizer either, or read it otherwise")];
            }
        };
        let mut notes = files.notices.clone();
        let parsed = self.templates(files, &mut notes);
        if self.gguf().is_none() {
            notes.extend(self.otherwise_in_transformers(files));
        }
        let rows = families::vocabulary(self.config()).ok().flatten();
        if let Some(rows) = rows {
            notes.extend(without_a_row(files, rows));
        }
        if self.gguf().is_none() {
            notes.extend(self.unusable_stops(rows));
            notes.extend(self.unusable_pad(rows));
            notes.extend(self.stops(files, parsed.as_ref()));
        }
        notes
    }

    /// What of [`Checkpoint::notes_on`] no runtime can do with: a chat template that cannot be parsed, and ids beyond the embedding.
    pub fn faults_of_words(&self, files: &TokenizerFiles) -> Vec<String> {
        let mut faults = Vec::new();
        self.templates(files, &mut faults);
        faults.retain(|fault| fault.contains("cannot be parsed"));
        let rows = families::vocabulary(self.config()).ok().flatten();
        if self.gguf().is_none() {
            faults.extend(self.unusable_stops(rows).into_iter().chain(self.unusable_pad(rows)));
        }
        faults
    }

    /// What transformers makes of the tokenizer's file that it does not say.
    fn otherwise_in_transformers(&self, files: &TokenizerFiles) -> Vec<String> {
        let shown = self.path().display();
        let mut notes = Vec::new();
        let (of_pieces, file) = (files.name != FILE, files.file());
        // What the general classes and Llama's make of pieces is told where those are read.
        let is_told = of_pieces && files.sources.class().is_none_or(sentencepiece::has_notes);
        if let Some(otherwise) = classes::otherwise(&files.sources, families::type_of(self.config()), &files.json)
            && !is_told
        {
            notes.push(otherwise.note(&format!("{shown}/{file}"), of_pieces));
        }
        if files.flag("split_special_tokens") == Some(true) {
            notes.push(format!(
                "{shown}/tokenizer_config.json: with split_special_tokens transformers splits what looks like a special token in a text; \
                 here it is that token"
            ));
        }
        if files.json.pointer("/model/dropout").is_some_and(|dropout| dropout.as_f64().is_some_and(|share| share > 0.0))
        {
            notes.push(format!("{shown}/{file}: the dropout of its merges is for training, and was left out"));
        }
        notes
    }

    /// Parses every template and has the default one render the plainest conversation; returns that one, if it is sound.
    fn templates(&self, files: &TokenizerFiles, notes: &mut Vec<String>) -> Option<ChatTemplate> {
        let templates = &files.templates;
        // A GGUF file holds its template itself.
        let at = |name: &str| match self.gguf() {
            Some(_) => self.path().display().to_string(),
            None => self.path().join(templates.place(name)).display().to_string(),
        };
        let problem = |error: SampleError| match error {
            SampleError::Template { problem, .. } | SampleError::Endless { problem, .. } => problem,
            other => other.to_string(),
        };
        let config = files.config();
        let default = templates.default.iter().map(|text| (DEFAULT, text));
        let (mut found, before) = (None, notes.len());
        for (name, text) in default.chain(templates.others.iter().map(|(name, text)| (&name[..], text))) {
            let place = at(name);
            let which = if name == DEFAULT { String::new() } else { format!(" `{name}`") };
            if text.trim().is_empty() {
                notes.push(format!("{place}: the template{which} is empty, and no runtime will chat with it"));
                continue;
            }
            let parsed = TokenizerConfig { chat_template: Some(text.clone()), tool_template: None, ..config.clone() }
                .chat(&within(place.clone().into()));
            match parsed {
                Err(error) => notes.push(format!(
                    "{place}: the template{which} cannot be parsed, and no runtime will chat with it: {}",
                    problem(error)
                )),
                Ok(template) if name == DEFAULT => found = template,
                Ok(_) => {}
            }
        }
        if templates.lacks_default() && notes.len() == before {
            notes.push(format!("{}: {}", self.path().display(), templates.without_default()));
        }
        let template = found?;
        let place = at(DEFAULT);
        let say = |content: Value| {
            let message = Message { role: "user".to_owned(), content, extra: Default::default() };
            template.render(&[message], &[])
        };
        let plain = say(QUESTION.into());
        let said = |text: &Result<String, _>| text.as_ref().is_ok_and(|text| text.contains(QUESTION));
        // Models of images may want every content in parts.
        if said(&plain) || said(&say(json!([{"type": "text", "text": QUESTION}]))) {
            return Some(template);
        }
        notes.push(match plain {
            Err(error) => {
                format!("{place}: the template refuses a conversation of one turn by the user: {}", problem(error))
            }
            Ok(_) => format!("{place}: the template leaves out what the user says"),
        });
        None
    }

    /// generation_config.json of a directory; null where there is none that can be read.
    pub fn generation(&self) -> Value {
        read_json(&self.path().join("generation_config.json")).ok().flatten().unwrap_or_default()
    }

    /// What each file of settings has as eos_token_id.
    fn stop_settings(&self) -> [(&'static str, Vec<Value>); 2] {
        let of = |json: &Value| {
            let own = &json["eos_token_id"];
            let value = if own.is_null() { &json[families::text_key(json)]["eos_token_id"] } else { own };
            match value {
                Value::Null => Vec::new(),
                Value::Array(list) => list.clone(),
                one => vec![one.clone()],
            }
        };
        [("generation_config.json", of(&self.generation())), ("config.json", of(self.config()))]
    }

    /// A pad_token_id beyond the embedding, over which transformers fails when it makes the model.
    fn unusable_pad(&self, rows: Option<usize>) -> Option<String> {
        let pad = [&self.config()["pad_token_id"], &families::text_settings(self.config())["pad_token_id"]];
        let pad = pad.into_iter().find_map(integer)?;
        let rows = rows.filter(|rows| pad >= *rows as i64)?;
        Some(format!(
            "config.json: pad_token_id is {pad}, and the embedding has {rows} rows: transformers fails on that; name a token that the model has, or null"
        ))
    }

    /// Values of eos_token_id that no model gives.
    fn unusable_stops(&self, rows: Option<usize>) -> Option<String> {
        let is_id = |value: &Value| {
            value.is_number() && integer(value).is_some_and(|id| id >= 0 && rows.is_none_or(|rows| id < rows as i64))
        };
        let wrong = |(file, values): (&str, Vec<Value>)| {
            let value = values.iter().find(|value| !is_id(value))?;
            Some(format!(
                "{file}: eos_token_id has {value}, which is no token of the model: generation never stops there"
            ))
        };
        self.stop_settings().into_iter().find_map(wrong)
    }

    /// Turns that nothing ends, and settings that do not agree where to stop.
    fn stops(&self, files: &TokenizerFiles, template: Option<&ChatTemplate>) -> Option<String> {
        let of = |values: Vec<Value>| values.iter().filter_map(|id| u32::try_from(integer(id)?).ok()).collect();
        let stops: [Stops; 2] = self.stop_settings().map(|(file, values)| (file, of(values)));
        // config.json is asked only where generation_config.json does not say.
        let (file, stops) = stops.into_iter().find(|(_, ids)| !ids.is_empty())?;
        let tokenizer = &files.tokenizer;
        let shown = |id: u32| match tokenizer.id_to_token(id) {
            Some(text) => format!("`{text}` ({id})"),
            None => format!("{id}, which is no token of the tokenizer's"),
        };
        let at = stops.iter().map(|id| shown(*id)).collect::<Vec<_>>().join(", ");
        let eos = files.special("eos").and_then(|(named_in, text)| Some((named_in, tokenizer.token_to_id(text)?)));
        let end = template.and_then(|template| turn_end(files, template));
        if let Some(end) = end.filter(|end| !stops.contains(end)) {
            let also = eos.is_some_and(|(_, eos)| eos == end);
            let mut who = vec!["transformers"];
            if !also {
                who.push("vLLM");
                if !tokenizer.id_to_token(end).is_some_and(|text| knows_as_end(&text)) {
                    who.push("llama.cpp");
                }
            }
            return Some(format!(
                "{}/{}: the template ends the assistant's turns with {}, and {file} stops at {at}: chats do not end by themselves in {}; \
                 add the id to eos_token_id in generation_config.json",
                self.path().display(),
                files.templates.place(DEFAULT),
                shown(end),
                who.join(", ")
            ));
        }
        let (named_in, eos) = eos.filter(|(_, eos)| !stops.contains(eos))?;
        Some(format!(
            "{named_in} names {} as EOS, and {file} stops at {at}: transformers stops at the latter, llama.cpp at the former, vLLM at either",
            shown(eos)
        ))
    }
}

/// What runtimes make of a folder with neither tokenizer.json nor tokenizer.model.
fn without_tokenizer(folder: &Path, model_type: Option<&str>) -> String {
    let shown = folder.display();
    match other_tokenizer(folder, model_type) {
        Some(Other { what, is_loaded: true, remedy }) => format!(
            "{shown}: no tokenizer.json and no tokenizer.model: {what}, of which transformers makes a tokenizer each time, and so do \
             runtimes that load tokenizers with it, as vLLM and SGLang do; for others, {remedy}"
        ),
        Some(Other { what, remedy, .. }) => format!(
            "{shown}: no tokenizer.json and no tokenizer.model: {what}, so that runtimes load no tokenizer without it \
             (trust_remote_code); for those that take no such code, {remedy}"
        ),
        None => {
            format!(
                "{shown}: no tokenizer.json and no tokenizer.model, and runtimes need one{}",
                without_one(folder, model_type)
            )
        }
    }
}

/// The token that a template puts behind what the assistant says.
fn turn_end(files: &TokenizerFiles, template: &ChatTemplate) -> Option<u32> {
    let turns = [Message::new("user", QUESTION), Message::new("assistant", ANSWER)];
    let text = template.render(&turns, &[]).ok()?;
    let (_, behind) = text.rsplit_once(ANSWER)?;
    let ids = files.tokenizer.encode(behind, false).ok()?;
    let added = files.json["added_tokens"].as_array()?;
    ids.into_iter().find(|id| added.iter().any(|token| token["id"] == *id && token["special"] == true))
}

/// Named special tokens that the embedding has no row for.
fn without_a_row(files: &TokenizerFiles, rows: usize) -> Option<String> {
    let named = NAMES.iter().filter_map(|short| {
        let (file, text) = files.special(short)?;
        let id = files.tokenizer.token_to_id(text)?;
        (id as usize >= rows).then(|| format!("{file}: {short}_token is `{text}` ({id})"))
    });
    let named: Vec<String> = named.collect();
    (!named.is_empty()).then(|| {
        format!(
            "{}, and the embedding has {rows} rows: a runtime that gives it to the model fails or reads another's row",
            named.join("; ")
        )
    })
}
