//! Pixtral, alone (LLaVA's class) and with the merger of Mistral Small 3.1.

use super::computed::{Is, Need};
use super::{Kind, Make, PLAIN, Rule, count, float, free, made, weight};
use crate::json::{integer, real};

/// Queries or keys: the weight alone, with rows in the order in which llama.cpp rotates them.
const fn turned(from: &'static str, to: &'static str) -> Rule {
    Rule { need: Need::Weight, ..made(from, to, Make::Turned) }
}

/// Names of the tower and of the linears behind it, which both classes have.
const BOTH: &[Rule] = &[
    weight("vision_tower.patch_conv", "v.patch_embd"),
    weight("vision_tower.ln_pre", "v.pre_ln"),
    turned("vision_tower.transformer.layers.{}.attention.q_proj", "v.blk.{}.attn_q"),
    turned("vision_tower.transformer.layers.{}.attention.k_proj", "v.blk.{}.attn_k"),
    weight("vision_tower.transformer.layers.{}.attention.v_proj", "v.blk.{}.attn_v"),
    weight("vision_tower.transformer.layers.{}.attention.o_proj", "v.blk.{}.attn_out"),
    weight("vision_tower.transformer.layers.{}.attention_norm", "v.blk.{}.ln1"),
    weight("vision_tower.transformer.layers.{}.ffn_norm", "v.blk.{}.ln2"),
    weight("vision_tower.transformer.layers.{}.feed_forward.gate_proj", "v.blk.{}.ffn_gate"),
    weight("vision_tower.transformer.layers.{}.feed_forward.up_proj", "v.blk.{}.ffn_up"),
    weight("vision_tower.transformer.layers.{}.feed_forward.down_proj", "v.blk.{}.ffn_down"),
    weight("multi_modal_projector.linear_1", "mm.1"),
    weight("multi_modal_projector.linear_2", "mm.2"),
];

/// Pixtral's vision tower in LLaVA's class.
pub(super) const PIXTRAL: Kind = Kind {
    id: "pixtral",
    model_types: &["llava"],
    tower: Some("pixtral"),
    architectures: &["llama", "mistral3"],
    prefixes: &["multi_modal_projector.", "vision_tower."],
    // llama.cpp loads no file of this kind without it, though its converter leaves it out.
    ends_rows: Some("[IMG_BREAK]"),
    rules: &[
        BOTH,
        &[
            free("multi_modal_projector.norm", "mm.input_norm"),
            free("multi_modal_projector.patch_merger.merging_layer", "mm.patch_merger"),
        ],
    ],
    computes: &[
        ("/vision_config/hidden_act", Is::Said("gelu")),
        ("/projector_hidden_act", Is::Gelu),
        ("/vision_config/rope_theta", Is::Number(1e4)),
        ("/vision_config/rope_parameters/rope_theta", Is::Number(1e4)),
    ],
    settings: |said, out| {
        count(out, "image_size", said.count(&["image_size"])?);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-5));
        if let Some(side) = integer(&said.config["spatial_merge_size"]).and_then(|side| u32::try_from(side).ok()) {
            count(out, "spatial_merge_size", side);
        }
        Ok(())
    },
    ..PLAIN
};

/// The same in Mistral Small 3.1's class, which joins patches before they go to the language model.
pub(super) const MISTRAL3: Kind = Kind {
    model_types: &["mistral3"],
    rules: &[
        BOTH,
        &[
            weight("multi_modal_projector.norm", "mm.input_norm"),
            weight("multi_modal_projector.patch_merger.merging_layer", "mm.patch_merger"),
        ],
    ],
    ..PIXTRAL
};
