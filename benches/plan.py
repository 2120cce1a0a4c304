#!/usr/bin/env python3
"""Says how near the time that `quantc plan` names is to the time that a run then takes, and how near the time that the run itself names once
a tenth of a stage is done: the largest difference between the stage's end as it was told and as it came, as a share of the stage.

    python3 benches/plan.py --quantc target/release/quantc --model MODEL        six runs of one model; nothing else should run beside
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
import time

RUNS = {
    "W4A16, GPTQ": "--group-size 64 --samples 16 --seq-len 512 --verify-windows 1",
    "W4A16, AWQ": "--method awq --group-size 64 --samples 8 --seq-len 512 --verify-text none",
    "W4A16, RTN": "--method rtn --group-size 64 --verify-windows 1",
    "Q4_K_M, GPTQ": "--format gguf --scheme Q4_K_M --samples 16 --seq-len 512 --verify-windows 1",
    "Q4_K_M, RTN": "--format gguf --scheme Q4_K_M --method rtn --verify-windows 1",
    "MLX, 8 bits, RTN": "--format mlx --bits 8 --group-size 64 --method rtn --verify-windows 1",
}


# Seconds of the shortest stage that is looked at: of shorter ones nobody reads the time that is left.
LONG = 8


def run(words):
    """Runs a command; the largest error of the time left, as a share of its stage, or None where no stage was long."""
    stages = {}
    process = subprocess.Popen([*words, "--events"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        event, now = json.loads(line), time.monotonic()
        stage = stages.setdefault(event.get("stage"), {"begin": now, "told": []})
        stage["end"] = now
        if event["event"] == "progress" and event["done"] >= 0.1 and event["seconds_left"] is not None:
            stage["told"].append(now + event["seconds_left"])
    if process.wait():
        raise SystemExit(f"{words}: exit code {process.returncode}")
    long = [stage for name, stage in stages.items() if name and stage["end"] - stage["begin"] >= LONG]
    wrong = [abs(told - stage["end"]) / (stage["end"] - stage["begin"]) for stage in long for told in stage["told"]]
    return max(wrong, default=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantc", required=True)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    print("| run | planned, s | taken, s | ratio | time left, error |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as room:
        for name, flags in RUNS.items():
            words = flags.split()
            planned = subprocess.run([args.quantc, "plan", args.model, *words, "--json"], check=True, capture_output=True)
            planned = json.loads(planned.stdout)["seconds"]["total"]
            out = pathlib.Path(room) / ("out.gguf" if "gguf" in words else "out")
            wrong = run([args.quantc, "quantize", args.model, "-o", out, *words, "--force"])
            report = out / "report.json" if out.is_dir() else out.with_name(out.name + ".report.json")
            taken = json.loads(report.read_text())["seconds"]["total"]
            wrong = "" if wrong is None else f"{100 * wrong:.0f} %"
            print(f"| {name} | {planned:.1f} | {taken:.1f} | {planned / taken:.2f} | {wrong} |", flush=True)


if __name__ == "__main__":
    main()
