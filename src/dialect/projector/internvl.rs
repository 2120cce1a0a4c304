//! InternVL, as transformers has it, and Intern-S1.

use super::{Kind, PLAIN, count, float, same};
use crate::json::{integer, real};

/// InternVL.
pub(super) const INTERNVL: Kind = Kind {
    id: "internvl",
    model_types: &["internvl"],
    architectures: &["llama", "qwen2", "qwen3", "qwen3moe", "gpt-oss"],
    prefixes: &["vision_tower.", "multi_modal_projector."],
    rules: &[&[
        same("vision_tower.embeddings.cls_token", "v.class_embd"),
        same("vision_tower.embeddings.patch_embeddings.projection", "v.patch_embd"),
        same("vision_tower.embeddings.position_embeddings", "v.position_embd.weight"),
        same("vision_tower.encoder.layer.{}.attention.q_proj", "v.blk.{}.attn_q"),
        same("vision_tower.encoder.layer.{}.attention.k_proj", "v.blk.{}.attn_k"),
        same("vision_tower.encoder.layer.{}.attention.v_proj", "v.blk.{}.attn_v"),
        same("vision_tower.encoder.layer.{}.attention.q_norm", "v.blk.{}.attn_q_norm"),
        same("vision_tower.encoder.layer.{}.attention.k_norm", "v.blk.{}.attn_k_norm"),
        same("vision_tower.encoder.layer.{}.attention.projection_layer", "v.blk.{}.attn_out"),
        same("vision_tower.encoder.layer.{}.layernorm_before", "v.blk.{}.ln1"),
        same("vision_tower.encoder.layer.{}.layernorm_after", "v.blk.{}.ln2"),
        same("vision_tower.encoder.layer.{}.lambda_1", "v.blk.{}.ls1.weight"),
        same("vision_tower.encoder.layer.{}.lambda_2", "v.blk.{}.ls2.weight"),
        same("vision_tower.encoder.layer.{}.mlp.fc1", "v.blk.{}.ffn_up"),
        same("vision_tower.encoder.layer.{}.mlp.fc2", "v.blk.{}.ffn_down"),
        same("multi_modal_projector.layer_norm", "mm.model.mlp.0"),
        same("multi_modal_projector.linear_1", "mm.model.mlp.1"),
        same("multi_modal_projector.linear_2", "mm.model.mlp.3"),
    ]],
    // Those of transformers' class.
    usual: &[
        ("hidden_size", 1024),
        ("num_hidden_layers", 24),
        ("num_attention_heads", 16),
        ("intermediate_size", 4096),
        ("image_size", 448),
        ("patch_size", 14),
    ],
    settings: |said, out| {
        count(out, "image_size", said.count(&["image_size"])?);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-6));
        said.flag_activation(out, "gelu")?;
        let ratio = real(&said.config["downsample_ratio"]).unwrap_or(0.5);
        count(out, "projector.scale_factor", (1.0 / ratio) as u32);
        for (from, to) in [("min_dynamic_patch", "preproc_min_tiles"), ("max_dynamic_patch", "preproc_max_tiles")] {
            let tiles = integer(&said.config[from]).and_then(|tiles| u32::try_from(tiles).ok());
            tiles.filter(|tiles| *tiles > 0).into_iter().for_each(|tiles| count(out, to, tiles));
        }
        Ok(())
    },
    ..PLAIN
};
