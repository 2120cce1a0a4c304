//! What the inputs of linears look like.

use calibration::statistics::{Needs, Statistics};
use kernels::Backend;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::forward::{Inputs, Others};
use crate::graph::Linear;
use crate::recipe::Recipe;

/// Tokens that an expert is run over when too few were sent to it, unless it has more than half as many channels.
const ENOUGH_TOKENS: usize = 4096;

/// Gathers what is to be known of the inputs that linears read.
pub struct Observer<'a, B: Backend> {
    backend: &'a B,
    source: &'a Checkpoint,
    /// Each once; what one target needs is gathered as if it were alone, so that its bytes do not hang on the others.
    kinds: Vec<Needs>,
    /// Every token counts as sent to every expert.
    all_experts: bool,
    /// Statistics of a layer's input over all tokens, and the layer's name.
    layer: Option<(String, Observed<B>)>,
    /// Seconds that it took.
    pub seconds: f64,
}

/// Statistics of one input, for each kind of need.
pub struct Observed<B: Backend>(Vec<(Needs, Statistics<B>)>);

impl<B: Backend> Observed<B> {
    /// Of an input that nobody looks at.
    pub fn nothing() -> Observed<B> {
        Observed(Vec::new())
    }

    /// What was gathered for whoever needs this.
    pub fn of(&self, needs: Needs) -> Option<&Statistics<B>> {
        self.0.iter().find(|(kind, _)| *kind == needs).map(|(_, statistics)| statistics)
    }
}

impl<'a, B: Backend> Observer<'a, B> {
    /// Gathers each of the kinds that are something, of experts as the recipe says.
    pub fn new(
        backend: &'a B,
        source: &'a Checkpoint,
        kinds: impl IntoIterator<Item = Needs>,
        recipe: &Recipe,
    ) -> Observer<'a, B> {
        let mut kinds: Vec<Needs> = kinds.into_iter().filter(|kind| *kind > Needs::Nothing).collect();
        kinds.sort();
        kinds.dedup();
        Observer { backend, source, kinds, all_experts: recipe.moe_all_experts, layer: None, seconds: 0.0 }
    }

    /// Forgets what was known of a layer, whose experts are done.
    pub fn forget_layer(&mut self) {
        self.layer = None;
    }

    /// Gathers statistics of what `first`, and whatever else reads its input, sees; fails on a NaN or an infinity in it.
    pub fn observe(&mut self, first: &Linear, inputs: &Inputs<'_, B::Input>) -> Result<Observed<B>> {
        let kinds = self.kinds.clone();
        kinds.into_iter().map(|kind| Ok((kind, self.gather(first, kind, inputs)?))).collect::<Result<_>>().map(Observed)
    }

    /// The same of one kind.
    pub fn gather(&mut self, first: &Linear, needs: Needs, inputs: &Inputs<'_, B::Input>) -> Result<Statistics<B>> {
        let (backend, seconds) = (self.backend, &mut self.seconds);
        let statistics =
            Statistics::gather(backend, first.cols, needs, |see| inputs(&mut |x| super::timed(seconds, || see(x))))?;
        if !statistics.is_finite() {
            return Err(Error::failed(format!(
                "{}: the input of `{}` holds a NaN or an infinity on the calibration text; the checkpoint is damaged, or overflows",
                self.source.path().display(),
                first.module
            )));
        }
        Ok(statistics)
    }

    /// Gathers statistics of what an expert sees, with as many tokens of its layer as it has channels as a prior.
    ///
    /// ```text
    /// H = Σ own xᵀx + n · mean of all xᵀx        # n channels
    /// ```
    ///
    /// Of its first linears the layer's statistics are those of all tokens, and gathered once; of its last they are those of
    /// some tokens that were not sent to it, if too few were.
    pub fn observe_expert(
        &mut self,
        first: &Linear,
        inputs: &Inputs<'_, B::Input>,
        others: &Others<'_, B::Input>,
    ) -> Result<Observed<B>> {
        let all = self.all_experts;
        if let Some(name) = others.shared
            && self.layer.as_ref().is_none_or(|(known, _)| known != name)
        {
            self.layer = Some((name.to_owned(), self.sample(first, others, usize::MAX)?));
        }
        let mut own = match all {
            false => self.observe(first, inputs)?,
            true => self.observe(first, &|_| Ok(()))?,
        };
        let channels = first.cols as f64;
        match (others.shared, &self.layer) {
            (Some(_), Some((_, layer))) => {
                for ((_, own), (_, layer)) in own.0.iter_mut().zip(&layer.0) {
                    own.blend(self.backend, layer, if all { layer.count } else { channels })?;
                    if all {
                        own.tokens = layer.tokens;
                    }
                }
            }
            _ if all => own = self.sample(first, others, usize::MAX)?,
            _ if own.0.iter().any(|(_, own)| own.tokens < 2 * first.cols) => {
                let some = self.sample(first, others, ENOUGH_TOKENS.max(2 * first.cols))?;
                for ((_, own), (_, some)) in own.0.iter_mut().zip(&some.0) {
                    own.blend(self.backend, some, channels)?;
                }
            }
            _ => {}
        }
        Ok(own)
    }

    fn sample(&mut self, first: &Linear, others: &Others<'_, B::Input>, count: usize) -> Result<Observed<B>> {
        self.observe(first, &|see| (others.inputs)(count, see))
    }
}
