use std::path::Path;

use kernels::Cpu;

use super::*;
use crate::families;

fn open(name: &str) -> (Checkpoint, Graph) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let source = Checkpoint::open(&path).unwrap();
    let graph = families::graph_of(&source).unwrap();
    (source, graph)
}

const GPTQ: Work = Work { needs: Needs::Hessian, sweeps: true, refines: false, smooths: false };

/// A CPU that rounds to bfloat16 or not.
fn device(input: u64) -> Device {
    Device { input, ..Device::of(&Cpu::exact()) }
}

#[test]
fn what_is_counted_grows_with_what_is_asked() {
    let (source, graph) = open("src/demo/model");
    let bytes = |work, count, length| calibrating(&graph, device(2), work, Some(Tokens { count, length }));
    assert_eq!(calibrating(&graph, device(2), GPTQ, None), BASE + solving(&graph.blocks[0], device(2), GPTQ));
    // Each token has its row of the stream, and what two uses of the feed-forward layer need.
    let inner = graph.blocks[0].linears().map(|linear| linear.cols).max().unwrap();
    let token = (4 * graph.hidden + 4 + 2 * inner) as u64;
    assert_eq!(bytes(GPTQ, 200, 512) - bytes(GPTQ, 100, 512), 100 * 512 * token);
    // While a linear is refined its whole Hessian is there once more, in single precision; an MLP's factorization takes more than that.
    let refined = Work { refines: true, ..GPTQ };
    let mut attention = graph.blocks[0].clone();
    attention.steps.truncate(1);
    assert!(solving(&attention, device(2), refined) > solving(&attention, device(2), GPTQ));
    let awq = Work { smooths: true, ..GPTQ };
    assert!(bytes(awq, 200, 512) - bytes(awq, 100, 512) > 100 * 512 * token);
    assert!(calibrating(&graph, device(4), GPTQ, Some(Tokens::of(100, 512))) > bytes(GPTQ, 100, 512));
    // What would be too much to keep is computed twice.
    assert!(bytes(GPTQ, 4096, 512) < bytes(GPTQ, 1024, 512) * 4);
    let windows =
        |count, length| measuring(&graph, device(2), &[Some(&source), Some(&source)], Tokens { count, length });
    let packed = measuring(&graph, device(2), &[Some(&source), None], Tokens { count: 1, length: 512 });
    assert_eq!(packed - windows(1, 512), 4 * (graph.vocabulary * graph.hidden) as u64);
    assert!(windows(1, 512) < windows(8, 512) && windows(8, 512) < windows(8, 4096));
    for huge in [u64::MAX, 1 << 40] {
        assert!(bytes(awq, huge, huge) > 1 << 40 && windows(huge, huge) > 1 << 40);
    }
}

#[test]
fn a_run_that_cannot_fit_is_told_what_would() {
    let (source, graph) = open("src/demo/model");
    let run = |count, length, free| {
        let tokens = Some(Tokens { count, length });
        Expected::calibration(&graph, device(2), GPTQ, tokens, Some(Free::of(free))).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        })
    };
    let free = calibrating(&graph, device(2), GPTQ, Some(Tokens::of(300, 512)));
    assert!(run(300, 512, free).is_ok());
    // An estimate that is a little too high refuses nothing.
    assert!(run(310, 512, free).is_ok());
    let told = run(1000, 512, free).unwrap_err();
    assert!(told.starts_with("calibrating on 1000 sequences of 512 tokens takes about "), "{told}");
    assert!(told.ends_with(" can be had (a test): give --samples 300 or less"), "{told}");
    let told = run(u64::MAX, 512, free).unwrap_err();
    assert!(told.ends_with("give --samples 300 or less"), "{told}");
    let told = run(4, 1 << 20, free).unwrap_err();
    let length: u64 = told.split("--seq-len ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(told.contains("give --samples 1 --seq-len "), "{told}");
    assert!(calibrating(&graph, device(2), GPTQ, Some(Tokens { count: 1, length })) <= free);
    assert!(calibrating(&graph, device(2), GPTQ, Some(Tokens { count: 1, length: length + 1 })) > free);
    let told = run(4, 512, 1 << 20).unwrap_err();
    assert!(told.contains("are the model's own layers"), "{told}");
    let none = Expected::calibration(&graph, device(2), GPTQ, None, Some(Free::of(1 << 20))).unwrap_err().to_string();
    assert!(none.contains("while it is quantized"), "{none}");

    let measure = |length, free, flag| {
        let windows = Tokens { count: 8, length };
        nothing(Some(Free::of(free)))
            .and_measuring(&graph, device(2), &[Some(&source)], windows, flag)
            .map_err(|e| e.to_string())
    };
    let free = measuring(&graph, device(2), &[Some(&source)], Tokens::of(8, 20_000));
    assert!(measure(20_000, free, "--context").is_ok());
    let told = measure(1 << 30, free, "--context").unwrap_err();
    assert!(told.ends_with("give --context 20000 or less"), "{told}");
    assert!(measure(1 << 30, free, "--verify-text").unwrap_err().ends_with("give it more, or --verify-text none"));
    // Where nothing is known of what there is, nothing is refused.
    let unknown = Expected::calibration(&graph, device(2), GPTQ, Some(Tokens { count: u64::MAX, length: 9 }), None);
    assert!(unknown.unwrap().line(&["so much".to_owned()]).starts_with("so much takes up to about "));
}

#[test]
fn a_text_has_no_more_tokens_than_its_bytes_allow() {
    let asked = Tokens { count: u64::MAX, length: 512 };
    assert_eq!(at_least(asked, 64 * 5120), Tokens { count: 10, length: 512 });
    assert_eq!(at_least(Tokens { count: 3, length: u64::MAX }, 6400), Tokens { count: 1, length: 100 });
    assert_eq!(at_least(Tokens { count: 3, length: 512 }, 0).all(), 0);
}

/// Keys and values of block 1, 2 heads of 16 values, and of block 2, as many of 32, until the last block.
#[test]
fn keys_and_values_that_later_blocks_read_are_counted() {
    let (_, graph) = open("tests/fixtures/families/gemma4_text_plain");
    let left = [0, 0, 4 * 2 * 2 * 16, 4 * 2 * 2 * 48, 4 * 2 * 2 * 48, 4 * 2 * 2 * 48];
    assert_eq!(shared(&graph).collect::<Vec<_>>(), left);
    let mut alone = graph.clone();
    for block in &mut alone.blocks {
        let Layer::Attention(attention) = &mut block.steps[0].layer else { panic!("attention first") };
        attention.keys = if matches!(attention.keys, Keys::Left(_)) { Keys::Own } else { attention.keys };
    }
    let bytes = |graph: &Graph, count| calibrating(graph, device(2), GPTQ, Some(Tokens { count, length: 64 }));
    let more = |graph: &Graph| bytes(graph, 2000) - bytes(graph, 1000);
    assert_eq!(more(&graph) - more(&alone), 64_000 * left[3]);
}

/// Latents of block 0, with what positions turn, and of block 1, without.
#[test]
fn latents_that_later_blocks_read_are_counted() {
    let (_, graph) = open("tests/fixtures/families/mistral_large4_published");
    assert_eq!(shared(&graph).collect::<Vec<_>>(), [0, 4 * 48, 4 * 80, 4 * 80, 4 * 80]);
}

#[test]
fn mixtures_and_latent_attention_are_counted_too() {
    for name in ["deepseek_v3_plain", "mixtral_plain"] {
        let (_, graph) = open(&format!("tests/fixtures/families/{name}"));
        let bytes = |count| calibrating(&graph, device(2), GPTQ, Some(Tokens { count, length: 64 }));
        assert!(bytes(2000) - bytes(1000) >= 64_000 * (4 * graph.hidden as u64), "{name}");
    }
}
