//! Which of llama.cpp's ways of splitting text a byte-level tokenizer uses: `tokenizer.ggml.pre`.
//!
//! llama.cpp knows them by name only. Its converter recognises a tokenizer by the ids that it gives for one probe text;
//! the same table is used here first, then the expressions that split the text.

use calibration::samples::Tokenizer;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::dialect::tokenizer::byte_level::{ENDINGS, GPT2, WAYS, Way};
use crate::error::{Error, Result};

/// The name for a tokenizer, and what to tell the user about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// `tokenizer.ggml.pre`.
    pub name: String,
    /// Where the name may not fit wholly.
    pub notice: Option<String>,
}

/// Finds the name for `tokenizer`, whose tokenizer.json is `json`; `chosen` is what the user gave with `--pre`.
///
/// Fails for one that is not recognised: a wrong name gives a file that loads and answers badly.
pub fn find(tokenizer: &Tokenizer, json: &Value, bos: Option<u32>, chosen: Option<&str>) -> Result<Found> {
    if let Some(name) = chosen {
        let known = Way::named(name).is_some();
        let notice = format!("`{name}` is no pre-tokenizer known here: llama.cpp refuses files that name one it lacks");
        return Ok(Found { name: name.to_owned(), notice: (!known).then_some(notice) });
    }
    if let Some(name) = by_probe(tokenizer, bos) {
        return Ok(Found { name: name.to_owned(), notice: None });
    }
    let ignore_merges = json["model"]["ignore_merges"] == true;
    if let Some(steps) = steps(&json["pre_tokenizer"]) {
        let same = WAYS.iter().filter_map(|way| {
            let equal = way.of_json == steps || self::steps(&way.pre_tokenizer()).as_ref() == Some(&steps);
            equal.then_some((way.names[0], way.ignore_merges == ignore_merges))
        });
        let same: Vec<(&str, bool)> = same.collect();
        if let Some((name, exact)) = same.iter().find(|(_, exact)| *exact).or(same.first()) {
            let notice = (!exact).then(|| {
                format!(
                    "tokenizer.json has ignore_merges {ignore_merges}, and llama.cpp's `{name}`, which splits text alike, the opposite: \
                     rare words may become other tokens"
                )
            });
            return Ok(Found { name: (*name).to_owned(), notice });
        }
    }
    Err(Error::usage(
        "tokenizer.json: this way of splitting text is none that is known here; if llama.cpp supports the model, name its \
         pre-tokenizer with --pre NAME (such as gpt-2, llama-bpe, qwen2)",
    ))
}

/// The name whose hash the ids of the probe text have.
pub(super) fn by_probe(tokenizer: &Tokenizer, bos: Option<u32>) -> Option<&'static str> {
    let bare = tokenizer.encode(PROBE, false).ok()?;
    let full = tokenizer.encode(PROBE, true).ok()?;
    // The converter's tokenizer may add a BOS that tokenizer.json does not.
    let with_bos = bos.map(|bos| [&[bos], &bare[..]].concat());
    [Some(full), Some(bare), with_bos].into_iter().flatten().find_map(|ids| {
        let digest = Sha256::digest(format!("{ids:?}"));
        let start = u64::from_be_bytes(digest[..8].try_into().expect("eight bytes"));
        HASHES.iter().rev().find(|(hash, _)| *hash == start).map(|(_, name)| *name)
    })
}

/// The expressions that a pre-tokenizer splits by, one after the other; `None` for one that is not byte-level or does
/// something else.
fn steps(pre_tokenizer: &Value) -> Option<Vec<String>> {
    let mut found = Vec::new();
    let mut bytes = false;
    let list = match pre_tokenizer["type"].as_str()? {
        "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.iter().collect(),
        _ => vec![pre_tokenizer],
    };
    for step in list {
        match step["type"].as_str()? {
            "Split" => {
                let isolated = step["behavior"] == "Isolated" && step["invert"] == false;
                // The rest between matches is dropped, and matches cover the text.
                let kept = step["behavior"] == "Removed" && step["invert"] == true;
                if !isolated && !kept {
                    return None;
                }
                let words = step["pattern"]["Regex"].as_str()?;
                found.push(words.replace(ENDINGS[0], ENDINGS[1]));
            }
            "Digits" if step["individual_digits"] == true => found.push(r"\p{N}".to_owned()),
            "Digits" => found.push(r"\p{N}+".to_owned()),
            "ByteLevel" => {
                bytes = true;
                // The default.
                if step["use_regex"] != false {
                    found.push(GPT2.to_owned());
                }
            }
            _ => return None,
        }
    }
    bytes.then_some(found)
}

/// The text whose ids tell tokenizers apart.
pub(crate) const PROBE: &str = "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\u{1f680} (normal) \u{1f636}\u{200d}\u{1f32b}\u{fe0f} (multiple emojis concatenated) \u{2705} \u{1f999}\u{1f999} 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 \u{1780}\u{17b6}\u{1793}\u{17cb}\u{178f}\u{17c2}\u{1796}\u{17b7}\u{179f}\u{17c1}\u{179f}\u{17a2}\u{17b6}\u{1785}\u{1f601} ?\u{6211}\u{60f3}\u{5728}apple\u{5de5}\u{4f5c}1314151\u{5929}\u{ff5e} ------======= \u{43d}\u{435}\u{449}\u{43e} \u{43d}\u{430} \u{411}\u{44a}\u{43b}\u{433}\u{430}\u{440}\u{441}\u{43a}\u{438} ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL";

/// The first eight bytes of the SHA-256 of the probe's ids, written as Python writes a list, and the name; where two have
/// one hash, the later counts. From the converter of llama.cpp 0c1e570.
#[rustfmt::skip]
const HASHES: &[(u64, &str)] = &[
    (0xb6e8e1518dc4305b, "chatglm-bpe"),
    (0x81d72c7348a9f0eb, "chatglm-bpe"),
    (0xa1336059768a55c9, "glm4"),
    (0x9ca2dd618e8afaf0, "glm4"),
    (0xcdf5f35325780597, "glm4"),
    (0x1431a23e583c9743, "minerva-7b"),
    (0x7e57df22b1fe23a7, "hunyuan"),
    (0xbba3b3366b646dbd, "hunyuan-dense"),
    (0xe6ddf9c6686791c1, "hy_v4"),
    (0xa6b57017d60e6edb, "falcon-h1"),
    (0x60476e1243776c4f, "falcon-h1"),
    (0x3eda48b4c4dc7de7, "falcon-h1"),
    (0x48f8e02c0359c0bb, "falcon-h1"),
    (0x81212dc7cdb7e0c1, "kimi-k2"),
    (0xd4540891389ea895, "qwen2"),
    (0x1444df51289cfa80, "qwen35"),
    (0x66b8d4e19ab16c3b, "grok-2"),
    (0xb3d1dd861f1d4c5c, "jina-v2-de"),
    (0x0fe1cf6eda062318, "gpt-2"),
    (0x9e454714343b69b9, "lfm2"),
    (0x846deafc5b0fa786, "gemma4"),
    (0x0a766d034107bc73, "spark2_5"),
    (0x0ef9807a4087ebef, "llama-bpe"),
    (0x049ecf7629871e30, "deepseek-llm"),
    (0x347715f544604f91, "deepseek-coder"),
    (0x8aeee3860c56296a, "falcon"),
    (0x0876d13b50744004, "jina-v2-en"),
    (0x9d032fcbd5501f4a, "falcon3"),
    (0x8e62295832751ca1, "bert-bge-large"),
    (0xb6dc8df998e1cfbd, "olmo"),
    (0x35d91631860c815f, "starcoder"),
    (0x3ce83efda5659b07, "gpt-2"),
    (0x32d85c31273f8019, "stablelm2"),
    (0x6221ad2852e85ce9, "refact"),
    (0x9c2227e4dd922002, "command-r"),
    (0xd772b220ace2baec, "tiny_aya"),
    (0x52df12b4c8d4176e, "cohere2moe"),
    (0xe636dc30a262dcc0, "qwen2"),
    (0xa8594e3edff7c29c, "dbrx"),
    (0xc7699093ba4255a9, "jina-v1-en"),
    (0x171aeeedd6fb548d, "jina-v2-es"),
    (0x27949a2493fc4a9f, "jina-v2-de"),
    (0xa023e9fdc5a11f03, "jina-v5-nano"),
    (0xc136ed14d01c2745, "smaug-bpe"),
    (0xc7ea5862a53e4272, "poro-chat"),
    (0x7967bfa498ade6b7, "jina-v2-code"),
    (0x7fc505bd3104ca10, "viking"),
    (0xb53802fb28e26d64, "jais"),
    (0xbc5108ee1eb6a3d6, "jais-2"),
    (0x7b3e7548e4308f52, "codeshell"),
    (0x63b97e4253352e6f, "tekken"),
    (0x855059429035d75a, "smollm"),
    (0x3c30d3ad1d6b6420, "bloom"),
    (0xbc01ce58980e1db4, "gpt3-finnish"),
    (0x4e2b24cc4770243d, "exaone"),
    (0xfcace8b9cac38ce8, "phi-2"),
    (0x60824e3c0d9401f8, "chameleon"),
    (0x8b5a93ed70405748, "roberta-bpe"),
    (0xad851be1dba641f2, "gigachat"),
    (0xd4c8f286ea6b520b, "megrez"),
    (0x877081d19cf6996e, "deepseek-v3"),
    (0xb3f499bb4255f8ca, "deepseek-r1-qwen"),
    (0xccc2ef013c104be7, "gpt-4o"),
    (0x7dec86086fcc38b6, "superbpe"),
    (0x1994ffd01900cfb3, "trillion"),
    (0x96a5f08be6259352, "bailingmoe"),
    (0xd353350c764d8c3b, "llama4"),
    (0x0e9433cbbb161f89, "pixtral"),
    (0xd5f1dd6f980fec56, "seed-coder"),
    (0xb0a6b1c0bd5998eb, "a.x-4.0"),
    (0xf6791d196f87ce6b, "midm-2.0"),
    (0x169bf0296a13c4d9, "lfm2"),
    (0x2085e1638f6c377a, "exaone4"),
    (0xa1e163ecab2e718a, "mellum"),
    (0xa0b64b4385f12366, "modern-bert"),
    (0x49fc0303c9e0d2c2, "afmoe"),
    (0x9b1be57e70d20d95, "bailingmoe2"),
    (0x53e325976a6e1423, "granite-docling"),
    (0xf4f37b6c8eb9ea29, "minimax-m2"),
    (0x4a2e2abae11ca2b8, "kormo"),
    (0x9d70134b369a70e5, "youtu"),
    (0x16389f0a1f51ee53, "solar-open"),
    (0x6c81ce329e080288, "exaone-moe"),
    (0xd30d75d9059f1aa2, "qwen35"),
    (0xb4b8ca1f9769494f, "joyai-llm"),
    (0xe4d54df1ebc1f2b9, "kanana2"),
    (0x862f827721df9560, "f2llmv2"),
    (0x62f6fb0a6fd5098c, "sarvam-moe"),
    (0xf728162c1315c26e, "talkie"),
    (0x36f3066e97b7f399, "minicpm5"),
    (0xf241072145675bf8, "granite-embed-multi-97m"),
    (0x789696f5946cc0fc, "granite-embed-multi-311m"),
    (0x9dcf830ee9990cdb, "mellum2"),
    (0x972da7b59cec44d1, "laguna"),
    (0x653660222fb704f6, "ufakzeka"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn read(path: &str) -> Value {
        let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    fn find_in(json: &Value, chosen: Option<&str>) -> Result<Found> {
        find(&Tokenizer::from_json(json.to_string().as_bytes()).unwrap(), json, Some(0), chosen)
    }

    #[test]
    fn tables_are_whole() {
        assert_eq!((HASHES.len(), PROBE.chars().count()), (95, 350));
        assert!(HASHES.iter().enumerate().all(|(i, (hash, _))| HASHES[i + 1..].iter().all(|(other, _)| other != hash)));
        let mut json = read("tests/fixtures/text/byte_level.json");
        for way in WAYS.iter().filter(|way| way.is_of_bytes()) {
            let name = way.names[0];
            assert!(steps(&way.pre_tokenizer()).is_some(), "{name}");
            // Expressions that can be read, and lose nothing of a text.
            json["pre_tokenizer"] = way.pre_tokenizer();
            let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).expect(name);
            let bare = |text: &str| tokenizer.encode(text, false).expect(name).len();
            let text = "It's  12345 words,\n don't\t\u{4e2d}\u{6587} \u{1f600}\r\n x_y ";
            assert!(bare(text) > 12 && bare("") == 0, "{name}");
        }
    }

    /// The names and the hashes in llama.cpp's source (`tests/runtimes/tokens.py`).
    #[test]
    fn every_name_of_llama_cpp_is_known() {
        let source = read("tests/fixtures/gguf/pre_tokenizers.json");
        let names = source["names"].as_object().unwrap();
        assert!(names.len() > 90);
        for (name, ignores) in names {
            let way = Way::named(name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(json!(way.ignore_merges), *ignores, "{name}");
        }
        let ours: usize = WAYS.iter().map(|way| way.names.len()).sum();
        assert_eq!(ours, names.len(), "a name that llama.cpp does not know, or one that is here twice");
        let hashes = source["hashes"].as_object().unwrap();
        for (hash, name) in hashes {
            let start = u64::from_str_radix(&hash[..16], 16).unwrap();
            let found = HASHES.iter().rev().find(|(hash, _)| *hash == start);
            assert_eq!(found.map(|(_, name)| json!(name)), Some(name.clone()), "{hash}");
        }
        assert_eq!(hashes.len(), HASHES.len());
    }

    #[test]
    fn a_tokenizer_of_unknown_ids_is_known_by_its_expressions() {
        assert_eq!(find_in(&read("src/demo/model/tokenizer.json"), None).unwrap().name, "smollm");
        let llama = read("tests/fixtures/text/byte_level.json");
        let found = find_in(&llama, None).unwrap();
        assert_eq!((found.name.as_str(), &found.notice), ("smaug-bpe", &None), "Llama 3's words, merges not ignored");
        let mut words = llama.clone();
        words["model"]["ignore_merges"] = true.into();
        assert_eq!(find_in(&words, None).unwrap(), Found { name: "llama-bpe".to_owned(), notice: None });
        // The same words as a single step, and said the other way round.
        let mut plain = read("src/demo/model/tokenizer.json");
        plain["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        assert_eq!(find_in(&plain, None).unwrap().name, "gpt-2");
        plain["model"]["ignore_merges"] = true.into();
        assert!(find_in(&plain, None).unwrap().notice.unwrap().contains("the opposite"));
    }

    #[test]
    fn an_unknown_way_is_refused_until_the_user_names_one() {
        let mut json = read("tests/fixtures/text/byte_level.json");
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d+|\D+".into();
        let error = find_in(&json, None).unwrap_err();
        assert!(error.to_string().contains("--pre NAME") && error.exit_code() == 2, "{error}");
        assert_eq!(find_in(&json, Some("falcon")).unwrap(), Found { name: "falcon".to_owned(), notice: None });
        assert!(find_in(&json, Some("flacon")).unwrap().notice.unwrap().contains("`flacon` is no pre-tokenizer known"));
    }
}
