#!/usr/bin/env python3
"""Time quantc's GPTQ beside llm-compressor's and GPTQModel's: one run, one machine, the same threads, the same text.

    python3 benches/peers/run.py --model MODEL                       # quantc three times, each peer once
    python3 benches/peers/run.py --model MODEL --only quantc         # no peers, nothing to install but torch for the peak
    python3 benches/peers/run.py --model MODEL --quality TEXT        # and evaluate what each wrote, with `quantc eval`
    python3 benches/peers/run.py --model MODEL --device cuda --threads 16 --samples 128 --seq-len 2048 --calibration TEXT

MODEL is a Hugging Face directory of the Llama family. All three quantize its decoder's linears to 4 bits, symmetric, groups
of 64, from the same 64 pieces of 512 tokens. The peers are installed from PyPI into --venv (pinned; see README.md) and run
with their own defaults. Each job is a process of its own, held to --threads cores. With --device cuda all of them take the
first GPU, and torch is installed with CUDA (several GB). The table on stdout is markdown.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNTIMES = ROOT / "tests" / "runtimes"
# Who is measured: the venv, its torch, its requirements. GPTQModel's venv is that of the runtime checks.
PEERS = {
    "GPTQModel": ("transformers", "2.15.0", [RUNTIMES / "requirements-transformers.txt", RUNTIMES / "requirements-gptqmodel.txt"]),
    "llm-compressor": ("llmcompressor", "2.14.0", [HERE / "requirements-llmcompressor.txt"]),
}


def say(text):
    print(text, file=sys.stderr, flush=True)


def measured(command, environ, log):
    """Run a command: its wall seconds, its CPU seconds, and its peak resident memory in bytes."""
    with open(log, "w") as sink:
        started = time.perf_counter()
        # In the log's folder: GPTQModel writes logs into the folder that it is started in.
        child = subprocess.Popen(
            command, env=environ, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = "\n".join(pathlib.Path(log).read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {child.returncode}:\n{tail}")
    return {"process": seconds, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}


def work(config, samples, length):
    """Floating-point operations that no GPTQ of this model can do without, by part.

    One forward of the decoder's linears, causal attention (half the square), and the lower half of each Hessian: q, k and v
    read one input, so do gate and up.
    """
    hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv, q = (config.get("num_key_value_heads") or heads) * head, heads * head
    tokens = samples * length
    weights = layers * (hidden * (q + 2 * kv) + q * hidden + 3 * hidden * mlp)
    return {
        "forward": 2 * weights * tokens,
        "attention": 2 * layers * q * length * tokens,
        "Hessians": layers * (2 * hidden**2 + q**2 + mlp**2) * tokens,
    }


def quantc_job(options, folder, environ):
    """quantc, --repeat times: the run of median time."""
    runs = []
    for _ in range(options.repeat):
        out = folder / "quantc"
        shutil.rmtree(out, ignore_errors=True)
        command = [options.quantc, "quantize", options.model, "-o", out, "--format", "compressed-tensors", "--method", "gptq"]
        command += ["--refine", options.refine]
        command += ["--scheme", f"W{options.bits}A16", "--group-size", options.group_size]
        command += ["--calibration", folder / "calibration.jsonl", "--samples", options.samples, "--seq-len", options.seq_len]
        command += ["--threads", options.threads, "--device", options.device, "--verify-text", "none", "--quiet"]
        run = measured(list(map(str, command)), environ, folder / "quantc.log")
        say(f"quantc: {run['process']:.1f} s")
        runs.append(run)
    runs.sort(key=lambda run: run["process"])
    chosen = runs[(len(runs) - 1) // 2]
    version = subprocess.run([options.quantc, "--version"], capture_output=True, text=True).stdout.split()
    # quantc does nothing but the job: the process is the job.
    return {**chosen, "process": statistics.median(run["process"] for run in runs), "job": None, "version": version[-1] if version else ""}


def peer_job(name, options, folder, environ, python):
    """One peer, once."""
    key = name.replace("-", "").lower()
    out, result = folder / key, folder / f"{key}.json"
    shutil.rmtree(out, ignore_errors=True)
    job = {"model": str(options.model), "out": str(out), "tokens": str(folder / "tokens.json"), "result": str(result)}
    job |= {"bits": options.bits, "group_size": options.group_size, "threads": options.threads, "batch": options.peer_batch}
    job |= {"device": options.device}
    (folder / f"{key}.job.json").write_text(json.dumps(job))
    run = measured([str(python), str(HERE / f"job_{key}.py"), str(folder / f"{key}.job.json")], environ, folder / f"{key}.log")
    run |= json.loads(result.read_text())
    say(f"{name}: {run['job']:.1f} s, {run['process']:.1f} s with start, loading and saving")
    return run


def quality(options, path):
    """quantc's judgement of an artifact beside the original."""
    command = [options.quantc, "eval", path, "--reference", options.model, "--text", options.quality, "--json"]
    command += ["--context", options.quality_context, "--windows", options.quality_windows]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        say(f"quantc eval {path}: {done.stderr.strip()}")
        return None
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    parser.add_argument("--calibration", type=pathlib.Path, default=ROOT / "calibration" / "presets" / "mixed.txt", help="plain text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the first GPU, for all three")
    parser.add_argument("--repeat", type=int, default=3, help="runs of quantc; the median counts")
    parser.add_argument("--peer-batch", type=int, default=1, help="sequences a batch for the peers (1 is their own default)")
    parser.add_argument("--refine", choices=["true", "false"], default="true", help="whether quantc refines after the sweep; no peer does")
    parser.add_argument("--only", default="quantc,GPTQModel,llm-compressor")
    parser.add_argument("--quality", type=pathlib.Path, help="evaluate each artifact on this text")
    parser.add_argument("--quality-context", type=int, default=512)
    parser.add_argument("--quality-windows", type=int, default=40)
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / ".venv" / "runtimes")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target" / "peers", help="artifacts, logs and results.json")
    options = parser.parse_args()
    who = options.only.split(",")
    if unknown := set(who) - {"quantc", *PEERS}:
        parser.error(f"--only does not know {', '.join(sorted(unknown))}")
    for path in [options.model / "config.json", options.calibration, *([options.quality] if options.quality else [])]:
        if not path.exists():
            parser.error(f"{path} does not exist")
    if ("quantc" in who or options.quality) and not options.quantc.exists():
        parser.error(f"{options.quantc} does not exist: cargo build --release")
    options.model, options.quantc, options.calibration = (p.resolve() for p in (options.model, options.quantc, options.calibration))
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    sys.path.insert(0, str(RUNTIMES))
    import cpu_torch

    # Everything is installed before anything is timed.
    needed = [name for name in PEERS if name in who] or ["GPTQModel"]
    pythons = {}
    for name in needed:
        venv, torch, requirements = PEERS[name]
        if who == ["quantc"]:
            requirements = requirements[:1]
        gpu = options.device == "cuda"
        pythons[name] = cpu_torch.environment(options.venv.resolve() / f"{venv}{'-cuda' if gpu else ''}", torch, requirements, gpu)

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # children inherit it
    if len(os.sched_getaffinity(0)) < options.threads:
        parser.error(f"this machine lends {len(os.sched_getaffinity(0))} cores, --threads asks for {options.threads}")
    threads = {f"{name}_NUM_THREADS": str(options.threads) for name in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    environ = os.environ | threads | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1",
        "GPTQMODEL_CPU_WORKERS": "2",  # its default on two cores is one, and its start-up then waits for a second for ever
        "GPTQMODEL_DISABLE_PACK_EXT": "1",  # else it compiles a packer for two minutes
    }
    if options.device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    config = json.loads((options.model / "config.json").read_text())
    prepare = [pythons[needed[0]], HERE / "prepare.py", options.model, options.calibration, options.samples, options.seq_len, folder, options.threads, options.device]
    measured(list(map(str, prepare)), environ, folder / "prepare.log")
    found = json.loads((folder / "peak.json").read_text())
    peak, device_name = found["gflops"], found["device"]

    results = {}
    for name in ["quantc", *needed]:
        if name in who:
            job = quantc_job(options, folder, environ) if name == "quantc" else peer_job(name, options, folder, environ, pythons[name])
            results[name] = job
            (folder / "results.json").write_text(json.dumps(results, indent=1))  # now: a peer may take an hour
    if options.quality:
        for name, run in results.items():
            run["quality"] = quality(options, folder / name.replace("-", "").lower())

    parts = work(config, options.samples, options.seq_len)
    total = sum(parts.values())
    floor = total / peak / 1e9
    judged = options.quality is not None
    print(f"GPTQ W{options.bits}A16 g{options.group_size} of {options.model.name}, {options.samples} × {options.seq_len} tokens, "
          f"{options.threads} threads, {cpu_name()}{', ' + device_name if device_name else ''}.\n")
    print("| | version | job, s | whole process, s | CPU, s | peak memory, MB | time to quantc's | memory to quantc's |" + (" perplexity | KL | top-1 |" if judged else ""))
    print("|---|---|---|---|---|---|---|---|" + ("---|---|---|" if judged else ""))
    base = results.get("quantc")
    for name, run in results.items():
        job = run["job"] or run["process"]
        row = [name, run["version"], f"{job:.1f}", f"{run['process']:.1f}", f"{run['cpu']:.1f}", f"{run['memory'] / 1e6:.0f}"]
        row += [f"{job / base['process']:.1f} ×", f"{run['memory'] / base['memory']:.1f} ×"] if base else ["", ""]
        if judged:
            q = run.get("quality")
            row += [f"{q['perplexity']:.3f}", f"{q['kld_mean']:.4f} ± {q['kld_stderr']:.4f}", f"{100 * q['top1_agreement']:.1f} %"] if q else ["–"] * 3
        print("| " + " | ".join(row) + " |")
    detail = " + ".join(f"{name} {value / 1e12:.2f}" for name, value in parts.items())
    product = "bfloat16 product of 8192" if options.device == "cuda" else "float32 product of 2048"
    print(f"\nThe floor: {detail} = {total / 1e12:.2f} TFLOP, {floor:.1f} s at the {peak:.0f} GFLOP/s that a {product} "
          f"reaches here (torch, best of 5).")
    if base:
        print(f"quantc runs at {total / base['process'] / 1e9:.0f} GFLOP/s over its whole process: {100 * floor / base['process']:.0f} % of that peak.")
    print(f"Job: for the peers the call that quantizes, loading and saving left out; for quantc the whole process (median of {options.repeat}).")
    results["machine"] = {"cpu": cpu_name(), "device": device_name, "peak_gflops": peak, "work": parts}
    (folder / "results.json").write_text(json.dumps(results, indent=1))


def cpu_name():
    """What the machine calls its processor."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
