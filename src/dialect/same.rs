//! Whether two graphs are the same model, whatever their tensors are called.

use kernels::{Activation, AttentionShape};

use crate::families::rope::{all_near, near, unscaled};
use crate::graph::{
    AltUp, Attention, Collapse, Connection, Convolution, DeltaNet, Further, GramLayer, Grams, Graph, Joining, Layer,
    Linear, Mamba, Mlp, Moe, Norm, PerLayer, Projections, Rope, RopeScaling, Side, Step, Temperature,
};

/// How a reader takes a model.
#[derive(Clone, Copy)]
pub(super) struct Reader {
    /// Whether windows count; elsewhere they are ignored.
    pub windows: bool,
    /// Whether it is given a tensor of rotary factors and rows of heads in the order of its own rotation, as in a GGUF file.
    pub converted: bool,
}

/// What the reader cannot be told of `graph`, where what it takes is `other`; `None` where nothing is lost that matters.
///
/// Windows that it ignores do not count, nor does the difference between GELU and its approximation.
pub(super) fn difference(graph: &Graph, other: &Graph, reader: Reader) -> Option<String> {
    let sizes =
        |g: &Graph| (g.hidden, g.vocabulary, g.trunk().len(), g.embedding.positions.as_ref().map(|(_, rows)| *rows));
    if sizes(graph) != sizes(other) {
        return Some("a model of these sizes".to_owned());
    }
    if graph.predictors().len() != other.predictors().len() {
        return Some(format!("{} layers that predict further tokens", graph.predictors().len()));
    }
    if !near(graph.embedding.scale, other.embedding.scale) {
        return Some(format!("an embedding that is multiplied by {}", graph.embedding.scale));
    }
    if !near(graph.head.scale, other.head.scale) {
        return Some(format!("logits that are multiplied by {}", graph.head.scale));
    }
    if graph.head.softcap != other.head.softcap {
        return Some(format!(
            "logits {}, where it has them {},",
            capped(graph.head.softcap),
            capped(other.head.softcap)
        ));
    }
    let streams = |collapse: &Option<Collapse>| {
        collapse
            .as_ref()
            .map(|c| (c.streams(), c.hyper().map(|h| h.shape), c.linears().map(|l| l.rows).collect::<Vec<_>>()))
    };
    if streams(&graph.collapse) != streams(&other.collapse) {
        return Some("a stream of several hidden states".to_owned());
    }
    if !norm(Some(&graph.final_norm), Some(&other.final_norm)) {
        return Some("the last norm".to_owned());
    }
    graph.blocks.iter().zip(&other.blocks).enumerate().find_map(|(index, (block, other))| {
        let in_block = |what: String| format!("{what} in block {index}");
        if block.steps.len() != other.steps.len() {
            return Some(in_block("other steps".to_owned()));
        }
        if block.parallel != other.parallel {
            return Some(in_block(format!(
                "attention and feed-forward layer {}",
                if block.parallel { "side by side" } else { "one after the other" }
            )));
        }
        if let Some(what) = altup(block.altup.as_deref(), other.altup.as_deref()) {
            return Some(in_block(what));
        }
        if block.scale.is_some() != other.scale.is_some() {
            return Some(in_block("a stream that is multiplied".to_owned()));
        }
        block.steps.iter().zip(&other.steps).find_map(|(step, other)| {
            if !near(step.scale, other.scale) {
                return Some(in_block(format!("a residual that is multiplied by {}", step.scale)));
            }
            if !near(step.given, other.given) || step.unseen != other.unseen {
                return Some(in_block("a layer that is given this".to_owned()));
            }
            let streams = |step: &Step| {
                let of = |c: &Connection| {
                    (c.streams(), c.hyper().map(|h| h.shape), c.linears().map(|l| l.rows).collect::<Vec<_>>())
                };
                step.hyper.as_deref().map(of)
            };
            if streams(step) != streams(other) {
                return Some(in_block("streams that are read and written like this".to_owned()));
            }
            if !norm(step.pre.as_ref(), other.pre.as_ref()) || !norm(step.post.as_ref(), other.post.as_ref()) {
                return Some(in_block("norms of this kind or in these places".to_owned()));
            }
            match (&step.layer, &other.layer) {
                (Layer::Attention(a), Layer::Attention(b)) => attention(a, b, reader),
                (Layer::Delta(a), Layer::Delta(b)) => delta(a, b),
                (Layer::Delta(_), _) => Some("linear attention".to_owned()),
                (Layer::Mamba(a), Layer::Mamba(b)) => mamba(a, b, reader),
                (Layer::Mamba(_), _) => Some("a state space".to_owned()),
                (Layer::Short(a), Layer::Short(b)) => convolution(&a.convolution, &b.convolution),
                (Layer::Short(_), _) => Some("a gated short convolution".to_owned()),
                (Layer::Attention(_), _) => Some("attention".to_owned()),
                (Layer::Mlp(a), Layer::Mlp(b)) => mlp(a, b),
                (Layer::Moe(a), Layer::Moe(b)) => moe(a, b),
                (Layer::Further(a), Layer::Further(b)) => further(a, b),
                (Layer::Moe(_), _) => Some("a mixture of experts".to_owned()),
                (Layer::PerLayer(a), Layer::PerLayer(b)) => per_layer(a, b),
                (Layer::PerLayer(_), _) => Some("rows of a table for the tokens".to_owned()),
                (Layer::Grams(a), Layer::Grams(b)) => grams(a, b),
                (Layer::Grams(_), _) => Some("rows of a table for tokens in a row".to_owned()),
                _ => Some("a feed-forward layer without experts".to_owned()),
            }
            .map(in_block)
        })
    })
}

fn per_layer(a: &PerLayer, b: &PerLayer) -> Option<String> {
    let of = |layer: &PerLayer| {
        let Side { table, embedding, .. } = &layer.side;
        (table.rows, table.columns.clone(), embedding.cols, activation(layer.activation))
    };
    let scales = |side: &Side| [side.table.scale, side.embedding.scale, side.share];
    let alike = all_near(&scales(&a.side), &scales(&b.side)) && norm(Some(&a.side.norm), Some(&b.side.norm));
    (of(a) != of(b) || !alike).then(|| "rows of a table for the tokens of this form".to_owned())
}

fn grams(a: &GramLayer, b: &GramLayer) -> Option<String> {
    let of = |layer: &GramLayer| {
        let Grams { parts, cols, multipliers, sizes, end } = layer.grams.clone();
        let rows: usize = parts.iter().map(|(_, rows)| rows).sum();
        (rows, cols, multipliers, sizes, end, [layer.key.rows, layer.value.rows], layer.convolution.dilation)
    };
    (of(a) != of(b))
        .then(|| "rows of a table for tokens in a row that are found like this".to_owned())
        .or_else(|| convolution(&a.convolution, &b.convolution))
}

fn altup(a: Option<&AltUp>, b: Option<&AltUp>) -> Option<String> {
    let (a, b) = match (a, b) {
        (None, None) => return None,
        (Some(a), Some(b)) => (a, b),
        _ => return Some("several streams".to_owned()),
    };
    if (a.count, a.active) != (b.count, b.active) {
        return Some(format!("work on stream {} of {}", a.active, a.count));
    }
    if a.laurel.left.rows != b.laurel.left.rows {
        return Some(format!("a residual of rank {}", a.laurel.left.rows));
    }
    let norms =
        |a: &AltUp, b: &AltUp| norm(Some(&a.norm), Some(&b.norm)) && norm(Some(&a.laurel.norm), Some(&b.laurel.norm));
    let factors = |altup: &AltUp| [altup.given, altup.laurel.share];
    let alike = norms(a, b) && a.scale.is_some() == b.scale.is_some() && all_near(&factors(a), &factors(b));
    (!alike).then(|| "streams of this form".to_owned())
}

fn norm(a: Option<&Norm>, b: Option<&Norm>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => {
            let of = |norm: &Norm| (norm.kind, norm.weights.is_empty(), norm.bias.is_some(), norm.shape.clone());
            of(a) == of(b) && near(a.eps, b.eps)
        }
        _ => false,
    }
}

fn further(a: &Further, b: &Further) -> Option<String> {
    let norms = |a: &Further, b: &Further| {
        norm(Some(&a.of_token), Some(&b.of_token))
            && norm(Some(&a.of_state), Some(&b.of_state))
            && norm(Some(&a.norm), Some(&b.norm))
    };
    let state = |further: &Further| {
        let Further { joining, before, collapse, ending, .. } = further;
        let state_first = matches!(joining, Joining::Beside { state_first: true, .. });
        (state_first, joining.linears().len(), before.is_some(), collapse.is_some(), ending.is_some())
    };
    (state(a) != state(b) || !norms(a, b)).then(|| "predicting further tokens in this way".to_owned())
}

fn delta(a: &DeltaNet, b: &DeltaNet) -> Option<String> {
    let of = |delta: &DeltaNet| {
        let narrow = delta.narrow.as_ref().map(|narrow| (narrow.decay[0].rows, narrow.gate[0].rows));
        (delta.shape, delta.activation, delta.decay.limits, delta.decay.lower, delta.share, narrow)
    };
    (of(a) != of(b) || !norm(Some(&a.norm), Some(&b.norm)))
        .then(|| "linear attention of this form".to_owned())
        .or_else(|| convolution(&a.convolution, &b.convolution))
}

/// The shortest step that a reader may take for none at all: so short that it is said beside.
const SHORT: f32 = 0.002;

fn mamba(a: &Mamba, b: &Mamba, reader: Reader) -> Option<String> {
    let norms = match (&a.norm, &b.norm) {
        (Some(a), Some(b)) => (a.width, a.first) == (b.width, b.first) && norm(Some(&a.norm), Some(&b.norm)),
        (None, None) => true,
        _ => false,
    };
    let biases = |mamba: &Mamba| (mamba.input.bias, mamba.out.bias);
    let ([least, most], other) = (a.decay.limits, b.decay.limits);
    let short = reader.converted && least <= SHORT && most == other[1];
    if a.decay.limits != other && !short {
        return Some(format!(
            "a state space with steps from {least} to {most}, where it has them from {} to {},",
            other[0], other[1]
        ));
    }
    let scales = a.scales.iter().zip(&b.scales).all(|(a, b)| near(*a, *b));
    (!norms || !scales || biases(a) != biases(b) || (a.shape, a.activation) != (b.shape, b.activation))
        .then(|| "a state space of this form".to_owned())
        .or_else(|| convolution(&a.convolution, &b.convolution))
}

fn convolution(a: &Convolution, b: &Convolution) -> Option<String> {
    let of = |convolution: &Convolution| {
        let Convolution { channels, taps, activation, .. } = *convolution;
        (channels, taps, activation)
    };
    (of(a) != of(b)).then(|| "a short convolution of this form".to_owned())
}

fn attention(a: &Attention, b: &Attention, reader: Reader) -> Option<String> {
    let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, window, chunk, softcap, both_ways } = a.shape;
    if both_ways != b.shape.both_ways {
        return Some(format!("attention to what comes {}", if both_ways { "before and after" } else { "before" }));
    }
    if (heads, kv_heads, head_dim, value_dim) != (b.shape.heads, b.shape.kv_heads, b.shape.head_dim, b.shape.value_dim)
    {
        return Some(format!("{heads} heads of {head_dim} values that share {kv_heads} keys"));
    }
    if !near(scale, b.shape.scale) {
        return Some(format!("an attention scale of {scale} with heads of {head_dim} values"));
    }
    if reader.windows && (window, chunk) != (b.shape.window, b.shape.chunk) {
        return Some(match window.or(chunk) {
            Some(window) => format!("attention within {window} tokens"),
            None => "attention to all tokens".to_owned(),
        });
    }
    let gates = |a: &Attention| {
        let of_latent = matches!(&a.projections, Projections::Latent(latent) if latent.gate.is_some());
        (a.gated, a.head_gate.is_some(), of_latent)
    };
    if gates(a) != gates(b) {
        return Some(format!("attention {} a gate", if a.gated { "with" } else { "without" }));
    }
    if softcap != b.shape.softcap {
        return Some(format!("attention scores {}, where it has them {},", capped(softcap), capped(b.shape.softcap)));
    }
    match (&a.rope, &b.rope) {
        (None, None) => {}
        (Some(rope), Some(other)) if same_rope(rope, other, reader) => {}
        (None, _) => return Some("attention without rotary positions (NoPE)".to_owned()),
        (Some(_), None) => return Some("attention with rotary positions, where it has none,".to_owned()),
        (Some(rope), Some(other)) => return Some(turned(rope, other)),
    }
    if !reader.converted && a.rope.is_some() && a.layout.interleaved != b.layout.interleaved {
        let of = |neighbours| if neighbours { "neighbours" } else { "halves" };
        return Some(format!("rotating {} of heads together", of(a.layout.interleaved)));
    }
    let parts = |a: &Attention| match &a.projections {
        Projections::Direct(linears) => linears.iter().map(|linear: &Linear| linear.split.parts()).sum(),
        Projections::Latent(_) | Projections::Joint(_) => 0,
    };
    if (a.keys, parts(a)) != (b.keys, parts(b)) {
        return Some("keys and values that are shared like this".to_owned());
    }
    let entries = |a: &Attention| {
        let narrow = match &a.projections {
            Projections::Joint(joint) => Some((joint.narrow.split.parts(), joint.narrow.rows, joint.q[0].rows)),
            _ => None,
        };
        (narrow, a.beside.as_ref().map(|beside| (beside.block, beside.kv.rows, beside.pool.overlap)))
    };
    if entries(a) != entries(b) {
        return Some("attention to entries that stand for tokens like this".to_owned());
    }
    let latent = matches!(a.projections, Projections::Latent(_));
    if a.layout.first != b.layout.first || latent != matches!(b.projections, Projections::Latent(_)) {
        return Some("attention of this form".to_owned());
    }
    let norms = |a: &Attention| {
        a.norms.as_ref().map(|norms| {
            let of = |norm: &Norm| (norm.kind, norm.weights.len(), norm.shape.clone(), norm.bias.is_some());
            let [k, v] = [&norms.k, &norms.v].map(|norm| norm.as_ref().map(of));
            (of(&norms.q), k, v, norms.per_head, norms.after_rope)
        })
    };
    if norms(a) != norms(b) {
        return Some("norms of queries and keys of this kind".to_owned());
    }
    if a.clip != b.clip {
        return Some(match a.clip {
            Some(clip) => format!("queries, keys and values that are clamped to {clip}"),
            None => "queries, keys and values that are not clamped".to_owned(),
        });
    }
    let choice = |a: &Attention| {
        a.choice.as_ref().map(|choice| (*choice.shape(), choice.indexer().map(|indexer| indexer.layout.interleaved)))
    };
    if choice(a) != choice(b) {
        return Some("attention that sees a choice of tokens".to_owned());
    }
    if !near(a.value_scale, b.value_scale) {
        return Some(format!("values that are multiplied by {}", a.value_scale));
    }
    if a.sinks.is_some() != b.sinks.is_some() {
        return Some("attention with sinks".to_owned());
    }
    (a.temperature != b.temperature).then(|| match &a.temperature {
        Some(Temperature::Steps { floor, scale, .. }) => {
            format!("queries that grow with their positions (by {scale}, beyond {floor} tokens)")
        }
        Some(Temperature::Heads { .. }) => "queries of which each head grows with its positions".to_owned(),
        None => "queries that do not grow with their positions".to_owned(),
    })
}

fn capped(cap: Option<f32>) -> String {
    cap.map_or("without a cap".to_owned(), |cap| format!("with a cap of {cap}"))
}

/// How positions are rotated, where a reader would rotate them otherwise: what differs, by its key in config.json.
fn turned(a: &Rope, b: &Rope) -> String {
    let [one, two] = [a, b].map(|rope| 2 * rope.inverse_frequencies.len());
    if one != two {
        return format!("rotary positions in {one} values of each head, where it rotates {two},");
    }
    if a.theta != b.theta {
        return format!("rotary positions with rope_theta {}, where it has {},", a.theta, b.theta);
    }
    match (&a.scaling, &b.scaling) {
        (RopeScaling::Yarn { beta_fast, beta_slow, .. }, other) => {
            let attention = match near(a.magnitude, b.magnitude) {
                true => String::new(),
                false => format!(" and attention_factor {}, where it has {},", a.magnitude, b.magnitude),
            };
            let same_turns = matches!(other, RopeScaling::Yarn { beta_fast: fast, beta_slow: slow, .. }
                if (fast, slow) == (beta_fast, beta_slow));
            let alike = all_near(&a.inverse_frequencies, &b.inverse_frequencies);
            let bounds = if same_turns && !alike { ", truncate false" } else { "" };
            format!("YaRN with beta_fast {beta_fast}, beta_slow {beta_slow}{bounds}{attention}")
        }
        (one, other) if kind(one) != kind(other) => {
            format!("rotary positions of the rope_type {}, where it has {},", kind(one), kind(other))
        }
        (one, _) => format!("rotary positions of the rope_type {} with these settings", kind(one)),
    }
}

fn kind(scaling: &RopeScaling) -> &'static str {
    match scaling {
        RopeScaling::None => "default",
        RopeScaling::Linear { .. } => "linear",
        RopeScaling::Dynamic { .. } => "dynamic",
        RopeScaling::Llama3 { .. } => "llama3",
        RopeScaling::Yarn { .. } => "yarn",
        RopeScaling::Proportional => "proportional",
        RopeScaling::Long { .. } => "longrope",
    }
}

fn same_rope(a: &Rope, b: &Rope, reader: Reader) -> bool {
    // A tensor holds its factors.
    if reader.converted && matches!(a.scaling, RopeScaling::Llama3 { .. }) {
        return a.theta == b.theta && a.inverse_frequencies.len() == b.inverse_frequencies.len();
    }
    let scaling = match (&a.scaling, &b.scaling) {
        (RopeScaling::Long { short, long, original }, RopeScaling::Long { short: s, long: l, original: o }) => {
            all_near(short, s) && all_near(long, l) && original == o
        }
        (RopeScaling::Long { .. }, _) | (_, RopeScaling::Long { .. }) => false,
        // Beyond the first context the base grows; what reads GGUF files has no word for that, which a notice tells.
        (RopeScaling::Dynamic { .. }, _) | (_, RopeScaling::Dynamic { .. }) if !reader.converted => {
            a.scaling == b.scaling
        }
        _ => true,
    };
    let rounded = (reader.converted && bounds_are_rounded(a)).then(|| truncated(a)).flatten();
    let frequencies = rounded.as_ref().unwrap_or(&a.inverse_frequencies);
    scaling && near(a.magnitude, b.magnitude) && all_near(frequencies, &b.inverse_frequencies)
}

/// Whether YaRN's bounds are not whole pairs, as llama.cpp has them.
pub(super) fn bounds_are_rounded(rope: &Rope) -> bool {
    truncated(rope).is_some_and(|whole| !all_near(&whole, &rope.inverse_frequencies))
}

/// The frequencies of YaRN with bounds of whole pairs and the usual numbers of turns.
pub(crate) fn truncated(rope: &Rope) -> Option<Vec<f32>> {
    let RopeScaling::Yarn { factor, original, beta_fast: 32.0, beta_slow: 1.0, .. } = rope.scaling else { return None };
    let rotated = 2 * rope.inverse_frequencies.len();
    let plain = unscaled(f64::from(rope.theta), rotated).inverse_frequencies;
    let turns = |turns: f64| {
        let circle = turns * std::f64::consts::TAU;
        rotated as f64 * (original as f64 / circle).ln() / (2.0 * f64::from(rope.theta).ln())
    };
    let (low, high) = (turns(32.0).floor().max(0.0), turns(1.0).ceil().min(rotated as f64 - 1.0));
    let high = if low == high { high + 0.001 } else { high };
    let ramp = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
    Some(plain.iter().enumerate().map(|(i, f)| f / factor * ramp(i) + f * (1.0 - ramp(i))).collect())
}

fn activation(a: Activation) -> Activation {
    match a {
        Activation::Gelu => Activation::GeluTanh,
        // Its numbers are no settings: they are beside the weights.
        Activation::Xielu { .. } => Activation::Xielu { positive: 0.0, negative: 0.0, beta: 0.0, eps: 0.0 },
        other => other,
    }
}

fn mlp(a: &Mlp, b: &Mlp) -> Option<String> {
    if a.inner() != b.inner() {
        return Some(format!("a feed-forward layer of width {}", a.inner()));
    }
    let cut = |mlp: &Mlp| mlp.cut.map_or([0.0; 2], |cut| [1.0, cut]);
    if !all_near(&cut(a), &cut(b)) {
        return Some(match a.cut {
            Some(deviations) => {
                format!("a gate that lets through what is above its mean by {deviations} standard deviations")
            }
            None => "a gate that lets all values through".to_owned(),
        });
    }
    let same = a.gated() == b.gated() && near(a.scale, b.scale) && activation(a.activation) == activation(b.activation);
    (!same).then(|| {
        if let (Some(limit), Some(other)) = (a.activation.limit(), b.activation.limit())
            && limit != other
        {
            return format!("a feed-forward layer whose gate is limited to {limit}, where it has a limit of {other},");
        }
        let gate = |mlp: &Mlp| if mlp.gated() { "a gate of" } else { "no gate and" };
        format!(
            "a feed-forward layer with {} {}, where it has {} {},",
            gate(a),
            named(a.activation),
            gate(b),
            named(b.activation)
        )
    })
}

/// What config.json calls it.
pub(super) fn named(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::Relu => "relu",
        Activation::Relu2 => "relu2",
        Activation::SwigluOai { .. } => "gpt-oss's clamped swiglu",
        Activation::SiluWithin { .. } => "Step 3.5's limited silu",
        Activation::Sigmoid => "sigmoid",
        Activation::Identity => "linear",
        Activation::Xielu { .. } => "xielu",
    }
}

fn moe(a: &Moe, b: &Moe) -> Option<String> {
    let (r, o) = (&a.router, &b.router);
    if (a.experts.len(), r.top_k) != (b.experts.len(), o.top_k) {
        return Some(format!("{} of {} experts", r.top_k, a.experts.len()));
    }
    let groups = |moe: &Moe| moe.router.groups.filter(|groups| groups.kept < groups.count);
    if r.table.is_some() != o.table.is_some() {
        return Some("experts that a table names".to_owned());
    }
    if groups(a) != groups(b) {
        return Some("this way of limiting experts to groups".to_owned());
    }
    if (r.scoring, r.correction.is_some(), r.renormalize) != (o.scoring, o.correction.is_some(), o.renormalize) {
        return Some(match r.renormalize == o.renormalize {
            true => "this way of choosing experts".to_owned(),
            false => format!("experts whose weights {} up to 1", if r.renormalize { "add" } else { "do not add" }),
        });
    }
    if !near(r.scale, o.scale) || a.weigh_input != b.weigh_input {
        return Some("experts that are weighed like this".to_owned());
    }
    let factors = |moe: &Moe| (moe.router.factors.is_some(), moe.norms.is_some());
    if factors(a) != factors(b) || !near(r.logits, o.logits) {
        return Some("a mixture whose parts are normed like this".to_owned());
    }
    let shared = |moe: &Moe| moe.shared.as_ref().map(|(shared, gate)| (shared.inner(), gate.is_some()));
    if shared(a) != shared(b) {
        return Some("shared experts of this form".to_owned());
    }
    a.experts.first().zip(b.experts.first()).and_then(|(a, b)| mlp(a, b))
}
