//! From layers to operations.

mod altup;
mod further;
mod gated;
mod joint;

use super::{Expert, Kept, Kind, Operation, Program, Value};
use kernels::Activation;

use crate::graph::{
    Attention, Block, Choice, Collapse, Connection, Convolution, DeltaNet, GroupNorm, HeadNorms, Indexer, Keys, Latent,
    Layer, Linear, Mamba, Mlp, Moe, Narrow, Norm, PerLayer, Projections, Rope, ShortConvolution, Side, Step,
};

impl<'b> Program<'b> {
    /// What a block does; `None` for one of an unknown family, of which only the linears are known.
    pub fn of(block: &'b Block) -> Option<Program<'b>> {
        let hidden = block.steps.iter().find_map(|step| match &step.layer {
            Layer::Attention(attention) => Some(attention.o.rows),
            Layer::Delta(delta) => Some(delta.out.rows),
            Layer::Mamba(mamba) => Some(mamba.out.rows),
            Layer::Short(short) => Some(short.out.rows),
            Layer::Mlp(mlp) => Some(mlp.down.rows),
            Layer::Moe(moe) => Some(moe.router.linear.cols),
            Layer::Further(further) => further.joining.linears().first().map(|linear| linear.rows),
            Layer::PerLayer(layer) => Some(layer.out.rows),
            Layer::Grams(layer) => Some(layer.value.rows),
            Layer::Opaque(_) => None,
        })?;
        let program = Program { values: Vec::new(), operations: Vec::new(), leaves: None };
        let mut lowering = Lowering { program, hidden, expert: None };
        if let Some(altup) = &block.altup {
            lowering.altup(block, altup)?;
            return Some(lowering.end());
        }
        let collapse = block.further().and_then(|further| further.collapse.as_ref()).map(Collapse::streams);
        let streams = block.steps.iter().find_map(|step| step.hyper.as_ref()).map(|hyper| hyper.streams());
        let streams = streams.or(collapse).unwrap_or(1);
        let mut stream = lowering.value("h", streams * hidden, None);
        let mut streams = vec![stream];
        for step in &block.steps {
            let source = if block.parallel { Program::STREAM } else { streams[streams.len() - 1 - step.unseen] };
            stream = lowering.step(step, source, stream)?;
            streams.push(stream);
        }
        if let Some(tensor) = &block.scale {
            lowering.one(Kind::Rescale(tensor), &[stream], "h", hidden);
        }
        Some(lowering.end())
    }
}

struct Lowering<'b> {
    program: Program<'b>,
    /// Width of the stream.
    hidden: usize,
    /// Whose operations are being added.
    expert: Option<Expert>,
}

impl<'b> Lowering<'b> {
    fn value(&mut self, name: &'static str, width: usize, maker: Option<usize>) -> usize {
        let values = &mut self.program.values;
        let expert = self.expert.map(|expert| expert.index);
        // Names of an expert are its own. Its values are the last ones, so that the search ends soon.
        let own = values.iter().rev().take_while(|value| expert.is_none() || value.expert == expert);
        let number = 1 + own.filter(|value| value.expert == expert && value.name == name).count();
        values.push(Value { name, number, width, expert, kept: Kept::Never, maker, multiplied: false });
        values.len() - 1
    }

    fn operation(&mut self, kind: Kind<'b>, reads: &[usize], makes: &[(&'static str, usize)]) -> Vec<usize> {
        let at = self.program.operations.len();
        let made: Vec<usize> = makes.iter().map(|(name, width)| self.value(name, *width, Some(at))).collect();
        let operation = Operation { kind, reads: reads.to_vec(), makes: made.clone(), expert: self.expert };
        self.program.operations.push(operation);
        made
    }

    /// An operation that makes one value.
    fn one(&mut self, kind: Kind<'b>, reads: &[usize], name: &'static str, width: usize) -> usize {
        self.operation(kind, reads, &[(name, width)])[0]
    }

    /// An operation on values that makes one of the same name and width of each.
    fn each(&mut self, kind: Kind<'b>, reads: &mut [usize]) {
        let makes: Vec<_> =
            reads.iter().map(|v| (self.program.values[*v].name, self.program.values[*v].width)).collect();
        let made = self.operation(kind, reads, &makes);
        reads.copy_from_slice(&made);
    }

    fn linears(&mut self, linears: Vec<&'b Linear>, fixed: bool, x: usize, names: &[&'static str]) -> Vec<usize> {
        let widths = linears.iter().flat_map(|linear| match linear.split.lengths.is_empty() {
            true => vec![linear.rows],
            false => linear.split.lengths.iter().map(|length| linear.split.times * length).collect(),
        });
        let makes: Vec<_> = names.iter().copied().zip(widths).collect();
        self.operation(Kind::Linear { linears, fixed }, &[x], &makes)
    }

    fn keep(&mut self, value: usize, kept: Kept) {
        self.program.values[value].kept = kept;
    }

    fn norm(&mut self, norm: Option<&'b Norm>, x: usize, name: &'static str) -> usize {
        let width = self.program.values[x].width;
        norm.map_or(x, |norm| self.one(Kind::Norm(norm), &[x], name, width))
    }

    /// `source` is what the step reads, `stream` what it adds to.
    fn step(&mut self, step: &'b Step, mut source: usize, stream: usize) -> Option<usize> {
        let mut pre = step.pre.as_ref();
        let connection = step.hyper.as_deref().map(|connection| {
            let weights = match connection {
                Connection::Weighed(hyper) => {
                    let weights = self.one(Kind::Connect(hyper), &[stream], "w", hyper.shape.weights());
                    source = self.one(Kind::ReadStreams(hyper.shape.streams), &[stream, weights], "r", self.hidden);
                    // What every expert reads would otherwise be read of all streams by every one.
                    let kept = if matches!(step.layer, Layer::Moe(_)) { Kept::Always } else { Kept::Never };
                    self.keep(source, kept);
                    Some(weights)
                }
                Connection::Gated(gated) => {
                    let (read, weights) = self.gated(gated, pre.take(), stream);
                    source = read;
                    weights
                }
            };
            weights.iter().for_each(|weights| self.keep(*weights, Kept::Always));
            (connection, weights)
        });
        let y = match &step.layer {
            Layer::Moe(moe) => self.mixture(moe, pre, source),
            Layer::Further(further) => return Some(self.further(further, stream)),
            layer => {
                let x = self.norm(pre, source, "x");
                let x = self.scaled(x, step.given);
                self.layer(layer, x)?
            }
        };
        let y = self.norm(step.post.as_ref(), y, "y");
        let width = self.program.values[stream].width;
        Some(match connection {
            Some((connection, Some(weights))) => {
                self.one(Kind::WriteStreams(connection.hyper()), &[stream, y, weights], "h", width)
            }
            _ => self.one(Kind::Add { scale: step.scale }, &[stream, y], "h", width),
        })
    }

    /// What a layer makes of what it is given.
    fn layer(&mut self, layer: &'b Layer, x: usize) -> Option<usize> {
        Some(match layer {
            Layer::Attention(attention) => self.attention(attention, x),
            Layer::Delta(delta) => self.delta(delta, x),
            Layer::Mamba(mamba) => self.mamba(mamba, x),
            Layer::Short(short) => self.short(short, x),
            Layer::Mlp(mlp) => self.mlp(mlp, x, Kept::Room),
            Layer::PerLayer(layer) => self.per_layer(layer, x),
            Layer::Grams(layer) => self.grams(layer, x),
            Layer::Moe(_) | Layer::Further(_) | Layer::Opaque(_) => return None,
        })
    }

    fn attention(&mut self, attention: &'b Attention, x: usize) -> usize {
        let Attention {
            projections,
            keys,
            gated,
            head_gate,
            o,
            shape,
            rope,
            layout,
            norms,
            clip,
            sinks,
            temperature,
            choice,
            value_scale,
            beside,
        } = attention;
        let (gate, queries_latent);
        let mut qkv: [usize; 3] = match projections {
            Projections::Direct(linears) => {
                let names: &[&str] = if *gated { &["q", "gate", "k", "v"] } else { &["q", "k", "v"] };
                let mut made = self.linears(linears.iter().collect(), false, x, names);
                (gate, queries_latent) = (gated.then(|| made.remove(1)), None);
                match (*keys, &made[..]) {
                    (Keys::Of(block), [q, ..]) => {
                        let widths = [shape.head_dim, shape.value_dim].map(|width| shape.kv_heads * width);
                        let found = self.operation(Kind::Shared(block), &[], &[("k", widths[0]), ("v", widths[1])]);
                        [*q, found[0], found[1]]
                    }
                    // Values are what keys are made of.
                    (_, [q, k]) => [*q, *k, *k],
                    _ => made.try_into().expect("queries, keys and values"),
                }
            }
            Projections::Latent(latent) => {
                let made = self.latent(latent, *keys, [shape.heads, shape.head_dim - layout.first], x);
                (gate, queries_latent) = (made.2, made.1);
                made.0
            }
            Projections::Joint(joint) => {
                let (q, kv, latent) = self.joint(joint, x);
                (gate, queries_latent) = (None, Some(latent));
                [q, kv, kv]
            }
        };
        let norms = |after: bool| norms.as_ref().filter(|norms| norms.after_rope == after);
        self.head_norms(norms(false), shape.head_dim, &mut qkv);
        if let Some(limit) = clip {
            self.each(Kind::Clamp(*limit), &mut qkv);
        }
        if let Some(rope) = rope {
            // Latents are handed over as no position has turned them yet.
            let turned = matches!((keys, projections), (Keys::Of(_), Projections::Direct(_)));
            let own = if turned { 1 } else { 2 };
            self.each(Kind::Rope { rope, layout: *layout, back: 0, inverse: false }, &mut qkv[..own]);
        }
        if let Projections::Joint(_) = projections {
            qkv[2] = qkv[1];
        }
        self.head_norms(norms(true), shape.head_dim, &mut qkv);
        if let Some(temperature) = temperature {
            self.each(Kind::Warm(temperature), &mut qkv[..1]);
        }
        if *value_scale != 1.0 {
            self.each(Kind::Scale(*value_scale), &mut qkv[2..]);
        }
        if let (Keys::Left(block), Projections::Direct(_)) = (*keys, projections) {
            let [_, k, v] = qkv;
            [k, v].into_iter().for_each(|value| self.keep(value, Kept::Always));
            self.program.leaves = Some((block, vec![k, v]));
        }
        let mut reads = qkv.to_vec();
        reads.extend(choice.as_ref().map(|choice| match choice {
            Choice::Own(indexer, shared) => self.indexer(indexer, *shared, x, queries_latent, rope.as_deref()),
            Choice::Earlier(shape) => self.one(Kind::Chosen, &[], "chosen", shape.width()),
        }));
        let index = choice.as_ref().map(|choice| *choice.shape());
        reads.extend(beside.as_ref().map(|beside| self.entries(beside, x, rope.as_deref(), *layout)));
        let block = beside.as_ref().map(|beside| beside.block);
        let kind = Kind::Attention { shape: *shape, sinks: sinks.as_deref(), index, block };
        let width = shape.heads * shape.value_dim;
        let mut mixed = self.one(kind, &reads, "mix", width);
        let by_head = head_gate.as_ref().map(|linear| {
            let heads = self.linears(vec![linear], true, x, &["gate"])[0];
            self.one(Kind::Spread, &[heads], "gate", width)
        });
        if let Some(gate) = gate.or(by_head) {
            mixed = self.one(Kind::Gate(Activation::Sigmoid), &[gate, mixed], "mix", width);
        }
        if let Projections::Joint(joint) = projections {
            mixed = self.turned_back(joint, rope.as_deref(), *layout, mixed);
        }
        // It costs more than any product, and the weights before it can go once it is there.
        self.keep(mixed, Kept::Always);
        self.linears(vec![o], false, mixed, &["y"])[0]
    }

    /// The choice of an indexer; `latent` is that of attention's queries.
    fn indexer(
        &mut self,
        indexer: &'b Indexer,
        shared: bool,
        x: usize,
        latent: Option<usize>,
        rope: Option<&'b Rope>,
    ) -> usize {
        let Indexer { q, k, input_norm, temperature, q_norm, k_norm, weights, pool, mean, shape, layout, .. } = indexer;
        let others = || k.iter().chain(weights).chain(pool.iter().map(|pool| &pool.gate));
        let normed = input_norm.as_ref().map(|norm| self.norm(Some(norm), x, "ix"));
        let mut made = match latent.filter(|_| indexer.latent).or(normed) {
            Some(read) => {
                let mut made = self.linears(vec![q], true, read, &["iq"]);
                made.extend(self.linears(others().collect(), true, x, &["ik", "iw", "ig"]));
                made
            }
            None => self.linears([q].into_iter().chain(others()).collect(), true, x, &["iq", "ik", "iw", "ig"]),
        };
        let gates = pool.is_some().then(|| made.pop()).flatten();
        // What is made of a block stands at its last token.
        let first = *mean || pool.as_ref().is_some_and(|pool| pool.first);
        let back = if first { shape.block - 1 } else { 0 };
        if *mean {
            self.each(Kind::Average(shape.block), &mut made[1..2]);
        }
        let pool_keys = |this: &mut Self, made: &mut Vec<usize>, first: bool| {
            if let (Some(pool), Some(gates)) = (pool.as_ref().filter(|pool| pool.first == first), gates) {
                made[1] = this.one(Kind::Pool(pool), &[made[1], gates], "ik", shape.head_dim);
            }
        };
        pool_keys(self, &mut made, true);
        for (at, norm) in [q_norm.as_ref(), Some(k_norm)].into_iter().enumerate() {
            if let Some(norm) = norm {
                self.each(Kind::HeadNorm { norm, head_dim: shape.head_dim }, &mut made[at..=at]);
            }
        }
        if let Some(temperature) = temperature {
            self.each(Kind::Warm(temperature), &mut made[..1]);
        }
        if let Some(rope) = rope {
            let turn = |back| Kind::Rope { rope, layout: *layout, back, inverse: false };
            if back == 0 {
                self.each(turn(0), &mut made[..2]);
            } else {
                self.each(turn(0), &mut made[..1]);
                self.each(turn(back), &mut made[1..2]);
            }
        }
        pool_keys(self, &mut made, false);
        self.one(Kind::Select { shape: *shape, shared }, &made, "chosen", shape.width())
    }

    fn delta(&mut self, delta: &'b DeltaNet, x: usize) -> usize {
        let DeltaNet { inputs, rates, narrow, convolution, shape, decay, share, unit, norm, activation, out } = delta;
        let made = self.linears(inputs.iter().collect(), false, x, &["q", "k", "v", "z"]);
        let [mut q, mut k, mut v] = made[..3].try_into().expect("queries, keys and values");
        let [b, a, gate] = match narrow {
            None => {
                let rates = self.linears(rates.iter().collect(), true, x, &["b", "a"]);
                [rates[0], rates[1], made[3]]
            }
            Some(narrow) => {
                let Narrow { decay, gate } = &**narrow;
                let first = rates.iter().chain([&decay[0], &gate[0]]).collect();
                let made = self.linears(first, true, x, &["b", "fa", "ga"]);
                let a = self.linears(vec![&decay[1]], true, made[1], &["a"])[0];
                [made[0], a, self.linears(vec![&gate[1]], true, made[2], &["z"])[0]]
            }
        };
        let mut first = 0;
        for value in [&mut q, &mut k, &mut v] {
            self.convolve(convolution, first, value);
            first += self.program.values[*value].width;
        }
        for value in [&mut q, &mut k] {
            let kind = Kind::HeadNorm { norm: unit, head_dim: shape.key_dim };
            self.each(kind, std::slice::from_mut(value));
        }
        let decays = self.one(Kind::Decay(decay), &[a], "decay", shape.decays());
        let beta = self.one(Kind::Map(Activation::Sigmoid), &[b], "beta", shape.value_heads);
        let beta = self.scaled(beta, *share);
        let width = shape.value_heads * shape.value_dim;
        let mut mixed = self.one(Kind::Delta(*shape), &[q, k, v, decays, beta], "mix", width);
        self.each(Kind::HeadNorm { norm, head_dim: shape.value_dim }, std::slice::from_mut(&mut mixed));
        let mixed = self.one(Kind::Gate(*activation), &[gate, mixed], "mix", width);
        // As of attention.
        self.keep(mixed, Kept::Always);
        self.linears(vec![out], false, mixed, &["y"])[0]
    }

    fn mamba(&mut self, mamba: &'b Mamba, x: usize) -> usize {
        let Mamba { input, scales, convolution, shape, decay, skip, norm, activation, out } = mamba;
        let mut made = self.linears(vec![input], false, x, &["z", "v", "B", "C", "dt"]);
        for (value, scale) in made.iter_mut().zip(scales) {
            *value = self.scaled(*value, *scale);
        }
        let [gate, mut v, mut k, mut q, dt]: [usize; 5] = made.try_into().expect("five parts");
        let mut first = 0;
        for value in [&mut v, &mut k, &mut q] {
            self.convolve(convolution, first, value);
            first += self.program.values[*value].width;
        }
        let decays = self.one(Kind::Decay(decay), &[dt], "decay", shape.value_heads);
        let steps = self.one(Kind::Step(decay), &[dt], "step", shape.value_heads);
        let width = shape.value_heads * shape.value_dim;
        let mut mixed = self.one(Kind::Delta(*shape), &[q, k, v, decays, steps], "mix", width);
        mixed = self.one(Kind::Skip { tensor: skip, head_dim: shape.value_dim }, &[mixed, v], "mix", width);
        let (before, after) = match norm {
            Some(norm) if norm.first => (Some(norm), None),
            norm => (None, norm.as_ref()),
        };
        self.group_norm(before, &mut mixed);
        mixed = self.one(Kind::Gate(*activation), &[gate, mixed], "mix", width);
        self.group_norm(after, &mut mixed);
        // As of attention.
        self.keep(mixed, Kept::Always);
        self.linears(vec![out], false, mixed, &["y"])[0]
    }

    fn group_norm(&mut self, norm: Option<&'b GroupNorm>, value: &mut usize) {
        let Some(GroupNorm { norm, width, .. }) = norm else { return };
        self.each(Kind::HeadNorm { norm, head_dim: *width }, std::slice::from_mut(value));
    }

    fn short(&mut self, short: &'b ShortConvolution, x: usize) -> usize {
        let ShortConvolution { input, convolution, out } = short;
        let made = self.linears(vec![input], false, x, &["B", "C", "v"]);
        let product =
            |this: &mut Self, a, b| this.one(Kind::Gate(Activation::Identity), &[a, b], "v", convolution.channels);
        let mut v = product(self, made[0], made[2]);
        self.convolve(convolution, 0, &mut v);
        let mixed = product(self, made[1], v);
        self.keep(mixed, Kept::Always);
        self.linears(vec![out], false, mixed, &["y"])[0]
    }

    /// A value times a factor.
    fn scaled(&mut self, mut value: usize, factor: f32) -> usize {
        if factor != 1.0 {
            self.each(Kind::Scale(factor), std::slice::from_mut(&mut value));
        }
        value
    }

    /// Convolves a value, whose channels lie from `first` on in the convolution.
    fn convolve(&mut self, convolution: &'b Convolution, first: usize, value: &mut usize) {
        self.each(Kind::Convolve { convolution, first }, std::slice::from_mut(value));
    }

    fn head_norms(&mut self, norms: Option<&'b HeadNorms>, head_dim: usize, qkv: &mut [usize; 3]) {
        let Some(HeadNorms { q, k, v, per_head, .. }) = norms else { return };
        let names = ["q", "k", "v"].into_iter();
        for ((norm, value), name) in [Some(q), k.as_ref(), v.as_ref()].into_iter().zip(qkv).zip(names) {
            let Some(norm) = norm else { continue };
            let kind = if *per_head { Kind::HeadNorm { norm, head_dim } } else { Kind::Norm(norm) };
            *value = self.one(kind, &[*value], name, self.program.values[*value].width);
        }
    }

    /// Queries, keys and values, the latent of the queries and the gate of what is attended to, where there are such. `rotated` values of a head
    /// are the same in the keys of all of them.
    fn latent(
        &mut self,
        latent: &'b Latent,
        keys: Keys,
        [heads, rotated]: [usize; 2],
        x: usize,
    ) -> ([usize; 3], Option<usize>, Option<usize>) {
        let Latent { q, q_norm, kv_a, kv_norm, kv_scale, kv_b, gate } = latent;
        let first = if q.len() == 1 { "q" } else { "cq" };
        let names = [Some(first), kv_a.as_ref().map(|_| "ckv"), kv_a.as_ref().filter(|_| rotated > 0).map(|_| "kr")];
        let names: Vec<&str> = names.into_iter().flatten().chain(["gate"]).collect();
        let linears = q[..1].iter().chain(kv_a).chain(gate).collect();
        let mut made = self.linears(linears, false, x, &names);
        let gate = gate.is_some().then(|| made.pop()).flatten();
        let mut queries = made.remove(0);
        let queries_latent = (q.len() > 1).then(|| self.norm(q_norm.as_ref(), queries, "cq"));
        match keys {
            Keys::Of(block) => {
                let parts = [("ckv", kv_b.cols), ("kr", rotated)];
                made = self.operation(Kind::Shared(block), &[], if rotated > 0 { &parts } else { &parts[..1] });
            }
            Keys::Own | Keys::Left(_) => {
                made[0] = self.norm(kv_norm.as_ref(), made[0], "ckv");
                if *kv_scale != 1.0 {
                    made[0] = self.one(Kind::Scale(*kv_scale), &[made[0]], "ckv", kv_b.cols);
                }
                // Each of them is small, and all are made of one product with the input.
                made.iter().for_each(|value| self.keep(*value, Kept::Always));
            }
        }
        if let Keys::Left(block) = keys {
            self.program.leaves = Some((block, made.clone()));
        }
        queries_latent.iter().for_each(|value| self.keep(*value, Kept::Always));
        if let Some(queries_latent) = queries_latent {
            queries = self.linears(vec![&q[1]], false, queries_latent, &["q"])[0];
        }
        let rotated = made.get(1).copied();
        let made = self.linears(vec![kv_b], false, made[0], &["k", "v"]);
        let keys = rotated.map_or(made[0], |rotated| {
            let width = self.program.values[made[0]].width + heads * self.program.values[rotated].width;
            self.one(Kind::JoinHeads { heads }, &[made[0], rotated], "k", width)
        });
        ([queries, keys, made[1]], queries_latent, gate)
    }

    fn mlp(&mut self, mlp: &'b Mlp, x: usize, kept: Kept) -> usize {
        let names: &[&str] = if mlp.gated() { &["gate", "up"] } else { &["up"] };
        let made = self.linears(mlp.inputs.iter().collect(), false, x, names);
        let inner = match (mlp.scale == 1.0 && mlp.cut.is_none(), &made[..]) {
            (true, _) => self.one(Kind::Activate(mlp.activation), &made, "a", mlp.inner()),
            (false, [gate, rest @ ..]) => {
                let mut gate = self.scaled(*gate, mlp.scale);
                if let Some(deviations) = mlp.cut {
                    self.each(Kind::Cut(deviations), std::slice::from_mut(&mut gate));
                }
                let kind = if rest.is_empty() { Kind::Map(mlp.activation) } else { Kind::Gate(mlp.activation) };
                self.one(kind, &[&[gate], rest].concat(), "a", mlp.inner())
            }
            (false, []) => unreachable!("a linear makes something"),
        };
        self.keep(inner, kept);
        self.linears(vec![&mlp.down], false, inner, &["y"])[0]
    }

    fn mixture(&mut self, moe: &'b Moe, pre: Option<&'b Norm>, source: usize) -> usize {
        let Moe { router, experts, shared, weigh_input, latent, norms } = moe;
        let norms = norms.as_deref();
        let x = self.norm(pre, source, "x");
        let seen = norms.map_or(x, |norms| self.norm(Some(&norms.router), source, "x"));
        let pre = norms.map_or(pre, |norms| Some(&norms.experts));
        let logits = self.linears(vec![&router.linear], true, seen, &["logits"])[0];
        let routes = self.one(Kind::Route(router), &[logits], "routes", router.top_k);
        // In a space of their own experts need no norm.
        let width = latent.as_ref().map_or(self.hidden, |latent| latent[0].rows);
        let (source, pre) = match latent {
            Some(latent) => (self.linears(vec![&latent[0]], false, x, &["l"])[0], None),
            None => (source, pre),
        };
        let mut sum = self.one(Kind::Zeros, &[], "sum", width);
        [routes, sum]
            .into_iter()
            .chain(latent.as_ref().map(|_| source))
            .for_each(|value| self.keep(value, Kept::Always));
        for (index, expert) in experts.iter().enumerate() {
            self.expert = Some(Expert { index, routes });
            // Rows are normed one by one: those of one expert need no others.
            let own = self.one(Kind::Tokens, &[source, routes], "t", width);
            let mut x = self.norm(pre, own, "x");
            if *weigh_input {
                x = self.one(Kind::Weigh, &[x, routes], "x", width);
            }
            // Both uses follow at once, and the tokens of one expert are few.
            let y = self.mlp(expert, x, Kept::Always);
            let kind = Kind::Scatter { weighed: !weigh_input };
            let expert = self.expert.take();
            sum = self.add_to_sum(kind, &[sum, y, routes]);
            self.program.operations.last_mut().expect("just added").expert = expert;
        }
        if let Some(latent) = latent {
            sum = self.linears(vec![&latent[1]], false, sum, &["y"])[0];
            self.keep(sum, Kept::Always);
        }
        if experts.len() < router.linear.rows {
            sum = self.add_to_sum(Kind::Return { first: experts.len() }, &[sum, x, routes]);
        }
        if let Some(norms) = norms {
            sum = self.norm(Some(&norms.routed), sum, "sum");
            self.keep(sum, Kept::Always);
        }
        if let Some((shared, gate)) = shared {
            let mut y = self.mlp(shared, x, Kept::Room);
            if let Some(gate) = gate {
                let logit = self.linears(vec![gate], true, x, &["logits"])[0];
                y = self.one(Kind::Share, &[y, logit], "y", self.hidden);
            }
            y = self.norm(norms.map(|norms| &norms.shared), y, "y");
            sum = self.add_to_sum(Kind::Sum, &[sum, y]);
        }
        sum
    }

    fn per_layer(&mut self, layer: &'b PerLayer, x: usize) -> usize {
        let PerLayer { gate, activation, side, out } = layer;
        let Side { table, embedding, projection, norm, share } = side;
        let width = out.cols;
        let through = self.linears(vec![gate], false, x, &["gate"])[0];
        let e = self.one(Kind::Lookup(embedding), &[], "e", embedding.columns.len());
        let projected = self.linears(vec![projection], true, e, &["p"])[0];
        let projected = self.norm(Some(norm), projected, "p");
        let found = self.one(Kind::Lookup(table), &[], "t", width);
        let side = self.one(Kind::Plus(*share), &[found, projected], "s", width);
        let inner = self.one(Kind::Gate(*activation), &[through, side], "a", width);
        // Narrow, and used at once.
        self.keep(inner, Kept::Always);
        self.linears(vec![out], false, inner, &["y"])[0]
    }

    /// What comes of it stands where the sum stood, and is called as it was.
    fn add_to_sum(&mut self, kind: Kind<'b>, reads: &[usize]) -> usize {
        let width = self.program.values[reads[0]].width;
        let sum = self.one(kind, reads, "sum", width);
        self.program.values[sum].number = 1;
        self.keep(sum, Kept::Always);
        sum
    }

    /// Says of every value who reads it.
    fn end(self) -> Program<'b> {
        let mut program = self.program;
        let mut others = vec![false; program.values.len()];
        // Blocks behind read these as they are.
        program.leaves.iter().flat_map(|(_, left)| left).for_each(|value| others[*value] = true);
        for operation in &program.operations {
            let product = matches!(operation.kind, Kind::Linear { .. });
            for value in &operation.reads {
                program.values[*value].multiplied = product && !others[*value];
                others[*value] |= !product;
            }
        }
        let sums = program.operations.iter().filter(|operation| operation.kind.adds());
        for value in sums.flat_map(|operation| &operation.makes) {
            program.values[*value].multiplied = false;
        }
        program
    }
}
