//! State spaces and gated short convolutions, as llama.cpp's classes of Mamba 2 and LFM2 have them.

use super::{From, Lister, Part};
use crate::dialect::architectures::Need;
use crate::error::Result;
use crate::graph::{Convolution, Graph, GroupNorm, Layer, Mamba, ShortConvolution, Step};

impl Lister {
    /// Fails for what these classes do not know: a norm before the gate, another activation than SiLU, and biases of linears.
    pub(super) fn mamba(&mut self, at: &str, mamba: &Mamba, given: f32) -> Result<()> {
        let Mamba { input, scales, convolution, shape, decay, skip, norm, out, .. } = mamba;
        if norm.as_ref().is_some_and(|norm| norm.first) {
            return Err(self.cannot("a state space with a norm before its gate"));
        }
        let heads = shape.value_heads;
        let mut first = 0;
        let parts = input.split.lengths.iter().zip(scales).map(|(length, scale)| {
            let rows = (first..first + length).collect();
            first += length;
            Part { factor: scale * given, ..Part::some(From::Weight(input.clone()), Some(rows)) }
        });
        let parts = match self.architecture.absorbs {
            true => parts.collect(),
            false => vec![Part::whole(From::Weight(input.clone()))],
        };
        self.push(format!("{at}.ssm_in.weight"), vec![input.rows, input.cols], parts);
        self.bias(&format!("{at}.ssm_in"), &[(input, None)], Need::Never)?;
        self.convolution(&format!("{at}.ssm_conv1d"), convolution, true);
        let own = |tensor: &String, extents: &[usize]| Part::whole(From::Tensor(tensor.clone(), extents.to_vec()));
        self.push(format!("{at}.ssm_dt.bias"), vec![heads], vec![own(&decay.bias.0, &[heads])]);
        let rates = Part { rates: Some(-1.0), ..own(&decay.rates.0, &[heads, 1]) };
        self.push(format!("{at}.ssm_a"), vec![heads, 1], vec![rates]);
        self.push(format!("{at}.ssm_d"), vec![heads, 1], vec![own(skip, &[heads, 1])]);
        if let Some(GroupNorm { norm, width, .. }) = norm {
            let extents = [norm.shape.iter().product::<usize>() / width, *width];
            let part = own(&norm.weights[0], &extents);
            self.push(format!("{at}.ssm_norm.weight"), extents.to_vec(), vec![part]);
        }
        self.linear(&format!("{at}.ssm_out"), out, None, Need::Never)
    }

    /// Fails for biases.
    pub(super) fn short(&mut self, at: &str, short: &ShortConvolution) -> Result<()> {
        let ShortConvolution { input, convolution, out } = short;
        if convolution.bias.is_some() {
            return Err(self.cannot("a short convolution with a bias"));
        }
        self.linear(&format!("{at}.shortconv.in_proj"), input, None, Need::Never)?;
        self.convolution(&format!("{at}.shortconv.conv"), convolution, false);
        self.linear(&format!("{at}.shortconv.out_proj"), out, None, Need::Never)
    }

    /// With a bias of zeros where one must be and there is none.
    fn convolution(&mut self, name: &str, convolution: &Convolution, biased: bool) {
        let Convolution { tensors, bias, channels, taps, .. } = convolution;
        let part =
            |(tensor, channels): &(String, usize)| Part::whole(From::Tensor(tensor.clone(), vec![*channels, 1, *taps]));
        self.push(format!("{name}.weight"), vec![*channels, *taps], tensors.iter().map(part).collect());
        match bias {
            Some(bias) => {
                let part = Part::whole(From::Tensor(bias.clone(), vec![*channels]));
                self.push(format!("{name}.bias"), vec![*channels], vec![part]);
            }
            None if biased => self.values(format!("{name}.bias"), vec![0.0; *channels]),
            None => {}
        }
    }

    /// Multiplies the tensors that were listed from `first` on by the factors that the file has no other place for.
    pub(super) fn absorb(&mut self, first: usize, step: &Step) {
        let factors: &[(&str, f32)] = match &step.layer {
            Layer::Attention(attention) => {
                let usual = (attention.shape.head_dim as f32).powf(-0.5);
                let keys = step.given * attention.shape.scale / usual;
                &[("attn_q", step.given), ("attn_k", keys), ("attn_v", step.given), ("attn_output", step.scale)]
            }
            Layer::Mlp(mlp) => &[("ffn_gate", mlp.scale), ("ffn_down", step.scale)],
            Layer::Mamba(_) => &[("ssm_out", step.scale)],
            _ => &[],
        };
        for tensor in &mut self.tensors[first..] {
            let name = tensor.gguf.rsplit('.').nth(1).unwrap_or_default();
            let Some((_, factor)) = factors.iter().find(|(own, _)| *own == name) else { continue };
            if let super::Source::Parts(parts) = &mut tensor.source {
                parts.iter_mut().for_each(|part| part.factor *= factor);
            }
        }
    }
}

/// The model without the factors that [`Lister::absorb`] and its like put into tensors.
pub(crate) fn absorbed(graph: &Graph) -> Graph {
    let mut graph = graph.clone();
    (graph.embedding.scale, graph.head.scale) = (1.0, 1.0);
    for step in graph.blocks.iter_mut().flat_map(|block| &mut block.steps) {
        (step.given, step.scale) = (1.0, 1.0);
        match &mut step.layer {
            Layer::Attention(attention) => attention.shape.scale = (attention.shape.head_dim as f32).powf(-0.5),
            Layer::Mlp(mlp) => mlp.scale = 1.0,
            Layer::Mamba(mamba) => mamba.scales = [1.0; 5],
            _ => {}
        }
    }
    graph
}
