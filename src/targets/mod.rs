//! What a run writes: files of one format, by one recipe.
//!
//! A [`Target`] decides before the work how each linear is represented, and opens a [`Sink`] that takes what was solved. The pipeline
//! knows nothing of files, and a target nothing of calibration.

mod directory;
mod further;
mod gguf;
mod projector;
mod requested;
mod tokens;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use calibration::solvers::Solution;
use calibration::statistics::Needs;
use formats::encoding::{Block, Offset};
use formats::{Dtype, Encoding, Float, Follower, Scheme};
use kernels::{Backend, GridSpec};
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::forward::Weight;
use crate::graph::{Graph, Linear};
use crate::importance::ImportancePlace;
use crate::output::Staging;
use crate::recipe::Recipe;
use crate::report::{Recovery, TensorReport};
use crate::rest::Lost;

pub use directory::{Directory, copy_side_files, tell_dtype, write_config};
pub use gguf::Gguf;
pub use requested::{Output, Requested, requested, resolved, schemes};

/// The name of ggml's type where it is one, the width of a code (of a value where there are none), columns per scale (−1 for a row), and
/// whether the levels lie around 0.
pub fn described(encoding: &Encoding) -> (Option<&'static str>, u8, i64, bool) {
    let ty = encoding.ggml_type();
    let bits = match (encoding.levels.bits(), ty) {
        (0, Some(ty)) => (ty.block_bytes * 8) as u8,
        (bits, _) => bits,
    };
    let group = match encoding.block {
        Block::Row | Block::Matrix if ty.is_some() => 1,
        Block::Row | Block::Matrix => -1,
        _ => encoding.group() as i64,
    };
    (ty.map(|ty| ty.name), bits, group, !encoding.has_min() && !matches!(encoding.offset, Offset::Zero { .. }))
}

/// The plain grid on which channel scales are searched: the encoding's own, or one with as many codes in as large groups; `None` for
/// numbers without codes.
pub fn plain_grid(encoding: &Encoding, cols: usize) -> Option<GridSpec> {
    if encoding.levels.count() == 0 {
        return None;
    }
    if encoding.scheme().is_some() || encoding.ggml_type().is_none() {
        return Some(GridSpec::of(*encoding, cols));
    }
    let group = Some(encoding.group_width(cols)).filter(|group| *group < cols);
    let scheme = Scheme { bits: encoding.levels.bits(), group, symmetric: !encoding.has_min() };
    Some(GridSpec::of(scheme.encoding(Float::F16, 0), cols))
}

/// A part of a linear's weight as the output holds it: one for the whole weight, or one for each tensor that its rows go to.
#[derive(Clone, Debug)]
pub struct Placement {
    /// How it is represented.
    pub encoding: Encoding,
    /// Which of the linear's rows, in the order of the file; all of them, in their own order, without.
    pub rows: Option<Vec<usize>>,
    /// These rows are columns of the file, and its columns no inputs of the linear.
    pub transposed: bool,
    /// The linear's columns in the order of the file; their own without.
    pub columns: Option<Vec<usize>>,
    /// What the linear's weights are multiplied by in the file.
    pub factor: f32,
}

impl Placement {
    /// The whole weight as it is.
    pub fn whole(encoding: Encoding) -> Placement {
        Placement { encoding, rows: None, transposed: false, columns: None, factor: 1.0 }
    }

    /// Puts the values of a part, as the output holds it, where they are in the linear's matrix.
    pub fn place(&self, part: ArrayView2<'_, f32>, whole: &mut Array2<f32>) {
        let scaled = (self.factor != 1.0).then(|| part.mapv(|x| x / self.factor));
        let part = scaled.as_ref().map_or(part, |scaled| scaled.view());
        let lanes = part.axis_iter(Axis(usize::from(self.transposed)));
        for (at, lane) in lanes.enumerate() {
            let row = self.rows.as_ref().map_or(at, |rows| rows[at]);
            match &self.columns {
                None => whole.row_mut(row).assign(&lane),
                Some(columns) => lane.iter().zip(columns).for_each(|(x, col)| whole[[row, *col]] = *x),
            }
        }
    }

    /// Whether its columns are the inputs of the linear, one by one: what is known of these is known of them.
    pub fn reads_inputs(&self) -> bool {
        !self.transposed && self.columns.is_none()
    }

    /// Whether every row of the linear is in it, in whatever order, with its own columns.
    pub fn is_whole(&self, linear: &Linear) -> bool {
        self.reads_inputs() && self.factor == 1.0 && self.rows.as_ref().is_none_or(|rows| rows.len() == linear.rows)
    }
}

/// Does pieces of whole rows of a matrix on all threads, each with a buffer that it may leave to the next; `one` gets the rows of a piece.
/// Returns the sum of what the pieces return.
fn in_pieces<B: Backend>(
    backend: &B,
    [rows, cols]: [usize; 2],
    one: impl Fn(&mut Vec<f32>, Range<usize>) -> Result<usize> + Sync,
) -> Result<usize> {
    let piece = (backend.weights_at_once() / cols.max(1)).max(1);
    let range = |index: usize| index * piece..rows.min((index + 1) * piece);
    let pieces =
        (0..rows.div_ceil(piece)).into_par_iter().map_init(Vec::new, |values, index| one(values, range(index)));
    pieces.try_reduce(|| 0, |a, b| Ok(a + b))
}

/// What was found for a placement.
pub struct Solved<B: Backend> {
    /// The codes, what they stand for, and how good they are.
    pub solution: Solution<B>,
    /// Rows of blocks as a file of ggml's holds them, where they are such.
    pub rows: Option<Vec<u8>>,
}

/// Tensors besides the weights of linears that a transform changes.
pub struct Folded {
    names: HashSet<String>,
    changed: HashMap<String, Vec<f32>>,
}

impl Folded {
    /// What may change are these.
    pub fn of(names: HashSet<String>) -> Folded {
        Folded { names, changed: HashMap::new() }
    }

    /// A tensor is this from now on.
    pub fn change(&mut self, name: String, values: Vec<f32>) {
        self.changed.insert(name, values);
    }

    /// Whether the transform may change this tensor.
    pub fn touches(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Its values, where they are not the input's.
    pub fn values(&self, name: &str) -> Option<&[f32]> {
        self.changed.get(name).map(|values| &values[..])
    }
}

/// A linear that was rounded by its target without being looked at.
pub struct Rounded {
    /// Weights that are too small for the scales that the file stores.
    pub lost: usize,
    /// Whether its weights lay on a grid of this kind already.
    pub recovered: Option<Recovery>,
    /// How it is represented.
    pub encoding: Encoding,
}

/// Something to be written behind the rest of the work.
pub type Write<'a> = Box<dyn FnOnce() -> Result<()> + Send + 'a>;

/// What a target writes into.
pub trait Sink<B: Backend>: Sync {
    /// Readers that keep behind what is written.
    fn follow(&self) -> Result<Vec<Follower>>;
    /// Writes what belongs before everything else, on all threads; nothing of what is `folded` later.
    fn before(&self, backend: &B, folded: &dyn Fn(&str) -> bool) -> Result<Vec<Lost>> {
        let _ = (backend, folded);
        Ok(Vec::new())
    }
    /// Writes, on a thread beside the work, what needs no computing, until it is over.
    fn beside(&self, folded: &(dyn Fn(&str) -> bool + Sync), over: &AtomicBool) -> Result<Vec<Lost>> {
        let _ = (folded, over);
        Ok(Vec::new())
    }
    /// Makes of a solution what is to be written of it.
    fn put(
        &self,
        backend: &B,
        linear: &Linear,
        placement: usize,
        solved: Solved<B>,
        bias: Option<&[f32]>,
    ) -> Result<Write<'_>>;
    /// Writes a linear that the walk comes by and that stays as it is, where nobody else writes it. Returns what it loses.
    fn keep(&self, backend: &B, linear: &Linear, weight: &Weight<B::Matrix>) -> Result<Option<(String, f64)>> {
        let _ = (backend, linear, weight);
        Ok(None)
    }
    /// Rounds and writes a linear whose input nobody looks at, in pieces on all threads; `None` where that takes the usual way.
    fn round(&self, backend: &B, linear: &Linear) -> Result<Option<Rounded>> {
        let _ = (backend, linear);
        Ok(None)
    }
    /// Writes those of the tensors that may be [`Folded`] which are `wanted`.
    fn write_folded(&self, backend: &B, folded: &Folded, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Lost>>;
    /// Takes a linear as an earlier process has written it.
    fn keep_written(&self, linear: &Linear) -> Result<()>;
    /// What the file holds of a linear that was taken so; `None` where that is what the input holds.
    fn held(&self, backend: &B, linear: &Linear) -> Result<Option<B::Matrix>>;
    /// Waits until what is written so far is on the disk.
    fn sync(&self) -> Result<()>;
    /// What waits until everything is on the disk.
    fn finish(self: Box<Self>) -> Box<dyn FnOnce() -> formats::Result<()> + Send>;
}

/// An output, decided and checked before any work is done.
pub trait Target<B: Backend>: Sync {
    /// What it is made by.
    fn recipe(&self) -> &Recipe;
    /// What has to be known of the inputs.
    fn needs(&self) -> Needs {
        self.recipe().needs()
    }
    /// Names and bytes of the files that hold its weights, an index of them included, where the output is called `name`.
    fn files(&self, name: &str) -> Result<Vec<(String, u64)>>;
    /// Bytes of what is copied beside them.
    fn beside(&self) -> u64 {
        0
    }
    /// The parts that a linear is written in; none where it stays as it is.
    fn placements(&self, linear: &Linear) -> &[Placement];
    /// Matrices beside the linears of the blocks that are quantized, the embedding and the head: their names in the file, rows and columns,
    /// and how they are represented.
    fn ends(&self) -> Vec<(String, [usize; 2], Encoding)>;
    /// Importance of the columns of a placement that was read from a file.
    fn importance(&self, linear: &Linear, placement: usize) -> Result<Option<Vec<f32>>>;
    /// Where an imatrix keeps what the inputs of a linear look like, if one is to be written.
    fn importance_places(&self, linear: &Linear) -> Vec<ImportancePlace>;
    /// Whether importance is read from a file, so that none is taken from what is seen.
    fn takes_importance(&self) -> bool;
    /// What a placement of a linear is called in the file.
    fn called(&self, linear: &Linear, placement: usize) -> String;
    /// What was decided for a linear in place of what was asked for.
    fn fallback(&self, linear: &Linear) -> Option<String> {
        let _ = linear;
        None
    }
    /// The type in which norms and biases that a transform changes will be held.
    fn float_dtype(&self) -> Dtype;
    /// Linears that it quantizes.
    fn linears(&self) -> usize;
    /// Lays its files out.
    fn open<'a>(&'a self, source: &'a Checkpoint, staging: &'a Staging) -> Result<Box<dyn Sink<B> + 'a>>;
    /// Writes what lies beside the weights, once these are written.
    fn complete(&self, source: &Checkpoint, staging: &Staging) -> Result<()>;
    /// Opens what was written.
    fn reopen(&self, staging: &Staging) -> Result<Checkpoint>;
    /// What there is to say before the work, of how it will be loaded, and after all else has been said.
    fn notes(&self) -> Notes;
    /// What becomes of every tensor of the input.
    fn tensors(&self) -> Vec<TensorReport>;
    /// Weights in its quantized linears, and the bytes that they take.
    fn quantized(&self, graph: &Graph) -> [u64; 2];
    /// Keys of the recipe that turned out to have no effect.
    fn idle(&self) -> Vec<&'static str> {
        Vec::new()
    }
    /// What the report and the model card of an output called `name` are called in the staging folder.
    fn papers(&self, name: &str) -> [String; 2];
    /// What the file is called that makes tokens of images, beside an output called `name`, where one is written.
    fn projector(&self, name: &str) -> Option<String>;
    /// Whether tensors besides the language model's are carried over.
    fn carries_others(&self) -> bool;
    /// Compares a tokenizer that was written anew with the original's. Returns what there is to say of it; fails where other tokens
    /// would make what was measured untrue.
    fn check_tokenizer(&self, source: &Checkpoint, reopened: &Checkpoint, words: &Words<'_>) -> Result<Vec<String>> {
        let _ = (source, reopened, words);
        Ok(Vec::new())
    }
}

/// What a tokenizer that was written is compared on.
pub struct Words<'a> {
    /// How many ids there are.
    pub vocabulary: usize,
    /// The text that the output is measured on, and the original's ids of it.
    pub held_out: Option<(&'a str, &'a HeldOut)>,
    /// As the user called the output.
    pub output: &'a Path,
}

/// The held-out text in the original's tokens, as far as it is looked at.
pub struct HeldOut {
    /// Ids of the text from its start, as many as were asked for if it has them.
    pub ids: Vec<u32>,
    /// How many ids were asked for; the text has no more where there are fewer.
    pub asked: usize,
    /// Those that are measured.
    pub windows: Vec<Vec<u32>>,
    /// What the tokenizer puts before a text, and after it.
    pub around: [Vec<u32>; 2],
}

/// What a target has to say, beside what there is to say of model and texts.
pub struct Notes {
    /// Said before all else: who will not load it.
    pub before: Vec<String>,
    /// Said after what there is to say of the texts; not twice.
    pub after: Vec<String>,
}

/// Decides what a recipe makes of a model; nothing is written.
pub fn target<B: Backend>(graph: &Graph, source: &Checkpoint, recipe: Recipe) -> Result<Box<dyn Target<B>>> {
    let graph = &*further::asked(graph, source, &recipe);
    Ok(match recipe.gguf {
        Some(_) => Box::new(Gguf::new(graph, source, recipe)?),
        None => Box::new(Directory::new(graph, source, recipe)?),
    })
}
