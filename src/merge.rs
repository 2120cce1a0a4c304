//! Writes a checkpoint merged with a LoRA adapter.

use std::path::Path;

use formats::TensorSpec;

use crate::checkpoint::Checkpoint;
use crate::convert::fates;
use crate::error::Result;
use crate::evidence::too_small;
use crate::output::{Staging, bytes_of, check_place, weight_writer};
use crate::recipe::UnknownTensors;
use crate::report::Fate;
use crate::rest::copy_tensor;
use crate::stray;
use crate::targets::{copy_side_files, tell_dtype, write_config};
use crate::weights::StoredType;

/// Writes every tensor of `model`, merged with the adapter in `adapter`, to the directory `output`, one at a time, each in its
/// own type (quantized ones in the model's), with config.json and what lies beside the weights. Tensors that are not part
/// of the model are treated as `unknown` says. Returns the merged checkpoint as it was read, and what the user should know.
pub fn merge(
    model: &Path,
    adapter: &Path,
    output: &Path,
    unknown: UnknownTensors,
    force: bool,
) -> Result<(Checkpoint, Vec<String>)> {
    write(model, adapter, output, unknown, force).map_err(|error| error.of_output(output, false))
}

fn write(
    model: &Path,
    adapter: &Path,
    output: &Path,
    unknown: UnknownTensors,
    force: bool,
) -> Result<(Checkpoint, Vec<String>)> {
    let source = Checkpoint::open_with(model, Some(adapter))?;
    check_place(output, adapter)?;
    let staging = Staging::folder_for(output, Some(model), force, None)?;
    let beside = source.beside(&["config.json"])?;
    let spec = |entry: &crate::weights::Entry| {
        let dtype = match entry.dtype {
            StoredType::Plain(own) => own,
            _ => source.dtype(),
        };
        TensorSpec { name: entry.name.clone(), dtype, shape: entry.shape.clone() }
    };
    let (strays, mut notes) = fates(&source, unknown)?;
    notes.splice(0..0, [staging.notes().to_vec(), source.notices(), source.tokenizer_notes()].concat());
    let kept = source.entries().iter().filter(|entry| !matches!(strays.get(&entry.name), Some(Fate::Dropped(_))));
    let specs: Vec<TensorSpec> = kept.map(spec).collect();
    staging.check_space(bytes_of(&specs) + beside.bytes())?;
    let writer = weight_writer(staging.folder(), specs.clone(), false)?;
    let mut lost = Vec::new();
    for spec in &specs {
        if !matches!(strays.get(&spec.name), Some(fate) if stray::copied(&source, &spec.name, fate, &writer)?) {
            let share = copy_tensor(&source, &spec.name, spec.dtype, &writer)?;
            lost.extend(share.map(|share| (spec.name.clone(), share)));
        }
    }
    notes.extend(too_small(&lost));
    writer.finish()?;
    let mut config = source.config_of_folder();
    if let Some(config) = config.as_object_mut() {
        tell_dtype(config, source.dtype());
    }
    write_config(&config, &staging)?;
    copy_side_files(&beside, &staging)?;
    source.check_unchanged()?;
    let left = staging.commit()?;
    Ok((source, [notes, beside.notes, left].concat()))
}
