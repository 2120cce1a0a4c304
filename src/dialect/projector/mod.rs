//! `mmproj`: the file beside a GGUF file of a language model from which llama.cpp makes tokens of images and of sound.
//!
//! A kind of projector is data: what llama.cpp calls it, which models have it, what each tensor is called there and how it is made, and
//! which settings it has. Of a kind there is one small file, and a line in [`KINDS`].

mod computed;
mod gemma;
mod gemma3n;
mod gemma4;
mod glm;
mod internvl;
mod kimi;
mod pixtral;
mod qwen;
mod shapes;
mod siglip;
mod whisper;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use formats::{Dtype, GgmlType};
use serde_json::{Value, json};

use self::computed::{Computed, Need};
use super::metadata::Metadata;
use crate::families::{misshapen_beside, text_settings, type_of};
use crate::graph::Graph;
use crate::json::{integer, real};
use crate::mixes::Mix;
use crate::weights::{StoredType, Weights};
use crate::words::listed;

/// Every kind that can be written.
const KINDS: &[&Kind] = &[
    &qwen::QWEN2,
    &qwen::QWEN2_5,
    &qwen::QWEN3,
    &gemma::GEMMA3,
    &gemma3n::GEMMA3N,
    &gemma4::GEMMA4,
    &gemma4::UNIFIED,
    &pixtral::PIXTRAL,
    &pixtral::MISTRAL3,
    &siglip::IDEFICS3,
    &siglip::LFM2,
    &internvl::INTERNVL,
    &internvl::INTERNVL_CHAT,
    &glm::GLM4V,
    &glm::GLM5V,
    &kimi::KIMI_VL,
    &kimi::KIMI_K25,
    &whisper::QWEN2_AUDIO,
    &whisper::VOXTRAL,
];

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
    rules: &'static [&'static [Rule]],
    /// Settings that llama.cpp takes for something.
    computes: &'static [Computed],
    /// Counts of its `vision_config` where that does not say them.
    usual: &'static [(&'static str, u32)],
    /// It may hear, too, so that its types are told of each sense.
    hears: bool,
    /// It has no blocks: patches and sound go to the projector at once.
    flat: bool,
    /// It hears and sees nothing: its settings are those of `audio_config`.
    alone: bool,
    /// Settings of its own, and those that it says otherwise than all others do.
    settings: fn(&Said<'_>, &mut Metadata) -> Result<(), String>,
    /// The token whose embedding ends a row of a picture.
    ends_rows: Option<&'static str>,
}

/// What configurations call the number of heads.
const HEADS: &[&str] = &["num_attention_heads", "num_heads", "vt_num_attention_heads", "encoder_attention_heads"];

const PLAIN: Kind = Kind {
    id: "",
    model_types: &[],
    tower: None,
    architectures: &[],
    prefixes: &[],
    rules: &[],
    computes: &[],
    usual: &[],
    hears: false,
    flat: false,
    alone: false,
    settings: |_, _| Ok(()),
    ends_rows: None,
};

/// What becomes of a tensor; `{}` is the number of a block, in both names, or that of a stage and of a block within it. In the file's, `{KEY}` is the entry of a list of `vision_config` that has
/// this number.
struct Rule {
    /// Its name, or its module's, whose weight and bias are then meant, and the bounds of what it reads and gives.
    from: &'static str,
    /// What it is called in the file.
    to: &'static str,
    make: Make,
    ty: Ty,
    need: Need,
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
    /// Each value in a row of its own.
    Column,
    /// One value for each channel of a picture: `[out]` becomes `[1, out, 1, 1]`.
    Channels,
    /// A linear over the three colours of each pixel of a patch as a convolution over these: `[out, height · width · 3]` becomes `[out, 3,
    /// height, width]`.
    Pixels,
    /// The three colours of each pixel, in the last extent, with all that is of one colour before what is of the next.
    Colours,
    /// With its first two extents the other way round.
    Swapped,
    /// Without its second extent, which is 1.
    Squeezed,
    /// Of places in rows and columns one list: `[height, width, out]` becomes `[height · width, out]`.
    Places,
    /// Of queries, keys and values one after the other the first two, whose heads turn by width and height in turn, with all that turns by
    /// width before what turns by height.
    Sides,
    /// One of the three parts of that: queries, keys or values.
    SidesOf(usize),
    /// The logarithm of 1 and its exponential.
    Softplus,
}

/// The type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ty {
    /// F32 for vectors, positions and what goes over patches, and the checkpoint's own for matrices.
    Usual,
    F32,
    F16,
}

/// Weight and bias of a module, as they are; both have to be there.
const fn same(from: &'static str, to: &'static str) -> Rule {
    made(from, to, Make::Whole)
}

/// The same, of a module that may have no bias.
const fn weight(from: &'static str, to: &'static str) -> Rule {
    Rule { need: Need::Weight, ..same(from, to) }
}

/// A tensor as it is, which has to be there.
const fn itself(from: &'static str, to: &'static str) -> Rule {
    Rule { need: Need::Itself, ..same(from, to) }
}

/// Weight and bias of a module, or a tensor, as they are, where they are there.
const fn free(from: &'static str, to: &'static str) -> Rule {
    Rule { need: Need::Nothing, ..same(from, to) }
}

/// Weight and bias of a module, made so.
const fn made(from: &'static str, to: &'static str, make: Make) -> Rule {
    Rule { from, to, make, ty: Ty::Usual, need: Need::Both }
}

/// Weight and bias of a module as they are, in a type that llama.cpp asks for.
const fn typed(from: &'static str, to: &'static str, ty: Ty) -> Rule {
    Rule { ty, ..same(from, to) }
}

/// What the files of a model say.
struct Said<'a> {
    config: &'a Value,
    /// What the part of what sees or hears is called, and that part.
    part: &'static str,
    vision: &'a Value,
    text: &'a Value,
    preprocessor: &'a Value,
}

impl Said<'_> {
    /// A count of `vision_config` under the first of some names that is there; of one for each extent of a picture the first.
    fn count(&self, keys: &[&str]) -> Result<u32, String> {
        let one = |value: &Value| integer(value).or_else(|| integer(value.get(0)?));
        let found = keys.iter().find_map(|key| one(&self.vision[*key]));
        let count = found.and_then(|found| u32::try_from(found).ok()).filter(|count| *count > 0);
        count.ok_or_else(|| format!("{} of config.json has no {} that is a count", self.part, keys[0]))
    }

    /// A list of `vision_config`; none of it where it is not there.
    fn list(&self, key: &str) -> Vec<i64> {
        self.vision[key].as_array().into_iter().flatten().filter_map(integer).collect()
    }

    /// A count where it is said, or what counts where it is not.
    fn count_or(&self, key: &str, default: u32) -> Result<u32, String> {
        if self.vision[key].is_null() { Ok(default) } else { self.count(&[key]) }
    }

    /// What the values of pictures are shifted or divided by.
    fn channels(&self, key: &str) -> Result<MetadataValue, String> {
        let list = self.preprocessor[key].as_array();
        let values: Option<Vec<f64>> = list.map(|list| list.iter().filter_map(real).collect());
        let values = values.filter(|values| values.len() == 3);
        let values = values.ok_or_else(|| {
            format!("neither preprocessor_config.json nor processor_config.json has an {key} of three numbers")
        })?;
        // Pictures are divided by what the second says.
        let usable = |value: &f64| (*value as f32).is_finite() && (key == "image_mean" || *value as f32 > 0.0);
        if !values.iter().all(usable) {
            return Err(format!(
                "the {key} of preprocessor_config.json or processor_config.json is {values:?}, which no picture is {} by; fetch the file again",
                if key == "image_mean" { "shifted" } else { "divided" }
            ));
        }
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
    /// Its type: F32, F16 or BF16, or that which was asked for.
    pub ty: GgmlType,
    make: Make,
    /// Of the tensor that it is made of.
    stored: Vec<usize>,
    heads: usize,
}

/// What makes tokens of a model's images or sound, for a language model that is written as `architecture`; nothing for a model that sees nothing,
/// and for one that hears, unless it is known how.
///
/// `embedding` is the tensor that tokens have a row in each, and `token` finds one; `preprocessor` is what preprocessor_config.json and processor_config.json say. Fails, with the reason, where llama.cpp has
/// no such projector, or the files do not say what it needs. `types` are those of matrices.
pub fn plan(
    source: &dyn Weights,
    embedding: &str,
    token: &dyn Fn(&str) -> Option<u32>,
    preprocessor: &Value,
    architecture: &str,
    types: &Types,
) -> Option<Result<Projector, String>> {
    let config = source.config();
    let kind = kind_of(config);
    if kind.is_none() && !SENSES.iter().any(|part| config[*part].is_object()) {
        return None;
    }
    let Some(kind) = kind.filter(|kind| kind.architectures.contains(&architecture)) else {
        let model = type_of(config).unwrap_or_default();
        return Some(Err(format!("no file for images or sound is known here for models of the type {model}")));
    };
    let found = kind.laid_out(source, preprocessor, types).and_then(|(found, faults)| match faults.told() {
        told if told.is_empty() => Ok(found),
        told => Err(told.join("; ")),
    });
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

/// Parts of config.json that are of what sees or hears.
const SENSES: &[&str] = &["vision_config", "audio_config", "encoder_config", "vit_config"];

/// The kind of the projector that llama.cpp has for a model.
fn kind_of(config: &Value) -> Option<&'static Kind> {
    let own = |kind: &&Kind| {
        let own = type_of(config).is_some_and(|own| kind.model_types.contains(&own));
        let part = config.get(kind.part()).filter(|part| part.is_object());
        own && part.is_some_and(|part| kind.tower.is_none_or(|tower| type_of(part) == Some(tower)))
    };
    KINDS.iter().copied().find(own)
}

/// What to say of tensors of what sees or hears that its class asks for and the checkpoint lacks, where llama.cpp has a projector of its
/// kind, and of those that have other shapes than its class gives them; nothing where all of it is missing.
pub fn faults(graph: &Graph, source: &dyn Weights) -> Vec<String> {
    // What pictures are shifted by has nothing to do with it.
    let preprocessor =
        json!({"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "min_image_tokens": 1, "max_image_tokens": 1});
    let laid_out = |kind: &Kind| kind.laid_out(source, &preprocessor, &Types::default()).ok();
    let Some((_, faults)) = kind_of(source.config()).and_then(laid_out) else {
        return misshapen_beside(graph, source).iter().map(|told| format!("{told}: {AGAIN}")).collect();
    };
    let missing = lacks(&faults.missing).map(|told| {
        format!("{told}: transformers makes such tensors up at random; unless the model is meant so, download the weights again")
    });
    let shapes = faults.shapes().map(|told| format!("{told}: {AGAIN}"));
    missing.into_iter().chain(shapes).collect()
}

/// What to do about a tensor of a wrong shape.
const AGAIN: &str = "runtimes do not load the model so; download the weights again";

/// What is wrong with the tensors of what sees or hears.
struct Faults {
    /// Names of those that are asked for and not there.
    missing: Vec<String>,
    /// What to say of those that have wrong shapes.
    shapes: Vec<String>,
}

impl Faults {
    fn told(&self) -> Vec<String> {
        lacks(&self.missing).into_iter().chain(self.shapes()).collect()
    }

    /// What to say of the first three shapes that are wrong, and how many more are; nothing where all are right.
    fn shapes(&self) -> Option<String> {
        let first = self.shapes.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ");
        match self.shapes.len() {
            0 => None,
            1..=3 => Some(first),
            all => Some(format!("{first}, and {} more tensors have other shapes than expected", all - 3)),
        }
    }
}

fn lacks(missing: &[String]) -> Option<String> {
    let names: Vec<&str> = missing.iter().map(String::as_str).collect();
    (!names.is_empty()).then(|| format!("the checkpoint has no {}", listed(&names)))
}

/// The types of matrices in a file for images.
#[derive(Clone, Debug, Default)]
pub struct Types {
    /// Of all of them, where that is not to be the checkpoint's own.
    pub all: Option<GgmlType>,
    /// Of some, by the modules that the recipe names: nothing where they are to stay whole.
    pub some: HashMap<String, Option<GgmlType>>,
}

impl Kind {
    /// What its part of config.json is called.
    fn part(&self) -> &'static str {
        if self.alone { "audio_config" } else { "vision_config" }
    }

    /// `vision_config` with what is usual where it says nothing.
    fn completed(&self, vision: &Value) -> Value {
        let mut vision = vision.clone();
        for (key, usual) in self.usual {
            if vision[*key].is_null() {
                vision[*key] = (*usual).into();
            }
        }
        vision
    }

    /// What is written, and what is wrong with the tensors that it is made of.
    fn laid_out(
        &self,
        source: &dyn Weights,
        preprocessor: &Value,
        types: &Types,
    ) -> Result<(Projector, Faults), String> {
        let config = source.config();
        let text = text_settings(config);
        let (part, vision) = (self.part(), &self.completed(&config[self.part()]));
        let said = &Said { config, part, vision, text, preprocessor };
        let own = self.matrices(source);
        let all = types.all.unwrap_or(own);
        let mut metadata = self.metadata(said, all)?;
        computed::check(self, config, &mut metadata)?;
        (self.settings)(said, &mut metadata)?;
        let heads = if self.flat { 0 } else { said.count(HEADS)? as usize };
        let mut tensors = Vec::new();
        let mut unmade = BTreeMap::new();
        for entry in source.entries() {
            let name = entry.name.strip_prefix("model.").unwrap_or(&entry.name);
            if !self.prefixes.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let mut found = self
                .rules
                .iter()
                .copied()
                .flatten()
                .filter_map(|rule| Some((rule, rule.called(name, said)?)))
                .peekable();
            if found.peek().is_none() {
                return Err(format!("{} has no name in llama.cpp's file for images", entry.name));
            }
            for (rule, gguf) in found {
                let shape = rule.make.shape(&entry.shape, heads).unwrap_or_else(|| {
                    let told = format!("`{}` has the shape {:?}, which is not known here", entry.name, entry.shape);
                    unmade.insert(entry.name.clone(), told);
                    entry.shape.clone()
                });
                let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
                let asked = types.some.get(module).map_or(all, |asked| asked.unwrap_or(own));
                let ty = rule.ty(&gguf, &shape, asked);
                let (from, stored) = (entry.name.clone(), entry.shape.clone());
                tensors.push(Tensor { gguf, from, shape, ty, make: rule.make, stored, heads });
            }
        }
        if tensors.is_empty() {
            return Err("the checkpoint has no tensors of it".to_owned());
        }
        let found = Projector { metadata, tensors };
        let missing = computed::missing(self, said, &found);
        unmade.extend(shapes::odd(self, said, &found));
        Ok((found, Faults { missing, shapes: unmade.into_values().collect() }))
    }

    /// The type of matrices: BF16 where the checkpoint has it, else F16. What is quantized is dequantized, to that of the others.
    fn matrices(&self, source: &dyn Weights) -> GgmlType {
        let own = |name: &str| {
            let name = name.strip_prefix("model.").unwrap_or(name);
            self.prefixes.iter().any(|prefix| name.starts_with(prefix))
        };
        let mut bf16 = true;
        for entry in source.entries().iter().filter(|entry| own(&entry.name)) {
            if let StoredType::Plain(dtype) = entry.dtype {
                bf16 &= dtype == Dtype::BF16;
            }
        }
        ggml(if bf16 { "BF16" } else { "F16" })
    }

    /// What every file of a vision tower says.
    fn metadata(&self, said: &Said<'_>, matrices: GgmlType) -> Result<Metadata, String> {
        let mut out = Metadata::new();
        let mut string = |key: &str, value: &str| out.push((key.to_owned(), MetadataValue::String(value.to_owned())));
        string("general.architecture", "clip");
        string("general.type", "mmproj");
        string(if self.hears { "clip.vision.projector_type" } else { "clip.projector_type" }, self.id);
        let file_type = Mix::parse(matrices.name).map_or(1, |mix| mix.file_type);
        for (key, value) in [("general.file_type", file_type), ("general.quantization_version", 2)] {
            out.push((key.to_owned(), MetadataValue::U32(value)));
        }
        let sense = if self.alone { "audio" } else { "vision" };
        flag(&mut out, &format!("has_{sense}_encoder"));
        let wide = integer(&said.text["hidden_size"]).and_then(|wide| u32::try_from(wide).ok());
        let mut count = |key: &str, value| out.push((format!("clip.{sense}.{key}"), MetadataValue::U32(value)));
        count("projection_dim", wide.ok_or("config.json does not say the hidden_size of the language model")?);
        let inner: &[&str] = if said.vision["embed_dim"].is_null() {
            &["intermediate_size", "vt_intermediate_size", "encoder_ffn_dim"]
        } else {
            &["hidden_size"]
        };
        let keys: [(&str, &[&str]); 4] = [
            ("embedding_length", &["embed_dim", "hidden_size", "vt_hidden_size", "d_model", "mm_embed_dim"]),
            ("feed_forward_length", inner),
            ("block_count", &["num_hidden_layers", "depth", "vt_num_hidden_layers", "encoder_layers"]),
            ("attention.head_count", HEADS),
        ];
        for (key, names) in keys {
            count(key, if self.flat && key != "embedding_length" { 0 } else { said.count(names)? });
        }
        if self.alone {
            return Ok(out);
        }
        let side = said.count(&["patch_size"])?;
        count("patch_size", side);
        let cut = &said.preprocessor["patch_size"];
        if let Some(cut) = integer(cut).or(integer(&cut["height"])).filter(|cut| *cut != i64::from(side)) {
            return Err(format!(
                "pictures are cut into patches of {cut} pixels by the patch_size of preprocessor_config.json or processor_config.json, and {}'s \
                 is {side}: fetch the files again",
                said.part
            ));
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
    fn called(&self, name: &str, said: &Said<'_>) -> Option<String> {
        const ENDINGS: &[&str] = &["weight", "bias", "input_min", "input_max", "output_min", "output_max"];
        let (number, ending) = match self.number(name) {
            Some(number) => (number, None),
            None => {
                let (module, ending) = name.rsplit_once('.').filter(|(_, ending)| ENDINGS.contains(ending))?;
                // A linear within bounds is a part of the module that has these.
                let number = self.number(module).or_else(|| self.number(module.strip_suffix(".linear")?))?;
                (number, Some(ending))
            }
        };
        let to = match self.to.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?))) {
            Some((before, (key, after))) if !key.is_empty() => {
                let entry = said.list(key).get(number.parse::<usize>().ok()?).copied()?;
                format!("{before}{entry}{after}")
            }
            _ => self.to.replace("{}", number),
        };
        Some(ending.map_or(to.clone(), |ending| format!("{to}.{ending}")))
    }

    /// The number that a name has where this one has `{}`, if it is this one; nothing of it where this one has none.
    fn number<'n>(&self, name: &'n str) -> Option<&'n str> {
        match self.from.split_once("{}") {
            None => (name == self.from).then_some(""),
            Some((before, after)) => {
                let number = name.strip_prefix(before)?.strip_suffix(after)?;
                let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
                let (stage, block) = number.split_once('.').unwrap_or((number, "0"));
                (digits(stage) && digits(block)).then_some(number)
            }
        }
    }

    /// As llama.cpp's converter chooses it.
    fn ty(&self, gguf: &str, shape: &[usize], matrices: GgmlType) -> GgmlType {
        let patches = gguf.starts_with("v.patch_embd.weight") || gguf.starts_with("mm.patch_merger.weight");
        match self.ty {
            Ty::F16 => ggml("F16"),
            Ty::F32 => ggml("F32"),
            Ty::Usual if patches && shape.len() > 1 => ggml(if matrices.name == "F16" { "F16" } else { "F32" }),
            Ty::Usual if shape.len() < 2 || !gguf.ends_with(".weight") || gguf.starts_with("v.position_embd") => {
                ggml("F32")
            }
            // Rows that hold no whole blocks.
            Ty::Usual if matrices.row_bytes(shape[shape.len() - 1]).is_none() => ggml("F16"),
            Ty::Usual => matrices,
        }
    }
}

impl Make {
    /// The extents of what is made of a tensor of these; nothing where it cannot be.
    fn shape(self, stored: &[usize], heads: usize) -> Option<Vec<usize>> {
        let Some(&first) = stored.first() else { return (self == Make::Whole).then(|| vec![1]) };
        match self {
            Make::Whole | Make::PlusOne | Make::Softplus => Some(stored.to_vec()),
            Make::Colours => stored.last().is_some_and(|last| last.is_multiple_of(3)).then(|| stored.to_vec()),
            Make::Swapped => match stored {
                &[rows, columns, width] => Some(vec![columns, rows, width]),
                _ => None,
            },
            Make::Column => (stored.len() == 1).then(|| vec![first, 1]),
            Make::Channels => (stored.len() == 1).then(|| vec![1, first, 1, 1]),
            Make::Sides => (heads > 0 && first.is_multiple_of(12 * heads)).then(|| stored.to_vec()),
            Make::SidesOf(part) => Make::Rows(part, 3).shape(&Make::Sides.shape(stored, heads)?, heads),
            Make::Places => match stored {
                &[height, width, out] => Some(vec![height * width, out]),
                _ => None,
            },
            Make::Squeezed => match stored {
                &[channels, 1, width] => Some(vec![channels, width]),
                _ => None,
            },
            Make::Pixels => {
                let side = (*stored.get(1)? / 3).isqrt();
                (stored.len() == 2 && side * side * 3 == stored[1]).then(|| vec![first, 3, side, side])
            }
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
        let rows = self.stored.first().map_or(1, |rows| (*rows).max(1));
        let width = values.len() / rows;
        match self.make {
            Make::Whole | Make::Row(_) | Make::Squeezed | Make::Column | Make::Channels | Make::Places => values,
            Make::Softplus => {
                values.iter_mut().for_each(|value| *value = f64::from(*value).exp().ln_1p() as f32);
                values
            }
            Make::Swapped => {
                let (columns, width) = (self.stored[1], self.stored[2]);
                let one = |row: usize, column: usize| &values[(row * columns + column) * width..][..width];
                (0..columns).flat_map(|column| (0..rows).flat_map(move |row| one(row, column))).copied().collect()
            }
            Make::Pixels | Make::Colours => {
                let width = if self.make == Make::Colours { self.stored[self.stored.len() - 1] } else { width };
                let pixels = width / 3;
                let colours =
                    |row: &'_ [f32]| (0..3 * pixels).map(|at| row[at % pixels * 3 + at / pixels]).collect::<Vec<_>>();
                values.chunks_exact(width).flat_map(colours).collect()
            }
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
            Make::Sides => self.sides(&values, 0..rows),
            Make::SidesOf(part) => self.sides(&values, part * rows / 3..(part + 1) * rows / 3),
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

    /// Some of the rows of queries, keys and values, in the order of [`Make::Sides`].
    fn sides(&self, values: &[f32], rows: Range<usize>) -> Vec<f32> {
        let width = values.len() / self.stored[0].max(1);
        let (all, quarter) = (self.stored[0] / 3, self.stored[0] / 3 / self.heads / 4);
        let row = |row: usize| {
            let (part, within) = (row / all, row % all);
            let (head, at) = (within / (4 * quarter), within % (4 * quarter));
            // Side, then which of its pairs, then which of the pair; a file has pairs of both sides in turn.
            let (side, pair, one) = (at / (2 * quarter), at % (2 * quarter) / 2, at % 2);
            let from = if part == 2 { at } else { 4 * pair + 2 * side + one };
            let from = part * all + head * 4 * quarter + from;
            &values[from * width..(from + 1) * width]
        };
        rows.flat_map(row).copied().collect()
    }
}
