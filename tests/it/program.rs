//! What `quantc inspect --program` says of the tiny checkpoints, and that programs leave nothing out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use quantc::graph::{Further, Layer};
use quantc::program::{Kind, Program};
use quantc::{Checkpoint, families};
use serde_json::Value;

use crate::families::{checkpoint, names};
use crate::harness::Room;

fn expected(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/programs").join(format!("{name}.txt"))
}

/// A dense model, one whose blocks add both steps to what they were given, a mixture, one with latents and a shared expert, one with
/// linear attention and gated attention, ones with several streams, and ones with state spaces and with short convolutions.
/// `UPDATE_PROGRAMS=1` writes what is said now.
#[test]
fn programs_are_shown_as_they_were() {
    let room = Room::new();
    for name in [
        "qwen2_plain",
        "gpt_neox_parallel",
        "mixtral_plain",
        "deepseek_v3_plain",
        "qwen3_next_mixed",
        "falcon_h1_plain",
        "hy_v4_published",
        "mistral_large4_published",
        "qwen4_exp_text_plain",
        "deepseek_v4_published",
        "nemotron_h_latent",
        "lfm2_plain",
    ] {
        let model = checkpoint(name);
        let run = room.run(["inspect", "--program", model.path().to_str().unwrap()]);
        run.succeeds();
        let text = run.stdout();
        if std::env::var_os("UPDATE_PROGRAMS").is_some() {
            std::fs::create_dir_all(expected(name).parent().unwrap()).unwrap();
            std::fs::write(expected(name), &text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(expected(name)).unwrap(), "{name}");
    }
}

#[test]
fn a_script_reads_the_program_too() {
    let (room, model) = (Room::new(), checkpoint("mixtral_plain"));
    let model = model.path().to_str().unwrap();
    let run = room.run(["inspect", model, "--program", "--json"]);
    run.succeeds();
    let told: Value = serde_json::from_str(&run.stdout()).unwrap();
    let kinds = told["program"].as_array().unwrap();
    let blocks: usize = kinds.iter().map(|kind| kind["blocks"].as_array().unwrap().len()).sum();
    let config: Value = serde_json::from_slice(&std::fs::read(Path::new(model).join("config.json")).unwrap()).unwrap();
    assert_eq!(blocks as u64, config["num_hidden_layers"].as_u64().unwrap());
    let first = &kinds[0]["operations"][1];
    assert_eq!(first["expression"], "linear(x)");
    assert_eq!(first["makes"][1]["name"], "k");
    assert_eq!(first["tensors"][1], "self_attn.k_proj.weight");
    assert!(told["tensors"].as_array().unwrap().len() > 10);
    let plain: Value = serde_json::from_str(&room.run(["inspect", model, "--json"]).stdout()).unwrap();
    assert!(plain.get("program").is_none(), "only where it was asked for");
}

#[test]
fn what_is_not_known_is_not_shown() {
    let room = Room::new();
    room.model().config(|config| {
        config["model_type"] = "unheard_of".into();
        config["architectures"] = serde_json::json!(["UnheardOfForCausalLM"]);
    });
    room.run(["inspect", "model"]).succeeds();
    room.run(["inspect", "model", "--program"]).refuses(1, &["model", "is not known", "leave out --program"]);
}

#[test]
fn programs_of_all_families_hold_every_tensor_of_their_blocks_and_every_linear_once() {
    let mut seen = 0;
    for name in names() {
        let folder = checkpoint(&name);
        let source = Checkpoint::open(folder.path()).unwrap();
        let graph = families::graph_of(&source).unwrap();
        for block in &graph.blocks {
            let program = Program::of(block).unwrap_or_else(|| panic!("{name}: {} has no program", block.name));
            let mut linears = Vec::new();
            let mut tensors = BTreeSet::new();
            let mut there = BTreeSet::from([Program::STREAM]);
            for operation in &program.operations {
                assert!(operation.reads.iter().all(|value| there.contains(value)), "{name}: {:?}", operation.kind);
                assert!(operation.makes.iter().all(|value| there.insert(*value)), "{name}: {:?}", operation.kind);
                tensors.extend(operation.tensors());
                if let Kind::Linear { linears: own, .. } = &operation.kind {
                    linears.extend(own.iter().map(|linear| &linear.module[..]));
                    // As many values as parts, as wide as their rows: each part of a value of its own, or all of each.
                    let parts: usize = own.iter().map(|linear| linear.split.parts()).sum();
                    let times = if operation.reads.len() == parts { 1 } else { operation.reads.len() };
                    let (parts, rows) = (times * parts, times * own.iter().map(|linear| linear.rows).sum::<usize>());
                    let widths = operation.makes.iter().map(|value| program.values[*value].width);
                    assert_eq!((operation.makes.len(), widths.sum::<usize>()), (parts, rows), "{name}: {own:?}");
                    for width in operation.reads.iter().map(|value| program.values[*value].width) {
                        assert!(own.iter().all(|linear| linear.cols == width), "{name}: {own:?} of {width} values");
                    }
                }
            }
            assert_eq!(there.len(), program.values.len());
            // What comes behind a layer that predicts further tokens is no part of its program.
            let behind = |further: &Further| {
                let ending = further.ending.iter().flat_map(|ending| ending.linears());
                further.head.iter().chain(ending).map(|linear| linear.module.clone()).collect::<Vec<_>>()
            };
            let behind: Vec<String> = block.further().into_iter().flat_map(behind).collect();
            let routers = block.fixed().filter(|linear| !behind.contains(&linear.module));
            let mut expected: Vec<&str> = block.linears().chain(routers).map(|linear| &linear.module[..]).collect();
            seen += expected.len();
            linears.sort_unstable();
            // What decides about several streams does so before the block and behind it.
            let fixed: BTreeSet<&str> = block.fixed().map(|linear| &linear.module[..]).collect();
            linears.dedup_by(|a, b| a == b && fixed.contains(a));
            expected.sort_unstable();
            assert_eq!(linears, expected, "{name}: {}", block.name);
            // The numbers of an activation are in the operation itself.
            let numbers = block.steps.iter().filter_map(|step| match &step.layer {
                Layer::Mlp(mlp) => mlp.learned.as_deref(),
                _ => None,
            });
            tensors.extend(numbers.flatten().map(|(name, _)| name.clone()));
            // All that the graph says of one block.
            let one = quantc::graph::Graph { blocks: vec![block.clone()], ..graph.clone() };
            let none = quantc::graph::Graph { blocks: Vec::new(), ..graph.clone() };
            let of = |graph: &quantc::graph::Graph| graph.tensors().into_iter().map(|(name, _)| name).collect();
            let (one, none): (BTreeSet<String>, BTreeSet<String>) = (of(&one), of(&none));
            let further = block.further().into_iter();
            let outside = |further: &Further| {
                let norms = further.before.iter().chain([&further.norm]).flat_map(|norm| norm.weights.clone());
                let streams = || further.collapse.iter().chain(&further.ending);
                let hyper = streams().filter_map(|collapse| collapse.hyper());
                let hyper = hyper.flat_map(|hyper| [&hyper.projection, &hyper.base, &hyper.scale].map(String::clone));
                let linears = further.head.iter().chain(streams().flat_map(|collapse| collapse.linears()));
                norms.chain(linears.map(|linear| linear.weight())).chain(hyper).collect::<Vec<_>>()
            };
            let outside: BTreeSet<String> = further.flat_map(outside).chain(none).collect();
            assert_eq!(&tensors - &outside, &one - &outside, "{name}: {}", block.name);
        }
    }
    assert!(seen > 1000, "only {seen} linears");
}
