//! What sentence-transformers makes of hidden states: the modules behind the model, as the files beside it describe them.

use std::path::Path;

use formats::SafetensorsFile;
use serde_json::Value;

use super::sentence::{modules, ways_of};
use super::{Checkpoint, not_finite};
use crate::error::{self, Error};
use crate::json::read_json;

/// The modules behind a model, in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Modules {
    steps: Vec<Step>,
    /// The tokens whose logits a text's score is made of: the first less the second, where there is a second.
    pub score: Option<(u32, Option<u32>)>,
    /// The file that says which.
    score_file: String,
}

#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// Hidden states become one vector, or several one behind the other.
    Pool(Vec<Way>),
    Dense(Dense),
    /// To length 1.
    Normalize,
    /// By mean and variance.
    Norm {
        /// The folder of its files, within the model's.
        path: String,
        weight: Vec<f32>,
        bias: Vec<f32>,
    },
}

/// A linear and what its results are put through.
#[derive(Clone, Debug, PartialEq)]
struct Dense {
    /// The folder of its files, within the model's.
    path: String,
    weight: Vec<f32>,
    cols: usize,
    /// What its config.json says of its rows and columns.
    said: [Option<usize>; 2],
    bias: Option<Vec<f32>>,
    activation: Activation,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Activation {
    Identity,
    Tanh,
    Relu,
    Sigmoid,
    Silu,
}

/// Ways to make one vector of all, in the order in which several are put together.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    First,
    Largest,
    Mean,
    /// Their sum over the root of their number.
    Root,
    /// Weighed by position: 1, 2, 3 …
    Weighed,
    Last,
}

const WAYS: &[(&str, Way)] = &[
    ("cls", Way::First),
    ("max", Way::Largest),
    ("mean", Way::Mean),
    ("mean_sqrt_len", Way::Root),
    ("weightedmean", Way::Weighed),
    ("lasttoken", Way::Last),
];

/// What is added to the variance.
const NORM_EPS: f64 = 1e-5;

impl Checkpoint {
    /// What becomes of hidden states, where sentence-transformers' files lie beside the model and say so.
    ///
    /// Fails, with the reason, for modules that are not known, or whose files cannot be read.
    pub fn modules(&self) -> Result<Option<Modules>, String> {
        if self.gguf().is_some() { Ok(None) } else { Modules::read(self.path()) }
    }
}

impl Modules {
    fn read(folder: &Path) -> Result<Option<Modules>, String> {
        let mut found = Modules::default();
        for (path, kind) in modules(folder) {
            let kind = kind.rsplit('.').next().unwrap_or_default().to_owned();
            let place = folder.join(&path);
            // Only what lies in a folder right beside the model.
            if Path::new(&path).file_name().is_none_or(|name| name != &*path) {
                return Err(format!("modules.json: {path} is no folder beside the model"));
            }
            match &kind[..] {
                "Transformer" | "Dropout" => {}
                "Pooling" => found.steps.push(Step::Pool(pooling(&path, &settings(&place, &path)?)?)),
                "Normalize" => found.steps.push(Step::Normalize),
                "Dense" => found.steps.push(Step::Dense(dense(&place, &path)?)),
                "LayerNorm" => {
                    let [weight, bias] = ["norm.weight", "norm.bias"].map(|name| tensor(&place, &path, name));
                    found.steps.push(Step::Norm { path, weight: weight?.1, bias: bias?.1 });
                }
                "LogitScore" => {
                    found.score = Some(score(&path, &settings(&place, &path)?)?);
                    found.score_file = format!("{path}/config.json");
                }
                _ => return Err(format!("modules.json has {path} of the type {kind}, which is not known here")),
            }
        }
        if !found.steps.is_empty() && !matches!(found.steps[0], Step::Pool(_)) {
            return Err("modules.json has a module before the one that pools hidden states".to_owned());
        }
        Ok((!found.steps.is_empty() || found.score.is_some()).then_some(found))
    }

    /// Fails where they do not fit each other, or a model with hidden states of `width` values and logits for `vocabulary` tokens, as far as these are
    /// known; and for weights that are no numbers.
    pub fn check(&self, folder: &Path, width: Option<usize>, vocabulary: Option<usize>) -> error::Result<()> {
        let mut width = width;
        for step in &self.steps {
            match step {
                Step::Pool(ways) => width = width.map(|width| width * ways.len()),
                Step::Normalize => {}
                Step::Dense(dense) => {
                    dense.check(folder, width.unwrap_or(dense.cols))?;
                    width = Some(dense.rows());
                }
                Step::Norm { path, weight, bias } => {
                    let width = width.unwrap_or(weight.len());
                    for (name, values) in [("norm.weight", weight), ("norm.bias", bias)] {
                        check_tensor(&folder.join(path), name, values, (&[values.len()], &[width]), FROM_BEFORE)?;
                    }
                }
            }
        }
        let (Some((yes, no)), Some(vocabulary)) = (self.score, vocabulary) else { return Ok(()) };
        for (key, id) in [("true_token_id", Some(yes)), ("false_token_id", no)] {
            if let Some(id) = id.filter(|id| *id as usize >= vocabulary) {
                return Err(Error::failed(format!(
                    "{}: {key} is {id}, and the model has logits for {vocabulary} tokens, with ids from 0; take the file that was published with the \
                     model",
                    folder.join(&self.score_file).display()
                )));
            }
        }
        Ok(())
    }

    /// Whether an embedding is made.
    pub fn embeds(&self) -> bool {
        !self.steps.is_empty()
    }

    /// How, in words: `lasttoken, normalized`.
    pub fn said(&self) -> String {
        let of = |step: &Step| match step {
            Step::Pool(ways) => {
                let name = |way: &Way| WAYS.iter().find(|(_, known)| known == way).map_or("", |(name, _)| *name);
                ways.iter().map(name).collect::<Vec<_>>().join(" and ")
            }
            Step::Dense(dense) => format!("a linear to {}", dense.rows()),
            Step::Normalize => "normalized".to_owned(),
            Step::Norm { .. } => "a norm".to_owned(),
        };
        self.steps.iter().map(of).collect::<Vec<_>>().join(", ")
    }

    /// The embedding of a text, of its hidden states behind the last norm, `width` values for each token.
    ///
    /// Fails, with the reason, where a module takes vectors of another width, which [`check`](Modules::check) tells with more words.
    pub fn embed(&self, hidden: &[f32], width: usize) -> Result<Vec<f64>, String> {
        let mut x: Vec<f64> = Vec::new();
        for step in &self.steps {
            x = match step {
                Step::Pool(ways) => ways.iter().flat_map(|way| way.of(hidden, width)).collect(),
                Step::Dense(dense) if dense.cols == x.len() => dense.of(&x),
                Step::Norm { weight, bias, .. } if weight.len() == x.len() && bias.len() == x.len() => {
                    let count = x.len() as f64;
                    let mean = x.iter().sum::<f64>() / count;
                    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
                    let scaled = x.iter().map(|x| (x - mean) / (variance + NORM_EPS).sqrt());
                    scaled.zip(weight.iter().zip(bias)).map(|(x, (w, b))| x * f64::from(*w) + f64::from(*b)).collect()
                }
                Step::Normalize => {
                    let length = x.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
                    x.iter().map(|x| x / length).collect()
                }
                Step::Dense(_) | Step::Norm { .. } => {
                    return Err(format!("modules.json has a module for another width than {}", x.len()));
                }
            };
        }
        Ok(x)
    }
}

impl Way {
    /// Of the hidden states of a text.
    fn of(self, hidden: &[f32], width: usize) -> Vec<f64> {
        let rows = || hidden.chunks_exact(width.max(1));
        let count = rows().len() as f64;
        let sum = |weight: &dyn Fn(usize) -> f64| {
            let mut sum = vec![0.0; width];
            for (position, row) in rows().enumerate() {
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight(position) * f64::from(*x));
            }
            sum
        };
        let one = |row: Option<&[f32]>| row.unwrap_or_default().iter().map(|x| f64::from(*x)).collect();
        match self {
            Way::First => one(rows().next()),
            Way::Last => one(rows().next_back()),
            Way::Mean => sum(&|_| 1.0 / count),
            Way::Root => sum(&|_| 1.0 / count.sqrt()),
            Way::Weighed => sum(&|position| (position + 1) as f64 / (count * (count + 1.0) / 2.0)),
            Way::Largest => rows().fold(vec![f64::NEG_INFINITY; width], |mut most, row| {
                most.iter_mut().zip(row).for_each(|(most, x)| *most = most.max(f64::from(*x)));
                most
            }),
        }
    }
}

/// What a shape follows from that config.json says nothing of.
const FROM_BEFORE: &str = "what the modules before it make";

/// Fails for a tensor of a module in another shape than follows from `why`, and for values that are no numbers.
fn check_tensor(
    place: &Path,
    name: &str,
    values: &[f32],
    (found, expected): (&[usize], &[usize]),
    why: &str,
) -> error::Result<()> {
    let file = place.join("model.safetensors");
    if found != expected {
        return Err(Error::failed(format!(
            "{}: tensor `{name}` has shape {found:?}, and by {why} it would be {expected:?}; take all files of this module as they were published \
             with the model",
            file.display()
        )));
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(not_finite(values[at], at).in_tensor(name).in_file(file).into()),
        None => Ok(()),
    }
}

impl Dense {
    fn rows(&self) -> usize {
        self.weight.len() / self.cols.max(1)
    }

    /// Fails where it does not take vectors of `width` values, or is not what its config.json says.
    fn check(&self, folder: &Path, width: usize) -> error::Result<()> {
        let place = folder.join(&self.path);
        let shape = [self.rows(), self.cols];
        let said = [0, 1].map(|at| self.said[at].unwrap_or(shape[at]));
        check_tensor(&place, "linear.weight", &self.weight, (&shape, &said), &format!("{}/config.json", self.path))?;
        check_tensor(&place, "linear.weight", &[], (&shape, &[shape[0], width]), FROM_BEFORE)?;
        match &self.bias {
            Some(bias) => check_tensor(&place, "linear.bias", bias, (&[bias.len()], &[shape[0]]), "linear.weight"),
            None => Ok(()),
        }
    }

    fn of(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.weight.chunks_exact(self.cols.max(1)).enumerate();
        let row = |(row, weight): (usize, &[f32])| {
            let sum: f64 = weight.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            self.activation.of(sum + self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[row])))
        };
        rows.map(row).collect()
    }
}

impl Activation {
    fn of(self, x: f64) -> f64 {
        match self {
            Activation::Identity => x,
            Activation::Tanh => x.tanh(),
            // What is no number stays none.
            Activation::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activation::Silu => x / (1.0 + (-x).exp()),
        }
    }
}

/// The config.json of a module.
fn settings(place: &Path, path: &str) -> Result<Value, String> {
    match read_json(&place.join("config.json")) {
        Ok(Some(found)) if found.is_object() => Ok(found),
        _ => Err(format!("{path}/config.json is not there, or is no object of JSON")),
    }
}

fn pooling(path: &str, config: &Value) -> Result<Vec<Way>, String> {
    let said = ways_of(config.as_object().expect("an object"));
    let stem = |name: &str| name.strip_suffix("_tokens").or(name.strip_suffix("_token")).unwrap_or(name).to_owned();
    let stems: Vec<String> = said.iter().map(|name| stem(name)).collect();
    if let Some(other) = stems.iter().find(|stem| WAYS.iter().all(|(name, _)| name != stem)) {
        return Err(format!("{path}/config.json pools by {other}, which is not known here"));
    }
    let ways: Vec<Way> =
        WAYS.iter().filter(|(name, _)| stems.iter().any(|stem| stem == name)).map(|(_, way)| *way).collect();
    match ways.is_empty() {
        true => Err(format!("{path}/config.json does not say how hidden states are pooled")),
        false => Ok(ways),
    }
}

/// The tokens whose logits are a text's score.
fn score(path: &str, config: &Value) -> Result<(u32, Option<u32>), String> {
    let id = |key: &str| match &config[key] {
        Value::Null => Ok(None),
        id => match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(format!("{path}/config.json: {key} is {id}, and is the id of a token")),
        },
    };
    let yes = id("true_token_id")?.ok_or_else(|| format!("{path}/config.json has no true_token_id"))?;
    Ok((yes, id("false_token_id")?))
}

fn dense(place: &Path, path: &str) -> Result<Dense, String> {
    let config = settings(place, path)?;
    for key in ["module_input_name", "module_output_name"] {
        if config[key].as_str().is_some_and(|name| name != "sentence_embedding") {
            return Err(format!(
                "{path}/config.json: {key} is {}, and only embeddings of texts are known here",
                config[key]
            ));
        }
    }
    // A linear's own class puts the result through a hyperbolic tangent where nothing is said.
    let said = config["activation_function"].as_str().unwrap_or("Tanh");
    let activation = match said.rsplit('.').next().unwrap_or_default() {
        "Identity" => Activation::Identity,
        "Tanh" => Activation::Tanh,
        "ReLU" => Activation::Relu,
        "Sigmoid" => Activation::Sigmoid,
        "SiLU" => Activation::Silu,
        other => return Err(format!("{path}/config.json: activation_function is {other}, which is not known here")),
    };
    let (shape, weight) = tensor(place, path, "linear.weight")?;
    let &[_, cols] = &shape[..] else { return Err(format!("{path}: linear.weight has the shape {shape:?}")) };
    let bias = match config["bias"].as_bool().unwrap_or(true) {
        true => Some(tensor(place, path, "linear.bias")?.1),
        false => None,
    };
    let size = |key: &str| config[key].as_u64().and_then(|size| usize::try_from(size).ok());
    let said = [size("out_features"), size("in_features")];
    Ok(Dense { path: path.to_owned(), weight, cols, said, bias, activation })
}

/// A tensor of a module's weights.
fn tensor(place: &Path, path: &str, name: &str) -> Result<(Vec<usize>, Vec<f32>), String> {
    let file = SafetensorsFile::open(place.join("model.safetensors"))
        .map_err(|_| format!("{path}/model.safetensors, which has the module's weights, cannot be read"))?;
    let view = file.get(name).ok_or_else(|| format!("{path}/model.safetensors has no {name}"))?;
    let values =
        view.to_f32().map_err(|_| format!("{path}/model.safetensors: {name} is of no type that is read here"))?;
    Ok((view.shape.to_vec(), values))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_that_do_not_fit_or_are_broken_are_told_with_file_and_tensor() {
        let dense = |weight: &[f32], cols, said| Dense {
            path: "2_Dense".to_owned(),
            weight: weight.to_vec(),
            cols,
            said,
            bias: None,
            activation: Activation::Relu,
        };
        let of =
            |step: Step| Modules { steps: vec![Step::Pool(vec![Way::Mean, Way::Last]), step], ..Modules::default() };
        let told = |modules: &Modules| match modules.check(Path::new("m"), Some(1), Some(7)) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        let fits = dense(&[1.0, 2.0], 2, [Some(1), Some(2)]);
        assert_eq!(told(&of(Step::Dense(fits.clone()))), "");
        for (step, words) in [
            (
                dense(&[1.0, 2.0], 2, [Some(3), None]),
                "shape [1, 2], and by 2_Dense/config.json it would be [3, 2]; take",
            ),
            (
                dense(&[1.0, 2.0], 1, [None; 2]),
                "shape [2, 1], and by what the modules before it make it would be [2, 2]; take",
            ),
            (dense(&[1.0, f32::NAN], 2, [None; 2]), "value NaN at index 1 is not a finite number"),
        ] {
            let told = told(&of(Step::Dense(step)));
            assert!(
                told.starts_with("m/2_Dense/model.safetensors: tensor `linear.weight`") && told.contains(words),
                "{told}"
            );
        }
        let bias = Some(vec![0.0; 2]);
        assert!(
            told(&of(Step::Dense(Dense { bias, ..fits })))
                .contains("`linear.bias` has shape [2], and by linear.weight")
        );
        let norm = |weight: Vec<f32>| of(Step::Norm { path: "3_Norm".to_owned(), weight, bias: vec![0.0; 2] });
        assert_eq!(told(&norm(vec![1.0; 2])), "");
        assert!(
            told(&norm(vec![1.0; 3])).starts_with("m/3_Norm/model.safetensors: tensor `norm.weight` has shape [3]")
        );
        assert!(told(&norm(vec![f32::INFINITY, 1.0])).contains("value inf at index 0"));
        let score = |yes, no| Modules {
            score: Some((yes, no)),
            score_file: "1_S/config.json".to_owned(),
            ..Modules::default()
        };
        assert_eq!(told(&score(6, Some(0))), "");
        assert!(
            told(&score(7, None))
                .starts_with("m/1_S/config.json: true_token_id is 7, and the model has logits for 7 tokens")
        );
        assert!(told(&score(1, Some(9))).contains("false_token_id is 9"));
        assert!(Activation::Relu.of(f64::NAN).is_nan());
    }

    #[test]
    fn what_modules_say_wrongly_is_told_with_its_file() {
        let room = tempfile::tempdir().unwrap();
        let folder = room.path().join("model");
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let list = |modules: &[(&str, &str)]| {
            let of = |(path, kind): &(&str, &str)| {
                format!(r#"{{"path": "{path}", "type": "sentence_transformers.models.{kind}"}}"#)
            };
            write("modules.json", &format!("[{}]", modules.iter().map(of).collect::<Vec<_>>().join(", ")));
        };
        assert_eq!(
            {
                write("x", "");
                Modules::read(&folder)
            },
            Ok(None)
        );
        list(&[("1_Pooling", "Pooling"), ("2_Dense", "Dense")]);
        let refused = |words: &str| {
            let why = Modules::read(&folder).unwrap_err();
            assert!(why.contains(words), "{why}");
        };
        refused("1_Pooling/config.json is not there");
        write("1_Pooling/config.json", r#"{"pooling_mode": ["mean", "lasttoken"]}"#);
        refused("2_Dense/config.json is not there");
        for (config, words) in [
            (r#"{"module_input_name": "token_embeddings"}"#, "only embeddings of texts"),
            (r#"{"activation_function": "my.Own"}"#, "activation_function is Own"),
            (r#"{"bias": false}"#, "2_Dense/model.safetensors, which has the module's weights"),
        ] {
            write("2_Dense/config.json", config);
            refused(words);
        }
        list(&[("../model", "Pooling")]);
        refused("no folder beside the model");
        list(&[("1_Pooling", "Normalize"), ("1_Pooling", "Pooling")]);
        refused("a module before the one that pools");
        list(&[("1_Pooling", "LogitScore")]);
        refused("has no true_token_id");
        write(
            "1_Pooling/config.json",
            r#"{"true_token_id": 5, "false_token_id": -1, "pooling_mode": ["mean", "lasttoken"]}"#,
        );
        refused("false_token_id is -1");
        list(&[("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]);
        let modules = Modules::read(&folder).unwrap().unwrap();
        assert_eq!((modules.said().as_str(), modules.embeds()), ("mean and lasttoken, normalized", true));
        // Of the states (1, 0) and (3, 4): mean (2, 2), last (3, 4), to length 1.
        let found = modules.embed(&[1.0, 0.0, 3.0, 4.0], 2).unwrap();
        let expected = [2.0, 2.0, 3.0, 4.0].map(|x: f64| x / 33f64.sqrt());
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        let wide = Step::Norm { path: "2_Norm".to_owned(), weight: vec![1.0], bias: vec![0.0] };
        let wrong = Modules { steps: vec![Step::Pool(vec![Way::Mean]), wide], ..Modules::default() };
        assert!(wrong.embed(&[1.0, 2.0], 2).unwrap_err().contains("another width than 2"));
    }
}
