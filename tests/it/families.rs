//! The tiny checkpoints of every family: `tests/fixtures/make_families.py` says what they are and how weights are made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use formats::{Dtype, ShardedWriter, TensorSpec};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Where the checkpoints are described.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families")
}

/// The name of every checkpoint.
pub fn names() -> Vec<String> {
    let entries = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    let mut names: Vec<String> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What `work` gives for each name, in their order.
///
/// There are as many workers as cores, each with one thread to compute with: models this small leave more than one thread nothing but waiting.
pub fn each<T: Send>(names: &[impl AsRef<str> + Sync], work: impl Fn(&str) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut found = Vec::new();
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(name) = names.get(place) else { break };
            found.push((place, work(name.as_ref())));
        }
        found
    };
    let alone = || rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(worker);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut found = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(alone)).collect();
        let results =
            workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        results.flatten().collect::<Vec<_>>()
    });
    found.sort_by_key(|(place, _)| *place);
    found.into_iter().map(|(_, result)| result).collect()
}

/// A folder with config.json and model.safetensors of the checkpoint `name`; gone once dropped.
pub fn checkpoint(name: &str) -> TempDir {
    checkpoint_of(&folder().join(name))
}

/// The same of the checkpoint that `described` describes.
pub fn checkpoint_of(described: &Path) -> TempDir {
    let room = tempfile::tempdir().unwrap();
    std::fs::copy(described.join("config.json"), room.path().join("config.json")).unwrap();
    let tensors = tensors(described);
    let specs = tensors.iter().map(|tensor| tensor.spec.clone()).collect();
    let writer = ShardedWriter::create(room.path(), specs, u64::MAX, &BTreeMap::new()).unwrap();
    for tensor in &tensors {
        writer.write(&tensor.spec.name, &tensor.bytes()).unwrap();
    }
    writer.finish().unwrap();
    room
}

/// A tensor and the range of its values.
struct Generated {
    spec: TensorSpec,
    center: f64,
    amplitude: f64,
}

/// The tensors of the checkpoint that a folder describes, in the order of its tensors.json.
fn tensors(described: &Path) -> Vec<Generated> {
    let text = std::fs::read(described.join("tensors.json")).unwrap();
    let list: Vec<(String, Vec<usize>, Dtype, f64, f64)> = serde_json::from_slice(&text).unwrap();
    let tensor = |(name, shape, dtype, center, amplitude)| {
        let spec = TensorSpec { name, shape, dtype };
        Generated { spec, center, amplitude }
    };
    list.into_iter().map(tensor).collect()
}

impl Generated {
    fn bytes(&self) -> Vec<u8> {
        let seed = self.spec.name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
        });
        let count: usize = self.spec.shape.iter().product();
        let reals = (1..=count as u64).map(|i| {
            let z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            let unit = ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 24);
            (unit - 0.5) * (2.0 * self.amplitude) + self.center
        });
        // To bfloat16, to nearest even: the upper half of a float32.
        let upper = |real: f64| {
            let bits = (real as f32).to_bits();
            ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
        };
        match self.spec.dtype {
            Dtype::BF16 => reals.flat_map(|x| upper(x).to_le_bytes()).collect(),
            Dtype::F32 => reals.flat_map(|x| (u32::from(upper(x)) << 16).to_le_bytes()).collect(),
            Dtype::U8 => reals.map(|x| x.floor() as u8).collect(),
            Dtype::I64 => reals.flat_map(|x| (x.floor() as i64).to_le_bytes()).collect(),
            other => panic!("{}: no values of type {other} are made", self.spec.name),
        }
    }
}

#[test]
fn weights_are_those_that_the_goldens_were_computed_with() {
    let recorded: BTreeMap<String, Value> =
        serde_json::from_slice(&std::fs::read(folder().join("sha256.json")).unwrap()).unwrap();
    let names = names();
    assert_eq!(names, recorded.keys().cloned().collect::<Vec<_>>(), "sha256.json lists every checkpoint");
    assert!(names.len() >= 60, "the fixtures are there");
    each(&names, |name| {
        let mut hash = Sha256::new();
        tensors(&folder().join(name)).iter().for_each(|tensor| hash.update(tensor.bytes()));
        assert_eq!(format!("{:x}", hash.finalize()), recorded[name].as_str().unwrap(), "{name}");
    });
}

#[test]
fn a_checkpoint_is_written_as_it_is_described() {
    let room = checkpoint("qwen2_tied");
    let file = formats::SafetensorsFile::open(room.path().join("model.safetensors")).unwrap();
    let expected = tensors(&folder().join("qwen2_tied"));
    assert_eq!(file.tensors().len(), expected.len());
    for tensor in expected {
        let found = file.get(&tensor.spec.name).unwrap();
        assert_eq!((found.dtype, found.shape), (tensor.spec.dtype, tensor.spec.shape.as_slice()));
        assert_eq!(found.data, tensor.bytes(), "{}", tensor.spec.name);
    }
    assert!(room.path().join("config.json").is_file());
}
