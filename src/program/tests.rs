use std::path::Path;

use super::*;
use crate::checkpoint::Checkpoint;
use crate::families;
use crate::graph::{Graph, Layer};

fn graph(name: &str) -> Graph {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name);
    families::graph_of(&Checkpoint::open(&path).unwrap()).unwrap()
}

/// The slots of a block, in words: the producer's last name, and the readers'.
fn slots(name: &str, block: usize) -> Vec<String> {
    let graph = graph(name);
    let last = |name: &str| name.trim_end_matches(".weight").rsplit('.').next().unwrap().to_owned();
    let slots = Program::of(&graph.blocks[block]).unwrap().slots();
    let said = slots.iter().map(|slot| {
        let producer = match slot.producer {
            Producer::Norm(norm) => last(&norm.weights[0]),
            Producer::Linear { linear, part, heads } => {
                let heads = heads.map_or(String::new(), |(dim, repeat)| format!("({dim} times {repeat})"));
                format!("{}:{part}{heads}", last(&linear.module))
            }
        };
        let readers: Vec<String> = slot.readers.iter().map(|linear| last(&linear.module)).collect();
        format!("{producer} > {}", readers.join(" "))
    });
    said.collect()
}

#[test]
fn scales_go_wherever_what_is_read_may_be_scaled() {
    // Norms first, then what lies between linears.
    assert_eq!(
        slots("qwen2_plain", 0),
        [
            "input_layernorm > q_proj k_proj v_proj",
            "post_attention_layernorm > gate_proj up_proj",
            "v_proj:0(16 times 2) > o_proj",
            "up_proj:0 > down_proj",
        ]
    );
    // The last parts of fused linears.
    assert_eq!(slots("phi3_plain", 0)[2..], ["qkv_proj:2(16 times 2) > o_proj", "gate_up_proj:1 > down_proj"]);
    // What is activated may not be scaled.
    assert_eq!(slots("gpt2_plain", 0), ["ln_1 > c_attn", "ln_2 > c_fc", "c_attn:2 > c_proj"]);
    // One norm for both steps goes with the readers of both.
    assert_eq!(slots("phi_plain", 0)[0], "input_layernorm > q_proj k_proj v_proj fc1");
    // Behind a norm there is nothing to fold into; values that are limited do not follow.
    assert_eq!(slots("olmo2_plain", 0).len(), 2);
    assert!(!slots("olmo_clip", 0).iter().any(|slot| slot.contains("o_proj")));
}

/// A gate multiplies each channel by itself; in linear attention what is never quantized reads the norm, and one norm is for all heads.
#[test]
fn scales_pass_gates_and_stay_away_from_linear_attention() {
    assert_eq!(
        slots("qwen3_next_dense", 1),
        [
            "input_layernorm > q_proj k_proj v_proj",
            "post_attention_layernorm > gate_proj up_proj",
            "v_proj:0(32 times 2) > o_proj",
            "up_proj:0 > down_proj",
        ]
    );
    assert_eq!(
        slots("qwen3_5_text_plain", 0),
        ["post_attention_layernorm > gate_proj up_proj", "up_proj:0 > down_proj"]
    );
}

#[test]
fn scales_stay_away_from_routers_latents_and_limits() {
    // A router reads the norm of a mixture.
    let found = slots("mixtral_plain", 0);
    assert!(!found.iter().any(|slot| slot.starts_with("post_attention_layernorm")), "{found:?}");
    assert!(found.iter().filter(|slot| *slot == "w3:0 > w2").count() > 1, "{found:?}");
    let found = slots("deepseek_v3_plain", 0);
    assert!(!found.iter().any(|slot| slot.contains("_b") || slot.contains("o_proj")), "{found:?}");
    assert!(found[0].starts_with("input_layernorm > q_a_proj kv_a_proj"), "{found:?}");
    // Gates of gpt-oss limit what is gated.
    assert!(!slots("gpt_oss_plain", 0).iter().any(|slot| slot.contains("down")));
}

/// The kept values of a block with the most that is kept at a time, each value counted by its width.
fn kept(name: &str, block: usize, needs_output: bool) -> (Vec<&'static str>, u64) {
    let graph = graph(name);
    let program = Program::of(&graph.blocks[block]).unwrap();
    let lives = Lifetimes::of(&program, needs_output);
    let names = program.values.iter().zip(&lives.from).filter(|(_, from)| from.is_some()).map(|(value, _)| value.name);
    let mut names: Vec<&str> = names.collect();
    names.dedup();
    (names, lives.most(&program, |value| value.width as u64))
}

#[test]
fn what_two_uses_need_is_kept_between_them() {
    let block = &graph("qwen2_plain").blocks[0];
    let inner = block.linears().map(|linear| linear.cols).max().unwrap() as u64;
    // The output of attention is gone before the feed-forward layer's inner values are there.
    assert_eq!(kept("qwen2_plain", 0, true), (vec!["mix", "a"], inner));
    let program = Program::of(block).unwrap();
    let lives = Lifetimes::of(&program, true);
    let products: Vec<usize> = (0..program.operations.len())
        .filter(|at| matches!(program.operations[*at].kind, Kind::Linear { .. }))
        .collect();
    // q, k and v go before the output projection comes; gate and up stay until all is added.
    assert_eq!(lives.weights_until[products[0]], 2 * products[1]);
    assert_eq!(lives.weights_until[products[2]], 2 * program.operations.len() - 1);
    // Nobody needs the output of the last block, whose last linear still shows its input.
    let last = Lifetimes::of(&program, false);
    assert!(!last.needed[products[3]] && last.needed[products[2]] && last.needed[products[1]]);
    assert_eq!(last.weights_until[products[2]], 2 * products[3] + 1);
    // Of a parallel block the stream that it was given is kept, too.
    let (names, most) = kept("gpt_neox_parallel", 0, true);
    assert_eq!(names, ["h", "mix", "a"]);
    let hidden = graph("gpt_neox_parallel").hidden as u64;
    assert!(most > hidden);
    assert_eq!(kept("gpt_neox_parallel", 0, false).0, ["mix", "a"]);
}

#[test]
fn mixtures_keep_routes_and_a_sum_and_one_expert_at_a_time() {
    let graph = graph("mixtral_plain");
    let Some(Layer::Moe(moe)) = graph.blocks[0].steps.iter().map(|step| &step.layer).nth(1) else {
        panic!("a mixture")
    };
    let (names, most) = kept("mixtral_plain", 0, true);
    assert_eq!(names[..3], ["mix", "routes", "sum"]);
    assert_eq!(most as usize, moe.router.top_k + graph.hidden + moe.experts[0].inner());
    // Latents are there together.
    let (names, _) = kept("deepseek_v3_plain", 0, true);
    assert_eq!(names[..3], ["kr", "cq", "ckv"]);
}
