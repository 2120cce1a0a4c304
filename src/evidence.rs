//! What a report has to tell of weights and inputs that say too little: scales that the file cannot store, outputs that are mostly
//! lost, inputs that were never seen.

use std::path::Path;

use calibration::statistics::Statistics;
use formats::encoding::{E4M3, Levels};
use formats::{Dtype, Float, GgmlType};
use kernels::{Grid, Quantize};
use ndarray::Array2;

use crate::error::{Error, Result};
use crate::mixes::is_substitution;
use crate::report::{LinearReport, Recovery};
use crate::words::listed;

/// The largest half.
const LARGEST_HALF: f32 = 65504.0;

/// The smallest half above 0.
const STEP: f32 = 5.960_464_5e-8;

/// What there is to tell of a tensor's lost values, from this share of them on.
const TOLD: f64 = 0.01;

/// The same of weights with scales, which are lost by whole groups: a single row that others make up for can count for much.
const TOLD_OF_GROUPS: f64 = 1e-4;

/// The share of what is known of an expert's input that came from tokens of the other experts; `None` where none did.
pub fn prior_share<B: Quantize>(statistics: &Statistics<B>) -> Option<f64> {
    (statistics.count > statistics.tokens as f64).then(|| 1.0 - statistics.tokens as f64 / statistics.count)
}

/// The share of an input's channels that were 0 for every token that was looked at; `None` where none were.
pub fn dead_inputs<B: Quantize>(statistics: &Statistics<B>) -> Option<f64> {
    let energy = statistics.energy();
    let dead = energy.iter().filter(|energy| **energy == 0.0).count();
    (dead > 0 && statistics.count > 0.0).then(|| dead as f64 / energy.len() as f64)
}

/// Counts the weights that packed blocks hold no longer, or much more coarsely than their codes could, because their scales are too small to be stored. `values` gives the weights
/// where they have to be looked at.
///
/// Fails where a scale is too large to be stored. `input` is what the tensor is read from, `source` its name there, `tensor` in the file.
pub fn lost_in_blocks(
    ty: GgmlType,
    packed: &[u8],
    input: &Path,
    [source, tensor]: [&str; 2],
    values: impl FnOnce() -> Result<Vec<f32>>,
) -> Result<usize> {
    let faults = ty.scale_faults(packed);
    if faults.beyond.is_none() && faults.tiny.is_empty() {
        return Ok(0);
    }
    let (values, span) = (values()?, ty.span());
    let of = |index: usize| &values[index * span..values.len().min((index + 1) * span)];
    let beyond = |index: usize| {
        let pattern = tensor.strip_suffix(".weight").unwrap_or(tensor);
        Error::failed(format!(
            "{}: tensor `{source}`: its values go up to {:e}, for which {ty} has no scale; choose a type for it that has, as with \
             --tensor-type {pattern}=BF16",
            input.display(),
            peak(of(index))
        ))
    };
    if let Some(index) = faults.beyond {
        return Err(beyond(index));
    }
    let most = tolerated(ty.layout().map_or(1 << 11, |layout| layout.levels.count()));
    let (mut lost, mut held) = (0, vec![0.0; span]);
    for index in faults.tiny {
        let values = of(index);
        let bytes = |at: usize| at / ty.block_len * ty.block_bytes;
        let (first, held) = (index * span, &mut held[..values.len()]);
        ty.dequantize(&packed[bytes(first)..bytes(first + values.len())], held).map_err(|e| e.in_tensor(source))?;
        if share_lost(values.iter().zip(held.iter()).map(|(x, y)| [*x, *y])) > most {
            // A search whose squares overflow gives up with a scale of 0.
            if peak(values) > 1e4 {
                return Err(beyond(index));
            }
            lost += values.len();
        }
    }
    Ok(lost)
}

/// The same for plain numbers in half precision; of other types none is lost.
pub fn lost_in_halves(dtype: Dtype, bytes: &[u8], name: &str, values: &[f32]) -> Result<usize> {
    match GgmlType::from_name("F16").filter(|_| dtype == Dtype::F16) {
        Some(half) => lost_in_blocks(half, bytes, Path::new(name), [name, name], || Ok(values.to_vec())),
        None => Ok(0),
    }
}

/// What is lost as a share of all, if anything is.
pub fn share_of(lost: usize, all: usize) -> Option<f64> {
    (lost > 0).then(|| lost as f64 / all as f64)
}

/// What there is to tell of tensors that are written as numbers in half precision, with the share of their values that is lost.
pub fn too_small(lost: &[(String, f64)]) -> Option<String> {
    let shares: Vec<(&str, f64)> =
        lost.iter().filter(|(_, share)| *share >= TOLD).map(|(name, share)| (&**name, *share)).collect();
    told_too_small(&shares, "half precision", "much coarser; --dtype bf16 or f32 of quantc convert keeps them")
}

fn told_too_small(shares: &[(&str, f64)], place: &str, or: &str) -> Option<String> {
    let most = shares.iter().map(|(_, share)| *share).reduce(f64::max)?;
    let names: Vec<&str> = shares.iter().map(|(name, _)| *name).collect();
    let digits = if most < TOLD { 2 } else { 0 };
    Some(format!(
        "the weights of {} tensors ({}) are too small for {place}: up to {:.digits$} % of them are lost, or {or}",
        names.len(),
        listed(&names),
        100.0 * most
    ))
}

/// The same for codes on a grid. `values` gives the weights, and what the file holds of them.
pub fn lost_in_grid(
    grid: &Grid,
    input: &Path,
    tensor: &str,
    values: impl FnOnce() -> Result<[Array2<f32>; 2]>,
) -> Result<usize> {
    let encoding = &grid.spec.encoding;
    let (precision, bits) = (encoding.precision(), encoding.levels.bits());
    // The largest level, and the largest that a weight can be off the zero of its group.
    let (top, widest) = match (encoding.fixed_zero(), encoding.levels) {
        (_, Levels::Table(table)) => {
            let largest = table.iter().filter(|x| x.is_finite()).fold(0.0f32, |m, x| m.max(x.abs()));
            (largest, largest)
        }
        (zero, _) => (f32::from(zero.unwrap_or(encoding.max_code())), f32::from(encoding.max_code())),
    };
    let (largest, small) = match precision {
        Float::F16 => (LARGEST_HALF, top * STEP),
        Float::BF16 => (65280.0, top * STEP),
        wide => (wide.largest(), 0.0),
    };
    // Written so that a NaN is beyond.
    if !grid.scales.iter().all(|scale| scale.abs() < largest) {
        let [weight, _] = values()?;
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        return Err(Error::failed(format!(
            "{}: tensor `{tensor}`: its values go up to {:e}, for which no scale can be stored with {} bits; leave it as it is with \
             --ignore {module}",
            input.display(),
            peak(weight.as_slice().expect("contiguous")),
            bits
        )));
    }
    let tiny = |scale: &f32| scale.abs() <= small;
    // Runtimes dequantize into the type of the scales.
    let may_overflow = precision == Float::F16 && grid.scales.iter().any(|scale| scale.abs() * widest >= LARGEST_HALF);
    if !may_overflow && !grid.scales.iter().any(tiny) {
        return Ok(0);
    }
    let [weight, held] = values()?;
    let most = peak(held.as_slice().expect("contiguous"));
    if may_overflow && most > LARGEST_HALF {
        return Err(Error::failed(format!(
            "{}: tensor `{tensor}`: its values go up to {most:e} as they are dequantized, which is beyond F16's largest, {LARGEST_HALF:?}; make \
             the model bfloat16 first (convert, or merge for an adapter, with --dtype bf16) and quantize that",
            input.display()
        )));
    }
    let groups = grid.spec.groups();
    let mut columns = vec![Vec::new(); groups];
    grid.spec.group_of.iter().enumerate().for_each(|(col, group)| columns[*group as usize].push(col));
    // Levels of a float are a share of their size apart, those of four bits of mantissa 2⁻⁴ at the most.
    let most = if encoding.levels == Levels::Table(&E4M3) { 4e-3 } else { tolerated(1 << bits) };
    let mut lost = 0;
    for (index, _) in grid.scales.iter().enumerate().filter(|(_, scale)| tiny(scale)) {
        let (row, columns) = (index / groups, &columns[index % groups]);
        if share_lost(columns.iter().map(|col| [weight[[row, *col]], held[[row, *col]]])) > most {
            lost += columns.len();
        }
    }
    Ok(lost)
}

/// The share of a group's energy that its codes alone never lose: some times what rounding bell-shaped weights to so many levels does.
fn tolerated(levels: usize) -> f64 {
    (12.0 / (levels as f64).powi(2)).clamp(1e-3, 0.5)
}

/// The share of the energy of weights that is lost, in pairs with what is held of them; 0 for weights that are all 0 and stay so.
fn share_lost(pairs: impl Iterator<Item = [f32; 2]>) -> f64 {
    let (mut whole, mut error) = (0.0, 0.0);
    for [x, y] in pairs {
        whole += f64::from(x).powi(2);
        error += (f64::from(x) - f64::from(y)).powi(2);
    }
    if error == 0.0 { 0.0 } else { error / whole }
}

fn peak(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |peak, x| peak.max(x.abs()))
}

/// Fails where what was measured of a linear is no number, which a report could not say.
pub fn check_measured(report: &LinearReport) -> Result<()> {
    match [report.proxy_loss, report.relative_error].into_iter().flatten().all(f64::is_finite) {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "`{}`: the loss of its output on the calibration text is no number; its weights and inputs are too large to be multiplied",
            report.name
        ))),
    }
}

/// What there is to tell of all linears, and of other tensors with the share of their values that is lost.
pub fn notes(linears: &[LinearReport], others: &[(String, f64)]) -> Vec<String> {
    let mut notes: Vec<String> = starved_experts(linears).into_iter().collect();
    let all = linears.len();
    let some = |told: &dyn Fn(&LinearReport) -> bool| -> Vec<&str> {
        linears.iter().filter(|linear| told(linear)).map(|linear| linear.name.as_str()).collect()
    };
    let mut fallbacks: Vec<(&str, Vec<&str>)> = Vec::new();
    for linear in linears {
        let fallback: Vec<&str> = linear.fallback.iter().flat_map(|all| all.split("; ")).collect();
        // Of types that others take the place of the target says all in one sentence.
        let Some(fallback) = fallback.into_iter().find(|one| !is_substitution(one)) else { continue };
        match fallbacks.iter_mut().find(|(known, _)| *known == fallback) {
            Some((_, names)) => names.push(&linear.name),
            None => fallbacks.push((fallback, vec![&linear.name])),
        }
    }
    for (fallback, names) in fallbacks {
        notes.push(format!("{} of {all} linears ({}): {fallback}", names.len(), listed(&names)));
    }
    notes.extend(recovered(linears));
    let lost = |share: Option<f64>| share.filter(|share| *share >= TOLD_OF_GROUPS);
    let mut shares: Vec<(&str, f64)> =
        linears.iter().filter_map(|linear| Some((linear.name.as_str(), lost(linear.lost)?))).collect();
    shares.extend(others.iter().filter_map(|(name, share)| Some((name.as_str(), lost(Some(*share))?))));
    notes.extend(told_too_small(&shares, "scales in half precision", "much coarser than their codes"));
    let broken = some(&|linear| linear.relative_error.is_some_and(|error| error > 0.5));
    if !broken.is_empty() {
        notes.push(format!(
            "{} of {all} linears lose more than half of their output's energy ({}): choose more bits for them, or leave them as they are",
            broken.len(),
            listed(&broken)
        ));
    }
    let dead = some(&|linear| linear.dead_inputs.is_some_and(|share| share > 0.5));
    if !dead.is_empty() {
        notes.push(format!(
            "{} of {all} linears read mostly zeros on the calibration text ({}): it says nothing about most of their weights, which were \
             rounded as they are",
            dead.len(),
            listed(&dead)
        ));
    }
    notes
}

/// What there is to say of weights that lay on a grid already.
fn recovered(linears: &[LinearReport]) -> Option<String> {
    let count = |of: Recovery| linears.iter().filter(|linear| linear.recovered == Some(of)).count();
    let (exact, nearly) = (count(Recovery::Exact), count(Recovery::NearestScales));
    let all = linears.len();
    let told = match (exact, nearly) {
        (0, 0) => return None,
        (_, 0) => "scale and code of each were recovered, and nothing of them is lost".to_owned(),
        (0, _) => "every code was recovered, and the scales are the nearest ones that the file can store".to_owned(),
        _ => format!(
            "every code was recovered; nothing is lost of {exact}, and the scales of {nearly} are the nearest ones that the file can store"
        ),
    };
    Some(format!(
        "the weights of {} of {all} linears lay on a grid of the output's already, as after quantization-aware training: {told}",
        exact + nearly
    ))
}

/// What there is to say of experts that few tokens were sent to.
fn starved_experts(linears: &[LinearReport]) -> Option<String> {
    let experts = || linears.iter().filter(|linear| linear.prior.is_some());
    let starved = experts().filter(|linear| linear.prior.is_some_and(|prior| prior > 0.5)).count();
    let unseen = experts().filter(|linear| linear.tokens == 0).count();
    (starved > 0).then(|| {
        format!(
            "{starved} of {} linears of experts saw fewer tokens than they have inputs, {unseen} of them none: what all tokens of their layer look like made up for it",
            experts().count()
        )
    })
}

#[cfg(test)]
mod tests {
    use calibration::solvers::{Asked, Gptq, Observer, Rtn, Solver};
    use calibration::statistics::Needs;
    use formats::ggml::TYPES;
    use kernels::{Cpu, GridSpec};

    use kernels::Memory as _;

    use super::*;

    /// Repeatable numbers around 0, more of them small than large.
    fn noise(rows: usize, cols: usize) -> Array2<f32> {
        let mut state = 7u64;
        Array2::from_shape_simple_fn((rows, cols), || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let x = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            0.1 * x * x * x
        })
    }

    /// The share of its energy that a weight lost, and what is told of it; an error where it is refused.
    fn solved(ty: GgmlType, weight: &Array2<f32>, sweep: bool) -> Result<(f64, usize)> {
        let backend = Cpu::exact();
        let inputs = backend.input(noise(64, 256)).unwrap();
        let statistics = Statistics::gather(&backend, 256, Needs::Hessian, |see| see(&inputs))
            .map_err(|e: kernels::Error| Error::from(e))?;
        let solver = Gptq { observer: Observer::Imatrix, damp: 0.05, act_order: true, desc_act: false, refine: true };
        let shared = match sweep {
            true => solver.share(&backend, Some(&statistics))?,
            false => calibration::solvers::Shared { statistics: None, factor: None, fallback: None },
        };
        let importance = statistics.importance();
        let weight = backend.upload(weight.clone())?;
        let spec = GridSpec::of(ty.encoding(), 256);
        let one = [Asked { weight: &weight, spec, importance: sweep.then_some(&importance[..]) }];
        let mut solution = match sweep {
            true => solver.solve(&backend, &shared, &one)?,
            false => Rtn { observer: Observer::MinMax }.solve(&backend, &shared, &one)?,
        }
        .remove(0);
        let packed = solution.rows(&backend)?;
        let asked = || Ok(backend.download(&weight)?.iter().copied().collect());
        let lost = lost_in_blocks(ty, &packed, Path::new("in"), ["the.weight", "blk.0.x.weight"], asked)?;
        let mut held = vec![0.0; 8 * 256];
        ty.dequantize(&packed, &mut held)?;
        let (mut whole, mut error) = (0.0, 0.0);
        for (x, y) in weight.iter().zip(&held) {
            assert!(y.is_finite(), "{ty}: {y} for {x}");
            whole += f64::from(*x).powi(2);
            error += (f64::from(*x) - f64::from(*y)).powi(2);
        }
        Ok((error / whole, lost))
    }

    #[test]
    fn every_type_holds_scaled_weights_or_is_found_not_to() {
        // Types whose blocks have a half for a scale, and no integers beside it.
        let narrow = ["F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "TQ1_0", "TQ2_0"];
        let wide = ["F32", "BF16", "MXFP4"];
        for ty in TYPES {
            for sweep in [false, true] {
                let (usual, lost) = solved(*ty, &noise(8, 256), sweep).unwrap();
                assert_eq!(lost, 0, "{ty}");
                for factor in [1e8, 1e20, 1e-4, 1e-8, 1e-12] {
                    let label = format!("{ty}, {}, {factor:e}", if sweep { "swept" } else { "rounded" });
                    let (found, lost) = match solved(*ty, &noise(8, 256).mapv(|x| x * factor), sweep) {
                        Ok(found) => found,
                        Err(refused) => {
                            let told = refused.to_string();
                            assert!(
                                told.contains("`the.weight`") && told.contains("--tensor-type blk.0.x=BF16"),
                                "{told}"
                            );
                            let holds = ["Q6_K", "IQ4_XS"].contains(&ty.name);
                            assert!(factor > 1e8 || !holds, "{label}: {told}");
                            assert!(factor > 1.0 && !wide.contains(&ty.name), "{label}: {told}");
                            continue;
                        }
                    };
                    assert!(factor < 1e8 || !narrow.contains(&ty.name), "{label} is beyond its scales");
                    let levels = ty.layout().map_or(1 << 11, |layout| layout.levels.count());
                    assert!(found < usual + tolerated(levels) || lost > 0, "{label}: {found} is lost, usually {usual}");
                    let tiny = factor < 1e-6 && !wide.contains(&ty.name);
                    assert!(lost > 0 || !tiny, "{label}: {found} is lost, and not found to be");
                    assert!(lost == 0 || factor < 1e-3 && !wide.contains(&ty.name), "{label}: {found}");
                    assert!(lost == 0 || factor > 1e-7 || lost == 8 * 256, "{label}: {lost}");
                }
            }
        }
    }

    #[test]
    fn zeros_and_equal_values_are_not_lost() {
        for ty in TYPES.iter().filter(|ty| ty.block_len > 1) {
            for value in [0.0, 0.25] {
                let (_, lost) = solved(*ty, &Array2::from_elem((8, 256), value), true).unwrap();
                assert_eq!(lost, 0, "{ty}: {value}");
            }
        }
    }

    #[test]
    fn names_are_listed_up_to_three() {
        assert_eq!(listed(&["a", "b", "c"]), "`a`, `b`, `c`");
        assert_eq!(listed(&["a", "b", "c", "d", "e"]), "`a`, `b`, `c` and 2 more");
    }
}
