#!/usr/bin/env python3
"""Load the tiny checkpoints of every family, in every layout, in the Python runtimes, and compare logits with quantc's reading.

For each checkpoint of tests/fixtures/families and heads and each layout:

1. `quantc quantize` writes it with 4 bits, in groups of 32, by rounding; where it refuses, its reason stands in the table;
2. `quantc convert ARTIFACT` writes what quantc itself holds the artifact to mean, as plain weights that transformers runs
   in float32: the reference;
3. each runtime loads the artifact and is fed the same tokens. It has to find a place for every tensor and a tensor for
   every place, and the largest difference of its logits may be TOLERANCE of the largest logit (in GPTQModel, of mixtures: that of the
   median token).

    python3 tests/runtimes/families.py                                     # all of transformers and GPTQModel
    python3 tests/runtimes/families.py --fast                              # what CI runs
    python3 tests/runtimes/families.py --docs docs/runtimes.md             # all, and the tables into the documentation
    python3 tests/runtimes/families.py --json FILE --docs docs/runtimes.md hy_v4_plain    # renews rows of what FILE keeps

The reference has the type that the runtime's kernel rounds its weights to. A difference in the rounding of a weight is then
no excuse, and what is left is the order of sums, and in GPTQModel a product in float16.

A whole run takes the better part of an hour. With `--json FILE` outcomes are kept in FILE, and those of earlier runs stay there but
for what this one tries: the tables are of all that FILE has, and so are made in as many runs as one likes.

A runtime that cannot load a file is no failure if the report's notes name that runtime; a note that names a runtime
which does load the file is one. Exit code 0: all is as quantc says; 1: it is not; 2: could not start.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from ending import beside_earlier, end

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
# The folders of checkpoints, and what writes them. transformers has no class of Qwen's reward models.
KINDS = {"families": "make_families.py", "heads": "make_heads.py"}
NOT_LOADED = {"gpt_oss_mxfp4", "qwen2_reward", "qwen2_process_reward"}
MARKS = "<!-- families.py begins -->\n", "<!-- families.py ends -->"

COMMON = "--group-size 32 --method rtn --verify-text none --quiet"
LAYOUTS = {
    "ct": f"--format compressed-tensors --scheme W4A16 {COMMON}",
    "ct-asym": f"--format compressed-tensors --scheme W4A16_ASYM {COMMON}",
    "gptq": f"--format gptq --scheme W4A16 {COMMON}",
    "awq": f"--format awq --scheme W4A16_ASYM {COMMON}",
    # Of mixtures: experts as they are, experts of a byte for a weight, experts with a scale over their scales, and experts of one
    # layer as they are.
    "ct-attention": rf"--format compressed-tensors --scheme W4A16 --ignore re:.*\.experts\.\d.* {COMMON}",
    "ct-w8a8": "--format compressed-tensors --scheme W8A8 --method rtn --verify-text none --quiet",
    "ct-fp8": "--format compressed-tensors --scheme FP8_DYNAMIC --method rtn --verify-text none --quiet",
    "ct-nvfp4": "--format compressed-tensors --scheme NVFP4A16 --method rtn --verify-text none --quiet",
    "ct-layers": rf"--format compressed-tensors --scheme W4A16 --ignore re:.*layers\.1\..*\.experts\.\d.* {COMMON}",
}
# layout: what is written. runtime: its name in quantc's notes. rounds: the type that its kernel rounds weights to, which
# may be that of the scales.
# tolerance: the largest difference allowed, as a share of the largest logit. process: what is loaded in one: GPTQModel changes
# transformers as it is imported, and is where transformers loads GPTQ and AWQ.
Column = collections.namedtuple("Column", "layout runtime title rounds tolerance process")
COLUMNS = {
    "ct": Column("ct", "transformers", "compressed-tensors: transformers", "f32", 1e-3, "transformers"),
    "ct-asym": Column("ct-asym", "transformers", "asymmetric: transformers", "scales", 1e-3, "transformers"),
    "gptq": Column("gptq", "transformers", "GPTQ: transformers", "f16", 1e-3, "optimum"),
    "gptq-own": Column("gptq", "GPTQModel", "GPTQ: GPTQModel", "f16", 2e-2, "gptqmodel"),
    "awq": Column("awq", "transformers", "AWQ: transformers", "f16", 1e-3, "optimum"),
    "awq-own": Column("awq", "GPTQModel", "AWQ: GPTQModel", "f16", 2e-2, "gptqmodel"),
    "ct-attention": Column("ct-attention", "transformers", "experts as they are: transformers", "f32", 1e-3, "transformers"),
    # Linears are unpacked in the type of their scales, and experts in single precision.
    "ct-w8a8": Column("ct-w8a8", "transformers", "W8A8: transformers", "scales", 1e-2, "transformers"),
    "ct-nvfp4": Column("ct-nvfp4", "transformers", "NVFP4A16: transformers", "f32", 1e-3, "transformers"),
    "ct-layers": Column("ct-layers", "transformers", "experts of a layer as they are: transformers", "f32", 1e-3, "transformers"),
}
# What is tried of these with each of EXPERTS, and with no other checkpoint.
OF_EXPERTS = ["ct-attention", "ct-w8a8", "ct-nvfp4", "ct-layers"]
EXPERTS = ["mixtral_plain", "qwen3_moe_mixed", "deepseek_v2_lite", "llama4_text_every_layer"]
USUAL = "ct,ct-asym,gptq,gptq-own,awq,awq-own"
FAST = (
    ",".join(["ct", "ct-asym", *OF_EXPERTS]),
    ["qwen2_plain", "gemma3_vision", "phi3_plain", "gpt_neox_sequential", "qwen3_5_vision", "deepseek_v32_published", "nemotron_h_plain", *EXPERTS],
)


# ---------------------------------------------------------------------------------------------------------------------
# Inside a venv: `families.py --worker JOB.json` loads what one job lists and writes a line for each.


def auto_class(folder):
    """The class that a checkpoint names or, as some on the hub name one of their own, that transformers has for its type."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if named := getattr(transformers, (config.architectures or [""])[0], None):
        return named
    classes = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM
    return next(auto for auto in classes if type(config) in auto._model_mapping)


# What layouts call the tensors of one linear.
PARTS = r"\.(weight|weight_packed|weight_scale|weight_shape|weight_zero_point|qweight|qzeros|scales|g_idx)$"


def place_everything(model, info, idle):
    """
    Fails unless every place found its tensor and every tensor its place, but those of which the reference had none either:
    what is missing is random, without a word.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or [])
    idle = {re.sub(PARTS, "", name) for name in idle}
    unexpected = [name for name in info["unexpected_keys"] if re.sub(PARTS, "", name) not in idle]
    # Hashes of words are computed where a file lacks them.
    missing = [k for k in info["missing_keys"] if k not in tied and not re.search(r"\.(layer_multipliers|ngram_heads_\w+)$", k)]
    found = {"missing": missing, "unexpected": unexpected, "misshapen": list(info.get("mismatched_keys") or [])}
    if wrong := {what: names for what, names in found.items() if names}:
        sample = ", ".join(f"{len(names)} {what} (`{sorted(map(str, names))[0]}`)" for what, names in wrong.items())
        raise RuntimeError(f"loads wrong weights: {sample}")


def loaded(folder, idle=None, **options):
    """A model; without `idle`, that of the reference, and the names that it has no place for."""
    import torch

    settings = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    model, info = auto_class(folder).from_pretrained(folder, output_loading_info=True, **settings)
    unexpected = set(info["unexpected_keys"])
    place_everything(model, info, unexpected if idle is None else idle)
    return (model.eval(), unexpected) if idle is None else model.eval()


def round_experts(folder, rounded, original):
    """
    Takes experts as they are in `rounded`: transformers unpacks those that it merges in the type of their scales. Stacked
    ones it takes apart or not at all.
    """
    from safetensors.torch import load_file, save_file

    if rounded and any(re.search(r"experts\.\d+\.", name) for name in load_file(pathlib.Path(original) / "model.safetensors")):
        file = pathlib.Path(folder) / "model.safetensors"
        found, other = load_file(file), load_file(pathlib.Path(rounded) / "model.safetensors")
        experts = {name: other[name].to(found[name].dtype) for name in found if re.search(r"experts\.\d+\.", name)}
        save_file(found | experts, file, metadata={"format": "pt"})


def restack(folder, original):
    """Puts experts that quantc wrote one by one back into the stacks that `original` has, as transformers reads them."""
    import torch
    from safetensors.torch import load_file, save_file

    file = pathlib.Path(folder) / "model.safetensors"
    found, model = load_file(file), load_file(pathlib.Path(original) / "model.safetensors")
    lost = [name for name in model if name not in found and re.search(r"experts\.[a-z_]+$|(input|output)_linear\.weight$", name)]
    if not lost:
        return

    def expert(prefix, part, what):
        names = sorted((n for n in found if re.fullmatch(rf"{re.escape(prefix)}experts\.\d+\.{part}_proj\.{what}", n)), key=natural)
        return torch.stack([found[n] for n in names])

    stacks = {}
    for name in lost:
        prefix, last = re.fullmatch(r"(.*?\.)(?:experts\.)?([a-z_]+(?:\.weight)?)", name).groups()
        what = "bias" if name.endswith("_bias") else "weight"
        if re.match("down|output", last):
            stack = expert(prefix, "down", what)
        else:
            gate, up = expert(prefix, "gate", what), expert(prefix, "up", what)
            # gpt-oss, the one with biases, has the rows of gate and up in turns.
            turns = f"{prefix}experts.gate_up_proj_bias" in model
            stack = torch.stack([gate, up], 2).flatten(1, 2) if turns else torch.cat([gate, up], 1)
        transposed = stack.dim() == 3 and "experts." in name
        stacks[name] = (stack.transpose(1, 2) if transposed else stack).contiguous()
        assert stacks[name].shape == model[name].shape, name
    kept = {n: t for n, t in found.items() if not re.search(r"experts\.\d+\.", n)}
    save_file(kept | stacks, file, metadata={"format": "pt"})


def natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def logits(model, ids):
    import torch

    with torch.inference_mode():
        found = model(input_ids=ids, use_cache=False)
        # What embeds texts has hidden states alone.
        return getattr(found, "logits", found[0]).float()


def in_gptqmodel(folder, ids):
    """Logits, and the places that no tensor of the file is called after."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import load_file
    from transformers import AutoProcessor

    # What makes images and sound into numbers lies beside real models, is loaded with them, and does nothing to text.
    AutoProcessor.from_pretrained = lambda *_, **__: None
    model = GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend=BACKEND.TORCH, attn_implementation="eager").model
    places, file = model.state_dict().keys() - {*(getattr(model, "all_tied_weights_keys", None) or [])}, load_file(folder + "/model.safetensors")
    return logits(model.eval(), ids), sorted(places - file.keys(), key=natural)


def measured(item, ids, idle):
    """The logits of one artifact in one runtime."""
    import torch
    from transformers import CompressedTensorsConfig

    folder, column = item["artifact"], item["column"]
    if column.endswith("-own"):
        return in_gptqmodel(folder, ids)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if column in ("ct-asym", "ct-w8a8", "ct-nvfp4") else {}
    if column in ("gptq", "awq"):
        options["device_map"] = "cpu"
    model = loaded(folder, idle, **options)
    # Experts keep the type of their scales, whatever type was asked for, and would be multiplied in it.
    return logits(torch.nn.Module.float(model) if item["layout"].startswith("ct") else model, ids)


def worker(path):
    import traceback

    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    job = json.loads(pathlib.Path(path).read_text())
    known = {}
    with open(job["result"], "a") as out:
        for item in job["items"]:
            started = time.time()
            print(f"==== {item['name']} {item['column']}", flush=True)
            try:
                ids = load_file(pathlib.Path(item["original"]) / "golden.safetensors")["input_ids"]
                if item["reference"] not in known:
                    round_experts(item["reference"], item.get("experts"), item["original"])
                    restack(item["reference"], item["original"])
                    model, unexpected = loaded(item["reference"])
                    known = {item["reference"]: (logits(model, ids), unexpected)}
                expected, unexpected = known[item["reference"]]
                found, empty = measured(item, ids, unexpected), []
                if isinstance(found, tuple):
                    found, empty = found
                largest = expected.abs().max().item()
                tokens = (found - expected).abs().amax(-1) / largest
                # In float16 a token here and there goes to another expert; what is loaded wrongly, all see.
                mixed = item["column"].endswith("-own") and "expert" in (pathlib.Path(item["original"]) / "config.json").read_text()
                answer = {"difference": (tokens.median() if mixed else tokens.max()).item()}
                if empty and not tokens.max() <= COLUMNS[item["column"]].tolerance:
                    raise RuntimeError(f"loads wrong weights: {len(empty)} missing (`{empty[0]}`)")
            except Exception as error:
                traceback.print_exc()
                last = traceback.extract_tb(error.__traceback__)[-1]
                answer = {"error": f"{type(error).__name__}: {error}", "at": f"{pathlib.Path(last.filename).name}:{last.lineno}"}
            answer |= {"name": item["name"], "column": item["column"], "seconds": time.time() - started}
            out.write(json.dumps(answer) + "\n")
            out.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Outside: write the checkpoints and the artifacts, start the workers, judge.


def say(text):
    print(text, file=sys.stderr, flush=True)


def quantc(binary, *arguments):
    """Exit code and stderr of one quantc command."""
    done = subprocess.run([str(binary), *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


def artifacts(options, folder, name, layout):
    """Writes a checkpoint in a layout and what it means in every type that is asked for; its notes, or why there is none."""
    out, without = folder / f"{name}-{layout}", []
    write = ["quantize", folder / name, "-o", out, *LAYOUTS[layout].split()]
    code, said = quantc(options.quantc, *write)
    if code == 2 and "multiples of 32 rows" in said:
        without = narrow(folder / name)
        code, said = quantc(options.quantc, *write, *(part for tail in without for part in ("--ignore", rf"re:.*\d\.{re.escape(tail)}$")))
    if code == 2:
        return {"refused": said.removeprefix("error: ")}
    if code:
        raise RuntimeError(f"{name}: quantc ended with {code}: {said[-600:]}")
    scales = scale_type(name)
    wanted = {column.rounds for column in map(COLUMNS.get, options.only) if column.layout == layout}
    for rounds in {scales if rounds == "scales" else rounds for rounds in wanted} | {scales}:
        code, said = quantc(options.quantc, "convert", out, "-o", f"{out}-{rounds}", "--dtype", rounds)
        if code:
            raise RuntimeError(f"{name}: quantc convert ended with {code}: {said[-600:]}")
    return {"notes": json.loads((out / "report.json").read_text())["notes"], "out": str(out), "without": without}


def narrow(folder):
    """What linears are called in blocks that GPTQ cannot hold, as tiny models have them, and those that runtimes join to them."""
    raw = (folder / "model.safetensors").read_bytes()
    shapes = {name: of["shape"] for name, of in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).items() if "shape" in of}
    tails = {name: re.fullmatch(r".*?\.\d+\.(.*)\.weight", name) for name in shapes}
    linears = {tails[name][1] for name, shape in shapes.items() if tails[name] and len(shape) == 2 and shape[0] % 32}
    linears = {tail for tail in linears if not re.search(r"gate$|router|indexer|_coefs$", tail)}  # stay as they are anyhow
    joined = {re.sub("[qkv]_proj$", f"{part}_proj", tail) for tail in linears for part in "qkv"}
    return sorted(joined & {tail[1] for tail in tails.values() if tail})


def run_job(python, options, items, folder, script="families.py"):
    """Runs one process's items; one that brings the process down is marked, and the rest is run in another."""
    job, log, found = folder / "job.json", folder / "log.txt", {}
    environ = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1", "GPTQMODEL_DISABLE_PACK_EXT": "1",
    }  # fmt: skip
    while left := [item for item in items if (item["name"], item["column"]) not in found]:
        result = folder / "result.jsonl"
        result.unlink(missing_ok=True)
        job.write_text(json.dumps({"items": left, "result": str(result)}))
        with log.open("a" if options.verbose else "w") as sink:
            code = subprocess.run(
                [str(python), str(HERE / script), "--worker", str(job)],
                env=environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        rows = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
        found |= {(row["name"], row["column"]): row for row in rows}
        if len(rows) < len(left):
            dead = left[len(rows)]
            tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-300:]
            found[dead["name"], dead["column"]] = {"error": f"the process ended with code {code}: {tail}"}
    if options.verbose:
        say(log.read_text(errors="replace"))
    return found


def outcome(column, made, found):
    """What stands in the table, and what is wrong with it if anything is."""
    if "refused" in made:
        return made["refused"], None
    # What a note says how to load is loaded so here.
    runtime = COLUMNS[column].runtime
    told = [note for note in made["notes"] if re.search(rf"{runtime}(?! loads| does[,;]| does not$)", note) and "only with" not in note]
    # A note that begins with runtimes is about these. What is said of a tokenizer, or of what config.json does not say, says nothing of weights.
    told = [note for note in told if not re.search("tokenizer|transformers' defaults", note)]
    told = [note for note in told if runtime in re.match(rf"(({RUNTIMES})( and |\b))+|", note)[0].split() or not re.match(RUNTIMES, note)]
    for pattern, why in NOT_TRIED.items():
        if re.search(pattern, found.get("error", "")):
            return f"not tried: {why}", None
    if "error" in found:
        problem = found["error"]
    elif not found["difference"] <= COLUMNS[column].tolerance:  # nor is NaN
        problem = f"logits differ by {found['difference']:.1e} of the largest"
    else:
        left = sorted({module.rpartition(".")[2] for module in made.get("without", [])})
        cell = "agrees" + (f" (but for {', '.join(left)})" if left else "")
        return cell, f"a note says otherwise: {told[0]}" if told and "may" not in told[0] else None
    return f"no: {problem}", None if told else problem


RUNTIMES = "sentence-transformers|transformers|GPTQModel|vLLM|SGLang|mlx-lm"
# What is no fault of a file.
NOT_TRIED = {
    "requires the timm library": "asks for timm",
    "requires package num2words": "asks for num2words",
    "does not recognize this architecture": "transformers has no such class",
    "activation must be None, silu, or swish": "GPTQModel's convolutions know SiLU alone",
}
# What messages come to, in a few words.
SHORT = {
    r"no: .*loads wrong weights.*": "no: loads wrong weights",
    r"no: logits differ by nan.*": "no: computes no numbers",
    r"no: logits differ.*": "no: other logits",
    r"no: .*(issues during automatic conversion|ignore_mismatched_sizes).*": "no: does not unpack them",
    r"no: .*(Unsupport model_type|Unrecognized configuration class).*": "no: does not know the family",
    r"no: .*No compatible quant linear was found.*": "no: takes nothing for quantized",
    r"no: .*requires trust_remote_code.*": "no: asks for the model's own code",
    r"no: .*Missing required quantized weights.*": "no: does not find the weights",
    r"tensor `.*cannot hold it: ([^;]*).*": r"refused: \1",
    r"no: (.*)": r"no: fails: \1",
    r"(agrees|not tried)(.*)": r"\1\2",
    r"(.*)": r"refused: \1",
}


def short(text):
    """A reason in a few words."""
    text = " ".join(text.split())
    pattern, words = next((pattern, words) for pattern, words in SHORT.items() if re.fullmatch(pattern, text))
    return re.sub(f"^{pattern}$", words, text).split("; ")[0].replace("|", "/")[:90]


def table(names, columns, cells):
    """Markdown: a row for each family; what differs between its checkpoints is said by name."""
    families = collections.defaultdict(list)
    for name in names:
        families[family_of(name)].append(name)
    lines = ["| family | " + " | ".join(COLUMNS[c].title for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for family, members in families.items():
        row = []
        for column in columns:
            texts = {name: short(cells[name, column]) for name in members}
            usual = collections.Counter(texts.values()).most_common(1)[0][0]
            others = [f"{name.removeprefix(family + '_')}: {text}" for name, text in texts.items() if text != usual]
            row.append("; ".join([usual, *others]))
        lines.append(f"| {family} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def tables(rows):
    """Markdown of outcomes, as JSON has them: a table for each runtime."""
    cells = collections.defaultdict(lambda: "not tried", {(row["checkpoint"], row["column"]): row["cell"] for row in rows})
    tried = collections.defaultdict(set)
    for row in rows:
        if home(row["checkpoint"]):
            tried[COLUMNS[row["column"]].runtime].add(row["checkpoint"])
    columns = collections.defaultdict(list)
    for name in [name for name in COLUMNS if any(row["column"] == name for row in rows)]:
        columns[COLUMNS[name].runtime].append(name)
    return "\n".join(table(sorted(tried[runtime]), of, cells) for runtime, of in columns.items())


def scale_type(name):
    """The type of the scales that compressed-tensors has of a checkpoint."""
    config = json.loads((home(name) / "config.json").read_text())
    return "f16" if config.get("torch_dtype", config.get("dtype")) == "float32" else "bf16"


def home(name):
    """Where what a checkpoint is made from lies; nothing if there is none of this name."""
    return next((kind / name for kind in map(FIXTURES.joinpath, KINDS) if (kind / name).is_dir()), None)


def family_of(name):
    """What a checkpoint's row is called: `qwen3`, `qwen3 (heads)`, `mistral3 of mistral4 (vision)`."""
    config = json.loads((home(name) / "config.json").read_text())
    outer, text = config["model_type"], config.get("text_config", {}).get("model_type", "")
    family = outer if text.startswith(outer) or not text else f"{outer} of {text}"
    kinds = {"vision": "vision_config" in config, "sound": "audio_config" in config, "heads": home(name).parent.name == "heads"}
    return " ".join([family, *(f"({kind})" for kind, is_one in kinds.items() if is_one)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="CHECKPOINT", help="only these (default: all)")
    parser.add_argument("--only", help=f"columns: {', '.join(COLUMNS)} (default: all but those of experts)")
    parser.add_argument("--fast", action="store_true", help="some checkpoints in transformers with compressed-tensors")
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / ".venv" / "runtimes")
    parser.add_argument("--artifacts", type=pathlib.Path, help="keep what is written in this new folder")
    parser.add_argument("--docs", type=pathlib.Path, help="write the tables into this file, between its marks")
    parser.add_argument("--json", type=pathlib.Path, help="keep outcomes in this file, beside those of earlier runs")
    parser.add_argument("--verbose", action="store_true", help="show the runtimes' whole output")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)

    # What is packed in MXFP4 is gpt_oss_plain otherwise, and tests/it proves that it is read.
    known = sorted(p.name for kind in KINDS for p in (FIXTURES / kind).iterdir() if p.is_dir() and p.name not in NOT_LOADED)
    names = options.names or (FAST[1] if options.fast else known)
    options.only = (options.only or (FAST[0] if options.fast else USUAL)).split(",")
    if unknown := {*names} - {*known} | {*options.only} - {*COLUMNS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not options.quantc.exists():
        parser.error(f"{options.quantc} does not exist")
    options.quantc = options.quantc.resolve()
    sys.path.insert(0, str(HERE))
    import cpu_torch
    from check import TORCH

    started, wrong, rows = time.time(), [], []
    folder = (options.artifacts or pathlib.Path(tempfile.mkdtemp(prefix="quantc-families-"))).resolve()
    try:
        processes, pythons = sorted({COLUMNS[c].process for c in options.only}), {}
        own = any(COLUMNS[c].layout in ("gptq", "awq") for c in options.only)
        for process in {"transformers", *processes}:
            wanted = [HERE / f"requirements-{name}.txt" for name in ("transformers", *(["gptqmodel"] if own else []))]
            pythons[process] = cpu_torch.environment(options.venv.resolve() / "transformers", TORCH["transformers"], wanted)
        for kind, script in KINDS.items():
            if of_kind := [name for name in names if home(name).parent.name == kind]:
                write = [pythons["transformers"], FIXTURES / script, "--write", folder, *of_kind]
                subprocess.run([str(part) for part in write], check=True)
        # GPTQModel takes models for what predicts tokens.
        heads = [n for n in names if home(n).parent.name == "heads"]
        tried = {(n, c) for n in names for c in options.only if c not in OF_EXPERTS or n in EXPERTS}
        tried -= {(n, c) for n in heads for c in options.only if COLUMNS[c].runtime != "transformers"}
        wanted = sorted({(n, COLUMNS[c].layout) for n, c in tried})
        made = {(n, layout): artifacts(options, folder, n, layout) for n, layout in wanted}
        say(f"{len(made)} artifacts after {time.time() - started:.0f} s")
        found = {}
        for process in processes:
            columns = [c for c in options.only if COLUMNS[c].process == process]
            pairs = [(n, c, COLUMNS[c]) for n in names for c in columns if (n, c) in tried]
            items = [
                {
                    "name": n, "column": c, "layout": column.layout, "artifact": out, "original": str(folder / n),
                    "reference": f"{out}-{scale_type(n) if column.rounds == 'scales' else column.rounds}",
                    "experts": f"{out}-{scale_type(n)}" if c == "ct" else None,
                }  # fmt: skip
                for n, c, column in pairs
                if (out := made[n, column.layout].get("out"))
            ]
            found |= run_job(pythons[process], options, items, folder)
    finally:
        if not options.artifacts:
            shutil.rmtree(folder, ignore_errors=True)
    for name, column in sorted(tried):
        of = made[name, COLUMNS[column].layout]
        cell, problem = outcome(column, of, found.get((name, column)))
        rows.append({"checkpoint": name, "column": column, "cell": cell, **of, **found.get((name, column), {})})
        if problem:
            wrong.append(f"{name} {column}: {problem[:400]}")
    summary = f"{len(rows)} cells, {len(wrong)} not as quantc says; {time.time() - started:.0f} s"
    rows = beside_earlier(options.json, rows, ("checkpoint", "column"), tried)
    return end(options, MARKS, tables(rows), wrong, summary, say)


if __name__ == "__main__":
    sys.exit(main())
