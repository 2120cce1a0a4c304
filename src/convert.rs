//! Rewrites a checkpoint as plain safetensors, laid out as its family publishes them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use formats::tensor::{is_float, narrow};
use formats::{Dtype, ShardedWriter, TensorSpec};
use ndarray::Array2;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::dialect::projector;
use crate::error::Result;
use crate::evidence::{lost_in_halves, share_of, too_small};
use crate::families;
use crate::graph::{Linear, Stored};
use crate::output::{Staging, bytes_of, weight_writer};
use crate::plan::check_tensors;
use crate::recipe::UnknownTensors;
use crate::report::Fate;
use crate::rest::{copy_tensor, write_floats};
use crate::stray::{self, Strays};
use crate::targets::{copy_side_files, tell_dtype, write_config};
use crate::weights::{Entry, StoredType};

/// Writes every tensor of `input` to `output`, dequantized, in `dtype` (the input's own type by default), and those that are not
/// part of the model as `unknown` says, with what lies beside them. Returns what the user should know.
pub fn convert(
    input: &Path,
    output: &Path,
    dtype: Option<Dtype>,
    unknown: UnknownTensors,
    force: bool,
) -> Result<Vec<String>> {
    rewrite(input, output, dtype, unknown, force).map_err(|error| error.of_output(output, false))
}

fn rewrite(
    input: &Path,
    output: &Path,
    dtype: Option<Dtype>,
    unknown: UnknownTensors,
    force: bool,
) -> Result<Vec<String>> {
    let source = Checkpoint::open(input)?;
    let staging = Staging::folder_for(output, Some(input), force, None)?;
    let beside = source.beside(&["config.json"])?;
    let target = dtype.unwrap_or(source.dtype());
    let layout = Layout::of(&source);
    let (strays, mut notes) = fates(&source, unknown)?;
    notes.splice(0..0, [staging.notes().to_vec(), source.notices(), source.tokenizer_notes()].concat());
    let mut specs: Vec<TensorSpec> = source
        .entries()
        .iter()
        .filter(|entry| !layout.members.contains(&entry.name))
        .filter(|entry| !matches!(strays.get(&entry.name), Some(Fate::Dropped(_))))
        .map(|entry| TensorSpec {
            name: entry.name.clone(),
            dtype: match entry.dtype {
                // Integer tensors are not numbers to be rounded, and what is not the model's is not touched.
                StoredType::Plain(own) if !is_float(own) || strays.contains_key(&entry.name) => own,
                _ => target,
            },
            shape: match layout.turned.contains(&entry.name) {
                true => entry.shape.iter().rev().copied().collect(),
                false => entry.shape.clone(),
            },
        })
        .collect();
    let stack_spec = |(name, stack): (&String, &Vec<Linear>)| {
        let shape = stack[0].tensors().into_iter().find(|(tensor, _)| tensor == name).expect("its own").1;
        TensorSpec { name: name.clone(), dtype: target, shape }
    };
    specs.extend(layout.stacks.iter().map(stack_spec));
    staging.check_space(bytes_of(&specs) + beside.bytes())?;
    let writer = weight_writer(staging.folder(), specs.clone(), false)?;
    let mut lost = Vec::new();
    for spec in &specs {
        let share = if let Some(stack) = layout.stacks.get(&spec.name) {
            write_stack(&source, spec, stack, &writer)?
        } else if layout.turned.contains(&spec.name) {
            let values = Array2::from_shape_vec((spec.shape[1], spec.shape[0]), source.load(&spec.name)?);
            let turned = values.expect("a matrix").reversed_axes();
            let turned = turned.as_standard_layout();
            write_floats(&source, &writer, &spec.name, spec.dtype, turned.as_slice().expect("contiguous"))?
        } else if !matches!(strays.get(&spec.name), Some(fate) if stray::copied(&source, &spec.name, fate, &writer)?) {
            copy_tensor(&source, &spec.name, spec.dtype, &writer)?
        } else {
            None
        };
        lost.extend(share.map(|share| (spec.name.clone(), share)));
    }
    notes.extend(too_small(&lost));
    writer.finish()?;
    let mut config = source.config_of_folder();
    if let Value::Object(config) = &mut config {
        // Both names of it, where both are there, as runtimes differ in which they read.
        let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config.insert(key.to_owned(), "".into());
        tell_dtype(config, target);
    }
    write_config(&config, &staging)?;
    copy_side_files(&beside, &staging)?;
    source.check_unchanged()?;
    let left = staging.commit()?;
    Ok([notes, beside.notes, left].concat())
}

/// What becomes of the tensors that are not part of the model, and what to say of them; of a model of an unknown family that
/// cannot be described every tensor goes over. Fails where a model of a known family lacks a tensor, for no runtime would load it.
pub fn fates(source: &Checkpoint, unknown: UnknownTensors) -> Result<(HashMap<String, Fate>, Vec<String>)> {
    let absent = families::absent(source, &[]).map(|absent| absent.note()).into_iter();
    let graph = match families::graph_of(source) {
        Ok(graph) => graph,
        Err(error) if families::is_known(source.config()) => return Err(error),
        Err(_) => return Ok((HashMap::new(), absent.chain(families::check_whole(source)?).collect())),
    };
    check_tensors(&graph, source)?;
    let strays = Strays::new(&graph, source, unknown);
    let fate = |entry: &Entry| Ok((entry.name.clone(), strays.fate(&entry.name)?));
    let found = strays.entries().map(fate).collect::<Result<Vec<_>>>()?;
    let mut notes = strays.notes(found.iter().map(|(name, fate)| (&**name, fate)), true);
    notes.extend(absent);
    notes.extend(families::cannot_run(&graph));
    notes.extend(families::not_whole(&graph));
    notes.extend(match graph.opaque {
        true => families::check_whole(source)?,
        false => families::check_beside(&graph, source).into_iter().chain(projector::faults(&graph, source)).collect(),
    });
    Ok((found.into_iter().collect(), notes))
}

/// Tensors that the model's family publishes otherwise than the checkpoint has them.
#[derive(Default)]
struct Layout {
    /// Experts that are stacked in one tensor, by its name.
    stacks: BTreeMap<String, Vec<Linear>>,
    /// Tensors of these experts in the checkpoint.
    members: HashSet<String>,
    /// Weights whose columns come before their rows.
    turned: HashSet<String>,
}

impl Layout {
    fn of(source: &Checkpoint) -> Layout {
        let mut layout = Layout::default();
        // A model of another family has no layout to keep.
        let Ok(graph) = families::published(source) else { return layout };
        for linear in graph.linears() {
            let [weight, bias] = ["weight", "bias"].map(|part| format!("{}.{part}", linear.module));
            let Some(entry) = source.entry(&weight) else { continue };
            match &linear.stored {
                Stored::Slice { tensor, bias: stacked_bias, .. } if source.entry(tensor).is_none() => {
                    layout.stacks.entry(tensor.clone()).or_default().push(linear.clone());
                    layout.members.insert(weight);
                    if let Some(stacked_bias) = stacked_bias.as_ref().filter(|_| source.entry(&bias).is_some()) {
                        layout.stacks.entry(stacked_bias.clone()).or_default().push(linear.clone());
                        layout.members.insert(bias);
                    }
                }
                Stored::Transposed if matches!(entry.dtype, StoredType::Quantized { .. }) => {
                    layout.turned.insert(weight);
                }
                _ => {}
            }
        }
        layout
    }
}

/// Writes a stack of experts, one at a time.
fn write_stack(
    source: &Checkpoint,
    spec: &TensorSpec,
    stack: &[Linear],
    writer: &ShardedWriter,
) -> Result<Option<f64>> {
    let length: usize = spec.shape[1..].iter().product();
    let mut values = vec![0.0; length];
    let (mut bytes, mut lost) = (Vec::new(), 0);
    // The linears of one expert follow each other.
    for (position, linear) in stack.iter().enumerate() {
        let Stored::Slice { tensor, index, transposed, part: (split, part), .. } = &linear.stored else {
            unreachable!("stacks hold slices")
        };
        let rows = split.rows(*part).unwrap_or_else(|| (0..linear.rows).collect());
        let (suffix, cols) = if *tensor == spec.name { ("weight", linear.cols) } else { ("bias", 1) };
        let own = source.load(&format!("{}.{suffix}", linear.module))?;
        for (own, row) in own.chunks_exact(cols).zip(rows) {
            for (col, value) in own.iter().enumerate() {
                let at = if *transposed && suffix == "weight" { col * (length / cols) + row } else { row * cols + col };
                values[at] = *value;
            }
        }
        let next = stack.get(position + 1).map(|next| &next.stored);
        if !matches!(next, Some(Stored::Slice { index: next, .. }) if next == index) {
            bytes.clear();
            narrow(spec.dtype, &values, &mut bytes).map_err(|e| source.beyond(e, &spec.name, spec.dtype))?;
            lost += lost_in_halves(spec.dtype, &bytes, &spec.name, &values)?;
            writer.write_part(&spec.name, (index * length * spec.dtype.bitsize() / 8) as u64, &bytes)?;
        }
    }
    Ok(share_of(lost, spec.shape.iter().product()))
}
