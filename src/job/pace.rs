//! How long a run will take: what it does, counted, times what each kind of work takes here, tried for a moment.
//!
//! ```text
//! for each kind of work (products, attention, sums, factoring, choosing codes in each encoding):
//!     do a little of it on random numbers in the model's own widths → seconds for one unit
//! for each block: units of each kind, by its shapes and by the tokens that go through it
//! seconds = Σ units · seconds for one
//! ```
//!
//! Choosing codes takes `rows · (a + b · columns)`: scales are searched weight by weight, and every column of a sweep is taken off all later
//! ones. Both are found by trying two widths.

use std::collections::HashMap;
use std::time::Instant;

use calibration::solvers::{Asked, Observer, Rtn, Shared, Solver};
use calibration::statistics::{Needs, Statistics};
use calibration::transforms::Awq;
use formats::Encoding;
use kernels::{AttentionShape, Backend, GridSpec};
use ndarray::Array2;

use super::planned::PlannedSeconds;
use crate::error::Result;
use crate::graph::{Attention, Block, Graph, Layer, Linear};
use crate::memory::Tokens;
use crate::pipeline::solver;
use crate::program::Program;
use crate::recipe::Recipe;
use crate::targets::{Target, plain_grid};

/// Seconds that each kind of work is tried for; some are tried at two sizes.
const TRIAL: f64 = 0.03;

/// Columns that codes are chosen for in a trial, at the most.
const COLUMNS: usize = 1024;

/// Rows of the same.
const ROWS: usize = 256;

/// What is known of a walk before it is made.
pub struct Walk<'a, B: Backend> {
    /// Its outputs.
    pub targets: Vec<&'a dyn Target<B>>,
    /// The calibration sequences, where there are any.
    pub tokens: Option<Tokens>,
    /// The most that one of the outputs needs to know of inputs.
    pub needs: Needs,
}

/// Tries each kind of work on a device, and counts what a model needs of it.
pub struct Pace<'a, B: Backend> {
    backend: &'a B,
    graph: &'a Graph,
    /// What the next random number is made of.
    seed: u32,
    started: Instant,
    /// Seconds for a weight of so many columns, by how its codes are chosen.
    codes: HashMap<String, [f64; 2]>,
}

impl<'a, B: Backend> Pace<'a, B> {
    /// Nothing has been tried yet.
    pub fn new(backend: &'a B, graph: &'a Graph) -> Pace<'a, B> {
        Pace { backend, graph, seed: 1, started: Instant::now(), codes: HashMap::new() }
    }

    /// Seconds of a run that makes these walks and then measures each output on `windows`, reading and writing files of so many `bytes`.
    pub fn run(&mut self, walks: &[Walk<'_, B>], windows: Option<Tokens>, bytes: u64) -> Result<PlannedSeconds> {
        let mut seconds = PlannedSeconds::default();
        let relaxed = self.backend.relaxed();
        for walk in walks {
            self.walk(&relaxed, walk, &mut seconds)?;
        }
        if let Some(windows) = windows {
            let outputs: usize = walks.iter().map(|walk| walk.targets.len()).sum();
            seconds.verify = outputs as f64 * self.verifying(windows)?;
        }
        seconds.measured = self.started.elapsed().as_secs_f64();
        let all = seconds.forward + seconds.observe + seconds.smooth + seconds.solve + seconds.verify;
        // Files are hashed beside the work, which waits for the slower of both.
        seconds.total = START + all.max(bytes as f64 / HASHED);
        Ok(seconds)
    }

    fn walk(&mut self, backend: &B, walk: &Walk<'_, B>, seconds: &mut PlannedSeconds) -> Result<()> {
        let smooths = walk.targets.iter().any(|target| target.recipe().method.smooths());
        let tokens = walk.tokens.map(|tokens| [(tokens.count * tokens.length) as f64, tokens.length as f64]);
        if let Some(tokens) = tokens {
            let once = self.forward(backend, tokens)?;
            seconds.forward += once * if smooths { 2.0 } else { 1.0 };
        }
        let sums = if walk.needs >= Needs::Hessian { self.sums(backend)? } else { 0.0 };
        let sweeps = walk.targets.iter().any(|target| target.recipe().method.sweeps());
        let factoring = if sweeps { self.factoring(backend)? } else { 0.0 };
        let graph = self.graph;
        for (block, stage, share) in stages(graph) {
            let cols = stage[0].cols as f64;
            if let Some([all, _]) = tokens {
                let seen = sums * all * share * cols * cols;
                seconds.observe += seen;
                if smooths && Program::of(block).is_some() {
                    seconds.smooth += seen + self.scales(backend, walk, &stage)?;
                }
            }
            seconds.solve += factoring * cols.powi(3);
            for target in &walk.targets {
                for linear in &stage {
                    for placement in target.placements(linear) {
                        let rows = placement.rows.as_ref().map_or(linear.rows, Vec::len);
                        let recipe = target.recipe();
                        let asked = (recipe, &placement.encoding, tokens.is_some());
                        seconds.solve += self.codes(backend, asked, [rows, linear.cols])?;
                    }
                }
            }
        }
        for target in &walk.targets {
            for (_, shape, encoding) in target.ends() {
                seconds.solve += self.rounding(backend, &encoding, shape)?;
            }
        }
        Ok(())
    }

    /// Seconds of running all blocks once for so many tokens in sequences of such a length.
    fn forward(&mut self, backend: &B, [tokens, length]: [f64; 2]) -> Result<f64> {
        let graph = self.graph;
        let [product, value] = [self.products(backend)?, self.values(backend)?];
        let mut sum = 0.0;
        for (_, stage, share) in stages(graph) {
            let weights: usize = stage.iter().map(|linear| linear.rows * linear.cols).sum();
            let rows: usize = stage.iter().map(|linear| linear.rows).sum();
            sum += tokens * share * (weights as f64 * product + (rows + 2 * stage[0].cols) as f64 * value);
            // Its weights are widened once.
            sum += weights as f64 * value;
        }
        let mut scores = HashMap::new();
        for attention in graph.blocks.iter().filter_map(Block::attention) {
            let shape = attention.shape;
            let reach =
                shape.window.into_iter().chain(shape.chunk).min().map_or(length, |reach| length.min(reach as f64));
            let seen = reach - reach * reach / (2.0 * length);
            let key = (shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim);
            let one = match scores.get(&key) {
                Some(one) => *one,
                None => *scores.entry(key).or_insert(self.attending(backend, attention)?),
            };
            sum += tokens * seen * one;
        }
        Ok(sum)
    }

    /// Seconds of measuring one output beside the original.
    fn verifying(&mut self, windows: Tokens) -> Result<f64> {
        let (backend, graph) = (self.backend, self.graph);
        let tokens = (windows.count * windows.length) as f64;
        let blocks = self.forward(backend, [tokens, windows.length as f64])?;
        let shape = [graph.vocabulary, graph.hidden];
        let head = self.product(backend, shape)? * (shape[0] * shape[1]) as f64;
        let logits = self.random([16, graph.vocabulary]);
        let logits = backend.upload(logits)?;
        let compared = self.tried(|| backend.compare(&logits, &logits, &[0; 16]).map(drop))? / 16.0;
        Ok(2.0 * (blocks + tokens * head) + tokens * compared)
    }

    /// Seconds of one multiplication and addition in products, where most of the model's are.
    fn products(&mut self, backend: &B) -> Result<f64> {
        let mut shapes: HashMap<[usize; 2], f64> = HashMap::new();
        for (_, stage, share) in stages(self.graph) {
            for linear in stage {
                *shapes.entry([linear.rows, linear.cols]).or_default() += share * (linear.rows * linear.cols) as f64;
            }
        }
        let Some((shape, _)) = shapes.into_iter().max_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0))) else {
            return Ok(0.0);
        };
        self.product(backend, shape)
    }

    fn product(&mut self, backend: &B, [rows, cols]: [usize; 2]) -> Result<f64> {
        // Of large ones a part, which is as fast.
        let [rows, cols] = [rows.min(2 * COLUMNS), cols.min(2 * COLUMNS)];
        let tokens = backend.tokens_at_once().clamp(1, 256);
        let weight = backend.weight(backend.upload(self.random([rows, cols]))?)?;
        let input = backend.input(backend.upload(self.random([tokens, cols]))?)?;
        let one = self.tried(|| settled(backend, &backend.linear(&input, &weight, None)?))?;
        Ok(one / (tokens * rows * cols) as f64)
    }

    /// Seconds for one score of attention: of a query with a key, over all heads.
    fn attending(&mut self, backend: &B, attention: &Attention) -> Result<f64> {
        let length = 512;
        let AttentionShape { heads, kv_heads, head_dim, value_dim, .. } = attention.shape;
        let mut matrix = |width: usize| backend.upload(self.random([length, width]));
        let (q, k, v) = (matrix(heads * head_dim)?, matrix(kv_heads * head_dim)?, matrix(kv_heads * value_dim)?);
        let shape = AttentionShape { window: None, chunk: None, ..attention.shape };
        let one = self.tried(|| {
            backend.attention(&q, &k, &v, None, &shape, &[length])?;
            settled(backend, &q)
        })?;
        Ok(one / (length * length / 2) as f64)
    }

    /// Seconds for one value of whatever is done to values one by one.
    fn values(&mut self, backend: &B) -> Result<f64> {
        let width = self.graph.hidden.clamp(64, 8192);
        let rows = (1 << 18) / width;
        let (x, weight) = (backend.upload(self.random([rows, width]))?, vec![1.0; width]);
        let one = self.tried(|| settled(backend, &backend.rms_norm(&x, &weight, 1e-5)?))?;
        Ok(2.0 * one / (rows * width) as f64)
    }

    /// The width in which most of the model's sums are.
    fn widest(&self) -> usize {
        self.graph.linears().map(|linear| linear.cols).max().unwrap_or(64)
    }

    /// Seconds of one token for each entry of `xᵀx`.
    fn sums(&mut self, backend: &B) -> Result<f64> {
        let (cols, tokens) = (self.widest().min(COLUMNS), 512);
        let input = backend.input(backend.upload(self.random([tokens, cols]))?)?;
        let mut gram = backend.zeros(cols, cols)?;
        let one = self.tried(|| {
            backend.add_gram(&input, &mut gram)?;
            settled(backend, &gram)
        })?;
        Ok(one / (tokens * cols * cols) as f64)
    }

    /// Seconds of factoring for each column to the third power.
    fn factoring(&mut self, backend: &B) -> Result<f64> {
        let cols = self.widest().min(COLUMNS);
        let statistics = self.statistics(backend, cols, Needs::Hessian)?;
        let gram = statistics.gram.as_ref().expect("asked for");
        let one = self.tried(|| backend.factor(gram, (0..cols as u32).collect(), 0.05).map(drop))?;
        Ok(one / (cols as f64).powi(3))
    }

    /// Seconds of choosing the codes of a weight as a recipe says, with or without having `seen` its inputs.
    fn codes(
        &mut self,
        backend: &B,
        (recipe, encoding, seen): (&Recipe, &Encoding, bool),
        [rows, cols]: [usize; 2],
    ) -> Result<f64> {
        let observer = match recipe.observer() {
            // What is not seen is read from a file, or every input counts alike.
            Observer::Imatrix | Observer::Clip if !seen => Observer::Mse,
            observer => observer,
        };
        let key = format!("{:?} {:?} {} {seen} {encoding:?}", recipe.method, observer, recipe.refine);
        let of = |[a, b]: [f64; 2]| rows as f64 * cols as f64 * (a + b * cols as f64);
        if let Some(known) = self.codes.get(&key) {
            return Ok(of(*known));
        }
        let whole = encoding.ggml_type().map_or(encoding.group().max(1), |ty| ty.block_len);
        let wide = |cols: usize| (cols / whole * whole).max(whole);
        let widths = [wide(cols.min(COLUMNS) / 2), wide(cols.min(COLUMNS))];
        let mut found = [0.0; 2];
        for (found, width) in found.iter_mut().zip(widths) {
            let solver = solver::<B>(recipe, observer);
            *found = self.choosing(backend, &*solver, (encoding, seen), [rows.min(ROWS), width])?;
        }
        let [near, far] = widths.map(|width| width as f64);
        let slope = if far > near { ((found[1] - found[0]) / (far - near)).max(0.0) } else { 0.0 };
        let line = [(found[1] - slope * far).max(0.0), slope];
        self.codes.insert(key, line);
        Ok(of(line))
    }

    /// The same of a matrix whose inputs nobody looks at.
    fn rounding(&mut self, backend: &B, encoding: &Encoding, [rows, cols]: [usize; 2]) -> Result<f64> {
        let key = format!("rounded {encoding:?}");
        let one = match self.codes.get(&key) {
            Some([one, _]) => *one,
            None => {
                let solver = Rtn { observer: Observer::Mse };
                let one = self.choosing(backend, &solver, (encoding, false), [ROWS.min(rows), cols.min(COLUMNS)])?;
                self.codes.insert(key, [one, 0.0]);
                one
            }
        };
        Ok(one * (rows * cols) as f64)
    }

    /// Seconds for one weight of a matrix of this shape.
    fn choosing(
        &mut self,
        backend: &B,
        solver: &dyn Solver<B>,
        (encoding, seen): (&Encoding, bool),
        shape: [usize; 2],
    ) -> Result<f64> {
        let weight = backend.upload(self.random(shape))?;
        let needs = solver.needs().max(Needs::Hessian);
        let seen = seen.then(|| self.statistics(backend, shape[1], needs)).transpose()?;
        let shared = match &seen {
            Some(seen) => solver.share(backend, Some(seen))?,
            None => Shared { statistics: None, factor: None, fallback: None },
        };
        let one = self.tried(|| {
            let importance =
                Some(&vec![1.0; shape[1]][..]).filter(|_| encoding.ggml_type().is_some()).map(<[f32]>::to_vec);
            let asked =
                Asked { weight: &weight, spec: GridSpec::of(*encoding, shape[1]), importance: importance.as_deref() };
            let found = solver.solve(backend, &shared, &[asked])?;
            settled(backend, &found[0].dequantized)
        })?;
        Ok(one / (shape[0] * shape[1]) as f64)
    }

    /// Seconds of searching channel scales for linears that read one input.
    fn scales(&mut self, backend: &B, walk: &Walk<'_, B>, stage: &[&Linear]) -> Result<f64> {
        let Some(placement) = walk.targets[0].placements(stage[0]).first() else { return Ok(0.0) };
        let Some(spec) = plain_grid(&placement.encoding, COLUMNS.min(stage[0].cols)) else { return Ok(0.0) };
        let key = format!("scales {:?}", spec.encoding);
        let awq = Awq::default();
        let one = match self.codes.get(&key) {
            Some([one, _]) => *one,
            None => {
                let cols = spec.group_of.len();
                let weight = backend.upload(self.random([64, cols]))?;
                let seen = self.statistics(backend, cols, Needs::Hessian)?;
                let (gram, ones) = (seen.gram.as_ref().expect("asked for"), vec![1.0; cols]);
                let one = self.tried(|| backend.scaled_rounding_loss(&weight, &ones, &spec, gram).map(drop))?;
                // The error is multiplied by the whole Hessian.
                let one = one / (64 * cols * cols) as f64;
                self.codes.insert(key, [one, 0.0]);
                one
            }
        };
        let cols = stage[0].cols as f64;
        Ok(stage.iter().map(|linear| (awq.grid * linear.rows.min(awq.rows)) as f64 * cols * cols * one).sum())
    }

    fn statistics(&mut self, backend: &B, cols: usize, needs: Needs) -> Result<Statistics<B>> {
        let input = backend.input(backend.upload(self.random([cols + 64, cols]))?)?;
        Statistics::gather(backend, cols, needs, |add| add(&input)).map_err(|error: kernels::Error| error.into())
    }

    fn random(&mut self, [rows, cols]: [usize; 2]) -> Array2<f32> {
        let seed = &mut self.seed;
        // Numerical Recipes' generator; nothing hangs on how random they are.
        Array2::from_shape_fn((rows, cols), |_| {
            *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *seed as f32 / u32::MAX as f32 - 0.5
        })
    }

    /// Seconds of one call: the least of some, after one that does not count, unless that took long.
    fn tried(&self, mut work: impl FnMut() -> kernels::Result<()>) -> Result<f64> {
        let begun = Instant::now();
        work()?;
        let first = begun.elapsed().as_secs_f64();
        if first > TRIAL {
            return Ok(first);
        }
        let (begun, mut least) = (Instant::now(), f64::INFINITY);
        while begun.elapsed().as_secs_f64() < TRIAL {
            let one = Instant::now();
            work()?;
            least = least.min(one.elapsed().as_secs_f64());
        }
        Ok(least)
    }
}

/// Seconds before and after the work.
const START: f64 = 0.2;

/// Bytes that are hashed in a second.
const HASHED: f64 = 1.0e9;

/// Waits until a device has made a matrix; a CPU has.
fn settled<B: Backend>(backend: &B, matrix: &B::Matrix) -> kernels::Result<()> {
    match backend.room() {
        Some(_) => backend.is_finite(matrix).map(drop),
        None => Ok(()),
    }
}

/// Every group of linears that read one input, with its block, and the share of the tokens that go through it.
fn stages(graph: &Graph) -> Vec<(&Block, Vec<&Linear>, f64)> {
    let mut all = Vec::new();
    for block in &graph.blocks {
        for step in &block.steps {
            let (experts, before) = match &step.layer {
                Layer::Moe(moe) => (moe.experts.len(), usize::from(moe.latent.is_some())),
                _ => (0, 0),
            };
            for (index, stage) in step.layer.linears().into_iter().enumerate() {
                // Each expert has two stages; those of what every token takes come last.
                let share = match &step.layer {
                    Layer::Moe(moe) if (before..before + 2 * experts).contains(&index) => {
                        moe.router.top_k as f64 / experts.max(1) as f64
                    }
                    _ => 1.0,
                };
                if !stage.is_empty() {
                    all.push((block, stage, share));
                }
            }
        }
    }
    all
}
