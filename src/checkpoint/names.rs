//! Names of tensors that training left behind, put back to those that the model's architecture has and runtimes look for.

use std::path::Path;

use formats::SafetensorsSet;
use serde_json::Value;

use super::Checkpoint;
use crate::error::{Error, Result};
use crate::families;

/// Modules around a module while it is trained or compiled: parts of a name that no architecture has.
const WRAPPERS: &[&str] = &["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];

/// Modules around a whole model, taken off where they stand before every tensor: DistributedDataParallel's and PEFT's.
const AROUND: &[&str] = &["module.", "base_model.model."];

impl Checkpoint {
    /// What was done to the names of the tensors, if anything.
    pub fn renamed(&self) -> Option<&str> {
        self.renamed.as_deref()
    }

    /// [`Checkpoint::open`] of what was just written: fails where a name would have to be rewritten, for runtimes do not.
    pub fn open_strictly(path: &Path) -> Result<Checkpoint> {
        let opened = Self::open(path)?;
        match &opened.renamed {
            None => Ok(opened),
            Some(how) => Err(Error::failed(format!("{}: no runtime would find these tensors: {how}", path.display()))),
        }
    }
}

/// The tensors under the names that the architecture has, and a sentence on what was done for that.
///
/// A file that was saved from inside a training wrapper loses the wrapper's part of its names. A model of a known family that
/// is no part of a larger one has its family's names, whatever stood before them; that of a base class (`LlamaModel`) has them
/// without the prefix too. Transformers and vLLM look for nothing else.
pub(super) fn as_the_architecture_has(
    tensors: SafetensorsSet,
    config: &Value,
    path: &Path,
) -> Result<(SafetensorsSet, Option<String>)> {
    let stored: Vec<String> = tensors.tensors().map(|spec| spec.name.clone()).collect();
    if let Some(name) = stored.iter().find(|name| name.contains(".base_layer.")) {
        return Err(Error::failed(format!(
            "{}: tensor `{name}` is one of a model that PEFT still wraps; save it after merge_and_unload(), or give the base model \
             and its adapter (--adapter)",
            path.display()
        )));
    }
    let bare = without_wrappers(&stored);
    let names = match families::names(config, &bare) {
        Some(usual) => usual.of(&bare),
        None => bare,
    };
    let changed: Vec<(&String, &String)> = stored.iter().zip(&names).filter(|(old, new)| old != new).collect();
    let Some((old, new)) = changed.first() else { return Ok((tensors, None)) };
    let how = format!(
        "{} of {} tensors' names were rewritten to those that the architecture has, such as `{old}` to `{new}`",
        changed.len(),
        stored.len()
    );
    let map: std::collections::HashMap<&str, &str> =
        stored.iter().zip(&names).map(|(old, new)| (old.as_str(), new.as_str())).collect();
    let renamed = tensors.renamed(&|name| map[name].to_owned())?;
    Ok((renamed, Some(how)))
}

/// The names without what training put around the modules.
fn without_wrappers(stored: &[String]) -> Vec<String> {
    let inner = |name: &String| {
        let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
        parts.collect::<Vec<_>>().join(".")
    };
    let mut names: Vec<String> = stored.iter().map(inner).collect();
    while let Some(prefix) = AROUND.iter().find(|prefix| names.iter().all(|name| name.starts_with(*prefix)))
        && !names.is_empty()
    {
        names.iter_mut().for_each(|name| drop(name.drain(..prefix.len())));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bare(names: &[&str]) -> Vec<String> {
        without_wrappers(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn wrappers_come_off_wherever_no_architecture_has_them() {
        assert_eq!(bare(&["module.a.weight", "module.b"]), ["a.weight", "b"]);
        assert_eq!(bare(&["module._orig_mod.base_model.model.a", "module.base_model.model.b"]), ["a", "b"]);
        assert_eq!(bare(&["_orig_mod.a.0._orig_mod.b", "_orig_mod.a.1.b"]), ["a.0.b", "a.1.b"]);
        assert_eq!(bare(&["base_model.model.model.a", "base_model.model.lm_head"]), ["model.a", "lm_head"]);
        assert_eq!(bare(&["a._fsdp_wrapped_module.b", "c"]), ["a.b", "c"]);
        // A module may be called so.
        assert_eq!(bare(&["module.a", "other.b"]), ["module.a", "other.b"]);
        assert_eq!(bare(&["modules.a"]), ["modules.a"]);
        assert_eq!(bare(&[]), Vec::<String>::new());
    }
}
