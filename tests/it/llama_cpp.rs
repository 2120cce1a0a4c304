//! What llama.cpp does with a GGUF file beside what its keys say, and how it is done here too.

use formats::GgufFile;
use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use quantc::Checkpoint;
use serde_json::Value;

use crate::families::checkpoint;
use crate::gguf_families::{spell, write};
use crate::gguf_inputs::{Keys, Tensors, changed, floats, key, rewrite};
use crate::harness::Room;

const RTN: [&str; 6] = ["--scheme", "F32", "--method", "rtn", "--verify-text", "none"];

fn text(value: &str) -> MetadataValue {
    MetadataValue::String(value.to_owned())
}

/// The array under a key.
fn list<'k>(keys: &'k mut Keys, name: &str) -> (&'k mut MetadataValue, Vec<MetadataValue>) {
    let (_, value) = keys.iter_mut().find(|(key, _)| key == name).expect(name);
    let MetadataValue::Array(array) = &*value else { panic!("{name}") };
    let array = array.iter().cloned().collect();
    (value, array)
}

/// Spells tokens otherwise, by their id.
fn respell(keys: &mut Keys, tokens: &[(usize, &str)]) {
    let (value, mut all) = list(keys, "tokenizer.ggml.tokens");
    tokens.iter().for_each(|(id, token)| all[*id] = text(token));
    *value = metadata_array(all, GGUFValueType::String).unwrap();
}

/// The ids that `x.gguf`'s tokenizer makes of a text.
fn ids(room: &Room, sample: &str) -> Vec<u32> {
    let files = Checkpoint::open(&room.path("x.gguf")).unwrap().tokenizer().unwrap().unwrap();
    files.tokenizer.encode(sample, false).unwrap()
}

#[test]
fn a_name_brings_no_rule_about_that_the_tokens_do_not_keep() {
    let room = Room::new();
    let model = room.model();
    for (name, other, told) in [
        ("tiny-Phi-3", "tiny-Phi 3", "asks for a token"),
        ("modern-bert", "modern bert", ""),
        ("Phi 3 mini", "Phi 3 mini", ""),
    ] {
        model.config(|config| config["_name_or_path"] = name.into());
        let run = room.run(["quantize", "model", "-o", "m.gguf", "--force"].iter().chain(&RTN));
        run.succeeds();
        let file = GgufFile::open(room.path("m.gguf")).unwrap();
        let expected = if told.is_empty() { name } else { other };
        assert_eq!(file.string("general.name").unwrap(), Some(expected), "{name}");
        assert_eq!(run.stderr().contains("calls the model `tiny-Phi 3`"), !told.is_empty(), "{}", run.stderr());
        assert!(run.stderr().contains(told));
    }
    // From file to file no less.
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |keys, _| {
        keys.iter_mut().filter(|(key, _)| key == "general.name").for_each(|(_, value)| *value = text("a phi3"));
    });
    room.run(["quantize", "x.gguf", "-o", "y.gguf"].iter().chain(&RTN)).succeeds();
    assert_eq!(GgufFile::open(room.path("y.gguf")).unwrap().string("general.name").unwrap(), Some("a phi 3"));
}

#[test]
fn special_tokens_of_a_phi_3_take_the_spaces_behind_them_along() {
    let of = |name: &str| {
        let room = changed(|keys, _| {
            keys.retain(|(key, _)| key != "general.name");
            keys.push(key("general.name", text(name)));
            respell(keys, &[(190, "</s>"), (191, "<unk>"), (192, "<s>"), (193, "<|user|>")]);
            let (value, mut kinds) = list(keys, "tokenizer.ggml.token_type");
            kinds[190..194].fill(MetadataValue::I32(3));
            *value = metadata_array(kinds, GGUFValueType::I32).unwrap();
        });
        ["<|user|>", "<s>"].map(|token| ids(&room, &format!("{token}  a")).len())
    };
    let [apart, plain] = of("tiny");
    assert_eq!(apart, plain);
    let [along, plain] = of("Phi-3-tiny");
    assert!(along < apart && plain == apart, "{along} {plain} {apart}");
}

#[test]
fn tokens_are_special_by_their_texts() {
    let room = changed(|keys, _| {
        keys.retain(|(key, _)| key != "tokenizer.ggml.token_type");
        respell(keys, &[(190, "<|im_end|>"), (191, "<fim_prefix>"), (192, "<|im_start|>")]);
    });
    assert_eq!(ids(&room, "<|endoftext|><|im_end|><fim_prefix>"), [0, 190, 191]);
    assert!(ids(&room, "<|im_start|>").len() > 1);
    rewrite(&room.path("x.gguf"), &room.path("y.gguf"), |keys, _| {
        keys.push(key("tokenizer.ggml.fim_pre_token_id", MetadataValue::U32(191)));
    });
    std::fs::rename(room.path("y.gguf"), room.path("x.gguf")).unwrap();
    assert!(ids(&room, "<fim_prefix>").len() > 1, "the file names one");
}

#[test]
fn texts_are_split_as_they_are_spelt() {
    let room = changed(|keys, _| {
        keys.retain(|(key, _)| key != "tokenizer.ggml.pre");
        keys.push(key("tokenizer.ggml.pre", text("qwen2")));
    });
    assert_ne!(ids(&room, "e\u{301}"), ids(&room, "\u{e9}"));
    // As the original composes them, the rest of the work goes on with what it makes of them.
    room.run(["convert", "x.gguf", "-o", "out"]).succeeds();
    let path = room.path("out/tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["normalizer"], Value::Null);
    json["normalizer"] = serde_json::json!({"type": "NFC"});
    std::fs::write(&path, json.to_string()).unwrap();
    room.file("held-out.txt", "Cafe\u{301} and the\u{301}. ".repeat(120));
    let run = room.run(
        [
            &["quantize", "out", "-o", "y.gguf", "--scheme", "F32", "--method", "rtn", "--pre", "qwen2"][..],
            &["--verify-text", "held-out.txt", "--verify-windows", "1"],
        ]
        .concat(),
    );
    run.succeeds();
    assert!(run.stderr().contains("composes them first (NFC)"), "{}", run.stderr());
}

fn blocks(tensors: &Tensors) -> usize {
    tensors.iter().filter(|(tensor, _)| tensor.name.ends_with("attn_norm.weight")).count()
}

/// Puts the rows of tensors into one.
fn fuse(tensors: &mut Tensors, names: [&str; 3], whole: &str) {
    let parts = names.map(|name| {
        let at = tensors.iter().position(|(tensor, _)| tensor.name == name).expect(name);
        tensors.remove(at)
    });
    let mut fused = parts[0].clone();
    fused.0.name = whole.to_owned();
    fused.0.shape[0] = parts.iter().map(|(tensor, _)| tensor.shape[0]).sum();
    fused.1 = parts.iter().flat_map(|(_, data)| data.iter().copied()).collect();
    tensors.push(fused);
}

fn same_values(a: &Checkpoint, b: &Checkpoint) {
    let names = |checkpoint: &Checkpoint| {
        let mut names: Vec<String> = checkpoint.entries().iter().map(|entry| entry.name.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(names(a), names(b));
    for name in names(a) {
        assert!(a.load(&name).unwrap() == b.load(&name).unwrap(), "{name}");
    }
}

#[test]
fn queries_keys_and_values_may_be_one_tensor() {
    let biased = |tensors: &mut Tensors| {
        for block in 0..blocks(tensors) {
            for module in ["attn_q", "attn_k", "attn_v", "attn_output"] {
                let name = format!("blk.{block}.{module}");
                let rows = tensors.iter().find(|(t, _)| t.name == format!("{name}.weight")).unwrap().0.shape[0];
                let values: Vec<f32> = (0..rows).map(|i| (i + block) as f32 / rows as f32).collect();
                tensors.push(floats(&format!("{name}.bias"), &values));
            }
        }
    };
    for (biases, fused_biases) in [(false, false), (true, false), (true, true)] {
        let room = changed(|_, tensors| {
            if biases {
                biased(tensors);
            }
        });
        rewrite(&room.path("x.gguf"), &room.path("y.gguf"), |_, tensors| {
            for block in 0..blocks(tensors) {
                for kind in [Some("weight"), fused_biases.then_some("bias")].into_iter().flatten() {
                    let names = ["attn_q", "attn_k", "attn_v"].map(|name| format!("blk.{block}.{name}.{kind}"));
                    fuse(tensors, [&names[0], &names[1], &names[2]], &format!("blk.{block}.attn_qkv.{kind}"));
                }
            }
        });
        same_values(&Checkpoint::open(&room.path("x.gguf")).unwrap(), &Checkpoint::open(&room.path("y.gguf")).unwrap());
        room.run(["quantize", "y.gguf", "-o", "z.gguf", "--scheme", "F32", "--method", "rtn", "--verify-windows", "1"])
            .succeeds();
    }
}

#[test]
fn tensors_of_several_may_be_apart_and_gates_of_experts_with_what_they_gate() {
    let written = |family: &str| {
        let model = checkpoint(family);
        spell(model.path());
        let room = Room::new();
        write(model.path(), &room.path("x.gguf"), "method = 'rtn'\nscheme = 'F32'").unwrap();
        room
    };
    let opened = |room: &Room| ["x.gguf", "y.gguf"].map(|name| Checkpoint::open(&room.path(name)).unwrap());
    let room = written("phi3_plain");
    rewrite(&room.path("x.gguf"), &room.path("y.gguf"), |keys, tensors| {
        let count = |name: &str| match &keys.iter().find(|(key, _)| key == name).expect(name).1 {
            MetadataValue::U32(count) => *count as usize,
            other => panic!("{name}: {other:?}"),
        };
        let [heads, shared] = ["phi3.attention.head_count", "phi3.attention.head_count_kv"].map(count);
        let fused: Vec<_> = tensors.iter().filter(|(t, _)| t.name.contains("attn_qkv.weight")).cloned().collect();
        tensors.retain(|(tensor, _)| !tensor.name.contains("attn_qkv"));
        for (tensor, data) in fused {
            let each = data.len() / (heads + 2 * shared);
            let (mut first, rows) = (0, tensor.shape[0] / (heads + 2 * shared));
            for (name, count) in [("attn_q.", heads), ("attn_k.", shared), ("attn_v.", shared)] {
                let mut part = tensor.clone();
                (part.name, part.shape[0]) = (part.name.replace("attn_qkv.", name), count * rows);
                tensors.push((part, data[first * each..][..count * each].to_vec()));
                first += count;
            }
        }
    });
    let [whole, apart] = opened(&room);
    same_values(&whole, &apart);

    let room = written("mixtral_plain");
    rewrite(&room.path("x.gguf"), &room.path("y.gguf"), |_, tensors| {
        let gates: Vec<_> = tensors.iter().filter(|(t, _)| t.name.contains("ffn_gate_exps")).cloned().collect();
        for (mut gate, data) in gates {
            let name = gate.name.replace("gate", "up");
            let up = tensors.iter().find(|(t, _)| t.name == name).unwrap().1.clone();
            tensors.retain(|(tensor, _)| tensor.name != name && tensor.name != gate.name);
            gate.name = name.replace("up", "gate_up");
            gate.shape[1] *= 2;
            let each = data.len() / gate.shape[0];
            let turns = data.chunks(each).zip(up.chunks(each)).flat_map(|(gate, up)| [gate, up]).flatten();
            tensors.push((gate, turns.copied().collect()));
        }
    });
    let [apart, whole] = opened(&room);
    same_values(&apart, &whole);
}
