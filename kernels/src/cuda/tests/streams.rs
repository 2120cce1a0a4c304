//! Several streams side by side.

use super::on_all;
use crate::backend::{Forward, Memory};
use crate::ops::streams;
use crate::ops::testing::{Noise, close};

#[test]
fn streams_are_mixed_matched_compared_and_cut_as_by_the_plain_loops() {
    let mut noise = Noise(5);
    for (tokens, from, to, width) in [(5, 4, 4, 33), (3, 1, 4, 64), (2, 5, 1, 7), (0, 2, 2, 4), (1, 3, 2, 300)] {
        let [x, coefficients, y] = [from * width, to * from, to * width].map(|cols| noise.matrix(tokens, cols));
        let mixed_with = noise.matrix(tokens, to * width);
        let found = on_all(|cuda| {
            let up = |m: &ndarray::Array2<f32>| cuda.upload(m.clone()).unwrap();
            let (mut mixed, mut matched, mut cut) = (up(&y), up(&x), up(&x));
            cuda.mix_streams(&up(&x), &up(&coefficients), width, &mut mixed).unwrap();
            cuda.match_streams(&mut matched, width, 1e-5).unwrap();
            cuda.cut(&mut cut, 0.6).unwrap();
            let agreed = cuda.agree_streams(&up(&mixed_with), &up(&y), width, 1e-6).unwrap();
            [mixed, matched, cut, agreed].map(|m| cuda.download(&m).unwrap())
        });
        let Some(found) = found else { return };
        let expected = [
            streams::reference(x.view(), coefficients.view(), width, y.view()),
            streams::match_reference(x.view(), width, 1e-5),
            streams::cut_reference(x.view(), 0.6),
            streams::agree_reference(mixed_with.view(), y.view(), width, 1e-6),
        ];
        for (found, expected) in found.iter().zip(&expected) {
            close(found.as_slice().unwrap(), expected.as_slice().unwrap(), 3e-6);
        }
    }
    on_all(|cuda| {
        let [mut wide, narrow] = [12, 4].map(|cols| cuda.zeros(3, cols).unwrap());
        assert!(cuda.mix_streams(&narrow, &narrow, 4, &mut wide).is_err());
        assert!(cuda.match_streams(&mut wide, 5, 1e-5).is_err());
        assert!(
            cuda.agree_streams(&wide, &narrow, 4, 1e-6).is_err() && cuda.agree_streams(&wide, &wide, 5, 1e-6).is_err()
        );
    });
}
