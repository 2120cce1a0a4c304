//! Logits of every tiny checkpoint against those of transformers (`tests/fixtures/make_checkpoints.py`,
//! `tests/fixtures/make_families.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use formats::{Dtype, SafetensorsFile, ShardedWriter, TensorSpec};
use kernels::Cpu;
use kernels::cpu::Input;
use quantc::graph::{Graph, Linear};
use quantc::recipe::UnknownTensors;
use quantc::report::Activations;
use quantc::stray::Strays;
use quantc::{Checkpoint, families, forward};

/// The committed checkpoints.
pub fn checkpoints() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints");
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    found.sort();
    found
}

/// Token ids, and the logits that transformers gave for them.
pub fn golden(folder: &Path) -> (Vec<Vec<u32>>, Vec<f32>) {
    let file = SafetensorsFile::open(folder.join("golden.safetensors")).unwrap();
    let ids = file.get("input_ids").unwrap();
    let tokens = ids.shape[1];
    let ids: Vec<u32> = ids.data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();
    (ids.chunks(tokens).map(<[u32]>::to_vec).collect(), file.get("logits").unwrap().to_f32().unwrap())
}

/// The logits of a checkpoint, all of whose tensors must be accounted for.
pub fn logits(folder: &Path, sequences: &[Vec<u32>]) -> quantc::Result<Vec<f32>> {
    Ok(logits_and_drafts(folder, sequences)?.0)
}

/// The same, and those of each layer that predicts further tokens.
fn logits_and_drafts(folder: &Path, sequences: &[Vec<u32>]) -> quantc::Result<(Vec<f32>, Vec<Vec<f32>>)> {
    let cpu = Cpu::default();
    let source = Checkpoint::open(folder)?;
    let graph = families::graph_of(&source)?;
    quantc::plan::check_tensors(&graph, &source)?;
    for entry in source.entries() {
        if !graph.tensors().iter().any(|(name, _)| *name == entry.name) {
            Strays::new(&graph, &source, UnknownTensors::Refuse).fate(&entry.name)?;
        }
    }
    let hidden = forward::final_hidden(&cpu, &graph, &source, sequences, Activations::Exact, true, &|_| Ok(()))?;
    let of = |graph: &Graph, hidden: Vec<_>| -> quantc::Result<Vec<f32>> {
        let head = forward::LoadedHead::of(&cpu, graph, &source, Activations::Exact)?;
        let mut found = Vec::new();
        for chunk in hidden {
            found.extend(head.logits(&cpu, chunk, usize::MAX)?);
        }
        Ok(found)
    };
    let mut drafts = Vec::new();
    for (block, hidden) in graph.predictors().iter().zip(hidden.further) {
        let mut own = graph.without_blocks();
        if let Some(linear) = &block.further().unwrap().head {
            (own.head.linear, own.head.tied) = (linear.clone(), false);
        }
        drafts.push(of(&own, hidden)?);
    }
    Ok((of(&graph, hidden.normed)?, drafts))
}

/// What is wrong with the logits of the checkpoint in `folder`, if anything.
fn difference(folder: &Path, golden_folder: &Path) -> Option<String> {
    let (sequences, expected) = golden(golden_folder);
    let (found, drafts) = match logits_and_drafts(folder, &sequences) {
        Ok(found) => found,
        Err(error) => return Some(error.to_string()),
    };
    let file = SafetensorsFile::open(golden_folder.join("golden.safetensors")).unwrap();
    let further = |at: usize| file.get(&format!("further.{at}")).map(|view| view.to_f32().unwrap());
    let known = (0..).map_while(further).collect::<Vec<_>>();
    if known.len() > drafts.len() {
        return Some(format!("{} layers predict further tokens, not {}", drafts.len(), known.len()));
    }
    let drafted = drafts.iter().zip(&known).find_map(|(found, expected)| apart(found, expected));
    apart(&found, &expected).or(drafted.map(|why| format!("of further tokens: {why}")))
}

fn apart(found: &[f32], expected: &[f32]) -> Option<String> {
    if found.len() != expected.len() {
        return Some(format!("{} logits, not {}", found.len(), expected.len()));
    }
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Written so that a NaN is a difference.
    let close = worst <= 1e-4 * largest;
    (!close).then(|| format!("logits are off by {worst}, the largest is {largest}"))
}

/// Hands out weights as they are, and sums up the squares of what every linear reads.
struct Energies<'a> {
    plain: forward::Plain<'a, Cpu>,
    found: BTreeMap<String, Vec<f64>>,
}

impl forward::Supply<Cpu> for Energies<'_> {
    fn vector(&mut self, name: &str) -> quantc::Result<Vec<f32>> {
        self.plain.vector(name)
    }

    fn linears(
        &mut self,
        group: &[&Linear],
        inputs: &forward::Inputs<'_, Input>,
    ) -> quantc::Result<Vec<forward::Weight<kernels::cpu::Weight>>> {
        let mut sums = vec![0.0; group[0].cols];
        inputs(&mut |x| {
            for row in x.values().rows() {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            }
            Ok(())
        })?;
        self.found.extend(group.iter().map(|linear| (linear.module.clone(), sums.clone())));
        self.plain.linears(group, inputs)
    }

    fn router(&mut self, linear: &Linear) -> quantc::Result<Vec<forward::Weight<kernels::cpu::Weight>>> {
        self.plain.router(linear)
    }
}

/// What calibration sees of the inputs of linears is what they read in transformers.
#[test]
fn linears_read_what_they_read_in_transformers() {
    let mut compared = Vec::new();
    for name in [
        "qwen3_next_dense",
        "qwen3_5_text_plain",
        "bamba_plain",
        "granitemoehybrid_dense",
        "nemotron_h_plain",
        "nemotron_h_latent",
        "falcon_h1_plain",
        "lfm2_plain",
        "lfm2_moe_plain",
        "deepseek_v32_published",
        "kimi_linear_plain",
        "hy_v4_published",
        "glm5_next_vision",
        "qwen3_next_further",
        "qwen3_5_text_further",
        "deepseek_v3_shared",
        "deepseek_v3_two",
        "glm4_moe_further",
        "exaone_moe_further",
        "qwen2_mimo",
        "deepseek_v32_further",
        "minimax_m2_further",
        "mimo_v2_flash_further",
        "bailing_hybrid_further",
        "nemotron_h_further",
        "ernie4_5_moe_further",
        "hy_v4_further",
        "lfm3_plain",
        "afmoe_plain",
        "olmo_hybrid_plain",
        "longcat_flash_published",
        "gemma3n_text_plain",
        "gemma4_text_plain",
        "gemma4_text_experts",
        "step3p7_plain",
        "bailing_hybrid_published",
        "mistral_large4_published",
        "qwen4_exp_text_plain",
        "deepseek_v4_published",
    ] {
        let (room, folder) = (crate::families::checkpoint(name), crate::families::folder().join(name));
        let (cpu, source) = (Cpu::exact(), Checkpoint::open(room.path()).unwrap());
        let graph = families::graph_of(&source).unwrap();
        let mut chunks = forward::embed(&cpu, &graph, &source, &golden(&folder).0).unwrap();
        let mut supply = Energies { plain: forward::Plain::exact(&cpu, &source), found: BTreeMap::new() };
        for block in &graph.blocks {
            forward::enter(&cpu, block, &mut chunks).unwrap();
            forward::run_block(&cpu, block, &source, &mut supply, &mut chunks).unwrap();
        }
        let file = SafetensorsFile::open(folder.join("golden.safetensors")).unwrap();
        for (module, found) in supply.found {
            // As the class in transformers calls it.
            let own = module.replace("backbone.", "model.").replace(".block_sparse_moe.", ".mlp.");
            let own = own.replace(".linear_gate", ".gate_proj").replace(".share_expert.", ".mlp.shared_experts.");
            let inside = own.replacen("model.", "model.language_model.", 1);
            let within = own.replace(".attention.", ".self_attn.").replace(".dense", ".o_proj");
            let loaded = families::Loading::of(source.config()).names(&module).into_iter();
            let loaded = loaded.flat_map(|own| [format!("model.{own}"), own]);
            let names = [own, inside, within].into_iter().chain(loaded);
            let Some(expected) = names.map(|own| format!("energies.{own}")).find_map(|own| file.get(&own)) else {
                assert!(module.contains(".experts."), "{name}: {module}: no linear of its own in transformers");
                continue;
            };
            let expected = expected.to_f32().unwrap();
            let largest = expected.iter().fold(0.0f32, |m, x| m.max(*x));
            assert_eq!(found.len(), expected.len(), "{name}: {module}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (*found as f32 - expected).abs() <= 1e-4 * largest,
                    "{name}: {module}: {found}, not {expected}"
                );
            }
            compared.push(module);
        }
    }
    for part in [
        "linear_attn.in_proj_qkvz",
        "linear_attn.in_proj_z",
        "linear_attn.out_proj",
        "self_attn.o_proj",
        "mamba.in_proj",
        "mamba.out_proj",
        "shared_mlp.output_linear",
        "mixer.out_proj",
        "mixer.fc2_latent_proj",
        "conv.out_proj",
        "self_attn.kv_b_proj",
        "self_attn.q_b_proj",
        "self_attn.linear_gate",
        "layers.3.attention.wkv_b",
        "layers.3.attention.wo",
        "mtp.fc",
        "mtp.layers.0.mlp.down_proj",
        "layers.2.eh_proj",
        "layers.2.self_attn.kv_b_proj",
        "per_layer_input_gate",
        "per_layer_projection",
        "ple.key_proj",
        "ple.value_proj",
        "layers.1.attn.wq_b",
        "layers.1.attn.wkv",
        "layers.2.attn.wo_a",
        "layers.2.attn.wo_b",
    ] {
        assert!(compared.iter().any(|module| module.ends_with(part)), "{part}: {compared:?}");
    }
}

#[test]
fn logits_are_those_of_transformers() {
    let folders = checkpoints();
    assert!(folders.len() >= 15, "the fixtures are there");
    for folder in folders {
        assert_eq!(difference(&folder, &folder), None, "{}", folder.display());
    }
}

#[test]
fn every_family_has_the_logits_of_transformers() {
    let names = crate::families::names();
    let wrong = crate::families::each(&names, |name| {
        let room = crate::families::checkpoint(name);
        difference(room.path(), &crate::families::folder().join(name)).map(|why| format!("{name}: {why}"))
    });
    let wrong: Vec<String> = wrong.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), names.len(), wrong.join("\n"));
}

/// Some kinds of scaling turn by the length of a sequence: neighbours in a batch do not count.
#[test]
fn sequences_of_unequal_lengths_are_run_as_if_each_were_alone() {
    for name in [
        "llama_rope_dynamic",
        "phi3_longrope_long",
        "llama_rope_longrope",
        "qwen2_plain",
        "qwen4_exp_text_plain",
        "deepseek_v4_published",
    ] {
        let (whole, expected) = golden(&crate::families::folder().join(name));
        let room = crate::families::checkpoint(name);
        let short = whole[0][..9].to_vec();
        let alone = logits(room.path(), std::slice::from_ref(&short)).unwrap();
        let mut batch = whole.clone();
        batch.insert(0, short);
        let found = logits(room.path(), &batch).unwrap();
        let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
        assert_eq!(found.len(), alone.len() + expected.len());
        let (first, rest) = found.split_at(alone.len());
        assert!(apart(first, &alone) < 1e-5, "{name}: {}", apart(first, &alone));
        assert!(apart(rest, &expected) < 1e-4, "{name}: {}", apart(rest, &expected));
    }
}

/// As DeepSeek V4 is published: floats of 8 bits, and of 4 in experts, whose scales are exponents that stand beside the weights.
#[test]
fn floats_of_8_and_4_bits_are_read_under_the_names_that_deepseek_v4_is_published_with() {
    let room = crate::families::checkpoint("deepseek_v4_published");
    let file = SafetensorsFile::open(room.path().join("model.safetensors")).unwrap();
    let (whole, expert) = ("layers.0.attn.wq_a", "layers.0.ffn.experts.0.w1");
    let mut all: BTreeMap<String, (TensorSpec, Vec<u8>)> = BTreeMap::new();
    let mut put = |name: String, dtype: Dtype, shape: &[usize], data: Vec<u8>| {
        all.insert(name.clone(), (TensorSpec { name, dtype, shape: shape.to_vec() }, data));
    };
    for spec in file.tensors() {
        put(spec.name.clone(), spec.dtype, &spec.shape, file.get(&spec.name).unwrap().data.to_vec());
    }
    put(format!("{whole}.weight"), Dtype::F8_E4M3, &[32, 64], vec![0x38; 32 * 64]);
    put(format!("{whole}.scale"), Dtype::F8_E8M0, &[1, 1], vec![126]);
    // Nibbles 1 and 12, a half and minus two.
    put(format!("{expert}.weight"), Dtype::I8, &[32, 32], vec![0xC1; 32 * 32]);
    put(format!("{expert}.scale"), Dtype::F8_E8M0, &[32, 2], [127, 129].repeat(32));
    let other = tempfile::tempdir().unwrap();
    let config = std::fs::read(room.path().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["quantization_config"] =
        serde_json::json!({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]});
    config["expert_dtype"] = "fp4".into();
    std::fs::write(other.path().join("config.json"), config.to_string()).unwrap();
    let specs = all.values().map(|(spec, _)| spec.clone()).collect();
    let writer = ShardedWriter::create(other.path(), specs, u64::MAX, &BTreeMap::new()).unwrap();
    all.values().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
    writer.finish().unwrap();
    let source = Checkpoint::open(other.path()).unwrap();
    assert_eq!(source.load(&format!("{whole}.weight")).unwrap(), [0.5; 32 * 64]);
    let row: Vec<f32> = [[0.5, -2.0].repeat(16), [2.0, -8.0].repeat(16)].concat();
    assert_eq!(source.load(&format!("{expert}.weight")).unwrap(), row.repeat(32));
    // Every output says anew what its weights are.
    assert!(source.config().get("expert_dtype").is_none() && source.config().get("quantization_config").is_none());
    assert!(logits(other.path(), &[(3..40).collect()]).unwrap().iter().all(|x| x.is_finite()));
}

/// A table lies in as many parts as a checkpoint has, and a checkpoint may name the numbers by which its rows are found.
#[test]
fn a_table_may_be_whole_and_its_rows_are_found_by_the_numbers_that_a_checkpoint_names() {
    let name = "qwen4_exp_text_plain";
    let (room, folder) = (crate::families::checkpoint(name), crate::families::folder().join(name));
    let file = SafetensorsFile::open(room.path().join("model.safetensors")).unwrap();
    let written = |multipliers: [i64; 3]| {
        let mut all: BTreeMap<String, (TensorSpec, Vec<u8>)> = BTreeMap::new();
        for spec in file.tensors() {
            let joined = spec.name.split(".shard_").next().unwrap();
            let whole = if joined == spec.name { joined.to_owned() } else { format!("{joined}.weight") };
            let data = file.get(&spec.name).unwrap().data;
            match all.get_mut(&whole) {
                Some((joined, bytes)) => {
                    joined.shape[0] += spec.shape[0];
                    bytes.extend(data);
                }
                None => drop(all.insert(whole.clone(), (TensorSpec { name: whole, ..spec.clone() }, data.to_vec()))),
            }
        }
        let at = "model.layers.0.ple.ple_embedding";
        for (part, numbers) in [("layer_multipliers", &multipliers[..]), ("ngram_heads_vocab_sizes", &[23, 29, 31, 37])]
        {
            let name = format!("{at}.{part}");
            let spec = TensorSpec { name: name.clone(), shape: vec![numbers.len()], dtype: Dtype::I64 };
            all.insert(name, (spec, numbers.iter().flat_map(|n| n.to_le_bytes()).collect()));
        }
        let other = tempfile::tempdir().unwrap();
        std::fs::copy(room.path().join("config.json"), other.path().join("config.json")).unwrap();
        let specs = all.values().map(|(spec, _)| spec.clone()).collect();
        let writer = ShardedWriter::create(other.path(), specs, u64::MAX, &BTreeMap::new()).unwrap();
        all.values().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
        writer.finish().unwrap();
        other
    };
    let own = [64_343_153_921_368_269, 59_473_814_669_861_233, 55_314_113_489_879_299];
    assert_eq!(difference(written(own).path(), &folder), None);
    let why = difference(written([own[0], own[1], own[2] + 2]).path(), &folder).unwrap();
    assert!(why.contains("ple_embedding.layer_multipliers` holds other numbers"), "{why}");
}
