//! Hyper-connections.

use super::on_all;
use crate::backend::{Forward, HyperParameters, HyperShape, Memory};
use crate::ops::hyper::tests::{parameters, shape};
use crate::ops::hyper::{read_reference, weights_reference, write_reference};
use crate::ops::testing::{Noise, close};

#[test]
fn weights_and_what_is_done_by_them_agree_with_the_plain_loop() {
    let mut noise = Noise(1);
    for (shape, tokens, hidden) in [
        (shape(4, true, 0), 9, 40),
        (shape(4, true, 3), 5, 33),
        (shape(1, true, 1), 3, 7),
        (shape(5, false, 0), 4, 6),
        (shape(16, true, 2), 2, 3),
        (shape(4, true, 2), 0, 8),
    ] {
        let h = noise.matrix(tokens, shape.streams * hidden) * 2.0;
        let y = noise.matrix(tokens, hidden);
        let [projection, base, scale] = parameters(&mut noise, &shape, hidden);
        let of = HyperParameters { projection: &projection, base: &base, scale: &scale };
        let found = on_all(|cuda| {
            let [mut h, y] = [&h, &y].map(|m| cuda.upload(m.clone()).unwrap());
            let weights = cuda.hyper_weights(&h, of, &shape).unwrap();
            let read = cuda.read_streams(&h, &weights, shape.streams).unwrap();
            if shape.writes.is_some() {
                cuda.write_streams(&y, &weights, &shape, &mut h).unwrap();
            }
            [weights, read, h].map(|m| cuda.download(&m).unwrap())
        });
        let Some([weights, read, written]) = found else { return };
        let expected = weights_reference(h.view(), of, &shape);
        close(weights.as_slice().unwrap(), expected.as_slice().unwrap(), 1e-5);
        let expected = read_reference(h.view(), weights.view(), shape.streams);
        close(read.as_slice().unwrap(), expected.as_slice().unwrap(), 2e-6);
        let mut expected = h.clone();
        if shape.writes.is_some() {
            write_reference(y.view(), weights.view(), &shape, &mut expected);
        }
        close(written.as_slice().unwrap(), expected.as_slice().unwrap(), 2e-6);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    on_all(|cuda| {
        let m = |rows, cols| cuda.zeros(rows, cols).unwrap();
        let four = shape(4, true, 0);
        let weigh = |cols: usize, projection: usize, base: usize, scale: usize, shape: HyperShape| {
            let [projection, base, scale] = [projection, base, scale].map(|count| vec![0.0; count]);
            let of = HyperParameters { projection: &projection, base: &base, scale: &scale };
            cuda.hyper_weights(&m(5, cols), of, &shape).map(|x| cuda.shape(&x))
        };
        assert_eq!(weigh(12, 96, 8, 2, four).unwrap(), [5, 8]);
        for wrong in [
            weigh(13, 96, 8, 2, four),
            weigh(12, 95, 8, 2, four),
            weigh(12, 96, 7, 2, four),
            weigh(12, 96, 8, 3, four),
            weigh(12, 96, 8, 2, HyperShape { streams: 17, ..four }),
            weigh(12, 96, 8, 2, HyperShape { streams: 0, ..four }),
        ] {
            wrong.unwrap_err();
        }
        assert!(cuda.read_streams(&m(5, 12), &m(5, 3), 4).is_err());
        assert!(cuda.read_streams(&m(5, 12), &m(4, 4), 4).is_err());
        assert!(cuda.write_streams(&m(5, 4), &m(5, 8), &four, &mut m(5, 12)).is_err());
        assert!(cuda.write_streams(&m(5, 3), &m(5, 4), &four, &mut m(5, 12)).is_err());
    });
}
