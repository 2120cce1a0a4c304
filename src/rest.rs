//! Tensors that are not quantized, and go over beside the rest of the work.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

use formats::tensor::narrow;
use formats::{Dtype, ShardedWriter};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::evidence::{lost_in_halves, share_of};
use crate::graph::{Block, Layer, Linear};
use crate::plan::Plan;
use crate::report::Fate;
use crate::stray;

/// A tensor that goes over as it is, but for what a transform makes of it.
pub struct Rest<'a> {
    /// Its place among all.
    index: usize,
    /// Its name.
    pub name: &'a str,
    fate: &'a Fate,
    /// What it is written as.
    pub dtype: Dtype,
}

/// A tensor that lost values in being written.
pub struct Lost {
    /// Its place among all of the target's.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// The share of its values that are too small for what it is written as.
    pub share: f64,
}

impl Rest<'_> {
    /// Writes it as it is.
    pub fn copy(&self, source: &Checkpoint, writer: &ShardedWriter) -> Result<Option<f64>> {
        match stray::copied(source, self.name, self.fate, writer)? {
            true => Ok(None),
            false => copy_tensor(source, self.name, self.dtype, writer),
        }
    }

    /// What is to be told of it, if anything was lost.
    pub fn lost(&self, share: Option<f64>) -> Option<Lost> {
        share.map(|share| Lost { index: self.index, name: self.name.to_owned(), share })
    }
}

/// Every tensor that is not quantized.
pub fn rest(plan: &Plan) -> Vec<Rest<'_>> {
    let types: HashMap<&str, Dtype> = plan.outputs.iter().map(|spec| (&spec.name[..], spec.dtype)).collect();
    let stays = |(_, (_, fate)): &(usize, &(String, Fate))| matches!(fate, Fate::Copied | Fate::Aside(_));
    let all = plan.fates.iter().enumerate().filter(stays);
    all.map(|(index, (name, fate))| Rest { index, name, fate, dtype: types[&name[..]] }).collect()
}

/// Tensors of a block besides weights of linears that a transform may change.
pub fn touched(block: &Block) -> HashSet<String> {
    let of_layer = |layer: &'_ Layer| match layer {
        // Its norm is that of all blocks, and nothing is folded into it.
        Layer::PerLayer(_) => Vec::new(),
        layer => layer.norms().into_iter().cloned().collect::<Vec<_>>(),
    };
    let norms = block.steps.iter().flat_map(|step| step.pre.iter().cloned().chain(of_layer(&step.layer)));
    let names = norms.flat_map(|norm| norm.weights.into_iter().chain(norm.bias));
    names.chain(block.linears().filter_map(Linear::bias)).collect()
}

/// Copies tensors until somebody says that it is over.
pub fn copied<'r>(
    source: &Checkpoint,
    mut all: impl Iterator<Item = &'r Rest<'r>>,
    writer: &ShardedWriter,
    over: &AtomicBool,
) -> Result<Vec<Lost>> {
    let mut lost = Vec::new();
    while let Some(rest) = all.next().filter(|_| !over.load(Ordering::Relaxed)) {
        lost.extend(rest.lost(rest.copy(source, writer)?));
    }
    Ok(lost)
}

/// Writes values as numbers of a type. Returns the share of them that are too small for it, if there are any.
pub fn write_floats(
    source: &Checkpoint,
    writer: &ShardedWriter,
    name: &str,
    dtype: Dtype,
    values: &[f32],
) -> Result<Option<f64>> {
    let mut bytes = Vec::new();
    narrow(dtype, values, &mut bytes).map_err(|e| source.beyond(e, name, dtype))?;
    writer.write(name, &bytes)?;
    Ok(share_of(lost_in_halves(dtype, &bytes, name, values)?, values.len()))
}

/// Copies one tensor, in pieces where it has to be converted. Returns what [`write_floats`] does.
pub fn copy_tensor(source: &Checkpoint, name: &str, dtype: Dtype, writer: &ShardedWriter) -> Result<Option<f64>> {
    if let Some(raw) = source.raw(name).filter(|raw| raw.dtype == dtype) {
        if !raw.is_finite() {
            // Loading it says where.
            source.load(name)?;
        }
        writer.write(name, raw.data)?;
        source.release(name);
        return Ok(None);
    }
    let entry = source.entry(name).expect("planned");
    let (mut bytes, mut lost) = (Vec::new(), 0);
    let in_pieces = matches!(entry.dtype, crate::weights::StoredType::Quantized { .. });
    if let (&[rows, width], false) = (&entry.shape[..], in_pieces) {
        let piece = (1 << 22) / width.max(1) + 1;
        let mut values = vec![0.0; piece.min(rows) * width];
        for row in (0..rows).step_by(piece) {
            let ids: Vec<u32> = (row..rows.min(row + piece)).map(|r| r as u32).collect();
            let values = &mut values[..ids.len() * width];
            source.load_rows(name, &ids, values)?;
            bytes.clear();
            narrow(dtype, values, &mut bytes).map_err(|e| source.beyond(e, name, dtype))?;
            lost += lost_in_halves(dtype, &bytes, name, values)?;
            writer.write_part(name, (row * width * dtype.bitsize() / 8) as u64, &bytes)?;
        }
    } else {
        let values = source.load(name)?;
        narrow(dtype, &values, &mut bytes).map_err(|e| source.beyond(e, name, dtype))?;
        lost += lost_in_halves(dtype, &bytes, name, &values)?;
        writer.write(name, &bytes)?;
    }
    source.release(name);
    Ok(share_of(lost, entry.shape.iter().product()))
}
