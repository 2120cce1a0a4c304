//! Runs quantc, and makes the models and texts it is run on.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// A text to calibrate on where it does not matter which: the bundled one takes longer to tokenize than a small model to solve.
pub const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/demo/calibration.txt");

/// Copies of a file with one to three bytes of each changed, the same ones in every run.
pub fn damaged(good: &[u8], copies: usize) -> impl Iterator<Item = Vec<u8>> + '_ {
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    (0..copies).map(move |_| {
        let mut bytes = good.to_vec();
        for _ in 0..1 + random(3) {
            let at = random(bytes.len());
            bytes[at] = random(256) as u8;
        }
        bytes
    })
}

/// A folder of its own for one test; gone afterwards.
pub struct Room(TempDir);

impl Room {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The path of a new file with this content.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// The built-in model without the upper half of its layers, to be damaged: what most tests look at is in every layer, and
    /// half of them takes half the time.
    pub fn model(&self) -> Model {
        let model = self.whole_model();
        model.keep_layers(2);
        model
    }

    /// A copy of the built-in model.
    pub fn whole_model(&self) -> Model {
        let folder = self.path("model");
        std::fs::create_dir_all(&folder).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo/model");
        for entry in std::fs::read_dir(source).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
        Model(folder)
    }

    /// Runs `quantc` in this folder, without the network.
    pub fn run<A: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Run {
        self.run_keeping(Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"), args)
    }

    /// Runs `quantc` in this folder, with a cache folder of its own.
    pub fn run_keeping<A: AsRef<std::ffi::OsStr>>(&self, cache: PathBuf, args: impl IntoIterator<Item = A>) -> Run {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
        Run(command
            .args(args)
            .env("QUANTC_CACHE", cache)
            .env("HF_HUB_OFFLINE", "1")
            .current_dir(self.0.path())
            .output()
            .unwrap())
    }

    /// Runs a line of sh in this folder, without the network.
    #[cfg(unix)]
    pub fn shell(&self, line: &str) -> Run {
        let mut command = Command::new("sh");
        Run(command.args(["-c", line]).current_dir(self.0.path()).env("HF_HUB_OFFLINE", "1").output().unwrap())
    }

    /// Everything in the folder, by name, hidden files too.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// A model folder.
pub struct Model(PathBuf);

impl Model {
    /// A model that is somewhere else.
    pub fn at(folder: &Path) -> Model {
        Model(folder.to_owned())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Changes config.json.
    pub fn config(&self, change: impl FnOnce(&mut Value)) {
        let path = self.path("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(path, config.to_string()).unwrap();
    }

    /// Changes the header and the data of model.safetensors.
    pub fn weights(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>, &mut Vec<u8>)) {
        let path = self.path("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut data = bytes[8 + length..].to_vec();
        change(header.as_object_mut().unwrap(), &mut data);
        let header = header.to_string().into_bytes();
        let whole = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
        std::fs::write(path, whole).unwrap();
    }

    /// Leaves out all layers from this one on.
    pub fn keep_layers(&self, count: usize) {
        self.config(|config| config["num_hidden_layers"] = count.into());
        let layer = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
        self.keep_tensors(|name| layer(name).is_none_or(|layer| layer < count));
    }

    /// Leaves out all other tensors than these.
    pub fn keep_tensors(&self, keep: impl Fn(&str) -> bool) {
        self.weights(|header, data| {
            header.retain(|name, _| keep(name));
            let mut kept = Vec::new();
            for (_, tensor) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
                let [from, to] = [0, 1].map(|end| tensor["data_offsets"][end].as_u64().unwrap() as usize);
                tensor["data_offsets"] = [kept.len(), kept.len() + to - from].into();
                kept.extend_from_slice(&data[from..to]);
            }
            *data = kept;
        });
    }

    /// Overwrites the first value of a bf16 tensor.
    pub fn poison(&self, tensor: &str, bits: u16) {
        self.weights(|header, data| {
            let at = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
            data[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        });
    }
}

/// Processes that a process has started, whichever of its threads did; none where it is gone.
pub fn children(process: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten();
    let listed = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok());
    listed.flat_map(|list| list.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<u32>>()).collect()
}

/// How a run ended.
pub struct Run(Output);

impl Run {
    pub fn of(output: Output) -> Run {
        Run(output)
    }

    pub fn code(&self) -> Option<i32> {
        self.0.status.code()
    }

    pub fn stdout(&self) -> String {
        String::from_utf8(self.0.stdout.clone()).unwrap()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8(self.0.stderr.clone()).unwrap()
    }

    /// Demands a refusal: this exit code, nothing on stdout, and one line on stderr that holds all of `words`, beside what a run that
    /// has begun says it will take.
    #[track_caller]
    pub fn refuses(&self, code: i32, words: &[&str]) {
        let (found, told) = (self.code(), self.stderr());
        assert_eq!(found, Some(code), "exit code; stderr: {told}");
        assert!(!told.contains("panicked"), "{told}");
        assert_eq!(self.stdout(), "", "a refusal prints nothing on stdout");
        let lines: Vec<&str> = told
            .lines()
            .filter(|line| {
                let said = [" takes up to about ", " is known from an earlier run"];
                !line.trim().is_empty() && !said.iter().any(|words| line.contains(words))
            })
            .collect();
        assert_eq!(lines.len(), 1, "one sentence: {told}");
        assert!(lines[0].starts_with("error: "), "{told}");
        for word in words {
            assert!(told.contains(word), "`{word}` is missing in: {told}");
        }
    }

    #[track_caller]
    pub fn succeeds(&self) {
        assert_eq!(self.code(), Some(0), "{}", self.stderr());
    }
}
