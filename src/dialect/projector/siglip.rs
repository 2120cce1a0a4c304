//! SigLIP's vision towers, by the names that their parts have: Idefics 3 and SmolVLM, and LFM2-VL.

use super::computed::Is;
use super::{Kind, Make, PLAIN, Rule, Ty, count, flag, float, free, itself, made, same, typed, weight};
use crate::json::{integer, real};

/// What becomes of the tensors of such a tower, whose names begin with this, but for what goes over patches.
macro_rules! siglip {
    ($at:literal) => {
        [
            weight(concat!($at, "embeddings.position_embedding"), "v.position_embd"),
            same(concat!($at, "encoder.layers.{}.self_attn.q_proj"), "v.blk.{}.attn_q"),
            same(concat!($at, "encoder.layers.{}.self_attn.k_proj"), "v.blk.{}.attn_k"),
            same(concat!($at, "encoder.layers.{}.self_attn.v_proj"), "v.blk.{}.attn_v"),
            same(concat!($at, "encoder.layers.{}.self_attn.out_proj"), "v.blk.{}.attn_out"),
            same(concat!($at, "encoder.layers.{}.layer_norm1"), "v.blk.{}.ln1"),
            same(concat!($at, "encoder.layers.{}.layer_norm2"), "v.blk.{}.ln2"),
            same(concat!($at, "encoder.layers.{}.mlp.fc1"), "v.blk.{}.ffn_up"),
            same(concat!($at, "encoder.layers.{}.mlp.fc2"), "v.blk.{}.ffn_down"),
            same(concat!($at, "post_layernorm"), "v.post_ln"),
        ]
    };
}

pub(super) const IN_TOWER: &[Rule] = &siglip!("vision_tower.vision_model.");
const BARE: &[Rule] = &siglip!("vision_tower.");
const IN_MODEL: &[Rule] = &siglip!("vision_model.");

/// What goes over patches, in F32 whatever the others are.
pub(super) const fn over_patches(from: &'static str) -> Rule {
    typed(from, "v.patch_embd", Ty::F32)
}

/// Idefics 3 and SmolVLM.
pub(super) const IDEFICS3: Kind = Kind {
    id: "idefics3",
    model_types: &["idefics3", "smolvlm"],
    architectures: &["llama", "smollm3"],
    prefixes: &["vision_model.", "connector."],
    rules: &[
        IN_MODEL,
        &[
            over_patches("vision_model.embeddings.patch_embedding"),
            weight("connector.modality_projection.proj", "mm.model.fc"),
        ],
    ],
    // Those of transformers' classes, which published files leave out.
    usual: &[
        ("hidden_size", 1152),
        ("num_attention_heads", 16),
        ("intermediate_size", 3072),
        ("num_hidden_layers", 12),
    ],
    computes: &[("/vision_config/hidden_act", Is::Gelu)],
    settings: |said, out| {
        let size = said.count(&["image_size"])?;
        count(out, "image_size", size);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-6));
        flag(out, "use_gelu");
        let of = |value: &serde_json::Value| integer(value).and_then(|value| u32::try_from(value).ok());
        count(out, "projector.scale_factor", of(&said.config["scale_factor"]).unwrap_or(2));
        count(out, "preproc_image_size", of(&said.preprocessor["size"]["longest_edge"]).unwrap_or(size));
        Ok(())
    },
    ..PLAIN
};

/// LFM2-VL. Its last blocks may be left out, of which none is written.
pub(super) const LFM2: Kind = Kind {
    id: "lfm2",
    model_types: &["lfm2_vl"],
    architectures: &["lfm2", "lfm2moe"],
    prefixes: &["vision_tower.", "multi_modal_projector."],
    rules: &[
        IN_TOWER,
        BARE,
        &[
            made("vision_tower.vision_model.embeddings.patch_embedding.weight", "v.patch_embd.weight", Make::Pixels),
            itself("vision_tower.vision_model.embeddings.patch_embedding.bias", "v.patch_embd.bias"),
            made("vision_tower.embeddings.patch_embedding.weight", "v.patch_embd.weight", Make::Pixels),
            itself("vision_tower.embeddings.patch_embedding.bias", "v.patch_embd.bias"),
            free("multi_modal_projector.layer_norm", "mm.input_norm"),
            weight("multi_modal_projector.linear_1", "mm.1"),
            weight("multi_modal_projector.linear_2", "mm.2"),
        ],
    ],
    // That of transformers' class.
    usual: &[("num_patches", 256)],
    computes: &[("/vision_config/hidden_act", Is::Gelu), ("/projector_hidden_act", Is::Gelu)],
    settings: |said, out| {
        // A tower takes pictures of any size, and the file has to name one.
        count(out, "image_size", 256);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-6));
        flag(out, "use_gelu");
        let factor = integer(&said.config["downsample_factor"]).and_then(|value| u32::try_from(value).ok());
        count(out, "projector.scale_factor", factor.unwrap_or(2));
        let last = integer(&said.config["vision_feature_layer"]).unwrap_or(-1);
        let blocks = i64::from(said.count(&["num_hidden_layers"])?) + last + 1;
        let blocks = u32::try_from(blocks).ok().filter(|blocks| *blocks > 0 && last < 0);
        let blocks = blocks
            .ok_or_else(|| format!("vision_feature_layer of config.json is {last}, which is none of its blocks"))?;
        out.retain(|(key, _)| key != "clip.vision.block_count");
        count(out, "block_count", blocks);
        Ok(())
    },
    ..PLAIN
};
