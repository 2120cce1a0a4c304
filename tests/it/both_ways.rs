//! Models that attend to what comes after as well: those that look both ways wherever they attend are run, and the others cannot be, and
//! everything that does not run them works. That what is run is what transformers computes is in `heads.rs`.

use serde_json::Value;

use crate::harness::Room;

#[test]
fn a_model_that_is_said_not_to_be_causal_sees_what_comes_after() {
    let room = Room::new();
    room.model();
    let perplexity = || {
        let run = room.run(["eval", "model", "--windows", "1", "--context", "64", "--json"]);
        run.succeeds();
        serde_json::from_str::<Value>(&run.stdout()).unwrap()["perplexity"].as_f64().unwrap()
    };
    let causal = perplexity();
    room.model().config(|config| config["is_causal"] = false.into());
    assert_ne!(perplexity(), causal);
    let run = room.run(["inspect", "model", "--program"]);
    run.succeeds();
    assert!(run.stdout().contains("both ways"), "{}", run.stdout());
    room.run(["quantize", "model", "-o", "out", "--samples", "2", "--seq-len", "32", "--verify-windows", "1"])
        .succeeds();
    // A window reaches to both sides, for which a GGUF file has no words.
    room.model().config(|config| {
        (config["model_type"], config["architectures"][0]) = ("mistral".into(), "MistralForCausalLM".into());
        (config["sliding_window"], config["is_causal"]) = (8.into(), false.into());
    });
    let gguf = "quantize model -o m.gguf --scheme F16 --method rtn --verify-text none";
    room.run(gguf.split(' ')).refuses(2, &["attention both ways within a window cannot be written"]);
}

#[test]
fn a_gemma_that_is_said_to_attend_both_ways_is_quantized_without_being_run() {
    let room = Room::new();
    let word = "use_bidirectional_attention is true";
    room.model().config(|config| {
        config["model_type"] = "gemma".into();
        config["use_bidirectional_attention"] = true.into();
    });
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
