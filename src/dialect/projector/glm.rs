//! GLM-4.5V and GLM-4.6V.

use super::qwen::{FIRST, SECOND};
use super::{Kind, PLAIN, count, float, same};
use crate::json::real;

/// GLM-4.5V. That of GLM-4.1V is the same, but there is no file of its language model here.
pub(super) const GLM4V: Kind = Kind {
    id: "glm4v",
    model_types: &["glm4v_moe"],
    architectures: &["glm4moe"],
    prefixes: &["visual."],
    rules: &[&[
        FIRST,
        SECOND,
        same("visual.patch_embed.proj.bias", "v.patch_embd.bias"),
        same("visual.embeddings.position_embedding", "v.position_embd"),
        same("visual.post_conv_layernorm", "v.norm_embd"),
        same("visual.blocks.{}.attn.qkv", "v.blk.{}.attn_qkv"),
        same("visual.blocks.{}.attn.proj", "v.blk.{}.attn_out"),
        same("visual.blocks.{}.norm1", "v.blk.{}.ln1"),
        same("visual.blocks.{}.norm2", "v.blk.{}.ln2"),
        same("visual.blocks.{}.mlp.gate_proj", "v.blk.{}.ffn_gate"),
        same("visual.blocks.{}.mlp.up_proj", "v.blk.{}.ffn_up"),
        same("visual.blocks.{}.mlp.down_proj", "v.blk.{}.ffn_down"),
        same("visual.post_layernorm", "v.post_ln"),
        same("visual.downsample", "mm.patch_merger"),
        same("visual.merger.proj", "mm.model.fc"),
        same("visual.merger.post_projection_norm", "mm.post_norm"),
        same("visual.merger.gate_proj", "mm.gate"),
        same("visual.merger.up_proj", "mm.up"),
        same("visual.merger.down_proj", "mm.down"),
    ]],
    // Those of transformers' class.
    usual: &[("image_size", 336), ("patch_size", 14)],
    settings: |said, out| {
        count(out, "image_size", said.count(&["image_size"])?);
        said.flag_activation(out, "silu")?;
        float(out, "attention.layer_norm_epsilon", real(&said.vision["rms_norm_eps"]).unwrap_or(1e-5));
        Ok(())
    },
    ..PLAIN
};
