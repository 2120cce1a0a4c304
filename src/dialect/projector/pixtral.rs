//! Pixtral, alone (LLaVA's class) and with the merger of Mistral Small 3.1.

use super::{Kind, Make, PLAIN, count, float, made, same};
use crate::json::{integer, real};

/// Pixtral's vision tower.
pub(super) const PIXTRAL: Kind = Kind {
    id: "pixtral",
    model_types: &["llava", "mistral3"],
    tower: Some("pixtral"),
    architectures: &["llama", "mistral3"],
    prefixes: &["multi_modal_projector.", "vision_tower."],
    // llama.cpp loads no file of this kind without it, though its converter leaves it out.
    ends_rows: Some("[IMG_BREAK]"),
    rules: &[&[
        same("vision_tower.patch_conv", "v.patch_embd"),
        same("vision_tower.ln_pre", "v.pre_ln"),
        made("vision_tower.transformer.layers.{}.attention.q_proj", "v.blk.{}.attn_q", Make::Turned),
        made("vision_tower.transformer.layers.{}.attention.k_proj", "v.blk.{}.attn_k", Make::Turned),
        same("vision_tower.transformer.layers.{}.attention.v_proj", "v.blk.{}.attn_v"),
        same("vision_tower.transformer.layers.{}.attention.o_proj", "v.blk.{}.attn_out"),
        same("vision_tower.transformer.layers.{}.attention_norm", "v.blk.{}.ln1"),
        same("vision_tower.transformer.layers.{}.ffn_norm", "v.blk.{}.ln2"),
        same("vision_tower.transformer.layers.{}.feed_forward.gate_proj", "v.blk.{}.ffn_gate"),
        same("vision_tower.transformer.layers.{}.feed_forward.up_proj", "v.blk.{}.ffn_up"),
        same("vision_tower.transformer.layers.{}.feed_forward.down_proj", "v.blk.{}.ffn_down"),
        same("multi_modal_projector.norm", "mm.input_norm"),
        same("multi_modal_projector.patch_merger.merging_layer", "mm.patch_merger"),
        same("multi_modal_projector.linear_{}", "mm.{}"),
    ]],
    settings: |said, out| {
        count(out, "image_size", said.count(&["image_size"])?);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-5));
        said.flag_activation(out, "gelu")?;
        if let Some(side) = integer(&said.config["spatial_merge_size"]).and_then(|side| u32::try_from(side).ok()) {
            count(out, "spatial_merge_size", side);
        }
        Ok(())
    },
    ..PLAIN
};
