//! Models that attend to what comes after as well: they cannot be run, and everything that does not run them works.

use serde_json::Value;

use crate::harness::Room;

/// Reads a config.json as one of a model that looks both ways.
fn check(change: impl Fn(&mut Value), word: &str) {
    let room = Room::new();
    room.model().config(&change);
    let rtn = "quantize model -o packed --method rtn --verify-text none --group-size 32";
    for line in ["convert model -o copy", rtn] {
        let run = room.run(line.split(' '));
        run.succeeds();
        assert!(run.stderr().contains(word), "{line}: {}", run.stderr());
    }
    room.file("text.txt", "a text of some words");
    for line in
        ["eval model --text text.txt --context 4", "quantize model -o out --calibration text.txt --verify-text none"]
    {
        room.run(line.split(' ')).refuses(1, &[word, "--method rtn --verify-text none"]);
    }
}

#[test]
fn a_model_that_is_said_not_to_be_causal_is_quantized_without_being_run() {
    check(|config| config["is_causal"] = false.into(), "is_causal is false");
}

#[test]
fn a_gemma_that_attends_both_ways_is_quantized_without_being_run() {
    let gemma = |config: &mut Value| {
        config["model_type"] = "gemma".into();
        config["use_bidirectional_attention"] = true.into();
    };
    check(gemma, "use_bidirectional_attention is true");
}
