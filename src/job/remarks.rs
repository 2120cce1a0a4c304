//! What there is to say of a run before its work.

use calibration::statistics::Needs;
use kernels::Backend;

use crate::checkpoint::Checkpoint;
use crate::families;
use crate::graph::Graph;
use crate::targets::Target;

/// What there is to say before the work, whichever output it is.
pub(super) struct Remarks {
    model: Vec<String>,
    /// Components that are no part of the language model.
    aside: Vec<String>,
    experts: bool,
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
        }
        model.extend(families::cannot_run(graph));
        // config.json may count layers for further tokens that the file does not hold.
        let there = |prefix: &str| source.entries().iter().any(|entry| entry.name.starts_with(prefix));
        let prefixes = graph.aside.iter().filter(|(prefix, _)| there(prefix));
        let prefixes = prefixes.map(|(prefix, _)| prefix.trim_end_matches('.').to_owned());
        let aside = if graph.opaque { Vec::new() } else { prefixes.collect() };
        Remarks { model, aside, experts: graph.has_experts(), tokenizer: Vec::new(), held_out: Vec::new() }
    }

    /// All that is to be said of a target, with what was said of its calibration text.
    pub(super) fn of<B: Backend>(&self, target: &dyn Target<B>, calibration: &[String]) -> Vec<String> {
        let (recipe, own) = (target.recipe(), target.notes());
        let calibrates = target.needs() > Needs::Nothing;
        let mut notes = own.before;
        notes.extend(self.model.iter().cloned());
        if !self.aside.is_empty() {
            let done = if target.carries_others() { "copied as they are" } else { "left out" };
            notes.push(format!("not part of the language model, and {done}: {}", self.aside.join(", ")));
        }
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
