//! Runs a block's program over all chunks.
//!
//! Values are computed chunk by chunk where they are used, each time from what is kept and the stream. What the program says to keep is
//! computed for all chunks before the next step, and let go after its last use.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use kernels::Forward;
use ndarray::Array2;

use super::hyper::LoadedHyper;
use super::route::{Routed, table};
use super::{Chunk, LoadedNorm, Others, Supply, Weight};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::graph::{Block, Convolution, Linear, Norm, Temperature};
use crate::program::{Expert, Kept, Kind, Lifetimes, Operation, Program, Streams};

/// Runs one block over all chunks; tables that it looks tokens up in are those of `source`.
pub fn run_block<B: Forward>(
    backend: &B,
    block: &Block,
    source: &Checkpoint,
    supply: &mut dyn Supply<B>,
    chunks: &mut [Chunk<B::Matrix>],
) -> Result<()> {
    let program = Program::of(block).expect("refused when the sequences were embedded");
    let lives = Lifetimes::of(&program, supply.needs_output());
    let loaded = program.operations.iter().map(|_| Loaded::Nothing).collect();
    let rounds_cache = supply.rounds_cache();
    let run = Run {
        backend,
        block,
        source,
        program: &program,
        lives: &lives,
        rounds_cache,
        chunks,
        stream: Program::STREAM,
        loaded,
        norms: Vec::new(),
        pending: Vec::new(),
        kept: RefCell::default(),
    };
    run.all(supply)
}

/// Taps that lie apart, with nothing between them: so they are taps that follow each other.
fn spread_taps(taps: &[f32], convolution: &Convolution) -> Vec<f32> {
    let Convolution { taps: count, dilation, .. } = *convolution;
    let mut spread = vec![0.0; taps.len() / count * convolution.reach()];
    for (from, to) in taps.chunks_exact(count).zip(spread.chunks_exact_mut(convolution.reach())) {
        to.iter_mut().step_by(dilation).zip(from).for_each(|(to, from)| *to = *from);
    }
    spread
}

/// A value of one chunk.
pub(super) enum Computed<B: Forward> {
    Matrix(B::Matrix),
    /// As products read it.
    Input(B::Input),
    /// For each expert.
    Routes(Vec<Routed>),
}

/// Values of chunks, by both.
type Store<B> = HashMap<(usize, usize), Rc<Computed<B>>>;

/// What an operation takes besides values.
pub(super) enum Loaded<'b, B: Forward> {
    Nothing,
    Weights(Vec<Weight<B::Weight>>),
    Norm(Rc<LoadedNorm<'b>>),
    Vector(Option<Vec<f32>>),
    /// Of a convolution, whose bias may be none.
    Taps(Vec<f32>, Option<Vec<f32>>),
    /// Of a router: the correction of its scores, a factor for each expert, and the experts of each token.
    Router(Option<Vec<f32>>, Option<Vec<f32>>, Option<Vec<u32>>),
    /// Rates of decay and what is added before them.
    Decay(Vec<f32>, Vec<f32>),
    /// How much each head's queries grow with their positions, and from where.
    Growth(Vec<f32>, Vec<f32>),
    /// What makes the weights of several streams.
    Hyper(LoadedHyper<'b>),
    /// Cosines and sines of every position, of whatever sequence.
    Angles(Array2<f32>, Array2<f32>),
}

/// For which tokens something is computed, and when.
#[derive(Clone, Copy)]
pub(super) struct Place<'p> {
    /// The chunk.
    pub index: usize,
    /// Tokens that are looked at in place of an expert's own.
    pub rows: Option<&'p [usize]>,
    /// What is kept until this time may be taken; none while somebody only looks.
    time: Option<usize>,
}

/// What an operation reads.
pub(super) enum Read<'m, B: Forward> {
    Stream(&'m B::Matrix),
    Value(Rc<Computed<B>>),
}

/// One block that is being run.
pub(super) struct Run<'r, 'b, B: Forward> {
    pub backend: &'r B,
    block: &'b Block,
    pub source: &'r Checkpoint,
    pub program: &'r Program<'b>,
    lives: &'r Lifetimes,
    pub rounds_cache: bool,
    pub chunks: &'r mut [Chunk<B::Matrix>],
    /// The value that chunks hold.
    stream: usize,
    /// Of each operation.
    pub loaded: Vec<Loaded<'b, B>>,
    norms: Vec<Rc<LoadedNorm<'b>>>,
    /// What is to be kept, and not yet computed.
    pending: Vec<usize>,
    kept: RefCell<Store<B>>,
}

impl<'b, B: Forward> Run<'_, 'b, B> {
    fn all(mut self, supply: &mut dyn Supply<B>) -> Result<()> {
        let program = self.program;
        for (at, operation) in program.operations.iter().enumerate() {
            if operation.kind.is_step() {
                self.keep_pending(2 * at)?;
                self.forget(2 * at);
            }
            match &operation.kind {
                Kind::Linear { linears, fixed: true } => {
                    let mut weights = Vec::new();
                    for linear in linears {
                        weights.extend(supply.router(linear)?);
                    }
                    self.loaded[at] = Loaded::Weights(weights);
                }
                Kind::Linear { linears, fixed: false } => {
                    self.loaded[at] = Loaded::Weights(self.stage(at, linears, supply)?);
                }
                kind if kind.adds() => {
                    if self.lives.needed[at] {
                        if let Kind::Rescale(tensor) = kind {
                            self.loaded[at] = Loaded::Vector(Some(supply.vector(tensor)?));
                        }
                        (0..self.chunks.len()).try_for_each(|index| self.add(at, index))?;
                        if kind.makes_stream() {
                            self.stream = operation.makes[0];
                        }
                    }
                }
                kind => self.loaded[at] = self.load(kind, supply)?,
            }
            if operation.kind.is_step() {
                self.forget(2 * at + 1);
            }
            if self.lives.needed[at] && !operation.kind.adds() {
                let kept =
                    |value: &&usize| program.values[**value].kept == Kept::Always && self.lives.until[**value] > 0;
                self.pending.extend(operation.makes.iter().filter(kept));
            }
        }
        self.leave();
        Ok(())
    }

    /// Hands keys and values over to the blocks behind, where they want them.
    fn leave(&mut self) {
        let Some((block, values)) = self.program.leaves.as_ref().filter(|_| self.lives.leaves) else { return };
        for (index, chunk) in self.chunks.iter_mut().enumerate() {
            let mut take = |value: &usize| match self.kept.get_mut().remove(&(*value, index)).map(Rc::try_unwrap) {
                Some(Ok(Computed::Matrix(matrix))) => matrix,
                _ => unreachable!("kept for no one else"),
            };
            chunk.shared.insert(*block, Rc::new(values.iter().map(&mut take).collect()));
        }
    }

    /// Loads what an operation takes besides values and weights.
    fn load(&mut self, kind: &Kind<'b>, supply: &mut dyn Supply<B>) -> Result<Loaded<'b, B>> {
        Ok(match kind {
            Kind::Norm(norm) | Kind::HeadNorm { norm, .. } => Loaded::Norm(self.norm(norm, supply)?),
            Kind::Pool(pool) => Loaded::Vector(Some(supply.vector(&pool.places)?)),
            Kind::Connect(hyper) => Loaded::Hyper(LoadedHyper::of(hyper, supply)?),
            Kind::Streams(_, Streams::Times(tensor)) => Loaded::Vector(Some(supply.vector(tensor)?)),
            Kind::Attention { sinks, .. } => Loaded::Vector(sinks.map(|name| supply.vector(name)).transpose()?),
            Kind::Convolve { convolution, first } => {
                let mut taps = Vec::new();
                for (tensor, _) in &convolution.tensors {
                    taps.extend(supply.vector(tensor)?);
                }
                let mut bias = convolution.bias.as_ref().map(|name| supply.vector(name)).transpose()?;
                taps.drain(..first * convolution.taps);
                if convolution.dilation > 1 {
                    taps = spread_taps(&taps, convolution);
                }
                bias.iter_mut().for_each(|bias| drop(bias.drain(..*first)));
                Loaded::Taps(taps, bias)
            }
            Kind::Decay(decay) => {
                let (rates, bias) = (supply.vector(&decay.rates.0)?, supply.vector(&decay.bias.0)?);
                // Channels of a head have its rate.
                let of_each = bias.len() / rates.len().max(1);
                let rates = rates.into_iter().flat_map(|rate| std::iter::repeat_n(rate.exp(), of_each)).collect();
                Loaded::Decay(rates, bias)
            }
            // Of a rate that turns them around.
            Kind::Step(decay) => {
                let bias = supply.vector(&decay.bias.0)?;
                Loaded::Decay(vec![-1.0; bias.len()], bias)
            }
            Kind::Skip { tensor, head_dim } => {
                let heads = supply.vector(tensor)?;
                let each = heads.iter().flat_map(|factor| std::iter::repeat_n(*factor, *head_dim));
                Loaded::Vector(Some(each.collect()))
            }
            Kind::Route(router) => {
                let mut load = |tensor: &Option<(String, Vec<usize>)>| {
                    tensor.as_ref().map(|(name, _)| supply.vector(name)).transpose()
                };
                let (correction, factors) = (load(&router.correction)?, load(&router.factors)?);
                Loaded::Router(correction, factors, table(self.source, router)?)
            }
            Kind::Warm(Temperature::Heads { scale, bias }) => {
                Loaded::Growth(supply.vector(scale)?, supply.vector(bias)?)
            }
            Kind::Rope { rope, back, inverse, .. } => {
                let learned = rope.learned.as_ref().map(|name| supply.vector(name)).transpose()?;
                let mut lengths: Vec<usize> = self.chunks.iter().flat_map(|chunk| &chunk.lengths).copied().collect();
                lengths.sort_unstable();
                lengths.dedup();
                let longest = lengths.last().copied().unwrap_or(0);
                let frequencies = rope.frequencies(longest);
                if lengths.iter().any(|length| rope.frequencies(*length) != frequencies) {
                    // Every chunk makes its own.
                    return Ok(Loaded::Vector(learned));
                }
                let (cos, mut sin) = rope.table(&[longest], *back, learned.as_deref());
                if *inverse {
                    sin.mapv_inplace(|x| -x);
                }
                Loaded::Angles(cos, sin)
            }
            _ => Loaded::Nothing,
        })
    }

    /// A norm, which is loaded once for all who use it.
    fn norm(&mut self, norm: &'b Norm, supply: &mut dyn Supply<B>) -> Result<Rc<LoadedNorm<'b>>> {
        if let Some(known) = self.norms.iter().find(|known| std::ptr::eq(known.norm, norm)) {
            return Ok(known.clone());
        }
        let loaded = Rc::new(LoadedNorm::of(norm, supply)?);
        self.norms.push(loaded.clone());
        Ok(loaded)
    }

    /// Asks for the weights of linears, and shows their input.
    fn stage(&self, at: usize, linears: &[&Linear], supply: &mut dyn Supply<B>) -> Result<Vec<Weight<B::Weight>>> {
        let operation = &self.program.operations[at];
        let x = operation.reads[0];
        let value = &self.program.values[x];
        let tokens: usize = self.chunks.iter().flat_map(|chunk| &chunk.lengths).sum();
        let keeps = value.kept == Kept::Room && tokens * value.width <= self.backend.kept_values();
        let inputs = |see: &mut dyn FnMut(&B::Input) -> Result<()>| {
            let mut here = (0..self.chunks.len()).filter(|index| self.is_here(operation.expert, *index));
            here.try_for_each(|index| {
                // Parts that read inputs of their own have one Hessian.
                operation.reads.iter().try_for_each(|x| {
                    let found = self.input(*x, Place { index, rows: None, time: None })?;
                    see(found.input())?;
                    // Kept as soon as it is there and has been seen: what is put aside for want of room is then written once and read once.
                    if keeps {
                        self.kept.borrow_mut().insert((*x, index), found);
                    }
                    Ok(())
                })
            })
        };
        if operation.expert.is_none() {
            return supply.linears(linears, &inputs);
        }
        let others = Others {
            inputs: &|count, see| {
                (0..self.chunks.len()).try_for_each(|index| match &self.spread(count, index)[..] {
                    [] => Ok(()),
                    rows => see(self.input(x, Place { index, rows: Some(rows), time: None })?.input()),
                })
            },
            // What none of an expert's own weights has changed.
            shared: (value.kept == Kept::Never).then_some(&self.block.name[..]),
        };
        supply.expert(linears, &inputs, &others)
    }

    /// About `count` tokens of all chunks, evenly spread: those of one chunk.
    fn spread(&self, count: usize, index: usize) -> Vec<usize> {
        let tokens = |chunk: &Chunk<B::Matrix>| chunk.lengths.iter().sum::<usize>();
        let total: usize = self.chunks.iter().map(tokens).sum();
        let step = total.div_ceil(count.clamp(1, total.max(1))).max(1);
        let before: usize = self.chunks[..index].iter().map(tokens).sum();
        (0..tokens(&self.chunks[index])).filter(|row| (before + row).is_multiple_of(step)).collect()
    }

    /// Whether any token of a chunk goes to an expert.
    fn is_here(&self, expert: Option<Expert>, index: usize) -> bool {
        expert.is_none_or(|expert| !self.routed(expert, index).routed(expert).rows.is_empty())
    }

    /// What says which tokens of a chunk go where.
    fn routed(&self, expert: Expert, index: usize) -> Rc<Computed<B>> {
        self.kept.borrow()[&(expert.routes, index)].clone()
    }

    /// Computes what is to be kept of what was defined so far.
    fn keep_pending(&mut self, time: usize) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let Some(first) = pending.first() else { return Ok(()) };
        // Those of different experts are never waiting together.
        let expert = self.program.maker(*first).and_then(|maker| maker.expert);
        for index in 0..self.chunks.len() {
            if self.is_here(expert, index) {
                let found = self.compute(&pending, Place { index, rows: None, time: Some(time) })?;
                self.kept.borrow_mut().extend(pending.iter().map(|value| (*value, index)).zip(found));
            }
        }
        Ok(())
    }

    /// Lets go what nobody needs after this time.
    fn forget(&mut self, time: usize) {
        let Lifetimes { until, weights_until, .. } = self.lives;
        self.kept.borrow_mut().retain(|(value, _), _| until[*value] > time);
        for (loaded, until) in self.loaded.iter_mut().zip(weights_until) {
            if *until <= time && matches!(loaded, Loaded::Weights(_)) {
                *loaded = Loaded::Nothing;
            }
        }
    }

    /// Does an operation that adds to what is kept, or to the stream, for one chunk.
    fn add(&mut self, at: usize, index: usize) -> Result<()> {
        let operation = &self.program.operations[at];
        let place = Place { index, rows: None, time: Some(2 * at + 1) };
        let (old, new) = (operation.reads[0], operation.makes[0]);
        match operation.kind {
            Kind::Add { scale } => return self.add_to_stream(operation, scale, place),
            Kind::Begin => {
                let begun = self.compute(&[operation.reads[1]], place)?.remove(0);
                self.chunks[index].hidden = self.own(Read::Value(begun))?;
                return Ok(());
            }
            Kind::Rescale(_) => return self.rescale(at, place),
            Kind::WriteStreams(hyper) => return self.write_streams(operation, hyper, place),
            _ => {}
        }
        let sum = self.kept.borrow_mut().remove(&(old, index)).expect("kept");
        let mut sum = self.own(Read::Value(sum))?;
        if self.is_here(operation.expert, index) {
            let y = self.compute(&operation.reads[1..2], place)?.remove(0);
            match (&operation.kind, operation.expert) {
                (Kind::Scatter { weighed }, Some(expert)) => {
                    let routes = self.routed(expert, index);
                    let Routed { rows, weights } = routes.routed(expert);
                    let ones = vec![1.0; rows.len()];
                    let weights = if *weighed { weights } else { &ones };
                    self.backend.add_rows(y.matrix(), rows, weights, &mut sum)?;
                }
                (Kind::Return { first }, _) => {
                    let routes = self.kept.borrow()[&(operation.reads[2], index)].clone();
                    let [tokens, _] = self.backend.shape(y.matrix());
                    let shares = routes.shares(*first, tokens);
                    let mut y = self.backend.copy(y.matrix())?;
                    self.backend.scale(&mut y, &shares, &[])?;
                    self.backend.add_scaled(&y, 1.0, &mut sum)?;
                }
                _ => self.backend.add_scaled(y.matrix(), 1.0, &mut sum)?,
            }
        }
        self.kept.borrow_mut().insert((new, index), Rc::new(Computed::Matrix(sum)));
        Ok(())
    }

    fn add_to_stream(&mut self, operation: &Operation<'b>, scale: f32, place: Place<'_>) -> Result<()> {
        let (backend, index) = (self.backend, place.index);
        let operands = self.program.operands(operation);
        let y = self.compute(&operands, place)?.remove(0);
        self.keep_stream(operation, index)?;
        let hidden = &mut self.chunks[index].hidden;
        match operands[..] == [operation.reads[1]] {
            true => backend.add_scaled(y.matrix(), scale, hidden)?,
            false => {
                let Loaded::Weights(weights) =
                    &self.loaded[self.program.values[operation.reads[1]].maker.expect("made")]
                else {
                    unreachable!("the weights are there as long as they are used")
                };
                let rounded = super::rounded(backend, y.input(), weights[0].rounding)?;
                let x = rounded.as_ref().unwrap_or(y.input());
                backend.add_linear(x, &weights[0].matrix, weights[0].bias(), hidden)?;
            }
        }
        Ok(())
    }

    /// Keeps the stream of a chunk as it is, where it is still read after this operation, which changes it.
    pub(super) fn keep_stream(&self, operation: &Operation<'b>, index: usize) -> Result<()> {
        let old = operation.reads[0];
        if self.lives.from[old].is_some() {
            let copy = self.backend.copy(&self.chunks[index].hidden)?;
            self.kept.borrow_mut().insert((old, index), Rc::new(Computed::Matrix(copy)));
        }
        Ok(())
    }

    /// Multiplies the stream of a chunk by one number.
    fn rescale(&mut self, at: usize, place: Place<'_>) -> Result<()> {
        self.keep_stream(&self.program.operations[at], place.index)?;
        let Loaded::Vector(Some(factor)) = &self.loaded[at] else { unreachable!("loaded where it stands") };
        let hidden = &mut self.chunks[place.index].hidden;
        let [_, width] = self.backend.shape(hidden);
        Ok(self.backend.scale(hidden, &[], &vec![factor[0]; width])?)
    }

    /// A value as products read it.
    fn input(&self, value: usize, place: Place<'_>) -> Result<Rc<Computed<B>>> {
        match self.stream_at(value, place.index) {
            Some(stream) => Ok(Rc::new(Computed::Input(self.backend.input(self.backend.copy(stream)?)?))),
            None => {
                let found = self.compute(&[value], place)?.remove(0);
                match &*found {
                    // A sum stays a matrix, so that it can grow.
                    Computed::Matrix(sum) => Ok(Rc::new(Computed::Input(self.backend.input(self.backend.copy(sum)?)?))),
                    _ => Ok(found),
                }
            }
        }
    }

    /// The stream of a chunk, if that is what a value is.
    fn stream_at(&self, value: usize, index: usize) -> Option<&B::Matrix> {
        (value == self.stream).then(|| &self.chunks[index].hidden)
    }

    /// Computes values of a chunk, and whatever they are made of that is not kept.
    pub(super) fn compute(&self, wanted: &[usize], place: Place<'_>) -> Result<Vec<Rc<Computed<B>>>> {
        let mut there = HashMap::new();
        let mut operations = BTreeMap::new();
        wanted.iter().for_each(|value| self.gather(*value, place, &mut there, &mut operations));
        // How many are still to read each.
        let mut readers: HashMap<usize, usize> = HashMap::new();
        operations.values().flatten().chain(wanted).for_each(|value| *readers.entry(*value).or_default() += 1);
        let mut take = |value: usize, there: &mut HashMap<usize, Rc<Computed<B>>>| {
            let left = readers.get_mut(&value).expect("counted");
            *left -= 1;
            let found = if *left == 0 { there.remove(&value) } else { there.get(&value).cloned() };
            found.expect("computed")
        };
        for (at, operands) in &operations {
            let read = |value: &usize| match self.stream_at(*value, place.index) {
                Some(stream) => Read::Stream(stream),
                None => Read::Value(take(*value, &mut there)),
            };
            let reads = operands.iter().map(read).collect();
            let asked = |value: &usize| wanted.contains(value) || operations.values().flatten().any(|v| v == value);
            there.extend(self.operate(*at, reads, place, &asked)?);
        }
        Ok(wanted.iter().map(|value| take(*value, &mut there)).collect())
    }

    /// Finds what is to be done for a value, with what it reads, and takes what is kept.
    fn gather(
        &self,
        value: usize,
        place: Place<'_>,
        there: &mut HashMap<usize, Rc<Computed<B>>>,
        operations: &mut BTreeMap<usize, Vec<usize>>,
    ) {
        if there.contains_key(&value) || self.stream_at(value, place.index).is_some() {
            return;
        }
        let key = (value, place.index);
        // What is kept of an expert is of its own tokens.
        if place.rows.is_none() || self.program.values[value].expert.is_none() {
            let last = place.time == Some(self.lives.until[value]);
            let mut kept = self.kept.borrow_mut();
            if let Some(found) = if last { kept.remove(&key) } else { kept.get(&key).cloned() } {
                there.insert(value, found);
                return;
            }
        }
        let at = self.program.values[value].maker.expect("the stream is there");
        if !operations.contains_key(&at) {
            let operands = self.program.operands(&self.program.operations[at]);
            operands.iter().for_each(|operand| self.gather(*operand, place, there, operations));
            operations.insert(at, operands);
        }
    }
}
