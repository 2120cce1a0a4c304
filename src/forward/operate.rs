//! What each operation of a program does to one chunk.

use std::rc::Rc;

use kernels::{Activation, Forward, RopeLayout};
use ndarray::Array2;

use super::route::{Routed, choose, sigmoid, told};
use super::run::{Computed, Loaded, Place, Read, Run};
use super::{LoadedNorm, Weight, product};
use crate::error::Result;
use crate::graph::{Rope, Router, Temperature};
use crate::program::{Expert, Kind, Operation};

impl<B: Forward> Computed<B> {
    pub fn matrix(&self) -> &B::Matrix {
        let Computed::Matrix(matrix) = self else { unreachable!("read as a matrix") };
        matrix
    }

    pub fn input(&self) -> &B::Input {
        let Computed::Input(input) = self else { unreachable!("read by linears alone") };
        input
    }

    /// The weights that each of so many tokens gives the experts from one on, summed up.
    pub fn shares(&self, first: usize, tokens: usize) -> Vec<f32> {
        let Computed::Routes(routes) = self else { unreachable!("read as routes") };
        let mut shares = vec![0.0; tokens];
        for Routed { rows, weights } in &routes[first..] {
            rows.iter().zip(weights).for_each(|(row, weight)| shares[*row] += weight);
        }
        shares
    }

    pub fn routed(&self, expert: Expert) -> &Routed {
        let Computed::Routes(routes) = self else { unreachable!("read as routes") };
        &routes[expert.index]
    }
}

impl<B: Forward> Read<'_, B> {
    pub fn matrix(&self) -> &B::Matrix {
        match self {
            Read::Stream(stream) => stream,
            Read::Value(value) => value.matrix(),
        }
    }
}

impl<'b, B: Forward> Run<'_, 'b, B> {
    /// A matrix that may be changed: the value itself where nobody else has it.
    pub fn own(&self, read: Read<'_, B>) -> Result<B::Matrix> {
        Ok(match read {
            Read::Stream(stream) => self.backend.copy(stream)?,
            Read::Value(value) => match Rc::try_unwrap(value) {
                Ok(Computed::Matrix(matrix)) => matrix,
                Ok(_) => unreachable!("read as a matrix"),
                Err(shared) => self.backend.copy(shared.matrix())?,
            },
        })
    }

    /// What linears read.
    fn multiplied(&self, read: Read<'_, B>) -> Result<Rc<Computed<B>>> {
        Ok(match read {
            Read::Value(value) if matches!(*value, Computed::Input(_)) => value,
            other => Rc::new(Computed::Input(self.backend.input(self.own(other)?)?)),
        })
    }

    fn weights(&self, at: usize) -> &[Weight<B::Weight>] {
        let Loaded::Weights(weights) = &self.loaded[at] else { unreachable!("there as long as they are used") };
        weights
    }

    fn loaded_norm(&self, at: usize) -> &LoadedNorm<'b> {
        let Loaded::Norm(norm) = &self.loaded[at] else { unreachable!("loaded where the norm stands") };
        norm
    }

    pub(super) fn vector(&self, at: usize) -> Option<&[f32]> {
        let Loaded::Vector(vector) = &self.loaded[at] else { unreachable!("loaded where it is used") };
        vector.as_deref()
    }

    /// Does an operation for one chunk; what it makes, of linears only what is asked for.
    pub fn operate(
        &self,
        at: usize,
        reads: Vec<Read<'_, B>>,
        place: Place<'_>,
        asked: &dyn Fn(&usize) -> bool,
    ) -> Result<Vec<(usize, Rc<Computed<B>>)>> {
        let (backend, program) = (self.backend, self.program);
        let operation = &program.operations[at];
        let lengths = &self.chunks[place.index].lengths;
        let mut reads = reads.into_iter();
        let mut next = || reads.next().expect("as many as it reads");
        let matrices = match &operation.kind {
            Kind::Norm(_) => {
                let (x, norm) = (next(), self.loaded_norm(at));
                if program.values[operation.makes[0]].multiplied {
                    let input = norm.input(backend, x.matrix())?;
                    return Ok(vec![(operation.makes[0], Rc::new(Computed::Input(input)))]);
                }
                vec![norm.apply(backend, x.matrix())?]
            }
            Kind::HeadNorm { norm, head_dim } => {
                let mut x = self.own(next())?;
                let LoadedNorm { weight, bias, .. } = self.loaded_norm(at);
                backend.norm_heads(&mut x, *head_dim, norm.kind, weight, bias.as_deref(), norm.eps)?;
                vec![x]
            }
            Kind::Linear { .. } if operation.reads.len() > 1 => {
                return self.part_by_part(at, operation.reads.iter().map(|_| next()), asked);
            }
            Kind::Linear { .. } => {
                let x = self.multiplied(next())?;
                let parts = operation.makes.iter().zip(self.weights(at)).filter(|(value, _)| asked(value));
                let made = parts.map(|(value, weight)| Ok((*value, product(backend, x.input(), weight)?)));
                return made.map(|made| made.and_then(|(value, y)| self.made(value, y))).collect();
            }
            Kind::JoinHeads { heads } => {
                let (own, shared) = (next(), next());
                // The shared part is rotated once a head: the layout says where in a head it lies.
                vec![backend.join_heads(own.matrix(), shared.matrix(), *heads)?]
            }
            Kind::Clamp(limit) => self.each(operation, next, |x| Ok(backend.clamp(x, *limit)?))?,
            Kind::Rope { rope, layout, back, inverse } => {
                let turn = |x: &mut B::Matrix| self.turn(at, x, (rope, *back, *inverse), layout, lengths);
                self.each(operation, next, turn)?
            }
            Kind::Warm(temperature) => vec![self.warm(at, self.own(next())?, temperature, lengths)?],
            Kind::Attention { .. } => {
                let mixed = self.see(at, operation.reads.iter().map(|_| next()).collect(), lengths)?;
                if program.values[operation.makes[0]].multiplied {
                    return Ok(vec![(operation.makes[0], Rc::new(Computed::Input(mixed)))]);
                }
                vec![backend.values(&mixed)?]
            }
            Kind::Select { shape, shared } => {
                vec![self.choice(place.index, operation.reads.iter().map(|_| next()).collect(), shape, *shared)?]
            }
            Kind::Pool(_) => vec![self.pooled(at, next().matrix(), next().matrix(), lengths)?],
            Kind::Chosen => vec![self.earlier_choice(place.index)?],
            Kind::Activate(activation) => {
                let x = self.multiplied(next())?;
                let weights = self.weights(program.values[operation.reads[0]].maker.expect("linears make it"));
                let inner = activate(backend, weights, *activation, x.input())?;
                return Ok(vec![(operation.makes[0], Rc::new(Computed::Input(inner)))]);
            }
            Kind::Route(router) => {
                let routes = self.routes(at, router, next().matrix(), &self.chunks[place.index].tokens)?;
                return Ok(vec![(operation.makes[0], Rc::new(Computed::Routes(routes)))]);
            }
            Kind::Tokens => {
                let (x, routes) = (next(), next());
                let rows = place.rows.unwrap_or_else(|| &routed(&routes, operation).rows);
                vec![backend.select_rows(x.matrix(), rows)?]
            }
            Kind::Weigh => {
                let (mut x, routes) = (self.own(next())?, next());
                // Others have no weight here.
                if place.rows.is_none() {
                    backend.scale(&mut x, &routed(&routes, operation).weights, &[])?;
                }
                vec![x]
            }
            Kind::Zeros => {
                let [rows, _] = backend.shape(&self.chunks[place.index].hidden);
                vec![backend.zeros(rows, program.values[operation.makes[0]].width)?]
            }
            Kind::Share => vec![self.shared(self.own(next())?, next().matrix())?],
            Kind::Connect(_) | Kind::ReadStreams(_) | Kind::Agree(_) => vec![self.connect(at, next)?],
            Kind::Cut(deviations) => self.each(operation, next, |x| Ok(backend.cut(x, *deviations)?))?,
            Kind::Streams(width, what) => {
                vec![self.streams(at, *width, what, operation.reads.iter().map(|_| next()).collect())?]
            }
            Kind::Lookup(_) | Kind::Grams(_) | Kind::Shared(_) | Kind::Plus(_) => self.beside(at, next, place.index)?,
            kind if kind.adds() => unreachable!("done where they stand"),
            _ => self.recur(at, next, lengths)?,
        };
        operation.makes.iter().zip(matrices).map(|(value, matrix)| self.made(*value, matrix)).collect()
    }

    /// What the parts of a linear make of which each reads what is its own, or one part of all that is read, as far as it is asked for.
    fn part_by_part<'m>(
        &self,
        at: usize,
        reads: impl Iterator<Item = Read<'m, B>>,
        asked: &dyn Fn(&usize) -> bool,
    ) -> Result<Vec<(usize, Rc<Computed<B>>)>>
    where
        B: 'm,
    {
        let mut made = Vec::new();
        let weights = self.weights(at).iter().cycle();
        for ((value, weight), read) in self.program.operations[at].makes.iter().zip(weights).zip(reads) {
            if asked(value) {
                let x = self.multiplied(read)?;
                made.push(self.made(*value, product(self.backend, x.input(), weight)?)?);
            }
        }
        Ok(made)
    }

    /// What an expert that all tokens are sent to makes of them, as far as its gate lets it through.
    fn shared(&self, mut y: B::Matrix, logits: &B::Matrix) -> Result<B::Matrix> {
        let share: Vec<f32> = self.backend.download(logits)?.iter().map(|x| sigmoid(*x)).collect();
        self.backend.scale(&mut y, &share, &[])?;
        Ok(y)
    }

    /// The tokens of each expert and their weights, from the router's `logits` `[tokens, experts]`.
    fn routes(&self, at: usize, router: &Router, logits: &B::Matrix, tokens: &[u32]) -> Result<Vec<Routed>> {
        let Loaded::Router(correction, factors, table) = &self.loaded[at] else {
            unreachable!("loaded where it stands")
        };
        let logits = self.backend.download(logits)?;
        let mut routes = vec![Routed::default(); logits.ncols()];
        for (row, logits) in logits.rows().into_iter().enumerate() {
            let told = table.as_ref().map(|table| told(table, router.top_k, tokens[row]));
            for (expert, weight) in choose(router, logits, correction.as_deref(), factors.as_deref(), told) {
                routes[expert].rows.push(row);
                routes[expert].weights.push(weight);
            }
        }
        Ok(routes)
    }

    /// Turns the heads of sequences of these lengths.
    fn turn(
        &self,
        at: usize,
        x: &mut B::Matrix,
        (rope, back, inverse): (&Rope, usize, bool),
        layout: &RopeLayout,
        lengths: &[usize],
    ) -> Result<()> {
        if let Loaded::Angles(cos, sin) = &self.loaded[at] {
            return Ok(self.backend.rope(x, cos, sin, layout, lengths)?);
        }
        // As of one sequence: each row of the table belongs to one token.
        let (cos, mut sin) = rope.table(lengths, back, self.vector(at));
        if inverse {
            sin.mapv_inplace(|x| -x);
        }
        Ok(self.backend.rope(x, &cos, &sin, layout, &[lengths.iter().sum()])?)
    }

    /// Queries of sequences of these lengths, made larger by their positions.
    fn warm(
        &self,
        at: usize,
        mut queries: B::Matrix,
        temperature: &Temperature,
        lengths: &[usize],
    ) -> Result<B::Matrix> {
        let positions = lengths.iter().flat_map(|length| 0..*length);
        match (temperature, &self.loaded[at]) {
            (Temperature::Steps { floor, scale, first }, _) => {
                let of = |position: usize| 1.0 + scale * (((position + first) as f32 / floor).floor() + 1.0).ln();
                self.backend.scale(&mut queries, &positions.map(of).collect::<Vec<f32>>(), &[])?;
                Ok(queries)
            }
            (Temperature::Heads { .. }, Loaded::Growth(scale, bias)) => {
                let logarithms: Vec<f32> = positions.map(|position| ((position + 1) as f32).ln()).collect();
                let of = |(token, head): (usize, usize)| scale[head] * logarithms[token] + bias[head];
                let heads = self.backend.upload(Array2::from_shape_fn((logarithms.len(), scale.len()), of))?;
                let [_, width] = self.backend.shape(&queries);
                let mut warmed = self.backend.spread_heads(&heads, width / scale.len().max(1))?;
                self.backend.gate(&mut warmed, &queries, Activation::Identity)?;
                Ok(warmed)
            }
            _ => unreachable!("loaded where it stands"),
        }
    }

    /// Does the same to everything that an operation reads.
    pub fn each<'m>(
        &self,
        operation: &Operation<'b>,
        mut next: impl FnMut() -> Read<'m, B>,
        change: impl Fn(&mut B::Matrix) -> Result<()>,
    ) -> Result<Vec<B::Matrix>>
    where
        B: 'm,
    {
        let changed = operation.reads.iter().map(|_| {
            let mut x = self.own(next())?;
            change(&mut x)?;
            Ok(x)
        });
        changed.collect()
    }

    /// A value that was made, in the form in which it is read.
    fn made(&self, value: usize, matrix: B::Matrix) -> Result<(usize, Rc<Computed<B>>)> {
        Ok((
            value,
            Rc::new(match self.program.values[value].multiplied {
                true => Computed::Input(self.backend.input(matrix)?),
                false => Computed::Matrix(matrix),
            }),
        ))
    }
}

/// The tokens of an operation's expert.
fn routed<'r, B: Forward>(routes: &'r Read<'_, B>, operation: &Operation<'_>) -> &'r Routed {
    let (Read::Value(routes), Some(expert)) = (routes, operation.expert) else { unreachable!("of an expert") };
    routes.routed(expert)
}

/// What linears make, activated.
fn activate<B: Forward>(
    backend: &B,
    weights: &[Weight<B::Weight>],
    activation: Activation,
    x: &B::Input,
) -> Result<B::Input> {
    // Types of gate and up differ only where somebody asked for that: what both read is then rounded for one after the other.
    let mut kinds: Vec<_> = weights.iter().filter_map(|weight| weight.rounding).collect();
    kinds.dedup();
    let mut kept = None;
    for kind in kinds {
        kept = Some(backend.round_activations(kept.as_ref().unwrap_or(x), kind)?);
    }
    let x = kept.as_ref().unwrap_or(x);
    Ok(match weights {
        [gate, up] => backend.gated(x, [&gate.matrix, &up.matrix], [gate.bias(), up.bias()], activation)?,
        [up, ..] => backend.activated(x, &up.matrix, up.bias(), activation)?,
        [] => unreachable!("a feed-forward layer has an input"),
    })
}
