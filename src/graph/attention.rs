//! What attention consists of.

use super::{Attention, Choice, Indexer, Latent, Linear, Norm, Projections};

impl Attention {
    /// Its linears, those that read one input together.
    pub(super) fn linears(&self) -> Vec<Vec<&Linear>> {
        let mut groups = match &self.projections {
            Projections::Direct(linears) => vec![linears.iter().collect()],
            Projections::Latent(latent) => {
                let mut groups = vec![[&latent.q[0], &latent.kv_a].into_iter().chain(&latent.gate).collect()];
                groups.extend(latent.q[1..].iter().map(|l| vec![l]));
                groups.push(vec![&latent.kv_b]);
                groups
            }
        };
        groups.push(vec![&self.o]);
        groups
    }

    /// What chooses for it, if that is its own.
    pub fn indexer(&self) -> Option<&Indexer> {
        self.choice.as_ref().and_then(Choice::indexer)
    }

    /// Its normalisations: of heads, of latents, and of its indexer.
    pub fn norms(&self) -> Vec<&Norm> {
        let of_heads = self.norms.iter().flat_map(|norms| [Some(&norms.q), norms.k.as_ref(), norms.v.as_ref()]);
        let mut norms: Vec<&Norm> = of_heads.flatten().collect();
        if let Projections::Latent(latent) = &self.projections {
            norms.extend(&latent.q_norm);
            norms.push(&latent.kv_norm);
        }
        norms.extend(self.indexer().into_iter().flat_map(Indexer::norms));
        norms
    }

    /// The same, to be changed.
    pub(super) fn norms_mut(&mut self) -> Vec<&mut Norm> {
        let of_heads = self.norms.iter_mut().flat_map(|norms| [Some(&mut norms.q), norms.k.as_mut(), norms.v.as_mut()]);
        let mut norms: Vec<&mut Norm> = of_heads.flatten().collect();
        if let Projections::Latent(latent) = &mut self.projections {
            norms.extend(&mut latent.q_norm);
            norms.push(&mut latent.kv_norm);
        }
        let indexer = self.choice.as_mut().and_then(Choice::indexer_mut);
        norms.extend(indexer.into_iter().flat_map(Indexer::norms_mut));
        norms
    }

    /// The names of its tensors that are no linears and no norms, to be changed.
    pub(super) fn tensors_mut(&mut self) -> impl Iterator<Item = &mut String> {
        let pool = self.choice.as_mut().and_then(Choice::indexer_mut).and_then(|indexer| indexer.pool.as_mut());
        self.sinks.iter_mut().chain(pool.map(|pool| &mut pool.places))
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        match &mut self.projections {
            Projections::Direct(linears) => linears.iter_mut().for_each(&mut *change),
            Projections::Latent(latent) => {
                let Latent { q, kv_a, kv_b, gate, .. } = &mut **latent;
                q.iter_mut().chain([kv_a, kv_b]).chain(gate).for_each(&mut *change);
            }
        }
        self.head_gate.iter_mut().for_each(&mut *change);
        change(&mut self.o);
        let indexer = self.choice.as_mut().and_then(Choice::indexer_mut);
        indexer.into_iter().flat_map(Indexer::linears_mut).for_each(change);
    }
}
