//! Kimi-VL and Kimi K2.5, whose tower is MoonViT.

use formats::container::gguf::MetadataValue;

use super::computed::{Is, Need};
use super::{Kind, Make, PLAIN, Rule, Ty, count, flag, float, made, same, weight};
use crate::json::{integer, real};

/// Names of the tower that both models have.
const BOTH: &[Rule] = &[
    same("vision_tower.patch_embed.proj", "v.patch_embd"),
    same("vision_tower.encoder.blocks.{}.wo", "v.blk.{}.attn_out"),
    same("vision_tower.encoder.blocks.{}.norm0", "v.blk.{}.ln1"),
    same("vision_tower.encoder.blocks.{}.norm1", "v.blk.{}.ln2"),
    same("vision_tower.encoder.blocks.{}.mlp.fc0", "v.blk.{}.ffn_up"),
    same("vision_tower.encoder.blocks.{}.mlp.fc1", "v.blk.{}.ffn_down"),
    same("vision_tower.encoder.final_layernorm", "v.post_ln"),
];

/// Kimi-VL, whose queries, keys and values are three matrices for llama.cpp, and one in the checkpoint.
///
/// The pairs of each head turn by width and height in turn, as in Kimi K2.5. llama.cpp turns the first half of them by width, the other by
/// height, and its converter orders the rows for that in Kimi K2.5 alone. So they are ordered here.
pub(super) const KIMI_VL: Kind = Kind {
    id: "kimivl",
    model_types: &["kimi_vl"],
    architectures: &["deepseek2"],
    prefixes: &["vision_tower.", "multi_modal_projector."],
    rules: &[
        BOTH,
        &[
            Rule {
                from: "vision_tower.patch_embed.pos_emb.weight",
                to: "v.position_embd.weight",
                make: Make::Places,
                ty: Ty::F32,
                need: Need::Itself,
            },
            made("vision_tower.encoder.blocks.{}.wqkv", "v.blk.{}.attn_q", Make::SidesOf(0)),
            made("vision_tower.encoder.blocks.{}.wqkv", "v.blk.{}.attn_k", Make::SidesOf(1)),
            made("vision_tower.encoder.blocks.{}.wqkv", "v.blk.{}.attn_v", Make::SidesOf(2)),
            same("multi_modal_projector.pre_norm", "mm.input_norm"),
            same("multi_modal_projector.linear_1", "mm.1"),
            same("multi_modal_projector.linear_2", "mm.2"),
        ],
    ],
    // Those of the published class.
    usual: &[
        ("patch_size", 14),
        ("hidden_size", 1152),
        ("num_hidden_layers", 27),
        ("num_attention_heads", 16),
        ("intermediate_size", 4304),
    ],
    settings: |said, out| {
        let patch = said.count(&["patch_size"])?;
        // Pictures may have any size, and the file has to name one.
        count(out, "image_size", 64 * patch);
        flag(out, "use_gelu");
        count(out, "projector.scale_factor", 2);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-5));
        let sides: Vec<i64> = said.list("merge_kernel_size");
        match sides[..] {
            [] | [2, 2] => Ok(()),
            _ => Err(format!("vision_config has merge_kernel_size {sides:?}, and llama.cpp joins 2 · 2 patches")),
        }
    },
    ..PLAIN
};

/// Kimi K2.5.
pub(super) const KIMI_K25: Kind = Kind {
    id: "kimik25",
    model_types: &["kimi_k25"],
    architectures: &["deepseek2"],
    prefixes: &["vision_tower.", "mm_projector."],
    rules: &[
        BOTH,
        &[
            weight("vision_tower.patch_embed.pos_emb", "v.position_embd"),
            made("vision_tower.encoder.blocks.{}.wqkv", "v.blk.{}.attn_qkv", Make::Sides),
            same("mm_projector.pre_norm", "mm.input_norm"),
            same("mm_projector.proj.0", "mm.1"),
            same("mm_projector.proj.2", "mm.2"),
        ],
    ],
    usual: &[("patch_size", 14), ("init_pos_emb_height", 64), ("init_pos_emb_width", 64), ("init_pos_emb_time", 4)],
    computes: &[
        ("/vision_config/hidden_act", Is::Gelu),
        ("/vision_config/projector_hidden_act", Is::Gelu),
        ("/vision_config/rope_parameters/rope_theta", Is::Number(1e4)),
    ],
    settings: |said, out| {
        let patch = said.count(&["patch_size"])?;
        count(out, "image_size", said.count(&["init_pos_emb_height"])? * patch);
        for side in ["height", "width", "time"] {
            let positions = said.count(&[&format!("init_pos_emb_{side}")])?;
            out.push((format!("vision.pos_emb_{side}"), MetadataValue::U32(positions)));
        }
        flag(out, "use_gelu");
        float(out, "attention.layer_norm_epsilon", real(&said.vision["projector_ln_eps"]).unwrap_or(1e-5));
        let side = integer(&said.vision["merge_kernel_size"][0]).and_then(|side| u32::try_from(side).ok());
        count(out, "projector.scale_factor", side.unwrap_or(2));
        let most = integer(&said.preprocessor["in_patch_limit"]).and_then(|most| u32::try_from(most).ok());
        for (key, patches) in [("image_min_pixels", 8), ("image_max_pixels", most.unwrap_or(16384))] {
            count(out, key, patches.saturating_mul(patch * patch));
        }
        Ok(())
    },
    ..PLAIN
};
