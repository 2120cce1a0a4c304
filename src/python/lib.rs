//! The Python module `quantc._quantc`: one call, which takes a request as JSON and gives the answer as JSON. What Python sees is the
//! package `quantc` around it.
//!
//! ```text
//! thread of Python's    waits without the interpreter's lock, hands updates to the callback, looks for Ctrl-C
//!  └─ thread of its own  does the work, as the program does it, but in this process
//! ```

use std::any::Any;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use quantc::{Cancel, Compare, Error, Evaluate, Job, Progress, Serve, Update};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// Bytes of the stack of the thread that works.
const STACK: usize = 16 << 20;

/// What lies between two looks for Ctrl-C.
const LOOK: Duration = Duration::from_millis(50);

/// The exit code of the program where limits are missed.
const LIMITS_MISSED: u8 = 3;

/// What the program would have printed, and its exit code.
struct Answer {
    code: u8,
    found: Value,
    /// Why the code is not 0.
    why: Vec<String>,
}

impl Answer {
    fn of(found: &impl Serialize) -> Result<Answer, Error> {
        Ok(Answer { code: 0, found: serde_json::to_value(found).map_err(no_json)?, why: Vec::new() })
    }

    /// The same, with this code if there is a reason for it.
    fn unless(self, code: u8, why: Vec<String>) -> Answer {
        Answer { code: if why.is_empty() { 0 } else { code }, why, ..self }
    }
}

fn no_json(error: serde_json::Error) -> Error {
    Error::Failed(error.to_string())
}

/// A request from its keys. Fails for one that is not known, and for a value of another type; the message names the key.
fn read<T: DeserializeOwned>(keys: Map<String, Value>) -> Result<T, Error> {
    let whole = |keys: Map<String, Value>| serde_json::from_value::<T>(Value::Object(keys));
    whole(keys.clone()).map_err(|error| {
        // What is said of a value does not say whose it is, so each is read by itself.
        let alone =
            |(key, value)| Some((key, whole(Map::from_iter([(String::clone(key), Value::clone(value))])).err()?));
        let (key, error) = keys.iter().find_map(alone).map_or((None, error), |(key, error)| (Some(key), error));
        // The names of Rust's types tell nothing to who writes Python.
        let whole = ["u8", "u32", "u64", "usize", "i64"].map(|kind| format!("expected {kind}"));
        let why = whole.iter().fold(error.to_string(), |why, kind| why.replace(kind, "expected a whole number"));
        let why = why.replace("expected f64", "expected a number");
        let named = key.filter(|key| !why.contains(&format!("`{key}`")));
        Error::Usage(named.map_or(why.clone(), |key| format!("`{key}`: {why}")))
    })
}

fn quantize(keys: Map<String, Value>, progress: Progress) -> Result<Answer, Error> {
    let job: Job = read(keys)?;
    let reports = job.run(progress)?;
    let missed = reports.iter().filter_map(|report| report.verdict.as_ref()).flat_map(|verdict| verdict.missed.clone());
    let missed = missed.collect();
    let answer = match &reports[..] {
        [report] if job.output.is_some() => Answer::of(report)?,
        all => Answer::of(&all)?,
    };
    Ok(answer.unless(LIMITS_MISSED, missed))
}

fn plan(mut keys: Map<String, Value>, progress: Progress) -> Result<Answer, Error> {
    let own = serde_json::to_value(Serve::default()).map_err(no_json)?;
    let own = own.as_object().into_iter().flatten();
    let serve = own.filter_map(|(key, _)| Some((key.clone(), keys.remove(key)?))).collect();
    let (serve, job): (Serve, Job) = (read(serve)?, read(keys)?);
    Answer::of(&job.plan(&serve, progress)?)
}

fn evaluate(keys: Map<String, Value>, progress: Progress) -> Result<Answer, Error> {
    let found = read::<Evaluate>(keys)?.run(progress)?;
    let missed = found.missed().collect();
    Ok(Answer::of(&found.json().map_err(no_json)?)?.unless(LIMITS_MISSED, missed))
}

fn compare(keys: Map<String, Value>, progress: Progress) -> Result<Answer, Error> {
    let table = read::<Compare>(keys)?.run(progress)?;
    let failed = table.failed().map(|(name, why)| format!("{name}: {why}")).collect();
    Ok(Answer::of(&table)?.unless(1, failed))
}

fn inspect(keys: &Map<String, Value>) -> Result<Answer, Error> {
    let model = keys.get("model").and_then(Value::as_str).unwrap_or_default();
    Answer::of(&quantc::inspect(Path::new(model), keys.get("program") == Some(&Value::Bool(true)))?)
}

fn demo_model(keys: &Map<String, Value>) -> Result<Answer, Error> {
    let folder = keys.get("folder").and_then(Value::as_str).unwrap_or_default();
    quantc::demo_model(Path::new(folder))?;
    Answer::of(&Value::Null)
}

/// Does what the program's command of that name does.
fn work(command: &str, asked: &str, progress: Progress) -> Result<Answer, Error> {
    let keys: Map<String, Value> = serde_json::from_str(asked).map_err(|error| Error::Usage(error.to_string()))?;
    match command {
        "quantize" => quantize(keys, progress),
        "plan" => plan(keys, progress),
        "evaluate" => evaluate(keys, progress),
        "compare" => compare(keys, progress),
        "inspect" => inspect(&keys),
        "demo_model" => demo_model(&keys),
        other => Err(Error::Usage(format!("there is no command `{other}`"))),
    }
}

/// The next update; `None` once the work is over.
fn next(updates: &Mutex<Receiver<Update>>) -> Option<Result<Update, RecvTimeoutError>> {
    match updates.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(LOOK) {
        Err(RecvTimeoutError::Disconnected) => None,
        other => Some(other),
    }
}

/// Hands updates on until the work is over. Fails as the callback does, and where Python was asked to stop.
fn attend(py: Python<'_>, updates: &Mutex<Receiver<Update>>, callback: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
    while let Some(update) = py.detach(|| next(updates)) {
        if let (Ok(update), Some(callback)) = (update, callback) {
            let share = (update.done as f64 / update.total.max(1) as f64).min(1.0);
            callback.call1((update.stage, share, update.seconds_left))?;
        }
        py.check_signals()?;
    }
    Ok(())
}

/// What a thread died of, in one sentence.
fn died(of: &(dyn Any + Send)) -> String {
    let words = of.downcast_ref::<String>().map(String::as_str).or(of.downcast_ref::<&str>().copied());
    format!("an internal check failed, which is a fault of quantc: {}", words.unwrap_or("unknown").replace('\n', " "))
}

/// Does what the program's command of that name does with a request, an object in JSON. Gives the program's exit code and an object in JSON:
/// `found`, and `why` the code is not 0.
///
/// Raises what `progress` raises, and what handlers of signals do, as Ctrl-C's; the work is over by then.
#[pyfunction]
fn run(py: Python<'_>, command: String, asked: String, callback: Option<Bound<'_, PyAny>>) -> PyResult<(u8, String)> {
    let (sender, updates) = channel();
    let (updates, cancel) = (Mutex::new(updates), Cancel::new());
    // Whoever does not listen any more has stopped the work.
    let progress = Progress::told(move |update| drop(sender.send(update.clone()))).stopped_by(&cancel);
    let worker = std::thread::Builder::new().stack_size(STACK).spawn(move || work(&command, &asked, progress));
    let worker = worker.map_err(|error| PyRuntimeError::new_err(format!("cannot start a thread: {error}")))?;
    let attended = attend(py, &updates, callback.as_ref());
    if attended.is_err() {
        cancel.cancel();
    }
    let done = py.detach(|| worker.join());
    attended?;
    let failed = |code, why: String| Answer { code, found: Value::Null, why: vec![why] };
    let Answer { code, found, why } = match done {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => failed(error.exit_code(), error.to_string()),
        Err(panic) => failed(1, died(&*panic)),
    };
    Ok((code, json!({"found": found, "why": why}).to_string()))
}

/// What Python imports.
#[pymodule]
mod _quantc {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::run;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // The words of a panic come with the error; nothing is printed into a program of somebody else's.
        std::panic::set_hook(Box::new(|_| {}));
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
