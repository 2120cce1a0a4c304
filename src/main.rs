//! The command line: reads the words, picks the device, turns outcomes into exit codes.

#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use calibration::samples::GUARDED;
use clap::{CommandFactory, Parser};
use formats::Dtype;
use quantc::cli::{
    self, Build, Clean, Cli, Command, Compare, Compute, Convert, Eval, Gates, Inspect, Merge, Plan, PushTo, Quantize,
};
use quantc::hub;
use quantc::output::{self, Place, SideOutput, Unfinished, remove_made, sweep, unfinished};
use quantc::progress::{Listener, Progress, Update};
use quantc::recipe::unknown_tensors;
use quantc::report::Report;
use quantc::report::gates::{Case, Earlier, annotation};
use quantc::supervisor::{self, End};
use quantc::words::{self, tell};
use quantc::{Error, build, check, convert, demo, devices, merge, report, with_backend};

/// The output is there, and its quality is below the limits.
const BELOW_THE_BAR: u8 = 3;

/// Notes of one output that a terminal shows.
const NOTES: usize = 12;

/// Bytes of the stack that everything but the work of further threads has.
const STACK: usize = 16 << 20;

fn main() -> ExitCode {
    // The first thread has what a limit of the shell (ulimit -s) leaves it, which may be too little for reading the command line.
    match std::thread::Builder::new().stack_size(STACK).spawn(begin) {
        Ok(thread) => thread.join().unwrap_or(ExitCode::FAILURE),
        Err(_) => begin(),
    }
}

/// Reads the command line and either works or watches over the process that does; the exit code.
fn begin() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help that cannot be written has not been given; who closes a pipe has heard enough.
            let unheard = error.print().is_err_and(|error| error.kind() != std::io::ErrorKind::BrokenPipe);
            let code = u8::try_from(error.exit_code()).unwrap_or(1);
            return ExitCode::from(if unheard && !error.use_stderr() { 1 } else { code });
        }
    };
    let places: Vec<Place> = cli.command.outputs().iter().filter_map(|output| Place::resolve(output).ok()).collect();
    let missing: Vec<PathBuf> = places.iter().flat_map(Place::missing_parents).collect();
    let Some(end) = supervisor::watch() else { return ExitCode::from(work(cli)) };
    if !matches!(end, End::Code(_)) {
        // What cannot be removed is removed by the next run.
        places.iter().for_each(|place| drop(sweep(place)));
        remove_made(&missing);
    }
    // A request that could not be met is not to be given again as it is.
    if ![End::Code(0), End::Code(2)].contains(&end) {
        places.iter().flat_map(unfinished).for_each(|left| tell(&format!("note: {}", continued(&left))));
    }
    if let Some(sentence) = end.sentence(cli.command.subject().unwrap_or(Path::new("quantc"))) {
        tell(&format!("error: {sentence}"));
    }
    ExitCode::from(match end {
        End::Code(code) if code <= BELOW_THE_BAR => code,
        End::Asked(signal) => {
            supervisor::die_of(signal);
            1
        }
        End::Code(_) | End::Died(_) | End::DiedIn(..) => 1,
    })
}

/// Runs a command; its exit code.
fn work(cli: Cli) -> u8 {
    let panicked: Arc<Mutex<String>> = Arc::default();
    let last = panicked.clone();
    std::panic::set_hook(Box::new(move |info| {
        // What is wrong with a damaged file is told by whoever reads it.
        if std::thread::current().name() != Some(GUARDED) {
            *last.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
        }
    }));
    match std::panic::catch_unwind(AssertUnwindSafe(|| run(cli))) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            tracing::error!("{}", words::one_line(&error.to_string()));
            // Ours say their cause themselves; the chain would say it twice.
            match error.downcast_ref::<Error>() {
                Some(error) => tell(&format!("error: {error}")),
                None => tell(&format!("error: {error:#}")),
            }
            code_of(&error)
        }
        Err(_) => {
            let what = panicked.lock().unwrap_or_else(PoisonError::into_inner).replace('\n', " ");
            // The language's own words where a thread cannot be had.
            if what.contains("failed to spawn thread") {
                tell(
                    "error: no more threads can be started: allow this process more of them (ulimit -u, or the container's limit on \
                     processes) or more memory, or give fewer --threads",
                );
                return 1;
            }
            tell(&format!("error: an internal check failed, which is a fault of quantc: {what}"));
            1
        }
    }
}

/// Opens a log for all that is done from now on.
///
/// Fails where something else lies at its place.
fn log(path: &Path) -> Result<(), Error> {
    use std::io::Read;
    let (open, read) = (Error::io(path, "write a log to"), Error::io(path, "read"));
    // A pipe would be waited for without end.
    if path.metadata().is_ok_and(|about| !about.is_file()) {
        return Err(Error::usage(format!("--log {}: is there already, and is no file: name another", path.display())));
    }
    let mut file = std::fs::File::options().create(true).read(true).append(true).open(path).map_err(open)?;
    let mut start = Vec::new();
    (&mut file).take(64).read_to_end(&mut start).map_err(read)?;
    // A log begins with a time, and then says whose it is.
    let is_log = start.first().is_none_or(u8::is_ascii_digit);
    if !is_log || !(start.is_empty() || String::from_utf8_lossy(&start).contains(" INFO quantc:")) {
        return Err(Error::usage(format!(
            "--log {}: is there already, and is no log: name another file",
            path.display()
        )));
    }
    let writer = Mutex::new(file);
    tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false).with_writer(writer).init();
    let words: Vec<String> = std::env::args().skip(1).collect();
    tracing::info!("quantc {} {}", env!("CARGO_PKG_VERSION"), words::one_line(&words.join(" ")));
    Ok(())
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    cli.command.log().map_or(Ok(()), log)?;
    match cli.command {
        Command::Demo(args) => {
            if let Some(folder) = args.export {
                quantc::demo_model(&folder)?;
                return Ok(0);
            }
            let (mut progress, compute) = start(&args.compute, args.compute.data()?)?;
            let table = compute.run(
                &mut progress,
                |engine, progress| with_backend!(engine, backend => demo::run(backend, progress)),
            )?;
            drop(progress);
            if !args.compute.quiet {
                say(&table)?;
            }
            Ok(0)
        }
        Command::Quantize(args) => {
            let (gates, model) = (args.gates.clone(), args.model.display().to_string());
            told(&gates, model, || quantize(*args))
        }
        Command::Plan(args) => plan(*args),
        Command::Eval(args) => eval(*args),
        Command::Compare(args) => compare(*args),
        Command::Inspect(args) => inspect(&args),
        Command::Build(args) => {
            let (gates, project) = (args.gates.clone(), args.project.display().to_string());
            told(&gates, project, || build(args))
        }
        Command::Check(args) => {
            let checked = match quantc::check(&args.path) {
                Err(error) if args.json && args.path.exists() => check::Checked::broken(&args.path, error.to_string()),
                checked => checked?,
            };
            checked.notes.iter().for_each(|note| tell(&format!("note: {note}")));
            show(args.json, &checked, || checked.text())?;
            checked.faults.iter().for_each(|fault| tell(&format!("error: {fault}")));
            Ok(u8::from(!checked.faults.is_empty()))
        }
        Command::Diff(args) => {
            let diff = quantc::diff(&args.a, &args.b)?;
            show(args.json, &diff, || diff.text())?;
            Ok(0)
        }
        Command::Convert(args) => convert(args),
        Command::Push(args) => {
            let push = hub::Push::new(&args.repository, args.private)?;
            pushed(&push, &[args.path], args.quiet)
        }
        Command::Clean(args) => Ok(clean(&args).map(|()| 0)?),
        Command::Completions(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "quantc", &mut script);
            say(&String::from_utf8_lossy(&script))?;
            Ok(0)
        }
        Command::Man(args) => {
            // Each is known by its whole name, as `man quantc-quantize` wants it.
            clap_mangen::generate_to(Cli::command(), &args.folder).map_err(Error::io(&args.folder, "write into"))?;
            Ok(0)
        }
        Command::Devices(args) => {
            let devices = devices::devices();
            show(args.json, &devices, || devices.text())?;
            Ok(0)
        }
        Command::Merge(args) => merge(args),
    }
}

/// Pushes outputs that are whole; the exit code.
fn pushed(push: &hub::Push, outputs: &[PathBuf], quiet: bool) -> anyhow::Result<u8> {
    let message = format!("Upload what {} made", build::TOOL);
    let address = push.push(outputs, &message, &mut Progress::new(quiet)).map_err(|error| {
        let again: Vec<String> = outputs.iter().map(|output| push.command(output)).collect();
        Error::failed(format!(
            "{error}; what was to be pushed is whole on this disk, and {} tries again",
            again.join(" and ")
        ))
    })?;
    if !quiet {
        say(&format!("pushed: {address}\n"))?;
    }
    Ok(0)
}

/// Where outputs are to be pushed, if anywhere: found out before any work.
fn push_of(asked: &PushTo) -> Result<Option<hub::Push>, Error> {
    asked.push_to.as_deref().map(|to| hub::Push::new(to, asked.push_private)).transpose()
}

/// Writes plain safetensors.
fn convert(args: Convert) -> anyhow::Result<u8> {
    let dtype = args.dtype.map(|name| match name.as_str() {
        "f16" => Dtype::F16,
        "bf16" => Dtype::BF16,
        _ => Dtype::F32,
    });
    let unknown = unknown_tensors(args.unknown_tensors.as_deref())?;
    let push = push_of(&args.push)?;
    let input = quantc::Located::whole(&args.input, &mut Progress::new(false))?;
    let notes = convert::convert(input.path(), &args.output, dtype, unknown, args.force)?;
    notes.iter().for_each(|note| tell(&format!("note: {note}")));
    push.map_or(Ok(0), |push| pushed(&push, &[args.output], false))
}

/// Writes a model merged with an adapter.
fn merge(args: Merge) -> anyhow::Result<u8> {
    let unknown = unknown_tensors(args.unknown_tensors.as_deref())?;
    let push = push_of(&args.push)?;
    let model = quantc::Located::whole(&args.model, &mut Progress::new(args.quiet))?;
    let adapter = quantc::Located::adapter(&args.adapter, &mut Progress::new(args.quiet))?;
    let (merged, notes) = merge::merge(model.path(), &adapter, &args.output, unknown, args.force)?;
    if let (Some(adapter), false) = (merged.adapter(), args.quiet) {
        let (output, kind) = (args.output.display(), adapter.kind);
        say(&format!("{output}: {kind}, {} modules merged, {} tensors replaced\n", adapter.modules, adapter.replaced))?;
        notes.iter().for_each(|note| tell(&format!("note: {note}")));
    }
    push.map_or(Ok(0), |push| pushed(&push, &[args.output], args.quiet))
}

/// Prints what was found, as JSON or for people.
fn show(json: bool, found: &impl serde::Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string_pretty(found)? + "\n" } else { text() };
    Ok(say(&text)?)
}

/// The exit code of a run that ended with this error.
fn code_of(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<Error>().map_or(1, Error::exit_code)
}

/// Prints to standard output. A reader that has closed the pipe has seen enough; any other failure is one of the run.
fn say(text: &str) -> Result<(), Error> {
    use std::io::{ErrorKind, Write};
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::io("standard output", "write to")(error)),
        _ => Ok(()),
    }
}

/// Shows what is in a checkpoint.
fn inspect(args: &Inspect) -> anyhow::Result<u8> {
    let inspection = quantc::inspect(&args.path, args.program)?;
    inspection.notes.iter().for_each(|note| tell(&format!("note: {note}")));
    show(args.json, &inspection, || inspection.text())?;
    Ok(0)
}

/// Who prints events, where these are asked for.
fn listener(gates: &Gates) -> Option<Listener> {
    // Whoever cannot be told any more is told at the end.
    gates.events.then(|| Box::new(|update: &Update| drop(say(&format!("{}\n", update.event())))) as Listener)
}

/// Writes JUnit XML and a summary, as far as they are asked for.
fn write_for_pipelines(gates: &Gates, cases: &[Case], summary: &str) -> Result<(), Error> {
    if let Some(path) = &gates.junit {
        SideOutput::write(path, report::gates::junit(cases).as_bytes())?.appear()?;
    }
    let Some(path) = gates.summary() else { return Ok(()) };
    let mut file = cli::appended(&path)?;
    std::io::Write::write_all(&mut file, summary.as_bytes()).map_err(Error::io(&path, "write"))
}

/// Whether a run that failed, perhaps before it looked at where it writes, may leave JUnit XML here: where nothing lies or JUnit XML does,
/// and not in the model.
fn is_free_for_junit(path: &Path, model: &Path) -> bool {
    let free = !path.exists() || std::fs::read(path).is_ok_and(|content| content.starts_with(b"<?xml"));
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let within =
        |folder: &Path, model: &Path| Some(folder.canonicalize().ok()?.starts_with(model.canonicalize().ok()?));
    free && !within(folder, model).unwrap_or(false)
}

/// Does what pipelines are told the end of: an event with the exit code, and where it failed, a failure in JUnit XML.
fn told(gates: &Gates, input: String, work: impl FnOnce() -> anyhow::Result<u8>) -> anyhow::Result<u8> {
    let done = work();
    if let Err(error) = &done {
        let case =
            Case { output: input.clone(), seconds: 0.0, checks: vec![("written".to_owned(), Some(error.to_string()))] };
        if let Some(path) = gates.junit.as_ref().filter(|path| is_free_for_junit(path, Path::new(&input))) {
            // What made the run fail is what is told.
            let _ = SideOutput::write(path, report::gates::junit(&[case]).as_bytes()).and_then(SideOutput::appear);
        }
    }
    if gates.events {
        let code = done.as_ref().map_or_else(code_of, |code| *code);
        let error = done.as_ref().err().map(ToString::to_string);
        let event = serde_json::json!({"event": "end", "exit_code": code, "error": error});
        let said = say(&format!("{event}\n"));
        if done.is_ok() {
            said?;
        }
    }
    done
}

/// The display, and where it is computed: on threads that are the whole process's.
fn start(compute: &Compute, data: quantc::Compute) -> Result<(Progress, quantc::Compute), Error> {
    let (data, fewer) = data.of_process()?;
    let progress = Progress::new(compute.quiet).verbose(compute.verbose);
    fewer.into_iter().for_each(|note| progress.say(&format!("note: {note}")));
    Ok((progress, data))
}

fn quantize(args: Quantize) -> anyhow::Result<u8> {
    let mut job = args.data()?;
    if args.discard {
        for (path, blocks) in job.discard()? {
            let told = match blocks {
                0 => "nothing was left by a run that is gone".to_owned(),
                _ => format!("{blocks} finished blocks were removed"),
            };
            say(&format!("{}: {told}\n", path.display()))?;
        }
        return Ok(0);
    }
    let paths = job.outputs()?;
    args.gates.check(&[&args.model], &paths)?;
    let push = push_of(&args.push)?;
    let single = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "gguf");
    if push.is_some() && paths.len() > 1 && !paths.iter().all(single) {
        return Err(Error::usage(
            "--push-to takes one output, or several GGUF files: push each of these with quantc push",
        )
        .into());
    }
    let earlier: Vec<_> = paths.iter().map(|path| Earlier::at(path)).collect();
    let (progress, compute) = start(&args.compute, job.compute)?;
    job.compute = compute;
    let reports = job.run(progress.listened(listener(&args.gates)))?;
    let made: Vec<(&Path, &Report)> = paths.iter().map(PathBuf::as_path).zip(&reports).collect();
    let code = conclude(&made, &earlier, (&args.compute, &args.gates))?;
    let Some(push) = push else { return Ok(code) };
    // A file in parts is called by the first of them.
    let first = |(path, report): (&PathBuf, &Report)| match report.outputs.first() {
        Some(file) if !path.exists() => path.with_file_name(&file.name),
        _ => path.clone(),
    };
    let made: Vec<PathBuf> = paths.iter().zip(&reports).map(first).collect();
    if code != 0 {
        let all: Vec<String> = made.iter().map(|path| push.command(path)).collect();
        tell(&format!("error: nothing was pushed, as limits are missed; {} pushes it all the same", all.join(" and ")));
        return Ok(code);
    }
    pushed(&push, &made, args.compute.quiet || args.gates.events)
}

/// Says what was made of a model; the exit code.
fn conclude(
    all: &[(&Path, &Report)],
    earlier: &[Option<Earlier>],
    (compute, gates): (&Compute, &Gates),
) -> anyhow::Result<u8> {
    // The outputs are there: what cannot be printed any more does not change what was found of them.
    let mut said = Ok(());
    if gates.events {
        said = all.iter().try_for_each(|(path, report)| say(&format!("{}\n", report.event(path))));
    } else if !compute.quiet {
        said = all.iter().try_for_each(|(path, report)| summarize(report, path, compute.verbose));
        match all {
            [(path, report)] => {
                let command = report.runs(&path.display().to_string());
                let ollama =
                    report.ollama(&path.display().to_string()).map(|command| format!("in Ollama: {command}\n"));
                let told = command.map(|command| format!("run it: {command}\n")).into_iter().chain(ollama);
                said = said.and_then(|()| told.into_iter().try_for_each(|line| say(&line)));
            }
            all => said = said.and_then(|()| say(&table(all))),
        }
    }
    let mut code = 0;
    for (path, report) in all {
        let Some(verdict) = report.verdict.as_ref().filter(|verdict| !verdict.passed) else { continue };
        for missed in &verdict.missed {
            let told = format!("{missed}; the output was kept in {}", path.display());
            tell(&format!("error: {told}"));
            if cli::in_github() {
                tell(&annotation("error", "quantc", &told));
            }
        }
        code = BELOW_THE_BAR;
    }
    let cases: Vec<Case> = all.iter().map(|(path, report)| Case::of(path, report)).collect();
    write_for_pipelines(gates, &cases, &report::gates::summary(all, earlier))?;
    if code > 0 { Ok(code) } else { Ok(said.map(|()| 0)?) }
}

/// Makes what is out of date of a project. Exit code 3 where a target misses its limits, now or when it was made.
fn build(args: Build) -> anyhow::Result<u8> {
    if args.schema {
        say(&format!("{}\n", serde_json::to_string_pretty(&build::schema())?))?;
        return Ok(0);
    }
    let data = args.compute.data()?;
    let project = build::Build::open(&args.project, data.means(), args.verify)?;
    let own = project.inputs_and_lock();
    let own: Vec<&Path> = own.iter().map(PathBuf::as_path).collect();
    let all: Vec<PathBuf> = project.standings().iter().map(|standing| standing.path.clone()).collect();
    args.gates.check(&own, &all)?;
    let mut code = 0;
    let mut cases = Vec::new();
    for standing in project.standings() {
        let path = standing.path.display();
        if args.gates.events {
            say(&format!("{}\n", standing.event()))?;
        } else if !args.compute.quiet {
            let why = standing.stale.as_ref();
            say(&format!("{path}: {}\n", why.map_or("up to date".to_owned(), |why| format!("out of date: {why}"))))?;
        }
        let mut checks = vec![("up to date".to_owned(), standing.stale.clone())];
        for missed in &standing.missed {
            tell(&format!("error: {path}: {missed}, as it was found when it was made"));
            checks.push(("limits".to_owned(), Some(missed.clone())));
            code = BELOW_THE_BAR;
        }
        cases.push(Case { output: path.to_string(), seconds: 0.0, checks });
    }
    if args.check || project.is_up_to_date() {
        write_for_pipelines(&args.gates, &cases, &report::gates::standing(&cases))?;
        if !project.is_up_to_date() {
            return Ok(1);
        }
        if !args.check {
            project.remember()?;
        }
        return Ok(code);
    }
    let (progress, compute) = start(&args.compute, data)?;
    let mut progress = progress.listened(listener(&args.gates));
    let earlier: Vec<_> = project.redone_places().iter().map(|place| Earlier::at(place)).collect();
    let how = (args.force, args.wait);
    let made = compute.run(
        &mut progress,
        |engine, progress| with_backend!(engine, backend => project.make(backend, how, progress)),
    )?;
    drop(progress);
    let made: Vec<(&Path, &Report)> = made.iter().map(|(path, report)| (path.as_path(), report)).collect();
    Ok(conclude(&made, &earlier, (&args.compute, &args.gates))?.max(code))
}

/// Says what a run would do. Exit code 2 where the runtime that was named refuses what it would write.
fn plan(args: Plan) -> anyhow::Result<u8> {
    let mut job = args.run.data()?;
    let (progress, compute) = start(&args.run.compute, job.compute)?;
    job.compute = compute;
    let planned = job.plan(&args.serve(), progress)?;
    show(args.json, &planned, || planned.text())?;
    Ok(if planned.refused() { 2 } else { 0 })
}

/// What was made of a model, a line for each output.
fn table(all: &[(&Path, &Report)]) -> String {
    let names = ["output", "format", "scheme", "bpw", "MB", "perplexity", "KL, mean", "top-1"];
    let mut rows = vec![names.map(str::to_owned).to_vec()];
    for (path, report) in all {
        let quality = report.quality.as_ref();
        let beside = quality.and_then(|quality| quality.beside.as_ref());
        let of = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
        rows.push(vec![
            path.display().to_string(),
            report.recipe.format.clone(),
            report.recipe.scheme_name(),
            format!("{:.2}", report.bpw.quantized),
            format!("{:.2}", report.outputs.iter().map(|file| file.bytes).sum::<u64>() as f64 / 1e6),
            of(quality.map(|quality| format!("{:.3}", quality.perplexity))),
            of(beside.map(|beside| format!("{:.4}", beside.kld_mean))),
            of(beside.map(|beside| format!("{:.1} %", 100.0 * beside.top1_agreement))),
        ]);
    }
    format!("\n{}", words::table(&rows, 3))
}

/// How to go on with what was finished, and how not to.
fn continued(left: &Unfinished) -> String {
    format!(
        "{} finished blocks are kept ({:.1} MB): the same command goes on after them, and with --discard it removes them",
        left.blocks,
        left.bytes as f64 / 1e6
    )
}

/// Removes, or lists, what interrupted runs have left in a folder.
fn clean(args: &Clean) -> Result<(), Error> {
    let found = output::clean(&args.folder, args.list)?;
    for left in &found {
        let done = if args.list { "" } else { ", removed" };
        let (folder, megabytes) = (left.folder.display(), left.bytes as f64 / 1e6);
        say(&format!("{folder}: {} finished blocks, {megabytes:.1} MB{done}\n", left.blocks))?;
    }
    if found.is_empty() {
        say(&format!("{}: no interrupted run has left anything\n", args.folder.display()))?;
    }
    Ok(())
}

/// Prints notes; on a terminal a few of them, unless all are wanted, and where the others are.
fn notes(all: &[String], verbose: bool, others: &str) {
    let shown = match std::io::stderr().is_terminal() && !verbose {
        true => words::shortened(all, NOTES, others),
        false => all.to_vec(),
    };
    shown.iter().for_each(|note| tell(&format!("note: {note}")));
}

/// Prints what a quantization did.
fn summarize(report: &Report, output: &Path, verbose: bool) -> Result<(), Error> {
    notes(&[&report.interrupted[..], &report.notes].concat(), verbose, "all are in the report, and -v shows them");
    let fallbacks = report.fallbacks();
    say(&format!(
        "{}: {} linears, {:.2} bits per weight ({:.2} of the file), {:.1} s on {}, peak {:.0} MB{}\n",
        output.display(),
        report.linears.len(),
        report.bpw.quantized,
        report.bpw.file,
        report.seconds.total,
        report.device,
        report.peak_memory_bytes.unwrap_or(0) as f64 / 1e6,
        if fallbacks > 0 { format!(", {fallbacks} with a fallback (see report.json)") } else { String::new() }
    ))?;
    report.quality.as_ref().map_or(Ok(()), |quality| say(&report::quality_text(quality)))?;
    report.hidden_states.as_ref().map_or(Ok(()), |states| say(&report::states_text(states)))
}

fn eval(args: Eval) -> anyhow::Result<u8> {
    let mut ask = args.data()?;
    let (progress, compute) = start(&args.compute, ask.compute)?;
    ask.compute = compute;
    let found = ask.run(progress)?;
    let Compute { quiet, verbose, .. } = args.compute;
    if !quiet {
        notes(&found.notes, verbose, "-v shows all");
    }
    match args.json {
        true => say(&format!("{}\n", serde_json::to_string_pretty(&found.json()?)?))?,
        false => say(&found.text())?,
    }
    if !quiet {
        notes(&found.remarks, verbose, "-v shows all");
    }
    let mut code = 0;
    for missed in found.missed() {
        tell(&format!("error: {missed}"));
        code = BELOW_THE_BAR;
    }
    Ok(code)
}

/// Compares schemes. Exit code 1 where a row failed; the report tells of the others all the same.
fn compare(args: Compare) -> anyhow::Result<u8> {
    let mut ask = args.data()?;
    let (progress, compute) = start(&args.compute, ask.compute)?;
    ask.compute = compute;
    let table = ask.run(progress)?;
    let mut said = Ok(());
    if !args.compute.quiet {
        table.said().iter().for_each(|note| tell(&format!("note: {note}")));
        said = say(&format!("{}report: {}\n", table.text(), args.schemes.report.join("compare.html").display()));
    }
    let mut code = 0;
    for (name, why) in table.failed() {
        tell(&format!("error: {name}: {why}"));
        code = 1;
    }
    if code > 0 { Ok(code) } else { Ok(said.map(|()| 0)?) }
}
