//! The seeds of the fuzz targets with a few changes each, through the same code (`tests/fuzz/`).

#[path = "../../tests/fuzz/targets.rs"]
mod targets;

use proptest::prelude::*;

/// A reader, and whether it takes a file.
struct Target {
    name: &'static str,
    run: fn(&[u8]),
    takes: fn(Vec<u8>) -> bool,
}

const TARGETS: [Target; 4] = [
    Target { name: "gguf", run: targets::gguf, takes: |data| formats::GgufFile::from_bytes("f", data).is_ok() },
    Target {
        name: "safetensors",
        run: targets::safetensors,
        takes: |data| formats::SafetensorsFile::from_bytes("f", data).is_ok(),
    },
    Target { name: "imatrix", run: targets::imatrix, takes: |data| formats::Imatrix::from_bytes("f", data).is_ok() },
    Target {
        name: "sentencepiece",
        run: targets::sentencepiece,
        takes: |data| formats::SentencePiece::parse(&data).is_ok(),
    },
];

/// Every seed with its target, in the order of names.
fn seeds() -> Vec<(&'static Target, String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for target in &TARGETS {
        let dir = format!("{}/../tests/fuzz/seeds/{}", env!("CARGO_MANIFEST_DIR"), target.name);
        let mut paths: Vec<_> = std::fs::read_dir(&dir).expect(&dir).map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            seeds.push((target, name, std::fs::read(&path).unwrap()));
        }
    }
    seeds
}

#[test]
fn seeds_are_files_of_their_kind() {
    let seeds = seeds();
    assert!(seeds.len() >= 14);
    for (target, name, data) in seeds {
        (target.run)(&data);
        // One of two files can only be opened beside the other.
        assert_eq!((target.takes)(data), name != "split", "{}/{name}", target.name);
    }
}

#[test]
fn every_truncation_is_survived() {
    for (target, name, data) in seeds() {
        // Long data after the header is cut at fewer places.
        let step = 1 + data.len() / 2000;
        for len in (0..data.len()).step_by(step) {
            let taken = std::panic::catch_unwind(|| (target.run)(&data[..len]));
            assert!(taken.is_ok(), "{}/{name} cut to {len} bytes", target.name);
        }
    }
}

/// One change to a file.
#[derive(Clone, Debug)]
enum Change {
    Byte(usize, u8),
    Bit(usize, u8),
    /// Overwrites eight bytes with a number that tends to overflow.
    Word(usize, u64),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
    Repeat(usize, usize),
}

impl Change {
    fn apply(&self, data: &mut Vec<u8>) {
        let len = data.len();
        if len == 0 {
            return;
        }
        match self {
            Change::Byte(at, value) => data[at % len] = *value,
            Change::Bit(at, bit) => data[at % len] ^= 1 << (bit % 8),
            Change::Word(at, value) => {
                let bytes = value.to_le_bytes();
                let at = at % len;
                let count = bytes.len().min(len - at);
                data[at..at + count].copy_from_slice(&bytes[..count]);
            }
            Change::Insert(at, bytes) => drop(data.splice(at % len..at % len, bytes.iter().copied())),
            Change::Remove(at, count) => drop(data.drain(at % len..(at % len + count).min(len))),
            Change::Repeat(at, count) => {
                let part = data[at % len..(at % len + count).min(len)].to_vec();
                data.splice(at % len..at % len, part);
            }
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    // Headers come first, so places near the beginning are tried more often.
    let at = || prop_oneof![0usize..64, 0usize..600, any::<u16>().prop_map(usize::from)];
    let word = prop_oneof![
        Just(u64::MAX),
        Just(1 << 63),
        Just(u64::MAX - 31),
        Just(1 << 32),
        (0u32..64).prop_map(|shift| 1 << shift),
        0u64..64,
    ];
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, value)| Change::Byte(at, value)),
        (at(), any::<u8>()).prop_map(|(at, bit)| Change::Bit(at, bit)),
        (at(), word).prop_map(|(at, value)| Change::Word(at, value)),
        (at(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (at(), 1usize..40).prop_map(|(at, count)| Change::Remove(at, count)),
        (at(), 1usize..40).prop_map(|(at, count)| Change::Repeat(at, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_seeds_never_panic(seed in 0..seeds().len(), changes in prop::collection::vec(change(), 1..5)) {
        let (target, _, mut data) = seeds().swap_remove(seed);
        changes.iter().for_each(|change| change.apply(&mut data));
        (target.run)(&data);
    }
}
