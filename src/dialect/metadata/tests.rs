//! What is written of shapes and positions, and what is refused.

use super::*;
use crate::dialect::names::plan;
use crate::families::build;
use serde_json::json;

fn config(change: impl FnOnce(&mut Value)) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 100, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "head_dim": 32, "rope_theta": 500000.0, "tie_word_embeddings": true,
    });
    change(&mut config);
    config
}

fn written(config: &Value) -> Written {
    let graph = build(config).unwrap();
    let about = About { name: Some("tiny".to_owned()), license: Some("mit".to_owned()) };
    metadata(&graph, config, &plan(&graph).unwrap(), &about, 15, None).unwrap()
}

#[test]
fn a_llama_has_every_key_with_its_type() {
    let (u32, f32, string) = (MetadataValue::U32, MetadataValue::F32, |s: &str| MetadataValue::String(s.to_owned()));
    let expected = [
        ("general.architecture", string("llama")),
        ("general.type", string("model")),
        ("general.name", string("tiny")),
        ("general.size_label", string("136K")),
        ("general.license", string("mit")),
        ("general.file_type", u32(15)),
        ("general.quantization_version", u32(2)),
        ("llama.vocab_size", u32(100)),
        ("llama.context_length", u32(512)),
        ("llama.embedding_length", u32(64)),
        ("llama.block_count", u32(3)),
        ("llama.feed_forward_length", u32(96)),
        ("llama.attention.head_count", u32(4)),
        ("llama.attention.head_count_kv", u32(2)),
        ("llama.attention.key_length", u32(32)),
        ("llama.attention.value_length", u32(32)),
        ("llama.attention.layer_norm_rms_epsilon", f32(1e-5)),
        ("llama.rope.dimension_count", u32(32)),
        ("llama.rope.freq_base", f32(500000.0)),
    ];
    let written = written(&config(|_| ()));
    assert_eq!(written.metadata, expected.map(|(key, value)| (key.to_owned(), value)));
    assert_eq!(written.notices, Vec::<String>::new());
}

#[test]
fn rope_scaling_is_written_where_it_is_a_setting() {
    let linear = written(&config(|c| c["rope_scaling"] = json!({"type": "linear", "factor": 4.0})));
    let find = |key: &str| linear.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    assert_eq!(find("llama.rope.scaling.type"), Some(MetadataValue::String("linear".to_owned())));
    assert_eq!(find("llama.rope.scaling.factor"), Some(MetadataValue::F32(4.0)));
    let llama3 = written(&config(|c| {
        c["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    }));
    assert!(llama3.metadata.iter().all(|(key, _)| !key.contains("scaling")));
}

#[test]
fn what_is_lost_is_told() {
    let window = written(&config(|c| {
        c["model_type"] = "mistral".into();
        c["sliding_window"] = 128.into();
    }));
    assert!(window.notices[0].contains("sliding window of 128 tokens"), "{:?}", window.notices);
    let wide = written(&config(|c| {
        c["model_type"] = "mistral".into();
        c["sliding_window"] = 512.into();
    }));
    assert!(wide.notices.is_empty());
    let unknown = written(&config(|c| c["max_position_embeddings"] = Value::Null));
    assert!(unknown.notices[0].contains("no max_position_embeddings"));
    assert!(unknown.metadata.contains(&("llama.context_length".to_owned(), MetadataValue::U32(2048))));
}

#[test]
fn what_cannot_be_said_is_refused() {
    let config = config(|_| ());
    let refused = |change: &dyn Fn(&mut Graph)| {
        let mut graph = build(&config).unwrap();
        change(&mut graph);
        let written = plan(&graph).and_then(|plan| metadata(&graph, &config, &plan, &About::default(), 0, None));
        written.unwrap_err().to_string()
    };
    let eps = refused(&|graph| graph.final_norm.eps = 1e-3);
    assert_eq!(
        eps,
        "norms with different epsilons cannot be written as GGUF's architecture `llama`, as llama.cpp reads it; give another --format, \
         as compressed-tensors"
    );
    assert!(refused(&|graph| graph.head.linear.bias = true).contains("a bias of `lm_head` cannot"));
    assert!(refused(&|graph| graph.head.scale = 0.5).contains("logits that are multiplied by 0.5 cannot"));
    assert!(refused(&|graph| graph.blocks[1].parallel = true).contains("side by side in block 1 cannot"));
    assert!(refused(&|graph| graph.blocks[2].steps[1].scale = 0.5).contains("multiplied by 0.5 in block 2 cannot"));
    let shape = |graph: &mut Graph, change: &dyn Fn(&mut Attention)| match &mut graph.blocks[0].steps[0].layer {
        Layer::Attention(attention) => change(attention),
        _ => unreachable!(),
    };
    assert!(refused(&|graph| shape(graph, &|a| a.shape.scale = 1.0)).contains("attention scale of 1"));
    assert!(refused(&|graph| drop(graph.blocks[1].steps.pop())).contains("one feed-forward layer each"));
}

#[test]
fn the_importance_matrix_is_recorded() {
    let config = config(|_| ());
    let graph = build(&config).unwrap();
    let plan = plan(&graph).unwrap();
    let importance = ImportanceSource {
        file: "m.gguf".to_owned(),
        dataset: Some("mixed".to_owned()),
        entries: 21,
        chunks: Some(128),
    };
    let written = metadata(&graph, &config, &plan, &About::default(), 15, Some(&importance)).unwrap();
    let last = &written.metadata[written.metadata.len() - 4..];
    let expected = [
        ("quantize.imatrix.file", MetadataValue::String("m.gguf".to_owned())),
        ("quantize.imatrix.dataset", MetadataValue::String("mixed".to_owned())),
        ("quantize.imatrix.entries_count", MetadataValue::U32(21)),
        ("quantize.imatrix.chunks_count", MetadataValue::U32(128)),
    ];
    assert_eq!(last, expected.map(|(key, value)| (key.to_owned(), value)));
}

#[test]
fn sizes_are_labelled_as_models_are() {
    for (n, label) in [
        (134_515_008, "135M"),
        (1_235_814_400, "1.2B"),
        (8_030_261_248, "8.0B"),
        (70_553_706_496, "71B"),
        (400, "0.40K"),
    ] {
        assert_eq!(size_label(n), label);
    }
}
