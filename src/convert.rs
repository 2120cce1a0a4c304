//! Rewrites a checkpoint as plain safetensors.

use std::path::Path;

use formats::{Dtype, TensorSpec};
use serde_json::Value;

use crate::checkpoint::{Checkpoint, StoredType};
use crate::compile::copy_tensor;
use crate::error::Result;
use crate::job::{copy_side_files, write_config};
use crate::output::{Staging, weight_writer};

/// Writes every tensor of `input` to `output`, dequantized, in `dtype` (the input's own type by default).
pub fn convert(input: &Path, output: &Path, dtype: Option<Dtype>, force: bool) -> Result<()> {
    rewrite(input, output, dtype, force).map_err(|error| error.of_output(output, false))
}

fn rewrite(input: &Path, output: &Path, dtype: Option<Dtype>, force: bool) -> Result<()> {
    let source = Checkpoint::open(input)?;
    let staging = Staging::new(output, Some(input), force)?;
    let target = dtype.unwrap_or(source.dtype());
    let specs: Vec<TensorSpec> = source
        .entries()
        .iter()
        .map(|entry| TensorSpec {
            name: entry.name.clone(),
            dtype: match entry.dtype {
                // Integer tensors are not numbers to be rounded.
                StoredType::Plain(own) if !is_float(own) => own,
                _ => target,
            },
            shape: entry.shape.clone(),
        })
        .collect();
    let writer = weight_writer(staging.folder(), specs.clone())?;
    for spec in &specs {
        copy_tensor(&source, &spec.name, spec.dtype, &writer)?;
    }
    writer.finish()?;
    let mut config = source.config().clone();
    if let Value::Object(config) = &mut config {
        let name = match target {
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            _ => "float32",
        };
        let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config.insert(key.to_owned(), Value::from(name));
    }
    write_config(&config, &staging)?;
    copy_side_files(&source, &staging)?;
    staging.commit()
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32)
}
