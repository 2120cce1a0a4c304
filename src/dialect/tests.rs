//! Files written from the specification, read as checkpoints.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::checkpoint::{Checkpoint, SideFile};

/// A GGUF file written from the specification.
#[derive(Default)]
struct Writer {
    metadata: Vec<u8>,
    keys: u64,
    table: Vec<u8>,
    tensors: u64,
    data: Vec<u8>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Writer {
    fn key(&mut self, key: &str, ty: u32, value: &[u8]) {
        self.metadata.extend([&string(key), &ty.to_le_bytes()[..], value].concat());
        self.keys += 1;
    }

    fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8, &string(value));
    }

    fn count(&mut self, key: &str, value: u32) {
        self.key(key, 4, &value.to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, 6, &value.to_le_bytes());
    }

    fn array(&mut self, key: &str, ty: u32, values: Vec<Vec<u8>>) {
        let head = [&ty.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.key(key, 9, &[head, values.concat()].concat());
    }

    fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.table.extend(string(name));
        self.table.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|e| self.table.extend((*e as u64).to_le_bytes()));
        self.table.extend(0u32.to_le_bytes());
        self.table.extend((self.data.len() as u64).to_le_bytes());
        self.tensors += 1;
        values.iter().for_each(|v| self.data.extend(v.to_le_bytes()));
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    fn write(&self, path: &Path) {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.keys.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.table);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        std::fs::write(path, out).unwrap();
    }

    fn open(&self) -> Result<Checkpoint, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        self.write(&path);
        Checkpoint::open(&path).map_err(|e| e.to_string().replace(&path.display().to_string(), "FILE"))
    }
}

/// The least metadata of a llama.
fn llama() -> Writer {
    llama_of(&json!({
        "max_position_embeddings": 256, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }))
}

fn llama_of(config: &Value) -> Writer {
    let mut w = Writer::default();
    w.string("general.architecture", "llama");
    for (key, name) in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ] {
        w.count(&format!("llama.{key}"), config[name].as_u64().expect(name) as u32);
    }
    w.float("llama.attention.layer_norm_rms_epsilon", 1e-5);
    w
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints").join(name)
}

/// As the official converter writes it: GGUF names, q and k interleaved, rope scaling as a tensor of factors.
fn convert(source: &Checkpoint) -> Writer {
    let mut w = llama_of(source.config());
    let head_count = |key: &str| source.config()[key].as_u64().unwrap() as usize;
    let names = [
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    for entry in source.entries() {
        let name = names.iter().fold(entry.name.clone(), |name, (from, to)| name.replace(from, to));
        let values = source.load(&entry.name).unwrap();
        let heads = match () {
            () if name.contains("attn_q.") => head_count("num_attention_heads"),
            () if name.contains("attn_k.") => head_count("num_key_value_heads"),
            () => 0,
        };
        let mut stored = values.clone();
        let rows = entry.shape[0];
        if let Some(d) = rows.checked_div(heads) {
            let row_len = values.len() / rows;
            for h in 0..heads {
                for p in 0..2 {
                    for j in 0..d / 2 {
                        let (new, old) = (h * d + 2 * j + p, h * d + p * d / 2 + j);
                        stored[new * row_len..][..row_len].copy_from_slice(&values[old * row_len..][..row_len]);
                    }
                }
            }
        }
        w.tensor(&name, &entry.shape, &stored);
    }
    w
}

#[test]
fn a_converted_llama_has_its_names_rows_and_settings_back() {
    for name in ["llama_both_biases", "llama_untied_gqa", "llama_tied"] {
        let original = Checkpoint::open(&fixture(name)).unwrap();
        let read = convert(&original).open().unwrap();
        assert_eq!(read.entries().len(), original.entries().len());
        for entry in original.entries() {
            assert_eq!(read.entry(&entry.name).expect(&entry.name).shape, entry.shape, "{name}");
            let values = original.load(&entry.name).unwrap();
            assert!(read.load(&entry.name).unwrap() == values, "{name} {}", entry.name);
            if let Some(raw) = read.raw(&entry.name) {
                assert!(raw.to_f32().unwrap() == values, "{name} {}", entry.name);
            }
            if let [_, width] = entry.shape[..] {
                let mut rows = vec![0.0; 2 * width];
                read.load_rows(&entry.name, &[3, 1], &mut rows).unwrap();
                assert!(rows[..width] == values[3 * width..][..width] && rows[width..] == values[width..][..width]);
            }
        }
        for key in [
            "architectures",
            "attention_bias",
            "mlp_bias",
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "model_type",
            "max_position_embeddings",
            "num_attention_heads",
            "num_key_value_heads",
            "num_hidden_layers",
            "rms_norm_eps",
            "tie_word_embeddings",
            "vocab_size",
        ] {
            assert_eq!(read.config()[key], original.config()[key], "{name} {key}");
        }
        assert_eq!(read.config()["rope_theta"], 10000.0);
        assert_eq!(read.config()["torch_dtype"], "float32");
    }
}

#[test]
fn llama3_scaling_is_found_from_its_factors() {
    let check = |head_dim: usize, theta: f64, factor: f64, high: f64, original: f64| -> Value {
        let factors: Vec<f32> = (0..head_dim / 2)
            .map(|i| {
                let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
                let t = (original / wavelength - 1.0) / (high - 1.0);
                let value = match () {
                    () if wavelength < original / high => 1.0,
                    () if wavelength > original => factor,
                    () => 1.0 / ((1.0 - t) / factor + t),
                };
                value as f32
            })
            .collect();
        let mut w = llama();
        w.float("llama.rope.freq_base", theta as f32);
        w.tensor("token_embd.weight", &[4, 32], &[0.5; 128]);
        w.tensor("rope_freqs.weight", &[factors.len()], &factors);
        let read = w.open().unwrap();
        assert_eq!(read.entries().len(), 1, "the factors are part of config.json");
        read.config()["rope_scaling"].clone()
    };
    let llama31 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    assert_eq!(check(128, 500000.0, 8.0, 4.0, 8192.0), llama31);
    assert_eq!(check(64, 500000.0, 32.0, 4.0, 8192.0)["factor"], 32.0);
    assert_eq!(check(128, 500000.0, 8.0, 2.5, 4096.0)["high_freq_factor"], 2.5);
    assert_eq!(check(128, 500000.0, 8.0, 2.5, 4096.0)["original_max_position_embeddings"], 4096);
    // Four pairs, none of them between the bounds.
    assert_eq!(check(8, 10000.0, 8.0, 4.0, 32.0)["factor"], 8.0);
    assert_eq!(check(128, 500000.0, 1.0, 4.0, 8192.0), Value::Null);
}

/// A GGUF with the vocabulary of a tokenizer.json.
fn with_vocabulary(original: &Value, model: &str, pre: &str) -> Writer {
    let vocab = original["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<&str> = vec![""; vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token);
    let mut kinds = vec![1i32; tokens.len()];
    for token in original["added_tokens"].as_array().unwrap() {
        let id = token["id"].as_u64().unwrap() as usize;
        kinds[id] = if token["special"] == true { 3 } else { 4 };
    }
    let mut w = llama();
    w.tensor("token_embd.weight", &[4, 32], &[0.5; 128]);
    w.string("tokenizer.ggml.model", model);
    w.string("tokenizer.ggml.pre", pre);
    if model == "llama" {
        kinds[0] = 2;
        (0..tokens.len()).filter(|id| tokens[*id].starts_with("<0x")).for_each(|id| kinds[id] = 6);
        let score = |id: usize| if kinds[id] == 1 { 259.0 - id as f32 } else { 0.0 };
        w.array("tokenizer.ggml.scores", 6, (0..tokens.len()).map(|id| score(id).to_le_bytes().to_vec()).collect());
    } else {
        let merges = original["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge {
            Value::String(text) => string(text),
            pair => string(&format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap())),
        });
        w.array("tokenizer.ggml.merges", 8, merges.collect());
    }
    w.array("tokenizer.ggml.tokens", 8, tokens.iter().map(|token| string(token)).collect());
    w.array("tokenizer.ggml.token_type", 5, kinds.iter().map(|kind| kind.to_le_bytes().to_vec()).collect());
    w
}

const TEXT: &str = "Hello, World!  It's 2024-05-31; they're 12345 apples…\n\n\tdef f(x): return x**2  # ünïcödé\r\n\
        Ein größerer Satz — «с кириллицей», 日本語のテキスト, 한국어, العربية, हिन्दी. 🤖👩‍👩‍👧 e\u{301}\u{00A0}x \
        <|im_start|>user\nhi<|im_end|> <s>in the text</s>   trailing   ";

fn same_ids(original: &Value, rebuilt: &[u8]) {
    let original = Tokenizer::from_bytes(original.to_string().as_bytes()).unwrap();
    let rebuilt = Tokenizer::from_bytes(rebuilt).unwrap();
    for text in [TEXT, "", " ", "a", "  two  spaces", "Once upon a time, there was a little girl named Lily."] {
        for special in [true, false] {
            let (a, b) = (original.encode(text, special).unwrap(), rebuilt.encode(text, special).unwrap());
            assert_eq!(a.get_tokens(), b.get_tokens());
            assert_eq!(a.get_ids(), b.get_ids());
            assert_eq!(original.decode(a.get_ids(), true).unwrap(), rebuilt.decode(b.get_ids(), true).unwrap());
        }
    }
}

fn tokenizer_at(path: &Path) -> Option<Value> {
    match std::fs::read(path) {
        Ok(bytes) => Some(serde_json::from_slice(&bytes).unwrap()),
        Err(_) => {
            eprintln!("SKIPPED: {} is not there", path.display());
            None
        }
    }
}

fn shared(path: &str) -> PathBuf {
    let root = std::env::var_os("QUANTC_SHARED").map(PathBuf::from);
    root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")).join(path)
}

#[test]
fn byte_level_tokenizers_are_rebuilt() {
    let cases = [
        (Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo/model/tokenizer.json"), "gpt-2"),
        (shared("models/smollm2-135m/tokenizer.json"), "smollm"),
    ];
    for (path, pre) in cases {
        let Some(original) = tokenizer_at(&path) else { continue };
        let mut w = with_vocabulary(&original, "gpt2", pre);
        w.key("tokenizer.ggml.add_bos_token", 7, &[0]);
        let rebuilt = w.open().unwrap();
        same_ids(&original, rebuilt.tokenizer().unwrap().unwrap().json.to_string().as_bytes());
    }
}

#[test]
fn sentence_piece_tokenizers_are_rebuilt_from_scores() {
    let Some(original) = tokenizer_at(&shared("models/stories260k/tokenizer.json")) else { return };
    let rebuilt = with_vocabulary(&original, "llama", "default").open().unwrap();
    same_ids(&original, rebuilt.tokenizer().unwrap().unwrap().json.to_string().as_bytes());
    let files = rebuilt.tokenizer().unwrap().unwrap();
    let names = ["bos", "eos", "unk"].map(|name| files.special(name).map(|(_, text)| text));
    assert_eq!(names, [Some("<s>"), Some("</s>"), Some("<unk>")]);
}

/// A SentencePiece vocabulary that says `Hi` in one piece.
fn pieces(kinds: Option<&[i32]>, scores: Option<&[f32]>) -> Checkpoint {
    let mut w = llama();
    let texts = ["<unk>", "<s>", "</s>", "▁", "H", "i", "▁H", "Hi", "▁Hi"];
    w.tensor("token_embd.weight", &[texts.len(), 32], &[0.5; 9 * 32]);
    w.string("tokenizer.ggml.model", "llama");
    w.array("tokenizer.ggml.tokens", 8, texts.map(string).to_vec());
    let bytes = |values: Option<Vec<[u8; 4]>>| values.map(|values| values.iter().map(|x| x.to_vec()).collect());
    let kinds = bytes(kinds.map(|kinds| kinds.iter().map(|kind| kind.to_le_bytes()).collect()));
    kinds.into_iter().for_each(|kinds| w.array("tokenizer.ggml.token_type", 5, kinds));
    let scores = bytes(scores.map(|scores| scores.iter().map(|score| score.to_le_bytes()).collect()));
    scores.into_iter().for_each(|scores| w.array("tokenizer.ggml.scores", 6, scores));
    w.open().unwrap()
}

fn split(read: &Checkpoint, text: &str) -> Vec<u32> {
    let json = read.tokenizer().unwrap().unwrap().json.to_string();
    Tokenizer::from_bytes(json).unwrap().encode(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn pieces_are_joined_whatever_their_types_and_without_scores() {
    let scores = [0.0, 0.0, 0.0, -5.0, -5.0, -5.0, -1.0, -2.0, -3.0];
    let kinds = [2, 3, 3, 1, 1, 1, 1, 1, 1];
    assert_eq!(split(&pieces(Some(&kinds), Some(&scores)), "Hi</s>"), [8, 2]);
    // An unused piece.
    for unused in [6, 8] {
        let mut kinds = kinds;
        kinds[unused] = 5;
        assert_eq!(split(&pieces(Some(&kinds), Some(&scores)), "Hi"), [8], "{unused}");
    }
    let untyped = pieces(None, Some(&scores));
    assert_eq!(split(&untyped, "Hi</s>"), [8, 2]);
    assert_ne!(split(&untyped, "<s>"), [1]);
    assert!(untyped.remarks().is_empty(), "{:?}", untyped.remarks());
    for scores in [None, Some(&[0.0; 9][..])] {
        let read = pieces(Some(&kinds), scores);
        assert_eq!(split(&read, "Hi"), [8]);
        assert!(read.remarks()[0].contains("have no scores"), "{:?}", read.remarks());
    }
}

/// Six tokens, one merge.
fn small_vocabulary() -> Writer {
    let original = json!({
        "added_tokens": [{"id": 0, "special": true}, {"id": 1, "special": true}],
        "model": {"vocab": {"<b>": 0, "<e>": 1, "a": 2, "b": 3, "ab": 4}, "merges": ["a b"]},
    });
    let mut w = with_vocabulary(&original, "gpt2", "llama-bpe");
    w.count("tokenizer.ggml.bos_token_id", 0);
    w.count("tokenizer.ggml.eos_token_id", 1);
    w.count("tokenizer.ggml.eot_token_id", 4);
    w.count("tokenizer.ggml.eom_token_id", 3);
    w.string("tokenizer.chat_template", "{{ messages }}");
    w
}

#[test]
fn special_tokens_templates_and_side_files() {
    let mut w = small_vocabulary();
    w.key("tokenizer.ggml.add_eos_token", 7, &[1]);
    let read = w.open().unwrap();
    let tokenizer = Tokenizer::from_bytes(read.tokenizer().unwrap().unwrap().json.to_string()).unwrap();
    assert_eq!(tokenizer.encode("ab", true).unwrap().get_ids(), [0, 4, 1], "BOS is Llama 3's default");
    assert_eq!(read.tokenizer().unwrap().unwrap().templates.default.as_deref(), Some("{{ messages }}"));
    assert_eq!(read.config()["bos_token_id"], 0);
    assert_eq!(read.config()["eos_token_id"], json!([1, 4, 3]));
    let side = read.beside(&[]).unwrap().files;
    let names: Vec<&str> = side.iter().map(|(name, _)| name.to_str().unwrap()).collect();
    assert_eq!(names, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    let SideFile::Bytes(bytes) = &side[0].1 else { panic!("rebuilt") };
    assert_eq!(serde_json::from_slice::<Value>(bytes).unwrap(), json!({"bos_token_id": 0, "eos_token_id": [1, 4, 3]}));
}

#[test]
fn what_cannot_be_translated_is_named() {
    let refused = |change: &dyn Fn(&mut Writer)| {
        let mut w = Writer::default();
        change(&mut w);
        let known: Vec<&str> = super::architectures::ARCHITECTURES.iter().map(|known| known.id).collect();
        w.open().unwrap_err().replace(&known.join(", "), "ARCHITECTURES")
    };
    assert_eq!(refused(&|_| ()), "FILE: metadata key `general.architecture` is missing");
    assert_eq!(
        refused(&|w| w.string("general.architecture", "mamba")),
        "FILE: GGUF architecture `mamba` is not one that can be read (ARCHITECTURES)"
    );
    assert_eq!(
        refused(&|w| w.string("general.architecture", "llama")),
        "FILE: metadata key `llama.embedding_length` is missing"
    );
    assert_eq!(
        refused(&|w| {
            w.string("general.architecture", "qwen2");
            for key in ["context_length", "embedding_length", "block_count", "feed_forward_length"] {
                w.count(&format!("qwen2.{key}"), 32);
            }
            w.count("qwen2.attention.head_count", 4);
            w.float("qwen2.attention.layer_norm_rms_epsilon", 1e-5);
            w.count("qwen2.expert_count", 8);
        }),
        "FILE: a mixture of experts of architecture `qwen2` cannot be read"
    );
    assert_eq!(
        refused(&|w| {
            *w = llama();
            w.tensor("token_embd.weight", &[4, 32], &[0.5; 128]);
            w.tensor("blk.0.attn_q.weight", &[12, 32], &[0.5; 384]);
        }),
        "FILE: tensor `blk.0.attn_q.weight`: its shape is [12, 32], expected [32, 32]"
    );
    let tokenizer = |change: &dyn Fn(&mut Writer)| {
        let mut w = llama();
        w.tensor("token_embd.weight", &[4, 32], &[0.5; 128]);
        change(&mut w);
        let message = w.open().unwrap().tokenizer().err().unwrap().to_string();
        message.rsplit_once("m.gguf: ").expect("names the file").1.to_string()
    };
    assert_eq!(tokenizer(&|_| ()), "metadata key `tokenizer.ggml.tokens` is missing");
    let tokens = |w: &mut Writer, pre: &str, merge: &str| {
        w.string("tokenizer.ggml.model", "gpt2");
        w.string("tokenizer.ggml.pre", pre);
        w.array("tokenizer.ggml.tokens", 8, ["a", "b"].map(string).to_vec());
        w.array("tokenizer.ggml.merges", 8, vec![string(merge)]);
    };
    let unknown = tokenizer(&|w| tokens(w, "unheard", "a b"));
    assert!(
        unknown.starts_with("pre-tokenizer `unheard` (tokenizer.ggml.pre) is none that is known here: how"),
        "{unknown}"
    );
    let near = tokenizer(&|w| tokens(w, "lama-bpe", "a b"));
    assert!(near.contains("(is it `llama-bpe`?)") && near.len() < 300, "{near}");
    assert_eq!(tokenizer(&|w| tokens(w, "gpt-2", "a b")), "merge `a b` does not join two tokens to a third");
    assert_eq!(
        tokenizer(&|w| w.array("tokenizer.ggml.tokens", 8, ["a", "a"].map(string).to_vec())),
        "tokens 0 and 1 are both `a`"
    );
}
