//! Which shapes the tensors of what sees or hears have, by the settings of the model and by one another.

use std::collections::{BTreeMap, HashMap};

use formats::container::gguf::MetadataValue;

use super::{Kind, Make, Projector, Said, Tensor};

/// Extents, slowest first; nothing where any is right.
type Extents = Vec<Option<usize>>;

/// Vectors of a block that are as wide as what goes through it.
const NORMS: &[&str] = &[
    "ln1",
    "ln2",
    "ls1",
    "ls2",
    "attn_pre_norm",
    "attn_post_norm",
    "ffn_norm",
    "ffn_norm_1",
    "ffn_post_norm",
    "ffn_post_norm_1",
    "conv_norm",
    "norm_conv",
];

/// Linears whose outputs go to the language model.
const LAST: &[&str] =
    &["mm.2", "mm.model.mlp.3", "mm.model.fc", "mm.down", "mm.a.fc", "mm.a.mlp.2", "mm.a.input_projection"];

/// Linears of which one is given what the other makes.
const CHAINED: &[(&str, &str)] =
    &[("mm.0", "mm.2"), ("mm.1", "mm.2"), ("mm.model.mlp.1", "mm.model.mlp.3"), ("mm.a.mlp.1", "mm.a.mlp.2")];

/// What is known of the widths of a model's tower.
struct Widths<'a> {
    kind: &'a Kind,
    said: &'a Said<'a>,
    /// The tensors, by their names in the file.
    tensors: HashMap<&'a str, &'a Tensor>,
    metadata: &'a [(String, MetadataValue)],
}

/// What to say of tensors whose shapes are not those that the model's settings or its other tensors ask for, by their names in the checkpoint.
pub(super) fn odd(kind: &Kind, said: &Said<'_>, found: &Projector) -> BTreeMap<String, String> {
    let tensors = found.tensors.iter().map(|tensor| (&tensor.gguf[..], tensor)).collect();
    let widths = Widths { kind, said, tensors, metadata: &found.metadata };
    let mut odd = BTreeMap::new();
    for tensor in found.tensors.iter().filter(|_| !kind.flat) {
        let Some(expected) = widths.expected(&tensor.gguf).and_then(|made| stored(tensor, made)) else { continue };
        if !fits(&tensor.stored, &expected) {
            odd.entry(tensor.from.clone()).or_insert_with(|| told(tensor, &expected));
        }
    }
    for tensor in &found.tensors {
        let weight = tensor.gguf.strip_suffix(".bias").and_then(|module| widths.tensor(module, "weight"));
        let Some(weight) = weight.filter(|weight| !odd.contains_key(&weight.from)) else { continue };
        let rows = weight.shape.first().copied().unwrap_or(1);
        if tensor.shape.iter().product::<usize>() != rows {
            let why = || format!("`{}` has {} values, and `{}` {rows} rows", tensor.from, tensor.shape[0], weight.from);
            odd.entry(tensor.from.clone()).or_insert_with(why);
        }
    }
    uneven(found, &mut odd);
    odd
}

/// Tensors of a block whose shape is not that of their like in most blocks.
fn uneven(found: &Projector, odd: &mut BTreeMap<String, String>) {
    let mut alike: BTreeMap<(&str, &str), Vec<&Tensor>> = BTreeMap::new();
    for tensor in &found.tensors {
        let parts = tensor.gguf.split_once(".blk.").and_then(|(sense, rest)| Some((sense, rest.split_once('.')?.1)));
        // Blocks that are numbered within stages differ from stage to stage.
        let Some((sense, tail)) = parts.filter(|(_, tail)| !tail.starts_with(|c: char| c.is_ascii_digit())) else {
            continue;
        };
        alike.entry((sense, tail)).or_default().push(tensor);
    }
    for tensors in alike.values() {
        let shapes: Vec<&[usize]> = tensors.iter().map(|tensor| &tensor.stored[..]).collect();
        let Some(usual) = most(&shapes) else { continue };
        let expected: Extents = usual.iter().map(|extent| Some(*extent)).collect();
        for tensor in tensors.iter().filter(|tensor| tensor.stored != usual) {
            odd.entry(tensor.from.clone()).or_insert_with(|| told(tensor, &expected));
        }
    }
}

/// That of which there are most; of as many the first.
fn most<T: PartialEq + Copy>(all: &[T]) -> Option<T> {
    let count = |one: &T| all.iter().filter(|other| *other == one).count();
    let best = all.iter().map(count).max()?;
    all.iter().find(|one| count(one) == best).copied()
}

fn fits(found: &[usize], expected: &Extents) -> bool {
    found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| b.is_none_or(|b| b == *a))
}

fn told(tensor: &Tensor, expected: &Extents) -> String {
    let extents: Vec<String> = expected.iter().map(|one| one.map_or("any".to_owned(), |one| one.to_string())).collect();
    format!("`{}` has the shape {:?} in place of [{}]", tensor.from, tensor.stored, extents.join(", "))
}

/// The extents of what a tensor of such extents is made of; nothing where that is not told.
fn stored(tensor: &Tensor, made: Extents) -> Option<Extents> {
    Some(match (tensor.make, &made[..]) {
        (Make::Whole | Make::PlusOne | Make::Turned | Make::Sides | Make::Places, _) => made,
        (Make::Rows(_, of), [first, rest @ ..]) => [&[first.map(|rows| rows * of)], rest].concat(),
        (Make::SidesOf(_), [first, rest @ ..]) => [&[first.map(|rows| 3 * rows)], rest].concat(),
        (Make::Frame(_), &[out, channels, height, width]) => vec![out, channels, Some(2), height, width],
        (Make::Pixels, &[out, channels, height, width]) => {
            vec![out, channels.zip(height).zip(width).map(|((channels, height), width)| channels * height * width)]
        }
        (Make::Column, [first, ..]) => vec![*first],
        _ => return None,
    })
}

impl Widths<'_> {
    fn tensor(&self, module: &str, part: &str) -> Option<&Tensor> {
        self.tensors.get(&format!("{module}.{part}")[..]).copied()
    }

    /// A count that the file says of a sense.
    fn count(&self, sense: &str, key: &str) -> Option<usize> {
        let key = format!("clip.{sense}.{key}");
        self.metadata.iter().find_map(|(name, value)| match value {
            MetadataValue::U32(count) if *name == key => Some(*count as usize),
            _ => None,
        })
    }

    /// A count of the tower's part of config.json.
    fn setting(&self, keys: &[&str]) -> Option<usize> {
        self.said.count(keys).ok().map(|count| count as usize)
    }

    /// The extents of a tensor of the file; nothing of one of which nothing is known.
    fn expected(&self, gguf: &str) -> Option<Extents> {
        let (module, part) = gguf.rsplit_once('.').filter(|(_, part)| matches!(*part, "weight" | "bias" | "1"))?;
        if module.starts_with("mm.") {
            return self.of_projector(module, part);
        }
        let (sense, module) = match (module.strip_prefix("v."), module.strip_prefix("a.")) {
            (Some(rest), _) => ("vision", rest),
            (_, Some(rest)) => ("audio", rest),
            _ => return None,
        };
        let wide = self.count(sense, "embedding_length")?;
        if let Some((number, tail)) = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            let block = &gguf[..gguf.find(".blk.")? + 5 + number.len()];
            return self.of_block(sense, block, (tail, part), wide);
        }
        Some(match (module, part) {
            ("post_ln" | "pre_ln" | "norm_embd", _) | ("patch_embd", "bias") => vec![Some(wide)],
            // The second of the two pictures is called so.
            ("patch_embd" | "patch_embd.weight", _) if sense == "vision" => {
                let side = self.setting(&["patch_size"]);
                let channels = ["in_channels", "in_chans", "num_channels"].iter().find_map(|key| self.setting(&[key]));
                vec![Some(wide), Some(channels.unwrap_or(3)), side, side]
            }
            ("position_embd", "weight") => {
                let positions = self.positions();
                match self.tensor(&format!("{}.position_embd", &gguf[..1]), "weight")?.stored.len() {
                    // Each part of a picture's place has its own.
                    3 if self.kind.hears => vec![Some(2), positions, Some(wide)],
                    3 if self.tensors.contains_key("v.class_embd") => {
                        vec![Some(1), positions.map(|positions| positions + 1), Some(wide)]
                    }
                    3 => {
                        let [rows, columns] =
                            ["height", "width"].map(|side| self.setting(&[&format!("init_pos_emb_{side}")]));
                        vec![rows, columns, Some(wide)]
                    }
                    _ => vec![positions, Some(wide)],
                }
            }
            _ => return None,
        })
    }

    /// How many positions a tower has learned, as far as its settings say so.
    fn positions(&self) -> Option<usize> {
        let said = ["num_position_embeddings", "num_patches", "max_source_positions", "position_embedding_size"];
        let patches = || {
            let side = self.setting(&["image_size"])? / self.setting(&["patch_size"])?;
            Some(side * side)
        };
        said.iter().find_map(|key| self.setting(&[key])).or_else(patches)
    }

    /// Of a tensor of a block, which is called `tail` behind its number.
    fn of_block(&self, sense: &str, block: &str, (tail, part): (&str, &str), wide: usize) -> Option<Extents> {
        let heads = || Some(self.setting(&["head_dim"])? * self.setting(super::HEADS)?);
        let heads = match (self.kind.hears && sense == "vision", heads()) {
            (true, said) => said,
            (false, said) => Some(said.filter(|_| !self.kind.hears).unwrap_or(wide)),
        };
        // Where there are fewer of them, which only some classes know.
        let shared = heads.filter(|_| self.said.vision["num_key_value_heads"].is_null());
        let wide = Some(wide);
        let (rows, columns) = match tail {
            "attn_q" => (heads, wide),
            "attn_k" | "attn_v" => (shared, wide),
            "attn_qkv" => (heads.map(|heads| 3 * heads), wide),
            "attn_out" => (wide, heads),
            "ffn_up" | "ffn_gate" => (self.inner(block, ""), wide),
            "ffn_down" => (wide, self.inner(block, "")),
            "ffn_up_1" => (self.inner(block, "_1"), wide),
            "ffn_down_1" => (wide, self.inner(block, "_1")),
            _ if NORMS.contains(&tail) => return Some(vec![wide]),
            _ => return None,
        };
        Some(if part == "bias" { vec![rows] } else { vec![rows, columns] })
    }

    /// The width within a feed-forward layer, by what most of its tensors say.
    fn inner(&self, block: &str, behind: &str) -> Option<usize> {
        let of = |name: &str, part: &str, at: usize| {
            self.tensor(&format!("{block}.ffn_{name}{behind}"), part)?.shape.get(at).copied()
        };
        let said = [of("up", "bias", 0), of("gate", "bias", 0), of("down", "weight", 1), of("gate", "weight", 0)];
        let said: Vec<usize> = said.into_iter().chain([of("up", "weight", 0)]).flatten().collect();
        most(&said)
    }

    /// Of a tensor between the tower and the language model.
    fn of_projector(&self, module: &str, part: &str) -> Option<Extents> {
        let sense = if module.starts_with("mm.a.") { "audio" } else { "vision" };
        let rows = LAST.contains(&module).then(|| self.count(sense, "projection_dim")).flatten();
        let between = |(first, second): (&str, &str)| {
            let said = [(first, "bias", 0), (second, "weight", 1), (first, "weight", 0)];
            let of = |(module, part, at): (&str, &str, usize)| self.tensor(module, part)?.shape.get(at).copied();
            most(&said.into_iter().filter_map(of).collect::<Vec<_>>())
        };
        let there = |module: &str| self.tensor(module, "weight").is_some();
        let mut chained = CHAINED.iter().copied().filter(|(first, second)| there(first) && there(second));
        let chained = chained.find(|(first, second)| *first == module || *second == module);
        let (rows, columns) = match chained {
            Some(both) if both.0 == module => (between(both), None),
            Some(both) => (rows, between(both)),
            None => (Some(rows?), None),
        };
        Some(if part == "bias" { vec![rows] } else { vec![rows, columns] })
    }
}
