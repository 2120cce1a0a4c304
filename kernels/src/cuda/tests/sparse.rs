//! Attention to a choice of tokens.

use super::super::Operands;
use super::on_all;
use crate::backend::{AttentionShape, Entries, Forward, IndexShape, Memory};
use crate::ops::beside::{self, Far};
use crate::ops::pool;
use crate::ops::sparse::tests::{shape, whole};
use crate::ops::sparse::{attend_reference, select_reference};
use crate::ops::testing::{Noise, close};

fn attention(heads: usize, kv_heads: usize, head_dim: usize, value_dim: usize) -> AttentionShape {
    let scale = (head_dim as f32).powf(-0.5);
    AttentionShape {
        heads,
        kv_heads,
        head_dim,
        value_dim,
        scale,
        window: None,
        chunk: None,
        softcap: None,
        both_ways: false,
    }
}

#[test]
fn choices_and_attention_to_them_agree_with_the_plain_loop() {
    let mut noise = Noise(1);
    for (index, shape, lengths) in [
        (shape(3, 8, 5, 1, false), attention(2, 2, 5, 3), vec![7, 0, 1, 30]),
        (shape(2, 4, 40, 1, false), attention(1, 1, 24, 33), vec![70]),
        (shape(1, 1, 1, 1, false), attention(4, 2, 6, 130), vec![9, 3]),
        (shape(2, 6, 2, 4, true), attention(4, 2, 8, 8), vec![37, 5]),
        (IndexShape { pooled: true, ..shape(3, 8, 3, 4, false) }, attention(2, 2, 5, 3), vec![37, 0, 3, 12, 16]),
        (
            IndexShape { pooled: true, entries: true, ..shape(3, 8, 2, 4, false) },
            attention(2, 1, 6, 6),
            vec![37, 0, 3, 12],
        ),
        // More than one block for each thread.
        (shape(2, 3, 60, 1, false), attention(1, 1, 4, 4), vec![300]),
    ] {
        let tokens = lengths.iter().sum();
        let [iq, ik, weights] = whole(&mut noise, tokens, &index);
        let q = noise.matrix(tokens, shape.heads * shape.head_dim) * 2.0;
        let k = noise.matrix(tokens, shape.kv_heads * shape.head_dim);
        let v = noise.matrix(tokens, shape.kv_heads * shape.value_dim);
        let weights = (!index.apart).then_some(weights);
        let sinks: Vec<f32> = (0..shape.heads).map(|_| 3.0 * noise.next()).collect();
        let sinks = (shape.heads > 1).then_some(&sinks[..]);
        let found = on_all(|cuda| {
            let [iq, ik, q, k, v] = [&iq, &ik, &q, &k, &v].map(|m| cuda.upload(m.clone()).unwrap());
            let weights = weights.clone().map(|m| cuda.upload(m).unwrap());
            let chosen = cuda.select(&iq, &ik, weights.as_ref(), &index, &lengths).unwrap();
            let out = match index.entries {
                true => {
                    let shape = AttentionShape { window: Some(5), ..shape };
                    let entries = Entries { values: &k, block: index.block, chosen: Some(&chosen) };
                    cuda.attention_beside([&q, &k, &v], &entries, sinks, &shape, &lengths)
                }
                false => cuda.attention_to([&q, &k, &v], &chosen, sinks, &shape, &index, &lengths),
            };
            let Operands::Whole(out) = out.unwrap() else { unreachable!("not rounded") };
            [chosen, out].map(|m| cuda.download(&m).unwrap())
        });
        let Some([chosen, out]) = found else { return };
        let weights = weights.as_ref().map(|m| m.view());
        assert_eq!(chosen, select_reference(iq.view(), ik.view(), weights, &index, &lengths), "{index:?}");
        let qkv = [q.view(), k.view(), v.view()];
        let expected = match index.entries {
            true => {
                let far = Far { values: k.view(), block: index.block, chosen: Some(chosen.view()) };
                beside::reference(qkv, far, sinks, &AttentionShape { window: Some(5), ..shape }, &lengths)
            }
            false => attend_reference(qkv, chosen.view(), sinks, &shape, &index, &lengths),
        };
        close(out.as_slice().unwrap(), expected.as_slice().unwrap(), 2e-6);
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_no_work() {
    on_all(|cuda| {
        let m = |rows, cols| cuda.zeros(rows, cols).unwrap();
        let two = shape(2, 3, 4, 1, false);
        let select = |q, k, weights: Option<usize>, shape, n| {
            cuda.select(&m(5, q), &m(5, k), weights.map(|cols| m(5, cols)).as_ref(), &shape, &[n])
                .map(|x| cuda.shape(&x))
        };
        assert_eq!(select(6, 3, Some(2), two, 5).unwrap(), [5, 4]);
        let nothing = cuda.select(&m(0, 6), &m(0, 3), Some(&m(0, 2)), &two, &[]).unwrap();
        let four = attention(4, 2, 8, 6);
        cuda.attention_to([&m(0, 32), &m(0, 16), &m(0, 12)], &nothing, None, &four, &two, &[]).unwrap();
        for wrong in [
            select(5, 3, Some(2), two, 5),
            select(6, 2, Some(2), two, 5),
            select(6, 3, Some(1), two, 5),
            select(6, 3, None, two, 5),
            select(6, 3, Some(2), two, 4),
            select(6, 3, Some(2), shape(2, 3, 0, 1, false), 5),
            select(6, 3, Some(2), shape(2, 3, 4, 0, false), 5),
        ] {
            wrong.unwrap_err();
        }
        let attend = |cols, shape: AttentionShape| {
            cuda.attention_to([&m(5, 32), &m(5, 16), &m(5, 12)], &m(5, cols), None, &shape, &two, &[5])
                .map(|x| x.shape())
        };
        assert!(attend(3, four).is_err());
        assert!(attend(4, AttentionShape { window: Some(3), ..four }).is_err());
        assert!(attend(4, AttentionShape { softcap: Some(3.0), ..four }).is_err());
    });
}

#[test]
fn pooled_blocks_and_bounded_decays_agree_with_the_plain_loop() {
    let mut noise = Noise(5);
    for (channels, block, overlap, lengths) in [
        (5, 4, false, vec![9, 0, 3, 8]),
        (40, 1, false, vec![3]),
        (7, 16, false, vec![5, 40]),
        (10, 4, true, vec![9, 0, 3, 13]),
        (6, 1, true, vec![3, 2]),
    ] {
        let tokens = lengths.iter().sum();
        let (x, gates) = (noise.matrix(tokens, channels), noise.matrix(tokens, channels) * 2.0);
        let [places, rates, bias] = [block * channels, channels, channels]
            .map(|count| (0..count).map(|_| noise.next().abs()).collect::<Vec<f32>>());
        let found = on_all(|cuda| {
            let [a, b] = [&x, &gates].map(|m| cuda.upload(m.clone()).unwrap());
            let pooled = cuda.pool_blocks(&a, &b, &places, block, overlap, &lengths).unwrap();
            let mut decays = cuda.upload(gates.clone()).unwrap();
            cuda.bounded_decays(&mut decays, &rates, &bias, -5.0).unwrap();
            assert!(cuda.pool_blocks(&a, &b, &places[1..], block, overlap, &lengths).is_err());
            assert!(cuda.bounded_decays(&mut decays, &rates[1..], &bias, -5.0).is_err());
            [pooled, decays].map(|m| cuda.download(&m).unwrap())
        });
        let Some([pooled, decays]) = found else { return };
        let expected = pool::reference(x.view(), gates.view(), &places, (block, overlap), &lengths);
        close(pooled.as_slice().unwrap(), expected.as_slice().unwrap(), 2e-6);
        let mut expected = gates.clone();
        crate::ops::delta::bounded_decays(&mut expected, &rates, &bias, -5.0);
        close(decays.as_slice().unwrap(), expected.as_slice().unwrap(), 2e-6);
    }
}

#[test]
fn attention_to_a_window_and_to_all_entries_agrees_with_the_plain_loop() {
    let mut noise = Noise(9);
    for (shape, window, block, lengths) in [
        (attention(4, 1, 6, 6), Some(8), 4, vec![37, 0, 3, 70]),
        (attention(2, 2, 5, 5), None, 8, vec![9, 20]),
        (attention(3, 1, 130, 130), Some(1), 1, vec![40]),
    ] {
        let (shape, tokens) = (AttentionShape { window, ..shape }, lengths.iter().sum());
        let q = noise.matrix(tokens, shape.heads * shape.head_dim) * 2.0;
        let [k, v, far] = [(); 3].map(|()| noise.matrix(tokens, shape.kv_heads * shape.head_dim));
        let sinks: Vec<f32> = (0..shape.heads).map(|_| 3.0 * noise.next()).collect();
        let sinks = window.map(|_| &sinks[..]);
        let found = on_all(|cuda| {
            let few = cuda.zeros(1, 2).unwrap();
            let [q, k, v, far] = [&q, &k, &v, &far].map(|m| cuda.upload(m.clone()).unwrap());
            let attend = |entries, shape| cuda.attention_beside([&q, &k, &v], &entries, sinks, &shape, &lengths);
            let Operands::Whole(out) = attend(Entries { values: &far, block, chosen: None }, shape).unwrap() else {
                unreachable!("not rounded")
            };
            assert!(attend(Entries { values: &far, block: 0, chosen: None }, shape).is_err());
            assert!(attend(Entries { values: &far, block, chosen: Some(&few) }, shape).is_err());
            assert!(
                attend(Entries { values: &far, block, chosen: None }, AttentionShape { softcap: Some(1.0), ..shape })
                    .is_err()
            );
            cuda.download(&out).unwrap()
        });
        let Some(out) = found else { return };
        let far = Far { values: far.view(), block, chosen: None };
        let expected = beside::reference([q.view(), k.view(), v.view()], far, sinks, &shape, &lengths);
        close(out.as_slice().unwrap(), expected.as_slice().unwrap(), 2e-6);
    }
}
