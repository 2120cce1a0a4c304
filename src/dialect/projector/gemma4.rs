//! Gemma 4, which sees and, in its smaller sizes, hears.

use formats::container::gguf::MetadataValue;

use super::{Kind, Make, Metadata, PLAIN, Rule, Said, Ty, count, flag, float, made, same, typed};
use crate::json::{integer, real};

const SEES: &[Rule] = &[
    made("vision_tower.patch_embedder.input_proj.weight", "v.patch_embd.weight", Make::Pixels),
    same("vision_tower.patch_embedder.position_embedding_table", "v.position_embd.weight"),
    same("vision_tower.encoder.layers.{}.self_attn.q_proj", "v.blk.{}.attn_q"),
    same("vision_tower.encoder.layers.{}.self_attn.k_proj", "v.blk.{}.attn_k"),
    same("vision_tower.encoder.layers.{}.self_attn.v_proj", "v.blk.{}.attn_v"),
    same("vision_tower.encoder.layers.{}.self_attn.o_proj", "v.blk.{}.attn_out"),
    same("vision_tower.encoder.layers.{}.self_attn.q_norm", "v.blk.{}.attn_q_norm"),
    same("vision_tower.encoder.layers.{}.self_attn.k_norm", "v.blk.{}.attn_k_norm"),
    same("vision_tower.encoder.layers.{}.mlp.gate_proj", "v.blk.{}.ffn_gate"),
    same("vision_tower.encoder.layers.{}.mlp.up_proj", "v.blk.{}.ffn_up"),
    same("vision_tower.encoder.layers.{}.mlp.down_proj", "v.blk.{}.ffn_down"),
    same("vision_tower.encoder.layers.{}.input_layernorm", "v.blk.{}.ln1"),
    same("vision_tower.encoder.layers.{}.post_attention_layernorm", "v.blk.{}.attn_post_norm"),
    same("vision_tower.encoder.layers.{}.pre_feedforward_layernorm", "v.blk.{}.ln2"),
    same("vision_tower.encoder.layers.{}.post_feedforward_layernorm", "v.blk.{}.ffn_post_norm"),
    same("vision_tower.encoder.layers.{}.layer_scalar", "v.blk.{}.out_scale.weight"),
    same("vision_tower.std_bias", "v.std_bias"),
    same("vision_tower.std_scale", "v.std_scale"),
    same("embed_vision.embedding_projection", "mm.input_projection"),
];

const HEARS: &[Rule] = &[
    typed("audio_tower.subsample_conv_projection.layer{}.conv.weight", "a.conv1d.{}.weight", Ty::F32),
    same("audio_tower.subsample_conv_projection.layer{}.norm", "a.conv1d.{}.norm"),
    typed("audio_tower.subsample_conv_projection.input_proj_linear.weight", "a.input_projection.weight", Ty::F32),
    same("audio_tower.output_proj", "a.pre_encode.out"),
    same("audio_tower.layers.{}.feed_forward1.pre_layer_norm", "a.blk.{}.ffn_norm"),
    same("audio_tower.layers.{}.feed_forward1.post_layer_norm", "a.blk.{}.ffn_post_norm"),
    same("audio_tower.layers.{}.feed_forward1.ffw_layer_1", "a.blk.{}.ffn_up"),
    same("audio_tower.layers.{}.feed_forward1.ffw_layer_2", "a.blk.{}.ffn_down"),
    same("audio_tower.layers.{}.feed_forward2.pre_layer_norm", "a.blk.{}.ffn_norm_1"),
    same("audio_tower.layers.{}.feed_forward2.post_layer_norm", "a.blk.{}.ffn_post_norm_1"),
    same("audio_tower.layers.{}.feed_forward2.ffw_layer_1", "a.blk.{}.ffn_up_1"),
    same("audio_tower.layers.{}.feed_forward2.ffw_layer_2", "a.blk.{}.ffn_down_1"),
    same("audio_tower.layers.{}.self_attn.q_proj", "a.blk.{}.attn_q"),
    same("audio_tower.layers.{}.self_attn.k_proj", "a.blk.{}.attn_k"),
    same("audio_tower.layers.{}.self_attn.v_proj", "a.blk.{}.attn_v"),
    same("audio_tower.layers.{}.self_attn.post", "a.blk.{}.attn_out"),
    same("audio_tower.layers.{}.self_attn.relative_k_proj", "a.blk.{}.attn_k_rel"),
    made("audio_tower.layers.{}.self_attn.per_dim_scale", "a.blk.{}.per_dim_scale.weight", Make::Softplus),
    made("audio_tower.layers.{}.self_attn.per_dim_key_scale", "a.blk.{}.per_dim_k_scale.weight", Make::Softplus),
    same("audio_tower.layers.{}.lconv1d.pre_layer_norm", "a.blk.{}.conv_norm"),
    same("audio_tower.layers.{}.lconv1d.linear_start", "a.blk.{}.conv_pw1"),
    Rule {
        from: "audio_tower.layers.{}.lconv1d.depthwise_conv1d.weight",
        to: "a.blk.{}.conv_dw.weight",
        make: Make::Squeezed,
        ty: Ty::F32,
    },
    same("audio_tower.layers.{}.lconv1d.conv_norm", "a.blk.{}.norm_conv"),
    same("audio_tower.layers.{}.lconv1d.linear_end", "a.blk.{}.conv_pw2"),
    same("audio_tower.layers.{}.norm_pre_attn", "a.blk.{}.attn_pre_norm"),
    same("audio_tower.layers.{}.norm_post_attn", "a.blk.{}.attn_post_norm"),
    same("audio_tower.layers.{}.norm_out", "a.blk.{}.ln2"),
    same("embed_audio.embedding_projection", "mm.a.input_projection"),
];

/// Gemma 4.
pub(super) const GEMMA4: Kind = Kind {
    id: "gemma4v",
    model_types: &["gemma4"],
    architectures: &["gemma4"],
    prefixes: &["vision_tower.", "embed_vision.", "audio_tower.", "embed_audio."],
    rules: &[SEES, HEARS],
    hears: true,
    settings: |said, out| {
        // Pictures may have any size, and the file has to name one.
        count(out, "image_size", 224);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-6));
        match said.config["audio_config"].is_object() {
            true => hearing(said, out),
            false => Ok(()),
        }
    },
    ..PLAIN
};

/// What a file says of what hears.
fn hearing(said: &Said<'_>, out: &mut Metadata) -> Result<(), String> {
    let audio = &said.config["audio_config"];
    let of = |key: &str, usual: Option<i64>| {
        let found = integer(&audio[key]).or(usual).and_then(|found| u32::try_from(found).ok());
        found.ok_or_else(|| format!("audio_config of config.json has no {key} that is a count"))
    };
    flag(out, "has_audio_encoder");
    out.push(("clip.audio.projector_type".to_owned(), MetadataValue::String("gemma4a".to_owned())));
    let hidden = of("hidden_size", Some(1024))?;
    let wide = integer(&said.text["hidden_size"]).and_then(|wide| u32::try_from(wide).ok());
    let counts = [
        ("projection_dim", wide.ok_or("config.json does not say the hidden_size of the language model")?),
        ("embedding_length", hidden),
        ("feed_forward_length", hidden * 4),
        ("block_count", of("num_hidden_layers", Some(12))?),
        ("attention.head_count", of("num_attention_heads", Some(8))?),
        ("num_mel_bins", of("input_feat_size", Some(128))?),
    ];
    out.extend(counts.map(|(key, count)| (format!("clip.audio.{key}"), MetadataValue::U32(count))));
    let eps = real(&audio["layer_norm_eps"]).unwrap_or(1e-6) as f32;
    out.push(("clip.audio.attention.layer_norm_epsilon".to_owned(), MetadataValue::F32(eps)));
    Ok(())
}
