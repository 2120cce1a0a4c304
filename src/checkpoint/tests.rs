use super::*;
use formats::codec::{Codec, QuantizedModule, codec};
use formats::{Scheme, ShardedWriter, TensorSpec};
use serde_json::json;
use std::collections::BTreeMap;

/// A plain tensor, with its values.
fn plain(name: &str, dtype: Dtype, shape: &[usize], values: &[f32]) -> (TensorSpec, Vec<u8>) {
    let mut bytes = Vec::new();
    formats::tensor::narrow(dtype, values, &mut bytes).unwrap();
    (TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }, bytes)
}

fn write(dir: &Path, config: &Value, tensors: &[(TensorSpec, Vec<u8>)]) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let writer = ShardedWriter::create(dir, specs, 600, &BTreeMap::new()).unwrap();
    tensors.iter().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
    writer.finish().unwrap();
}

fn weight(codec: &dyn Codec, scheme: Scheme) -> QuantizedWeight {
    let (rows, cols) = (32, 64);
    let encoding = codec.encoding(scheme).unwrap();
    let groups = scheme.groups(cols);
    let max = usize::from(scheme.max_code());
    QuantizedWeight {
        rows,
        cols,
        encoding,
        codes: (0..rows * cols).map(|i| (i * 7 % (max + 1)) as u8).collect(),
        scales: (0..rows * groups).map(|i| i as f32 / 64.0 - 0.25).collect(),
        zeros: (0..rows * groups)
            .map(|i| match (encoding.has_min(), scheme.symmetric) {
                (true, _) => 0,
                (false, true) => scheme.midpoint(),
                (false, false) => 1 + (i % max) as u8,
            })
            .collect(),
        mins: if encoding.has_min() { (0..rows * groups).map(|i| 0.5 - i as f32 / 32.0).collect() } else { Vec::new() },
        global: None,
        group_of: None,
    }
}

/// A directory as each codec's runtime would load it, opened again.
fn check_quantized(codec: &dyn Codec, scheme: Scheme) {
    let dir = tempfile::tempdir().unwrap();
    let weight = weight(codec, scheme);
    let module = "model.layers.0.mlp.up_proj";
    let parts = codec.encode(&weight, Dtype::F16).unwrap();
    let mut tensors: Vec<_> = parts
        .0
        .into_iter()
        .map(|(part, t)| (TensorSpec { name: format!("{module}.{part}"), dtype: t.dtype, shape: t.shape }, t.data))
        .collect();
    tensors.push(plain("model.norm.weight", Dtype::F16, &[2], &[1.0, -2.0]));
    let files = codec
        .config(&[QuantizedModule { name: module, encoding: weight.encoding, desc_act: false, loaded: &[] }], &[])
        .unwrap();
    let mut config = files.of(codec);
    config["model_type"] = "llama".into();
    config["torch_dtype"] = "bfloat16".into();
    write(dir.path(), &config, &tensors);

    let name = format!("{module}.weight");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config(), &json!({"model_type": "llama", "torch_dtype": "bfloat16"}));
    assert_eq!(checkpoint.dtype(), Dtype::BF16, "of config.json, as the linears are quantized");
    assert_eq!(checkpoint.entries().len(), 2);
    let entry = checkpoint.entry(&name).unwrap();
    assert_eq!(entry.shape, [32, 64]);
    let stored: usize = tensors[..tensors.len() - 1].iter().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(entry.stored_bytes, stored as u64);
    assert!(matches!(entry.dtype, StoredType::Quantized { codec: id, .. } if id == codec.id()));
    assert!(checkpoint.raw(&name).is_none());
    assert!(checkpoint.load(&name).unwrap() == weight.dequantize());
    checkpoint.release(&name);
    let read = checkpoint.quantized(&name).unwrap().unwrap();
    assert!(read.codes == weight.codes && read.scales == weight.scales);
    assert!(read.mins == weight.mins && read.zeros == weight.zeros);
    let mut rows = vec![0.0; 128];
    checkpoint.load_rows(&name, &[31, 0], &mut rows).unwrap();
    assert!(rows[..64] == weight.dequantize()[31 * 64..] && rows[64..] == weight.dequantize()[..64]);
    assert_eq!(checkpoint.quantized("model.norm.weight").unwrap(), None);
    assert_eq!(checkpoint.load("model.norm.weight").unwrap(), [1.0, -2.0]);
}

#[test]
fn every_codec_is_read_back() {
    for (id, bits, symmetric, group) in [
        ("compressed-tensors", 4, true, Some(32)),
        ("compressed-tensors", 3, false, None),
        ("gptq", 4, true, Some(32)),
        ("gptq", 8, false, None),
        ("awq", 4, false, Some(32)),
        ("mlx", 4, false, Some(32)),
        ("mlx", 8, false, Some(64)),
    ] {
        check_quantized(codec(id).unwrap(), Scheme { bits, group, symmetric });
    }
}

#[test]
fn plain_tensors_load_whole_by_rows_and_raw() {
    let dir = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..300).map(|i| i as f32).collect();
    let tensors = [
        plain("model.embed_tokens.weight", Dtype::F16, &[100, 3], &values),
        plain("model.norm.weight", Dtype::F32, &[3], &[0.1, 0.2, 0.3]),
    ];
    write(dir.path(), &json!({"torch_dtype": "bfloat16"}), &tensors);
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    let template = "additional_chat_templates/tool_use.jinja";
    for name in [
        template,
        "additional_chat_templates/notes",
        "tokenizer_config.json",
        "LICENSE.txt",
        "modeling_x.py",
        "README.md",
        "merges.txt",
        "optimizer.pt",
    ] {
        std::fs::write(dir.path().join(name), format!("{{\"name\": \"{name}\"}}")).unwrap();
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.dtype(), Dtype::F16, "of the tensors, whatever config.json says");
    assert_eq!(checkpoint.load("model.embed_tokens.weight").unwrap(), values);
    let mut rows = [0.0; 6];
    checkpoint.load_rows("model.embed_tokens.weight", &[99, 1], &mut rows).unwrap();
    assert_eq!(rows, [297.0, 298.0, 299.0, 3.0, 4.0, 5.0]);
    assert_eq!(checkpoint.raw("model.norm.weight").unwrap().data, &tensors[1].1[..]);
    assert_eq!(checkpoint.files().len(), 2);
    let beside = checkpoint.beside(&["config.json", "README.md"]).unwrap();
    let names: Vec<&str> = beside.files.iter().map(|(name, _)| name.to_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "LICENSE.txt",
            "README.original.md",
            "additional_chat_templates/notes",
            template,
            "merges.txt",
            "modeling_x.py",
            "tokenizer_config.json"
        ]
    );
    let message = checkpoint.load_rows("model.embed_tokens.weight", &[100], &mut [0.0; 3]).unwrap_err().to_string();
    assert_eq!(message, "tensor `model.embed_tokens.weight`: row 100 is beyond its 100 rows");
    let message = checkpoint.load("model.nothing").unwrap_err().to_string();
    assert!(message.ends_with("tensor `model.nothing`: the tensor is missing"), "{message}");
}

fn refused(prepare: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let error = match Checkpoint::open(dir.path()) {
        Ok(checkpoint) => checkpoint.load("w").unwrap_err(),
        Err(error) => error,
    };
    error.to_string().replace(&dir.path().display().to_string(), "DIR")
}

#[test]
fn what_cannot_be_read_is_told_in_a_sentence() {
    assert_eq!(refused(|_| ()), "DIR: config.json is missing");
    let config = |dir: &Path| std::fs::write(dir.join("config.json"), "{}").unwrap();
    assert_eq!(refused(config), "DIR: model.safetensors or model.safetensors.index.json is missing");
    assert_eq!(
        refused(|dir| {
            config(dir);
            std::fs::write(dir.join("pytorch_model.bin"), "").unwrap();
        }),
        "DIR: PyTorch pickles such as pytorch_model.bin are not read, as opening one can run what it contains; convert them \
         once: python3 -c 'from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
         M.from_pretrained(\"DIR\", dtype=\"auto\").save_pretrained(\"OUT\"); \
         T.from_pretrained(\"DIR\").save_pretrained(\"OUT\")'"
    );
    let put = |dir: &Path, name: &str| {
        std::fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        std::fs::write(dir.join(name), "").unwrap();
    };
    let zero = |dir: &Path, names: &[&str]| names.iter().for_each(|name| put(dir, name));
    let states = ["global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step10/mp_rank_00_model_states.pt"];
    let told = refused(|dir| {
        config(dir);
        zero(dir, &states);
        zero(dir, &["zero_to_fp32.py", "training_args.bin", "rng_state_0.pth"]);
        std::fs::write(dir.join("latest"), "global_step10").unwrap();
    });
    assert_eq!(
        told,
        "DIR: a checkpoint of DeepSpeed's training (global_step10), whose weights are divided among processes; make a model of it once: \
         python DIR/zero_to_fp32.py DIR OUT --safe_serialization, and put config.json and the tokenizer's files into OUT"
    );
    // Without a configuration, without the script, and from within.
    let told = refused(|dir| zero(dir, &states[..1]));
    assert!(
        told.contains("(global_step9)") && told.contains(": python -m deepspeed.utils.zero_to_fp32 DIR OUT "),
        "{told}"
    );
    let room = tempfile::tempdir().unwrap();
    zero(room.path(), &states);
    let told = Checkpoint::open(&room.path().join("global_step9")).unwrap_err().to_string();
    assert!(told.contains(&format!("zero_to_fp32 {} OUT", room.path().display())), "{told}");
    let told = refused(|dir| {
        config(dir);
        zero(dir, &["optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"]);
    });
    assert!(told.starts_with(
        "DIR: a checkpoint of training by torch.distributed.checkpoint, as FSDP saves it (pytorch_model_fsdp_0),"
    ));
    assert!(
        told.contains("once: accelerate merge-weights DIR/pytorch_model_fsdp_0 OUT, and put config.json"),
        "{told}"
    );
    assert!(told.contains("format_utils dcp_to_torch DIR/pytorch_model_fsdp_0 OUT.pt"), "{told}");
    let told = refused(|dir| zero(dir, &["__0_0.distcp", ".metadata"]));
    assert!(told.contains("accelerate merge-weights DIR OUT"), "{told}");
    let empty = |name: &str| plain(name, Dtype::BF16, &[0], &[]);
    let told = refused(|dir| {
        write(dir, &json!({}), &[plain("n", Dtype::BF16, &[1], &[1.0]), empty("w.weight"), empty("w.bias")])
    });
    assert!(told.starts_with("DIR/model.safetensors: 2 of 3 tensors, such as `w."), "{told}");
    assert!(
        told.contains("ZeRO-3") && told.contains("save the model again with stage3_gather_16bit_weights_on_model_save"),
        "{told}"
    );
    let told = refused(|dir| {
        write(dir, &json!({}), &[empty("w.weight")]);
        zero(dir, &states[..1]);
    });
    assert!(
        told.contains("beside them: python -m deepspeed.utils.zero_to_fp32 DIR OUT --safe_serialization"),
        "{told}"
    );
    // What a library keeps beside the weights may be empty.
    let told = refused(|dir| write(dir, &json!({}), &[empty("w._extra_state")]));
    assert!(!told.contains("ZeRO-3"), "{told}");
    let nan = plain("w", Dtype::BF16, &[3], &[0.0, 1.0, f32::NAN]);
    assert_eq!(
        refused(|dir| write(dir, &json!({}), &[nan])),
        "DIR/model.safetensors: tensor `w`: value NaN at index 2 is not a finite number: the weights are broken; fetch or save them again"
    );
    let inf = plain("w", Dtype::F32, &[2], &[f32::NEG_INFINITY, 1.0]);
    assert_eq!(
        refused(|dir| write(dir, &json!({}), &[inf])),
        "DIR/model.safetensors: tensor `w`: value -inf at index 0 is not a finite number: the weights are broken; fetch or save them again"
    );
    let codes = (TensorSpec { name: "w.qweight".into(), dtype: Dtype::I32, shape: vec![1, 1] }, vec![0; 4]);
    assert_eq!(
        refused(|dir| write(dir, &json!({}), &[codes])),
        "DIR/model.safetensors: tensor `w.qweight`: \
         the quantization_config that says how these codes are meant is missing"
    );
    let message = Checkpoint::open(Path::new("/nonexistent/model")).unwrap_err().to_string();
    assert!(message.starts_with("/nonexistent/model: cannot open: ") && !message.contains("hf://"), "{message}");
    for path in ["meta-llama/Llama-3.2-1B", "https://huggingface.co/meta-llama/Llama-3.2-1B/tree/main"] {
        let message = Checkpoint::open(Path::new(path)).unwrap_err().to_string();
        assert!(message.contains("say hf://meta-llama/Llama-3.2-1B, and it is downloaded"), "{message}");
    }
}
