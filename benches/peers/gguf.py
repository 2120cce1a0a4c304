#!/usr/bin/env python3
"""quantc's GGUF files beside llama-quantize's: their quality from the same calibration text, and the time they take.

    python3 benches/peers/gguf.py --demo                          # the built-in model: its rows fit the k-quants
    python3 benches/peers/gguf.py --model DIR --text TEXT         # a model in full precision, and a held-out text
    python3 benches/peers/gguf.py --only speed --model DIR --synthetic   # times, also of a model of the shape of a 1B
    python3 benches/peers/gguf.py --only parity --model DIR --text TEXT  # `quantc eval` beside llama-perplexity, every mix

Quality. `quantc quantize` writes the model unquantized as GGUF; llama-imatrix runs it over the calibration text, and
llama-quantize gets what that found. quantc calibrates itself on the same text, cut into windows of the same length, all of
them. `quantc eval` then measures both files beside the original on the held-out text, in the same windows.

Speed. Both quantize the same file of F16 with the same threads, without importance and with the same imatrix; quantc also
goes from safetensors. Wall time of the whole process, the best of --repeat, the input in the page cache.

Parity. Files written without calibration; what llama-perplexity prints for each, and what `quantc eval --protocol llama.cpp`
does, on the same windows. 0.5 % are allowed, or exit code 1.

llama.cpp's tools are built from the sdist of llama-cpp-python, with cmake and ninja from PyPI (a quarter of an hour on
two cores), unless --llama names a folder that has them. The tables on stdout are markdown.
"""

import argparse
import array
import json
import os
import pathlib
import platform
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import venv

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEMO = ROOT / "src" / "demo"
SDIST = "llama-cpp-python==0.3.36"
BUILD = ["cmake==4.4.0", "ninja==1.13.2"]
TOOLS = ["llama-quantize", "llama-imatrix", "llama-perplexity"]
QUALITY = ["Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q3_K_M", "IQ4_XS"]
SPEED = ["Q4_0", "Q8_0", "Q4_K_M"]
# Without the ternary ones, which leave nothing of most models to be measured.
PARITY = [
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "MXFP4_MOE",
]  # fmt: skip
NEAR = 0.005
EVERYTHING = 1_000_000  # samples: as many windows as the text has


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(*words):
    """A command that has to succeed: its output, and its seconds."""
    words = [str(word) for word in words]
    started = time.perf_counter()
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode} from `{' '.join(words)}`: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout + done.stderr, seconds


def build_llama(cache):
    """The folder of llama.cpp's tools, built there if it is not."""
    folder = cache / SDIST.replace("==", "-")
    tools = folder / "build" / "bin"
    if all((tools / tool).exists() for tool in TOOLS):
        return tools
    folder.mkdir(parents=True, exist_ok=True)
    say(f"building {', '.join(TOOLS)} of {SDIST} in {folder}")
    started = time.time()
    bin_ = folder / "venv" / "bin"
    if not (bin_ / "ninja").exists():
        venv.create(folder / "venv", with_pip=True)
        run(bin_ / "python", "-m", "pip", "install", "--quiet", *BUILD)
    if not (archives := list(folder.glob("*.tar.gz"))):
        # Fetched as it is: pip would first ask its build system for its metadata.
        fetch = [bin_ / "python", "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        run(bin_ / "python", "-m", "pip", "install", "--quiet", "scikit-build-core")
        run(*fetch, "-d", folder, SDIST)
        archives = list(folder.glob("*.tar.gz"))
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder / "source", filter="data")
    [source] = (folder / "source").glob("*/vendor/llama.cpp")
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
    flags += ["-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_UI=OFF"]
    run(bin_ / "cmake", "-S", source, "-B", folder / "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={bin_ / 'ninja'}", *flags)
    run(bin_ / "ninja", "-C", folder / "build", *TOOLS)
    say(f"built after {time.time() - started:.0f} s")
    return tools


def calibration_text(path, limit, out):
    """About `limit` bytes of a text: whole documents, evenly spread over it, without the marks that only quantc knows."""
    documents = [part.strip("\n") for part in path.read_text(encoding="utf-8").split("<|document|>\n")]
    whole = sum(len(part.encode()) for part in documents)
    kept, due, taken = [], 0.0, 0
    for document in documents:
        size = len(document.encode())
        due += size * min(1.0, limit / whole)
        if taken + size / 2 <= due:
            kept.append(document)
            taken += size
    if not kept:
        kept = [documents[0].encode()[:limit].decode(errors="ignore")]
    out.write_text("\n\n".join(kept) + "\n", encoding="utf-8")
    return out


def whole_type(model):
    """The type that holds the checkpoint as it is."""
    config = json.loads((model / "config.json").read_text())
    return {"float32": "F32", "float16": "F16"}.get(config.get("dtype") or config.get("torch_dtype"), "BF16")


def unquantized(options, model, kind, file):
    if not file.exists():
        run(options.quantc, "quantize", model, "-o", file, "--scheme", kind, "--method", "rtn", "--verify-text", "none", "--quiet")
    return file


def evaluate(options, file, model, text):
    words = [options.quantc, "eval", file, "--reference", model, "--text", text, "--json", "--quiet"]
    words += ["--context", options.context, "--threads", options.threads]
    words += ["--windows", options.windows] if options.windows else []
    out, _ = run(*words)
    return json.loads(out[out.index("{") :])


def quality(options, name, model, text, calibration, folder):
    """The table of quality of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    limit = options.calibration_kb * 1000
    calibration = calibration_text(calibration, limit, folder / "calibration.txt")
    original = unquantized(options, model, whole_type(model), folder / "original.gguf")
    imatrix = folder / "imatrix.gguf"
    if not imatrix.exists():
        words = [options.llama / "llama-imatrix", "-m", original, "-f", calibration, "-o", imatrix, "-c", options.seq_len]
        words += ["-t", options.threads, "--no-ppl"] + (["--process-output"] if options.process_output else [])
        _, seconds = run(*words)
        say(f"{name}: llama-imatrix took {seconds:.1f} s")
    rows, results = [], {}
    for kind in options.types:
        theirs, ours = folder / f"{kind}.llama.gguf", folder / f"{kind}.quantc.gguf"
        spent = {}
        for file in (theirs, ours):
            file.unlink(missing_ok=True)
        _, spent["theirs"] = run(options.llama / "llama-quantize", "--imatrix", imatrix, original, theirs, kind, options.threads)
        words = [options.quantc, "quantize", model, "-o", ours, "--scheme", kind, "--calibration", calibration]
        words += ["--samples", EVERYTHING, "--seq-len", options.seq_len, "--threads", options.threads]
        words += ["--method", options.method] if options.method else []
        _, spent["ours"] = run(*words, "--verify-text", "none", "--quiet")
        found = {who: evaluate(options, file, model, text) for who, file in (("theirs", theirs), ("ours", ours))}
        sizes = {"theirs": theirs.stat().st_size, "ours": ours.stat().st_size}
        a, b = found["theirs"], found["ours"]
        results[kind] = {who: found[who] | {"bytes": sizes[who], "seconds": spent[who]} for who in found}
        kld = lambda one: f"{one['kld_mean']:.5f} ± {one['kld_stderr']:.5f}"
        row = [kind, f"{sizes['theirs']:,} / {sizes['ours']:,}", kld(a), kld(b), f"{b['kld_mean'] / a['kld_mean']:.3f}"]
        row += [f"{100 * a['top1_agreement']:.2f} / {100 * b['top1_agreement']:.2f} %"]
        row += [f"{a['perplexity_ratio']:.4f} / {b['perplexity_ratio']:.4f}", f"{spent['ours']:.1f}"]
        rows.append("| " + " | ".join(row) + " |")
        say(f"{name} {rows[-1]}")
        if not options.keep:
            theirs.unlink()
            ours.unlink()
    judged = next(iter(results.values()))["ours"]
    print(f"Quality of {name}: calibrated on {calibration.stat().st_size:,} bytes of {options.calibration_name}, windows of "
          f"{options.seq_len}; measured on {judged['tokens']:,} tokens of {text.name}, windows of {judged['context']}; perplexity of "
          f"the original {judged['reference_perplexity']:.3f}. Pairs are llama-quantize / quantc.\n")
    print("| type | bytes | KL llama-quantize | KL quantc | ratio | top-1 | perplexity ratio | quantc, s |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows) + "\n", flush=True)
    return results


def synthetic(folder):
    """Random weights of the shape of a Llama with 1.2 G parameters, under the built-in model's tokenizer."""
    if (folder / "config.json").exists():
        return folder
    say(f"writing {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner, layers, heads, kv_heads, vocabulary = 2048, 8192, 16, 32, 8, 128_256
    head = hidden // heads
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": [hidden], f"{at}.post_attention_layernorm.weight": [hidden]}
        for part, rows in [("q", hidden), ("k", kv_heads * head), ("v", kv_heads * head), ("o", hidden)]:
            shapes[f"{at}.self_attn.{part}_proj.weight"] = [rows, hidden]
        for part, shape in [("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])]:
            shapes[f"{at}.mlp.{part}_proj.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    # One block of normal numbers, entered at another place for each tensor: a search for scales sees each row anew.
    generator = random.Random(0)
    values = array.array("f", (generator.gauss(0, 0.02) for _ in range(1 << 22))).tobytes()
    block = bytearray(len(values) // 2)
    block[0::2], block[1::2] = values[2::4], values[3::4]
    head_bytes = json.dumps(header).encode()
    head_bytes += b" " * (-len(head_bytes) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(head_bytes)) + head_bytes)
        for name, shape in shapes.items():
            size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            if len(shape) == 1:
                file.write(b"\x80\x3f" * shape[0])
                continue
            at = 2 * generator.randrange(len(block) // 2)
            while size:
                piece = memoryview(block)[at : at + size]
                file.write(piece)
                size, at = size - len(piece), 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / "model" / name, folder)
    config = json.loads((DEMO / "model" / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": head}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def best_of(count, out, words):
    """The least wall time of a command that writes `out`."""
    seconds = []
    for _ in range(count):
        out.unlink(missing_ok=True)
        seconds.append(run(*words)[1])
    out.unlink()
    return min(seconds)


def speed(options, name, model, calibration, folder):
    """The table of times of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    f16 = unquantized(options, model, "F16", folder / "f16.gguf")
    imatrix, out = folder / "speed-imatrix.gguf", folder / "out.gguf"
    if not imatrix.exists():
        text = calibration_text(calibration, 40_000, folder / "speed-calibration.txt")
        words = [options.llama / "llama-imatrix", "-m", f16, "-f", text, "-o", imatrix, "-c", 64, "--chunks", 2]
        run(*words, "-b", 64, "-t", options.threads, "--no-ppl")
    size = {"gguf": f16.stat().st_size, "safetensors": sum(file.stat().st_size for file in model.glob("*.safetensors"))}
    copied = best_of(options.repeat, out, ["cp", f16, out])
    synced = best_of(options.repeat, out, ["sh", "-c", 'cp "$0" "$1" && sync "$1"', f16, out])
    rows, results = [], {"cp": copied, "cp and sync": synced}
    print(f"Speed on {name}: {size['gguf'] / 1e6:.0f} MB of F16, {options.threads} threads, best of {options.repeat}. Seconds, and MB/s of "
          f"input. `cp` of that file into the same folder takes {copied:.2f} s, {size['gguf'] / copied / 1e6:.0f} MB/s, and {synced:.2f} s, "
          f"{size['gguf'] / synced / 1e6:.0f} MB/s, with `sync` until it is on the disk, which quantc waits for and the others do not.\n")
    print("| type | importance | llama-quantize | quantc, from GGUF | times as fast | quantc, from safetensors |")
    print("|---|---|---|---|---|---|")
    for kind in options.speed_types:
        for given in ([], [imatrix]) if kind not in ("F16", "BF16") else ([],):
            flag = ["--imatrix", *given] if given else []
            common = ["-o", out, "--scheme", kind, "--method", "rtn", *flag, "--verify-text", "none", "--quiet", "--threads", options.threads]
            theirs = best_of(options.repeat, out, [options.llama / "llama-quantize", *flag, f16, out, kind, options.threads])
            ours = best_of(options.repeat, out, [options.quantc, "quantize", f16, *common])
            direct = best_of(options.repeat, out, [options.quantc, "quantize", model, *common])
            results[f"{kind}{' imatrix' if given else ''}"] = {"llama-quantize": theirs, "gguf": ours, "safetensors": direct}
            cell = lambda seconds, kind: f"{seconds:.2f} s, {size[kind] / seconds / 1e6:.0f} MB/s"
            row = [kind, "imatrix" if given else "none", cell(theirs, "gguf"), cell(ours, "gguf"), f"{theirs / ours:.2f} ×", cell(direct, "safetensors")]
            print("| " + " | ".join(row) + " |", flush=True)
    print()
    if not options.keep:
        f16.unlink()
    return results


def parity(options, name, model, text, folder):
    """The table of perplexities beside llama-perplexity's of one model, and how many are too far off."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, results, far = [], {}, 0
    for kind in options.types:
        file = folder / f"{kind}.parity.gguf"
        file.unlink(missing_ok=True)
        run(options.quantc, "quantize", model, "-o", file, "--scheme", kind, "--method", "rtn", "--verify-text", "none", "--quiet")
        shape = ["--context", options.context, "--windows", options.windows or 24, "--threads", options.threads]
        words = [options.quantc, "eval", file, "--text", text, *shape, "--protocol", "llama.cpp", "--json", "--quiet"]
        ours, exact = (json.loads(run(*words, "--activations", how)[0]) for how in ("runtime", "exact"))
        words = [options.llama / "llama-perplexity", "-m", file, "-f", text, "-c", options.context]
        words += ["--chunks", options.windows or 24, "-t", options.threads]
        for _ in range(5):  # it logs from a thread, and may end before the last line is out
            if found := re.search(r"Final estimate: PPL = ([0-9.]+)", run(*words)[0]):
                break
        else:
            raise RuntimeError(f"llama-perplexity prints no estimate for {file}")
        theirs = float(found[1])
        results[kind] = {"llama-perplexity": theirs, "runtime": ours["perplexity"], "exact": exact["perplexity"]}
        off = {who: results[kind][who] / theirs - 1 for who in ("runtime", "exact")}
        far += not abs(off["runtime"]) <= NEAR
        row = [kind, f"{theirs:.4f}", f"{ours['perplexity']:.4f}", f"{100 * off['runtime']:+.3f} %"]
        rows.append("| " + " | ".join([*row, f"{exact['perplexity']:.4f}", f"{100 * off['exact']:+.3f} %"]) + " |")
        say(f"{name} {rows[-1]}")
        if not options.keep:
            file.unlink()
    print(f"Parity on {name}: {ours['tokens']:,} tokens of {text.name}, windows of {ours['context']}; {far} more than {100 * NEAR} % off.\n")
    print("| type | llama-perplexity | quantc eval | off | with exact activations | off |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows) + "\n", flush=True)
    return results, far


def cpu_name():
    """What the machine calls its processor."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, action="append", default=[], help="a Hugging Face directory; repeatable")
    parser.add_argument("--demo", action="store_true", help="the built-in model, on its own texts")
    parser.add_argument("--synthetic", action="store_true", help="random weights of the shape of a 1B: speed alone")
    parser.add_argument("--only", choices=["quality", "speed", "parity"])
    parser.add_argument("--types", help=f"[default: {','.join(QUALITY)}; of parity every mix that needs no importance]")
    parser.add_argument("--speed-types", default=",".join([*SPEED, "F16"]))
    parser.add_argument("--method", help="quantc's, instead of its default")
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    parser.add_argument("--llama", type=pathlib.Path, help="a folder with " + ", ".join(TOOLS))
    parser.add_argument("--calibration", type=pathlib.Path, help="text for --model [default: quantc's preset]")
    parser.add_argument("--calibration-kb", type=int, default=150, help="of it, for either tool; 150 kB are some 64 windows of 512")
    parser.add_argument("--text", type=pathlib.Path, help="held-out text for --model [default: that of the built-in model]")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window of calibration")
    parser.add_argument("--process-output", action="store_true", help="llama-imatrix observes the output projection too, which it does not by default")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window of evaluation")
    parser.add_argument("--windows", type=int, help="windows of evaluation [default: all]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / ".venv" / "llama")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target" / "peers" / "gguf")
    options = parser.parse_args()
    if not (options.model or options.demo or options.synthetic):
        parser.error("nothing to run: give --demo, --model or --synthetic")
    options.types = options.types.split(",") if options.types else PARITY if options.only == "parity" else QUALITY
    options.speed_types = options.speed_types.split(",")
    preset = ROOT / "calibration" / "presets" / "mixed.txt"
    calibration, text = options.calibration or preset, options.text or DEMO / "evaluation.txt"
    for path in [options.quantc, calibration, text, *(model / "config.json" for model in options.model)]:
        if not path.exists():
            parser.error(f"{path} does not exist")
    options.quantc = options.quantc.resolve()
    options.llama = options.llama.resolve() if options.llama else build_llama(options.cache.resolve())
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # children inherit it
    if len(os.sched_getaffinity(0)) < options.threads:
        parser.error(f"this machine lends {len(os.sched_getaffinity(0))} cores, --threads asks for {options.threads}")

    models = [(model.resolve().name, model.resolve(), text, calibration) for model in options.model]
    if options.demo:
        demo = folder / "demo-model"
        if not demo.exists():
            run(options.quantc, "demo", "--export", demo)
        models.append(("the built-in model", demo, DEMO / "evaluation.txt", DEMO / "calibration.txt"))
    version, _ = run(options.quantc, "--version")
    built, _ = run(options.llama / "llama-perplexity", "--version")
    found = re.search(r"version: *(.+)", built)
    print(f"{version.strip()} beside llama.cpp {found[1] if found else ''}; {cpu_name()}, {options.threads} threads.\n")
    results, far = {}, 0
    for name, model, held_out, observed in models:
        place = folder / name.replace(" ", "-")
        if options.only == "parity":
            results[name], off = parity(options, name, model, held_out, place)
            far += off
            continue
        if options.only != "speed":
            options.calibration_name = observed.name
            results[name] = {"quality": quality(options, name, model, held_out, observed, place)}
        if options.only != "quality" and model in (m.resolve() for m in options.model):
            results.setdefault(name, {})["speed"] = speed(options, name, model, observed, place)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    if options.synthetic and options.only not in ("quality", "parity"):
        model = synthetic(folder / "synthetic-1b")
        results["synthetic"] = {"speed": speed(options, "random weights of the shape of a 1B", model, DEMO / "calibration.txt", folder / "synthetic")}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    return int(far > 0)


if __name__ == "__main__":
    sys.exit(main())
