//! Runs a model block by block over many sequences at once, operator by operator.
//!
//! Whoever supplies the weights is told the input of each group of linears before it hands them out. Evaluation just
//! loads them; calibration looks at the input, quantizes, and hands out what the file will hold, so that every operator
//! sees what all operators before it will really produce, and the model is run once.

mod ahead;
mod head;
mod hyper;
mod lookup;
mod operate;
mod recurrent;
mod route;
mod run;
mod sparse;
mod streams;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use formats::{Dtype, Encoding, Float};
use kernels::{ActivationRounding, Forward};
use ndarray::{Array2, Axis};

pub use self::ahead::Ahead;
pub use self::head::{LoadedHead, kept};
use self::hyper::Ending;
pub use self::route::{numbers, table};
pub use self::run::run_block;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::families::check_runnable;
use crate::graph::{Block, Collapse, Graph, Linear, Norm, Stored};
use crate::report::Activations;
use crate::weights::StoredType;

impl Activations {
    /// How the input of a linear is rounded whose weight is the tensor `name`.
    fn rounding(self, source: &Checkpoint, name: &str) -> Option<ActivationRounding> {
        if self == Activations::Exact {
            return None;
        }
        let encoding = match source.entry(name)?.dtype {
            // llama.cpp's; of other files nobody says what runtimes do beside values as they are.
            StoredType::Ggml(ty) => ty.encoding(),
            StoredType::Plain(Dtype::F16) if source.gguf().is_some() => Encoding::plain(Float::F16),
            StoredType::Plain(Dtype::BF16) if source.gguf().is_some() => Encoding::plain(Float::BF16),
            _ => source.declared(name)?,
        };
        ActivationRounding::beside(&encoding)
    }
}

/// The residual stream of some sequences, and what goes from block to block beside it.
pub struct Chunk<M> {
    /// `[tokens, hidden]`, or as many of these side by side as the graph has streams.
    pub hidden: M,
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// What the last indexer chose, where layers behind it take that over.
    pub chosen: RefCell<Option<M>>,
    /// The token that belongs to each row: its own, and in a block that predicts further tokens one that follows.
    pub tokens: Vec<u32>,
    /// Keys and values of blocks that later ones read, or their latents, by the number of the block.
    pub shared: HashMap<usize, Rc<Vec<M>>>,
}

impl<M> Chunk<M> {
    /// The same, so that one may be changed and the other not.
    pub fn copy<B: Forward<Matrix = M>>(&self, backend: &B) -> Result<Chunk<M>> {
        let (lengths, tokens) = (self.lengths.clone(), self.tokens.clone());
        let chosen = self.chosen.borrow().as_ref().map(|chosen| backend.copy(chosen)).transpose()?;
        let (hidden, shared) = (backend.copy(&self.hidden)?, self.shared.clone());
        Ok(Chunk { hidden, lengths, chosen: RefCell::new(chosen), tokens, shared })
    }
}

/// A linear's weight on the device, as a matrix or in the form that products read it in.
pub struct Weight<M> {
    /// `[out, in]`.
    pub matrix: M,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
    /// How its input is rounded first.
    pub rounding: Option<ActivationRounding>,
}

impl<M> Weight<M> {
    fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }
}

/// What a linear of this rounding reads of `x`; `None` for `x` itself.
fn rounded<B: Forward>(backend: &B, x: &B::Input, rounding: Option<ActivationRounding>) -> Result<Option<B::Input>> {
    Ok(rounding.map(|kind| backend.round_activations(x, kind)).transpose()?)
}

/// `x wᵀ + bias`, of `x` as the weight's linear reads it.
fn product<B: Forward>(backend: &B, x: &B::Input, weight: &Weight<B::Weight>) -> Result<B::Matrix> {
    let rounded = rounded(backend, x, weight.rounding)?;
    Ok(backend.linear(rounded.as_ref().unwrap_or(x), &weight.matrix, weight.bias())?)
}

/// Hands the inputs of a group of linears over, chunk by chunk, to whoever wants to see them.
pub type Inputs<'a, I> = dyn Fn(&mut dyn FnMut(&I) -> Result<()>) -> Result<()> + 'a;

/// Hands over the inputs of about so many tokens, evenly spread.
pub type Sample<'a, I> = dyn Fn(usize, &mut dyn FnMut(&I) -> Result<()>) -> Result<()> + 'a;

/// What an expert would see of tokens that were not sent to it, for those who find its own too few.
pub struct Others<'a, I> {
    /// The inputs of some tokens of all.
    pub inputs: &'a Sample<'a, I>,
    /// The same for all experts that name the same thing here.
    pub shared: Option<&'a str>,
}

/// Where weights come from.
pub trait Supply<B: Forward> {
    /// A small tensor: of a normalisation, say.
    fn vector(&mut self, name: &str) -> Result<Vec<f32>>;
    /// The weights of linears that read one input, a weight for each part of them.
    fn linears(&mut self, group: &[&Linear], inputs: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>>;
    /// As [`linears`](Self::linears), for an expert of a mixture.
    fn expert(
        &mut self,
        group: &[&Linear],
        inputs: &Inputs<'_, B::Input>,
        others: &Others<'_, B::Input>,
    ) -> Result<Vec<Weight<B::Weight>>> {
        let _ = others;
        self.linears(group, inputs)
    }
    /// The weights of a linear that is never quantized, one for each part of it.
    fn router(&mut self, linear: &Linear) -> Result<Vec<Weight<B::Weight>>>;
    /// Whether attention reads keys and values as llama.cpp's cache holds them.
    fn rounds_cache(&self) -> bool {
        false
    }
    /// Whether what a block leaves in the stream is still needed; of the last one of a calibration it is not.
    fn needs_output(&self) -> bool {
        true
    }
}

/// Sequences that follow each other and have `most` tokens together, or are one of more, from the first to the last.
pub fn together(sequences: &[Vec<u32>], most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fits = |sequence: &&Vec<u32>| {
            tokens += sequence.len();
            tokens <= most
        };
        let count = sequences[start..].iter().take_while(fits).count().max(1);
        let range = start..sequences.len().min(start + count);
        start = range.end;
        (!range.is_empty()).then_some(range)
    })
}

/// Embeds sequences, grouped into chunks.
///
/// Fails on a sequence longer than the model has learned positions for.
pub fn embed<B: Forward>(
    backend: &B,
    graph: &Graph,
    source: &Checkpoint,
    sequences: &[Vec<u32>],
) -> Result<Vec<Chunk<B::Matrix>>> {
    check_runnable(graph, source)?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    if let Some((tensor, rows)) = graph.embedding.positions.as_ref().filter(|(_, rows)| *rows < longest) {
        return Err(Error::usage(format!(
            "sequences of {longest} tokens, and `{tensor}` of {} has {rows} positions: give a smaller --seq-len or --context",
            source.path().display()
        )));
    }
    // Other streams are made of the embedding by the first block.
    let streams = graph.collapse.as_ref().map_or(1, Collapse::streams);
    let mut chunks = Vec::new();
    for now in together(sequences, backend.tokens_at_once()).map(|range| &sequences[range]) {
        let ids: Vec<u32> = now.iter().flatten().copied().collect();
        let mut hidden = vec![0.0; ids.len() * graph.hidden];
        lookup::rows(source, &graph.embedding.tensor, &ids, 0..graph.hidden, &mut hidden)?;
        if graph.embedding.scale != 1.0 {
            hidden.iter_mut().for_each(|x| *x *= graph.embedding.scale);
        }
        if let Some((tensor, _)) = &graph.embedding.positions {
            let places: Vec<u32> = now.iter().flat_map(|s| 0..s.len() as u32).collect();
            let mut positions = vec![0.0; hidden.len()];
            source.load_rows(tensor, &places, &mut positions)?;
            hidden.iter_mut().zip(&positions).for_each(|(x, p)| *x += p);
        }
        if streams > 1 {
            hidden = hidden.chunks_exact(graph.hidden).flat_map(|row| row.repeat(streams)).collect();
        }
        let hidden = Array2::from_shape_vec((ids.len(), streams * graph.hidden), hidden).expect("one row a token");
        let (hidden, lengths) = (backend.upload(hidden)?, now.iter().map(Vec::len).collect());
        chunks.push(Chunk { hidden, lengths, chosen: RefCell::default(), tokens: ids, shared: HashMap::new() });
    }
    Ok(chunks)
}

/// Readies the stream for a block: before one that predicts further tokens each row gets the token that follows its own, and the last of a
/// sequence, which none follows, is let go. What the stream holds is what the model leaves, and then what each such block does.
pub fn enter<B: Forward>(backend: &B, block: &Block, chunks: &mut Vec<Chunk<B::Matrix>>) -> Result<()> {
    if block.further().is_none() {
        return Ok(());
    }
    // Of sequences that are over nothing is left.
    chunks.retain(|chunk| chunk.lengths.iter().any(|length| *length > 1));
    for Chunk { hidden, lengths, tokens, chosen, .. } in chunks {
        let (mut kept, mut following, mut start) = (Vec::new(), Vec::new(), 0);
        for length in lengths.iter() {
            let end = start + length;
            kept.extend(start..end.saturating_sub(1));
            following.extend(tokens[start..end].iter().skip(1));
            start = end;
        }
        *hidden = backend.select_rows(hidden, &kept)?;
        *tokens = following;
        chosen.take();
        *lengths = lengths.iter().filter(|length| **length > 1).map(|length| length - 1).collect();
    }
    Ok(())
}

/// A normalisation with its weight.
struct LoadedNorm<'n> {
    norm: &'n Norm,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl<'n> LoadedNorm<'n> {
    fn of<B: Forward>(norm: &'n Norm, supply: &mut dyn Supply<B>) -> Result<LoadedNorm<'n>> {
        let mut weight = Vec::new();
        for name in &norm.weights {
            weight.extend(supply.vector(name)?);
        }
        if norm.weights.is_empty() {
            weight = vec![1.0; norm.shape.iter().product()];
        }
        if norm.offset != 0.0 {
            weight.iter_mut().for_each(|w| *w += norm.offset);
        }
        let bias = norm.bias.as_ref().map(|name| supply.vector(name)).transpose()?;
        Ok(LoadedNorm { norm, weight, bias })
    }

    fn apply<B: Forward>(&self, backend: &B, x: &B::Matrix) -> Result<B::Matrix> {
        Ok(backend.norm(x, self.norm.kind, &self.weight, self.bias.as_deref(), self.norm.eps)?)
    }

    /// Normed, as products read it.
    fn input<B: Forward>(&self, backend: &B, x: &B::Matrix) -> Result<B::Input> {
        Ok(backend.norm_input(x, self.norm.kind, &self.weight, self.bias.as_deref(), self.norm.eps)?)
    }
}

/// Brings a weight into the form that products read, one for each part of its linear.
pub fn ready<B: Forward>(backend: &B, linear: &Linear, weight: Weight<B::Matrix>) -> Result<Vec<Weight<B::Weight>>> {
    if linear.split.rows(0).is_none() {
        let Weight { matrix, bias, rounding } = weight;
        return Ok(vec![Weight { matrix: backend.weight(matrix)?, bias, rounding }]);
    }
    let part = |part: usize| {
        let rows = linear.split.rows(part).expect("a part");
        let bias = weight.bias.as_ref().map(|bias| rows.iter().map(|row| bias[*row]).collect());
        let matrix = backend.weight(backend.select_rows(&weight.matrix, &rows)?)?;
        Ok(Weight { matrix, bias, rounding: weight.rounding })
    };
    (0..linear.split.parts()).map(part).collect()
}

/// Loads weights from a checkpoint as they are.
pub struct Plain<'a, B: Forward> {
    /// Where to upload to.
    pub backend: &'a B,
    /// Where from.
    pub source: &'a Checkpoint,
    /// What is multiplied with them.
    pub activations: Activations,
    /// What was sent already.
    pub ahead: Option<&'a Ahead<'a, B>>,
}

impl<'a, B: Forward> Plain<'a, B> {
    /// Weights that are multiplied with what was computed.
    pub fn exact(backend: &'a B, source: &'a Checkpoint) -> Plain<'a, B> {
        Plain { backend, source, activations: Activations::Exact, ahead: None }
    }

    /// One linear, with its bias, all parts together.
    pub fn load(&self, linear: &Linear) -> Result<Weight<B::Matrix>> {
        let bias = load_bias(self.source, linear)?;
        let rounding = self.activations.rounding(self.source, &linear.weight());
        let as_it_lies = match self.stored(linear)? {
            None => self.packed(linear)?,
            found => found,
        };
        let matrix = match as_it_lies {
            Some(matrix) => matrix,
            None => self.backend.upload(load_matrix(self.source, linear)?)?,
        };
        Ok(Weight { matrix, bias, rounding })
    }

    /// A weight that lies in the file as it is, if the device widens such; one that is not finite is left to the other way, which
    /// says so.
    fn stored(&self, linear: &Linear) -> Result<Option<B::Matrix>> {
        let Some((raw, shape)) = ahead::stored(self.source, linear) else { return Ok(None) };
        let name = linear.weight();
        let sent = self.ahead.map_or(Ok(None), |ahead| ahead.take(&name))?;
        let matrix = match sent {
            Some(sent) => Some(self.backend.widen(sent)?),
            None => self.backend.upload_stored(raw.data, raw.dtype, shape)?,
        };
        let Some(matrix) = matrix else { return Ok(None) };
        self.source.release(&name);
        Ok(self.backend.is_finite(&matrix)?.then_some(matrix))
    }

    /// A weight that lies in the file in codes of its own, whose reals the device makes; one that is not finite as above.
    fn packed(&self, linear: &Linear) -> Result<Option<B::Matrix>> {
        if linear.stored != Stored::Plain {
            return Ok(None);
        }
        let name = linear.weight();
        let Some((weight, layout)) = self.source.packed(&name)? else { return Ok(None) };
        self.source.release(&name);
        let matrix = self.backend.upload_packed(weight, layout)?;
        Ok(self.backend.is_finite(&matrix)?.then_some(matrix))
    }
}

/// A linear's weight `[rows, cols]`, however it is stored.
pub fn load_matrix(source: &Checkpoint, linear: &Linear) -> Result<Array2<f32>> {
    let (rows, cols) = (linear.stored_rows(), linear.cols);
    let name = linear.weight();
    let (values, transposed) = match &linear.stored {
        Stored::Slice { index, transposed, .. } => (source.load_slices(&name, *index..index + 1)?, *transposed),
        Stored::Rows { first, .. } => (source.load_slices(&name, *first..first + linear.rows)?, false),
        stored => (source.load(&name)?, *stored == Stored::Transposed),
    };
    source.release(&name);
    let matrix = match transposed {
        false => Array2::from_shape_vec((rows, cols), values),
        true => Array2::from_shape_vec((cols, rows), values).map(Array2::reversed_axes),
    };
    let matrix = matrix.expect("checked when the graph was built");
    Ok(match &linear.stored {
        Stored::Slice { part: (split, part), .. } => match split.rows(*part) {
            Some(rows) => matrix.select(Axis(0), &rows),
            None => matrix,
        },
        _ => matrix,
    })
}

/// A linear's bias `[rows]`, if it has one.
pub fn load_bias(source: &Checkpoint, linear: &Linear) -> Result<Option<Vec<f32>>> {
    match &linear.stored {
        Stored::Slice { index, bias: Some(bias), part: (split, part), .. } => {
            let values = source.load_slices(bias, *index..index + 1)?;
            Ok(Some(match split.rows(*part) {
                Some(rows) => rows.iter().map(|row| values[*row]).collect(),
                None => values,
            }))
        }
        Stored::Slice { .. } => Ok(None),
        _ => linear.bias().map(|bias| source.load(&bias)).transpose(),
    }
}

impl<B: Forward> Supply<B> for Plain<'_, B> {
    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        self.source.load(name)
    }

    fn linears(&mut self, group: &[&Linear], _: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        let mut weights = Vec::new();
        for linear in group {
            weights.extend(ready(self.backend, linear, self.load(linear)?)?);
        }
        Ok(weights)
    }

    fn router(&mut self, linear: &Linear) -> Result<Vec<Weight<B::Weight>>> {
        ready(self.backend, linear, self.load(linear)?)
    }

    fn rounds_cache(&self) -> bool {
        self.activations == Activations::Runtime && self.source.gguf().is_some()
    }
}

/// What a model makes of sequences, in chunks of whole sequences.
pub struct Hidden<M> {
    /// The last hidden states, normed: what its head reads.
    pub normed: Vec<M>,
    /// The same of each block that predicts further tokens, where they were asked for: the `n`th leaves out the last `n` tokens of every
    /// sequence, and sequences that have no more.
    pub further: Vec<Vec<M>>,
}

/// Runs a model over sequences, with the blocks that predict `further` tokens if there are any; `step` is told of every block done, and may
/// end the work.
pub fn final_hidden<B: Forward>(
    backend: &B,
    graph: &Graph,
    source: &Checkpoint,
    sequences: &[Vec<u32>],
    activations: Activations,
    further: bool,
    step: &dyn Fn(&Block) -> Result<()>,
) -> Result<Hidden<B::Matrix>> {
    let ahead = Ahead::new(backend, source);
    let mut plain = Plain { activations, ..ahead.plain() };
    let mut hidden = Hidden { normed: Vec::new(), further: Vec::new() };
    let ended = |norm: &Norm, collapse: Option<&Collapse>, chunks: &[Chunk<B::Matrix>], plain: &mut Plain<'_, B>| {
        let ending = Ending::of(norm, collapse, plain)?;
        chunks.iter().map(|chunk| ending.apply(backend, &chunk.hidden)).collect::<Result<Vec<_>>>()
    };
    let own = graph.collapse.as_ref();
    let begin = || embed(backend, graph, source, sequences);
    let blocks = if further { &graph.blocks } else { graph.trunk() };
    let last = graph.trunk().len();
    let chunks = ahead.blocks(blocks, begin, |chunks, index, block| {
        if index == last {
            hidden.normed = ended(&graph.final_norm, own, chunks, &mut plain)?;
        }
        enter(backend, block, chunks)?;
        run_block(backend, block, source, &mut plain, chunks)?;
        if let Some(further) = block.further() {
            hidden.further.push(ended(&further.norm, further.ending.as_ref(), chunks, &mut plain)?);
        }
        step(block)
    })?;
    if blocks.len() == last {
        hidden.normed = ended(&graph.final_norm, own, &chunks, &mut plain)?;
    }
    Ok(hidden)
}
