//! The solvers on a fixture whose input channels are correlated and of very different energy.

use formats::{Float, GgmlType, Scheme};
use kernels::{Cpu, GridSpec, Memory};
use ndarray::Array2;

use super::*;
use crate::statistics::{Needs, Statistics};
use crate::transforms::{Awq, Slot, Tie};

/// A repeatable stream of numbers, roughly normal.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        (0..4)
            .map(|_| {
                self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((self.0 >> 40) as f32) / (1u64 << 24) as f32 - 0.5
            })
            .sum::<f32>()
            * 1.7
    }

    fn matrix(&mut self, rows: usize, cols: usize) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, cols), || self.next())
    }
}

fn fixture() -> (Array2<f32>, Array2<f32>) {
    let mut noise = Noise(1);
    let mixing = noise.matrix(24, 64);
    let mut x = noise.matrix(600, 24).dot(&mixing) + noise.matrix(600, 64);
    for (col, mut values) in x.columns_mut().into_iter().enumerate() {
        let energy = if col % 13 == 5 { 12.0 } else { 0.3 + 0.02 * col as f32 };
        values.mapv_inplace(|v| v * energy);
    }
    (noise.matrix(96, 64), x)
}

fn statistics(x: &Array2<f32>) -> Statistics<Cpu> {
    let cpu = Cpu::default();
    let gathered: std::result::Result<_, kernels::Error> =
        Statistics::gather(&cpu, x.ncols(), Needs::HessianAndMagnitude, |see| {
            see(&cpu.input(x.slice(ndarray::s![..200, ..]).to_owned())?)?;
            see(&cpu.input(x.slice(ndarray::s![200.., ..]).to_owned())?)
        });
    gathered.unwrap()
}

fn solve(solver: &dyn Solver<Cpu>, scheme: Scheme) -> Solution<Cpu> {
    let (w, x) = fixture();
    let statistics = statistics(&x);
    let shared = solver.share(&Cpu::default(), Some(&statistics)).unwrap();
    let spec = GridSpec::of(scheme.encoding(Float::F16, 0), w.ncols());
    solver.solve(&Cpu::default(), &shared, &[Asked { weight: &w, spec, importance: None }]).unwrap().remove(0)
}

const GPTQ: Gptq = Gptq { observer: Observer::Imatrix, damp: 0.05, act_order: true, desc_act: false, refine: false };

#[test]
fn each_refinement_lowers_the_loss() {
    for bits in [2, 3, 4, 8] {
        for symmetric in [true, false] {
            let scheme = Scheme { bits, group: Some(32), symmetric };
            let loss = |solver: &dyn Solver<Cpu>| solve(solver, scheme).relative_error.unwrap();
            let plain = loss(&Rtn { observer: Observer::MinMax });
            let weighted = loss(&Rtn { observer: Observer::Imatrix });
            let swept = loss(&GPTQ);
            assert!(swept < 0.8 * weighted && weighted < plain, "{scheme:?}: {plain} {weighted} {swept}");
            let clipped = loss(&Rtn { observer: Observer::Clip });
            assert!(clipped <= plain, "{scheme:?}: {plain} clipped {clipped}");
        }
    }
}

#[test]
fn the_reported_loss_is_the_output_error() {
    let (w, x) = fixture();
    let solution = solve(&GPTQ, Scheme { bits: 4, group: Some(16), symmetric: false });
    let dequantized = &solution.dequantized;
    let energy = |m: &Array2<f32>| m.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    let (lost, whole) = (energy(&x.dot(&(&w - dequantized).t())), energy(&x.dot(&w.t())));
    assert!((solution.proxy_loss.unwrap() - lost).abs() < 1e-3 * lost);
    assert!((solution.relative_error.unwrap() - lost / whole).abs() < 1e-3 * lost / whole);
}

#[test]
fn descending_activation_order_leaves_its_groups_in_the_weight() {
    let scheme = Scheme { bits: 4, group: Some(16), symmetric: false };
    let solution = solve(&Gptq { desc_act: true, ..GPTQ }, scheme);
    assert!(solution.relative_error.unwrap() < 0.05);
    let packed = |solution: Solution<Cpu>| solution.packed(&Cpu::default(), WordLayout::Rows).unwrap();
    let groups = packed(solution).group_of.expect("scattered groups");
    assert_eq!((0..4).map(|g| groups.iter().filter(|x| **x == g).count()).collect::<Vec<_>>(), [16; 4]);
    assert!(packed(solve(&GPTQ, scheme)).group_of.is_none());
}

#[test]
fn weights_that_are_solved_together_are_solved_as_alone() {
    let (w, x) = fixture();
    let statistics = statistics(&x);
    let cpu = Cpu::default();
    let others = [w.slice(ndarray::s![..7, ..]).to_owned(), &w * 0.5];
    let scheme = |bits| Scheme { bits, group: Some(16), symmetric: false };
    let spec = |bits| GridSpec::of(scheme(bits).encoding(Float::F16, 0), w.ncols());
    let ggml = GridSpec::of(GgmlType::from_name("Q4_0").unwrap().encoding(), w.ncols());
    let asked = |weight, spec| Asked { weight, spec, importance: None };
    let weights = [asked(&w, spec(4)), asked(&others[0], spec(3)), asked(&others[1], spec(4)), asked(&others[1], ggml)];
    for solver in [&GPTQ as &dyn Solver<Cpu>, &Rtn { observer: Observer::MinMax }] {
        let shared = solver.share(&cpu, Some(&statistics)).unwrap();
        let together = solver.solve(&cpu, &shared, &weights).unwrap();
        assert_eq!(together.len(), 4);
        for (mut together, weight) in together.into_iter().zip(weights.clone()) {
            let blocks = weight.spec.encoding.ggml_type().is_some();
            let mut alone = solver.solve(&cpu, &shared, &[weight]).unwrap().remove(0);
            assert_eq!((together.proxy_loss, &together.dequantized), (alone.proxy_loss, &alone.dequantized));
            if blocks {
                assert!(together.rows(&cpu).unwrap() == alone.rows(&cpu).unwrap());
                continue;
            }
            let [together, alone] = [together, alone].map(|one| one.packed(&cpu, WordLayout::Rows).unwrap());
            assert!(together == alone);
        }
    }
}

#[test]
fn a_hopeless_hessian_is_reported_not_hidden() {
    let mut statistics = statistics(&fixture().1);
    let mut gram = Array2::<f32>::eye(64);
    gram[[40, 3]] = 1e9;
    statistics.gram = Some(gram);
    let shared = Solver::<Cpu>::share(&GPTQ, &Cpu::default(), Some(&statistics)).unwrap();
    assert!(shared.factor.is_none());
    assert!(shared.fallback.unwrap().contains("rounded to nearest"));
}

#[test]
fn awq_scales_help_rounding_and_keep_the_function() {
    let (w, x) = fixture();
    let statistics = statistics(&x);
    let spec = GridSpec::of(Scheme { bits: 3, group: Some(32), symmetric: false }.encoding(Float::F16, 0), 64);
    let slot = Slot { readers: vec![(&w, &spec)], statistics: &statistics, tie: Tie::Free };
    let found = Awq { rows: 96, ..Awq::default() }.scales(&Cpu::default(), &slot).unwrap();
    assert!(found.alpha > 0.0 && found.loss[1] < 0.9 * found.loss[0], "{found:?}");
    let mut scaled = w.clone();
    Cpu::default().scale(&mut scaled, &[], &found.reader).unwrap();
    let inverse: Vec<f32> = found.producer.iter().map(|t| 1.0 / t).collect();
    let mut x_scaled = x.clone();
    Cpu::default().scale(&mut x_scaled, &[], &inverse).unwrap();
    let (before, after) = (x.dot(&w.t()), x_scaled.dot(&scaled.t()));
    let largest = before.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(before.iter().zip(&after).all(|(a, b)| (a - b).abs() < 1e-4 * largest));
}

/// A weight of whole superblocks, and inputs of very different energy.
fn wide() -> (Array2<f32>, Array2<f32>) {
    let mut noise = Noise(2);
    let mixing = noise.matrix(40, 256);
    let mut x = noise.matrix(700, 40).dot(&mixing) + noise.matrix(700, 256);
    x.columns_mut().into_iter().enumerate().for_each(|(col, mut values)| values *= 0.2 + 0.05 * (col % 37) as f32);
    (noise.matrix(24, 256), x)
}

fn solve_in(solver: &dyn Solver<Cpu>, ty: &str, importance: Option<&[f32]>) -> Solution<Cpu> {
    let (w, x) = wide();
    let statistics = statistics(&x);
    let shared = solver.share(&Cpu::default(), Some(&statistics)).unwrap();
    let spec = GridSpec::of(GgmlType::from_name(ty).unwrap().encoding(), 256);
    solver.solve(&Cpu::default(), &shared, &[Asked { weight: &w, spec, importance }]).unwrap().remove(0)
}

#[test]
fn every_observer_serves_every_type_of_ggml() {
    for ty in ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "IQ4_NL", "IQ4_XS", "TQ2_0", "MXFP4", "F16"] {
        let solved = |observer| {
            let mut solution = solve_in(&Rtn { observer }, ty, None);
            let mut held = vec![0.0; solution.dequantized.len()];
            let ty = GgmlType::from_name(ty).unwrap();
            ty.dequantize(&solution.rows(&Cpu::default()).unwrap(), &mut held).unwrap();
            assert_eq!(solution.dequantized.as_slice().unwrap(), held, "{ty}: rows hold something else");
            solution.relative_error.unwrap()
        };
        let [plain, mse, weighted, clipped] =
            Observer::ALL.iter().map(|(_, observer)| solved(*observer)).collect::<Vec<_>>()[..]
        else {
            panic!("four observers")
        };
        assert!(weighted < 1.02 * mse && weighted < 1.02 * plain, "{ty}: {plain} {mse} {weighted}");
        assert!((clipped / weighted - 1.0).abs() < 0.01, "{ty}: {weighted} clipped {clipped}");
        let swept = solve_in(&GPTQ, ty, None).relative_error.unwrap();
        assert!(swept < 0.9 * weighted || ty == "F16", "{ty}: {weighted} swept {swept}");
    }
}

#[test]
fn an_importance_takes_the_place_of_what_was_seen() {
    let (even, imatrix, mse) = (vec![1.0; 256], Rtn { observer: Observer::Imatrix }, Rtn { observer: Observer::Mse });
    for ty in ["Q4_0", "Q4_K"] {
        let rows =
            |solver: &dyn Solver<Cpu>, importance| solve_in(solver, ty, importance).rows(&Cpu::default()).unwrap();
        assert!(rows(&imatrix, Some(&even)) == rows(&mse, None));
        assert!(rows(&imatrix, None) != rows(&mse, None), "{ty}: what was seen counts for nothing");
    }
    let (w, x) = fixture();
    let statistics = statistics(&x);
    let shared = Shared { statistics: Some(&statistics), factor: None, fallback: None };
    let spec = GridSpec::of(Scheme { bits: 4, group: Some(32), symmetric: false }.encoding(Float::F16, 0), 64);
    let scales = |solver: &dyn Solver<Cpu>, importance| {
        let asked = Asked { weight: &w, spec: spec.clone(), importance };
        solver.solve(&Cpu::default(), &shared, &[asked]).unwrap()[0].grid().unwrap().scales.clone()
    };
    assert!(scales(&imatrix, Some(&even[..64])) == scales(&mse, None) && scales(&imatrix, None) != scales(&mse, None));
}

#[test]
fn refinement_lowers_the_loss_of_integers_and_of_blocks() {
    for (bits, symmetric, desc_act) in
        [(2, false, false), (3, true, false), (4, false, true), (4, true, false), (8, false, false)]
    {
        let scheme = Scheme { bits, group: Some(16), symmetric };
        let of = |refine| solve(&Gptq { desc_act, refine, ..GPTQ }, scheme);
        let (before, after) = (of(false), of(true));
        let [before, refined] = [&before, &after].map(|one| one.relative_error.unwrap());
        assert!(refined < 0.99 * before, "{scheme:?}, desc_act {desc_act}: {refined} after {before}");
        // What is said of it is true of what it stands for.
        let (w, x) = fixture();
        let energy = |m: &Array2<f32>| m.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let lost = energy(&x.dot(&(&w - &after.dequantized).t())) / energy(&x.dot(&w.t()));
        assert!((refined - lost).abs() < 2e-3 * lost, "{scheme:?}: {refined}, and it loses {lost}");
    }
    for ty in ["Q4_0", "Q4_K"] {
        let of = |refine| solve_in(&Gptq { refine, ..GPTQ }, ty, None).relative_error.unwrap();
        assert!(of(true) < 0.99 * of(false), "{ty}");
    }
}
