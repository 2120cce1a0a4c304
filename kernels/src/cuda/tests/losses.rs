//! Losses of tokens.

use super::on_all;
use crate::backend::{Measure, Memory};
use crate::ops::loss;
use crate::ops::testing::Noise;

#[test]
fn losses_agree_with_the_plain_loops() {
    let mut noise = Noise(13);
    for vocabulary in [1, 5, 17, 256, 1031, 5003] {
        let p = noise.matrix(4, vocabulary) * 6.0;
        let q = &p + &(noise.matrix(4, vocabulary) * 0.2);
        let targets: Vec<u32> = (0..4).map(|t| (t * 7 % vocabulary) as u32).collect();
        let found = on_all(|cuda| {
            let [p, q] = [&p, &q].map(|m| cuda.upload(m.clone()).unwrap());
            let found = cuda.compare(&p, &q, &targets).unwrap();
            assert_eq!(cuda.compare(&p, &p, &targets).unwrap().kld, vec![0.0; 4]);
            (found.kld, found.reference.nll, found.reference.argmax, found.model.nll, found.model.argmax)
        });
        let Some((kld, p_nll, p_top, q_nll, q_top)) = found else { return };
        for token in 0..4 {
            let (p, q) = (p.row(token).to_vec(), q.row(token).to_vec());
            for (row, nll, top) in [(&p, p_nll[token], p_top[token]), (&q, q_nll[token], q_top[token])] {
                let (expected, argmax) = loss::reference(row, targets[token] as usize);
                assert!((nll - expected).abs() <= 1e-5, "{nll} and {expected}");
                assert_eq!(top, argmax);
            }
            let expected = loss::reference_kld(&p, &q);
            assert!((kld[token] - expected).abs() <= 1e-5 * expected + 2e-6, "{} and {expected}", kld[token]);
        }
    }
    // Of equal logits the first is the largest.
    let flat = ndarray::Array2::<f32>::ones((1, 700));
    on_all(|cuda| assert_eq!(cuda.token_loss(&cuda.upload(flat.clone()).unwrap(), &[3]).unwrap().argmax, [0]));
}
