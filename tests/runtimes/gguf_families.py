"""The tiny checkpoints of every family in llama.cpp: what `gguf.py --families` does.

Each checkpoint of tests/fixtures/families is made as tests/it/families.rs makes it, written by quantc as a GGUF file of F32
and run by llama.cpp in F32, without flash attention. Its logits are compared with those that transformers computed, which
lie beside the checkpoint. The difference is the largest of a logit, as a share of the largest logit.

llama.cpp looks GELU up in a table of f16, and has its approximation only: such models are allowed more.

With --types the checkpoints are quantized instead, by rounding, and the perplexity of each file in llama.cpp is compared with
what `quantc eval` says of it, as `gguf.py` does for a whole model: over letters that the checkpoint has tokens for. Where
attention sees a choice of tokens, roundings decide on some of them, and what follows differs as a whole: such models are
allowed as much as those with GELU.

With --heads the models of tests/fixtures/heads that make embeddings are run instead, and what llama.cpp pools is put through the
modules that sentence-transformers has behind that, which a GGUF file does not hold.
"""

import copy
import json
import math
import pathlib
import re
import shutil
import struct
import subprocess
import sys

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "families"
HEADS = FIXTURES.parent / "heads"
TOLERANCE, ROUGH = 1e-3, 2e-2
WINDOW, WINDOWS = 24, 64
# Without flash attention llama.cpp lets these see all tokens.
FLASH = ("minimax_m3",)
ROUGH_WORDS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def values(name, count, dtype, center, amplitude):
    """Bytes of a tensor, whose numbers follow from its name; those of floats are rounded to bfloat16."""
    import numpy

    with numpy.errstate(over="ignore"):
        seed = numpy.uint64(0xCBF29CE484222325)
        for byte in name.encode():
            seed = (seed ^ numpy.uint64(byte)) * numpy.uint64(0x00000100000001B3)
        z = seed + numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        unit = ((z ^ (z >> numpy.uint64(31))) >> numpy.uint64(40)).astype(numpy.float64) / 2**24
    reals = (unit - 0.5) * (2 * amplitude) + center
    if dtype == "U8":
        return numpy.floor(reals).astype(numpy.uint8).tobytes()
    if dtype == "I64":
        return numpy.floor(reals).astype(numpy.int64).tobytes()
    bits = reals.astype(numpy.float32).view(numpy.uint32)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return (upper << 16 if dtype == "F32" else upper.astype(numpy.uint16)).astype("<u4" if dtype == "F32" else "<u2").tobytes()


def make(name, folder, fixtures=FIXTURES):
    """Write the checkpoint with a tokenizer of bytes, and what sentence-transformers has beside it."""
    import numpy

    config = json.loads((fixtures / name / "config.json").read_text())
    header, parts, at = {}, [], 0
    for tensor, shape, dtype, center, amplitude in json.loads((fixtures / name / "tensors.json").read_text()):
        data = values(tensor, int(numpy.prod(shape)), dtype, center, amplitude)
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    (folder / "config.json").write_text(json.dumps(config))
    size = config.get("text_config", config)["vocab_size"]
    letters = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x1000)]][:size]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": step, "post_processor": None, "decoder": step,
        "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for beside in [path for path in (fixtures / name).iterdir() if path.is_dir() or path.name == "modules.json"]:
        (shutil.copytree if beside.is_dir() else shutil.copy)(beside, folder / beside.name)
    return config


def golden(name, fixtures=FIXTURES, of="logits"):
    import numpy

    data = (fixtures / name / "golden.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def tensor(key, kind):
        begin, end = header[key]["data_offsets"]
        return numpy.frombuffer(body[begin:end], kind).reshape(header[key]["shape"])

    return tensor("input_ids", "<i8"), tensor(of, "<f4") if of in header else None


def behind(folder, embedding):
    """What the modules behind pooling make of an embedding: matrices without biases and activations, and a length of 1."""
    import numpy

    for module in json.loads((folder / "modules.json").read_text()):
        kind, path = module["type"].rsplit(".", 1)[-1], folder / module["path"]
        if kind == "Dense":
            if json.loads((path / "config.json").read_text())["bias"]:
                raise RuntimeError(f"{path} has a bias")
            data = (path / "model.safetensors").read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            [entry] = [value for key, value in json.loads(data[8 : 8 + length]).items() if key != "__metadata__"]
            begin, end = entry["data_offsets"]
            data = data[8 + length + begin : 8 + length + end]
            if entry["dtype"] == "BF16":
                matrix = (numpy.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
            else:
                matrix = numpy.frombuffer(data, "<f4")
            embedding = matrix.reshape(entry["shape"]) @ embedding
        elif kind == "Normalize":
            embedding = embedding / numpy.linalg.norm(embedding)
        elif kind not in ("Transformer", "Pooling"):
            raise RuntimeError(f"{kind} is not known here")
    return embedding


def embed(job):
    """The largest difference of one file's embeddings from transformers'."""
    import numpy

    import llama

    ids, expected = golden(job["name"], HEADS, "embeddings")
    runtime = llama.Runtime(llama.load(job["libraries"]), job["file"], ids.shape[1], 1, exact=True, embeds=True)
    found = [behind(pathlib.Path(job["model"]), runtime.embedding([int(token) for token in sequence])) for sequence in ids]
    print(json.dumps({"worst": float(numpy.abs(numpy.array(found) - expected).max() / numpy.abs(expected).max())}))


def embeddings(options, python, scratch):
    """A table of the models that make embeddings on stdout; the number of those that fail."""
    failures = 0
    print("| checkpoint | GGUF architecture | largest difference | |\n|---|---|---|---|")
    for name in sorted(path.name for path in HEADS.iterdir() if (path / "modules.json").exists()):
        if options.only and name not in options.only.split(","):
            continue
        folder, file = scratch / name, scratch / f"{name}.gguf"
        words = [str(python), str(pathlib.Path(__file__)), "make", name, str(folder), str(HEADS)]
        subprocess.run(words, check=True, capture_output=True, text=True)
        words = [options.quantc, "quantize", folder, "-o", file, "--format", "gguf", "--scheme", "F32"]
        words += ["--method", "rtn", "--verify-text", "none"]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        if done.returncode == 2:
            print(f"| {name} | | | refused: {done.stderr.strip().splitlines()[-1].split(': ', 1)[-1]} |", flush=True)
            continue
        if done.returncode:
            raise RuntimeError(f"{name}: quantc ends with {done.returncode}: {done.stderr.strip()[-500:]}")
        if "pooling_type" not in file.read_bytes()[:8192].decode(errors="replace"):
            print(f"| {name} | | | llama.cpp has no such way to make an embedding |", flush=True)
            continue
        job = {"libraries": str(options.libraries), "name": name, "file": str(file), "model": str(folder)}
        words = [str(python), str(pathlib.Path(__file__)), "embed", json.dumps(job)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            failures += 1
            print(f"| {name} | | | **failed**: llama.cpp ends with {done.returncode}: {(done.stderr + done.stdout)[-400:]} |", flush=True)
            continue
        worst = json.loads(done.stdout.strip().splitlines()[-1])["worst"]
        rough = any(word in (folder / "config.json").read_text() for word in ROUGH_WORDS)
        failed = not worst <= (ROUGH if rough else TOLERANCE)
        failures += failed
        print(f"| {name} | {architecture_of(file)} | {worst:.1e} | {'**failed**' if failed else ''} |", flush=True)
    return failures


def architecture_of(file):
    data = file.read_bytes()[:4096]
    found = re.search(rb"general\.architecture.{4}(.{8})", data, re.S)
    start = found.end()
    return data[start : start + struct.unpack("<Q", found[1])[0]].decode()


def worker(job):
    """The largest difference of one file's logits from transformers'."""
    import numpy

    import llama

    name, file, valid = job["name"], job["file"], job["valid"]
    ids, logits = golden(name)
    valid = min(valid, ids.shape[1])
    runtime = llama.Runtime(llama.load(job["libraries"]), file, ids.shape[1], 1, exact=True, flash=name.startswith(FLASH))
    worst = 0.0
    for sequence, expected in zip(ids, logits):
        runtime.forget()
        found = runtime.logits([int(token) for token in sequence[:valid]], 0, 0)
        worst = max(worst, float(numpy.abs(found - expected[:valid]).max()))
    print(json.dumps({"worst": worst / float(numpy.abs(logits).max()), "tokens": valid}))


def examine(options, python, name, scratch):
    """(architecture, largest difference, tokens, why it fails or is not written)."""
    # The name of a model is looked at by llama.cpp, too.
    folder = scratch / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    words = [str(python), str(pathlib.Path(__file__)), "make", name, str(folder)]
    subprocess.run(words, check=True, capture_output=True, text=True)
    file = scratch / f"{name}.gguf"
    words = [options.quantc, "quantize", folder, "-o", file, "--format", "gguf", "--scheme", "F32"]
    words += ["--method", "rtn", "--verify-text", "none"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode == 2:
        return None, None, None, done.stderr.strip().splitlines()[-1].split(": ", 1)[-1]
    if done.returncode:
        raise RuntimeError(f"{name}: quantc ends with {done.returncode}: {done.stderr.strip()[-500:]}")
    said = done.stdout + done.stderr
    limits = [int(number) for number in re.findall(r"beyond (\d+) tokens", said)]
    config = json.loads((FIXTURES / name / "config.json").read_text())
    rough = any(word in json.dumps(config) for word in ROUGH_WORDS) or "approximates GELU" in said or "rounds the bounds" in said
    rough = rough or config.get("text_config", config).get("model_type", "").startswith(("gemma", "gpt", "phi", "starcoder2"))
    job = {"libraries": str(options.libraries), "name": name, "file": str(file), "valid": min(limits, default=1 << 20)}
    words = [str(python), str(pathlib.Path(__file__)), "run", json.dumps(job)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    architecture = architecture_of(file)
    file.unlink()
    if done.returncode:
        tail = " | ".join((done.stderr + done.stdout).strip().splitlines()[-4:])[-500:]
        return architecture, None, None, f"llama.cpp ends with {done.returncode}: {tail}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    allowed = ROUGH if rough else TOLERANCE
    # Which of LongRoPE's factors are used depends on the context that is made, not on the text.
    if "LongRoPE's long factors" in said and found["worst"] > allowed:
        return architecture, found["worst"], found["tokens"], "not comparable: llama.cpp takes the long factors"
    if "dynamic" in said and found["worst"] > allowed:
        return architecture, found["worst"], found["tokens"], "not comparable: dynamic scaling depends on the whole text"
    return architecture, found["worst"], found["tokens"], "" if found["worst"] <= allowed else f"more than {allowed}"


def letters(size):
    """A text of as many windows as are scored, in which no letter follows from another."""
    state, text = 1, []
    for _ in range(WINDOW * WINDOWS):
        state = (state * 1103515245 + 12345) % (1 << 31)
        text.append(chr(0x21 + (state >> 16) % min(size, 0x5E)))
    return "".join(text)


def perplexities(options, python, names, scratch):
    """A table of the perplexities of quantized checkpoints on stdout; the number of those that fail."""
    import gguf

    mixes, failures = options.types.split(","), 0
    print("| checkpoint | mix | llama.cpp | quantc eval | Δ | unpacked | exact | Δ | |\n|---|---|---|---|---|---|---|---|---|")
    for name in names:
        folder, files = scratch / "checkpoint", scratch / "files"
        for old in (folder, files):
            shutil.rmtree(old, ignore_errors=True)
        words = [str(python), str(pathlib.Path(__file__)), "make", name, str(folder)]
        subprocess.run(words, check=True, capture_output=True, text=True)
        config = json.loads((FIXTURES / name / "config.json").read_text())
        own = copy.copy(options)
        own.text = scratch / "letters.txt"
        own.text.write_text(letters(config.get("text_config", config)["vocab_size"]))
        own.flash = name.startswith(FLASH)
        own.method, own.context, own.windows, own.prompt, own.generate, own.llama = "rtn", WINDOW, WINDOWS, "A", 4, None
        rough = json.dumps(config)
        if '"dynamic"' in rough and "alpha" not in rough:
            print(f"| {name} | | | | | | | | not comparable: dynamic scaling depends on the whole text |", flush=True)
            continue
        if any(word in rough for word in (*ROUGH_WORDS, "index_topk", "indexer_budget", "sparse_topk_blocks")):
            own.tolerance = own.exact_tolerance = ROUGH
        for mix, found, likely, reason in gguf.check_model(own, python, folder, mixes, files, scratch):
            if "cannot be written" in reason or "cannot be written" in str(found.get("error")):
                print(f"| {name} | | | | | | | | refused |", flush=True)
                break
            failures += bool(reason)
            shown = []
            for theirs, ours in [("perplexity", "quantc"), ("unpacked", "exact")]:
                pair = [found.get(theirs, math.nan), found.get(ours, math.nan)]
                shown += [f"{pair[0]:.4f}", f"{pair[1]:.4f}", f"{100 * (pair[0] / pair[1] - 1):+.3f} %"]
            print(f"| {name} | {mix} | {' | '.join(shown)} | {'**failed**: ' + reason if reason else ''} |", flush=True)
    return failures


def check(options, python, scratch):
    """A table of all checkpoints on stdout; the number of those that fail."""
    names = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
    wanted = options.only.split(",") if options.only else names
    if options.heads:
        return embeddings(options, python, scratch)
    if options.types:
        return perplexities(options, python, [name for name in names if name in wanted], scratch)
    print("| checkpoint | GGUF architecture | tokens | largest difference | |\n|---|---|---|---|---|")
    failures = 0
    for name in (name for name in names if name in wanted):
        try:
            architecture, worst, tokens, why = examine(options, python, name, scratch)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            architecture, worst, tokens, why = "", None, None, str(error)
        refused = architecture is None
        comparable = why.startswith("not comparable")
        failed = bool(why) and not refused and not comparable
        failures += failed
        shown = "" if worst is None else f"{worst:.1e}"
        note = f"refused: {why}" if refused else f"**failed**: {why}" if failed else why
        print(f"| {name} | {architecture or ''} | {tokens or ''} | {shown} | {note} |", flush=True)
    return failures


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    if sys.argv[1] == "make":
        make(sys.argv[2], pathlib.Path(sys.argv[3]), *map(pathlib.Path, sys.argv[4:]))
    elif sys.argv[1] == "embed":
        embed(json.loads(sys.argv[2]))
    else:
        worker(json.loads(sys.argv[2]))
