//! Whisper's encoder, which hears: Qwen2-Audio and Voxtral.

use formats::container::gguf::MetadataValue;

use super::{Kind, Make, Metadata, PLAIN, Rule, Said, Ty, made, same, typed};
use crate::json::real;

const ENCODER: &[Rule] = &[
    typed("audio_tower.conv{}.weight", "a.conv1d.{}.weight", Ty::F16),
    made("audio_tower.conv{}.bias", "a.conv1d.{}.bias", Make::Column),
    typed("audio_tower.embed_positions.weight", "a.position_embd.weight", Ty::F32),
    same("audio_tower.layers.{}.self_attn.q_proj", "a.blk.{}.attn_q"),
    same("audio_tower.layers.{}.self_attn.k_proj", "a.blk.{}.attn_k"),
    same("audio_tower.layers.{}.self_attn.v_proj", "a.blk.{}.attn_v"),
    same("audio_tower.layers.{}.self_attn.out_proj", "a.blk.{}.attn_out"),
    same("audio_tower.layers.{}.self_attn_layer_norm", "a.blk.{}.ln1"),
    same("audio_tower.layers.{}.final_layer_norm", "a.blk.{}.ln2"),
    same("audio_tower.layers.{}.fc1", "a.blk.{}.ffn_up"),
    same("audio_tower.layers.{}.fc2", "a.blk.{}.ffn_down"),
    same("audio_tower.layer_norm", "a.post_ln"),
    same("multi_modal_projector.linear", "mm.a.fc"),
    same("multi_modal_projector.linear_{}", "mm.a.mlp.{}"),
];

/// Qwen2-Audio.
pub(super) const QWEN2_AUDIO: Kind = Kind {
    id: "qwen2a",
    model_types: &["qwen2_audio"],
    architectures: &["qwen2"],
    prefixes: &["audio_tower.", "multi_modal_projector."],
    rules: &[ENCODER],
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
