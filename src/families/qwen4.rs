//! Qwen 4: the layers of Qwen3.5 with experts, in several streams that are read through a gate for each value; attention to whole blocks of tokens
//! that an indexer chooses; and rows of tables for tokens in a row, which some layers add to all streams.

use std::collections::HashMap;

use kernels::{Activation, IndexShape, RopeLayout};

use super::build::{Base, activation, block, by_type};
use super::qwen_next::{Kind, delta, feed_forward, further_layers};
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{
    Choice, Collapse, Connection, Convolution, Gated, GramLayer, Grams, Graph, Indexer, Layer, Linear, Rope, Split,
    Step,
};
use crate::json::integer;
use crate::weights::Weights;

/// Qwen 4 as it was first shown, its language model.
pub const QWEN4: Family = Family { id: "qwen4_exp", model_types: &["qwen4_exp_text"], build };

/// What the table of a layer is called, before its parts.
const TABLE: &str = "ple.ple_embedding.ngram_embedding";

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm_offset = 1.0;
    let act = activation(config, Activation::Silu)?;
    let gate = gate(config, act)?;
    let bias = config.flag("attention_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let every = config.optional_count("full_attention_interval")?.unwrap_or(4);
    let kinds: [&[&str]; 2] = [&["indexed_attention", "full_attention"], &["linear_attention"]];
    let recurrent = by_type(config, "layer_types", kinds, base.layers, |layer| !(layer + 1).is_multiple_of(every))?;
    let feed_forward = feed_forward(config, &base, Kind::Four, act)?;
    let streams = config.optional_count("hc_count")?.unwrap_or(4);
    let rank = config.optional_count("hc_lowrank")?.unwrap_or(320);
    if !(2..=16).contains(&streams) {
        return Err(Error::failed(format!("config.json: hc_count must be 2 to 16, found {streams}")));
    }
    let mut tables = tables(config, &base, streams)?;
    if let Some(layer) = tables.keys().find(|layer| recurrent.get(**layer) != Some(&true)) {
        return Err(Error::failed(format!(
            "config.json: ple_layer_ids names layer {}, and only layers of linear attention have tables for tokens in a row; the first is 1",
            layer + 1
        )));
    }
    let width = streams * base.hidden;
    let gated = |module: &str, writes: bool| {
        let linear = |name: &str, rows, cols| Linear::plain(format!("{module}.{name}"), rows, cols, false);
        Gated {
            streams,
            mix: [linear("input_mix_weight_down", rank, width), linear("input_mix_weight_up", width, rank)],
            inject: writes.then(|| linear("block_inject_weight", streams, width)),
        }
    };
    let step = |module: String, layer: Layer| {
        let hyper = Some(Box::new(Connection::Gated(Box::new(gated(&module, true)))));
        Step { pre: Some(base.norm_of(&format!("{module}.hc_norm"), width)), hyper, ..plain(layer) }
    };
    let layer = |at: String, number: usize, recurrent: bool| {
        let mixer = match recurrent {
            true => {
                let delta = delta(config, &base, &format!("{at}.linear_attn"), Kind::Four, act)?;
                Layer::Delta(Box::new(crate::graph::DeltaNet { activation: gate, ..delta }))
            }
            false => {
                let module = format!("{at}.self_attn");
                let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
                base.gate_heads(&mut attention);
                attention.norms = Some(base.head_norms(&module));
                let indexer = indexer(config, &base, &rope, &format!("{module}.indexer"))?;
                attention.choice = Some(Choice::Own(Box::new(indexer), false));
                Layer::Attention(attention)
            }
        };
        let steps = vec![
            step(format!("{at}.attn_hyper_connection"), mixer),
            step(format!("{at}.mlp_hyper_connection"), feed_forward(&at, number)),
        ];
        Ok::<_, Error>(block(at, steps))
    };
    let blocks = base.each(|number| {
        let mut block = layer(base.at(number), number, recurrent[number])?;
        let table = tables.remove(&number).map(|table| plain(Layer::Grams(Box::new(table))));
        block.steps.splice(..0, table);
        Ok(block)
    })?;
    let mut graph = base.graph(config, "qwen4_exp", blocks)?;
    let module = "model.hyper_connection_mixer";
    graph.final_norm = base.norm_of(&format!("{module}.hc_norm"), width);
    graph.collapse = Some(Collapse::Gated(Box::new(gated(module, false))));
    for block in graph.blocks.iter().filter(|block| block.steps.len() > 2) {
        let said = format!("{}.ple.ple_embedding", block.name);
        let what = "what rows of a table are found by, which follows from config.json";
        graph.aside.extend(["layer_multipliers", "ngram_heads_"].map(|name| (format!("{said}.{name}"), what)));
    }
    let further = further_layers(config)?;
    if further > 0 {
        let ending = Collapse::Gated(Box::new(gated("mtp.hyper_connection_mixer", false)));
        let block = layer("mtp.layers.0".to_owned(), base.layers, false)?;
        further::append_with(&mut graph, &base, &further::QWEN4, block, Some(ending));
    }
    further::aside_unless_one(&mut graph, "mtp.", further);
    Ok(graph)
}

/// `h ← h + layer(h)`.
fn plain(layer: Layer) -> Step {
    Step { pre: None, layer, post: None, scale: 1.0, given: 1.0, unseen: 0, hyper: None }
}

/// What is done to the gate of linear attention.
fn gate(config: &Config<'_>, act: Activation) -> Result<Activation> {
    let named = match config.get("output_gate_type") {
        None => (act == Activation::Silu).then_some(act),
        Some(_) => match config.text("output_gate_type")? {
            "silu" => Some(Activation::Silu),
            "sigmoid" => Some(Activation::Sigmoid),
            _ => None,
        },
    };
    named.ok_or_else(|| {
        Error::failed("config.json: output_gate_type, or hidden_act where there is none, must be silu or sigmoid")
    })
}

/// What chooses blocks of tokens, under `module`.
fn indexer(config: &Config<'_>, base: &Base, rope: &Rope, module: &str) -> Result<Indexer> {
    let [heads, keys, head_dim, budget, ratio] =
        ["n_heads", "kv_heads", "head_dim", "budget", "compress_ratio"].map(|key| format!("indexer_{key}"));
    let (heads, keys, head_dim) = (config.count(&heads)?, config.count(&keys)?, config.count(&head_dim)?);
    let (budget, ratio) = (config.count(&budget)?, config.count(&ratio)?);
    let rotated = 2 * rope.inverse_frequencies.len();
    let wrong = match () {
        () if keys != 1 => format!("indexer_kv_heads must be 1, found {keys}"),
        () if !budget.is_multiple_of(ratio) => {
            format!("indexer_budget {budget} must be a multiple of indexer_compress_ratio, found {ratio}")
        }
        () if rotated > head_dim => {
            format!("indexer_head_dim must be {rotated} at least, as many values as positions turn, found {head_dim}")
        }
        () => String::new(),
    };
    if !wrong.is_empty() {
        return Err(Error::failed(format!("config.json: {wrong}")));
    }
    let norm = |name: &str| base.norm_of(&format!("{module}.{name}"), head_dim);
    Ok(Indexer {
        input_norm: None,
        temperature: None,
        q: Linear {
            split: Split::of(&[heads * head_dim, head_dim]),
            ..Linear::plain(format!("{module}.index_qk_proj"), (heads + 1) * head_dim, base.hidden, false)
        },
        latent: false,
        k: None,
        q_norm: Some(norm("q_layernorm")),
        k_norm: norm("k_layernorm"),
        weights: None,
        pool: None,
        mean: true,
        shape: IndexShape {
            heads,
            head_dim,
            scale: (head_dim as f32).powf(-0.5),
            count: budget / ratio + 1,
            block: ratio,
            local: 0,
            apart: false,
            pooled: true,
            entries: false,
        },
        layout: RopeLayout { head_dim, first: 0, interleaved: false },
    })
}

/// The most heads of all tables that are made: each needs a prime number of its own.
const HEADS: usize = 4096;

/// The most parts of a table that are named.
const PARTS: usize = 1 << 16;

/// What each layer of `ple_layer_ids` adds to `streams` streams, by its number.
///
/// Fails for sizes that do not divide, and for more rows than ids can tell apart.
fn tables(config: &Config<'_>, base: &Base, streams: usize) -> Result<HashMap<usize, GramLayer>> {
    let mut layers: Vec<usize> = config.layer_list("ple_layer_ids")?.unwrap_or_default();
    layers.sort_unstable();
    layers.dedup();
    if layers.is_empty() {
        return Ok(HashMap::new());
    }
    let failed = |why: String| Error::failed(format!("config.json: {why}"));
    if layers[0] == 0 || layers[layers.len() - 1] > base.layers {
        return Err(failed(format!("ple_layer_ids must be numbers of layers from 1 to {}", base.layers)));
    }
    let order = config.optional_count("ngram_size")?.unwrap_or(3);
    let each = config.optional_count("heads_per_ngram")?.unwrap_or(8);
    let width = config.optional_count("ple_embed_dim")?.unwrap_or(base.hidden);
    let heads = order.saturating_sub(1).saturating_mul(each);
    if heads == 0 || !width.is_multiple_of(heads) || heads.saturating_mul(layers.len()) > HEADS {
        return Err(failed(format!(
            "ple_embed_dim is {width}, and it must be divided by the heads of tokens in a row, which are {heads} \
             ((ngram_size - 1) * heads_per_ngram), {HEADS} at most in all layers"
        )));
    }
    let least = config.integer("ngram_vocab_size_base", 20_000_000)?;
    let divisor = config.optional_count("make_ngram_vocab_size_divisible_by")?.unwrap_or(128);
    let shards = config.optional_count("split_ngram_parts")?.unwrap_or(512);
    if shards > PARTS {
        return Err(failed(format!("split_ngram_parts must be {PARTS} at most, found {shards}")));
    }
    let mut primes = Primes { last: u32::try_from(least.saturating_sub(1).max(0)).unwrap_or(u32::MAX) };
    let seed = config.integer("seed", 1234)?;
    let end = match config.get("eos_token_id").map(|ids| integer(ids.get(0).unwrap_or(ids))) {
        Some(Some(id)) if u32::try_from(id).is_ok() => id as u32,
        _ => {
            let why = "eos_token_id must be a token's id: it ends what tables for tokens in a row see";
            return Err(failed(why.to_owned()));
        }
    };
    let taps = config.optional_count("ple_conv_kernel_size")?.unwrap_or(4);
    let wide = streams * base.hidden;
    let layer = |(index, layer): (usize, usize)| {
        let at = format!("{}.ple", base.at(layer - 1));
        let sizes: Option<Vec<usize>> = (0..heads).map(|_| primes.next()).collect();
        let rows = sizes.as_ref().and_then(|sizes| sizes.iter().sum::<usize>().checked_next_multiple_of(divisor));
        let (Some(sizes), Some(rows @ ..=0xffff_ffff)) = (sizes, rows) else {
            return Err(failed(format!(
                "ngram_vocab_size_base is {least}, and tables of {heads} heads must have no more than 4294967295 rows"
            )));
        };
        let share = rows.div_ceil(shards);
        let part = |n: usize| (shard(&base.at(layer - 1), n), share.min(rows - n * share));
        let norms = ["norm_key", "norm_query", "norm_conv"].map(|name| base.norm_of(&format!("{at}.{name}"), wide));
        let grams = Grams {
            parts: (0..rows.div_ceil(share)).map(part).collect(),
            cols: width / heads,
            multipliers: multipliers(base.vocabulary, order, index as u64, seed as u64),
            sizes,
            end,
        };
        let convolution = Convolution {
            tensors: vec![(format!("{at}.conv1d.weight"), wide)],
            bias: None,
            channels: wide,
            taps,
            dilation: order,
            activation: Some(Activation::Silu),
        };
        let key = Linear::plain(format!("{at}.key_proj"), wide, width, false);
        let value = Linear::plain(format!("{at}.value_proj"), base.hidden, width, false);
        Ok((layer - 1, GramLayer { grams, key, value, norms, convolution }))
    };
    layers.into_iter().enumerate().map(layer).collect()
}

/// Part `n` of the table of the layer `at`.
fn shard(at: &str, n: usize) -> String {
    format!("{at}.{TABLE}.shard_{n}.weight")
}

/// Prime numbers, one after the other.
struct Primes {
    /// The last that was given, or what they are larger than.
    last: u32,
}

impl Primes {
    /// None where they are no longer 32 bits long.
    fn next(&mut self) -> Option<usize> {
        loop {
            self.last = self.last.checked_add(1)?;
            if is_prime(self.last) {
                return Some(self.last as usize);
            }
        }
    }
}

fn is_prime(n: u32) -> bool {
    let odd = (3..).step_by(2).take_while(|d| u64::from(*d) * u64::from(*d) <= u64::from(n));
    n == 2 || n > 2 && n % 2 == 1 && { odd }.all(|d: u32| !n.is_multiple_of(d))
}

/// What a token and those before it are multiplied by in the table with this number: odd, and so small that no product overflows.
fn multipliers(vocabulary: usize, order: usize, index: u64, seed: u64) -> Vec<i64> {
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
    let half = (i64::MAX as u64 / vocabulary.max(1) as u64 / 2).max(1);
    let seed = seed.wrapping_add(index.wrapping_mul(10_007));
    let random = |n: u64| {
        // SplitMix64.
        let mut x = seed.wrapping_add(STEP.wrapping_mul(n + 1)).wrapping_add(STEP);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    (0..order as u64).map(|n| (2 * (random(n) % half) + 1) as i64).collect()
}

/// The largest seed that is looked for.
const SEEDS: u64 = 1 << 16;

/// The seed by which rows of the first table of a model are found, of heads with so many rows; none where they are found by no such seed.
pub(crate) fn seed(vocabulary: usize, sizes: &[usize], by: &[usize]) -> Option<u64> {
    let mut primes = Primes { last: u32::try_from(*sizes.first()?).ok()?.checked_sub(1)? };
    let usual = std::iter::once(1234).chain(0..SEEDS);
    let given =
        |seed: &u64| multipliers(vocabulary, by.len(), 0, *seed).iter().map(|by| *by as usize).eq(by.iter().copied());
    sizes.iter().all(|size| primes.next() == Some(*size)).then(|| { usual }.find(given))?
}

/// Takes the parts of tables that a checkpoint has, which need not be as many as config.json says: one even, without a number.
///
/// Fails where a checkpoint says that its rows are found by other numbers.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) -> Result<()> {
    for block in &mut graph.blocks {
        let name = &block.name;
        for step in &mut block.steps {
            let Layer::Grams(layer) = &mut step.layer else { continue };
            let Grams { parts, cols, multipliers, sizes, .. } = &mut layer.grams;
            let rows = |tensor: String| {
                let entry = source.entry(&tensor).filter(|entry| entry.shape.len() == 2 && entry.shape[1] == *cols)?;
                Some((tensor, entry.shape[0]))
            };
            let whole: Vec<_> = rows(format!("{name}.{TABLE}.weight")).into_iter().collect();
            let shards: Vec<_> = (0..).map_while(|n| rows(shard(name, n))).collect();
            let all = |parts: &[(String, usize)]| parts.iter().map(|(_, rows)| rows).sum::<usize>();
            if let Some(found) = [whole, shards].into_iter().find(|found| all(found) == all(parts)) {
                *parts = found;
            }
            let sizes: Vec<i64> = sizes.iter().map(|size| *size as i64).collect();
            for (name_of, expected) in [("layer_multipliers", &*multipliers), ("ngram_heads_vocab_sizes", &sizes)] {
                let tensor = format!("{name}.ple.ple_embedding.{name_of}");
                let Some(raw) = source.raw(&tensor).filter(|raw| raw.data.len() == 8 * expected.len()) else {
                    continue;
                };
                let found = raw.data.chunks_exact(8).map(|n| i64::from_le_bytes(n.try_into().expect("eight bytes")));
                if !found.eq(expected.iter().copied()) {
                    return Err(Error::failed(format!(
                        "{}: `{tensor}` holds other numbers than follow from config.json (vocab_size, seed, ngram_size, ngram_vocab_size_base): \
                         rows of the table would not be found; take the config.json that belongs to the model",
                        source.path().display()
                    )));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As transformers 5.23 makes them for a vocabulary of 64 and the seed 1234.
    #[test]
    fn hashes_are_those_of_transformers() {
        let first = [112_381_549_946_653_559, 107_512_210_695_146_523, 55_314_113_489_879_299];
        let second = [125_324_136_723_312_099, 74_677_362_759_709_025, 33_105_235_034_841_755];
        assert_eq!([0, 1].map(|index| multipliers(64, 3, index, 1234)), [first, second]);
        let mut primes = Primes { last: 19 };
        let found: Vec<usize> = std::iter::from_fn(|| primes.next()).take(10).collect();
        assert_eq!(found, [23, 29, 31, 37, 41, 43, 47, 53, 59, 61]);
        assert!(
            [0, 1, 4, 9, 25, 20_000_001].iter().all(|n| !is_prime(*n))
                && [2, 3, 5, 4_294_967_291].iter().all(|n| is_prime(*n))
        );
    }
}
