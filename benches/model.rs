//! Whole passes: a decoder block, layers with a state beside attention, GPTQ of a model of one block, and evaluation of
//! the built-in model.
//!
//! Block and GPTQ are of SmolLM2-135M's shape with random weights; elements are the floating-point operations that
//! cannot be avoided, as in README.md. Elements of the layers and of the evaluation are tokens.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use calibration::samples::{SampleSource, Samples, windows};
use criterion::{BatchSize, SamplingMode, Throughput, criterion_group, criterion_main};
use formats::tensor::narrow;
use formats::{Dtype, ShardedWriter, TensorSpec};
use kernels::{Cpu, Memory, cpu};
use quantc::forward::{Inputs, Plain, Supply, Weight, embed, ready, run_block};
use quantc::graph::{Graph, Linear};
use quantc::output::Staging;
use quantc::pipeline::quantize;
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use quantc::report::{Activations, Protocol};
use quantc::targets::target;
use quantc::text::{HELD_OUT, ModelText, load_text};
use quantc::verify::evaluate;
use quantc::{Checkpoint, demo, families};
use serde_json::{Value, json};
use tempfile::TempDir;

use common::{Criterion, measure, noise};

const SEQ_LEN: usize = 512;

/// A checkpoint of one random block. Its vocabulary is small, since an embedding is only copied.
struct Model {
    folder: TempDir,
    graph: Graph,
    source: Checkpoint,
}

impl Model {
    fn llama() -> Model {
        Model::new(json!({
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_key_value_heads": 3, "num_hidden_layers": 1, "vocab_size": 1024, "tie_word_embeddings": true,
            "rope_theta": 100_000.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"
        }))
    }

    fn new(config: Value) -> Model {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
        let graph = families::build(&config).expect("a known family");
        write_random(&graph, folder.path()).expect("written");
        let source = Checkpoint::open(folder.path()).expect("a checkpoint");
        Model { folder, graph, source }
    }

    fn sequences(&self, count: usize) -> Vec<Vec<u32>> {
        self.sequences_of(count, SEQ_LEN)
    }

    fn sequences_of(&self, count: usize, length: usize) -> Vec<Vec<u32>> {
        let size = self.graph.vocabulary as f32;
        let ids: Vec<u32> = noise(count * length, 7).iter().map(|x| (x.abs() * 200.0).min(size - 1.0) as u32).collect();
        ids.chunks_exact(length).map(<[u32]>::to_vec).collect()
    }

    /// Multiplications and additions of the block's linears for each token, without those that `counts` leaves out, and
    /// of the causal half of attention.
    fn forward_flops(&self, sequences: usize, counts: impl Fn(&Linear) -> bool) -> usize {
        let weights: usize = self.graph.linears().filter(|l| counts(l)).map(|l| l.rows * l.cols).sum();
        let attention = self.graph.blocks[0].attention().expect("a Llama has attention");
        let wide = attention.shape.heads * attention.shape.head_dim;
        sequences * (2 * weights * SEQ_LEN + 2 * wide * SEQ_LEN * (SEQ_LEN + 1))
    }
}

fn write_random(graph: &Graph, folder: &Path) -> formats::Result<()> {
    let tensors = graph.tensors();
    let specs =
        tensors.iter().map(|(name, shape)| TensorSpec { name: name.clone(), dtype: Dtype::BF16, shape: shape.clone() });
    let writer = ShardedWriter::create(folder, specs.collect(), u64::MAX, &BTreeMap::new())?;
    for (seed, (name, shape)) in tensors.iter().enumerate() {
        let mut values = noise(shape.iter().product(), seed as u64);
        match shape.len() {
            1 => values.fill(1.0),
            _ => values.iter_mut().for_each(|x| *x *= 0.04),
        }
        let mut bytes = Vec::new();
        narrow(Dtype::BF16, &values, &mut bytes)?;
        writer.write(name, &bytes)?;
    }
    writer.finish()
}

/// Weights that lie ready, in bf16 packed too, so that only the forward pass is measured (and a copy of them, a
/// hundredth of it). Activations are rounded inside, where the pass does it.
struct Ready(HashMap<String, cpu::Weight>);

impl Ready {
    fn new(model: &Model, cpu: &Cpu) -> Ready {
        let plain = Plain::exact(cpu, &model.source);
        let load = |linear: &Linear| {
            let weight = plain.load(linear).and_then(|weight| ready(cpu, linear, weight)).expect("in the checkpoint");
            (linear.module.clone(), weight.into_iter().next().expect("one part").matrix)
        };
        Ready(model.graph.linears().map(load).collect())
    }
}

impl Supply<Cpu> for Ready {
    fn vector(&mut self, _: &str) -> quantc::Result<Vec<f32>> {
        Ok(vec![1.0; 576])
    }

    fn router(&mut self, _: &Linear) -> quantc::Result<Vec<Weight<cpu::Weight>>> {
        unreachable!("a Llama has no router")
    }

    fn linears(&mut self, group: &[&Linear], _: &Inputs<'_, cpu::Input>) -> quantc::Result<Vec<Weight<cpu::Weight>>> {
        Ok(group.iter().map(|l| Weight { matrix: self.0[&l.module].clone(), bias: None, rounding: None }).collect())
    }
}

fn block(c: &mut Criterion) {
    let model = Model::llama();
    let sequences = model.sequences(8);
    let mut group = c.benchmark_group("block forward");
    group.sample_size(10).throughput(Throughput::Elements(model.forward_flops(8, |_| true) as u64));
    for (name, cpu) in [("8 x 512 tokens, f32", Cpu::exact()), ("8 x 512 tokens, relaxed", Cpu::default().relaxed())] {
        group.bench_function(name, |bencher| {
            let mut ready = Ready::new(&model, &cpu);
            let start = || embed(&cpu, &model.graph, &model.source, &sequences).expect("known tokens");
            bencher.iter_batched_ref(
                start,
                |chunks| {
                    run_block(&cpu, &model.graph.blocks[0], &model.source, &mut ready, chunks).expect("shapes fit")
                },
                BatchSize::LargeInput,
            );
        });
    }
}

/// What the kinds of layers take that mix tokens otherwise than by attention, each beside the attention of its own
/// family in a block of the same width, 1024, with the proportions of published models. The feed-forward layer is as
/// narrow as it can be, so that it hardly counts. Tokens are 4096 in any case: a layer that is linear in them takes as
/// long for 1 x 4096 as for 8 x 512.
fn layers(c: &mut Criterion) {
    let common = json!({
        "hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1024,
        "tie_word_embeddings": true, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"
    });
    let qwen = json!({
        "model_type": "qwen3_5_text", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 16,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4
    });
    let granite = json!({
        "model_type": "granitemoehybrid", "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 0,
        "shared_intermediate_size": 64, "mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 128,
        "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2
    });
    let kimi = json!({
        "model_type": "kimi_linear", "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": null,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts": 8,
        "linear_num_heads": 8, "linear_head_dim": 128, "linear_conv_kernel_dim": 4, "mlp_layer_types": ["dense"]
    });
    let lfm = json!({
        "model_type": "lfm2", "num_attention_heads": 16, "num_key_value_heads": 8, "conv_L_cache": 3,
        "block_ff_dim": 64, "block_auto_adjust_ff_dim": false
    });
    let deepseek = json!({
        "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 384, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
        "index_n_heads": 8, "index_head_dim": 128, "index_topk": 256
    });
    let of = |kind: &str| json!({ "layer_types": [kind] });
    let named = |name: &str| json!({ "model_type": name });
    let kinds = [
        ("Qwen3.5, attention", &qwen, of("full_attention")),
        ("Qwen3.5, Gated DeltaNet", &qwen, of("linear_attention")),
        ("Granite 4, attention", &granite, of("attention")),
        ("Granite 4, Mamba 2", &granite, of("mamba")),
        ("Kimi Linear, latent attention", &kimi, of("full_attention")),
        ("Kimi Linear, KDA", &kimi, of("linear_attention")),
        ("LFM2, attention", &lfm, of("full_attention")),
        ("LFM2, short convolution", &lfm, of("conv")),
        ("DeepSeek V3, latent attention", &deepseek, named("deepseek_v3")),
        ("DeepSeek V3.2, its indexer besides", &deepseek, named("deepseek_v32")),
    ];
    for (name, family, own) in kinds {
        let mut config = common.clone();
        for part in [family, &own] {
            let part = part.as_object().expect("written above").clone();
            config.as_object_mut().expect("written above").extend(part);
        }
        let model = Model::new(config);
        let cpu = Cpu::exact();
        let mut group = c.benchmark_group(format!("layer of {name}"));
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        for length in [512, 2048, 4096] {
            let sequences = model.sequences_of(4096 / length, length);
            let start = || embed(&cpu, &model.graph, &model.source, &sequences).expect("known tokens");
            group.throughput(Throughput::Elements(4096));
            group.bench_function(format!("{} x {length} tokens", sequences.len()), |bencher| {
                let mut plain = Plain::exact(&cpu, &model.source);
                bencher.iter_batched_ref(
                    start,
                    |chunks| {
                        run_block(&cpu, &model.graph.blocks[0], &model.source, &mut plain, chunks).expect("shapes fit")
                    },
                    BatchSize::LargeInput,
                );
            });
        }
    }
}

/// From the open checkpoint to the finished safetensors file: forward, Hessians, factors, scales, sweep, packing.
///
/// Counted is the forward pass, of which the last linear's output is not needed, and half of each Hessian.
fn gptq(c: &mut Criterion) {
    const SEQUENCES: usize = 16;
    let model = Model::llama();
    let mut request = Request::default();
    (request.bits, request.group_size) = (Some(4), Some(64));
    let recipe = Recipe::resolve(request).expect("valid");
    let samples = Samples {
        sequences: model.sequences(SEQUENCES),
        source: SampleSource {
            name: "noise".to_owned(),
            text_sha256: String::new(),
            tokens_sha256: String::new(),
            documents: 1,
            refused: 0,
            refusal: None,
            templated: 0,
            untemplated: 0,
            unwritten: 0,
            tokens: SEQUENCES * SEQ_LEN,
            sequences: SEQUENCES,
            requested: SEQUENCES,
            seq_len: SEQ_LEN,
            seed: 7,
        },
    };
    let forward = model.forward_flops(SEQUENCES, |linear| !linear.module.ends_with("down_proj"));
    let hessians = SEQUENCES * SEQ_LEN * (3 * 576 * 577 + 1536 * 1537);
    let mut group = c.benchmark_group("GPTQ of one block");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    measure(
        &mut group,
        "16 x 512 tokens",
        Throughput::Elements((forward + hessians) as u64),
        || (),
        |()| {
            let output = tempfile::tempdir_in(model.folder.path()).expect("a folder");
            let mut progress = Progress::new(true);
            let out = output.path().join("out");
            let target = target(&model.graph, &model.source, recipe.clone()).expect("fits");
            let staging = Staging::folder_for(&out, Some(model.folder.path()), false, None).expect("a free place");
            let targets = [(&*target, &staging)];
            quantize(&Cpu::default(), &model.graph, &model.source, &targets, 0, Some(&samples), &mut progress)
        },
    );
}

fn evaluation(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    demo::export(folder.path()).expect("written");
    let model = Checkpoint::open(folder.path()).expect("a checkpoint");
    let text = ModelText::open(&model).expect("a tokenizer");
    let ids = text.evaluation_ids(&load_text(HELD_OUT).expect("bundled")).expect("running text");
    let windows = windows(HELD_OUT, &ids, SEQ_LEN, Some(24), None).expect("long enough");
    let tokens = Throughput::Elements((windows.len() * SEQ_LEN) as u64);
    let mut group = c.benchmark_group("evaluate the built-in model");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for (name, reference) in [("alone", None), ("beside its reference", Some(&model))] {
        measure(
            &mut group,
            name,
            tokens.clone(),
            || (),
            |()| {
                let (cpu, mut progress) = (Cpu::default(), Progress::new(true));
                evaluate(
                    &cpu,
                    &model,
                    reference.map(Into::into),
                    &windows,
                    Protocol::Papers,
                    Activations::Exact,
                    &mut progress,
                )
            },
        );
    }
}

criterion_group!(name = benches; config = common::criterion(); targets = block, layers, gptq, evaluation);
criterion_main!(benches);
