//! The command line: reads the words, picks the device, turns outcomes into exit codes.

use std::process::ExitCode;

use anyhow::Context;
use calibration::samples::GUARDED;
use clap::Parser;
use formats::Dtype;
use quantc::cli::{Cli, Command, Compute, Engine, Eval, Quantize};
use quantc::forward::Activations;
use quantc::job::{Job, Verification};
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request, named, unknown_tensors};
use quantc::text::{HELD_OUT, ModelText, load_text};
use quantc::verify::{Limits, Protocol, evaluate};
use quantc::{Checkpoint, Error, convert, demo, devices, families, inspect, merge, report, stray, with_backend};

/// The output is there, and its quality is below the limits.
const BELOW_THE_BAR: u8 = 3;

fn main() -> ExitCode {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // What is wrong with a damaged file is told by whoever reads it.
        if std::thread::current().name() != Some(GUARDED) {
            told(panic);
        }
    }));
    match run(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // Ours say their cause themselves; the chain would say it twice.
            match error.downcast_ref::<Error>() {
                Some(error) => eprintln!("error: {error}"),
                None => eprintln!("error: {error:#}"),
            }
            ExitCode::from(error.downcast_ref::<Error>().map_or(1, Error::exit_code))
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    match cli.command {
        Command::Demo(args) => {
            if let Some(folder) = args.export {
                demo::export(&folder)?;
                return Ok(0);
            }
            let (mut progress, engine) = start(&args.compute)?;
            with_backend!(&engine, backend => demo::run(backend, &mut progress, args.compute.quiet))?;
            Ok(0)
        }
        Command::Quantize(args) => quantize(*args),
        Command::Eval(args) => eval(args),
        Command::Inspect(args) => {
            let checkpoint = Checkpoint::open(&args.path)?;
            checkpoint.remarks().iter().for_each(|note| eprintln!("note: {note}"));
            let inspection = inspect::inspect(&checkpoint);
            match args.json {
                true => say(&format!("{}\n", serde_json::to_string_pretty(&inspection)?)),
                false => say(&inspection.text()),
            }
            Ok(0)
        }
        Command::Convert(args) => {
            let dtype = args.dtype.map(|name| match name.as_str() {
                "f16" => Dtype::F16,
                "bf16" => Dtype::BF16,
                _ => Dtype::F32,
            });
            let unknown = unknown_tensors(args.unknown_tensors.as_deref())?;
            let notes = convert::convert(&args.input, &args.output, dtype, unknown, args.force)?;
            notes.iter().for_each(|note| eprintln!("note: {note}"));
            Ok(0)
        }
        Command::Devices(args) => {
            let devices = devices::devices();
            match args.json {
                true => say(&format!("{}\n", serde_json::to_string_pretty(&devices)?)),
                false => say(&devices.text()),
            }
            Ok(0)
        }
        Command::Merge(args) => {
            let unknown = unknown_tensors(args.unknown_tensors.as_deref())?;
            let (merged, notes) = merge::merge(&args.model, &args.adapter, &args.output, unknown, args.force)?;
            if let (Some(adapter), false) = (merged.adapter(), args.quiet) {
                let (output, kind) = (args.output.display(), adapter.kind);
                say(&format!(
                    "{output}: {kind}, {} modules merged, {} tensors replaced\n",
                    adapter.modules, adapter.replaced
                ));
                notes.iter().for_each(|note| eprintln!("note: {note}"));
            }
            Ok(0)
        }
    }
}

/// Prints; a reader that has closed the pipe has seen enough.
fn say(text: &str) {
    use std::io::Write;
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Sets the threads up, the display, and the device.
fn start(compute: &Compute) -> anyhow::Result<(Progress, Engine)> {
    if compute.threads == Some(0) {
        return Err(Error::usage("--threads must be at least 1").into());
    }
    if let Some(threads) = compute.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("cannot start the threads")?;
    }
    let (engine, left) = compute.engine()?;
    if let (Some(left), false) = (left, compute.quiet) {
        eprintln!("note: {left}");
    }
    Ok((Progress::new(compute.quiet), engine))
}

fn quantize(args: Quantize) -> anyhow::Result<u8> {
    let (mut progress, engine) = start(&args.compute)?;
    let to_file = args.output.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let flags = Request {
        format: args.format,
        scheme: args.scheme,
        bits: args.bits,
        group_size: args.group_size,
        symmetric: args.symmetric,
        method: args.method,
        observer: args.observer,
        damp: args.damp,
        act_order: args.act_order,
        desc_act: args.desc_act.then_some(true),
        moe_all_experts: args.moe_all_experts.then_some(true),
        ignore: (!args.ignore.is_empty()).then_some(args.ignore),
        unknown_tensors: args.unknown_tensors,
        adapter: args.adapter,
        calibration: args.calibration,
        samples: args.samples,
        seq_len: args.seq_len,
        seed: args.seed,
        tensor_type: (!args.tensor_type.is_empty()).then_some(args.tensor_type),
        output_tensor_type: args.output_tensor_type,
        token_embedding_type: args.token_embedding_type,
        pure: args.pure.then_some(true),
        pre: args.pre,
        imatrix: args.imatrix,
        save_imatrix: args.save_imatrix,
        split_max_size: args.split_max_size,
        overrides: Vec::new(),
    };
    let file = args.recipe.map(|path| Request::read(&path)).transpose()?.unwrap_or_default();
    let mut request = flags.or(file);
    request.format = request.format.or(to_file.then(|| "gguf".to_owned()));
    let limits = Limits { max_ppl_ratio: args.max_ppl_ratio, max_kld: args.max_kld, min_top1: args.min_top1 };
    limits.check()?;
    let verification = match args.verify_text.as_deref() {
        Some("none") if limits.any() => {
            return Err(
                Error::usage("limits on the quality need a text to measure it on: drop --verify-text none").into()
            );
        }
        Some("none") => None,
        text => Some(Verification {
            text: text.unwrap_or(HELD_OUT).to_owned(),
            context: 2048,
            windows: Some(args.verify_windows),
            limits,
        }),
    };
    let job = Job {
        model: &args.model,
        output: &args.output,
        recipe: Recipe::resolve(request)?,
        verification,
        force: args.force,
        report: args.report,
    };
    let report = with_backend!(&engine, backend => job.run(backend, &mut progress))?;
    drop(progress);
    if let Some(profile) = engine.profile() {
        eprint!("{profile}");
    }
    if !args.compute.quiet {
        let fallbacks = report.linears.iter().filter(|l| l.fallback.is_some()).count();
        say(&format!(
            "{}: {} linears, {:.2} bits per weight ({:.2} of the file), {:.1} s on {}, peak {:.0} MB{}\n",
            args.output.display(),
            report.linears.len(),
            report.bpw.quantized,
            report.bpw.file,
            report.seconds.total,
            report.device,
            report.peak_memory_bytes.unwrap_or(0) as f64 / 1e6,
            if fallbacks > 0 { format!(", {fallbacks} with a fallback (see report.json)") } else { String::new() }
        ));
        if let Some(quality) = &report.quality {
            say(&report::quality_table(quality));
        }
        for note in &report.notes {
            eprintln!("note: {note}");
        }
    }
    match &report.verdict {
        Some(verdict) if !verdict.passed => {
            for missed in &verdict.missed {
                eprintln!("error: {missed}; the output was kept in {}", args.output.display());
            }
            Ok(BELOW_THE_BAR)
        }
        _ => Ok(0),
    }
}

fn eval(args: Eval) -> anyhow::Result<u8> {
    let (mut progress, engine) = start(&args.compute)?;
    let protocol = named("protocol", Protocol::ALL, &args.protocol)?;
    let model = Checkpoint::open_with(&args.model, args.adapter.as_deref())?;
    let activations = match &args.activations {
        Some(name) => named("activations", Activations::ALL, name)?,
        None if protocol == Protocol::LlamaCpp && model.gguf().is_some() && args.reference.is_none() => {
            Activations::Runtime
        }
        None => Activations::Exact,
    };
    let reference_adapter = args.reference_adapter.as_deref();
    let reference = args.reference.as_deref().map(|path| Checkpoint::open_with(path, reference_adapter)).transpose()?;
    for checkpoint in [Some(&model), reference.as_ref()].into_iter().flatten() {
        stray::refuse_adapters(checkpoint)?;
    }
    let text = load_text(args.text.as_deref().unwrap_or(HELD_OUT)).map_err(Error::from)?;
    let tokenizer = ModelText::open(&model)?;
    let ids = tokenizer.evaluation_ids(&text).map_err(Error::from)?;
    if let Some(reference) = &reference {
        let own = ModelText::open(reference)?.evaluation_ids(&text).map_err(Error::from)?;
        if own != ids {
            return Err(Error::failed(format!(
                "{} and {} turn the text into different tokens: they cannot be compared",
                args.model.display(),
                reference.path().display()
            ))
            .into());
        }
    }
    let longest = families::longest_context(model.config())?.unwrap_or(usize::MAX);
    let bos = match protocol {
        Protocol::Papers => None,
        Protocol::LlamaCpp => tokenizer.tokenizer.added_bos(),
    };
    let windows = calibration::samples::windows(&text.name, &ids, args.context.min(longest), args.windows, bos)
        .map_err(|e| Error::from(quantc::text::TextError::from(e)))?;
    let quality = with_backend!(&engine, backend => evaluate(
        backend,
        &model,
        reference.as_ref(),
        &windows,
        protocol,
        activations,
        &mut progress
    ))?;
    drop(progress);
    if let Some(profile) = engine.profile() {
        eprint!("{profile}");
    }
    for note in text.notes.iter().filter(|_| !args.compute.quiet) {
        eprintln!("note: {note}");
    }
    match args.json {
        true => say(&format!("{}\n", serde_json::to_string_pretty(&quality)?)),
        false => say(&report::quality_table(&quality)),
    }
    if !args.compute.quiet {
        let read = [Some(&model), reference.as_ref()].into_iter().flatten();
        read.flat_map(Checkpoint::remarks).for_each(|note| eprintln!("note: {note}"));
    }
    Ok(0)
}
