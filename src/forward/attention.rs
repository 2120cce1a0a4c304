//! Self-attention.

use kernels::{ActivationRounding, Backend};

use super::{Chunk, LoadedNorm, Run, Supply, product};
use crate::error::Result;
use crate::graph::{Attention, Latent, Linear, Projections, Temperature};

/// Queries, keys and values of a chunk.
type Qkv<'a, M> = Box<dyn Fn(&[Chunk<M>], usize) -> Result<[M; 3]> + 'a>;

pub(super) fn run<B: Backend>(
    run: &Run<'_, B>,
    attention: &Attention,
    supply: &mut dyn Supply<B>,
    chunks: &mut [Chunk<B::Matrix>],
) -> Result<()> {
    let backend = run.backend;
    let make = match &attention.projections {
        Projections::Direct(linears) => direct(run, linears, supply, chunks)?,
        Projections::Latent(parts) => latent(run, parts, attention.shape.heads, supply, chunks)?,
    };
    let norms = match &attention.norms {
        Some(norms) => Some((LoadedNorm::of(&norms.q, supply)?, LoadedNorm::of(&norms.k, supply)?, norms)),
        None => None,
    };
    let rounds_cache = supply.rounds_cache();
    let sinks = attention.sinks.as_ref().map(|name| supply.vector(name)).transpose()?;
    let longest = chunks.iter().flat_map(|chunk| &chunk.lengths).copied().max().unwrap_or(0);
    let table = attention.rope.as_ref().map(|rope| rope.table(longest));
    let normed = |q: &mut B::Matrix, k: &mut B::Matrix, after_rope: bool| -> Result<()> {
        let Some((q_norm, k_norm, norms)) = norms.as_ref().filter(|(.., norms)| norms.after_rope == after_rope) else {
            return Ok(());
        };
        for (x, norm) in [(q, q_norm), (k, k_norm)] {
            match norms.per_head {
                true => {
                    let kind = norm.norm.kind;
                    backend.norm_heads(
                        x,
                        attention.shape.head_dim,
                        kind,
                        &norm.weight,
                        norm.bias.as_deref(),
                        norm.norm.eps,
                    )?;
                }
                false => *x = norm.apply(backend, x)?,
            }
        }
        Ok(())
    };
    let mut mixed = Vec::with_capacity(chunks.len());
    for (index, chunk) in chunks.iter().enumerate() {
        let [mut q, mut k, mut v] = make(chunks, index)?;
        normed(&mut q, &mut k, false)?;
        if let Some(limit) = attention.clip {
            for x in [&mut q, &mut k, &mut v] {
                backend.clamp(x, limit)?;
            }
        }
        if let Some((cos, sin)) = &table {
            for x in [&mut q, &mut k] {
                backend.rope(x, cos, sin, &attention.layout, &chunk.lengths)?;
            }
        }
        normed(&mut q, &mut k, true)?;
        if let Some(Temperature { floor, scale, first }) = attention.temperature {
            let warm = |position: usize| 1.0 + scale * (((position + first) as f32 / floor).floor() + 1.0).ln();
            let factors: Vec<f32> = chunk.lengths.iter().flat_map(|length| (0..*length).map(warm)).collect();
            backend.scale(&mut q, &factors, &[])?;
        }
        if rounds_cache {
            // As a cache in half precision keeps them.
            backend.round_values(&mut k, ActivationRounding::F16)?;
            backend.round_values(&mut v, ActivationRounding::F16)?;
        }
        mixed.push(backend.attention(&q, &k, &v, sinks.as_deref(), &attention.shape, &chunk.lengths)?);
    }
    drop(make);
    let o = supply.linears(&[&attention.o], &|see| mixed.iter().try_for_each(&mut *see))?;
    if !supply.needs_output(run.last) {
        return Ok(());
    }
    chunks.iter_mut().zip(mixed).try_for_each(|(chunk, x)| run.add(&x, &o[0], &mut chunk.hidden))
}

fn direct<'r, B: Backend>(
    run: &'r Run<'_, B>,
    linears: &[Linear],
    supply: &mut dyn Supply<B>,
    chunks: &[Chunk<B::Matrix>],
) -> Result<Qkv<'r, B::Matrix>> {
    let group: Vec<_> = linears.iter().collect();
    let weights =
        supply.linears(&group, &|see| (0..chunks.len()).try_for_each(|index| see(&run.input(chunks, index)?)))?;
    Ok(Box::new(move |chunks, index| {
        let x = run.input(chunks, index)?;
        let part = |part: usize| product(run.backend, &x, &weights[part]);
        Ok([part(0)?, part(1)?, part(2)?])
    }))
}

fn latent<'r, B: Backend>(
    run: &'r Run<'_, B>,
    Latent { q, q_norm, kv_a, kv_norm, kv_b }: &Latent,
    heads: usize,
    supply: &mut dyn Supply<B>,
    chunks: &[Chunk<B::Matrix>],
) -> Result<Qkv<'r, B::Matrix>> {
    let backend = run.backend;
    let first =
        supply.linears(&[&q[0], kv_a], &|see| (0..chunks.len()).try_for_each(|i| see(&run.input(chunks, i)?)))?;
    let [to_q, to_latent, to_rotated] = &first[..] else { unreachable!("three parts") };
    let kv_norm = LoadedNorm::of(kv_norm, supply)?;
    let q_norm = q_norm.as_ref().map(|norm| LoadedNorm::of(norm, supply)).transpose()?;
    let (mut queries, mut latents, mut rotated) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..chunks.len() {
        let x = run.input(chunks, index)?;
        if let Some(norm) = &q_norm {
            queries.push(backend.input(norm.apply(backend, &product(backend, &x, to_q)?)?)?);
        }
        latents.push(backend.input(kv_norm.apply(backend, &product(backend, &x, to_latent)?)?)?);
        rotated.push(product(backend, &x, to_rotated)?);
    }
    let q_b = match q.get(1) {
        Some(q_b) => Some(supply.linears(&[q_b], &|see| queries.iter().try_for_each(&mut *see))?),
        None => None,
    };
    let kv_b = supply.linears(&[kv_b], &|see| latents.iter().try_for_each(&mut *see))?;
    Ok(Box::new(move |chunks, index| {
        let q = match &q_b {
            Some(q_b) => product(backend, &queries[index], &q_b[0])?,
            None => product(backend, &run.input(chunks, index)?, &first[0])?,
        };
        let own = product(backend, &latents[index], &kv_b[0])?;
        let v = product(backend, &latents[index], &kv_b[1])?;
        // The shared part is rotated once a head: the layout says where in a head it lies.
        Ok([q, backend.join_heads(&own, &rotated[index], heads)?, v])
    }))
}
