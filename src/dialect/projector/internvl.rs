//! InternVL, as transformers has it and under the names of its own code, and Intern-S1.

use super::computed::{Is, Need};
use super::{Kind, Make, PLAIN, Rule, count, float, free, itself, made, same, weight};
use crate::json::{integer, real};

/// InternVL.
pub(super) const INTERNVL: Kind = Kind {
    id: "internvl",
    model_types: &["internvl"],
    architectures: &["llama", "qwen2", "qwen3", "qwen3moe", "gpt-oss"],
    prefixes: &["vision_tower.", "multi_modal_projector."],
    rules: &[&[
        itself("vision_tower.embeddings.cls_token", "v.class_embd"),
        same("vision_tower.embeddings.patch_embeddings.projection", "v.patch_embd"),
        itself("vision_tower.embeddings.position_embeddings", "v.position_embd.weight"),
        weight("vision_tower.encoder.layer.{}.attention.q_proj", "v.blk.{}.attn_q"),
        weight("vision_tower.encoder.layer.{}.attention.k_proj", "v.blk.{}.attn_k"),
        weight("vision_tower.encoder.layer.{}.attention.v_proj", "v.blk.{}.attn_v"),
        free("vision_tower.encoder.layer.{}.attention.q_norm", "v.blk.{}.attn_q_norm"),
        free("vision_tower.encoder.layer.{}.attention.k_norm", "v.blk.{}.attn_k_norm"),
        same("vision_tower.encoder.layer.{}.attention.projection_layer", "v.blk.{}.attn_out"),
        weight("vision_tower.encoder.layer.{}.layernorm_before", "v.blk.{}.ln1"),
        weight("vision_tower.encoder.layer.{}.layernorm_after", "v.blk.{}.ln2"),
        itself("vision_tower.encoder.layer.{}.lambda_1", "v.blk.{}.ls1.weight"),
        itself("vision_tower.encoder.layer.{}.lambda_2", "v.blk.{}.ls2.weight"),
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
    computes: &[("/vision_config/hidden_act", Is::Said("gelu")), ("/projector_hidden_act", Is::Gelu)],
    settings: |said, out| {
        count(out, "image_size", said.count(&["image_size"])?);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-6));
        let root = said.vision["norm_type"].as_str().is_some_and(|name| name == "rms_norm");
        let [wide, layers] = [said.count(&["hidden_size"])?, said.count(&["num_hidden_layers"])?];
        if root != ((wide, layers) == (3200, 45)) {
            // By its size it tells which tower it is.
            return Err(format!(
                "the vision tower has {layers} blocks of width {wide}, in which llama.cpp takes norms to be of the other kind"
            ));
        }
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

/// A third of the rows of queries, keys and values, which may have no bias.
const fn third(part: usize, to: &'static str) -> Rule {
    Rule { need: Need::Weight, ..made("vision_model.encoder.layers.{}.attn.qkv", to, Make::Rows(part, 3)) }
}

/// InternVL under the names of the code that it brings along (`internvl_chat`).
pub(super) const INTERNVL_CHAT: Kind = Kind {
    model_types: &["internvl_chat"],
    prefixes: &["vision_model.", "mlp1."],
    rules: &[&[
        itself("vision_model.embeddings.class_embedding", "v.class_embd"),
        same("vision_model.embeddings.patch_embedding", "v.patch_embd"),
        itself("vision_model.embeddings.position_embedding", "v.position_embd.weight"),
        third(0, "v.blk.{}.attn_q"),
        third(1, "v.blk.{}.attn_k"),
        third(2, "v.blk.{}.attn_v"),
        free("vision_model.encoder.layers.{}.attn.q_norm", "v.blk.{}.attn_q_norm"),
        free("vision_model.encoder.layers.{}.attn.k_norm", "v.blk.{}.attn_k_norm"),
        same("vision_model.encoder.layers.{}.attn.proj", "v.blk.{}.attn_out"),
        weight("vision_model.encoder.layers.{}.norm1", "v.blk.{}.ln1"),
        weight("vision_model.encoder.layers.{}.norm2", "v.blk.{}.ln2"),
        itself("vision_model.encoder.layers.{}.ls1", "v.blk.{}.ls1.weight"),
        itself("vision_model.encoder.layers.{}.ls2", "v.blk.{}.ls2.weight"),
        same("vision_model.encoder.layers.{}.mlp.fc1", "v.blk.{}.ffn_up"),
        same("vision_model.encoder.layers.{}.mlp.fc2", "v.blk.{}.ffn_down"),
        same("mlp1.0", "mm.model.mlp.0"),
        same("mlp1.1", "mm.model.mlp.1"),
        same("mlp1.3", "mm.model.mlp.3"),
    ]],
    computes: &[("/vision_config/hidden_act", Is::Said("gelu")), ("/select_layer", Is::Number(-1.0))],
    ..INTERNVL
};
