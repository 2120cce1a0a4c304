//! What a report has to tell of weights and inputs that say too little: scales that the file cannot store, outputs that are mostly
//! lost, inputs that were never seen.

use calibration::statistics::Statistics;
use formats::{GgmlType, ScalePrecision};
use kernels::{Backend, Grid};
use ndarray::Array2;

use crate::compile::LinearReport;
use crate::error::{Error, Result};

/// The smallest half above 0.
const STEP: f32 = 5.960_464_5e-8;

/// Weights count as lost where the file's differ from them by more than this share of their energy.
const LOST: f64 = 0.25;

/// What there is to tell of a linear's or another tensor's lost weights, from this share of them on.
const TOLD: f64 = 0.01;

/// The share of what is known of an expert's input that came from tokens of the other experts; `None` where none did.
pub fn prior_share<B: Backend>(statistics: &Statistics<B>) -> Option<f64> {
    (statistics.count > statistics.tokens as f64).then(|| 1.0 - statistics.tokens as f64 / statistics.count)
}

/// The share of an input's channels that were 0 for every token that was looked at; `None` where none were.
pub fn dead_inputs<B: Backend>(statistics: &Statistics<B>) -> Option<f64> {
    let energy = statistics.energy();
    let dead = energy.iter().filter(|energy| **energy == 0.0).count();
    (dead > 0 && statistics.count > 0.0).then(|| dead as f64 / energy.len() as f64)
}

/// Counts the weights that packed blocks hold no longer, because their scales are too small to be stored. `values` gives the weights
/// where they have to be looked at.
///
/// Fails where a scale is too large to be stored. `source` is the tensor's name in the input, `tensor` in the file.
pub fn lost_in_blocks(
    ty: GgmlType,
    packed: &[u8],
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
            "tensor `{source}`: its values go up to {:e}, for which {ty} has no scale; choose a type for it that has, as with \
             --tensor-type {pattern}=BF16",
            peak(of(index))
        ))
    };
    if let Some(index) = faults.beyond {
        return Err(beyond(index));
    }
    let (mut lost, mut held) = (0, vec![0.0; span]);
    for index in faults.tiny {
        let values = of(index);
        let bytes = |at: usize| at / ty.block_len * ty.block_bytes;
        let (first, held) = (index * span, &mut held[..values.len()]);
        ty.dequantize(&packed[bytes(first)..bytes(first + values.len())], held).map_err(|e| e.in_tensor(source))?;
        if is_lost(values.iter().zip(held.iter()).map(|(x, y)| [*x, *y])) {
            // A search whose squares overflow gives up with a scale of 0.
            if peak(values) > 1e4 {
                return Err(beyond(index));
            }
            lost += values.len();
        }
    }
    Ok(lost)
}

/// The same for codes on a grid. `values` gives the weights, and what the file holds of them.
pub fn lost_in_grid(grid: &Grid, tensor: &str, values: impl FnOnce() -> Result<[Array2<f32>; 2]>) -> Result<usize> {
    let scheme = grid.spec.scheme;
    let top = if scheme.symmetric { scheme.midpoint() } else { scheme.max_code() };
    let (largest, small) = match grid.spec.precision {
        ScalePrecision::F32 => (f32::MAX, 0.0),
        ScalePrecision::F16 => (65504.0, f32::from(top) * STEP),
        ScalePrecision::BF16 => (65280.0, f32::from(top) * STEP),
    };
    // Written so that a NaN is beyond.
    if grid.scales.iter().any(|scale| !(scale.abs() < largest)) {
        let [weight, _] = values()?;
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        return Err(Error::failed(format!(
            "tensor `{tensor}`: its values go up to {:e}, for which no scale can be stored with {} bits; leave it as it is with \
             --ignore {module}",
            peak(weight.as_slice().expect("contiguous")),
            scheme.bits
        )));
    }
    let tiny = |scale: &f32| scale.abs() <= small;
    if !grid.scales.iter().any(tiny) {
        return Ok(0);
    }
    let [weight, held] = values()?;
    let groups = grid.spec.groups();
    let mut columns = vec![Vec::new(); groups];
    grid.spec.group_of.iter().enumerate().for_each(|(col, group)| columns[*group as usize].push(col));
    let mut lost = 0;
    for (index, _) in grid.scales.iter().enumerate().filter(|(_, scale)| tiny(scale)) {
        let (row, columns) = (index / groups, &columns[index % groups]);
        if is_lost(columns.iter().map(|col| [weight[[row, *col]], held[[row, *col]]])) {
            lost += columns.len();
        }
    }
    Ok(lost)
}

fn is_lost(pairs: impl Iterator<Item = [f32; 2]>) -> bool {
    let (mut whole, mut error) = (0.0, 0.0);
    for [x, y] in pairs {
        whole += f64::from(x).powi(2);
        error += (f64::from(x) - f64::from(y)).powi(2);
    }
    error > LOST * whole
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
        let Some(fallback) = linear.fallback.as_deref() else { continue };
        match fallbacks.iter_mut().find(|(known, _)| *known == fallback) {
            Some((_, names)) => names.push(&linear.name),
            None => fallbacks.push((fallback, vec![&linear.name])),
        }
    }
    for (fallback, names) in fallbacks {
        notes.push(format!("{} of {all} linears ({}): {fallback}", names.len(), listed(&names)));
    }
    let lost = |share: Option<f64>| share.filter(|share| *share >= TOLD);
    let mut shares: Vec<(&str, f64)> =
        linears.iter().filter_map(|linear| Some((linear.name.as_str(), lost(linear.lost)?))).collect();
    shares.extend(others.iter().filter_map(|(name, share)| Some((name.as_str(), lost(Some(*share))?))));
    if let Some(most) = shares.iter().map(|(_, share)| *share).reduce(f64::max) {
        let names: Vec<&str> = shares.iter().map(|(name, _)| *name).collect();
        notes.push(format!(
            "the weights of {} tensors ({}) are too small for scales in half precision: up to {:.0} % of them are lost, and read as 0 or \
             far from what they were",
            names.len(),
            listed(&names),
            100.0 * most
        ));
    }
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

/// The first few of some names.
pub fn listed(names: &[&str]) -> String {
    let first: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
    match names.len() {
        0..=3 => first.join(", "),
        all => format!("{} and {} more", first.join(", "), all - 3),
    }
}
