//! What lies beside the weights of a folder: everything goes along but other forms of the weights, what training and
//! downloads left, and what an output says anew; and what stays behind is told.

use std::collections::{BTreeMap, HashSet};
use std::fs::Metadata;
use std::path::{Path, PathBuf};

use formats::container::file::{self, Identity};
use formats::container::stand_in::{is_pointer, stand_in};

use serde_json::{Map, Value};

use super::place::{beginning, is_gguf, is_unfinished, list};
use super::sentence::no_modules;
use super::{Checkpoint, Source};
use crate::error::{Error, Result};
use crate::json::read_json;

/// What accompanies the weights.
#[derive(Debug, Default)]
pub struct Beside {
    /// Files by their path within the output, sorted.
    pub files: Vec<(PathBuf, SideFile)>,
    /// What a reader of a report should know: what stayed behind, and what is called otherwise now.
    pub notes: Vec<String>,
}

impl Beside {
    /// Bytes that these files take in an output.
    pub fn bytes(&self) -> u64 {
        let of = |file: &SideFile| match file {
            SideFile::Copy(_, identity) => identity.bytes(),
            SideFile::Bytes(bytes) => bytes.len() as u64,
        };
        self.files.iter().map(|(_, file)| of(file)).sum()
    }
}

/// A file that accompanies the weights.
#[derive(Clone, Debug, PartialEq)]
pub enum SideFile {
    /// To be copied from here, as long as it is still the file that was looked at.
    Copy(PathBuf, Identity),
    /// Rebuilt from other information.
    Bytes(Vec<u8>),
}

impl Checkpoint {
    /// What to carry over beside the weights of an output that writes the files `own` itself.
    ///
    /// Of a folder everything that is not another form of the weights; fails for what cannot be read there.
    pub fn beside(&self, own: &[&str]) -> Result<Beside> {
        match &self.source {
            Source::Directory { .. } => beside(&self.path, &self.files(), own),
            Source::Gguf(model) => {
                let files = [
                    ("generation_config.json", model.generation_config()),
                    ("tokenizer.json", model.tokenizer_json()?),
                    ("tokenizer_config.json", model.tokenizer_config()?),
                ];
                let of = |(name, value)| {
                    (PathBuf::from(name), SideFile::Bytes(serde_json::to_vec_pretty(&value).expect("a JSON value")))
                };
                let pooling = model.pooling().filter(|pooling| *pooling > 0).map(|pooling| {
                    format!(
                        "{}: the way to make an embedding of hidden states (pooling_type {pooling}) has no place beside \
                         config.json and was left out",
                        self.path.display()
                    )
                });
                let text = model.text_config().map(|config| {
                    format!(
                        "{}: it is the language model of one that also sees, and was written for {}, which computes the same of a text; a GGUF \
                         file that is made of that folder has its architecture too",
                        self.path.display(),
                        config["architectures"][0].as_str().unwrap_or_default()
                    )
                });
                let class = model.config()["architectures"][0].as_str();
                let class = class.and_then(not_whole).map(|why| format!("{}: transformers {why}", self.path.display()));
                let notes = pooling.into_iter().chain(text).chain(class).chain(model.composed());
                Ok(Beside { files: files.map(of).into(), notes: notes.collect() })
            }
        }
    }

    /// config.json of a folder that holds this model.
    pub fn config_of_folder(&self) -> Value {
        let text = match &self.source {
            Source::Directory { .. } => None,
            Source::Gguf(model) => model.text_config(),
        };
        text.unwrap_or_else(|| self.config.clone())
    }
}

/// What transformers does with the language model alone, of classes that do not load all of it.
fn not_whole(class: &str) -> Option<&'static str> {
    match class {
        "Glm5NextTextModel" => Some(
            "has no class that predicts tokens with this language model alone: Glm5NextTextModel, which config.json names, leaves \
             out its head",
        ),
        "MiniMaxM3VLForCausalLM" => Some(
            "loads this language model alone by names that no published file has: MiniMaxM3VLForCausalLM, which config.json names, \
             finds neither feed-forward layers nor indexers, and leaves them at random",
        ),
        _ => None,
    }
}

/// The model card of the input, where the output has one of its own.
const ORIGINAL_CARD: &str = "README.original.md";

/// Pickles and safetensors in folders go along up to this size (64 MiB): those of modules, not another whole model.
const SMALL: u64 = 64 << 20;

/// Bytes of the largest file that goes along (1 GiB).
const LARGEST: u64 = 1 << 30;

/// What stands between the first two lines of dashes of a model card; `None` for a file that cannot be read, or has none.
pub(super) fn front_matter(card: &Path) -> Option<String> {
    let text = file::read_text(card, file::DESCRIPTION).ok()?;
    Some(text.strip_prefix("---\n")?.split("\n---").next()?.to_owned())
}

/// Files that say how words are made, stopped at and put into turns.
pub const OF_WORDS: &[&str] = &[
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Folders within folders that are looked into.
const DEPTH: usize = 16;

/// Why something stays behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    Weights,
    Training,
    Quantization,
    Adapter,
    Card,
    Replaced,
    Unfinished,
    Pointer,
    Nowhere,
    Special,
    Loop,
    Large,
    Hidden,
}

impl Reason {
    fn text(self) -> &'static str {
        match self {
            Reason::Weights => "weights in another form, or not in the index",
            Reason::Training => "left by training",
            Reason::Quantization => "of an earlier quantization",
            Reason::Adapter => "an adapter, which --adapter would merge",
            Reason::Card => "the card of an earlier run",
            Reason::Replaced => "the output has its own",
            Reason::Unfinished => "downloads that are not complete",
            Reason::Pointer => "pointers of git-lfs to files that were not fetched",
            Reason::Nowhere => "links to nothing",
            Reason::Special => "no files",
            Reason::Loop => "links to folders around it",
            Reason::Large => "larger than 1 GiB",
            Reason::Hidden => "hidden files and caches",
        }
    }
}

/// Files that say how weights are quantized, and records of how that was done.
const QUANTIZATION_FILES: &[&str] = &[
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
    "quanto_qmap.json",
    "quant_log.csv",
    "recipe.yaml",
];

/// Folders that hold the model in another form.
const FORM_FOLDERS: &[&str] = &[
    "onnx", "openvino", "original", "coreml", "tflite", "tensorrt", "gguf", "ggml", "mlx", "metal", "flax", "tf", "jax",
];

/// Folders that training fills.
const TRAINING_FOLDERS: &[&str] = &["runs", "logs", "wandb", "tensorboard", "lightning_logs"];

/// Files of training, by the beginnings of their names; pickles and JSON.
const TRAINING_FILES: &[&str] = &[
    "training_args.",
    "trainer_state.",
    "optimizer.",
    "scheduler.",
    "scaler.",
    "rng_state",
    "random_states",
    "zero_to_fp32.",
    "events.out.tfevents",
];

/// Endings of files that hold a whole model and nothing else.
const FORM_ENDINGS: &[&str] = &[
    ".gguf",
    ".ggml",
    ".llamafile",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".h5",
    ".hdf5",
    ".msgpack",
    ".tflite",
    ".mlmodel",
    ".mlpackage",
    ".pdparams",
    ".nemo",
    ".ckpt",
    ".ckpt.index",
    ".ckpt.meta",
    ".ot",
    ".npz",
    ".engine",
];

/// Endings of pickles, which may be anything.
const PICKLES: &[&str] = &[".bin", ".pt", ".pth", ".pkl", ".pickle"];

/// The classifier of a model of SetFit, which stands nowhere else.
const CLASSIFIER: &str = "model_head.pkl";

/// What turns sound into the numbers that a model takes.
const FILTERS: &str = "mel_filters.npz";

/// Pickles that hold a whole model, by the beginnings of their names.
const MODEL_PICKLES: &[&str] =
    &["pytorch_model", "model", "consolidated", "ggml", "openvino", "gptq_model", "qmodel", "diffusion_pytorch_model"];

/// Files without which tokenizers and processors do not load, so that one that was cut short must not go along.
const LOADED: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
];

/// Files that loaders read where they are there, and that nothing here has to read.
const PERHAPS_LOADED: &[&str] =
    &["tokenizer.model", "generation_config.json", "preprocessor_config.json", "processor_config.json"];

/// Endings of files that no loader reads, so that a pointer in their place costs no model.
const PICTURES: &[&str] =
    &[".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".mov", ".pdf", ".wav", ".mp3", ".webm"];

/// What a file says without which a tokenizer or a processor does not load; nothing where it is not there. Fails for one that is no JSON object.
pub(crate) fn read_loaded(path: &Path) -> Result<Option<Map<String, Value>>> {
    let json = read_json(path).map_err(|error| {
        let empty = std::fs::metadata(path).is_ok_and(|metadata| metadata.len() == 0);
        Error::failed(format!("{error}{}", if empty { "" } else { "; fetch the file again" }))
    })?;
    json.map(|json| match json {
        Value::Object(settings) => Ok(settings),
        _ => {
            let why = "not a JSON object, and no tokenizer or processor loads with it; fetch the file again";
            Err(Error::failed(format!("{}: {why}", path.display())))
        }
    })
    .transpose()
}

/// Looks through the folder of a model whose weights are `weights`; `own` are the names of files that the output writes
/// itself.
///
/// Fails for what cannot be read, and where a file that loaders read was never fetched.
pub(super) fn beside(folder: &Path, weights: &[PathBuf], own: &[&str]) -> Result<Beside> {
    let modules = super::sentence::modules(folder).into_iter().map(|(path, _)| path);
    let report = read_json(&folder.join("report.json")).ok().flatten();
    let mut walk = Walk {
        root: folder,
        weights: weights.iter().filter_map(|path| path.strip_prefix(folder).ok()).collect(),
        own,
        modules: modules.map(PathBuf::from).collect(),
        was_written_here: report
            .is_some_and(|report| report["tool"].as_str().is_some_and(|tool| tool.starts_with("quantc "))),
        around: HashSet::new(),
        files: Vec::new(),
        left: BTreeMap::new(),
        notes: Vec::new(),
    };
    walk.folder(Path::new(""), 0, false)?;
    let Walk { mut files, left, mut notes, .. } = walk;
    files.sort_by(|a, b| a.0.cmp(&b.0));
    if files.iter().any(|(name, file)| {
        name.as_path() == Path::new(ORIGINAL_CARD)
            && matches!(file, SideFile::Copy(from, _) if from.ends_with("README.md"))
    }) {
        notes.push(format!("the model card of {} is {ORIGINAL_CARD} now", folder.display()));
    }
    if !left.is_empty() {
        let told: Vec<String> =
            left.iter().map(|(reason, names)| format!("{} ({})", list(names), reason.text())).collect();
        notes.push(format!("left out of what lies beside the weights: {}", told.join("; ")));
    }
    Ok(Beside { files, notes })
}

struct Walk<'a> {
    root: &'a Path,
    /// Their paths within the folder.
    weights: HashSet<&'a Path>,
    own: &'a [&'a str],
    /// Folders that sentence-transformers loads as modules.
    modules: Vec<PathBuf>,
    was_written_here: bool,
    /// The real paths of the folders that the walk is in.
    around: HashSet<PathBuf>,
    files: Vec<(PathBuf, SideFile)>,
    left: BTreeMap<Reason, Vec<String>>,
    /// Files that are not what their names say, and go along all the same.
    notes: Vec<String>,
}

impl Walk<'_> {
    fn leave(&mut self, reason: Reason, at: &Path, is_folder: bool) {
        let slash = if is_folder { "/" } else { "" };
        self.left.entry(reason).or_default().push(format!("{}{slash}", at.display()));
    }

    /// Looks through the folder `at` of the model; `is_module` says that it is one of sentence-transformers', or an adapter's
    /// own, whose weights belong to the model.
    fn folder(&mut self, at: &Path, depth: usize, is_module: bool) -> Result<()> {
        let folder = self.root.join(at);
        let real = self.inside(&folder)?;
        if depth > DEPTH || !self.around.insert(real.clone()) {
            self.leave(Reason::Loop, at, true);
            return Ok(());
        }
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder, "list"))? {
            entries.push(entry.map_err(Error::io(&folder, "list"))?.file_name());
        }
        entries.sort();
        for name in entries {
            let inner = at.join(&name);
            let path = self.root.join(&inner);
            // Through links, as hub caches hold links to their blobs.
            let metadata = match std::fs::metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    self.leave(Reason::Nowhere, &inner, false);
                    continue;
                }
                Err(error) => return Err(Error::io(&path, "open")(error)),
            };
            let name = name.to_string_lossy().to_lowercase();
            if name.starts_with('.') || name == "__pycache__" {
                self.leave(Reason::Hidden, &inner, metadata.is_dir());
            } else if metadata.is_dir() {
                if depth == 0 && PERHAPS_LOADED.contains(&&name[..]) {
                    self.notes.push(format!("{}: is a folder, and runtimes read a file of this name", path.display()));
                }
                let own = is_module || self.modules.contains(&inner) || path.join("adapter_config.json").exists();
                match folder_reason(&name).filter(|_| !own) {
                    Some(reason) => self.leave(reason, &inner, true),
                    None if self.holds(&path)? => self.leave(Reason::Loop, &inner, true),
                    None => self.folder(&inner, depth + 1, own)?,
                }
            } else if !metadata.is_file() {
                self.leave(Reason::Special, &inner, false);
            } else {
                self.file(inner, &name, &path, &metadata, depth == 0, is_module)?;
            }
        }
        self.around.remove(&real);
        Ok(())
    }

    /// Whether a folder holds the model's, so that a walk through it would come back.
    fn holds(&self, folder: &Path) -> Result<bool> {
        let [folder, root] = [folder, self.root].map(|path| path.canonicalize().map_err(Error::io(path, "resolve")));
        Ok(root?.starts_with(folder?))
    }

    fn file(
        &mut self,
        at: PathBuf,
        name: &str,
        path: &Path,
        metadata: &Metadata,
        at_top: bool,
        is_module: bool,
    ) -> Result<()> {
        if self.weights.contains(&*at) {
            return Ok(());
        }
        if at_top {
            if name == "config.json" {
                return Ok(());
            }
            if name == "model.safetensors.index.json" {
                return Ok(());
            }
            if self.was_written_here && (name == "report.json" || name == "readme.md") {
                self.leave(Reason::Card, &at, false);
                return Ok(());
            }
            if self.own.contains(&name) && name != "readme.md" {
                let quantization = QUANTIZATION_FILES.contains(&name);
                self.leave(if quantization { Reason::Quantization } else { Reason::Replaced }, &at, false);
                return Ok(());
            }
        }
        if let Some(reason) = file_reason(name, metadata.len(), at_top, is_module) {
            self.leave(reason, &at, false);
            return Ok(());
        }
        self.inside(path)?;
        let bytes = beginning(path)?;
        if is_gguf(&bytes) {
            self.leave(Reason::Weights, &at, false);
            return Ok(());
        }
        let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
        if is_pointer(&bytes) && (ends(PICTURES) || !at_top && !is_module) {
            self.leave(Reason::Pointer, &at, false);
            return Ok(());
        }
        // An empty file may be meant, and a page may be documentation.
        let read_by_loaders =
            is_pointer(&bytes) || ends(&[".json", ".model", ".tiktoken", ".jinja"]) && !bytes.is_empty();
        if let Some(why) = stand_in(&bytes).filter(|_| read_by_loaders) {
            return Err(Error::failed(format!("{}: {why}", path.display())));
        }
        if at_top && LOADED.contains(&name) {
            read_loaded(path)?;
        } else if at_top && name.ends_with(".json") && metadata.len() <= SMALL {
            match read_json(path) {
                Err(error) => self
                    .notes
                    .push(format!("{error}; the file goes along as it is, and what reads it will fail or do without")),
                Ok(Some(json)) if name == "generation_config.json" && !json.is_object() => {
                    self.notes.push(format!("{}: not a JSON object; the file goes along as it is", path.display()));
                }
                Ok(Some(json)) if name == "modules.json" => self.notes.extend(no_modules(path, &json)),
                Ok(_) => {}
            }
        }
        let kept = if at_top && name == "readme.md" && self.own.iter().any(|own| own.eq_ignore_ascii_case(name)) {
            PathBuf::from(ORIGINAL_CARD)
        } else {
            at
        };
        if kept == Path::new(ORIGINAL_CARD) && self.files.iter().any(|(other, _)| *other == kept) {
            self.leave(Reason::Card, &kept, false);
            return Ok(());
        }
        if metadata.len() > LARGEST {
            self.leave(Reason::Large, &kept, false);
            return Ok(());
        }
        self.files.push((kept, SideFile::Copy(path.to_path_buf(), Identity::from_metadata(metadata))));
        Ok(())
    }

    /// The real path of a file or folder of the model. Fails for one that a link leads to from outside: whoever made the folder may
    /// mean a file of the reader's, which would go into the output.
    fn inside(&self, path: &Path) -> Result<PathBuf> {
        let real_path = |path: &Path| path.canonicalize().map_err(Error::io(path, "resolve"));
        let (real, root) = (real_path(path)?, real_path(self.root)?);
        // The snapshots of a hub cache are links to what they share.
        let snapshots = root.parent().filter(|folder| folder.file_name().is_some_and(|name| name == "snapshots"));
        let blobs = snapshots.and_then(|folder| folder.with_file_name("blobs").canonicalize().ok());
        if real.starts_with(&root) || blobs.is_some_and(|blobs| real.starts_with(blobs)) {
            return Ok(real);
        }
        Err(Error::failed(format!(
            "{}: a link that leads out of the model's folder, to {}; put the file itself there, or remove the link",
            path.display(),
            real.display()
        )))
    }
}

/// Whether a file beside the weights is one that a model's folder needs, by its path within and its size: what would stay behind anyway need
/// not be fetched, and pictures need not either.
pub fn goes_along(path: &str, bytes: u64) -> bool {
    let path = path.to_lowercase();
    let (folders, name) = path.rsplit_once('/').unwrap_or(("", &path));
    let hidden = path.split('/').any(|part| part.starts_with('.') || part == "__pycache__");
    let picture = PICTURES.iter().any(|ending| name.ends_with(ending));
    let reason = file_reason(name, bytes, folders.is_empty(), false);
    // How the weights of an older quantization are stored is read from these files.
    let stays = reason.is_some_and(|reason| reason != Reason::Quantization);
    !hidden
        && !picture
        && !stays
        && bytes <= LARGEST
        && folders.split('/').all(|folder| folder_reason(folder).is_none())
}

/// Why a folder of this name, in lower case, stays behind as a whole.
fn folder_reason(name: &str) -> Option<Reason> {
    let numbered = |prefix: &str| {
        name.strip_prefix(prefix).is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
    };
    match () {
        () if FORM_FOLDERS.contains(&name) || name.ends_with(".mlpackage") => Some(Reason::Weights),
        () if TRAINING_FOLDERS.contains(&name) || numbered("checkpoint-") || numbered("global_step") => {
            Some(Reason::Training)
        }
        () => None,
    }
}

/// Why a file of this name, in lower case, and size stays behind.
fn file_reason(name: &str, size: u64, at_top: bool, is_module: bool) -> Option<Reason> {
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    let starts = |beginnings: &[&str]| beginnings.iter().any(|beginning| name.starts_with(beginning));
    if is_unfinished(name) {
        return Some(Reason::Unfinished);
    }
    if starts(TRAINING_FILES) {
        return Some(Reason::Training);
    }
    let pickle = ends(PICKLES);
    if at_top {
        if QUANTIZATION_FILES.contains(&name) {
            return Some(Reason::Quantization);
        }
        let adapter = name == "adapter_config.json" || starts(&["adapter_model.", "adapters.safetensors"]);
        if adapter {
            return Some(Reason::Adapter);
        }
        // vLLM loads every safetensors file of a folder whose index does not forbid it.
        let whole = name.ends_with(".safetensors")
            || name.ends_with(".index.json")
            || pickle && starts(MODEL_PICKLES) && name != CLASSIFIER;
        if whole {
            return Some(Reason::Weights);
        }
    }
    if is_module {
        return None;
    }
    let large = (pickle || name.ends_with(".safetensors")) && size > SMALL;
    let form = ends(FORM_ENDINGS) && name != FILTERS;
    (large || form || name.contains(".ckpt.data-")).then_some(Reason::Weights)
}
