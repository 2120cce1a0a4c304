//! MiniMax M2: experts chosen by sigmoids, norms of all queries and of all keys, a part of each head rotated.

use kernels::Activation;

use super::build::{Base, activation};
use super::moe::router;
use super::olmo::whole_norms;
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer, Moe, Scoring};

/// MiniMax M2.
pub const MINIMAX_M2: Family = Family { id: "minimax_m2", model_types: &["minimax_m2"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let base = Base::read(config)?;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [false, false], Some(rope.clone()));
        attention.norms = Some(whole_norms(&base, &module));
        let module = format!("{at}.block_sparse_moe");
        let mut router = router(&base, format!("{module}.gate"), experts, top_k, true);
        router.scoring = Scoring::Sigmoid;
        router.correction = Some((format!("{module}.e_score_correction_bias"), vec![experts]));
        let expert = |e| base.gated_of(&format!("{module}.experts.{e}"), ["w1", "w3", "w2"], inner, act, false);
        let experts = (0..experts).map(expert).collect();
        Ok(base.usual_block(
            at,
            attention,
            Layer::Moe(Moe { router, experts, shared: None, weigh_input: false, latent: None }),
        ))
    })?;
    let mut graph = base.graph(config, "minimax_m2", blocks)?;
    for layer in 0..config.count_or("num_mtp_modules", 0)? {
        graph.aside.push((format!("{}.", base.at(base.layers + layer)), super::FURTHER));
    }
    Ok(graph)
}
