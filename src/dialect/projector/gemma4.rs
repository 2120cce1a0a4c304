//! Gemma 4, which sees and, in its smaller sizes, hears; with towers, and without.

use formats::container::gguf::MetadataValue;

use super::computed::{Is, Need};
use super::{Kind, Make, Metadata, PLAIN, Rule, Said, Ty, count, flag, float, free, itself, made, same, typed, weight};
use crate::json::{integer, real};

const SEES: &[Rule] = &[
    made("vision_tower.patch_embedder.input_proj.weight", "v.patch_embd.weight", Make::Pixels),
    itself("vision_tower.patch_embedder.position_embedding_table", "v.position_embd.weight"),
    weight("vision_tower.encoder.layers.{}.self_attn.q_proj", "v.blk.{}.attn_q"),
    weight("vision_tower.encoder.layers.{}.self_attn.k_proj", "v.blk.{}.attn_k"),
    weight("vision_tower.encoder.layers.{}.self_attn.v_proj", "v.blk.{}.attn_v"),
    weight("vision_tower.encoder.layers.{}.self_attn.o_proj", "v.blk.{}.attn_out"),
    weight("vision_tower.encoder.layers.{}.self_attn.q_norm", "v.blk.{}.attn_q_norm"),
    weight("vision_tower.encoder.layers.{}.self_attn.k_norm", "v.blk.{}.attn_k_norm"),
    weight("vision_tower.encoder.layers.{}.mlp.gate_proj", "v.blk.{}.ffn_gate"),
    weight("vision_tower.encoder.layers.{}.mlp.up_proj", "v.blk.{}.ffn_up"),
    weight("vision_tower.encoder.layers.{}.mlp.down_proj", "v.blk.{}.ffn_down"),
    weight("vision_tower.encoder.layers.{}.input_layernorm", "v.blk.{}.ln1"),
    weight("vision_tower.encoder.layers.{}.post_attention_layernorm", "v.blk.{}.attn_post_norm"),
    weight("vision_tower.encoder.layers.{}.pre_feedforward_layernorm", "v.blk.{}.ln2"),
    weight("vision_tower.encoder.layers.{}.post_feedforward_layernorm", "v.blk.{}.ffn_post_norm"),
    free("vision_tower.encoder.layers.{}.layer_scalar", "v.blk.{}.out_scale.weight"),
    free("vision_tower.std_bias", "v.std_bias"),
    free("vision_tower.std_scale", "v.std_scale"),
    weight("embed_vision.embedding_projection", "mm.input_projection"),
];

const HEARS: &[Rule] = &[
    typed("audio_tower.subsample_conv_projection.layer{}.conv.weight", "a.conv1d.{}.weight", Ty::F32),
    weight("audio_tower.subsample_conv_projection.layer{}.norm", "a.conv1d.{}.norm"),
    typed("audio_tower.subsample_conv_projection.input_proj_linear.weight", "a.input_projection.weight", Ty::F32),
    same("audio_tower.output_proj", "a.pre_encode.out"),
    weight("audio_tower.layers.{}.feed_forward1.pre_layer_norm", "a.blk.{}.ffn_norm"),
    weight("audio_tower.layers.{}.feed_forward1.post_layer_norm", "a.blk.{}.ffn_post_norm"),
    weight("audio_tower.layers.{}.feed_forward1.ffw_layer_1", "a.blk.{}.ffn_up"),
    weight("audio_tower.layers.{}.feed_forward1.ffw_layer_2", "a.blk.{}.ffn_down"),
    weight("audio_tower.layers.{}.feed_forward2.pre_layer_norm", "a.blk.{}.ffn_norm_1"),
    weight("audio_tower.layers.{}.feed_forward2.post_layer_norm", "a.blk.{}.ffn_post_norm_1"),
    weight("audio_tower.layers.{}.feed_forward2.ffw_layer_1", "a.blk.{}.ffn_up_1"),
    weight("audio_tower.layers.{}.feed_forward2.ffw_layer_2", "a.blk.{}.ffn_down_1"),
    weight("audio_tower.layers.{}.self_attn.q_proj", "a.blk.{}.attn_q"),
    weight("audio_tower.layers.{}.self_attn.k_proj", "a.blk.{}.attn_k"),
    weight("audio_tower.layers.{}.self_attn.v_proj", "a.blk.{}.attn_v"),
    weight("audio_tower.layers.{}.self_attn.post", "a.blk.{}.attn_out"),
    weight("audio_tower.layers.{}.self_attn.relative_k_proj", "a.blk.{}.attn_k_rel"),
    Rule {
        need: Need::Itself,
        ..made("audio_tower.layers.{}.self_attn.per_dim_scale", "a.blk.{}.per_dim_scale.weight", Make::Softplus)
    },
    Rule {
        need: Need::Nothing,
        ..made("audio_tower.layers.{}.self_attn.per_dim_key_scale", "a.blk.{}.per_dim_k_scale.weight", Make::Softplus)
    },
    weight("audio_tower.layers.{}.lconv1d.pre_layer_norm", "a.blk.{}.conv_norm"),
    weight("audio_tower.layers.{}.lconv1d.linear_start", "a.blk.{}.conv_pw1"),
    Rule {
        from: "audio_tower.layers.{}.lconv1d.depthwise_conv1d.weight",
        to: "a.blk.{}.conv_dw.weight",
        make: Make::Squeezed,
        ty: Ty::F32,
        need: Need::Itself,
    },
    weight("audio_tower.layers.{}.lconv1d.conv_norm", "a.blk.{}.norm_conv"),
    weight("audio_tower.layers.{}.lconv1d.linear_end", "a.blk.{}.conv_pw2"),
    weight("audio_tower.layers.{}.norm_pre_attn", "a.blk.{}.attn_pre_norm"),
    weight("audio_tower.layers.{}.norm_post_attn", "a.blk.{}.attn_post_norm"),
    weight("audio_tower.layers.{}.norm_out", "a.blk.{}.ln2"),
    weight("embed_audio.embedding_projection", "mm.a.input_projection"),
];

/// Gemma 4.
pub(super) const GEMMA4: Kind = Kind {
    id: "gemma4v",
    model_types: &["gemma4"],
    architectures: &["gemma4"],
    prefixes: &["vision_tower.", "embed_vision.", "audio_tower.", "embed_audio."],
    rules: &[SEES, HEARS],
    hears: true,
    computes: &[
        ("/vision_config/hidden_activation", Is::Gelu),
        ("/vision_config/pooling_kernel_size", Is::Number(3.0)),
        ("/vision_config/rope_parameters/rope_theta", Is::Number(100.0)),
        ("/audio_config/hidden_act", Is::Silu),
    ],
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

/// A tensor of all patches at once, whose pixels lie otherwise.
const fn coloured(from: &'static str, to: &'static str) -> Rule {
    Rule { need: Need::Itself, ..made(from, to, Make::Colours) }
}

/// Gemma 4 without towers, which is given patches and pieces of sound as they are.
pub(super) const UNIFIED: Kind = Kind {
    id: "gemma4uv",
    model_types: &["gemma4_unified"],
    prefixes: &["vision_embedder.", "embed_vision.", "embed_audio."],
    rules: &[&[
        coloured("vision_embedder.patch_dense.weight", "v.patch_embd.weight"),
        itself("vision_embedder.patch_dense.bias", "v.patch_embd.bias"),
        coloured("vision_embedder.patch_ln1.weight", "v.patch_norm.1.weight"),
        coloured("vision_embedder.patch_ln1.bias", "v.patch_norm.1.bias"),
        same("vision_embedder.patch_ln2", "v.patch_norm.2"),
        Rule { need: Need::Itself, ..made("vision_embedder.pos_embedding", "v.position_embd.weight", Make::Swapped) },
        same("vision_embedder.pos_norm", "v.patch_norm.3"),
        weight("embed_vision.embedding_projection", "mm.input_projection"),
        weight("embed_audio.embedding_projection", "mm.a.input_projection"),
    ]],
    flat: true,
    usual: &[("mm_embed_dim", 3840), ("patch_size", 16)],
    computes: &[
        ("/vision_config/pooling_kernel_size", Is::Number(3.0)),
        // Samples in a piece of sound.
        ("/audio_config/audio_embed_dim", Is::Number(640.0)),
    ],
    settings: |said, out| {
        // Pictures may have any size, and the file has to name one.
        count(out, "image_size", 224);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-6));
        let audio = &said.config["audio_config"];
        if !audio.is_object() {
            return Ok(());
        }
        let wide = integer(&audio["audio_embed_dim"]).and_then(|wide| u32::try_from(wide).ok());
        heard(said, out, "gemma4ua", [wide.unwrap_or(640), 0, 0, 0, 128])
    },
    ..GEMMA4
};

/// What a file says of what hears, of this kind: its width, that of its feed-forward layers, blocks, heads, and bins.
fn heard(said: &Said<'_>, out: &mut Metadata, kind: &str, counts: [u32; 5]) -> Result<(), String> {
    flag(out, "has_audio_encoder");
    out.push(("clip.audio.projector_type".to_owned(), MetadataValue::String(kind.to_owned())));
    let wide = integer(&said.text["hidden_size"]).and_then(|wide| u32::try_from(wide).ok());
    let wide = wide.ok_or("config.json does not say the hidden_size of the language model")?;
    let keys = ["embedding_length", "feed_forward_length", "block_count", "attention.head_count", "num_mel_bins"];
    let all = keys.into_iter().zip(counts).chain([("projection_dim", wide)]);
    out.extend(all.map(|(key, count)| (format!("clip.audio.{key}"), MetadataValue::U32(count))));
    let eps = real(&said.config["audio_config"]["layer_norm_eps"]).unwrap_or(1e-6) as f32;
    out.push(("clip.audio.attention.layer_norm_epsilon".to_owned(), MetadataValue::F32(eps)));
    Ok(())
}

/// What a file says of what hears.
fn hearing(said: &Said<'_>, out: &mut Metadata) -> Result<(), String> {
    let audio = &said.config["audio_config"];
    let of = |key: &str, usual: Option<i64>| {
        let found = integer(&audio[key]).or(usual).and_then(|found| u32::try_from(found).ok());
        found.ok_or_else(|| format!("audio_config of config.json has no {key} that is a count"))
    };
    let hidden = of("hidden_size", Some(1024))?;
    let [layers, heads] = [of("num_hidden_layers", Some(12))?, of("num_attention_heads", Some(8))?];
    let bins = of("input_feat_size", Some(128))?;
    heard(said, out, "gemma4a", [hidden, hidden * 4, layers, heads, bins])
}
