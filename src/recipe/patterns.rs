//! Linears by their names, as users select them.

use regex::Regex;

use crate::error::{Error, Result};

/// The patterns of a recipe, each with the number of linears it matched.
pub struct Patterns {
    /// Of `ignore`.
    pub ignore: Vec<(Pattern, usize)>,
    /// Of `override`.
    pub overrides: Vec<(Pattern, usize)>,
}

impl Patterns {
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
        let patterns = |text: &str| Patterns { ignore: vec![(Pattern::new(text).unwrap(), 0)], overrides: Vec::new() };
        patterns("?re:vision.*").check_hits().unwrap();
        assert!(
            patterns("re:vision.*").check_hits().unwrap_err().to_string().contains("`re:vision.*` matches no linear")
        );
        assert!(Pattern::new("re:(").unwrap_err().to_string().contains("not a regular expression"));
    }
}
