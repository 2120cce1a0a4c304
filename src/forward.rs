//! Runs a model block by block over many sequences at once, operator by operator.
//!
//! Whoever supplies the weights is told the input of each group of linears before it hands them out. Evaluation just
//! loads them; calibration looks at the input, quantizes, and hands out what the file will hold, so that every operator
//! sees what all operators before it will really produce, and the model is run once.

use kernels::{Activation, Backend, RopeLayout};
use ndarray::Array2;

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::graph::{Attention, Block, Graph, Linear, Mlp, Norm, Step};

/// Tokens that go through an operator together, unless one sequence is longer.
pub const CHUNK_TOKENS: usize = 2048;

/// Values of the gated activation that are kept between the two uses of it; more are computed twice.
const KEPT_VALUES: usize = 1 << 29;

/// The residual stream of some sequences.
pub struct Chunk<M> {
    /// `[tokens, hidden]`.
    pub hidden: M,
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
}

/// A linear's weight on the device, as a matrix or in the form that products read it in.
pub struct Weight<M> {
    /// `[out, in]`.
    pub matrix: M,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

impl<M> Weight<M> {
    fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }
}

/// Hands the inputs of a group of linears over, chunk by chunk, to whoever wants to see them.
pub type Inputs<'a, I> = dyn Fn(&mut dyn FnMut(&I) -> Result<()>) -> Result<()> + 'a;

/// Where weights come from.
pub trait Supply<B: Backend> {
    /// The weight of a normalisation.
    fn norm(&mut self, norm: &Norm) -> Result<Vec<f32>>;
    /// The weights of linears that read one input.
    fn linears(&mut self, group: &[&Linear], inputs: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>>;
    /// Whether the output of this step is still needed; the last step of a calibration is not.
    fn needs_output(&self, last_step: bool) -> bool {
        let _ = last_step;
        true
    }
}

/// Embeds sequences, grouped into chunks.
pub fn embed<B: Backend>(
    backend: &B,
    graph: &Graph,
    source: &Checkpoint,
    sequences: &[Vec<u32>],
) -> Result<Vec<Chunk<B::Matrix>>> {
    let mut chunks = Vec::new();
    let mut rest = sequences;
    while !rest.is_empty() {
        let mut tokens = 0;
        let count = rest
            .iter()
            .take_while(|s| {
                tokens += s.len();
                tokens <= CHUNK_TOKENS
            })
            .count()
            .max(1);
        let (now, later) = rest.split_at(count);
        rest = later;
        let ids: Vec<u32> = now.iter().flatten().copied().collect();
        let mut hidden = vec![0.0; ids.len() * graph.hidden];
        source.load_rows(&graph.embedding, &ids, &mut hidden)?;
        let hidden = Array2::from_shape_vec((ids.len(), graph.hidden), hidden).expect("one row a token");
        chunks.push(Chunk { hidden: backend.upload(hidden)?, lengths: now.iter().map(Vec::len).collect() });
    }
    Ok(chunks)
}

/// Runs one block over all chunks.
pub fn run_block<B: Backend>(
    backend: &B,
    block: &Block,
    supply: &mut dyn Supply<B>,
    chunks: &mut [Chunk<B::Matrix>],
) -> Result<()> {
    for (index, step) in block.steps.iter().enumerate() {
        let last = index + 1 == block.steps.len();
        match step {
            Step::Attention(attention) => run_attention(backend, attention, supply, chunks, last)?,
            Step::Mlp(mlp) => run_mlp(backend, mlp, supply, chunks, last)?,
        }
    }
    Ok(())
}

fn run_attention<B: Backend>(
    backend: &B,
    attention: &Attention,
    supply: &mut dyn Supply<B>,
    chunks: &mut [Chunk<B::Matrix>],
    last: bool,
) -> Result<()> {
    let scale = supply.norm(&attention.norm)?;
    let normed =
        |chunk: &Chunk<B::Matrix>| backend.input(backend.rms_norm(&chunk.hidden, &scale, attention.norm.eps)?);
    let qkv = supply.linears(&[&attention.q, &attention.k, &attention.v], &|see| {
        chunks.iter().try_for_each(|chunk| see(&normed(chunk)?))
    })?;
    let longest = chunks.iter().flat_map(|chunk| &chunk.lengths).copied().max().unwrap_or(0);
    let (cos, sin) = attention.rope.table(longest);
    let mut mixed = Vec::with_capacity(chunks.len());
    for chunk in chunks.iter() {
        let x = normed(chunk)?;
        let project = |weight: &Weight<B::Weight>| backend.linear(&x, &weight.matrix, weight.bias());
        let (mut q, mut k, v) = (project(&qkv[0])?, project(&qkv[1])?, project(&qkv[2])?);
        let layout = RopeLayout { head_dim: attention.shape.head_dim, first: 0, interleaved: false };
        backend.rope(&mut q, &cos, &sin, &layout, &chunk.lengths)?;
        backend.rope(&mut k, &cos, &sin, &layout, &chunk.lengths)?;
        mixed.push(backend.attention(&q, &k, &v, None, &attention.shape, &chunk.lengths)?);
    }
    drop(qkv);
    let o = supply.linears(&[&attention.o], &|see| mixed.iter().try_for_each(&mut *see))?;
    if !supply.needs_output(last) {
        return Ok(());
    }
    for (chunk, x) in chunks.iter_mut().zip(mixed) {
        backend.add_linear(&x, &o[0].matrix, o[0].bias(), &mut chunk.hidden)?;
    }
    Ok(())
}

fn run_mlp<B: Backend>(
    backend: &B,
    mlp: &Mlp,
    supply: &mut dyn Supply<B>,
    chunks: &mut [Chunk<B::Matrix>],
    last: bool,
) -> Result<()> {
    let scale = supply.norm(&mlp.norm)?;
    let normed = |chunk: &Chunk<B::Matrix>| backend.input(backend.rms_norm(&chunk.hidden, &scale, mlp.norm.eps)?);
    let weights =
        supply.linears(&[&mlp.gate, &mlp.up], &|see| chunks.iter().try_for_each(|chunk| see(&normed(chunk)?)))?;
    let gated = |chunk: &Chunk<B::Matrix>| -> Result<B::Input> {
        let [gate, up] = [&weights[0], &weights[1]];
        let weights = [&gate.matrix, &up.matrix];
        Ok(backend.gated(&normed(chunk)?, weights, [gate.bias(), up.bias()], Activation::Silu)?)
    };
    let tokens: usize = chunks.iter().flat_map(|chunk| &chunk.lengths).sum();
    let kept = match tokens * mlp.down.cols <= KEPT_VALUES {
        true => Some(chunks.iter().map(gated).collect::<Result<Vec<_>>>()?),
        false => None,
    };
    let down = supply.linears(&[&mlp.down], &|see| match &kept {
        Some(kept) => kept.iter().try_for_each(&mut *see),
        None => chunks.iter().try_for_each(|chunk| see(&gated(chunk)?)),
    })?;
    if !supply.needs_output(last) {
        return Ok(());
    }
    let mut kept = kept.map(Vec::into_iter);
    for chunk in chunks {
        let x = match kept.as_mut().and_then(Iterator::next) {
            Some(x) => x,
            None => gated(chunk)?,
        };
        backend.add_linear(&x, &down[0].matrix, down[0].bias(), &mut chunk.hidden)?;
    }
    Ok(())
}

/// Brings a weight into the form that products read.
pub fn ready<B: Backend>(backend: &B, weight: Weight<B::Matrix>) -> Result<Weight<B::Weight>> {
    Ok(Weight { matrix: backend.weight(weight.matrix)?, bias: weight.bias })
}

/// Loads weights from a checkpoint as they are.
pub struct Plain<'a, B> {
    /// Where to upload to.
    pub backend: &'a B,
    /// Where from.
    pub source: &'a Checkpoint,
}

impl<B: Backend> Plain<'_, B> {
    /// One linear, with its bias.
    pub fn load(&self, linear: &Linear) -> Result<Weight<B::Matrix>> {
        let values = self.source.load(&linear.weight())?;
        self.source.release(&linear.weight());
        let matrix =
            Array2::from_shape_vec((linear.rows, linear.cols), values).expect("checked when the graph was built");
        let bias = linear.bias().map(|bias| self.source.load(&bias)).transpose()?;
        Ok(Weight { matrix: self.backend.upload(matrix)?, bias })
    }
}

impl<B: Backend> Supply<B> for Plain<'_, B> {
    fn norm(&mut self, norm: &Norm) -> Result<Vec<f32>> {
        self.source.load(&norm.weight)
    }

    fn linears(&mut self, group: &[&Linear], _: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        group.iter().map(|linear| ready(self.backend, self.load(linear)?)).collect()
    }
}

/// The last hidden states of sequences, normed, in chunks of whole sequences; `step` is told of every block done.
pub fn final_hidden<B: Backend>(
    backend: &B,
    graph: &Graph,
    source: &Checkpoint,
    sequences: &[Vec<u32>],
    step: &dyn Fn(),
) -> Result<Vec<B::Matrix>> {
    let mut chunks = embed(backend, graph, source, sequences)?;
    let mut plain = Plain { backend, source };
    for block in &graph.blocks {
        run_block(backend, block, &mut plain, &mut chunks)?;
        step();
    }
    let norm = source.load(&graph.final_norm.weight)?;
    chunks.iter().map(|chunk| Ok(backend.rms_norm(&chunk.hidden, &norm, graph.final_norm.eps)?)).collect()
}

/// The output projection's weight, on the device.
pub fn load_head<B: Backend>(backend: &B, graph: &Graph, source: &Checkpoint) -> Result<B::Weight> {
    let name = if graph.head.tied { graph.embedding.clone() } else { graph.head.linear.weight() };
    let values = source.load(&name)?;
    source.release(&name);
    let matrix = Array2::from_shape_vec((graph.vocabulary, graph.hidden), values).expect("checked");
    Ok(backend.weight(backend.upload(matrix)?)?)
}
