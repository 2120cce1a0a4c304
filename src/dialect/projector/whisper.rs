//! Whisper's encoder, which hears: Qwen2-Audio and Voxtral.

use formats::container::gguf::MetadataValue;

use super::computed::Is;
use super::{Kind, Make, Metadata, PLAIN, Rule, Said, Ty, made, same, typed, weight};
use crate::json::real;

const ENCODER: &[Rule] = &[
    typed("audio_tower.conv1.weight", "a.conv1d.1.weight", Ty::F16),
    made("audio_tower.conv1.bias", "a.conv1d.1.bias", Make::Column),
    typed("audio_tower.conv2.weight", "a.conv1d.2.weight", Ty::F16),
    made("audio_tower.conv2.bias", "a.conv1d.2.bias", Make::Column),
    typed("audio_tower.embed_positions.weight", "a.position_embd.weight", Ty::F32),
    same("audio_tower.layers.{}.self_attn.q_proj", "a.blk.{}.attn_q"),
    weight("audio_tower.layers.{}.self_attn.k_proj", "a.blk.{}.attn_k"),
    same("audio_tower.layers.{}.self_attn.v_proj", "a.blk.{}.attn_v"),
    same("audio_tower.layers.{}.self_attn.out_proj", "a.blk.{}.attn_out"),
    same("audio_tower.layers.{}.self_attn_layer_norm", "a.blk.{}.ln1"),
    same("audio_tower.layers.{}.final_layer_norm", "a.blk.{}.ln2"),
    same("audio_tower.layers.{}.fc1", "a.blk.{}.ffn_up"),
    same("audio_tower.layers.{}.fc2", "a.blk.{}.ffn_down"),
    same("audio_tower.layer_norm", "a.post_ln"),
];
const ONE: &[Rule] = &[same("multi_modal_projector.linear", "mm.a.fc")];
const TWO: &[Rule] =
    &[weight("multi_modal_projector.linear_1", "mm.a.mlp.1"), weight("multi_modal_projector.linear_2", "mm.a.mlp.2")];

/// Qwen2-Audio.
pub(super) const QWEN2_AUDIO: Kind = Kind {
    id: "qwen2a",
    model_types: &["qwen2_audio"],
    architectures: &["qwen2"],
    prefixes: &["audio_tower.", "multi_modal_projector."],
    rules: &[ENCODER, ONE],
    computes: &[("/audio_config/activation_function", Is::Gelu)],
    // Those of transformers' class, which published files leave out in part.
    usual: &[
        ("d_model", 1280),
        ("encoder_layers", 32),
        ("encoder_attention_heads", 20),
        ("encoder_ffn_dim", 5120),
        ("num_mel_bins", 128),
    ],
    alone: true,
    settings: |said, out| bins(said, out),
    ..PLAIN
};

/// Voxtral.
pub(super) const VOXTRAL: Kind = Kind {
    id: "voxtral",
    model_types: &["voxtral"],
    architectures: &["llama"],
    rules: &[ENCODER, TWO],
    computes: &[("/audio_config/activation_function", Is::Gelu), ("/projector_hidden_act", Is::Gelu)],
    usual: &[
        ("hidden_size", 1280),
        ("num_hidden_layers", 32),
        ("num_attention_heads", 20),
        ("intermediate_size", 5120),
        ("num_mel_bins", 128),
    ],
    settings: |said, out| {
        out.push(("clip.audio.projector.stack_factor".to_owned(), MetadataValue::U32(4)));
        bins(said, out)
    },
    ..QWEN2_AUDIO
};

/// What both say.
fn bins(said: &Said<'_>, out: &mut Metadata) -> Result<(), String> {
    out.push(("clip.audio.num_mel_bins".to_owned(), MetadataValue::U32(said.count(&["num_mel_bins"])?)));
    let eps = real(&said.vision["layer_norm_eps"]).unwrap_or(1e-5) as f32;
    out.push(("clip.audio.attention.layer_norm_epsilon".to_owned(), MetadataValue::F32(eps)));
    Ok(())
}
