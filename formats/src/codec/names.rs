//! Naming many modules in few words: by what they are called inside every decoder block, else one by one.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::QuantizedModule;
use crate::encoding::Encoding;
use crate::grid::Scheme;

/// Linears that vLLM merges into one, and what it calls the result.
const FUSED: &[(&str, &[&str])] =
    &[("qkv_proj", &["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", &["gate_proj", "up_proj"])];

/// All modules of one encoding.
pub(super) struct Selection {
    pub encoding: Encoding,
    pub desc_act: bool,
    pub names: NameSet,
}

/// A set of modules.
pub(super) struct NameSet {
    /// `mlp.down_proj`: all linears so called, in whatever block, are in the set.
    tails: Vec<String>,
    /// Full names of the rest.
    exact: Vec<String>,
    /// Those beside the blocks, without what stands before them: vLLM has some of `model` in `model.self_decoder`.
    beside: Vec<String>,
    /// Whether runtimes may put another prefix before the blocks.
    wrapped: bool,
}

impl Selection {
    /// The integers that it is of.
    ///
    /// # Panics
    /// If it is of anything else, which the caller's [`Codec::supports`](super::Codec::supports) refuses.
    pub fn scheme(&self) -> Scheme {
        self.encoding.scheme().expect("integers in groups")
    }
}

/// The modules grouped by encoding, the encoding with the most modules first.
pub(super) fn by_encoding(modules: &[QuantizedModule<'_>], others: &[String]) -> Vec<Selection> {
    let (components, others): (Vec<&str>, Vec<&str>) = others.iter().map(String::as_str).partition(|n| is_component(n));
    let all: Vec<&str> = modules.iter().map(|m| m.name).chain(others).collect();
    let wrapped = !components.is_empty();
    let mut keys: Vec<((Encoding, bool), Vec<&str>)> = Vec::new();
    for module in modules {
        let key = (module.encoding, module.desc_act);
        match keys.iter_mut().find(|(k, _)| *k == key) {
            Some((_, names)) => names.push(module.name),
            None => keys.push((key, vec![module.name])),
        }
    }
    keys.sort_by_key(|(_, names)| std::cmp::Reverse(names.len()));
    keys.into_iter()
        .map(|((encoding, desc_act), names)| Selection {
            encoding,
            desc_act,
            names: NameSet::new(&names, &all, wrapped),
        })
        .collect()
}

/// The rules under GPTQModel's `dynamic` for what is left as it is, of which the first that fits holds. Components stand first, for a tower's
/// linears may be called as the language model's are. The head has a setting of its own.
pub(super) fn left_out(modules: &[QuantizedModule<'_>], unquantized_linears: &[String]) -> Map<String, Value> {
    let (components, others): (Vec<&str>, Vec<&str>) =
        unquantized_linears.iter().map(String::as_str).partition(|name| is_component(name));
    let left: Vec<&str> = others.into_iter().filter(|name| !name.ends_with("lm_head")).collect();
    let all: Vec<&str> = modules.iter().flat_map(QuantizedModule::names).chain(left.iter().copied()).collect();
    let patterns = NameSet::new(&left, &all, !components.is_empty()).patterns();
    let patterns = components.iter().map(|component| anywhere(component)).chain(patterns);
    patterns.map(|pattern| (format!("-:{pattern}"), json!({}))).collect()
}

/// The part of a module's name after the block's number, or `None` outside the blocks.
pub(super) fn tail(name: &str) -> Option<&str> {
    let mut rest = name;
    while let Some((head, after)) = rest.split_once('.') {
        if !head.is_empty() && head.bytes().all(|b| b.is_ascii_digit()) {
            return Some(after);
        }
        rest = after;
    }
    None
}

/// Whether the name of a module says that it is in an expert of a mixture; experts that all tokens pass are not among these.
pub fn is_expert(module: &str) -> bool {
    module.contains(".experts.")
}

/// Whether a name stands for all modules under it.
pub(super) fn is_component(name: &str) -> bool {
    name.ends_with('.')
}

/// The part of a name that every runtime has in it, from the list of blocks on: Transformers says
/// `model.language_model.layers.0`, vLLM `language_model.model.layers.0`, and files either, or less.
pub(super) fn core(name: &str) -> &str {
    match tail(name) {
        Some(tail) => {
            let head = name[..name.len() - tail.len()].trim_end_matches('.');
            let start = |end: usize| head[..end].rfind('.').map_or(0, |dot| dot + 1);
            let list = head.rfind('.').map_or(0, start);
            // Layers that predict further tokens may have a list of their own, which is called like that of the others.
            let own = if head[..list].ends_with(".mtp.") || &head[..list] == "mtp." { start(list - 1) } else { list };
            &name[own..]
        }
        None => name.strip_prefix("model.").filter(|_| is_component(name)).unwrap_or(name),
    }
}

/// A regular expression for a component, or for one module, under whatever prefix.
pub(super) fn anywhere(name: &str) -> String {
    let end = if is_component(name) { ".*" } else { "$" };
    format!(r"(.*\.)?{}{end}", escape(core(name)))
}

impl NameSet {
    /// `names` among `all` modules there are, which runtimes may keep under another prefix when they are `wrapped`.
    pub fn new(names: &[&str], all: &[&str], wrapped: bool) -> NameSet {
        let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for t in names.iter().filter_map(|name| tail(name)) {
            counts.entry(t).or_default().0 += 1;
        }
        // A pattern finds what it says after any number in a name, be it an expert's.
        for name in all {
            let mut rest = *name;
            while let Some(t) = tail(rest) {
                counts.entry(t).or_default().1 += 1;
                rest = t;
            }
        }
        let whole = |t: &str| counts.get(t).is_some_and(|(here, everywhere)| here == everywhere && *here > 0);
        let mut set = NameSet { tails: Vec::new(), exact: Vec::new(), beside: Vec::new(), wrapped };
        let alone = |own: &&str| !all.iter().any(|other| is_or_ends_in(other, own) && !names.contains(other));
        for name in names {
            match (tail(name).filter(|t| whole(t)), beside(name).filter(alone)) {
                (Some(t), _) if set.tails.iter().any(|known| known == t) => {}
                (Some(t), _) => set.tails.push(t.into()),
                (None, Some(own)) => set.beside.push(own.into()),
                (None, None) => set.exact.push((*name).into()),
            }
        }
        set
    }

    /// Targets of compressed-tensors: module names, and `re:` with a regular expression.
    pub fn targets(&self) -> Vec<String> {
        let tails = self.tails.iter().map(|t| format!("re:{}", tail_pattern(t)));
        let exact =
            self.exact.iter().map(|name| if self.wrapped { format!("re:{}", anywhere(name)) } else { name.clone() });
        let beside = self.beside.iter().map(|own| format!("re:{}", anywhere(own)));
        tails.chain(exact).chain(beside).collect()
    }

    /// Regular expressions for the modules, and for what vLLM calls those it merges.
    pub fn patterns(&self) -> Vec<String> {
        let tails = with_fused(&self.tails).into_iter().map(|t| tail_pattern(&t));
        let exact = with_fused(&self.exact).into_iter();
        let exact = exact.map(|name| if self.wrapped { anywhere(&name) } else { format!("^{}$", escape(&name)) });
        tails.chain(exact).chain(self.beside.iter().map(|own| anywhere(own))).collect()
    }
}

fn is_or_ends_in(name: &str, own: &str) -> bool {
    name.strip_suffix(own).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// What a module beside the blocks of a text model is called in it.
pub(super) fn beside(name: &str) -> Option<&str> {
    let mut own = name;
    while let Some(rest) = ["model.", "language_model."].iter().find_map(|part| own.strip_prefix(part)) {
        own = rest;
    }
    (own != name && tail(name).is_none() && !is_component(name)).then_some(own)
}

fn tail_pattern(tail: &str) -> String {
    format!(r".*\.\d+\.{}$", escape(tail))
}

fn with_fused(names: &[String]) -> Vec<String> {
    let mut out = names.to_vec();
    for name in names {
        for (fused, members) in FUSED {
            let Some(prefix) = name.strip_suffix(members[0]) else { continue };
            if members.iter().all(|member| names.contains(&format!("{prefix}{member}"))) {
                out.push(format!("{prefix}{fused}"));
            }
        }
    }
    out
}

fn escape(name: &str) -> String {
    name.replace('.', r"\.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_start_after_the_block_number() {
        assert_eq!(tail("model.layers.11.mlp.down_proj"), Some("mlp.down_proj"));
        assert_eq!(tail("model.layers.0.mlp.experts.3.w1"), Some("mlp.experts.3.w1"));
        assert_eq!(tail("lm_head"), None);
    }

    #[test]
    fn a_set_is_named_by_tails_where_it_has_all_of_them() {
        let all = [
            "m.0.q_proj",
            "m.0.k_proj",
            "m.0.v_proj",
            "m.0.o",
            "m.1.q_proj",
            "m.1.k_proj",
            "m.1.v_proj",
            "m.1.o",
            "lm_head",
        ];
        let set = NameSet::new(&["m.0.q_proj", "m.1.q_proj", "m.0.o", "lm_head"], &all, false);
        assert_eq!(set.targets(), [r"re:.*\.\d+\.q_proj$", "m.0.o", "lm_head"]);
        let set = NameSet::new(&["m.1.q_proj", "m.1.k_proj", "m.1.v_proj"], &all, false);
        assert_eq!(set.patterns(), [r"^m\.1\.q_proj$", r"^m\.1\.k_proj$", r"^m\.1\.v_proj$", r"^m\.1\.qkv_proj$"]);
    }

    #[test]
    fn a_set_is_not_named_by_what_an_expert_has_as_well() {
        let all = ["m.0.gate", "m.1.gate", "m.1.experts.3.gate"];
        assert_eq!(NameSet::new(&all[..2], &all, false).targets(), ["m.0.gate", "m.1.gate"]);
        assert_eq!(NameSet::new(&all[2..], &all, false).targets(), [r"re:.*\.\d+\.experts\.3\.gate$"]);
        assert_eq!(NameSet::new(&all[..2], &all[..2], false).targets(), [r"re:.*\.\d+\.gate$"]);
    }

    #[test]
    fn a_module_beside_the_blocks_is_named_by_what_it_is_called_alone() {
        let all = ["model.layers.0.up", "model.layers.0.fc", "model.up_projections.0", "model.fc", "mtp.fc"];
        assert_eq!(NameSet::new(&all[2..3], &all, false).targets(), [r"re:(.*\.)?up_projections\.0$"]);
        assert_eq!(NameSet::new(&all[3..], &all, false).targets(), ["model.fc", "mtp.fc"]);
        let inner = ["model.language_model.up_projections.0"];
        assert_eq!(NameSet::new(&inner, &inner, true).targets(), [r"re:(.*\.)?up_projections\.0$"]);
    }

    #[test]
    fn a_wrapped_module_is_named_by_what_all_runtimes_call_it() {
        assert_eq!(anywhere("vision_tower."), r"(.*\.)?vision_tower\..*");
        assert_eq!(anywhere("model.visual."), r"(.*\.)?visual\..*");
        assert_eq!(anywhere("model.layers.3."), r"(.*\.)?layers\.3\..*");
        assert_eq!(anywhere("language_model.model.layers.3.mlp.up_proj"), r"(.*\.)?layers\.3\.mlp\.up_proj$");
        assert_eq!(core("h.0.mlp.c_fc"), "h.0.mlp.c_fc");
        for other in ["mtp.layers.0.mlp.up_proj", "model.mtp.layers.0.mlp.up_proj"] {
            assert_eq!(core(other), "mtp.layers.0.mlp.up_proj");
        }
        assert_eq!(core("language_model.lm_head"), "language_model.lm_head");
        let set = NameSet::new(&["a.m.1.q"], &["a.m.0.q", "a.m.1.q"], true);
        assert_eq!(set.targets(), [r"re:(.*\.)?m\.1\.q$"]);
        assert_eq!(set.patterns(), [r"(.*\.)?m\.1\.q$"]);
    }
}
