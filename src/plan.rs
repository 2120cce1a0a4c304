//! What will become of every tensor, decided and checked before any work is done.

use std::collections::{BTreeMap, HashMap, HashSet};

use formats::codec::{ConfigFiles, QuantizedModule};
use formats::{Codec, Dtype, ScalePrecision, Scheme, TensorSpec};

use crate::checkpoint::{Checkpoint, StoredType};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::recipe::Recipe;

/// What happens to one input tensor.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// Becomes codes.
    Quantized,
    /// Goes over as it is.
    Copied,
    /// Is another tensor's twin and not stored.
    Tied,
    /// Is left out, for this reason.
    Dropped(&'static str),
}

/// The whole plan.
pub struct Plan {
    /// How weights are laid out.
    pub codec: &'static dyn Codec,
    /// The scheme of each quantized linear, by module.
    pub schemes: HashMap<String, Scheme>,
    /// Linears of the blocks that stay as they are.
    pub unquantized: Vec<String>,
    /// Every input tensor, in file order.
    pub fates: Vec<(String, Fate)>,
    /// Every output tensor, in file order.
    pub outputs: Vec<TensorSpec>,
    /// Type of scales in the file.
    pub scale_dtype: Dtype,
    /// Precision that scales are searched in.
    pub precision: ScalePrecision,
    /// Type of tensors that are written but not quantized.
    pub float_dtype: Dtype,
    /// config.json's addition and files beside it.
    pub config: ConfigFiles,
}

impl Plan {
    /// Decides. Fails when a tensor is missing, misshapen or unexplained, a pattern matches nothing, or the layout cannot
    /// hold what the recipe wants.
    pub fn new(graph: &Graph, source: &Checkpoint, recipe: &Recipe) -> Result<Plan> {
        let codec = formats::codec::codec(&recipe.format).expect("resolved");
        check_tensors(graph, source)?;
        let mut patterns = recipe.patterns()?;
        // The head is a linear like any other to patterns, though it is never quantized here.
        recipe.scheme_of(&graph.head.linear.module, &mut patterns)?;
        let mut schemes = HashMap::new();
        let mut modules = Vec::new();
        let mut unquantized = Vec::new();
        let mut refusals = Vec::new();
        for linear in graph.linears() {
            match recipe.scheme_of(&linear.module, &mut patterns)? {
                None => unquantized.push(linear.module.clone()),
                Some(scheme) => {
                    if let Err(why) = codec.supports(linear.rows, linear.cols, &scheme, recipe.desc_act) {
                        refusals.push((linear.weight(), why));
                    }
                    modules.push((linear.module.clone(), scheme));
                    schemes.insert(linear.module.clone(), scheme);
                }
            }
        }
        patterns.check_hits()?;
        if modules.is_empty() {
            return Err(Error::usage("the recipe leaves no linear to quantize"));
        }
        if let Some((tensor, why)) = refusals.first() {
            let others = match refusals.len() {
                1 => String::new(),
                n => format!(" (and {} more tensors)", n - 1),
            };
            return Err(Error::usage(format!("tensor `{tensor}`{others}: {} cannot hold it: {why}", codec.id())));
        }
        let mut left = unquantized.clone();
        if !graph.head.tied {
            left.push(graph.head.linear.module.clone());
        }
        let listed: Vec<QuantizedModule<'_>> = modules
            .iter()
            .map(|(name, scheme)| QuantizedModule { name, scheme: *scheme, desc_act: recipe.desc_act })
            .collect();
        let config = codec.config(&listed, &left).map_err(|e| Error::usage(e.to_string()))?;

        let model_dtype = source.dtype();
        let float_dtype = if matches!(model_dtype, Dtype::F16 | Dtype::BF16) { model_dtype } else { Dtype::F32 };
        let scale_dtype = codec.scale_dtype(model_dtype);
        let precision = match (model_dtype, scale_dtype) {
            // Runtimes may cast scales to the model's type: choose scales that survive that.
            (Dtype::BF16, _) | (_, Dtype::BF16) => ScalePrecision::BF16,
            (_, Dtype::F32) => ScalePrecision::F32,
            _ => ScalePrecision::F16,
        };
        let shapes: BTreeMap<String, (usize, usize)> =
            graph.linears().map(|l| (l.weight(), (l.rows, l.cols))).collect();
        let known: HashSet<String> = graph.tensors().into_iter().map(|(name, _)| name).collect();
        let (mut fates, mut outputs) = (Vec::new(), Vec::new());
        for entry in source.entries() {
            let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
            let fate = if let Some(scheme) = schemes.get(module).filter(|_| shapes.contains_key(&entry.name)) {
                let (rows, cols) = shapes[&entry.name];
                for (part, dtype, shape) in codec.layout(rows, cols, scheme, scale_dtype) {
                    outputs.push(TensorSpec { name: format!("{module}.{part}"), dtype, shape });
                }
                Fate::Quantized
            } else if known.contains(&entry.name) {
                let dtype = match entry.dtype {
                    StoredType::Plain(dtype) => dtype,
                    _ => float_dtype,
                };
                outputs.push(TensorSpec { name: entry.name.clone(), dtype, shape: entry.shape.clone() });
                Fate::Copied
            } else {
                left_out(graph, source, &entry.name)?
            };
            fates.push((entry.name.clone(), fate));
        }
        Ok(Plan { codec, schemes, unquantized, fates, outputs, scale_dtype, precision, float_dtype, config })
    }
}

/// Why a tensor of the input is not in the output; fails when nothing says so.
pub fn left_out(graph: &Graph, source: &Checkpoint, name: &str) -> Result<Fate> {
    if graph.head.tied && name == graph.head.linear.weight() {
        return Ok(Fate::Tied);
    }
    match graph.dropped.iter().find(|rule| name.ends_with(rule.suffix)) {
        Some(rule) => Ok(Fate::Dropped(rule.reason)),
        None => Err(Error::failed(format!(
            "{}: tensor `{name}` is not part of a {} model and no rule says what to do with it",
            source.path().display(),
            graph.family
        ))),
    }
}

/// Fails unless every tensor that the model needs is there, in its shape and in a type that can be read.
pub fn check_tensors(graph: &Graph, source: &Checkpoint) -> Result<()> {
    for (name, shape) in graph.tensors() {
        let place = source.path().display();
        match source.entry(&name) {
            None => {
                return Err(Error::failed(format!(
                    "{place}: tensor `{name}` is missing; its shape would be {shape:?}"
                )));
            }
            Some(entry) if entry.shape != shape => {
                return Err(Error::failed(format!(
                    "{place}: tensor `{name}` has shape {:?}, and config.json says {shape:?}",
                    entry.shape
                )));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
