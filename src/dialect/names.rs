//! The tensors of a GGUF file: their names and order, and of which parts of a model's tensors each is made.

mod altup;
mod choice;
mod delta;
pub(crate) mod joint;
mod mamba;
mod per_layer;
mod streams;

pub(crate) use self::mamba::absorbed;
use crate::dialect::architectures::{self, Architecture, Need, ROPE_FREQS, ROPE_LONG, ROPE_SHORT, STANDING};
use crate::error::{Error, Result};
use crate::graph::{
    Attention, Block, Connection, Further, Graph, HeadNorms, Joining, Latent, Layer, Linear, Lookup, Mlp, Moe, Norm,
    Projections, Rope, RopeScaling,
};

/// The tensors of a GGUF file, in the order in which llama-quantize writes them.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportPlan {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Every tensor, in file order.
    pub tensors: Vec<ExportTensor>,
}

/// One tensor of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportTensor {
    /// Its name in the file.
    pub gguf: String,
    /// Where its values come from.
    pub source: Source,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
}

/// Where the values of a tensor come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Parts of the model's tensors, one after the other: one for each matrix of a tensor of several.
    Parts(Vec<Part>),
    /// Computed from the configuration.
    Values(Vec<f32>),
    /// Nothing but zeros, of whatever type: loaders ask for it, and nothing reads it.
    Zeros,
}

/// Consecutive rows of a GGUF tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Where they come from.
    pub from: From,
    /// Which rows of it, in the order of the file; all of them without. Elements where it has one extent.
    pub rows: Option<Vec<usize>>,
    /// These rows are columns of the file.
    pub transposed: bool,
    /// The order of the columns in the file, by those of the model; their own without.
    pub columns: Option<Vec<usize>>,
    /// Added to every value.
    pub offset: f32,
    /// What every value is multiplied by then.
    pub factor: f32,
    /// The file has this times `exp(x)` of every value `x`, 1 or −1: rates of decay, whose logarithms the model has.
    pub rates: Option<f32>,
}

/// What a part is taken from.
#[derive(Clone, Debug, PartialEq)]
pub enum From {
    /// A linear's weight, `[rows, cols]`, however it is stored.
    Weight(Linear),
    /// A linear's bias, `[rows]`.
    Bias(Linear),
    /// Another tensor, and its extents.
    Tensor(String, Vec<usize>),
}

impl From {
    /// The tensor of the checkpoint.
    pub fn tensor(&self) -> String {
        match self {
            From::Weight(linear) => linear.weight(),
            From::Bias(linear) => linear.bias().expect("planned for those that have one"),
            From::Tensor(name, _) => name.clone(),
        }
    }

    /// Rows and width; a vector is one row.
    pub fn extents(&self) -> [usize; 2] {
        match self {
            From::Weight(linear) => [linear.rows, linear.cols],
            From::Bias(linear) => [1, linear.rows],
            From::Tensor(_, shape) => match shape[..] {
                [] => [1, 1],
                [.., width] => [shape.iter().product::<usize>() / width.max(1), width],
            },
        }
    }
}

impl Part {
    /// All of something, as it is.
    pub fn whole(from: From) -> Part {
        Part { from, rows: None, transposed: false, columns: None, offset: 0.0, factor: 1.0, rates: None }
    }

    fn some(from: From, rows: Option<Vec<usize>>) -> Part {
        Part { rows, ..Part::whole(from) }
    }

    /// Makes of the model's values those of the file.
    pub fn encode(&self, values: &mut [f32]) {
        if self.offset != 0.0 {
            values.iter_mut().for_each(|x| *x += self.offset);
        }
        if self.factor != 1.0 {
            values.iter_mut().for_each(|x| *x *= self.factor);
        }
        if let Some(sign) = self.rates {
            values.iter_mut().for_each(|x| *x = sign * x.exp());
        }
    }

    /// Makes of the file's values those of the model.
    pub fn decode(&self, values: &mut [f32]) {
        if let Some(sign) = self.rates {
            values.iter_mut().for_each(|x| *x = (sign * *x).ln());
        }
        if self.factor != 1.0 {
            values.iter_mut().for_each(|x| *x /= self.factor);
        }
        if self.offset != 0.0 {
            values.iter_mut().for_each(|x| *x -= self.offset);
        }
    }

    /// Whether values lie in the file as they are in the model, but for the rows that they are in.
    pub fn is_plain(&self) -> bool {
        !self.transposed && self.columns.is_none() && self.offset == 0.0 && self.factor == 1.0 && self.rates.is_none()
    }

    /// Rows and width in the file; a vector is one row.
    pub fn extents(&self) -> [usize; 2] {
        let [rows, width] = self.from.extents();
        let taken = self.rows.as_ref().map(Vec::len);
        match (&self.from, self.transposed) {
            (_, true) => [width, taken.unwrap_or(rows)],
            (From::Bias(_), _) => [1, taken.unwrap_or(width)],
            (From::Tensor(_, shape), _) if shape.len() < 2 => [1, taken.unwrap_or(width)],
            _ => [taken.unwrap_or(rows), width],
        }
    }
}

impl ExportTensor {
    /// Its parts; none where its values are computed.
    pub fn parts(&self) -> &[Part] {
        match &self.source {
            Source::Parts(parts) => parts,
            Source::Values(_) | Source::Zeros => &[],
        }
    }

    /// Rows and width, all matrices together; a vector is one row.
    pub fn extents(&self) -> [usize; 2] {
        match self.shape[..] {
            [] => [1, 1],
            [width] => [1, width],
            [.., width] => [self.shape.iter().product::<usize>() / width.max(1), width],
        }
    }

    /// How many matrices it holds.
    pub fn matrices(&self) -> usize {
        if self.shape.len() > 2 { self.shape[..self.shape.len() - 2].iter().product() } else { 1 }
    }
}

/// Lists the tensors of `graph` as a GGUF file holds them.
///
/// A tied head is left out where runtimes take the embedding. Llama 3's and LongRoPE's scaling become F32 tensors of
/// factors. Fails for a family without an architecture in GGUF, and for a model with tensors that llama.cpp does not take.
pub fn plan(graph: &Graph) -> Result<ExportPlan> {
    let architecture = Architecture::of(graph).ok_or_else(|| {
        Error::usage(format!(
            "models of the family `{}` cannot be written as GGUF; choose another --format",
            graph.family
        ))
    })?;
    if let Some(why) = &graph.unrunnable {
        return Err(Error::usage(format!("{why}, and a GGUF file has no place for it; choose another --format")));
    }
    let neighbours = architecture.rotates_neighbours(graph);
    let mut list = Lister { architecture, neighbours, tensors: Vec::new() };
    list.model(&graph.predicting_further(architecture.further.is_some()))?;
    let mut tensors = list.tensors;
    tensors.sort_by(|a, b| architectures::file_order(&a.gguf, &b.gguf));
    Ok(ExportPlan { architecture: architecture.id, tensors })
}

/// A refusal of what an architecture has no place for.
pub(super) fn cannot(architecture: &str, what: impl std::fmt::Display) -> Error {
    Error::usage(format!(
        "{what} cannot be written as GGUF's architecture `{architecture}`, as llama.cpp reads it; give another --format, as \
         compressed-tensors"
    ))
}

struct Lister {
    architecture: &'static Architecture,
    /// Whether the runtime rotates neighbours together in this model.
    neighbours: bool,
    tensors: Vec<ExportTensor>,
}

impl Lister {
    fn cannot(&self, what: impl std::fmt::Display) -> Error {
        cannot(self.architecture.id, what)
    }

    fn push(&mut self, gguf: String, shape: Vec<usize>, parts: Vec<Part>) {
        self.tensors.push(ExportTensor { gguf, shape, source: Source::Parts(parts) });
    }

    fn values(&mut self, gguf: String, values: Vec<f32>) {
        self.tensors.push(ExportTensor { gguf, shape: vec![values.len()], source: Source::Values(values) });
    }

    fn model(&mut self, graph: &Graph) -> Result<()> {
        let shape = [graph.vocabulary, graph.hidden].to_vec();
        let embedding = From::Tensor(graph.embedding.tensor.clone(), shape.clone());
        let absorbs = self.architecture.absorbs;
        let times = |factor: f32| Part { factor: if absorbs { factor } else { 1.0 }, ..Part::whole(embedding.clone()) };
        self.push("token_embd.weight".into(), shape.clone(), vec![times(graph.embedding.scale)]);
        if let Some((tensor, rows)) = &graph.embedding.positions {
            let extents = vec![*rows, graph.hidden];
            let part = Part::whole(From::Tensor(tensor.clone(), extents.clone()));
            self.push("position_embd.weight".into(), extents, vec![part]);
        }
        for (index, block) in graph.blocks.iter().enumerate() {
            let at = format!("blk.{index}");
            let mut shared = None;
            for step in &block.steps {
                let gated = matches!(step.hyper.as_deref(), Some(Connection::Gated(_)));
                let (pre, post) = match step.layer {
                    Layer::Mlp(_) | Layer::Moe(_) if gated => ("hc_ffn_norm", "post_ffw_norm"),
                    _ if gated => ("hc_attn_norm", "post_attention_norm"),
                    Layer::Attention(_) | Layer::Delta(_) | Layer::Mamba(_) | Layer::Short(_) => {
                        ("attn_norm", "post_attention_norm")
                    }
                    Layer::PerLayer(_) => ("inp_gate_norm", "post_norm"),
                    // Of one of two layers in a block, where others have one in each.
                    _ if block.further().is_some() && self.architecture.ffn_norm == "attn_norm" => {
                        ("post_attention_norm", "post_ffw_norm")
                    }
                    _ => (self.architecture.ffn_norm, "post_ffw_norm"),
                };
                // Of a norm that two steps share there is the first name only.
                if let Some(norm) = step
                    .pre
                    .as_ref()
                    .filter(|norm| shared.as_ref() != Some(norm) || !(block.parallel || step.unseen > 0))
                {
                    self.norm(&format!("{at}.{pre}"), norm)?;
                    shared = Some(norm);
                }
                if let Some(norm) = &step.post {
                    self.norm(&format!("{at}.{post}"), norm)?;
                }
                if let Some(hyper) = &step.hyper {
                    let part = if matches!(step.layer, Layer::Mlp(_) | Layer::Moe(_)) { "ffn" } else { "attn" };
                    self.connection(&format!("{at}.hc_{part}"), hyper)?;
                }
                let first = self.tensors.len();
                match &step.layer {
                    Layer::Attention(attention) => self.attention(&at, attention, graph.hidden)?,
                    Layer::Delta(delta) => self.delta(&at, delta)?,
                    Layer::Mamba(mamba) => self.mamba(&at, mamba, step.given)?,
                    Layer::Short(short) => self.short(&at, short)?,
                    Layer::Mlp(mlp) => self.mlp(&at, "", mlp)?,
                    Layer::Moe(moe) => self.moe(&at, moe)?,
                    Layer::Further(further) => self.further(&at, further)?,
                    Layer::PerLayer(layer) => self.per_layer(&at, layer)?,
                    Layer::Grams(layer) => self.grams(&at, layer, graph.hidden)?,
                    Layer::Opaque(_) => return Err(self.cannot("a model of an unknown family")),
                }
                if absorbs {
                    self.absorb(first, step);
                }
            }
            // In such a layer its class asks for them in one piece.
            if self.architecture.id == "mimo2" && block.further().is_some() {
                super::fused::join_queries(&mut self.tensors, &at);
            }
            self.scale(&at, block)?;
            self.altup(&at, block)?;
        }
        self.tables(graph)?;
        graph.collapse.iter().try_for_each(|collapse| self.collapse(collapse))?;
        self.norm(self.architecture.final_norm, &graph.final_norm)?;
        let head = &graph.head;
        match (self.architecture.head, head.tied) {
            (Need::Never, false) => {
                return Err(self.cannot("an output projection that differs from the embedding"));
            }
            (Need::Must, true) => self.push("output.weight".into(), shape, vec![Part::whole(embedding)]),
            // What they are multiplied by differs.
            (_, true) if absorbs && head.scale != graph.embedding.scale => {
                self.push("output.weight".into(), shape, vec![times(head.scale)]);
            }
            (_, true) => {}
            (_, false) => {
                let from = From::Weight(head.linear.clone());
                self.push("output.weight".into(), shape, vec![Part { from, ..times(head.scale) }]);
            }
        }
        self.bias("output", &[(&head.linear, None)], self.architecture.head_bias)?;
        self.factors(graph)
    }

    /// Rotary factors, which all layers share.
    fn factors(&mut self, graph: &Graph) -> Result<()> {
        if self.architecture.per_layer {
            // Asked for wherever a layer sees all.
            let mut wide = graph.blocks.iter().filter_map(Block::attention).filter(|a| a.shape.window.is_none());
            if let Some(rope) = wide.find_map(|attention| attention.rope.as_deref()) {
                self.values(ROPE_FREQS.to_owned(), standing(rope));
            }
            return Ok(());
        }
        let attention = graph.blocks.iter().filter_map(|block| block.attention());
        for (rope, head_dim) in attention.filter_map(|a| Some((a.rope.as_deref()?, a.shape.head_dim))) {
            let found = match &rope.scaling {
                RopeScaling::Llama3 { .. } => {
                    let mut factors = frequency_factors(rope);
                    // Of layers that see all half a head is turned, and the tensor is as long as the others' would be.
                    if self.architecture.id == "step35" {
                        factors.resize(head_dim / 2, 1.0);
                    }
                    vec![(ROPE_FREQS, factors)]
                }
                RopeScaling::Long { short, long, .. } => vec![(ROPE_LONG, long.clone()), (ROPE_SHORT, short.clone())],
                _ => continue,
            };
            if !self.architecture.factors {
                return Err(self.cannot("rotary frequencies with a factor for each"));
            }
            found.into_iter().for_each(|(name, values)| self.values(name.to_owned(), values));
            break;
        }
        Ok(())
    }

    fn norm(&mut self, name: &str, norm: &Norm) -> Result<()> {
        self.norm_of(name, norm, None)
    }

    /// A norm of values in this order.
    fn norm_of(&mut self, name: &str, norm: &Norm, order: Option<Vec<usize>>) -> Result<()> {
        let part = |tensor: &String, offset| Part {
            offset,
            ..Part::some(From::Tensor(tensor.clone(), norm.shape.clone()), order.clone())
        };
        let mut shape = norm.shape.clone();
        if norm.weights.len() > 1 {
            shape.insert(0, norm.weights.len());
        }
        if !norm.weights.is_empty() {
            let parts = norm.weights.iter().map(|tensor| part(tensor, norm.offset)).collect();
            let bare = self.architecture.bare_ffn_norm && name.ends_with(".ffn_norm");
            self.push(if bare { name.to_owned() } else { format!("{name}.weight") }, shape, parts);
        }
        if let Some(bias) = &norm.bias {
            self.push(format!("{name}.bias"), norm.shape.clone(), vec![part(bias, 0.0)]);
        }
        Ok(())
    }

    /// The bias of rows of linears, as the architecture wants it: zeros where it must have one.
    fn bias(&mut self, name: &str, of: &[(&Linear, Option<Vec<usize>>)], need: Need) -> Result<()> {
        let count = |(linear, rows): &(&Linear, Option<Vec<usize>>)| rows.as_ref().map_or(linear.rows, Vec::len);
        let length: usize = of.iter().map(count).sum();
        let biased = of.iter().filter(|(linear, _)| linear.bias().is_some()).count();
        match (biased, need) {
            (0, Need::Must) => self.values(format!("{name}.bias"), vec![0.0; length]),
            (0, _) => {}
            (_, Need::Never) => return Err(self.cannot(format_args!("a bias of `{}`", of[0].0.module))),
            _ if biased < of.len() => return Err(self.cannot("biases of some projections only")),
            _ => {
                let part = |(linear, rows): &(&Linear, Option<Vec<usize>>)| {
                    Part::some(From::Bias((*linear).clone()), rows.clone())
                };
                self.push(format!("{name}.bias"), vec![length], of.iter().map(part).collect());
            }
        }
        Ok(())
    }

    /// Rows of one linear as a matrix, and its bias.
    fn linear(&mut self, name: &str, linear: &Linear, rows: Option<Vec<usize>>, bias: Need) -> Result<()> {
        let count = rows.as_ref().map_or(linear.rows, Vec::len);
        let part = Part::some(From::Weight(linear.clone()), rows.clone());
        self.push(format!("{name}.weight"), vec![count, linear.cols], vec![part]);
        self.bias(name, &[(linear, rows)], bias)
    }

    fn attention(&mut self, at: &str, attention: &Attention, hidden: usize) -> Result<()> {
        let Attention { projections, shape, .. } = attention;
        let architecture = self.architecture;
        if let Some(gate) = &attention.head_gate {
            if !matches!(architecture.id, "step35" | "bailingmoe3") {
                return Err(self.cannot("attention with a gate for each head"));
            }
            self.linear(&format!("{at}.attn_gate"), gate, None, Need::Never)?;
        }
        if architecture.square && shape.heads * shape.head_dim != hidden {
            return Err(self.cannot(format_args!(
                "{} heads of {} values in a model of width {hidden}",
                shape.heads, shape.head_dim
            )));
        }
        match projections {
            // Queries and gates head by head, as they are stored.
            Projections::Direct(linears) if attention.gated => {
                let names: &[&str] = match linears.len() {
                    3 => &["attn_q", "attn_k", "attn_v"],
                    4 => &["attn_q", "attn_gate", "attn_k", "attn_v"],
                    _ => return Err(self.cannot("gated attention of this form")),
                };
                for (name, linear) in names.iter().zip(linears) {
                    self.linear(&format!("{at}.{name}"), linear, None, architecture.qkv_bias)?;
                }
            }
            Projections::Direct(linears) => {
                let parts: Vec<(&Linear, Option<Vec<usize>>)> = linears
                    .iter()
                    .flat_map(|linear| (0..linear.split.parts()).map(move |part| (linear, linear.split.rows(part))))
                    .collect();
                let [q, k, v] = &parts[..] else { return self.fewer(at, attention, linears) };
                let q = (q.0, self.rotated(attention, q.1.clone(), shape.heads)?);
                let k = (k.0, self.rotated(attention, k.1.clone(), shape.kv_heads)?);
                if let [fused] = &linears[..] {
                    // Queries, keys and values one after the other, whatever their order was.
                    let all: Vec<usize> = [&q.1, &k.1, &v.1].into_iter().flatten().flatten().copied().collect();
                    let rows = (!all.iter().copied().eq(0..fused.rows)).then_some(all);
                    self.linear(&format!("{at}.attn_qkv"), fused, rows, architecture.qkv_bias)?;
                } else {
                    for (name, (linear, rows)) in [("attn_q", q), ("attn_k", k), ("attn_v", v.clone())] {
                        self.linear(&format!("{at}.{name}"), linear, rows, architecture.qkv_bias)?;
                    }
                }
            }
            Projections::Latent(_) => self.latent(at, attention)?,
            Projections::Joint(_) if architecture.id == "deepseek4" => return self.joint(at, attention),
            Projections::Joint(_) => return Err(self.cannot("attention whose keys are its values")),
        }
        self.attention_ends(at, attention)
    }

    /// What follows the linears of queries, keys and values.
    fn attention_ends(&mut self, at: &str, attention: &Attention) -> Result<()> {
        let Attention { o, shape, norms, sinks, .. } = attention;
        let architecture = self.architecture;
        self.linear(&format!("{at}.attn_output"), o, None, architecture.o_bias)?;
        if let Some(HeadNorms { q, k, v, .. }) = norms {
            self.norm(&format!("{at}.attn_q_norm"), q)?;
            k.iter().try_for_each(|k| self.norm(&format!("{at}.attn_k_norm"), k))?;
            if v.as_ref().is_some_and(|v| !v.weights.is_empty()) {
                return Err(self.cannot("norms of values with weights"));
            }
        }
        if let Some(indexer) = attention.indexer() {
            self.indexer(at, attention, indexer)?;
        }
        if let Some(tensor) = sinks {
            let part = Part::whole(From::Tensor(tensor.clone(), vec![shape.heads]));
            self.push(format!("{at}.attn_sinks.weight"), vec![shape.heads], vec![part]);
        }
        Ok(())
    }

    /// Attention without values, or without keys too, of its own.
    fn fewer(&mut self, at: &str, attention: &Attention, linears: &[Linear]) -> Result<()> {
        let whole = linears.iter().all(|linear| linear.split.lengths.is_empty()) && linears.len() < 3;
        let Architecture { per_layer, altup, .. } = *self.architecture;
        if !(whole && (per_layer || altup)) || self.permuted(attention) {
            return Err(self.cannot("attention without queries, keys and values"));
        }
        for (name, linear) in ["attn_q", "attn_k"].into_iter().zip(linears) {
            self.linear(&format!("{at}.{name}"), linear, None, self.architecture.qkv_bias)?;
        }
        if altup {
            self.unread_keys(at, attention);
        }
        self.attention_ends(at, attention)
    }

    fn latent(&mut self, at: &str, attention: &Attention) -> Result<()> {
        let Projections::Latent(latent) = &attention.projections else { unreachable!("asked for these") };
        let Latent { q, q_norm, kv_a, kv_norm, kv_b, gate, .. } = &**latent;
        let (Some(kv_a), Some(kv_norm)) = (kv_a, kv_norm) else {
            return Err(self.cannot("attention through the latent of another layer"));
        };
        if let Some(gate) = gate {
            if !self.architecture.streams {
                return Err(self.cannot("attention through a latent with a gate"));
            }
            self.linear(&format!("{at}.attn_gate"), gate, None, Need::Never)?;
        }
        let (heads, shape) = (attention.shape.heads, &attention.shape);
        match &q[..] {
            [q] => self.linear(&format!("{at}.attn_q"), q, self.rotated(attention, None, heads)?, Need::Never)?,
            [q_a, q_b] => {
                self.linear(&format!("{at}.attn_q_a"), q_a, None, Need::Never)?;
                self.linear(&format!("{at}.attn_q_b"), q_b, self.rotated(attention, None, heads)?, Need::Never)?;
            }
            _ => return Err(self.cannot("queries of more than two linears")),
        }
        if let Some(norm) = q_norm {
            self.norm(&format!("{at}.attn_q_a_norm"), norm)?;
        }
        if attention.layout.interleaved && !self.neighbours {
            return Err(self.cannot("rotating neighbours"));
        }
        let (latent, nope, value) = (kv_b.cols, attention.layout.first, shape.value_dim);
        let order = match self.permuted(attention) {
            false => None,
            // The shared key lies behind the latent as if it were a head.
            true => {
                let pairs = (kv_a.rows - latent) / 2;
                Some((0..latent).chain((0..2 * pairs).map(|row| latent + row % 2 * pairs + row / 2)).collect())
            }
        };
        self.linear(&format!("{at}.attn_kv_a_mqa"), kv_a, order, Need::Never)?;
        self.norm(&format!("{at}.attn_kv_a_norm"), kv_norm)?;
        // Runtimes multiply queries instead of keys: by the transposed projection, head by head.
        let head = |head: usize| head * (nope + value);
        let keys = (0..heads).map(|h| Part {
            transposed: true,
            ..Part::some(From::Weight(kv_b.clone()), Some((head(h)..head(h) + nope).collect()))
        });
        self.push(format!("{at}.attn_k_b.weight"), vec![heads, latent, nope], keys.collect());
        let values =
            (0..heads).map(|h| Part::some(From::Weight(kv_b.clone()), Some((head(h) + nope..head(h + 1)).collect())));
        self.push(format!("{at}.attn_v_b.weight"), vec![heads, value, latent], values.collect());
        Ok(())
    }

    /// Whether rows of heads have another order in the file, since of model and runtime one rotates halves and the other neighbours.
    fn permuted(&self, attention: &Attention) -> bool {
        // Layers without positions too: one order for q and k changes nothing there.
        self.neighbours != attention.layout.interleaved
    }

    /// The rows of queries or keys in the order that the runtime's rotation wants.
    fn rotated(&self, attention: &Attention, rows: Option<Vec<usize>>, heads: usize) -> Result<Option<Vec<usize>>> {
        if !self.permuted(attention) {
            return Ok(rows);
        }
        if attention.norms.as_ref().is_some_and(|norms| !norms.q.weights.is_empty()) {
            return Err(self.cannot("norms of queries and keys whose halves are rotated"));
        }
        let head_dim = attention.shape.head_dim;
        let first = attention.layout.first;
        let pairs = attention.rope.as_ref().map_or(head_dim / 2, |rope| rope.inverse_frequencies.len());
        let row = |row: usize| {
            let (head, within) = (row / head_dim, row % head_dim);
            head * head_dim
                + match within.checked_sub(first).filter(|at| *at < 2 * pairs) {
                    Some(at) if self.neighbours => first + at % 2 * pairs + at / 2,
                    Some(at) => first + at % pairs * 2 + at / pairs,
                    None => within,
                }
        };
        Ok(Some((0..heads * head_dim).map(|at| rows.as_ref().map_or(row(at), |rows| rows[row(at)])).collect()))
    }

    /// What a layer has of its own that predicts further tokens.
    fn further(&mut self, at: &str, further: &Further) -> Result<()> {
        let own = match &further.joining {
            Joining::Beside { projection, state_first: false } => projection,
            Joining::Beside { .. } => {
                return Err(self.cannot("states before embeddings in a layer that predicts further tokens"));
            }
            Joining::Apart { .. } => {
                return Err(self.cannot("several streams in a layer that predicts further tokens"));
            }
        };
        self.linear(&format!("{at}.nextn.eh_proj"), own, None, Need::Never)?;
        self.norm(&format!("{at}.nextn.enorm"), &further.of_token)?;
        self.norm(&format!("{at}.nextn.hnorm"), &further.of_state)?;
        let last = if self.architecture.id == "bailingmoe3" { "layer_output_norm" } else { "nextn.shared_head_norm" };
        self.norm(&format!("{at}.{last}"), &further.norm)?;
        let Lookup { tensor, rows, cols, .. } = &further.embedding;
        if tensor.starts_with(&further.prefix) {
            let shape = vec![*rows, *cols];
            let part = Part::whole(From::Tensor(tensor.clone(), shape.clone()));
            self.push(format!("{at}.nextn.embed_tokens.weight"), shape, vec![part]);
        }
        match &further.head {
            Some(head) => self.linear(&format!("{at}.nextn.shared_head_head"), head, None, Need::Never),
            None => Ok(()),
        }
    }

    /// A feed-forward layer; `suffix` marks a shared expert.
    fn mlp(&mut self, at: &str, suffix: &str, mlp: &Mlp) -> Result<()> {
        let need = if suffix.is_empty() { self.architecture.mlp_bias } else { Need::Never };
        let names: &[&str] = match (&mlp.inputs[..], mlp.gated()) {
            ([both], true) if self.architecture.gate_apart => {
                for (part, name) in ["ffn_gate", "ffn_up"].into_iter().enumerate() {
                    self.linear(&format!("{at}.{name}{suffix}"), both, both.split.rows(part), need)?;
                }
                &[]
            }
            // Stored as one, and read as one: the gate's rows come first.
            ([_], _) => &["ffn_up"],
            (_, true) => &["ffn_gate", "ffn_up"],
            _ => return Err(self.cannot("a feed-forward layer of this form")),
        };
        for (name, linear) in names.iter().zip(&mlp.inputs) {
            self.linear(&format!("{at}.{name}{suffix}"), linear, None, need)?;
        }
        self.linear(&format!("{at}.ffn_down{suffix}"), &mlp.down, None, need)
    }

    fn moe(&mut self, at: &str, moe: &Moe) -> Result<()> {
        let need = self.architecture.moe_bias;
        self.linear(&format!("{at}.ffn_gate_inp"), &moe.router.linear, None, need)?;
        if let Some((tensor, _)) = &moe.router.correction {
            let part = Part::whole(From::Tensor(tensor.clone(), vec![moe.experts.len()]));
            self.push(format!("{at}.{}", self.architecture.correction), vec![moe.experts.len()], vec![part]);
        }
        self.table(at, &moe.router)?;
        let first = moe.experts.first().expect("checked with the graph");
        let names: &[&str] = match (first.inputs.len(), first.gated()) {
            (2, _) => &["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"],
            (_, false) if self.architecture.ungated_experts => &["ffn_up_exps", "ffn_down_exps"],
            _ => return Err(self.cannot("experts without a gate of its own")),
        };
        if let Some(latent) = &moe.latent {
            if !self.architecture.ungated_experts {
                return Err(self.cannot("experts in a space of their own"));
            }
            for (name, linear) in ["ffn_latent_down", "ffn_latent_up"].into_iter().zip(&**latent) {
                self.linear(&format!("{at}.{name}"), linear, None, Need::Never)?;
            }
        }
        let linear = |mlp: &Mlp, which: usize| mlp.inputs.get(which).unwrap_or(&mlp.down).clone();
        for (which, name) in names.iter().enumerate() {
            let (count, one) = (moe.experts.len(), linear(first, which));
            let all = || moe.experts.iter().map(|mlp| linear(mlp, which));
            if all().any(|other| (other.rows, other.cols) != (one.rows, one.cols)) {
                return Err(self.cannot("experts of different widths"));
            }
            let parts = all().map(|linear| Part::whole(From::Weight(linear))).collect();
            self.push(format!("{at}.{name}.weight"), vec![count, one.rows, one.cols], parts);
            match (one.bias().is_some(), need) {
                (false, Need::Must) => return Err(self.cannot("experts without biases")),
                (false, _) => {}
                (true, Need::Never) => return Err(self.cannot("experts with biases")),
                (true, _) => {
                    let parts = all().map(|linear| Part::whole(From::Bias(linear))).collect();
                    self.push(format!("{at}.{name}.bias"), vec![count, one.rows], parts);
                }
            }
        }
        self.within(at, moe)?;
        if let Some((shared, gate)) = &moe.shared {
            self.mlp(at, if moe.norms.is_some() { "" } else { "_shexp" }, shared)?;
            if let Some(gate) = gate {
                // A vector to loaders.
                let part = Part::whole(From::Tensor(gate.weight(), vec![gate.cols]));
                self.push(format!("{at}.ffn_gate_inp_shexp.weight"), vec![gate.cols], vec![part]);
            }
        }
        Ok(())
    }
}

/// What each rotary frequency of a head is divided by of which the last pairs stand still: by so much that they do.
fn standing(rope: &Rope) -> Vec<f32> {
    let plain = crate::families::rope::unscaled(f64::from(rope.theta), 2 * rope.inverse_frequencies.len());
    let pairs = plain.inverse_frequencies.iter().zip(&rope.inverse_frequencies);
    pairs.map(|(plain, turns)| if *turns == 0.0 { STANDING } else { plain / turns }).collect()
}

/// What each rotary frequency of Llama 3's scaling is divided by.
fn frequency_factors(rope: &Rope) -> Vec<f32> {
    let RopeScaling::Llama3 { factor, low, high, original } = rope.scaling else { unreachable!("asked for this") };
    let [factor, low, high, original] = [factor, low, high, original].map(f64::from);
    let pairs = rope.inverse_frequencies.len();
    let of_pair = |i: usize| {
        let frequency = 1.0 / rope.theta.powf((2 * i) as f32 / (2 * pairs) as f32);
        let wavelength = std::f64::consts::TAU / f64::from(frequency);
        let smooth = (original / wavelength - low) / (high - low);
        let value = if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        value as f32
    };
    (0..pairs).map(of_pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families;
    use serde_json::json;

    fn graph(change: impl FnOnce(&mut serde_json::Value)) -> Graph {
        let mut config = json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 11, "vocab_size": 10, "tie_word_embeddings": false,
            "attention_bias": true,
        });
        change(&mut config);
        families::build(&config).unwrap()
    }

    #[test]
    fn a_llama_is_listed_in_file_order() {
        let plan = plan(&graph(|_| ())).unwrap();
        let names: Vec<&str> = plan.tensors.iter().map(|t| t.gguf.as_str()).collect();
        assert_eq!(plan.architecture, "llama");
        assert_eq!(
            names[..16],
            [
                "output.weight",
                "output_norm.weight",
                "token_embd.weight",
                "blk.0.attn_k.bias",
                "blk.0.attn_k.weight",
                "blk.0.attn_norm.weight",
                "blk.0.attn_output.bias",
                "blk.0.attn_output.weight",
                "blk.0.attn_q.bias",
                "blk.0.attn_q.weight",
                "blk.0.attn_v.bias",
                "blk.0.attn_v.weight",
                "blk.0.ffn_down.weight",
                "blk.0.ffn_gate.weight",
                "blk.0.ffn_norm.weight",
                "blk.0.ffn_up.weight",
            ]
        );
        assert_eq!(names.len(), 3 + 11 * 13);
        assert!(names.last().unwrap().starts_with("blk.10."));
        let find = |name: &str| plan.tensors.iter().find(|t| t.gguf == name).unwrap();
        let q = &find("blk.2.attn_q.weight").parts()[0];
        assert_eq!(q.from.tensor(), "model.layers.2.self_attn.q_proj.weight");
        assert_eq!((q.rows.as_ref().unwrap()[9], q.extents()), (12, [32, 32]));
        // Four heads of eight rows: halves 0 1 2 3 | 4 5 6 7 become pairs.
        assert_eq!(find("blk.2.attn_k.bias").parts()[0].rows.as_ref().unwrap()[..8], [0, 4, 1, 5, 2, 6, 3, 7]);
        assert_eq!(find("blk.2.attn_v.weight").parts()[0].rows, None);
    }

    #[test]
    fn a_tied_head_is_left_out() {
        let plan = plan(&graph(|config| config["tie_word_embeddings"] = true.into())).unwrap();
        assert!(plan.tensors.iter().all(|t| t.gguf != "output.weight"));
    }

    #[test]
    fn llama_3_scaling_is_a_tensor_of_factors() {
        let scaled = graph(|config| {
            config["rope_theta"] = 500000.0.into();
            config["head_dim"] = 128.into();
            config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        });
        let plan = plan(&scaled).unwrap();
        let freqs = plan.tensors.iter().find(|t| t.gguf == "rope_freqs.weight").unwrap();
        let Source::Values(factors) = &freqs.source else { panic!("computed") };
        assert_eq!((freqs.shape.as_slice(), factors[0], factors[63]), (&[64][..], 1.0, 8.0));
        // Dividing the plain frequencies by the factors gives the frequencies that the model is run with.
        let rope = scaled.blocks[0].attention().unwrap().rope.clone().unwrap();
        let between = (0..64).filter(|i| factors[*i] > 1.0 && factors[*i] < 8.0).count();
        assert!(between > 3);
        for (i, factor) in factors.iter().enumerate() {
            let plain = 1.0 / 500000f32.powf((2 * i) as f32 / 128.0);
            let ratio = rope.inverse_frequencies[i] / (plain / factor);
            assert!((ratio - 1.0).abs() < 1e-6, "{i}: {ratio}");
        }
    }
}
