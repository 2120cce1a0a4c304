//! `mmproj`: the file beside a GGUF file of a language model from which llama.cpp makes tokens of images.
//!
//! A kind of projector is data: what llama.cpp calls it, which models have it, what each tensor is called there and how it is made, and
//! which settings it has. Of a kind there is one small file, and a line in [`KINDS`].

mod gemma;
mod pixtral;
mod qwen;

use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use formats::{Dtype, GgmlType};
use serde_json::Value;

use super::metadata::Metadata;
use crate::families::type_of;
use crate::json::{integer, real};
use crate::weights::{StoredType, Weights};

/// Every kind that can be written.
const KINDS: &[&Kind] = &[&qwen::QWEN2, &qwen::QWEN2_5, &qwen::QWEN3, &gemma::GEMMA3, &pixtral::PIXTRAL];

/// A kind of projector.
struct Kind {
    /// `clip.projector_type`.
    id: &'static str,
    /// `model_type` of config.json.
    model_types: &'static [&'static str],
    /// `model_type` of its `vision_config`, where that says which it is.
    tower: Option<&'static str>,
    /// Architectures of language models that llama.cpp gives its tokens to.
    architectures: &'static [&'static str],
    /// What the names of its tensors begin with, without the `model.` that some checkpoints put before it.
    prefixes: &'static [&'static str],
    /// Of each tensor, or of weight and bias of a module, what becomes of it.
    rules: &'static [Rule],
    /// Settings of its own, and those that it says otherwise than all others do.
    settings: fn(&Said<'_>, &mut Metadata) -> Result<(), String>,
    /// The token whose embedding ends a row of a picture.
    ends_rows: Option<&'static str>,
}

/// What becomes of a tensor; `{}` is the number of a block, in both names.
struct Rule {
    /// Its name, or its module's, whose weight and bias are then meant.
    from: &'static str,
    /// What it is called in the file.
    to: &'static str,
    make: Make,
    ty: Ty,
}

/// How the values of a tensor of the file are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Make {
    /// As they are.
    Whole,
    /// One of so many equal parts of the rows.
    Rows(usize, usize),
    /// One of the two pictures that a convolution goes through at once: `[out, in, 2, height, width]` becomes `[out, in, height, width]`.
    Frame(usize),
    /// Of rotated queries and keys the halves of each head's rows in turn, as llama.cpp rotates neighbours.
    Turned,
    /// One more: the checkpoint has the difference from 1.
    PlusOne,
    /// One of its rows.
    Row(u32),
}

/// The type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ty {
    /// F32 for vectors, positions and what goes over patches, and the checkpoint's own for matrices.
    Usual,
    F32,
    F16,
}

/// Weight and bias of a module, as they are.
const fn same(from: &'static str, to: &'static str) -> Rule {
    Rule { from, to, make: Make::Whole, ty: Ty::Usual }
}

/// Weight and bias of a module, made so.
const fn made(from: &'static str, to: &'static str, make: Make) -> Rule {
    Rule { from, to, make, ty: Ty::Usual }
}

/// What the files of a model say.
struct Said<'a> {
    config: &'a Value,
    vision: &'a Value,
    text: &'a Value,
    preprocessor: &'a Value,
}

impl Said<'_> {
    /// A count of `vision_config` under the first of some names that is there.
    fn count(&self, keys: &[&str]) -> Result<u32, String> {
        let found = keys.iter().find_map(|key| integer(&self.vision[*key]));
        let count = found.and_then(|found| u32::try_from(found).ok()).filter(|count| *count > 0);
        count.ok_or_else(|| format!("vision_config of config.json has no {} that is a count", keys[0]))
    }

    /// A count where it is said, or what counts where it is not.
    fn count_or(&self, key: &str, default: u32) -> Result<u32, String> {
        if self.vision[key].is_null() { Ok(default) } else { self.count(&[key]) }
    }

    /// The word for the activation.
    fn activation(&self, default: &'static str) -> &str {
        self.vision["hidden_act"].as_str().unwrap_or(default)
    }

    /// What the values of pictures are shifted or divided by.
    fn channels(&self, key: &str) -> Result<MetadataValue, String> {
        let found = [&self.preprocessor[key], &self.preprocessor["image_processor"][key]];
        let list = found.into_iter().find_map(Value::as_array);
        let values: Option<Vec<f64>> = list.map(|list| list.iter().filter_map(real).collect());
        let values = values.filter(|values| values.len() == 3);
        let values = values.ok_or_else(|| format!("preprocessor_config.json has no {key} of three numbers"))?;
        array(values.into_iter().map(|value| MetadataValue::F32(value as f32)).collect(), GGUFValueType::F32)
    }
}

fn array(values: Vec<MetadataValue>, ty: GGUFValueType) -> Result<MetadataValue, String> {
    metadata_array(values, ty).map_err(|error| error.to_string())
}

/// A flag, a count and a number, under `clip.`.
fn flag(out: &mut Metadata, key: &str) {
    out.push((format!("clip.{key}"), MetadataValue::Bool(true)));
}

fn count(out: &mut Metadata, key: &str, value: u32) {
    out.push((format!("clip.vision.{key}"), MetadataValue::U32(value)));
}

fn float(out: &mut Metadata, key: &str, value: f64) {
    out.push((format!("clip.vision.{key}"), MetadataValue::F32(value as f32)));
}

/// A file that is to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Projector {
    /// Keys and values.
    pub metadata: Metadata,
    /// Its tensors, in the order in which they are written.
    pub tensors: Vec<Tensor>,
}

/// A tensor of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// What it is called there.
    pub gguf: String,
    /// What it is made of.
    pub from: String,
    /// Its extents, slowest first.
    pub shape: Vec<usize>,
    /// Its type: F32, F16 or BF16.
    pub ty: GgmlType,
    make: Make,
    /// Of the tensor that it is made of.
    stored: Vec<usize>,
    heads: usize,
}

/// What makes tokens of a model's images, for a language model that is written as `architecture`; nothing for a model that sees nothing.
///
/// `embedding` is the tensor that tokens have a row in each, and `token` finds one; `preprocessor` is preprocessor_config.json, or the `image_processor` of processor_config.json. Fails, with the reason, where llama.cpp has
/// no such projector, or the files do not say what it needs.
pub fn plan(
    source: &dyn Weights,
    embedding: &str,
    token: &dyn Fn(&str) -> Option<u32>,
    preprocessor: &Value,
    architecture: &str,
) -> Option<Result<Projector, String>> {
    let config = source.config();
    let vision = config.get("vision_config").filter(|vision| vision.is_object())?;
    let kind = KINDS.iter().find(|kind| {
        let own = type_of(config).is_some_and(|own| kind.model_types.contains(&own));
        own && kind.tower.is_none_or(|tower| type_of(vision) == Some(tower))
    });
    let Some(kind) = kind.filter(|kind| kind.architectures.contains(&architecture)) else {
        return Some(Err(format!(
            "no file for images is known here for models of the type {}",
            type_of(config).unwrap_or_default()
        )));
    };
    let text = config.get("text_config").unwrap_or(config);
    let found = kind.plan(source, &Said { config, vision, text, preprocessor });
    Some(found.and_then(|mut found| {
        if let Some(name) = kind.ends_rows {
            let (row, entry) =
                token(name).zip(source.entry(embedding)).ok_or(format!("the tokenizer has no {name}"))?;
            if row as usize >= entry.shape[0] {
                return Err(format!("{name} is token {row}, and the embedding has {}", entry.shape[0]));
            }
            let (stored, make) = (entry.shape.clone(), Make::Row(row));
            let shape = make.shape(&stored, 0).unwrap_or_default();
            let gguf = "v.token_embd.img_break".to_owned();
            found.tensors.push(Tensor {
                gguf,
                from: entry.name.clone(),
                shape,
                ty: ggml("F32"),
                make,
                stored,
                heads: 0,
            });
        }
        Ok(found)
    }))
}

impl Kind {
    fn plan(&self, source: &dyn Weights, said: &Said<'_>) -> Result<Projector, String> {
        let matrices = self.matrices(source)?;
        let mut metadata = self.metadata(said, matrices)?;
        (self.settings)(said, &mut metadata)?;
        let heads = said.count(&["num_attention_heads", "num_heads"])? as usize;
        let mut tensors = Vec::new();
        for entry in source.entries() {
            let name = entry.name.strip_prefix("model.").unwrap_or(&entry.name);
            if !self.prefixes.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let mut found = self.rules.iter().filter_map(|rule| Some((rule, rule.called(name)?))).peekable();
            if found.peek().is_none() {
                return Err(format!("{} has no name in llama.cpp's file for images", entry.name));
            }
            for (rule, gguf) in found {
                let wrong = || format!("{} has the shape {:?}, which is not known here", entry.name, entry.shape);
                let shape = rule.make.shape(&entry.shape, heads).ok_or_else(wrong)?;
                let ty = rule.ty(&gguf, &shape, matrices);
                let (from, stored) = (entry.name.clone(), entry.shape.clone());
                tensors.push(Tensor { gguf, from, shape, ty, make: rule.make, stored, heads });
            }
        }
        match tensors.is_empty() {
            true => Err("the checkpoint has no tensors of it".to_owned()),
            false => Ok(Projector { metadata, tensors }),
        }
    }

    /// The type of matrices: BF16 where the checkpoint has it, else F16. Fails for tensors that are quantized.
    fn matrices(&self, source: &dyn Weights) -> Result<GgmlType, String> {
        let own = |name: &str| {
            let name = name.strip_prefix("model.").unwrap_or(name);
            self.prefixes.iter().any(|prefix| name.starts_with(prefix))
        };
        let mut bf16 = true;
        for entry in source.entries().iter().filter(|entry| own(&entry.name)) {
            match entry.dtype {
                StoredType::Plain(dtype) => bf16 &= dtype == Dtype::BF16,
                _ => return Err(format!("{} is quantized, which no file for images is written of", entry.name)),
            }
        }
        Ok(ggml(if bf16 { "BF16" } else { "F16" }))
    }

    /// What every file of a vision tower says.
    fn metadata(&self, said: &Said<'_>, matrices: GgmlType) -> Result<Metadata, String> {
        let mut out = Metadata::new();
        let mut string = |key: &str, value: &str| out.push((key.to_owned(), MetadataValue::String(value.to_owned())));
        string("general.architecture", "clip");
        string("general.type", "mmproj");
        string("clip.projector_type", self.id);
        let file_type = if matrices.name == "BF16" { 32 } else { 1 };
        for (key, value) in [("general.file_type", file_type), ("general.quantization_version", 2)] {
            out.push((key.to_owned(), MetadataValue::U32(value)));
        }
        flag(&mut out, "has_vision_encoder");
        let wide = integer(&said.text["hidden_size"]).and_then(|wide| u32::try_from(wide).ok());
        count(
            &mut out,
            "projection_dim",
            wide.ok_or("config.json does not say the hidden_size of the language model")?,
        );
        let inner: &[&str] = if said.vision["embed_dim"].is_null() { &["intermediate_size"] } else { &["hidden_size"] };
        let keys: [(&str, &[&str]); 5] = [
            ("patch_size", &["patch_size"]),
            ("embedding_length", &["embed_dim", "hidden_size"]),
            ("feed_forward_length", inner),
            ("block_count", &["num_hidden_layers", "depth"]),
            ("attention.head_count", &["num_attention_heads", "num_heads"]),
        ];
        for (key, names) in keys {
            count(&mut out, key, said.count(names)?);
        }
        for key in ["image_mean", "image_std"] {
            out.push((format!("clip.vision.{key}"), said.channels(key)?));
        }
        Ok(out)
    }
}

fn ggml(name: &str) -> GgmlType {
    GgmlType::from_name(name).expect("in the list")
}

impl Rule {
    /// What a tensor is called in the file, if the rule is for it.
    fn called(&self, name: &str) -> Option<String> {
        let whole = |from: &str| from.ends_with("weight") || from.ends_with("bias");
        let (module, ending) = match whole(self.from) {
            true => (name, None),
            false => {
                let (module, ending) = name.rsplit_once('.').filter(|(_, ending)| whole(ending))?;
                (module, Some(ending))
            }
        };
        let number = match self.from.split_once("{}") {
            None => (module == self.from).then_some("")?,
            Some((before, after)) => {
                let number = module.strip_prefix(before)?.strip_suffix(after)?;
                (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(number)?
            }
        };
        let to = self.to.replace("{}", number);
        Some(ending.map_or(to.clone(), |ending| format!("{to}.{ending}")))
    }

    /// As llama.cpp's converter chooses it.
    fn ty(&self, gguf: &str, shape: &[usize], matrices: GgmlType) -> GgmlType {
        let patches = gguf.starts_with("v.patch_embd.weight") || gguf.starts_with("mm.patch_merger.weight");
        match self.ty {
            Ty::F16 => ggml("F16"),
            Ty::F32 => ggml("F32"),
            Ty::Usual if patches && shape.len() > 1 => ggml(if matrices.name == "F16" { "F16" } else { "F32" }),
            Ty::Usual if shape.len() < 2 || gguf.starts_with("v.position_embd") => ggml("F32"),
            Ty::Usual => matrices,
        }
    }
}

impl Make {
    /// The extents of what is made of a tensor of these; nothing where it cannot be.
    fn shape(self, stored: &[usize], heads: usize) -> Option<Vec<usize>> {
        let first = *stored.first()?;
        match self {
            Make::Whole | Make::PlusOne => Some(stored.to_vec()),
            Make::Row(_) => Some(stored[1..].to_vec()),
            Make::Rows(_, of) => first.is_multiple_of(of).then(|| [vec![first / of], stored[1..].to_vec()].concat()),
            Make::Frame(_) => match stored {
                &[out, channels, 2, height, width] => Some(vec![out, channels, height, width]),
                _ => None,
            },
            Make::Turned => (heads > 0 && first.is_multiple_of(2 * heads)).then(|| stored.to_vec()),
        }
    }
}

impl Tensor {
    /// Which row of the tensor that it is made of it is, if it is one.
    pub fn row(&self) -> Option<u32> {
        if let Make::Row(row) = self.make { Some(row) } else { None }
    }

    /// Its values, of those of the tensor that it is made of, or of its row.
    pub fn values(&self, mut values: Vec<f32>) -> Vec<f32> {
        let rows = self.stored[0].max(1);
        let width = values.len() / rows;
        match self.make {
            Make::Whole | Make::Row(_) => values,
            Make::PlusOne => {
                values.iter_mut().for_each(|value| *value += 1.0);
                values
            }
            Make::Rows(part, of) => values[part * rows / of * width..(part + 1) * rows / of * width].to_vec(),
            Make::Frame(frame) => {
                let picture = self.stored[3] * self.stored[4];
                values
                    .chunks_exact(2 * picture)
                    .flat_map(|both| &both[frame * picture..(frame + 1) * picture])
                    .copied()
                    .collect()
            }
            Make::Turned => {
                let half = rows / self.heads / 2;
                let row = |row: usize| {
                    // Head, then which of its pairs, then which of the pair.
                    let (head, within) = (row / (2 * half), row % (2 * half));
                    let from = head * 2 * half + within % 2 * half + within / 2;
                    &values[from * width..(from + 1) * width]
                };
                (0..rows).flat_map(row).copied().collect()
            }
        }
    }
}
