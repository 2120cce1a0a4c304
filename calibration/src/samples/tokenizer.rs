//! tokenizer.json, and the special tokens and chat template beside it.

use serde::Deserialize;
use serde_json::Value;

use super::cuts::Cuts;
use super::guard::{Guard, guarded};
use super::{ChatTemplate, SampleError};

/// What building a tokenizer is compared to: going through a text of so many bytes (8 MiB).
const BUILDING: usize = 8 << 20;

/// What to say of a tokenizer over which the library gives up without a word.
const BROKEN: &str = "a part of it is not as its type demands";

/// Bytes of the smallest and of the largest part of a text that is tokenized at a time; the library takes about a hundred times as much.
const PART: [usize; 2] = [4 << 10, 256 << 10];

/// Bytes of text that are taken for each token that is wanted; English has a little more.
const BYTES_PER_TOKEN: usize = 4;

/// The first ids of a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Beginning {
    /// Those that the whole text begins with.
    pub ids: Vec<u32>,
    /// Bytes of the text that they stand for, marks left out.
    pub read: usize,
}

/// A model's tokenizer: text in, ids out, the ids that transformers gives for the same tokenizer.json.
#[derive(Clone)]
pub struct Tokenizer {
    pub(super) inner: tokenizers::Tokenizer,
    /// Ids put before and after every text when special tokens are added.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// Ends a document; known from the configuration.
    eos: Option<u32>,
    bos: Option<u32>,
    max_id: u32,
    pub(super) cuts: Cuts,
    guard: Guard,
}

impl Tokenizer {
    /// Reads the bytes of a tokenizer.json.
    ///
    /// Truncation and padding stored in the file are switched off, as transformers does when neither is asked for. A
    /// damaged file is an error, even where the tokenizers library would panic on it.
    pub fn from_json(bytes: &[u8]) -> Result<Self, SampleError> {
        let mut json: Value = serde_json::from_slice(bytes).map_err(|e| tokenizer_error("tokenizer.json", e))?;
        Self::from_value(&mut json, &None)
    }

    /// [`Tokenizer::from_json`] of what is parsed already, which is left as it was. Whatever it does, it does within `guard`.
    pub fn from_value(json: &mut Value, guard: &Guard) -> Result<Self, SampleError> {
        // The same text has the same ids every time; dropout is for training.
        let dropout = json.pointer_mut("/model/dropout").map(Value::take);
        // Nothing is ever decoded, and a decoder of an unknown kind is no reason to refuse the model.
        let decoder = json.get_mut("decoder").map(Value::take);
        let built = guarded(guard, BUILDING, BROKEN, || Self::build(json));
        let built = built.unwrap_or_else(|problem| Err(tokenizer_error("tokenizer.json", problem)));
        if let Some(dropout) = dropout {
            json["model"]["dropout"] = dropout;
        }
        if let Some(decoder) = decoder {
            json["decoder"] = decoder;
        }
        Ok(Self { guard: guard.clone(), ..built? })
    }

    fn build(json: &Value) -> Result<Self, SampleError> {
        let mut inner = tokenizers::Tokenizer::deserialize(json).map_err(|e| tokenizer_error("tokenizer.json", e))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| tokenizer_error("tokenizer.json", e))?;
        let max_id = inner
            .get_vocab(true)
            .into_values()
            .max()
            .ok_or_else(|| tokenizer_error("tokenizer.json", "the vocabulary is empty"))?;
        let cuts = Cuts::of(json, &inner);
        let (prefix, suffix) = (Vec::new(), Vec::new());
        let mut tokenizer = Self { inner, prefix, suffix, eos: None, bos: None, max_id, cuts, guard: None };
        tokenizer.find_affixes()?;
        Ok(tokenizer)
    }

    /// Takes the BOS and EOS that the configuration names.
    ///
    /// The EOS is put between calibration documents. Whether a BOS is added before a text stays with tokenizer.json: its
    /// post-processor goes before `add_bos_token`, as in transformers 5.
    pub fn with_config(mut self, config: &TokenizerConfig) -> Self {
        let id = |token: &Option<String>| token.as_deref().and_then(|token| self.inner.token_to_id(token));
        (self.bos, self.eos) = (id(&config.bos_token), id(&config.eos_token));
        self
    }

    /// Ids of a text; `add_special` puts the tokenizer's own marks (BOS for many models) around it.
    ///
    /// They are those of the text tokenized whole, whatever its length. Text that looks like a special token becomes that token, as in
    /// transformers.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, SampleError> {
        self.begin(text, add_special, usize::MAX).map(|beginning| beginning.ids)
    }

    /// As [`Tokenizer::encode`], of no more of the text than gives `least` ids, or little more; of all of it where that has fewer.
    ///
    /// The text is taken in parts, cut where [`Cuts`] shows that the ids stay those of the whole.
    pub fn begin(&self, text: &str, add_special: bool, least: usize) -> Result<Beginning, SampleError> {
        let prefix = if add_special { &self.prefix[..] } else { &[] };
        let (mut ids, mut read) = (prefix.to_vec(), 0);
        while read < text.len() && ids.len() < least {
            let wanted = (least - ids.len()).saturating_mul(BYTES_PER_TOKEN).clamp(PART[0], PART[1]);
            let end = self.cuts.end(text, read, wanted);
            let part = self.part(text, read, end)?;
            read = if part.is_some() { end } else { text.len() };
            match part {
                Some(part) => ids.extend(part),
                // Not a cut after all: nothing of what was taken so far is relied on.
                None => ids = [prefix, &self.part(text, 0, read)?.unwrap_or_default()].concat(),
            }
        }
        if add_special && read == text.len() {
            ids.extend(&self.suffix);
        }
        Ok(Beginning { ids, read })
    }

    /// Ids of a part of a text between two cuts; `None` where what stands before it does not keep its own.
    pub(super) fn part(&self, text: &str, from: usize, to: usize) -> Result<Option<Vec<u32>>, SampleError> {
        let start = from - text[..from].chars().next_back().map_or(0, char::len_utf8);
        let encode = |text: &str| self.inner.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec());
        let both = || {
            let before = if start < from { encode(&text[start..from])? } else { Vec::new() };
            Ok((before, encode(&text[start..to])?))
        };
        let ids: tokenizers::Result<(Vec<u32>, Vec<u32>)> =
            guarded(&self.guard, to - start, BROKEN, both).map_err(|e| tokenizer_error("tokenizer.json", e))?;
        let (before, mut ids) = ids.map_err(|e| tokenizer_error("tokenizer.json", e))?;
        Ok(ids.starts_with(&before).then(|| {
            ids.drain(..before.len());
            ids
        }))
    }

    /// Number of tokens, added ones included; ids may lie above it, see [`Tokenizer::max_id`].
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The highest id that a text can give; an embedding needs more rows than this.
    pub fn max_id(&self) -> u32 {
        self.max_id
    }

    /// The id of a token by its exact spelling.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Ids that inference puts before a text; empty for models without a BOS.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Ids that inference puts after a text; empty for nearly every decoder.
    pub fn suffix(&self) -> &[u32] {
        &self.suffix
    }

    /// The BOS, where the tokenizer puts one before every text; what llama.cpp's protocol writes over each window's start.
    pub fn added_bos(&self) -> Option<u32> {
        let first = self.prefix.first().copied();
        if self.bos.is_some() && self.bos != first { None } else { first }
    }

    /// The token that ends a document, where the configuration names one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Sets the token that ends a document, for callers without a configuration.
    pub fn set_eos(&mut self, eos: Option<u32>) {
        self.eos = eos;
    }

    /// Finds what the post-processor puts around a text by comparing the same text with and without.
    fn find_affixes(&mut self) -> Result<(), SampleError> {
        let encode = |add: bool| {
            let encoding = self.inner.encode_fast("a", add).map_err(|e| tokenizer_error("tokenizer.json", e))?;
            Ok::<_, SampleError>(encoding.get_ids().to_vec())
        };
        let (bare, full) = (encode(false)?, encode(true)?);
        let extra = full.len().saturating_sub(bare.len());
        let at = (0..=extra)
            .find(|&at| full.get(at..at + bare.len()) == Some(&bare[..]))
            .ok_or_else(|| tokenizer_error("tokenizer.json", "the post-processor changes the text's own tokens"))?;
        self.prefix = full[..at].to_vec();
        self.suffix = full[at + bare.len()..].to_vec();
        Ok(())
    }
}

/// What a model says of its tokenizer beside the vocabulary; all of it optional.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerConfig {
    /// Spelling of the token that starts a text.
    pub bos_token: Option<String>,
    /// Spelling of the token that ends one.
    pub eos_token: Option<String>,
    /// Source of the chat template.
    pub chat_template: Option<String>,
    /// The file in which it stands.
    pub chat_template_file: String,
    /// Source of the template for conversations with tools, and its file, where that is another one.
    pub tool_template: Option<(String, String)>,
    /// Spellings of the remaining special tokens, by name (`unk_token`, `pad_token`, …).
    pub others: Vec<(String, String)>,
}

impl TokenizerConfig {
    /// The chat template with these special tokens, which does whatever it does within `guard`; `None` when the model has none.
    pub fn chat(&self, guard: &Guard) -> Result<Option<ChatTemplate>, SampleError> {
        let Some(source) = self.chat_template.as_deref() else { return Ok(None) };
        let (file, tokens) = (&self.chat_template_file, [&self.bos_token, &self.eos_token].map(Option::as_deref));
        let made = |file: &str, source: &str| {
            let mut template = ChatTemplate::guarded(file, source, tokens, guard)?;
            for (name, token) in &self.others {
                template = template.with_variable(name, token);
            }
            Ok::<_, SampleError>(template)
        };
        let template = made(file, source)?;
        // One that cannot be parsed is told when the model is opened; conversations without tools do not need it.
        let tools = self.tool_template.iter().find_map(|(source, file)| made(file, source).ok());
        Ok(Some(match tools {
            None => template,
            Some(tools) => template.with_tools(tools),
        }))
    }
}

fn tokenizer_error(file: &str, error: impl std::fmt::Display) -> SampleError {
    let problem = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    SampleError::Tokenizer { file: file.to_owned(), problem }
}
