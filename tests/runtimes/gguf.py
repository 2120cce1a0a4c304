#!/usr/bin/env python3
"""Load the GGUF files that quantc writes in llama.cpp, and compare with quantc's own reading of them.

    python3 tests/runtimes/gguf.py                                  # four mixes of the built-in model: a minute
    python3 tests/runtimes/gguf.py --all                            # every mix
    python3 tests/runtimes/gguf.py --all --model DIR --llama BIN --text TEXT --windows 16
    python3 tests/runtimes/gguf.py --families                       # the tiny checkpoints of every family (gguf_families.py)
    python3 tests/runtimes/gguf.py --families --types Q8_0,Q4_0     # the same, quantized: their perplexity
    python3 tests/runtimes/gguf.py --heads                          # tiny models that make embeddings

For each mix `quantc quantize` writes a file; then

- llama.cpp loads it, and makes the same tokens of the evaluation text, and of a line of oddities, as the model's own
  tokenizer.json (by Hugging Face's tokenizers);
- its perplexity by llama.cpp's protocol (windows of --context tokens, the second half of each scored) is within 0.5 % of
  what `quantc eval --protocol llama.cpp` prints for the file, over as many tokens;
- when llama.cpp first unpacks the file to F32 and runs in F32 throughout, it is within 0.01 % of what the same prints with
  `--activations exact`;
- the text it writes greedily costs the unquantized model (a file of F32, in the same runtime) at most one nat a token more
  than the held-out text does. Ternary mixes are excused: they are for models that were trained for them.

llama.cpp rounds the inputs of quantized linears to 8 bits and its KV cache to f16, and so does `eval` by this protocol. The
order of summation then decides some of the roundings, and those more of the next layer's: hence 0.5 % (--tolerance).
Unpacked, nothing of that is left, and a single wrong scale shows.

llama.cpp comes prebuilt from npm (see llama.py), numpy and tokenizers from PyPI, both into --cache. --libraries names a folder
with another libllama, --llama one with llama-perplexity, which is then run too. The table on stdout is markdown; --docs FILE puts it between the marks that
FILE has for it. Exit code 0: all agree; 1: some file failed; 2: could not start.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEMO = ROOT / "src" / "demo" / "model"
QUICK = ["Q4_0", "Q4_K_M", "Q6_K", "IQ4_NL"]
FLOATS = ["F32", "F16", "BF16"]
TERNARY = ["TQ1_0", "TQ2_0"]
ALL = [
    *FLOATS, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", *TERNARY, "MXFP4_MOE",
]  # fmt: skip
ODD = "  Two  spaces,\ttabs\n\n\nand 1234567 digits; don't, WE'LL — naïve café, 你好世界, Привет, 🙂🏽\r\n\u200b{[()]} \u00a0end "


def say(text):
    print(text, file=sys.stderr, flush=True)


def worker(path):
    """What llama.cpp makes of one file: tokens, perplexity, a text; and how likely it finds texts of others."""
    import numpy
    from tokenizers import Tokenizer

    import llama

    job = json.loads(pathlib.Path(path).read_text())
    library = llama.load(job["libraries"])
    runtime = llama.Runtime(library, job["file"], job["context"], job["threads"])
    own = Tokenizer.from_file(str(pathlib.Path(job["model"], "tokenizer.json")))
    text = pathlib.Path(job["text"]).read_text(encoding="utf-8")
    result = {"vocabulary": runtime.vocabulary, "bos": runtime.bos, "differ": ""}
    for name, sample in [("the text", text), ("the odd line", ODD)]:
        theirs, expected = runtime.tokenize(sample), own.encode(sample, add_special_tokens=False).ids
        if theirs != expected:
            at = next((i for i, (a, b) in enumerate(zip(theirs, expected)) if a != b), min(len(theirs), len(expected)))
            result["differ"] = f"tokens of {name} differ from token {at}: {theirs[at : at + 4]}, expected {expected[at : at + 4]}"
            break
    ids, context, first = runtime.tokenize(text, special=True), job["context"], job["context"] // 2
    windows = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)[: job["windows"]]]
    for window in windows:
        if runtime.bos is not None:
            window[0] = runtime.bos
    losses = numpy.concatenate([runtime.losses(window, first) for window in windows])
    result |= {"tokens": len(losses), "perplexity": math.exp(losses.mean())}
    if job["unpacked"]:
        llama.dequantize(library, job["file"], job["unpacked"])
        unpacked = llama.Runtime(library, job["unpacked"], context, job["threads"], exact=True, flash=job["flash"])
        result["unpacked"] = math.exp(numpy.concatenate([unpacked.losses(window, first) for window in windows]).mean())
    prompt = runtime.tokenize(job["prompt"], special=True)
    result["generated"] = runtime.greedy(prompt, job["generate"])
    result["text"] = job["prompt"] + runtime.text(result["generated"])
    result["likely"] = {
        name: float(runtime.losses(prompt + ids, len(prompt) - 1).mean()) for name, ids in job["judge"].items() if ids
    }
    pathlib.Path(job["result"]).write_text(json.dumps(result))


def command(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode} from `{' '.join(map(str, words))}`: {done.stderr.strip()[-600:]}")
    return done


def in_llama(options, python, model, file, scratch, judge):
    """The worker's result for one file, in a process of its own: llama.cpp may end it."""
    result, log = scratch / "result.json", scratch / "log.txt"
    result.unlink(missing_ok=True)
    job = {"libraries": str(options.libraries), "file": str(file), "model": str(model), "text": str(options.text)}
    job |= {"context": options.context, "windows": options.windows, "threads": options.threads, "prompt": options.prompt}
    unpacked = "" if judge else str(scratch / "unpacked.gguf")
    job |= {"flash": getattr(options, "flash", False), "generate": options.generate, "judge": judge, "unpacked": unpacked, "result": str(result)}
    (scratch / "job.json").write_text(json.dumps(job))
    with log.open("w") as sink:
        words = [str(python), str(HERE / "gguf.py"), "--worker", str(scratch / "job.json")]
        code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT).returncode
    if code or not result.exists():
        tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-4:])[-600:]
        raise RuntimeError(f"the runtime's process ended with code {code}: {tail}")
    return json.loads(result.read_text())


def llama_perplexity(options, file):
    """What llama.cpp's own tool prints for the file."""
    words = [options.llama / "llama-perplexity", "-m", file, "-f", options.text, "-c", options.context]
    words += ["--chunks", options.windows, "-t", options.threads]
    for _ in range(5):  # it logs from a thread, and may end before the last line is out
        done = command(*words)
        if found := re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr):
            return float(found[1])
    raise RuntimeError(f"llama-perplexity prints no estimate for {file}")


def examine(options, python, model, mix, folder, scratch):
    """Write one file, and all measurements of it but the judgement of its text."""
    file = folder / f"{mix}.gguf"
    if not file.exists():
        flags = ["--method", "rtn"] if mix in FLOATS or options.method == "rtn" else ["--method", options.method, "--samples", 16, "--seq-len", 256]
        words = [options.quantc, "quantize", model, "-o", file, "--format", "gguf", "--scheme", mix]
        command(*words, *flags, "--verify-text", "none", "--quiet")
    found = in_llama(options, python, model, file, scratch, {})
    words = [options.quantc, "eval", file, "--text", options.text, "--context", options.context, "--windows", options.windows]
    words += ["--protocol", "llama.cpp", "--json", "--quiet"]
    judged, exact = json.loads(command(*words).stdout), json.loads(command(*words, "--activations", "exact").stdout)
    found |= {"bytes": file.stat().st_size, "quantc": judged["perplexity"], "quantc_tokens": judged["tokens"]}
    found |= {"exact": exact["perplexity"]}
    if options.llama:
        found["tool"] = llama_perplexity(options, file)
    return found


def verdict(options, mix, found, likely, text_loss):
    """Why the file fails, or nothing."""
    if "error" in found:
        return found["error"]
    checks = [
        (not found["differ"], found["differ"]),
        (found["tokens"] == found["quantc_tokens"], f"{found['tokens']} tokens scored in llama.cpp, {found['quantc_tokens']} by quantc eval"),
    ]
    for key, where, own, tolerance in [
        ("perplexity", "in llama.cpp", "quantc", options.tolerance),
        ("unpacked", "in llama.cpp once unpacked", "exact", options.exact_tolerance),
        ("tool", "by llama-perplexity", "quantc", options.tolerance),
    ]:
        if key in found:
            near = abs(found[key] / found[own] - 1) <= tolerance
            checks.append((near, f"perplexity {found[key]:.4f} {where}, {found[own]:.4f} by quantc eval"))
    if mix not in TERNARY:
        checks.append((bool(found["generated"]), "nothing was generated"))
        if likely is not None and text_loss is not None:
            checks.append((likely <= text_loss + 1, f"its text costs the original {likely:.2f} nats a token, held-out text {text_loss:.2f}"))
        else:
            checks.append((False, "the unquantized model could not judge its text"))
    # A NaN fails every comparison above, so it cannot pass here.
    return "; ".join(message for passed, message in checks if not passed)


def check_model(options, python, model, mixes, folder, scratch):
    """Rows of one model: (mix, measurements, nats a token of its text to the original, why it fails)."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for mix in ["F32", *[mix for mix in mixes if mix != "F32"]]:
        started = time.time()
        try:
            found[mix] = examine(options, python, model, mix, folder, scratch)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            found[mix] = {"error": str(error)}
        say(f"{model.name} {mix}: {found[mix].get('error') or found[mix]['perplexity']} ({time.time() - started:.0f} s)")
    original, likely, text_loss = found["F32"], {}, None
    if "error" not in original:
        text_loss = math.log(original["perplexity"])
        judge = {mix: one["generated"] for mix, one in found.items() if "error" not in one}
        likely = in_llama(options, python, model, folder / "F32.gguf", scratch, judge)["likely"]
    return [(mix, found[mix], likely.get(mix), verdict(options, mix, found[mix], likely.get(mix), text_loss)) for mix in mixes]


def table(options, model, rows):
    tool = " llama-perplexity |" if options.llama else ""
    name = "built-in model" if model == DEMO else model.name
    lines = [f"| {name} | bytes | tokens | perplexity: libllama |{tool} quantc eval | Δ | unpacked | exact | Δ | its text, nats | verdict |"]
    lines.append("|---|---|---|---|" + ("---|" if tool else "") + "---|---|---|---|---|---|---|")
    for mix, found, likely, reason in rows:
        if "error" in found:
            lines.append(f"| {mix} | | | |" + (" |" if tool else "") + " | | | | | | **failed** |")
            continue
        line = f"| {mix} | {found['bytes']:,} | {found['tokens']} | {found['perplexity']:.4f} |"
        line += f" {found['tool']:.4f} |" if tool else ""
        for theirs, own, shown in [("perplexity", "quantc", ""), ("unpacked", "exact", f" {found['unpacked']:.4f} |")]:
            line += f"{shown} {found[own]:.4f} | {100 * (found[theirs] / found[own] - 1):+.3f} % |"
        line += f" {likely:.2f} |" if likely is not None else " |"
        lines.append(line + (" **failed** |" if reason else " agrees |"))
    for mix, found, *_ in rows:
        if mix in ("F32", "Q4_0", "Q4_K_M") and "error" not in found:
            lines += ["" if lines[-1].startswith("|") else ">", f"> {mix}: " + " ".join(found["text"].split())]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every mix, instead of " + ", ".join(QUICK))
    parser.add_argument("--types", help="these mixes, divided by commas")
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    parser.add_argument("--model", type=pathlib.Path, action="append", help="a Hugging Face directory; repeatable [default: the built-in model]")
    parser.add_argument("--method", default="gptq", help="rtn or gptq, from 16 samples of 256 tokens [default: gptq]")
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "src" / "demo" / "evaluation.txt")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--tolerance", type=float, default=0.005, help="of perplexity, in llama.cpp as it runs the file")
    parser.add_argument("--exact-tolerance", type=float, default=1e-4, help="of perplexity, once the file is unpacked to F32")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--generate", type=int, default=48, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama", type=pathlib.Path, help="a folder with llama-perplexity, to run it too")
    parser.add_argument("--libraries", type=pathlib.Path, help="a folder with another libllama, of the same interface, as of newer source")
    parser.add_argument("--artifacts", type=pathlib.Path, help="keep the files here, and use again what is there")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / ".venv" / "runtimes")
    parser.add_argument("--docs", type=pathlib.Path, help="put the tables into this file, between its marks")
    parser.add_argument("--json", type=pathlib.Path, help="write all measurements here too")
    parser.add_argument("--families", action="store_true", help="the logits of every family's tiny checkpoints instead")
    parser.add_argument("--heads", action="store_true", help="the embeddings of models that make such instead")
    parser.add_argument("--only", help="with --families: these checkpoints, divided by commas")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if options.worker:
        try:
            return worker(options.worker)
        except RuntimeError as error:
            return str(error)
    import llama

    mixes = options.types.split(",") if options.types else ALL if options.all else QUICK
    models = [path.resolve() for path in options.model or [DEMO]]
    needed = [options.quantc, options.text, *[model / "tokenizer.json" for model in models]]
    for path in needed + ([options.llama / "llama-perplexity"] if options.llama else []):
        if not path.exists():
            parser.error(f"{path} does not exist")
    options.quantc, options.text = options.quantc.resolve(), options.text.resolve()
    options.cache.mkdir(parents=True, exist_ok=True)
    options.libraries = options.libraries.resolve() if options.libraries else llama.libraries(options.cache.resolve())
    python = llama.environment(options.cache.resolve() / "llama")

    started, tables, everything, failures = time.time(), [], [], 0
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="quantc-gguf-"))
    try:
        if options.families or options.heads:
            import gguf_families

            return int(gguf_families.check(options, python, scratch) > 0)
        for model in models:
            folder = (options.artifacts or scratch / "files").resolve() / model.name
            rows = check_model(options, python, model, mixes, folder, scratch)
            tables.append(table(options, model, rows))
            print(tables[-1] + "\n", flush=True)
            for mix, found, likely, reason in rows:
                failures += bool(reason)
                everything.append({"model": model.name, "mix": mix, "likely": likely, "reason": reason, **found})
                if reason:
                    say(f"FAILED {model.name} {mix}: {reason}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    if options.docs:
        before, begin, rest = options.docs.read_text().partition("<!-- gguf.py begins -->\n")
        _, end, after = rest.partition("<!-- gguf.py ends -->")
        if not end:
            parser.error(f"{options.docs} has no marks <!-- gguf.py begins --> and <!-- gguf.py ends -->")
        options.docs.write_text(before + begin + "\n" + "\n\n".join(tables) + "\n\n" + end + after)
    say(f"{time.time() - started:.0f} s")
    print(f"{len(everything) - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
