//! The command line's words.

use std::path::{Path, PathBuf};

use clap::{ArgAction, ArgMatches, Args, FromArgMatches, Parser, Subcommand};

use crate::api::{self, Evaluate, Job, Math, Serve};
use crate::build::Project;
use crate::error::{Error, Result};
use crate::output::check_beside;
use crate::recipe::Request;
use crate::recipe::headings::{COMPUTATION, OUTPUT, PIPELINE, VERIFICATION};
use crate::report::gates;

/// Quantizes language models for the runtimes that serve them, and proves that they are still themselves.
#[derive(Debug, Parser)]
#[command(name = "quantc", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Quantize the built-in model with every method, verify each, and print a table.
    #[command(after_help = "Examples:\n  quantc demo\n  quantc demo --export model")]
    Demo(Demo),
    /// Quantize a checkpoint, reopen the result, and measure it against the original.
    #[command(
        after_help = "Examples:\n  quantc quantize MODEL -o OUT                  W4A16 for vLLM, calibrated with GPTQ and measured\n  quantc quantize MODEL -o m.gguf --scheme Q4_K_M   a GGUF file for llama.cpp and Ollama"
    )]
    Quantize(Box<Quantize>),
    /// Say what quantize would do, without doing it: what becomes of every tensor, sizes, memory, time, and whether the result can be
    /// served. Reads no weights.
    Plan(Box<Plan>),
    /// Measure perplexity, and divergence from a reference.
    #[command(
        after_help = "Examples:\n  quantc eval OUT --reference MODEL\n  quantc eval A B C --reference MODEL --max-kld 0.05"
    )]
    Eval(Box<Eval>),
    /// Compare schemes: quantize a model by each, measure what was written beside the original, and report it all.
    #[command(
        after_help = "Examples:\n  quantc compare MODEL --scheme W4A16 --scheme Q4_K_M --report DIR\n  quantc compare MODEL --scheme W4A16 --also OTHER --tasks questions.jsonl --report DIR"
    )]
    Compare(Box<Compare>),
    /// Show what is in a checkpoint.
    #[command(after_help = "Examples:\n  quantc inspect MODEL\n  quantc inspect m.gguf --json")]
    Inspect(Inspect),
    /// Make what a project (quantc.toml) names and is out of date, and nothing else.
    Build(Build),
    /// Find out whether a checkpoint is whole: hashes, tensors, configuration, tokenizer.
    Check(Check),
    /// Say what differs between two checkpoints, in whatever formats they are.
    Diff(Diff),
    /// Rewrite any readable checkpoint as plain safetensors.
    #[command(after_help = "Examples:\n  quantc convert m.gguf -o OUT --dtype bf16")]
    Convert(Convert),
    /// Write a checkpoint merged with a LoRA adapter.
    #[command(after_help = "Examples:\n  quantc merge MODEL --adapter ADAPTER -o OUT")]
    Merge(Merge),
    /// Push a finished output to the Hugging Face hub.
    #[command(after_help = "Examples:\n  quantc push OUT ORG/NAME\n  quantc push m-Q4_K_M.gguf ORG/NAME --private")]
    Push(Push),
    /// Remove what interrupted runs have left in a folder.
    #[command(after_help = "Examples:\n  quantc clean FOLDER --list\n  quantc clean FOLDER")]
    Clean(Clean),
    /// Print what makes a shell complete the program's words.
    Completions(Completions),
    /// Write manual pages.
    Man(Man),
    /// List the devices that can compute: the CPU, and NVIDIA GPUs with their memory.
    #[command(after_help = "Examples:\n  quantc devices --json")]
    Devices(Devices),
}

impl Command {
    /// Where the command writes a log, if it does.
    pub fn log(&self) -> Option<&Path> {
        let compute = match self {
            Command::Quantize(args) => &args.compute,
            Command::Plan(args) => &args.run.compute,
            Command::Eval(args) => &args.compute,
            Command::Compare(args) => &args.compute,
            Command::Build(args) => &args.compute,
            Command::Demo(args) => &args.compute,
            _ => return None,
        };
        compute.log.as_deref()
    }

    /// What the command writes, as far as its words and its recipe say.
    pub fn outputs(&self) -> Vec<PathBuf> {
        match self {
            Command::Quantize(args) => {
                let recipe = args.recipe.as_deref().and_then(|recipe| Request::read(recipe).ok());
                let tables = recipe.into_iter().flat_map(|recipe| recipe.target).filter_map(|table| table.path);
                let flags = args.target.iter().filter_map(|text| Some(PathBuf::from(text.split_once('=')?.1)));
                args.output.iter().cloned().chain(flags).chain(tables).collect()
            }
            Command::Convert(args) => vec![args.output.clone()],
            Command::Merge(args) => vec![args.output.clone()],
            Command::Demo(args) => args.export.iter().cloned().collect(),
            Command::Build(args) => {
                let project = Project::read(&args.project);
                project.into_iter().flat_map(|project| project.outputs).map(|output| output.path).collect()
            }
            Command::Plan(_)
            | Command::Eval(_)
            | Command::Compare(_)
            | Command::Inspect(_)
            | Command::Check(_)
            | Command::Diff(_)
            | Command::Push(_)
            | Command::Clean(_)
            | Command::Completions(_)
            | Command::Man(_)
            | Command::Devices(_) => Vec::new(),
        }
    }

    /// The model that the command reads, if it reads one.
    pub fn subject(&self) -> Option<&Path> {
        match self {
            Command::Quantize(args) => Some(&args.model),
            Command::Plan(args) => Some(&args.run.model),
            Command::Convert(args) => Some(&args.input),
            Command::Merge(args) => Some(&args.model),
            Command::Eval(args) => args.models.first().map(PathBuf::as_path),
            Command::Compare(args) => Some(&args.model),
            Command::Inspect(args) => Some(&args.path),
            Command::Check(args) => Some(&args.path),
            Command::Diff(args) => Some(&args.a),
            Command::Demo(_)
            | Command::Build(_)
            | Command::Push(_)
            | Command::Clean(_)
            | Command::Completions(_)
            | Command::Man(_)
            | Command::Devices(_) => None,
        }
    }
}

/// Flags that every command that computes has.
#[derive(Clone, Debug, Args)]
pub struct Compute {
    /// Number of threads. All cores by default; results do not depend on it.
    #[arg(long, help_heading = COMPUTATION, value_name = "N")]
    pub threads: Option<usize>,
    /// Where to compute: cpu, cuda, cuda:N for GPU number N, or auto for a GPU if one can be used.
    #[arg(long, help_heading = COMPUTATION, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Memory of the GPU to use, as 8GiB or 500MB; most of what is free by default. What does not fit waits in the host's.
    #[arg(long, help_heading = COMPUTATION, value_name = "SIZE")]
    pub gpu_memory: Option<String>,
    /// Type in which calibration multiplies: f32, or auto for bfloat16 on CPUs where that is faster. Measuring is always in f32.
    #[arg(long, help_heading = COMPUTATION, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "f32"])]
    pub math: String,
    /// GPU: wait for each operation, and print where the time went at the end.
    #[arg(long, help_heading = COMPUTATION)]
    pub profile: bool,
    /// Write a log here: decisions, stages, every linear and window, timings, each with its time and level. A log that is there is
    /// continued.
    #[arg(long, help_heading = COMPUTATION, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Print errors only: no progress and no summary.
    #[arg(long, help_heading = COMPUTATION, short)]
    pub quiet: bool,
    /// On a terminal every note, and a line for each linear.
    #[arg(long, help_heading = COMPUTATION, short, conflicts_with = "quiet")]
    pub verbose: bool,
}

impl Compute {
    /// The same as data.
    ///
    /// Fails for a device that is not known.
    pub fn data(&self) -> Result<api::Compute> {
        let mut data = api::Compute::on(self.device.parse()?);
        (data.threads, data.gpu_memory, data.profile) = (self.threads, self.gpu_memory.clone(), self.profile);
        data.math = if self.math == "f32" { Math::F32 } else { Math::Auto };
        Ok(data)
    }
}

/// `quantc clean`.
#[derive(Debug, Args)]
pub struct Clean {
    /// The folder that outputs were to be written into.
    pub folder: PathBuf,
    /// List it, with sizes, and remove nothing.
    #[arg(long)]
    pub list: bool,
}

/// `quantc completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// `quantc man`.
#[derive(Debug, Args)]
pub struct Man {
    /// The folder to write them into, which exists; one page for the program and one for each command.
    pub folder: PathBuf,
}

/// `quantc devices`.
#[derive(Debug, Args)]
pub struct Devices {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `quantc demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Write the built-in model to this directory as a Hugging Face checkpoint, and do nothing else.
    #[arg(long, value_name = "DIR")]
    pub export: Option<PathBuf>,
    /// Flags for the computation.
    #[command(flatten)]
    pub compute: Compute,
}

/// Limits on the quality, beside a reference.
#[derive(Clone, Debug, Args)]
pub struct Bounds {
    /// Exit with code 3 if the perplexity is more than R times the original's.
    #[arg(long, help_heading = VERIFICATION, value_name = "R")]
    pub max_ppl_ratio: Option<f64>,
    /// Exit with code 3 if the mean KL divergence from the original is above K nats.
    #[arg(long, help_heading = VERIFICATION, value_name = "K")]
    pub max_kld: Option<f64>,
    /// Exit with code 3 if both models name the same top token in less than this share of positions, from 0 to 1; of a classifier, the same
    /// label.
    #[arg(long, help_heading = VERIFICATION, value_name = "P")]
    pub min_top1: Option<f64>,
    /// Exit with code 3 if embeddings have a mean cosine below C with the original's, or hidden states where a model makes nothing of them.
    #[arg(long, help_heading = VERIFICATION, value_name = "C")]
    pub min_cosine: Option<f64>,
    /// Exit with code 3 if scores of a reranker or a reward model have a rank correlation (Spearman) below R with the original's.
    #[arg(long, help_heading = VERIFICATION, value_name = "R")]
    pub min_spearman: Option<f64>,
    /// An earlier output, or its report.json, with the same text: the perplexity ratio and the mean KL divergence may not be worse.
    #[arg(long, help_heading = VERIFICATION, value_name = "OUT|REPORT")]
    pub baseline: Option<PathBuf>,
    /// How much worse than the baseline's they may be, as 5% or 0.05. [default: 0]
    #[arg(long, help_heading = VERIFICATION, value_name = "SHARE", requires = "baseline")]
    pub max_regression: Option<String>,
}

impl Bounds {
    /// The same as data.
    pub fn data(&self) -> gates::Bounds {
        let mut data = gates::Bounds::default();
        (data.max_ppl_ratio, data.max_kld, data.min_top1) = (self.max_ppl_ratio, self.max_kld, self.min_top1);
        (data.min_cosine, data.min_spearman) = (self.min_cosine, self.min_spearman);
        (data.baseline, data.max_regression) = (self.baseline.clone(), self.max_regression.clone());
        data
    }
}

/// What a pipeline reads of a run.
#[derive(Clone, Debug, Default, Args)]
pub struct Gates {
    /// Write JUnit XML here: for each output a test that it was written, and one for each limit.
    #[arg(long, help_heading = PIPELINE, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Append a summary in Markdown to this file. [default: in GitHub Actions the summary of its step]
    #[arg(long, help_heading = PIPELINE, value_name = "FILE")]
    pub summary: Option<PathBuf>,
    /// Print one JSON object a line instead of text: stages, progress, outputs with their figures, the end.
    #[arg(long, help_heading = PIPELINE)]
    pub events: bool,
}

/// Whether this is a step of GitHub Actions.
pub fn in_github() -> bool {
    std::env::var_os("GITHUB_ACTIONS").is_some_and(|value| value == "true")
}

impl Gates {
    /// Where a summary goes, if anywhere.
    pub fn summary(&self) -> Option<PathBuf> {
        let step = || std::env::var_os("GITHUB_STEP_SUMMARY").filter(|path| in_github() && !path.is_empty());
        self.summary.clone().or_else(|| step().map(PathBuf::from))
    }

    /// Fails where what is to be written would replace an input or an output, or cannot be appended to.
    pub fn check(&self, inputs: &[&Path], places: &[PathBuf]) -> Result<()> {
        for (flag, file) in [("--junit", &self.junit), ("--summary", &self.summary)] {
            let Some(file) = file else { continue };
            places.iter().try_for_each(|place| check_beside(flag, file, inputs, place))?;
        }
        // Nothing is worse to find out at the end.
        self.summary().map_or(Ok(()), |file| appended(&file).map(drop))
    }
}

/// Opens a file that a summary is appended to; one that is not there is made.
pub fn appended(path: &Path) -> Result<std::fs::File> {
    let file = std::fs::File::options().create(true).append(true).open(path);
    file.map_err(Error::io(path, "append a summary to"))
}

/// `quantc quantize`.
#[derive(Debug, Args)]
pub struct Quantize {
    /// A Hugging Face directory, a GGUF file, or org/name[@revision] of a model on the Hugging Face hub.
    pub model: PathBuf,
    /// Where to write: a directory, or for GGUF a file. The same as a single --target.
    #[arg(long, help_heading = OUTPUT, short, value_name = "OUT")]
    pub output: Option<PathBuf>,
    /// One of several outputs from one calibration, as compressed-tensors:W4A16=OUT, gptq:W4A16:g64=OUT or gguf:Q4_K_M=m.gguf. Repeatable;
    /// the other flags complete it. The first leads: the inputs of each layer are those that its weights make.
    #[arg(long, help_heading = OUTPUT, value_name = "FORMAT[:SCHEME[:gN]]=PATH")]
    pub target: Vec<String>,
    /// Calibrate every target by itself, as if it were the only one.
    #[arg(long, help_heading = OUTPUT)]
    pub independent: bool,
    /// What may also stand in a recipe.
    #[command(flatten)]
    pub request: Request,
    /// A recipe.toml with any of these settings, and exceptions for some linears, or a recipe.yaml of llm-compressor. If a flag and the file give the same setting,
    /// the flag counts.
    #[arg(long, help_heading = OUTPUT, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Held-out text to measure the output on; `none` to skip. [default: a bundled text]
    #[arg(long, help_heading = VERIFICATION, value_name = "FILE|none")]
    pub verify_text: Option<String>,
    /// Number of windows, of up to 2048 tokens each, to measure. [default: 8]
    #[arg(long, help_heading = VERIFICATION, value_name = "N")]
    pub verify_windows: Option<usize>,
    /// Limits on the quality.
    #[command(flatten)]
    pub limits: Bounds,
    /// For pipelines.
    #[command(flatten)]
    pub gates: Gates,
    /// Replace an existing output.
    #[arg(long, help_heading = OUTPUT)]
    pub force: bool,
    /// Begin afresh, though an interrupted run of the same command has finished some blocks.
    #[arg(long, help_heading = OUTPUT)]
    pub no_resume: bool,
    /// Remove what interrupted runs have finished of the outputs, and do nothing else.
    #[arg(long, help_heading = OUTPUT)]
    pub discard: bool,
    /// Wait for another run that is writing to the same place, instead of being refused.
    #[arg(long, help_heading = OUTPUT)]
    pub wait: bool,
    /// Where to push the output.
    #[command(flatten)]
    pub push: PushTo,
    /// Flags for the computation.
    #[command(flatten)]
    pub compute: Compute,
}

impl Quantize {
    /// The same as data.
    ///
    /// Fails for a device that is not known.
    pub fn data(&self) -> Result<Job> {
        let mut job = Job::of(&self.model, self.request.clone());
        (job.output, job.targets, job.recipe) = (self.output.clone(), self.target.clone(), self.recipe.clone());
        (job.verify_text, job.verify_windows) = (self.verify_text.clone(), self.verify_windows);
        (job.independent, job.force, job.no_resume, job.wait) =
            (self.independent, self.force, self.no_resume, self.wait);
        (job.bounds, job.compute) = (self.limits.data(), self.compute.data()?);
        Ok(job)
    }
}

/// Where an output is to be pushed.
#[derive(Clone, Debug, Default, Args)]
pub struct PushTo {
    /// Push the output to this repository of the Hugging Face hub once it is whole and within its limits; needs HF_TOKEN.
    #[arg(long, help_heading = OUTPUT, value_name = "ORG/NAME")]
    pub push_to: Option<String>,
    /// Make the repository a private one; refuse one that is public.
    #[arg(long, help_heading = OUTPUT, requires = "push_to")]
    pub push_private: bool,
}

/// `quantc push`.
#[derive(Debug, Args)]
pub struct Push {
    /// The output: a directory, or a GGUF file with its other parts and its report.
    pub path: PathBuf,
    /// The repository of the hub; it is made where there is none.
    #[arg(value_name = "ORG/NAME")]
    pub repository: String,
    /// Make the repository a private one; refuse one that is public.
    #[arg(long)]
    pub private: bool,
    /// No progress; errors only.
    #[arg(long, short)]
    pub quiet: bool,
}

/// `quantc plan`.
#[derive(Debug, Args)]
pub struct Plan {
    /// The run that is planned. An output need not be named.
    #[command(flatten)]
    pub run: Quantize,
    /// Tokens of each sequence that is served. [default: what the model takes, up to 8192]
    #[arg(long, value_name = "N")]
    pub context: Option<u64>,
    /// Number of sequences that are served at the same time.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: u64,
    /// The program that is to serve the output: vllm, sglang, llama.cpp, transformers or mlx. Says what it would not load, and
    /// exits with code 2 then.
    #[arg(long = "for", value_name = "RUNTIME")]
    pub runtime: Option<String>,
    /// The GPUs that are to serve it, by generation, card or compute capability: ampere, l40s, 9.0.
    #[arg(long, value_name = "GPU", requires = "runtime")]
    pub gpu: Option<String>,
    /// Number of GPUs among which the model is divided.
    #[arg(long, value_name = "N", requires = "runtime", default_value_t = 1)]
    pub tensor_parallel: usize,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

impl Plan {
    /// What is asked about serving, as data.
    pub fn serve(&self) -> Serve {
        let mut serve = Serve::default();
        (serve.context, serve.batch, serve.tensor_parallel) =
            (self.context, Some(self.batch), Some(self.tensor_parallel));
        (serve.runtime, serve.gpu) = (self.runtime.clone(), self.gpu.clone());
        serve
    }
}

/// `quantc eval`.
#[derive(Debug, Args)]
pub struct Eval {
    /// A Hugging Face directory, quantized or not, a GGUF file, or org/name[@revision] of a model on the Hugging Face hub. Several give one table.
    #[arg(value_name = "MODEL", required = true)]
    pub models: Vec<PathBuf>,
    /// A LoRA adapter to merge into the model: PEFT's directory, or its name on the hub.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The original model, to compare with.
    #[arg(long, value_name = "MODEL")]
    pub reference: Option<PathBuf>,
    /// A LoRA adapter to merge into the reference: PEFT's directory, or its name on the hub.
    #[arg(long, value_name = "DIR", requires = "reference")]
    pub reference_adapter: Option<PathBuf>,
    /// Text; a bundled one by default.
    #[arg(long, value_name = "FILE")]
    pub text: Option<String>,
    /// Tokens of a window; cut down to the model's positions.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub context: usize,
    /// Number of windows to measure at most. All by default.
    #[arg(long, value_name = "N")]
    pub windows: Option<usize>,
    /// papers (all tokens but the first of each window) or llama.cpp (the second half of each window).
    #[arg(long, value_name = "PROTOCOL", default_value = "papers")]
    pub protocol: String,
    /// exact measures the weights alone. runtime also rounds what linears and attention read, as the runtime does: llama.cpp on
    /// a CPU for GGUF files, vLLM for W8A8 and FP8_DYNAMIC. [default: runtime for W8A8 and FP8_DYNAMIC, and for a GGUF file with
    /// --protocol llama.cpp and no reference, else exact]
    #[arg(long, value_name = "ACTIVATIONS")]
    pub activations: Option<String>,
    /// Limits on the quality, which need --reference.
    #[command(flatten)]
    pub limits: Bounds,
    /// Print JSON: an object for one model, a list of them for several.
    #[arg(long)]
    pub json: bool,
    /// Flags for the computation.
    #[command(flatten)]
    pub compute: Compute,
}

impl Eval {
    /// The same as data.
    ///
    /// Fails for a device that is not known.
    pub fn data(&self) -> Result<Evaluate> {
        let mut ask = Evaluate::new(&self.models);
        (ask.adapter, ask.reference) = (self.adapter.clone(), self.reference.clone());
        (ask.reference_adapter, ask.text) = (self.reference_adapter.clone(), self.text.clone());
        (ask.context, ask.windows) = (self.context, self.windows);
        (ask.protocol, ask.activations) = (self.protocol.clone(), self.activations.clone());
        (ask.bounds, ask.compute) = (self.limits.data(), self.compute.data()?);
        Ok(ask)
    }
}

/// `quantc compare`.
#[derive(Debug, Args)]
pub struct Compare {
    /// A Hugging Face directory, a GGUF file, or org/name[@revision] of a model on the Hugging Face hub.
    pub model: PathBuf,
    /// A checkpoint of the same model that was made elsewhere. Repeatable.
    #[arg(long, help_heading = OUTPUT, value_name = "PATH")]
    pub also: Vec<PathBuf>,
    /// The schemes, the folder of the report, and the flags of calibration.
    #[command(flatten)]
    pub schemes: Schemes,
    /// A recipe.toml with settings for all schemes, and exceptions for some linears, or a recipe.yaml of llm-compressor; flags go before it.
    #[arg(long, help_heading = OUTPUT, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Calibrate every scheme by itself, as if it were the only one.
    #[arg(long, help_heading = OUTPUT)]
    pub independent: bool,
    /// Leave what the schemes made in the folder of the report, under work.
    #[arg(long, help_heading = OUTPUT)]
    pub keep: bool,
    /// Text to measure on; a bundled one by default. Short texts of several domains are measured in any case.
    #[arg(long, help_heading = VERIFICATION, value_name = "FILE")]
    pub text: Option<String>,
    /// Tokens of a window; cut down to the model's positions.
    #[arg(long, help_heading = VERIFICATION, value_name = "N", default_value_t = 2048)]
    pub context: usize,
    /// Windows of each text at most; all by default.
    #[arg(long, help_heading = VERIFICATION, value_name = "N")]
    pub windows: Option<usize>,
    /// Questions with choices, a JSON record a line, as lm-evaluation-harness has them; none to skip. [default: bundled ones]
    #[arg(long, help_heading = VERIFICATION, value_name = "FILE|none")]
    pub tasks: Option<String>,
    /// Flags for the computation.
    #[command(flatten)]
    pub compute: Compute,
}

impl Compare {
    /// The same as data.
    ///
    /// Fails for a device that is not known.
    pub fn data(&self) -> Result<api::Compare> {
        let Schemes { schemes, report, request } = &self.schemes;
        let mut ask = api::Compare::new(&self.model, schemes, report);
        (ask.also, ask.request, ask.recipe) = (self.also.clone(), request.clone(), self.recipe.clone());
        (ask.text, ask.context, ask.windows) = (self.text.clone(), self.context, self.windows);
        (ask.tasks, ask.independent, ask.keep) = (self.tasks.clone(), self.independent, self.keep);
        ask.compute = self.compute.data()?;
        Ok(ask)
    }
}

/// What `quantize` takes of calibration, with `--scheme` as often as there are schemes and a folder as `--report`.
#[derive(Debug)]
pub struct Schemes {
    /// Each as `FORMAT[:SCHEME[:gN]]`, or a scheme alone.
    pub schemes: Vec<String>,
    /// The folder of the report.
    pub report: PathBuf,
    /// What is said for all.
    pub request: Request,
}

impl FromArgMatches for Schemes {
    fn from_arg_matches(matches: &ArgMatches) -> clap::error::Result<Schemes> {
        let schemes = matches.get_many::<String>("scheme").into_iter().flatten().cloned().collect();
        let mut request = Request::from_arg_matches(matches)?;
        request.scheme = None;
        Ok(Schemes { schemes, report: request.report.take().unwrap_or_default(), request })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> clap::error::Result<()> {
        *self = Schemes::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Schemes {
    fn augment_args(command: clap::Command) -> clap::Command {
        Request::augment_args(command)
            .mut_arg("scheme", |flag| {
                flag.action(ArgAction::Append).value_name("[FORMAT:]SCHEME[:gN]").help(
                    "What to make of the model, as W4A16, Q4_K_M or gptq:W4A16:g64. Repeatable; the other flags complete it. The first \
                     leads: the inputs of each layer are those that its weights make",
                )
            })
            .mut_arg("report", |flag| {
                flag.value_name("DIR").required(true).help(
                    "The folder of the report: compare.html, compare.md, compare.csv and compare.json, and rows that are finished, which a \
                     later call reuses",
                )
            })
            .mut_arg("save_imatrix", |flag| flag.hide(true))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Schemes::augment_args(command)
    }
}

/// `quantc inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// A Hugging Face directory, a GGUF file, or org/name[@revision] of a model on the Hugging Face hub.
    pub path: PathBuf,
    /// Show what the model computes, one block of each kind, instead of the tensors. With --json, show both.
    #[arg(long)]
    pub program: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `quantc build`.
#[derive(Debug, Args)]
pub struct Build {
    /// The project.
    #[arg(default_value = "quantc.toml", value_name = "FILE")]
    pub project: PathBuf,
    /// Make nothing, and fail (exit code 1) where something is out of date.
    #[arg(long, conflicts_with = "force")]
    pub check: bool,
    /// Hash every file, also those that look as they did.
    #[arg(long)]
    pub verify: bool,
    /// Replace what lies at a target's place though no build has made it.
    #[arg(long)]
    pub force: bool,
    /// Wait for another run that is writing to a target's place, instead of being refused.
    #[arg(long)]
    pub wait: bool,
    /// Print the JSON Schema of the project file, and do nothing else.
    #[arg(long)]
    pub schema: bool,
    /// For pipelines.
    #[command(flatten)]
    pub gates: Gates,
    /// Flags for the computation.
    #[command(flatten)]
    pub compute: Compute,
}

/// `quantc check`.
#[derive(Debug, Args)]
pub struct Check {
    /// A Hugging Face directory, a model's folder of a hub cache, or a GGUF file.
    pub path: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `quantc diff`.
#[derive(Debug, Args)]
pub struct Diff {
    /// A Hugging Face directory, quantized or not, a model's folder of a hub cache, or a GGUF file.
    pub a: PathBuf,
    /// What it is compared with.
    pub b: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `quantc convert`.
#[derive(Debug, Args)]
pub struct Convert {
    /// A Hugging Face directory, quantized or not, a GGUF file, or org/name[@revision] of a model on the Hugging Face hub.
    pub input: PathBuf,
    /// The directory to write.
    #[arg(long, short, value_name = "OUT")]
    pub output: PathBuf,
    /// Type of the tensors: f16, bf16 or f32. [default: that of the input]
    #[arg(long, value_name = "TYPE", value_parser = ["f16", "bf16", "f32"])]
    pub dtype: Option<String>,
    /// Tensors that are not part of the model: copy them as they are, drop them, or refuse. [default: copy]
    #[arg(long, value_name = "copy|drop|refuse")]
    pub unknown_tensors: Option<String>,
    /// Replace an existing output.
    #[arg(long)]
    pub force: bool,
    /// Where to push the output.
    #[command(flatten)]
    pub push: PushTo,
}

/// `quantc merge`.
#[derive(Debug, Args)]
pub struct Merge {
    /// A Hugging Face directory, quantized or not, a GGUF file, or org/name[@revision] of a model on the Hugging Face hub.
    pub model: PathBuf,
    /// The LoRA adapter, a directory that PEFT wrote, or org/name[@revision] of one on the Hugging Face hub.
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// The directory to write.
    #[arg(long, short, value_name = "OUT")]
    pub output: PathBuf,
    /// Tensors that are not part of the model: copy them as they are, drop them, or refuse. [default: copy]
    #[arg(long, value_name = "copy|drop|refuse")]
    pub unknown_tensors: Option<String>,
    /// Replace an existing output.
    #[arg(long)]
    pub force: bool,
    /// No summary; errors only.
    #[arg(long, short)]
    pub quiet: bool,
    /// Where to push the output.
    #[command(flatten)]
    pub push: PushTo,
}
