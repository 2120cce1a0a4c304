//! What a run will take of the host's memory, told before it begins, and refused where it cannot be had.
//!
//! Counted is what a run keeps in memory of its own; pages of mapped files do not count, for the system takes them back when it needs
//! room. The estimate sums up what `docs/ARCHITECTURE.md` lists under *Memory*; runs were found to take 86 to 106 % of it.

mod free;
#[cfg(test)]
mod tests;

use calibration::statistics::Needs;
use kernels::Backend;

pub use self::free::Free;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::forward;
use crate::graph::{Attention, Block, Graph, Keys, Layer, Linear, Projections, Step};
use crate::program::{Kept, Kind, Lifetimes, Operation, Program, Value};
use crate::recipe::Recipe;
use crate::verify;

/// What a run has in memory whatever its model: the program, a tokenizer, parts of a text that are being tokenized.
const BASE: u64 = 64 << 20;

/// Bytes of a text that one token takes at most, where a text is to be refused before it is tokenized; real ones have 4.
const BYTES_PER_TOKEN: u64 = 64;

/// What an estimate may be too high by before a run is refused for it.
const SLACK: f64 = 0.85;

/// The largest resident set of this process so far, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// A device as far as what it keeps in the host's memory goes.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// Bytes that it may use of its own; the host's is then only where things are put aside.
    pub room: Option<u64>,
    /// Tokens that go through an operator together.
    pub at_once: usize,
    /// Bytes of a value that products read, in calibration.
    input: u64,
    kept_values: u64,
}

impl Device {
    /// What a backend keeps where.
    pub fn of<B: Backend>(backend: &B) -> Device {
        let input = backend.relaxed().bytes_of_input() as u64;
        Device {
            room: backend.room(),
            at_once: backend.tokens_at_once(),
            input,
            kept_values: backend.kept_values() as u64,
        }
    }
}

/// What a recipe does that takes memory.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// What is gathered of inputs.
    pub needs: Needs,
    /// Whether Hessians are factored, which takes them once more in doubles.
    pub sweeps: bool,
    /// After a sweep scales and codes are moved, by a whole damped Hessian.
    pub refines: bool,
    /// Each block is first run as it is.
    pub smooths: bool,
}

impl Work {
    /// That of a recipe which needs this of its inputs.
    pub fn of(recipe: &Recipe, needs: Needs) -> Work {
        let (sweeps, smooths) = (recipe.method.sweeps(), recipe.method.smooths());
        Work { needs, sweeps, refines: sweeps && recipe.refine, smooths }
    }

    /// What two recipes take that are worked off together.
    pub fn and(self, other: Work) -> Work {
        Work {
            needs: self.needs.max(other.needs),
            sweeps: self.sweeps || other.sweeps,
            refines: self.refines || other.refines,
            smooths: self.smooths || other.smooths,
        }
    }
}

/// Tokens in sequences of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Sequences that go through the model, which calibration has in memory together.
    pub count: u64,
    /// Tokens of the longest sequence, as which all are counted.
    pub length: u64,
}

impl Tokens {
    /// So many sequences of such a length.
    pub fn of(count: usize, length: usize) -> Tokens {
        Tokens { count: count as u64, length: length as u64 }
    }

    fn all(self) -> u64 {
        self.count.saturating_mul(self.length)
    }
}

/// Bytes of one linear's weight as f32.
fn f32s(linear: &Linear) -> u64 {
    4 * (linear.rows as u64) * (linear.cols as u64)
}

/// Bytes that quantizing takes with these calibration tokens; none where the recipe needs no text.
pub fn calibrating(graph: &Graph, device: Device, work: Work, tokens: Option<Tokens>) -> u64 {
    let weights = graph.blocks.iter().map(|block| solving(block, device, work)).max().unwrap_or(0);
    let Some(tokens) = tokens else { return BASE.saturating_add(weights) };
    let smoothing = u64::from(work.smooths);
    let streams = 4 * graph.width() as u64 * (1 + smoothing);
    let ids = 4;
    let stream = tokens.all().saturating_mul(streams + ids);
    let of_block = |(block, shared): (&Block, u64)| {
        let Running { kept, chunk } = running(graph, block, device, device.input, tokens);
        let kept = kept.saturating_add(tokens.all().saturating_mul(shared));
        kept.saturating_add(chunk.saturating_add(products(block, device.input)).max(solving(block, device, work)))
    };
    let block = graph.blocks.iter().zip(shared(graph)).map(of_block).max().unwrap_or(0);
    [stream, block].into_iter().fold(BASE, u64::saturating_add)
}

/// Bytes of one token that lie beside the stream while each block is run: keys and values, or their latents, that earlier blocks have left for
/// later ones.
fn shared(graph: &Graph) -> impl Iterator<Item = u64> + '_ {
    graph.blocks.iter().scan(0, |left, block| {
        let before = *left;
        if let Some(Attention { keys: Keys::Left(_), shape, projections, .. }) = block.attention() {
            *left += 4 * match projections {
                Projections::Direct(_) => shape.kv_heads * (shape.head_dim + shape.value_dim),
                Projections::Latent(latent) => latent.kv_a.as_ref().map_or(0, |kv_a| kv_a.rows),
                Projections::Joint(joint) => joint.kv.rows,
            } as u64;
        }
        Some(before)
    })
}

/// Bytes of a symmetric matrix of which a triangle is used: rows are touched up to the diagonal, by pages.
fn triangle(width: usize, bytes: u64) -> u64 {
    let width = width as u64;
    (bytes * width * width / 2).saturating_add(4096 * width).min(bytes * width * width)
}

/// Bytes of the weights of a block's largest step as products read them.
fn products(block: &Block, input: u64) -> u64 {
    let of = |linears: Vec<&Linear>| linears.into_iter().map(|linear| f32s(linear) / 4 * input).sum::<u64>();
    let step = |layer: &Layer| match layer {
        // One after the other.
        Layer::Moe(moe) => {
            let all = moe.experts.iter().chain(moe.shared.iter().map(|(shared, _)| shared));
            let latent = moe.latent.iter().map(|latent| of(latent.iter().collect())).sum::<u64>();
            all.map(|mlp| of(mlp.inputs.iter().chain([&mlp.down]).collect())).max().unwrap_or(0) + latent
        }
        layer => of(layer.linears().concat()),
    };
    // Beside what makes the gates of streams.
    let gates = |s: &Step| s.hyper.iter().map(|hyper| of(hyper.linears().collect())).sum::<u64>();
    block.steps.iter().map(|s| step(&s.layer) + gates(s)).max().unwrap_or(0)
}

/// Bytes that the largest linear of a block takes with what is known of its input, and what was solved before it.
fn solving(block: &Block, device: Device, work: Work) -> u64 {
    let hessian = |linear: &Linear| if work.needs >= Needs::Hessian { triangle(linear.cols, 4) } else { 0 };
    let mut most = 0;
    let (mut all, mut seen) = (0, 0);
    for step in &block.steps {
        // Those whose weights stay until the step is done.
        let mut ready = 0;
        for group in step.layer.linears() {
            let Some(first) = group.first() else { continue };
            let of_inputs = hessian(first);
            seen += of_inputs;
            let factor = if work.sweeps { of_inputs } else { 0 };
            // In doubles.
            let factoring = if work.sweeps { triangle(first.cols, 8) + factor } else { 0 };
            // As it was, as it will be, its codes, and codes of others that wait to be written.
            let largest = group.iter().map(|linear| f32s(linear)).max().unwrap_or(0);
            let solved = group.iter().map(|linear| f32s(linear) / 4 * device.input).sum::<u64>();
            let refining = if work.refines { 4 * (first.cols as u64).pow(2) } else { 0 };
            let solving = 2 * largest + largest / 4 * 2 + solved + refining;
            most = most.max(ready + of_inputs + factoring.max(factor + solving));
            all += group.iter().map(|linear| f32s(linear)).sum::<u64>();
            // An expert's are let go before the next one.
            if !matches!(step.layer, Layer::Moe(_)) {
                ready += solved;
            }
        }
    }
    // Scales are searched with all of a block in memory, and what is known of all of its inputs.
    if work.smooths { most.max(all + seen) + all } else { most }
}

/// What a block takes beside the stream, in bytes.
struct Running {
    /// What lasts from one step to the next, of all tokens.
    kept: u64,
    /// For the chunk of them that is at work.
    chunk: u64,
}

fn running(graph: &Graph, block: &Block, device: Device, input: u64, tokens: Tokens) -> Running {
    let (all, hidden) = (tokens.all(), graph.width() as u64);
    let chunk = tokens.length.max(device.at_once as u64).min(all);
    // Nothing runs a block of which only the linears are known.
    let Some(program) = Program::of(block) else { return Running { kept: 0, chunk: chunk.saturating_mul(8 * hidden) } };
    let experts = program.values.iter().filter_map(|value| value.expert).max().map_or(1, |last| last as u64 + 1);
    let chosen = program.operations.iter().find_map(|operation| match operation.kind {
        Kind::Route(router) => Some(router.top_k as u64),
        _ => None,
    });
    let kept = |value: &Value| {
        let values = all.saturating_mul(value.width as u64);
        let bytes = match value.maker.map(|at| &program.operations[at].kind) {
            // A number of the token and a weight.
            Some(Kind::Route(_)) => 12,
            _ if value.multiplied => input,
            _ => 4,
        };
        match (value.kept, value.expert) {
            (Kept::Room, _) if values > device.kept_values => 0,
            // Twice an expert's share of the tokens.
            (_, Some(_)) => values.min(values.saturating_mul(2 * chosen.unwrap_or(1)) / experts).saturating_mul(bytes),
            _ => values.saturating_mul(bytes),
        }
    };
    let wide = |operation: &Operation<'_>| match operation.kind {
        Kind::Attention { .. } | Kind::Delta(_) => {
            (4 + input) * operation.reads.iter().map(|v| program.values[*v].width as u64).sum::<u64>()
        }
        // Of what a table has, and of the streams that it is compared with.
        Kind::Agree(_) => 16 * program.values[operation.reads[0]].width as u64,
        // Streams that are begun are put side by side one after the other.
        Kind::Begin => 16 * program.values[operation.makes[0]].width as u64,
        Kind::Activate(_) | Kind::Cut(_) => 8 * program.values[operation.makes[0]].width as u64,
        _ => 0,
    };
    // What layers behind an indexer take over stays in the chunks.
    let carried = program.operations.iter().map(|operation| match operation.kind {
        Kind::Select { shared: true, .. } | Kind::Chosen => 4 * program.values[operation.makes[0]].width as u64,
        _ => 0,
    });
    let carried = all.saturating_mul(carried.sum());
    let kept = Lifetimes::of(&program, true).most(&program, kept).saturating_add(carried);
    let wide = program.operations.iter().map(wide).max().unwrap_or(0);
    Running { kept, chunk: chunk.saturating_mul(8 * hidden + wide) }
}

/// Bytes that evaluating these models beside each other takes; they are of one shape, and `None` is one in ggml's types.
pub fn measuring(graph: &Graph, device: Device, models: &[Option<&Checkpoint>], windows: Tokens) -> u64 {
    // What nobody gathers statistics of is used once, and is not kept.
    let device = Device { kept_values: 0, ..device };
    let further = graph.predictors().iter().filter_map(Block::further);
    let heads = 1 + further.filter(|further| further.head.is_some()).count() as u64;
    let heads = heads * models.iter().map(|model| forward::kept(graph, *model)).sum::<u64>();
    let models = models.len() as u64;
    let batch = verify::batch(windows.length as usize).min(windows.count as usize);
    let batch = Tokens { count: batch as u64, ..windows };
    let block = |(block, shared): (&Block, u64)| {
        let Running { kept, chunk } = running(graph, block, device, 4, batch);
        let kept = kept.saturating_add(batch.all().saturating_mul(shared));
        products(block, 4).saturating_add(kept).saturating_add(chunk)
    };
    let blocks = graph.blocks.iter().zip(shared(graph)).map(block).max().unwrap_or(0);
    // Before the head, and before that of each layer that predicts further tokens.
    let states = graph.width() as u64 + (graph.predictors().len() * graph.hidden) as u64;
    let stream = batch.all().saturating_mul(4 * models * states);
    let together = (verify::logits_at_once(graph.vocabulary) as u64).min(windows.length.max(device.at_once as u64));
    // Of the reference, and of one of the others after another.
    let logits = (4 * models.min(2) * graph.vocabulary as u64).saturating_mul(together);
    // The ids of the text, and of each window.
    let ids = windows.all().saturating_mul(8);
    [stream, blocks.max(logits), heads, ids].into_iter().fold(BASE, u64::saturating_add)
}

/// How many of the models fit into memory together beside the reference, at least one; all where the device's memory is not the host's.
pub fn fitting(
    graph: &Graph,
    device: Device,
    reference: Option<&Checkpoint>,
    models: &[&Checkpoint],
    windows: Tokens,
) -> usize {
    let Some(free) = Free::now().filter(|_| device.room.is_none()) else { return models.len() };
    let fits = |count: u64| {
        let sides: Vec<_> = models[..count as usize].iter().copied().chain(reference).map(Some).collect();
        measuring(graph, device, &sides, windows) as f64 * SLACK <= free.bytes as f64
    };
    largest(models.len() as u64, fits).max(1) as usize
}

/// What a run will take, if it can be had.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Bytes at the most, about.
    pub bytes: u64,
    free: Option<Free>,
}

impl Expected {
    /// Fails where a calibration takes more than there is, with what would fit; none where the device's memory is not the host's.
    pub fn calibration(
        graph: &Graph,
        device: Device,
        work: Work,
        tokens: Option<Tokens>,
        free: Option<Free>,
    ) -> Result<Expected> {
        let bytes = calibrating(graph, device, work, tokens);
        let expected = Expected { bytes, free };
        let (Some(free), false) = (&expected.free, expected.fits()) else { return Ok(expected) };
        let fits = |tokens: Tokens| calibrating(graph, device, work, Some(tokens)) <= free.bytes;
        let Some(asked) = tokens else {
            return Err(Error::usage(format!(
                "a linear of the model takes about {} of memory while it is quantized, and {free}: give it more",
                gigabytes(bytes)
            )));
        };
        let what = format!(
            "calibrating on {} sequences of {} tokens takes about {} of memory, and {free}",
            asked.count,
            asked.length,
            gigabytes(bytes)
        );
        let count = largest(asked.count, |count| fits(Tokens { count, ..asked }));
        let length = largest(asked.length, |length| fits(Tokens { count: 1, length }));
        Err(Error::usage(match (count, length) {
            (0, 0) => format!(
                "{what}; {} of it are the model's own layers: give it more memory, or use --method rtn without calibration",
                gigabytes(calibrating(graph, device, work, Some(Tokens { count: 1, length: 1 })))
            ),
            (0, length) => format!("{what}: give --samples 1 --seq-len {length} or less"),
            (count, _) => format!("{what}: give --samples {count} or less"),
        }))
    }

    /// The larger of this and what evaluating takes. Fails where that is more than there is, with what would fit.
    pub fn and_measuring(
        self,
        graph: &Graph,
        device: Device,
        models: &[Option<&Checkpoint>],
        windows: Tokens,
        flag: &str,
    ) -> Result<Expected> {
        let bytes = measuring(graph, device, models, windows);
        let expected = Expected { bytes: self.bytes.max(bytes), free: self.free };
        let (Some(free), false) = (&expected.free, expected.fits()) else { return Ok(expected) };
        let fits = |length: u64| measuring(graph, device, models, Tokens { length, ..windows }) <= free.bytes;
        let advice = match (flag, largest(windows.length, fits)) {
            ("--context", length) if length > 1 => format!("give --context {length} or less"),
            ("--context", _) => "give it more".to_owned(),
            _ => "give it more, or --verify-text none".to_owned(),
        };
        Err(Error::usage(format!(
            "measuring windows of {} tokens takes about {} of memory, and {free}: {advice}",
            windows.length,
            gigabytes(bytes)
        )))
    }

    fn fits(&self) -> bool {
        self.free.as_ref().is_none_or(|free| self.bytes as f64 * SLACK <= free.bytes as f64)
    }

    /// What there is to say at the start.
    pub fn line(&self, what: &[String]) -> String {
        let free = self.free.as_ref().map_or(String::new(), |free| format!("; {free}"));
        let what = if what.is_empty() { "this".to_owned() } else { what.join(" and ") };
        format!("{what} takes up to about {} of memory{free}", gigabytes(self.bytes))
    }
}

/// Nothing yet, beside what can be had.
pub fn nothing(free: Option<Free>) -> Expected {
    Expected { bytes: 0, free }
}

/// Fewer tokens than a text of so many bytes can have, or than are asked for.
pub fn at_least(asked: Tokens, text_bytes: u64) -> Tokens {
    let most = text_bytes / BYTES_PER_TOKEN;
    let length = asked.length.min(most);
    Tokens { count: asked.count.min(most / length.max(1)), length }
}

/// The largest of `1..=most` that fits, 0 where none does; what does not fit once may fit again where it is no longer kept.
fn largest(most: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

/// As people read it.
pub(crate) fn gigabytes(bytes: u64) -> String {
    let bytes = bytes as f64;
    if bytes < 1e9 { format!("{:.0} MB", bytes / 1e6) } else { format!("{:.1} GB", bytes / 1e9) }
}
