//! Checkpoints that MLX has packed, as inputs and as outputs.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use formats::codec::{Codec, Mlx, QuantizedModule};
use formats::{Dtype, Encoding, Float, QuantizedWeight, ShardedWriter, TensorSpec};
use kernels::ops::encoded;
use ndarray::Array2;
use quantc::Checkpoint;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::harness::{Room, TEXT};

const WHERE: &str = "model.layers.0.mlp.down_proj";

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// Packs the built-in model in `room` by the plain loop, in 4 bits, one linear in 8 and one not at all, as `mlx_lm.convert` does;
/// returns what the packed weights stand for.
fn pack(room: &Room) -> HashMap<String, Vec<f32>> {
    let model = room.model();
    let source = Checkpoint::open(&room.path("model")).unwrap();
    let (mut tensors, mut values, mut modules) = (Vec::new(), HashMap::new(), Vec::new());
    for entry in source.entries() {
        let (&[rows, cols], module) = (&entry.shape[..], entry.name.strip_suffix(".weight").unwrap()) else {
            let raw = source.raw(&entry.name).unwrap();
            let spec = TensorSpec { name: entry.name.clone(), dtype: raw.dtype, shape: entry.shape.clone() };
            tensors.push((spec, raw.data.to_vec()));
            continue;
        };
        let encoding = Encoding::mlx(if module == WHERE { 8 } else { 4 }, 64, Float::BF16);
        let weight = Array2::from_shape_vec((rows, cols), source.load(&entry.name).unwrap()).unwrap();
        let found = encoded::quantize(weight.view(), &encoding);
        values.insert(entry.name.clone(), found.dequantize().into_raw_vec_and_offset().0);
        let weight = QuantizedWeight {
            rows,
            cols,
            encoding,
            codes: found.codes,
            zeros: vec![0; found.scales.len()],
            scales: found.scales,
            mins: found.offsets,
            global: None,
            group_of: None,
        };
        for (part, tensor) in Mlx.encode(&weight, Dtype::BF16).unwrap().0 {
            let name = format!("{module}.{part}");
            tensors.push((TensorSpec { name, dtype: tensor.dtype, shape: tensor.shape }, tensor.data));
        }
        modules.push((module.to_owned(), encoding));
    }
    let of = |(name, encoding): &(String, Encoding)| (name.clone(), *encoding);
    let modules: Vec<(String, Encoding)> = modules.iter().map(of).collect();
    let listed: Vec<QuantizedModule<'_>> = modules
        .iter()
        .map(|(name, encoding)| QuantizedModule { name, encoding: *encoding, desc_act: false, loaded: &[] })
        .collect();
    let said = Mlx.config(&listed, &[]).unwrap().of(&Mlx);
    drop(source);
    std::fs::remove_file(model.path("model.safetensors")).unwrap();
    model.config(|config| config.as_object_mut().unwrap().extend(said.as_object().unwrap().clone()));
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let writer = ShardedWriter::create(room.path("model"), specs, u64::MAX, &BTreeMap::new()).unwrap();
    tensors.iter().for_each(|(spec, data)| writer.write(&spec.name, data).unwrap());
    writer.finish().unwrap();
    values
}

#[test]
fn what_mlx_packed_is_a_model_like_any_other() {
    let room = Room::new();
    let values = pack(&room);
    let said = config(&room.path("model"))["quantization"].clone();
    assert_eq!(said[WHERE], json!({"group_size": 64, "bits": 8, "mode": "affine"}));

    let inspected = room.run(["inspect", "model", "--json"]);
    inspected.succeeds();
    let inspected: Value = serde_json::from_str(&inspected.stdout()).unwrap();
    let kind = |name: &str| {
        let tensors = inspected["tensors"].as_array().unwrap();
        tensors.iter().find(|tensor| tensor["name"] == name).unwrap()["type"].clone()
    };
    assert_eq!(kind("model.embed_tokens.weight"), "mlx W4A16_ASYM group 64");
    assert_eq!(kind(&format!("{WHERE}.weight")), "mlx W8A16_ASYM group 64");
    assert_eq!(kind("model.norm.weight"), "BF16");

    room.run(["convert", "model", "-o", "plain", "--dtype", "f32"]).succeeds();
    let plain = Checkpoint::open(&room.path("plain")).unwrap();
    for (name, values) in &values {
        assert!(plain.load(name).unwrap() == *values, "{name}");
    }
    let plain = config(&room.path("plain"));
    assert!(plain.get("quantization").is_none() && plain.get("quantization_config").is_none());

    // Embedding and head are read a few rows at a time.
    let eval = |model: &str| {
        let run = room.run(["eval", model, "--text", TEXT, "--windows", "2", "--context", "64", "--json"]);
        run.succeeds();
        serde_json::from_str::<Value>(&run.stdout()).unwrap()["perplexity"].as_f64().unwrap()
    };
    let [packed, plain] = ["model", "plain"].map(eval);
    assert!((packed / plain - 1.0).abs() < 1e-6, "{packed}, {plain}");
}

#[test]
fn what_mlx_cannot_hold_is_refused_before_any_work() {
    let room = Room::new();
    room.model();
    let refuses = |flags: &[&str], words: &[&str]| {
        let base = ["quantize", "model", "-o", "out", "--format", "mlx"];
        room.run([&base, flags].concat()).refuses(2, words);
        assert_eq!(room.names(), ["model"]);
    };
    refuses(&["--bits", "3"], &["4 or 8 bits, not 3"]);
    refuses(&["--group-size", "256"], &["groups of 32, 64 or 128, not 256"]);
    refuses(&["--group-size", "-1"], &["no scale for a whole row"]);
    refuses(&["--symmetric", "true"], &["mlx stores an offset for each group", "leave it out"]);
    refuses(&["--scheme", "W8A8"], &["`W8A8` is one of compressed-tensors", "the format is mlx"]);
    refuses(&["--method", "rtn", "--ignore", "no_such"], &["`no_such` matches no linear"]);
}

#[test]
fn embedding_and_head_are_written_as_mlx_has_them() {
    let room = Room::new();
    room.model();
    let few = ["--samples", "4", "--seq-len", "128", "--calibration", TEXT, "--verify-windows", "2"];
    let quantize = |out: &str, flags: &[&str]| {
        room.run([&["quantize", "model", "-o", out, "--format", "mlx"], flags, &few].concat()).succeeds();
        let report = std::fs::read(room.path(out).join("report.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        (config(&room.path(out)), report, Checkpoint::open(&room.path(out)).unwrap())
    };
    let kinds = |checkpoint: &Checkpoint| -> Vec<String> {
        let entries = checkpoint.entries().iter().filter(|entry| entry.shape.len() == 2);
        let mut kinds: Vec<String> = entries.map(|entry| checkpoint.kind(entry)).collect();
        kinds.sort();
        kinds.dedup();
        kinds
    };
    let (said, report, written) = quantize("out", &[]);
    let expected = json!({"group_size": 64, "bits": 4, "mode": "affine"});
    assert_eq!([&said["quantization"], &said["quantization_config"]], [&expected, &expected]);
    assert_eq!(kinds(&written), ["mlx W4A16_ASYM group 64"]);
    assert_eq!(report["bpw"]["quantized"], 4.5, "embedding and linears alike");
    assert!(report["bpw"]["file"].as_f64().unwrap() < 4.6);
    let fate = |name: &str| {
        let tensors = report["tensors"].as_array().unwrap();
        tensors.iter().find(|tensor| tensor["name"] == name).unwrap()["fate"].clone()
    };
    assert_eq!([fate("model.embed_tokens.weight"), fate("model.norm.weight")], ["quantized", "copied"]);

    // The embedding serves as the head: what leaves out either leaves out both.
    for ignored in ["lm_head", "model.embed_tokens"] {
        let (said, report, written) = quantize(&format!("plain-{ignored}"), &["--ignore", ignored, "--method", "rtn"]);
        assert_eq!(said["quantization"]["model.embed_tokens"], false, "{ignored}");
        assert_eq!(kinds(&written), ["BF16", "mlx W4A16_ASYM group 64"], "{ignored}");
        assert_eq!(report["bpw"]["quantized"], 4.5);
    }

    room.file(
        "recipe.toml",
        "[[override]]\nmatch = 'model.embed_tokens'\nbits = 8\n[[override]]\nmatch = 'down_proj'\ngroup_size = 32",
    );
    let (said, _, written) = quantize("mixed", &["--recipe", "recipe.toml", "--method", "rtn"]);
    assert_eq!(said["quantization"]["model.embed_tokens"], json!({"group_size": 64, "bits": 8, "mode": "affine"}));
    assert_eq!(said["quantization"][WHERE], json!({"group_size": 32, "bits": 4, "mode": "affine"}));
    let expected = ["mlx W4A16_ASYM group 32", "mlx W4A16_ASYM group 64", "mlx W8A16_ASYM group 64"];
    assert_eq!(kinds(&written), expected);
}

/// Tensors that no rule names go over, and mlx-lm takes no file with them.
#[test]
fn tensors_that_mlx_lm_does_not_know_are_told() {
    let room = Room::new();
    let model = room.model();
    let flags = ["quantize", "model", "--format", "mlx", "--method", "rtn", "--verify-text", "none"];
    let plain = room.run(flags.into_iter().chain(["-o", "plain"]));
    plain.succeeds();
    assert!(!plain.stderr().contains("--unknown-tensors drop"), "{}", plain.stderr());
    model.weights(|header, data| {
        let begin = data.len();
        data.extend([0; 8]);
        let stray = serde_json::json!({"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]});
        header.insert("v_head.summary.bias".to_owned(), stray);
    });
    let told = room.run(flags.into_iter().chain(["-o", "out"]));
    told.succeeds();
    let note = "1 of these are copied (`v_head.summary.bias`): give --unknown-tensors drop";
    assert!(told.stderr().contains(note), "{}", told.stderr());
}

/// Most of its classes leave out layers that predict further tokens as they load a file.
#[test]
fn layers_for_further_tokens_that_mlx_lm_refuses_are_told() {
    let room = Room::new();
    let run = |name: &str, mtp: &str| {
        let folder = crate::families::checkpoint(name);
        let path = folder.path().to_str().unwrap();
        let flags =
            ["quantize", path, "--format", "mlx", "--method", "rtn", "--verify-text", "none", "--group-size", "32"];
        let run =
            room.run(flags.into_iter().chain(["--force", "-o", "out", "--mtp", mtp, "--unknown-tensors", "drop"]));
        run.succeeds();
        run.stderr().to_owned()
    };
    for (name, refused) in [
        ("bailing_hybrid_further", false),
        ("deepseek_v32_further", false),
        ("mimo_v2_flash_further", false),
        ("nemotron_h_further", false),
        ("minimax_m2_further", true),
        // It leaves out the layer with the number 61.
        ("deepseek_v3_further", true),
    ] {
        let told = run(name, "quantize");
        assert_eq!(told.contains("give --mtp drop if it is to load the output"), refused, "{name}: {told}");
        assert_eq!(told.contains("mlx-lm refuses files"), refused, "{name}: {told}");
        let told = run(name, "drop");
        assert!(!told.contains("mlx-lm refuses files"), "{name}: {told}");
    }
}

/// mlx-lm saves convolutions with their channels last, and folds factors into weights beside them.
#[test]
fn what_was_turned_for_mlx_is_refused_and_what_may_be_is_told() {
    for (module, shape, refused) in [
        ("layers.0.mixer.conv1d", vec![64, 4, 1], true),
        ("layers.0.mixer.conv1d", vec![64, 1, 4], false),
        ("visual.patch_embed.proj", vec![32, 14, 14, 3], true),
        ("visual.patch_embed.proj", vec![32, 3, 14, 14], false),
        ("visual.patch_embed.proj", vec![32, 2, 14, 14, 3], true),
        ("visual.patch_embed.proj", vec![32, 3, 2, 14, 14], false),
        ("layers.0.mlp.experts.up_proj", vec![4, 32, 64], true),
        ("layers.0.mlp.switch_mlp.up_proj", vec![4, 32, 64], true),
    ] {
        let room = Room::new();
        let folder = room.path("model");
        std::fs::create_dir(&folder).unwrap();
        let config =
            json!({"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"], "num_hidden_layers": 1});
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let turned = format!("model.{module}.weight");
        let tensors = [
            ("model.embed_tokens.weight".to_owned(), vec![96, 64]),
            ("model.layers.0.self_attn.q_proj.weight".to_owned(), vec![64, 64]),
            (turned.clone(), shape.clone()),
        ];
        let bytes = vec![0x3c; 32 * 2 * 14 * 14 * 3 * 2];
        let views = tensors.iter().map(|(name, shape)| {
            let size = shape.iter().product::<usize>() * 2;
            (name, TensorView::new(safetensors::Dtype::F16, shape.clone(), &bytes[..size]).unwrap())
        });
        let metadata = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
        let file = safetensors::serialize(views, Some(metadata)).unwrap();
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
        let line = "quantize model -o out --scheme W8A16 --group-size 32 --method rtn --verify-text none";
        let run = room.run(line.split_whitespace());
        if refused {
            run.refuses(1, &[&turned, &format!("{shape:?}"), "the model that it was made from"]);
            assert_eq!(room.names(), ["model"]);
        } else {
            run.succeeds();
            assert!(run.stderr().contains("the files were written for MLX"), "{}", run.stderr());
        }
    }
}
