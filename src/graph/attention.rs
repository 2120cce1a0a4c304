//! What attention consists of.

use std::sync::Arc;

use super::{Attention, Choice, Indexer, Joint, Latent, Linear, Norm, Projections};

impl Attention {
    /// Its linears, those that read one input together.
    pub(super) fn linears(&self) -> Vec<Vec<&Linear>> {
        let mut groups = match &self.projections {
            Projections::Direct(linears) => vec![linears.iter().collect()],
            Projections::Latent(latent) => {
                let mut groups = vec![latent.q[..1].iter().chain(&latent.kv_a).chain(&latent.gate).collect()];
                groups.extend(latent.q[1..].iter().map(|l| vec![l]));
                groups.push(vec![&latent.kv_b]);
                groups
            }
            Projections::Joint(joint) => joint.linears(),
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
        match &self.projections {
            Projections::Direct(_) => {}
            Projections::Latent(latent) => norms.extend(latent.q_norm.iter().chain(&latent.kv_norm)),
            Projections::Joint(joint) => norms.push(&joint.q_norm),
        }
        norms.extend(self.beside.iter().map(|beside| &beside.norm));
        norms.extend(self.indexer().into_iter().flat_map(Indexer::norms));
        norms
    }

    /// The same, to be changed.
    pub(super) fn norms_mut(&mut self) -> Vec<&mut Norm> {
        let of_heads = self.norms.iter_mut().flat_map(|norms| [Some(&mut norms.q), norms.k.as_mut(), norms.v.as_mut()]);
        let mut norms: Vec<&mut Norm> = of_heads.flatten().collect();
        match &mut self.projections {
            Projections::Direct(_) => {}
            Projections::Latent(latent) => norms.extend(latent.q_norm.iter_mut().chain(&mut latent.kv_norm)),
            Projections::Joint(joint) => norms.push(&mut joint.q_norm),
        }
        norms.extend(self.beside.iter_mut().map(|beside| &mut beside.norm));
        let indexer = self.choice.as_mut().and_then(Choice::indexer_mut);
        norms.extend(indexer.into_iter().flat_map(Indexer::norms_mut));
        norms
    }

    /// Gives every tensor that is no linear's and no norm's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        self.sinks.iter_mut().for_each(|tensor| *tensor = name(tensor));
        self.temperature.iter_mut().for_each(|temperature| temperature.rename(name));
        if let Some(rope) = self.rope.as_mut().filter(|rope| rope.learned.is_some()) {
            Arc::make_mut(rope).learned.iter_mut().for_each(|tensor| *tensor = name(tensor));
        }
        if let Some(indexer) = self.choice.as_mut().and_then(Choice::indexer_mut) {
            indexer.rename(name);
        }
        self.beside.iter_mut().for_each(|beside| beside.pool.places = name(&beside.pool.places));
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        match &mut self.projections {
            Projections::Direct(linears) => linears.iter_mut().for_each(&mut *change),
            Projections::Latent(latent) => {
                let Latent { q, kv_a, kv_b, gate, .. } = &mut **latent;
                q.iter_mut().chain(kv_a).chain([kv_b]).chain(gate).for_each(&mut *change);
            }
            Projections::Joint(joint) => {
                let Joint { q, kv, narrow, .. } = &mut **joint;
                q.iter_mut().chain([kv, narrow]).for_each(&mut *change);
            }
        }
        self.head_gate.iter_mut().for_each(&mut *change);
        self.beside.iter_mut().flat_map(|beside| beside.linears_mut()).for_each(&mut *change);
        change(&mut self.o);
        let indexer = self.choice.as_mut().and_then(Choice::indexer_mut);
        indexer.into_iter().flat_map(Indexer::linears_mut).for_each(change);
    }
}
