//! GLM-4.1V, GLM-4.5V and GLM-4.6V, and GLM-5.3-Flash.

use super::computed::Is;
use super::qwen::{FIRST, SECOND};
use super::{Kind, PLAIN, Rule, count, flag, float, itself, same, weight};
use crate::json::{integer, real};

/// Names that both kinds share.
const BOTH: &[Rule] = &[
    FIRST,
    SECOND,
    itself("visual.patch_embed.proj.bias", "v.patch_embd.bias"),
    weight("visual.blocks.{}.attn.qkv", "v.blk.{}.attn_qkv"),
    weight("visual.blocks.{}.attn.proj", "v.blk.{}.attn_out"),
    weight("visual.blocks.{}.norm1", "v.blk.{}.ln1"),
    weight("visual.blocks.{}.norm2", "v.blk.{}.ln2"),
    weight("visual.blocks.{}.mlp.gate_proj", "v.blk.{}.ffn_gate"),
    weight("visual.blocks.{}.mlp.up_proj", "v.blk.{}.ffn_up"),
    weight("visual.blocks.{}.mlp.down_proj", "v.blk.{}.ffn_down"),
    weight("visual.post_layernorm", "v.post_ln"),
    same("visual.downsample", "mm.patch_merger"),
    weight("visual.merger.proj", "mm.model.fc"),
    same("visual.merger.post_projection_norm", "mm.post_norm"),
    weight("visual.merger.gate_proj", "mm.gate"),
    weight("visual.merger.up_proj", "mm.up"),
    weight("visual.merger.down_proj", "mm.down"),
];

/// GLM-4.1V and GLM-4.5V, whose positions are learned, and GLM-4.6V, which has the class of the latter.
pub(super) const GLM4V: Kind = Kind {
    id: "glm4v",
    model_types: &["glm4v", "glm4v_moe"],
    architectures: &["glm4", "glm4moe"],
    prefixes: &["visual."],
    rules: &[
        BOTH,
        &[
            weight("visual.embeddings.position_embedding", "v.position_embd"),
            weight("visual.post_conv_layernorm", "v.norm_embd"),
        ],
    ],
    // Those of transformers' class.
    usual: &[("image_size", 336), ("patch_size", 14)],
    computes: &[
        ("/vision_config/hidden_act", Is::Said("silu")),
        ("/vision_config/rope_theta", Is::Number(1e4)),
        ("/vision_config/rope_parameters/rope_theta", Is::Number(1e4)),
        ("/vision_config/spatial_merge_size", Is::Number(2.0)),
    ],
    settings: |said, out| {
        count(out, "image_size", said.count(&["image_size"])?);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["rms_norm_eps"]).unwrap_or(1e-5));
        Ok(())
    },
    ..PLAIN
};

/// GLM-5.3-Flash, whose feed-forward layers are limited and which has no learned positions.
pub(super) const GLM5V: Kind = Kind {
    id: "glm5v",
    model_types: &["glm5_next"],
    architectures: &["glm5-next"],
    rules: &[
        BOTH,
        &[
            weight("visual.blocks.{}.attn.q_norm", "v.blk.{}.attn_q_norm"),
            weight("visual.blocks.{}.attn.k_norm", "v.blk.{}.attn_k_norm"),
        ],
    ],
    computes: &[
        ("/vision_config/hidden_act", Is::Silu),
        ("/vision_config/rope_parameters/rope_theta", Is::Number(1e4)),
        ("/vision_config/spatial_merge_size", Is::Number(2.0)),
    ],
    settings: |said, out| {
        count(out, "image_size", said.count(&["image_size"])?);
        flag(out, "use_silu");
        float(out, "attention.layer_norm_epsilon", real(&said.vision["rms_norm_eps"]).unwrap_or(1e-5));
        count(out, "spatial_merge_size", 2);
        float(out, "swiglu_clamp", real(&said.vision["swiglu_limit"]).unwrap_or(10.0));
        let of = |key: &str| integer(&said.preprocessor[key]);
        let side = of("patch_size").unwrap_or(14) * of("merge_size").unwrap_or(2);
        for (from, to) in [("min_image_tokens", "image_min_pixels"), ("max_image_tokens", "image_max_pixels")] {
            // llama.cpp loads no file without them.
            let pixels = of(from).and_then(|tokens| u32::try_from(tokens.checked_mul(side)?.checked_mul(side)?).ok());
            let why = format!("neither preprocessor_config.json nor processor_config.json has {from}");
            count(out, to, pixels.filter(|pixels| *pixels > 0).ok_or(why)?);
        }
        Ok(())
    },
    ..GLM4V
};
