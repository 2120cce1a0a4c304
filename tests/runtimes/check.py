#!/usr/bin/env python3
"""Load what quantc writes in the runtimes that people use, on the CPU, and compare with quantc's own numbers.

For each case of the matrix below:

1. `quantc quantize MODEL` writes the artifact;
2. `quantc convert ARTIFACT --dtype f32` writes what quantc itself holds the artifact to mean, as plain float32 weights,
   which transformers runs in float32: the reference;
3. the runtime loads the artifact, is fed the same token ids, and its logits are compared with the reference's;
4. perplexity on the same windows of text: the runtime's own, beside what `quantc eval ARTIFACT` prints.

    python3 tests/runtimes/check.py                       # everything: several GB of packages, a quarter of an hour
    python3 tests/runtimes/check.py --only ct             # transformers + compressed-tensors: a few minutes
    python3 tests/runtimes/check.py --quantc target/release/quantc --model MODEL --text TEXT --artifacts DIR

What it needs is installed from PyPI into --venv (pinned in requirements-*.txt; Python 3.11 or newer with venv, Linux on
x86-64, a C compiler). The table on stdout is markdown. Exit code 0: all agree; 1: some case failed; 2: could not start.

How near is near enough. A runtime that computes in a type of unit roundoff u rounds the weight, the input and the output
of each linear, the norms and the rotary products: about 20 roundings a layer that matter, independent of one another. On
L layers the logits then differ by about u/sqrt(3) * sqrt(20 L) of their own spread s (root mean square over the
vocabulary, mean removed). Three times that is the tolerance t on the root mean square difference (with a floor of 2e-5 for
float32, where the order of summation counts too). From t follow the others: KL, about half the variance of the
difference, may be (t s)^2; and the most likely token may change only where the reference's two best are within 6 t s.
A wrong nibble order, zero point or group misses t by two orders of magnitude, a scale rounded to the wrong 16-bit type by
one in float32. Perplexity must agree to 1e-3 in every case.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = {"transformers": "2.15.0", "vllm": "2.13.0"}
PERPLEXITY_TOLERANCE = 1e-3
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def case(group, name, runtime, options, dtype, **extra):
    """One row of the matrix: `options` go to `quantc quantize`, `dtype` is the coarsest type that the runtime rounds to.

    transformers is always asked for float32; the GPTQ and AWQ kernels still round the weights to float16.
    """
    return {"group": group, "name": name, "runtime": runtime, "options": options.split(), "dtype": dtype, **extra}


# The artifact is named by its options, so that two runtimes read the very same one.
CT = "--format compressed-tensors --method rtn"
GPTQ = "--format gptq --method gptq --samples 16 --seq-len 256"
AWQ = "--format awq --method awq --samples 16 --seq-len 256 --scheme W4A16_ASYM"
CASES = [
    case("ct", "ct-w4-g32", "transformers", f"{CT} --scheme W4A16 --group-size 32", "float32"),
    case("ct", "ct-w4-g64", "transformers", f"{CT} --scheme W4A16 --group-size 64", "float32"),
    case("ct", "ct-w4-g128", "transformers", f"{CT} --scheme W4A16 --group-size 128", "float32"),
    case("ct", "ct-w4-channel", "transformers", f"{CT} --scheme W4A16 --group-size -1", "float32"),
    case("ct", "ct-w8-g64", "transformers", f"{CT} --scheme W8A16 --group-size 64", "float32"),
    # Unpacked, for else the runtime rounds inputs as well; in the scales' own type, as below.
    case("ct", "ct-w8a8", "transformers", f"{CT} --scheme W8A8", "bfloat16", dequantize=True),
    case("ct", "ct-fp8-dynamic", "transformers", f"{CT} --scheme FP8_DYNAMIC", "bfloat16", dequantize=True),
    # A four-bit float of three bits times an eight-bit one of four, and a power of two: exact in bfloat16.
    case("ct", "ct-nvfp4a16", "transformers", f"{CT} --scheme NVFP4A16", "bfloat16", dequantize=True),
    case("ct", "ct-w3-g64", "transformers", f"{CT} --scheme W3A16 --group-size 64", "float32"),
    case("ct", "ct-w2-g32", "transformers", f"{CT} --scheme W2A16 --group-size 32", "float32"),
    # The default path of transformers 5.23 expects zero points unpacked; with dequantize=True it reads them as they are, but
    # multiplies in the scales' own type, so that each weight is rounded to it.
    case("ct", "ct-w4-asym-g64", "transformers", f"{CT} --scheme W4A16_ASYM --group-size 64", "bfloat16", dequantize=True),
    case("gptq", "gptq-w4-g128", "transformers", f"{GPTQ} --scheme W4A16 --group-size 128", "float16"),
    case("gptq", "gptq-w4-asym-g64", "transformers", f"{GPTQ} --scheme W4A16_ASYM --group-size 64", "float16"),
    case("gptq", "gptq-w8-g64", "transformers", f"{GPTQ} --scheme W8A16 --group-size 64", "float16"),
    case("gptq", "gptq-w3-g64", "transformers", f"{GPTQ} --scheme W3A16 --group-size 64", "float16"),
    case("gptq", "gptq-w2-g32", "transformers", f"{GPTQ} --scheme W2A16 --group-size 32", "float16"),
    case("gptq", "gptq-w4-g64-desc-act", "transformers", f"{GPTQ} --scheme W4A16 --group-size 64 --desc-act", "float16"),
    case("awq", "awq-w4-g64", "transformers", f"{AWQ} --group-size 64", "float16"),
    case("awq", "awq-w4-g128", "transformers", f"{AWQ} --group-size 128", "float16"),
    case("vllm", "ct-w4-g128", "vllm", f"{CT} --scheme W4A16 --group-size 128", "float16"),
    case("vllm", "ct-w4-asym-g64", "vllm", f"{CT} --scheme W4A16_ASYM --group-size 64", "float16"),
    case("vllm", "gptq-w4-g128", "vllm", f"{GPTQ} --scheme W4A16 --group-size 128", "float16"),
    case("vllm", "awq-w4-g128", "vllm", f"{AWQ} --group-size 128", "float16"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Inside a venv: `check.py --worker JOB.json` runs the cases of one job and writes their measurements.


def windows_of(job, folder):
    """The evaluation windows: the text tokenized once with the artifact's own tokenizer, cut without overlap."""
    from tokenizers import Tokenizer

    text = pathlib.Path(job["text"]).read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(pathlib.Path(folder, "tokenizer.json"))).encode(text).ids
    context, count = job["context"], job["windows"]
    if len(ids) < context * count:
        raise SystemExit(f"{job['text']} has {len(ids)} tokens, {count} windows of {context} need {context * count}")
    return [ids[i * context : (i + 1) * context] for i in range(count)]


class Comparison:
    """Running comparison of log-probabilities [T, V] of a runtime with the reference's."""

    def __init__(self):
        self.positions = self.same_top = self.wrong_top = 0
        self.squares = self.spread = self.kl = self.largest = 0.0
        self.margins = []

    def add(self, reference, runtime, raw=None):
        """Add one window. `raw` = the two logits, when the runtime gives them: the largest difference is theirs."""
        reference, runtime = reference.double(), runtime.double()
        delta = runtime - reference
        delta = delta - delta.mean(-1, keepdim=True)
        self.positions += delta.shape[0]
        self.squares += delta.square().mean(-1).sum().item()
        self.spread += reference.var(-1, unbiased=False).sum().item()
        self.kl += (reference.exp() * (reference - runtime)).sum(-1).sum().item()
        a, b = raw if raw else (reference, runtime)
        self.largest = max(self.largest, (a - b).abs().max().item())
        best = reference.topk(2, -1)
        changed = runtime.argmax(-1) != best.indices[:, 0]
        self.same_top += int((~changed).sum())
        self.margins += (best.values[:, 0] - best.values[:, 1])[changed].tolist()

    def result(self):
        n = self.positions
        spread = math.sqrt(self.spread / n)
        return {
            "positions": n,
            "max_abs": self.largest,
            "spread": spread,
            "relative": math.sqrt(self.squares / n) / spread,
            "kl": self.kl / n,
            "top1": self.same_top / n,
            "changed_margin": max(self.margins, default=0.0),
        }


def load_reference(folder):
    """quantc's own dequantization, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    refuse_bad_loading(folder, info, model)
    return model.eval()


def refuse_bad_loading(folder, info, model):
    """A tensor that the runtime did not find is filled at random, without an exception: look at its loading report."""
    tied = set(getattr(model, "_tied_weights_keys", None) or [])
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = [str(n) for n in info.get(what) or [] if str(n) not in tied]
        if names:
            raise RuntimeError(f"{folder}: {what.replace('_', ' ')} on loading: {', '.join(sorted(names)[:4])} ({len(names)} in all)")


def negative_log_likelihood(logprobs, ids):
    """Sum over a window of the loss of every token but the first; logprobs [T, V]."""
    import torch

    return -logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).double().sum().item()


def run_transformers(job, item):
    """Logits of the artifact in transformers (through compressed-tensors, or gptqmodel for GPTQ and AWQ)."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if item.get("dequantize") else {}
    if item["group"] != "ct":
        options["device_map"] = "cpu"  # GPTQModel would look for a GPU; compressed-tensors would ask for accelerate
    windows = windows_of(job, item["artifact"])
    reference = load_reference(item["reference"])
    model, info = AutoModelForCausalLM.from_pretrained(
        item["artifact"], dtype=torch.float32, output_loading_info=True, **options
    )
    refuse_bad_loading(item["artifact"], info, model)
    model.eval()
    compare, ours, theirs, scored = Comparison(), 0.0, 0.0, 0
    with torch.inference_mode():
        # All windows at once: some kernels unpack their weights on every call.
        found = model(torch.tensor(windows)).logits.float()
        for ids, b in zip(windows, found):
            a = reference(torch.tensor([ids])).logits[0]
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            compare.add(p, q, (a, b))
            ours, theirs = ours + negative_log_likelihood(p, ids), theirs + negative_log_likelihood(q, ids)
            scored += len(ids) - 1
    kinds = sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__} - {"Linear"})
    return {
        **compare.result(),
        "layers": model.config.num_hidden_layers,
        "reference_perplexity": math.exp(ours / scored),
        "perplexity": math.exp(theirs / scored),
        "kernel": ", ".join(kinds) or "Linear",
    }


def run_vllm(job, item):
    """Prompt log-probabilities of the artifact in vLLM: all of the vocabulary on a short window, the target's on the rest."""
    import torch
    from vllm import LLM, SamplingParams

    windows, short = windows_of(job, item["artifact"]), 64
    reference = load_reference(item["reference"])
    vocabulary = reference.config.vocab_size
    llm = LLM(
        item["artifact"],
        skip_tokenizer_init=True,
        dtype=item["dtype"],
        enforce_eager=True,
        max_model_len=job["context"] + 8,
        max_num_seqs=1,
        max_logprobs=vocabulary,
        enable_prefix_caching=False,
    )

    def prompt_logprobs(ids, count):
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=count, detokenize=False)
        return llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0].prompt_logprobs

    compare, ours, theirs, scored = Comparison(), 0.0, 0.0, 0
    with torch.inference_mode():
        ids = windows[0][:short]
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1]
        found = torch.full((len(ids) - 1, vocabulary), -math.inf)
        for row, entry in enumerate(prompt_logprobs(ids, vocabulary)[1:]):
            tokens = list(entry)
            found[row, tokens] = torch.tensor([entry[t].logprob for t in tokens])
        compare.add(expected, found)
        for ids in windows:
            ours += negative_log_likelihood(reference(torch.tensor([ids])).logits[0].log_softmax(-1), ids)
            theirs -= sum(entry[t].logprob for t, entry in zip(ids[1:], prompt_logprobs(ids, 0)[1:]))
            scored += len(ids) - 1
    return {
        **compare.result(),
        "layers": reference.config.num_hidden_layers,
        "reference_perplexity": math.exp(ours / scored),
        "perplexity": math.exp(theirs / scored),
        "kernel": "vLLM",
    }


def worker(path):
    """Run one job: {"cases": [...], "text", "context", "windows", "result"}; one JSON line a case goes to `result`."""
    import traceback

    job = json.loads(pathlib.Path(path).read_text())
    with open(job["result"], "a") as out:
        for item in job["cases"]:
            started = time.time()
            try:
                found = {"vllm": run_vllm, "transformers": run_transformers}[item["runtime"]](job, item)
            except Exception as error:
                traceback.print_exc()
                last = traceback.extract_tb(error.__traceback__)[-1]
                found = {"error": f"{type(error).__name__}: {error} ({pathlib.Path(last.filename).name}:{last.lineno})"}
            found |= {"name": item["name"], "runtime": item["runtime"], "seconds": time.time() - started}
            out.write(json.dumps(found) + "\n")
            out.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Outside: install, make the artifacts, start the workers, judge.


def say(text):
    print(text, file=sys.stderr, flush=True)


def quantc(binary, *arguments):
    """stdout of one quantc command; its stderr is shown when it fails."""
    command = [str(binary), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode} from `{' '.join(command)}`: {done.stderr.strip()[-600:]}")
    return done.stdout


def artifact(options, item, folder):
    """Write the case's artifact, its float32 twin, and quantc's own evaluation; what exists is used again."""
    out, twin, judged = folder / item["name"], folder / f"{item['name']}.f32", folder / f"{item['name']}.eval.json"
    if not out.exists():
        quantc(options.quantc, "quantize", options.model, "-o", out, *item["options"], "--verify-text", "none", "--quiet")
    if not twin.exists():
        quantc(options.quantc, "convert", out, "-o", twin, "--dtype", "f32")
    wanted = {"text": str(options.text), "context": options.context, "windows": options.windows}
    known = json.loads(judged.read_text()) if judged.exists() else {}
    if known.get("asked") != wanted:
        flags = ["--text", options.text, "--context", options.context, "--windows", options.windows]
        known = json.loads(quantc(options.quantc, "eval", out, *flags, "--json")) | {"asked": wanted}
        judged.write_text(json.dumps(known, indent=1))
    return {**item, "artifact": str(out), "reference": str(twin), "quantc_perplexity": known["perplexity"]}


def verdict(item, found):
    """Why the case fails, or nothing."""
    if "error" in found:
        return found["error"]
    noise = ROUNDOFF[item["dtype"]] / math.sqrt(3) * math.sqrt(20 * found["layers"])
    tolerance = max(3 * noise, 2e-5)
    absolute = tolerance * found["spread"]
    checks = [
        (found["relative"] <= tolerance, f"logits differ by {found['relative']:.2e} of their spread, {tolerance:.2e} allowed"),
        (found["kl"] <= absolute**2, f"KL {found['kl']:.2e}, {absolute**2:.2e} allowed"),
        (found["changed_margin"] <= 6 * absolute, f"the first choice changed over a margin of {found['changed_margin']:.3g}"),
        (
            abs(found["perplexity"] / item["quantc_perplexity"] - 1) <= PERPLEXITY_TOLERANCE,
            f"perplexity {found['perplexity']:.4f} in the runtime, {item['quantc_perplexity']:.4f} by quantc eval",
        ),
    ]
    # A NaN fails every comparison above, so it cannot pass here.
    return "; ".join(message for passed, message in checks if not passed)


def run_job(python, options, items, scratch):
    """The measurements of `items`, all of one runtime, in one process of its own."""
    job = {"cases": items, "text": str(options.text), "context": options.context, "windows": options.windows}
    job["result"] = str(scratch / "result.jsonl")
    pathlib.Path(job["result"]).unlink(missing_ok=True)
    (scratch / "job.json").write_text(json.dumps(job))
    environ = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1",  # GPTQModel compiles its kernels: a minute a checkpoint, the same numbers
        "GPTQMODEL_DISABLE_PACK_EXT": "1",  # else two minutes of compiling for a packer that loading does not use
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = scratch / "log.txt"
    with log.open("w") as sink:
        code = subprocess.run(
            [str(python), str(HERE / "check.py"), "--worker", str(scratch / "job.json")],
            env=environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
        ).returncode
    lines = pathlib.Path(job["result"]).read_text().splitlines() if os.path.exists(job["result"]) else []
    found = {row["name"]: row for row in map(json.loads, lines)}
    tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-4:])[-500:]
    for item in items:
        if item["name"] not in found:
            found[item["name"]] = {"error": f"the runtime's process ended with code {code}: {tail}", "seconds": 0.0}
        elif options.verbose and "error" in found[item["name"]]:
            say(log.read_text(errors="replace"))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="ct,gptq,awq,vllm", help="groups to run: ct, gptq, awq, vllm (default: all)")
    parser.add_argument("--case", action="append", help="only the cases of this name")
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "src" / "demo" / "model")
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "src" / "demo" / "evaluation.txt")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--artifacts", type=pathlib.Path, help="keep the artifacts here, and use again what is there")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / ".venv" / "runtimes")
    parser.add_argument("--json", type=pathlib.Path, help="write all measurements here too")
    parser.add_argument("--verbose", action="store_true", help="show a failing runtime's whole output")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)

    groups = options.only.split(",")
    if unknown := set(groups) - {c["group"] for c in CASES}:
        parser.error(f"--only does not know {', '.join(sorted(unknown))}")
    cases = [c for c in CASES if c["group"] in groups and (not options.case or c["name"] in options.case)]
    if not cases:
        parser.error("nothing to run")
    for path in (options.quantc, options.model, options.text):
        if not path.exists():
            parser.error(f"{path} does not exist")
    options.quantc, options.model, options.text = (p.resolve() for p in (options.quantc, options.model, options.text))
    sys.path.insert(0, str(HERE))
    import cpu_torch

    scratch = pathlib.Path(tempfile.mkdtemp(prefix="quantc-runtimes-"))
    folder = (options.artifacts or scratch / "artifacts").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started, rows, failures = time.time(), [], 0
    try:
        ready = []
        for item in cases:
            try:
                ready.append(artifact(options, item, folder))
            except (RuntimeError, ValueError, KeyError, OSError) as error:
                rows.append((item, {"error": f"quantc: {error}", "seconds": 0.0}))
        say(f"{len(ready)} of {len(cases)} artifacts written after {time.time() - started:.0f} s")
        jobs = []
        if items := [i for i in ready if i["runtime"] == "transformers"]:
            jobs.append(("transformers", ["gptqmodel"] if {i["group"] for i in items} & {"gptq", "awq"} else [], items))
        jobs += [("vllm", [], [i]) for i in ready if i["runtime"] == "vllm"]  # an engine does not leave its process
        for runtime, extras, items in jobs:
            wanted = [HERE / f"requirements-{name}.txt" for name in [runtime, *extras]]
            python = cpu_torch.environment(options.venv.resolve() / runtime, TORCH[runtime], wanted)
            found = run_job(python, options, items, scratch)
            rows += [(item, found[item["name"]]) for item in items]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    print("| artifact | runtime | rounds to | max abs Δ | relative Δ | KL | top-1 | perplexity: runtime | quantc eval | verdict |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for item, found in rows:
        reason = verdict(item, found)
        failures += bool(reason)
        head = f"| {item['name']} | {item['runtime']} | {item['dtype']} |"
        if "error" in found:
            print(f"{head} | | | | | | **failed** |")
        else:
            numbers = f"{found['max_abs']:.1e} | {found['relative']:.1e} | {found['kl']:.1e} | {100 * found['top1']:.2f} % |"
            print(f"{head} {numbers} {found['perplexity']:.4f} | {item['quantc_perplexity']:.4f} | {'**failed**' if reason else 'agrees'} |")
        if reason:
            say(f"FAILED {item['name']} in {item['runtime']}: {reason}")
    if options.json:
        options.json.write_text(json.dumps([{**item, **found} for item, found in rows], indent=1))
    say(f"{time.time() - started:.0f} s")
    print(f"\n{len(rows) - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
