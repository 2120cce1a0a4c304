//! What is refused, and that neither threads nor bfloat16 change a layer.

use ndarray::Array2;

use super::{Cpu, Input, Weight};
use crate::backend::{Activation, AttentionShape, DeltaShape, Forward, Memory, NormKind, RopeLayout};
use crate::ops::testing::Noise;
use crate::{Error, Result};

const SHAPE: AttentionShape = AttentionShape {
    heads: 4,
    kv_heads: 2,
    head_dim: 8,
    value_dim: 6,
    scale: 0.3,
    window: Some(70),
    chunk: Some(100),
    softcap: Some(5.0),
    both_ways: false,
};

fn refused<T>(op: &str, result: Result<T>) {
    match result {
        Err(Error::Shape { op: found, .. }) => assert_eq!(found, op),
        Err(error) => panic!("{op}: {error}"),
        Ok(_) => panic!("{op}: accepted"),
    }
}

#[test]
fn matrices_that_do_not_fit_are_refused() {
    let cpu = Cpu::exact();
    let m = |rows, cols| Array2::<f32>::zeros((rows, cols));
    refused("layer_norm", cpu.layer_norm(&m(3, 4), &[1.0; 5], None, 1e-5));
    refused("layer_norm", cpu.layer_norm(&m(3, 4), &[1.0; 4], Some(&[1.0; 3]), 1e-5));
    refused("norm_heads", cpu.norm_heads(&mut m(3, 8), 3, NormKind::Rms, &[1.0; 3], None, 1e-5));
    refused("norm_heads", cpu.norm_heads(&mut m(3, 8), 0, NormKind::Rms, &[], None, 1e-5));
    refused("norm_heads", cpu.norm_heads(&mut m(3, 8), 4, NormKind::Layer, &[1.0; 2], None, 1e-5));

    let layout = RopeLayout { head_dim: 8, first: 2, interleaved: true };
    let rope = |cols, angles: [usize; 2], sines, lengths: &[usize]| {
        cpu.rope(&mut m(5, cols), &m(angles[0], angles[1]), &m(sines, angles[1]), &layout, lengths)
    };
    assert!(rope(16, [3, 3], 3, &[3, 2]).is_ok());
    refused("rope", rope(12, [3, 3], 3, &[3, 2]));
    refused("rope", rope(16, [3, 4], 3, &[3, 2]));
    refused("rope", rope(16, [3, 3], 2, &[3, 2]));
    refused("rope", rope(16, [3, 3], 3, &[4, 1]));
    refused("rope", rope(16, [3, 3], 3, &[3, 1]));

    let attention = |v_cols, sinks, shape| cpu.attention(&m(5, 32), &m(5, 16), &m(5, v_cols), sinks, &shape, &[5]);
    assert_eq!(attention(12, Some(&[0.0; 4][..]), SHAPE).unwrap().shape(), [5, 24]);
    refused("attention", attention(16, None, SHAPE));
    refused("attention", attention(12, Some(&[0.0; 2]), SHAPE));
    refused("attention", attention(12, None, AttentionShape { kv_heads: 3, ..SHAPE }));
    refused("attention", attention(12, None, AttentionShape { kv_heads: 0, ..SHAPE }));
    refused("attention", attention(12, None, AttentionShape { window: Some(0), ..SHAPE }));
    refused("attention", attention(12, None, AttentionShape { chunk: Some(0), ..SHAPE }));

    let (x, w) = (Input::Whole(m(3, 4)), Weight::Whole(m(6, 4)));
    refused("activated", cpu.activated(&x, &w, Some(&[0.0; 4]), Activation::Relu));
    refused("activated", cpu.activated(&x, &Weight::Whole(m(6, 5)), None, Activation::Relu));
    refused("activated", cpu.activated(&x, &w, None, Activation::SwigluOai { alpha: 1.0, limit: 1.0, shift: 1.0 }));

    for limit in [-1.0, f32::NAN] {
        refused("gated", cpu.gated(&x, [&w, &w], [None; 2], Activation::SwigluOai { alpha: 1.0, limit, shift: 1.0 }));
        refused("clamp", cpu.clamp(&mut m(2, 2), limit));
    }

    let convolve = |taps, bias, lengths: &[usize]| cpu.convolve(&m(5, 4), &vec![0.0; taps], bias, None, lengths);
    assert_eq!(convolve(12, Some(&[0.0; 4][..]), &[2, 3]).unwrap(), m(5, 4));
    refused("convolve", convolve(10, None, &[5]));
    refused("convolve", convolve(0, None, &[5]));
    refused("convolve", convolve(12, Some(&[0.0; 3]), &[5]));
    refused("convolve", convolve(12, None, &[4]));
    refused("decays", cpu.decays(&mut m(3, 4), &[1.0; 3], &[1.0; 4], [0.0, 1.0]));
    refused("decays", cpu.decays(&mut m(3, 4), &[1.0; 4], &[1.0; 5], [0.0, 1.0]));
    let shape = DeltaShape {
        key_heads: 2,
        value_heads: 4,
        key_dim: 3,
        value_dim: 2,
        scale: 1.0,
        replaces: true,
        by_channel: false,
    };
    let delta = |keys, gates, lengths: &[usize], shape| {
        cpu.delta_rule([&m(5, 6), &m(5, keys), &m(5, 8)], &m(5, gates), &m(5, 4), &shape, lengths)
    };
    assert_eq!(delta(6, 4, &[5], shape).unwrap(), m(5, 8));
    refused("delta_rule", delta(8, 4, &[5], shape));
    refused("delta_rule", delta(6, 2, &[5], shape));
    refused("delta_rule", delta(6, 4, &[5, 1], shape));
    refused("delta_rule", delta(6, 4, &[5], DeltaShape { key_heads: 3, ..shape }));
    refused("delta_rule", delta(6, 4, &[5], DeltaShape { key_heads: 0, ..shape }));
    refused("activate", cpu.activate(&mut m(2, 2), Activation::SwigluOai { alpha: 1.0, limit: 1.0, shift: 1.0 }));
    refused("gate", cpu.gate(&mut m(2, 2), &m(2, 3), Activation::Sigmoid));

    assert!(cpu.mix_streams(&m(3, 8), &m(3, 6), 4, &mut m(3, 12)).is_ok());
    refused("mix_streams", cpu.mix_streams(&m(3, 8), &m(3, 6), 0, &mut m(3, 12)));
    refused("mix_streams", cpu.mix_streams(&m(3, 8), &m(3, 6), 4, &mut m(3, 10)));
    refused("mix_streams", cpu.mix_streams(&m(3, 8), &m(3, 5), 4, &mut m(3, 12)));
    refused("mix_streams", cpu.mix_streams(&m(3, 8), &m(2, 6), 4, &mut m(3, 12)));
    refused("mix_streams", cpu.mix_streams(&m(2, 8), &m(3, 6), 4, &mut m(3, 12)));
    refused("match_streams", cpu.match_streams(&mut m(3, 8), 3, 1e-5));

    refused("join_heads", cpu.join_heads(&m(3, 8), &m(3, 2), 3));
    refused("join_heads", cpu.join_heads(&m(3, 8), &m(3, 2), 0));
    refused("join_heads", cpu.join_heads(&m(3, 8), &m(2, 2), 4));
    refused("add_scaled", cpu.add_scaled(&m(3, 8), 2.0, &mut m(4, 6)));
    refused("add_rows", cpu.add_rows(&m(2, 4), &[0, 1], &[1.0; 2], &mut m(3, 5)));
    refused("add_rows", cpu.add_rows(&m(2, 4), &[0], &[1.0; 2], &mut m(3, 4)));
    refused("add_rows", cpu.add_rows(&m(2, 4), &[0, 1], &[1.0; 3], &mut m(3, 4)));
    refused("add_rows", cpu.add_rows(&m(2, 4), &[0, 3], &[1.0; 2], &mut m(3, 4)));
    refused("add_rows", cpu.add_rows(&m(2, 4), &[1, 1], &[1.0; 2], &mut m(3, 4)));
}

/// A layer with a state, from its input to its output.
fn recurrent(
    cpu: &Cpu,
    linear: &mut impl FnMut(&Input, usize) -> Array2<f32>,
    x: &Input,
    lengths: &[usize],
) -> Array2<f32> {
    let shape = DeltaShape {
        key_heads: 2,
        value_heads: 4,
        key_dim: 9,
        value_dim: 7,
        scale: 1.0 / 3.0,
        replaces: true,
        by_channel: false,
    };
    let (v, mut decay, mut beta, mut gate) = (linear(x, 28), linear(x, 4), linear(x, 4), linear(x, 28));
    let [q, k] = [0, 1].map(|_| {
        let taps = [0.5, -0.2, 0.7].repeat(18);
        let mut x = cpu.convolve(&linear(x, 18), &taps, Some(&[0.1; 18]), Some(Activation::Silu), lengths).unwrap();
        cpu.norm_heads(&mut x, 9, NormKind::Length, &[1.0; 9], None, 1e-6).unwrap();
        x
    });
    cpu.decays(&mut decay, &[0.5; 4], &[1.0; 4], [0.0, f32::INFINITY]).unwrap();
    cpu.activate(&mut beta, Activation::Sigmoid).unwrap();
    let mixed = cpu.delta_rule([&q, &k, &v], &decay, &beta, &shape, lengths).unwrap();
    cpu.gate(&mut gate, &mixed, Activation::Silu).unwrap();
    linear(&cpu.input(gate).unwrap(), 37)
}

/// One decoder layer of no model there is: every step that families differ in.
fn layer(cpu: &Cpu) -> Array2<f32> {
    let (mut noise, lengths) = (Noise(31), [210, 1, 89]);
    let mut stream = noise.matrix(300, 37);
    let mut linear = |x: &Input, outs| {
        let weight = cpu.weight(noise.matrix(outs, x.shape()[1])).unwrap();
        cpu.linear(x, &weight, None).unwrap()
    };
    let x = cpu.input(cpu.layer_norm(&stream, &[0.2; 37], Some(&[0.1; 37]), 1e-5).unwrap()).unwrap();
    let (mut q, own, shared, v) = (linear(&x, 32), linear(&x, 12), linear(&x, 2), linear(&x, 12));
    let mut k = cpu.join_heads(&own, &shared, 2).unwrap();
    let angle = Array2::from_shape_fn((210, 3), |(position, pair)| (position * (pair + 1)) as f32 * 0.01);
    for heads in [&mut q, &mut k] {
        cpu.norm_heads(heads, 8, NormKind::Rms, &[1.0; 8], None, 1e-6).unwrap();
        let layout = RopeLayout { head_dim: 8, first: 1, interleaved: true };
        cpu.rope(heads, &angle.mapv(f32::cos), &angle.mapv(f32::sin), &layout, &lengths).unwrap();
    }
    let mixed = cpu.attention(&q, &k, &v, Some(&[0.5, -1.0, 2.0, 0.0]), &SHAPE, &lengths).unwrap();
    cpu.add_scaled(&linear(&mixed, 37), 0.3, &mut stream).unwrap();
    cpu.add_scaled(&recurrent(cpu, &mut linear, &x, &lengths), 0.3, &mut stream).unwrap();
    let x = cpu.input(cpu.rms_norm(&stream, &[0.2; 37], 1e-5).unwrap()).unwrap();
    let [gate, up, one] = [61, 61, 37].map(|outs| cpu.weight(noise.matrix(outs, 37)).unwrap());
    let gated =
        cpu.gated(&x, [&gate, &up], [None; 2], Activation::SwigluOai { alpha: 1.7, limit: 7.0, shift: 1.0 }).unwrap();
    let down = cpu.weight(noise.matrix(37, 61)).unwrap();
    let rows: Vec<usize> = (0..300).rev().collect();
    cpu.add_rows(&cpu.linear(&gated, &down, None).unwrap(), &rows, &[0.7; 300], &mut stream).unwrap();
    let alone = cpu.activated(&cpu.input(stream.clone()).unwrap(), &one, None, Activation::Gelu).unwrap();
    let mut last = alone.values() + &stream;
    cpu.softcap(&mut last, 30.0).unwrap();
    last
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for cpu in [Cpu::exact(), Cpu::default().relaxed()] {
        let [one, some] = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| layer(&cpu))
        });
        assert_eq!(one, some);
        assert!(one.iter().all(|x| x.is_finite()) && one.iter().any(|x| x.abs() > 1.0));
    }
}

#[test]
fn the_relaxed_layer_is_near_the_exact_one() {
    let (exact, relaxed) = (layer(&Cpu::exact()), layer(&Cpu::default().relaxed()));
    let [error, size] = [&relaxed - &exact, exact].map(|x| x.iter().map(|x| x * x).sum::<f32>().sqrt());
    assert!(error <= 0.03 * size, "{error} of {size}");
}
