//! The ways of splitting texts that llama.cpp knows by name (`tokenizer.ggml.pre`), held to its own ids by `tests/runtimes/tokens.py`.

use serde_json::{Value, json};

use crate::tokenizer::words::{self, LLAMA3, QWEN2};

/// Mistral's since Nemo: case ends a word. llama.cpp knows the case of ASCII alone, and takes marks for punctuation.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same as the tokenizers have it.
const TEKKEN_OF_JSON: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GPT-4o's: the same with English endings, and numbers by three.
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same with marks, as llama.cpp has it for some.
const GPT_4O_MARKS: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^a-z]]*[\p{L}\p{M}&&[^A-Z]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^a-z]]+[\p{L}\p{M}&&[^A-Z]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same without case, as llama.cpp has it for Cohere's.
const GPT_4O_CASELESS: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same as the tokenizers have it.
const GPT_4O_OF_JSON: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek V3's, one after the other.
const DEEPSEEK_V3: &[&str] = &[
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];

/// DeepSeek's first, one after the other: letters of scripts with case, punctuation, those of Chinese, Japanese, Korean.
const DEEPSEEK_LLM: &[&str] = &[
    "[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
];

/// The same as the tokenizers have it, whose vocabularies join no digits.
const DEEPSEEK_LLM_OF_JSON: &[&str] =
    &[DEEPSEEK_LLM[0], DEEPSEEK_LLM[1], DEEPSEEK_LLM[2], DEEPSEEK_LLM[3], DEEPSEEK_LLM[4], r"\p{N}"];

/// DeepSeek Coder's, one after the other.
const DEEPSEEK_CODER: &[&str] = &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"];

/// Falcon's, one after the other.
const FALCON: &[&str] = &[
    r"[\p{P}\$\+<=>\^~\|`]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"[0-9][0-9][0-9]",
];

/// Qwen 3.5's: marks belong to their letters.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What llama.cpp does, one after the other, when a file says `default`.
const DEFAULT: &[&str] = &[
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// What the third of DeepSeek V3's splits by, which others have behind steps of their own.
const DEEPSEEK_V3_LAST: &str = DEEPSEEK_V3[2];

/// Spark's: as DeepSeek V3's, with line breaks apart.
const SPARK: &[&str] = &[
    r"\p{N}{1,3}",
    DEEPSEEK_V3[1],
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+|[\r\n]|\\s+(?!\\S)|\\s+",
    r"\p{N}",
];

/// Youtu's: scripts of East Asia apart, then words with their marks. llama.cpp does not look at the case of letters here.
const YOUTU: &[&str] = &[
    "[\u{ac00}-\u{d7a3}\u{3131}-\u{318e}]+|[\u{ff01}\u{2026}\u{201c}\u{201d}\u{2018}\u{2019}\u{2014}\u{ff1a}\u{ff1b}\u{ff0c}\u{3001}-\u{303f}\u{fe30}-\u{fe4f}]+|[\u{3105}-\u{312f}]+|[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// The same as the tokenizers have it: GPT-4o's, with each digit alone.
const YOUTU_OF_JSON: &[&str] = &[
    YOUTU[0],
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Numbers in groups of three, counted from the right.
const DIGITS_FROM_RIGHT: &str = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))";

/// The same as Cohere's tokenizers have it: not where a letter stands behind the number.
const DIGITS_OF_JSON: &str = r"\d{1,3}(?=(?:\d{3})*\b)";

/// AFMoE's, one after the other: numbers, scripts of Asia, DeepSeek V3's last.
const AFMOE: &[&str] = &[
    DIGITS_FROM_RIGHT,
    "[\u{4e00}-\u{9fff}\u{3400}-\u{4dbf}\u{8c48}-\u{faff}\u{3040}-\u{309f}\u{30a0}-\u{30ff}\u{ff65}-\u{ff9f}\u{2f00}-\u{2fdf}\u{e40}-\u{e7f}\u{e80}-\u{eff}\u{1780}-\u{17ff}\u{1000}-\u{109f}\u{aa60}-\u{aa7f}\u{a9e0}-\u{a9ff}\u{ac00}-\u{d7af}\u{1100}-\u{11ff}]+",
    DEEPSEEK_V3_LAST,
];

/// Jais 2's: Llama 3's, with runs of spaces by powers of two.
const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";

/// Bloom's: words with the space before them, up to some marks of punctuation.
const BLOOM: &str = " ?[^(\\s|.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c})]+";

/// Chameleon's, one after the other; its images' tokens are special ones, too.
const CHAMELEON: &[&str] = &[
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    "([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    GPT2,
];

/// SuperBPE's: numbers, cut before groups of three that are counted from the right.
const SUPERBPE: &[&str] = &[r"\p{N}+", r"(?=(\d{3})+(?!\d))"];

/// Bailing's: Qwen 2's, with a line break at a time.
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Seed Coder's: Qwen 2's, with line breaks apart from what stands before.
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 2's without English endings, so that Turkish ones stay.
const UFAKZEKA: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// EXAONE's with experts: words of several with the spaces between them.
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";

/// MiniCPM 5's, one after the other.
const MINICPM5: &[&str] = &[
    r"\p{N}{1,3}",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Kimi's, without the case of letters and without marks, which llama.cpp does not look at here.
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Lines and the breaks between them.
const LINES: &str = r"[^\n]+|[\n]+";

/// What a byte-level pre-tokenizer splits by itself.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// What a way does to a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Steps {
    /// [`GPT2`], which the tokenizers library does by itself; with `digits` each digit stands alone.
    Plain { digits: bool },
    /// Splits by expressions, one after the other, and then spells bytes.
    Bytes(&'static [&'static str]),
    /// Splits by an expression, and leaves characters as they are. With `spaces` these become `▁` first, with `runs` several line breaks
    /// are one token, where there is one.
    Pieces { words: &'static str, spaces: bool, runs: bool },
}

/// One of llama.cpp's ways.
#[derive(Debug)]
pub(super) struct Way {
    /// Names of it, the first being the one that is written for tokenizers that are known by nothing else.
    pub names: &'static [&'static str],
    pub steps: Steps,
    /// Whether a word that is a token as a whole is taken as it is.
    pub ignore_merges: bool,
    /// Whether texts start with the BOS token when a file does not say.
    pub add_bos: bool,
    /// The expressions of the tokenizers that it is meant for, where llama.cpp has them otherwise.
    pub of_json: &'static [&'static str],
}

/// A way that joins by merges alone and puts nothing before texts.
const fn way(names: &'static [&'static str], steps: Steps) -> Way {
    Way { names, steps, ignore_merges: false, add_bos: false, of_json: &[] }
}

/// Every way. Where two split texts alike, the first counts.
pub(super) const WAYS: &[Way] = &[
    way(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "roberta-bpe",
        ],
        Steps::Plain { digits: false },
    ),
    way(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        Steps::Plain { digits: true },
    ),
    Way {
        ignore_merges: true,
        add_bos: true,
        ..way(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
            Steps::Bytes(&[LLAMA3]),
        )
    },
    Way { ignore_merges: true, ..way(&["glm4", "glm5"], Steps::Bytes(&[LLAMA3])) },
    way(&["smaug-bpe", "dbrx", "chatglm-bpe"], Steps::Bytes(&[LLAMA3])),
    way(
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "hunyuan", "solar-open", "megrez", "grok-2"],
        Steps::Bytes(&[QWEN2]),
    ),
    way(&["qwen35"], Steps::Bytes(&[QWEN35])),
    Way { ignore_merges: true, add_bos: true, of_json: &[TEKKEN_OF_JSON], ..way(&["tekken"], Steps::Bytes(&[TEKKEN])) },
    Way {
        of_json: &[GPT_4O_OF_JSON],
        ..way(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], Steps::Bytes(&[GPT_4O]))
    },
    Way {
        ignore_merges: true,
        of_json: &[GPT_4O_OF_JSON],
        ..way(&["granite-embed-multi-97m"], Steps::Bytes(&[GPT_4O_MARKS]))
    },
    Way { of_json: &[words::KIMI], ..way(&["kimi-k2"], Steps::Bytes(&[KIMI])) },
    Way { of_json: DEEPSEEK_LLM_OF_JSON, ..way(&["deepseek-llm"], Steps::Bytes(DEEPSEEK_LLM)) },
    way(&["deepseek-coder"], Steps::Bytes(DEEPSEEK_CODER)),
    way(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], Steps::Bytes(DEEPSEEK_V3)),
    way(&["spark2_5"], Steps::Bytes(SPARK)),
    way(&["falcon"], Steps::Bytes(FALCON)),
    Way {
        of_json: &[DIGITS_OF_JSON, GPT_4O_OF_JSON],
        ..way(&["tiny_aya", "cohere2moe"], Steps::Bytes(&[DIGITS_FROM_RIGHT, GPT_4O_CASELESS]))
    },
    way(&["afmoe"], Steps::Bytes(AFMOE)),
    way(&["bailingmoe", "bailingmoe2", "llada-moe"], Steps::Bytes(&[BAILING])),
    way(&["seed-coder"], Steps::Bytes(&[SEED_CODER])),
    way(&["exaone-moe"], Steps::Bytes(&[EXAONE_MOE])),
    way(&["ufakzeka"], Steps::Bytes(&[UFAKZEKA])),
    way(&["laguna"], Steps::Bytes(&[LINES, QWEN2])),
    way(&["jais-2"], Steps::Bytes(&[JAIS2])),
    way(&["superbpe"], Steps::Bytes(SUPERBPE)),
    way(&["poro-chat", "bloom", "gpt3-finnish"], Steps::Bytes(&[BLOOM])),
    way(&["viking"], Steps::Bytes(&[BLOOM, r"\p{N}"])),
    Way { add_bos: true, ..way(&["chameleon"], Steps::Bytes(CHAMELEON)) },
    Way { ignore_merges: true, ..way(&["minicpm5"], Steps::Bytes(MINICPM5)) },
    Way { ignore_merges: true, of_json: YOUTU_OF_JSON, ..way(&["youtu"], Steps::Bytes(YOUTU)) },
    way(&["default"], Steps::Bytes(DEFAULT)),
    way(&["gemma4", "granite-embed-multi-311m"], Steps::Pieces { words: LINES, spaces: true, runs: true }),
    way(&["sarvam-moe"], Steps::Pieces { words: LINES, spaces: true, runs: false }),
    way(&["whitespace"], Steps::Pieces { words: r"\S+", spaces: false, runs: false }),
];

/// How English endings are spelt in tokenizer.json, and how here.
pub(super) const ENDINGS: [&str; 2] =
    ["(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"];

impl Way {
    /// The way of a name.
    pub fn named(name: &str) -> Option<&'static Way> {
        WAYS.iter().find(|way| way.names.contains(&name))
    }

    /// The pre-tokenizer, as tokenizer.json has it.
    pub fn pre_tokenizer(&self) -> Value {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |words: &str| json!({"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false});
        let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
        match self.steps {
            Steps::Plain { digits: false } => bytes(true),
            Steps::Plain { digits: true } => {
                sequence(vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)])
            }
            Steps::Bytes(all) => sequence(all.iter().map(|words| split(words)).chain([bytes(false)]).collect()),
            Steps::Pieces { words, .. } => split(words),
        }
    }

    /// Whether texts are bytes in GPT-2's alphabet when they are joined.
    pub fn is_of_bytes(&self) -> bool {
        !matches!(self.steps, Steps::Pieces { .. })
    }
}
