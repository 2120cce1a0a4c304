//! Streams side by side of which layers work on one, and which are told of what becomes of it (alternating updates).
//!
//! ```text
//! streams = streams + predict(of(streams[active])) · streams      # a matrix for each token
//! a = streams[active], then the steps of the block on it
//! streams[i] += (1 + correct(of(a))[i]) · (a − streams[active])
//! of(x) = tanh(router(given · norm(x)))
//! ```

use super::{Block, Linear, Norm};

/// What a block does with several streams (AltUp: Baykal et al. 2023, arXiv:2301.13310). Its linears are never quantized: they are small, and
/// all streams hang on them.
#[derive(Clone, Debug)]
pub struct AltUp {
    /// How many streams there are.
    pub count: usize,
    /// The one that the block's steps work on.
    pub active: usize,
    /// Of what decides how streams are predicted and corrected.
    pub norm: Norm,
    /// What is normed is multiplied by this.
    pub given: f32,
    /// To the numbers that decide, `[count, hidden]`.
    pub router: Linear,
    /// To the matrix by which streams are predicted, `[count · count, count]`.
    pub predict: Linear,
    /// To how much of what is new each stream takes, less 1, `[count, count]`.
    pub correct: Linear,
    /// Tensor `[hidden]` that the active stream is multiplied by, for a step that reads rows of a table beside it.
    pub scale: Option<(String, Vec<usize>)>,
    /// What stands beside the first step.
    pub laurel: Laurel,
    /// Of the first block: what makes the other streams of the embedding, `[hidden, hidden]` each. They are made as large as it.
    pub widen: Vec<Linear>,
    /// Of the last block: what brings the other streams back, `[hidden, hidden]` each. They are made as large as the first, and the mean of all
    /// is what the model leaves.
    pub narrow: Vec<Linear>,
}

/// A residual of low rank beside the first step of a block, which reads what that reads: `x + norm(right(left(x)))` (LAuReL: Menghani et al.
/// 2024, arXiv:2411.07501). It is never quantized.
#[derive(Clone, Debug)]
pub struct Laurel {
    /// `[rank, hidden]`.
    pub left: Linear,
    /// `[hidden, rank]`.
    pub right: Linear,
    /// Of what these make.
    pub norm: Norm,
    /// What the stream is multiplied by once the step and this are added to it.
    pub share: f32,
}

/// The square of the size that a stream is taken to have at least where it is made as large as another.
pub const LEAST: f32 = 1e-5;

impl AltUp {
    /// Its linears, those that make and take back the other streams last: none is ever quantized.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let own = [&self.router, &self.predict, &self.correct, &self.laurel.left, &self.laurel.right];
        own.into_iter().chain(&self.widen).chain(&self.narrow)
    }

    /// Its norms.
    pub(super) fn norms(&self) -> [&Norm; 2] {
        [&self.norm, &self.laurel.norm]
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        let AltUp { router, predict, correct, laurel, widen, narrow, .. } = self;
        let own = [router, predict, correct, &mut laurel.left, &mut laurel.right];
        own.into_iter().chain(widen).chain(narrow).for_each(change);
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let norms = [&mut self.norm, &mut self.laurel.norm].into_iter().flat_map(|norm| &mut norm.weights);
        norms.chain(self.scale.iter_mut().map(|(tensor, _)| tensor)).for_each(|tensor| *tensor = name(tensor));
    }
}

impl Block {
    /// Its linears that are never quantized.
    pub fn fixed(&self) -> impl Iterator<Item = &Linear> {
        let of_layers = self.steps.iter().flat_map(|step| step.layer.routers());
        let of_streams = self.steps.iter().filter_map(|step| step.hyper.as_ref()).flat_map(|hyper| hyper.linears());
        of_layers.chain(of_streams).chain(self.altup.iter().flat_map(|altup| altup.linears()))
    }
}
