//! Files for images that are not written: what is in their place, what is wrong with the tensors and the settings that they are made of.

use std::path::Path;

use kernels::Cpu;
use quantc::job::{Asked, Job};
use quantc::progress::Progress;
use quantc::recipe::Recipe;
use quantc::report::Report;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::wrappers::{RTN, model, quantize, set};

/// Fails unless the GGUF file is alone, for this reason.
fn alone(report: &Report, output: &Path, why: &str) {
    let beside = output.with_file_name(format!("mmproj-{}", output.file_name().unwrap().to_str().unwrap()));
    assert!(report.projector.is_none() && output.exists() && !beside.exists(), "{}: {why}", output.display());
    let told = report.notes.iter().find(|note| note.contains("no mmproj file is written"));
    assert!(told.is_some_and(|told| told.contains(why)), "{why}: {:#?}", report.notes);
}

/// Before anything is read that the work needs, as the calibration text that is not there.
#[test]
fn a_place_that_is_taken_is_told_before_the_work_and_by_planning() {
    let (room, outputs) = (model("qwen3_vl_vision"), tempfile::tempdir().unwrap());
    let (output, beside) = (outputs.path().join("m.gguf"), outputs.path().join("mmproj-m.gguf"));
    std::fs::write(&beside, "GGUF of somebody").unwrap();
    let job = |force: bool| {
        let toml = "format = 'gguf'\nscheme = 'Q4_0'\nmethod = 'gptq'\ncalibration = 'gone.txt'";
        let recipe = Recipe::resolve(toml::from_str(toml).unwrap()).unwrap();
        Job::one(room.path(), &output, recipe, None, force)
    };
    let asked = Asked { named: true, ..Asked::default() };
    let plan = |force: bool| job(force).plan(&Cpu::exact(), &asked, &Progress::new(true)).map(drop).unwrap_err();
    let run = job(false).run_one(&Cpu::exact(), &mut Progress::new(true)).unwrap_err();
    for error in [run, plan(false)] {
        assert!(error.to_string().contains("mmproj-m.gguf: exists already; --force replaces it"), "{error}");
        assert!(matches!(error, quantc::Error::Usage(_)), "{error}");
    }
    assert!(plan(true).to_string().contains("gone.txt"));
    std::fs::write(&beside, "a letter").unwrap();
    assert!(plan(true).to_string().contains("--force replaces a GGUF file, and this is none"));
    assert_eq!(std::fs::read_dir(outputs.path()).unwrap().count(), 1);
}

/// Gives a tensor another shape, and zeros for values.
fn reshape(room: &TempDir, name: &str, shape: &[usize]) {
    crate::harness::Model::at(room.path()).weights(|header, data| {
        let values: usize = shape.iter().product();
        let at = data.len();
        data.extend(std::iter::repeat_n(0, 2 * values));
        let entry = header.get_mut(name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(entry["dtype"], "BF16", "{name}");
        entry["shape"] = json!(shape);
        entry["data_offsets"] = json!([at, at + 2 * values]);
        // All bytes of a file belong to a tensor.
        let mut kept = Vec::new();
        for (_, tensor) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
            let [from, to] = [0, 1].map(|end| tensor["data_offsets"][end].as_u64().unwrap() as usize);
            tensor["data_offsets"] = json!([kept.len(), kept.len() + to - from]);
            kept.extend_from_slice(&data[from..to]);
        }
        *data = kept;
    });
}

#[test]
fn a_tower_tensor_of_a_wrong_shape_is_told_in_every_format() {
    let outputs = tempfile::tempdir().unwrap();
    let qwen = "model.visual.";
    let cases: &[(&str, &str, &[usize], &str)] = &[
        ("qwen3_vl_vision", "blocks.0.attn.qkv.weight", &[95, 32], "has the shape [95, 32] in place of [96, 32]"),
        ("qwen3_vl_vision", "blocks.0.attn.proj.bias", &[31], "has the shape [31] in place of [32]"),
        ("qwen3_vl_vision", "blocks.0.norm1.weight", &[33], "has the shape [33] in place of [32]"),
        ("qwen3_vl_vision", "blocks.0.mlp.linear_fc1.weight", &[31, 32], "[31, 32] in place of [32, 32]"),
        ("qwen3_vl_vision", "pos_embed.weight", &[13, 32], "has the shape [13, 32] in place of [16, 32]"),
        ("qwen3_vl_vision", "patch_embed.proj.weight", &[32, 1, 2, 14, 14], "in place of [32, 3, 2, 14, 14]"),
        ("qwen3_vl_vision", "merger.linear_fc2.weight", &[63, 128], "[63, 128] in place of [64, 128]"),
        ("qwen3_vl_vision", "deepstack_merger_list.0.norm.bias", &[127], "has 127 values, and"),
        ("qwen3_vl_moe_vision", "blocks.2.mlp.linear_fc2.bias", &[30], "has the shape [30] in place of [32]"),
        ("qwen2_5_vl_vision", "visual.blocks.0.attn.qkv.weight", &[95, 32], "[95, 32] in place of [96, 32]"),
        (
            "lfm2_vl_vision",
            "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
            &[32, 256],
            "[32, 768]",
        ),
        ("kimi_k25_vision", "vision_tower.patch_embed.pos_emb.weight", &[4, 3, 32], "in place of [4, 4, 32]"),
        ("internvl_vision", "model.vision_tower.embeddings.position_embeddings", &[1, 16, 32], "of [1, 17, 32]"),
        ("gemma4_sound", "model.vision_tower.patch_embedder.position_embedding_table", &[2, 15, 32], "of [2, 16, 32]"),
        ("gemma4_sound", "model.audio_tower.layers.0.norm_out.weight", &[63], "[63] in place of [64]"),
        ("qwen2_audio_sound", "audio_tower.conv2.bias", &[31], "has 31 values, and `audio_tower.conv2.weight` 32 rows"),
    ];
    for (at, (name, tensor, shape, told)) in cases.iter().enumerate() {
        let room = model(name);
        let whole = if name.starts_with("qwen3") { format!("{qwen}{tensor}") } else { (*tensor).to_owned() };
        reshape(&room, &whole, shape);
        let told_so = |notes: &[String]| {
            let ours: Vec<&String> = notes.iter().filter(|note| note.contains("download the weights again")).collect();
            let named = |note: &&String| note.contains(&format!("`{whole}`")) && note.contains(told);
            assert!(ours.len() == 1 && ours.iter().all(named), "{name}: {whole}: {ours:#?} of {notes:#?}");
            // One damaged tensor is no reason to suspect others.
            assert_eq!(ours[0].matches("has the shape").count().max(1), 1, "{}", ours[0]);
        };
        let output = outputs.path().join(format!("{at}.gguf"));
        let report = quantize(room.path(), &output, RTN).unwrap();
        alone(&report, &output, told);
        told_so(&report.notes);
        let plain = outputs.path().join(format!("{at}"));
        told_so(&quantc::convert::convert(room.path(), &plain, None, Default::default(), false).unwrap());
        told_so(&quantc::check::check(room.path()).unwrap().notes);
    }
    // Of a tower for which llama.cpp has no file.
    let room = model("llama4_vision");
    let source = quantc::Checkpoint::open(room.path()).unwrap();
    let entries = || quantc::weights::Weights::entries(&source);
    let bias = |name: &str| name.contains("vision_model") && name.ends_with(".bias");
    let bias = entries().iter().find(|entry| bias(&entry.name)).unwrap().name.clone();
    reshape(&room, &bias, &[7]);
    let notes = quantc::check::check(room.path()).unwrap().notes;
    assert!(notes.iter().any(|note| note.contains(&format!("`{bias}` has 7 values"))), "{notes:#?}");
}

#[test]
fn odd_settings_for_pictures_get_no_file() {
    let outputs = tempfile::tempdir().unwrap();
    let cases = [
        (r#""image_mean": [0, 0, 0], "image_std": [0, 0, 0]"#, "is [0.0, 0.0, 0.0], which no picture is divided by"),
        (r#""image_mean": [NaN, 0, 0], "image_std": [1, 1, 1]"#, "is [NaN, 0.0, 0.0], which no picture is shifted by"),
        (r#""image_mean": [0, 0, 0], "image_std": [1, 1, 1], "patch_size": 16"#, "patches of 16 pixels"),
    ];
    for (at, (settings, why)) in cases.into_iter().enumerate() {
        let room = model("qwen3_vl_vision");
        std::fs::write(room.path().join("preprocessor_config.json"), format!("{{{settings}}}")).unwrap();
        let output = outputs.path().join(format!("{at}.gguf"));
        alone(&quantize(room.path(), &output, RTN).unwrap(), &output, why);
    }
    for (at, (text, why)) in
        [(r#"{"image_mean": [0.5"#, "not valid JSON"), ("[]", "not a JSON object")].iter().enumerate()
    {
        let room = model("qwen3_vl_vision");
        std::fs::write(room.path().join("preprocessor_config.json"), text).unwrap();
        let told = |output: String, toml: &str| {
            let output = outputs.path().join(output);
            let error = quantize(room.path(), &output, toml).unwrap_err();
            assert!(matches!(error, quantc::Error::Failed(_)) && !output.exists(), "{error}");
            error.to_string()
        };
        let gguf = told(format!("cut{at}.gguf"), RTN);
        assert!(gguf.contains(why) && gguf.contains("fetch the file again"), "{gguf}");
        let folder = told(format!("cut{at}"), "scheme = 'W8A16'\nmethod = 'rtn'\ngroup_size = 32");
        assert_eq!(gguf, folder);
    }
}

#[test]
fn a_tower_of_which_config_json_says_nothing_is_told_of() {
    let (room, outputs) = (model("qwen3_5_vision"), tempfile::tempdir().unwrap());
    set(&room, "vision_config", Value::Null);
    let output = outputs.path().join("m.gguf");
    let report = quantize(room.path(), &output, RTN).unwrap();
    alone(&report, &output, "config.json says nothing of what sees or hears (vision_config, audio_config)");
    alone(&report, &output, "the weights hold `model.visual`");
}
