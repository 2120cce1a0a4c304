//! What transformers makes of tensors as it loads them, by their names: it calls some otherwise than files do, so that a
//! configuration which leaves a module out has to name it so too; and it splits or joins matrices, which it cannot do to packed ones.
//!
//! `renames.json` is made from transformers' own conversions by `tests/fixtures/make_renames.py`.

use std::collections::HashMap;
use std::sync::LazyLock;

use fancy_regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use super::{settings, type_of};

static TABLE: LazyLock<HashMap<String, Vec<Told>>> =
    LazyLock::new(|| serde_json::from_str(include_str!("renames.json")).expect("a committed file"));

/// Whether transformers renames what it loads of a model of this type.
pub(super) fn has(model_type: &str) -> bool {
    TABLE.contains_key(model_type)
}

/// How one class of a model type is loaded, as the table has it.
#[derive(Deserialize)]
struct Told {
    /// The classes that are loaded so.
    classes: Vec<String>,
    /// PEFT does the same to the names in an adapter.
    adapters: bool,
    base: String,
    steps: Vec<(Option<String>, String, Vec<String>, Kind)>,
    tied: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
enum Kind {
    #[serde(rename = "")]
    Renames,
    /// Splits, joins or turns a matrix.
    #[serde(rename = "changes")]
    Changes,
    /// Does so and is found by the name of the weight itself, whose sources transformers takes for packed ones where it loads
    /// compressed-tensors.
    #[serde(rename = "changes weights")]
    ChangesWeights,
}

struct Step {
    /// Prefixes of the names that it is done in, one of which is left out of what the pattern sees.
    scopes: Vec<String>,
    pattern: Regex,
    targets: &'static [String],
    kind: Kind,
}

/// What transformers makes of the tensors of one model.
#[derive(Default)]
pub struct Loading {
    /// The steps of each class that may load it.
    ways: Vec<Vec<Step>>,
    tied: Vec<&'static str>,
}

impl Loading {
    /// Of the model that this config.json describes, and of its text.
    pub fn of(config: &Value) -> Loading {
        let text = settings(config).map(|settings| settings.model_type).unwrap_or_default();
        let outer = type_of(config).filter(|outer| *outer != text);
        let told = outer.into_iter().chain([&text[..]]).filter_map(|model_type| TABLE.get(model_type)).flatten();
        let mut loading = Loading::default();
        for Told { base, steps, tied, .. } in told {
            loading.tied.extend(tied.iter().map(|name| &name[..]));
            loading.ways.push(steps.iter().map(|step| Step::new(base, step)).collect());
        }
        loading
    }

    /// The names by which transformers knows a module of a file once it is loaded, where that is not the file's.
    pub fn names(&self, module: &str) -> Vec<String> {
        let weight = format!("{module}.weight");
        let names = self.ways.iter().flat_map(|way| loaded(way, &weight).0);
        let mut names: Vec<String> = names
            .filter(|name| *name != weight)
            .filter_map(|name| name.strip_suffix(".weight").map(str::to_owned))
            .collect();
        names.dedup();
        names
    }

    /// What a tensor of a file is called, or what holds it with others, once transformers has loaded it, where that is not the file's name.
    pub fn in_memory(&self, tensor: &str) -> Vec<String> {
        let names = self.ways.iter().flat_map(|way| loaded(way, tensor).0);
        // A stack of experts is a parameter by itself.
        let bare = |name: String| [name.strip_suffix(".weight").map(str::to_owned), Some(name)];
        let mut names: Vec<String> = names.flat_map(bare).flatten().filter(|name| name != tensor).collect();
        names.dedup();
        names
    }

    /// Whether a module's matrix is split, joined or turned.
    pub fn changes(&self, module: &str) -> bool {
        let weight = format!("{module}.weight");
        self.ways.iter().any(|way| loaded(way, &weight).1.is_some())
    }

    /// Linears that share another tensor and have none, where they have no usual name.
    pub fn tied(&self) -> &[&'static str] {
        &self.tied
    }

    /// Whether loading compressed-tensors fails whatever is packed: transformers wants to unpack what it joins even where that is
    /// plain, and what it splits even where there is none of it.
    pub fn refuses_packed<'n>(&self, tensors: impl IntoIterator<Item = &'n str>) -> bool {
        let mut steps = self.ways.iter().flatten();
        let splits = steps.any(|step| step.kind == Kind::ChangesWeights && step.targets.len() > 1);
        let joined = |name| self.ways.iter().any(|way| loaded(way, name).1 == Some(Kind::ChangesWeights));
        splits || tensors.into_iter().any(joined)
    }
}

/// What PEFT calls the modules of one model: as transformers calls them once they are loaded.
pub struct AdapterNames {
    /// The steps of its class; of each class of its type where it is not known.
    ways: Vec<Vec<Step>>,
    /// PEFT does them to the names in an adapter, too.
    converts: bool,
}

impl AdapterNames {
    /// Of the model that this config.json describes, loaded by the class that it names.
    pub fn of(config: &Value) -> AdapterNames {
        let class = config.pointer("/architectures/0").and_then(Value::as_str).unwrap_or_default();
        let all = type_of(config).and_then(|model_type| TABLE.get(model_type)).map_or(&[][..], |told| &told[..]);
        let own: Vec<&Told> = all.iter().filter(|told| told.classes.iter().any(|known| known == class)).collect();
        let told = if own.is_empty() { all.iter().collect() } else { own };
        let steps = |told: &&'static Told| told.steps.iter().map(|step| Step::new(&told.base, step)).collect();
        AdapterNames { ways: told.iter().map(steps).collect(), converts: told.iter().any(|told| told.adapters) }
    }

    /// Whether modules have other names in files.
    pub fn differ(&self) -> bool {
        !self.ways.is_empty()
    }

    /// What a module of a file is called, for each way in which the model may be loaded.
    pub fn in_memory(&self, module: &str) -> Vec<String> {
        if self.ways.is_empty() {
            return vec![module.to_owned()];
        }
        let weight = format!("{module}.weight");
        let names = self.ways.iter().flat_map(|way| loaded(way, &weight).0);
        let mut names: Vec<String> =
            names.map(|name| name.strip_suffix(".weight").map_or_else(|| module.to_owned(), str::to_owned)).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The modules that PEFT takes a module of an adapter for. It renames factors as the weights of older files are renamed, where the type of
    /// the model is registered for that, but not where that only takes something off the front.
    pub fn taken_for(&self, module: &str) -> Vec<String> {
        if !self.converts {
            return vec![module.to_owned()];
        }
        const PART: &str = ".lora_A.default.weight";
        let renamed = |way: &Vec<Step>| {
            let mut name = format!("{module}{PART}");
            for step in way.iter().filter(|step| step.kind == Kind::Renames) {
                name = step.done(&name).and_then(|names| names.into_iter().next()).unwrap_or(name);
            }
            let name = name.strip_suffix(PART).unwrap_or(module);
            if format!("base_model.model.{module}").ends_with(name) { module.to_owned() } else { name.to_owned() }
        };
        self.ways.iter().map(renamed).collect()
    }
}

/// What a tensor becomes, and the kind of the step that changes it.
fn loaded(way: &[Step], tensor: &str) -> (Vec<String>, Option<Kind>) {
    let mut name = tensor.to_owned();
    for step in way.iter().filter(|step| step.kind == Kind::Renames) {
        if let Some(renamed) = step.done(&name) {
            name = renamed.into_iter().next().expect("a target for each");
        }
    }
    let mut changes = way.iter().filter(|step| step.kind != Kind::Renames);
    match changes.find_map(|step| Some((step.done(&name)?, step.kind))) {
        Some((names, kind)) => (names, Some(kind)),
        None => (vec![name], None),
    }
}

impl Step {
    fn new(base: &str, (scope, pattern, targets, kind): &'static (Option<String>, String, Vec<String>, Kind)) -> Step {
        let dotted = |part: &str| if part.is_empty() { String::new() } else { format!("{part}.") };
        let scopes = match scope {
            Some(scope) => vec![dotted(base) + &dotted(scope), dotted(scope)],
            None => vec![String::new()],
        };
        Step { scopes, pattern: Regex::new(pattern).expect("a committed file"), targets, kind: *kind }
    }

    /// The names that this one becomes; `None` where it is not concerned.
    fn done(&self, name: &str) -> Option<Vec<String>> {
        let scope = self.scopes.iter().find(|scope| name.starts_with(&scope[..]))?;
        let rest = &name[scope.len()..];
        let found = self.pattern.captures(rest).ok()??;
        let group = found.iter().skip(1).flatten().next().map_or("", |group| group.as_str());
        let named = |target: &String| scope.clone() + &rest.replacen(&found[0], &target.replace(r"\1", group), 1);
        Some(self.targets.iter().map(named).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(model_type: &str) -> Loading {
        Loading::of(&json!({ "model_type": model_type }))
    }

    #[test]
    fn modules_are_called_as_transformers_loads_them() {
        for (model_type, file, name) in [
            ("phimoe", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router"),
            ("deepseek_v4", "model.layers.1.attn.compressor.wgate", "model.layers.1.self_attn.compressor.gate_proj"),
            ("deepseek_v4", "model.layers.1.attn.wo_a", "model.layers.1.self_attn.o_a_proj"),
            ("hy_v4", "model.layers.1.mlp.shared_experts.linear_gate", "model.layers.1.mlp.shared_experts.gate_proj"),
            ("inkling2_text", "model.llm.layers.0.attn.gate_attn", "model.layers.0.self_attn.gate_proj"),
            ("gemma3n_text", "model.language_model.layers.0.x", "model.layers.0.x"),
            // Models that also see, and parts of them.
            ("paddleocr_vl", "mlp_AR.linear_1", "model.projector.linear_1"),
            ("hyperclovax_vision_v2", "model.vision_projector", "model.projector"),
            ("step3p7", "vit_large_projector", "model.multi_modal_projector"),
            ("lfm3_vl_vision", "patchifier", "patch_embed"),
            // Only its classes have steps, and only in what is theirs.
            ("fuyu", "vision_embed_tokens", "model.vision_embed_tokens"),
            ("ultravbert", "text_model.ultrabert.layers.0.x", "text_model.layers.0.x"),
        ] {
            assert!(
                of(model_type).names(file).contains(&name.to_owned()),
                "{model_type}: {:?}",
                of(model_type).names(file)
            );
        }
        assert!(of("phimoe").names("lm_head").is_empty());
        assert!(of("unheard_of").names("model.layers.0.block_sparse_moe.gate").is_empty());
        // Steps of the text count inside a wrapper that is not known.
        let inside = json!({"model_type": "unheard_of", "text_config": {"model_type": "phimoe"}});
        assert!(!Loading::of(&inside).names("model.layers.0.block_sparse_moe.gate").is_empty());
    }

    #[test]
    fn matrices_that_are_split_become_all_of_their_parts() {
        for (model_type, module, parts) in [
            ("nomic_bert", "encoder.layers.0.attn.Wqkv", ["q_proj", "k_proj", "v_proj"]),
            ("gte", "encoder.layer.0.attention.qkv_proj", ["q_proj", "k_proj", "v_proj"]),
            ("molmo2_text", "layers.0.self_attn.att_proj", ["q_proj", "k_proj", "v_proj"]),
        ] {
            let (loading, names) = (of(model_type), of(model_type).names(module));
            assert!(loading.changes(module), "{model_type}");
            assert!(parts.iter().all(|part| names.iter().any(|name| name.ends_with(part))), "{model_type}: {names:?}");
        }
        let (loading, module) = (of("nomic_bert"), "encoder.layers.0.mlp.fc2");
        assert!(!loading.changes(module));
        assert_eq!(loading.names(module), ["layers.0.mlp.down_proj"]);
    }

    #[test]
    fn what_transformers_joins_by_its_weights_cannot_be_packed_at_all() {
        for (model_type, tensor, refused) in [
            ("hrm_text", "", true),
            ("molmo2_text", "", true),
            ("kimi_linear", "model.layers.0.self_attn.q_conv1d.weight", true),
            ("olmo_hybrid", "model.layers.0.linear_attn.k_conv1d.weight", true),
            ("bailing_hybrid", "model.layers.0.attention.v_conv1d.weight", true),
            ("minimax_m3_vl", "language_model.model.layers.0.mlp.shared_experts.gate_proj.weight", true),
            ("kimi_linear", "model.layers.0.self_attn.q_proj.weight", false),
            ("nomic_bert", "encoder.layers.0.attn.Wqkv.weight", false),
            ("qwen3_moe", "model.layers.0.mlp.experts.0.gate_proj.weight", false),
        ] {
            assert_eq!(of(model_type).refuses_packed([tensor]), refused, "{model_type}");
        }
        assert_eq!(of("luke").tied(), ["entity_predictions.decoder"]);
    }

    /// Held to what PEFT 0.21 loads with transformers 5.23.
    #[test]
    fn modules_of_adapters_are_found_as_peft_finds_them() {
        let layer = "layers.0.self_attn.q_proj";
        let known = |model_type: &str, class: &str, file: &str, module: &str| {
            let names = AdapterNames::of(&json!({"model_type": model_type, "architectures": [class]}));
            let memory = names.in_memory(file);
            names.taken_for(module).iter().any(|name| memory.contains(name))
        };
        for (model_type, class, file, module, expected) in [
            ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "model.", "model.language_model.", true),
            ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "model.", "model.", false),
            (
                "qwen2_5_vl",
                "Qwen2_5_VLForConditionalGeneration",
                "model.language_model.",
                "model.language_model.",
                true,
            ),
            ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "model.language_model.", "model.", false),
            ("gemma3", "Gemma3ForConditionalGeneration", "language_model.model.", "model.language_model.", true),
            ("gemma3", "Gemma3ForConditionalGeneration", "language_model.model.", "language_model.model.", true),
            ("gemma3", "Gemma3ForConditionalGeneration", "language_model.model.", "model.", false),
            (
                "gemma3",
                "Gemma3ForConditionalGeneration",
                "vision_tower.vision_model.encoder.",
                "model.vision_tower.encoder.",
                true,
            ),
            (
                "gemma3",
                "Gemma3ForConditionalGeneration",
                "vision_tower.vision_model.encoder.",
                "vision_tower.vision_model.encoder.",
                true,
            ),
            (
                "gemma3",
                "Gemma3ForConditionalGeneration",
                "vision_tower.vision_model.encoder.",
                "vision_model.encoder.",
                false,
            ),
            ("gemma3n_text", "Gemma3nForCausalLM", "model.language_model.", "model.", true),
            ("gemma3n_text", "Gemma3nForCausalLM", "model.language_model.", "model.language_model.", false),
            ("llama", "LlamaForCausalLM", "model.", "model.", true),
            ("llama", "LlamaForCausalLM", "model.", "language_model.model.", false),
        ] {
            let found = known(model_type, class, &format!("{file}{layer}"), &format!("{module}{layer}"));
            assert_eq!(found, expected, "{class}: {file} and {module}");
        }
    }

    #[test]
    fn every_step_can_be_done() {
        TABLE.keys().for_each(|model_type| drop(of(model_type).names("model.layers.0.x")));
    }
}
