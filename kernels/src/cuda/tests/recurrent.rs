//! Layers with a state.

use super::on_all;
use crate::backend::{Activation, DeltaShape, Forward, Memory, NormKind};
use crate::ops::testing::{Noise, close};
use crate::ops::{convolve, delta, norm};

#[test]
fn convolutions_agree_with_the_plain_loop() {
    let mut noise = Noise(1);
    for (channels, taps, lengths) in [(5, 4, vec![9, 0, 2, 4]), (33, 1, vec![3]), (2, 3, vec![1, 1]), (7, 4, vec![])] {
        let x = noise.matrix(lengths.iter().sum(), channels);
        let weight: Vec<f32> = (0..channels * taps).map(|_| noise.next()).collect();
        let bias: Vec<f32> = (0..channels).map(|_| noise.next()).collect();
        for (bias, activation) in [(None, Some(Activation::Silu)), (Some(&bias[..]), None)] {
            let found = on_all(|cuda| {
                let x = cuda.upload(x.clone()).unwrap();
                cuda.download(&cuda.convolve(&x, &weight, bias, activation, &lengths).unwrap()).unwrap()
            });
            let Some(found) = found else { return };
            let expected = convolve::reference(x.view(), &weight, bias, activation, &lengths);
            close(found.as_slice().unwrap(), expected.as_slice().unwrap(), 2e-6);
        }
    }
    on_all(|cuda| {
        let x = cuda.zeros(3, 4).unwrap();
        assert!(cuda.convolve(&x, &[0.0; 6], None, None, &[3]).is_err());
        assert!(cuda.convolve(&x, &[0.0; 8], None, None, &[2]).is_err());
    });
}

#[test]
fn the_delta_rule_agrees_with_the_plain_loop() {
    let mut noise = Noise(2);
    let sizes = [
        (1, 1, 1, 1, vec![3]),
        (2, 4, 5, 3, vec![7, 0, 1, 12]),
        (1, 2, 70, 40, vec![33]),
        (1, 1, 128, 130, vec![9]),
        (2, 2, 300, 2, vec![5, 4]),
    ];
    let cases = sizes.iter().flat_map(|case| [false, true].map(|by_channel| (case, by_channel)));
    for ((key_heads, value_heads, key_dim, value_dim, lengths), by_channel) in cases {
        let (key_heads, value_heads, key_dim, value_dim) = (*key_heads, *value_heads, *key_dim, *value_dim);
        let scale = (key_dim as f32).powf(-0.5);
        for replaces in [true, false] {
            let shape = DeltaShape { key_heads, value_heads, key_dim, value_dim, scale, replaces, by_channel };
            let all = delta::tests::layer(&mut noise, lengths.iter().sum(), &shape);
            let found = on_all(|cuda| {
                let [q, k, v, decay, beta] = all.each_ref().map(|m| cuda.upload(m.clone()).unwrap());
                cuda.download(&cuda.delta_rule([&q, &k, &v], &decay, &beta, &shape, lengths).unwrap()).unwrap()
            });
            let Some(found) = found else { return };
            let [q, k, v, decay, beta] = all.each_ref().map(|m| m.view());
            let expected = delta::reference([q, k, v], decay, beta, &shape, lengths);
            close(found.as_slice().unwrap(), expected.as_slice().unwrap(), 3e-6);
        }
    }
}

#[test]
fn decays_lengths_and_gates_are_those_of_the_cpu() {
    let mut noise = Noise(3);
    let (x, gate) = (noise.matrix(6, 40) * 9.0, noise.matrix(6, 40));
    let [rates, bias]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..40).map(|_| noise.next().abs()).collect());
    let found = on_all(|cuda| {
        let (mut decays, mut lengths, mut both) =
            (cuda.upload(x.clone()).unwrap(), cuda.upload(x.clone()).unwrap(), cuda.upload(gate.clone()).unwrap());
        cuda.decays(&mut decays, &rates, &bias, [0.25, 8.0]).unwrap();
        cuda.norm_heads(&mut lengths, 8, NormKind::Length, &[1.0; 8], None, 1e-3).unwrap();
        cuda.gate(&mut both, &cuda.upload(x.clone()).unwrap(), Activation::Sigmoid).unwrap();
        let mut alone = cuda.upload(gate.clone()).unwrap();
        cuda.activate(&mut alone, Activation::Sigmoid).unwrap();
        let again = cuda.values(&cuda.relaxed().input(cuda.upload(gate.clone()).unwrap()).unwrap()).unwrap();
        [decays, lengths, both, alone, again].map(|m| cuda.download(&m).unwrap())
    });
    let Some([decays, lengths, both, alone, again]) = found else { return };
    let mut expected = x.clone();
    delta::decays(&mut expected, &rates, &bias, [0.25, 8.0]);
    close(decays.as_slice().unwrap(), expected.as_slice().unwrap(), 1e-6);
    let expected = norm::reference(x.view(), 8, NormKind::Length, &[1.0; 8], None, 1e-3);
    close(lengths.as_slice().unwrap(), expected.as_slice().unwrap(), 3e-6);
    let sigmoid = gate.mapv(|x| 1.0 / (1.0 + (-x).exp()));
    close(alone.as_slice().unwrap(), sigmoid.as_slice().unwrap(), 1e-6);
    close(both.as_slice().unwrap(), (sigmoid * &x).as_slice().unwrap(), 1e-6);
    assert_eq!(again, gate.mapv(|x| half::bf16::from_f32(x).to_f32()));
}
