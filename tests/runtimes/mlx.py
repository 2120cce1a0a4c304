#!/usr/bin/env python3
"""Load what quantc writes for MLX in mlx-lm, on the CPU, and compare with quantc's own reading.

For each checkpoint of tests/fixtures/families:

1. `quantc quantize` writes it with 4 bits, in groups of 32, by rounding, embedding and head too; where it refuses, its reason stands in
   the table;
2. `quantc convert ARTIFACT --dtype f32` writes what quantc itself holds the artifact to mean, as plain weights that transformers runs in
   float32: the reference;
3. mlx-lm loads the artifact, which fails where a tensor has no place or a place no tensor, and is fed the same tokens. Its scales, biases
   and norms are widened to float32 first, so that what is left is the order of sums;
4. it loads the plain weights too, with the artifact's settings: what mlx-lm does not run, or runs otherwise than transformers, though
   nothing is quantized, is its own affair, and the table says so.

The same is done with what such checkpoints become by other settings (`VARIANTS`), with the bare class of one, and with a family that quantc
does not know. Where a report has a note that mlx-lm computes something otherwise, it may; where it has none, it may not.

Then the built-in model, with 8 bits and with its down projections alone in 8, beside `quantc eval`.

    python3 tests/runtimes/mlx.py                                   # all; a few minutes once the packages are there
    python3 tests/runtimes/mlx.py qwen2_tied mixtral_plain          # these families
    python3 tests/runtimes/mlx.py --docs docs/runtimes.md           # all, and the table into the documentation
    python3 tests/runtimes/mlx.py --pythons PYTHON MLX_PYTHON       # with transformers and torch, and with mlx-lm

A file that mlx-lm cannot run is no failure if a note of its report says so; such a note about a file that it does run is one, and so is a
model that it runs otherwise than transformers without a note. Exit code 0:
all is as quantc says; 1: it is not; 2: could not start.
"""

import argparse
import collections
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from ending import end

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
MARKS = "<!-- mlx.py begins -->\n", "<!-- mlx.py ends -->"
COMMON = "--format mlx --method rtn --verify-text none --quiet".split()
TOLERANCE = 1e-3  # of the largest logit
PERPLEXITY_TOLERANCE = 1e-3
# Of the built-in model.
WHOLE = {
    "w4-g64": [],
    "w8-g32": ["--scheme", "W8A16", "--group-size", "32"],
    "w4-g64, down_proj w8-g32": ["--recipe", "mixed.toml"],
}
LAYERS = {"L": "sliding_attention", "G": "full_attention"}


def layers(kinds):
    return [LAYERS[kind] for kind in kinds]


def yarn(**more):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4} | more
    return {"rope_scaling": None, "rope_theta": None, "rope_parameters": rope}


LINEAR = {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
# What a checkpoint becomes by other settings, where `None` leaves one out; a bare model has the names of its class and no head.
VARIANTS = {
    "llama_gelu": ("llama_rope_linear", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_biases_of_mlp_left_out": ("llama_rope_linear", {"mlp_bias": False}),
    "llama_windowed_types": ("llama_rope_linear", {"layer_types": layers("LG"), "sliding_window": 8}),
    "llama_yarn_warm": ("llama_rope_linear", yarn(attention_factor=1.5, beta_fast=16)),
    "llama_yarn_mscale_alone": ("llama_rope_linear", yarn(mscale=0.7)),
    "llama_bare": ("llama_rope_linear", {"architectures": ["LlamaModel"]}),
    "cohere2_two": ("cohere2_plain", {"layer_types": layers("LGL"), "sliding_window_pattern": None}),
    "cohere2_own": ("cohere2_plain", {"layer_types": layers("GLL"), "sliding_window_pattern": None}),
    "exaone4_own": ("exaone4_hybrid", {"layer_types": layers("LLGG"), "sliding_window_pattern": 4}),
    "gemma3_text_own": ("gemma3_text_linear", {"layer_types": layers("GLL"), "sliding_window_pattern": 2}),
    "gemma3_text_capped": ("gemma3_text_plain", {"final_logit_softcapping": 7.0}),
    "mixtral_linear": ("mixtral_plain", LINEAR),
    "nemotron_linear": ("nemotron_plain", LINEAR),
    "qwen2_moe_linear": ("qwen2_moe_plain", LINEAR),
    "qwen2_moe_renormalized": ("qwen2_moe_plain", {"norm_topk_prob": True}),
}
MIXED = "[[override]]\nmatch = 'down_proj'\nbits = 8\ngroup_size = 32\n"
CONTEXT, WINDOWS = 128, 4


# ---------------------------------------------------------------------------------------------------------------------
# In a Python of their own: `mlx.py --worker JOB.json` answers a line for each item.


def reference(item):
    """The logits of the plain weights, for the other process."""
    sys.path.append(str(HERE))
    import families
    import numpy as np
    from safetensors.torch import load_file

    ids = load_file(pathlib.Path(item["original"]) / "golden.safetensors")["input_ids"]
    families.restack(item["plain"], item["original"])
    model, _ = families.loaded(item["plain"])
    np.savez(item["logits"], ids=ids.numpy(), logits=families.logits(model, ids).numpy())
    return {}


def in_mlx(item):
    """How far the logits of the artifact are from them, or the perplexity of a text."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)

    def widened(folder):
        model, _ = load_model(pathlib.Path(folder))
        wide = tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters())
        model.update(wide)
        return model

    if "text" in item:
        from tokenizers import Tokenizer

        model = widened(item["artifact"])
        text = pathlib.Path(item["text"]).read_text(encoding="utf-8")
        ids = Tokenizer.from_file(str(pathlib.Path(item["artifact"], "tokenizer.json"))).encode(text).ids
        total = 0.0
        for window in range(WINDOWS):
            tokens = mx.array([ids[window * CONTEXT : (window + 1) * CONTEXT]])
            logits = model(tokens).astype(mx.float32)[0, :-1]
            own = mx.take_along_axis(logits, tokens[0, 1:, None], 1)[:, 0]
            total += (mx.logsumexp(logits, 1) - own).sum().item()
        return {"perplexity": math.exp(total / (WINDOWS * (CONTEXT - 1)))}
    expected = np.load(item["logits"])
    largest = np.abs(expected["logits"]).max()

    def logits(model):
        return np.array(model(mx.array(expected["ids"])).astype(mx.float32))

    try:
        config = json.loads((pathlib.Path(item["artifact"]) / "config.json").read_text())
        config.pop("quantization"), config.pop("quantization_config")
        plain = pathlib.Path(item["plain"])
        (plain / "config.json").write_text(json.dumps(config))
        plain = logits(widened(plain))
    except (Exception, SystemExit) as error:
        return {"own": f"{type(error).__name__}: {error}"}
    model = widened(item["artifact"])
    other = float(np.abs(plain - expected["logits"]).max() / largest)
    return {"difference": float(np.abs(logits(model) - plain).max() / largest), "other": other}


def worker(path):
    import traceback

    job = json.loads(pathlib.Path(path).read_text())
    with open(job["result"], "a") as out:
        for item in job["items"]:
            print(f"==== {item['name']}", flush=True)
            try:
                answer = {"reference": reference, "mlx": in_mlx}[job["process"]](item)
            # Where a package is missing that a model asks for, mlx-lm ends the process.
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            out.write(json.dumps(answer | {"name": item["name"]}) + "\n")
            out.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Outside: write the checkpoints and the artifacts, start the workers, judge.


def say(text):
    print(text, file=sys.stderr, flush=True)


def quantc(options, *arguments):
    """Exit code, stdout and stderr of one quantc command, run among the artifacts."""
    command = [str(options.quantc), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=options.folder)
    return done.returncode, done.stdout, done.stderr.strip()


def must(options, *arguments):
    code, said, told = quantc(options, *arguments)
    if code:
        raise RuntimeError(f"quantc {' '.join(map(str, arguments))} ended with {code}: {told[-600:]}")
    return said


def artifact(options, name):
    """Writes a checkpoint for MLX, and what it means; its notes, or why there is none."""
    out = options.folder / f"{name}-mlx"
    code, _, told = quantc(options, "quantize", options.folder / name, "-o", out, "--group-size", 32, *COMMON)
    if code == 2:
        return {"refused": told.removeprefix("error: ")}
    if code:
        raise RuntimeError(f"{name}: quantc ended with {code}: {told[-600:]}")
    must(options, "convert", out, "-o", f"{out}-plain", "--dtype", "f32")
    paths = {"artifact": str(out), "plain": f"{out}-plain", "original": str(options.folder / name), "logits": f"{out}.npz"}
    return {"notes": json.loads((out / "report.json").read_text())["notes"], "item": {"name": name} | paths}


def run_job(python, process, items, options):
    """The answers of one process; whoever brings it down is marked, and the rest is run in another."""
    found = {}
    while left := [item for item in items if item["name"] not in found]:
        job, result = options.folder / f"{process}.json", options.folder / f"{process}.jsonl"
        result.unlink(missing_ok=True)
        job.write_text(json.dumps({"process": process, "items": left, "result": str(result)}))
        done = subprocess.run(
            [str(python), str(HERE / "mlx.py"), "--worker", str(job)],
            capture_output=not options.verbose, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        rows = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
        found |= {row["name"]: row for row in rows}
        if len(rows) < len(left):
            tail = " | ".join((done.stderr or "").strip().splitlines()[-3:])[-300:]
            found[left[len(rows)]["name"]] = {"error": f"the process ended with code {done.returncode}: {tail}"}
    return found


def vary(options, name):
    """Writes a variant beside the checkpoint that it is made of."""
    of, settings = VARIANTS[name]
    folder = options.folder / name
    shutil.copytree(options.folder / of, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if config["architectures"][0].endswith("Model"):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        # What is computed is left out.
        names = {"lm_head.weight": "model.rotary_emb.inv_freq"}
        header = {names.get(k, k.removeprefix("model.")): v for k, v in header.items()}
        header = json.dumps(header).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


NOT_RUN = "does not run", "does not load", "refuses files"
OTHERWISE = "takes the embedding for one", "ignores the sliding window", "logits differ a little", "takes LongRoPE's long factors"
ANEW = "rounds the parts anew"


def outcome(made, expected, found):
    """What stands in the table, and what is wrong with it if anything is."""
    if "refused" in made:
        return made["refused"], None
    told = {kinds: [note for note in made["notes"] if any(kind in note for kind in kinds)] for kinds in (NOT_RUN, OTHERWISE, (ANEW,))}
    if "error" in expected:
        return f"not tried: {expected['error']}", None if "image processor" in expected["error"] else expected["error"]
    problem = found.get("own") or found.get("error")
    if not problem and not found["difference"] <= TOLERANCE:  # nor is NaN
        problem = f"logits differ by {found['difference']:.1e} of the largest"
    if problem:
        return f"no: {problem}", None if told[NOT_RUN] or told[(ANEW,)] else f"not said: {problem}"
    if told[NOT_RUN]:
        return "agrees", f"a note says otherwise: {told[NOT_RUN][0]}"
    if found["other"] <= TOLERANCE:
        return "agrees", None
    otherwise = f"runs it otherwise than transformers (by {found['other']:.0e})"
    return f"{otherwise}, as a note says", None if told[OTHERWISE] else f"not said: {otherwise}"


def short(text):
    """A reason in a few words."""
    text = " ".join(text.split()).split("; ")[0].replace("|", "/")
    return text[text.find("cannot hold it: ") + 16 :][:110] if "cannot hold it: " in text else text[:110]


def environment(folder, wanted):
    """The Python of a venv that has what a file of requirements lists."""
    python, mark = folder / "bin" / "python", folder / "complete"
    if not mark.exists() or mark.read_text() != wanted.read_text():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(wanted)], check=True)
        mark.write_text(wanted.read_text())
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="CHECKPOINT", help="only these (default: all)")
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / ".venv" / "runtimes")
    parser.add_argument("--pythons", nargs=2, metavar="PYTHON", help="one with transformers and torch, one with mlx-lm, as they are")
    parser.add_argument("--artifacts", type=pathlib.Path, help="keep what is written in this new folder")
    parser.add_argument("--docs", type=pathlib.Path, help="write the table into this file, between its marks")
    parser.add_argument("--verbose", action="store_true", help="show the runtimes' whole output")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        # This file has the name of a package that it needs.
        sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != HERE]
        return worker(options.worker)

    fixtures = sorted(p.name for p in (FIXTURES / "families").iterdir() if p.is_dir() and p.name != "gpt_oss_mxfp4")
    known = [*fixtures, *VARIANTS]
    names = options.names or known
    if unknown := {*names} - {*known}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not options.quantc.exists():
        parser.error(f"{options.quantc} does not exist")
    options.quantc = options.quantc.resolve()
    started = time.time()
    if options.pythons:
        own, mlx = options.pythons
    else:
        import cpu_torch
        from check import TORCH

        wanted = [HERE / "requirements-transformers.txt"]
        own = cpu_torch.environment(options.venv.resolve() / "transformers", TORCH["transformers"], wanted)
        mlx = environment(options.venv.resolve() / "mlx", HERE / "requirements-mlx.txt")
    options.folder = (options.artifacts or pathlib.Path(tempfile.mkdtemp(prefix="quantc-mlx-"))).resolve()
    options.folder.mkdir(exist_ok=True)
    wrong, lines = [], ["| family | mlx-lm |", "|---|---|"]
    try:
        bases = sorted({VARIANTS[name][0] if name in VARIANTS else name for name in names})
        write = [own, FIXTURES / "make_families.py", "--write", options.folder, *bases]
        subprocess.run([str(part) for part in write], check=True)
        [vary(options, name) for name in names if name in VARIANTS]
        made = {name: artifact(options, name) for name in names}
        items = [one["item"] for one in made.values() if "item" in one]
        expected = run_job(own, "reference", items, options)
        found = run_job(mlx, "mlx", [item for item in items if "error" not in expected[item["name"]]], options)
        cells = collections.defaultdict(dict)
        for name in names:
            cell, problem = outcome(made[name], expected.get(name, {}), found.get(name, {}))
            config = json.loads((options.folder / name / "config.json").read_text())
            family = config["model_type"] + (" (vision)" if "text_config" in config else "")
            cells[family][name] = short(cell)
            if problem:
                wrong.append(f"{name}: {problem[:600]}")
        for family, texts in cells.items():
            usual = collections.Counter(texts.values()).most_common(1)[0][0]
            others = [f"{name.removeprefix(family + '_')}: {text}" for name, text in texts.items() if text != usual]
            lines.append(f"| {family} | " + "; ".join([usual, *others]) + " |")
        if not options.names:
            lines += whole(options, mlx, wrong)
    finally:
        if not options.artifacts:
            shutil.rmtree(options.folder, ignore_errors=True)
    summary = f"{len(names)} checkpoints, {len(wrong)} not as quantc says; {time.time() - started:.0f} s"
    return end(options, MARKS, "\n".join(lines) + "\n", wrong, summary, say)


def whole(options, mlx, wrong):
    """Lines of a table for the built-in model."""
    model, text = ROOT / "src" / "demo" / "model", ROOT / "src" / "demo" / "evaluation.txt"
    (options.folder / "mixed.toml").write_text(MIXED)
    lines = ["", "| built-in model | perplexity: mlx-lm | quantc eval | verdict |", "|---|---|---|---|"]
    items, own = [], {}
    for index, (name, flags) in enumerate(WHOLE.items()):
        out = options.folder / f"whole-{index}"
        must(options, "quantize", model, "-o", out, *COMMON, *flags)
        windows = ["--context", CONTEXT, "--windows", WINDOWS]
        said = json.loads(must(options, "eval", out, "--text", text, *windows, "--json"))
        own[name] = said["perplexity"]
        items.append({"name": name, "artifact": str(out), "text": str(text)})
    for name, answer in run_job(mlx, "mlx", items, options).items():
        found = answer.get("perplexity", math.nan)
        good = abs(found / own[name] - 1) <= PERPLEXITY_TOLERANCE
        lines.append(f"| {name} | {found:.4f} | {own[name]:.4f} | {'agrees' if good else 'no'} |")
        if not good:
            wrong.append(f"the built-in model, {name}: {answer.get('error', found)}, and quantc eval says {own[name]}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
