//! Written tokenizers against real files, and read back.

use std::path::PathBuf;

use calibration::samples::Tokenizer;
use formats::{GgmlType, GgufTensor, GgufWriter};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;
use crate::checkpoint::Checkpoint;

#[path = "../../../tests/fixtures/sentencepiece.rs"]
mod sentencepieces;
use sentencepieces::{bytes, number, piece};

const TEXTS: &[&str] = &[
    "",
    " ",
    "a",
    "  two  spaces\t\ttabs\n\n\nlines\r\n   ",
    "Once upon a time, there was a little girl named Lily. She'd 've I'LL",
    "It's 2024-05-31; 1 12 123 1234 12345 3.14159 ٣٤٥ Ⅷ ½ 1e-5",
    "def f(x):\n    return x**2  # ünïcödé\r\n",
    "Größe — «с кириллицей», 日本語のテキスト, 한국어, العربية, हिन्दी, ไทย",
    "🤖👩‍👩‍👧🏽 e\u{301}\u{a0}x\u{200b}y\u{feff}z \u{1f1e9}\u{1f1ea} \u{0}\u{7f}\u{85}",
    "<|im_start|>user\nhi<|im_end|>\n<s>in the text</s> <unk> <|endoftext|><|begin_of_text|>x",
    "▁already▁there <0x0A> [PAD3] Ġthe",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn shared(path: &str) -> PathBuf {
    let folder = std::env::var_os("QUANTC_SHARED").map(PathBuf::from);
    folder.unwrap_or_else(|| root().join("../shared")).join(path)
}

/// The JSON file, unless it is one of another machine.
fn json_at(path: &Path) -> Option<Value> {
    let found = read_json(path).unwrap();
    if found.is_none() {
        eprintln!("SKIPPED: {} is not there", path.display());
    }
    found
}

/// A folder with these files.
fn folder(files: &[(&str, &Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in files {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    folder
}

fn written(folder: &Path, rows: usize) -> Written {
    of_folder(folder, &Value::Null, rows, None, "a model").unwrap()
}

fn get<'w>(written: &'w Written, key: &str) -> Option<&'w MetadataValue> {
    written.metadata.iter().find(|(name, _)| name.strip_prefix("tokenizer.ggml.") == Some(key)).map(|(_, value)| value)
}

fn text<'w>(written: &'w Written, key: &str) -> Option<&'w str> {
    get(written, key)?.as_str()
}

fn id(written: &Written, name: &str) -> Option<u64> {
    get(written, &format!("{name}_token_id"))?.as_u64()
}

fn list<'w>(written: &'w Written, key: &str) -> Vec<&'w MetadataValue> {
    match get(written, key) {
        Some(MetadataValue::Array(array)) => array.iter().collect(),
        other => panic!("{key}: {other:?}"),
    }
}

fn kinds(written: &Written) -> Vec<i64> {
    list(written, "token_type").iter().map(|value| value.as_i64().unwrap()).collect()
}

fn words<'w>(written: &'w Written, key: &str) -> Vec<&'w str> {
    list(written, key).iter().map(|value| value.as_str().unwrap()).collect()
}

/// A GGUF file with this tokenizer, opened.
fn file_of(written: &Written, rows: usize) -> (tempfile::TempDir, Checkpoint) {
    let count = |key: &str, n: u32| (format!("llama.{key}"), MetadataValue::U32(n));
    let mut metadata = vec![
        ("general.architecture".to_owned(), MetadataValue::String("llama".to_owned())),
        count("context_length", 64),
        count("embedding_length", 32),
        count("block_count", 1),
        count("feed_forward_length", 32),
        count("attention.head_count", 1),
        ("llama.attention.layer_norm_rms_epsilon".to_owned(), MetadataValue::F32(1e-5)),
    ];
    metadata.extend(written.metadata.iter().cloned());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let ty = GgmlType::from_name("Q4_0").unwrap();
    let embedding = GgufTensor { name: "token_embd.weight".to_owned(), ty, shape: vec![rows, 32] };
    let writer = GgufWriter::create(&path, metadata, vec![embedding]).unwrap();
    writer.write("token_embd.weight", &vec![0; rows * 18]).unwrap();
    writer.finish().unwrap();
    let opened = Checkpoint::open(&path).unwrap();
    (folder, opened)
}

/// Writes the tokenizer, reads it back, and encodes texts with both.
fn round_trip(original: &Value, written: &Written, rows: usize) {
    let (_folder, file) = file_of(written, rows);
    let back = file.tokenizer().unwrap().unwrap().tokenizer;
    let original = Tokenizer::from_json(original.to_string().as_bytes()).unwrap();
    for text in TEXTS {
        for special in [true, false] {
            assert_eq!(back.encode(text, special).unwrap(), original.encode(text, special).unwrap(), "{text:?}");
        }
    }
    // And once more from the GGUF file, whose keys stay as they are.
    let again = tokenizer(&file, rows, None).unwrap();
    let sorted = |written: &Written| {
        let mut all = written.metadata.clone();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    assert!(sorted(&again) == sorted(written));
    let error = tokenizer(&file, rows + 1, None).unwrap_err().to_string();
    assert!(error.contains(&format!("the number of tokens is {rows}, expected {}", rows + 1)), "{error}");
}

fn digest(written: &Written, key: &str) -> String {
    let mut hash = Sha256::new();
    for value in list(written, key) {
        hash.update(value.to_string_representation());
        hash.update([0]);
    }
    format!("{:x}", hash.finalize())
}

#[test]
fn the_built_in_model_round_trips() {
    let folder = root().join("src/demo/model");
    let original = json_at(&folder.join("tokenizer.json")).unwrap();
    let out = of_folder(&folder, &json_at(&folder.join("config.json")).unwrap(), 4096, None, "a model").unwrap();
    assert_eq!((text(&out, "model"), text(&out, "pre")), (Some("gpt2"), Some("smollm")));
    assert_eq!(["bos", "eos", "unknown", "padding"].map(|name| id(&out, name)), [Some(0), Some(0), Some(0), None]);
    assert_eq!(get(&out, "add_bos_token"), Some(&MetadataValue::Bool(false)));
    assert_eq!(kinds(&out)[..2], [kind::CONTROL, kind::NORMAL]);
    assert_eq!(out.notices, Vec::<String>::new());
    round_trip(&original, &out, 4096);
}

#[test]
fn smollm2_is_written_as_llama_cpps_converter_writes_it() {
    let folder = shared("models/smollm2-135m");
    let Some(original) = json_at(&folder.join("tokenizer.json")) else { return };
    let out = of_folder(&folder, &json_at(&folder.join("config.json")).unwrap(), 49152, None, "a model").unwrap();
    // Of the GGUF file of SmolLM2-135M-Instruct that its makers published: each entry and a zero byte, hashed.
    for (key, expected) in [
        ("tokens", "4ca839f11927b8890dbb58b39b1f0008a4d826e02eecd78c77d8ed1340170a11"),
        ("token_type", "a3a65d57d9158c4ec777be3af2fb6c6d512d75928d950f30ad949aec381347be"),
        ("merges", "e3c0b318be8a7ce2d559e1ec4d6f8ebbab56cc792f3aa27fd53a8925011a0017"),
    ] {
        assert_eq!(digest(&out, key), expected, "{key}");
    }
    assert_eq!((text(&out, "model"), text(&out, "pre")), (Some("gpt2"), Some("smollm")));
    let probed = pretokenizer::by_probe(&Tokenizer::from_json(original.to_string().as_bytes()).unwrap(), Some(1));
    assert_eq!(probed, Some("smollm"), "by the hash of its ids");
    assert_eq!(["bos", "eos", "unknown", "padding"].map(|name| id(&out, name)), [Some(1), Some(2), Some(0), Some(2)]);
    assert_eq!(get(&out, "add_bos_token"), Some(&MetadataValue::Bool(false)));
    let template = out.metadata.iter().find(|(key, _)| key == "tokenizer.chat_template").unwrap().1.as_str().unwrap();
    assert_eq!(
        format!("{:x}", Sha256::digest(template)),
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"
    );
    // Its vocabulary was made without 21 bytes that its text never held.
    let [note] = &out.notices[..] else { panic!("{:?}", out.notices) };
    assert!(note.contains("no token for 21 of the 256 bytes (such as 0x04)"), "{note}");
    round_trip(&original, &out, 49152);
}

#[test]
fn sentence_piece_round_trips_from_its_merges() {
    for name in ["stories260k", "aidreams260k"] {
        let folder = shared(&format!("models/{name}"));
        let Some(original) = json_at(&folder.join("tokenizer.json")) else { continue };
        let out = of_folder(&folder, &json_at(&folder.join("config.json")).unwrap(), 512, None, "a model").unwrap();
        assert_eq!((text(&out, "model"), text(&out, "pre")), (Some("llama"), Some("default")));
        assert_eq!(["bos", "eos", "unknown"].map(|name| id(&out, name)), [Some(1), Some(2), Some(0)]);
        for flag in ["add_bos_token", "add_space_prefix"] {
            assert_eq!(get(&out, flag), Some(&MetadataValue::Bool(true)));
        }
        let kinds = kinds(&out);
        assert_eq!(kinds[..3], [kind::UNKNOWN, kind::CONTROL, kind::CONTROL]);
        assert!(kinds[3..259].iter().all(|kind| *kind == kind::BYTE));
        // As SentencePiece scores pieces joined in order.
        let scores = list(&out, "scores");
        for (id, score) in scores.iter().enumerate().skip(259) {
            assert_eq!(**score, MetadataValue::F32(259.0 - id as f32), "{name} {id}");
        }
        assert_eq!(out.notices, Vec::<String>::new(), "{name}");
        round_trip(&original, &out, 512);
    }
}

#[test]
fn llama_3s_marks_ends_and_fill_are_written() {
    let mut original = json_at(&root().join("tests/fixtures/text/byte_level.json")).unwrap();
    original["model"]["ignore_merges"] = true.into();
    original["added_tokens"].as_array_mut().unwrap().push(json!({"id": 1002, "content": "of▁a user", "special": false,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
    let config = json!({"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>", "mask_token": "[none]",
        "chat_template": [{"name": "Tool-use", "template": "T"}, {"name": "default", "template": "D"}]});
    let generation = json!({"eos_token_id": [1, 3, 4, 5], "pad_token_id": 1009});
    let files =
        [("tokenizer.json", &original), ("tokenizer_config.json", &config), ("generation_config.json", &generation)];
    let out = written(folder(&files).path(), 1010);
    assert_eq!(text(&out, "pre"), Some("llama-bpe"));
    let tokens = words(&out, "tokens");
    assert_eq!((tokens.len(), tokens[1000], tokens[1001], tokens[1009]), (1010, "of a user", "[none]", "[PAD1009]"));
    assert_eq!([1000, 1001, 1009].map(|id| kinds(&out)[id]), [kind::USER_DEFINED, kind::CONTROL, kind::UNUSED]);
    let ids = ["bos", "eos", "eot", "eom", "padding", "mask", "unknown"].map(|name| id(&out, name));
    assert_eq!(ids, [Some(0), Some(1), Some(3), Some(4), Some(1009), Some(1001), None]);
    assert_eq!(get(&out, "add_bos_token"), Some(&MetadataValue::Bool(true)));
    assert_eq!(
        out.notices,
        [
            "the tokenizer's files give `of▁a user` the id 1002, and it has 1000 (tokenizer.json): ids are those of the \
             tokenizers library, as in transformers",
            "`[none]` (mask_token) is not in the vocabulary: it becomes token 1001, as in transformers, whose embedding the \
             model did not learn",
            "the model also stops at token 5 (`[/INST]`), which a GGUF file cannot say",
        ]
    );
    let find = |key: &str| out.metadata.iter().find(|(name, _)| name == key).and_then(|(_, value)| value.as_str());
    assert_eq!(find("tokenizer.chat_template"), Some("D"));
    assert_eq!(find("tokenizer.chat_template.tool_use"), Some("T"));
    original["added_tokens"].as_array_mut().unwrap().pop();
    let out = written(folder(&[("tokenizer.json", &original), ("tokenizer_config.json", &config)]).path(), 1000);
    round_trip(&original, &out, 1000);
}

/// As embedding models of chat models have it: texts end with one mark, and turns with another.
#[test]
fn the_mark_behind_texts_is_eos_and_what_ends_turns_is_kept() {
    let mut original = json_at(&root().join("tests/fixtures/text/byte_level.json")).unwrap();
    let marks: Vec<(String, u64)> = original["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| (token["content"].as_str().unwrap().to_owned(), token["id"].as_u64().unwrap()))
        .collect();
    let ((behind, behind_id), (turn, turn_id)) = (&marks[1], &marks[3]);
    original["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": behind, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {behind: {"id": behind, "ids": [behind_id], "tokens": [behind]}}});
    let config = json!({"eos_token": turn});
    let model = json!({"eos_token_id": behind_id});
    let files = [("tokenizer.json", &original), ("tokenizer_config.json", &config), ("config.json", &model)];
    let out = written(folder(&files).path(), 1000);
    let ids = ["eos", "eot"].map(|name| id(&out, name));
    assert_eq!(ids, [Some(*behind_id), Some(*turn_id)]);
    assert_eq!(get(&out, "add_eos_token"), Some(&MetadataValue::Bool(true)));
    assert!(
        out.notices.iter().all(|note| !note.contains("behind") && !note.contains("after texts")),
        "{:?}",
        out.notices
    );
    round_trip(&original, &out, 1000);
}

#[test]
fn merges_of_either_form_and_spaces_in_them() {
    let merges = |value: Value| super::merges(&json!({"model": {"merges": value}}));
    assert_eq!(merges(json!(["a b", "ab c"])).unwrap(), ["a b", "ab c"]);
    assert_eq!(merges(json!([["a", " b"], ["ab", "c"]])).unwrap(), ["a Ġb", "ab c"]);
    assert!(merges(json!([["a"]])).unwrap_err().to_string().contains("[\"a\"] is no merge"));
    assert_eq!(
        ["Ġthe", "<|im_end|>", "é", "ðŁ¤ĸ", "Ã", "日本"].map(decoded),
        [" the", "<|im_end|>", "é", "🤖", "Ã", "日本"]
    );
}

/// A tokenizer.model with the vocabulary of a tokenizer.json of this kind, scored as pieces are.
fn model_of(json: &Value, change: impl Fn(usize, &str) -> String) -> Vec<u8> {
    let mut out = Vec::new();
    for (id, token) in vocabulary(json).unwrap() {
        let (kind, score) = match id {
            0 => (2, 0.0),
            1 | 2 => (3, 0.0),
            3..259 => (6, 0.0),
            _ => (1, 259.0 - id as f32),
        };
        out.extend(piece(&change(id as usize, token), score, kind));
    }
    out.extend(bytes(2, &number(3, 2)));
    out.extend(bytes(3, &number(4, 0)));
    out
}

#[test]
fn a_sentence_piece_model_goes_first() {
    let original = json_at(&root().join("tests/fixtures/text/sentencepiece_like.json")).unwrap();
    let model = model_of(&original, |_, text| text.to_owned());
    // Alone.
    let alone = tempfile::tempdir().unwrap();
    std::fs::write(alone.path().join("tokenizer.model"), &model).unwrap();
    let out = written(alone.path(), 810);
    assert_eq!(words(&out, "tokens")[800..802], ["[PAD800]", "[PAD801]"]);
    assert_eq!(["bos", "eos", "unknown", "padding"].map(|name| id(&out, name)), [Some(1), Some(2), Some(0), None]);
    assert_eq!(get(&out, "add_bos_token"), Some(&MetadataValue::Bool(true)));
    assert_eq!(list(&out, "scores")[300], &MetadataValue::F32(-41.0));
    assert_eq!((kinds(&out)[0], kinds(&out)[5], kinds(&out)[809]), (kind::UNKNOWN, kind::BYTE, kind::UNUSED));
    assert!(out.notices.len() == 1 && out.notices[0].contains("without a space before texts"), "{:?}", out.notices);

    // With what was added since.
    std::fs::write(alone.path().join("added_tokens.json"), r#"{"<pad>": 800, "user▁defined": 801}"#).unwrap();
    let decoder = json!({"added_tokens_decoder": {"1": {"content": "<s>", "special": true},
        "300": {"content": "<new>", "special": true}, "800": {"content": "<pad>"}, "801": {"content": "user▁defined"}},
        "add_bos_token": false});
    std::fs::write(alone.path().join("tokenizer_config.json"), decoder.to_string()).unwrap();
    let out = written(alone.path(), 810);
    assert_eq!([300, 800, 801].map(|id| words(&out, "tokens")[id]), ["<new>", "<pad>", "user defined"]);
    assert_eq!([300, 800, 801, 1].map(|id| kinds(&out)[id]), [3, 3, 4, 3]);
    assert_eq!([1, 300].map(|id| list(&out, "scores")[id].clone()), [0.0, -1000.0].map(MetadataValue::F32));
    assert_eq!(get(&out, "add_bos_token"), Some(&MetadataValue::Bool(false)));

    // Beside a tokenizer.json that says the same, and one that does not.
    let both = folder(&[("tokenizer.json", &original)]);
    let beside = |model: &[u8]| {
        std::fs::write(both.path().join("tokenizer.model"), model).unwrap();
        written(both.path(), 800)
    };
    assert_eq!(beside(&model).notices, Vec::<String>::new());
    let other = beside(&model_of(&original, |id, text| if id == 400 { "☃☃☃".to_owned() } else { text.to_owned() }));
    assert!(other.notices[0].contains("differs from tokenizer.json in 1 tokens"), "{:?}", other.notices);
    assert_ne!(words(&other, "tokens")[400], "☃☃☃");
    // Llama 3's tokenizer.model is a list of base64.
    let not_one = beside(b"IQ== 0\nIg== 1\n");
    assert_eq!(words(&not_one, "tokens"), words(&other, "tokens"));
    std::fs::remove_file(both.path().join("tokenizer.json")).unwrap();
    let error = of_folder(both.path(), &Value::Null, 800, None, "a model").unwrap_err().to_string();
    assert!(
        error.contains("/tokenizer.model: a list of tokens for tiktoken, and not a SentencePiece model"),
        "{error}"
    );
}

#[test]
fn unigram_models_are_written_as_they_are() {
    let mut pieces = vec![json!(["<unk>", 0.0]), json!(["▁a", -1.5]), json!(["b", -2.0])];
    pieces.extend((0..=255).map(|byte| json!([format!("<0x{byte:02X}>"), -9.0])));
    let unigram = json!({"added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": false},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": true}});
    let out = written(folder(&[("tokenizer.json", &unigram)]).path(), 259);
    assert_eq!(kinds(&out)[..4], [kind::UNKNOWN, kind::NORMAL, kind::NORMAL, kind::BYTE]);
    assert_eq!(list(&out, "scores")[1], &MetadataValue::F32(-1.5));
    assert_eq!(get(&out, "add_space_prefix"), Some(&MetadataValue::Bool(false)));
    assert_eq!((text(&out, "model"), id(&out, "unknown")), (Some("t5"), Some(0)));
    assert_eq!(get(&out, "remove_extra_whitespaces"), Some(&MetadataValue::Bool(false)));
    assert_eq!(out.notices.len(), 2);
    assert!(
        out.notices[0].contains("step Lowercase") && out.notices[1].contains("its bytes here"),
        "{:?}",
        out.notices
    );
}

#[test]
fn sentence_piece_without_a_token_for_each_byte_is_refused() {
    let bytes = |left_out: &[u8]| -> Vec<String> {
        (0..=255).filter(|byte| !left_out.contains(byte)).map(|byte| format!("<0x{byte:02X}>")).collect()
    };
    let check = |tokens: &[String]| check_bytes(&tokens.iter().map(|token| &**token).collect());
    assert_eq!(check(&bytes(&[])), Ok(()));
    // llama.cpp takes the character itself where there is no byte, which a byte of several has not.
    assert_eq!(check(&[bytes(b"A"), vec!["A".to_owned()]].concat()), Ok(()));
    assert!(check(&[bytes(&[0xe9]), vec!["é".to_owned()]].concat()).unwrap_err().contains("for 1 of the 256 bytes"));
    let several = check(&bytes(b"\0\nA")).unwrap_err();
    assert!(several.contains("for 3 of the 256 bytes") && several.contains("(such as `<0x0A>`)"), "{several}");
}

#[test]
fn merges_that_scores_cannot_say_are_told() {
    let original = json_at(&root().join("tests/fixtures/text/sentencepiece_like.json")).unwrap();
    let out = written(folder(&[("tokenizer.json", &original)]).path(), 800);
    assert!(out.notices[0].contains("joins pieces in its own order"), "{:?}", out.notices);
}

#[test]
fn what_cannot_be_written_is_one_sentence() {
    let original = json_at(&root().join("tests/fixtures/text/byte_level.json")).unwrap();
    let refused = |rows: usize, pre: Option<&str>, change: &dyn Fn(&mut Value)| {
        let mut json = original.clone();
        change(&mut json);
        let folder = folder(&[("tokenizer.json", &json)]);
        let error = of_folder(folder.path(), &Value::Null, rows, pre, "a model").unwrap_err().to_string();
        error.replace(&format!("{}/", folder.path().display()), "")
    };
    let few = refused(999, None, &|_| ());
    assert!(
        few.starts_with("tokenizer.json: token 999 (`") && few.contains("beyond the embedding's 999 rows"),
        "{few}"
    );
    // Read as it is spelt, the added token is one of the vocabulary.
    let twice = refused(1010, None, &|json| {
        let token = json!({"id": 1001, "content": "ĠĠĠĠ", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false});
        json["added_tokens"].as_array_mut().unwrap().push(token);
        json["model"]["vocab"]["    "] = 1000.into();
    });
    assert!(twice.starts_with("tokenizer.json: tokens ") && twice.contains("and 1001 are both `    `"), "{twice}");
    let word_piece = json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 9, "vocab": {"a": 0}});
    let other = refused(1, None, &|json| {
        json["model"] = word_piece.clone();
        json["added_tokens"] = json!([]);
        json["post_processor"] = Value::Null;
    });
    assert!(other.contains("a tokenizer of type WordPiece cannot be written as GGUF"), "{other}");
    let sentence_piece = json_at(&root().join("tests/fixtures/text/sentencepiece_like.json")).unwrap();
    let pre = refused(800, Some("gpt-2"), &|json| *json = sentence_piece.clone());
    assert!(pre.starts_with("--pre gpt-2: only byte-level BPE has a pre-tokenizer"), "{pre}");
    let empty = tempfile::tempdir().unwrap();
    let none = of_folder(empty.path(), &Value::Null, 3, None, "a model").unwrap_err().to_string();
    assert!(none.contains("/tokenizer.json: no such file, and there is no tokenizer.model"), "{none}");
}

#[test]
fn the_user_may_name_the_pre_tokenizer() {
    let folder = root().join("src/demo/model");
    let out = of_folder(&folder, &Value::Null, 4096, Some("gpt-2"), "a model").unwrap();
    assert_eq!(text(&out, "pre"), Some("gpt-2"));
    let (_folder, file) = file_of(&out, 4096);
    assert_eq!(text(&tokenizer(&file, 4096, Some("smollm")).unwrap(), "pre"), Some("smollm"));
}

/// What llama.cpp makes of texts with each name, and the same vocabulary (`tests/runtimes/tokens.py`).
#[test]
fn ids_of_every_pre_tokenizer_are_llama_cpps() {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/gguf/pre_tokenizers.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let mut wrong = Vec::new();
    let ways = golden["ways"].as_array().unwrap();
    assert!(ways.len() > 25);
    for way in ways {
        let vocabulary = &golden["vocabularies"][way["vocabulary"].as_str().unwrap()];
        let list = |key: &str| -> Vec<String> { serde_json::from_value(vocabulary[key].clone()).unwrap() };
        let tokens = list("tokens");
        for name in way["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()) {
            let mut out = Written::default();
            out.string("tokenizer.ggml.model", "gpt2");
            out.string("tokenizer.ggml.pre", name);
            out.flag("tokenizer.ggml.add_bos_token", false);
            strings("tokenizer.ggml.tokens", tokens.clone(), &mut out).unwrap();
            strings("tokenizer.ggml.merges", list("merges"), &mut out).unwrap();
            let kinds = tokens.iter().map(|token| MetadataValue::I32(if is_byte(token) { 6 } else { 1 })).collect();
            array("tokenizer.ggml.token_type", kinds, GGUFValueType::I32, &mut out).unwrap();
            let (_folder, file) = file_of(&out, tokens.len());
            let files = file.tokenizer().unwrap().unwrap();
            for (text, expected) in texts.iter().zip(way["ids"].as_array().unwrap()) {
                let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
                let found = files.tokenizer.encode(text, false).unwrap();
                if found != expected {
                    let at = found.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(0);
                    let shown = |ids: &[u32]| -> Vec<&str> {
                        ids.iter().skip(at.saturating_sub(2)).take(8).map(|id| &*tokens[*id as usize]).collect()
                    };
                    wrong.push(format!("{name}, {text:?}:\n  {:?}\n  {:?}", shown(&found), shown(&expected)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
