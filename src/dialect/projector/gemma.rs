//! Gemma 3, whose vision tower is SigLIP's.

use super::computed::{Is, Need};
use super::siglip::{IN_TOWER, over_patches};
use super::{Kind, Make, PLAIN, Rule, Ty, count, flag, float};
use crate::json::{integer, real};

/// Gemma 3.
pub(super) const GEMMA3: Kind = Kind {
    id: "gemma3",
    model_types: &["gemma3"],
    architectures: &["gemma3"],
    prefixes: &["multi_modal_projector.", "vision_tower."],
    rules: &[
        IN_TOWER,
        &[
            over_patches("vision_tower.vision_model.embeddings.patch_embedding"),
            Rule {
                from: "multi_modal_projector.mm_input_projection_weight",
                to: "mm.input_projection.weight",
                make: Make::Whole,
                ty: Ty::F16,
                need: Need::Itself,
            },
            Rule {
                from: "multi_modal_projector.mm_soft_emb_norm.weight",
                to: "mm.soft_emb_norm.weight",
                make: Make::PlusOne,
                ty: Ty::F32,
                need: Need::Itself,
            },
        ],
    ],
    computes: &[("/vision_config/hidden_act", Is::Gelu)],
    settings: |said, out| {
        let size = said.count(&["image_size"])?;
        count(out, "image_size", size);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-6));
        flag(out, "use_gelu");
        // How many patches become one token on each side; llama.cpp takes 4 where nothing is said.
        let tokens = integer(&said.preprocessor["image_seq_length"]).unwrap_or(256).max(1);
        let factor = size / said.count(&["patch_size"])? / (tokens as f64).sqrt() as u32;
        if factor > 0 && factor != 4 {
            count(out, "projector.scale_factor", factor);
        }
        Ok(())
    },
    ..PLAIN
};
