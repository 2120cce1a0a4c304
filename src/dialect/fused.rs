//! Tensors that llama.cpp takes in one piece or in several, whatever the model's class has.

use formats::GgufFile;

use crate::dialect::names::{ExportTensor, Part, Source};

/// Tensors of a block that may be stored as one, one after the other, and the name of that one.
const QKV: ([&str; 3], &str) = (["attn_q", "attn_k", "attn_v"], "attn_qkv");

/// Those of experts, whose matrices take turns.
const GATE_UP: ([&str; 2], &str) = (["ffn_gate_exps", "ffn_up_exps"], "ffn_gate_up_exps");

/// The tensors of a plan as the file has them.
pub(super) fn as_stored(planned: Vec<ExportTensor>, file: &GgufFile) -> Vec<ExportTensor> {
    let mut stored = planned;
    let mut blocks: Vec<String> = stored.iter().filter_map(|tensor| Some(block(&tensor.gguf)?.0.to_owned())).collect();
    blocks.sort_unstable();
    blocks.dedup();
    for at in blocks {
        for kind in ["weight", "bias"] {
            let name = |module: &str| format!("{at}.{module}.{kind}");
            let here = |module: &&str| file.get(&name(module)).is_some();
            let (parts, whole) = QKV;
            if here(&whole) && !parts.iter().any(&here) {
                join(&mut stored, parts.map(name), name(whole));
            } else if !here(&whole) && parts.iter().all(&here) {
                let rows = parts.map(|part| file.get(&name(part)).expect("here").shape[0]);
                split(&mut stored, &name(whole), &parts.map(name), &rows);
            }
            let (parts, whole) = GATE_UP;
            if here(&whole) && !parts.iter().any(&here) {
                join(&mut stored, parts.map(name), name(whole));
            }
        }
    }
    stored
}

/// Puts queries, keys and values of the block `at` of a plan into one tensor.
pub(super) fn join_queries(tensors: &mut Vec<ExportTensor>, at: &str) {
    let name = |module: &str| format!("{at}.{module}.weight");
    join(tensors, QKV.0.map(name), name(QKV.1));
}

/// The block that a tensor belongs to, and its name there.
fn block(name: &str) -> Option<(&str, &str)> {
    let end = name.strip_prefix("blk.")?.find('.')? + "blk.".len();
    Some((&name[..end], &name[end + 1..]))
}

/// Puts one tensor in the place of several, matrix by matrix.
fn join<const N: usize>(tensors: &mut Vec<ExportTensor>, names: [String; N], whole: String) {
    let found: Vec<&ExportTensor> =
        names.iter().filter_map(|name| tensors.iter().find(|tensor| tensor.gguf == *name)).collect();
    let Some(first) = found.first().filter(|_| found.len() == N) else { return };
    let (mut shape, matrices) = (first.shape.clone(), first.matrices());
    let along = shape.len().saturating_sub(2);
    shape[along] = found.iter().map(|tensor| tensor.shape[along]).sum();
    let of = |matrix: usize| {
        found.iter().flat_map(move |tensor| {
            let each = tensor.parts().len() / matrices;
            &tensor.parts()[matrix * each..][..each]
        })
    };
    let parts: Vec<Part> = (0..matrices).flat_map(of).cloned().collect();
    tensors.retain(|tensor| !names.contains(&tensor.gguf));
    tensors.push(ExportTensor { gguf: whole, source: Source::Parts(parts), shape });
}

/// Puts several tensors, of so many rows each, in the place of one that is made of one part.
fn split(tensors: &mut Vec<ExportTensor>, whole: &str, names: &[String], rows: &[usize]) {
    let Some(at) = tensors.iter().position(|tensor| tensor.gguf == whole) else { return };
    let [part] = tensors[at].parts() else { return };
    let all: Vec<usize> = part.rows.clone().unwrap_or_else(|| (0..tensors[at].shape[0]).collect());
    if part.transposed || all.len() != rows.iter().sum::<usize>() {
        return;
    }
    let (part, shape) = (part.clone(), tensors[at].shape.clone());
    tensors.remove(at);
    let mut first = 0;
    for (name, count) in names.iter().zip(rows) {
        let own = Part { rows: Some(all[first..][..*count].to_vec()), ..part.clone() };
        let shape = [&[*count], &shape[1..]].concat();
        tensors.push(ExportTensor { gguf: name.clone(), source: Source::Parts(vec![own]), shape });
        first += count;
    }
}
