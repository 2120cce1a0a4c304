//! Checkpoints of training, whose weights are divided among processes: what they are, and the command that makes a model of them.

use std::path::{Path, PathBuf};

use formats::container::file;

use super::place::names;
use crate::error::Error;

/// What DeepSpeed calls its script, which it puts beside its checkpoints.
const SCRIPT: &str = "zero_to_fp32.py";

/// What to set for weights to be gathered as they are saved.
const GATHER: &str = "stage3_gather_16bit_weights_on_model_save set in DeepSpeed's configuration (zero3_save_16bit_model in Accelerate's)";

/// Where the output of a command is completed.
const REST: &str = "and put config.json and the tokenizer's files into OUT";

/// What is said of a folder that holds weights as training divides them, and no others.
pub(super) fn training(folder: &Path) -> Option<Error> {
    let shown = folder.display();
    if let Some((root, tag)) = deepspeed(folder) {
        return Some(Error::failed(format!(
            "{shown}: a checkpoint of DeepSpeed's training ({tag}), whose weights are divided among processes; make a model of it once: \
             {} {} OUT --safe_serialization, {REST}",
            script(&root),
            quoted(&root)
        )));
    }
    let shards = distributed(folder)?;
    Some(Error::failed(format!(
        "{shown}: a checkpoint of training by torch.distributed.checkpoint, as FSDP saves it ({}), whose weights are divided among processes; \
         make a model of it once: accelerate merge-weights {} OUT, {REST} (where it was not Accelerate that saved it: python -m \
         torch.distributed.checkpoint.format_utils dcp_to_torch {} OUT.pt, a pickle to load with torch and save with safetensors)",
        if shards == folder {
            ".metadata and *.distcp".to_owned()
        } else {
            shards.strip_prefix(folder).unwrap_or(&shards).display().to_string()
        },
        quoted(&shards),
        quoted(&shards)
    )))
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@%,".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// How the script is called for a checkpoint.
fn script(root: &Path) -> String {
    match root.join(SCRIPT).is_file() {
        true => format!("python {}", quoted(&root.join(SCRIPT))),
        false => "python -m deepspeed.utils.zero_to_fp32".to_owned(),
    }
}

/// Whether a folder holds the states of DeepSpeed's processes.
fn holds_states(folder: &Path) -> bool {
    let is_state = |name: &String| name.ends_with("_optim_states.pt") || name.ends_with("_model_states.pt");
    names(folder).is_ok_and(|names| names.iter().any(is_state))
}

/// The folder that DeepSpeed's script is run on, and what it calls the state within: `folder` itself, or the one around it.
fn deepspeed(folder: &Path) -> Option<(PathBuf, String)> {
    if holds_states(folder) {
        let tag = folder.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned();
        let around = folder.parent().filter(|around| !around.as_os_str().is_empty()).unwrap_or(Path::new("."));
        return Some((around.to_owned(), tag));
    }
    let found = names(folder).ok()?.into_iter().filter(|name| folder.join(name).is_dir());
    // It is told in a file which of several is the last.
    let latest = file::read_text(&folder.join("latest"), file::DESCRIPTION).ok().map(|tag| tag.trim().to_owned());
    let mut states = found.filter(|name| name.starts_with("global_step") || holds_states(&folder.join(name)));
    let first = states.next()?;
    Some((folder.to_owned(), latest.filter(|tag| *tag == first || states.any(|state| state == *tag)).unwrap_or(first)))
}

/// The folder with the shards of torch.distributed.checkpoint: this one, or one right in it, of the model rather than of an optimizer.
fn distributed(folder: &Path) -> Option<PathBuf> {
    let holds = |folder: &Path| names(folder).is_ok_and(|names| names.iter().any(|name| name.ends_with(".distcp")));
    if holds(folder) {
        return Some(folder.to_owned());
    }
    let mut found: Vec<String> = names(folder).ok()?.into_iter().filter(|name| holds(&folder.join(name))).collect();
    found.sort_by_key(|name| name.starts_with("optimizer"));
    found.first().map(|name| folder.join(name))
}

/// What to say of `count` tensors of so many, such as `name`, that are empty, in a file in `folder`. Of an adapter the script makes none.
pub(super) fn emptied(file: &Path, name: &str, [count, all]: [usize; 2], is_adapter: bool) -> Error {
    let folder = file.parent().unwrap_or(Path::new(""));
    let told = format!(
        "{}: {count} of {all} tensors, such as `{name}`, are empty (of shape [0]): they were saved while ZeRO-3 of DeepSpeed had them divided \
         among processes",
        file.display()
    );
    Error::failed(match (is_adapter, deepspeed(folder)) {
        (true, _) => format!("{told}; save the adapter again with {GATHER}"),
        (false, Some((root, _))) => format!(
            "{told}; make the model of the checkpoint of training beside them: {} {} OUT --safe_serialization, {REST}",
            script(&root),
            quoted(&root)
        ),
        (false, None) => format!(
            "{told}; save the model again with {GATHER}, or make it of the checkpoint of training: python {SCRIPT} CHECKPOINT OUT \
             --safe_serialization, {REST}"
        ),
    })
}

/// The first of the weights that are empty, where there are any; and how many of all tensors are.
pub(super) fn empty_weights<'n>(
    tensors: impl Iterator<Item = (&'n str, &'n [usize])>,
) -> Option<(&'n str, [usize; 2])> {
    let (mut first, mut counts) = (None, [0, 0]);
    for (name, shape) in tensors {
        counts[1] += 1;
        // Other things than weights may well be empty, as states that a library keeps.
        if shape == [0] && [".weight", ".bias"].iter().any(|part| name.ends_with(part)) {
            counts[0] += 1;
            first = first.or(Some(name));
        }
    }
    first.map(|name| (name, counts))
}
