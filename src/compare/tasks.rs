//! Questions with several answers, of which a model chooses the one that it finds likeliest for its length.

use std::ops::Range;
use std::path::Path;

use formats::container::file;
use kernels::TokenComparison;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::numbers::share;
use crate::error::{Error, Result};
use crate::text::ModelText;
use crate::verify::mean;

/// What the bundled questions are called.
const BUNDLED: &str = "bundled";

/// Bytes of the largest file of questions that is read (256 MiB).
const LONGEST: u64 = 256 << 20;

/// One question.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What goes before the answer.
    pub prompt: String,
    /// The answers as they follow it.
    pub choices: Vec<String>,
    /// Which of them is right.
    pub gold: usize,
}

/// Where an answer of a question is found among the tokens that are scored.
pub struct Choice {
    /// Its tokens.
    pub tokens: Range<usize>,
}

/// What a model makes of the questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Tasks {
    /// Share of right answers.
    pub accuracy: f64,
    /// Standard error of that share, questions taken as independent.
    pub accuracy_stderr: f64,
    /// That share less the original's.
    pub difference: f64,
    /// Its standard error, from the difference question by question.
    pub difference_stderr: f64,
    /// Questions that the original answers otherwise.
    pub changed: usize,
    /// Those of them that the original has right, and the model has not.
    pub lost: usize,
    /// Those of them that the model has right, and the original has not.
    pub gained: usize,
    /// Tokens of the right answers.
    pub tokens: usize,
    /// Mean KL divergence from the original on them, in nats.
    pub kld_mean: f64,
    /// Standard error of that mean, in nats.
    pub kld_stderr: f64,
    /// Share of them before which both would say the same token.
    pub top1: f64,
    /// The answer to each question, counted from 0.
    pub answers: Vec<usize>,
}

/// The questions of a file, or the bundled ones, and what they are called.
///
/// Fails on a line that is none, with its number.
pub fn questions(path: Option<&str>) -> Result<(String, Vec<Question>)> {
    let Some(path) = path else {
        return Ok((BUNDLED.to_owned(), parse(BUNDLED, include_str!("texts/questions.jsonl"))?));
    };
    let bytes = file::read(Path::new(path), LONGEST).map_err(Error::io(path, "read"))?;
    let text = String::from_utf8(bytes)
        .map_err(|e| Error::failed(format!("{path}: byte {} is no UTF-8", e.utf8_error().valid_up_to())))?;
    Ok((crate::words::called(path).to_owned(), parse(path, &text)?))
}

/// Reads a question a line.
fn parse(name: &str, text: &str) -> Result<Vec<Question>> {
    let mut all = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |why: &str| Error::failed(format!("{name}, line {}: {why}", index + 1));
        let value: Value = serde_json::from_str(line).map_err(|error| wrong(&format!("not valid JSON: {error}")))?;
        all.push(question(&value).map_err(|why| wrong(&why))?);
    }
    match all.len() {
        0 => Err(Error::failed(format!("{name}: there is no question in it"))),
        1 => Err(Error::failed(format!("{name}: one question has no standard error; give at least two"))),
        _ => Ok(all),
    }
}

/// A record in one of the forms that lm-evaluation-harness's tasks have: `query` or `ctx` as it is, `question` between "Question:" and
/// "Answer:", PIQA's `goal` in the same way.
fn question(value: &Value) -> Result<Question, String> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let asked = |text: String| format!("Question: {text}\nAnswer:");
    let prompt = text("query").or_else(|| text("ctx")).or_else(|| text("question").or_else(|| text("goal")).map(asked));
    let prompt = prompt.ok_or("it has none of `query`, `ctx`, `question` and `goal`")?;
    let strings = |value: &Value| -> Option<Vec<String>> {
        value.as_array()?.iter().map(|choice| choice.as_str().map(str::to_owned)).collect()
    };
    let listed = value.get("choices").or_else(|| value.get("endings"));
    // ARC has its answers beside what they are called.
    let names = listed.and_then(|choices| strings(choices.get("label")?));
    let choices = match listed {
        Some(choices) => strings(choices.get("text").unwrap_or(choices)).ok_or("`choices` is no list of texts")?,
        None => text("sol1").into_iter().chain(text("sol2")).collect(),
    };
    if choices.len() < 2 {
        return Err("it has fewer than two choices: `choices`, `endings`, or `sol1` and `sol2`".to_owned());
    }
    if choices.iter().any(|choice| choice.trim().is_empty()) {
        return Err("a choice is empty".to_owned());
    }
    let gold = ["gold", "label", "answer", "answerKey"].iter().find_map(|key| value.get(*key));
    let gold = gold.ok_or("it does not say which choice is right: `gold`, `label`, `answer` or `answerKey`")?;
    let number = gold.as_u64().map(|gold| gold as usize).or_else(|| {
        let gold = gold.as_str()?.trim();
        let named = names.as_ref().and_then(|names| names.iter().position(|name| name == gold));
        let letter = || match gold.as_bytes() {
            [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
            _ => gold.parse().ok(),
        };
        named.or_else(letter)
    });
    let number = number.filter(|number| *number < choices.len());
    let number = number.ok_or_else(|| format!("{gold} is none of its {} choices, counted from 0", choices.len()))?;
    let apart = |choice: String| match prompt.ends_with(char::is_whitespace) || choice.starts_with(char::is_whitespace)
    {
        true => choice,
        false => format!(" {choice}"),
    };
    Ok(Question { choices: choices.into_iter().map(apart).collect(), prompt, gold: number })
}

impl Question {
    /// The ids of the prompt with one answer, behind the mark that the model begins texts with, if it has one, and the positions before
    /// the answer's tokens. Of what is longer than the model can take, the end.
    pub fn tokens(&self, choice: usize, model: &ModelText, longest: usize) -> Result<(Vec<u32>, Range<usize>)> {
        let encode = |text: &str| model.tokenizer.encode(text, false).map_err(crate::text::TextError::from);
        let (prompt, mut ids) = (encode(&self.prompt)?, encode(&format!("{}{}", self.prompt, self.choices[choice]))?);
        let common = prompt.iter().zip(&ids).take_while(|(a, b)| a == b).count().min(ids.len().saturating_sub(1));
        let mut from = common;
        if let Some(bos) = model.tokenizer.added_bos() {
            ids.insert(0, bos);
            from += 1;
        }
        let extra = ids.len().saturating_sub(longest);
        if from <= extra {
            return Err(Error::failed(format!(
                "an answer leaves no room for its question within the {longest} tokens that the model takes, that to `{}`: leave it out, or give \
                 --tasks none",
                self.prompt.chars().take(60).collect::<String>()
            )));
        }
        ids.drain(..extra);
        model.check(&ids)?;
        let scored = from - extra - 1..ids.len() - 1;
        Ok((ids, scored))
    }
}

/// The answer with the largest log-likelihood for each of its letters; the first one on a tie.
fn answer(question: &Question, choices: &[Choice], nll: &[f64]) -> usize {
    let score = |choice: usize| {
        let letters = question.choices[choice].chars().count().max(1) as f64;
        -nll[choices[choice].tokens.clone()].iter().sum::<f64>() / letters
    };
    (1..choices.len()).fold(0, |best, choice| if score(choice) > score(best) { choice } else { best })
}

/// What a model, and what its reference make of the questions, where `found` is of all scored tokens.
pub fn tasks(questions: &[Question], choices: &[Vec<Choice>], found: &TokenComparison) -> [Tasks; 2] {
    let both = questions.iter().zip(choices);
    let answers = |nll: &[f64]| -> Vec<usize> {
        both.clone().map(|(question, choices)| answer(question, choices, nll)).collect()
    };
    let (theirs, ours) = (answers(&found.reference.nll), answers(&found.model.nll));
    let right = |answers: &[usize]| -> Vec<f64> {
        answers.iter().zip(questions).map(|(answer, question)| f64::from(u8::from(*answer == question.gold))).collect()
    };
    let golden: Vec<usize> =
        both.clone().flat_map(|(question, choices)| choices[question.gold].tokens.clone()).collect();
    let kld: Vec<f64> = golden.iter().map(|at| found.kld[*at]).collect();
    let same = golden.iter().filter(|at| found.reference.argmax[**at] == found.model.argmax[**at]).count();
    let made = |answers: Vec<usize>, kld: (f64, f64), same: usize| {
        let (own, reference) = (right(&answers), right(&theirs));
        let apart: Vec<f64> = own.iter().zip(&reference).map(|(own, reference)| own - reference).collect();
        let (accuracy, difference) = (mean(&own), mean(&apart));
        Tasks {
            accuracy: accuracy.0,
            accuracy_stderr: accuracy.1,
            difference: difference.0,
            difference_stderr: difference.1,
            changed: answers.iter().zip(&theirs).filter(|(a, b)| a != b).count(),
            lost: apart.iter().filter(|apart| **apart < 0.0).count(),
            gained: apart.iter().filter(|apart| **apart > 0.0).count(),
            tokens: golden.len(),
            kld_mean: kld.0,
            kld_stderr: kld.1,
            top1: share(same, golden.len()),
            answers,
        }
    };
    [made(ours, mean(&kld), same), made(theirs.clone(), (0.0, 0.0), golden.len())]
}

#[cfg(test)]
mod tests {
    use kernels::TokenLoss;

    use super::*;

    fn of(json: &str) -> Result<Question, String> {
        question(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn records_are_read_in_the_forms_that_tasks_have() {
        let plain = of(r#"{"query": "A cat says", "choices": ["meow", "moo"], "gold": 1}"#).unwrap();
        let expected = Question { prompt: "A cat says".into(), choices: vec![" meow".into(), " moo".into()], gold: 1 };
        assert_eq!(plain, expected);
        let piqa = of(r#"{"goal": "Cut bread.", "sol1": "knife", "sol2": "spoon", "label": 0}"#).unwrap();
        assert_eq!((&piqa.prompt[..], piqa.gold), ("Question: Cut bread.\nAnswer:", 0));
        let swag = of(r#"{"ctx": "He ", "endings": ["runs", "sits"], "label": "1"}"#).unwrap();
        assert_eq!((&swag.choices[0][..], swag.gold), ("runs", 1));
        let arc = r#"{"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}"#;
        assert_eq!(of(arc).unwrap().gold, 1);
        assert_eq!(of(r#"{"question": "Q", "choices": ["x", "y"], "answer": "B"}"#).unwrap().gold, 1);
        for (json, why) in [
            (r#"{"choices": ["x", "y"], "gold": 0}"#, "none of `query`"),
            (r#"{"query": "Q", "choices": ["x"], "gold": 0}"#, "fewer than two"),
            (r#"{"query": "Q", "choices": ["x", 3], "gold": 0}"#, "no list of texts"),
            (r#"{"query": "Q", "choices": ["x", " "], "gold": 0}"#, "empty"),
            (r#"{"query": "Q", "choices": ["x", "y"]}"#, "does not say which"),
            (r#"{"query": "Q", "choices": ["x", "y"], "gold": 2}"#, "2 is none of its 2"),
            (r#"{"query": "Q", "choices": ["x", "y"], "gold": -1}"#, "-1 is none"),
        ] {
            let told = of(json).unwrap_err();
            assert!(told.contains(why), "{told}");
        }
        assert!(parse("f", "{\n").unwrap_err().to_string().starts_with("f, line 1: not valid JSON"));
        assert!(parse("f", "\n").unwrap_err().to_string().contains("no question"));
        assert_eq!(questions(None).unwrap().1.len(), 64);
    }

    #[test]
    fn the_likeliest_answer_for_its_length_is_chosen() {
        let question = |gold| Question { prompt: String::new(), choices: vec!["ab".into(), "abcd".into()], gold };
        let choices = |from: usize| vec![Choice { tokens: from..from + 1 }, Choice { tokens: from + 1..from + 3 }];
        let loss = |nll: &[f64], argmax: &[u32]| TokenLoss { nll: nll.to_vec(), argmax: argmax.to_vec() };
        // Of the first question 2 / 2 against 3 / 4 letters: the second answer; of the second 1 / 2 against 8 / 4: the first.
        let reference = loss(&[2.0, 1.0, 2.0, 1.0, 4.0, 4.0], &[0, 1, 2, 3, 4, 5]);
        let model = loss(&[1.0, 1.0, 3.0, 1.0, 4.0, 4.0], &[0, 1, 9, 3, 4, 5]);
        let found = TokenComparison { reference, model, kld: vec![0.0, 0.5, 0.7, 0.3, 0.0, 0.0] };
        let [ours, theirs] = tasks(&[question(1), question(0)], &[choices(0), choices(3)], &found);
        assert_eq!((theirs.answers, theirs.accuracy, theirs.changed), (vec![1, 0], 1.0, 0));
        assert_eq!((ours.answers, ours.accuracy, ours.difference), (vec![0, 0], 0.5, -0.5));
        assert_eq!((ours.changed, ours.lost, ours.gained, ours.tokens), (1, 1, 0, 3));
        assert_eq!((ours.difference_stderr, ours.top1), (0.5, 2.0 / 3.0));
        assert!((ours.kld_mean - 0.5).abs() < 1e-12);
    }
}
