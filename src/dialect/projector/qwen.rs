//! Qwen2-VL, Qwen2.5-VL and the vision towers of Qwen3.5.

use formats::container::gguf::{GGUFValueType, MetadataValue};

use super::computed::Is;
use super::{Kind, Make, Metadata, PLAIN, Rule, Said, array, count, flag, float, itself, made, same, weight};
use crate::json::{integer, real};

pub(super) const FIRST: Rule = made("visual.patch_embed.proj.weight", "v.patch_embd.weight", Make::Frame(0));
pub(super) const SECOND: Rule = made("visual.patch_embed.proj.weight", "v.patch_embd.weight.1", Make::Frame(1));

/// Names that Qwen2-VL and Qwen2.5-VL share.
const BOTH: &[Rule] = &[
    FIRST,
    SECOND,
    made("visual.blocks.{}.attn.qkv", "v.blk.{}.attn_q", Make::Rows(0, 3)),
    made("visual.blocks.{}.attn.qkv", "v.blk.{}.attn_k", Make::Rows(1, 3)),
    made("visual.blocks.{}.attn.qkv", "v.blk.{}.attn_v", Make::Rows(2, 3)),
    same("visual.blocks.{}.attn.proj", "v.blk.{}.attn_out"),
    same("visual.merger.mlp.0", "mm.0"),
    same("visual.merger.mlp.2", "mm.2"),
];

/// Of Qwen2-VL alone.
const OLDER: &[Rule] = &[
    same("visual.blocks.{}.norm1", "v.blk.{}.ln1"),
    same("visual.blocks.{}.norm2", "v.blk.{}.ln2"),
    same("visual.blocks.{}.mlp.fc1", "v.blk.{}.ffn_up"),
    same("visual.blocks.{}.mlp.fc2", "v.blk.{}.ffn_down"),
    same("visual.merger.ln_q", "v.post_ln"),
];

/// Of Qwen2.5-VL alone.
const NEWER: &[Rule] = &[
    weight("visual.blocks.{}.norm1", "v.blk.{}.ln1"),
    weight("visual.blocks.{}.norm2", "v.blk.{}.ln2"),
    same("visual.blocks.{}.mlp.gate_proj", "v.blk.{}.ffn_gate"),
    same("visual.blocks.{}.mlp.up_proj", "v.blk.{}.ffn_up"),
    same("visual.blocks.{}.mlp.down_proj", "v.blk.{}.ffn_down"),
    weight("visual.merger.ln_q", "v.post_ln"),
];

/// Qwen2-VL.
pub(super) const QWEN2: Kind = Kind {
    id: "qwen2vl_merger",
    model_types: &["qwen2_vl"],
    architectures: &["qwen2vl"],
    prefixes: &["visual."],
    rules: &[BOTH, OLDER],
    computes: &[
        ("/vision_config/hidden_act", Is::QuickGelu),
        ("/vision_config/spatial_merge_size", Is::Number(2.0)),
        ("/vision_config/rope_parameters/rope_theta", Is::Number(1e4)),
    ],
    settings: |said, out| second(said, out),
    ..PLAIN
};

/// Qwen2.5-VL.
pub(super) const QWEN2_5: Kind = Kind {
    id: "qwen2.5vl_merger",
    model_types: &["qwen2_5_vl"],
    rules: &[BOTH, NEWER],
    computes: &[
        ("/vision_config/hidden_act", Is::Silu),
        ("/vision_config/spatial_merge_size", Is::Number(2.0)),
        ("/vision_config/window_size", Is::Number(112.0)),
        ("/vision_config/rope_parameters/rope_theta", Is::Number(1e4)),
    ],
    settings: |said, out| {
        flag(out, "use_silu");
        let all: Vec<i64> =
            said.vision["fullatt_block_indexes"].as_array().into_iter().flatten().filter_map(integer).collect();
        let wrong = || {
            format!("vision_config says that the blocks {all:?} see the whole picture, which llama.cpp has no word for")
        };
        let every = all.first().map_or(0, |first| first + 1);
        if every < 1 || !all.windows(2).all(|two| two[1] - two[0] == every) {
            return Err(wrong());
        }
        count(out, "n_wa_pattern", u32::try_from(every).map_err(|_| wrong())?);
        second(said, out)
    },
    ..QWEN2
};

/// What both say.
fn second(said: &Said<'_>, out: &mut Metadata) -> Result<(), String> {
    count(out, "image_size", said.count_or("image_size", 560)?);
    float(out, "attention.layer_norm_epsilon", real(&said.config["rms_norm_eps"]).unwrap_or(1e-6));
    Ok(())
}

/// Qwen3-VL, whose inner layers reach into the language model, and Qwen3.5, where none do.
pub(super) const QWEN3: Kind = Kind {
    id: "qwen3vl_merger",
    model_types: &["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"],
    architectures: &["qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe"],
    prefixes: &["visual."],
    rules: &[&[
        FIRST,
        SECOND,
        itself("visual.patch_embed.proj.bias", "v.patch_embd.bias"),
        weight("visual.pos_embed", "v.position_embd"),
        same("visual.blocks.{}.attn.qkv", "v.blk.{}.attn_qkv"),
        same("visual.blocks.{}.attn.proj", "v.blk.{}.attn_out"),
        same("visual.blocks.{}.norm1", "v.blk.{}.ln1"),
        same("visual.blocks.{}.norm2", "v.blk.{}.ln2"),
        same("visual.blocks.{}.mlp.linear_fc1", "v.blk.{}.ffn_up"),
        same("visual.blocks.{}.mlp.linear_fc2", "v.blk.{}.ffn_down"),
        same("visual.deepstack_merger_list.{}.norm", "v.deepstack.{deepstack_visual_indexes}.norm"),
        same("visual.deepstack_merger_list.{}.linear_fc1", "v.deepstack.{deepstack_visual_indexes}.fc1"),
        same("visual.deepstack_merger_list.{}.linear_fc2", "v.deepstack.{deepstack_visual_indexes}.fc2"),
        same("visual.merger.norm", "v.post_ln"),
        same("visual.merger.linear_fc1", "mm.0"),
        same("visual.merger.linear_fc2", "mm.2"),
    ]],
    // That of transformers' class.
    usual: &[("num_position_embeddings", 2304)],
    computes: &[
        ("/vision_config/hidden_act", Is::Gelu),
        ("/vision_config/spatial_merge_size", Is::Number(2.0)),
        ("/vision_config/rope_parameters/rope_theta", Is::Number(1e4)),
    ],
    settings: |said, out| {
        flag(out, "use_gelu");
        let positions = said.count(&["num_position_embeddings"])?;
        let size = f64::from(positions).sqrt() * f64::from(said.count(&["patch_size"])?);
        count(out, "image_size", said.count_or("image_size", size as u32)?);
        count(out, "spatial_merge_size", said.count_or("spatial_merge_size", 2)?);
        float(out, "attention.layer_norm_epsilon", real(&said.text["rms_norm_eps"]).unwrap_or(1e-6));
        let reaching = said.list("deepstack_visual_indexes");
        let reaches = |layer: u32| MetadataValue::Bool(reaching.contains(&i64::from(layer)));
        let flags = (0..said.count(&["num_hidden_layers", "depth"])?).map(reaches).collect();
        out.push(("clip.vision.is_deepstack_layers".to_owned(), array(flags, GGUFValueType::Bool)?));
        Ok(())
    },
    ..PLAIN
};
