//! The sweep and the refinement.

use formats::{ScalePrecision, Scheme};
use ndarray::Array2;

use super::super::{Cuda, Matrix};
use super::on_all;
use crate::backend::Backend;
use crate::ops::testing::Noise;
use crate::ops::{gram, round};
use crate::{Cpu, Error, Factor, FitKind, Grid, GridSpec, Swept};

/// Correlated inputs' Hessian.
fn hessian(noise: &mut Noise, n: usize) -> Array2<f32> {
    let mixing = noise.matrix(n, n);
    gram::reference(noise.matrix(2 * n + 8, n).dot(&mixing).view())
}

/// Not sorted by anything.
fn scattered(n: usize) -> Vec<u32> {
    let step = [7, 11, 13].into_iter().find(|step| !n.is_multiple_of(*step)).unwrap();
    (0..n).map(|i| ((i * step + 3) % n) as u32).collect()
}

/// As many codes may differ as ties in single precision explain, and what follows from them.
fn same_but_for_ties(found: &Array2<u8>, expected: &Array2<u8>, what: &str) {
    assert_eq!(found.dim(), expected.dim());
    let different = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    assert!(different <= 1 + found.len() / 10_000, "{different} of {} codes: {what}", found.len());
}

fn on_device(cuda: &Cuda, factor: &Factor<Array2<f32>>) -> Factor<Matrix> {
    Factor {
        order: factor.order.clone(),
        unit: cuda.upload(factor.unit.clone()).unwrap(),
        pivots: factor.pivots.clone(),
        damp: factor.damp,
        dead: factor.dead,
    }
}

fn sweep(targets: &[(&Array2<f32>, &Grid)], factor: &Factor<Array2<f32>>) -> Option<Vec<Swept<Array2<u8>>>> {
    let swept = on_all(|cuda| {
        let uploaded: Vec<Matrix> = targets.iter().map(|(target, _)| cuda.upload((*target).clone()).unwrap()).collect();
        let targets: Vec<(&Matrix, &Grid)> = uploaded.iter().zip(targets).map(|(m, (_, grid))| (m, *grid)).collect();
        let swept = cuda.sweep(&targets, &on_device(cuda, factor)).unwrap();
        swept.iter().map(|one| (cuda.download_codes(&one.codes).unwrap(), one.loss)).collect::<Vec<_>>()
    })?;
    Some(swept.into_iter().map(|(codes, loss)| Swept { codes, loss }).collect())
}

#[test]
fn codes_are_those_of_the_cpu() {
    let (mut noise, cpu) = (Noise(9), Cpu::exact());
    for (rows, cols, group, bits, symmetric) in [
        (1, 1, None, 4, true),
        (5, 7, None, 3, false),
        (64, 130, None, 4, false),
        (70, 128, Some(32), 2, false),
        (33, 320, Some(64), 8, true),
        (1000, 33, Some(32), 4, false),
        (31, 256, Some(128), 3, true),
    ] {
        let hessian = hessian(&mut noise, cols);
        let target = noise.matrix(rows, cols);
        let mut spec = GridSpec::contiguous(Scheme { bits, group, symmetric }, ScalePrecision::F16, 0, cols);
        if cols == 320 {
            // No two neighbours alike.
            let groups = spec.groups() as u32;
            spec.group_of.iter_mut().zip(0..).for_each(|(group, col)| *group = col % groups);
        }
        let mut grid = cpu.fit(&target, &spec, FitKind::MinMax).unwrap();
        if cols == 128 {
            // A group of zeros.
            grid.scales[5] = 0.0;
        }
        let factor = cpu.factor(&hessian, scattered(cols), 0.05).unwrap();
        let expected = cpu.sweep(&[(&target, &grid)], &factor).unwrap().remove(0);
        let Some(found) = sweep(&[(&target, &grid)], &factor) else { return };
        let found = &found[0];
        let what = format!("{rows} x {cols}, groups of {group:?}");
        same_but_for_ties(&found.codes, &expected.codes, &what);
        assert!((found.loss - expected.loss).abs() <= 1e-4 * expected.loss + 1e-12, "{what}: {}", found.loss);
        if cols > 7 {
            let plain = round::run(target.view(), &grid);
            let moved = plain.iter().zip(&expected.codes).filter(|(a, b)| a != b).count();
            assert!(moved * 8 > plain.len(), "too little is fed back for the test to say much: {moved} codes");
        }
    }
}

#[test]
fn more_rows_than_are_swept_at_a_time() {
    let (mut noise, cpu) = (Noise(11), Cpu::exact());
    let hessian = hessian(&mut noise, 9);
    let target = noise.matrix(16_500, 9);
    let spec = GridSpec::contiguous(Scheme { bits: 4, group: None, symmetric: false }, ScalePrecision::F16, 0, 9);
    let grid = cpu.fit(&target, &spec, FitKind::MinMax).unwrap();
    let factor = cpu.factor(&hessian, scattered(9), 0.05).unwrap();
    let expected = cpu.sweep(&[(&target, &grid)], &factor).unwrap().remove(0);
    let Some(found) = sweep(&[(&target, &grid)], &factor) else { return };
    same_but_for_ties(&found[0].codes, &expected.codes, "two chunks");
    assert!((found[0].loss - expected.loss).abs() <= 1e-4 * expected.loss);
}

/// Weights of unlike heights, some of whose grids are unlike too, and one more than goes with the others.
#[test]
fn weights_that_are_swept_together_are_swept_as_alone() {
    let (mut noise, cpu) = (Noise(12), Cpu::exact());
    for (cols, heights) in [(160, [33, 1, 64, 0, 7]), (9, [40, 9000, 9000, 31, 16_500])] {
        let factor = cpu.factor(&hessian(&mut noise, cols), scattered(cols), 0.05).unwrap();
        let scheme = |index| Scheme { bits: if index == 2 { 3 } else { 4 }, group: None, symmetric: false };
        let spec = |index| GridSpec::contiguous(scheme(index), ScalePrecision::F16, 0, cols);
        let targets = heights.map(|rows| noise.matrix(rows, cols));
        let grids: Vec<Grid> = targets
            .iter()
            .enumerate()
            .map(|(index, target)| cpu.fit(target, &spec(index), FitKind::MinMax).unwrap())
            .collect();
        let all: Vec<(&Array2<f32>, &Grid)> = targets.iter().zip(&grids).collect();
        let Some(together) = sweep(&all, &factor) else { return };
        assert_eq!(together.len(), all.len());
        for (index, (one, found)) in all.iter().zip(&together).enumerate() {
            let alone = &sweep(&[*one], &factor).unwrap()[0];
            let what = format!("weight {index} of {heights:?}");
            assert_eq!(found.codes, alone.codes, "{what}");
            assert_eq!(found.loss, alone.loss, "{what}");
            let expected = cpu.sweep(&[*one], &factor).unwrap().remove(0);
            same_but_for_ties(&found.codes, &expected.codes, &what);
        }
    }
}

#[test]
fn blocks_are_swept_as_on_the_cpu() {
    let (mut noise, cpu) = (Noise(15), Cpu::exact());
    let hessian = hessian(&mut noise, 256);
    let target = noise.matrix(40, 256);
    let factor = cpu.factor(&hessian, scattered(256), 0.05).unwrap();
    for ty in formats::ggml::TYPES.iter().filter(|t| t.layout().is_some()) {
        let grid = cpu.fit_blocks(&target, *ty, None).unwrap();
        let expected = cpu.sweep_blocks(&target, &factor, &grid).unwrap();
        let found = on_all(|cuda| {
            let target = cuda.upload(target.clone()).unwrap();
            let swept = cuda.sweep_blocks(&target, &on_device(cuda, &factor), &grid).unwrap();
            (cuda.download_codes(&swept.codes).unwrap(), swept.loss)
        });
        let Some((codes, loss)) = found else { return };
        same_but_for_ties(&codes, &expected.codes, ty.name);
        assert!((loss - expected.loss).abs() <= 1e-4 * expected.loss, "{ty}: {loss}, not {}", expected.loss);
    }
}

#[test]
fn refinement_is_that_of_the_cpu() {
    let (mut noise, cpu) = (Noise(50), Cpu::exact());
    let [narrow, wide] = [288, 512].map(|n| {
        let mixing = noise.matrix(n, n);
        let mut x = noise.matrix(2 * n + 8, n).dot(&mixing);
        x.column_mut(7).fill(0.0);
        let mut hessian = gram::reference(x.view());
        // Above the diagonal is scratch.
        (0..n).for_each(|i| (i + 1..n).for_each(|j| hessian[[i, j]] = f32::NAN));
        hessian
    });
    for (index, ty) in formats::ggml::TYPES.iter().filter(|t| t.layout().is_some()).enumerate() {
        let (hessian, rows) = if ty.block_len == 32 { (&narrow, 37 - index) } else { (&wide, 33 - index) };
        let n = hessian.nrows();
        let target = noise.matrix(rows, n);
        let factor = cpu.factor(hessian, scattered(n), 0.05).unwrap();
        let mut grid = cpu.fit_blocks(&target, *ty, None).unwrap();
        // A block without a scale.
        grid.blocks[3].d = 0.0;
        let start = crate::BlockGrid::new(*ty, rows, n, grid.blocks.clone());
        let swept = cpu.sweep_blocks(&target, &factor, &start).unwrap();
        let (mut expected, mut expected_codes) = (start.clone(), swept.codes.clone());
        let expected_loss = cpu.refine_blocks(&target, hessian, 0.05, &mut expected, &mut expected_codes).unwrap();
        let found = on_all(|cuda| {
            let [target, hessian] = [&target, hessian].map(|m| cuda.upload(m.clone()).unwrap());
            let (mut grid, mut codes) = (start.clone(), cuda.send_codes(&swept.codes).unwrap());
            let loss = cuda.refine_blocks(&target, &hessian, 0.05, &mut grid, &mut codes).unwrap();
            (loss, cuda.download_codes(&codes).unwrap(), grid.blocks, grid.scales, grid.mins)
        });
        let Some((loss, codes, blocks, scales, mins)) = found else { return };
        assert!((loss - expected_loss).abs() <= 1e-3 * expected_loss, "{ty}: {loss}, not {expected_loss}");
        assert!(loss < 0.999 * swept.loss, "{ty}: {loss} after {}", swept.loss);
        let different = codes.iter().zip(&expected_codes).filter(|(a, b)| a != b).count();
        assert!(different * 1000 <= codes.len(), "{ty}: {different} of {} codes", codes.len());
        let moved = codes.iter().zip(&swept.codes).filter(|(a, b)| a != b).count();
        assert!(moved > 10 * different + 10, "{ty}: {moved} codes moved, {different} differ");
        let near = |a: f32, b: f32| (a - b).abs() <= 2e-3 * b.abs() + 1e-7;
        let apart = blocks.iter().zip(&expected.blocks).filter(|(a, b)| !near(a.d, b.d) || !near(a.m, b.m)).count();
        assert!(apart * 100 <= blocks.len(), "{ty}: {apart} of {} blocks", blocks.len());
        let again = crate::BlockGrid::new(*ty, rows, n, blocks);
        assert!(again.scales == scales && again.mins == mins, "{ty}: scales are not those of the blocks");
        if ty.name == "MXFP4" {
            assert!(again.blocks == start.blocks, "powers of two stay");
        }
        // The loss is that of what comes back.
        let error = &target
            - &Array2::from_shape_vec((rows, n), crate::ops::testing::restored(&again, codes.as_slice().unwrap()))
                .unwrap();
        let mut damped = hessian.clone();
        damped.diag_mut().iter_mut().for_each(|d| *d *= 1.05);
        damped[[7, 7]] = 1.0;
        let trace = gram::quadratic(error.view(), damped.view());
        assert!((trace - loss).abs() <= 2e-3 * trace, "{ty}: {trace}, and it says {loss}");
    }
}

#[test]
fn more_rows_than_are_refined_at_a_time() {
    let (mut noise, cpu) = (Noise(51), Cpu::exact());
    let hessian = hessian(&mut noise, 32);
    let target = noise.matrix(16_400, 32);
    let ty = formats::ggml::GgmlType::from_name("Q4_1").unwrap();
    let start = cpu.fit_blocks(&target, ty, None).unwrap();
    let rounded = cpu.round_blocks(&target, &start).unwrap();
    let (mut expected, mut expected_codes) = (start.clone(), rounded.clone());
    let expected_loss = cpu.refine_blocks(&target, &hessian, 0.01, &mut expected, &mut expected_codes).unwrap();
    let found = on_all(|cuda| {
        let [target, hessian] = [&target, &hessian].map(|m| cuda.upload(m.clone()).unwrap());
        let (mut grid, mut codes) = (start.clone(), cuda.send_codes(&rounded).unwrap());
        let loss = cuda.refine_blocks(&target, &hessian, 0.01, &mut grid, &mut codes).unwrap();
        (loss, cuda.download_codes(&codes).unwrap(), grid.scales)
    });
    let Some((loss, codes, scales)) = found else { return };
    assert!((loss - expected_loss).abs() <= 1e-3 * expected_loss, "{loss}, not {expected_loss}");
    let different = codes.iter().zip(&expected_codes).filter(|(a, b)| a != b).count();
    assert!(different * 1000 <= codes.len(), "{different} of {} codes", codes.len());
    let apart = scales.iter().zip(&expected.scales).filter(|(a, b)| (*a - *b).abs() > 2e-3 * b.abs()).count();
    assert!(apart * 100 <= scales.len(), "{apart} of {} scales", scales.len());
}

#[test]
fn what_does_not_fit_is_refused() {
    let cpu = Cpu::exact();
    let target = Noise(3).matrix(3, 64);
    let hessian = hessian(&mut Noise(4), 64);
    let factor = cpu.factor(&hessian, (0..64).collect(), 0.05).unwrap();
    let spec = GridSpec::contiguous(Scheme { bits: 4, group: Some(32), symmetric: false }, ScalePrecision::F16, 0, 64);
    let grid = cpu.fit(&target, &spec, FitKind::MinMax).unwrap();
    on_all(|cuda| {
        let on_device = |order: Vec<u32>| Factor { order, ..on_device(cuda, &factor) };
        let target = cuda.upload(target.clone()).unwrap();
        let refused = |factor: &Factor<Matrix>, grid: &Grid| {
            let result = cuda.sweep(&[(&target, grid)], factor);
            assert!(matches!(result, Err(Error::Shape { op: "sweep", .. })), "{result:?}");
        };
        let good = on_device(factor.order.clone());
        refused(&good, &Grid { rows: 2, ..grid.clone() });
        refused(&good, &Grid { scales: vec![1.0; 5], ..grid.clone() });
        refused(&on_device((1..65).collect()), &grid);
        refused(&on_device((0..63).collect()), &grid);
        let spec = GridSpec { group_of: vec![2; 64], ..spec.clone() };
        refused(&good, &Grid { spec, ..grid.clone() });

        let ty = formats::ggml::GgmlType::from_name("Q4_0").unwrap();
        let blocks = cpu.fit_blocks(&Noise(3).matrix(3, 64), ty, None).unwrap();
        let refused = |gram: [usize; 2], rows: usize, codes: [usize; 2]| {
            let mut codes = cuda.send_codes(&Array2::zeros(codes)).unwrap();
            let mut grid = crate::BlockGrid { rows, ..blocks.clone() };
            let gram = cuda.zeros(gram[0], gram[1]).unwrap();
            let result = cuda.refine_blocks(&target, &gram, 0.1, &mut grid, &mut codes);
            assert!(matches!(result, Err(Error::Shape { op: "refine_blocks", .. })), "{result:?}");
        };
        refused([64, 64], 2, [3, 64]);
        refused([64, 64], 3, [2, 64]);
        refused([64, 64], 3, [3, 32]);
        refused([63, 64], 3, [3, 64]);
        refused([63, 63], 3, [3, 64]);
        let swept = cuda.sweep_blocks(&target, &good, &crate::BlockGrid { rows: 2, ..blocks.clone() });
        assert!(matches!(swept, Err(Error::Shape { op: "sweep_blocks", .. })), "{swept:?}");
    });
}
