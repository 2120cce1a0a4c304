//! The device, as data, and the engine that it stands for.

use std::str::FromStr;
use std::sync::Arc;

use kernels::{Cpu, Cuda, Memory, cuda};
use serde::{Deserialize, Serialize};

use super::at_least_one;
use crate::build::Means;
use crate::error::{Error, Result};
use crate::memory;
use crate::progress::Progress;

/// Runs an expression with the backend of an engine.
#[cfg_attr(doc, doc(hidden))]
#[macro_export]
macro_rules! with_backend {
    ($engine:expr, $backend:ident => $work:expr) => {
        match $engine {
            $crate::api::Engine::Cpu($backend) => $work,
            $crate::api::Engine::Cuda($backend, _) => $work,
        }
    };
}

/// Threads that are started for each core at the most.
const MOST_THREADS: usize = 4;

/// Bytes of the stack of a thread that works.
const STACK: usize = 16 << 20;

/// A device that computes, written as `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// ```
/// use quantc::Device;
/// assert_eq!("cuda".parse::<Device>()?, Device::cuda(0));
/// assert_eq!(Device::default(), Device::auto());
/// assert!("tpu".parse::<Device>().is_err());
/// # Ok::<(), quantc::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Device(Kind);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
}

impl Device {
    /// A GPU if one can be used, and else the CPU.
    pub fn auto() -> Device {
        Device(Kind::Auto)
    }

    /// The CPU.
    pub fn cpu() -> Device {
        Device(Kind::Cpu)
    }

    /// The NVIDIA GPU of this number, from 0.
    pub fn cuda(ordinal: usize) -> Device {
        Device(Kind::Cuda(ordinal))
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Kind::Auto => f.write_str("auto"),
            Kind::Cpu => f.write_str("cpu"),
            Kind::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Device> {
        let known = match text.split_once(':') {
            None if text == "auto" => Some(Device::auto()),
            None if text == "cpu" => Some(Device::cpu()),
            None if text == "cuda" => Some(Device::cuda(0)),
            Some(("cuda", number)) => number.parse().ok().map(Device::cuda),
            _ => None,
        };
        known.ok_or_else(|| {
            Error::usage(format!("--device `{text}` is not known: there are auto, cpu, cuda and cuda:N"))
        })
    }
}

impl TryFrom<String> for Device {
    type Error = Error;

    fn try_from(text: String) -> Result<Device> {
        text.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> String {
        device.to_string()
    }
}

/// The type in which calibration multiplies. Measuring is always in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Math {
    /// bfloat16 on devices where that is faster, f32 elsewhere.
    #[default]
    Auto,
    /// f32.
    F32,
}

/// Where and how it is computed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Compute {
    /// The device.
    pub device: Device,
    /// Number of threads. Without, those of the rayon pool that the caller works in, which is one for each core where nobody has said
    /// otherwise. Results do not depend on it.
    pub threads: Option<usize>,
    /// Memory of the GPU to use, as `8GiB` or `500MB`; most of what is free without. What does not fit waits in the host's.
    pub gpu_memory: Option<String>,
    /// The type in which calibration multiplies.
    pub math: Math,
    /// On a GPU: wait for each operation, and print where the time went at the end.
    pub profile: bool,
}

impl Compute {
    /// On this device, with everything else as it is by default.
    pub fn on(device: Device) -> Compute {
        Compute { device, ..Compute::default() }
    }

    /// The same, once its threads are those of the whole process, which must have no rayon pool yet; a note where they are fewer.
    ///
    /// Fails where they cannot be started.
    #[cfg_attr(doc, doc(hidden))]
    pub fn of_process(self) -> Result<(Compute, Option<String>)> {
        let (most, fewer) = self.threads()?;
        rayon::ThreadPoolBuilder::new().num_threads(most).build_global().map_err(|error| no_threads(most, &error))?;
        Ok((Compute { threads: None, ..self }, fewer))
    }

    /// What of it changes what is written.
    #[cfg_attr(doc, doc(hidden))]
    pub fn means(&self) -> Means {
        let device = match self.device.0 {
            Kind::Auto => None,
            Kind::Cpu => Some("cpu"),
            Kind::Cuda(_) => Some("cuda"),
        };
        Means { device, math: if self.math == Math::F32 { "f32" } else { "auto" } }
    }

    /// How many threads to start; a note where that is fewer than were asked for.
    fn threads(&self) -> Result<(usize, Option<String>)> {
        at_least_one("--threads", self.threads.map(|threads| threads as u64))?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.unwrap_or(cores);
        let most = threads.min(cores * MOST_THREADS);
        let fewer = (most < threads)
            .then(|| format!("--threads {threads} is more than {cores} cores can use; {most} were started"));
        Ok((most, fewer))
    }

    /// Does `work` with the engine that was asked for, on its threads.
    ///
    /// Fails where a GPU was asked for and cannot be used, where threads cannot be started, and as `work` does.
    #[cfg_attr(doc, doc(hidden))]
    pub fn run<T: Send>(
        &self,
        progress: &mut Progress,
        work: impl FnOnce(&Engine, &mut Progress) -> Result<T> + Send,
    ) -> Result<T> {
        let run = |progress: &mut Progress| {
            let (engine, left) = self.engine()?;
            left.into_iter().for_each(|note| progress.say(&format!("note: {note}")));
            let name = with_backend!(&engine, backend => backend.name());
            tracing::info!("computing on {name}");
            let done = work(&engine, progress)?;
            engine.profile().into_iter().for_each(|profile| progress.print(&profile));
            Ok(done)
        };
        if self.threads.is_none() {
            return run(progress);
        }
        let (most, fewer) = self.threads()?;
        fewer.into_iter().for_each(|note| progress.say(&format!("note: {note}")));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(most).stack_size(STACK).build();
        pool.map_err(|error| no_threads(most, &error))?.install(|| run(progress))
    }

    /// The engine that was asked for, and for `auto` why a GPU that is there was left.
    ///
    /// Fails where a GPU was asked for and cannot be used.
    fn engine(&self) -> Result<(Engine, Option<String>)> {
        let exact = self.math == Math::F32;
        let budget = self.gpu_memory.as_deref().map(bytes).transpose()?;
        let cpu = || Engine::Cpu(if exact { Cpu::exact() } else { Cpu::default() });
        let gpu = |ordinal: usize| -> Result<Engine> {
            let card = cuda::Card::open(ordinal)?;
            let card = Arc::new(if self.profile { card.profiled() } else { card });
            let cuda = Cuda::new(card.clone(), budget)?.with_host(memory::Free::now().map_or(0, |free| free.bytes / 2));
            Ok(Engine::Cuda(if exact { cuda.exact() } else { cuda }, card))
        };
        match self.device.0 {
            Kind::Cpu if budget.is_some() => Err(Error::usage("--gpu-memory is for a GPU, and --device is cpu")),
            Kind::Cpu => Ok((cpu(), None)),
            Kind::Cuda(ordinal) => Ok((gpu(ordinal)?, None)),
            Kind::Auto => match cuda::cards() {
                // No driver, or no card: nothing is missed.
                Err(_) => Ok((cpu(), None)),
                Ok(cards) => match cards.iter().find(|card| card.unusable.is_none()).map(|card| gpu(card.ordinal)) {
                    Some(Ok(engine)) => Ok((engine, None)),
                    Some(Err(error)) => Ok((cpu(), Some(format!("{} is not used: {error}", cards[0].name)))),
                    None => {
                        let why = cards.first().and_then(|card| Some((card.name.clone(), card.unusable.clone()?)));
                        Ok((cpu(), why.map(|(name, why)| format!("{name} is not used: {why}"))))
                    }
                },
            },
        }
    }
}

/// What to say where threads cannot be started.
fn no_threads(most: usize, error: &rayon::ThreadPoolBuildError) -> Error {
    // Its cause stands in its own words already.
    Error::failed(format!(
        "cannot start {most} threads: {error}; allow this process more of them (ulimit -u) or more memory, or give fewer --threads"
    ))
}

/// What computes.
pub enum Engine {
    /// The CPU.
    Cpu(Cpu),
    /// A GPU, and the card behind it.
    Cuda(Cuda, Arc<cuda::Card>),
}

impl Engine {
    /// Where a GPU's time went, if that was asked for, and how much was copied to it in no time.
    fn profile(&self) -> Option<String> {
        match self {
            Engine::Cpu(_) => None,
            Engine::Cuda(cuda, card) => {
                let ahead = cuda.usage().ahead as f64 / 1e6;
                Some(format!("{}sent ahead {ahead:.3} MB\n", card.profile()?.text()))
            }
        }
    }
}

/// Bytes, as `8GiB`, `8G` or `500MB`: powers of 1024 with an i, of 1000 without.
fn bytes(text: &str) -> Result<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "g" | "gb" => 1_000_000_000,
        "gi" | "gib" => 1 << 30,
        "m" | "mb" => 1_000_000,
        "k" | "kb" => 1_000,
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        _ => 0,
    };
    match number.parse::<f64>() {
        Ok(number) if number > 0.0 && number < 1e6 && unit > 0 => Ok((number * unit as f64) as u64),
        _ => Err(Error::usage(format!("--gpu-memory `{text}` is not a size; say 8GiB or 500MB"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_written_as_they_are_read() {
        for (text, device) in [("auto", Device::auto()), ("cpu", Device::cpu()), ("cuda:3", Device::cuda(3))] {
            assert_eq!((text.parse::<Device>().unwrap(), device.to_string()), (device, text.to_owned()));
        }
        for wrong in ["", "cuda:", "cuda:x", "cuda:-1", "CPU", "cpu:0"] {
            let error = wrong.parse::<Device>().unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("auto, cpu, cuda and cuda:N"), "{error}");
        }
        let compute: Compute = serde_json::from_str(r#"{"device": "cuda:1", "math": "f32"}"#).unwrap();
        assert_eq!(compute, Compute { math: Math::F32, ..Compute::on(Device::cuda(1)) });
        assert!(serde_json::from_str::<Compute>(r#"{"device": "gpu"}"#).unwrap_err().to_string().contains("`gpu`"));
    }

    #[test]
    fn work_has_the_threads_that_were_asked_for() {
        let of = |threads| {
            let compute = Compute { threads, ..Compute::on(Device::cpu()) };
            compute.run(&mut Progress::silent(), |_, _| Ok(rayon::current_num_threads()))
        };
        assert_eq!(of(Some(3)).unwrap(), 3);
        assert_eq!(of(Some(0)).unwrap_err().exit_code(), 2);
        assert_eq!(of(None).unwrap(), rayon::current_num_threads());
    }
}
