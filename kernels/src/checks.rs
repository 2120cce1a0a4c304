//! What operations demand of what they are given, the same on every device.

use formats::GgmlType;
use formats::encoding::Block;
use ndarray::Array2;

use crate::backend::{
    Activation, AttentionShape, DeltaShape, Grid, GridSpec, HyperParameters, HyperShape, IndexShape, RopeLayout,
};
use crate::{Error, Result};

/// So many of something.
pub(crate) fn expect(op: &'static str, what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected} {what}"), found: found.to_string() })
}

/// `parts` parts of one size, or parts of that size.
pub(crate) fn expect_multiple(op: &'static str, parts: usize, whole: usize) -> Result<()> {
    if parts > 0 && whole.is_multiple_of(parts) {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("a multiple of {parts}"), found: whole.to_string() })
}

/// What values are limited to; `f32::clamp` would panic at others.
pub(crate) fn expect_limit(op: &'static str, limit: f32) -> Result<()> {
    if limit >= 0.0 {
        return Ok(());
    }
    Err(Error::Shape { op, expected: "a limit of at least 0".to_owned(), found: limit.to_string() })
}

/// Angles for every position of the sequences that `rows` consist of, and for heads of `cols`.
pub(crate) fn expect_rotation(
    [rows, cols]: [usize; 2],
    cos: &Array2<f32>,
    sin: &Array2<f32>,
    layout: &RopeLayout,
    lengths: &[usize],
) -> Result<()> {
    expect("rope", "tokens", rows, lengths.iter().sum())?;
    expect_multiple("rope", layout.head_dim, cols)?;
    expect("rope", "sines", cos.len(), sin.len())?;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    if longest > cos.nrows() || layout.first + 2 * cos.ncols() > layout.head_dim {
        return Err(Error::Shape {
            op: "rope",
            expected: format!("angles for {longest} positions and for heads of {} values", layout.head_dim),
            found: format!("{} positions, {} values from {}", cos.nrows(), 2 * cos.ncols(), layout.first),
        });
    }
    Ok(())
}

/// Queries, keys and values, each `[tokens, features]`, that fit the layer and the sequences.
pub(crate) fn expect_attention(
    qkv: [[usize; 2]; 3],
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    lengths: &[usize],
) -> Result<()> {
    let AttentionShape { heads, kv_heads, head_dim, value_dim, window, chunk, both_ways, .. } = *shape;
    expect_multiple("attention", kv_heads, heads)?;
    if let (true, Some(chunk)) = (both_ways, chunk) {
        let expected = "attention both ways without a chunk".to_owned();
        return Err(Error::Shape { op: "attention", expected, found: chunk.to_string() });
    }
    if window == Some(0) || chunk == Some(0) {
        let expected = "a window and a chunk of some positions".to_owned();
        return Err(Error::Shape { op: "attention", expected, found: "0".to_owned() });
    }
    expect("attention", "query features", heads * head_dim, qkv[0][1])?;
    expect("attention", "key features", kv_heads * head_dim, qkv[1][1])?;
    expect("attention", "value features", kv_heads * value_dim, qkv[2][1])?;
    for [tokens, _] in qkv {
        expect("attention", "tokens", lengths.iter().sum(), tokens)?;
    }
    sinks.map_or(Ok(()), |sinks| expect("attention", "sinks", heads, sinks.len()))
}

/// Queries and keys, each `[tokens, features]`, and weights where heads choose together, that fit the layer and the sequences.
pub(crate) fn expect_index(
    [q, k]: [[usize; 2]; 2],
    weights: Option<[usize; 2]>,
    shape: &IndexShape,
    lengths: &[usize],
) -> Result<()> {
    let wrong =
        |expected: &str, found: String| Err(Error::Shape { op: "select", expected: expected.to_owned(), found });
    if shape.count == 0 || shape.block == 0 {
        return wrong("a choice of some blocks of some tokens", format!("{} of {}", shape.count, shape.block));
    }
    if shape.entries && !shape.pooled || shape.pooled && (shape.count < 2 && !shape.entries || shape.local > 0) {
        return wrong("a choice of some whole blocks, and the query's own", format!("{shape:?}"));
    }
    if weights.is_some() == shape.apart {
        return wrong("weights of heads that choose together, and of no others", format!("{weights:?}"));
    }
    let longest = lengths.iter().copied().max().unwrap_or(0);
    if longest > 1 << 24 {
        return wrong("sequences whose positions are exact in single precision", longest.to_string());
    }
    expect("select", "query features", shape.heads * shape.head_dim, q[1])?;
    expect("select", "key features", shape.head_dim, k[1])?;
    weights.map_or(Ok(()), |weights| expect("select", "weights", shape.heads, weights[1]))?;
    for [tokens, _] in [q, k].into_iter().chain(weights) {
        expect("select", "tokens", lengths.iter().sum(), tokens)?;
    }
    Ok(())
}

/// What attention takes, and a choice of what it sees, that fit each other.
pub(crate) fn expect_choice(
    qkv: [[usize; 2]; 3],
    chosen: [usize; 2],
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    index: &IndexShape,
    lengths: &[usize],
) -> Result<()> {
    expect_attention(qkv, sinks, shape, lengths)?;
    expect("attention_to", "tokens", qkv[0][0], chosen[0])?;
    expect("attention_to", "numbers of a choice", index.width(), chosen[1])?;
    expect_multiple("attention_to", index.groups(), shape.heads)?;
    if shape.window.is_some() || shape.chunk.is_some() || shape.softcap.is_some() || shape.both_ways {
        let expected = "a choice alone to say what is seen".to_owned();
        return Err(Error::Shape { op: "attention_to", expected, found: format!("{shape:?}") });
    }
    Ok(())
}

/// What attention takes, and entries beside it, that fit each other.
pub(crate) fn expect_entries(
    qkv: [[usize; 2]; 3],
    entries: [usize; 2],
    (block, chosen): (usize, Option<[usize; 2]>),
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    lengths: &[usize],
) -> Result<()> {
    expect_attention(qkv, sinks, shape, lengths)?;
    let op = "attention_beside";
    expect(op, "values of a head", shape.head_dim, shape.value_dim)?;
    expect(op, "tokens of entries", qkv[1][0], entries[0])?;
    expect(op, "features of entries", qkv[1][1], entries[1])?;
    if let Some([tokens, count]) = chosen {
        expect(op, "tokens of a choice", qkv[0][0], tokens)?;
        expect_multiple(op, count, count)?;
    }
    if block == 0 || shape.chunk.is_some() || shape.softcap.is_some() || shape.both_ways {
        let expected = "blocks of some tokens, and no more than a window beside them".to_owned();
        return Err(Error::Shape { op, expected, found: format!("{block}, {shape:?}") });
    }
    Ok(())
}

/// The most streams that hyper-connections may have: as many as a thread of a GPU holds.
const STREAMS: usize = 16;

/// Streams, and as many weights of each token as something needs.
pub(crate) fn expect_weights(h: [usize; 2], weights: [usize; 2], streams: usize, least: usize) -> Result<()> {
    expect_multiple("hyper_connections", streams, h[1])?;
    if !(1..=STREAMS).contains(&streams) || h[1] == 0 {
        let expected = format!("1 to {STREAMS} streams of some values");
        return Err(Error::Shape { op: "hyper_connections", expected, found: format!("{streams} of {}", h[1]) });
    }
    expect("hyper_connections", "tokens", h[0], weights[0])?;
    if weights[1] < least {
        let expected = format!("at least {least} weights of a token");
        return Err(Error::Shape { op: "hyper_connections", expected, found: weights[1].to_string() });
    }
    Ok(())
}

/// Streams, and what their weights are made by.
pub(crate) fn expect_hyper(h: [usize; 2], of: HyperParameters<'_>, shape: &HyperShape) -> Result<()> {
    expect_weights(h, [h[0], shape.weights()], shape.streams, shape.weights())?;
    if shape.rounds > 0 && shape.writes.is_none() {
        let expected = "streams that are written where they are mixed".to_owned();
        return Err(Error::Shape { op: "hyper_connections", expected, found: format!("{shape:?}") });
    }
    expect("hyper_connections", "values of the projection", shape.weights() * h[1], of.projection.len())?;
    expect("hyper_connections", "values of the base", shape.weights(), of.base.len())?;
    expect("hyper_connections", "scales", shape.kinds(), of.scale.len())
}

/// Values and gates of tokens, and places in blocks of some tokens.
pub(crate) fn expect_pool(
    x: [usize; 2],
    gates: [usize; 2],
    places: &[f32],
    (block, overlap): (usize, bool),
    lengths: &[usize],
) -> Result<()> {
    expect_multiple("pool_blocks", 1 + usize::from(overlap), x[1])?;
    expect("pool_blocks", "tokens", lengths.iter().sum(), x[0])?;
    expect("pool_blocks", "tokens of gates", x[0], gates[0])?;
    expect("pool_blocks", "channels of gates", x[1], gates[1])?;
    if block == 0 {
        let expected = "blocks of some tokens".to_owned();
        return Err(Error::Shape { op: "pool_blocks", expected, found: "0".to_owned() });
    }
    expect("pool_blocks", "values of places", block * x[1], places.len())
}

/// An activation that is a function of one value.
pub(crate) fn expect_alone(op: &'static str, activation: Activation) -> Result<()> {
    match activation {
        Activation::SwigluOai { .. } | Activation::SiluWithin { .. } => {
            let (expected, found) = ("a function of one value".to_owned(), format!("{activation:?}"));
            Err(Error::Shape { op, expected, found })
        }
        _ => Ok(()),
    }
}

/// Some taps for each of `cols` channels, for sequences that `rows` consist of.
pub(crate) fn expect_convolution(
    [rows, cols]: [usize; 2],
    weight: &[f32],
    bias: Option<&[f32]>,
    activation: Option<Activation>,
    lengths: &[usize],
) -> Result<()> {
    expect("convolve", "tokens", rows, lengths.iter().sum())?;
    expect_multiple("convolve", cols.max(1), weight.len())?;
    if weight.is_empty() && cols > 0 {
        return Err(Error::Shape { op: "convolve", expected: "some taps".to_owned(), found: "0".to_owned() });
    }
    bias.map_or(Ok(()), |bias| expect("convolve", "bias values", cols, bias.len()))?;
    activation.map_or(Ok(()), |activation| expect_alone("convolve", activation))
}

/// What is mixed, how much, and what takes it, each `[tokens, features]`, of streams of one width: how many there are of the first and the last.
pub(crate) fn expect_streams([x, coefficients, y]: [[usize; 2]; 3], width: usize) -> Result<[usize; 2]> {
    const OP: &str = "mix_streams";
    for [tokens, features] in [x, y] {
        expect(OP, "tokens", y[0], tokens)?;
        expect_multiple(OP, width, features)?;
    }
    let [from, to] = [x[1] / width, y[1] / width];
    expect(OP, "tokens", y[0], coefficients[0])?;
    expect(OP, "coefficients", to * from, coefficients[1])?;
    Ok([from, to])
}

/// Two matrices of one shape, of streams of so many values.
pub(crate) fn expect_alike(op: &'static str, x: [usize; 2], y: [usize; 2], width: usize) -> Result<()> {
    expect(op, "tokens", x[0], y[0])?;
    expect(op, "features", x[1], y[1])?;
    expect_multiple(op, width, x[1])
}

/// Queries, keys, values, decays and betas, each `[tokens, features]`, that fit the layer and the sequences.
pub(crate) fn expect_delta(all: [[usize; 2]; 5], shape: &DeltaShape, lengths: &[usize]) -> Result<()> {
    let DeltaShape { key_heads, value_heads, key_dim, value_dim, .. } = *shape;
    expect_multiple("delta_rule", key_heads, value_heads)?;
    let [q, k, v, decay, beta] = all;
    expect("delta_rule", "query features", key_heads * key_dim, q[1])?;
    expect("delta_rule", "key features", key_heads * key_dim, k[1])?;
    expect("delta_rule", "value features", value_heads * value_dim, v[1])?;
    expect("delta_rule", "decays", shape.decays(), decay[1])?;
    expect("delta_rule", "betas", value_heads, beta[1])?;
    all.iter().try_for_each(|[tokens, _]| expect("delta_rule", "tokens", lengths.iter().sum(), *tokens))
}

/// Rows of `cols` values that the encoding of a grid can be fitted to.
pub(crate) fn expect_spec(op: &'static str, cols: usize, spec: &GridSpec) -> Result<()> {
    expect(op, "columns", spec.group_of.len(), cols)?;
    let encoding = &spec.encoding;
    let wrong = |expected: String| Err(Error::Shape { op, expected, found: format!("{cols} columns") });
    match (encoding.ggml_type(), encoding.block) {
        _ if !encoding.has_codes() => {
            let found = format!("{encoding:?}");
            Err(Error::Shape { op, expected: "an encoding with codes".to_owned(), found })
        }
        (Some(ty), _) if ty.row_bytes(cols).is_none() => {
            wrong(format!("rows of whole blocks of {ty}, {} weights each", ty.block_len))
        }
        // A block that goes on in the next row is no group of columns.
        (None, Block::Flat(len)) if len == 0 || !cols.is_multiple_of(len) => {
            wrong(format!("rows of whole blocks of {len} weights"))
        }
        _ => Ok(()),
    }
}

/// A grid of a matrix `[rows, cols]` that has all it should.
pub(crate) fn expect_grid(op: &'static str, [rows, cols]: [usize; 2], grid: &Grid) -> Result<()> {
    expect(op, "rows", grid.rows, rows)?;
    expect_spec(op, cols, &grid.spec)?;
    let groups = rows * grid.spec.groups();
    expect(op, "scales", groups, grid.scales.len())?;
    match grid.spec.encoding.is_integers() {
        true => expect(op, "zeros", groups, grid.zeros.len()),
        false => {
            expect(op, "mins", groups, grid.mins.len())?;
            let units = cols.div_ceil(grid.spec.encoding.unit_width(cols).max(1));
            expect(op, "blocks", rows * units, grid.blocks.len())
        }
    }
}

/// What a layout of words says of codes that it has no room for.
pub(crate) fn no_room(op: &'static str, error: &formats::Error) -> Error {
    Error::Shape { op, expected: "codes that the layout has room for".to_owned(), found: error.to_string() }
}

/// A grid of one of ggml's types.
pub(crate) fn expect_type(op: &'static str, grid: &Grid) -> Result<GgmlType> {
    let missing =
        || Error::Shape { op, expected: "a type of ggml's".to_owned(), found: format!("{:?}", grid.spec.encoding) };
    grid.spec.encoding.ggml_type().ok_or_else(missing)
}

/// Codes `[rows, cols]` of a target of that shape and their grid, and a Hessian of its columns.
pub(crate) fn expect_refined(
    op: &'static str,
    [rows, cols]: [usize; 2],
    gram: [usize; 2],
    codes: [usize; 2],
    grid: &Grid,
) -> Result<()> {
    expect(op, "features", cols, gram[1])?;
    expect(op, "rows of the Hessian", cols, gram[0])?;
    expect_grid(op, [rows, cols], grid)?;
    expect(op, "rows of codes", rows, codes[0])?;
    expect(op, "columns of codes", cols, codes[1])
}
