//! Linears by their names, as users select them.

use regex::Regex;

use crate::error::{Error, Result};

/// The patterns of a recipe, each with the number of linears it matched.
pub struct Patterns {
    /// Of `ignore`.
    pub ignore: Vec<(Pattern, usize)>,
    /// Of `override`.
    pub overrides: Vec<(Pattern, usize)>,
    /// The override that the linear asked for last is to follow.
    chosen: Option<usize>,
    /// What came of each override.
    effects: Vec<Effect>,
}

/// What came of an override.
#[derive(Clone, Debug, Default)]
struct Effect {
    /// Some linear does as it says.
    taken: bool,
    /// Linears of blocks that stay as they are for a runtime's sake.
    whole: Vec<String>,
    /// Others that are not quantized in any case.
    outside: Vec<String>,
}

impl Patterns {
    /// Patterns that have matched nothing yet.
    pub fn new(ignore: Vec<Pattern>, overrides: Vec<Pattern>) -> Patterns {
        let effects = vec![Effect::default(); overrides.len()];
        let [ignore, overrides] = [ignore, overrides].map(|all| all.into_iter().map(|pattern| (pattern, 0)).collect());
        Patterns { ignore, overrides, chosen: None, effects }
    }

    /// Says which override a linear is to follow, if any.
    pub fn choose(&mut self, index: Option<usize>) {
        self.chosen = index;
    }

    /// The linear asked for last does as its override says.
    pub fn taken(&mut self) {
        if let Some(index) = self.chosen {
            self.effects[index].taken = true;
        }
    }

    /// The linear asked for last, `module`, stays as it is whatever is said: `outside` of the blocks, or because runtimes load it so.
    pub fn stays(&mut self, module: &str, outside: bool) {
        let Some(index) = self.chosen else { return };
        let Effect { whole, outside: others, .. } = &mut self.effects[index];
        (if outside { others } else { whole }).push(module.to_owned());
    }

    /// What there is to say of overrides that change nothing of linears that they name; `packed` says which of these have codes after all.
    pub fn without_effect(&self, packed: impl Fn(&str) -> bool) -> Vec<String> {
        let mut notes = Vec::new();
        for ((pattern, _), Effect { taken, whole, outside }) in self.overrides.iter().zip(&self.effects) {
            // A broad pattern names what is never quantized along with the rest.
            let taken = *taken || outside.iter().any(|module| packed(module));
            let (all, why) = match (&whole[..], taken) {
                ([], true) => continue,
                ([], false) => {
                    (outside, "are no linears of the language model's blocks, and stay as they are in this layout")
                }
                _ => (whole, "stay as they are, because vLLM and SGLang load them without codes"),
            };
            notes.extend(all.first().map(|first| {
                let count = all.len();
                format!(
                    "the override `{}` has no effect on linears as `{first}` ({count} in all): they {why}",
                    pattern.text
                )
            }));
        }
        notes
    }

    /// Fails when a pattern matched nothing: it is a typing error, and silence would quantize what was to be spared.
    pub fn check_hits(&self) -> Result<()> {
        match self.ignore.iter().chain(&self.overrides).find(|(pattern, hits)| *hits == 0 && !pattern.optional) {
            Some((pattern, _)) => Err(Error::usage(format!(
                "pattern `{}` matches no linear of the model; `quantc inspect MODEL` lists them",
                pattern.text
            ))),
            None => Ok(()),
        }
    }
}

/// Selects linears by name.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    regex: Option<Regex>,
    /// It may match nothing.
    optional: bool,
}

impl Pattern {
    /// `re:` and a regular expression that must match from the start of the name; else the name or the end of it. With a ? before it, it may
    /// match nothing.
    pub fn new(text: &str) -> Result<Pattern> {
        let (text, optional) = text.strip_prefix('?').map_or((text, false), |text| (text, true));
        let regex = match text.strip_prefix("re:") {
            None => None,
            Some(pattern) => Some(Regex::new(&format!("^(?:{pattern})")).map_err(|e| {
                // The library draws a picture first; its last line says what is wrong.
                let e = e.to_string();
                let why = e.lines().last().unwrap_or_default().trim().trim_start_matches("error: ");
                Error::usage(format!("pattern `{text}` is not a regular expression: {why}"))
            })?),
        };
        Ok(Pattern { text: text.to_owned(), regex, optional })
    }

    /// Whether it selects this module.
    pub fn matches(&self, module: &str) -> bool {
        match &self.regex {
            Some(regex) => regex.is_match(module),
            None => {
                module == self.text || module.strip_suffix(self.text.as_str()).is_some_and(|rest| rest.ends_with('.'))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_parts_of_a_name() {
        let matches = |pattern: &str, module: &str| Pattern::new(pattern).unwrap().matches(module);
        assert!(matches("lm_head", "lm_head"));
        assert!(matches("mlp.down_proj", "model.layers.0.mlp.down_proj"));
        assert!(!matches("proj", "model.layers.0.mlp.down_proj"));
        assert!(matches(r"re:.*layers\.[01]\..*", "model.layers.1.mlp.up_proj"));
        assert!(!matches("re:layers", "model.layers.1.mlp.up_proj"), "from the start, as Python's re.match");
        assert!(matches("?mlp.down_proj", "model.layers.0.mlp.down_proj"));
        let patterns = |text: &str| Patterns::new(vec![Pattern::new(text).unwrap()], Vec::new());
        patterns("?re:vision.*").check_hits().unwrap();
        assert!(
            patterns("re:vision.*").check_hits().unwrap_err().to_string().contains("`re:vision.*` matches no linear")
        );
        assert!(Pattern::new("re:(").unwrap_err().to_string().contains("not a regular expression"));
    }

    #[test]
    fn overrides_that_change_nothing_are_told() {
        let pattern = |text: &str| Pattern::new(text).unwrap();
        let mut patterns = Patterns::new(Vec::new(), vec![pattern("a"), pattern("b"), pattern("c"), pattern("d")]);
        for (index, module, taken, outside) in [
            (0, "x.a", true, false),
            (0, "router.a", false, true),
            (1, "router.b", false, true),
            (2, "y.c", false, false),
            (2, "x.c", true, false),
            (3, "tower.d", false, true),
        ] {
            patterns.choose(Some(index));
            if taken { patterns.taken() } else { patterns.stays(module, outside) }
        }
        patterns.choose(None);
        patterns.stays("other", false);
        let told = patterns.without_effect(|module| module == "tower.d");
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("the override `b` has no effect on linears as `router.b` (1 in all)"), "{told:?}");
        assert!(told[1].contains("`c` has no effect on linears as `y.c`") && told[1].contains("vLLM"), "{told:?}");
    }
}
