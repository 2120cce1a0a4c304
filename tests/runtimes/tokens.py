#!/usr/bin/env python3
"""Hold the tokens of every pre-tokenizer and every kind of vocabulary that llama.cpp has to what llama.cpp makes of texts.

    python3 tests/runtimes/tokens.py --source LLAMA.CPP     # renews tests/fixtures/gguf/pre_tokenizers.json
    python3 tests/runtimes/tokens.py                        # only asks whether llama.cpp still gives what stands there, and whether its ids
                                                            # of Unigram models in files of quantc are SentencePiece's

llama.cpp is the prebuilt one of llama.py; LLAMA.CPP is a checkout of its source, out of which names and hashes are read. The file has

    names         each `tokenizer.ggml.pre`, and whether a word that is a token as a whole is taken as it is
    hashes        those by which llama.cpp's converter knows a tokenizer, with the names
    texts         what is split
    vocabularies  tokens and merges: of bytes in GPT-2's alphabet, and of pieces with ▁ for spaces
    ways          names that give the same ids, the vocabulary, and the ids of each text
"""

import argparse
import base64
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile

import llama

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests/fixtures/gguf/pre_tokenizers.json"
# A list of tokens that reach across words.
LIST = ROOT / "tests/fixtures/ranked/qwen/qwen.tiktoken"
# Names whose vocabularies are not of bytes.
PIECES = ["gemma4", "sarvam-moe", "granite-embed-multi-311m"]
# With this one llama.cpp aborts at two spaces in a row.
ABORTS = ["whitespace"]
VOCABULARY_ALONE = 72  # in llama_model_params

TEXTS = [
    "  two  leading and  inner   spaces and trailing  ",
    "Hello, World! It's 12345 o'clock;  we'll   SEE, WE'LL see.\n\n\n  indented\ttabs \r\nCRLF\n",
    "naïve café, Straße, Ａｂｃ, e\u0301 \u00a0no-break ① 日本語のテキスト。中文文本English混排，한국어 Русский العربية हिन्दी ไทย ខ្មែរ",
    "🙂👩‍👩‍👧‍👦🇯🇵 x² ≤ ∑∞ \x01\x7f ~ ～ $+<=>^`|",
    "def f(x):\n    return x ** 2  # a_b\n\n\nclass CamelCaseAndSNAKE(A):\n\tpass //\n/* x->y::z */",
    "1234567890 3.14159 -42 1e-10 0x1F 12 1234 ²³ ½ Ⅷ ٣٤٥ １２３",
]


def from_source(source):
    """Names of pre-tokenizers with whether they ignore merges, and hashes with names."""
    code = (source / "src/llama-vocab.cpp").read_text()
    start = code.index("for now, only BPE models have pre-tokenizers")
    code = code[start : code.index("unknown pre-tokenizer type", start)]
    names = {}
    for part in re.split(r"\} else if", code):
        for name in re.findall(r'tokenizer_pre == "([^"]+)"', part):
            names[name] = "ignore_merges = true" in part
    code = (source / "conversion/base.py").read_text()
    hashes = {hash: name for hash, name in re.findall(r'if chkhsh == "([0-9a-f]{64})":\n(?:\s*#.*\n)*\s*res = "([^"]+)"', code)}
    return names, hashes


def alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


def vocabularies():
    """Tokens and merges of the list, by rank."""
    tokens = [base64.b64decode(line.split()[0]) for line in LIST.read_text().splitlines()]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ways = lambda token: [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks]
    joined = [way for token in tokens for way in sorted(ways(token), key=lambda way: (ranks[way[0]], ranks[way[1]]))]
    letters = alphabet()
    spelt = lambda token: "".join(letters[byte] for byte in token)
    of_bytes = {"tokens": [spelt(token) for token in tokens], "merges": [f"{spelt(a)} {spelt(b)}" for a, b in joined]}

    def piece(token):
        try:
            return token.decode().replace(" ", "▁")
        except UnicodeDecodeError:
            return None

    texts = [piece(token) for token in tokens[256:]]
    texts = dict.fromkeys(text for text in texts if text and min(text) > " ")
    characters = dict.fromkeys(c for text in [*texts, *(chr(code) for code in range(33, 127))] for c in text)
    kept = {*texts, *characters}
    merges = [(piece(a), piece(b)) for a, b in joined]
    merges = [f"{a} {b}" for a, b in merges if a in kept and b in kept and a + b in kept]
    every = [f"<0x{byte:02X}>" for byte in range(256)]
    of_pieces = {"tokens": [*every, *dict.fromkeys([*characters, *texts, "\n", "\n\n", "\n\n\n"])], "merges": merges}
    return {"bytes": of_bytes, "pieces": of_pieces}


def gguf(path, keys):
    """A GGUF file without a tensor: strings, lists of strings and of int32, and float32."""
    text = lambda value: struct.pack("<Q", len(value.encode())) + value.encode()
    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    for key, value in keys.items():
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, bool):
            out += struct.pack("<IB", 7, value)
        elif isinstance(value, int):
            out += struct.pack("<II", 4, value)
        elif isinstance(value, bytes):
            out += struct.pack("<IIQ", 9, 0, len(value)) + value
        elif isinstance(value[0], str):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)
        else:
            kind, form = (6, "f") if isinstance(value[0], float) else (5, "i")
            out += struct.pack("<IIQ", 9, kind, len(value)) + struct.pack(f"<{len(value)}{form}", *value)
    path.write_bytes(out + b"\0" * 64)


class Vocabulary(llama.Runtime):
    """No more than the tokenizer of a file."""

    def __init__(self, library, path):
        self.lib = library
        parameters = library.llama_model_default_params()
        parameters.bytes[VOCABULARY_ALONE] = 1
        self.model = library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab = library.llama_model_get_vocab(self.model)


def ids(library, folder, keys, texts):
    path = folder / "vocabulary.gguf"
    gguf(path, {"general.architecture": "llama", **keys})
    vocabulary = Vocabulary(library, path)
    return [vocabulary.tokenize(text) for text in texts]


def pre_tokenizers(library, names, known, texts):
    """Names that give the same ids of all texts."""
    ways = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in names if name not in ABORTS]:
            kind = "pieces" if name in PIECES else "bytes"
            tokens = known[kind]["tokens"]
            keys = {
                "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [6 if token.startswith("<0x") else 1 for token in tokens],
                "tokenizer.ggml.merges": known[kind]["merges"],
                "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False,
            }
            try:
                found = ids(library, pathlib.Path(folder), keys, texts)
            except RuntimeError:
                llama.say(f"{name}: not known to llama.cpp of {llama.VERSION}")
                continue
            for way in ways:
                if way["vocabulary"] == kind and way["ids"] == found:
                    way["names"].append(name)
                    break
            else:
                ways.append({"names": [name], "vocabulary": kind, "ids": found})
    return ways


def unigram(library, quantc):
    """Texts of which SentencePiece's ids are also llama.cpp's; of characters that are no pieces llama.cpp makes no bytes."""
    alike = 0
    for name in ["unigram", "unigram_bytes"]:
        source = ROOT / "tests/fixtures/sentencepiece" / name
        golden = json.loads((source / "golden.json").read_text())
        is_byte = [kind == 6 for _, _, kind in golden["pieces"]]
        with tempfile.TemporaryDirectory() as folder:
            model, output = pathlib.Path(folder, "model"), pathlib.Path(folder, "out.gguf")
            shutil.copytree(ROOT / "src/demo/model", model)
            for file in [*model.glob("tokenizer*"), *model.glob("report.json")]:
                file.unlink()
            for file in source.glob("tokenizer*"):
                shutil.copy(file, model)
            words = [quantc, "quantize", model, "-o", output, "--scheme", "Q8_0", "--method", "rtn", "--verify-text", "none", "--quiet"]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            vocabulary = Vocabulary(library, output)
            for text, expected in zip(golden["texts"], golden["sentencepiece"]):
                if expected is None or any(is_byte[id] for id in expected):
                    continue
                found = vocabulary.tokenize(text)
                if found != expected:
                    sys.exit(f"{name}: llama.cpp makes {found} of {text!r}, and SentencePiece {expected}")
                alike += 1
    return alike


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=pathlib.Path, help="a checkout of llama.cpp: renew the file")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / ".venv" / "runtimes")
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    options = parser.parse_args()
    library = llama.load(llama.libraries(options.cache.resolve()))
    if options.source:
        names, hashes = from_source(options.source)
        known = vocabularies()
        ways = pre_tokenizers(library, names, known, TEXTS)
        content = {"names": names, "hashes": hashes, "texts": TEXTS, "vocabularies": known, "ways": ways}
        FIXTURE.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    content = json.loads(FIXTURE.read_text())
    found = pre_tokenizers(library, content["names"], content["vocabularies"], content["texts"])
    for way in found:
        if way not in content["ways"]:
            sys.exit(f"llama.cpp gives other ids now for {', '.join(way['names'])}")
    print(f"{unigram(library, options.quantc)} texts of Unigram models: llama.cpp's ids are SentencePiece's")
    print(f"{len(content['names'])} names, {len(found)} ways, {len(content['hashes'])} hashes: as they stand in {FIXTURE.name}")


main()
