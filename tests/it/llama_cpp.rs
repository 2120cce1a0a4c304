//! What llama.cpp does with a GGUF file beside what its keys say, and how it is done here too.

use formats::GgufFile;
use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use quantc::Checkpoint;
use serde_json::Value;

use crate::gguf_inputs::{Keys, changed, key, rewrite};
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
