//! A program as people and scripts read it.

use kernels::{Activation, IndexShape, NormKind};
use serde::Serialize;

use super::{Kept, Kind, Operation, Program, Streams, Value};
use crate::graph::{Block, Decay, Norm, RopeScaling, Scoring, Temperature};
use crate::words::{listed, one_line};

/// What some blocks do that are alike.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shown {
    /// The prefixes of their tensors.
    pub blocks: Vec<String>,
    /// What is done, in order.
    pub operations: Vec<ShownOperation>,
}

/// One operation; of alike ones on several experts that of the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShownOperation {
    /// What is computed, as in `linear(x)`.
    pub expression: String,
    /// The values that it reads.
    pub reads: Vec<String>,
    /// The values that it makes.
    pub makes: Vec<ShownValue>,
    /// Numbers of a token that linears read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<usize>,
    /// What else decides about it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
    /// Its tensors, without the prefix of the block.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<String>,
    /// It is done for each of so many experts, and is shown for the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    #[serde(skip)]
    expert: Option<usize>,
}

/// A value that is made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShownValue {
    /// What it is called.
    pub name: String,
    /// Numbers of one token.
    pub width: usize,
    /// Whether it is kept for all tokens: `always`, or where there is `room`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<&'static str>,
}

/// What blocks do, those that do the same together; `None` if there is one of which only the linears are known.
pub fn shown(blocks: &[Block]) -> Option<Vec<Shown>> {
    let mut found: Vec<Shown> = Vec::new();
    for block in blocks {
        let operations = operations(block)?;
        match found.iter_mut().find(|known| known.operations == operations) {
            Some(known) => known.blocks.push(block.name.clone()),
            None => found.push(Shown { blocks: vec![block.name.clone()], operations }),
        }
    }
    Some(found)
}

fn operations(block: &Block) -> Option<Vec<ShownOperation>> {
    let program = Program::of(block)?;
    let inside = |name: String| match name.strip_prefix(&block.name).and_then(|name| name.strip_prefix('.')) {
        Some(inside) => inside.to_owned(),
        None => name,
    };
    let show = |operation| {
        let mut shown = program.show(operation);
        shown.tensors = shown.tensors.into_iter().map(inside).collect();
        shown
    };
    let all: Vec<ShownOperation> = program.operations.iter().map(show).collect();
    let of = |index: usize| all.iter().filter(move |operation| operation.expert == Some(index));
    let experts = all.iter().filter_map(|operation| operation.expert).max().map_or(0, |last| last + 1);
    let alike = |a: &ShownOperation, b: &ShownOperation| {
        (&a.expression, &a.reads, &a.makes, &a.details) == (&b.expression, &b.reads, &b.makes, &b.details)
    };
    let all_alike =
        (1..experts).all(|index| of(index).count() == of(0).count() && of(index).zip(of(0)).all(|(a, b)| alike(a, b)));
    if !all_alike {
        return Some(all);
    }
    let first = all.into_iter().filter(|operation| operation.expert.unwrap_or(0) == 0);
    Some(
        first
            .map(|mut operation| {
                operation.experts = operation.expert.map(|_| experts);
                operation
            })
            .collect(),
    )
}

impl Program<'_> {
    fn name(&self, value: usize) -> String {
        let Value { name, number, expert, .. } = &self.values[value];
        let number = if *number == 1 { String::new() } else { number.to_string() };
        format!("{name}{number}{}", if expert.is_some() { "[e]" } else { "" })
    }

    fn show(&self, operation: &Operation<'_>) -> ShownOperation {
        let reads: Vec<String> = operation.reads.iter().map(|value| self.name(*value)).collect();
        let makes = operation.makes.iter().map(|value| ShownValue {
            name: self.name(*value),
            width: self.values[*value].width,
            kept: match self.values[*value].kept {
                Kept::Never => None,
                Kept::Room => Some("room"),
                Kept::Always => Some("always"),
            },
        });
        let (expression, details) = said(operation, &reads);
        let tensors = operation.tensors();
        let expert = operation.expert.map(|expert| expert.index);
        let input = match operation.kind {
            Kind::Linear { .. } => Some(self.values[operation.reads[0]].width),
            _ => None,
        };
        ShownOperation { expression, makes: makes.collect(), reads, input, details, tensors, experts: None, expert }
    }
}

/// How much an indexer chooses, and for whom.
fn said_of_choice(shape: &IndexShape, shared: bool) -> Vec<String> {
    let mut details = vec![format!("{} heads", shape.heads), format!("scale {}", shape.scale)];
    details.push(match shape.block {
        1 => format!("{} tokens", shape.count),
        block if shape.entries => format!("{} entries for {block} tokens each", shape.count),
        block if shape.pooled => format!("{} whole blocks of {block} tokens, and what follows", shape.count - 1),
        block => format!("{} blocks of {block} tokens", shape.count),
    });
    details.extend(shared.then(|| "for layers behind it, too".to_owned()));
    details
}

/// What an operation computes, and what else decides about it.
fn said(operation: &Operation<'_>, reads: &[String]) -> (String, Vec<String>) {
    let call = |name: &str| format!("{name}({})", reads.join(", "));
    let only = |expression: String| (expression, Vec::new());
    match &operation.kind {
        Kind::Norm(norm) => (call("norm"), said_of_norm(norm)),
        Kind::HeadNorm { norm, head_dim } => {
            let mut details = said_of_norm(norm);
            details.push(format!("heads of {head_dim}"));
            (call("head_norm"), details)
        }
        Kind::Linear { fixed, .. } => {
            let details = if *fixed { vec!["never quantized".to_owned()] } else { Vec::new() };
            (call("linear"), details)
        }
        Kind::JoinHeads { heads: 1 } => only(call("join")),
        Kind::Spread => only(call("spread")),
        Kind::JoinHeads { heads } => (call("join_heads"), vec![format!("{heads} heads")]),
        Kind::Clamp(limit) => (call("clamp"), vec![format!("to ±{limit}")]),
        Kind::Rope { rope, layout, back, inverse } => {
            let pairs = if layout.interleaved { "neighbours" } else { "halves" };
            let turned = 2 * rope.inverse_frequencies.len();
            let mut details = vec![format!("theta {}", rope.theta), format!("{turned} of {} a head", layout.head_dim)];
            if layout.first > 0 {
                details.push(format!("from {}", layout.first));
            }
            details.push(pairs.to_owned());
            details.extend((*back > 0).then(|| format!("as {back} tokens before")));
            details.extend(inverse.then(|| "back".to_owned()));
            if rope.scaling != RopeScaling::None {
                // The name alone: LongRoPE has as many factors as pairs.
                let name = format!("{:?}", rope.scaling);
                let name = name.split([' ', '(']).next().unwrap_or_default().to_lowercase();
                details.push(format!("scaling {name}"));
            }
            details.extend(rope.learned.as_ref().map(|_| "learned factors".to_owned()));
            (call("rope"), details)
        }
        Kind::Warm(Temperature::Steps { scale, floor, .. }) => {
            (call("temperature"), vec![format!("scale {scale}"), format!("floor {floor}")])
        }
        Kind::Warm(Temperature::Heads { .. }) => (call("temperature"), vec!["of each head".to_owned()]),
        Kind::Attention { .. } | Kind::Select { .. } | Kind::Chosen | Kind::Pool(_) => {
            said_of_attention(operation, reads)
        }
        Kind::Convolve { .. }
        | Kind::Average(_)
        | Kind::Decay(_)
        | Kind::Step(_)
        | Kind::Delta(_)
        | Kind::Skip { .. }
        | Kind::Scale(_)
        | Kind::Map(_)
        | Kind::Gate(_) => said_of_state(operation, reads),
        Kind::Activate(activation) => said_of_activation(*activation, reads),
        Kind::Route(router) => {
            let mut details = vec![format!("{} of {} experts", router.top_k, router.linear.rows)];
            let scoring = match router.scoring {
                Scoring::Softmax => "softmax",
                Scoring::Sigmoid => "sigmoid",
                Scoring::RootSoftplus => "root of softplus",
            };
            details.push(scoring.to_owned());
            details.extend(router.groups.map(|groups| format!("{} of {} groups", groups.kept, groups.count)));
            details.extend(router.table.as_ref().map(|_| "by the ids of tokens".to_owned()));
            if router.renormalize {
                details.push("renormalized".to_owned());
            }
            if router.logits != 1.0 {
                details.push(format!("logits * {}", router.logits));
            }
            if router.scale != 1.0 {
                details.push(format!("scale {}", router.scale));
            }
            (call("route"), details)
        }
        Kind::Tokens => only(format!("{}[{}]", reads[0], reads[1])),
        Kind::Weigh => only(format!("{} * weight({})", reads[0], reads[1])),
        Kind::Zeros => only("0".to_owned()),
        Kind::Scatter { weighed: true } => only(format!("{} + weight({}) * {}", reads[0], reads[2], reads[1])),
        Kind::Scatter { weighed: false } | Kind::Sum => only(format!("{} + {}", reads[0], reads[1])),
        Kind::Return { first } => {
            (format!("{} + weights({}) * {}", reads[0], reads[2], reads[1]), vec![format!("experts from {first} on")])
        }
        Kind::Share => only(format!("{} * sigmoid({})", reads[0], reads[1])),
        Kind::Add { scale } if *scale != 1.0 => only(format!("{} + {scale} * {}", reads[0], reads[1])),
        Kind::Add { .. } => only(format!("{} + {}", reads[0], reads[1])),
        Kind::Begin => only(reads[1].clone()),
        Kind::Rescale(_) => only(format!("{} * scale", reads[0])),
        Kind::Connect(_)
        | Kind::ReadStreams(_)
        | Kind::WriteStreams(_)
        | Kind::Agree(_)
        | Kind::Cut(_)
        | Kind::Streams(..) => said_of_streams(operation, reads),
        Kind::Plus(_) | Kind::Shared(_) | Kind::Lookup(_) | Kind::Grams(_) => said_beside(operation, reads),
    }
}

/// The same of the function between the linears of a feed-forward layer.
fn said_of_activation(activation: Activation, reads: &[String]) -> (String, Vec<String>) {
    let call = |name: &str| format!("{name}({})", reads.join(", "));
    let name = match activation {
        Activation::SwigluOai { alpha, limit, shift } => {
            let mut details = vec![format!("alpha {alpha}"), format!("limit {limit}")];
            details.extend((shift != 1.0).then(|| format!("shift {shift}")));
            return (call("swiglu_oai"), details);
        }
        Activation::Xielu { positive, negative, beta, eps } => {
            let details = [("positive", positive), ("negative", negative), ("beta", beta), ("eps", eps)];
            return (call("xielu"), details.map(|(name, value)| format!("{name} {value}")).to_vec());
        }
        Activation::SiluWithin { limit } => return (call("silu_within"), vec![format!("limit {limit}")]),
        other => named(other),
    };
    let expression = match reads {
        [gate, up] => format!("{name}({gate}) * {up}"),
        _ => call(name),
    };
    (expression, Vec::new())
}

/// The same of what blocks are given beside the stream.
fn said_beside(operation: &Operation<'_>, reads: &[String]) -> (String, Vec<String>) {
    match &operation.kind {
        Kind::Plus(share) => (format!("{} + {share} * {}", reads[0], reads[1]), Vec::new()),
        Kind::Shared(block) => ("shared()".to_owned(), vec![format!("of block {block}")]),
        Kind::Lookup(lookup) => {
            let mut details = vec![format!("scale {}", lookup.scale)];
            if lookup.columns != (0..lookup.cols) {
                details.push(format!("columns {} to {}", lookup.columns.start, lookup.columns.end - 1));
            }
            ("rows(ids)".to_owned(), details)
        }
        Kind::Grams(grams) => {
            let heads = grams.sizes.len() / (grams.multipliers.len() - 1);
            let details = vec![format!("{heads} for each of 2 to {} tokens", grams.multipliers.len())];
            ("rows(ids of tokens in a row)".to_owned(), details)
        }
        _ => unreachable!("one of these"),
    }
}

/// The same of several streams, and of gates that let few values through.
fn said_of_streams(operation: &Operation<'_>, reads: &[String]) -> (String, Vec<String>) {
    let call = |name: &str| format!("{name}({})", reads.join(", "));
    let what = match &operation.kind {
        Kind::Connect(hyper) => {
            let mut details = vec![format!("{} streams", hyper.shape.streams), format!("eps {:e}", hyper.shape.eps)];
            if hyper.shape.rounds > 0 {
                details.push(format!("mixed, {} rounds", hyper.shape.rounds));
            }
            return (call("weights"), details);
        }
        Kind::ReadStreams(_) => return (call("read"), Vec::new()),
        Kind::WriteStreams(_) => return (call("write"), Vec::new()),
        Kind::Agree(width) => return (call("agreement"), vec![format!("streams of {width}")]),
        Kind::Cut(deviations) => return (call("above"), vec![format!("mean and {deviations} deviations")]),
        Kind::Streams(_, what) => what,
        _ => unreachable!("one of these"),
    };
    let expression = match what {
        Streams::Take(index) => format!("{}[{index}]", reads[0]),
        Streams::Match => call("as_large_as_first"),
        Streams::Mean => call("mean"),
        Streams::Tanh => call("tanh"),
        Streams::Predict => format!("{} + {} * {}", reads[0], reads[2], reads[1]),
        Streams::Correct => format!("{} + (1 + {}) * {}", reads[0], reads[2], reads[1]),
        Streams::Others => format!("{}, but to all but the first + {}", reads[0], reads[1]),
        Streams::Each => format!("{} * {}", reads[1], reads[0]),
        Streams::Join(1.0) => reads.join(" + "),
        Streams::Join(share) => format!("{share} * ({})", reads.join(" + ")),
        Streams::Times(_) => format!("{} * scale", reads[0]),
    };
    (expression, Vec::new())
}

/// The same of attention, and of what chooses the tokens that it sees.
fn said_of_attention(operation: &Operation<'_>, reads: &[String]) -> (String, Vec<String>) {
    let call = |name: &str| format!("{name}({})", reads.join(", "));
    match &operation.kind {
        Kind::Attention { shape, index, block, .. } => {
            let mut details = vec![format!("{} heads", shape.heads)];
            if shape.kv_heads != shape.heads {
                details.push(format!("{} of keys and values", shape.kv_heads));
            }
            details.push(format!("scale {}", shape.scale));
            details.extend(shape.both_ways.then(|| "both ways".to_owned()));
            details.extend(shape.window.map(|window| format!("window {window}")));
            details.extend(shape.chunk.map(|chunk| format!("chunk {chunk}")));
            details.extend(shape.softcap.map(|cap| format!("softcap {cap}")));
            match (block, index) {
                (Some(block), Some(index)) => {
                    details.push(format!("and {} entries for {block} tokens each", index.count))
                }
                (Some(block), None) => details.push(format!("and an entry for each {block} tokens")),
                (None, index) => details.extend(index.map(|index| format!("{} tokens at most", index.tokens()))),
            }
            (call("attention"), details)
        }
        Kind::Select { shape, shared } => (call("select"), said_of_choice(shape, *shared)),
        Kind::Pool(_) => (call("pool"), Vec::new()),
        Kind::Chosen => ("what the last indexer chose".to_owned(), Vec::new()),
        _ => unreachable!("one of these"),
    }
}

/// The same of what layers with a state do, and of gates.
fn said_of_state(operation: &Operation<'_>, reads: &[String]) -> (String, Vec<String>) {
    let call = |name: &str| format!("{name}({})", reads.join(", "));
    let only = |expression: String| (expression, Vec::new());
    match &operation.kind {
        Kind::Convolve { convolution, first } => {
            let mut details = vec![format!("{} taps", convolution.taps)];
            details.extend((convolution.dilation > 1).then(|| format!("{} tokens apart", convolution.dilation)));
            if *first > 0 {
                details.push(format!("channels from {first}"));
            }
            let call = call("convolve");
            (
                convolution.activation.map_or(call.clone(), |activation| format!("{}({call})", named(activation))),
                details,
            )
        }
        Kind::Average(count) => (call("mean"), vec![format!("of {count} tokens")]),
        Kind::Decay(Decay { lower: Some(lower), .. }) => (call("decay"), vec![format!("no less than {lower}")]),
        Kind::Decay(decay) => (call("decay"), said_of_steps(decay)),
        Kind::Step(decay) => (call("step"), said_of_steps(decay)),
        Kind::Skip { .. } => (format!("{} + skip * {}", reads[0], reads[1]), Vec::new()),
        Kind::Scale(factor) => only(format!("{factor} * {}", reads[0])),
        Kind::Delta(shape) => {
            let mut details = vec![format!("{} heads", shape.value_heads)];
            if shape.key_heads != shape.value_heads {
                details.push(format!("{} of queries and keys", shape.key_heads));
            }
            if shape.replaces || shape.scale != 1.0 {
                details.push(format!("scale {}", shape.scale));
            }
            (call(if shape.replaces { "delta_rule" } else { "state_space" }), details)
        }
        Kind::Map(activation) => only(call(named(*activation))),
        Kind::Gate(Activation::Identity) => only(format!("{} * {}", reads[0], reads[1])),
        Kind::Gate(activation) => only(format!("{}({}) * {}", named(*activation), reads[0], reads[1])),
        _ => unreachable!("one of these"),
    }
}

fn said_of_steps(decay: &Decay) -> Vec<String> {
    let [least, most] = decay.limits;
    match decay.limits == Decay::UNLIMITED {
        true => Vec::new(),
        false => vec![format!("steps from {least} to {most}")],
    }
}

/// What a function of one value is called.
fn named(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_tanh",
        Activation::Relu => "relu",
        Activation::Relu2 => "relu2",
        Activation::SwigluOai { .. } => "swiglu_oai",
        Activation::SiluWithin { .. } => "silu_within",
        Activation::Xielu { .. } => "xielu",
        Activation::Sigmoid => "sigmoid",
        Activation::Identity => "identity",
    }
}

fn said_of_norm(norm: &Norm) -> Vec<String> {
    let kind = match norm.kind {
        NormKind::Rms => "rms",
        NormKind::Layer => "layer",
        NormKind::Length => "length",
    };
    let mut details = vec![kind.to_owned(), format!("eps {:e}", norm.eps)];
    if norm.offset != 0.0 {
        details.push(format!("weight + {}", norm.offset));
    }
    details
}

impl ShownOperation {
    /// Makes, expression, shapes and tensors.
    fn columns(&self) -> [String; 4] {
        let makes: Vec<&str> = self.makes.iter().map(|value| &value.name[..]).collect();
        let shape = |ShownValue { name, width, kept }: &ShownValue| match kept {
            None => format!("{name} {width}"),
            Some("room") => format!("{name} {width} (kept where there is room)"),
            Some(_) => format!("{name} {width} (kept)"),
        };
        let shapes: Vec<String> = self.makes.iter().map(shape).collect();
        let inputs = self.input.map_or(String::new(), |input| format!("[in {input}] "));
        let details = self.details.iter().map(|detail| format!("; {detail}"));
        let shapes = format!("{inputs}{}{}", shapes.join(", "), details.collect::<String>());
        [makes.join(", "), self.expression.clone(), shapes, self.tensors.join(" ")]
    }
}

impl Shown {
    /// For people: an operation a line, in columns.
    pub fn text(&self) -> String {
        let names: Vec<&str> = self.blocks.iter().map(|name| &name[..]).collect();
        let count = if names.len() == 1 { "1 block".to_owned() } else { format!("{} blocks", names.len()) };
        let mut text = format!("{count}: {}\n", one_line(&listed(&names)));
        let rows: Vec<[String; 4]> = self.operations.iter().map(ShownOperation::columns).collect();
        let indent = |operation: &ShownOperation| if operation.experts.is_some() { 2 } else { 0 };
        let widest = |column: usize| {
            let width = |(row, operation): (&[String; 4], &ShownOperation)| {
                row[column].chars().count() + if column == 0 { indent(operation) } else { 0 }
            };
            rows.iter().zip(&self.operations).map(width).max().unwrap_or(0)
        };
        let [first, second, third] = [widest(0), widest(1), widest(2)];
        let mut experts = None;
        for (row, operation) in rows.iter().zip(&self.operations) {
            if let (Some(count), None) = (operation.experts, experts) {
                text += &format!("  for each of {count} experts e, with the tensors of the first\n");
            }
            experts = operation.experts;
            let [makes, expression, shapes, tensors] = row;
            let makes = format!("{}{makes}", " ".repeat(indent(operation)));
            let line = format!("  {makes:first$} = {expression:second$}  {shapes:third$}  {tensors}");
            text += &format!("{}\n", one_line(line.trim_end()));
        }
        text
    }
}
