//! What will become of every tensor, decided and checked before any work is done.

use std::collections::{HashMap, HashSet};

use formats::codec::{ConfigFiles, QuantizedModule, is_expert};
use formats::tensor::is_float;
use formats::{Codec, Dtype, Encoding, Float, TensorSpec};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::families::towers::{TowerLinear, towers};
use crate::families::{self, Absent, Loading, linears::From};
use crate::forward;
use crate::graph::{Block, Collapse, Graph, Linear, Stored};
use crate::recipe::{Patterns, Recipe, Said, Towers};
use crate::report::Fate;
use crate::runtimes::{self, experts};
use crate::serving::unequal;
use crate::stray::{Lookalike, Strays, lookalike};
use crate::weights::StoredType;
use crate::words::listed;

/// The whole plan.
pub struct Plan {
    /// How weights are laid out.
    pub codec: &'static dyn Codec,
    /// How each quantized linear is represented, by module.
    pub encodings: HashMap<String, Encoding>,
    /// The embedding and the head, where the layout holds them, and what is quantized beside the language model.
    pub ends: Vec<End>,
    /// Linears of the blocks that stay as they are.
    pub unquantized: Vec<String>,
    /// Every input tensor, in file order.
    pub fates: Vec<(String, Fate)>,
    /// Stacks of experts of which some are quantized, so that the file holds them one by one.
    unstacked: HashSet<String>,
    /// Every output tensor, in file order.
    pub outputs: Vec<TensorSpec>,
    /// Type of scales in the file.
    pub scale_dtype: Dtype,
    /// Type of tensors that are written but not quantized.
    pub float_dtype: Dtype,
    /// config.json's addition and files beside it.
    pub config: ConfigFiles,
}

/// A matrix outside the blocks that is quantized, without data: the embedding, a head of its own, or a linear of what sees or hears.
pub struct End {
    /// Its place among all tensors of the input.
    pub index: usize,
    /// Its name without `.weight`.
    pub module: String,
    /// The tensor of the input.
    pub tensor: String,
    /// Rows, one for each token, and columns.
    pub shape: [usize; 2],
    /// How it is represented.
    pub encoding: Encoding,
    /// Its rows belong together, as those of a file whose matrices have parts for all rows.
    pub whole: bool,
}

impl Plan {
    /// Decides. Fails when a tensor is missing, misshapen or unexplained, a pattern matches nothing, or the layout cannot
    /// hold what the recipe wants.
    pub fn new(graph: &Graph, source: &Checkpoint, recipe: &Recipe) -> Result<Plan> {
        let codec = formats::codec::codec(&recipe.format).expect("resolved");
        check_tensors(graph, source)?;
        let mut patterns = recipe.patterns()?;
        // To patterns the head, routers and other components' linears are linears, though they are not quantized here.
        let strays = Strays::new(graph, source, recipe.unknown_tensors);
        let mut others = other_linears(graph, source, &strays, codec.goes_by_class())?;
        for module in &others {
            recipe.encoding_of(module, &mut patterns)?;
            patterns.stays(module, true);
        }
        let model_dtype = source.dtype();
        let float_dtype = if matches!(model_dtype, Dtype::F16 | Dtype::BF16) { model_dtype } else { Dtype::F32 };
        let scale_dtype = codec.scale_dtype(model_dtype);
        let precision = match (model_dtype, scale_dtype) {
            // Runtimes may cast scales to the model's type: choose scales that survive that.
            (Dtype::BF16, _) | (_, Dtype::BF16) => Float::BF16,
            (_, Dtype::F32) => Float::F32,
            _ => Float::F16,
        };
        let mut chosen = Chosen::of(graph, recipe, codec, precision, patterns)?;
        let of_towers = chosen.add_towers(graph, source, recipe, codec, precision)?;
        others.retain(|name| !chosen.ends.iter().any(|end| end.module == *name));
        let Named { mut left, loaded, loading, absent } = Named::of(graph, source, codec, &others, &chosen);
        left.extend(runtimes::vllm::called(graph, codec.id()));
        let listed: Vec<QuantizedModule<'_>> = chosen
            .modules
            .iter()
            .zip(&loaded)
            .map(|((name, encoding), loaded)| QuantizedModule {
                name,
                encoding: *encoding,
                desc_act: recipe.desc_act,
                loaded,
            })
            .collect();
        let mut config = codec.config(&listed, &left).map_err(|e| Error::usage(e.to_string()))?;
        config.notes.extend(runtimes::notes(graph, source, &loading, codec.id(), &chosen.encodings)?);
        config.notes.extend(experts::uneven(graph, &chosen.encodings, codec)?);
        config.notes.extend(uneven_fused(graph, &chosen.encodings, codec, recipe.allow_uneven)?);
        config.notes.extend(rounded_inputs(&chosen.encodings));
        config.notes.extend(of_towers);
        // A head that is the embedding has its codes.
        let tied = graph.head.tied && !chosen.ends.is_empty();
        let packed = |module: &str| {
            chosen.modules.iter().any(|(own, _)| own == module) || tied && module == graph.head.linear.module
        };
        config.notes.extend(chosen.patterns.without_effect(packed));
        config.notes.extend(absent.as_ref().map(Absent::note));
        if graph.opaque {
            check_named(&config, &listed, &left, codec)?;
        }

        // Transformers unpacks experts to the type of their scales, and not every class of its multiplies matrices of two types:
        // the scales are chosen as before, for vLLM runs such a model in float16, and written in the model's type.
        let of_experts = graph.opaque && chosen.encodings.keys().any(|module| is_expert(module));
        let scale_dtype = match (of_experts, codec.id()) {
            (true, "compressed-tensors") if float_dtype == Dtype::F32 => {
                config.notes.push(
                    "scales are float32, as the model is: transformers unpacks experts to that type, so load it with dtype=\"auto\"".to_owned(),
                );
                Dtype::F32
            }
            _ => scale_dtype,
        };
        let layout = Layout { codec, scale_dtype, float_dtype };
        let Outputs { fates, outputs, unstacked } = Outputs::of(graph, source, &strays, layout, &mut chosen)?;
        let Chosen { encodings, unquantized, ends, .. } = chosen;
        config.notes.extend(runtimes::unknown_to_mlx(graph, source, codec.id(), &fates));
        config.notes.extend(strays.notes(fates.iter().map(|(name, fate)| (&**name, fate)), true));
        Ok(Plan { codec, encodings, ends, unquantized, fates, unstacked, outputs, scale_dtype, float_dtype, config })
    }
}

/// What the recipe wants of the linears of the blocks and of the ends, as the layout holds it.
struct Chosen {
    /// How each quantized linear of the blocks is represented, by module.
    encodings: HashMap<String, Encoding>,
    /// All modules with codes: linears of the blocks, then the ends.
    modules: Vec<(String, Encoding)>,
    /// Linears of the blocks that stay as they are.
    unquantized: Vec<String>,
    ends: Vec<End>,
    /// Ends that stay as they are in a layout that could hold their codes.
    plain_ends: Vec<String>,
    /// The recipe's, each with what came of it.
    patterns: Patterns,
}

impl Chosen {
    /// Asks the recipe; scales are chosen so that they survive storage in `precision`.
    ///
    /// Fails when a pattern has matched nothing, here or before, no linear is left, or the layout cannot hold what the recipe wants.
    fn of(
        graph: &Graph,
        recipe: &Recipe,
        codec: &dyn Codec,
        precision: Float,
        mut patterns: Patterns,
    ) -> Result<Chosen> {
        let of_head = recipe.encoding_of(&graph.head.linear.module, &mut patterns)?;
        patterns.stays(&graph.head.linear.module, true);
        let mut encodings = HashMap::new();
        let mut modules = Vec::new();
        let mut unquantized = Vec::new();
        let mut refusals = Vec::new();
        let left = runtimes::vllm::whole(graph, codec.id());
        for linear in graph.linears() {
            // What makes the stream of a layer that predicts further tokens has no codes in vLLM and SGLang.
            let whole = graph.joins(linear) || left.contains(&*linear.module);
            let asked = recipe.encoding_of(&linear.module, &mut patterns)?.filter(|_| !whole);
            match asked {
                Some(_) => patterns.taken(),
                None => patterns.stays(&linear.module, false),
            }
            match asked {
                None => unquantized.push(linear.module.clone()),
                Some(encoding) => {
                    let encoding = encoding.stored_in(precision, codec.min_zero());
                    if linear.stored == Stored::Transposed && codec.id() != "gptq" {
                        refusals.push((
                            linear.weight(),
                            "runtimes look for linears, and this is a `Conv1D`; write gptq or gguf".to_owned(),
                        ));
                    } else if let Err(why) = codec.supports(linear.rows, linear.cols, &encoding, recipe.desc_act) {
                        refusals.push((linear.weight(), why));
                    }
                    modules.push((linear.module.clone(), encoding));
                    encodings.insert(linear.module.clone(), encoding);
                }
            }
        }
        let (mut ends, mut plain_ends) = (Vec::new(), Vec::new());
        if codec.holds_ends() && !graph.opaque {
            for (module, shape, asked) in ends_of(graph, recipe, of_head, &mut patterns)? {
                let Some(encoding) = asked else {
                    plain_ends.push(module);
                    continue;
                };
                let encoding = encoding.stored_in(precision, codec.min_zero());
                let tensor = format!("{module}.weight");
                if let Err(why) = codec.supports(shape[0], shape[1], &encoding, recipe.desc_act) {
                    refusals.push((tensor.clone(), why));
                }
                ends.push(End { index: 0, module, tensor, shape, encoding, whole: false });
            }
        }
        patterns.check_hits()?;
        if modules.is_empty() {
            return Err(Error::usage("the recipe leaves no linear to quantize"));
        }
        modules.extend(ends.iter().map(|end| (end.module.clone(), end.encoding)));
        if let Some((tensor, why)) = refusals.first() {
            let others = match refusals.len() {
                1 => String::new(),
                n => format!(" (and {} more tensors)", n - 1),
            };
            return Err(Error::usage(format!("tensor `{tensor}`{others}: {} cannot hold it: {why}", codec.id())));
        }
        Ok(Chosen { encodings, modules, unquantized, ends, plain_ends, patterns })
    }

    /// Adds the linears of what sees or hears, where the recipe wants them quantized. Returns what there is to say of it.
    fn add_towers(
        &mut self,
        graph: &Graph,
        source: &Checkpoint,
        recipe: &Recipe,
        codec: &dyn Codec,
        precision: Float,
    ) -> Result<Vec<String>> {
        if recipe.towers == Towers::Keep {
            return Ok(Vec::new());
        }
        // That each pattern matches something is checked with the language model's.
        let mut patterns = recipe.patterns()?;
        let (mut parts, mut refused) = (Vec::new(), Vec::new());
        let before = self.ends.len();
        for TowerLinear { module, shape } in towers(graph, source) {
            let Some(encoding) = recipe.encoding_of(&module, &mut patterns)? else { continue };
            let encoding = encoding.stored_in(precision, codec.min_zero());
            if let Err(why) = codec.supports(shape[0], shape[1], &encoding, recipe.desc_act) {
                refused.push(format!("{module}: {why}"));
                continue;
            }
            let part = families::component(&module).trim_end_matches('.').to_owned();
            if !parts.contains(&part) {
                parts.push(part);
            }
            self.modules.push((module.clone(), encoding));
            let tensor = format!("{module}.weight");
            self.ends.push(End { index: 0, module, tensor, shape, encoding, whole: true });
        }
        let parts: Vec<&str> = parts.iter().map(|part| &**part).collect();
        let mut notes = Vec::new();
        let packed = |end: &End| {
            let layout = codec.layout(end.shape[0], end.shape[1], &end.encoding, Dtype::F32);
            layout.iter().all(|(part, ..)| *part != "weight")
        };
        if self.ends[before..].iter().any(packed) {
            notes.extend(runtimes::of_towers(source.config()));
        }
        notes.push(match self.ends.len() - before {
            0 => {
                "towers has no effect: no linears were found beside the language model that can be quantized".to_owned()
            }
            found => format!(
                "{found} linears of {} are rounded without data, for nothing is known of their inputs",
                listed(&parts)
            ),
        });
        if let Some(first) = refused.first() {
            notes.push(format!("{} linears beside the language model stay as they are, as {first}", refused.len()));
        }
        Ok(notes)
    }
}

/// The names by which a configuration says what has codes and what has none.
struct Named {
    /// Linears that stay as they are, and other components as a whole, whose names end in a dot.
    left: Vec<String>,
    /// For each module with codes what it is called once transformers has loaded it, where that differs.
    loaded: Vec<Vec<String>>,
    /// How transformers renames what it loads, where that differs.
    loading: Loading,
    /// What the model's class has and the files lack; named among what is left, for runtimes that look for codes of every linear.
    absent: Option<Absent>,
}

impl Named {
    /// `others` are the linears outside the blocks and ends.
    fn of(graph: &Graph, source: &Checkpoint, codec: &dyn Codec, others: &[String], chosen: &Chosen) -> Named {
        let Chosen { modules, unquantized, ends, plain_ends, .. } = chosen;
        // Other components as a whole, for runtimes call what is in them otherwise than files do.
        // What is left in one of which some has codes is named by itself.
        let whole = |prefix: &String| !modules.iter().any(|(own, _)| own.starts_with(&prefix[..]));
        let components: Vec<String> =
            graph.aside.iter().map(|(prefix, _)| prefix).filter(|p| p.ends_with('.') && whole(p)).cloned().collect();
        let aside = |name: &String| components.iter().any(|prefix| name.starts_with(prefix));
        // AWQ leaves out whatever has a name in its own: `fc` would take `c_fc` along.
        let hides = |name: &String| codec.id() == "awq" && modules.iter().any(|(own, _)| own.contains(&**name));
        let alone = others.iter().filter(|name| !aside(name)).filter(|name| graph.opaque || !hides(name));
        let mut left: Vec<String> = unquantized.iter().chain(alone).chain(&components).cloned().collect();
        left.extend(plain_ends.iter().cloned());
        let packed = ends.iter().any(|end| end.module == graph.head.linear.module);
        if !graph.head.tied && !packed && !left.contains(&graph.head.linear.module) {
            left.push(graph.head.linear.module.clone());
        }
        let loading = Loading::of(source.config());
        let loaded: Vec<Vec<String>> = modules.iter().map(|(name, _)| loading.names(name)).collect();
        let packed: Vec<&String> = modules.iter().map(|(name, _)| name).chain(loaded.iter().flatten()).collect();
        let alone = left
            .iter()
            .filter(|name| !name.ends_with('.'))
            .flat_map(|name| loading.names(name))
            .filter(|name| graph.opaque || !hides(name));
        let inside = others.iter().filter(|name| aside(name)).flat_map(|name| loading.names(name));
        let inside = inside.filter_map(|name| as_component(name, &components, &packed));
        let mut known: HashSet<String> = packed.iter().copied().chain(&left).cloned().collect();
        let more: Vec<String> = alone.chain(inside).filter(|name| known.insert(name.clone())).collect();
        left.extend(more);
        let mut absent = families::absent(source, &packed);
        if let Some(Absent { from: From::Parts(modules), .. }) = &mut absent {
            let told = |name: &String| left.contains(name) || hides(&name.trim_end_matches('.').to_owned());
            modules.retain(|name| codec.goes_by_class() && !told(name));
            left.extend(modules.iter().cloned());
            absent = absent.filter(|absent| absent.from != From::Parts(Vec::new()));
        }
        Named { left, loaded, loading, absent }
    }
}

/// How tensors are laid out in the file.
#[derive(Clone, Copy)]
struct Layout<'c> {
    codec: &'c dyn Codec,
    /// Type of scales.
    scale_dtype: Dtype,
    /// Type of tensors that are written but not quantized.
    float_dtype: Dtype,
}

impl Layout<'_> {
    /// The tensors of a matrix with codes: codes, scales and whatever else the layout has.
    fn packed(self, module: &str, [rows, cols]: [usize; 2], encoding: &Encoding) -> Vec<TensorSpec> {
        let parts = self.codec.layout(rows, cols, encoding, self.scale_dtype).into_iter();
        parts.map(|(part, dtype, shape)| TensorSpec { name: format!("{module}.{part}"), dtype, shape }).collect()
    }

    /// The tensors of a linear's weight out of a stack, of codes or, without an encoding, as it is.
    fn weight(self, linear: &Linear, encoding: Option<&Encoding>) -> Vec<TensorSpec> {
        let Linear { module, rows, cols, .. } = linear;
        match encoding {
            Some(encoding) => self.packed(module, [*rows, *cols], encoding),
            None => vec![TensorSpec {
                name: format!("{module}.weight"),
                dtype: self.float_dtype,
                shape: vec![*rows, *cols],
            }],
        }
    }

    /// The tensor of a linear's bias out of a stack.
    fn bias(self, linear: &Linear) -> TensorSpec {
        TensorSpec { name: format!("{}.bias", linear.module), dtype: self.float_dtype, shape: vec![linear.rows] }
    }
}

/// What becomes of each tensor of the input, and the tensors that are written; see the fields of [`Plan`].
struct Outputs {
    fates: Vec<(String, Fate)>,
    outputs: Vec<TensorSpec>,
    unstacked: HashSet<String>,
}

impl Outputs {
    /// Goes through the input in file order, and notes where in it the ends are. Fails when a tensor is unexplained.
    fn of(
        graph: &Graph,
        source: &Checkpoint,
        strays: &Strays<'_>,
        layout: Layout<'_>,
        chosen: &mut Chosen,
    ) -> Result<Outputs> {
        let Chosen { encodings, ends, .. } = chosen;
        // The linears of every tensor: one, or the experts that are stacked in it.
        let mut stored: HashMap<String, Vec<&Linear>> = HashMap::new();
        for linear in graph.linears() {
            for (name, _) in linear.tensors() {
                stored.entry(name).or_default().push(linear);
            }
        }
        let known: HashSet<String> = graph.tensors().into_iter().map(|(name, _)| name).collect();
        let (mut fates, mut outputs, mut unstacked) = (Vec::new(), Vec::new(), HashSet::new());
        for entry in source.entries() {
            let readers = stored.get(&entry.name).map_or(&[][..], |readers| readers);
            let is_weight = readers.first().is_some_and(|linear| linear.weight() == entry.name);
            let stacked = matches!(readers.first(), Some(Linear { stored: Stored::Slice { .. }, .. }));
            // Beside packed linears transformers has Llama 4's experts one by one, and finds none in a stack; others it takes from either.
            let by_stack = matches!(
                graph.family,
                "qwen3_vl_moe"
                    | "gpt_oss"
                    | "granitemoe"
                    | "granitemoeshared"
                    | "granitemoehybrid"
                    | "mistral4"
                    | "mistral_large4"
            );
            let apart = stacked && layout.codec.id() == "compressed-tensors" && !by_stack;
            let planned = |linear: &&Linear| apart || encodings.contains_key(&linear.module);
            let fate = if let Some(end) = ends.iter_mut().find(|end| end.tensor == entry.name) {
                end.index = fates.len();
                outputs.extend(layout.packed(&end.module, end.shape, &end.encoding));
                Fate::Quantized
            } else if readers.iter().any(planned) && (is_weight || stacked) {
                for linear in readers {
                    match is_weight {
                        true => outputs.extend(layout.weight(linear, encodings.get(&linear.module))),
                        false => outputs.push(layout.bias(linear)),
                    }
                }
                if stacked {
                    unstacked.insert(entry.name.clone());
                }
                Fate::Quantized
            } else if known.contains(&entry.name) {
                outputs.push(TensorSpec {
                    name: entry.name.clone(),
                    dtype: copied_dtype(entry.dtype, layout.float_dtype),
                    shape: entry.shape.clone(),
                });
                Fate::Copied
            } else {
                let fate = strays.fate(&entry.name)?;
                if let Fate::Aside(_) = fate {
                    let dtype = match entry.dtype {
                        StoredType::Plain(dtype) => dtype,
                        _ => layout.float_dtype,
                    };
                    outputs.push(TensorSpec { name: entry.name.clone(), dtype, shape: entry.shape.clone() });
                }
                fate
            };
            fates.push((entry.name.clone(), fate));
        }
        Ok(Outputs { fates, outputs, unstacked })
    }
}

/// Module and extents of what stands at an end, and how it is to be represented; `None` where it stays as it is.
type AskedEnd = (String, [usize; 2], Option<Encoding>);

/// The embedding, and a head with a tensor of its own.
///
/// An embedding that serves as the head is what is said of either, of the embedding first.
fn ends_of(
    graph: &Graph,
    recipe: &Recipe,
    of_head: Option<Encoding>,
    patterns: &mut Patterns,
) -> Result<Vec<AskedEnd>> {
    let mut ends = Vec::new();
    if let Some(module) = graph.embedding.tensor.strip_suffix(".weight") {
        let of_both = graph.head.tied && !graph.head.missing;
        let asked = match recipe.said_of(module, patterns) {
            Said::Nothing if of_both => of_head,
            _ => recipe.encoding_of(module, patterns)?,
        };
        if asked.is_some() {
            patterns.taken();
        }
        ends.push((module.to_owned(), [graph.vocabulary, graph.hidden], asked));
    }
    let head = &graph.head.linear;
    if !graph.head.tied && head.stored == Stored::Plain {
        ends.push((head.module.clone(), [head.rows, head.cols], of_head));
    }
    Ok(ends)
}

/// What to say where runtimes round what linears read.
fn rounded_inputs(encodings: &HashMap<String, Encoding>) -> Option<String> {
    let mut names: Vec<&str> =
        encodings.values().filter(|e| e.activation.is_some()).map(|e| e.name().unwrap_or("this scheme")).collect();
    names.sort_unstable();
    names.dedup();
    (!names.is_empty()).then(|| {
        format!(
            "runtimes round the inputs of linears in {} to 8 bits, token by token, and so does the measurement (quantc eval --activations \
             exact leaves it out)",
            names.join(" and ")
        )
    })
}

/// What to say where linears that vLLM and SGLang load as one matrix are not held alike; of experts it is said elsewhere.
///
/// Fails, naming them, unless that is `allowed`.
fn uneven_fused(
    graph: &Graph,
    encodings: &HashMap<String, Encoding>,
    codec: &dyn Codec,
    allowed: bool,
) -> Result<Option<String>> {
    let of = |linear: &Linear| {
        let encoding = encodings.get(&linear.module).filter(|_| !is_expert(&linear.module));
        encoding.copied().into_iter().collect()
    };
    let Some((group, count)) = unequal(graph, of).filter(|_| codec.id() != "mlx") else {
        return Ok(None);
    };
    let modules = listed(&group.iter().map(|linear| &*linear.module).collect::<Vec<_>>());
    let more = if count > 1 { format!(", as {} more such groups do", count - 1) } else { String::new() };
    let told = format!("{modules} have several schemes{more}: vLLM and SGLang load them as one matrix and refuse that");
    if allowed {
        return Ok(Some(format!("{told}; transformers does not")));
    }
    Err(Error::usage(format!(
        "{told}; give them one scheme, leave all of them out with --ignore, or give --allow-uneven for a file for transformers alone"
    )))
}

/// Fails unless the configuration, as it will be read, says of every linear whether it has codes.
fn check_named(
    config: &ConfigFiles,
    quantized: &[QuantizedModule<'_>],
    left: &[String],
    codec: &dyn Codec,
) -> Result<()> {
    let reader = formats::codec::read_quantization(&config.of(codec))?.expect("it is there");
    for module in quantized {
        let mut hidden = false;
        for name in module.loaded {
            hidden |= reader.declared(name)?.is_none();
        }
        if hidden || reader.declared(module.name)?.map(|declared| declared.encoding) != Some(module.encoding.told()) {
            return Err(Error::usage(format!(
                "{} leaves linears out by their names, and could not but leave out `{}` as well, which is quantized; give --ignore \
                 for it, or write another --format",
                codec.id(),
                module.name
            )));
        }
    }
    for name in left.iter().filter(|name| !name.ends_with('.')) {
        // The head has a setting of its own in GPTQ and AWQ.
        if reader.declared(name)?.is_some() && !name.ends_with("lm_head") {
            return Err(Error::failed(format!("the configuration of {} would not leave out `{name}`", codec.id())));
        }
    }
    Ok(())
}

/// What leaves out a linear of another component that transformers knows by this name: nothing more where the components' names do; its
/// component as a whole where nothing `packed` is in that, for layers in it may be called as the language model's are; else the name.
fn as_component(name: String, components: &[String], packed: &[&String]) -> Option<String> {
    let is_in = |part: &String| name.starts_with(&part[..]) || name.contains(&format!(".{part}"));
    if components.iter().any(is_in) {
        return None;
    }
    let part = crate::families::component(&name);
    let alone = part.ends_with('.') && part != "model." && !packed.iter().any(|packed| packed.starts_with(&part));
    Some(if alone { part } else { name })
}

/// Linears that are never quantized: routers, what looks like one in other components of the model and among tensors that go
/// over though no rule names them, and in a model that is not known all that may be one. Heads without a tensor are among them
/// where a layout goes by `classes` of modules.
pub fn other_linears(graph: &Graph, source: &Checkpoint, strays: &Strays<'_>, classes: bool) -> Result<Vec<String>> {
    if graph.opaque {
        return Ok(crate::families::plain_modules(graph, source, classes));
    }
    let routers = graph.blocks.iter().flat_map(Block::fixed);
    let routers = routers.chain(graph.collapse.iter().flat_map(Collapse::linears));
    let aside = source
        .entries()
        .iter()
        .filter(|entry| entry.shape.len() == 2 && graph.aside.iter().any(|(prefix, _)| entry.name.starts_with(prefix)));
    let mut copied = Vec::new();
    for entry in strays.entries().filter(|entry| entry.shape.len() == 2) {
        if let Fate::Aside(_) = strays.fate(&entry.name)? {
            copied.push(entry);
        }
    }
    let aside = aside.chain(copied).filter_map(|entry| entry.name.strip_suffix(".weight").map(str::to_owned));
    // One of which every block has its rows is named once.
    let mut seen = HashSet::new();
    let all = routers.map(|linear| linear.module.clone()).chain(aside);
    Ok(all.filter(|module| seen.insert(module.clone())).collect())
}

impl Plan {
    /// Whether a linear that stays as it is leaves its stack, because others of the stack are quantized or a runtime wants it so.
    pub fn unstacked(&self, linear: &Linear) -> bool {
        matches!(linear.stored, Stored::Slice { .. }) && self.unstacked.contains(&linear.weight())
    }
}

/// The type that a tensor of the model which is not quantized is written in.
fn copied_dtype(stored: StoredType, float_dtype: Dtype) -> Dtype {
    match stored {
        StoredType::Plain(Dtype::F64 | Dtype::F8_E4M3 | Dtype::F8_E5M2) | StoredType::Foreign => float_dtype,
        StoredType::Plain(dtype) => dtype,
        _ => float_dtype,
    }
}

/// Fails unless every tensor that the model needs is there, in its shape and in a type that can be read, and tables name experts that are there.
pub fn check_tensors(graph: &Graph, source: &Checkpoint) -> Result<()> {
    let place = source.path().display();
    let tables: HashSet<&str> = graph.tables().collect();
    for (name, shape) in graph.tensors() {
        let Some(entry) = source.entry(&name) else { return Err(missing(graph, source, &name, &shape)) };
        if entry.shape != shape {
            let (says, take) = match (source.gguf().is_some(), entry.dtype) {
                (true, _) => ("the metadata", "download the file again"),
                (_, StoredType::Quantized { .. }) => (
                    "config.json",
                    "take the config.json that was published with these weights: how wide codes are stands in its quantization_config, and \
                     the shape follows from that, too",
                ),
                _ => (
                    "config.json",
                    "take the config.json that was published with these weights, or set its sizes (as vocab_size, hidden_size, \
                     intermediate_size, num_attention_heads, num_key_value_heads, head_dim) to what the tensors have",
                ),
            };
            return Err(Error::failed(format!(
                "{place}: tensor `{name}` has shape {:?}, and by {says} it would be {shape:?}; {take}",
                entry.shape
            )));
        }
        let StoredType::Plain(dtype) = entry.dtype else { continue };
        if tables.contains(&name[..]) {
            if !matches!(dtype, Dtype::I64 | Dtype::I32) {
                return Err(Error::failed(format!(
                    "{place}: tensor `{name}` is of type {dtype}, and numbers of experts are I64 or I32"
                )));
            }
            continue;
        }
        if !is_float(dtype) {
            return Err(Error::failed(format!(
                "{place}: tensor `{name}` is of type {dtype}, and weights are F64, F32, F16, BF16, F8_E4M3 or F8_E5M2"
            )));
        }
        if matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2) {
            let module = name.strip_suffix(".weight").unwrap_or(&name);
            let scales = [
                format!("{name}_scale"),
                format!("{name}_scale_inv"),
                format!("{module}.scale"),
                format!("{module}.scale_weight"),
            ];
            if let Some(scale) = scales.iter().find(|scale| source.entry(scale).is_some()) {
                return Err(Error::failed(format!(
                    "{place}: tensor `{name}` is of type {dtype} and has scales in `{scale}`, and config.json lacks the \
                     quantization_config that says how they are meant; take the config.json that was published with these weights"
                )));
            }
        }
    }
    graph.routers().try_for_each(|router| forward::table(source, router).map(drop))
}

/// What to say of a tensor that is missing: where it should be, and what it may be called instead.
fn missing(graph: &Graph, source: &Checkpoint, name: &str, shape: &[usize]) -> Error {
    if source.gguf().is_some() {
        let planned = crate::dialect::names::plan(graph).map(|plan| plan.tensors).unwrap_or_default();
        let own = planned.into_iter().find(|tensor| tensor.parts().iter().any(|part| part.from.tensor() == name));
        let (name, shape) = own.map_or((name.to_owned(), shape.to_vec()), |own| (own.gguf, own.shape));
        // Experts one by one are of files that llama.cpp wrote before April 2024.
        let old = source.gguf().is_some_and(|file| file.get("blk.0.ffn_gate.0.weight").is_some());
        let what = if old {
            "make the file anew from the original model, for this is an old kind of mixture"
        } else {
            "download the file again"
        };
        return Error::failed(format!(
            "{}: tensor `{name}` is missing; its shape would be {shape:?}; {what}",
            source.path().display()
        ));
    }
    let mut text = format!("{}: tensor `{name}` is missing; its shape would be {shape:?}", source.path().display());
    let loaded = families::Loading::of(source.config()).in_memory(name);
    if let Some(loaded) = loaded.iter().find(|loaded| source.entry(loaded).is_some()) {
        text += &format!(
            "; the file has it in `{loaded}`, as transformers' class calls it in memory, and no runtime's files do: load the model with transformers \
             and save it with save_pretrained(), without save_original_format=False"
        );
    } else if let Some((shard, index)) = source.promised(name) {
        let index = index.file_name().unwrap_or_default().to_string_lossy();
        text += &format!("; {index} places it in {shard}, which does not hold it");
    } else if let Some(Lookalike { name: other, same_shape }) = lookalike(graph, source, name, shape) {
        let family = graph.family;
        text += &match same_shape {
            true => format!(
                "; `{other}` has that shape and is not part of a {family} model: if it is the same under another name, rename it or mend \
                 config.json"
            ),
            false => format!(
                "; in its place the file has `{other}`, which is not part of a {family} model as runtimes read it: load the model with what \
                 wrote it and save it with transformers' save_pretrained(), or take the config.json that belongs to the weights"
            ),
        };
    } else if name == graph.head.linear.weight() {
        text += "; get the file that holds it, or set tie_word_embeddings to true in config.json (where it is false, null or \
                 not there) if the embedding serves as the head, and where there is none name the class without it in \
                 `architectures`";
    } else {
        text += "; download the weights again, or take the config.json that belongs to them";
    }
    Error::failed(text)
}
