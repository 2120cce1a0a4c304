//! The sweep and the refinement.

use std::ops::RangeInclusive;

use formats::{Encoding, Float, Scheme};
use ndarray::Array2;

use super::super::{Card, Cuda, Matrix};
use super::on_all;
use crate::backend::{Memory, Quantize};
use crate::ops::levels::{AnyLevels, EvenLevels};
use crate::ops::testing::{Noise, fit_blocks};
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

/// How far a code may be from the nearest, in steps between codes: single precision rounds a sum of some hundred terms by far less, and
/// a wrong term is seen at once.
const TIE: f64 = 1e-3;

/// What a code stands for in a row and column.
type Value<'a> = &'a dyn Fn(usize, usize, u8) -> f64;

/// Checks a sweep by its own rule in double precision, and not against the codes of another: that code of a column is chosen which is
/// nearest to what the errors of those before it make of the target. Where a target lies in the middle between two codes the last bit of a
/// sum decides, and all later codes of the row follow from that: both ways are right, and no other is.
///
/// The loss is that of these codes.
fn check_swept(
    target: &Array2<f32>,
    value: Value<'_>,
    codes: RangeInclusive<u8>,
    factor: &Factor<Array2<f32>>,
    swept: &Swept<Array2<u8>>,
    what: &str,
) {
    let (rows, n) = target.dim();
    assert_eq!(swept.codes.dim(), (rows, n), "{what}");
    let (mut loss, mut errors) = (0.0f64, vec![0.0f64; n]);
    for row in 0..rows {
        for (p, col) in factor.order.iter().map(|col| *col as usize).enumerate() {
            let fed: f64 = (0..p).map(|i| f64::from(factor.unit[[i, p]]) * errors[i]).sum();
            let (wanted, chosen) = (f64::from(target[[row, col]]) + fed, swept.codes[[row, col]]);
            assert!(codes.contains(&chosen), "{what}: code {chosen}");
            let apart = |code: u8| (wanted - value(row, col, code)).abs();
            let nearest = codes.clone().map(apart).fold(f64::INFINITY, f64::min);
            let step = (value(row, col, 1) - value(row, col, 0)).abs();
            assert!(
                apart(chosen) <= nearest + TIE * step,
                "{what}: row {row}, column {col}: {wanted} became {}, {} steps beside the nearest",
                value(row, col, chosen),
                (apart(chosen) - nearest) / step
            );
            // What is left of the target itself; what was fed back is in the terms before.
            errors[p] = f64::from(target[[row, col]]) - value(row, col, chosen);
            loss += factor.pivots[p] * (wanted - value(row, col, chosen)).powi(2);
        }
    }
    assert!((swept.loss - loss).abs() <= 4e-6 * loss + 1e-12, "{what}: the loss is {loss}, and it says {}", swept.loss);
}

fn value_in(grid: &Grid) -> impl Fn(usize, usize, u8) -> f64 {
    let groups = grid.spec.groups();
    move |row, col, code| {
        let at = row * groups + grid.spec.group_of[col] as usize;
        f64::from(grid.scales[at]) * (f64::from(code) - f64::from(grid.zeros[at]))
    }
}

fn check_grid(target: &Array2<f32>, grid: &Grid, factor: &Factor<Array2<f32>>, swept: &Swept<Array2<u8>>, what: &str) {
    check_swept(target, &value_in(grid), 0..=grid.spec.encoding.max_code(), factor, swept, what);
}

/// Nearly all rows are those of the CPU to the bit: a tie is rare, and is felt in its own row only.
fn mostly_the_same(found: &Array2<u8>, expected: &Array2<u8>, what: &str) {
    let apart = found.outer_iter().zip(expected.outer_iter()).filter(|(a, b)| a != b).count();
    assert!(apart <= 1 + found.nrows() / 8, "{what}: {apart} of {} rows", found.nrows());
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
    sweep_by(|cuda| cuda.clone(), targets, factor)
}

/// The same by what `of` makes of a device.
fn sweep_by(
    of: impl Fn(&Cuda) -> Cuda,
    targets: &[(&Array2<f32>, &Grid)],
    factor: &Factor<Array2<f32>>,
) -> Option<Vec<Swept<Array2<u8>>>> {
    let swept = on_all(|cuda| {
        let cuda = &of(cuda);
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
        let mut spec = GridSpec::of(Scheme { bits, group, symmetric }.encoding(Float::F16, 0), cols);
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
        check_grid(&target, &grid, &factor, &expected, &format!("the CPU's {what}"));
        check_grid(&target, &grid, &factor, found, &what);
        mostly_the_same(&found.codes, &expected.codes, &what);
        // In calibration errors are handed on by three products of bfloat16.
        let split = &sweep_by(|cuda| cuda.relaxed(), &[(&target, &grid)], &factor).unwrap()[0];
        check_grid(&target, &grid, &factor, split, &format!("{what}, in halves"));
        let apart = cols <= 128 || split.loss.to_bits() != found.loss.to_bits();
        assert!(apart || Card::open(0).is_ok(), "{what}: it was not done in halves");
        if cols > 7 {
            let plain = round::run(target.view(), &grid);
            let moved = plain.iter().zip(&expected.codes).filter(|(a, b)| a != b).count();
            assert!(moved * 8 > plain.len(), "too little is fed back for the test to say much: {moved} codes");
        }
    }
}

/// What the check of a sweep lets pass and what not, without any device.
#[test]
fn a_tie_may_fall_either_way_and_nothing_else_may() {
    let (mut noise, cpu) = (Noise(19), Cpu::exact());
    let (rows, cols) = (2, 64);
    let mut target = noise.matrix(rows, cols);
    let spec = GridSpec::of(Scheme { bits: 4, group: None, symmetric: false }.encoding(Float::F16, 0), cols);
    let grid = cpu.fit(&target, &spec, FitKind::MinMax).unwrap();
    let factor = cpu.factor(&hessian(&mut noise, cols), scattered(cols), 0.05).unwrap();
    let value = value_in(&grid);
    // A sweep in double precision; the code of a position of the first row may be given.
    let by_hand = |target: &Array2<f32>, given: Option<(usize, u8)>| {
        let (mut codes, mut loss) = (Array2::zeros((rows, cols)), 0.0);
        let mut wanted_at = 0.0;
        for row in 0..rows {
            let mut errors = vec![0.0f64; cols];
            for (p, col) in factor.order.iter().map(|col| *col as usize).enumerate() {
                let fed: f64 = (0..p).map(|i| f64::from(factor.unit[[i, p]]) * errors[i]).sum();
                let wanted = f64::from(target[[row, col]]) + fed;
                let apart = |code: &u8| (wanted - value(row, col, *code)).abs();
                let mut code = (0..=15u8).min_by(|a, b| apart(a).total_cmp(&apart(b))).unwrap();
                if let Some((_, other)) = given.filter(|(turn, _)| row == 0 && p == *turn) {
                    (code, wanted_at) = (other, wanted);
                }
                errors[p] = f64::from(target[[row, col]]) - value(row, col, code);
                loss += factor.pivots[p] * (wanted - value(row, col, code)).powi(2);
                codes[[row, col]] = code;
            }
        }
        (Swept { codes, loss }, wanted_at)
    };
    let passes = |target: &Array2<f32>, swept: &Swept<Array2<u8>>| {
        let check = std::panic::AssertUnwindSafe(|| check_grid(target, &grid, &factor, swept, "by hand"));
        std::panic::catch_unwind(check).is_ok()
    };
    let (right, _) = by_hand(&target, None);
    assert!(passes(&target, &right));
    // In the middle of the order, and a code that leaves room for the next one.
    let turn = (20..40).find(|p| (3..12).contains(&right.codes[[0, factor.order[*p] as usize]])).unwrap();
    let col = factor.order[turn] as usize;
    let code = right.codes[[0, col]];
    let (wrong, wanted) = by_hand(&target, Some((turn, code + 1)));
    assert!(!passes(&target, &wrong), "a code that is not the nearest");
    assert!(
        !passes(&target, &Swept { loss: 1.00001 * right.loss, codes: right.codes.clone() }),
        "a loss of other codes"
    );
    // Moved to the middle between both either is right, and the codes after it differ.
    target[[0, col]] += ((value(0, col, code) + value(0, col, code + 1)) / 2.0 - wanted) as f32;
    let [low, other] = [code, code + 1].map(|code| by_hand(&target, Some((turn, code))).0);
    let differing = low.codes.iter().zip(&other.codes).filter(|(a, b)| a != b).count();
    assert!(differing > 3, "nothing follows from the tie: {differing} codes");
    assert!(passes(&target, &low) && passes(&target, &other));
}

#[test]
fn more_rows_than_are_swept_at_a_time() {
    let (mut noise, cpu) = (Noise(11), Cpu::exact());
    let hessian = hessian(&mut noise, 9);
    let target = noise.matrix(16_500, 9);
    let spec = GridSpec::of(Scheme { bits: 4, group: None, symmetric: false }.encoding(Float::F16, 0), 9);
    let grid = cpu.fit(&target, &spec, FitKind::MinMax).unwrap();
    let factor = cpu.factor(&hessian, scattered(9), 0.05).unwrap();
    let expected = cpu.sweep(&[(&target, &grid)], &factor).unwrap().remove(0);
    let Some(found) = sweep(&[(&target, &grid)], &factor) else { return };
    check_grid(&target, &grid, &factor, &found[0], "two chunks");
    mostly_the_same(&found[0].codes, &expected.codes, "two chunks");
}

/// Weights of unlike heights, some of whose grids are unlike too, and one more than goes with the others.
#[test]
fn weights_that_are_swept_together_are_swept_as_alone() {
    let (mut noise, cpu) = (Noise(12), Cpu::exact());
    for (cols, heights) in [(160, [33, 1, 64, 0, 7]), (9, [40, 9000, 9000, 31, 16_500])] {
        let factor = cpu.factor(&hessian(&mut noise, cols), scattered(cols), 0.05).unwrap();
        let scheme = |index| Scheme { bits: if index == 2 { 3 } else { 4 }, group: None, symmetric: false };
        let spec = |index| GridSpec::of(scheme(index).encoding(Float::F16, 0), cols);
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
            // A library may sum products of another shape in another order.
            check_grid(one.0, one.1, &factor, found, &what);
            mostly_the_same(&found.codes, &alone.codes, &what);
            if found.codes == alone.codes {
                assert!(
                    (found.loss - alone.loss).abs() <= 1e-6 * alone.loss,
                    "{what}: {} and {}",
                    found.loss,
                    alone.loss
                );
            }
            let expected = cpu.sweep(&[*one], &factor).unwrap().remove(0);
            mostly_the_same(&found.codes, &expected.codes, &what);
        }
    }
}

/// ggml's types, and encodings whose blocks store scales of their own.
fn encodings() -> impl Iterator<Item = (&'static str, Encoding)> {
    let types = formats::ggml::TYPES.iter().filter(|ty| ty.layout().is_some());
    types.map(|ty| (ty.name, ty.encoding())).chain(super::blocks::apart())
}

#[test]
fn blocks_are_swept_as_on_the_cpu() {
    let (mut noise, cpu) = (Noise(15), Cpu::exact());
    let hessian = hessian(&mut noise, 256);
    let target = noise.matrix(40, 256);
    let factor = cpu.factor(&hessian, scattered(256), 0.05).unwrap();
    for (name, encoding) in encodings() {
        let grid = cpu.fit(&target, &GridSpec::of(encoding, 256), FitKind::MinMax).unwrap();
        let expected = cpu.sweep(&[(&target, &grid)], &factor).unwrap().remove(0);
        let found = on_all(|cuda| {
            let target = cuda.upload(target.clone()).unwrap();
            let swept = cuda.sweep(&[(&target, &grid)], &on_device(cuda, &factor)).unwrap().remove(0);
            (cuda.download_codes(&swept.codes).unwrap(), swept.loss)
        });
        let Some((codes, loss)) = found else { return };
        mostly_the_same(&codes, &expected.codes, name);
        let value = |row: usize, col: usize, code: u8| {
            let at = row * grid.spec.groups() + col / encoding.group_width(256);
            f64::from(grid.scales[at]) * f64::from(encoding.levels.level(code)) - f64::from(grid.mins[at])
        };
        let all = (encoding.levels.count() - 1) as u8;
        let allowed = match AnyLevels::of(&encoding) {
            AnyLevels::Even(EvenLevels { low, offset, .. }) => (low + offset) as u8..=all,
            AnyLevels::Table(_) | AnyLevels::Float(_) => 0..=all,
        };
        check_swept(&target, &value, allowed, &factor, &Swept { codes, loss }, name);
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
    for (index, (ty, encoding)) in encodings().enumerate() {
        // Superblocks are wider than the narrow one's rows are whole ones of; groups of 64 and 128 are so of the wide one alone.
        let is_narrow = matches!(encoding.unit_width(288), 16 | 32 | 288);
        let (hessian, rows) = if is_narrow { (&narrow, 37 - index % 20) } else { (&wide, 33 - index % 20) };
        let n = hessian.nrows();
        let spec = GridSpec::of(encoding, n);
        let target = noise.matrix(rows, n);
        let factor = cpu.factor(hessian, scattered(n), 0.05).unwrap();
        let mut grid = cpu.fit(&target, &spec, FitKind::MinMax).unwrap();
        // A block without a scale.
        grid.blocks[3].d = 0.0;
        let start = Grid::of_blocks(grid.spec.clone(), rows, grid.blocks.clone());
        let swept = cpu.sweep(&[(&target, &start)], &factor).unwrap().remove(0);
        let (mut expected, mut expected_codes) = (start.clone(), swept.codes.clone());
        let expected_loss = cpu.refine(&target, hessian, 0.05, &mut expected, &mut expected_codes).unwrap();
        let found = on_all(|cuda| {
            let [target, hessian] = [&target, hessian].map(|m| cuda.upload(m.clone()).unwrap());
            let (mut grid, mut codes) = (start.clone(), cuda.send_codes(&swept.codes).unwrap());
            let loss = cuda.refine(&target, &hessian, 0.05, &mut grid, &mut codes).unwrap();
            (loss, cuda.download_codes(&codes).unwrap(), grid.blocks, grid.scales, grid.mins)
        });
        let Some((loss, codes, blocks, scales, mins)) = found else { return };
        assert!((loss - expected_loss).abs() <= 1e-3 * expected_loss, "{ty}: {loss}, not {expected_loss}");
        assert!(loss < 0.999 * swept.loss, "{ty}: {loss} after {}", swept.loss);
        // A tie that falls the other way is felt in all of its row, in codes and in scales, and in no other.
        mostly_the_same(&codes, &expected_codes, ty);
        let alike: Vec<bool> = codes.outer_iter().zip(expected_codes.outer_iter()).map(|(a, b)| a == b).collect();
        let moved = codes.iter().zip(&swept.codes).filter(|(a, b)| a != b).count();
        assert!(moved > codes.len() / 100, "{ty}: {moved} codes moved");
        let near = |a: f32, b: f32| (a - b).abs() <= 2e-3 * b.abs() + 1e-7;
        let (found, wanted) = (blocks.chunks(blocks.len() / rows), expected.blocks.chunks(blocks.len() / rows));
        let same_rows = found.zip(wanted).zip(&alike).filter(|(_, alike)| **alike);
        let pairs: Vec<_> = same_rows.flat_map(|((a, b), _)| a.iter().zip(b)).collect();
        let apart = pairs.iter().filter(|(a, b)| !near(a.d, b.d) || !near(a.m, b.m)).count();
        assert!(apart * 100 <= pairs.len(), "{ty}: {apart} of {} blocks", pairs.len());
        let again = Grid::of_blocks(start.spec.clone(), rows, blocks);
        assert!(again.scales == scales && again.mins == mins, "{ty}: scales are not those of the blocks");
        if !crate::ops::refine::moves_scales(&encoding) {
            assert!(again.blocks == start.blocks, "{ty}: powers of two stay, and what rows share");
        }
        // The loss is that of what comes back.
        let error = &target
            - &Array2::from_shape_vec((rows, n), crate::ops::testing::dequantized(&again, codes.as_slice().unwrap()))
                .unwrap();
        let mut damped = hessian.clone();
        damped.diag_mut().iter_mut().for_each(|d| *d *= 1.05);
        damped[[7, 7]] = 1.0;
        let trace = gram::quadratic(error.view(), damped.view());
        assert!((trace - loss).abs() <= 2e-3 * trace, "{ty}: {trace}, and it says {loss}");
    }
}

#[test]
fn refinement_of_integers_is_that_of_the_cpu() {
    let (mut noise, cpu) = (Noise(53), Cpu::exact());
    for (rows, cols, group, bits, symmetric, apart) in [
        (37, 96, Some(32), 4, true, false),
        (40, 61, Some(24), 3, false, false),
        (33, 77, None, 4, false, false),
        (35, 64, Some(16), 2, false, true),
        (9, 320, Some(64), 4, false, false),
    ] {
        let mixing = noise.matrix(cols, cols);
        let mut x = noise.matrix(2 * cols + 8, cols).dot(&mixing);
        x.column_mut(7).fill(0.0);
        let mut hessian = gram::reference(x.view());
        (0..cols).for_each(|i| (i + 1..cols).for_each(|j| hessian[[i, j]] = f32::NAN));
        let target = noise.matrix(rows, cols);
        let mut spec = GridSpec::of(Scheme { bits, group, symmetric }.encoding(Float::F16, 1), cols);
        let groups = spec.groups();
        if apart {
            spec.group_of.iter_mut().zip(0..).for_each(|(group, col)| *group = col % groups as u32);
        }
        let mut start = cpu.fit(&target, &spec, FitKind::MinMax).unwrap();
        start.scales[groups] = 0.0;
        let factor = cpu.factor(&hessian, scattered(cols), 0.05).unwrap();
        let swept = cpu.sweep(&[(&target, &start)], &factor).unwrap().remove(0);
        let (mut expected, mut expected_codes) = (start.clone(), swept.codes.clone());
        let expected_loss = cpu.refine(&target, &hessian, 0.05, &mut expected, &mut expected_codes).unwrap();
        let found = on_all(|cuda| {
            let [target, hessian] = [&target, &hessian].map(|m| cuda.upload(m.clone()).unwrap());
            let (mut grid, mut codes) = (start.clone(), cuda.send_codes(&swept.codes).unwrap());
            let loss = cuda.refine(&target, &hessian, 0.05, &mut grid, &mut codes).unwrap();
            (loss, cuda.download_codes(&codes).unwrap(), grid.scales, grid.zeros)
        });
        let Some((loss, codes, scales, zeros)) = found else { return };
        let what = format!("{rows} x {cols}, {bits} bits, groups of {group:?}");
        assert!((loss - expected_loss).abs() <= 2e-3 * expected_loss, "{what}: {loss}, not {expected_loss}");
        assert!(loss < 0.999 * swept.loss, "{what}: {loss} after {}", swept.loss);
        mostly_the_same(&codes, &expected_codes, &what);
        let apart = scales.iter().zip(&expected.scales).filter(|(a, b)| (*a - *b).abs() > 2e-3 * b.abs()).count();
        assert!(apart * 12 <= scales.len(), "{what}: {apart} of {} scales", scales.len());
        let apart = zeros.iter().zip(&expected.zeros).filter(|(a, b)| a != b).count();
        assert!(apart * 12 <= zeros.len(), "{what}: {apart} of {} zeros", zeros.len());
        assert_eq!(scales[groups], 0.0, "{what}");
        // The loss is that of what comes back.
        let grid = Grid::of_integers(spec, rows, scales, zeros);
        let error = &target - &cpu.dequantize(&codes, &grid).unwrap();
        let mut damped = hessian.clone();
        damped.diag_mut().iter_mut().for_each(|d| *d *= 1.05);
        damped[[7, 7]] = 1.0;
        let trace = gram::quadratic(error.view(), damped.view());
        assert!((trace - loss).abs() <= 2e-3 * trace, "{what}: {trace}, and it says {loss}");
    }
}

#[test]
fn more_rows_than_are_refined_at_a_time() {
    let (mut noise, cpu) = (Noise(51), Cpu::exact());
    let hessian = hessian(&mut noise, 32);
    let target = noise.matrix(16_400, 32);
    let ty = formats::ggml::GgmlType::from_name("Q4_1").unwrap();
    let start = fit_blocks(&cpu, &target, ty, None).unwrap();
    let rounded = cpu.round(&target, &start).unwrap();
    let (mut expected, mut expected_codes) = (start.clone(), rounded.clone());
    let expected_loss = cpu.refine(&target, &hessian, 0.01, &mut expected, &mut expected_codes).unwrap();
    let found = on_all(|cuda| {
        let [target, hessian] = [&target, &hessian].map(|m| cuda.upload(m.clone()).unwrap());
        let (mut grid, mut codes) = (start.clone(), cuda.send_codes(&rounded).unwrap());
        let loss = cuda.refine(&target, &hessian, 0.01, &mut grid, &mut codes).unwrap();
        (loss, cuda.download_codes(&codes).unwrap(), grid.scales)
    });
    let Some((loss, codes, scales)) = found else { return };
    assert!((loss - expected_loss).abs() <= 1e-3 * expected_loss, "{loss}, not {expected_loss}");
    mostly_the_same(&codes, &expected_codes, "two chunks");
    let apart = scales.iter().zip(&expected.scales).filter(|(a, b)| (*a - *b).abs() > 2e-3 * b.abs()).count();
    assert!(apart * 100 <= scales.len(), "{apart} of {} scales", scales.len());
}

#[test]
fn what_does_not_fit_is_refused() {
    let cpu = Cpu::exact();
    let target = Noise(3).matrix(3, 64);
    let hessian = hessian(&mut Noise(4), 64);
    let factor = cpu.factor(&hessian, (0..64).collect(), 0.05).unwrap();
    let spec = GridSpec::of(Scheme { bits: 4, group: Some(32), symmetric: false }.encoding(Float::F16, 0), 64);
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
        let blocks = fit_blocks(&cpu, &Noise(3).matrix(3, 64), ty, None).unwrap();
        let refused = |gram: [usize; 2], rows: usize, codes: [usize; 2]| {
            let mut codes = cuda.send_codes(&Array2::zeros(codes)).unwrap();
            let mut grid = Grid { rows, ..blocks.clone() };
            let gram = cuda.zeros(gram[0], gram[1]).unwrap();
            let result = cuda.refine(&target, &gram, 0.1, &mut grid, &mut codes);
            assert!(matches!(result, Err(Error::Shape { op: "refine", .. })), "{result:?}");
        };
        refused([64, 64], 2, [3, 64]);
        refused([64, 64], 3, [2, 64]);
        refused([64, 64], 3, [3, 32]);
        refused([63, 64], 3, [3, 64]);
        refused([63, 63], 3, [3, 64]);
        let swept = cuda.sweep(&[(&target, &Grid { rows: 2, ..blocks.clone() })], &good);
        assert!(matches!(swept, Err(Error::Shape { op: "sweep", .. })), "{swept:?}");
    });
}
