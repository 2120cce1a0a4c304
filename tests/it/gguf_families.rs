//! Every family as GGUF: written, read back, and still the model that transformers runs.

use std::path::Path;

use formats::GgufFile;
use kernels::Cpu;
use quantc::job::Job;
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request, UnknownTensors};
use quantc::report::Report;
use quantc::{Checkpoint, families};
use serde_json::{Value, json};

use crate::families::{checkpoint, each, folder, names};
use crate::golden::{golden, logits};

/// Gives a checkpoint a tokenizer that GGUF knows: a token for each of the first bytes.
pub fn spell(folder: &Path) {
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let text = ["text_config", "llm_config"].into_iter().find_map(|part| config.get(part));
    let size = text.unwrap_or(&config)["vocab_size"].as_u64().unwrap() as u32;
    // GPT-2's alphabet begins with what ASCII prints; these go on as letters do.
    let letters = (0x21..0x7f).chain(0xa1..0xad).chain(0xae..0x1000).filter_map(char::from_u32);
    let vocab: serde_json::Map<String, Value> =
        letters.zip(0..size).map(|(letter, id)| (letter.to_string(), json!(id))).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

pub fn write(model: &Path, output: &Path, settings: &str) -> quantc::Result<Report> {
    let request: Request = toml::from_str(&format!("format = 'gguf'\n{settings}")).unwrap();
    let recipe = Recipe::resolve(request).unwrap();
    let job = Job::one(model, output, recipe, None, false);
    job.run_one(&Cpu::exact(), &mut Progress::new(true))
}

/// What llama.cpp has no architecture for, or no setting, and what the refusal says.
const REFUSED: &[(&str, &str)] = &[
    ("apertus_relu", "a feed-forward layer with relu"),
    ("bailing_hybrid_plain", "linear attention whose channels decay each by itself"),
    ("olmo_hybrid_nope", "cannot be written as GGUF"),
    ("olmo_hybrid_plain", "cannot be written as GGUF"),
    ("qwen3_5_text_tied", "linear attention with keys of 24 and values of 16"),
    ("qwen3_next_dense", "layers without experts"),
    ("qwen3_next_mixed", "linear attention with keys of 8 and values of 16"),
    ("qwen3_next_sparse_step", "layers without experts"),
    ("afmoe_biases", "a bias of `model.layers.0.self_attn.q_proj`"),
    ("bamba_biases", "a bias of `model.layers.1.mamba.in_proj`"),
    ("falcon_h1_before", "a state space with a norm before its gate"),
    ("falcon_h1_biases", "a bias of `model.layers.0.mamba.in_proj`"),
    ("lfm2_biases", "a short convolution with a bias"),
    ("lfm3_bare", "cannot be written as GGUF"),
    ("lfm3_plain", "cannot be written as GGUF"),
    ("lfm3_vl_vision", "cannot be written as GGUF"),
    ("lfm2_moe_unbiased", "experts whose weights do not add up to 1"),
    ("nemotron_h_biases", "a bias of `backbone.layers.0.mixer.in_proj`"),
    ("arcee_biases", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("dots1_plain", "4 heads that share 2 keys"),
    ("dots1_sliding", "4 heads that share 2 keys"),
    ("cohere2_moe_sigmoid", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("exaone_moe_types", "attention to all tokens in block 0"),
    ("flex_olmo_normed", "cannot be written as GGUF"),
    ("flex_olmo_plain", "cannot be written as GGUF"),
    ("step3p7_plain", "an attention scale of 0.35355338"),
    ("gemma3n_text_biases", "a bias of `model.layers.0.self_attn.q_proj`"),
    ("gemma3n_text_plain", "work on stream 0 of 3"),
    ("gemma3n_vision", "a residual of rank 8"),
    ("gemma4_text_biases", "a bias of `model.layers.0.self_attn.q_proj`"),
    ("gemma4_text_trained", "where the two before are not one with a window and one without"),
    ("glm4_moe_lite_types", "a bias of"),
    ("hy_v3_types", "a bias of"),
    ("hy_v4_plain", "a bias of `model.layers.0.self_attn.q_a_proj`"),
    ("mistral_large4_grouped", "cannot be written as GGUF"),
    ("mistral_large4_published", "cannot be written as GGUF"),
    ("mistral4_grouped", "a bias of"),
    ("mistral4_vision", "YaRN with beta_fast"),
    ("ernie4_5_biases", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("ernie4_5_moe_biases", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("glm5_next_unbounded", "a bias of `model.language_model.layers.2.self_attn.q_a_proj`"),
    ("qwen4_exp_text_bare", "a bias of `model.layers.1.self_attn.o_proj`"),
    ("qwen4_exp_text_further", "ple_embed_dim 32 beside a hidden_size of 64"),
    ("qwen4_exp_text_plain", "ple_embed_dim 32 beside a hidden_size of 64"),
    ("qwen4_exp_vision", "ple_embed_dim 96 beside a hidden_size of 64"),
    ("glm4_moe_grouped", "this way of limiting experts to groups"),
    ("granitemoeshared_unshared", "a feed-forward layer with a gate of gelu"),
    ("solar_open_grouped", "this way of limiting experts to groups"),
    ("helium_plain", "cannot be written as GGUF"),
    ("hunyuan_v1_dense_plain", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("ministral3_plain", "YaRN with beta_fast"),
    ("seed_oss_biases", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("cohere_qk_norm", "norms of queries and keys of this kind in block 0"),
    ("deepseek_v2_grouped", "groups of experts that are ranked by their best expert"),
    ("deepseek_v2_lite", "queries made without a latent in a model of 2 layers"),
    ("longcat_flash_further", "cannot be written as GGUF"),
    ("longcat_flash_published", "cannot be written as GGUF"),
    (
        "minimax_m3_vl_published",
        "a feed-forward layer whose gate is limited to 1.5, where it has a limit of 7, in block 0",
    ),
    ("kimi_linear_plain", "queries made through a latent"),
    ("deepseek_v32_whole", "a bias of `model.layers.0.self_attn.q_a_proj`"),
    ("deepseek_v4_further", "an indexer with heads of 32 values"),
    ("deepseek_v4_rotations", "entries that stand for 2 tokens"),
    ("deepseek_v4_plain", "entries that stand for 8 tokens"),
    ("deepseek_v4_published", "entries that stand for 8 tokens"),
    ("deepseek_v3_halves", "a bias of `model.layers.0.self_attn.q_a_proj`"),
    ("deepseek_v3_yarn", "queries made without a latent in a model of 2 layers"),
    ("exaone4_hybrid", "attention within 8 tokens in block 0"),
    ("gemma2_plain", "an attention scale of 0.20412415 with heads of 32 values"),
    ("gemma2_uncapped", "logits without a cap, where it has them with a cap of 30, cannot"),
    ("gemma3_text_plain", "an attention scale of 0.2236068 with heads of 32 values"),
    ("gpt2_inner", "a feed-forward layer with no gate and relu"),
    ("gpt_oss_mxfp4", "YaRN with beta_fast"),
    ("gpt_oss_plain", "YaRN with beta_fast"),
    ("llama4_text_every_layer", "attention within 8 tokens"),
    ("llama4_text_plain", "attention within 8 tokens"),
    ("llama4_vision", "attention within 8 tokens"),
    ("llama_rope_yarn", "YaRN with beta_fast"),
    ("llama_rope_yarn_untruncated", "YaRN with beta_fast"),
    ("nemotron_biases", "4 heads of 32 values in a model of width 64"),
    ("olmoe_clip", "4 heads that share 2 keys"),
    ("olmoe_plain", "4 heads that share 2 keys"),
    ("phi_qk_layernorm", "norms of queries and keys of this kind"),
    ("qwen2_moe_normed", "a feed-forward layer without experts in block 0"),
    ("qwen2_moe_sparse_step", "a feed-forward layer without experts in block 0"),
    ("qwen2_yarn", "4 heads of 32 values in a model of width 64"),
    ("qwen3_attention_bias", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("qwen3_moe_mixed", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("smollm3_interval", "a bias of `model.layers.0.self_attn.o_proj`"),
    ("smollm3_nope", "attention without rotary positions (NoPE) in block 1"),
];

/// Beyond how many tokens the file means another model, as a notice says.
fn valid(report: &Report) -> usize {
    let of = |notice: &String| {
        let (_, rest) = notice.split_once("beyond ")?;
        rest.split_whitespace().next()?.parse::<usize>().ok()
    };
    report.notes.iter().filter_map(of).min().unwrap_or(usize::MAX)
}

#[test]
fn every_family_is_read_back_as_the_model_that_was_written() {
    let only = std::env::var("QUANTC_FAMILY").ok();
    let mut names = names();
    names.retain(|name| only.as_ref().is_none_or(|only| name.contains(only)));
    let wrong: Vec<String> = each(&names, read_back).into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

/// What is wrong with the file of a checkpoint.
fn read_back(name: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let room = checkpoint(name);
    spell(room.path());
    let outputs = tempfile::tempdir().unwrap();
    let output = outputs.path().join("model.gguf");
    let refused = REFUSED.iter().find(|(refused, _)| *refused == name);
    let report = match (write(room.path(), &output, "method = 'rtn'\nscheme = 'F32'"), refused) {
        (Ok(report), None) => report,
        (Err(error), Some((_, why))) if error.to_string().contains(why) => {
            assert_eq!(error.exit_code(), 2, "{name}: {error}");
            return wrong;
        }
        (Ok(_), Some(_)) => {
            wrong.push(format!("{name}: written, and should be refused"));
            return wrong;
        }
        (Err(error), _) => {
            wrong.push(format!("{name}: {error}"));
            return wrong;
        }
    };
    let read = Checkpoint::open(&output).unwrap();
    let unread = read.remarks();
    if !unread.is_empty() {
        wrong.push(format!("{name}: {unread:?}"));
    }
    if let Some(own) = read.entries().iter().find(|entry| entry.name.starts_with("blk.")) {
        wrong.push(format!("{name}: `{}` means nothing outside of the file", own.name));
    }
    if let Some(note) = report.notes.iter().find(|note| note.contains("a name that means nothing")) {
        wrong.push(format!("{name}: {note}"));
    }
    let (sequences, expected) = golden(&folder().join(name));
    let width = expected.len() / sequences.iter().map(Vec::len).sum::<usize>();
    let length = sequences[0].len();
    let valid = valid(&report).min(length);
    let sequences: Vec<Vec<u32>> = sequences.into_iter().map(|ids| ids[..valid].to_vec()).collect();
    let expected: Vec<f32> = match name.contains("dynamic") {
        false => expected.chunks_exact(length * width).flat_map(|logits| &logits[..valid * width]).copied().collect(),
        // How it is scaled depends on the length of the whole text.
        true => logits(room.path(), &sequences).unwrap(),
    };
    let approximate =
        report.notes.iter().any(|note| note.contains("approximates GELU") || note.contains("rounds the bounds"));
    match logits(&output, &sequences) {
        Err(error) => wrong.push(format!("{name}: {error}")),
        Ok(found) if found.len() != expected.len() => wrong.push(format!("{name}: {} logits", found.len())),
        Ok(found) => {
            let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let close = worst <= if approximate { 2e-2 } else { 2e-4 } * largest;
            if !close {
                wrong.push(format!("{name}: logits are off by {worst}, the largest is {largest}, {valid} tokens"));
            }
        }
    }
    wrong
}

/// How far logits are from transformers', as a share of their size; one token's other expert does not count for much.
fn distance(name: &str, file: &Path) -> f32 {
    let (sequences, expected) = golden(&folder().join(name));
    let found = logits(file, &sequences).unwrap();
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
    let off = squares(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
    (off / squares(&mut expected.iter().copied())).sqrt()
}

/// Fused, permuted, transposed and stacked linears are quantized as their inputs become known, each to its place.
#[test]
fn what_is_quantized_along_the_way_is_what_the_file_holds() {
    let names = [
        "deepseek_v3_plain",
        "deepseek_v4_usual",
        "falcon_h1_plain",
        "gemma3n_text_published",
        "gemma4_text_experts",
        "gemma4_text_plain",
        "glm4v_vision",
        "glm5_next_vision",
        "gpt2_plain",
        "gpt_neox_sequential",
        "gpt_oss_truncated",
        "granitemoe_plain",
        "granitemoehybrid_plain",
        "hy_v4_published",
        "lfm2_plain",
        "minimax_m3_vl_usual",
        "mixtral_plain",
        "nemotron_h_latent",
        "phi3_plain",
        "qwen2_moe_plain",
        "qwen3_5_text_plain",
        "qwen3_next_published",
        "qwen4_exp_text_published",
    ];
    each(&names, |name| {
        let (room, outputs) = (checkpoint(name), tempfile::tempdir().unwrap());
        spell(room.path());
        let text: String = (0..6000u32).map(|i| char::from(b'!' + (i * i % 9973 % 90) as u8)).collect();
        std::fs::write(room.path().join("text.txt"), text).unwrap();
        let common = format!("calibration = '{}'\nsamples = 16\nseq_len = 24", room.path().join("text.txt").display());
        for (scheme, most) in [("Q8_0", 0.05), ("Q5_1", 0.3)] {
            let imatrix = outputs.path().join(format!("{scheme}.imatrix"));
            let output = outputs.path().join(format!("{scheme}.gguf"));
            let settings =
                format!("{common}\nmethod = 'gptq'\nscheme = '{scheme}'\nsave_imatrix = '{}'", imatrix.display());
            let report = write(room.path(), &output, &settings).unwrap();
            assert!(report.linears.iter().any(|linear| linear.method == "gptq"), "{name}");
            let far = distance(name, &output);
            assert!(far <= most, "{name} {scheme}: logits are off by {far}");
            // What was collected serves another run, stacked experts each with their own.
            let settings = format!("method = 'rtn'\nscheme = '{scheme}'\nimatrix = '{}'", imatrix.display());
            let again = outputs.path().join(format!("{scheme}-again.gguf"));
            write(room.path(), &again, &settings).unwrap();
            let far = distance(name, &again);
            assert!(far <= most, "{name} {scheme}, importance from a file: logits are off by {far}");
        }
    });
}

/// llama.cpp's convolutions over tokens take weights of F32 alone, and abort over others.
#[test]
fn convolutions_are_f32_whatever_the_mix() {
    for name in [
        "bamba_plain",
        "falcon_h1_plain",
        "glm5_next_vision",
        "kimi_linear_published",
        "lfm2_moe_plain",
        "lfm2_plain",
        "nemotron_h_latent",
        "qwen3_5_text_plain",
        "qwen3_next_published",
        "qwen4_exp_text_published",
    ] {
        let (room, outputs) = (checkpoint(name), tempfile::tempdir().unwrap());
        spell(room.path());
        for scheme in ["F16", "BF16", "Q8_0", "Q4_K_M"] {
            let output = outputs.path().join(format!("{scheme}.gguf"));
            write(room.path(), &output, &format!("method = 'rtn'\nscheme = '{scheme}'")).unwrap();
            let file = GgufFile::open(&output).unwrap();
            let kernels: Vec<_> = file
                .tensors()
                .iter()
                .filter(|t| t.name.ends_with(".conv.weight") || t.name.contains("conv1d"))
                .collect();
            assert!(!kernels.is_empty(), "{name}");
            for tensor in kernels {
                assert_eq!(tensor.ty.name, "F32", "{name} {scheme}: {}", tensor.name);
            }
        }
    }
}

/// In transformers the language model of Qwen2-VL is no class by itself, and a model without a tower would get one at random.
#[test]
fn the_text_of_a_model_that_sees_becomes_one_of_text_alone() {
    let cases = [
        ("qwen2_vl_flat", "qwen2vl", "qwen2", "Qwen2ForCausalLM", None),
        ("qwen2_5_vl_vision", "qwen2vl", "qwen2", "Qwen2ForCausalLM", None),
        ("qwen3_vl_vision", "qwen3vl", "qwen3", "Qwen3ForCausalLM", Some(1)),
        ("qwen3_vl_moe_vision", "qwen3vlmoe", "qwen3_moe", "Qwen3MoeForCausalLM", Some(2)),
        ("glm4v_moe_vision", "glm4moe", "glm4_moe", "Glm4MoeForCausalLM", None),
    ];
    for (name, architecture, model_type, class, reaching) in cases {
        let (model, outputs) = (checkpoint(name), tempfile::tempdir().unwrap());
        spell(model.path());
        let file = outputs.path().join("model.gguf");
        write(model.path(), &file, "method = 'rtn'\nscheme = 'F32'").unwrap();
        let folder = outputs.path().join("folder");
        let notes = quantc::convert::convert(&file, &folder, None, UnknownTensors::Copy, false).unwrap();
        assert!(notes.iter().any(|note| note.contains(&format!("was written for {class}"))), "{name}: {notes:?}");
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!((&config["model_type"], &config["rope_scaling"]), (&json!(model_type), &Value::Null), "{name}");
        assert_eq!(config["architectures"], json!([class]), "{name}");
        let far = distance(name, &folder);
        assert!(far < 1e-4, "{name}: logits are off by {far}");
        let absent = families::absent(&Checkpoint::open(&file).unwrap(), &[]);
        assert_eq!(absent, None, "{name}: no class with a tower is written");
        // From one GGUF file to the next it stays what it was.
        let again = outputs.path().join("again.gguf");
        write(&file, &again, "method = 'rtn'\nscheme = 'F32'").unwrap();
        let again = Checkpoint::open(&again).unwrap();
        let again = again.gguf().unwrap();
        assert_eq!(again.string("general.architecture").unwrap(), Some(architecture), "{name}");
        assert_eq!(again.count(&format!("{architecture}.n_deepstack_layers")).unwrap(), reaching, "{name}");
    }
}

/// A folder names the class that runs it, and a note says what that class leaves out.
#[test]
fn what_no_class_loads_whole_is_told_of_a_folder() {
    for (name, said) in [
        ("glm5_next_vision", "leaves out its head"),
        ("minimax_m3_vl_usual", "finds neither feed-forward layers nor indexers"),
        ("qwen3_plain", ""),
    ] {
        let (model, outputs) = (checkpoint(name), tempfile::tempdir().unwrap());
        spell(model.path());
        let [file, folder] = ["model.gguf", "folder"].map(|path| outputs.path().join(path));
        write(model.path(), &file, "method = 'rtn'\nscheme = 'F32'").unwrap();
        let notes = quantc::convert::convert(&file, &folder, None, UnknownTensors::Copy, false).unwrap();
        let told: Vec<&String> = notes.iter().filter(|note| note.contains("which config.json names")).collect();
        assert_eq!(told.len(), usize::from(!said.is_empty()), "{name}: {notes:?}");
        assert!(told.iter().all(|note| note.contains(said)), "{name}: {told:?}");
    }
}

/// llama.cpp divides by the length of blocks that no layer has.
#[test]
fn deepseek_v4_without_one_kind_of_entries_is_refused() {
    let (model, outputs) = (checkpoint("deepseek_v4_usual"), tempfile::tempdir().unwrap());
    spell(model.path());
    for (ratios, none) in [(json!([0, 128, 0]), 4), (json!([0, 0, 4]), 128)] {
        crate::harness::Model::at(model.path()).config(|config| config["compress_ratios"] = ratios.clone());
        let output = outputs.path().join("model.gguf");
        let error = write(model.path(), &output, "method = 'rtn'\nscheme = 'F32'").unwrap_err();
        assert!(error.to_string().contains(&format!("no layer has entries for {none} tokens")), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}

/// By these transformers and vLLM find them.
#[test]
fn a_file_becomes_a_folder_with_the_names_that_deepseek_v4_is_published_under() {
    let name = "deepseek_v4_usual";
    let (model, outputs) = (checkpoint(name), tempfile::tempdir().unwrap());
    spell(model.path());
    let [file, folder] = ["model.gguf", "folder"].map(|path| outputs.path().join(path));
    write(model.path(), &file, "method = 'rtn'\nscheme = 'F32'").unwrap();
    quantc::convert::convert(&file, &folder, None, UnknownTensors::Copy, false).unwrap();
    let [mut written, mut published] = [folder.as_path(), model.path()]
        .map(|path| Checkpoint::open(path).unwrap().entries().iter().map(|e| e.name.clone()).collect::<Vec<_>>());
    written.sort();
    published.sort();
    assert_eq!(written, published);
    let far = distance(name, &folder);
    assert!(far < 1e-4, "logits are off by {far}");
}

/// llama.cpp calls the correction of Hunyuan 3's scores otherwise than that of its relatives.
#[test]
fn corrections_have_the_name_that_the_architecture_asks_for() {
    for (family, name) in [("hy_v3_plain", "exp_probs_b"), ("glm4_moe_plain", "exp_probs_b.bias")] {
        let (model, output) = (checkpoint(family), tempfile::tempdir().unwrap());
        let path = output.path().join("m.gguf");
        spell(model.path());
        write(model.path(), &path, "scheme = 'F16'\nmethod = 'rtn'").unwrap();
        let file = formats::GgufFile::open(&path).unwrap();
        let found: Vec<&str> = file
            .tensors()
            .iter()
            .filter_map(|tensor| tensor.name.split_once("exp_probs_b"))
            .map(|(_, end)| end)
            .collect();
        assert!(
            !found.is_empty() && found.iter().all(|end| format!("exp_probs_b{end}") == name),
            "{family}: {found:?}"
        );
    }
}

/// Where config.json does not say how rotary frequencies are divided, the usual division may be of more than there are.
#[test]
fn sections_of_rotary_frequencies_are_no_more_than_these() {
    let (model, output) = (checkpoint("qwen3_5_text_plain"), tempfile::tempdir().unwrap());
    let path = model.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["rope_parameters"].as_object_mut().unwrap().remove("mrope_section");
    std::fs::write(&path, config.to_string()).unwrap();
    spell(model.path());
    let path = output.path().join("m.gguf");
    write(model.path(), &path, "scheme = 'F16'\nmethod = 'rtn'").unwrap();
    let file = formats::GgufFile::open(&path).unwrap();
    let rotated = file.count("qwen35.rope.dimension_count").unwrap().unwrap() as i64;
    let sum: i64 = file.integers("qwen35.rope.dimension_sections").unwrap().unwrap().into_iter().sum();
    assert!(sum > 0 && 2 * sum <= rotated, "{sum} of {rotated}");
}

/// A linear that becomes several tensors is one linear in what is said of an imatrix.
#[test]
fn a_linear_without_importance_is_told_once() {
    let (model, outputs) = (checkpoint("deepseek_v3_plain"), tempfile::tempdir().unwrap());
    spell(model.path());
    let text: String = (0..6000u32).map(|i| char::from(b'!' + (i * i % 9973 % 90) as u8)).collect();
    std::fs::write(model.path().join("text.txt"), text).unwrap();
    let (all, some) = (outputs.path().join("all.imatrix"), outputs.path().join("some.imatrix"));
    let common = format!("calibration = '{}'\nsamples = 16\nseq_len = 24", model.path().join("text.txt").display());
    let collect = format!("{common}\nmethod = 'rtn'\nscheme = 'Q8_0'\nsave_imatrix = '{}'", all.display());
    write(model.path(), &outputs.path().join("first.gguf"), &collect).unwrap();
    let mut imatrix = formats::Imatrix::read(&all).unwrap();
    imatrix.entries.retain(|name, _| !name.contains(".attn_k_b") && !name.contains(".attn_v_b"));
    imatrix.write(&some).unwrap();
    let settings = format!("method = 'rtn'\nscheme = 'Q8_0'\nimatrix = '{}'", some.display());
    let report = write(model.path(), &outputs.path().join("second.gguf"), &settings).unwrap();
    let told: Vec<&String> = report.notes.iter().filter(|note| note.contains("as without importance")).collect();
    let words = "no entry for 2 of 64 linears (`model.layers.0.self_attn.kv_b_proj`, `model.layers.1.self_attn.kv_b_proj`), which";
    assert!(told.len() == 1 && told[0].contains(words), "{told:?}");
}

/// Classes of transformers have a pad token of their own, beyond the vocabulary of a small model; and what a tokenizer did that the file cannot say is told.
#[test]
fn a_folder_made_of_a_file_has_no_pad_token_that_the_file_has_not() {
    for name in ["hy_v4_published", "bailing_hybrid_published"] {
        let (model, outputs) = (checkpoint(name), tempfile::tempdir().unwrap());
        spell(model.path());
        let config = model.path().join("config.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        json.as_object_mut().unwrap().remove("pad_token_id");
        std::fs::write(&config, json.to_string()).unwrap();
        let (file, folder) = (outputs.path().join("model.gguf"), outputs.path().join("folder"));
        write(model.path(), &file, "method = 'rtn'\nscheme = 'F32'\npre = 'qwen2'").unwrap();
        let notes = quantc::convert::convert(&file, &folder, None, UnknownTensors::Copy, false).unwrap();
        assert!(notes.iter().any(|note| note.contains("compose characters first (NFC)")), "{name}: {notes:?}");
        let written: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        assert_eq!(written.get("pad_token_id"), Some(&Value::Null), "{name}: {written}");
    }
}
