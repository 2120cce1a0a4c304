//! A GGUF file of the `llama` architecture seen as a Hugging Face checkpoint: names, row order, config.json.
//!
//! The tokenizer is rebuilt by [`super::gguf_tokenizer`].

use std::collections::HashMap;
use std::path::Path;

use formats::container::gguf::GgufSpec;
use formats::{Dtype, GgufFile, TensorView};
use serde_json::{Map, Value, json};

use crate::checkpoint::{Entry, StoredType};
use crate::error::{Error, Result};
use crate::import::names::{self, ARCHITECTURES, Architecture, Heads, ROPE_FREQS};

/// An opened GGUF model.
#[derive(Debug)]
pub(crate) struct GgufModel {
    file: GgufFile,
    config: Value,
    dtype: Dtype,
    tensors: HashMap<String, Mapped>,
    order: Vec<String>,
}

/// Where a tensor lies, and how its rows are ordered.
#[derive(Debug)]
struct Mapped {
    name: String,
    /// Heads whose rows are interleaved (q and k), else `None`.
    interleaved: Option<usize>,
}

impl GgufModel {
    pub fn open(path: &Path) -> Result<GgufModel> {
        let file = GgufFile::open(path)?;
        let id = file.require("general.architecture", file.string("general.architecture")?)?;
        let Some(architecture) = Architecture::named(id) else {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|architecture| architecture.id).collect();
            return Err(Error::failed(format!(
                "{}: GGUF architecture `{id}` is not one that can be read ({})",
                path.display(),
                known.join(", ")
            )));
        };
        let settings = Settings::read(&file, architecture.id)?;
        let dtype = stored_dtype(file.tensors());
        let config = settings.config(&file, dtype)?;

        let mut tensors = HashMap::new();
        let mut order = Vec::new();
        for spec in file.tensors().iter().filter(|spec| spec.name != ROPE_FREQS) {
            // An unknown tensor keeps its name, for whoever accounts for tensors to refuse.
            let name = architecture.hugging_face_name(&spec.name).unwrap_or_else(|| spec.name.clone());
            let interleaved = architecture.interleaved(&spec.name).map(|heads| match heads {
                Heads::Query => settings.heads,
                Heads::Key => settings.kv_heads,
            });
            let rows = spec.shape.first().copied().unwrap_or(1);
            if let Some(heads) = interleaved
                && !rows.is_multiple_of(2 * heads)
            {
                let why = format!("its {rows} rows do not split into pairs for {heads} heads");
                return Err(formats::Error::malformed(why).in_tensor(&spec.name).in_file(path).into());
            }
            order.push(name.clone());
            if tensors.insert(name.clone(), Mapped { name: spec.name.clone(), interleaved }).is_some() {
                return Err(formats::Error::malformed("two tensors would have this name")
                    .in_tensor(name)
                    .in_file(path)
                    .into());
            }
        }
        Ok(GgufModel { file, config, dtype, tensors, order })
    }

    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    pub fn config(&self) -> &Value {
        &self.config
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Every tensor under its Hugging Face name, in the file's order.
    pub fn entries(&self) -> Vec<Entry> {
        let entry = |name: &String| {
            let view = self.file.get(&self.tensors[name].name).expect("listed");
            Entry {
                name: name.clone(),
                shape: view.shape.to_vec(),
                dtype: view.ty.plain().map_or(StoredType::Ggml(view.ty), StoredType::Plain),
                stored_bytes: view.data.len() as u64,
            }
        };
        self.order.iter().map(entry).collect()
    }

    /// Rows of a tensor in Hugging Face order; `rows` are within it, and each target holds one row.
    pub fn read_rows<'o>(&self, name: &str, rows: impl Iterator<Item = (usize, &'o mut [f32])>) -> formats::Result<()> {
        let mapped = &self.tensors[name];
        let view = self.file.get(&mapped.name).expect("listed");
        // Of a bias it is the elements that are permuted.
        if view.shape.len() == 1 {
            let mut whole = vec![0.0; view.shape[0]];
            view.ty.dequantize(view.data, &mut whole)?;
            for (_, out) in rows {
                for (element, out) in out.iter_mut().enumerate() {
                    *out = whole[mapped.stored_row(element, whole.len())];
                }
            }
            return Ok(());
        }
        let (count, _) = view.rows_and_width();
        for (row, out) in rows {
            view.ty.dequantize(view.row(mapped.stored_row(row, count)), out)?;
        }
        Ok(())
    }

    /// The bytes of a tensor that is stored plainly and in Hugging Face order.
    pub fn raw(&self, name: &str) -> Option<TensorView<'_>> {
        let mapped = self.tensors.get(name)?;
        let view = self.file.get(&mapped.name)?;
        match mapped.interleaved {
            Some(_) => None,
            None => Some(TensorView { dtype: view.ty.plain()?, shape: view.shape, data: view.data }),
        }
    }

    pub fn release(&self, name: &str) {
        if let Some(mapped) = self.tensors.get(name) {
            self.file.release(&mapped.name);
        }
    }

    pub fn tokenizer_json(&self) -> Result<Value> {
        super::gguf_tokenizer::tokenizer_json(&self.file)
    }

    pub fn tokenizer_config(&self) -> Result<Value> {
        super::gguf_tokenizer::tokenizer_config(&self.file, self.config["max_position_embeddings"].as_u64())
    }

    pub fn generation_config(&self) -> Value {
        let mut config = Map::new();
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(id) = self.config.get(key) {
                config.insert(key.into(), id.clone());
            }
        }
        Value::Object(config)
    }
}

impl Mapped {
    /// The row of the file that holds row `row` of `rows`.
    fn stored_row(&self, row: usize, rows: usize) -> usize {
        self.interleaved.map_or(row, |heads| names::stored_row(row, rows, heads))
    }
}

/// What converted weights should be stored as: the file's own float type, and half precision for ggml's blocks.
fn stored_dtype(tensors: &[GgufSpec]) -> Dtype {
    if tensors.iter().any(|spec| spec.ty.plain().is_none()) {
        return Dtype::F16;
    }
    let bytes = |dtype| tensors.iter().filter(|s| s.ty.plain() == Some(dtype)).map(GgufSpec::bytes).sum::<usize>();
    [Dtype::BF16, Dtype::F16, Dtype::F32].into_iter().max_by_key(|dtype| bytes(*dtype)).expect("three types")
}

/// The settings under `{architecture}.`.
struct Settings {
    hidden: usize,
    mlp: usize,
    blocks: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    epsilon: f64,
    theta: f64,
    scaling: Option<Value>,
}

impl Settings {
    fn read(file: &GgufFile, architecture: &str) -> Result<Settings> {
        let key = |name: &str| format!("{architecture}.{name}");
        let count = |name: &str| -> Result<Option<usize>> { Ok(file.count(&key(name))?) };
        let required = |name: &str| -> Result<usize> {
            let value = file.require(&key(name), count(name)?)?;
            if value == 0 {
                let error = formats::Error::mismatch(format!("metadata key `{}`", key(name)), "a positive count", 0);
                return Err(error.in_file(file.path()).into());
            }
            Ok(value)
        };
        let unsupported = |why: String| Error::Format(formats::Error::unsupported(why).in_file(file.path()));

        if let Some(experts) = count("expert_count")?.filter(|n| *n > 0) {
            return Err(unsupported(format!("a mixture of {experts} experts cannot be read")));
        }
        let hidden = required("embedding_length")?;
        let heads = required("attention.head_count")?;
        let kv_heads = count("attention.head_count_kv")?.unwrap_or(heads).max(1);
        let head_dim = count("attention.key_length")?.unwrap_or(hidden / heads);
        if let Some(value) = count("attention.value_length")?.filter(|value| *value != head_dim) {
            return Err(unsupported(format!("keys of {head_dim} values and values of {value} cannot be read")));
        }
        if let Some(rotated) = count("rope.dimension_count")?.filter(|rotated| *rotated != head_dim) {
            return Err(unsupported(format!("rotating {rotated} of {head_dim} values of a head cannot be read")));
        }
        let context = required("context_length")?;
        let epsilon = "attention.layer_norm_rms_epsilon";
        let epsilon = file.require(&key(epsilon), file.float(&key(epsilon))?)?;
        Ok(Settings {
            hidden,
            mlp: required("feed_forward_length")?,
            blocks: required("block_count")?,
            heads,
            kv_heads,
            head_dim,
            context,
            epsilon,
            theta: file.float(&key("rope.freq_base"))?.unwrap_or(10000.0),
            scaling: rope_scaling(file, architecture)?,
        })
    }

    /// config.json of a `LlamaForCausalLM`.
    fn config(&self, file: &GgufFile, dtype: Dtype) -> Result<Value> {
        let embedding = file
            .get("token_embd.weight")
            .ok_or_else(|| formats::Error::missing("the tensor").in_tensor("token_embd.weight").in_file(file.path()))?;
        let dtype = match dtype {
            Dtype::F32 => "float32",
            Dtype::BF16 => "bfloat16",
            _ => "float16",
        };
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": file.get("blk.0.attn_q.bias").is_some(),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "max_position_embeddings": self.context,
            "mlp_bias": file.get("blk.0.ffn_up.bias").is_some(),
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.blocks,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.theta,
            "tie_word_embeddings": file.get("output.weight").is_none(),
            "torch_dtype": dtype,
            "vocab_size": embedding.shape.first(),
        });
        let object = config.as_object_mut().expect("an object");
        if let Some(scaling) = &self.scaling {
            object.insert("rope_scaling".into(), scaling.clone());
        }
        for (name, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(id) = file.count(&format!("tokenizer.ggml.{key}_token_id"))? {
                object.insert(name.into(), id.into());
            }
        }
        // A chat model ends its turn with another token than a text.
        if let (Some(eos), Some(eot)) =
            (object.get("eos_token_id").cloned(), file.count("tokenizer.ggml.eot_token_id")?)
            && eos != json!(eot)
        {
            object.insert("eos_token_id".into(), json!([eos, eot]));
        }
        Ok(config)
    }
}

fn rope_scaling(file: &GgufFile, architecture: &str) -> Result<Option<Value>> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    if let Some(freqs) = file.get(ROPE_FREQS) {
        let mut factors = vec![0.0; freqs.shape.iter().product()];
        freqs.ty.dequantize(freqs.data, &mut factors)?;
        let theta = file.float(&key("freq_base"))?.unwrap_or(10000.0);
        return llama3_scaling(&factors, theta).map_err(|e| e.in_tensor(ROPE_FREQS).in_file(file.path()).into());
    }
    let factor = match file.float(&key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => file.float(&key("scale_linear"))?,
    };
    let kind = file.string(&key("scaling.type"))?.unwrap_or(if factor.is_some() { "linear" } else { "none" });
    match (kind, factor) {
        ("none", _) | ("linear", None | Some(1.0)) => Ok(None),
        ("linear", Some(factor)) => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
        (other, _) => Err(formats::Error::unsupported(format!("rope scaling of type `{other}` cannot be read"))
            .in_file(file.path())
            .into()),
    }
}

/// Finds Llama 3's scaling from the factor it gives each rotary frequency.
///
/// With wavelength `λ` the factor is 1 below `original/high`, `factor` above `original/low`, and between them
/// `1 / ((1 − t)/factor + t)` with `t = (original/λ − low) / (high − low)`. Only the ratios `original : low : high` can be
/// known, so `low` is taken to be 1, as it always is.
fn llama3_scaling(factors: &[f32], theta: f64) -> formats::Result<Option<Value>> {
    if factors.iter().all(|f| *f == 1.0) {
        return Ok(None);
    }
    let dim = 2 * factors.len();
    let inverse_wavelength = |i: usize| theta.powf(-(2.0 * i as f64) / dim as f64) / std::f64::consts::TAU;
    let factor = factors.iter().copied().fold(1.0f32, f32::max);
    // Each factor in between gives a point on the line t(1/λ).
    let t = |f: f32| (1.0 / f64::from(f) - 1.0 / f64::from(factor)) / (1.0 - 1.0 / f64::from(factor));
    let between: Vec<(f64, f64)> = (0..factors.len())
        .filter(|&i| factors[i] > 1.0 && factors[i] < factor)
        .map(|i| (inverse_wavelength(i), t(factors[i])))
        .collect();
    let (original, high) = match (between.first(), between.last()) {
        (Some(first), Some(last)) if between.len() > 1 => {
            let slope = (last.1 - first.1) / (last.0 - first.0);
            let low_over_span = slope * first.0 - first.1;
            let span = 1.0 / low_over_span;
            (slope * span, 1.0 + span)
        }
        // Few rotary pairs leave the bounds open; any between the last unscaled and the first scaled wavelength will do.
        (None, None) => {
            let wavelength = |i: usize| 1.0 / inverse_wavelength(i);
            let first_scaled = (0..factors.len()).find(|&i| factors[i] > 1.0).map_or(1.0, wavelength);
            let last_whole =
                (0..factors.len()).rev().find(|&i| factors[i] == 1.0).map_or(first_scaled / 4.0, wavelength);
            let original = first_scaled.floor();
            (original, (original / last_whole).min(4.0))
        }
        // What Llama 3.1 to 3.3 use.
        _ => (8192.0, 4.0),
    };
    let (original, high) = (original.round(), (high * 1000.0).round() / 1000.0);
    let expected = |i: usize| {
        let t = (original * inverse_wavelength(i) - 1.0) / (high - 1.0);
        1.0 / ((1.0 - t.clamp(0.0, 1.0)) / f64::from(factor) + t.clamp(0.0, 1.0))
    };
    if let Some(i) = (0..factors.len()).find(|&i| (f64::from(factors[i]) / expected(i) - 1.0).abs() > 1e-3) {
        return Err(formats::Error::unsupported(format!(
            "the frequency factors are not Llama 3's rope scaling: factor {i} is {}, expected {:.4}",
            factors[i],
            expected(i)
        )));
    }
    Ok(Some(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    })))
}
