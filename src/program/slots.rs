//! Where channel scales can go: what some linears read in common, and what makes it.

use kernels::Activation;

use super::{Kind, Operation, Program};
use crate::graph::{Linear, Norm};

/// Values that linears read, each channel of which can be made larger where its producer makes it smaller.
#[derive(Clone, Debug)]
pub struct Slot<'b> {
    /// Where the channels are made.
    pub producer: Producer<'b>,
    /// All that reads them.
    pub readers: Vec<&'b Linear>,
}

/// What makes the channels of a slot.
#[derive(Clone, Copy, Debug)]
pub enum Producer<'b> {
    /// The weight of a norm.
    Norm(&'b Norm),
    /// Rows of a linear's weight.
    Linear {
        /// The linear.
        linear: &'b Linear,
        /// The part of it whose output they are.
        part: usize,
        /// Each head of so many channels is read so many times, one after the other.
        heads: Option<(usize, usize)>,
    },
}

impl<'b> Program<'b> {
    /// Every place for channel scales: the norms of the stream, then what lies between linears.
    pub fn slots(&self) -> Vec<Slot<'b>> {
        let mut slots = self.norm_slots();
        slots.extend(self.operations.iter().filter_map(|operation| self.linear_slot(operation)));
        slots
    }

    /// A norm goes with all that reads it, in whatever step. The norm of a mixture is left alone: its router, which is never quantized,
    /// would be rounded once more. So are norms of latents.
    fn norm_slots(&self) -> Vec<Slot<'b>> {
        let mut found: Vec<(&Norm, Vec<&Linear>, bool)> = Vec::new();
        for reader in &self.operations {
            for value in &reader.reads {
                // What only multiplies it is read by others in its stead.
                let Some((norm, of)) = self.norm_of(*value).filter(|_| !matches!(reader.kind, Kind::Scale(_))) else {
                    continue;
                };
                if norm.weights.len() != 1 || !self.is_stream(of) {
                    continue;
                }
                let (linears, other) = match &reader.kind {
                    Kind::Linear { linears, fixed: false } => (&linears[..], false),
                    _ => (&[][..], true),
                };
                match found.iter_mut().find(|(known, ..)| known.weights == norm.weights) {
                    Some((_, all, others)) => {
                        all.extend(linears);
                        *others |= other;
                    }
                    None => found.push((norm, linears.to_vec(), other)),
                }
            }
        }
        let free = found.into_iter().filter(|(.., others)| !others);
        free.map(|(norm, readers, _)| Slot { producer: Producer::Norm(norm), readers }).collect()
    }

    /// The norm that makes a value, or what is multiplied by a number to make it, and what the norm reads.
    fn norm_of(&self, value: usize) -> Option<(&'b Norm, usize)> {
        let mut maker = self.maker(value)?;
        if let Kind::Scale(_) = maker.kind {
            maker = self.maker(maker.reads[0])?;
        }
        let Kind::Norm(norm) = maker.kind else { return None };
        Some((norm, maker.reads[0]))
    }

    /// What lies between a linear and another one that does no more than multiply, or take an average.
    fn linear_slot(&self, reader: &Operation<'b>) -> Option<Slot<'b>> {
        let Kind::Linear { linears, fixed: false } = &reader.kind else { return None };
        let mut between = self.maker(reader.reads[0])?;
        // A gate multiplies each channel by itself.
        if let Kind::Gate(activation) = between.kind {
            // Nothing is done to this one before it multiplies the other.
            if let (Activation::Identity, Some((linear, part))) = (activation, self.made_by(between.reads[0])) {
                let producer = Producer::Linear { linear, part, heads: None };
                return Some(Slot { producer, readers: linears.clone() });
            }
            let gated = self.maker(between.reads[1])?;
            match gated.kind {
                // Of what a linear makes, it is a feed-forward layer's.
                Kind::Linear { .. } => {}
                _ => between = gated,
            }
        }
        let heads = match &between.kind {
            // With a weight for each channel.
            Kind::HeadNorm { norm, .. } if norm.weights.len() == 1 && norm.shape == [linears[0].cols] => {
                return Some(Slot { producer: Producer::Norm(norm), readers: linears.clone() });
            }
            Kind::Gate(_) => None,
            Kind::Attention { shape, .. } => {
                let repeat = shape.heads / shape.kv_heads;
                (repeat > 1).then_some((shape.value_dim, repeat))
            }
            // What is gated may be scaled, what is activated may not.
            Kind::Activate(Activation::SwigluOai { .. } | Activation::SiluWithin { .. }) => return None,
            Kind::Activate(_) if between.reads.len() == 2 => None,
            _ => return None,
        };
        // What attention sees of the values may be read behind them.
        let made = match between.kind {
            Kind::Attention { .. } => match self.maker(between.reads[2])? {
                Operation { kind: Kind::Scale(_), reads, .. } => reads[0],
                _ => between.reads[2],
            },
            _ => *between.reads.last()?,
        };
        let (linear, part) = self.made_by(made)?;
        // What is made of a latent is left as it is.
        let read = self.maker(made)?.reads[0];
        let taken_over = self.maker(read).is_some_and(|maker| matches!(maker.kind, Kind::Shared(_)));
        let latent = taken_over || self.norm_of(read).is_some_and(|(_, of)| self.made_by(of).is_some());
        let producer = Producer::Linear { linear, part, heads };
        (!latent).then(|| Slot { producer, readers: linears.clone() })
    }
}
