//! What there is to say of a run before its work.

use calibration::statistics::Needs;
use formats::{Encoding, Float, Scheme};
use kernels::{Backend, GridSpec, recover};
use ndarray::Array2;

use crate::checkpoint::Checkpoint;
use crate::dialect::projector;
use crate::families;
use crate::graph::{FURTHER, Graph, Linear, Stored};
use crate::recipe::Towers;
use crate::report::HiddenStates;
use crate::targets::{Placement, Target};
use crate::verify::Gives;

/// What there is to say of a model that is measured by what it makes of texts.
pub(super) fn of_states(gives: &Gives, graph: &Graph, found: Option<&HiddenStates>) -> Vec<String> {
    let mut notes = gives.notes.clone();
    if graph.head.missing {
        let found = found.map_or("were not compared".to_owned(), |found| {
            format!(
                "on {} tokens have a mean cosine of {:.5} with the original's, {:.5} at the lowest, and differ by {:.2} % of their length",
                found.tokens,
                found.cosine_mean,
                found.cosine_min,
                100.0 * found.relative_error
            )
        });
        notes.push(format!("the model has no output projection: its hidden states {found}"));
    } else if !gives.predicts {
        notes.push(
            "the model makes embeddings, as modules.json beside it says: these are compared with the original's, and not the tokens that its \
             embedding would predict"
                .to_owned(),
        );
    }
    notes
}

/// What there is to say before the work, whichever output it is.
pub(super) struct Remarks {
    model: Vec<String>,
    /// Components that are no part of the language model.
    aside: Vec<String>,
    experts: bool,
    /// The grid on which its weights lie already.
    trained: Option<TrainedGrid>,
    /// Of its tokenizer.
    pub(super) tokenizer: Vec<String>,
    /// Of the text that is measured.
    pub(super) held_out: Vec<String>,
}

impl Remarks {
    /// Of the model, to begin with.
    pub(super) fn of_model(graph: &Graph, source: &Checkpoint) -> Remarks {
        let mut model = source.notices();
        if graph.opaque {
            let bytes = |module: &str| source.entry(&format!("{module}.weight")).map_or(0, |entry| entry.stored_bytes);
            let found: u64 = graph.linears().map(|linear| bytes(&linear.module)).sum();
            let all: u64 = source.entries().iter().map(|entry| entry.stored_bytes).sum();
            model.push(format!(
                "the model's type is not known: {} linears were found by name and shape, {:.0} % of its bytes, and nothing could be measured",
                graph.linears().count(),
                100.0 * found as f64 / all.max(1) as f64
            ));
            // What is surely missing was refused when the graph was made.
            model.extend(families::check_whole(source).unwrap_or_default());
        } else {
            model.extend(families::check_beside(graph, source));
            model.extend(projector::faults(graph, source));
        }
        model.extend(families::cannot_run(graph));
        let there = |prefix: &str| source.entries().iter().any(|entry| entry.name.starts_with(prefix));
        // Of those that it holds each target tells what becomes of them.
        let own = graph.aside.iter().filter(|(_, what)| !what.starts_with(FURTHER));
        let prefixes = own.filter(|(prefix, _)| there(prefix));
        let prefixes = prefixes.map(|(prefix, _)| prefix.trim_end_matches('.').to_owned());
        let aside = if graph.opaque { Vec::new() } else { prefixes.collect() };
        let trained = TrainedGrid::of(graph, source);
        Remarks { model, aside, experts: graph.has_experts(), trained, tokenizer: Vec::new(), held_out: Vec::new() }
    }

    /// All that is to be said of a target, with what was said of its calibration text.
    pub(super) fn of<B: Backend>(&self, target: &dyn Target<B>, calibration: &[String]) -> Vec<String> {
        let (recipe, own) = (target.recipe(), target.notes());
        let calibrates = target.needs() > Needs::Nothing;
        let mut notes = own.before;
        notes.extend(self.model.iter().cloned());
        if !self.aside.is_empty() {
            let done = match (target.carries_others(), target.projector("").is_some()) {
                (true, _) if recipe.towers != Towers::Keep && !target.idle().contains(&"towers") => {
                    "copied but for their linears, which are rounded without data"
                }
                (true, _) => "copied as they are",
                (_, true) => "left out of the file, and written to one of their own as far as they see",
                _ => "left out",
            };
            notes.push(format!("not part of the language model, and {done}: {}", self.aside.join(", ")));
        }
        notes.extend(self.trained.as_ref().and_then(|trained| trained.told(target)));
        notes.extend(self.tokenizer.iter().cloned());
        notes.extend(recipe.notes.iter().cloned());
        if recipe.moe_all_experts && !self.experts && calibrates {
            notes.push("moe_all_experts has no effect: the model is no mixture of experts".to_owned());
        }
        if calibrates {
            notes.extend(calibration.iter().cloned());
        }
        notes.extend(self.held_out.iter().cloned());
        // What there is to say of a tokenizer, reading its files for the texts has said too.
        let more: Vec<String> = own.after.into_iter().filter(|note| !notes.contains(note)).collect();
        notes.extend(more);
        notes
    }
}

/// A grid of integers on which most weights of a model lie already, as quantization-aware training leaves them: told by the first rows of
/// some of its linears.
struct TrainedGrid {
    scheme: Scheme,
    /// What was looked at and lies on it, each with its first row `[1, in]`.
    rows: Vec<(Linear, Array2<f32>)>,
    /// Whether all that was looked at does.
    all: bool,
}

/// Linears that are looked at.
const LOOKED_AT: usize = 8;

impl TrainedGrid {
    /// The one on which most rows lie; of several the one with the fewest bits, in the widest groups. `None` where no grid has more than half of them.
    fn of(graph: &Graph, source: &Checkpoint) -> Option<TrainedGrid> {
        let plain: Vec<_> = graph.linears().filter(|linear| linear.stored == Stored::Plain).collect();
        let mut rows = Vec::new();
        for linear in plain.iter().step_by(plain.len().div_ceil(LOOKED_AT).max(1)) {
            let mut row = vec![0.0; linear.cols];
            source.load_rows(&linear.weight(), &[0], &mut row).ok()?;
            // A row of zeros lies on every grid.
            if row.iter().any(|x| *x != 0.0) {
                rows.push((Linear::clone(linear), Array2::from_shape_vec((1, linear.cols), row).ok()?));
            }
        }
        let narrowest = rows.iter().map(|(_, row)| row.ncols()).min()?;
        let groups = [None, Some(256), Some(128), Some(64), Some(32), Some(16)];
        let groups = groups.into_iter().filter(|group| group.is_none_or(|group| group < narrowest));
        let schemes = groups.flat_map(|group| {
            [2, 3, 4].into_iter().flat_map(move |bits| [true, false].map(|symmetric| Scheme { bits, group, symmetric }))
        });
        let lies = |row: &Array2<f32>, scheme: &Scheme| {
            recover(row.view(), &GridSpec::of(scheme.encoding(Float::F32, 0), row.ncols())).is_some()
        };
        let mut best: Option<(Scheme, Vec<bool>)> = None;
        let count = |found: &[bool]| found.iter().filter(|lies| **lies).count();
        for scheme in schemes {
            let found: Vec<bool> = rows.iter().map(|(_, row)| lies(row, &scheme)).collect();
            if best.as_ref().is_none_or(|(_, other)| count(&found) > count(other)) {
                best = Some((scheme, found));
            }
        }
        let (scheme, found) = best.filter(|(_, found)| 2 * count(found) > found.len())?;
        let all = count(&found) == rows.len();
        let rows = rows.into_iter().zip(found).filter_map(|(row, lies)| lies.then_some(row)).collect();
        Some(TrainedGrid { scheme, rows, all })
    }

    /// What there is to say where a target cannot hold it.
    fn told<B: Backend>(&self, target: &dyn Target<B>) -> Option<String> {
        let held = |(linear, row): &(Linear, Array2<f32>)| {
            let holds = |encoding: &Encoding| {
                !encoding.has_codes() || recover(row.view(), &GridSpec::of(*encoding, row.ncols())).is_some()
            };
            let plain = |placement: &&Placement| placement.columns.is_none() && !placement.transposed;
            target.placements(linear).iter().filter(plain).all(|placement| holds(&placement.encoding))
        };
        if self.rows.iter().all(held) {
            return None;
        }
        let behind = |(linear, _): &(Linear, Array2<f32>)| {
            target
                .placements(linear)
                .iter()
                .any(|placement| placement.encoding.has_min() && placement.encoding.sub().is_none())
        };
        let Scheme { bits, group, symmetric } = self.scheme;
        let groups = group.map_or("whole rows".to_owned(), |group| format!("groups of {group}"));
        let zeros = if symmetric { "" } else { ", with zeros," };
        let most = if self.all { "the weights" } else { "most of the weights" };
        // A scale and a minimum may hold the grid, but only if their product is exact, which is not looked for.
        let why = match self.rows.iter().any(behind) {
            true => {
                "stores a minimum beside each scale, behind which no grid is looked for: compressed-tensors or GPTQ with"
            }
            false => "cannot hold them as they are: a scheme of",
        };
        Some(format!(
            "{most} lie on a grid of {bits} bits in {groups}{zeros} already, as after quantization-aware training, and this output \
             {why} {bits} bits in such groups loses nothing of them"
        ))
    }
}
