//! What llama.cpp takes from a model's name (`general.name`): which special tokens take the spaces beside them along.

use std::collections::HashSet;

use crate::tokenizer::added::Added;

/// A rule that a name brings about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// All special tokens but three take the spaces behind them along.
    Phi3,
    /// `[MASK]` takes those before it.
    ModernBert,
}

const RULES: &[(&str, Rule)] = &[("phi-3", Rule::Phi3), ("phi3", Rule::Phi3), ("modern-bert", Rule::ModernBert)];

impl Rule {
    /// The rule for a model of this name.
    pub fn of(name: &str) -> Option<Rule> {
        let name = name.to_ascii_lowercase();
        RULES.iter().find(|(part, _)| name.contains(part)).map(|(_, rule)| *rule)
    }

    /// Tokens without which llama.cpp fails to load a file of such a name.
    pub fn needs(self) -> &'static [&'static str] {
        match self {
            Rule::Phi3 => &["</s>", "<unk>", "<s>", "<|endoftext|>"],
            Rule::ModernBert => &[],
        }
    }

    /// Whether a special token takes the spaces before and behind it along.
    pub fn strips(self, token: &str) -> [bool; 2] {
        match self {
            Rule::Phi3 => [false, !["<unk>", "<s>", "<|endoftext|>"].contains(&token)],
            Rule::ModernBert => [token == "[MASK]", false],
        }
    }
}

/// The rule for a model of this name, where it suits the vocabulary and what is known of its added tokens.
pub(crate) fn suitable<'t>(
    name: &str,
    vocabulary: &HashSet<&str>,
    added: impl Iterator<Item = &'t Added>,
) -> Option<Rule> {
    let rule = Rule::of(name).filter(|rule| rule.needs().iter().all(|token| vocabulary.contains(token)))?;
    let (mut with, mut without) = (0, 0);
    for token in added {
        let strips = [token.lstrip, token.rstrip];
        with += usize::from(strips != rule.strips(&token.content));
        without += usize::from(strips != [false, false]);
    }
    (with <= without).then_some(rule)
}

/// A name for which there is no rule, as near to this one as can be.
pub(crate) fn without_rule(name: &str) -> String {
    let mut name = name.to_owned();
    let found = |name: &str| {
        let lower = name.to_ascii_lowercase();
        RULES.iter().find_map(|(part, _)| Some((lower.find(part)?, *part)))
    };
    while let Some((at, part)) = found(&name) {
        let cut = part.find('-').unwrap_or(part.len() - 1);
        let rest = at + cut + usize::from(part.contains('-'));
        name.replace_range(at + cut..rest, " ");
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_changed_as_little_as_can_be() {
        for (name, other) in [
            ("phi3 6M", "phi 3 6M"),
            ("My Phi-3 of PHI3", "My Phi 3 of PHI 3"),
            ("x/Modern-BERT-base", "x/Modern BERT-base"),
            ("Phi 3 Mini", "Phi 3 Mini"),
        ] {
            assert_eq!(without_rule(name), other);
            assert_eq!(Rule::of(other), None);
        }
    }

    #[test]
    fn a_rule_needs_its_tokens_and_tokens_that_behave_so() {
        let all: HashSet<&str> = ["</s>", "<unk>", "<s>", "<|endoftext|>", "<|user|>"].into();
        let token = |content: &str, rstrip| Added { rstrip, ..Added::new(content, true) };
        let eager = [token("<s>", false), token("<|user|>", true)];
        assert_eq!(suitable("Phi-3-mini", &all, eager.iter()), Some(Rule::Phi3));
        assert_eq!(suitable("a model", &all, eager.iter()), None);
        assert_eq!(suitable("phi3", &all, [token("<|user|>", false)].iter()), None);
        let mut fewer = all.clone();
        fewer.remove("<unk>");
        assert_eq!(suitable("Phi-3-mini", &fewer, eager.iter()), None);
    }
}
