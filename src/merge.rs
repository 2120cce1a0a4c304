//! Writes a checkpoint merged with a LoRA adapter.

use std::path::Path;

use formats::TensorSpec;

use crate::checkpoint::{Checkpoint, StoredType};
use crate::compile::copy_tensor;
use crate::error::Result;
use crate::job::{copy_side_files, write_config};
use crate::output::{Staging, check_place, weight_writer};

/// Writes every tensor of `model`, merged with the adapter in `adapter`, to the directory `output`, one at a time, each in its
/// own type (quantized ones in the model's), with config.json and the tokenizer. Returns the merged checkpoint as it was read.
pub fn merge(model: &Path, adapter: &Path, output: &Path, force: bool) -> Result<Checkpoint> {
    write(model, adapter, output, force).map_err(|error| error.of_output(output, false))
}

fn write(model: &Path, adapter: &Path, output: &Path, force: bool) -> Result<Checkpoint> {
    let source = Checkpoint::open_with(model, Some(adapter))?;
    check_place(output, adapter)?;
    let staging = Staging::folder_for(output, Some(model), force)?;
    let spec = |entry: &crate::checkpoint::Entry| {
        let dtype = match entry.dtype {
            StoredType::Plain(own) => own,
            _ => source.dtype(),
        };
        TensorSpec { name: entry.name.clone(), dtype, shape: entry.shape.clone() }
    };
    let specs: Vec<TensorSpec> = source.entries().iter().map(spec).collect();
    let writer = weight_writer(staging.folder(), specs.clone())?;
    for spec in &specs {
        copy_tensor(&source, &spec.name, spec.dtype, &writer)?;
    }
    writer.finish()?;
    write_config(source.config(), &staging)?;
    copy_side_files(&source, &staging)?;
    staging.commit()?;
    Ok(source)
}
