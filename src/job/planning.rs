//! A run as far as it goes without reading weights: what it decides, what it takes, and what serving its outputs will take.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use calibration::statistics::Needs;
use formats::Encoding;
use formats::codec::scheme_of;
use kernels::Backend;

use super::pace::{Pace, Walk};
use super::planned::{Planned, PlannedFile, PlannedFold, PlannedLinear, PlannedOutput, PlannedPart, Serving, Takes};
use super::remarks::Remarks;
use super::room::{OnDevice, room_of};
use super::{Group, Job, Run, parameters};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::families;
use crate::graph::{Graph, Linear};
use crate::memory::{Device, Free, Tokens};
use crate::output::{Place, Staging, check_space, free_space};
use crate::program::{Producer, Program};
use crate::progress::Progress;
use crate::report::BitsPerWeight;
use crate::serving::{CacheType, Gpu, Held, Runtime, cache_bytes, fits, lint, splits};
use crate::targets::{Output, Target, described};
use crate::verify::Gives;

/// Tokens of a sequence that is served where nobody says how many, if the model takes so many.
const CONTEXT: u64 = 8192;

/// What is asked about serving the outputs.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Tokens of a sequence; what the model takes, up to 8192, where it is not said.
    pub context: Option<u64>,
    /// Sequences at a time.
    pub batch: u64,
    /// The program that is to serve them.
    pub runtime: Option<Runtime>,
    /// The generation of the GPUs.
    pub gpu: Option<Gpu>,
    /// How many of them there are.
    pub tensor_parallel: usize,
    /// Whether the outputs have places, which are then looked at as a run would.
    pub named: bool,
    /// Whether each kind of work is tried for a moment, so that it can be said how long a run takes.
    pub tries: bool,
}

impl Job<'_> {
    /// Decides everything as [`run`](Job::run) does, and says it. Nothing is written, and of the model nothing is read but headers, its
    /// configuration, and the tokenizer for the texts.
    ///
    /// Fails where a run would be refused before its work.
    pub fn plan<B: Backend>(&self, backend: &B, asked: &Asked, progress: &Progress) -> Result<Planned> {
        if asked.named {
            self.check_places()?;
        }
        let source = Checkpoint::open_with(self.model, self.adapter()?)?;
        let graph = families::graph_of(&source)?;
        self.check_limits(&Gives::of(&graph, &source))?;
        let targets = self.targets::<B>(&graph, &source)?;
        for output in self.outputs.iter().filter(|_| asked.named) {
            Staging::check(&output.path, Some(self.model), self.force, output.recipe.gguf.is_some())?;
        }
        if asked.named {
            self.check_projectors(&targets)?;
        }
        let mut run = Run::of(&source, &graph);
        let device = Device::of(backend);
        let (said, groups) = self.prepare((device, progress), &mut run, &targets)?;
        let mut outputs = Vec::new();
        for (index, (output, target)) in self.outputs.iter().zip(&targets).enumerate() {
            let group = groups.iter().find(|group| group.members.contains(&index)).expect("in a group");
            let leader = &*targets[group.members[0]];
            outputs.push(self.planned((&source, &graph), output, (&**target, leader), (&said, group), asked)?);
        }
        let windows = run.held_out.as_ref();
        let windows = windows.map(|text| Tokens::of(text.windows.len(), text.windows.first().map_or(0, Vec::len)));
        let bytes = source.file_bytes()?;
        let written: u64 = outputs.iter().map(|output| output.bytes + output.beside_bytes).sum();
        if asked.named {
            self.check_planned_space(&outputs)?;
        }
        let walk = |group: &Group| Walk {
            targets: group.members.iter().map(|index| &*targets[*index]).collect(),
            tokens: group.samples.as_ref().map(|s| Tokens::of(s.source.sequences, s.source.seq_len)),
            needs: group.members.iter().map(|index| targets[*index].needs()).max().unwrap_or(Needs::Nothing),
        };
        let walks: Vec<Walk<'_, B>> = groups.iter().map(walk).collect();
        let pace = || Pace::new(backend, &graph).run(&walks, windows, bytes + written);
        let seconds = asked.tries.then(pace).transpose()?;
        let host = device.room.is_none();
        let measures = self.verification.is_some();
        let rooms =
            groups.iter().map(|group| room_of(&graph, &OnDevice::of(self, &targets, device, &group.members, measures)));
        Ok(Planned {
            tool: concat!("quantc ", env!("CARGO_PKG_VERSION")).to_owned(),
            device: backend.name(),
            model: self.model.display().to_string(),
            name: source.name(),
            family: graph.family,
            parameters: parameters(&graph),
            bytes,
            tied: graph.head.tied,
            outputs,
            takes: Takes {
                memory: groups.iter().filter_map(|group| group.expected).max().filter(|_| host),
                memory_free: Free::now().filter(|_| host).map(|free| free.bytes),
                gpu_memory: rooms.map(|(bytes, _)| bytes).max().filter(|_| !host),
                gpu_memory_free: device.room,
                disk: written,
                disk_free: self.outputs.first().filter(|_| asked.named).and_then(|output| free_beside(&output.path)),
            },
            seconds,
        })
    }

    /// Fails where the disk has no room for the outputs, as a run does.
    fn check_planned_space(&self, outputs: &[PlannedOutput]) -> Result<()> {
        let mut all: HashMap<PathBuf, u64> = HashMap::new();
        for (output, planned) in self.outputs.iter().zip(outputs) {
            let Some(folder) = folder_of(&output.path) else { continue };
            let bytes = all.entry(folder.clone()).or_default();
            *bytes += planned.bytes + planned.beside_bytes;
            check_space(&folder, &output.path, *bytes)?;
        }
        Ok(())
    }

    fn planned<B: Backend>(
        &self,
        (source, graph): (&Checkpoint, &Graph),
        output: &Output,
        (target, leader): (&dyn Target<B>, &dyn Target<B>),
        (said, group): (&Remarks, &Group),
        asked: &Asked,
    ) -> Result<PlannedOutput> {
        let recipe = &output.recipe;
        let name = match asked.named {
            true => Place::resolve(&output.path)?.name,
            false => output.path.display().to_string(),
        };
        let files: Vec<PlannedFile> =
            target.files(&name)?.into_iter().map(|(name, bytes)| PlannedFile { name, bytes }).collect();
        let bytes = files.iter().map(|file| file.bytes).sum();
        // An index says where tensors are, and holds none.
        let weights: u64 = files.iter().filter(|file| !file.name.ends_with(".json")).map(|file| file.bytes).sum();
        let stored = source.file_bytes()?;
        let [values, packed] = target.quantized(graph);
        let all = parameters(graph) as f64;
        let linears = graph.linears().map(|linear| planned_linear(target, linear));
        let ends = target.ends().into_iter().map(|(name, shape, encoding)| PlannedLinear {
            parts: vec![part(name.clone(), &encoding)],
            name,
            shape,
            fallback: None,
        });
        Ok(PlannedOutput {
            path: asked.named.then(|| output.path.display().to_string()),
            format: recipe.format.clone(),
            scheme: recipe.scheme_name(),
            method: recipe.method.name(),
            files,
            bytes,
            beside_bytes: target.beside(),
            bpw: BitsPerWeight {
                quantized: packed as f64 * 8.0 / values.max(1) as f64,
                file: weights as f64 * 8.0 / all,
                original_file: stored as f64 * 8.0 / all,
            },
            linears: linears.collect(),
            ends: ends.collect(),
            tensors: target.tensors(),
            folds: if leader.recipe().method.smooths() { folds(graph, leader) } else { Vec::new() },
            notes: said.of(target, &group.notes),
            serving: serving(graph, source, target, weights, asked)?,
        })
    }
}

fn part(name: String, encoding: &Encoding) -> PlannedPart {
    let (ty, bits, group_size, symmetric) = described(encoding);
    let scheme = || scheme_of(encoding).map(|scheme| scheme.name()).or(encoding.name().map(str::to_owned));
    let ty = ty.map(str::to_owned).or_else(scheme).unwrap_or_else(|| format!("{bits} bits"));
    PlannedPart { name, ty, bits, group_size, symmetric }
}

fn planned_linear<B: Backend>(target: &dyn Target<B>, linear: &Linear) -> PlannedLinear {
    let placements = target.placements(linear).iter().enumerate();
    let parts = placements.map(|(at, placement)| part(target.called(linear, at), &placement.encoding));
    PlannedLinear {
        name: linear.module.clone(),
        shape: [linear.rows, linear.cols],
        parts: parts.collect(),
        fallback: target.fallback(linear),
    }
}

/// The channel scales that are searched, which the leading target decides.
fn folds<B: Backend>(graph: &Graph, leader: &dyn Target<B>) -> Vec<PlannedFold> {
    let mut all = Vec::new();
    for program in graph.blocks.iter().filter_map(Program::of) {
        for slot in program.slots() {
            // What stays as it is would be rounded after the scaling.
            if slot.readers.iter().any(|linear| leader.placements(linear).is_empty()) {
                continue;
            }
            let producer = match slot.producer {
                Producer::Norm(norm) => norm.weights[0].trim_end_matches(".weight").to_owned(),
                Producer::Linear { linear, .. } if leader.placements(linear).is_empty() => continue,
                Producer::Linear { linear, .. } => linear.module.clone(),
            };
            all.push(PlannedFold {
                producer,
                readers: slot.readers.iter().map(|linear| linear.module.clone()).collect(),
            });
        }
    }
    all
}

/// What serving an output takes.
fn serving<B: Backend>(
    graph: &Graph,
    source: &Checkpoint,
    target: &dyn Target<B>,
    weights: u64,
    asked: &Asked,
) -> Result<Serving> {
    let recipe = target.recipe();
    let gguf = recipe.gguf.is_some();
    let longest = families::longest_context(source.config())?.map(|longest| longest as u64);
    let context = asked.context.unwrap_or_else(|| longest.map_or(CONTEXT, |longest| longest.min(CONTEXT)));
    let batch = asked.batch.max(1);
    let cache = |ty| cache_bytes(graph, context, batch, ty, gguf);
    let mut encodings: HashMap<&str, Vec<Encoding>> = HashMap::new();
    for linear in graph.linears() {
        let held: Vec<Encoding> = target.placements(linear).iter().map(|placement| placement.encoding).collect();
        if !held.is_empty() {
            encodings.insert(&linear.module, held);
        }
    }
    let held = Held { graph, format: &recipe.format, desc_act: recipe.desc_act, encodings };
    let mut findings = asked.runtime.map_or(Vec::new(), |runtime| lint(&held, runtime, asked.gpu));
    // What reads GGUF goes by the architecture in the file.
    let unknown = asked.runtime.filter(|_| !gguf).and_then(|_| families::unknown_outside(source.config()));
    findings.extend(unknown.map(|text| crate::serving::Finding { refused: true, text }));
    let parallel = asked.tensor_parallel.max(1);
    let divides = asked.runtime.filter(|runtime| matches!(runtime, Runtime::Vllm | Runtime::Sglang));
    let splits = divides.map(|runtime| splits(&held, runtime, parallel));
    findings.extend(splits.as_ref().and_then(|splits| splits.finding(parallel)));
    if let (Some(longest), Some(asked)) = (longest, asked.context.filter(|asked| Some(*asked) > longest)) {
        findings.push(crate::serving::Finding {
            refused: false,
            text: format!("the model takes {longest} tokens, and --context says {asked}"),
        });
    }
    Ok(Serving {
        context,
        longest,
        batch,
        cache_16_bit: cache(CacheType::Half),
        cache_8_bit: cache(CacheType::Byte),
        cards: match graph.opaque {
            true => Vec::new(),
            false => fits(graph, weights, [context, longest.unwrap_or(1 << 20)], batch, gguf, parallel),
        },
        runtime: asked.runtime.map(Runtime::name),
        findings,
        tensor_parallel: parallel,
        splits,
    })
}

/// The folder that an output would be written into, or the nearest one around it that there is.
fn folder_of(path: &Path) -> Option<PathBuf> {
    Some(Place::resolve(path).ok()?.parent.ancestors().find(|folder| folder.is_dir())?.to_path_buf())
}

/// Bytes that are free where an output would be written.
fn free_beside(path: &Path) -> Option<u64> {
    free_space(&folder_of(path)?)
}
